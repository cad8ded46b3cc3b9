"""`strict_topk` and `uld`: only the likeliest tokens of a row, which the ranks exchange.

`strict_topk` is strict (shared_tokens.py) over the student's k likeliest shared tokens of each row, both
models renormalized on them (arXiv:2610.08448, k = 16).

`uld` is 1.5 sum over r of |p_(r) - q_(r)|: the r-th largest probability of one model against that of the
other, whatever the tokens (arXiv:2402.12030); over the `uld_topk` largest, and the rest of each as one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megatron_simct.losses.kinds.shared_tokens import SHARED_READS, one_to_one
from megatron_simct.losses.rows import ALL_TOKENS, Interface, RowNeeds, Rows, RowValues
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY
from megatron_simct.records import TeacherNeeds


def compare_top(rows: Rows) -> RowValues:
    """strict_topk. The masses are those of the top columns."""
    stats, temperature = rows.statistics, rows.config.temperature
    nothing = stats.top_student == NEGATIVE_INFINITY
    log_p = (rows.top / temperature).log_softmax(1)
    log_q = (stats.top_teacher.masked_fill(nothing, NEGATIVE_INFINITY) / temperature).log_softmax(1)
    lse_t = rows.teacher_lse[rows.teacher_start].unsqueeze(1)
    return RowValues(
        value=rows.divergence(log_p, log_q, norms=None),
        student_mass=(stats.top_student - rows.log_norm.unsqueeze(1)).exp().sum(1),
        teacher_mass=(stats.top_teacher - lse_t).exp().masked_fill(nothing, 0).sum(1),
    )


def sorted_distance(rows: Rows) -> RowValues:
    """uld.

    The teacher's list [A, k'] is of log-probabilities, descending; the shorter list is filled up with zeros.
    """
    assert rows.labels.teacher_topk is not None, "check_labels refuses uld without teacher_topk"
    teacher = rows.labels.teacher_topk[rows.labels.teacher_hidden_index[rows.chosen]]
    log_sums = rows.statistics.label_max[rows.start] + rows.log_sums[rows.start]
    p = (rows.top - log_sums.unsqueeze(1)).exp()
    q = teacher.to(p.dtype).exp()
    width = max(p.shape[1], q.shape[1])
    p, q = (pad(side, (0, width - side.shape[1])) for side in (p, q))
    rest_p, rest_q = ((1 - side.sum(1)).clamp(min=0) for side in (p, q))
    one = torch.ones_like(rest_q)
    return RowValues(
        value=1.5 * (_distance(p, q, torch.maximum(p, q)).sum(1) + _distance(rest_p, rest_q, one))
    )


def _distance(a: torch.Tensor, b: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """|a - b|, 0 with its derivative where they are equal but for rounding of numbers of this size."""
    equal = (a - b).detach().abs() <= 64 * torch.finfo(a.dtype).eps * size.detach()
    return torch.where(equal, 0, a - b).abs()


STRICT_TOPK = Interface(
    needs=one_to_one,
    reads=SHARED_READS | {"topk"},
    rows=lambda config: RowNeeds(units=False, top=config.topk),
    value=compare_top,
)
ULD = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="one_to_one", topk=config.uld_topk or ALL_TOKENS),
    reads=frozenset({"uld_topk", "mask_whitespace", "stop_bridge"}),
    rows=lambda config: RowNeeds(
        units=False, shared=False, dense="firsts", top=config.uld_topk or ALL_TOKENS
    ),
    value=sorted_distance,
)
