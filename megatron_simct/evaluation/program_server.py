"""A warm interpreter from which every program is forked, with two processes for each. sandbox.py starts it.

It waits on a socket for connections, one for each program. For each it forks a supervisor. The
supervisor forks the program's process before it reads the job, so the program's process never holds
anything but its own source.

    grader  --- job, outcome --->  supervisor  --- source, calls, values: plain data (plain.py) --->  program

The supervisor of a job with checks confines itself in the same way as the program, and runs the checks.
They see the program's functions as Remote. A message that is not plain data ends the job as an error.
The program can write to its pipes, and is killed when its supervisor ends. This process ends when the
grader closes the socket.

Jobs and outcomes are JSON. The length of each message is sent before it.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import gc
import importlib
import json
import linecache
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any, NoReturn

from megatron_simct.evaluation import confined
from megatron_simct.evaluation.plain import Peer

_OFTEN_IMPORTED = (
    "bisect copy datetime decimal enum fractions functools hashlib heapq inspect io itertools math numbers "
    "operator queue random re statistics string textwrap threading traceback typing zoneinfo"
).split()
"""Modules that most programs import. They are loaded once, so that programs need not wait for them."""
STARTED = b"+"
"""The first byte of an answer: both processes run."""
LENGTH = struct.Struct(">Q")
_LONGEST_MIB = 256
"""The longest message of a program."""
_PROGRAM, _CHECKS = "program.py", "checks.py"
_SLACK_S = 5.0
"""Checks that do not end by themselves are killed this long after their time limit."""


def main() -> None:
    """Serve, in the first process. In the processes that are forked from it, supervise
    a program or run it.
    """
    for name in _OFTEN_IMPORTED:
        importlib.import_module(name)
    control = socket.socket(fileno=int(sys.argv[1]))
    confined.seclude()
    confined.adopt_orphans()
    ruleset = confined.landlock_ruleset()
    print(json.dumps({"landlock": confined.landlock_version()}), flush=True)
    os.dup2(2, 1)
    sys.argv = [_PROGRAM]
    gc.freeze()  # otherwise each process would copy the pages of all objects when it collects
    connection = _next_connection(control)
    pipes = _Pipes.open()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # for sigtimedwait
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        confined.die_with(supervisor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _be_program(pipes, ruleset)
    else:
        pipes.close_programs()
        _Supervisor(connection, pipes, ruleset, pid).run()


def _next_connection(control: socket.socket) -> int:
    """Fork a process for each connection. Returns in the forked process, with the connection's descriptor."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children are not waited for
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            os._exit(0)
        with suppress(OSError):  # no more processes: the grader sees that the connection is closed
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                os.setsid()
                return descriptors[0]
        os.close(descriptors[0])


@dataclass(frozen=True, slots=True)
class _Pipes:
    """Between a supervisor and its program: (end to read, end to write)."""

    input: int
    """The program's standard input, a file in memory."""
    output: tuple[int, int]
    """The program's standard output."""
    calls: tuple[int, int]
    """To the program."""
    values: tuple[int, int]
    """From the program."""

    @classmethod
    def open(cls) -> _Pipes:
        memory = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return cls(memory, os.pipe(), os.pipe(), os.pipe())

    def close_programs(self) -> None:
        """Close the ends that only the program needs."""
        for descriptor in (self.output[1], self.calls[0], self.values[1]):
            os.close(descriptor)


def _send(descriptor: int, message: bytes) -> None:
    data = memoryview(LENGTH.pack(len(message)) + message)
    while data:
        data = data[os.write(descriptor, data) :]


def _received(descriptor: int) -> bytes:
    """The next message. Raises EOFError if there is none."""
    (length,) = LENGTH.unpack(_exactly(descriptor, LENGTH.size))
    return _exactly(descriptor, length)


def _exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# The program


def _be_program(pipes: _Pipes, ruleset: int | None) -> None:
    """Run the source that arrives first. If the job asks for more, answer calls."""
    calls, values = pipes.calls[0], pipes.values[1]
    os.dup2(pipes.input, 0)
    os.dup2(pipes.output[1], 1)
    _close_all_but({calls, values} if ruleset is None else {calls, values, ruleset})
    job = json.loads(_received(calls))
    try:
        confined.confine(cpu_s=job["cpu_s"], memory_mib=job["memory_mib"], ruleset=ruleset)
    except (OSError, KeyError) as error:
        _send(values, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(1)
    _send(values, json.dumps(None).encode())
    source = job["source"]
    # inspect and tracebacks look for it here; no such file exists
    linecache.cache[_PROGRAM] = (len(source), None, source.splitlines(keepends=True), _PROGRAM)
    namespace: dict[str, Any] = {"__name__": "__main__"} if job["as_script"] else {}
    if not job["answers_calls"]:
        os.close(calls)
        os.close(values)
    exec(compile(source, _PROGRAM, "exec"), namespace)
    if not job["answers_calls"]:
        _end_quickly()
    else:
        peer = Peer(lambda: _received(calls), lambda message: _send(values, message), _leave, shares=True)
        peer.give_first(lambda names: {name: namespace[name] for name in names if name in namespace})
        peer.serve()


def _close_all_but(kept: set[int]) -> None:
    """Close all descriptors above the three standard ones, except these. There are never many."""
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 256)


def _end_quickly() -> NoReturn:
    """End as an interpreter does, but do not free objects: for most programs that would take
    longer than the run.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _leave(_: str) -> NoReturn:
    os._exit(1)


# Its supervisor


class _Supervisor:
    """Runs one job. Each of its methods may end the process, with an answer."""

    def __init__(self, connection: int, pipes: _Pipes, ruleset: int | None, pid: int) -> None:
        self._connection, self._pipes, self._ruleset, self._pid = connection, pipes, ruleset, pid
        self._values, self._calls, self._output = pipes.values[0], pipes.calls[1], pipes.output[0]
        self._message, self._printed = bytearray(), bytearray()
        self._poll = select.poll()
        for descriptor in (connection, self._values, self._output):
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> NoReturn:
        os.write(self._connection, STARTED)
        job = json.loads(_received(self._connection))
        self._deadline, self._most_printed = time.monotonic() + job["wall_s"], job["output_kib"] << 10
        signal.setitimer(signal.ITIMER_REAL, job["wall_s"] + _SLACK_S)
        os.pwrite(self._pipes.input, job["stdin"].encode(errors="replace"), 0)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._pipes.input, fcntl.F_ADD_SEALS, seals)
        os.close(self._pipes.input)
        names = ("source", "as_script", "cpu_s", "memory_mib")
        checks = job["checks"]
        program = {name: job[name] for name in names} | {"answers_calls": checks is not None}
        self._ask(json.dumps(program).encode())
        refusal = json.loads(self._answer())
        if refusal is not None:
            self._end("unconfined", refusal)
        if checks is None:
            self._watch()
        try:
            confined.confine(cpu_s=job["cpu_s"], memory_mib=job["memory_mib"], ruleset=self._ruleset)
            _run_checks(
                Peer(self._answer, self._ask, self._broken, shares=False),
                checks,
                job["helpers"],
                job["asked"],
            )
        except BaseException as error:
            self._end("error", f"{type(error).__name__}: {error}")
        self._end("ok")

    def _watch(self) -> NoReturn:
        """Wait until the program ends by itself."""
        self._poll.unregister(self._values)
        while self._output >= 0:
            self._wait()
        while True:
            left = self._deadline - time.monotonic()
            # it goes on without its output
            if left <= 0 or signal.sigtimedwait({signal.SIGCHLD}, left) is None:
                self._end("time")
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._end("ok" if status == 0 else "error")

    def _ask(self, message: bytes) -> None:
        try:
            _send(self._calls, message)
        except BrokenPipeError:
            self._end("error", "the program has ended")

    def _answer(self) -> bytes:
        """The program's next message."""
        while True:
            if len(self._message) >= LENGTH.size:
                (length,) = LENGTH.unpack(self._message[: LENGTH.size])
                if length > _LONGEST_MIB << 20:
                    self._broken("a message that is too long")
                end = LENGTH.size + length
                if len(self._message) >= end:
                    message = bytes(self._message[LENGTH.size : end])
                    del self._message[:end]
                    return message
            self._wait()

    def _wait(self) -> None:
        """Read the next part of the program's messages or of its output."""
        left = self._deadline - time.monotonic()
        ready = self._poll.poll(1000 * left) if left > 0 else []
        if not ready:
            self._end("time")
        for descriptor, _ in ready:
            if descriptor == self._connection:  # the grader asks for nothing more: it is gone
                os._exit(1)
            part = os.read(descriptor, 1 << 16)
            if descriptor == self._values:
                self._message += part
                if not part:
                    self._end("error", "the program has ended")
            else:
                self._printed += part
                if len(self._printed) > self._most_printed:
                    self._end("output")
                if not part:
                    self._poll.unregister(self._output)
                    self._output = -1

    def _broken(self, reason: str) -> NoReturn:
        self._end("error", f"the program sent no plain data: {reason}")

    def _end(self, status: str, reason: str = "") -> NoReturn:
        """Answer, and end with the program. The process ends at once: checks that catch
        exceptions do not go on.
        """
        answer = {"status": status, "output": self._printed.decode(errors="replace"), "reason": reason}
        with suppress(OSError):  # the grader is gone
            _send(self._connection, json.dumps(answer).encode())
        os._exit(0)


def _run_checks(peer: Peer, checks: str, helpers: str, asked: Sequence[str]) -> None:
    """Returns if the checks run to their end. They see the helpers' definitions, and the asked
    names of the program.

    A name that is not asked, not defined by the helpers and not Python's own is the program's too.
    """
    code = compile(checks, _CHECKS, "exec")
    namespace: dict[str, Any] = {}
    with suppress(SyntaxError):  # the beginning of code that the program completes
        exec(compile(helpers, _CHECKS, "exec"), namespace)
    own, python = set(namespace), set(dir(builtins))
    names = {name for name in _names(code) | own | set(asked) if not name.startswith("__")}
    found = peer.first(sorted(names))
    if type(found) is not dict:
        raise TypeError("the program does not say what it defines")
    for name in names:
        if name in asked or name not in own | python | sys.stdlib_module_names:
            if name in found:
                namespace[name] = found[name]
        elif name not in found:
            # As if both were one module: a module that the program does not import is not there.
            namespace.pop(name, None)
        elif name not in own | python:
            namespace[name] = importlib.import_module(name)
    exec(code, namespace)


def _names(code: CodeType) -> set[str]:
    """Global names and attributes in code."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)
