"""Several teachers, each for the rows that name it: the step by hand in float64, every layout, resuming,
jobs, what is refused.

L = mean over all labels of the step of the loss of each row under its own teacher
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import megatron_simct.teacher.build
from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config
from megatron_simct.config.run_file import read_run_file
from megatron_simct.job import build_job
from megatron_simct.launch.commands import command_of
from megatron_simct.loading import load_model, open_model, open_tokenizer
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.preflight.check import check_run
from megatron_simct.records import MicroBatch, Prompt, Rollout
from megatron_simct.rollout.engine import GivenResponses
from megatron_simct.teacher.client import Patience
from megatron_simct.teacher.routing import unscored
from megatron_simct.teacher.scorer import without_content
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks
from tests.huggingface import save_byte_level, save_model
from tests.oracles import bytes as oracle
from tests.runs import assert_same_run, metrics, run
from tests.steps import scores_of, train_and_record
from tests.teacher_jobs import TeacherJob
from tests.tiny import command_line, routed, rows_of_teachers

pytest.importorskip("transformers")

TEACHERS = ("one", "two", "one", "one", "one", "two", "one", "one")
"""The teachers of the rows in turn. Of two data-parallel ranks only one has rows of `two`."""


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory) -> Path:
    return rows_of_teachers(tiny, tmp_path_factory.mktemp("rows") / "rows.jsonl", TEACHERS)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A teacher of another width whose tokenizer is a third one."""
    folder = tmp_path_factory.mktemp("other")
    save_model(folder, "llama", vocab_size=320, hidden_size=48)
    save_byte_level(folder)
    return folder


def of_start(weights: tuple[str, ...]) -> str:
    """The checkpoint of the student's weights."""
    return dict(zip(weights[::2], weights[1::2], strict=True))["--pretrained-checkpoint"]


def of_teacher(weights: tuple[str, ...]) -> str:
    """The checkpoint of the tiny teacher's weights."""
    return dict(zip(weights[::2], weights[1::2], strict=True))["--teacher-pretrained-checkpoint"]


# One tokenizer and two models, by hand


def _two_models(files: Path, weights: tuple[str, ...], moved: Path) -> dict[str, Any]:
    """The student's start, and a model of the student's tokenizer with other weights and another width."""
    common = {"tokenizer_model": str(files / "student.model"), "make_vocab_size_divisible_by": 8}
    one = {"hf_checkpoint": str(files / "student"), "pretrained_checkpoint": of_start(weights)}
    return {"one": common | one, "two": common | {"hf_checkpoint": str(moved)}}


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moved")
    save_model(folder, "llama", vocab_size=360, hidden_size=48, scale=0.3)
    return folder


def _step(
    rank: int, world_size: int, files: Path, weights: tuple[str, ...], rows: Path, moved: Path, *flags: str
) -> tuple[Any, ...]:
    """The sums, the gradient norm, in one process the gradient too; there by hand too."""
    resolved = parse_config(
        routed(
            *(files, rows, _two_models(files, weights, moved), *weights[:2], "--simct-interface", "kd"),
            *("--simct-divergence", "forward_kl", "--micro-batch-size", "1", "--rollout-max-response-len"),
            *("24", "--optimizer", "sgd", "--lr", "1", "--clip-grad", "0", "--lr-decay-style", "constant"),
            *("--no-rollout-shuffle", *flags),
        )
    )
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        student = job.updater.model
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.2)
        before = {name: value.detach().double() for name, value in student.named_parameters()}
        tokenizer = open_tokenizer(resolved.model, prefix="")
        asked = job.prompts.batch(0)
        rollouts = GivenResponses(tokenizer).generate(asked, job.sampling)  # as if they had been sampled
        drops = resolved.routing.missing_teacher == "drop"  # as if `two` had not answered
        by_hand = None
        if world_size == 1:
            models = {
                one.name: load_model(resolved, one.model, groups, tokenizer, prefix=one.prefix).double()
                for one in resolved.teachers
            }
            own = load_model(resolved, resolved.model, groups, tokenizer, prefix="").double()
            own.load_state_dict(before, strict=False)
            if drops:
                del models["two"]
            by_hand = _by_hand(own, models, asked, rollouts, tokenizer.table.num_ids)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
        scored = [pair for pair in pairs if not (drops and pair.teacher == "two")]
        scores = scores_of(job.teacher, scored)
        if drops:
            pairs = [pair if pair in scored else unscored(pair) for pair in pairs]
            scores += [without_content(pair.sample_id) for pair in pairs if pair.teacher is None]
        batches = job.pack(asked, rollouts, pairs, scores)
        of = {pair.sample_id: pair.teacher for pair in pairs}
        assert all({of[i] for i in batch.sample_ids} == {batch.teacher} for batch in batches)
        report = job.updater.step(batches)
        after = {name: value.detach().double() for name, value in student.named_parameters()}
        gradient = {name: before[name] - after[name] for name in before} if world_size == 1 else None
        names = [name for name in report.sums if name.startswith(("loss", "num_labels", "teacher_nll_sum"))]
        return {name: report.sums[name] for name in names}, report.grad_norm, gradient, by_hand, len(batches)


def _by_hand(
    student: HiddenStateModel,
    teachers: dict[str, HiddenStateModel],
    asked: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    vocab_size: int,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """KL(teacher of the row || student) of every label: sums by teacher, and the gradient of the mean."""

    def log_probs(model: HiddenStateModel, prompt_ids: np.ndarray, response_ids: np.ndarray) -> torch.Tensor:
        ids = torch.tensor([*prompt_ids, *response_ids])[None]
        hidden = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0]
        logits = (hidden[len(prompt_ids) - 1 : -1] @ model.output_weight.T)[:, :vocab_size]
        return torch.log_softmax(logits, dim=1)

    found: dict[str, list[torch.Tensor]] = {name: [] for name in teachers}
    for prompt, rollout, name in zip(asked, rollouts, TEACHERS, strict=True):
        if name not in teachers:
            continue
        own = log_probs(student, prompt.student_ids, rollout.student_ids)
        target = log_probs(teachers[name], prompt.teacher_ids, rollout.student_ids).detach()
        found[name].append((target.exp() * (target - own)).sum(1))
    of_teachers = {name: torch.cat(values) for name, values in found.items()}
    student.zero_grad()
    torch.cat(list(of_teachers.values())).mean().backward()
    sums = {f"loss/{name}": float(values.sum()) for name, values in of_teachers.items()}
    sums |= {f"num_labels/{name}": float(len(values)) for name, values in of_teachers.items()}
    return sums, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def one_process(tiny, weights, rows, moved) -> tuple[Any, ...]:
    return run_ranks(1, _step, tiny, weights, rows, moved)[0]


def test_the_step_is_that_of_each_row_s_teacher(one_process) -> None:
    sums, grad_norm, gradient, (expected, expected_gradient), _ = one_process
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5) and value > 1
    assert sums["loss"] == pytest.approx(sums["loss/one"] + sums["loss/two"], rel=1e-6)
    assert sums["loss/one"] / sums["num_labels/one"] != pytest.approx(
        sums["loss/two"] / sums["num_labels/two"], rel=0.05
    )
    norm = float(torch.sqrt(sum(value.square().sum() for value in expected_gradient.values())))
    assert grad_norm == pytest.approx(norm, rel=1e-5)
    for name, value in expected_gradient.items():
        # Weights of at most 2 are rounded by 1.2e-7 in the update.
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=3e-6 * max(1, norm), msg=name)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ("--micro-batch-size", "4")),
        (1, ("--max-tokens-per-gpu", "100")),
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ("--micro-batch-size", "4")),
        (2, ("--use-distributed-optimizer", "--optimizer", "adam", "--overlap-grad-reduce")),
        (2, ("--context-parallel-size", "2", "--max-tokens-per-gpu", "60")),
        (2, ("--context-parallel-size", "2", "--teacher-context-parallel-size", "1")),
        (4, ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--max-tokens-per-gpu", "90")),
    ],
    ids=[
        "larger",
        "packed",
        "TP2",
        "PP2",
        "DP2",
        "DP2 overlapped",
        "CP2 packed",
        "CP2 dealt",
        "TP2 DP2 SP packed",
    ],
)
def test_every_layout_takes_the_same_step(tiny, weights, rows, moved, one_process, ranks, flags) -> None:
    sums, grad_norm, *_ = one_process
    found = run_ranks(ranks, _step, tiny, weights, rows, moved, *flags)
    for its, norm, *_ in found:
        assert its == pytest.approx(sums, rel=1e-5)
        assert norm == pytest.approx(grad_norm, rel=1e-5)
    assert len({count for *_, count in found}) == 1, "every rank has as many micro-batches"


def test_rows_of_a_missing_teacher_add_nothing(tiny, weights, rows, moved, one_process) -> None:
    drop = ("--missing-teacher", "drop")
    found = run_ranks(1, _step, tiny, weights, rows, moved, *drop)
    sums, grad_norm, gradient, (expected, expected_gradient), _ = found[0]
    assert sums["num_labels"] == expected["num_labels/one"] < one_process[0]["num_labels"]
    assert sums["loss"] == pytest.approx(expected["loss/one"], rel=1e-5)
    assert sums["loss/two"] == sums["num_labels/two"] == 0
    norm = float(torch.sqrt(sum(value.square().sum() for value in expected_gradient.values())))
    assert grad_norm == pytest.approx(norm, rel=1e-5) and grad_norm != pytest.approx(one_process[1], rel=0.01)
    for name, value in expected_gradient.items():
        # Weights of at most 2 are rounded by 1.2e-7 in the update.
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=3e-6 * max(1, norm), msg=name)
    # On one of two ranks; of context-parallel ranks each has some labels of a row.
    for flags in ((), ("--context-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")):
        for its, its_norm, *_ in run_ranks(2, _step, tiny, weights, rows, moved, *drop, *flags):
            assert its == pytest.approx(sums, rel=1e-5) and its_norm == pytest.approx(grad_norm, rel=1e-5)


# Other tokenizers, `paper` and `bytes`, jobs of their own


def _mixed_places(files: Path, weights: tuple[str, ...], other: Path) -> dict[str, Any]:
    one = {
        "hf_checkpoint": str(files / "teacher"),
        "tokenizer_model": str(files / "teacher.tiktoken"),
        "pretrained_checkpoint": of_teacher(weights),
        "make_vocab_size_divisible_by": 4,
    }
    return {"one": one, "two": {"hf_checkpoint": str(other)}}


def _scored(
    rank: int, world_size: int, argv: list[str], with_oracle: bool
) -> tuple[dict[str, float], float, Any]:
    """A step on given responses; with `bytes` the sums by the oracle too."""
    megatron_simct.teacher.build.Patience = partial(
        Patience, hello_s=0.2, silence_s=2.0, look_s=0.1, look_again_s=0.1
    )
    resolved: Config = parse_config(argv)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        asked = job.prompts.batch(0)
        tokenizer = open_tokenizer(resolved.model, prefix="")
        rollouts = GivenResponses(tokenizer).generate(asked, job.sampling)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
        expected = _oracle(resolved, groups, asked, rollouts) if with_oracle else None
        report = job.updater.step(job.pack(asked, rollouts, pairs, scores_of(job.teacher, pairs)))
        names = [name for name in report.sums if name.startswith(("loss", "num_labels"))]
        return {name: report.sums[name] for name in names}, report.grad_norm, expected


def _oracle(resolved: Config, groups: Any, asked: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Any:
    """Sums of `bytes` by teacher and the norm of the mean's gradient, from whole logits in float64."""
    tokenizers = {"": open_tokenizer(resolved.model, prefix="")}
    tokenizers |= {one.name: open_tokenizer(one.model, prefix=one.prefix) for one in resolved.teachers}
    options = {"": (resolved.model, "")} | {one.name: (one.model, one.prefix) for one in resolved.teachers}
    models = {
        name: open_model(
            model, resolved.parallel, groups, tokenizers[name], prefix=prefix, bf16=False, longest=256
        )
        for name, (model, prefix) in options.items()
    }
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for prompt, rollout in zip(asked, rollouts, strict=True):
        text = tokenizers[""].decode(rollout.student_ids[:-1])
        weights = dict(prompt.mixture) or {prompt.teacher: 1.0}
        sides = [_side(models[""], tokenizers[""].table, prompt.student_ids, rollout.student_ids)]
        for name, ids in zip(weights, (prompt.teacher_ids, *prompt.other_teacher_ids), strict=True):
            labels = np.append(tokenizers[name].encode(text), tokenizers[name].table.stop_ids[:1])
            sides.append(_side(models[name], tokenizers[name].table, ids, labels))
        if prompt.mixture:
            value = oracle.mixture_loss(sides[0], sides[1:], list(weights.values()))
        else:
            value, _ = oracle.loss(*sides)
        key = f"loss/{prompt.teacher}"
        sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + value
        count += len(rollout.student_ids)
    models[""].zero_grad()
    (sum(sums.values()) / count).backward()
    squares = (p.grad.double().square().sum() for p in models[""].parameters() if p.grad is not None)
    return {name: float(value.detach()) for name, value in sums.items()}, float(sum(squares)) ** 0.5


def _side(model: HiddenStateModel, table: Any, prompt_ids: np.ndarray, labels: np.ndarray) -> oracle.Side:
    tokens = torch.from_numpy(np.concatenate([prompt_ids, labels]).astype(np.int64))[None]
    hidden = model(tokens, torch.arange(tokens.shape[1])[None], None)[:, 0]
    logits = (hidden @ model.output_weight.T)[len(prompt_ids) - 1 : -1, : table.num_ids]
    return oracle.Side(table.pieces(), list(table.stop_ids), logits, [int(label) for label in labels])


def _flags(weights: tuple[str, ...], interface: str) -> tuple[str, ...]:
    return (
        *(*weights[:2], "--simct-interface", interface, "--rollout-max-response-len", "24"),
        *("--no-rollout-shuffle", "--clip-grad", "0"),
    )


@pytest.fixture(scope="module")
def on_these_ranks(tiny, weights, rows, other) -> dict[str, Any]:
    teachers = _mixed_places(tiny, weights, other)
    return {
        interface: run_ranks(
            1, _scored, routed(tiny, rows, teachers, *_flags(weights, interface)), interface == "bytes"
        )[0]
        for interface in ("bytes", "paper", "partition")
    }


def test_bytes_of_two_tokenizers_are_those_of_the_oracle(on_these_ranks) -> None:
    sums, grad_norm, (expected, expected_norm) = on_these_ranks["bytes"]
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5) and value > 1
    assert grad_norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, ()), (2, ("--tensor-model-parallel-size", "2")), (2, ("--pipeline-model-parallel-size", "2"))],
    ids=["DP2", "TP2", "PP2"],
)
@pytest.mark.parametrize("interface", ["paper", "bytes", "partition"])
def test_teachers_with_other_tokenizers_and_jobs(
    tiny, weights, rows, other, on_these_ranks, tmp_path, interface, ranks, flags
) -> None:
    """One of the teachers in a job of its own."""
    sums, grad_norm, _ = on_these_ranks[interface]
    teachers = _mixed_places(tiny, weights, other)
    teachers["two"]["endpoint"] = [str(tmp_path)]
    argv = routed(tiny, rows, teachers, *_flags(weights, interface), *flags)
    its_flags = ("--teacher-hf-checkpoint", str(other), "--teacher-tokenizer-model", str(other))
    with TeacherJob(tiny, (), tmp_path, "--teacher-hidden-dtype", "fp32", *its_flags):
        for found, norm, _ in run_ranks(ranks, _scored, argv, False):
            assert found == pytest.approx(sums, rel=1e-5) and found["loss/two"] > 1
            assert norm == pytest.approx(grad_norm, rel=1e-5)


# Rows with a mixture


@pytest.fixture(scope="module")
def mixed(rows, tmp_path_factory) -> Path:
    """The rows, of which a third has the weights 3 to 1 and a third 1 to 2."""
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(content):
        if number % 3:
            del row["teacher"]
            row["teachers"] = {"one": 3, "two": 1} if number % 3 == 1 else {"one": 0.5, "two": 1.0}
    path = tmp_path_factory.mktemp("mixed") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def mixture(tiny, weights, mixed, other) -> Any:
    teachers = _mixed_places(tiny, weights, other)
    return run_ranks(1, _scored, routed(tiny, mixed, teachers, *_flags(weights, "bytes")), True)[0]


def test_rows_with_weights_are_the_mixture_of_the_oracle(mixture, on_these_ranks) -> None:
    sums, grad_norm, (expected, expected_norm) = mixture
    assert expected.keys() == {"loss/one", "loss/two"}
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5) and value > 1
    assert grad_norm == pytest.approx(expected_norm, rel=1e-5)
    assert sums["loss"] != pytest.approx(on_these_ranks["bytes"][0]["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ()),
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ("--context-parallel-size", "2")),
    ],
    ids=["DP2", "TP2", "PP2", "CP2"],
)
def test_every_layout_mixes_alike(tiny, weights, mixed, other, mixture, tmp_path, ranks, flags) -> None:
    """One of the teachers in a job of its own."""
    teachers = _mixed_places(tiny, weights, other)
    teachers["two"]["endpoint"] = [str(tmp_path)]
    argv = routed(tiny, mixed, teachers, *_flags(weights, "bytes"), *flags)
    its_flags = ("--teacher-hf-checkpoint", str(other), "--teacher-tokenizer-model", str(other))
    with TeacherJob(tiny, (), tmp_path, "--teacher-hidden-dtype", "fp32", *its_flags):
        for found, norm, _ in run_ranks(ranks, _scored, argv, False):
            assert found == pytest.approx(mixture[0], rel=1e-5)
            assert norm == pytest.approx(mixture[1], rel=1e-5)


def test_a_resumed_mixture_equals_an_undisturbed_one(tiny, weights, mixed, other, tmp_path) -> None:
    argv = routed(
        *(tiny, mixed, _mixed_places(tiny, weights, other), *weights[:2], "--simct-interface", "bytes"),
    )
    code, out, error = _train(tmp_path / "once", argv, 4)
    assert code == 0 and "by teacher: one 44, two 36" in out, error + out
    for iterations in (2, 4):
        assert _train(tmp_path / "twice", argv, iterations)[0] == 0
    assert_same_run(tmp_path / "twice", tmp_path / "once")


# Whole runs


def _train(folder: Path, argv: Sequence[str], iterations: int) -> tuple[int, str, str]:
    saved = ("--save", str(folder / "save"), "--load", str(folder / "save"), "--run-dir", str(folder / "run"))
    steps = ("--train-iters", str(iterations), "--lr-decay-style", "constant", "--lr", "1e-2")
    ((code, out, error),) = run_ranks(1, run, [*argv, *saved, *steps])
    return code, out, error


@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, weights, rows, other, tmp_path, interface) -> None:
    teachers = _mixed_places(tiny, weights, other)
    terms = ("--given-share", "0.25", "--reference-kl-weight", "0.1")
    argv = routed(tiny, rows, teachers, *weights[:2], "--simct-interface", interface, *terms)
    code, out, error = _train(tmp_path / "once", argv, 4)
    assert code == 0, error
    assert "rows of --prompt-data by teacher: one 36, two 12" in out and "loss/two: " in out
    for iterations in (2, 4):
        assert _train(tmp_path / "twice", argv, iterations)[0] == 0
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    steps = [row for row in metrics(tmp_path / "once") if row["kind"] == "step"]
    assert all(step["samples/one"] + step["samples/two"] == 1 for step in steps)
    both = [step for step in steps if "loss/two" in step]
    assert both and all(step["samples/two"] == 0 for step in steps if step not in both)
    for step in both:
        between = sorted([step["loss/one"], step["loss/two"]])
        compared = step["loss"] - 0.1 * step["reference_kl"] - step["given_cross_entropy"]
        assert between[0] - 1e-6 < compared < between[1] + 1e-6
    logged = [json.loads(line) for line in (tmp_path / "once" / "run" / "samples.jsonl").open()]
    assert {sample["teacher"] for sample in logged} <= {"one", "two"}
    teachers["two"] = teachers["one"]
    argv = routed(tiny, rows, teachers, *weights[:2], "--simct-interface", interface, *terms)
    code, _, error = _train(tmp_path / "twice", argv, 6)
    assert code == 1 and "its teacher tokenizer is not that of" in error and "--teachers" in error


# A teacher that is gone

PATIENCE = Patience(timeout_s=100, hello_s=0.2, silence_s=2.0, look_s=0.1, look_again_s=0.1)
GONE_AT, BACK_AT = 2, 4


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _without_two(rank: int, world_size: int, argv: list[str], folder: Path) -> Any:
    """A run that asks for the end of the teacher of the rows of `two` before an iteration, and for its return
    before another one: of each step the sums, the gradient norm, and the micro-batches' teachers and labels.
    """
    megatron_simct.teacher.build.Patience = lambda **_: PATIENCE
    resolved: Config = parse_config(argv)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        client = job.teacher._scorers["two"]._client

        def before_step(iteration: int) -> None:
            for at, wish in ((GONE_AT, "gone"), (BACK_AT, "back")):
                if iteration == at:
                    (folder / f"wants {wish}").touch()
                    _until((folder / wish).exists)
            if client is not None:
                gone = GONE_AT <= iteration < BACK_AT
                client._patience = replace(PATIENCE, timeout_s=1) if gone else PATIENCE
                if iteration == BACK_AT:
                    _until(client.status)

        object.__setattr__(job, "before_step", before_step)
        kept: list[list[MicroBatch]] = []
        step = job.updater.step

        def recording(batches: list[MicroBatch]) -> StepReport:
            kept.append(batches)
            return step(batches)

        job.updater.step = recording
        reports = train_and_record(job)
        return [
            (
                report.sums["loss"],
                report.sums["num_labels"],
                report.grad_norm,
                [(batch.teacher, sum(batch.num_labels)) for batch in batches],
            )
            for report, batches in zip(reports, kept, strict=True)
        ]


@pytest.mark.parametrize(
    "flags",
    [(), ("--pipeline-model-parallel-size", "2"), ("--tensor-model-parallel-size", "2")],
    ids=["DP2", "PP2", "TP2"],
)
@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_a_step_goes_on_without_the_rows_of_a_teacher_that_is_gone(
    tiny, weights, rows, other, tmp_path, interface, flags
) -> None:
    """On two data-parallel ranks all rows of one of them are of `two` in some steps."""
    teachers = _mixed_places(tiny, weights, other)
    teachers["two"]["endpoint"] = [str(tmp_path / "two")]
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(content):  # one of two ranks has rows of `two` only
        row["teacher"] = "two" if number % 2 else "one"
        if interface == "bytes" and number % 6 == 0:  # a mixture needs both
            row |= {"teacher": None, "teachers": {"one": 2, "two": 1}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = routed(
        *(tiny, path, teachers, *_flags(weights, interface), "--missing-teacher", "drop", *flags),
        *("--train-iters", str(BACK_AT), "--run-dir", str(tmp_path / "run"), "--given-share", "0.25"),
        *("--micro-batch-size", "1"),
    )
    its_flags = ("--teacher-hf-checkpoint", str(other), "--teacher-tokenizer-model", str(other))
    with ThreadPoolExecutor(1) as pool:
        with TeacherJob(tiny, (), tmp_path / "two", *its_flags):
            running = pool.submit(run_ranks, 2, _without_two, argv, tmp_path)
            _until(lambda: (tmp_path / "wants gone").exists() or running.done())
        (tmp_path / "gone").touch()
        _until(lambda: (tmp_path / "wants back").exists() or running.done())
        with TeacherJob(tiny, (), tmp_path / "two", *its_flags):
            (tmp_path / "back").touch()
            found = running.result()
    for number, of_ranks in enumerate(zip(*found, strict=True), start=1):
        gone = GONE_AT <= number < BACK_AT
        counted: dict[str | None, int] = {}
        for teacher, labels in [batch for *_, batches in of_ranks[: 1 if flags else 2] for batch in batches]:
            counted[teacher] = counted.get(teacher, 0) + labels
        assert (None in counted) == gone and ("two" in counted) != gone, (number, counted)
        assert len({len(batches) for *_, batches in of_ranks}) == 1
        for loss, num_labels, grad_norm, _ in of_ranks:
            assert num_labels == sum(counted[name] for name in ("one", "two") if name in counted)
            assert loss > 0 and grad_norm > 0
    steps = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    missing = 4 if interface == "bytes" else 3
    assert [row["missing/two"] for row in steps] == [0, missing, missing, 0]
    assert [row["missing/one"] for row in steps] == [0, 0, 0, 0]


def _changed_rows(rows: Path, folder: Path, teacher: str | None) -> Path:
    """The rows, of which the third has another teacher, or none."""
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    content[2] |= {"teacher": teacher}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("third", "the unknown teacher 'third' (the teachers are one, two)"),
        (None, "no teacher (the teachers are one, two; the row has prompt, "),
    ],
)
def test_a_row_without_one_of_the_teachers_is_named(
    tiny, weights, rows, other, tmp_path, teacher, words
) -> None:
    path = _changed_rows(rows, tmp_path, teacher)
    argv = routed(tiny, path, _mixed_places(tiny, weights, other))
    ((code, _, error),) = run_ranks(1, run, argv)
    assert code == 1 and f"--prompt-data {path}, line 3: {words}" in error and error.count("\n") == 1


def test_one_teacher_needs_no_names_in_the_rows(tiny, weights, tmp_path) -> None:
    only = {"one": _mixed_places(tiny, weights, tiny)["one"]}
    code, out, error = _train(tmp_path, routed(tiny, tiny / "train.jsonl", only, *weights[:2]), 1)
    assert code == 0 and "by teacher: one 48" in out, error


def _single(files: Path, *flags: str) -> list[str]:
    return routed(files, files / "train.jsonl", {"a": {"hf_checkpoint": "/a"}}, *flags)


@pytest.mark.parametrize(
    ("teachers", "flags", "words"),
    [
        ("[]", (), "--teachers: expected teachers by name"),
        ("{", (), "--teachers: not JSON"),
        (
            '{"a": {"hf_checkpoint": "/a"}, "a": {"hf_checkpoint": "/b"}}',
            (),
            "--teachers: not JSON .the key 'a' occurs twice",
        ),
        (
            '{"a": {"hf_checkpoint": "/a", "endpoint": ["/jobs/a"]}}',
            ("--context-parallel-size", "2", "--teacher-context-parallel-size", "1"),
            "student's ranks; with endpoints of all --teachers give --context-parallel-size to the",
        ),
        ('{"a b": {}}', (), "--teachers a b: a name has only letters, digits"),
        ('{"student": {}}', (), "--teachers student: this name is the student's"),
        ('{"a": {}}', (), "--teachers a: hf_checkpoint is missing"),
        (
            '{"a": {"hf_chekpoint": "/a"}}',
            (),
            "--teachers a: unknown key 'hf_chekpoint'; it has hf_checkpoint",
        ),
        ('{"a": {"hf_checkpoint": 1}}', (), "--teachers a.hf_checkpoint: 1 is not a value of type str"),
        ('{"a": {"hf_checkpoint": "/a", "endpoint": "x"}}', (), "a.endpoint: 'x' is not a list; write"),
        (
            '{"a": {"hf_checkpoint": "/a", "make_vocab_size_divisible_by": 0}}',
            (),
            "--teachers a.make_vocab_size_divisible_by 0: must be at least 1",
        ),
        (None, ("--teacher-hf-checkpoint", "x"), "--teacher-hf-checkpoint and others .* write them into"),
        (
            None,
            ("--teacher-ema", "0.9"),
            "--teachers: not with --teacher-endpoint, -client-key, -cache and -ema",
        ),
        (None, ("--simct-alignment-map", "x"), "--teachers: not with --simct-alignment-map"),
        (
            None,
            ("--save-debug-scored-data", "x"),
            "not with --save-debug-scored-data.* leave one of them out",
        ),
        (None, ("--simct-interface", "sft"), "--teachers: --simct-interface sft uses no teacher"),
        (None, ("--schedule", "one_step_off"), "one_step_off needs an endpoint for each of --teachers"),
        (
            None,
            (
                *("--num-virtual-stages-per-pipeline-rank", "2", "--pipeline-model-parallel-size", "2"),
                *("--rollout-batch-size", "16"),
            ),
            "--teachers a: with --num-virtual-stages-per-pipeline-rank it needs an endpoint",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(tiny, teachers, flags, words) -> None:
    argv = _single(tiny, *flags)
    if teachers is not None:
        argv[argv.index("--teachers") + 1] = teachers
    with pytest.raises(ValueError, match=words):
        parse_config(argv).check(data_parallel_size=1)


def test_without_several_teachers_none_can_be_missing(tiny) -> None:
    with pytest.raises(ValueError, match="--missing-teacher drop needs --teachers"):
        parse_config(command_line(tiny, "--missing-teacher", "drop")).check(data_parallel_size=1)


def test_experts_over_ranks_need_a_job(tiny, tmp_path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    for name in ("student", "teacher"):
        save_model(tmp_path / name, "qwen3_moe", vocab_size=360, **experts)
    tokenizer = {"tokenizer_model": str(tiny / "student.model")}
    argv = routed(
        *(tiny, tiny / "train.jsonl", {"one": tokenizer | {"hf_checkpoint": str(tmp_path / "teacher")}}),
        *("--hf-checkpoint", str(tmp_path / "student"), "--expert-model-parallel-size", "2"),
    )
    (code, _, error), _ = run_ranks(2, run, argv)
    assert code == 1
    assert "has experts, which --expert-model-parallel-size 2 divides over ranks" in error


def test_a_run_file_names_teachers_and_their_jobs(tmp_path) -> None:
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "jobs": [
            {
                "name": "student",
                "kind": "student",
                "options": {
                    "hf_checkpoint": "/s",
                    "prompt_data": "/p",
                    "teachers": {"maths": {}, "code": None, "here": {"hf_checkpoint": "/h"}},
                },
            },
            {"name": "maths", "kind": "teacher", "options": {"teacher_hf_checkpoint": "/m"}},
            {
                "name": "code",
                "kind": "teacher",
                "options": {"teacher_hf_checkpoint": "/c", "teacher_stop_token_ids": [3]},
            },
        ],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    run_file = read_run_file(str(path))
    teachers = {one.name: one for one in run_file.config.teachers}
    assert list(teachers) == ["maths", "code", "here"]
    assert [one.model.hf_checkpoint for one in teachers.values()] == ["/m", "/c", "/h"]
    assert (
        teachers["maths"].job.endpoint == (f"{tmp_path}/run/maths",) and teachers["here"].job.endpoint == ()
    )
    assert teachers["code"].model.stop_token_ids == (3,)
    argv = command_of(run_file.student)[2:]
    assert parse_config(argv) == run_file.config and not any("two" in word for word in argv)
    values["jobs"][0]["options"]["teachers"] = {"maths": {}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ValueError, match="student.teachers has no code, which is a job; it has maths"):
        read_run_file(str(path))
    values["jobs"][0]["options"]["teachers"] = {"maths": {"hf_checkpoint": "/x"}, "code": {}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(
        ValueError, match="student.teachers.maths.hf_checkpoint and maths.teacher_hf_checkpoint"
    ):
        read_run_file(str(path))


def test_the_run_file_of_the_example_runs(tiny, weights, rows, other, tmp_path) -> None:
    """On the tiny models, two steps, with its teachers' jobs."""
    names = ("additions", "subtractions")
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(content):
        row["teacher"] = names[number % 2]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    student = {
        "hf_checkpoint": tiny / "student",
        "tokenizer_model": tiny / "student.model",
        "pretrained_checkpoint": of_start(weights),
        "prompt_data": path,
        "eval_prompt_data": tiny / "held_out.jsonl",
        "make_vocab_size_divisible_by": 8,
        "train_iters": 2,
    }
    teachers: dict[str, dict[str, Any]] = {
        "additions": {
            "teacher_hf_checkpoint": tiny / "teacher",
            "teacher_tokenizer_model": tiny / "teacher.tiktoken",
            "teacher_pretrained_checkpoint": of_teacher(weights),
            "teacher_make_vocab_size_divisible_by": 4,
        },
        "subtractions": {
            "teacher_hf_checkpoint": other,
            "teacher_tokenizer_model": other,
            "teacher_pretrained_checkpoint": "null",
        },
    }
    values = {"student": student, **teachers}
    overrides = [
        f"jobs.{job}.options.{key}={value}" for job, of in values.items() for key, value in of.items()
    ]
    example = Path(__file__).parents[2] / "examples" / "two_teachers" / "two_jobs.yaml"
    run_file = read_run_file(str(example), [*overrides, f"run_dir={tmp_path / 'run'}"])
    report = check_run(run_file)
    assert not report.failed, [f.message for f in report.findings if f.level == "fail"]
    assert {"student", *names} == report.plans.keys()
    with contextlib.ExitStack() as jobs:
        for job in run_file.of_kind("teacher"):
            module, *its_flags = command_of(job)[1:]
            assert module == "megatron_simct.serve_teacher"
            jobs.enter_context(TeacherJob(tiny, (), tmp_path / "run" / job.name, *its_flags))
        ((code, out, error),) = run_ranks(1, run, command_of(run_file.student)[2:])
    assert code == 0, out + error
    assert "by teacher: additions 24, subtractions 24" in out and "loss/subtractions: " in out
