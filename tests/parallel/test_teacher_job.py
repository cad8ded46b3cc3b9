"""A teacher in another job scores as the colocated one does, whatever the layouts of the two jobs."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.serve_teacher import main as serve_main
from megatron_simct.teacher.endpoints import endpoint_folder, read_endpoints
from megatron_simct.train import train
from tests.distributed import run_ranks
from tests.tiny import config

INTERFACES = ("paper", "code", "strict", "alm", "bytes")
TEACHERS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2 x pp2": (2, 2)}
STUDENTS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


def layout(tp: int, pp: int) -> tuple[str, ...]:
    return ("--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp))


class Teacher:
    """A teacher's job in forked processes: entered when its door is open, left by SIGTERM."""

    def __init__(self, tiny: Path, weights: tuple[str, ...], run_dir: Path, *flags: str, world_size: int = 1) -> None:
        argv = [
            *("--teacher-hf-checkpoint", str(tiny / "teacher"), *weights[2:]),
            *("--teacher-tokenizer-model", str(tiny / "teacher.tiktoken")),
            *("--teacher-make-vocab-size-divisible-by", "4", "--run-dir", str(run_dir), *flags),
        ]
        self.folder = endpoint_folder(str(run_dir))
        self._known = set(read_endpoints(self.folder))
        self._process = multiprocessing.get_context("fork").Process(target=_job, args=(world_size, argv))

    def __enter__(self) -> Teacher:
        self._process.start()
        deadline = time.monotonic() + 60
        while not set(read_endpoints(self.folder)) - self._known:
            assert self._process.is_alive() and time.monotonic() < deadline, "the teacher did not start"
            time.sleep(0.05)
        (self.name,) = set(read_endpoints(self.folder)) - self._known
        self.pid = read_endpoints(self.folder)[self.name].pid
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGTERM)
        self._process.join(60)
        assert self._process.exitcode == 0


def _job(world_size: int, argv: list[str]) -> None:
    assert run_ranks(world_size, _serve, argv, timeout_s=300) == [0] * world_size


def _serve(rank: int, world_size: int, argv: list[str]) -> int:
    return serve_main(argv)


def _run(rank, world_size, folder, *flags):
    """Loss sums and gradient norm of each step, as this rank saw them, and some of the trained weights."""
    resolved = config(folder, *flags)
    reports = []
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        step = job.updater.step

        def recording_step(batches):
            reports.append(step(batches))
            return reports[-1]

        job.updater.step = recording_step
        train(job)
    return [(r.sums, r.grad_norm) for r in reports]


@pytest.fixture(scope="module")
def colocated(tiny, weights, tmp_path_factory):
    """One process, both models: its rollouts and what it trained, by interface."""
    rollouts = tmp_path_factory.mktemp("rollouts")
    return rollouts, {
        interface: run_ranks(
            1,
            _run,
            tiny,
            *(*weights, "--simct-interface", interface, "--save-debug-rollout-data", str(rollouts / interface)),
        )[0]
        for interface in INTERFACES
    }


def assert_same(results, reference, *, tolerance: float):
    assert len(reference) == 2
    for steps in results:
        for (sums, grad_norm), (wanted, wanted_norm) in zip(steps, reference, strict=True):
            assert sums.keys() == wanted.keys()
            assert wanted["loss"] > 0.1 and wanted_norm > 0.01
            for name, value in wanted.items():
                assert math.isclose(sums[name], value, rel_tol=tolerance, abs_tol=10 * tolerance), name
            assert math.isclose(grad_norm, wanted_norm, rel_tol=tolerance)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_layout_of_both_jobs_and_every_interface(tiny, weights, colocated, tmp_path, teacher):
    rollouts, expected = colocated
    tp, pp = TEACHERS[teacher]
    flags = (*layout(tp, pp), "--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "128")
    with Teacher(tiny, weights, tmp_path, *flags, world_size=tp * pp):
        for student, (student_tp, student_pp) in STUDENTS.items():
            for interface in INTERFACES if student == "tp2" or teacher == "one" else ("paper", "bytes"):
                results = run_ranks(
                    student_tp * student_pp,
                    _run,
                    tiny,
                    *weights,
                    *("--simct-interface", interface, *layout(student_tp, student_pp)),
                    *("--load-debug-rollout-data", str(rollouts / interface), "--teacher-endpoint", str(tmp_path)),
                )
                assert_same(results, expected[interface], tolerance=1e-5)
