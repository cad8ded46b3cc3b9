"""One optimizer step: its gradient, its schedule, its clipping, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.job import build_job
from megatron_simct.loading import load_model
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import MicroBatch
from megatron_simct.train import train
from megatron_simct.update.optimizer import wrap_data_parallel
from megatron_simct.update.step import NonFiniteError, StepReport
from tests.distributed import run_ranks
from tests.steps import scores_of
from tests.tiny import config

SGD = (
    "--optimizer",
    "sgd",
    "--lr",
    ".5",
    "--min-lr",
    ".5",
    "--lr-decay-style",
    "constant",
    "--clip-grad",
    "0",
)
SFT = ("--simct-interface", "sft", "--rollout-max-response-len", "64")


def micro_batches(job, step: int = 0) -> list[MicroBatch]:
    """The training loop's input to the update."""
    prompts = job.prompts.batch(step)
    rollouts = job.engine.generate(prompts, job.sampling)
    pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    return job.pack(prompts, rollouts, pairs, scores_of(job.teacher, pairs))


def parameters_of(job) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.updater.model.named_parameters()}


# The gradient


def _unpacked(model, batches, vocab_size) -> tuple[dict[str, torch.Tensor], float, int]:
    """Cross entropy and its gradient by plain autograd: one sequence at a time, no
    padding, then one division.
    """
    total, num_labels = 0.0, 0
    model.zero_grad()
    for batch in batches:
        tokens, rows = batch.sequences.tokens, batch.sequences.label_rows
        for b, ids in enumerate(tokens):
            mine = [i for i, row in enumerate(rows.tolist()) if row % len(tokens) == b]
            labels = batch.labels.student_labels[mine]
            prompt_len = int(rows[mine[0]]) // len(tokens) + 1
            sequence = ids[: prompt_len + len(labels)][None]
            assert sequence[0, prompt_len:].tolist() == labels.tolist()
            hidden = model(sequence, torch.arange(sequence.shape[1])[None], None)[:, 0]
            logits = (hidden[prompt_len - 1 : -1] @ model.output_weight.T)[:, :vocab_size]
            loss = -torch.log_softmax(logits.double(), dim=1).gather(1, labels[:, None]).sum()
            loss.backward()
            total += float(loss.detach())
            num_labels += len(labels)
    return {name: p.grad / num_labels for name, p in model.named_parameters()}, total, num_labels


def _one_sgd_step(rank, world_size, folder, weights, *flags) -> tuple[Any, ...]:
    """Weights before and after, the report, and, if one process sees all samples, the gradient by hand."""
    resolved = config(folder, *weights, *SFT, *SGD, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        batches = micro_batches(job)
        by_hand = None
        if world_size == 1:
            model = job.updater.model
            # A copy: plain autograd, without the hooks that move gradients into Megatron's buffer.
            student = load_tokenizer(resolved.model.tokenizer_model)
            replica = load_model(resolved, resolved.model, groups, student, prefix="")
            assert all(
                torch.equal(a, b) for a, b in zip(replica.parameters(), model.parameters(), strict=True)
            )
            by_hand = _unpacked(replica, batches, student.table.num_ids)
        before = parameters_of(job)
        report = job.updater.step(batches)
        return before, parameters_of(job), report, by_hand


@pytest.fixture(scope="module")
def by_hand(tiny, weights) -> tuple[Any, ...]:
    ((before, after, report, expected),) = run_ranks(1, _one_sgd_step, tiny, weights)
    return before, after, report, expected


def test_the_step_follows_the_gradient_of_the_unpacked_loss(by_hand) -> None:
    before, after, report, (gradients, total, num_labels) = by_hand
    assert report.sums["num_labels"] == num_labels > 50
    assert report.sums["loss"] == pytest.approx(total, rel=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert report.grad_norm == pytest.approx(norm, rel=1e-5) and norm > 0.1
    assert report.learning_rate == 0.5
    assert before.keys() == after.keys() == gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        moved = after[name] - before[name]
        torch.testing.assert_close(moved, -0.5 * gradient, rtol=1e-3, atol=2e-6, msg=name)
        assert bool(moved.any()), name


@pytest.mark.parametrize("flags", [("--micro-batch-size", "1"), ("--micro-batch-size", "4")])
def test_data_parallel_ranks_take_the_same_step(tiny, weights, by_hand, flags) -> None:
    _, expected, expected_report, _ = by_hand
    for _, after, report, _ in run_ranks(2, _one_sgd_step, tiny, weights, *flags):
        assert report.sums["loss"] == pytest.approx(expected_report.sums["loss"], rel=1e-6)
        assert report.grad_norm == pytest.approx(expected_report.grad_norm, rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=2e-6)


def _wrapped(rank, world_size, folder, weights) -> dict[str, torch.Tensor]:
    """Weights of a rank that started with other weights."""
    resolved = config(folder, *weights)
    with process_groups(resolved.parallel, seed=1) as groups:
        student = load_tokenizer(resolved.model.tokenizer_model)
        model = load_model(resolved, resolved.model, groups, student, prefix="")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)
        (chunk,) = wrap_data_parallel(model, resolved.parallel, resolved.update)
        return {name: parameter.detach() for name, parameter in chunk.named_parameters()}


def test_data_parallel_ranks_start_from_the_weights_of_the_first(tiny, weights) -> None:
    first, second = run_ranks(2, _wrapped, tiny, weights)
    assert first.keys() == second.keys() and len(first) > 10
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_clipping_scales_the_step_to_its_norm(tiny, weights, by_hand) -> None:
    before, free, free_report, _ = by_hand
    limit = free_report.grad_norm / 4
    ((_, clipped, report, _),) = run_ranks(1, _one_sgd_step, tiny, weights, "--clip-grad", str(limit))
    assert report.grad_norm == pytest.approx(free_report.grad_norm, rel=1e-6), (
        "the reported norm is the one before"
    )
    for name, start in before.items():
        torch.testing.assert_close(clipped[name] - start, (free[name] - start) / 4, rtol=1e-3, atol=2e-6)
    length = math.sqrt(sum(float((clipped[n] - before[n]).double().square().sum()) for n in before))
    assert length == pytest.approx(0.5 * limit, rel=1e-3)


def test_a_high_limit_clips_nothing(tiny, weights, by_hand) -> None:
    _, free, _, _ = by_hand
    ((_, after, _, _),) = run_ranks(1, _one_sgd_step, tiny, weights, "--clip-grad", "1000")
    for name, value in free.items():
        assert torch.equal(after[name], value)


def test_weight_decay_is_decoupled_and_spares_norms(tiny, weights) -> None:
    """With a huge --adam-eps the gradient moves nothing, so only the decay is left: lr x
    decay of each weight.
    """
    adam = (
        "--optimizer",
        "adam",
        "--lr",
        "1e-2",
        "--min-lr",
        "1e-2",
        "--weight-decay",
        ".5",
        "--adam-eps",
        "1e6",
    )
    ((before, after, _, _),) = run_ranks(1, _one_sgd_step, tiny, weights, *adam)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    torch.testing.assert_close(after[name], before[name] * (1 - 1e-2 * 0.5), rtol=0, atol=1e-6)
    norm = "decoder.final_layernorm.weight"
    torch.testing.assert_close(after[norm], before[norm], rtol=0, atol=1e-6)


# The schedule


def _learning_rates(rank, world_size, folder, weights, *flags) -> list[float]:
    resolved = config(folder, *weights, *SFT, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        batches = micro_batches(job)
        return [job.updater.step(batches).learning_rate for _ in range(resolved.training.train_iters)]


@pytest.mark.parametrize(
    "style, expected",
    [
        # 8 steps, 2 of them warm-up: the rate rises from 0 to 1e-3 and falls to 1e-4 over the other 6.
        ("linear", [0, 0.5, 1, 0.85, 0.7, 0.55, 0.4, 0.25]),
        ("cosine", [0, 0.5] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_learning_rates(tiny, weights, style, expected) -> None:
    flags = ("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", style, "--lr-warmup-fraction", ".25")
    (rates,) = run_ranks(1, _learning_rates, tiny, weights, *flags, "--train-iters", "8")
    assert rates == pytest.approx([1e-3 * factor for factor in expected], abs=1e-12)


def test_a_rate_below_the_minimum_is_not_raised_to_it(tiny, weights) -> None:
    flags = ("--lr", "1e-9", "--min-lr", "1e-8", "--lr-decay-style", "linear", "--train-iters", "3")
    (rates,) = run_ranks(1, _learning_rates, tiny, weights, *flags)
    assert rates == pytest.approx([1e-9] * 3, rel=1e-6)


# Refusals

POISONS = {
    "layer": (lambda model, loss, labels: model.decoder.layers[1].mlp.linear_fc2.weight, (0, 0), math.nan),
    "infinite layer": (
        lambda model, loss, labels: model.decoder.layers[1].mlp.linear_fc2.weight,
        (0, 0),
        math.inf,
    ),
    "head, at a token that nothing says": (
        lambda model, loss, labels: model.output_weight,
        (-16, 0),
        math.nan,
    ),
    # Not the last row: under tensor parallelism that is padding, which the loss never reads.
    "teacher's head": (lambda model, loss, labels: loss.keywords["shared_head"].weight, (0, 0), math.nan),
    "teacher's logit": (lambda model, loss, labels: labels.teacher_own_logit, (0,), math.nan),
    "teacher's hidden state": (lambda model, loss, labels: labels.teacher_hidden, (0, 0), math.nan),
}
"""A bad number on one rank alone: a tensor, an index, and the number."""


def _poisoned_steps(
    rank, world_size, folder, weights, tp
) -> tuple[dict[str, tuple[str, bool]], StepReport, int]:
    """For each of POISONS the error of the step and whether all was unchanged; then a step without poison."""
    resolved = config(folder, *weights, "--tensor-model-parallel-size", str(tp))
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        optimizer = job.updater._optimizer
        batches = micro_batches(job)
        before, lr = parameters_of(job), optimizer.param_groups[0]["lr"]
        results = {}
        for name, (find, index, value) in POISONS.items():
            tensor = find(job.updater.model, job.updater._losses[""], batches[0].labels).detach()
            sound = tensor[index].clone()
            if rank == world_size - 1:
                tensor[index] = value
            try:
                job.updater.step(batches)
                message = ""
            except NonFiniteError as error:
                message = str(error)
            tensor[index] = sound
            after = parameters_of(job)
            results[name] = (
                message,
                all(torch.equal(after[n], before[n]) for n in before)
                and not optimizer.optimizer.state
                and optimizer.param_groups[0]["lr"] == lr,
            )
        report = job.updater.step(batches)
        moved = sum(not torch.equal(value, before[n]) for n, value in parameters_of(job).items())
        return results, report, moved


@pytest.mark.parametrize("world_size, tp", [(1, 1), (2, 2), (2, 1)], ids=["one", "tp2", "dp2"])
def test_a_bad_number_on_one_rank_stops_all_before_any_weight_changes(tiny, weights, world_size, tp) -> None:
    by_rank = run_ranks(world_size, _poisoned_steps, tiny, weights, tp)
    for name in POISONS:
        messages = [results[name][0] for results, _, _ in by_rank]
        assert all("stopped before the optimizer step; lower --lr" in message for message in messages), name
        assert any("nan" in message or "inf" in message for message in messages), name
        assert all(results[name][1] for results, _, _ in by_rank), name
    for _, report, moved in by_rank:  # and the refused step has no effect
        assert math.isfinite(report.sums["loss"]) and math.isfinite(report.grad_norm) and moved > 10


def _train_broken(rank, world_size, folder, weights, temperature) -> str:
    """The error of a whole run whose student holds one nan on one rank."""
    flags = ("--tensor-model-parallel-size", str(world_size), "--rollout-temperature", temperature)
    resolved = config(folder, *weights, *flags, "--make-vocab-size-divisible-by", "128")
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        if rank == world_size - 1:
            with torch.no_grad():
                job.updater.model.decoder.layers[0].mlp.linear_fc2.weight[0, 0] = math.nan
        with pytest.raises(NonFiniteError) as error:
            train(job)
        return str(error.value)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_broken_student_stops_at_the_loss_after_it_was_sampled(tiny, weights, temperature) -> None:
    for message in run_ranks(2, _train_broken, tiny, weights, temperature):
        assert "loss sum nan over 96 labels" in message
