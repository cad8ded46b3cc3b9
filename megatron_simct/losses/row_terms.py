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

`partition_of_events`  exact: no scores but probabilities of events that exclude each other, the rest being one of them.

`compare_top`       strict_topk: a softmax over the student's k likeliest shared tokens.

`sorted_distance`   uld: the k-th largest probability of one model against the k-th largest of the other.

`binary_events`     alm: one event a segment, "the model says these bytes", from the labels' log-probabilities alone.

`cross_entropy`     sft.

Shapes: `A` shared rows in the plan's order, `S` all segments, `N` student labels, `M` teacher labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from megatron_simct.losses.divergences import (
    Norms,
    derivative_of,
    factor_of,
    known_gradient,
    known_sums,
    mean_of_derivative,
    shared_sums,
    sum_of_derivative,
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
    weight = _kept_weight(rows, teacher_mass, log_q_labels, min_teacher_mass)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """Where the paths of a row's unit begin, as student ids; [A] each."""

    own: torch.Tensor
    """The student's first label."""
    teacher: torch.Tensor
    """The shared token that the teacher's first label is, or -1."""
    replaced: torch.Tensor
    """The shared token that spells the unit's bytes, or -1."""

    def special(self) -> torch.Tensor:
        """int64 [A, 3]: the three, each id once; -1 where it has been named by a later column or, the second, by the
        first."""
        teacher = torch.where((self.teacher == self.own) | (self.teacher == self.replaced), -1, self.teacher)
        return torch.stack([torch.where(self.own == self.replaced, -1, self.own), teacher, self.replaced], dim=1)


def partition_of_events(
    passes: TwoPass,
    stats: Statistics,
    rows: RowInputs,
    first: FirstTokens,
    *,
    divergence: str,
    beta: float,
    min_teacher_mass: float,
) -> RowTerms:
    """exact: every shared token, the unit, and the rest, each with its probability at the first row.

    With P the probability of the unit's path and w the shared token of the same bytes, the unit has P + p(w), or p(w)
    alone if the path begins with w; the shared token that the path begins with keeps p - P, what does not go on along
    the path. A model's rest is what is left of 1. All rows are dense: the rest depends on every logit.

    Special columns, those of `FirstTokens.special`: tokens whose probability is not their event's.

    The teacher's rest is only known as what its log-sum-exp leaves of 1, to some 1e-7 in float32: below that both rests
    are one floor. So in float32 forward_kl and js are only as good as that where one of the rests is as small.
    """
    starts_t, ends_t, starts_s, ends_s = rows.sides
    log_q_labels = rows.teacher_own - rows.teacher_lse
    label_max, log_sum = stats.label_max[starts_s], stats.label_log_sum[starts_s]
    norms = Norms(
        student_max=stats.student_max,
        teacher_max=stats.teacher_max,
        student_log_z=label_max - stats.student_max + log_sum,
        teacher_log_z=rows.teacher_lse[starts_t] - stats.teacher_max,
    )
    special_s = stats.special_student - (label_max + log_sum).unsqueeze(1)
    special_t = stats.special_teacher - rows.teacher_lse[starts_t].unsqueeze(1)
    path_s = _path(rows, stats.log_probs, starts_s, ends_s, "student")
    path_t = _path(rows, log_q_labels, starts_t, ends_t, "teacher")

    in_unit_s = (first.own == first.replaced) & rows.has_unit
    in_unit_t = (first.teacher == first.replaced) & (first.teacher >= 0) & rows.has_unit
    at_own_s = special_s[:, 0] > NEGATIVE_INFINITY
    at_own_t = at_own_s & (first.teacher == first.own)
    at_second_t = special_t[:, 1] > NEGATIVE_INFINITY
    ends_s_early = _log_not(path_s - stats.log_probs[starts_s])
    ends_t_early = _log_not(path_t - log_q_labels[starts_t])
    log_p = torch.stack(
        [
            torch.where(at_own_s, special_s[:, 0] + ends_s_early, special_s[:, 0]),
            special_s[:, 1],
            torch.where(in_unit_s, special_s[:, 2], torch.logaddexp(special_s[:, 2], path_s)),
        ],
        dim=1,
    )
    log_q = torch.stack(
        [
            torch.where(at_own_t, special_t[:, 0] + ends_t_early, special_t[:, 0]),
            torch.where(at_second_t, special_t[:, 1] + ends_t_early, special_t[:, 1]),
            torch.where(in_unit_t, special_t[:, 2], torch.logaddexp(special_t[:, 2], path_t)),
        ],
        dim=1,
    )
    deficits = passes.deficits(norms) if divergence == "js" else []
    many = shared_sums(stats.sums, norms, deficits, divergence)
    events = many + known_sums(log_p, log_q, divergence, beta)
    rest_p, rest_q = _log_rest(events.p).unsqueeze(1), _log_rest(events.q).unsqueeze(1)
    total = events + known_sums(rest_p, rest_q, divergence, beta)
    offset = derivative_of(rest_p, rest_q, divergence, beta).squeeze(1)

    student_mass, teacher_mass = _masses(stats, rows, 1.0)
    weight = _kept_weight(rows, teacher_mass, log_q_labels, min_teacher_mass)
    dropped = weight == 0
    scale = (weight * factor_of(divergence, beta)).masked_fill(dropped, 0)

    # where, not a product with 0: the derivatives of a dropped row may be infinite.
    relative = derivative_of(log_p, log_q, divergence, beta) - offset.unsqueeze(1)
    relative = torch.where(dropped.unsqueeze(1), 0, relative)
    # The path's probability goes to the unit, from the event that its first token is part of.
    from_event = torch.where(at_own_s, relative[:, 0], torch.where(in_unit_s, relative[:, 2], 0))
    of_path = torch.where(rows.has_unit, path_s.exp() * (relative[:, 2] - from_event), 0) * scale
    of_special = torch.where(special_s > NEGATIVE_INFINITY, special_s.exp() * relative, 0) * scale.unsqueeze(1)
    of_many = torch.where(dropped, 0, sum_of_derivative(many, divergence) - offset * many.p) * scale
    count = len(stats.log_probs)
    per_label = rows.spread(of_path, count)
    softmax_weight = (-per_label).index_add(0, starts_s, -(of_many + of_special.sum(1)))
    return RowTerms(
        row_loss=torch.where(dropped, 0, value_of(total, divergence, beta) * weight),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        weights=GradientWeights(
            norms=norms,
            offset=offset,
            scale=scale,
            own_weight=per_label,
            softmax_weight=softmax_weight,
            special_weight=of_special,
        ),
    )


def _path(
    rows: RowInputs,
    log_probs: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    side: Literal["teacher", "student"],
) -> torch.Tensor:
    """[A]: log-probability of all labels of the unit, -inf in rows without one."""
    return (rows.mean(log_probs, side) * (ends - starts)).masked_fill(~rows.has_unit, NEGATIVE_INFINITY)


def _log_not(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x), at least the logarithm of what the type rounds 1 by."""
    least = torch.finfo(log_probs.dtype).eps
    return torch.log(-torch.expm1(log_probs.clamp(max=-least)))


def _log_rest(total: torch.Tensor) -> torch.Tensor:
    """log(1 - total), likewise."""
    return torch.log((1 - total).clamp(min=torch.finfo(total.dtype).eps))


def compare_top(
    stats: Statistics,
    rows: RowInputs,
    *,
    divergence: str,
    beta: float,
    temperature: float,
    min_teacher_mass: float,
) -> RowTerms:
    """strict_topk: q = softmax over the top columns. The masses are those of the top columns."""
    starts_t, _, starts_s, _ = rows.sides
    top = stats.top
    assert top is not None, "the statistics were taken without topk"
    nothing = top.student == NEGATIVE_INFINITY
    log_p = torch.log_softmax(top.student / temperature, dim=1)
    log_q = torch.log_softmax(top.teacher.masked_fill(nothing, NEGATIVE_INFINITY) / temperature, dim=1)
    total = known_sums(log_p, log_q, divergence, beta)
    offset = mean_of_derivative(total, divergence, beta)
    log_sum = stats.label_max[starts_s] + stats.label_log_sum[starts_s]
    student_mass = (top.student - log_sum.unsqueeze(1)).exp().sum(1)
    teacher_mass = (top.teacher - rows.teacher_lse[starts_t].unsqueeze(1)).exp().masked_fill(nothing, 0).sum(1)
    weight = _kept_weight(rows, teacher_mass, rows.teacher_own - rows.teacher_lse, min_teacher_mass)
    dropped = weight == 0
    scale = weight * factor_of(divergence, beta) / temperature
    gradient = known_gradient(log_p, log_q, offset, divergence, beta) * scale.unsqueeze(1)
    return _without_sums(
        row_loss=torch.where(dropped, 0, value_of(total, divergence, beta) * weight),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        own_weight=torch.zeros_like(stats.log_probs),
        softmax_weight=torch.zeros_like(stats.log_probs),
        top_weight=gradient.masked_fill(nothing | dropped.unsqueeze(1), 0),
    )


def sorted_distance(stats: Statistics, rows: RowInputs, teacher_topk: torch.Tensor) -> RowTerms:
    """uld: 1.5 sum |p_(r) - q_(r)| over the ranks r of both sorted distributions, and over what is left of each.

    teacher_topk [A, k']: log-probabilities, descending; the shorter list is filled up with zeros.
    """
    _, _, starts_s, _ = rows.sides
    top = stats.top
    assert top is not None, "the statistics were taken without topk"
    log_sum = stats.label_max[starts_s] + stats.label_log_sum[starts_s]
    p = (top.student - log_sum.unsqueeze(1)).exp()
    q = teacher_topk.to(p.dtype).exp()
    width = max(p.shape[1], q.shape[1])
    p, q = (pad(side, (0, width - side.shape[1])) for side in (p, q))
    rest_p, rest_q = (1 - p.sum(1)).clamp(min=0), (1 - q.sum(1)).clamp(min=0)
    dropped = rows.weight == 0
    weight = 1.5 * rows.weight
    value = ((p - q).abs().sum(1) + (rest_p - rest_q).abs()) * weight
    slope = _sign(p, q) - _sign(rest_p, rest_q, scale=1.0).unsqueeze(1)
    slope = slope * p * weight.unsqueeze(1)
    slope = slope.masked_fill(dropped.unsqueeze(1), 0)[:, : top.student.shape[1]]
    softmax_weight = torch.zeros_like(stats.log_probs).index_add(0, starts_s, -slope.sum(1))
    return _without_sums(
        row_loss=torch.where(dropped, 0, value),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        student_mass=torch.zeros_like(value),
        teacher_mass=torch.zeros_like(value),
        own_weight=torch.zeros_like(stats.log_probs),
        softmax_weight=softmax_weight,
        top_weight=slope,
    )


def _sign(a: torch.Tensor, b: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """The derivative of |a - b| by a: 0 where they are equal but for rounding, of `scale` or of the larger one."""
    size = torch.maximum(a, b) if scale is None else scale
    return torch.where((a - b).abs() <= 64 * torch.finfo(a.dtype).eps * size, 0, (a - b).sign())


def _kept_weight(rows: RowInputs, teacher_mass: torch.Tensor, log_q_labels: torch.Tensor, least: float) -> torch.Tensor:
    """[A]: the rows' weights, 0 where the teacher gives U less than `least`."""
    if least <= 0:
        return rows.weight
    unit_mass = rows.mean(log_q_labels, "teacher").exp().masked_fill(~rows.has_unit, 0)
    return torch.where((teacher_mass + unit_mass).clamp(max=1) < least, 0, rows.weight)


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
        # At a large tau the events are nearly certain: 1 - e^(-x / tau) and differences of such would be rounded away.
        p_t, not_t, not_s = (-a / temperature).exp(), -torch.expm1(-a / temperature), -torch.expm1(-b / temperature)
        value = p_t * (b - a) + temperature * not_t * (not_t / not_s).log()
        slope = -p_t * torch.expm1((a - b) / temperature) / not_s
    dropped = rows.weight == 0
    slope = torch.where(dropped | (surprise_s < ALM_FLOOR), 0, slope * rows.weight)
    per_label = rows.spread(slope, len(stats.log_probs))
    return _without_sums(
        row_loss=torch.where(dropped, 0, value * rows.weight),
        label_loss=torch.zeros_like(stats.log_probs),
        dropped=dropped,
        own_weight=-per_label,
        softmax_weight=per_label,
    )


def cross_entropy(stats: Statistics) -> RowTerms:
    """sft: -log p of every label."""
    one = torch.ones_like(stats.log_probs)
    return _without_sums(
        row_loss=one[:0],
        label_loss=-stats.log_probs,
        dropped=one[:0].bool(),
        own_weight=-one,
        softmax_weight=one,
    )


def _without_sums(
    *,
    row_loss: torch.Tensor,
    label_loss: torch.Tensor,
    dropped: torch.Tensor,
    own_weight: torch.Tensor,
    softmax_weight: torch.Tensor,
    student_mass: torch.Tensor | None = None,
    teacher_mass: torch.Tensor | None = None,
    top_weight: torch.Tensor | None = None,
) -> RowTerms:
    """Terms of interfaces whose gradient has nothing at the shared columns of a tile."""
    nothing = row_loss[:0]
    norms = Norms(student_max=nothing, teacher_max=nothing, student_log_z=nothing, teacher_log_z=nothing)
    return RowTerms(
        row_loss=row_loss,
        label_loss=label_loss,
        dropped=dropped,
        student_mass=torch.zeros_like(row_loss) if student_mass is None else student_mass,
        teacher_mass=torch.zeros_like(row_loss) if teacher_mass is None else teacher_mass,
        weights=GradientWeights(
            norms=norms,
            offset=nothing,
            scale=nothing,
            own_weight=own_weight,
            softmax_weight=softmax_weight,
            top_weight=top_weight,
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
