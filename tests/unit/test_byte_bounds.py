"""The least divergence that the unresolved mass permits: equal to its oracle, and zero for
any two tokenizers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment.continuations import Merges, inside_pretokens
from megatron_simct.alignment.languages import (
    ExactModel,
    divergence,
    flattened,
    longest_match,
    mixture,
    random_byte_pairs,
    random_language,
    unigram,
)
from megatron_simct.losses.kinds import bytes as losses_bytes
from tests.oracles import byte_bounds as oracle
from tests.oracles import byte_cases
from tests.oracles.byte_cases import evaluate, evaluate_mixture, random_cases, table_of
from tests.oracles.bytes import Side
from tests.unit.test_byte_mixture import LETTERS as MIXED_LETTERS
from tests.unit.test_byte_mixture import TRIPLES, WEIGHTS
from tests.unit.test_bytes import DIVERGENCES, KINDS, PAIRS

SEEDS = range(12)


def limited(cases, seed: int, *, share: float = 0.6) -> list[tuple[Side, ...]]:
    """The same cases with a table for each vocabulary of the bytes that may follow; the
    end may always follow.
    """
    tables: dict[int, np.ndarray] = {}
    found = []
    for case in cases:
        sides = []
        for number, side in enumerate(case):
            if number not in tables:
                table = np.random.default_rng(10 * seed + number).random((len(side.pieces), 257)) < share
                table[:, 256] = True
                tables[number] = table
            sides.append(replace(side, follows=_reader(tables[number])))
        found.append(tuple(sides))
    return found


def _reader(table: np.ndarray) -> Callable[[int, int | None], bool]:
    return lambda token, symbol: bool(table[token, 256 if symbol is None else symbol])


def cases_of(seed: int, *, num_sides: int = 2, num_cases: int = 3) -> list[tuple[Side, ...]]:
    cases = random_cases(seed, scale=1.0 + seed % 2, num_sides=num_sides, num_cases=num_cases)
    return limited(cases, seed) if seed % 3 else cases


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_equals_the_oracle(seed, monkeypatch) -> None:
    monkeypatch.setattr(losses_bytes, "TILE", (1, 3, 4096)[seed % 3])
    cases = cases_of(seed)
    for name in DIVERGENCES:
        expected = sum(oracle.loss(s, [t], divergence_name=name, beta=0.3) for s, t in cases)
        found = evaluate(cases, divergence=name, js_beta=0.3, bounds="any")
        assert float(found.sum) == pytest.approx(expected, rel=1e-10, abs=1e-11)
        row_sums = found.gradient.sum(1)
        torch.testing.assert_close(row_sums, torch.zeros_like(row_sums), rtol=0, atol=1e-9)
        assert float(found.label_losses.sum()) == pytest.approx(expected, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_is_that_of_central_differences_of_the_oracle(seed) -> None:
    """Caps bind in most of the cases: see below."""
    name = DIVERGENCES[seed % 3]
    (student, teacher), *_ = cases_of(seed, num_cases=1)
    found = evaluate([(student, teacher)], divergence=name, js_beta=0.3, bounds="any").gradient
    rng = random.Random(seed)
    step = 1e-5
    for _ in range(6):
        n, v = rng.randrange(len(student.labels)), rng.randrange(len(student.pieces))
        values = []
        for sign in (1, -1):
            logits = student.logits.clone()
            logits[n, v] += sign * step
            moved = replace(student, logits=logits)
            values.append(oracle.loss(moved, [teacher], divergence_name=name, beta=0.3))
        assert float(found[n, v]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-5, abs=2e-7)


def test_the_random_cases_have_caps_that_bind_agreements_and_every_case_of_the_minimizer(monkeypatch) -> None:
    seen = {"agree": 0, "binds": 0}
    solvers = dict.fromkeys(("_outer", "_inner", "_joint"), 0)
    module = losses_bytes.least_divergence.__globals__
    for name in solvers:

        def counted(bounds, name=name, solve=module[name]) -> Any:
            solved = solve(bounds)
            solvers[name] += int(solved.is_right.sum())
            return solved

        monkeypatch.setitem(module, name, counted)
    for seed in SEEDS:
        for student, teacher in cases_of(seed):
            evaluate([(student, teacher)], bounds="any")
            for at in oracle.position_views(student, [teacher]):
                seen["agree"] += (
                    bool(at.known[0]) and max(at.unresolved) > 0 and oracle.least(at, "js", 0.5) == 0
                )
                seen["binds"] += any(0 < cap < at.unresolved[0] for cap in at.caps[0])
    assert min(seen.values()) > 10, seen
    assert min(solvers.values()) > 0, solvers


def test_the_oracles_minimum_is_the_least() -> None:
    """Against a minimizer by alternation, which does not use the cases."""
    compared = 0
    for seed in (1, 2, 4, 5):
        for student, teacher in cases_of(seed):
            for at in oracle.position_views(student, [teacher]):
                if at.known[0] and min(at.unresolved) > 1e-3 and len(at.known[0]) < 9:
                    for name in DIVERGENCES:
                        least = oracle.least(at, name, 0.4)
                        assert least <= oracle.projected_minimum(at, name, 0.4, steps=60) + 1e-9
                    assert least == pytest.approx(
                        oracle.projected_minimum(at, "js", 0.4, steps=600), abs=1e-4
                    )
                    compared += 1
    assert compared > 5


@pytest.mark.parametrize("seed", range(6))
def test_a_mixture_of_teachers_equals_the_oracle(seed) -> None:
    num_teachers = 3 if seed % 4 == 3 else 2
    cases = cases_of(seed, num_sides=1 + num_teachers)
    for name in DIVERGENCES:
        weights = WEIGHTS[num_teachers]
        expected = sum(oracle.loss(s, ts, weights, divergence_name=name, beta=0.3) for s, *ts in cases)
        found = evaluate_mixture(cases, weights, divergence=name, js_beta=0.3, bounds="any")
        assert float(found.sum) == pytest.approx(expected, rel=1e-10, abs=1e-11)


def sides_of(language, text, vocabularies, cuts) -> tuple[Side, ...]:
    sides = []
    for pieces, cut in zip(vocabularies, cuts, strict=True):
        model = ExactModel.of(language, cut, 0)
        logits = torch.from_numpy(model.logits(text, len(pieces)))
        sides.append(Side(list(pieces), [0], logits, model.labels(text)))
    return tuple(sides)


def is_zero(cases, *, divergences=DIVERGENCES) -> None:
    for name in divergences:
        found = evaluate(cases, divergence=name, bounds="any")
        assert abs(float(found.sum)) <= 1e-9
        assert float(found.gradient.abs().max()) <= 1e-9


@pytest.mark.parametrize(("kind", "student_name", "teacher_name"), PAIRS)
def test_one_language_in_two_tokenizers_of_the_longest_match_has_loss_zero(
    kind, student_name, teacher_name
) -> None:
    vocabularies, units, length = KINDS[kind]
    language = random_language(units, length, seed=3)
    pieces = [[b"", *vocabularies[name]] for name in (student_name, teacher_name)]
    cuts = [longest_match(of) for of in pieces]
    texts = random.Random(5).sample(sorted(language), 6)
    is_zero([sides_of(language, text, pieces, cuts) for text in texts])


def test_one_language_in_two_unigram_tokenizers_has_loss_zero() -> None:
    language = random_language([b"a", b"b"], 5, seed=1)
    pieces = [[b"", b"a", b"b", b"ab", b"ba", b"aba", b"bb"], [b"", b"a", b"b", b"aa", b"bab", b"abb"]]
    cuts = [
        unigram(pieces[0], [0, -2.0, -1.5, -2.9, -3.7, -4.1, -3.3]),
        unigram(pieces[1], [0, -1.0, -2.0, -2.5, -3.0, -6]),
    ]
    is_zero([sides_of(language, text, pieces, cuts) for text in sorted(language)[::5]])


def of_pair(pair, language_of_student, texts) -> list[tuple[Side, ...]]:
    """Cases with the tables of both merge tables."""
    follows = []
    for pieces, merges in zip(pair.pieces, pair.merges, strict=True):
        table = table_of(Side(pieces, [0], torch.zeros(0), []))
        symbols = sorted({b for piece in pieces for b in piece})
        known = inside_pretokens(
            Merges.of(pieces, merges), table, symbols=symbols, inside=np.ones((256, 256), bool)
        )
        follows.append(_reader(known.rows[known.row_of]))
    languages = (language_of_student, pair.language)
    models = [ExactModel.of(of, cut, 0) for of, cut in zip(languages, pair.cuts, strict=True)]
    cases = []
    for text in texts:
        sides = zip(pair.pieces, models, follows, strict=True)
        cases.append(
            tuple(
                Side(pieces, [0], torch.from_numpy(model.logits(text, len(pieces))), model.labels(text), may)
                for pieces, model, may in sides
            )
        )
    return cases


NUM_LANGUAGES = 24
"""More of them take minutes; of the first 40 the worst was 1e-14."""


def test_byte_pair_languages_whose_merges_disagree_have_loss_zero_and_a_flatter_student_has_not() -> None:
    first_fails, kept = 0, []
    for seed in range(NUM_LANGUAGES):
        pair = random_byte_pairs(seed, length=4)
        texts = sorted(pair.language)
        is_zero(of_pair(pair, pair.language, texts), divergences=("reverse_kl",))
        first_fails += float(evaluate(of_pair(pair, pair.language, texts[::4])).sum) > 1e-9
        if seed < 4:
            flat = flattened(pair.language, 0.5)
            cases = of_pair(pair, flat, texts)
            found = math.fsum(
                flat[text] * float(evaluate([case], bounds="any").sum)
                for text, case in zip(texts, cases, strict=True)
            )
            kept.append(found / divergence(flat, pair.language))
    assert first_fails > NUM_LANGUAGES / 3, "bounds of the longest match are wrong on many of them"
    assert 0.4 < min(kept) <= max(kept) <= 1 + 1e-9, (
        "a lower bound of the true divergence, and not an idle one"
    )


def test_the_teachers_numbers_in_float16_leave_a_perfect_student_almost_alone(monkeypatch) -> None:
    """One rounding moves a log mass x by |x| / 2048 at most. So it moves a probability by that share, and a
    divergence, which is quadratic in it, by half of its square.
    """
    largest = 0.0

    def rounded(*args, **options) -> torch.Tensor:
        nonlocal largest
        masses = slot_log_masses(*args, **options)
        largest = max(largest, float(-masses[masses > -60].min()))
        return masses.half().to(masses.dtype)

    slot_log_masses = byte_cases.slot_log_masses
    monkeypatch.setattr(byte_cases, "slot_log_masses", rounded)
    moved = 0.0
    for seed in range(6):
        pair = random_byte_pairs(seed, length=4)
        for case in of_pair(pair, pair.language, sorted(pair.language)[::5]):
            found = evaluate([case], bounds="any")
            positions = float(found.metrics["byte_positions"])
            assert float(found.sum) / positions <= 0.5 * (2 * largest / 2048) ** 2
            moved = max(moved, float(found.sum))
    assert moved > 1e-9, "nothing was rounded"


@pytest.mark.parametrize(("kind", "student_name", "one", "other"), TRIPLES[:1] + TRIPLES[3:5] + TRIPLES[7:])
def test_a_student_that_is_the_mixture_has_loss_zero(kind, student_name, one, other) -> None:
    vocabularies, units, length = KINDS[kind]
    vocabularies = MIXED_LETTERS if kind == "letters" else vocabularies
    languages = [random_language(units, length - 1, seed=seed) for seed in (3, 4)]
    mixed = mixture(languages, WEIGHTS[2])
    cases = []
    for text in random.Random(5).sample(sorted(mixed), 6):
        case = []
        for language, name in zip((mixed, *languages), (student_name, one, other), strict=True):
            pieces = [b"", *vocabularies[name]]
            case += sides_of(language, text, [pieces], [longest_match(pieces)])
        cases.append(tuple(case))
    found = evaluate_mixture(cases, WEIGHTS[2], bounds="any")
    assert abs(float(found.sum)) < 1e-9
    assert float(found.gradient.abs().max()) < 1e-9
