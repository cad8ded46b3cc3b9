"""Two teachers in separate jobs, each with its tokenizer, act as one: loss and gradient are
those of the oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_simct.teacher.build
from megatron_simct.alignment.continuations import END
from megatron_simct.alignment.cut_rules import with_continuations
from megatron_simct.config.flags import parse_config
from megatron_simct.job import build_job
from megatron_simct.job_parts.prompts import build_prompts, read_training_rows
from megatron_simct.loading import open_model, open_pair, open_tokenizer
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Rollout
from megatron_simct.rollout.engine import ReplayEngine, write_rollouts
from megatron_simct.teacher.client import Patience
from tests.distributed import run_ranks
from tests.huggingface import save_byte_level, save_model
from tests.oracles import byte_bounds
from tests.oracles.bytes import Side, mixture_loss
from tests.runs import run
from tests.steps import train_and_record
from tests.teacher_jobs import TeacherJob
from tests.tiny import command_line, config, routed

pytest.importorskip("transformers")

WEIGHT = 0.35
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """A teacher with a third tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    save_model(folder, "llama", vocab_size=320, hidden_size=48)
    save_byte_level(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(tiny, tmp_path_factory) -> Path:
    """Responses of the tiny job's task, in the student's own tokens; the last one was cut."""
    folder = tmp_path_factory.mktemp("rollouts")
    run_ranks(1, _write_rollouts, tiny, folder)
    return folder


def _write_rollouts(rank, world_size, tiny, folder) -> None:
    tokenizer = open_tokenizer(config(tiny).model, prefix="")
    texts = [
        f"{name} has {number} apples." for number, name in enumerate(["Tom", "Nora", "Anna", "Äh"], start=8)
    ]
    samples = []
    for sample_id, text in enumerate(texts):
        ids = tokenizer.encode(text.encode()).astype(np.int32)
        finish = "length" if sample_id == len(texts) - 1 else "stop"
        if finish == "stop":
            ids = np.append(ids, np.int32(tokenizer.table.stop_ids[0]))
        samples.append(
            Rollout(
                sample_id=sample_id,
                weight_version=0,
                student_ids=ids,
                logprobs=np.zeros(ids.size, np.float32),
                finish=finish,
            )
        )
    write_rollouts(folder, samples, step=0, dp_rank=0)


def _flags(weights, second, rollouts, *more) -> tuple[str, ...]:
    return (
        *(
            *weights,
            "--simct-interface",
            "bytes",
            "--load-debug-rollout-data",
            str(rollouts),
            "--train-iters",
            "1",
            "--rollout-batch-size",
            "4",
        ),
        *(
            "--second-teacher-hf-checkpoint",
            str(second),
            "--second-teacher-weight",
            str(WEIGHT),
            "--clip-grad",
            "0",
        ),
        *more,
    )


def _endpoints(run_dir) -> tuple[str, ...]:
    return ("--teacher-endpoint", str(run_dir / "1"), "--second-teacher-endpoint", str(run_dir / "2"))


def _run(rank, world_size, folder, *flags) -> tuple[dict[str, float], float]:
    megatron_simct.teacher.build.Patience = partial(
        Patience, hello_s=0.2, silence_s=2.0, look_s=0.1, look_again_s=0.1
    )
    resolved = config(folder, *flags)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        (report,) = train_and_record(build_job(resolved, groups))
    return report.sums, report.grad_norm


def _expected(rank, world_size, folder, *flags) -> tuple[float, float, float]:
    """Loss and norm of the gradient by the oracle and autograd, from full logits of all three models."""
    resolved = config(folder, *flags, "--second-teacher-endpoint", "asks nobody")
    prefixes = ("", "teacher-", "second-teacher-")
    options = (resolved.model, resolved.teacher, resolved.second_teacher)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        tokenizers = [open_tokenizer(o, prefix=p) for o, p in zip(options, prefixes, strict=True)]
        models = [
            open_model(o, resolved.parallel, groups, t, prefix=p, bf16=False, longest=256)
            for o, p, t in zip(options, prefixes, tokenizers, strict=True)
        ]
        rows = read_training_rows(resolved)
        prompts = build_prompts(resolved, groups, open_pair(resolved), rows).batch(0)
        responses = ReplayEngine(
            None, save_dir=None, load_dir=resolved.rollout.load_debug_rollout_data, dp_rank=0, writes=False
        ).generate(prompts, None)
        total, count, of_any = torch.zeros((), dtype=torch.float64), 0, 0.0
        follows = [_follows(with_continuations(tokenizer)) for tokenizer in tokenizers]
        for prompt, rollout in zip(prompts, responses, strict=True):
            stopped = rollout.finish == "stop"
            text = tokenizers[0].decode(rollout.student_ids[:-1] if stopped else rollout.student_ids)
            labels = [rollout.student_ids]
            for tokenizer in tokenizers[1:]:
                labels.append(
                    np.append(tokenizer.encode(text), tokenizer.table.stop_ids[:1] if stopped else [])
                )
            prompt_ids = (prompt.student_ids, prompt.teacher_ids, *prompt.other_teacher_ids)
            student, *teachers = (
                _side(model, tokenizer.table, *ids)
                for model, tokenizer, *ids in zip(models, tokenizers, prompt_ids, labels, strict=True)
            )
            total = total + mixture_loss(student, teachers, [1 - WEIGHT, WEIGHT])
            count += len(rollout.student_ids)
            sides = [replace(s, follows=f) for s, f in zip((student, *teachers), follows, strict=True)]
            of_any += byte_bounds.loss(sides[0], sides[1:], [1 - WEIGHT, WEIGHT])
        (total / count).backward()
        squares = (p.grad.double().square().sum() for p in models[0].parameters() if p.grad is not None)
        return float(total.detach()), float(sum(squares)) ** 0.5, of_any


def _follows(tokenizer) -> Callable[[int, int | None], bool]:
    """Whether a byte, or the end (None), may follow a token."""
    return lambda token, symbol: bool(
        tokenizer.continuations.may_follow(token, END if symbol is None else symbol)
    )


def _side(model, table, prompt_ids, labels) -> Side:
    tokens = torch.from_numpy(np.concatenate([prompt_ids, labels]).astype(np.int64))[None]
    hidden = model(tokens, torch.arange(tokens.shape[1])[None], None)[:, 0]
    logits = (hidden @ model.output_weight.T)[len(prompt_ids) - 1 : -1, : table.num_ids]
    return Side(table.pieces(), list(table.stop_ids), logits, [int(label) for label in labels])


@pytest.fixture(scope="module")
def expected(tiny, weights, second, rollouts) -> tuple[float, float, float]:
    return run_ranks(1, _expected, tiny, *_flags(weights, second, rollouts))[0]


@pytest.mark.parametrize(
    "student, first_teacher, second_teacher",
    [((1, ()), (1, ()), (2, TP2)), ((2, TP2), (2, PP2), (1, ())), ((2, PP2), (1, ()), (1, ()))],
)
def test_two_jobs_are_the_mixture_of_the_oracle(
    tiny, weights, second, rollouts, expected, tmp_path, student, first_teacher, second_teacher
) -> None:
    fp32 = ("--teacher-hidden-dtype", "fp32")
    of_second = ("--teacher-hf-checkpoint", str(second), "--teacher-tokenizer-model", str(second))
    with (
        TeacherJob(tiny, weights, tmp_path / "1", *fp32, *first_teacher[1], world_size=first_teacher[0]),
        TeacherJob(
            tiny, (), tmp_path / "2", *fp32, *of_second, *second_teacher[1], world_size=second_teacher[0]
        ),
    ):
        flags = _flags(
            weights, second, rollouts, *_endpoints(tmp_path), "--rollout-wave-size", "2", *student[1]
        )
        for sums, grad_norm in run_ranks(student[0], _run, tiny, *flags):
            assert sums["loss"] == pytest.approx(expected[0], rel=1e-5) and expected[0] > 10
            assert grad_norm == pytest.approx(expected[1], rel=1e-5) and expected[1] > 0.1
        for sums, grad_norm in run_ranks(student[0], _run, tiny, *flags, "--simct-byte-bounds", "any"):
            assert sums["loss"] == pytest.approx(expected[2], rel=1e-5) and expected[2] > 1
            assert grad_norm > 0.01 and sums["bytes_teacher_unresolved_sum"] > 0


def _run_of(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, float], float]:
    resolved = parse_config(argv)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        (report,) = train_and_record(build_job(resolved, groups))
    return report.sums, report.grad_norm


def test_the_flags_are_a_short_form_of_teachers(tiny, weights, second, rollouts, tmp_path) -> None:
    """The same numbers as of two entries of --teachers and their weights in every row."""
    of_second = ("--teacher-hf-checkpoint", str(second), "--teacher-tokenizer-model", str(second))
    of = dict(zip(weights[::2], weights[1::2], strict=True))
    entries = {
        "one": {
            "hf_checkpoint": str(tiny / "teacher"),
            "tokenizer_model": str(tiny / "teacher.tiktoken"),
            "make_vocab_size_divisible_by": 4,
            "pretrained_checkpoint": of["--teacher-pretrained-checkpoint"],
            "endpoint": [str(tmp_path / "1")],
        },
        "two": {"hf_checkpoint": str(second), "endpoint": [str(tmp_path / "2")]},
    }
    content = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    by_row = {"teachers": {"one": 1 - WEIGHT, "two": WEIGHT}}
    path.write_text("".join(json.dumps(row | by_row) + "\n" for row in content))
    common = ("--simct-interface", "bytes", "--load-debug-rollout-data", str(rollouts))
    common += ("--train-iters", "1", "--rollout-batch-size", "4", "--clip-grad", "0")
    student = ("--pretrained-checkpoint", of["--pretrained-checkpoint"])
    with (
        TeacherJob(tiny, weights, tmp_path / "1", "--teacher-hidden-dtype", "fp32"),
        TeacherJob(tiny, (), tmp_path / "2", "--teacher-hidden-dtype", "fp32", *of_second),
    ):
        flags = _flags(weights, second, rollouts, *_endpoints(tmp_path))
        ((short, short_norm),) = run_ranks(1, _run, tiny, *flags)
        ((sums, norm),) = run_ranks(1, _run_of, routed(tiny, path, entries, *student, *common))
    for name in ("loss", "num_labels", "teacher_nll_sum", "byte_positions"):
        assert short[name] == pytest.approx(sums[name], rel=1e-6) and short[name] > 1, name
    assert short_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        (("--simct-interface", "paper"), ["--simct-interface paper", "use --simct-interface bytes"]),
        (("--second-teacher-weight", "1"), ["--second-teacher-weight 1", "between 0 and 1"]),
        (("--teacher-cache", "x"), ["--teacher-cache", "--second-teacher-endpoint"]),
        (("--second-teacher-endpoint", "a", "b"), ["--second-teacher-endpoint a b", "one directory"]),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_flag(
    tiny, weights, second, rollouts, tmp_path, change, words
) -> None:
    argv = command_line(tiny, *_flags(weights, second, rollouts, *_endpoints(tmp_path), *change))
    ((code, _, err),) = run_ranks(1, run, argv)
    assert code == 1 and err.count("\n") == 1 and all(word in err for word in words), err


def test_flags_of_a_second_teacher_need_one(tiny, second) -> None:
    ((code, _, err),) = run_ranks(1, run, command_line(tiny, "--second-teacher-hf-checkpoint", str(second)))
    assert code == 1 and "--second-teacher-endpoint is missing" in err
