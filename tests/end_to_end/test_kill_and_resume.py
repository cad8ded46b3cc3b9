"""A short form of kill_and_resume.sh, and real processes that get a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_simct.update.checkpoint import TRACKER
from tests.end_to_end.kill_and_resume import verify
from tests.tiny import command_line

ROOT = Path(__file__).parents[2]


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path) -> None:
    text = verify(tmp_path, kills=3, seed=3, processes=2)
    assert text.startswith("kill -9 at 3 moments (") and "28 tensors" in text


def test_ranks_of_torchrun_save_on_sigterm_and_go_on(tiny, tmp_path) -> None:
    """Real processes: the signal that a cluster's scheduler sends to a job, and the restarted job."""

    run = (
        "--run-dir",
        str(tmp_path / "run"),
        "--save",
        str(tmp_path / "save"),
        "--load",
        str(tmp_path / "save"),
    )
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_simct.train",
    )

    def start(train_iters: int) -> subprocess.Popen:
        argv = command_line(tiny, *run, "--train-iters", str(train_iters), "--exit-signal-handler")
        return subprocess.Popen([sys.executable, *launcher, *argv], env=env, cwd=ROOT, text=True, stdout=-1)

    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and "MASTER" not in k
    }
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with start(400) as first:
        assert any(line.startswith(" iteration        3/") for line in first.stdout)
        first.send_signal(signal.SIGTERM)
        rest = first.stdout.read()
    reached = int((tmp_path / "save" / TRACKER).read_text())
    assert f" SIGTERM: saving and exiting after iteration {reached}\n" in rest and 3 <= reached < 400
    with start(reached + 2) as second:
        text = second.stdout.read()
    assert (
        second.returncode == 0
        and f"after iteration {reached}; changed: train_iters 400 -> {reached + 2}\n" in text
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, reached + 3))
