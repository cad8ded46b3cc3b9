"""The interface `bytes` with bounds for any tokenizer, on dense float64 logits, by enumeration.

For model M with realized tokens ending at beta_1 .. beta_n and byte position i, K the last boundary <= i, and
with every mass relative to A_K, the probability of the tokens up to there:

    border      the last B <= i that no token crosses: none that begins at a < B, goes on as y[a : i] does as
                far as either lasts, and is longer than B - a
    known(b)    sum over rows k <= K with beta_k >= border of p_k(w) A_k / A_K, w spells y[beta_k : i] b ..
    known(end), known(other)    at a boundary (i = beta_K): the stop set, and other ids without bytes, of row
                                K
    atom (k, w)                 w spells y[beta_k : j) with beta_k < j <= i, and j is not where the realized
                                token ends
        ended (j = i)           may go to event e if `follows(w, e)`; several ids with w's bytes: to any
        free (j < i)            if `follows(w, y[j])`, else it is left out; may go to any event

Events: symbols that both sides know are one each; the others are joined if the same sides know them and the
same ended atoms may go to them. The loss of a position is the least divergence of (s + a, t + b) over 0 <= a
<= cap_S, sum of a = u_S, and b likewise, where all of a model's masses are divided by their sum and FLOOR is
added to each known event.

The minimum is found by bisection of the cases' equations; `projected_minimum` finds it without them, slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.oracles.bytes import Side, positions

FLOOR = 1e-12
END, OTHER = "end", "other"
Symbol = int | str


@dataclass
class View:
    """One side's knowledge at one byte position."""

    known: dict[Symbol, float]
    ended: dict[tuple[int, bytes], float]
    """Mass of each ended atom, by row and bytes."""
    goes_to: dict[tuple[int, bytes], Callable[[Symbol], bool]]
    free: float


def view(side: Side, log_p: list[list[float]], text: bytes, i: int) -> View:
    begins = [0]
    for label in side.labels[:-1]:
        begins.append(begins[-1] + len(side.pieces[label]))
    last = max(k for k, begin in enumerate(begins) if begin <= i)
    border = max(b for b in range(i + 1) if not _crossed(side, text, i, b))
    known: dict[Symbol, float] = {}
    ended: dict[tuple[int, bytes], float] = {}
    goes_to: dict[tuple[int, bytes], Callable[[Symbol], bool]] = {}
    free = 0.0
    for k in range(last + 1):
        if begins[k] < border:
            continue
        weight = math.exp(-sum(log_p[j][side.labels[j]] for j in range(k, last)))
        realized = begins[k] + len(side.pieces[side.labels[k]])
        for w, piece in enumerate(side.pieces):
            if not piece or not (text[begins[k] : i]).startswith(piece[: i - begins[k]]):
                continue
            j, mass = begins[k] + len(piece), weight * math.exp(log_p[k][w])
            if j > i:
                symbol = piece[i - begins[k]]
                known[symbol] = known.get(symbol, 0.0) + mass
            elif j != realized and j == i:
                ended[k, piece] = ended.get((k, piece), 0.0) + mass
                goes_to[k, piece] = _goes_to(side, w)
            elif j != realized and _goes_to(side, w)(text[j]):
                free += mass
    if begins[last] == i:
        probabilities = [math.exp(x) for x in log_p[last]]
        known[END] = sum(probabilities[w] for w in side.stop_ids)
        others = [w for w, piece in enumerate(side.pieces) if piece == b"" and w not in side.stop_ids]
        if others:
            known[OTHER] = sum(probabilities[w] for w in others)
    return View(known, ended, goes_to, free)


def _crossed(side: Side, text: bytes, i: int, b: int) -> bool:
    for a in range(b):
        for piece in side.pieces:
            if a + len(piece) > b and text[a:i].startswith(piece[: i - a]):
                return True
    return False


def _goes_to(side: Side, w: int) -> Callable[[Symbol], bool]:
    if side.follows is None or side.pieces.count(side.pieces[w]) > 1:
        return lambda _: True
    follows = side.follows
    return lambda symbol: follows(w, symbol if isinstance(symbol, int) else None)


@dataclass
class Position:
    """Student and teacher, with every list over events. Masses are shares of the model's total."""

    known: tuple[list[float], list[float]]
    caps: tuple[list[float], list[float]]
    unresolved: tuple[float, float]


def joined(student: View, teachers: Sequence[View], weights: Sequence[float]) -> Position:
    views = [student, *teachers]
    by_student, by_teachers = set(student.known), set().union(*(t.known for t in teachers))
    events: dict[object, list[Symbol]] = {}
    for symbol in [*range(256), END, OTHER]:
        atoms = frozenset((m, key) for m, v in enumerate(views) for key in v.ended if v.goes_to[key](symbol))
        knows = (symbol in by_student, symbol in by_teachers)
        if all(knows):
            events[symbol] = [symbol]
        elif any(knows) or atoms or any(v.free for v in views):
            events.setdefault((knows, atoms), []).append(symbol)
    if len(events) < 2:
        return Position(([], []), ([], []), (0.0, 0.0))
    rows = []
    for v in views:
        whole = sum(v.known.values()) + sum(v.ended.values()) + v.free
        known = [sum(v.known.get(symbol, 0.0) for symbol in of) / whole for of in events.values()]
        caps = [
            (v.free + sum(mass for key, mass in v.ended.items() if v.goes_to[key](of[0]))) / whole
            for of in events.values()
        ]
        rows.append((known, caps, (sum(v.ended.values()) + v.free) / whole))
    mixed_known = [
        sum(w * r[0][e] for w, r in zip(weights, rows[1:], strict=True)) for e in range(len(events))
    ]
    mixed_caps = [
        sum(w * r[1][e] for w, r in zip(weights, rows[1:], strict=True)) for e in range(len(events))
    ]
    mixed = sum(w * r[2] for w, r in zip(weights, rows[1:], strict=True))
    return Position((rows[0][0], mixed_known), (rows[0][1], mixed_caps), (rows[0][2], mixed))


def least(at: Position, name: str, beta: float) -> float:
    """The least divergence that the bounds allow."""
    if not at.known[0]:
        return 0.0
    s, t = ([x + FLOOR for x in side] for side in at.known)
    c, d = at.caps
    u, v = at.unresolved
    whole = 1 + FLOOR * len(s)
    events = range(len(s))
    floors, ceilings = [max(s[e], t[e]) for e in events], [min(s[e] + c[e], t[e] + d[e]) for e in events]
    if all(floors[e] <= ceilings[e] for e in events) and sum(floors) <= whole <= sum(ceilings):
        return 0.0
    low = _root(lambda x: sum(_clip(x * t[e] - s[e], c[e]) for e in events), u)
    up = _root(lambda x: sum(_clip(x * s[e] - t[e], d[e]) for e in events), v)
    if low * up < 1:
        p = [s[e] + _clip(low * t[e] - s[e], c[e]) for e in events]
        q = [t[e] + _clip(up * s[e] - t[e], d[e]) for e in events]
        return _sum(p, q, name, beta)
    low = _root(lambda x: sum(_clip(x * (t[e] + d[e]) - s[e], c[e]) for e in events), u)
    up = _root(lambda x: sum(_clip(x * (s[e] + c[e]) - t[e], d[e]) for e in events), v)
    if low * up > 1:
        p = [s[e] + _clip(low * (t[e] + d[e]) - s[e], c[e]) for e in events]
        q = [t[e] + _clip(up * (s[e] + c[e]) - t[e], d[e]) for e in events]
        return _sum(p, q, name, beta)

    def fixed(r: float) -> tuple[list[float], list[float]]:
        below = [e for e in events if (s[e] + c[e]) / t[e] < r]
        above = [e for e in events if s[e] / (t[e] + d[e]) > r]
        return (
            [s[e] + c[e] for e in below] + [s[e] for e in above],
            [t[e] for e in below] + [t[e] + d[e] for e in above],
        )

    left, right = 0.0, 1e15
    for _ in range(400):
        middle = math.sqrt(max(left, 1e-30) * right)
        p, q = fixed(middle)
        if whole - sum(p) - middle * (whole - sum(q)) > 0:
            left = middle
        else:
            right = middle
    p, q = fixed(right)
    return _sum([*p, whole - sum(p)], [*q, whole - sum(q)], name, beta)


def projected_minimum(at: Position, name: str, beta: float, steps: int = 4000) -> float:
    """The same by alternation: the best a for the current b, then the best b. Each is one bisection."""
    s, t = ([x + FLOOR for x in side] for side in at.known)
    c, d = at.caps
    u, v = at.unresolved
    events = range(len(s))
    a, b = ([cap * mass / max(sum(caps), 1e-300) for cap in caps] for caps, mass in ((c, u), (d, v)))
    for _ in range(steps):
        q = [t[e] + b[e] for e in events]
        level = _root(lambda x, q=q: sum(_clip(x * q[e] - s[e], c[e]) for e in events), u)
        a = [_clip(level * q[e] - s[e], c[e]) for e in events]
        p = [s[e] + a[e] for e in events]
        level = _root(lambda x, p=p: sum(_clip(x * p[e] - t[e], d[e]) for e in events), v)
        b = [_clip(level * p[e] - t[e], d[e]) for e in events]
    return _sum([s[e] + a[e] for e in events], [t[e] + b[e] for e in events], name, beta)


def _root(function: Callable[[float], float], target: float) -> float:
    """Where an ascending function has the value `target`; 0 if nowhere."""
    if target <= 0:
        return 0.0
    left, right = 1e-30, 1e15
    for _ in range(200):
        middle = math.sqrt(left * right)
        if function(middle) < target:
            left = middle
        else:
            right = middle
    return right


def _clip(x: float, cap: float) -> float:
    return min(max(x, 0.0), cap)


def _sum(p: list[float], q: list[float], name: str, beta: float) -> float:
    total = 0.0
    for p_e, q_e in zip(p, q, strict=True):
        if name == "reverse_kl":
            total += p_e * math.log(p_e / q_e)
        elif name == "forward_kl":
            total += q_e * math.log(q_e / p_e)
        else:
            m = beta * q_e + (1 - beta) * p_e
            total += beta * q_e * math.log(q_e / m) + (1 - beta) * p_e * math.log(p_e / m)
    return total


def position_views(
    student: Side, teachers: Sequence[Side], weights: Sequence[float] = (1.0,)
) -> list[Position]:
    """The compared events at every byte position."""
    sides = [student, *teachers]
    rows = [torch.log_softmax(side.logits.detach().double(), dim=-1).tolist() for side in sides]
    text, count = positions(*sides)
    found = []
    for i in range(count):
        views = [view(side, log_p, text, i) for side, log_p in zip(sides, rows, strict=True)]
        found.append(joined(views[0], views[1:], weights))
    return found


def loss(
    student: Side,
    teachers: Sequence[Side],
    weights: Sequence[float] = (1.0,),
    *,
    divergence_name: str = "reverse_kl",
    beta: float = 0.5,
) -> float:
    """The sum over byte positions."""
    return sum(least(at, divergence_name, beta) for at in position_views(student, teachers, weights))
