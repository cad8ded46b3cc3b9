"""The token-level losses once more, as whole matrices in float64, on texts over random vocabularies.

Written from the equations and shared with neither the package nor `modes.py`: segments come from the byte
offsets of the two tokenizations, the shared tokens from the pieces, rows from one [segments, shared tokens +
1] matrix a model. Gradients come from autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

LETTERS = b"abc"
SHARED, UNIT, STOP = 0, 1, 2


@dataclass(frozen=True)
class Sample:
    """One response: two vocabularies, the two tokenizations of one text, and both models'
    logits at its labels.
    """

    student_pieces: list[bytes]
    teacher_pieces: list[bytes]
    """The stop tokens have no bytes: the student's is id 0, the teacher's are ids 0 and 1."""
    student_labels: list[int]
    teacher_labels: list[int]
    segments: list[tuple[int, int, int, int]]
    weights: list[float]
    student_logits: torch.Tensor
    """float64 [n, V_S]"""
    teacher_logits: torch.Tensor

    @property
    def shared(self) -> dict[int, list[int]]:
        """Tokens of equal bytes, and the stop tokens. If several tokens have the same
        bytes, the lowest id.
        """
        first_of: dict[bytes, int] = {}
        for i, piece in reversed(list(enumerate(self.teacher_pieces))):
            first_of[piece] = i
        found = {0: [0, 1]}
        for i, piece in enumerate(self.student_pieces):
            if i and piece in first_of and self.student_pieces.index(piece) == i:
                found[i] = [first_of[piece]]
        return found

    @property
    def kinds(self) -> list[int]:
        kinds, shared = [], self.shared
        for ts, te, ss, se in self.segments:
            student, teacher = self.student_labels[ss], self.teacher_labels[ts]
            single = (te - ts, se - ss) == (1, 1) and teacher in shared.get(student, [])
            kinds.append((STOP if student == 0 else SHARED) if single else UNIT)
        return kinds

    @property
    def replaced(self) -> list[int]:
        """The shared token that spells a unit's bytes, or -1."""
        found = []
        for (_, _, ss, se), kind in zip(self.segments, self.kinds, strict=True):
            text = b"".join(self.student_pieces[i] for i in self.student_labels[ss:se])
            same = [i for i in self.shared if i and self.student_pieces[i] == text]
            found.append(same[0] if kind == UNIT and same else -1)
        return found


def random_sample(seed: int, *, length: int = 24) -> Sample:
    """A text over three letters, tokenized at random on both sides: units begin with, and
    spell, shared tokens.
    """
    rng = np.random.default_rng(seed)
    text = bytes(rng.choice(list(LETTERS), length).tolist())
    sides = []
    for num_stops, num_words in ((1, 14), (2, 17)):
        words = [bytes([letter]) for letter in LETTERS]
        words += [bytes(rng.choice(list(LETTERS), rng.integers(2, 5)).tolist()) for _ in range(num_words)]
        rng.shuffle(words)  # some of them twice: only one of two equal tokens is shared
        pieces = [b""] * num_stops + words
        labels, at = [], 0
        while at < length:
            fitting = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece, at)]
            labels.append(int(rng.choice(fitting)))
            at += len(pieces[labels[-1]])
        sides.append((pieces, labels))
    (student_pieces, student_labels), (teacher_pieces, teacher_labels) = sides
    ends_s, ends_t = (np.cumsum([len(pieces[i]) for i in labels]) for pieces, labels in sides)
    common = sorted(set(ends_s.tolist()) & set(ends_t.tolist()))
    last = [(int((ends_t <= end).sum()), int((ends_s <= end).sum())) for end in common]
    segments = [(t, te, s, se) for (t, s), (te, se) in zip([(0, 0), *last], last, strict=False)]
    if rng.random() < 0.7:
        student_labels = [*student_labels, 0]
        teacher_labels = [*teacher_labels, int(rng.integers(2))]
        segments.append(
            (len(teacher_labels) - 1, len(teacher_labels), len(student_labels) - 1, len(student_labels))
        )
    return Sample(
        student_pieces=student_pieces,
        teacher_pieces=teacher_pieces,
        student_labels=student_labels,
        teacher_labels=teacher_labels,
        segments=segments,
        weights=rng.choice([0.0, 0.5, 1.0, 2.0], len(segments)).tolist(),
        student_logits=torch.tensor(rng.normal(size=(len(student_labels), len(student_pieces))) * 2),
        teacher_logits=torch.tensor(rng.normal(size=(len(teacher_labels), len(teacher_pieces))) * 2),
    )


def divergence(p: torch.Tensor, q: torch.Tensor, name: str, beta: float) -> torch.Tensor:
    """[A, c], the student first -> [A]."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        used = a > 0
        return torch.where(used, a * torch.log(torch.where(used, a, 1) / torch.where(used, b, 1)), 0).sum(1)

    if name == "reverse_kl":
        return kl(p, q)
    if name == "forward_kl":
        return kl(q, p)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def loss(
    sample: Sample,
    student_logits: torch.Tensor,
    interface: str,
    *,
    divergence_name: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    topk: int = 16,
    uld_topk: int = 0,
    alm_temperature: float = math.inf,
    min_teacher_mass: float = 0.0,
) -> torch.Tensor:
    """The sum over rows.

    `code` uses the minimal segments here: the alignment determines the segments.
    """
    z_s, z_t = student_logits, sample.teacher_logits
    log_p, log_q = z_s.log_softmax(1), z_t.log_softmax(1)
    own_s = (torch.arange(len(z_s)), torch.tensor(sample.student_labels))
    own_t = (torch.arange(len(z_t)), torch.tensor(sample.teacher_labels))
    if interface == "sft":
        return -log_p[own_s].sum()
    segments = torch.tensor(sample.segments)
    ts, te, ss, se = segments.unbind(1)
    kinds, replaced = torch.tensor(sample.kinds), torch.tensor(sample.replaced)
    is_unit = kinds == UNIT
    member_s = ((torch.arange(len(z_s)) >= ss[:, None]) & (torch.arange(len(z_s)) < se[:, None])).double()
    member_t = ((torch.arange(len(z_t)) >= ts[:, None]) & (torch.arange(len(z_t)) < te[:, None])).double()
    length_s, length_t = member_s.sum(1), member_t.sum(1)
    students = torch.tensor(list(sample.shared))
    joins = torch.zeros(z_t.shape[1], len(students), dtype=torch.float64)
    for column, teachers in enumerate(sample.shared.values()):
        joins[teachers, column] = 1
    weights = torch.tensor(sample.weights, dtype=torch.float64)
    path_s, path_t = member_s @ log_p[own_s], member_t @ log_q[own_t]
    captured = log_q[ts].exp() @ joins @ torch.ones(len(students), dtype=torch.float64)
    captured = (captured + torch.where(is_unit, (path_t / length_t).exp(), 0)).clamp(max=1)
    least = 0.5 if interface == "code_gh" else min_teacher_mass
    if interface not in ("alm", "uld"):
        weights = torch.where(captured < least, 0, weights)
    if interface in ("strict", "strict_topk", "uld"):
        weights = torch.where(is_unit, 0, weights)

    if interface == "alm":
        a, b = (-path_t).clamp(min=1e-6), (-path_s).clamp(min=1e-6)
        if math.isinf(alm_temperature):
            return (weights * (b - a - a * (b / a).log())).sum()
        q, p = (-a / alm_temperature).exp(), (-b / alm_temperature).exp()
        rows = alm_temperature * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
        return (weights * rows).sum()
    if interface == "uld":
        p, q = (side.exp().sort(dim=1, descending=True).values for side in (log_p[ss], log_q[ts]))
        if uld_topk:
            p, q = (torch.cat([s[:, :uld_topk], s[:, uld_topk:].sum(1, keepdim=True)], 1) for s in (p, q))
        width = max(p.shape[1], q.shape[1])
        p, q = (torch.nn.functional.pad(s, (0, width - s.shape[1])) for s in (p, q))
        return (weights * 1.5 * (p - q).abs().sum(1)).sum()

    is_replaced = is_unit[:, None] & (students == replaced[:, None])
    if interface == "exact":
        first_s = is_unit[:, None] & (students == torch.tensor(sample.student_labels)[ss][:, None])
        first_t = is_unit[:, None] & joins[torch.tensor(sample.teacher_labels)[ts]].bool()
        sides = []
        for mass, first, path in (
            (log_p[ss][:, students].exp(), first_s, path_s.exp()),
            (log_q[ts].exp() @ joins, first_t, path_t.exp()),
        ):
            left = mass - torch.where(first, path[:, None], 0)
            of_unit = torch.where(is_unit, path + torch.where(is_replaced, left, 0).sum(1), 0)
            events = torch.cat([torch.where(is_replaced, 0, left), of_unit[:, None]], 1)
            sides.append(torch.cat([events, 1 - events.sum(1, keepdim=True)], 1))
        return (weights * divergence(*sides, divergence_name, beta)).sum()

    raw = interface in ("code", "code_gh")
    scores_s = (z_s if raw else log_p)[ss][:, students]
    scores_t = ((z_t if raw else log_q)[ts].exp() @ joins).log()
    unit_s, unit_t = (member_s @ z_s[own_s], member_t @ z_t[own_t]) if raw else (path_s, path_t)
    if interface != "sum":
        unit_s, unit_t = unit_s / length_s, unit_t / length_t
    if raw:
        is_replaced = torch.zeros_like(is_replaced)
    absent = -math.inf
    rows = []
    for scores, unit in ((scores_s, unit_s), (scores_t, unit_t)):
        unit = torch.where(is_unit, unit, absent)
        rows.append(torch.cat([scores.masked_fill(is_replaced, absent), unit[:, None]], 1) / temperature)
    if interface == "strict_topk":
        chosen = rows[0].topk(min(topk, len(students)), dim=1).indices
        rows = [row.gather(1, chosen) for row in rows]
    p, q = (row.softmax(1) for row in rows)
    return (weights * divergence(p, q, divergence_name, beta)).sum()


def event_masses(
    sample: Sample, a: int, log_p: torch.Tensor, log_q: torch.Tensor, k: int
) -> list[torch.Tensor]:
    """[P_S, P_T] of a segment's events, the sampled one first. Every pair of tokens is tried.

    Of tokens with equal bytes the student's lowest id and the teacher's likeliest token count. The
    stop tokens are one.
    """
    ts, te, ss, se = sample.segments[a]
    own, theirs = sample.student_labels[ss:se], sample.teacher_labels[ts:te]
    row = log_q[te - 1]
    chosen = set(row.topk(min(k, len(row))).indices.tolist()) | {theirs[-1]}
    before_s = sum(
        (log_p[ss + i, token] for i, token in enumerate(own[:-1])), torch.zeros((), dtype=torch.float64)
    )
    before_t = sum(float(log_q[ts + j, token]) for j, token in enumerate(theirs[:-1]))
    text_s = b"".join(sample.student_pieces[i] for i in own[:-1])
    text_t = b"".join(sample.teacher_pieces[i] for i in theirs[:-1])
    single = len(own) == len(theirs) == 1
    masses = {own[-1]: float(row[theirs[-1]].exp())}
    if single and chosen & {0, 1} and (own[-1] == 0 or theirs[-1] > 1):
        masses[0] = sum(float(row[i].exp()) for i in chosen & {0, 1})
    for u, piece in enumerate(sample.student_pieces):
        if u == 0 or sample.student_pieces.index(piece) != u or not (len(own) == 1 or len(theirs) == 1):
            continue
        same = [
            t
            for t in chosen
            if t > 1 and t != theirs[-1] and text_s + piece == text_t + sample.teacher_pieces[t]
        ]
        if same and u not in masses:
            masses[u] = max(float(row[t].exp()) for t in same)
    p = torch.stack([(before_s + log_p[se - 1, u]).exp() for u in masses])
    return [p, torch.tensor(list(masses.values()), dtype=torch.float64) * math.exp(before_t)]


def prefix_target(sample: Sample, a: int, label: int, log_q: torch.Tensor, k: int) -> dict[int, float]:
    """The `bpm` target of one student label of segment a, from the bytes before it, over
    every teacher token.
    """
    ts, te, ss, _ = sample.segments[a]
    words = [sample.teacher_pieces[i] for i in sample.teacher_labels[ts:te]]
    text = b"".join(words)
    before = sum(len(sample.student_pieces[i]) for i in sample.student_labels[ss:label])
    j = 0
    while j + 1 < len(words) and sum(map(len, words[: j + 1])) <= before:
        j += 1
    behind = text[sum(map(len, words[:j])) : before]

    def chosen(row: int) -> dict[int, float]:
        ids = set(log_q[row].topk(min(k, log_q.shape[1])).indices.tolist()) | {sample.teacher_labels[row]}
        return {i: float(log_q[row, i].exp()) for i in ids}

    def begins_as(rest: bytes) -> int | None:
        fitting = [u for u, piece in enumerate(sample.student_pieces) if u and rest.startswith(piece)]
        return min(fitting, key=lambda u: (-len(sample.student_pieces[u]), u)) if fitting else None

    masses: dict[int, float] = {}
    for w, q in chosen(ts + j).items():
        piece = sample.teacher_pieces[w]
        if w < 2:
            u = 0 if behind == b"" else None
        else:
            u = begins_as(piece[len(behind) :]) if piece[: len(behind)] == behind else None
        if u is not None:
            masses[u] = masses.get(u, 0.0) + q
    said = sample.student_labels[label]
    end = before + len(sample.student_pieces[said])
    if end > sum(map(len, words[: j + 1])):
        path, m = float(log_q[ts + j, sample.teacher_labels[ts + j]].exp()), j + 1
        while m < len(words) and sum(map(len, words[: m + 1])) <= end:
            path *= float(log_q[ts + m, sample.teacher_labels[ts + m]].exp())
            m += 1
        left = text[sum(map(len, words[:m])) : end]
        if left:
            path *= sum(q for w, q in chosen(ts + m).items() if sample.teacher_pieces[w].startswith(left))
        head = begins_as(words[j][len(behind) :])
        if head is not None:
            masses[head] = max(0.0, masses[head] - path)
        masses[said] = masses.get(said, 0.0) + path
    whole = sum(masses.values())
    return {u: mass / whole for u, mass in masses.items() if mass > 0}


def event_loss(
    sample: Sample,
    student_logits: torch.Tensor,
    interface: str,
    *,
    k: int,
    divergence_name: str,
    beta: float = 0.5,
) -> torch.Tensor:
    """`partition`, `topk_kl` and `bpm`."""
    log_p, log_q = student_logits.log_softmax(1), sample.teacher_logits.log_softmax(1)
    total = 0 * student_logits.sum()
    for a, (kind, weight) in enumerate(zip(sample.kinds, sample.weights, strict=True)):
        if weight == 0 or (kind == UNIT and interface == "topk_kl"):
            continue
        if interface == "bpm":
            for label in range(*sample.segments[a][2:]):
                target = torch.zeros_like(log_p[label]).detach()
                for u, mass in prefix_target(sample, a, label, log_q, k).items():
                    target[u] = mass
                total = (
                    total
                    + weight * divergence(log_p[label].exp()[None], target[None], divergence_name, beta)[0]
                )
            continue
        p, q = event_masses(sample, a, log_p, log_q, k)
        if interface == "topk_kl":
            total = total + weight * (p * (p / q).log() - p + q).sum()
        else:
            p, q = (torch.cat([side, 1 - side.sum(0, keepdim=True)])[None] for side in (p, q))
            total = total + weight * divergence(p, q, divergence_name, beta)[0]
    return total
