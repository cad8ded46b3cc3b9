"""`paper`, `code`, `strict`, `kd`: a softmax over the shared tokens and, in the row of a unit, the unit.

SimCT (arXiv:2605.07711, Eq. 6-9). For a model M, a segment's first prefix h, and a candidate u
that M spells v_1..v_k:

    s_M(u | h) = 1/k sum_j log p_M(v_j | h, v_<j)             Eq. 7; for a shared token k = 1
    q_M(u | h) = exp s_M(u | h) / sum_{u' in U} exp s_M(u' | h)       U = shared tokens, and this row's unit
    loss       = sum over segments of D(q_S(. | h), q_T(. | h))       Eq. 9 has D = KL(q_S || q_T)

U is a set of byte strings. If a unit spells the bytes of a shared token w (the student sampled "8"
"2", and "82" is shared), the row has one column for them: the realized unit's score replaces column
w, for both models.

    paper     every minimal unit. The default. unit_score "sum": without the 1/k.
    code      SimCT's released code: the segments of its walk, raw logits in place of log-probabilities. Not
              invariant to a constant that is added to the logits of a unit's inner position.
    strict    no units: 1:1 positions only (arXiv:2610.08448). span_mse: units by the squared difference of
              their log-probabilities, with this weight; the same paper finds it harmful in all of its 18
              runs.
    kd        strict where both models have one tokenizer: U is the whole vocabulary.

D is in losses/divergences.py, the sums over the shared tokens too; this file and that one
are all of the method.

Scores are divided by the temperature. A softmax does not see a constant, so the log-sum-exp of the first row
is added to all log-probabilities of a row: shared tokens are then plain logits, and their maxima and sums do
not wait for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.divergences import Norms
from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues, SideName
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY
from megatron_simct.records import SegmentKind, TeacherNeeds

SHARED_READS = frozenset(
    {"divergence", "js_beta", "temperature", "mask_whitespace", "stop_bridge", "min_teacher_mass"}
)


LENGTH_POWER = {"mean": 1, "sum": 0}
"""For each --simct-unit-score: the unit's log-probability is divided by k to this power."""


def value(rows: Rows) -> RowValues:
    """Eq. 8 and 9."""
    stats = rows.statistics
    unit_s, unit_t = raw_scores(rows) if rows.config.interface == "code" else unit_scores(rows)
    norms = Norms(
        student_max=stats.student_max,
        teacher_max=stats.teacher_max,
        # U is the shared tokens and the unit; without a unit its score is -inf and adds nothing.
        student_log_z=torch.logaddexp(stats.sums["z_s"].log(), unit_s.detach()),
        teacher_log_z=torch.logaddexp(stats.sums["z_t"].log(), unit_t),
    )
    log_p, log_q = unit_s - norms.student_log_z, unit_t - norms.teacher_log_z
    student_mass, teacher_mass = rows.masses()
    return RowValues(
        value=rows.divergence(log_p.unsqueeze(1), log_q.unsqueeze(1), norms=norms),
        student_mass=student_mass,
        teacher_mass=teacher_mass,
    )


def strict(rows: Rows) -> RowValues:
    """The 1:1 positions, and with span_mse > 0 the units by it (log q(unit) - log
    p(unit))^2, their whole paths.
    """
    found = value(rows)
    if not rows.config.span_mse:
        return found
    difference = rows.totals(rows.teacher_log_probs, "teacher") - rows.totals(rows.log_probs, "student")
    used = (rows.labels.kinds == SegmentKind.UNIT) & (rows.labels.weights != 0)
    return replace(found, units=rows.config.span_mse * torch.where(used, difference, 0).square())


def unit_scores(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 7 plus the row's log-sum-exp, relative to the row's maximum; -inf in rows without a unit."""
    stats, temperature = rows.statistics, rows.config.temperature
    power = LENGTH_POWER[rows.config.unit_score]

    def score(log_probs: torch.Tensor, side: SideName) -> torch.Tensor:
        # The sum over k labels divided by k^power; mean * k^(1 - power) is the same.
        return rows.mean(log_probs, side) * rows.length(side).to(log_probs.dtype) ** (1 - power)

    # The log-sum-exp is label_max + log_sums: the two maxima cancel first.
    student = (score(rows.log_probs, "student") + rows.log_sums[rows.start]) / temperature
    student = student + (stats.label_max[rows.start] / temperature - stats.student_max)
    teacher = score(rows.teacher_log_probs, "teacher") / temperature
    teacher = teacher + (rows.teacher_lse[rows.teacher_start] / temperature - stats.teacher_max)
    return of_units(rows, student, teacher)


def raw_scores(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the labels' raw logits, relative to the row's maximum."""
    stats, temperature = rows.statistics, rows.config.temperature
    student = rows.mean(rows.own, "student") / temperature - stats.student_max
    teacher = rows.mean(rows.teacher_own, "teacher") / temperature - stats.teacher_max
    return of_units(rows, student, teacher)


def of_units(rows: Rows, *scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores, -inf in rows without a unit."""
    student, teacher = (score.masked_fill(~rows.has_unit, NEGATIVE_INFINITY) for score in scores)
    return student, teacher


def _first(config: InterfaceConfig) -> TeacherNeeds:
    return TeacherNeeds(hidden_rows="first")


def one_to_one(config: InterfaceConfig) -> TeacherNeeds:
    """The needs of interfaces that compare 1:1 positions."""
    return TeacherNeeds(hidden_rows="one_to_one")


PAPER = Interface(
    needs=_first,
    reads=SHARED_READS | {"unit_weight", "unit_score", "drop_units", "random_units"},
    rows=lambda config: RowNeeds(dense="units", special="replaced"),
    value=value,
)
CODE = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="first", segmentation="authors"),
    reads=SHARED_READS | {"unit_weight", "shared"},
    rows=lambda config: RowNeeds(raw=True),
    value=value,
)
STRICT = Interface(
    needs=one_to_one,
    reads=SHARED_READS | {"span_mse"},
    rows=lambda config: RowNeeds(units=False, dense="units" if config.span_mse else "none"),
    value=strict,
)
KD = Interface(
    needs=one_to_one,
    reads=SHARED_READS - {"stop_bridge"},
    rows=lambda config: RowNeeds(units=False),
    value=value,
)
