"""The effect of a signal on jobs that load, that work, and that got one signal before."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_simct import job, serve_teacher, train
from megatron_simct.stopping import children_end_with_me
from megatron_simct.teacher.endpoints import read_endpoints
from megatron_simct.teacher.forward import TeacherForward
from tests.teacher_jobs import make_request, open_client
from tests.tiny import command_line

APART_S = 1.5
"""Two signals that are closer together count as one."""


def wait_in_c(*_, **__) -> None:
    """Wait in C code, for minutes. Python's own signal handlers are not called there."""
    dist.HashStore().get("what nobody sets")


class Ranks:
    """A command in forked processes with their own stderr and folder for temporary files."""

    def __init__(
        self, folder: Path, tmp: Path, main: Callable, argv: list[str], patch: Callable, world_size: int = 1
    ) -> None:
        """patch(rank, ready) is called before the command, on every rank; a rank that has reached its
        place calls ready.set().
        """
        context = multiprocessing.get_context("fork")
        self._folder, self.tmp = folder, tmp
        self._ready = [context.Event() for _ in range(world_size)]
        self._processes = [
            context.Process(target=self._run, args=(main, argv, patch, rank, world_size))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def _run(self, main: Callable, argv: list[str], patch: Callable, rank: int, world_size: int) -> None:
        os.dup2(os.open(self._folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
        tempfile.tempdir = str(self.tmp)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        store = dist.FileStore(str(self._folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        patch(rank, self._ready[rank])
        sys.exit(main(argv))

    def come(self) -> None:
        for event, process in zip(self._ready, self._processes, strict=True):
            assert event.wait(90) and process.is_alive(), "it did not come to that"

    def tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def running(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def end(self) -> list[tuple[int | None, str]]:
        """Exit codes and stderr."""
        for process in self._processes:
            process.join(60)
        return [
            (p.exitcode, (self._folder / f"{rank}.err").read_text()) for rank, p in enumerate(self._processes)
        ]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def ranks(*args, **kwargs) -> Iterator[Ranks]:
    started = Ranks(*args, **kwargs)
    try:
        yield started
    finally:
        started.kill()


@pytest.fixture
def teacher_argv(tiny, weights, tmp_path) -> list[str]:
    return [
        *("--teacher-hf-checkpoint", str(tiny / "teacher"), *weights[2:]),
        *("--teacher-tokenizer-model", str(tiny / "teacher.tiktoken")),
        *("--teacher-make-vocab-size-divisible-by", "4", "--run-dir", str(tmp_path / "run")),
    ]


def last_loads(module: object, name: str, after: str, world_size: int) -> Callable:
    """The last rank loads forever; the others have reached the next call."""

    def patch(rank, ready) -> None:
        def load(*args, **kwargs) -> None:
            loaded(*args, **kwargs)  # files of a checkpoint are read together
            ready.set()
            wait_in_c()

        def come(*args, **kwargs) -> Any:
            ready.set()
            return then(*args, **kwargs)

        loaded, then = getattr(module, name), getattr(module, after)
        if rank == world_size - 1:
            setattr(module, name, load)
        else:
            setattr(module, after, come)

    return patch


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "number, code, line",
    [
        (signal.SIGTERM, 0, " SIGTERM: the teacher exits immediately\n"),
        (signal.SIGINT, 130, "megatron_simct.serve_teacher: interrupted\n"),
    ],
)
def test_a_teacher_that_loads_ends_at_once_and_leaves_nothing(
    teacher_argv, tmp_path, short_tmp, number, code, line, world_size
) -> None:
    patch = last_loads(serve_teacher, "open_model", "TeacherForward", world_size)
    with ranks(tmp_path, short_tmp, serve_teacher.main, teacher_argv, patch, world_size) as job_:
        job_.come()
        time.sleep(0.5)  # a teacher that has loaded would open its endpoint
        job_.tell(number)
        (first, *others) = job_.end()
        assert first == (code, line) and others == [(code, "")] * (world_size - 1)
        assert not (tmp_path / "run").exists() and not list(job_.tmp.iterdir())


def never_answers(rank, ready) -> None:
    def run(*_) -> None:
        ready.set()
        wait_in_c()

    TeacherForward.run = run


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_teacher_that_finishes_what_it_holds(
    teacher_argv, tmp_path, short_tmp, number, code
) -> None:
    folder = tmp_path / "run" / "teacher"
    with ranks(tmp_path, short_tmp, serve_teacher.main, teacher_argv, never_answers) as job_:
        client = open_client(folder, fingerprints={"hidden_size": 48})
        client.meet()
        client.submit(make_request(np.random.default_rng(0), 0))
        job_.come()
        job_.tell(number)
        job_.tell(number)  # from a terminal, and from torchrun
        time.sleep(APART_S)
        assert job_.running() and read_endpoints(folder), "one alone is no reason to drop a request"
        deadline = time.monotonic() + 60
        while job_.running() and time.monotonic() < deadline:  # it may have received the first one late
            job_.tell(number)
            time.sleep(0.5)
        ((ended, _),) = job_.end()
        client.close()
        assert ended == code and not list(job_.tmp.iterdir()) and not read_endpoints(folder)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_that_loads_ends_at_once_on_the_signal_that_it_handles(
    tiny, tmp_path, short_tmp, world_size
) -> None:
    save = ("--save", str(tmp_path / "save"), "--run-dir", str(tmp_path / "run"))
    argv = command_line(tiny, "--exit-signal-handler", *save)
    patch = last_loads(job, "load_student", "build_placements", world_size)
    with ranks(tmp_path, short_tmp, train.main, argv, patch, world_size) as job_:
        job_.come()
        job_.tell(signal.SIGTERM)
        (first, *others) = job_.end()
        assert first == (0, " SIGTERM: exiting before the first step\n") and others == [(0, "")] * (
            world_size - 1
        )
        assert not (tmp_path / "save").exists()


def test_a_fork_does_not_tell_its_parent_of_its_own_signals(tmp_path, short_tmp) -> None:
    """Like the children that write a checkpoint's shards, if a scheduler signals all processes of a job."""

    def main(_: list[str]) -> int:
        from megatron_simct.stopping import EndSignals

        signals = EndSignals({signal.SIGTERM: (7, "")})
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2,))
        child.start()
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGTERM)
        child.join()
        return int(signals.received) + (0 if child.exitcode == 0 else 2)

    with ranks(tmp_path, short_tmp, main, [], lambda *_: None) as job_:
        assert job_.end() == [(0, "")]


def _fork_and_wait(pipe: int) -> None:
    with children_end_with_me():
        if os.fork() == 0:
            os.fork()  # a child's child ends too
            signal.pause()
        os.write(pipe, b"forked")
        signal.pause()


def test_what_a_rank_forks_ends_with_it() -> None:
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_fork_and_wait, args=(writing,))
    process.start()
    os.close(writing)
    assert os.read(reading, 6) == b"forked"
    process.kill()
    assert os.read(reading, 1) == b"", "the last of them has closed the pipe"
    os.close(reading)
    process.join()
