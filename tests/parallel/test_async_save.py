"""--async-save: a checkpoint has the state of its step, gets its name when it is complete, and a
failed one stops the run.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.train import train
from megatron_simct.update import torch_dist
from megatron_simct.update.checkpoint import TRACKER
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks
from tests.runs import assert_same_run, run
from tests.tiny import command_line, config


def arguments(files: Path, folder: Path, iterations: int, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--run-dir", str(folder / "run")),
        *("--save", str(folder / "save"), "--load", str(folder / "save"), "--save-interval", "1", *flags),
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


class _Steps:
    """Runs the loop of a job one step at a time, and lists the folder between steps."""

    def __init__(self, job, folder: Path, released: threading.Event) -> None:
        self.seen: list[list[str]] = []
        step = job.updater.step

        def watched(batches) -> StepReport:
            self.seen.append(names(folder))
            if len(self.seen) == 3:
                released.set()
            return step(batches)

        job.updater.step = watched


def _train_held_up(rank, world_size, files, folder) -> list[list[str]]:
    """Folders before each step. The last rank may write only when the third step has begun."""
    released = threading.Event()
    write = torch_dist._write_here

    def held_up(*args) -> None:
        assert rank == 0 or released.wait(60)
        write(*args)

    torch_dist._write_here = held_up
    flags = ("--async-save", "--save", str(folder), "--save-interval", "2", "--train-iters", "4")
    resolved = config(files, *flags, "--use-distributed-optimizer")
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        steps = _Steps(job, folder, released)
        train(job)
        return steps.seen


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path) -> None:
    for seen in run_ranks(2, _train_held_up, tiny, tmp_path):
        assert seen[0] == seen[1] == []
        assert len(seen[2]) == 1 and seen[2][0].startswith("iter_0000002.") and seen[2][0].endswith(".tmp")
    assert names(tmp_path) == ["iter_0000002", "iter_0000004"] and (tmp_path / TRACKER).read_text() == "4"


@pytest.mark.parametrize("flags", [(), ("--use-distributed-optimizer",)], ids=["plain", "shared"])
def test_it_ends_and_resumes_as_without_it(tiny, tmp_path, flags) -> None:
    """The saved state is that of the step: training changes the weights while they are written."""
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    for folder, iterations, more in (
        (through, 3, ()),
        (resumed, 2, ("--async-save",)),
        (resumed, 3, ("--async-save", "--save-retain", "1")),
    ):
        results = run_ranks(2, run, arguments(tiny, folder, iterations, *flags, *more))
        assert all(code == 0 for code, _, _ in results), results
    assert_same_run(resumed, through)
    assert names(resumed / "save") == ["iter_0000003"]


def _refused(rank, world_size, argv) -> tuple[int, str, str]:
    """A run whose disk refuses the files of the second rank."""

    def full(writer, rank, buckets, results) -> None:
        results.put(OSError(28, "No space left on device"))

    if rank == 1:
        torch_dist._write_here = full
    return run(rank, world_size, argv)


def test_a_disk_that_refuses_stops_all_ranks(tiny, tmp_path) -> None:
    results = run_ranks(2, _refused, arguments(tiny, tmp_path, 4, "--async-save"))
    for code, _, error in results:
        assert code == 1 and "--save" in error and "cannot be written" in error and error.count("\n") == 1, (
            error
        )
    assert "No space left on device" in results[0][2] and "see the error of another rank" in results[1][2]
    assert not (tmp_path / "save" / TRACKER).exists()
