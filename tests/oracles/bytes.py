"""The interface `bytes` on dense float64 logits: one byte, one token and one candidate at a time.

For model M with realized tokens v_1 .. v_n ending at byte offsets beta_1 .. beta_n (beta_0 = 0) and byte
position i, K is its last boundary, beta_K <= i, and c_k = y[beta_k : i]. Relative to the realized path up to
K:
    mass(b) = sum over k <= K of prod_{k < j <= K} 1 / p(v_j | v_<j) * sum of p(w | v_<=k)
              where w begins with c_k b
    at a boundary (beta_K = i):  stop  = p(stop set | v_<=K)
                                 other = p(other specials, tokens without bytes | v_<=K)
    inside a token:              ended = p(tokens that spell c_K | v_<=K)
                                 loose = the same of the longest token that is a prefix of c_K
Byte b is loose for M if M is inside a token, some token is a prefix of c_K, and c_K b is no token: text that
goes on with b may then have left the token that M is in. Gradients come from autograd; nothing is shared with
the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

STOP, REST = "stop", "rest"
FLOOR = 1e-8
BOUND_TOLERANCE = 1e-4


@dataclass
class Side:
    """One model's output for one response."""

    pieces: list[bytes]
    """Bytes of each id, b"" for ids without content."""
    stop_ids: list[int]
    logits: torch.Tensor
    """[n, V], the real vocabulary."""
    labels: list[int]
    follows: Callable[[int, int | None], bool] | None = None
    """Whether a byte, or the end (None), may follow a token in the tokenizer's own
    tokenization; None: not known.
    """


@dataclass
class Point:
    """One side's knowledge at one byte position. Masses are relative to its realized path."""

    mass: dict[int, torch.Tensor]
    boundary: bool
    stop: torch.Tensor
    other: torch.Tensor
    can_end: bool
    ended: torch.Tensor
    slack: torch.Tensor
    """Mass of the longest token that is a prefix of c."""
    loose: set[int]


def point(side: Side, log_p: torch.Tensor, text: bytes, i: int) -> Point:
    begins = [0]
    for label in side.labels[:-1]:
        begins.append(begins[-1] + len(side.pieces[label]))
    last = max(k for k, begin in enumerate(begins) if begin <= i)
    zero = log_p.new_zeros(())
    mass: dict[int, torch.Tensor] = {}
    for k in range(last + 1):
        c = text[begins[k] : i]
        weight = log_p.new_ones(())
        for j in range(k, last):
            weight = weight / log_p[j, side.labels[j]].exp()
        for w, piece in enumerate(side.pieces):
            if piece.startswith(c) and len(piece) > len(c):
                mass[piece[len(c)]] = (
                    mass.get(piece[len(c)], zero) + weight * log_p[last if k == last else k, w].exp()
                )
    c = text[begins[last] : i]
    boundary = c == b""
    stop = sum((log_p[last, w].exp() for w in side.stop_ids), zero) if boundary else zero
    other = zero
    if boundary:
        others = [w for w, piece in enumerate(side.pieces) if piece == b"" and w not in side.stop_ids]
        other = sum((log_p[last, w].exp() for w in others), zero)
    ended = sum((log_p[last, w].exp() for w, piece in enumerate(side.pieces) if c and piece == c), zero)
    prefixes = [c[:length] for length in range(1, len(c) + 1) if c[:length] in side.pieces]
    longest = prefixes[-1] if prefixes else None
    slack = sum((log_p[last, w].exp() for w, piece in enumerate(side.pieces) if piece == longest), zero)
    loose = {b for b in mass if longest is not None and c + bytes([b]) not in side.pieces}
    return Point(mass, boundary, stop, other, boundary or c in side.pieces, ended, slack, loose)


@dataclass
class Shares:
    """One side's masses of the events of a position, in any unit that is the same for all of them."""

    mass: dict[str | int, torch.Tensor]
    slack: torch.Tensor
    """The additional mass that its loose bytes may have, all together; 0 without any."""
    loose: set[int]


def shares(own: Point, common: set[int], *, stop_is_event: bool, has_rest: bool) -> Shares:
    mass: dict[str | int, torch.Tensor] = {b: own.mass[b] for b in sorted(common)}
    if stop_is_event:
        mass[STOP] = own.stop
    if has_rest:
        mass[REST] = own.other + own.ended + sum(own.mass[b] for b in own.mass if b not in common)
        mass[REST] = mass[REST] + (own.stop if not stop_is_event else 0)
    loose = own.loose & common
    return Shares(mass, own.slack if loose else 0 * own.slack, loose)


def mixture(own: list[Shares], wholes: list[torch.Tensor], weights: list[float]) -> Shares:
    """A teacher whose probability of b is the weighted sum of the teachers' probabilities."""
    parts = list(zip(weights, own, wholes, strict=True))
    mass = {event: sum(w * s.mass[event] / whole for w, s, whole in parts) for event in own[0].mass}
    return Shares(
        mass, sum(w * s.slack / whole for w, s, whole in parts), set().union(*(s.loose for s in own))
    )


def compared(student: Shares, teacher: Shares) -> list[dict[str | int, torch.Tensor]]:
    """The probabilities of the two sides that are compared at one position."""
    # If a byte's probability may be the same in both models, by all that is known, it is not
    # an event of its own.
    has_rest = REST in student.mass
    merged = set()
    for b in student.loose | teacher.loose:
        lower, upper = [], []
        for own in (student, teacher):
            total = sum(own.mass.values())
            whole = total if has_rest else total + own.slack
            lower.append((own.mass[b] / whole).item())
            upper.append(
                ((own.mass[b] + own.slack) / whole if b in own.loose else own.mass[b] / total).item()
            )
        if lower[0] <= upper[1] * (1 + BOUND_TOLERANCE) and lower[1] <= upper[0] * (1 + BOUND_TOLERANCE):
            merged.add(b)
    results = []
    for own in (student, teacher):
        result = {event: value for event, value in own.mass.items() if event not in merged}
        if has_rest:
            result[REST] = result[REST] + sum(own.mass[b] for b in merged)
        total = sum(result.values(), 0 * student.slack)
        results.append({event: (value / total).clamp(min=FLOOR) for event, value in result.items()})
    return results


def events(student: Point, teacher: Point) -> list[dict[str | int, torch.Tensor]]:
    """The probabilities of the two models that are compared at one position."""
    common = set(student.mass) & set(teacher.mass)
    options = {
        "stop_is_event": student.boundary and teacher.boundary,
        "has_rest": student.can_end and teacher.can_end,
    }
    return compared(*(shares(own, common, **options) for own in (student, teacher)))


def mixture_events(
    student: Point, teachers: list[Point], weights: list[float]
) -> list[dict[str | int, torch.Tensor]]:
    """Events of a student and a mixture. None if a teacher is inside a token that cannot end here."""
    if not all(teacher.can_end for teacher in teachers):
        return [{}, {}]
    common = set(student.mass).intersection(*(set(teacher.mass) for teacher in teachers))
    options = {
        "stop_is_event": student.boundary and all(teacher.boundary for teacher in teachers),
        "has_rest": student.can_end,
    }
    of_teachers = [shares(teacher, common, **options) for teacher in teachers]
    wholes = [sum(t.mass.values()) + t.stop + t.other + t.ended for t in teachers]
    return compared(shares(student, common, **options), mixture(of_teachers, wholes, weights))


def divergence(p: dict, q: dict, name: str, beta: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for event in p:
        p_e, q_e = p[event], q[event]
        if name == "reverse_kl":
            total = total + p_e * torch.log(p_e / q_e)
        elif name == "forward_kl":
            total = total + q_e * torch.log(q_e / p_e)
        else:
            m_e = beta * q_e + (1 - beta) * p_e
            total = total + beta * q_e * torch.log(q_e / m_e) + (1 - beta) * p_e * torch.log(p_e / m_e)
    return total


def positions(*sides: Side) -> tuple[bytes, int]:
    """The common text, and the number of compared byte positions: its length, and one more if all
    stopped at its end.
    """
    texts, stopped = [], []
    for side in sides:
        text, whole = b"", True
        stops = bool(side.labels) and side.labels[-1] in side.stop_ids
        for label in side.labels[: len(side.labels) - stops]:
            if side.pieces[label] == b"":
                whole = False
                break
            text += side.pieces[label]
        texts.append(text)
        stopped.append(stops and whole)
    common = 0
    while common < min(map(len, texts)) and len({text[common] for text in texts}) == 1:
        common += 1
    return texts[0][:common], common + (len(set(texts)) == 1 and all(stopped))


def loss(
    student: Side, teacher: Side, *, divergence_name: str = "reverse_kl", beta: float = 0.5
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum over byte positions, and the value of each position. Differentiable in student.logits."""
    log_p = torch.log_softmax(student.logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher.logits.double(), dim=-1).detach()
    text, count = positions(student, teacher)
    values = []
    for i in range(count):
        p, q = events(point(student, log_p, text, i), point(teacher, log_q, text, i))
        values.append(divergence(p, q, divergence_name, beta))
    return sum(values, 0 * student.logits.double().sum()), values


def mixture_loss(
    student: Side,
    teachers: list[Side],
    weights: list[float],
    *,
    divergence_name: str = "reverse_kl",
    beta: float = 0.5,
) -> torch.Tensor:
    """The sum over byte positions. Differentiable in student.logits."""
    log_p = torch.log_softmax(student.logits.double(), dim=-1)
    log_q = [torch.log_softmax(teacher.logits.double(), dim=-1).detach() for teacher in teachers]
    text, count = positions(student, *teachers)
    total = 0 * student.logits.double().sum()
    for i in range(count):
        of_teachers = [point(teacher, log, text, i) for teacher, log in zip(teachers, log_q, strict=True)]
        p, q = mixture_events(point(student, log_p, text, i), of_teachers, weights)
        total = total + divergence(p, q, divergence_name, beta)
    return total
