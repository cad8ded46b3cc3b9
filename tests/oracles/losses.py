"""The interfaces on dense float64 logits, one row and one candidate at a time, written from SimCT's Eq. 6-9.

For M in {student, teacher}, prefix h and candidate u with realization v_1 .. v_k in M's own tokens:
    s_M(u | h) = (1/k) sum_j log p_M(v_j | h, v_<j)
    q_M(u | h) = exp(s_M(u | h) / tau) / sum over u' in U of exp(s_M(u' | h) / tau)
    U = the shared tokens and, in a row of a multi-token unit, that unit
    loss = sum over rows of the divergence of q_S and q_T
Nothing is vectorized over the candidates, nothing is shared with the package. Gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHARED, UNIT, STOP = 0, 1, 2


@dataclass
class OracleLoss:
    sum: torch.Tensor
    rows: list[torch.Tensor]
    """One value a segment that is used."""
    mass_outside: tuple[float, float]
    """Student's and teacher's probability of tokens that are not shared, at the first positions of the used rows."""
    nll: tuple[float, float]


def divergence(p: list[torch.Tensor], q: list[torch.Tensor], name: str, beta: float) -> torch.Tensor:
    """Of two distributions given as probabilities of the same candidates; p is the student's."""
    total = torch.zeros((), dtype=torch.float64)
    for p_u, q_u in zip(p, q, strict=True):
        if name == "reverse_kl":
            total = total + p_u * torch.log(p_u / q_u)
        elif name == "forward_kl":
            total = total + q_u * torch.log(q_u / p_u)
        else:
            m_u = beta * q_u + (1 - beta) * p_u
            total = total + beta * q_u * torch.log(q_u / m_u) + (1 - beta) * p_u * torch.log(p_u / m_u)
    return total


def loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    student_labels: list[int],
    teacher_labels: list[int],
    segments: list[tuple[int, int, int, int]],
    kinds: list[int],
    replaced: list[int],
    shared: dict[int, list[int]],
    interface: str,
    divergence_name: str = "reverse_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> OracleLoss:
    """student_logits [N, V_S] and teacher_logits [M, V_T] over the REAL vocabularies.

    `shared` maps each shared student id to its teacher ids.
    """
    if student_softcap is not None:
        student_logits = student_softcap * torch.tanh(student_logits / student_softcap)
    if teacher_softcap is not None:
        teacher_logits = teacher_softcap * torch.tanh(teacher_logits / teacher_softcap)
    log_p = torch.log_softmax(student_logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher_logits.double(), dim=-1)
    zero = torch.zeros((), dtype=torch.float64)
    student_nll = -sum((log_p[n, label] for n, label in enumerate(student_labels)), zero)
    teacher_nll = -sum(float(log_q[m, label]) for m, label in enumerate(teacher_labels))
    if interface == "sft":
        return OracleLoss(student_nll, [], (0.0, 0.0), (float(student_nll.detach()), teacher_nll))

    rows: list[torch.Tensor] = []
    outside_s = outside_t = 0.0
    for (ts, te, ss, se), kind, replaced_id in zip(segments, kinds, replaced, strict=True):
        if interface == "strict" and kind == UNIT:
            continue
        scores_s: list[torch.Tensor] = []
        scores_t: list[torch.Tensor] = []
        for student_id, teacher_ids in shared.items():
            if kind == UNIT and student_id == replaced_id:
                continue  # the unit spells these bytes: it is the one candidate for them
            scores_s.append(log_p[ss, student_id])
            scores_t.append(torch.log(sum(torch.exp(log_q[ts, t]) for t in teacher_ids)))
        if kind == UNIT:
            scores_s.append(sum(log_p[n, student_labels[n]] for n in range(ss, se)) / (se - ss))
            scores_t.append(sum(log_q[m, teacher_labels[m]] for m in range(ts, te)) / (te - ts))
        z_s = sum(torch.exp(s / temperature) for s in scores_s)
        z_t = sum(torch.exp(s / temperature) for s in scores_t)
        p = [torch.exp(s / temperature) / z_s for s in scores_s]
        q = [torch.exp(s / temperature) / z_t for s in scores_t]
        rows.append(divergence(p, q, divergence_name, beta))
        outside_s += 1 - sum(float(torch.exp(log_p[ss, i]).detach()) for i in shared)
        outside_t += 1 - sum(float(torch.exp(log_q[ts, t])) for ids in shared.values() for t in ids)
    total = sum(rows, zero) + 0 * student_logits.sum()
    return OracleLoss(total, rows, (outside_s, outside_t), (float(student_nll.detach()), teacher_nll))
