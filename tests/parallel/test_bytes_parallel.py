"""The interface `bytes` on vocabulary shards: the same numbers for every tensor-parallel size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_simct.losses.kinds.bytes import ByteOrder, SharedRows, byte_loss, teacher_byte_statistics
from megatron_simct.losses.tiles import GivenLogits
from megatron_simct.packing import pack_byte_events, pack_byte_sides, part_of_bytes, part_of_events
from tests.distributed import run_ranks
from tests.oracles import byte_bounds
from tests.oracles.byte_cases import Evaluation, evaluate, events_of, random_cases, table_of
from tests.parallel.test_losses_parallel import counted_bytes
from tests.unit.test_byte_bounds import cases_of
from tests.unit.test_bytes import DIVERGENCES, oracle_of

CASES = [random_cases(seed) for seed in range(6)]


def evaluate_all(rank: int, world_size: int, dtype: torch.dtype) -> list[Evaluation]:
    return [
        evaluate(cases, divergence=divergence, js_beta=0.3, group=dist.group.WORLD, dtype=dtype)
        for cases in CASES
        for divergence in DIVERGENCES
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradient_equal_the_oracle_on_shards(world_size) -> None:
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


ANY = [cases_of(seed) for seed in (1, 2, 3)]
"""With caps, and without for the last."""


def evaluate_any(rank: int, world_size: int) -> list[Evaluation]:
    return [
        evaluate(
            cases,
            divergence=divergence,
            js_beta=0.3,
            group=dist.group.WORLD,
            dtype=torch.float64,
            bounds="any",
        )
        for cases in ANY
        for divergence in DIVERGENCES
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_bounds_for_any_tokenizer_equal_the_oracle_on_shards(world_size) -> None:
    by_rank = run_ranks(world_size, evaluate_any)
    options = [(cases, divergence) for cases in ANY for divergence in DIVERGENCES]
    for (cases, divergence), *evaluations in zip(options, *by_rank, strict=True):
        expected = sum(byte_bounds.loss(s, [t], divergence_name=divergence, beta=0.3) for s, t in cases)
        alone = evaluate(cases, divergence=divergence, js_beta=0.3, bounds="any")
        for evaluation in evaluations:
            assert float(evaluation.sum) == pytest.approx(expected, rel=1e-10, abs=1e-11)
            assert evaluation.metrics == evaluations[0].metrics
        whole = torch.cat([evaluation.gradient for evaluation in evaluations], dim=1)
        width = alone.gradient.shape[1]
        torch.testing.assert_close(whole[:, :width], alone.gradient, rtol=1e-10, atol=1e-10)
        assert not whole[:, width:].any(), "padded columns were scored"


@pytest.mark.parametrize("world_size", [2, 4])
def test_layouts_agree_in_float32(world_size) -> None:
    (alone,) = run_ranks(1, evaluate_all, torch.float32)
    for reference, *evaluations in zip(
        alone, *run_ranks(world_size, evaluate_all, torch.float32), strict=True
    ):
        torch.testing.assert_close(evaluations[0].sum, reference.sum, rtol=1e-5, atol=1e-5)
        whole = torch.cat([evaluation.gradient for evaluation in evaluations], dim=1)
        width = min(whole.shape[1], reference.gradient.shape[1])
        error = (whole[:, :width] - reference.gradient[:, :width]).norm() / reference.gradient.norm()
        assert float(error) < 1e-5


def count(rank: int, world_size: int) -> dict[str, int]:
    with counted_bytes() as sent:
        evaluate(CASES[0], group=dist.group.WORLD, dtype=torch.float32)
    return sent


def test_what_crosses_ranks_is_two_reductions_a_model() -> None:
    (sent, _) = run_ranks(2, count)
    numbers = 0
    for student, teacher in CASES[0]:
        events = events_of(student, teacher)
        for side, labels in ((events.student, student.labels), (events.teacher, teacher.labels)):
            numbers += 2 * len(labels) + side.segment_row.size
    assert sent == {"all_reduce": 4 * numbers}


# Rows split over context-parallel ranks


def evaluate_split(rank: int, world_size: int) -> list[tuple]:
    """For each of CASES, with labels distributed in pieces as context parallelism does: this rank's share
    of the sum, the gradient of all rows' logits, its share of the labels' losses, the exchanged values,
    and the bytes sent.
    """
    found = []
    for cases in CASES:
        events = [events_of(student, teacher) for student, teacher in cases]
        shared, orders, rows, labels = [], [], [], []
        for k, sides in enumerate(zip(*cases, strict=True)):
            of_all = torch.tensor([label for side in sides for label in side.labels])
            owner = torch.empty_like(of_all)
            for number, piece in enumerate(torch.arange(len(of_all)).tensor_split(2 * world_size)):
                owner[piece] = min(number, 2 * world_size - 1 - number)
            index = (owner == rank).nonzero()[:, 0]
            logits = torch.cat([side.logits.detach() for side in sides])
            plans = [(event.student, event.teacher)[k] for event in events]
            packed = pack_byte_sides(plans, [len(side.labels) for side in sides])
            part = part_of_bytes(packed, owner, rank)
            shared.append(SharedRows(part=part, index=index, num_labels=len(owner), group=dist.group.WORLD))
            orders.append(
                ByteOrder.of(table_of(sides[0]), shard_start=0, shard_end=logits.shape[1], device="cpu")
            )
            rows.append((logits, index, owner, packed))
            labels.append(of_all)
        logits, index, _, packed = rows[1]
        identity = torch.eye(logits.shape[1], dtype=torch.float64)  # logits as hidden states of a head
        masses, _, _ = teacher_byte_statistics(
            logits[index], identity, labels[1][index], packed, order=orders[1], shard_start=0, group=None,
            shared=shared[1],
        )  # fmt: skip
        logits, index, owner, _ = rows[0]
        lengths = [len(student.labels) for student, _ in cases]
        batch = part_of_events(
            pack_byte_events(events, lengths, masses.split([e.slot_event.size for e in events])), owner, rank
        )
        mine = logits[index].requires_grad_()
        with counted_bytes() as sent:
            result = byte_loss(
                GivenLogits(mine, num_columns=logits.shape[1]), labels[0][index], batch, order=orders[0],
                shard_start=0, divergence="js", js_beta=0.3, group=None, shared=shared[0],
            )  # fmt: skip
        result.sum.backward()
        gradient = torch.zeros_like(logits).index_copy(0, index, mine.grad)
        dist.all_reduce(gradient)
        found.append((float(result.sum), gradient, result.label_losses, shared[0].part.num_exchanged, sent))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_split_over_context_parallel_ranks(world_size) -> None:
    """Both models' rows, with tokens that straddle the cuts; and what the ranks send each other."""
    by_rank = run_ranks(world_size, evaluate_split)
    exchanged = 0
    for cases, *found in zip(CASES, *by_rank, strict=True):
        expected, gradient = oracle_of(cases, divergence="js", js_beta=0.3)
        alone = evaluate(cases, divergence="js", js_beta=0.3)
        assert sum(value for value, *_ in found) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        torch.testing.assert_close(sum(losses for _, _, losses, _, _ in found), alone.label_losses)
        num_labels = len(alone.label_losses)
        for _, of_rows, _, number, sent in found:
            torch.testing.assert_close(of_rows, gradient, rtol=1e-10, atol=1e-10)
            # Forward and back, in float64: a number for each label, and one for each segment that
            # another rank needs.
            assert sent == {"all_reduce": 2 * 8 * (num_labels + number)}
            exchanged += number
    assert exchanged > 20, "no token straddled a cut"
