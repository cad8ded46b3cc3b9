"""The interface `bytes` on dense float64 logits: one byte, one token and one candidate at a time.

For model M with realized tokens v_1 .. v_n ending at byte offsets beta_1 .. beta_n (beta_0 = 0) and byte position i, K
is its last boundary, beta_K <= i, and c_k = y[beta_k : i]. Relative to the realized path up to K:
    mass(b)  = sum over k <= K of  prod_{k < j <= K} 1 / p(v_j | v_<j)  *  sum of p(w | v_<=k), w begins with c_k b
    at a boundary (beta_K = i):  stop = p(stop set | v_<=K), other = p(other specials, tokens without bytes | v_<=K)
    inside a token:              ended = p(tokens that spell c_K | v_<=K)
                                 loose = the same of the longest token that is a prefix of c_K
Byte b is loose for M if M is inside a token, some token is a prefix of c_K, and c_K b is no token: text that goes on
with b may then have left the token that M is in. Gradients come from autograd; nothing is shared with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STOP, REST = "stop", "rest"
FLOOR = 1e-8
SLACK = 1e-4


@dataclass
class Side:
    """One model's word on one response."""

    pieces: list[bytes]
    """Bytes of each id, b"" for ids without content."""
    stop_ids: list[int]
    logits: torch.Tensor
    """[n, V], the real vocabulary."""
    labels: list[int]


@dataclass
class Point:
    """What a side knows at one byte position; masses are relative to its realized path."""

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
                mass[piece[len(c)]] = mass.get(piece[len(c)], zero) + weight * log_p[last if k == last else k, w].exp()
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


def events(student: Point, teacher: Point) -> tuple[dict[str | int, torch.Tensor], dict[str | int, torch.Tensor]]:
    """The probabilities of the two models that are compared at one position."""
    common = sorted(set(student.mass) & set(teacher.mass))
    stop_is_event = student.boundary and teacher.boundary
    has_rest = student.can_end and teacher.can_end
    masses = []
    for own in (student, teacher):
        mass: dict[str | int, torch.Tensor] = {b: own.mass[b] for b in common}
        if stop_is_event:
            mass[STOP] = own.stop
        if has_rest:
            mass[REST] = own.other + own.ended + sum(own.mass[b] for b in own.mass if b not in common)
            mass[REST] = mass[REST] + (own.stop if not stop_is_event else 0)
        masses.append(mass)
    # A byte whose probability may be the same in both models, for all that is known, is no event of its own.
    for b in [b for b in common if b in student.loose or b in teacher.loose]:
        lower, upper = [], []
        for own, mass in zip((student, teacher), masses, strict=True):
            total = sum(mass[e] for e in [*common, STOP, REST] if e in mass)
            spread = own.slack if own.loose & set(common) else 0 * own.slack
            whole = total if has_rest else total + spread
            lower.append((mass[b] / whole).item())
            if b in own.loose:
                upper.append(((mass[b] + spread) / whole).item())
            else:
                upper.append((mass[b] / total).item())
        if lower[0] <= upper[1] * (1 + SLACK) and lower[1] <= upper[0] * (1 + SLACK):
            for mass in masses:
                mass[("merged", b)] = mass[b]
    results = []
    for mass in masses:
        result = {}
        for event, value in mass.items():
            if isinstance(event, tuple):
                continue
            if ("merged", event) in mass:
                continue
            result[event] = value
        if has_rest:
            for event, value in mass.items():
                if isinstance(event, tuple):
                    result[REST] = result[REST] + value
        total = sum(result.values(), student.stop.new_zeros(()))
        results.append({event: (value / total).clamp(min=FLOOR) for event, value in result.items()})
    return results[0], results[1]


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


def positions(student: Side, teacher: Side) -> tuple[bytes, int]:
    """The common text, and how many byte positions are compared: its length, one more where both stopped on it."""
    texts, stopped = [], []
    for side in (student, teacher):
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
    while common < min(map(len, texts)) and texts[0][common] == texts[1][common]:
        common += 1
    same = texts[0] == texts[1] and all(stopped)
    return texts[0][:common], common + same


def loss(
    student: Side, teacher: Side, *, divergence_name: str = "reverse_kl", beta: float = 0.5
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum over byte positions, and one value a position. Differentiable in student.logits."""
    log_p = torch.log_softmax(student.logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher.logits.double(), dim=-1).detach()
    text, count = positions(student, teacher)
    values = []
    for i in range(count):
        p, q = events(point(student, log_p, text, i), point(teacher, log_q, text, i))
        values.append(divergence(p, q, divergence_name, beta))
    return sum(values, 0 * student.logits.double().sum()), values
