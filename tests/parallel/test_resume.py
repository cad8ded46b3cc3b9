"""A resumed run ends where an undisturbed one ends, bit by bit, and says so when it cannot."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.train import build_job, load_model, main, open_tokenizer, train
from megatron_simct.update import checkpoint
from megatron_simct.update.checkpoint import RUN_FILE, TRACKER, load_weights
from tests.distributed import run_ranks
from tests.tiny import command_line, config

with megatron_imports():
    from megatron.core import dist_checkpointing


def run(rank, world_size, argv):
    """Exit code, stdout and stderr of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def trained(files: Path, folder: Path, iterations: int, *flags: str, world_size: int = 1) -> str:
    """Run to this iteration in the folder, resuming what is there; what the first rank printed."""
    results = run_ranks(world_size, run, arguments(files, folder, iterations, *flags))
    assert all(code == 0 for code, _, _ in results), results
    return results[0][1]


def arguments(files: Path, folder: Path, iterations: int, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--eval-prompt-data", str(files / "held_out.jsonl"), "--eval-interval", "2"),
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--run-dir", str(folder / "run")),
        *("--save", str(folder / "save"), "--load", str(folder / "save"), *flags),
    )


def metrics(folder: Path) -> list[dict]:
    """The rows without their timing."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def _tensors(rank, world_size, folder):
    iteration = int((folder / "save" / TRACKER).read_text())
    path = folder / "save" / f"iter_{iteration:07d}"
    state = dist_checkpointing.load_plain_tensors(str(path))
    return iteration, {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def tensors(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The newest checkpoint: its iteration, weights and optimizer state."""
    return run_ranks(1, _tensors, folder)[0]


def assert_same_run(folder: Path, reference: Path) -> None:
    assert metrics(folder) == metrics(reference)
    (iteration, ours), (expected_iteration, expected) = tensors(folder), tensors(reference)
    assert iteration == expected_iteration and ours.keys() == expected.keys() and len(expected) > 15
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """Four steps in one go on one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = trained(tiny, folder, 4)
    assert "no checkpoint there yet, starting afresh" in text
    return folder


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, undisturbed, tmp_path, optimizer):
    if optimizer == "sgd":
        undisturbed = tmp_path / "undisturbed"
        trained(tiny, undisturbed, 4, "--optimizer", "sgd")
    folder = tmp_path / "resumed"
    trained(tiny, folder, 1, "--optimizer", optimizer, "--eval-interval", "9")
    text = trained(tiny, folder, 4, "--optimizer", optimizer)
    assert "after iteration 1" in text and "train_iters 1 -> 4" in text
    assert_same_run(folder, undisturbed)
