"""Sampling from one row of logits in float64, one process, one token at a time, following the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    normalizer = math.fsum(math.exp(z - top) for z in logits)
    return [z - top - math.log(normalizer) for z in logits]


def greedy(logits: Sequence[float]) -> int:
    """The likeliest id; the lowest of equals."""
    best = 0
    for i, z in enumerate(logits):
        if z > logits[best]:
            best = i
    return best


def nucleus(probs: Sequence[float], top_p: float) -> set[int]:
    """The fewest tokens, from the most probable, that have top_p of the mass, and those as
    probable as the last.
    """
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    wanted = top_p * math.fsum(probs)
    chosen: list[int] = []
    for i in order:
        chosen.append(i)
        if math.fsum(probs[j] for j in chosen) >= wanted:
            break
    lowest = probs[chosen[-1]]
    return {i for i in order if probs[i] >= lowest}


def distribution(
    logits: Sequence[float], *, temperature: float, top_p: float, top_k: int = -1
) -> list[float]:
    """The distribution to sample from: tempered, cut to the top_k most probable and those that tie with the
    last of them, cut to the nucleus of the rest, normalized.
    """
    probs = [math.exp(score) for score in log_softmax([z / temperature for z in logits])]
    if 0 < top_k < len(probs):
        lowest = sorted(probs)[-top_k]
        probs = [p if p >= lowest else 0.0 for p in probs]
    if top_p < 1.0:
        kept = nucleus(probs, top_p)
        probs = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    total = math.fsum(probs)
    return [p / total for p in probs]


def choose(probs: Sequence[float], uniform: float) -> tuple[int, float]:
    """The first id whose cumulative probability exceeds the uniform number, and the distance of that
    number from a boundary.
    """
    ends = [math.fsum(probs[: i + 1]) for i in range(len(probs))]
    chosen = next((i for i, end in enumerate(ends) if end > uniform), len(probs) - 1)
    return chosen, min(abs(end - uniform) for end in ends)
