"""The quick start runs from one end to the other, two steps a stage: real torchrun, two ranks, real tokenizers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import run as quickstart
from megatron_simct.arguments import parse_config
from tools import evaluate, select_responses

ROOT = Path(__file__).resolve().parents[2]
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: pip install --no-deps -r examples/quickstart/requirements.txt",
)


@needs_tokenizers
def test_quickstart_smoke(tmp_path):
    command = [sys.executable, "examples/quickstart/run.py", "--smoke", "--run-dir", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {
        "teacher_accuracy",
        "student_accuracy_before",
        "student_accuracy_after",
        "student_sampled_before",
        "student_sampled_after",
        "interface",
        "seed",
        "seconds",
    } <= summary.keys()
    assert summary["interface"] == "paper" and summary["seconds"] > 0
    assert "student after" in first.stdout
    assert "<svg" in (tmp_path / "report.html").read_text() and (tmp_path / "curves.png").stat().st_size > 10_000

    rows = [json.loads(line) for line in (tmp_path / "distil-paper" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["iteration"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rollout_logprob_gap"] < 1e-4
        covered = row["coverage_one_to_one"] + row["coverage_unit"]
        dropped = sum(value for name, value in row.items() if name.startswith("dropped_"))
        assert abs(covered + dropped - 1) < 1e-6


@needs_tokenizers
def test_a_warm_up_on_the_teachers_answers_is_a_chain_of_commands_that_the_tools_accept(tmp_path):
    options = quickstart.parse(["--warm-up", "teacher", "--processes", "1", "--run-dir", str(tmp_path)])
    recipe = quickstart.Recipe(options, tmp_path)
    distil = recipe.distil("bytes", "distil")
    chain = [*recipe.warm_start, distil, recipe.evaluate(distil)]
    assert [stage.name for stage in chain] == [
        *("teacher", "sample", "select", "warm-up of the student", "distil with bytes", "evaluate")
    ]
    teacher, sample, select, student, distil, evaluation = chain
    for stage in (teacher, student, distil):
        assert parse_config(list(stage.command[3:])).output.load == str(stage.output / "checkpoint")
    asked, measured = (evaluate._parser().parse_args(list(stage.command[2:])) for stage in (sample, evaluation))
    selected = select_responses._parser().parse_args(list(select.command[2:]))
    # What a stage leaves is what the next one reads.
    assert asked.pretrained_checkpoint == str(teacher.output / "checkpoint")
    assert (str(selected.responses), selected.data) == (asked.output_dir, asked.data)
    assert parse_config(list(student.command[3:])).data.prompt_data == str(selected.output) == str(select.output)
    assert parse_config(list(distil.command[3:])).model.pretrained_checkpoint == str(student.output / "checkpoint")
    assert measured.pretrained_checkpoint == str(distil.output / "checkpoint")
    assert measured.data == str(tmp_path / "held_out.jsonl") != asked.data
    for before, after in zip(chain, chain[1:], strict=False):
        assert before in after.needs
    assert all(stage.resumes for stage in chain if stage is not select)
