"""The whole example with real weights, shortened. It downloads, so it runs only on request."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmark.real_inputs import Unavailable

ROOT = Path(__file__).resolve().parents[2]
WANTED = "MEGATRON_SIMCT_REAL_WEIGHTS"
"""1: run it in a temporary folder. Another value: a folder to run it in, in which
finished stages are kept.
"""


@pytest.mark.skipif(
    not os.environ.get(WANTED), reason=f"downloads 330 MB: {WANTED} is not set to 1 or to a folder"
)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="gguf or accelerate is not installed: pip install -r examples/real_weights/requirements.txt",
)
def test_two_steps_with_real_weights(tmp_path, monkeypatch) -> None:
    folder = tmp_path if os.environ[WANTED] == "1" else Path(os.environ[WANTED]).resolve()
    monkeypatch.syspath_prepend(ROOT / "examples" / "real_weights")
    models = importlib.import_module("models")
    try:
        for model in models.MODELS.values():
            models.gguf_file(model, folder / "gguf")
    except Unavailable as error:
        pytest.skip(str(error))
    command = [sys.executable, "examples/real_weights/run.py", "--run-dir", str(folder), "--processes", "1"]
    command += ["--train-iters", "2", "--batch-size", "2", "--response-len", "16", "--held-out", "2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    summary = json.loads((folder / "gemma3-to-smollm2" / "summary.json").read_text())
    assert summary["num_shared"] == 46145 and summary["train_iters"] == 2
    # Real models, read correctly: far from the 5.5 nats of a uniform byte.
    assert (
        0.3 < summary["teacher_nats_per_byte"] < 1.2 and 0.3 < summary["student_nats_per_byte_before"] < 1.2
    )
    assert summary["exported_loss"] != 0 and len(summary["continuations"]) == 2
    rows = [
        json.loads(line)
        for line in (folder / "gemma3-to-smollm2" / "distil" / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row["rollout_logprob_gap"] < 1e-4
        assert row["coverage_one_to_one"] + row["coverage_unit"] == pytest.approx(1, abs=1e-6)
