"""The loss as plain torch computes it: all logits of both models at once, log_softmax, kl_div, autograd.

It computes in the type of its inputs, with softmax in float32 for bfloat16. The package's rounding is
compared with it. In float64 it replaces the oracle if a vocabulary is too large for one candidate at a time.
It shares nothing with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import kl_div

ABSENT = -1e9
"""The score of a column that is not a candidate of a row."""


def dense_sum(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    case: Any,
    *,
    interface: str,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    rounded: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone,
) -> torch.Tensor:
    """Sum over rows of `paper`, `sum` or `strict` at temperature 1. case: labels,
    segments, ... of a LossCase.

    `rounded` is applied to the inputs of the logits and to the log-probabilities.
    """
    log_p = rounded(_log_softmax(rounded(student_hidden) @ rounded(student_weight).T))
    log_q = rounded(_log_softmax(rounded(teacher_hidden) @ rounded(teacher_weight).T)).detach()
    device = log_p.device
    own_p = log_p[torch.arange(len(log_p)), torch.tensor(case.student_labels, device=device)]
    own_q = log_q[torch.arange(len(log_q)), torch.tensor(case.teacher_labels, device=device)]
    rows = [a for a, kind in enumerate(case.kinds) if interface != "strict" or kind != 1]
    segments = [case.segments[a] for a in rows]
    ids = list(case.shared)
    scores_s = log_p[[ss for _, _, ss, _ in segments]][:, ids]
    of_rows = log_q[[ts for ts, _, _, _ in segments]]
    scores_t = of_rows[:, [teachers[0] for teachers in case.shared.values()]]
    for column, teachers in enumerate(case.shared.values()):
        if len(teachers) > 1:
            scores_t[:, column] = of_rows[:, teachers].logsumexp(1)
    if interface != "strict":
        reduce = torch.sum if interface == "sum" else torch.mean
        is_unit = torch.tensor([kind == 1 for kind in case.kinds], device=device)
        unit_s = torch.stack([reduce(own_p[ss:se]) for _, _, ss, se in segments])
        unit_t = torch.stack([reduce(own_q[ts:te]) for ts, te, _, _ in segments])
        replaced = torch.tensor(case.replaced, device=device)[:, None] == torch.tensor(ids, device=device)
        replaced &= is_unit[:, None]
        scores_s, scores_t = (
            torch.cat([scores.masked_fill(replaced, ABSENT), unit.masked_fill(~is_unit, ABSENT)[:, None]], 1)
            for scores, unit in ((scores_s, unit_s), (scores_t, unit_t))
        )
    p, q = scores_s.log_softmax(1), scores_t.log_softmax(1)
    match divergence:
        case "reverse_kl":
            return kl_div(q, p, reduction="sum", log_target=True)
        case "forward_kl":
            return kl_div(p, q, reduction="sum", log_target=True)
    m = torch.logsumexp(torch.stack([p + math.log(1 - beta), q + math.log(beta)]), 0)
    of_q, of_p = (kl_div(m, side, reduction="sum", log_target=True) for side in (q, p))
    return beta * of_q + (1 - beta) * of_p


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(1)
