"""A whole sample by the oracle: the sum over the rows of modes.py, and the measurements beside it.

Dense float64 logits. It shares nothing with the package; gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.oracles.modes import SHARED, STOP, UNIT, Model, capped, captured_teacher_mass, row_losses

__all__ = ["SHARED", "STOP", "UNIT", "OracleLoss", "loss"]
NO_ROWS_OF_U = ("sft", "alm", "uld", "scalar")


@dataclass
class OracleLoss:
    sum: torch.Tensor
    rows: list[torch.Tensor]
    """One value for each used segment."""
    mass_outside: tuple[float, float]
    """Student's and teacher's probability of tokens that are not shared, at the first
    positions of the used rows.
    """
    nll: tuple[float, float]


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
    alm_temperature: float = float("inf"),
    topk: int = 16,
    uld_topk: int = 0,
    min_teacher_mass: float = 0.0,
    weights: list[float] | None = None,
    unit_score: str = "mean",
    span_mse: float = 0.0,
    scalar: str = "dpca",
    old_log_probs: list[float] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> OracleLoss:
    """student_logits [N, V_S] and teacher_logits [M, V_T] over the REAL vocabularies, before any soft-cap.

    `shared` maps each shared student id to its teacher ids.
    """
    student = Model(capped(student_logits, student_softcap).double(), student_labels)
    teacher = Model(capped(teacher_logits, teacher_softcap).double(), teacher_labels)
    log_p, log_q = student.log_p, teacher.log_p
    zero = torch.zeros((), dtype=torch.float64)
    terms = row_losses(
        student,
        teacher,
        segments=segments,
        kinds=kinds,
        replaced=replaced,
        shared=shared,
        interface=interface,
        divergence_name=divergence_name,
        temperature=temperature,
        beta=beta,
        alm_temperature=alm_temperature,
        topk=topk,
        uld_topk=uld_topk,
        min_teacher_mass=min_teacher_mass,
        weights=weights,
        unit_score=unit_score,
        span_mse=span_mse,
        scalar=scalar,
        old_log_probs=old_log_probs,
    )
    outside_s = outside_t = 0.0
    for segment, kind in zip(segments, kinds, strict=True):
        ts, _, ss, _ = segment
        dropped = (kind == UNIT and interface in ("strict", "strict_topk", "kd")) or (
            interface == "code_gh" and captured_teacher_mass(teacher, segment, kind, shared) < 0.5
        )
        if interface in NO_ROWS_OF_U or dropped:
            continue
        outside_s += 1 - sum(float(torch.exp(log_p[ss, i]).detach()) for i in shared)
        outside_t += 1 - sum(float(torch.exp(log_q[ts, t])) for ids in shared.values() for t in ids)
    student_nll = -sum((float(log_p[n, label].detach()) for n, label in enumerate(student_labels)), 0.0)
    teacher_nll = -sum((float(log_q[m, label]) for m, label in enumerate(teacher_labels)), 0.0)
    return OracleLoss(
        sum=sum(terms, zero) + 0 * student_logits.sum(),
        rows=[] if interface == "sft" else terms,
        mass_outside=(outside_s, outside_t),
        nll=(student_nll, teacher_nll),
    )
