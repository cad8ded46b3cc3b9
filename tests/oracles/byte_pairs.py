"""The same distribution over texts, written out in the tokens of any tokenizer.

A finite language gives every text a probability. What a model of these texts in a given tokenization says is then known
exactly: p(v | v_1 .. v_k) = mass of the texts whose tokens begin with v_1 .. v_k v, over that of v_1 .. v_k.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tests.oracles.bytes import Side

Tokenize = Callable[[bytes], list[int]]
IMPOSSIBLE = -90.0
"""The logit of a token that no text has there."""


def longest_match(pieces: Sequence[bytes]) -> Tokenize:
    """From left to right, always the longest token."""

    def tokenize(text: bytes) -> list[int]:
        ids = []
        while text:
            _, best = max((len(piece), i) for i, piece in enumerate(pieces) if piece and text.startswith(piece))
            ids.append(best)
            text = text[len(pieces[best]) :]
        return ids

    return tokenize


def merges(pieces: Sequence[bytes]) -> Tokenize:
    """Byte-pair merging: of all neighbors whose join is a token, the join of lowest id first."""

    def tokenize(text: bytes) -> list[int]:
        parts = [bytes([b]) for b in text]
        while True:
            pairs = [a + b for a, b in itertools.pairwise(parts)]
            joins = [(pieces.index(pair), at) for at, pair in enumerate(pairs) if pair in pieces]
            if not joins:
                return [pieces.index(part) for part in parts]
            _, at = min(joins)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    return tokenize


def write_out(
    language: dict[bytes, float], text: bytes, pieces: Sequence[bytes], stop_id: int, tokenize: Tokenize
) -> Side:
    """What the model of `language` in this tokenization says along `text`."""
    sequences = [([*tokenize(t), stop_id], mass) for t, mass in language.items()]
    labels = [*tokenize(text), stop_id]
    logits = torch.full((len(labels), len(pieces)), IMPOSSIBLE, dtype=torch.float64)
    for k in range(len(labels)):
        mass = np.zeros(len(pieces))
        for sequence, weight in sequences:
            if sequence[:k] == labels[:k]:
                mass[sequence[k]] += weight
        logits[k, mass > 0] = torch.tensor(np.log(mass[mass > 0] / mass.sum()))
    return Side(list(pieces), [stop_id], logits, labels)


def random_language(units: Sequence[bytes], length: int, seed: int) -> dict[bytes, float]:
    """All texts of up to `length` units, each with a random probability."""
    texts = {b""}
    for _ in range(length):
        texts |= {text + unit for text in texts for unit in units}
    weights = np.random.default_rng(seed).gamma(0.7, size=len(texts)) + 1e-3
    return dict(zip(sorted(texts), (weights / weights.sum()).tolist(), strict=True))


def mixture(languages: Sequence[dict[bytes, float]], weights: Sequence[float]) -> dict[bytes, float]:
    """The language whose every next byte, or end, is drawn from one of the languages, by fixed weights."""

    def beginning(language: dict[bytes, float], text: bytes) -> float:
        return sum(mass for t, mass in language.items() if t.startswith(text))

    mixed = {}
    for text in languages[0]:
        mass = 1.0
        for end in range(len(text) + 1):
            mass *= sum(
                w * (beginning(of, text[: end + 1]) if end < len(text) else of[text]) / beginning(of, text[:end])
                for of, w in zip(languages, weights, strict=True)
            )
        mixed[text] = mass
    return mixed
