"""Small languages with exact models: every text has a probability, and can be written in the
tokens of any tokenizer.

The distributions of a model of such a language in a given tokenization follow by counting:

    p(v | v_1 .. v_k) = mass of the texts whose tokens begin with v_1 .. v_k v, over that of v_1 .. v_k

So two models of ONE language in two tokenizations are the same distribution over texts, whatever their
tokens. A loss between tokenizers that is not 0 on them moves a student that is already right. The tests, the
figure that `check_pair` and `build_alignment_map` show for a pair, and the table of interfaces all compare
such models.

A `Cut` is a tokenizer's own way to write a text in ids (canonical). Four kinds can be made here from a list
of pieces; `Tokenizer.encode` is one too.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Cut = Callable[[bytes], Iterable[int]]
Language = Mapping[bytes, float]
"""Text -> probability; they add up to 1."""
IMPOSSIBLE = -90.0
"""The logit of a token that cannot come next."""


def longest_match(pieces: Sequence[bytes]) -> Cut:
    """From left to right, always the longest piece."""
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    longest = max(map(len, ids), default=0)

    def cut(text: bytes) -> list[int]:
        found, at = [], 0
        while at < len(text):
            size = next(n for n in range(min(longest, len(text) - at), 0, -1) if text[at : at + n] in ids)
            found.append(ids[text[at : at + size]])
            at += size
        return found

    return cut


def byte_pairs(pieces: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]] | None = None) -> Cut:
    """Byte-pair merging: of all neighbours that a merge joins, the earliest merge first, and of
    these the leftmost.

    merges: default, every pair of pieces whose join is a piece, in the order of the joins' ids (as tiktoken
    has it).
    """
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    rank = None if merges is None else {pair: i for i, pair in enumerate(merges)}

    def cut(text: bytes) -> list[int]:
        parts = [bytes([b]) for b in text]
        while True:
            pairs = enumerate(itertools.pairwise(parts))
            if rank is None:
                joins = [(ids[a + b], at) for at, (a, b) in pairs if a + b in ids]
            else:
                joins = [(rank[pair], at) for at, pair in pairs if pair in rank]
            if not joins:
                return [ids[part] for part in parts]
            _, at = min(joins)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    return cut


def unigram(pieces: Sequence[bytes], scores: Sequence[float]) -> Cut:
    """The segmentation whose scores add up to most; of equals the one whose last piece is longest."""
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    longest = max(map(len, ids), default=0)

    def cut(text: bytes) -> list[int]:
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(text) + 1):
            starts = range(max(0, end - longest), end)
            options = [(best[s][0] + scores[ids[text[s:end]]], s) for s in starts if text[s:end] in ids]
            best.append(
                max(options, key=lambda option: (option[0], -option[1]), default=(-math.inf, end - 1))
            )
        found, at = [], len(text)
        while at:
            found.append(ids[text[best[at][1] : at]])
            at = best[at][1]
        return found[::-1]

    return cut


@dataclass(frozen=True)
class ExactModel:
    """The exact model of a language in the tokens of a tokenizer."""

    next_tokens: Mapping[tuple[int, ...], Mapping[int, float]]
    """Ids of the beginning of a text -> the probability of every id that may come next."""
    cut: Cut
    stop_id: int

    @classmethod
    def of(cls, language: Language, cut: Cut, stop_id: int) -> ExactModel:
        """Every text is cut by `cut` and ends with `stop_id`."""
        counts: dict[tuple[int, ...], dict[int, float]] = {}
        for text, mass in language.items():
            ids = [*map(int, cut(text)), stop_id]
            for k, token in enumerate(ids):
                row = counts.setdefault(tuple(ids[:k]), {})
                row[token] = row.get(token, 0.0) + mass
        shares = {}
        for beginning, row in counts.items():
            total = math.fsum(row.values())
            shares[beginning] = {token: mass / total for token, mass in row.items()}
        return cls(shares, cut, stop_id)

    def labels(self, text: bytes) -> list[int]:
        """The ids of the text and of its end."""
        return [*map(int, self.cut(text)), self.stop_id]

    def logits(self, text: bytes, num_ids: int) -> np.ndarray:
        """float64 [labels of the text, num_ids]: log-probabilities, IMPOSSIBLE where a token is."""
        labels = self.labels(text)
        rows = np.full((len(labels), num_ids), IMPOSSIBLE)
        for k in range(len(labels)):
            row = self.next_tokens[tuple(labels[:k])]
            rows[k, list(row)] = np.log(np.maximum(list(row.values()), 1e-300))
        return rows


def language_of(texts: Iterable[bytes]) -> dict[bytes, float]:
    """The language with the frequencies of these texts."""
    counts = Counter(texts)
    total = counts.total()
    return {text: count / total for text, count in counts.items()}


def flattened(language: Language, power: float = 0.8) -> dict[bytes, float]:
    """The language of a student that is less sure: probabilities in proportion to p^power."""
    weights = {text: mass**power for text, mass in language.items()}
    total = math.fsum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def divergence(student: Language, teacher: Language) -> float:
    """KL(student || teacher) over texts, in nats: the value that an interface should find."""
    return math.fsum(mass * math.log(mass / teacher[text]) for text, mass in student.items() if mass > 0)


def expected(language: Language, loss: Callable[[bytes], float]) -> float:
    """The mean of a text's loss over the texts of a language, in nats a text."""
    return math.fsum(mass * loss(text) for text, mass in language.items())


def random_language(units: Sequence[bytes], length: int, seed: int) -> dict[bytes, float]:
    """All texts of up to `length` units, each with a random probability."""
    texts = {b""}
    for _ in range(length):
        texts |= {text + unit for text in texts for unit in units}
    weights = np.random.default_rng(seed).gamma(0.7, size=len(texts)) + 1e-3
    return dict(zip(sorted(texts), (weights / weights.sum()).tolist(), strict=True))


def mixture(languages: Sequence[Language], weights: Sequence[float]) -> dict[bytes, float]:
    """The language whose every next byte, or end, is drawn from one of the languages, by fixed weights."""

    def beginning(language: Language, text: bytes) -> float:
        return sum(mass for t, mass in language.items() if t.startswith(text))

    mixed = {}
    for text in languages[0]:
        mass = 1.0
        for end in range(len(text) + 1):
            mass *= sum(
                w
                * (beginning(of, text[: end + 1]) if end < len(text) else of[text])
                / beginning(of, text[:end])
                for of, w in zip(languages, weights, strict=True)
            )
        mixed[text] = mass
    return mixed


@dataclass(frozen=True)
class PairOfCuts:
    """One language and two ways to write it; id 0 of both vocabularies ends a text."""

    language: Mapping[bytes, float]
    pieces: tuple[list[bytes], list[bytes]]
    merges: tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]
    disagreement: float
    """Share of the texts, by number, in whose inside one tokenizer ends a token where the other does not."""

    @property
    def cuts(self) -> tuple[Cut, Cut]:
        """Both tokenizers' own."""
        first, second = (
            byte_pairs(pieces, merges) for pieces, merges in zip(self.pieces, self.merges, strict=True)
        )
        return first, second


def random_byte_pairs(seed: int, *, least_disagreement: float = 0.3, length: int = 5) -> PairOfCuts:
    """A random language over two or three letters, and two random tables of merges that cut it differently.

    The merges are drawn as training draws them, from the joins of the pieces that there are, but by chance.
    """
    random = np.random.default_rng(seed)
    while True:
        units = [bytes([b]) for b in b"abc"[: random.integers(2, 4)]]
        language = random_language(
            units, length if len(units) == 2 else length - 1, int(random.integers(1 << 30))
        )
        sides = [_random_merges(random, units) for _ in range(2)]
        cuts = [byte_pairs(*side) for side in sides]
        ends = [
            {text: frozenset(np.cumsum([len(pieces[i]) for i in cut(text)]).tolist()) for text in language}
            for cut, (pieces, _) in zip(cuts, sides, strict=True)
        ]
        share = float(np.mean([bool(ends[0][text] ^ ends[1][text]) for text in language]))
        if share >= least_disagreement:
            (first, of_first), (second, of_second) = sides
            return PairOfCuts(language, (first, second), (of_first, of_second), share)


def _random_merges(
    random: np.random.Generator, units: Sequence[bytes]
) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """Pieces with the end of a text first, and merges in their order."""
    pieces, merges = [b"", *units], []
    for _ in range(random.integers(2, 7)):
        content = pieces[1:]
        a, b = (content[random.integers(len(content))] for _ in range(2))
        if len(a + b) <= 4 and a + b not in pieces:
            pieces.append(a + b)
            merges.append((a, b))
    return pieces, merges
