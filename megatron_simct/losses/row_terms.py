"""What each interface makes of a row: its loss, and how the row's gradient is weighted.

Everything here is about a few numbers a row or a label, equal on every rank. What spans the vocabulary (sums before,
gradients after) is in two_pass.py and divergences.py; the interfaces differ only here.

With z the logits of a segment's first row, LSE their log-sum-exp over the real vocabulary and tau the temperature:

`compare_over_u`  q is a softmax over U, the shared tokens and, in a row of a unit, the unit:

    paper           unit score u = mean of the labels' log-probabilities       (SimCT, arXiv:2605.07711, Eq. 6-9)
    sum             u = their sum
    code, code_gh   u = mean of the labels' raw logits, beside raw logits of the shared tokens (the authors' code)
    strict          no units

  The scores of a row are (z_c - LSE) / tau and u / tau. The softmax does not see a constant, so LSE is added to all of
  them: z_c / tau and (u + LSE) / tau; then the maxima and sums over shared tokens do not wait for LSE. With g the
  gradient with respect to the scores, the unit's share h = g_u / tau goes through each of its k labels, h / k (onehot -
  softmax) (`sum`: h), and comes back through the added LSE, + h softmax at the first row. Raw logits have neither.

`binary_events`     alm: one event a segment, "the model says these bytes", from the labels' log-probabilities alone.

`cross_entropy`     sft.

Shapes: `A` shared rows in the plan's order, `S` all segments, `N` student labels, `M` teacher labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_simct.losses.divergences import (
    Norms,
    factor_of,
    known_gradient,
    known_sums,
    mean_of_derivative,
    shared_sums,
    value_of,
)
from megatron_simct.losses.two_pass import GradientWeights, Statistics, TwoPass
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY

ALM_FLOOR = 1e-6
"""Nats: the least surprise of a segment that `alm` divides by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInputs:
    """What a row is made of, beside the statistics."""

    segments: torch.Tensor
    """int64 [S, 4], both sides ascending."""
    chosen: torch.Tensor
    """int64 [A]: the segment of each shared row; for interfaces without shared rows, of each used segment."""
    has_unit: torch.Tensor
    """bool [A]"""
    weight: torch.Tensor
    """[A]: what the row's loss is multiplied by; 0 drops it."""
    teacher_own: torch.Tensor
    """[M], raw logits of the teacher labels."""
    teacher_lse: torch.Tensor
    """[M]"""

    @property
    def sides(self) -> tuple[torch.Tensor, ...]:
        """[A] each: teacher start and end, student start and end."""
        return self.segments[self.chosen].unbind(1)

    def mean(self, values: torch.Tensor, side: Literal["teacher", "student"]) -> torch.Tensor:
        """[N] or [M] -> [A]: the mean over the labels of each chosen segment."""
        column = 0 if side == "teacher" else 2
        return _segment_mean(values, self.segments[:, column], self.segments[:, column + 1])[self.chosen]

    def spread(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """[A] -> [N]: the chosen segment's value at each of its student labels, 0 elsewhere."""
        everywhere = values.new_zeros(len(self.segments)).index_copy(0, self.chosen, values)
        return spread(everywhere, self.segments[:, 2], self.segments[:, 3], count)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTerms:
    """The loss as terms, and the weights of its gradient."""

    row_loss: torch.Tensor
    """[A], weighted; 0 for dropped rows."""
    label_loss: torch.Tensor
    """[N], of `sft`; zero for the others."""
    dropped: torch.Tensor
    """bool [A]: rows of weight 0, or dropped for their low mass."""
    student_mass: torch.Tensor
    """[A]: the student's probability of the shared tokens at the first row; 0 without shared rows."""
    teacher_mass: torch.Tensor
    """[A]"""
    weights: GradientWeights


def compare_over_u(
    passes: TwoPass,
    stats: Statistics,
    rows: RowInputs,
    *,
    unit_score: Literal["mean", "sum", "raw"],
    divergence: str,
    beta: float,
    temperature: float,
    min_teacher_mass: float,
) -> RowTerms:
    """q = softmax over the shared tokens and the unit. The special column, if any, is the one that the unit replaces.

    min_teacher_mass: drop rows where the teacher's probability of U is lower: min(1, mass of the shared tokens plus, in
    a row of a unit, e^(mean log-probability of the unit)).
    """
    starts_t, _, starts_s, ends_s = rows.sides
    lengths = ends_s - starts_s
    log_q_labels = rows.teacher_own - rows.teacher_lse
    unit_s, unit_t = _unit_scores(stats, rows, log_q_labels, unit_score, temperature)
    norms = Norms(
        student_max=stats.student_max,
        teacher_max=stats.teacher_max,
        student_log_z=torch.logaddexp(stats.sums["z_s"].log(), unit_s),
        teacher_log_z=torch.logaddexp(stats.sums["z_t"].log(), unit_t),
    )
    deficits = passes.deficits(norms) if divergence == "js" else []
    log_p, log_q = (unit_s - norms.student_log_z).unsqueeze(1), (unit_t - norms.teacher_log_z).unsqueeze(1)
    total = shared_sums(stats.sums, norms, deficits, divergence) + known_sums(log_p, log_q, divergence, beta)
    offset = mean_of_derivative(total, divergence, beta)

    student_mass, teacher_mass = _masses(stats, rows, temperature)
    weight = rows.weight
    if min_teacher_mass > 0:
        unit_mass = rows.mean(log_q_labels, "teacher").exp().masked_fill(~rows.has_unit, 0)
        weight = torch.where((teacher_mass + unit_mass).clamp(max=1) < min_teacher_mass, 0, weight)
    dropped = weight == 0
    scale = weight * factor_of(divergence, beta) / temperature

    of_unit = known_gradient(log_p, log_q, offset, divergence, beta).squeeze(1)
    of_unit = torch.where(rows.has_unit & ~dropped, of_unit * scale, 0)
    count = len(stats.log_probs)
    per_label = rows.spread(of_unit if unit_score == "sum" else of_unit / lengths, count)
    softmax_weight = torch.zeros_like(per_label)
    if unit_score != "raw":
        softmax_weight = (-per_label).index_add(0, starts_s, of_unit)
    # where, not a product with 0: what a dropped row computed may be anything.
    return RowTerms(
        row_loss=torch.where(dropped, 0, value_of(total, divergence, beta) * weight),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        weights=GradientWeights(
            norms=norms,
            offset=offset,
            scale=scale.masked_fill(dropped, 0),
            own_weight=per_label,
            softmax_weight=softmax_weight,
            own_outside_dense=unit_score == "raw",
        ),
    )


def _unit_scores(
    stats: Statistics, rows: RowInputs, log_q_labels: torch.Tensor, unit_score: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[A] each, student and teacher: the unit's score relative to the row's maximum; -inf in rows without a unit."""
    starts_t, ends_t, starts_s, ends_s = rows.sides
    if unit_score == "raw":
        student = rows.mean(stats.own, "student") / temperature - stats.student_max
        teacher = rows.mean(rows.teacher_own, "teacher") / temperature - stats.teacher_max
    else:
        log_p, log_q = rows.mean(stats.log_probs, "student"), rows.mean(log_q_labels, "teacher")
        if unit_score == "sum":
            log_p, log_q = log_p * (ends_s - starts_s), log_q * (ends_t - starts_t)
        # u + LSE relative to the row's maximum. LSE is label_max + log_sum: the two maxima cancel first.
        student = (log_p + stats.label_log_sum[starts_s]) / temperature
        student = student + (stats.label_max[starts_s] / temperature - stats.student_max)
        teacher = log_q / temperature + (rows.teacher_lse[starts_t] / temperature - stats.teacher_max)
    none = ~rows.has_unit
    return student.masked_fill(none, NEGATIVE_INFINITY), teacher.masked_fill(none, NEGATIVE_INFINITY)


def _masses(stats: Statistics, rows: RowInputs, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[A] each: the models' probability of the shared tokens, special columns included, at the first rows."""
    starts_t, _, starts_s, _ = rows.sides
    names = ("z_s", "z_t") if temperature == 1 else ("mass_s", "mass_t")
    log_sum, label_max = stats.label_log_sum[starts_s], stats.label_max[starts_s]
    student = stats.sums[names[0]] * (temperature * stats.student_max - label_max - log_sum).exp()
    teacher = stats.sums[names[1]] * (temperature * stats.teacher_max - rows.teacher_lse[starts_t]).exp()
    num_first = len(stats.special_student)
    if num_first and stats.special_student.shape[1]:
        first = slice(len(student) - num_first, None)
        special = stats.special_student - (label_max + log_sum)[first].unsqueeze(1)
        student[first] += special.exp().sum(1)
        special = stats.special_teacher - rows.teacher_lse[starts_t][first].unsqueeze(1)
        teacher[first] += special.exp().sum(1)
    return student, teacher


def binary_events(stats: Statistics, rows: RowInputs, *, temperature: float) -> RowTerms:
    """alm: with a and b the teacher's and the student's surprise at a segment (nats, at least ALM_FLOOR), the KL of the
    events "says it", of probability e^(-a / tau) and e^(-b / tau), times tau. At tau = inf: (b - a) - a log(b / a)."""
    starts_t, ends_t, starts_s, ends_s = rows.sides
    surprise_t = -rows.mean(rows.teacher_own - rows.teacher_lse, "teacher") * (ends_t - starts_t)
    surprise_s = -rows.mean(stats.log_probs, "student") * (ends_s - starts_s)
    a, b = surprise_t.clamp(min=ALM_FLOOR), surprise_s.clamp(min=ALM_FLOOR)
    if math.isinf(temperature):
        value = (b - a) - a * (b / a).log()
        slope = 1 - a / b
    else:
        p_t = (-a / temperature).exp()
        # log(1 - e^(-x / tau)) of both.
        log_not_t, log_not_s = (torch.log(-torch.expm1(-x / temperature)) for x in (a, b))
        value = p_t * (b - a) + temperature * (1 - p_t) * (log_not_t - log_not_s)
        slope = ((-a / temperature).exp() - (-b / temperature).exp()) / log_not_s.exp()
    dropped = rows.weight == 0
    slope = torch.where(dropped | (surprise_s < ALM_FLOOR), 0, slope * rows.weight)
    per_label = rows.spread(slope, len(stats.log_probs))
    return _without_shared_rows(
        row_loss=torch.where(dropped, 0, value * rows.weight),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        own_weight=-per_label,
        softmax_weight=per_label,
    )


def cross_entropy(stats: Statistics) -> RowTerms:
    """sft: -log p of every label."""
    one = torch.ones_like(stats.log_probs)
    return _without_shared_rows(
        row_loss=one[:0],
        label_loss=-stats.log_probs,
        dropped=one[:0].bool(),
        own_weight=-one,
        softmax_weight=one,
    )


def _without_shared_rows(
    *,
    row_loss: torch.Tensor,
    label_loss: torch.Tensor,
    dropped: torch.Tensor,
    own_weight: torch.Tensor,
    softmax_weight: torch.Tensor,
) -> RowTerms:
    nothing = row_loss[:0]
    norms = Norms(student_max=nothing, teacher_max=nothing, student_log_z=nothing, teacher_log_z=nothing)
    return RowTerms(
        row_loss=row_loss,
        label_loss=label_loss,
        dropped=dropped,
        student_mass=torch.zeros_like(row_loss),
        teacher_mass=torch.zeros_like(row_loss),
        weights=GradientWeights(
            norms=norms, offset=nothing, scale=nothing, own_weight=own_weight, softmax_weight=softmax_weight
        ),
    )


def _segment_mean(values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[n] -> [S]: the mean over [starts, ends), which ascend without overlap. Every rank adds in the same order."""
    borders = torch.stack([starts, ends], dim=1).flatten()
    offsets = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(values))])
    # Pieces 1, 3, 5, ... are the segments, those between them the gaps. `unsafe` leaves out a check on the host.
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)[1::2]
    return sums / (ends - starts)


def spread(values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, count: int) -> torch.Tensor:
    """[S] -> [count]: each segment's value at each of its labels, 0 outside of segments."""
    if len(values) == 0:
        return values.new_zeros(count)
    position = torch.arange(count, device=values.device)
    segment = (torch.searchsorted(starts.contiguous(), position, right=True) - 1).clamp(min=0)
    inside = (position >= starts[segment]) & (position < ends[segment])
    return torch.where(inside, values[segment], 0)
