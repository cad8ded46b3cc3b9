"""The quick start runs from one end to the other, two steps a stage: real torchrun, two ranks, real tokenizers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: pip install --no-deps -r examples/quickstart/requirements.txt",
)
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

    rows = [json.loads(line) for line in (tmp_path / "distil-paper" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["iteration"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rollout_logprob_gap"] < 1e-4
        covered = row["coverage_one_to_one"] + row["coverage_unit"]
        dropped = sum(value for name, value in row.items() if name.startswith("dropped_"))
        assert abs(covered + dropped - 1) < 1e-6
