"""All jobs on this machine: their output side by side, one Ctrl-C for all, the exit code of the student.

Engines start first, then teachers, then the student. The first Ctrl-C (or SIGTERM) lets the student save and
exit, as --exit-signal-handler says; teachers and engines, which it may still need, are stopped when it has. A
second one ends all at once. A job that ends before the student is an error, but for an engine that may start
again (max_restarts). Where the launcher itself is killed, its jobs end too (guard.py), and the same command
goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from megatron_simct.config.run_file import Job, RunFile
from megatron_simct.launch.commands import command_of, torchrun
from megatron_simct.launch.guard import Guard

_POLL_S = 0.2
_OTHERS_STOP_S = 30.0
"""For a teacher or an engine to finish what it holds, after the student has ended."""
_ORDER = ("engine", "teacher", "student")
"""Kinds of jobs, in the order in which they start."""


def in_order(run: RunFile) -> list[Job]:
    """The jobs in the order in which they start."""
    return sorted(run.jobs, key=lambda job: _ORDER.index(job.kind))


def commands(run: RunFile) -> dict[str, list[str]]:
    """Job -> its command, in the order in which they start."""
    return {job.name: _command(run, job) for job in in_order(run)}


def _command(run: RunFile, job: Job) -> list[str]:
    python = run.python_of(job)
    if job.kind == "engine":
        return [python, *command_of(job)]
    return [python, *torchrun(job), "--rdzv-endpoint=localhost:0", *command_of(job)]


def devices(run: RunFile) -> dict[str, dict[str, str]]:
    """Job -> the variable that gives it GPUs of its own: the first ones are the student's, the next those of
    the other jobs in the order of the file.

    A job without GPUs sees none. ValueError where CUDA_VISIBLE_DEVICES has fewer than the jobs ask for: the
    last job would run on CPUs, or on one GPU several times.
    """
    visible = run.env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    wanted = sum(job.gpus_per_node for job in run.jobs)
    names = [str(i) for i in range(wanted)] if visible is None else list(filter(None, visible.split(",")))
    if len(names) < wanted:
        asked = ", ".join(f"{run.where(job)}.gpus_per_node {job.gpus_per_node}" for job in run.jobs)
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} has {len(names)} of {wanted} GPUs ({asked})")
    given: dict[str, dict[str, str]] = {}
    for job in run.jobs:
        given[job.name] = {"CUDA_VISIBLE_DEVICES": ",".join(names[: job.gpus_per_node])}
        names = names[job.gpus_per_node :]
    return given


def dry_run(run: RunFile) -> str:
    """What would run, as lines for a shell."""
    lines = ["umask 077", f"mkdir -p -- {shlex.quote(run.run_dir)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in run.env.items()]
    gpus = devices(run)
    for job in in_order(run):
        variables = [f"{name}={shlex.quote(value)}" for name, value in (gpus[job.name] | job.env).items()]
        lines.append(
            " ".join([*variables, shlex.join(_command(run, job)), *(["&"] if job.kind != "student" else [])])
        )
    return "\n".join(lines) + "\n"


def start(run: RunFile) -> int:
    """Run all jobs to their end; the student's exit code.

    Output goes to stdout, with the job's name before it.
    """
    gpus = devices(run)
    os.umask(0o077)
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    processes: list[_Process] = []
    guard = Guard()
    try:
        all_commands = commands(run)
        for job in in_order(run):
            env = os.environ | run.env | gpus[job.name] | job.env
            processes.append(_Process(job, all_commands[job.name], env, guard))
        return _watch(processes[-1], processes[:-1], stop, grace_s=run.cluster.grace_s)
    finally:
        for process in processes:
            process.kill()
        guard.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Stop:
    """Counts the signals that ask to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _watch(student: _Process, others: Sequence[_Process], stop: _Stop, *, grace_s: float) -> int:
    deadline = None
    while student.running:
        if stop.count and deadline is None:
            _say(
                "stopping: the student finishes its step and saves; press Ctrl-C again to end all jobs at "
                "once"
            )
            student.ask_to_stop()
            deadline = time.monotonic() + grace_s
        if stop.count > 1 or (
            deadline is not None and (time.monotonic() > deadline or student.was_restarted)
        ):
            student.kill()
        for other in others:
            if other.running or stop.count:
                continue
            if other.may_restart:
                _say(f"the job {other.name} ended with exit code {other.exit_code}; starting it again")
                other.restart()
                continue
            needed = f"the job {other.name} ended with exit code {other.exit_code}; the student needs it"
            _say(f"{needed}; its output is above")
            student.ask_to_stop()
            student.wait(grace_s, stop)
            student.kill()
            return 1
        time.sleep(_POLL_S)
    for other in reversed(others):  # teachers before the engines that they ask
        if other.running:
            other.ask_to_stop()
            other.wait(_OTHERS_STOP_S, stop)
    return student.exit_code


class _Process:
    """One job in its own session, so that Ctrl-C reaches only the launcher."""

    def __init__(self, job: Job, command: list[str], env: Mapping[str, str], guard: Guard) -> None:
        self.name, self._guard = job.name, guard
        self._is_engine = job.kind == "engine"
        self._restarts_left = job.max_restarts if self._is_engine else 0  # torchrun counts its own
        self._command, self._env = command, dict(env)
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._env,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._guard.watch(self._process.pid)
        self._asked: set[int] = set()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_stream, args=(self.name, self._process.stdout), daemon=True)
        self._reader.start()

    @property
    def may_restart(self) -> bool:
        """Whether it is an engine that has starts left."""
        return self._restarts_left > 0

    def restart(self) -> None:
        """Start it once more, after what is left of it has gone."""
        self._restarts_left -= 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: processes that it has started live on
        self._start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 and the signal for a process that a signal has ended."""
        code = self._process.wait()
        self._reader.join(timeout=5)
        return 128 - code if code < 0 else code

    @property
    def was_restarted(self) -> bool:
        """Whether processes that were asked to stop died of it, and torchrun has started others."""
        workers = self._workers()  # once: between two looks they may end as they were asked to
        return bool(self._asked) and bool(workers) and not self._asked & workers

    def ask_to_stop(self) -> None:
        """SIGTERM to the processes that torchrun has started, or to torchrun where there are none yet; to an
        engine itself."""
        self._asked = set() if self._is_engine else self._workers()
        for pid in self._asked or {self._process.pid}:
            _signal(pid, signal.SIGTERM)

    def wait(self, timeout_s: float, stop: _Stop) -> None:
        """Until it ends, at most so long, or until one more signal asks for an end."""
        deadline, before = time.monotonic() + timeout_s, stop.count
        while self.running and time.monotonic() < deadline and stop.count == before:
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End it and all that it has started; nothing where it has ended."""
        if self.running:
            pids = {child.pid for child in psutil.Process(self._process.pid).children(recursive=True)}
            for pid in (self._process.pid, *pids):
                _signal(pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=5)

    def _workers(self) -> set[int]:
        try:
            return {child.pid for child in psutil.Process(self._process.pid).children()}
        except psutil.Error:
            return set()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _stream(name: str, lines: TextIO) -> None:
    with lines:
        for line in lines:
            sys.stdout.write(f"[{name}] {line}")
            sys.stdout.flush()


def _say(message: str) -> None:
    print(f"[launch] {message}", file=sys.stderr, flush=True)
