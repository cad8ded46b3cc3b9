"""Two teachers as one, byte by byte: equal to the oracle, and zero if the student is their mixture."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_simct.losses.kinds import bytes as losses_bytes
from tests.oracles.byte_cases import evaluate, evaluate_mixture, mixture_oracle_of, random_cases
from tests.oracles.byte_pairs import longest_match, mixture, random_language, write_out
from tests.unit.test_bytes import DIVERGENCES, KINDS, SINGLES, VOCABULARIES

WEIGHTS = {2: (0.3, 0.7), 3: (0.2, 0.5, 0.3)}


@pytest.mark.parametrize("seed", range(12))
def test_loss_and_gradient_equal_the_oracle(seed, monkeypatch) -> None:
    monkeypatch.setattr(losses_bytes, "TILE", (1, 3, 4096)[seed % 3])
    num_teachers = 3 if seed % 4 == 3 else 2
    cases = random_cases(seed, num_sides=1 + num_teachers, scale=1.0 + seed % 2)
    for divergence in DIVERGENCES:
        expected, gradient = mixture_oracle_of(
            cases, WEIGHTS[num_teachers], divergence=divergence, js_beta=0.3
        )
        found = evaluate_mixture(cases, WEIGHTS[num_teachers], divergence=divergence, js_beta=0.3)
        assert float(found.sum) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        real = gradient.shape[1]
        torch.testing.assert_close(found.gradient[:, :real], gradient, rtol=1e-10, atol=1e-10)
        assert not found.gradient[:, real:].any(), "padding was scored"


@pytest.mark.parametrize("seed", [277, 327])
def test_what_is_outside_of_the_events_is_no_spread(seed) -> None:
    """Cases with a loose byte at a place where the student cannot end its token, which
    few random ones have.
    """
    cases = random_cases(seed, num_sides=3)
    expected, gradient = mixture_oracle_of(cases, WEIGHTS[2], divergence="reverse_kl")
    found = evaluate_mixture(cases, WEIGHTS[2])
    assert float(found.sum) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(found.gradient[:, : gradient.shape[1]], gradient, rtol=1e-10, atol=1e-10)


def test_the_random_cases_compare_something_and_merge_some_bytes() -> None:
    found = [evaluate_mixture(random_cases(seed, num_sides=3, scale=1.0), WEIGHTS[2]) for seed in range(12)]
    assert sum(float(f.sum) > 0.1 for f in found) > 8
    assert any(float(f.metrics["bytes_merged"]) for f in found)


# In "ab" the first cannot end, and may go on in two ways: its probability of "ab" itself is not known.
LETTERS = {"two ways": [*SINGLES, b"aba", b"abc"], **VOCABULARIES}
TRIPLES = [
    ("letters", "bytes", "two ways", "long tokens"),
    ("letters", "long tokens", "bytes", "not prefix-closed"),
    ("letters", "not prefix-closed", "prefix-closed", "two ways"),
    ("letters", "prefix-closed", "not prefix-closed", "long tokens"),
    ("digits", "single digits", "digit groups", "single digits"),
    ("digits", "digit groups", "single digits", "digit groups"),
    ("characters", "characters", "pairs of characters", "character bytes"),
    ("characters", "pairs of characters", "character bytes", "characters"),
]


@pytest.mark.parametrize(("kind", "student_name", "one", "other"), TRIPLES)
def test_a_student_that_is_the_mixture_has_loss_and_gradient_zero(kind, student_name, one, other) -> None:
    """Two teachers of different languages in different tokenizations. The student's next
    byte is their mixture.
    """
    vocabularies, units, length = KINDS[kind]
    vocabularies = LETTERS if kind == "letters" else vocabularies
    length -= kind == "digits"
    languages = [random_language(units, length, seed=seed) for seed in (3, 4)]
    mixed = mixture(languages, WEIGHTS[2])
    for divergence in DIVERGENCES:
        cases = []
        for text in random.Random(5).sample(sorted(mixed), 12 if divergence == "reverse_kl" else 4):
            sides = []
            for language, name in zip((mixed, *languages), (student_name, one, other), strict=True):
                pieces = [*vocabularies[name], b""]
                sides.append(write_out(language, text, pieces, len(pieces) - 1, longest_match(pieces)))
            cases.append(tuple(sides))
        found = evaluate_mixture(cases, WEIGHTS[2], divergence=divergence)
        assert abs(float(found.sum)) < 1e-11
        assert float(found.gradient.abs().max()) < 1e-11
        assert float(evaluate_mixture(cases, WEIGHTS[2][::-1]).sum) > 1e-2, (
            "other weights are another mixture"
        )


def test_a_teacher_mixed_with_itself_is_that_teacher() -> None:
    """The teacher can end at every byte: its vocabulary is closed under prefixes."""
    languages = [random_language([b"a", b"b", b"c"], 4, seed=seed) for seed in (1, 2)]
    cases = []
    for text in sorted(languages[0])[::7]:
        sides = []
        for language, name in zip(languages, ("long tokens", "prefix-closed"), strict=True):
            pieces = [*VOCABULARIES[name], b""]
            sides.append(write_out(language, text, pieces, len(pieces) - 1, longest_match(pieces)))
        cases.append(tuple(sides))
    alone = evaluate(cases)
    twice = evaluate_mixture([(student, teacher, teacher) for student, teacher in cases], (0.25, 0.75))
    assert float(alone.sum) > 1
    assert float(twice.sum) == pytest.approx(float(alone.sum), rel=1e-12)
    torch.testing.assert_close(twice.gradient, alone.gradient, rtol=1e-10, atol=1e-12)
