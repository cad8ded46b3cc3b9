"""Whole runs of the command in forked processes, and comparisons of two runs."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch

from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.train import main
from megatron_simct.update.checkpoint import TRACKER
from tests.distributed import run_ranks

with megatron_imports():
    from megatron.core import dist_checkpointing


def run(rank: int, world_size: int, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def metrics(folder: Path) -> list[dict]:
    """The rows of FOLDER/run/metrics.jsonl without time and memory."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]


def tensors(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The newest checkpoint of FOLDER/save: its iteration, and all weights, optimizer and
    random state by name.
    """
    return run_ranks(1, _tensors, folder)[0]


def _tensors(rank: int, world_size: int, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    iteration = int((folder / "save" / TRACKER).read_text())
    state = dist_checkpointing.load_plain_tensors(str(folder / "save" / f"iter_{iteration:07d}"))
    return iteration, {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same_run(folder: Path, reference: Path) -> int:
    """Asserts that metrics, last iteration, weights, optimizer and random state are equal bit by bit. Returns
    the number of tensors.
    """
    assert metrics(folder) == metrics(reference)
    (iteration, ours), (expected_iteration, expected) = tensors(folder), tensors(reference)
    assert iteration == expected_iteration and ours.keys() == expected.keys() and len(expected) > 15
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    return len(expected)
