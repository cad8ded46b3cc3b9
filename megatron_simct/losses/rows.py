"""What an interface is, and the numbers that its rows are made of.

An interface (losses/kinds/) is a value function over a few numbers a row, equal on every rank: `value(rows)`
returns the loss of each row, and autograd differentiates it. What spans the vocabulary is in the passes
(two_pass.py, top_columns.py), which turn the gradient of these numbers into that of the logits:

    log_probs [N]     log-probability of each student label        onehot(label) - softmax of its row
    own [N]           its logit                                    onehot(label)
    log_sums [N]      log-sum-exp of its row                       softmax of its row
    special [F, K]    logits of the special columns                these columns
    outside [A]       sum over the columns that are not shared     these columns
    top [A, k]        logits of the student's likeliest columns    these columns
    entries [E]       logits of single tokens of single rows       these columns
    divergence(...)   over the shared columns                      these columns (divergences.py)

Two rules for an author. Mask first: an infinite number in a row that is not used makes nan of the whole
gradient, so replace it before the algebra (`Rows.used`), not after it. And subtract maxima before anything is
added: a log-sum-exp of a hundred nats in float32 is rounded to 1e-5.

Shapes: `A` rows (shared ones in the plan's order), `S` segments, `N` student and `M` teacher labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.divergences import (
    ColumnSums,
    Norms,
    factor_of,
    known_gradient,
    known_sums,
    mean_of_derivative,
    shared_sums,
    value_of,
)
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY
from megatron_simct.records import EntryBatch, LabelBatch, SegmentKind, TeacherNeeds

SideName = Literal["student", "teacher"]
NOTHING = torch.zeros(0)
"""A statistic that the interface's passes do not take."""
ALL_TOKENS = 1 << 30
"""As a k of the most likely tokens: the whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNeeds:
    """What an interface reads of the student's rows."""

    segments: bool = True
    """Compares segments; else every label by itself."""
    units: bool = True
    """Segments of several tokens too."""
    first_rows: bool = True
    """Looks at the vocabulary in the first row of every used segment; else at the labels alone."""
    shared: bool = True
    """What it looks at there are the shared tokens of both models."""
    dense: Literal["none", "units", "firsts", "segments", "labels"] = "none"
    """The labels whose rows need the whole softmax in the gradient: of units, the first ones or all of every
    used segment, or simply all."""
    special: Literal["none", "replaced", "first"] = "none"
    """Columns that are kept apart in a unit's row: the shared token of the same bytes, or
    FirstTokens.special.
    """
    raw: bool = False
    """Reads the labels' logits, in rows that need no softmax too."""
    outside: bool = False
    """Sums the columns that are not shared."""
    top: int = 0
    """Likeliest columns of each row, in place of sums over the shared ones."""
    entries: bool = False
    """Single columns of single rows, LabelBatch.entries."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One method, beside its algebra in losses/kinds/. Its name, source and known failure:
    config/interfaces.py.
    """

    needs: Callable[[InterfaceConfig], TeacherNeeds]
    """What it asks of the teacher."""
    reads: frozenset[str]
    """The options of InterfaceConfig that it reads; others are refused."""
    rows: Callable[[InterfaceConfig], RowNeeds | None]
    """None: it has no token rows (`bytes`)."""
    value: Callable[[Rows], RowValues] | None
    entries: Callable[[InterfaceConfig], Callable[..., EntryBatch]] | None = None
    """For single tokens: what makes LabelBatch.entries of a response, see kinds/teacher_topk.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowValues:
    """What a value function returns."""

    value: torch.Tensor
    """[A], nats, not weighted yet; without segments, [N]. Any value where the row's weight is 0."""
    student_mass: torch.Tensor | None = None
    """[A]: the student's probability of the compared tokens at the first row; None: it compares none."""
    teacher_mass: torch.Tensor | None = None
    units: torch.Tensor | None = None
    """[S]: the loss of units without a row; any value elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Row statistics after all-reduce; identical on every rank."""

    label_max: torch.Tensor
    """[N], the largest logit of each student row (0 if there is none)."""
    label_log_sum: torch.Tensor
    """[N], log of the sum of e^(z - label_max) over the real vocabulary."""
    own: torch.Tensor
    """[N], each label's logit."""
    log_probs: torch.Tensor
    """[N], of each student label."""
    same_top: torch.Tensor = NOTHING
    """bool [A]: whether both models find the same of the compared tokens likeliest, special columns left out.
    """
    student_max: torch.Tensor = NOTHING
    """[A], of the scores of the shared tokens, special columns left out (0 if there is none)."""
    teacher_max: torch.Tensor = NOTHING
    """[A]"""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """The sums of RunningSums."""
    special_student: torch.Tensor = NOTHING
    """[F, K], logits (before the temperature) of the special columns; -inf where the token
    is not a shared one.
    """
    special_teacher: torch.Tensor = NOTHING
    """[F, K]"""
    outside: torch.Tensor = NOTHING
    """[A], with `outside`: the sum of e^(z - label_max) over columns that are not shared,
    special ids left out.
    """
    top_student: torch.Tensor = NOTHING
    """[A, k], descending: logits of the likeliest columns; -inf where a row has fewer."""
    top_teacher: torch.Tensor = NOTHING
    """[A, k]: the teacher's logits of the same shared tokens; of no meaning without a teacher."""
    entries: torch.Tensor = NOTHING
    """[E]: the logits of LabelBatch.entries."""


@dataclass
class Rows:
    """The rows of a micro-batch, as a value function sees them."""

    config: InterfaceConfig
    """`method()` of the configuration."""
    labels: LabelBatch
    chosen: torch.Tensor
    """int64 [A]: the segment of each row."""
    weight: torch.Tensor
    """[A]: what a row's loss is multiplied by; 0 leaves it out."""
    statistics: Statistics
    teacher_own: torch.Tensor
    """[M], logits of the teacher's labels."""
    teacher_lse: torch.Tensor
    """[M]"""
    deficits: Callable[[Norms], list[torch.Tensor]] | None = None
    """The additional pass over the tiles that js needs."""
    shared: tuple[Norms, torch.Tensor, torch.Tensor] | None = field(init=False, default=None)
    """After `divergence`: norms, offset, and a leaf whose gradient is the scale of the
    shared columns' gradient.
    """

    def __post_init__(self) -> None:
        stats, self.segments = self.statistics, self.labels.segments
        self.has_unit = (self.labels.kinds == SegmentKind.UNIT)[self.chosen]
        self.used = self.weight != 0
        # Each number of pass 1 is a leaf of autograd: the value function is differentiated by these alone,
        # and pass 2 turns their gradients into the logits'.
        self.log_probs = stats.log_probs.detach().requires_grad_()
        self.own = stats.own.detach().requires_grad_()
        self.log_sums = stats.label_log_sum.detach().requires_grad_()
        """[N], relative to label_max."""
        self.special = stats.special_student.detach().requires_grad_()
        self.outside = stats.outside.detach().requires_grad_()
        self.top = stats.top_student.detach().requires_grad_()
        self.entries = stats.entries.detach().requires_grad_()
        self.teacher_log_probs = self.teacher_own - self.teacher_lse
        self.teacher_start, self.teacher_end, self.start, self.end = self.segments[self.chosen].unbind(1)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that autograd differentiates with respect to."""
        names = ("log_probs", "own", "log_sums", "special", "outside", "top", "entries")
        return {name: getattr(self, name) for name in names}

    @property
    def log_norm(self) -> torch.Tensor:
        """[A], no gradient: log-sum-exp of each first row, of the student."""
        return (self.statistics.label_max + self.statistics.label_log_sum)[self.start]

    def mean(self, values: torch.Tensor, side: SideName) -> torch.Tensor:
        """[N] or [M] -> [A]: the mean over the labels of each row's segment."""
        # Columns of a segment: ts, te, ss, se.
        column = 0 if side == "teacher" else 2
        starts, ends = self.segments[:, column], self.segments[:, column + 1]
        return segment_mean(values, starts, ends)[self.chosen]

    @property
    def old_log_probs(self) -> torch.Tensor:
        """[N], no gradient: the labels' log-probabilities when they were sampled; today's
        where that is not known.
        """
        sampled = self.labels.sampling_log_probs
        return self.statistics.log_probs if sampled is None else sampled.to(self.statistics.log_probs.dtype)

    def at_labels(self, values: torch.Tensor) -> torch.Tensor:
        """[A] -> [N]: each row's value at the student labels of its segment, 0 elsewhere."""
        everywhere = values.new_zeros(len(self.segments)).index_copy(0, self.chosen, values)
        return segments_to_labels(everywhere, self.segments[:, 2], self.segments[:, 3], len(self.log_probs))

    def totals(self, values: torch.Tensor, side: SideName) -> torch.Tensor:
        """[N] or [M] -> [S]: the sum over the labels of every segment, rows or not."""
        starts, ends = self.segments.unbind(1)[0:2] if side == "teacher" else self.segments.unbind(1)[2:4]
        return segment_mean(values, starts, ends) * (ends - starts)

    def total(self, values: torch.Tensor, side: SideName) -> torch.Tensor:
        """[N] or [M] -> [A]: the sum over the labels of each row's segment."""
        return self.mean(values, side) * self.length(side)

    def length(self, side: SideName) -> torch.Tensor:
        """int64 [A]: labels of each row's segment."""
        return self.teacher_end - self.teacher_start if side == "teacher" else self.end - self.start

    def shared_sums(self, norms: Norms) -> ColumnSums:
        """Over the shared columns that are not special: what the divergence is made of."""
        found = self.deficits(norms) if self.config.divergence == "js" and self.deficits is not None else []
        return shared_sums(self.statistics.sums, norms, found, self.config.divergence)

    def divergence(
        self,
        log_p: torch.Tensor,
        log_q: torch.Tensor,
        *,
        norms: Norms | None,
        shared: ColumnSums | None = None,
    ) -> torch.Tensor:
        """[A]: the divergence of two distributions over the columns log_p, log_q [A, E] and, with `norms`,
        the shared.

        Differentiable by log_p; its gradient is that of a distribution (the probabilities of all columns add
        up to 1), so that a normalizer which all columns have in common is a constant: detach it.
        """
        divergence, beta = self.config.divergence, self.config.js_beta
        if norms is not None and shared is None:
            shared = self.shared_sums(norms)
        scale = torch.zeros_like(log_p[:, 0]).detach().requires_grad_()
        value, offset = _Divergence.apply(log_p, scale, log_q, shared, divergence, beta)
        if norms is not None:
            self.shared = (norms, offset, scale)
        return value

    def masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[A] each: the models' probability of the shared tokens, special columns
        included, at the first rows.
        """
        stats, temperature = self.statistics, self.config.temperature
        # At temperature 1 the sums of the scores are sums of probabilities; else pass 1 summed the masses, of
        # e^(temperature * score), beside them.
        names = ("z_s", "z_t") if temperature == 1 else ("mass_s", "mass_t")
        log_sum, label_max = stats.label_log_sum[self.start], stats.label_max[self.start]
        teacher_lse = self.teacher_lse[self.teacher_start]
        student = stats.sums[names[0]] * (temperature * stats.student_max - label_max - log_sum).exp()
        teacher = stats.sums[names[1]] * (temperature * stats.teacher_max - teacher_lse).exp()
        # Special columns belong to the dense first rows, which are the last `num_first` of the A rows.
        num_first = len(stats.special_student)
        if stats.special_student.numel():
            first = slice(len(student) - num_first, None)
            student[first] += (stats.special_student - self.log_norm[first].unsqueeze(1)).exp().sum(1)
            teacher[first] += (stats.special_teacher - teacher_lse[first].unsqueeze(1)).exp().sum(1)
        return student, teacher

    def kept(self, teacher_mass: torch.Tensor | None) -> torch.Tensor:
        """[A]: the weights, 0 where the teacher gives the compared tokens and the unit less
        than min_teacher_mass.
        """
        least = self.config.min_teacher_mass
        if least <= 0 or teacher_mass is None:
            return self.weight
        # The unit counts as one more token, with the geometric mean of its labels' probabilities.
        unit_mass = self.mean(self.teacher_log_probs, "teacher").exp().masked_fill(~self.has_unit, 0)
        return torch.where((teacher_mass + unit_mass).clamp(max=1) < least, 0, self.weight)


class _Divergence(torch.autograd.Function):
    """Value [A] and offset [A] of a divergence; by hand, as the three differ from a constant by what is left
    of large sums: js is made of deficits (`mean_deficits`), and autograd would round their difference away.

    The value does not depend on `scale`: its "gradient" is the factor of the shared columns' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        log_p: torch.Tensor,
        scale: torch.Tensor,
        log_q: torch.Tensor,
        shared: ColumnSums | None,
        divergence: str,
        beta: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = known_sums(log_p, log_q, divergence, beta)
        total = total if shared is None else shared + total
        offset = mean_of_derivative(total, divergence, beta)
        ctx.save_for_backward(log_p, log_q, offset)
        ctx.kind = (divergence, beta)
        ctx.mark_non_differentiable(offset)
        return value_of(total, divergence, beta).clone(), offset  # for reverse_kl they are one number

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = gradients[0] * factor_of(*ctx.kind)
        log_p, log_q, offset = ctx.saved_tensors
        of_known = known_gradient(log_p, log_q, offset, *ctx.kind) * scale.unsqueeze(1)
        # where, not a product with 0: the derivatives of a row that is left out may be infinite.
        of_known = torch.where((scale == 0).unsqueeze(1) | (log_p == NEGATIVE_INFINITY), 0, of_known)
        return of_known, scale, None, None, None, None


def log_add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log(e^a + e^b), also where both are -inf: with gradient 0 there."""
    nothing = (a == NEGATIVE_INFINITY) & (b == NEGATIVE_INFINITY)
    return torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0)).masked_fill(
        nothing, NEGATIVE_INFINITY
    )


def is_row(kinds: torch.Tensor, needs: RowNeeds) -> torch.Tensor:
    """[S] -> bool [S]: the segments that the interface uses."""
    if not needs.segments:
        return torch.zeros_like(kinds, dtype=torch.bool)
    return (kinds != SegmentKind.UNIT) | needs.units


def segment_mean(values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[n] -> [S]: the mean over [starts, ends), which ascend without overlap.

    Every rank adds in the same order.
    """
    # start_0, end_0, start_1, end_1, ...: borders that cut [0, n) into gaps and segments by turns.
    borders = torch.stack([starts, ends], dim=1).flatten()
    offsets = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(values))])
    # Pieces 1, 3, 5, ... are the segments. `unsafe` skips a check that waits for the device.
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)[1::2]
    return sums / (ends - starts)


def segments_to_labels(
    values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, count: int
) -> torch.Tensor:
    """[S] -> [count]: each segment's value at each of its labels, 0 outside of segments."""
    if len(values) == 0:
        return values.new_zeros(count)
    # The last segment that starts at or before each label; `inside`: whether it reaches the label.
    position = torch.arange(count, device=values.device)
    segment = (torch.searchsorted(starts.contiguous(), position, right=True) - 1).clamp(min=0)
    inside = (position >= starts[segment]) & (position < ends[segment])
    return torch.where(inside, values[segment], 0)
