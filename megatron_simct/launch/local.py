"""Both jobs on this machine: their output side by side, one Ctrl-C for both, the exit code of the student.

The first Ctrl-C (or SIGTERM) lets the student save and exit, as --exit-signal-handler says; the teacher, which it may
still need, is stopped when it has. A second one ends both at once. A teacher that ends before the student is an error.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from megatron_simct.launch.commands import interpreter, student_command, teacher_command, torchrun
from megatron_simct.launch.run_file import RunFile

_POLL_S = 0.2
_TEACHER_STOP_S = 30.0
"""For the teacher to finish what it holds, after the student has ended."""


def commands(run: RunFile) -> dict[str, list[str]]:
    """Job -> its command, in the order in which they start."""
    python = interpreter(run)
    jobs = {}
    if run.teacher is not None:
        jobs["teacher"] = [python, *torchrun(run.cluster.teacher), "--rdzv-endpoint=localhost:0", *teacher_command(run)]
    jobs["student"] = [python, *torchrun(run.cluster.student), "--rdzv-endpoint=localhost:0", *student_command(run)]
    return jobs


def devices(run: RunFile) -> dict[str, dict[str, str]]:
    """Job -> the variable that gives it GPUs of its own: the first ones are the student's, the next the teacher's.

    A job without GPUs sees none. ValueError where CUDA_VISIBLE_DEVICES has fewer than the jobs ask for: the last job
    would run on CPUs, or on one GPU several times.
    """
    visible = run.env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    sizes = {"student": run.cluster.student.gpus_per_node}
    if run.teacher is not None:
        sizes["teacher"] = run.cluster.teacher.gpus_per_node
    wanted = sum(sizes.values())
    names = [str(i) for i in range(wanted)] if visible is None else list(filter(None, visible.split(",")))
    if len(names) < wanted:
        asked = ", ".join(f"cluster.{job}.gpus_per_node {count}" for job, count in sizes.items())
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} has {len(names)} of {wanted} GPUs ({asked})")
    given: dict[str, dict[str, str]] = {}
    for job, count in sizes.items():
        given[job] = {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}
        names = names[count:]
    return given


def dry_run(run: RunFile) -> str:
    """What would run, as lines for a shell."""
    lines = ["umask 077", f"mkdir -p -- {shlex.quote(run.run_dir)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in run.env.items()]
    gpus = devices(run)
    for job, command in commands(run).items():
        variables = [f"{name}={shlex.quote(value)}" for name, value in gpus[job].items()]
        lines.append(" ".join([*variables, shlex.join(command), *(["&"] if job == "teacher" else [])]))
    return "\n".join(lines) + "\n"


def start(run: RunFile) -> int:
    """Run both jobs to their end; the student's exit code. Output goes to stdout, with the job's name before it."""
    gpus = devices(run)
    os.umask(0o077)
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    jobs: dict[str, _Process] = {}
    try:
        for name, command in commands(run).items():
            jobs[name] = _Process(name, command, os.environ | run.env | gpus[name])
        return _watch(jobs, stop, grace_s=run.cluster.grace_s)
    finally:
        for job in jobs.values():
            job.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Stop:
    """Counts the signals that ask for an end."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _watch(jobs: Mapping[str, _Process], stop: _Stop, *, grace_s: float) -> int:
    student, teacher = jobs["student"], jobs.get("teacher")
    deadline = None
    while student.running:
        if stop.count and deadline is None:
            _say("stopping: the student saves after its step; once more ends both at once")
            student.ask_to_stop()
            deadline = time.monotonic() + grace_s
        if stop.count > 1 or (deadline is not None and (time.monotonic() > deadline or student.was_restarted)):
            student.kill()
        if teacher is not None and not teacher.running and not stop.count:
            _say(f"the teacher ended with exit code {teacher.exit_code}, and the student needs it; its output is above")
            student.ask_to_stop()
            student.wait(grace_s, stop)
            student.kill()
            return 1
        time.sleep(_POLL_S)
    if teacher is not None and teacher.running:
        teacher.ask_to_stop()
        teacher.wait(_TEACHER_STOP_S, stop)
    return student.exit_code


class _Process:
    """One torchrun in a session of its own, so that a Ctrl-C reaches the launcher alone."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._asked: set[int] = set()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_stream, args=(name, self._process.stdout), daemon=True)
        self._reader.start()

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
        """SIGTERM to the processes that torchrun has started, or to torchrun where there are none yet."""
        self._asked = self._workers()
        for pid in self._asked or {self._process.pid}:
            _signal(pid, signal.SIGTERM)

    def wait(self, timeout_s: float, stop: _Stop) -> None:
        """Until it ends, at most so long, or until one more signal asks for an end."""
        deadline, before = time.monotonic() + timeout_s, stop.count
        while self.running and time.monotonic() < deadline and stop.count == before:
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End torchrun and all that it has started; nothing where it has ended."""
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
