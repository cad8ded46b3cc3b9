"""Divergences between the two models' distributions over U, from vocabulary-parallel scores.

A row compares q_S = softmax of the student's scores s over U with q_T = softmax of the teacher's scores t over U
(SimCT, arXiv:2605.07711, Eq. 8-9). The shared tokens of U are spread over ranks; the row's unit, if it has one, is one
more column whose score every rank knows. A row without a unit has the unit score -inf on both sides.

    reverse_kl   KL(q_S || q_T)     the paper's
    forward_kl   KL(q_T || q_S)
    js           b KL(q_T || m) + (1 - b) KL(q_S || m),   m = b q_T + (1 - b) q_S

All scores in this module are shifted: s stands for s - m_s and t for t - m_t, with the rows' maxima over the shared
tokens of all ranks, so the large common part is gone before anything is added. Everything follows from sums over
columns:

    Z_s = sum e^s,   Z_t = sum e^t,   X = sum e^s (s - t)          (forward KL: X = sum e^t (t - s))

A KL is separable, KL(q_S || q_T) = X / Z_s - log Z_s + log Z_t: one reduction for the maxima and one for the sums. js
needs log q_S and log q_T first, and one reduction more.

The gradients are with respect to the student's scores, and each adds up to zero over a row:

    reverse_kl   p (log p - log q - value)              p = q_S, q = q_T
    forward_kl   p - q
    js           (1 - b) p (log p/m - KL(p || m))

A column of probability zero adds nothing to a value it weights (0 log 0 = 0); nan goes through everywhere.

Shapes: `A` rows, `c` shared tokens of this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_simct.losses.vocab_parallel import reduce_packed


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDivergences:
    """Value of each row and its gradient with respect to the student's scores."""

    value: torch.Tensor
    """[A], nats, equal on every rank."""
    shared_gradient: torch.Tensor
    """[A, c]"""
    unit_gradient: torch.Tensor
    """[A], equal on every rank."""


def local_sums(student: torch.Tensor, teacher: torch.Tensor, divergence: str) -> list[torch.Tensor]:
    """This rank's part of Z_s, Z_t and, for the two KLs, X; each [A]. To be summed over the ranks.

    student, teacher [A, c]: this rank's shifted scores.
    """
    weights_s, weights_t = student.exp(), teacher.exp()
    sums = [weights_s.sum(1), weights_t.sum(1)]
    match divergence:
        case "reverse_kl":
            sums.append(_weighted(weights_s, student - teacher).sum(1))
        case "forward_kl":
            sums.append(_weighted(weights_t, teacher - student).sum(1))
    return sums


def row_divergences(
    student: torch.Tensor,
    teacher: torch.Tensor,
    sums: list[torch.Tensor],
    *,
    student_unit: torch.Tensor,
    teacher_unit: torch.Tensor,
    divergence: str,
    js_beta: float,
    group: dist.ProcessGroup | None,
) -> RowDivergences:
    """Value and gradient of each row, from the sums of `local_sums` over all ranks.

    student, teacher [A, c] and the units [A] (-inf for no unit) are shifted by the same maxima. js reduces two numbers
    a row over `group`; the KLs communicate nothing here.
    """
    log_z_s = torch.logaddexp(sums[0].log(), student_unit)
    log_z_t = torch.logaddexp(sums[1].log(), teacher_unit)
    # Log-probabilities over U of the columns: shared tokens [A, c] and unit [A, 1].
    log_p, log_q = student - log_z_s.unsqueeze(1), teacher - log_z_t.unsqueeze(1)
    log_p_unit, log_q_unit = (student_unit - log_z_s).unsqueeze(1), (teacher_unit - log_z_t).unsqueeze(1)
    match divergence:
        case "reverse_kl":
            # Over the shared tokens, sum p (log p - log q) with p = e^s / Z: from X and Z alone.
            kl = (-log_z_s).exp() * (sums[2] - sums[0] * (log_z_s - log_z_t))
            kl = kl + _weighted(log_p_unit.exp(), log_p_unit - log_q_unit).squeeze(1)
            return _join(kl, _reverse_kl_gradient(log_p, log_q, kl), _reverse_kl_gradient(log_p_unit, log_q_unit, kl))
        case "forward_kl":
            kl = (-log_z_t).exp() * (sums[2] - sums[1] * (log_z_t - log_z_s))
            kl = kl + _weighted(log_q_unit.exp(), log_q_unit - log_p_unit).squeeze(1)
            return _join(kl, log_p.exp() - log_q.exp(), log_p_unit.exp() - log_q_unit.exp())
        case "js":
            # KL(p || m) = -log(1 - b) - the mean deficit of log p/m from that bound. Where the models hardly overlap,
            # the gradient is made of small differences of deficits, which log p - log m would round away.
            local = list(_mean_deficits(log_p, log_q, js_beta))
            shared = reduce_packed(local, dist.ReduceOp.SUM, group)
            unit = _mean_deficits(log_p_unit, log_q_unit, js_beta)
            deficit_s, deficit_t = shared[0] + unit[0], shared[1] + unit[1]
            kl_s, kl_t = -math.log(1 - js_beta) - deficit_s, -math.log(js_beta) - deficit_t
            return _join(
                js_beta * kl_t + (1 - js_beta) * kl_s,
                _js_gradient(log_p, log_q, deficit_s, js_beta),
                _js_gradient(log_p_unit, log_q_unit, deficit_s, js_beta),
            )
    raise AssertionError(f"unknown divergence {divergence!r}")


def _join(value: torch.Tensor, shared_gradient: torch.Tensor, unit_gradient: torch.Tensor) -> RowDivergences:
    return RowDivergences(value=value, shared_gradient=shared_gradient, unit_gradient=unit_gradient.squeeze(1))


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights * values, and 0 where the weight is 0: the value may be infinite or inf - inf there. nan weights stay."""
    return torch.where(weights == 0, torch.zeros_like(weights), weights * values)


def _reverse_kl_gradient(log_p: torch.Tensor, log_q: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    return _weighted(log_p.exp(), log_p - log_q - kl.unsqueeze(1))


def _deficit(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(1 + (1 - share) b / (share a)): by how much log(a / m), m = share a + (1 - share) b, is below -log(share)."""
    relative = log_b - log_a + math.log((1 - share) / share)
    return torch.logaddexp(relative, torch.zeros_like(relative))


def _mean_deficits(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns' part of the mean deficit of q_S under q_S and of q_T under q_T; each [A]."""
    return (
        _weighted(log_p.exp(), _deficit(log_p, log_q, 1 - beta)).sum(1),
        _weighted(log_q.exp(), _deficit(log_q, log_p, beta)).sum(1),
    )


def _js_gradient(log_p: torch.Tensor, log_q: torch.Tensor, mean_deficit: torch.Tensor, beta: float) -> torch.Tensor:
    return (1 - beta) * _weighted(log_p.exp(), mean_deficit.unsqueeze(1) - _deficit(log_p, log_q, 1 - beta))
