"""The effect of each interface on a student that is already right, on exact small languages:
docs/perfect_student.md.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from examples.experiments.perfect_student import DIGITS, KINDS, LENGTH, PAIRS, Comparison
from megatron_simct.alignment.languages import random_language

LANGUAGE = random_language(DIGITS, LENGTH, seed=0)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "perfect_student.md"
BYTES = ("bytes", "bytes, forward", "bytes, any", "bytes, any, forward")
LEFT_ALONE = {**dict.fromkeys(BYTES, PAIRS), "bpm, forward": ((3, 1), (3, 2))}
"""Interface -> the pairs of different tokenizers whose perfect student it does not change."""
WEIGHTS = 1e-7
"""Weights of segments are float32, so sums over texts that should cancel leave this much."""


def comparison(name: str, pair: tuple[int, int]) -> Comparison:
    return Comparison(LANGUAGE, KINDS[name], teacher=pair[0], student=pair[1])


@functools.cache
def gradient_norm(name: str, pair: tuple[int, int]) -> float:
    return comparison(name, pair).gradient_norm()


@pytest.mark.parametrize("name", KINDS)
def test_a_perfect_student_of_the_teachers_tokenizer_is_left_alone(name) -> None:
    assert gradient_norm(name, (1, 1)) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_which_leave_a_perfect_student_of_another_tokenizer_alone(name) -> None:
    for pair in PAIRS:
        if pair[0] != pair[1]:
            norm = gradient_norm(name, pair)
            assert norm < WEIGHTS if pair in LEFT_ALONE.get(name, ()) else norm > 0.01, f"{pair}: {norm}"


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("bytes")])
def test_texts_in_one_call_are_the_sum_of_each_in_a_call_of_its_own(name) -> None:
    """Micro-batches rely on this."""
    both = comparison(name, (3, 2))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(both.student.logits.shape, generator=generator, dtype=torch.float64)
    found = []
    for at_once in (True, False):
        logits = (both.student.logits + 0.3 * noise).requires_grad_()
        weights = both.student.log_masses(logits).exp().detach()
        value = both.loss(logits) if at_once else both.one_by_one(logits, weights.float().double())
        value.backward()
        found.append((value.detach(), logits.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_bytes_learns_where_paper_unlearns() -> None:
    """Teacher groups three digits, the student none."""
    found = {
        name: comparison(name, (3, 1)).learnt(steps=15, noise=0.5, lr=0.1) for name in ("bytes", "paper")
    }
    (before, bytes_after), (_, paper_after) = found["bytes"], found["paper"]
    assert bytes_after < 0.5 * before and paper_after > 1.5 * before


def test_the_page_has_a_row_for_each_interface() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(KINDS)
    for name, cells in rows:
        norms = [float(cell.split(",")[0].strip(" *")) for cell in cells.split("|")]
        alone = [gradient_norm(name, pair) for pair in PAIRS]
        for written, norm in zip(norms, alone, strict=True):
            assert written == pytest.approx(norm, abs=0.006) or (written < WEIGHTS and norm < WEIGHTS)
