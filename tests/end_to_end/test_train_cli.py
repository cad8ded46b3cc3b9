"""The command as a user starts it: real processes, their exit codes, their output and their files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_simct.alignment import build_alignment_map, load_tokenizer
from megatron_simct.alignment.map_files import save_map
from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config
from megatron_simct.reporting.monitor import METRICS
from megatron_simct.train import main
from tests.distributed import run_ranks
from tests.tiny import command_line, config

ROOT = Path(__file__).parents[2]
LAUNCH = "megatron_simct.launch"
TRACKER = "latest_checkpointed_iteration.txt"


def start(*command: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, without a job's environment."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in torchrun and "SLURM" not in name}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=180, env=env, cwd=ROOT
    )


def assert_two_steps(result: subprocess.CompletedProcess, run_dir: Path) -> list[dict]:
    """Exit code 0, two log lines between two evaluations, and the same in metrics.jsonl; its lines."""
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "rror" not in result.stderr
    lines = _said(result.stdout)
    assert [
        re.match(r" (evaluation at iteration [02]|iteration +[12]/ +2) \| ", line) is not None
        for line in lines
    ] == [True] * 4, result.stdout
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["iteration"]) for line in metrics] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
    ]
    for line in metrics[1:3]:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["rollout_logprob_gap"] < 1e-4
        assert 0 < line["coverage_one_to_one"] + line["coverage_unit"] <= 1
    for line in (metrics[0], metrics[3]):
        for name in ("greedy", "sampled"):
            right = line[f"{name}_right"]
            assert set(right) <= {0, 1} and line[f"{name}_accuracy"] == sum(right) / len(right)
    return metrics


@pytest.fixture(scope="module")
def first_run(tiny, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    """One process without a launcher."""
    folder = tmp_path_factory.mktemp("first_run")
    argv = command_line(tiny, "--eval-prompt-data", str(tiny / "held_out.jsonl"))
    argv += ["--run-dir", str(folder / "run"), "--save", str(folder / "save")]
    return folder, argv, start("-m", "megatron_simct.train", *argv)


def test_one_process_trains_and_leaves_metrics_config_and_checkpoint(first_run) -> None:
    folder, argv, result = first_run
    rows = assert_two_steps(result, folder / "run")
    assert {name for row in rows for name in row} - {"kind", "iteration"} <= METRICS.keys()
    assert parse_config(["--config-file", str(folder / "run" / "config.yaml")]) == parse_config(argv)
    assert (folder / "save" / TRACKER).read_text() == "2"
    assert (folder / "save" / "iter_0000002" / "metadata.json").exists()
    assert sorted(path.name for path in (folder / "save").iterdir()) == ["iter_0000002", TRACKER]


def test_torchrun_goes_on_from_its_checkpoint_and_its_config_on_two_ranks(first_run, tmp_path) -> None:
    folder, _, _ = first_run
    result = start(
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "megatron_simct.train",
        ),
        *("--config-file", str(folder / "run" / "config.yaml"), "--tensor-model-parallel-size", "2"),
        *("--pretrained-checkpoint", str(folder / "save"), "--run-dir", str(tmp_path / "run")),
        *("--save", str(tmp_path / "save"), "--save-interval", "1"),
    )
    assert_two_steps(result, tmp_path / "run")
    assert (tmp_path / "save" / TRACKER).read_text() == "2"
    assert (tmp_path / "save" / "iter_0000001").is_dir()
    written: Config = parse_config(["--config-file", str(tmp_path / "run" / "config.yaml")])
    assert written.parallel.tensor_model_parallel_size == 2
    original: Config = parse_config(["--config-file", str(folder / "run" / "config.yaml")])
    assert (
        replace(written, parallel=original.parallel, model=original.model, output=original.output) == original
    )


def test_a_missing_file_is_one_line_and_exit_code_1(tiny) -> None:
    result = start("-m", "megatron_simct.train", *command_line(tiny, "--prompt-data", "/nowhere/train.jsonl"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "megatron_simct.train: error: --prompt-data /nowhere/train.jsonl: No such file or directory\n"
    )


# The same entry point in forked processes: an import of torch and megatron-core costs seconds.


def _main(rank, world_size, argv) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _said(out: str) -> list[str]:
    """The lines of a run, without those that name the initial weights."""
    return [
        line
        for line in out.splitlines()
        if not line.startswith((" random weights", " interface ", " --pretrained-checkpoint "))
    ]


@pytest.mark.parametrize(
    "more, code, words",
    [
        (["--hf-checkpoint", "/nowhere"], 1, ["--hf-checkpoint /nowhere", "config.json", "No such file"]),
        (["--teacher-hf-checkpoint", "/nowhere"], 1, ["--teacher-hf-checkpoint /nowhere", "config.json"]),
        (["--tokenizer-model", "/nowhere/a.model"], 1, ["--tokenizer-model: ", "/nowhere/a.model"]),
        (
            ["--teacher-tokenizer-model", "x.bin"],
            1,
            ["--teacher-tokenizer-model: ", "x.bin", "does not exist"],
        ),
        (["--stop-token-ids", "999"], 1, ["--tokenizer-model: ", "[999]", "360"]),
        (["--pretrained-checkpoint", "/nowhere"], 1, ["--pretrained-checkpoint /nowhere", TRACKER]),
        (["--teacher-pretrained-checkpoint", "/nowhere"], 1, ["--teacher-pretrained-checkpoint /nowhere"]),
        (["--eval-prompt-data", "/nowhere/x"], 1, ["--eval-prompt-data /nowhere/x", "No such file"]),
        (["--eval-benchmark", "gsm8k"], 1, ["--eval-prompt-data ", "line 1 is not a row of gsm8k"]),
        (
            ["--tensor-model-parallel-size", "2"],
            1,
            ["world size (1)", "--tensor-model-parallel-size (2)", "start 2"],
        ),
        (
            ["--pipeline-model-parallel-size", "2"],
            1,
            ["world size (1)", "--pipeline-model-parallel-size (2)"],
        ),
        (["--context-parallel-size", "2"], 1, ["world size (1)", "--context-parallel-size (2)"]),
        (
            ["--expert-model-parallel-size", "2"],
            1,
            ["--expert-model-parallel-size 2", "data-parallel size (1: "],
        ),
        (["--sequence-parallel"], 1, ["--sequence-parallel", "--tensor-model-parallel-size is 1"]),
        (["--micro-batch-size", "3"], 1, ["global batch size (8)", "--micro-batch-size (3)", "6 or 9"]),
        (["--global-batch-size", "4"], 1, ["--global-batch-size 4", "--rollout-batch-size (8)"]),
        (["--simct-temperature", "0"], 1, ["--simct-temperature", "0"]),
        (["--simct-divergence", "js", "--simct-js-beta", "0"], 1, ["--simct-js-beta", "0"]),
        (
            ["--rollout-max-prompt-len", "1"],
            1,
            ["--prompt-data", "all 48 prompts", "--rollout-max-prompt-len 1"],
        ),
        (["--micro-batch-sise", "2"], 2, ["--micro-batch-sise", "did you mean --micro-batch-size?"]),
        (["--num-layers", "2"], 2, ["--num-layers", "Megatron-LM"]),
        (["--config-file", "/nowhere.yaml"], 2, ["--config-file /nowhere.yaml"]),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_wrong_input_is_one_line_that_names_the_flag(tiny, more, code, words) -> None:
    """It is also found before anything else runs, so the first evaluation prints nothing."""
    argv = command_line(tiny, "--eval-prompt-data", str(tiny / "held_out.jsonl"), *more)
    ((found, out, err),) = run_ranks(1, _main, argv)
    assert found == code and _said(out) == []
    prefix = "megatron_simct.train: error: " if code == 1 else "python -m megatron_simct.train: error: "
    assert err.startswith(prefix) and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err


def test_wrong_content_of_the_files_is_one_line_too(tiny, tmp_path) -> None:
    unlabelled = write_rows(tmp_path / "held_out.jsonl", {"prompt": "a", "label": "b"}, {"prompt": "a"})
    small = tmp_path / "small"
    small.mkdir()
    fields = json.loads((tiny / "student" / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(fields | {"vocab_size": 300}))
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(
        json.dumps(fields | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8})
    )
    for world_size, more, words in (
        (1, ["--load-debug-rollout-data", str(small)], ["--load-debug-rollout-data", "rollout_0.*.json"]),
        (1, ["--eval-prompt-data", unlabelled], ["--eval-prompt-data", "line 2", "no label"]),
        (
            1,
            ["--simct-interface", "sft", "--prompt-data", unlabelled],
            ["--prompt-data", "line 1", "no response"],
        ),
        (1, ["--hf-checkpoint", str(small)], ["--hf-checkpoint", "360 ids", "vocab_size 300"]),
        (2, ["--hf-checkpoint", str(odd)], ["--tensor-model-parallel-size 2", "num_query_groups (3)"]),
    ):
        argv = command_line(tiny, *more, "--tensor-model-parallel-size", str(world_size))
        for rank, (code, out, err) in enumerate(run_ranks(world_size, _main, argv)):
            place = f" on rank {rank}" if world_size > 1 else ""
            assert code == 1 and _said(out) == []
            assert err.startswith(f"megatron_simct.train: error{place}: ") and err.count("\n") == 1
            for word in words:
                assert word in err


def test_prompts_that_are_left_out_are_counted(tiny, tmp_path) -> None:
    rows = [{"prompt": "Tom has 1 apples."}] * 7 + [{"prompt": "Tom has 1 apples. " * 20}]
    held_out = [row | {"label": "Tom has 1 apples."} for row in rows[4:]]
    argv = command_line(
        tiny, "--prompt-data", write_rows(tmp_path / "train.jsonl", *rows), "--rollout-max-prompt-len", "64"
    )
    argv += ["--eval-prompt-data", write_rows(tmp_path / "held_out.jsonl", *held_out)]
    results = run_ranks(2, _main, [*argv, "--train-iters", "1"])
    assert [code for code, _, _ in results] == [0, 0]
    for left_out in ("1 of 8 prompts", "1 of 4 held-out prompts"):
        assert f" {left_out} exceed --rollout-max-prompt-len 64 and are left out\n" in results[0][1]
    assert results[1][1] == "", "only the first rank prints"


def test_a_given_alignment_map_is_the_one_that_is_used(tiny, tmp_path) -> None:
    """A map of the same tokenizers with half of the pairs compares fewer tokens. A map of other
    tokenizers is refused.
    """
    student = load_tokenizer(str(tiny / "student.model"))
    teacher = load_tokenizer(str(tiny / "teacher.tiktoken"))
    whole = build_alignment_map(student, teacher)
    kept = slice(None, None, 2)
    half = replace(whole, student_ids=whole.student_ids[kept], teacher_ids=whole.teacher_ids[kept])
    for name, of, sides in (
        ("whole", whole, (student, teacher)),
        ("half", half, (student, teacher)),
        ("swapped", build_alignment_map(teacher, student), (teacher, student)),
    ):
        save_map(tmp_path / name, of, student=sides[0].table, teacher=sides[1].table)
    flags = {name: ["--simct-alignment-map", str(tmp_path / name)] for name in ("whole", "half", "swapped")}
    step = {}
    for name, more in {"built": [], "whole": flags["whole"], "half": flags["half"]}.items():
        argv = command_line(tiny, *more, "--train-iters", "1", "--run-dir", str(tmp_path / f"run-{name}"))
        ((code, _, err),) = run_ranks(1, _main, argv)
        assert code == 0, err
        line = json.loads((tmp_path / f"run-{name}" / "metrics.jsonl").read_text())
        step[name] = {key: line[key] for key in ("loss", "grad_norm", "coverage_one_to_one")}
    assert step["whole"] == step["built"]
    assert step["half"]["coverage_one_to_one"] < step["whole"]["coverage_one_to_one"]
    ((code, out, err),) = run_ranks(1, _main, command_line(tiny, *flags["swapped"]))
    assert code == 1 and _said(out) == [] and err.count("\n") == 1
    assert (
        err.startswith("megatron_simct.train: error: --simct-alignment-map: ") and "roles are swapped" in err
    )


def test_a_run_stops_at_the_wanted_accuracy(tiny, tmp_path) -> None:
    argv = command_line(tiny, "--eval-prompt-data", str(tiny / "held_out.jsonl"), "--exit-eval-accuracy", "0")
    ((code, out, _),) = run_ranks(1, _main, [*argv, "--save", str(tmp_path / "save")])
    assert code == 0
    random, interface, evaluation = out.splitlines()
    assert (
        random
        == f" random weights: --hf-checkpoint {tiny / 'student'}, --teacher-hf-checkpoint {tiny / 'teacher'}"
    )
    assert interface.startswith(" interface paper; known failure: ")
    assert evaluation.startswith(" evaluation at iteration 0 | ")
    assert (tmp_path / "save" / TRACKER).read_text() == "0"


def test_the_printed_configuration_is_that_of_the_command_line(tiny) -> None:
    ((code, out, err),) = run_ranks(1, _main, [*command_line(tiny), "--print-config"])
    assert code == 0 and err == ""
    (tiny / "printed.yaml").write_text(out)
    assert (
        parse_config(["--config-file", str(tiny / "printed.yaml")])
        == parse_config(command_line(tiny))
        == config(tiny)
    )


def test_two_launchers_on_one_host_where_the_usual_port_is_taken(tiny, tmp_path) -> None:
    """29500 is the default port of torchrun and of PyTorch's examples: another job may use it."""
    values = {
        "hf_checkpoint": str(tiny / "student"),
        "tokenizer_model": str(tiny / "student.model"),
        "prompt_data": str(tiny / "train.jsonl"),
        "teacher_hf_checkpoint": str(tiny / "teacher"),
        "teacher_tokenizer_model": str(tiny / "teacher.tiktoken"),
        "rollout_max_response_len": 8,
        "rollout_max_prompt_len": 64,
        "rollout_batch_size": 4,
        "micro_batch_size": 2,
        "train_iters": 1,
        "lr": 1e-3,
    }
    with contextlib.ExitStack() as stack:
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            held = stack.enter_context(socket.socket(family))
            if family == socket.AF_INET6:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with contextlib.suppress(OSError):  # another process uses it, or the machine has no IPv6
                held.bind((address, 29500))
                held.listen()
        launchers = []
        for number in range(2):
            run = {"run_dir": str(tmp_path / str(number)), "student": values}
            run["cluster"] = {"kind": "local", "student": {"processes_per_node": 2}}
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(run))
            launchers.append(
                stack.enter_context(ThreadPoolExecutor(1)).submit(start, "-m", LAUNCH, str(path))
            )
        for number, launcher in enumerate(launchers):
            done = launcher.result()
            assert done.returncode == 0, done.stdout + done.stderr
            assert len((tmp_path / str(number) / "student" / "metrics.jsonl").read_text().splitlines()) == 1
