"""A teacher whose weights are an average of the student's: by hand, in every layout, after a
resume, and refusals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.job import Job, build_job
from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.teacher.average import Average
from megatron_simct.train import train
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks
from tests.runs import assert_same_run, run, tensors
from tests.tiny import command_line, config

with megatron_imports():
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

DECAY = 0.6


def of_itself(files: Path, weights: tuple[str, ...], *flags: str) -> tuple[str, ...]:
    """Flags of a student whose teacher starts from the student's own weights."""
    start = dict(zip(weights[::2], weights[1::2], strict=True))["--pretrained-checkpoint"]
    hinted = files / "hinted.jsonl"  # without hints the student would have nothing to learn
    if not hinted.exists():
        rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
        hinted.write_text(
            "".join(json.dumps(row | {"teacher_suffix": f" {row['label']}"}) + "\n" for row in rows)
        )
    return (
        *("--prompt-data", str(hinted)),
        *("--pretrained-checkpoint", start, "--teacher-pretrained-checkpoint", start),
        *(
            "--teacher-hf-checkpoint",
            str(files / "student"),
            "--teacher-tokenizer-model",
            str(files / "student.model"),
        ),
        *("--teacher-make-vocab-size-divisible-by", "8", "--teacher-ema", str(DECAY), "--train-iters", "3"),
        *("--simct-interface", "kd", "--simct-divergence", "forward_kl", "--lr", "1e-2", *flags),
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() for name, value in model.named_parameters()}


def _follow(rank: int, world_size: int, files: Path, flags: tuple[str, ...]) -> tuple[Any, ...]:
    """Both models' weights after each update, the student's losses, and the final rows of
    the teacher's head.
    """
    resolved = config(files, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job: Job = build_job(resolved, groups)
        teacher, student = job.teacher._forward._model, job.updater.model
        seen, losses = [weights_of(teacher)], []
        students = []
        step = job.updater.step

        def recording_step(batches) -> StepReport:
            report = step(batches)
            losses.append((report.sums["loss"], report.grad_norm))
            students.append(weights_of(student))
            return report

        job.updater.step = recording_step
        train(job)
        seen.append(weights_of(teacher))
        head = job.updater._losses[""].keywords["shared_head"]
        return seen, students, losses, None if head is None else head.weight.double()


@pytest.fixture(scope="module")
def one_process(tiny, weights) -> tuple[Any, ...]:
    return run_ranks(1, _follow, tiny, of_itself(tiny, weights))[0]


def test_the_teacher_is_the_average_of_the_students_weights(one_process) -> None:
    (start, end), students, losses, head = one_process
    for name, average in start.items():
        for student in students:
            average = DECAY * average + (1 - DECAY) * student[name]
        torch.testing.assert_close(end[name], average, rtol=0, atol=1e-6, msg=name)
        assert float((average - start[name]).abs().max()) > 1e-4, name
    assert all(loss > 1 and norm > 0.1 for loss, norm in losses)
    # The loss reads the current rows of the head.
    rows = end["embedding.word_embeddings.weight"]
    assert torch.equal(head, rows[: len(head)])


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
    ],
    ids=["TP2", "PP2", "DP2 with overlapped gathering"],
)
def test_every_layout_takes_the_same_steps(tiny, weights, one_process, ranks, flags) -> None:
    _, _, expected, _ = one_process
    for _, _, losses, _ in run_ranks(ranks, _follow, tiny, of_itself(tiny, weights, *flags)):
        for (loss, norm), (expected_loss, expected_norm) in zip(losses[1:], expected[1:], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_a_resumed_run_goes_on_with_the_average(tiny, weights, tmp_path) -> None:
    def trained(folder: Path, iterations: int) -> None:
        saved = (
            "--save",
            str(folder / "save"),
            "--load",
            str(folder / "save"),
            "--run-dir",
            str(folder / "run"),
        )
        steps = ("--train-iters", str(iterations), "--lr-decay-style", "constant")
        argv = command_line(tiny, *of_itself(tiny, weights, *saved, *steps))
        ((code, out, error),) = run_ranks(1, run, argv)
        assert code == 0, out + error

    trained(tmp_path / "once", 4)
    trained(tmp_path / "twice", 2)
    trained(tmp_path / "twice", 4)
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    _, state = tensors(tmp_path / "once")
    averages = {name: value for name, value in state.items() if name.startswith("teacher_average.")}
    assert averages and all(value.dtype == torch.float32 for value in averages.values())
    # A run may start from the weights alone, and a run without an average reads the other parts.
    flags = of_itself(tiny, weights, "--pretrained-checkpoint", str(tmp_path / "once" / "save"))
    ((code, out, error),) = run_ranks(1, run, command_line(tiny, *flags, "--train-iters", "1"))
    assert code == 0, out + error


def _in_bfloat16(rank: int, world_size: int, files: Path) -> tuple[float, float, set[torch.dtype], bool]:
    """Difference of the average and the teacher's weights from float64 after many small steps,
    in units of a weight.
    """
    resolved = config(files)
    with process_groups(resolved.parallel, seed=1) as groups:
        tokenizer = open_tokenizer(resolved.model, prefix="")
        teacher, student = (
            load_model(resolved, resolved.model, groups, tokenizer, prefix="").bfloat16() for _ in range(2)
        )
        average = Average(teacher, student, decay=0.999, changed=lambda: None)
        expected = [value.detach().double() for value in teacher.parameters()]
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
        for _ in range(200):
            average.follow()
            for mean, value in zip(expected, student.parameters(), strict=True):
                mean.lerp_(value.detach().double(), 1 - 0.999)
        of_average, of_teacher = (
            max(float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True))
            for found in (average._average, [value.detach() for value in teacher.parameters()])
        )
        state = average.sharded_state_dict("teacher_average.")
        dtypes = {leaf.data.dtype for leaf in nested_values(state) if isinstance(leaf, ShardedTensor)}
        names = all(leaf.key.startswith("teacher_average.") for leaf in nested_values(state))
        assert {value.dtype for value in teacher.parameters()} == {torch.bfloat16}
        return of_average, of_teacher, dtypes, names


def test_the_average_is_float32_where_the_models_are_bfloat16(tiny) -> None:
    ((of_average, of_teacher, dtypes, names),) = run_ranks(1, _in_bfloat16, tiny)
    assert of_average < 1e-5 < of_teacher < 2e-2  # steps of 1e-3 of the difference would vanish in bfloat16
    assert dtypes == {torch.float32} and names


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--teacher-endpoint", "somewhere"), "--teacher-endpoint: a teacher in another job"),
        (("--simct-interface", "sft"), "--simct-interface sft: it uses no teacher"),
        (("--load-debug-scored-data", "there"), "--load-debug-scored-data: stored answers"),
        (("--teacher-ema", "1"), "strictly between 0 and 1"),
    ],
)
def test_what_cannot_follow_is_refused(tiny, flags, words) -> None:
    with pytest.raises(ValueError, match="--teacher-ema") as refused:
        config(tiny, "--teacher-ema", ".9", *flags).check(data_parallel_size=1)
    assert words in str(refused.value)


def _build(rank: int, world_size: int, files: Path) -> str:
    resolved = config(files, "--teacher-ema", ".9")
    with process_groups(resolved.parallel, seed=1) as groups:
        try:
            build_job(resolved, groups)
        except ValueError as error:
            return str(error)
    return ""


def test_a_teacher_of_another_shape_is_refused(tiny) -> None:
    ((message,),) = [run_ranks(1, _build, tiny)]
    assert message.startswith("--teacher-ema: --teacher-hf-checkpoint ")
    assert message.endswith("must be of one architecture and vocabulary")
