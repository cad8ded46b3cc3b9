"""Exact small languages: the cuts follow their definitions, and the models are the language."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_simct.alignment.languages import (
    ExactModel,
    byte_pairs,
    divergence,
    expected,
    flattened,
    language_of,
    longest_match,
    random_byte_pairs,
    random_language,
    unigram,
)

PIECES = [b"", b"a", b"b", b"c", b"ab", b"bc", b"abc", b"ca"]


def every_cut(text: bytes, pieces: list[bytes]) -> list[list[int]]:
    if not text:
        return [[]]
    starts = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece)]
    return [[i, *rest] for i in starts for rest in every_cut(text[len(pieces[i]) :], pieces)]


def test_cuts_of_the_four_kinds() -> None:
    assert longest_match(PIECES)(b"abca") == [6, 1]
    assert byte_pairs(PIECES)(b"abca") == [6, 1], "ab, then abc of ab and c"
    assert byte_pairs(PIECES, [(b"b", b"c"), (b"c", b"a"), (b"a", b"b")])(b"abca") == [1, 5, 1]
    assert byte_pairs([b"", b"a", b"aa"])(b"aaa") == [2, 1], "the leftmost first"
    scores = [0.0, -2.0, -1.5, -1.0, -3.5, -2.0, -9.0, -1.0]
    for text in map(bytes, itertools.product(b"abc", repeat=4)):
        best = max(sum(scores[i] for i in cut) for cut in every_cut(text, PIECES))
        assert sum(scores[i] for i in unigram(PIECES, scores)(text)) == pytest.approx(best)


def test_a_model_of_a_language_gives_each_text_its_probability() -> None:
    language = random_language([b"a", b"b"], 4, seed=2)
    model = ExactModel.of(language, longest_match(PIECES), 0)
    for text, mass in language.items():
        rows = model.logits(text, len(PIECES))
        assert np.exp(rows).sum(1) == pytest.approx(np.ones(len(rows)))
        assert math.exp(rows[np.arange(len(rows)), model.labels(text)].sum()) == pytest.approx(mass)
    assert expected(language, lambda _: 2.0) == pytest.approx(2.0)


def test_a_flattened_student_is_away_from_the_language_and_the_language_is_not() -> None:
    language = language_of([b"a"] * 6 + [b"b"] * 3 + [b"c"])
    assert divergence(language, language) == 0
    flat = flattened(language, 0.5)
    assert sum(flat.values()) == pytest.approx(1)
    assert divergence(flat, language) == pytest.approx(
        sum(p * math.log(p / language[t]) for t, p in flat.items())
    )
    assert divergence(flat, language) > 0.05


def test_random_byte_pairs_disagree_and_are_not_longest_match() -> None:
    pairs = [random_byte_pairs(seed) for seed in range(20)]
    assert all(pair.disagreement >= 0.3 for pair in pairs)
    other = 0
    for pair in pairs:
        for pieces, cut in zip(pair.pieces, pair.cuts, strict=True):
            longest = longest_match(pieces)
            assert all(b"".join(pieces[i] for i in cut(text)) == text for text in pair.language)
            other += any(list(cut(text)) != list(longest(text)) for text in pair.language)
    assert other > 10
