"""`exact`: a partition of events at a segment's first position, each with its probability;
nothing is renormalized.

With P the probability of the unit's path, v_1 its first token and w the shared token of the same bytes, for
each model:

    q(x)     = p(x)                shared tokens x other than v_1
    q(v_1)   = p(v_1) - P          if v_1 is shared: what does not go on along the path
    q(unit)  = P + p(w)            one term if the path begins with w
    q(rest)  = 1 - the others      less P if the path begins with a token that is not shared

and the loss is their divergence. The student's rest is summed over its tokens, not taken as what the others
leave of 1: where they leave little, that would be rounding. The teacher's is only known as what its
log-sum-exp leaves of 1, to some 1e-7 in float32: below that both rests are one floor, and reverse_kl, which
takes its logarithm, is only as good.

All rows are dense: the rest depends on every logit. The events add up to 1 whatever the logits, so the
log-sum-exp of the first row is a constant to the gradient (`Rows.divergence`), and no column has a large part
that another term takes away again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_simct.losses.divergences import Norms, known_sums
from megatron_simct.losses.kinds.shared_tokens import SHARED_READS
from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues, log_add
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY
from megatron_simct.records import LabelBatch, TeacherNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """Where the paths of a row's unit begin, as student ids; [A] each."""

    own: torch.Tensor
    """The student's first label."""
    teacher: torch.Tensor
    """The shared token that the teacher's first label is, or -1."""
    replaced: torch.Tensor
    """The shared token that spells the unit's bytes, or -1."""

    @staticmethod
    def of(labels: LabelBatch, segments: torch.Tensor | slice = slice(None)) -> FirstTokens:
        """Those of these segments."""
        return FirstTokens(
            own=labels.student_labels[labels.segments[segments, 2]],
            teacher=labels.teacher_first_columns[segments],
            replaced=labels.replaced_columns[segments],
        )

    def special(self) -> torch.Tensor:
        """int64 [A, 3]: the three, each id once; -1 if it has been named by a later column or, the second,
        by the first."""
        teacher = torch.where((self.teacher == self.own) | (self.teacher == self.replaced), -1, self.teacher)
        return torch.stack(
            [torch.where(self.own == self.replaced, -1, self.own), teacher, self.replaced], dim=1
        )


def value(rows: Rows) -> RowValues:
    """Events in the order: shared columns, own first token, teacher's first token, unit, rest."""
    stats, first = rows.statistics, FirstTokens.of(rows.labels, rows.chosen)
    lse_t = rows.teacher_lse[rows.teacher_start]
    norms = Norms(
        student_max=stats.student_max,
        teacher_max=stats.teacher_max,
        student_log_z=stats.label_max[rows.start] - stats.student_max + stats.label_log_sum[rows.start],
        teacher_log_z=lse_t - stats.teacher_max,
    )
    # The first labels' log-probabilities, whose log-sum-exp is a constant.
    log_probs = rows.log_probs.index_copy(0, rows.start, rows.own[rows.start] - rows.log_norm)
    own_s, own_t = log_probs[rows.start], rows.teacher_log_probs[rows.teacher_start]
    special_s, special_t = (
        rows.special - rows.log_norm.unsqueeze(1),
        stats.special_teacher - lse_t.unsqueeze(1),
    )
    # log P of the unit's path in each model; goes_on_s: log P without the first token's factor.
    path_s = rows.total(log_probs, "student").masked_fill(~rows.has_unit, NEGATIVE_INFINITY)
    path_t = rows.total(rows.teacher_log_probs, "teacher").masked_fill(~rows.has_unit, NEGATIVE_INFINITY)
    goes_on_s = rows.total(log_probs.index_fill(0, rows.start, 0), "student")

    own_is_shared = special_s[:, 0] > NEGATIVE_INFINITY
    own_is_replaced = first.own == first.replaced
    # Where a path begins: in the first token's column, in the unit's own, or outside of the shared tokens.
    turns_s, turns_t = _log_not(goes_on_s), _log_not(path_t - own_t)
    teacher_at_own = own_is_shared & (first.teacher == first.own)
    teacher_at_second = special_t[:, 1] > NEGATIVE_INFINITY
    teacher_is_replaced = (first.teacher == first.replaced) & (first.teacher >= 0)
    # Columns: own first token, teacher's first token, unit (with the token of the same bytes).
    log_p = torch.stack(
        [
            torch.where(own_is_shared, special_s[:, 0] + turns_s, NEGATIVE_INFINITY),
            special_s[:, 1],
            torch.where(own_is_replaced, special_s[:, 2], log_add(special_s[:, 2], path_s)),
        ],
        dim=1,
    )
    log_q = torch.stack(
        [
            torch.where(teacher_at_own, special_t[:, 0] + turns_t, special_t[:, 0]),
            torch.where(teacher_at_second, special_t[:, 1] + turns_t, special_t[:, 1]),
            torch.where(teacher_is_replaced, special_t[:, 2], log_add(special_t[:, 2], path_t)),
        ],
        dim=1,
    )
    shared = rows.shared_sums(norms)
    known = known_sums(log_p.detach(), log_q, rows.config.divergence, rows.config.js_beta)
    # The first token is not shared: what leaves the path behind it belongs to the rest.
    own_is_outside = (first.special()[:, 0] >= 0) & rows.has_unit & ~own_is_shared
    turns_off = (own_s + turns_s).masked_fill(~own_is_outside, NEGATIVE_INFINITY)
    # log of 0 has no derivative.
    none = rows.outside == 0
    log_outside = rows.outside.masked_fill(none, 1).log() - stats.label_log_sum[rows.start]
    rest_s = log_add(log_outside.masked_fill(none, NEGATIVE_INFINITY), turns_off)
    rest_s, rest_t = _floored_rests(rest_s, 1 - shared.q - known.q)
    student_mass, teacher_mass = rows.masses()
    return RowValues(
        value=rows.divergence(
            torch.cat([log_p, rest_s.unsqueeze(1)], 1),
            torch.cat([log_q, rest_t.unsqueeze(1)], 1),
            norms=norms,
            shared=shared,
        ),
        student_mass=student_mass,
        teacher_mass=teacher_mass,
    )


def _log_not(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x), at least the logarithm of what the type rounds 1 by."""
    least = torch.finfo(log_probs.dtype).eps
    return torch.log(-torch.expm1(log_probs.clamp(max=-least)))


def _floored_rests(log_student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[A] each, student and teacher: the log-probability of the rest; the teacher's is rounded as 1 is.

    Two rests that are as good as nothing do not differ; a student without any other token has
    one that is finite.
    """
    least = torch.finfo(teacher.dtype).eps
    floored = (teacher <= least) | (log_student == NEGATIVE_INFINITY)
    log_student = torch.where(floored, log_student.clamp(min=math.log(least)), log_student)
    return log_student, teacher.clamp(min=least).log()


EXACT = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="first"),
    reads=SHARED_READS - {"temperature"} | {"unit_weight"},
    rows=lambda config: RowNeeds(dense="segments", special="first", outside=True),
    value=value,
)
