"""The loss on vocabulary shards: the same numbers for every tensor-parallel size, and the
bytes between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import (
    LabelRows,
    gather_shared_head,
    interface_loss,
    label_statistics,
    logit_statistics,
)
from tests import golden
from tests.distributed import run_ranks
from tests.oracles.loss_cases import (
    CONFIGS,
    EXACT,
    OTHERS,
    WITHOUT_HEAD,
    Evaluation,
    LossCase,
    evaluate,
    evaluate_oracle,
    golden_case,
    label_batch,
    name_of,
    padded_shard,
    placement_of,
    random_case,
    shared_head_of,
)

CONTEXT_PARALLEL = ("paper", "sum", "code", "exact", "strict", "strict_topk", "uld", "alm", "scalar", "sft")

CASES = [
    random_case(0),
    random_case(1, softcap=True),
    random_case(2, num_stops=1),
    random_case(11, num_segments=21),
    random_case(5, vocab_size=9),  # four shards of 3: the last one has no real column at all
]


Pairs = list[tuple[LossCase, InterfaceConfig]]


def product(cases: list[LossCase], configs: list[InterfaceConfig]) -> Pairs:
    return [(case, config) for case in cases for config in configs]


def in_turn(configs: list[InterfaceConfig]) -> Pairs:
    """Every configuration with the smallest vocabulary and, in turns, with one other case."""
    pairs = [(CASES[-1], config) for config in configs]
    return pairs + [(CASES[i % (len(CASES) - 1)], config) for i, config in enumerate(configs)]


def evaluate_all(rank: int, world_size: int, pairs: Pairs) -> list[Evaluation]:
    return [evaluate(case, config, group=dist.group.WORLD) for case, config in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_equal_the_oracle_on_shards(world_size) -> None:
    configs = [*CONFIGS, *OTHERS]
    _compare(world_size, product(CASES, configs) if world_size == 2 else in_turn(configs))


@pytest.mark.parametrize("world_size", [2, 4])
def test_exact_and_weights_equal_the_oracle_on_shards(world_size) -> None:
    cases = [random_case(seed, spelled=True, weighted=seed % 2 == 1, num_segments=12) for seed in range(4)]
    _compare(world_size, product(cases, [*EXACT, InterfaceConfig(), InterfaceConfig(interface="alm")]))


def _compare(world_size: int, pairs: Pairs) -> None:
    by_rank = run_ranks(world_size, evaluate_all, pairs)
    for (case, config), *evaluations in zip(pairs, *by_rank, strict=True):
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        for evaluation in evaluations:
            assert float(evaluation.output.sum) == pytest.approx(
                float(expected.sum.detach()), rel=1e-10, abs=1e-10
            )
            torch.testing.assert_close(evaluation.hidden_gradient, hidden_gradient, rtol=1e-10, atol=1e-10)
            assert torch.equal(evaluation.output.sum, evaluations[0].output.sum)
            assert evaluation.output.metrics == evaluations[0].output.metrics
        whole = torch.cat([evaluation.weight_gradient for evaluation in evaluations])
        torch.testing.assert_close(whole[: len(weight_gradient)], weight_gradient, rtol=1e-10, atol=1e-10)
        assert not whole[len(weight_gradient) :].any(), "padded rows were scored"


def test_two_likeliest_tokens_on_two_ranks_agree_with_the_teacher() -> None:
    """bf16 logits are often equal; the sum of the ranks' answers must still be right."""
    case = random_case(0, num_stops=1)
    student, teacher = (
        case.student_hidden @ case.student_weight.T,
        case.teacher_hidden @ case.teacher_weight.T,
    )
    low, high = min(case.shared), max(case.shared)
    width = -(-(len(case.student_weight) + 1) // 2)
    assert low < width <= high
    student[:, [low, high]] = teacher[:, [case.shared[low][0], case.shared[high][0]]] = 50.0
    tied = replace(
        case,
        student_hidden=student,
        student_weight=torch.eye(student.shape[1], dtype=torch.float64),
        teacher_hidden=teacher,
        teacher_weight=torch.eye(teacher.shape[1], dtype=torch.float64),
    )
    for ((evaluation,),) in zip(run_ranks(2, evaluate_all, [(tied, InterfaceConfig())]), strict=True):
        assert evaluation.metric("rows_same_top") == len(case.segments)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("world_size", [2, 4])
def test_layouts_agree_in_float32(world_size) -> None:
    pairs = [(case.to(torch.float32), config) for case, config in in_turn(CONFIGS)]
    by_rank = run_ranks(world_size, evaluate_all, pairs)
    for (case, config), *evaluations in zip(pairs, *by_rank, strict=True):
        alone = evaluate(case, config)
        whole = torch.cat([evaluation.weight_gradient for evaluation in evaluations])[
            : len(case.student_weight)
        ]
        for evaluation in evaluations:
            torch.testing.assert_close(evaluation.output.sum, alone.output.sum, rtol=1e-5, atol=1e-5)
            assert relative_error(evaluation.hidden_gradient, alone.hidden_gradient) < 1e-5
            for name in alone.output.metrics:
                assert evaluation.metric(name) == pytest.approx(alone.metric(name), rel=1e-5, abs=1e-5), name
        alone_weight = alone.weight_gradient[: len(case.student_weight)]
        assert relative_error(whole, alone_weight) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_numbers_on_two_ranks(dtype) -> None:
    configs = [InterfaceConfig(interface=i, divergence=d, temperature=t) for i, d, t in golden.LOSS]
    for evaluations in run_ranks(2, evaluate_all, product([golden_case().to(dtype)], configs)):
        for evaluation, expected in zip(evaluations, golden.LOSS.values(), strict=True):
            assert float(evaluation.output.sum) / 4 == pytest.approx(expected, abs=6e-7)


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """A dict of the bytes that this rank passes to each collective of torch.distributed."""
    sent: dict[str, int] = {}
    names = [
        name
        for name in dir(dist)
        if name.startswith(
            ("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv")
        )
        and callable(getattr(dist, name))
        and not isinstance(getattr(dist, name), type)
    ]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        # The input is the second argument if the first is the output.
        position = 1 if name.startswith(("all_gather", "all_to_all", "reduce_scatter")) else 0

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position]
            sent[name] = sent.get(name, 0) + tensor.numel() * tensor.element_size()
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def bytes_of_losses(
    rank: int, world_size: int, cases: list[LossCase], config: InterfaceConfig
) -> list[dict[str, int]]:
    return [bytes_of_one_loss(rank, world_size, case, config) for case in cases]


def bytes_of_one_loss(rank: int, world_size: int, case: LossCase, config: InterfaceConfig) -> dict[str, int]:
    group = dist.group.WORLD
    weight, start = padded_shard(case.student_weight, rank, world_size)
    placement = placement_of(case, start, start + len(weight))
    head = None if config.interface == "sft" else shared_head_of(case, placement, group)
    labels = label_batch(case, config.interface)
    with counted_bytes() as sent:
        interface_loss(
            case.student_hidden.requires_grad_(),
            weight,
            labels,
            shared_head=head,
            placement=placement,
            config=config,
            group=group,
        )
    return sent


@pytest.mark.parametrize(
    "config, limit",
    [
        (InterfaceConfig(), 64),
        (InterfaceConfig(divergence="forward_kl", temperature=2.0), 64),
        (InterfaceConfig(interface="strict"), 64),
        (InterfaceConfig(divergence="js"), 96),
        (InterfaceConfig(interface="exact"), 64),
        (InterfaceConfig(interface="strict_topk", topk=4), 64 + 4 * 8),
        (InterfaceConfig(interface="sft"), 64),
    ],
    ids=name_of,
)
def test_bytes_between_ranks_per_row(config, limit) -> None:
    """The most expensive case is a row for every label; a wider vocabulary adds nothing."""
    base = random_case(0, num_segments=60).to(torch.float32)
    n = len(base.student_labels)
    dense = replace(
        base,
        teacher_hidden=base.teacher_hidden[:1].expand(n, -1),
        teacher_labels=[0] * n,
        segments=[(i, i + 1, i, i + 1) for i in range(n)],
        kinds=[0] * n,
        replaced=[-1] * n,
    )
    wide = replace(dense, student_weight=torch.cat([dense.student_weight] * 4))
    sent, sent_wide = run_ranks(2, bytes_of_losses, [dense, wide], config)[0]
    assert set(sent) == {"all_reduce"} | ({"all_gather"} if config.interface == "strict_topk" else set())
    assert 0 < sum(sent.values()) <= limit * n
    assert sent_wide == sent


def test_empty_micro_batches_on_two_ranks() -> None:
    full = random_case(0)
    no_segments = replace(full, segments=[], kinds=[], replaced=[])
    nothing = replace(
        no_segments,
        student_hidden=full.student_hidden[:0],
        teacher_hidden=full.teacher_hidden[:0],
        student_labels=[],
        teacher_labels=[],
    )
    for evaluations in run_ranks(2, evaluate_all, product([nothing, no_segments], CONFIGS)):
        for i, evaluation in enumerate(evaluations):
            if i < len(CONFIGS) or CONFIGS[i % len(CONFIGS)].interface != "sft":
                assert float(evaluation.output.sum) == 0
                assert not evaluation.hidden_gradient.any() and not evaluation.weight_gradient.any()


def sum_with_one_bad_weight(
    rank: int, world_size: int, case: LossCase, bad: float, config: InterfaceConfig
) -> float:
    group = dist.group.WORLD
    weight, start = padded_shard(case.student_weight, rank, world_size)
    placement = placement_of(case, start, start + len(weight))
    head = shared_head_of(case, placement, group)
    if rank == 1:
        weight[0] = bad
    options = {"shared_head": head, "placement": placement, "config": config, "group": group}
    return float(
        interface_loss(case.student_hidden, weight, label_batch(case, config.interface), **options).sum
    )


@pytest.mark.parametrize("interface", ["paper", "strict"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_logit_on_one_rank_reaches_all(bad, interface) -> None:
    sums = run_ranks(2, sum_with_one_bad_weight, random_case(0), bad, InterfaceConfig(interface=interface))
    assert not torch.isfinite(torch.tensor(sums)).any()


Gathered = tuple[torch.Tensor, dict[str, int], int]


def gather_heads(rank: int, world_size: int, dtype: torch.dtype) -> list[Gathered]:
    return [gather_head(rank, world_size, case, dtype) for case in CASES]


def gather_head(rank: int, world_size: int, case: LossCase, dtype: torch.dtype) -> Gathered:
    width = -(-(len(case.student_weight) + 1) // world_size)
    placement = placement_of(case, rank * width, (rank + 1) * width)
    shard, start = padded_shard(case.teacher_weight.to(dtype), rank, world_size)
    with counted_bytes() as sent:
        head = gather_shared_head(shard, start, placement, dist.group.WORLD)
    return head.weight, sent, len(placement.teacher_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 4])
def test_teacher_rows_move_to_the_student_columns(world_size, dtype) -> None:
    for case, *results in zip(CASES, *run_ranks(world_size, gather_heads, dtype), strict=True):
        width = -(-(len(case.student_weight) + 1) // world_size)
        for rank, (weight, _, _) in enumerate(results):
            wanted = placement_of(case, rank * width, (rank + 1) * width).teacher_rows
            assert torch.equal(weight, case.teacher_weight.to(dtype)[torch.from_numpy(wanted)])
        # All ranks together send each wanted row once, its id once, and one count for each pair of ranks.
        num_rows = sum(result[2] for result in results)
        row_bytes = case.teacher_weight.shape[1] * dtype.itemsize
        assert set().union(*(result[1] for result in results)) == {"all_to_all_single"}
        sent = sum(result[1]["all_to_all_single"] for result in results)
        assert sent == num_rows * (row_bytes + 8) + 8 * world_size**2


def statistics(rank: int, world_size: int, case: LossCase, cap: float | None) -> tuple[torch.Tensor, ...]:
    group = dist.group.WORLD
    weight, start = padded_shard(case.teacher_weight, rank, world_size)
    labels = torch.tensor(case.teacher_labels)
    vocab_size = len(case.teacher_weight)
    own, lse = label_statistics(
        case.teacher_hidden,
        weight,
        labels,
        shard_start=start,
        vocab_size=vocab_size,
        group=group,
        logit_softcap=cap,
        row_chunk=7,
        column_chunk=2,
    )
    of_logits = logit_statistics(
        case.teacher_hidden @ weight.T,
        labels,
        shard_start=start,
        vocab_size=vocab_size,
        group=group,
        logit_softcap=cap,
    )
    return own, lse, *of_logits


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_label_statistics_on_shards(world_size, cap) -> None:
    case = CASES[3]
    logits = case.teacher_hidden @ case.teacher_weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits[torch.arange(len(logits)), torch.tensor(case.teacher_labels)]
    for own, lse, own_of_logits, lse_of_logits in run_ranks(world_size, statistics, case, cap):
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(lse, logits.logsumexp(1))
        torch.testing.assert_close(own_of_logits, expected)
        torch.testing.assert_close(lse_of_logits, logits.logsumexp(1))


# Label rows split over context-parallel ranks


def context_parallel(
    rank: int, world_size: int, tp: int, cases: list[LossCase], configs: list[InterfaceConfig]
) -> list[Any]:
    """As `evaluate`, with labels distributed in pieces: the first and the last to rank 0, as
    context parallelism does.
    """
    groups = {"tp": None, "cp": None}
    for start in range(0, world_size, tp):
        members = list(range(start, start + tp))
        group = dist.new_group(members)
        groups["tp"] = group if rank in members else groups["tp"]
    for start in range(tp):
        members = list(range(start, world_size, tp))
        group = dist.new_group(members)
        groups["cp"] = group if rank in members else groups["cp"]
    cp_rank, cp_size = dist.get_rank(groups["cp"]), dist.get_world_size(groups["cp"])
    found = []
    for case in cases:
        for config in configs:
            n = len(case.student_labels)
            pieces = torch.arange(n).tensor_split(2 * cp_size)
            index = torch.cat([pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]])
            weight, start = padded_shard(case.student_weight, rank % tp, tp)
            placement = placement_of(case, start, start + len(weight))
            hidden = case.student_hidden[index].clone().requires_grad_()
            weight.requires_grad_()
            output = interface_loss(
                hidden,
                weight,
                label_batch(case, config.interface, uld_topk=config.uld_topk),
                shared_head=(
                    None
                    if config.interface in WITHOUT_HEAD
                    else shared_head_of(case, placement, groups["tp"])
                ),
                placement=placement,
                config=config,
                group=groups["tp"],
                teacher_logit_softcap=case.teacher_softcap,
                student_logit_softcap=case.student_softcap,
                label_rows=LabelRows(index=index, group=groups["cp"]),
            )
            output.sum.backward()
            whole = torch.zeros_like(case.student_hidden).index_copy(0, index, hidden.grad)
            totals = [whole, weight.grad, output.sum.detach(), output.num_labels, *output.metrics.values()]
            for total in totals:
                dist.all_reduce(total, group=groups["cp"])
            whole, of_weight, value, num_labels, *metrics = totals
            named = dict(zip(output.metrics, metrics, strict=True))
            found.append((float(value), int(num_labels), whole, of_weight, named))
    return found


@pytest.mark.parametrize("tp, cp", [(1, 2), (1, 3), (2, 2)])
def test_label_rows_split_over_context_parallel_ranks(tp, cp) -> None:
    """Units straddle the cuts."""
    cases = [random_case(seed, spelled=True, softcap=seed == 1, weighted=seed == 2) for seed in range(3)]
    configs = [
        InterfaceConfig(divergence="js"),
        *(InterfaceConfig(interface=name) for name in CONTEXT_PARALLEL),
    ]
    by_rank = run_ranks(tp * cp, context_parallel, tp, cases, configs)
    pairs = [(case, config) for case in cases for config in configs]
    for (case, config), *found in zip(pairs, *by_rank, strict=True):
        whole = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        for value, num_labels, of_hidden, _, metrics in found:
            assert value == pytest.approx(float(expected.sum.detach()), rel=1e-10, abs=1e-10)
            assert num_labels == len(case.student_labels)
            torch.testing.assert_close(of_hidden, hidden_gradient, rtol=1e-9, atol=1e-9)
            for name, total in whole.output.metrics.items():
                assert float(metrics[name]) == pytest.approx(float(total), rel=1e-9, abs=1e-9), name
        of_weight = torch.cat([of_weight for _, _, _, of_weight, _ in found[:tp]])[: len(weight_gradient)]
        torch.testing.assert_close(of_weight, weight_gradient, rtol=1e-9, atol=1e-9)
