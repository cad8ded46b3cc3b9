"""The interface `bytes` on vocabulary shards: the same numbers for every tensor-parallel size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.oracles.byte_cases import Evaluation, evaluate, events_of, random_cases
from tests.parallel.test_losses_parallel import counted_bytes
from tests.unit.test_bytes import DIVERGENCES, oracle_of

CASES = [random_cases(seed) for seed in range(6)]


def evaluate_all(rank: int, world_size: int, dtype: torch.dtype) -> list[Evaluation]:
    return [
        evaluate(cases, divergence=divergence, js_beta=0.3, group=dist.group.WORLD, dtype=dtype)
        for cases in CASES
        for divergence in DIVERGENCES
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradient_equal_the_oracle_on_shards(world_size):
    by_rank = run_ranks(world_size, evaluate_all, torch.float64)
    options = [(cases, divergence) for cases in CASES for divergence in DIVERGENCES]
    for (cases, divergence), *evaluations in zip(options, *by_rank, strict=True):
        expected, gradient = oracle_of(cases, divergence=divergence, js_beta=0.3)
        for evaluation in evaluations:
            assert float(evaluation.sum) == pytest.approx(expected, rel=1e-10, abs=1e-12)
            assert torch.equal(evaluation.sum, evaluations[0].sum)
            assert evaluation.metrics == evaluations[0].metrics
        whole = torch.cat([evaluation.gradient for evaluation in evaluations], dim=1)
        torch.testing.assert_close(whole[:, : gradient.shape[1]], gradient, rtol=1e-10, atol=1e-10)
        assert not whole[:, gradient.shape[1] :].any(), "padded columns were scored"


@pytest.mark.parametrize("world_size", [2, 4])
def test_layouts_agree_in_float32(world_size):
    (alone,) = run_ranks(1, evaluate_all, torch.float32)
    for reference, *evaluations in zip(alone, *run_ranks(world_size, evaluate_all, torch.float32), strict=True):
        torch.testing.assert_close(evaluations[0].sum, reference.sum, rtol=1e-5, atol=1e-5)
        whole = torch.cat([evaluation.gradient for evaluation in evaluations], dim=1)
        width = min(whole.shape[1], reference.gradient.shape[1])
        error = (whole[:, :width] - reference.gradient[:, :width]).norm() / reference.gradient.norm()
        assert float(error) < 1e-5


def count(rank: int, world_size: int) -> dict[str, int]:
    with counted_bytes() as sent:
        evaluate(CASES[0], group=dist.group.WORLD, dtype=torch.float32)
    return sent


def test_what_crosses_ranks_is_two_reductions_a_model():
    (sent, _) = run_ranks(2, count)
    numbers = 0
    for student, teacher in CASES[0]:
        events = events_of(student, teacher)
        for side, labels in ((events.student, student.labels), (events.teacher, teacher.labels)):
            numbers += 2 * len(labels) + side.segment_row.size
    assert sent == {"all_reduce": 4 * numbers}
