"""Every token-level interface in dense float64: one function for each definition, one row and one
candidate at a time.

Notation: M is the student or the teacher; z_M(p, v) is its logit of id v in the row that predicts label p,
after any soft-cap; p_M is its softmax. A segment (ts, te, ss, se) means that teacher labels [ts, te) and
student labels [ss, se) spell the same bytes. O maps each shared student id to its teacher ids (a stop set has
several, whose mass is one). It shares nothing with the package; gradients come from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SHARED, UNIT, STOP = 0, 1, 2
LENGTH_POWER = {"mean": 1, "raw": 1, "sum": 0}
"""The power of k by which a unit's score is divided."""
Segment = tuple[int, int, int, int]


@dataclass(frozen=True)
class Model:
    """One side of a sample."""

    logits: torch.Tensor
    """float64 [n, V], the real vocabulary."""
    labels: Sequence[int]

    @property
    def log_p(self) -> torch.Tensor:
        return torch.log_softmax(self.logits, dim=-1)


@dataclass(frozen=True)
class Row:
    """One segment as both models' distributions over the same candidates."""

    student: list[torch.Tensor]
    teacher: list[torch.Tensor]


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def divergence(p: list[torch.Tensor], q: list[torch.Tensor], name: str, beta: float = 0.5) -> torch.Tensor:
    """p is the student's. A candidate whose weighting probability is 0 adds nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for p_u, q_u in zip(p, q, strict=True):
        m_u = beta * q_u + (1 - beta) * p_u
        terms = {
            "reverse_kl": [(p_u, q_u, 1.0)],
            "forward_kl": [(q_u, p_u, 1.0)],
            "js": [(q_u, m_u, beta), (p_u, m_u, 1 - beta)],
        }[name]
        for weight, other, share in terms:
            if float(weight.detach()) > 0:
                total = total + share * weight * torch.log(weight / other)
    return total


def normalized(scores: list[torch.Tensor], temperature: float) -> list[torch.Tensor]:
    exponents = [score / temperature for score in scores]
    top = max(float(e.detach()) for e in exponents)
    total = sum(torch.exp(e - top) for e in exponents)
    return [torch.exp(e - top) / total for e in exponents]


def log_add(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.logsumexp(torch.stack(values), dim=0)


def path(model: Model, start: int, end: int) -> list[torch.Tensor]:
    """log p of each label in [start, end)."""
    log_p = model.log_p
    return [log_p[n, model.labels[n]] for n in range(start, end)]


def scored_row(
    student: Model,
    teacher: Model,
    segment: Segment,
    kind: int,
    replaced: int,
    shared: dict[int, list[int]],
    *,
    unit_score: str,
    temperature: float,
) -> Row:
    """`paper` (unit_score "mean"), `sum` ("sum"), `code` ("raw"): a softmax over U of scores (Eq. 6-9)."""
    ts, te, ss, se = segment
    table_s = student.logits if unit_score == "raw" else student.log_p
    table_t = teacher.logits if unit_score == "raw" else teacher.log_p
    scores_s, scores_t = [], []
    for student_id, teacher_ids in shared.items():
        if unit_score != "raw" and kind == UNIT and student_id == replaced:
            continue
        scores_s.append(table_s[ss, student_id])
        scores_t.append(log_add([table_t[ts, t] for t in teacher_ids]))
    if kind == UNIT:
        unit_s = sum(table_s[n, student.labels[n]] for n in range(ss, se))
        unit_t = sum(table_t[m, teacher.labels[m]] for m in range(ts, te))
        scores_s.append(unit_s / (se - ss) ** LENGTH_POWER[unit_score])
        scores_t.append(unit_t / (te - ts) ** LENGTH_POWER[unit_score])
    return Row(normalized(scores_s, temperature), normalized(scores_t, temperature))


def exact_row(
    student: Model, teacher: Model, segment: Segment, kind: int, replaced: int, shared: dict[int, list[int]]
) -> Row:
    """`exact`: a partition of events at the first position. The rest is one of them.

    A shared token w keeps p(w). The first token of the unit's path keeps the probability that does not go on
    along the path. The unit has the path's probability, and that of the shared token of the same bytes (once,
    if that token is the path). Small events are computed as sums of small numbers: 1 minus large ones would
    leave only the rounding of those.
    """
    ts, te, ss, se = segment

    def events(model: Model, start: int, end: int, ids_of: Callable[[int], list[int]]) -> list[torch.Tensor]:
        row = model.log_p[start].exp()
        along = torch.exp(sum(path(model, start, end)))
        first = model.labels[start]
        # p(first) - along; nothing is left of it if the first token is the whole path.
        turns_off = -row[first] * torch.expm1(sum(path(model, start + 1, end), torch.zeros_like(along)))
        found = []
        for w in shared:
            if kind == UNIT and w == replaced:
                continue
            others = [i for i in ids_of(w) if kind != UNIT or i != first]
            found.append(
                sum((row[i] for i in others), turns_off if len(others) < len(ids_of(w)) else 0 * along)
            )
        if kind == UNIT:
            unit = along
            if replaced >= 0:
                same = ids_of(replaced)
                mass = sum(row[i] for i in same)
                is_path = end - start == 1 and first in same
                # The path may begin with the replaced token itself. Then the probability that does not go on
                # is the token's own.
                goes_on = first in same and end - start > 1
                unit = mass if is_path or goes_on else mass + along
            found.append(unit)
        in_u = {i for w in shared for i in ids_of(w)}
        rest = [
            turns_off if kind == UNIT and i == first else row[i] for i in range(len(row)) if i not in in_u
        ]
        return [*found, sum(rest, 0 * along)]

    return Row(events(student, ss, se, lambda w: [w]), events(teacher, ts, te, lambda w: shared[w]))


def top_k_row(
    student: Model,
    teacher: Model,
    segment: Segment,
    shared: dict[int, list[int]],
    *,
    k: int,
    temperature: float,
) -> Row:
    """`strict_topk`: the student's k likeliest shared tokens at the row, renormalized on both sides."""
    ts, _, ss, _ = segment
    likeliest = sorted(shared, key=lambda i: -float(student.logits[ss, i].detach()))[:k]
    return scored_row(
        student,
        teacher,
        segment,
        SHARED,
        -1,
        {i: shared[i] for i in likeliest},
        unit_score="mean",
        temperature=temperature,
    )


def uld_row(student: Model, teacher: Model, segment: Segment, *, k: int, temperature: float) -> torch.Tensor:
    """1.5 times the distance of both sorted distributions. k > 0: the k largest, and one
    bin for the others.
    """
    ts, _, ss, _ = segment
    p = sorted(torch.softmax(student.logits[ss] / temperature, 0), key=lambda x: -float(x.detach()))
    q = sorted(torch.softmax(teacher.logits[ts] / temperature, 0), key=lambda x: -float(x.detach()))
    nothing = torch.zeros((), dtype=torch.float64)
    if k:
        p, q = ([*side[:k], *[nothing] * (k - len(side[:k])), sum(side[k:], nothing)] for side in (p, q))
    width = max(len(p), len(q))
    p, q = (side + [nothing] * (width - len(side)) for side in (p, q))
    return 1.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))


def alm_row(student: Model, teacher: Model, segment: Segment, *, temperature: float) -> torch.Tensor:
    """tau KL of the binary events P^(1/tau) of the whole segment, teacher first; its limit for tau = inf."""
    ts, te, ss, se = segment
    a = torch.clamp(-sum(path(teacher, ts, te)), min=1e-6)
    b = torch.clamp(-sum(path(student, ss, se)), min=1e-6)
    if math.isinf(temperature):
        return (b - a) - a * torch.log(b / a)
    q, p = torch.exp(-a / temperature), torch.exp(-b / temperature)
    return temperature * (q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p)))


def scalar_row(
    student: Model, teacher: Model, segment: Segment, *, name: str, old: Sequence[float] | None
) -> torch.Tensor:
    """Advantages from the chunk's one number, and the clipped surrogate of each token,
    one token at a time.
    """
    ts, te, ss, se = segment
    new = path(student, ss, se)
    old_log = [float(x.detach()) for x in new] if old is None else [float(old[n]) for n in range(ss, se)]
    total_t, total_s = sum(float(x) for x in path(teacher, ts, te)), sum(old_log)
    loss = torch.zeros((), dtype=torch.float64)
    for log_p, log_old in zip(new, old_log, strict=True):
        if name == "dpca":
            advantage = max(-10.0, min(10.0, (total_t / total_s - 1) * log_old)) if se - ss <= 6 else 0.0
        else:
            advantage = total_t / (se - ss) - log_old
        ratio = torch.exp(log_p - log_old)
        loss = loss - torch.minimum(ratio * advantage, torch.clamp(ratio, 0.8, 1.28) * advantage)
    return loss


def captured_teacher_mass(teacher: Model, segment: Segment, kind: int, shared: dict[int, list[int]]) -> float:
    """The probability that `code_gh` and the smallest teacher mass compare: the shared tokens', and a
    unit's geometric mean.
    """
    ts, te, _, _ = segment
    mass = sum(float(teacher.log_p[ts, t].exp()) for ids in shared.values() for t in ids)
    if kind == UNIT:
        mass += math.exp(sum(float(x) for x in path(teacher, ts, te)) / (te - ts))
    return min(1.0, mass)


def row_losses(
    student: Model,
    teacher: Model,
    *,
    segments: Sequence[Segment],
    kinds: Sequence[int],
    replaced: Sequence[int],
    shared: dict[int, list[int]],
    interface: str,
    divergence_name: str = "reverse_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    topk: int = 16,
    uld_topk: int = 0,
    alm_temperature: float = math.inf,
    min_teacher_mass: float = 0.0,
    weights: Sequence[float] | None = None,
    unit_score: str = "mean",
    span_mse: float = 0.0,
    scalar: str = "dpca",
    old_log_probs: Sequence[float] | None = None,
) -> list[torch.Tensor]:
    """The value of each segment that the interface uses, in order. Their sum over N labels is the loss.

    `sft` has one value for each student label. weights: one for each segment; a segment of
    weight 0 is not used.
    """
    if interface == "sft":
        return [-x for x in path(student, 0, len(student.labels))]
    if interface == "code_gh":
        min_teacher_mass = max(min_teacher_mass, 0.5)
    if interface == "kd":
        shared = {i: [i] for i in range(student.logits.shape[1])}
    weights = [1.0] * len(segments) if weights is None else weights
    found = []
    for segment, kind, replaced_id, weight in zip(segments, kinds, replaced, weights, strict=True):
        if span_mse and weight != 0 and kind == UNIT:
            ts, te, ss, se = segment
            found.append(weight * span_mse * (sum(path(teacher, ts, te)) - sum(path(student, ss, se))) ** 2)
            continue
        if weight == 0 or (kind == UNIT and interface in ("strict", "strict_topk", "uld", "kd")):
            continue
        if min_teacher_mass and captured_teacher_mass(teacher, segment, kind, shared) < min_teacher_mass:
            continue
        if interface == "uld":
            value = uld_row(student, teacher, segment, k=uld_topk, temperature=temperature)
        elif interface == "scalar":
            value = scalar_row(student, teacher, segment, name=scalar, old=old_log_probs)
        elif interface == "alm":
            value = alm_row(student, teacher, segment, temperature=alm_temperature)
        else:
            if interface == "exact":
                row = exact_row(student, teacher, segment, kind, replaced_id, shared)
            elif interface == "strict_topk":
                row = top_k_row(student, teacher, segment, shared, k=topk, temperature=temperature)
            else:
                score = {"sum": "sum", "code": "raw", "code_gh": "raw"}.get(interface, unit_score)
                row = scored_row(
                    student,
                    teacher,
                    segment,
                    kind,
                    replaced_id,
                    shared,
                    unit_score=score,
                    temperature=temperature,
                )
            value = divergence(row.student, row.teacher, divergence_name, beta)
        found.append(weight * value)
    return found
