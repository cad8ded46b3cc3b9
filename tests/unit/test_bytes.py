"""The interface `bytes`: equal to its oracle, and zero if two models are the same distribution over texts."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_simct.losses.kinds import bytes as losses_bytes
from tests import golden
from tests.oracles import bytes as oracle
from tests.oracles.byte_cases import evaluate, golden_case, oracle_of, random_cases
from tests.oracles.byte_pairs import byte_pairs, longest_match, random_language, write_out

DIVERGENCES = ("reverse_kl", "forward_kl", "js")


@pytest.mark.parametrize("seed", range(16))
def test_loss_and_gradient_equal_the_oracle(seed, monkeypatch) -> None:
    monkeypatch.setattr(losses_bytes, "TILE", (1, 3, 4096)[seed % 3])
    cases = random_cases(seed)
    for divergence in DIVERGENCES:
        expected, gradient = oracle_of(cases, divergence=divergence, js_beta=0.3)
        found = evaluate(cases, divergence=divergence, js_beta=0.3)
        assert float(found.sum) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        real = gradient.shape[1]
        torch.testing.assert_close(found.gradient[:, :real], gradient, rtol=1e-10, atol=1e-10)
        assert not found.gradient[:, real:].any(), "padding was scored"
        row_sums = found.gradient.sum(1)
        torch.testing.assert_close(row_sums, torch.zeros_like(row_sums), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [33, 106, 155])
def test_bounds_of_loose_bytes_decide_as_in_the_oracle_where_there_is_no_rest(seed) -> None:
    cases = random_cases(seed, scale=1.0)
    expected, gradient = oracle_of(cases, divergence="reverse_kl")
    found = evaluate(cases)
    assert float(found.sum) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(found.gradient[:, : gradient.shape[1]], gradient, rtol=1e-10, atol=1e-10)


def test_some_of_the_random_cases_have_bytes_that_may_agree_and_bytes_that_do_not() -> None:
    merged = [float(evaluate(random_cases(seed)).metrics["bytes_merged"]) for seed in range(16)]
    assert any(merged)
    loose = 0
    for seed in range(16):
        for student, teacher in random_cases(seed):
            text, count = oracle.positions(student, teacher)
            sides = [torch.log_softmax(side.logits, -1) for side in (student, teacher)]
            for i in range(count):
                points = [oracle.point(s, p, text, i) for s, p in zip((student, teacher), sides, strict=True)]
                loose += len((points[0].loose | points[1].loose) & set(points[0].mass) & set(points[1].mass))
    assert loose > sum(merged)


@pytest.mark.parametrize("labels", [[0, 1, 3], [1, 0, 3], [2, 3]])
def test_a_side_without_a_token_for_a_byte_is_compared_up_to_that_byte(labels) -> None:
    """The student may write byte 4; the teacher's tokenizer leaves it out of the text."""
    pieces = [b"a", b"b", b"ab", b"", b"\x04"]
    generator = torch.Generator().manual_seed(len(labels) + labels[0])
    teacher = oracle.Side(
        pieces[:4], [3], torch.randn(len(labels), 4, generator=generator, dtype=torch.float64), labels
    )
    for at in range(len(labels)):
        own = [*labels[:at], 4, *labels[at:]]
        logits = torch.randn(len(own), 5, generator=generator, dtype=torch.float64)
        cases = [(oracle.Side(pieces, [3], logits, own), teacher)]
        expected, gradient = oracle_of(cases, divergence="reverse_kl")
        found = evaluate(cases)
        assert float(found.sum) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        torch.testing.assert_close(found.gradient[:, :5], gradient, rtol=1e-10, atol=1e-10)
        assert (at > 0) == bool(found.sum)


def test_golden_numbers() -> None:
    for divergence, expected in golden.BYTES.items():
        student, teacher = golden_case()
        _, positions = oracle.loss(student, teacher, divergence_name=divergence)
        found = evaluate([golden_case()], divergence=divergence)
        assert float(found.sum) / 4 == pytest.approx(expected, abs=6e-7)
        if divergence == "reverse_kl":
            assert [value.item() for value in positions] == pytest.approx(golden.BYTES_POSITIONS, abs=6e-7)
            spans = ((0, 2), (2, 5), (5, 9), (9, 10))  # ha, ppy, " cat", stop
            by_label = [sum(golden.BYTES_POSITIONS[first:last]) for first, last in spans]
            assert found.label_losses.tolist() == pytest.approx(by_label, abs=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_that_of_finite_differences(divergence) -> None:
    cases = random_cases(4, num_cases=1, scale=1.0)
    found = evaluate(cases, divergence=divergence)
    student, teacher = cases[0]
    rng = random.Random(0)
    for _ in range(25):
        n, v = rng.randrange(len(student.labels)), rng.randrange(len(student.pieces))
        values = []
        for step in (1e-6, -1e-6):
            logits = student.logits.clone()
            logits[n, v] += step
            moved = oracle.Side(student.pieces, student.stop_ids, logits, student.labels)
            values.append(float(evaluate([(moved, teacher)], divergence=divergence).sum))
        assert float(found.gradient[n, v]) == pytest.approx(
            (values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7
        )


SINGLES = [b"a", b"b", b"c"]
DIGITS = [b"1", b"2", b"3"]
CHARACTERS = ("é", "日", "a")
CHARACTER_BYTES = sorted({bytes([b]) for c in CHARACTERS for b in c.encode()})
VOCABULARIES = {
    "bytes": SINGLES,
    "prefix-closed": [*SINGLES, b"ab", b"abc", b"ca", b"cab"],
    "not prefix-closed": [*SINGLES, b"abc", b"cab", b"bbca"],
    "long tokens": [*SINGLES, b"abcb", b"aba", b"bc", b"ccba", b"caa"],
}
GROUPS = {
    "single digits": DIGITS,
    "digit groups": [bytes(g) for k in (1, 2, 3) for g in itertools.product(b"123", repeat=k)],
}
TEXTS = {
    "character bytes": CHARACTER_BYTES,
    "characters": [*CHARACTER_BYTES, "é".encode(), "日".encode()],
    "pairs of characters": [*CHARACTER_BYTES, "éa".encode(), "日é".encode(), "日日".encode(), b"aa"],
}
KINDS = {
    "letters": (VOCABULARIES, SINGLES, 5),
    "digits": (GROUPS, DIGITS, 4),
    "characters": (TEXTS, [c.encode() for c in CHARACTERS], 4),
}
PAIRS = [(kind, s, t) for kind, (names, _, _) in KINDS.items() for s in names for t in names if s != t]


@pytest.mark.parametrize(("kind", "student_name", "teacher_name"), PAIRS)
def test_one_distribution_in_two_tokenizations_has_loss_and_gradient_zero(
    kind, student_name, teacher_name
) -> None:
    vocabularies, units, length = KINDS[kind]
    language = random_language(units, length, seed=3)
    texts = random.Random(5).sample(sorted(language), 16)
    for divergence in DIVERGENCES:
        cases = []
        for text in texts if divergence == "reverse_kl" else texts[:4]:
            sides = []
            for name in (student_name, teacher_name):
                pieces = [*vocabularies[name], b""]
                sides.append(write_out(language, text, pieces, len(pieces) - 1, longest_match(pieces)))
            cases.append(tuple(sides))
        found = evaluate(cases, divergence=divergence)
        assert abs(float(found.sum)) < 1e-12
        assert float(found.gradient.abs().max()) < 1e-12


def test_merges_that_take_the_longest_match_have_loss_zero_too() -> None:
    pieces = [*SINGLES, b"aa", b"aac", b"bb", b""]
    language = random_language(SINGLES, 4, seed=1)
    assert all(byte_pairs(pieces)(text) == longest_match(pieces)(text) for text in language)
    singles = [*SINGLES, b""]
    texts = sorted(language)[::9]
    student = [write_out(language, text, singles, 3, byte_pairs(singles)) for text in texts]
    teacher = [write_out(language, text, pieces, 6, byte_pairs(pieces)) for text in texts]
    for cases in (zip(student, teacher, strict=True), zip(teacher, student, strict=True)):
        found = evaluate(list(cases))
        assert abs(float(found.sum)) < 1e-12
        assert float(found.gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("name", VOCABULARIES)
def test_with_one_tokenizer_it_is_a_lower_bound_of_token_level_kl(name) -> None:
    pieces = [*VOCABULARIES[name], b""]
    tokenize = longest_match(pieces)
    of_student, of_teacher = (random_language(SINGLES, 3, seed=seed) for seed in (1, 2))
    chain = tokens = 0.0
    for text, mass in of_student.items():
        case = tuple(
            write_out(language, text, pieces, len(pieces) - 1, tokenize)
            for language in (of_student, of_teacher)
        )
        chain += mass * float(evaluate([case]).sum)
        log_p, log_q = (torch.log_softmax(side.logits, -1) for side in case)
        tokens += mass * float((log_p.exp() * (log_p - log_q)).sum())
    assert 0.05 < chain <= tokens + 1e-9
    if name == "bytes":
        assert chain == pytest.approx(tokens, abs=1e-6)


def test_metrics_are_float64_whatever_the_logits_are() -> None:
    metrics = evaluate(random_cases(0), dtype=torch.float32).metrics
    assert metrics["byte_positions"] > 0
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in metrics.values())


def test_nothing_to_compare_is_a_zero_with_zero_gradient() -> None:
    student, teacher = random_cases(0, num_cases=1)[0]
    special = student.pieces.index(b"", 1) if b"" in student.pieces[1:] else None
    cut = oracle.Side(student.pieces, [0], student.logits[:1], [1 if special is None else special])
    other = oracle.Side(teacher.pieces, [0], teacher.logits[:1], [0])
    found = evaluate([(cut, other)])
    assert float(found.sum) == 0
    assert not found.gradient.any()
