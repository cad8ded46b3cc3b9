"""Samples for the interface `bytes`: two random vocabularies, one text, random logits, and
the package's result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.byte_bounds import Side as PlannedSide
from megatron_simct.alignment.byte_bounds import plan_byte_bounds
from megatron_simct.alignment.byte_events import plan_byte_events, plan_mixture_events
from megatron_simct.alignment.continuations import Continuations
from megatron_simct.alignment.segments import align
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.losses.kinds.bytes import ByteOrder, Weigh, byte_loss, mixed_log_masses, slot_log_masses
from megatron_simct.losses.tiles import GivenLogits
from megatron_simct.packing import pack_byte_events, pack_byte_sides
from megatron_simct.records import ByteEvents
from tests import golden
from tests.oracles.bytes import Side, loss, mixture_loss

PADDING_SCORE = 50.0


def table_of(side: Side) -> TokenTable:
    special = [i for i, piece in enumerate(side.pieces) if piece == b""]
    return TokenTable.from_bytes(side.pieces, special_ids=special, stop_ids=side.stop_ids)


def continuations_of(side: Side) -> Continuations | None:
    """The table of `follows`."""
    if side.follows is None:
        return None
    symbols = [*range(256), None]
    ids = range(len(side.pieces))
    return Continuations.of(np.array([[side.follows(i, symbol) for symbol in symbols] for i in ids]))


def bounds_of(student: Side, teachers: Sequence[Side]) -> list[ByteEvents]:
    """The events of `plan_byte_bounds`, one result for each teacher."""
    texts, stops = zip(*(_text(student, teacher) for teacher in teachers), strict=True)
    sides = [
        PlannedSide(table=table_of(side), ids=_ids(side), continuations=continuations_of(side))
        for side in (student, *teachers)
    ]
    return plan_byte_bounds(min(texts, key=len), stop=all(stops), student=sides[0], teachers=sides[1:])


def events_of(student: Side, teacher: Side) -> ByteEvents:
    """The events of the longest match."""
    text, stop = _text(student, teacher)
    tables = table_of(student), table_of(teacher)
    ids = [_ids(side) for side in (student, teacher)]
    return plan_byte_events(
        text, stop=stop, student=tables[0], student_ids=ids[0], teacher=tables[1], teacher_ids=ids[1]
    )


def mixture_events_of(student: Side, teachers: Sequence[Side]) -> list[ByteEvents]:
    texts, stops = zip(*(_text(student, teacher) for teacher in teachers), strict=True)
    return plan_mixture_events(
        min(texts, key=len),
        stop=all(stops),
        student=table_of(student),
        student_ids=_ids(student),
        teachers=[(table_of(teacher), _ids(teacher)) for teacher in teachers],
    )


def _ids(side: Side) -> np.ndarray:
    return np.array(side.labels, dtype=np.int32)


def _text(student: Side, teacher: Side) -> tuple[np.ndarray, bool]:
    """The text that both spell, and whether both stop at its end."""
    table, ids = table_of(student), _ids(student)
    alignment = align(table_of(teacher), _ids(teacher), table, ids)
    content = ids[:-1] if student.labels[-1] in student.stop_ids else ids
    return table.spell(content)[0][: alignment.common_prefix_bytes], alignment.stop


@dataclass
class Evaluation:
    sum: torch.Tensor
    gradient: torch.Tensor
    """[n, W]: this rank's columns, padding included."""
    metrics: dict[str, torch.Tensor]
    label_losses: torch.Tensor
    """[n]"""


def _shard(logits: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int, int]:
    """This rank's columns (with at least one of padding over all ranks), where they start, and the
    number of real ones.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    width = -(-(logits.shape[1] + 1) // size)
    padded = logits.new_full((len(logits), width * size), PADDING_SCORE)
    padded[:, : logits.shape[1]] = logits
    start = rank * width
    return padded[:, start : start + width].clone(), start, max(0, min(width, logits.shape[1] - start))


def evaluate(
    cases: list[tuple[Side, Side]],
    *,
    divergence: str = "reverse_kl",
    js_beta: float = 0.5,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float64,
    bounds: str = "longest-match",
    label_terms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weigh: Weigh | None = None,
) -> Evaluation:
    """The package's loss of a micro-batch of (student, teacher) pairs with common vocabularies."""
    if bounds == "any":
        events = [bounds_of(student, [teacher]) for student, teacher in cases]
    else:
        events = [[events_of(student, teacher)] for student, teacher in cases]
    more = {"divergence": divergence, "js_beta": js_beta, "group": group, "dtype": dtype}
    more |= {"weigh": weigh, "label_terms": label_terms}
    return _evaluate(cases, events, (1.0,), **more)


def evaluate_mixture(
    cases: list[tuple[Side, ...]],
    weights: Sequence[float],
    *,
    divergence: str = "reverse_kl",
    js_beta: float = 0.5,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float64,
    bounds: str = "longest-match",
) -> Evaluation:
    """The same for (student, teacher, teacher, ...), with the teachers mixed."""
    plan = bounds_of if bounds == "any" else mixture_events_of
    events = [plan(student, teachers) for student, *teachers in cases]
    return _evaluate(cases, events, weights, divergence=divergence, js_beta=js_beta, group=group, dtype=dtype)


def _evaluate(
    cases: Sequence[tuple[Side, ...]],
    events: Sequence[Sequence[ByteEvents]],
    weights: Sequence[float],
    *,
    divergence: str,
    js_beta: float,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    label_terms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weigh: Weigh | None = None,
) -> Evaluation:
    sides = list(zip(*cases, strict=True))
    sources, labels, orders, starts = [], [], [], []
    for of_side in sides:
        logits, start, num_columns = _shard(
            torch.cat([side.logits.detach() for side in of_side]).to(dtype), group
        )
        if of_side is sides[0]:
            student_logits = logits.requires_grad_()
        sources.append(GivenLogits(logits, num_columns=num_columns))
        labels.append(torch.tensor([label for side in of_side for label in side.labels]))
        order = ByteOrder.of(
            table_of(of_side[0]), shard_start=start, shard_end=start + logits.shape[1], device="cpu"
        )
        orders.append(order)
        starts.append(start)
    answers = []
    for k, of_side in enumerate(sides[1:], start=1):
        side = pack_byte_sides([e[k - 1].teacher for e in events], [len(side.labels) for side in of_side])
        masses = slot_log_masses(
            sources[k], labels[k], side, order=orders[k], shard_start=starts[k], group=group
        )
        answers.append(masses.split([e[0].slot_event.size for e in events]))
    of_samples = zip(*answers, strict=True)
    if len(weights) > 1:
        of_teacher = [mixed_log_masses(a, weights, e[0]) for a, e in zip(of_samples, events, strict=True)]
    else:
        of_teacher = [answer for (answer,) in of_samples]
    batch = pack_byte_events([e[0] for e in events], [len(side.labels) for side in sides[0]], of_teacher)
    result = byte_loss(
        sources[0],
        labels[0],
        batch,
        order=orders[0],
        shard_start=starts[0],
        divergence=divergence,
        js_beta=js_beta,
        group=group,
        label_terms=label_terms,
        weigh=weigh,
    )
    result.sum.backward()
    return Evaluation(result.sum.detach(), student_logits.grad, result.metrics, result.label_losses)


def golden_case() -> tuple[Side, Side]:
    """G0."""
    sides = []
    for tokens, stop, logits, labels in (
        (golden.STUDENT_TOKENS, "<eos>", golden.STUDENT_LOGITS, golden.STUDENT_LABELS),
        (golden.TEACHER_TOKENS, "<|im_end|>", golden.TEACHER_LOGITS, golden.TEACHER_LABELS),
    ):
        pieces = [b"" if token == stop else token.encode() for token in tokens]
        sides.append(Side(pieces, [tokens.index(stop)], torch.tensor(logits), list(labels)))
    return sides[0], sides[1]


ALPHABET = (b"a", b"b", b"c", "é".encode(), "日".encode())


def random_vocabulary(rng: random.Random, *, closed: bool, size: int = 14) -> list[bytes]:
    """Single bytes of the alphabet, longer tokens with some duplicates, specials without bytes, and
    a stop token, id 0.
    """
    pieces = {bytes([b]) for unit in ALPHABET for b in unit}
    for _ in range(size):
        piece = b"".join(rng.choices(ALPHABET, k=rng.randint(1, 4)))
        pieces |= {piece[:length] for length in range(1, len(piece) + 1)} if closed else {piece}
    vocabulary = sorted(pieces)
    vocabulary += rng.choices(vocabulary, k=2) + [b""] * rng.randint(0, 2)
    rng.shuffle(vocabulary)
    return [b"", *vocabulary]


def spelled(rng: random.Random, pieces: list[bytes], text: bytes) -> list[int]:
    """The ids of a tokenization of the text, canonical or not."""
    ids = []
    while text:
        choices = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece)]
        ids.append(rng.choice(choices))
        text = text[len(pieces[ids[-1]]) :]
    return ids


def random_cases(
    seed: int, *, num_cases: int = 3, scale: float = 2.0, num_sides: int = 2
) -> list[tuple[Side, ...]]:
    """Responses that stop, are cut, differ in their last bytes, contain a special token, or are empty."""
    rng = random.Random(seed)
    vocabularies = [random_vocabulary(rng, closed=rng.random() < 0.5) for _ in range(num_sides)]
    cases = []
    for number in range(num_cases):
        text = b"".join(rng.choices(ALPHABET, k=rng.randint(0 if number else 3, 7)))
        sides = []
        for pieces in vocabularies:
            labels = spelled(rng, pieces, text)
            kind = rng.random()
            if kind < 0.15:
                labels += spelled(rng, pieces, rng.choice(ALPHABET))
            elif kind < 0.25 and b"" in pieces[1:]:
                labels.insert(rng.randint(0, len(labels)), pieces.index(b"", 1))
            if kind > 0.2 or not labels:
                labels.append(0)
            logits = torch.tensor(
                np.random.default_rng(rng.randint(0, 10**6)).normal(size=(len(labels), len(pieces)))
            )
            sides.append(Side(pieces, [0], logits * scale, labels))
        cases.append(tuple(sides))
    return cases


def oracle_of(cases, *, divergence: str, js_beta: float = 0.5) -> tuple[float, torch.Tensor]:
    total, gradients = 0.0, []
    for student, teacher in cases:
        logits = student.logits.detach().requires_grad_()
        value, _ = loss(
            Side(student.pieces, student.stop_ids, logits, student.labels),
            teacher,
            divergence_name=divergence,
            beta=js_beta,
        )
        value.backward()
        total += float(value.detach())
        gradients.append(logits.grad)
    return total, torch.cat(gradients)


def mixture_oracle_of(cases, weights, *, divergence: str, js_beta: float = 0.5) -> tuple[float, torch.Tensor]:
    total, gradients = 0.0, []
    for student, *teachers in cases:
        logits = student.logits.detach().requires_grad_()
        own = Side(student.pieces, student.stop_ids, logits, student.labels)
        value = mixture_loss(own, teachers, weights, divergence_name=divergence, beta=js_beta)
        value.backward()
        total += float(value.detach())
        gradients.append(logits.grad)
    return total, torch.cat(gradients)
