"""Run a program that nobody has read in a separate process, within limits; check the
results of its functions.

    no network, no other process, no file written     the kernel's filter of system calls refuses it
    reads only files of Python and its libraries      Landlock refuses the others, if the kernel has it
    nothing of another process                        by Landlock, and none can be looked into (confined.py)
    CPU seconds, memory, open files, core dumps       resource limits of the process
    seconds, bytes of output                          its supervisor kills the process beyond them

The checks of a program run in a second process, which gets only plain data from the program
(program_server.py). If the kernel has no Landlock, a program can read the files of the user who runs it. Such
data leaves it only by its output, which is compared and dropped, and by the results of its functions.

Linux on x86-64 or aarch64, any user, no privileges. On other systems code is not run at all.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_simct.evaluation import confined
from megatron_simct.evaluation.program_server import LENGTH, STARTED

ROOT = str(Path(__file__).resolve().parents[2])
_PACKAGE = str(Path(ROOT, "megatron_simct", "__init__.py"))
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("megatron_simct", sys.argv[2])
sys.modules["megatron_simct"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["megatron_simct"])
from megatron_simct.evaluation import program_server
program_server.main()
"""
"""Imports this package, and no other module of its folder."""
_SERVER_START_S = 120.0
_ANSWER_SLACK_S = 30.0
"""A supervisor ends a program that takes too long. This is for a supervisor that cannot."""

Sandbox = Literal["auto", "strict"]
SANDBOXES: tuple[Sandbox, ...] = get_args(Sandbox)
"""What a kernel must have so that programs run: the filter of system calls, or Landlock too."""


_NO_LANDLOCK = (
    "this kernel has no Landlock; it needs Linux 5.13 or later with `landlock` in its list of security "
    "modules"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one program."""

    cpu_s: int = 10
    wall_s: float = 60.0
    memory_mib: int = 1024
    """Limit of the address space, the interpreter included."""
    output_kib: int = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: Literal["ok", "error", "time", "output"]
    """ok: ended by itself with exit code 0. error: ended with another code or by a signal. time and output:
    exceeded that limit.
    """
    output: str


def run_program(source: str, limits: Limits, *, stdin: str = "", as_script: bool = False) -> Outcome:
    """Run Python source; return how it ended and its standard output, of at most limits.output_kib.

    as_script: `__name__` is "__main__". Otherwise the source runs as imported code.
    """
    answer = _run(source, limits, stdin=stdin, as_script=as_script)
    return Outcome(answer["status"], answer["output"])


def passes(source: str, checks: str, limits: Limits, *, helpers: str = "", asked: Sequence[str] = ()) -> bool:
    """Whether checks of the source's definitions run to their end, in another process than the source.

    checks: Python. It sees the source's functions and classes under their names. It calls them with plain
    data, its own functions, and values that it got from the source. It gets plain data, and objects of the
    source that equal only themselves. The names of Python and its modules are Python's, unless they are in
    `asked`. Arguments are copies: a function that changes its argument does not change that of the checks.
    helpers: definitions that the checks may use instead of the source's. asked: names that are the
    source's in any case.
    """
    answer = _run(source, limits, checks=checks, helpers=helpers, asked=list(asked))
    return answer["status"] == "ok"


def landlock_version() -> int:
    """The kernel's Landlock version under the programs that run here; 0 if it has none."""
    return _the_server().landlock


def described(landlock: int) -> str:
    """What confines programs on a kernel with this version of Landlock, and what remains open."""
    if landlock > 0:
        return f"programs were confined by seccomp and Landlock (version {landlock})"
    return f"programs were confined by seccomp alone, and could read this user's files: {_NO_LANDLOCK}"


def check_sandbox(*, flag: str = "--benchmark", sandbox: Sandbox = "auto") -> None:
    """Raises ValueError, naming the flag that asked for it, if programs cannot be confined on this system."""
    try:
        # A module that is not loaded yet shows that the library is still readable.
        outcome = run_program("import colorsys", Limits(wall_s=60.0))
        reason = (
            None if outcome.status == "ok" else f"a program that imports a module ends with {outcome.status}"
        )
    except OSError as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"{flag}: this system cannot sandbox programs ({reason}), so code benchmarks cannot run here; "
            "they need Linux on x86-64 or aarch64 with seccomp"
        )
    if sandbox == "strict" and landlock_version() == 0:
        raise ValueError(f"--sandbox strict: {_NO_LANDLOCK}; use a kernel that has it, or --sandbox auto")


# The server


class _Server:
    """The process from which programs are forked."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _START, str(theirs.fileno()), _PACKAGE],
                cwd="/",
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert self._process.stdout is not None, "it is a pipe"
        with self._process.stdout as report:
            line = report.readline()
        if not line:
            self.close()
            raise OSError("the process that starts programs has ended")
        self.landlock: int = json.loads(line)["landlock"]
        if self.landlock == 0:
            # Otherwise a program of the same user could read this process's environment and memory.
            confined.hide()

    def connect(self) -> socket.socket:
        """A connection to the supervisor of a new program."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait(timeout=60)


_server: _Server | None = None
_lock = threading.Lock()


def _the_server(*, instead_of: _Server | None = None) -> _Server:
    """The server of this process, started if necessary."""
    global _server
    with _lock:
        if _server is not None and _server is instead_of:
            _server.close()
            _server = None
        if _server is None:
            _server = _Server()
        return _server


@atexit.register
def _close() -> None:
    global _server
    with _lock:
        if _server is not None:
            _server.close()
        _server = None


def _connected() -> socket.socket:
    server = _the_server()
    try:
        return server.connect()
    except OSError:  # it was killed since the last program
        return _the_server(instead_of=server).connect()


def _run(source: str, limits: Limits, **what: Any) -> dict[str, Any]:
    """Run a program. Raises OSError if that is not possible on this system, or at this time."""
    with _connected() as connection:
        return _answer(connection, job(source, limits, **what), limits)


def job(
    source: str,
    limits: Limits,
    *,
    checks: str | None = None,
    helpers: str = "",
    asked: Sequence[str] = (),
    stdin: str = "",
    as_script: bool = False,
) -> bytes:
    """The message that a supervisor reads."""
    content = {
        # Half a surrogate pair has no bytes: a question mark makes the program wrong, and
        # is not an error here.
        "source": source.encode(errors="replace").decode(),
        "checks": checks,
        "helpers": helpers,
        "asked": asked,
        "stdin": stdin,
        "as_script": as_script,
        "cpu_s": limits.cpu_s,
        "wall_s": limits.wall_s,
        "memory_mib": limits.memory_mib,
        "output_kib": limits.output_kib,
    }
    message = json.dumps(content).encode()
    return LENGTH.pack(len(message)) + message


def _answer(connection: socket.socket, message: bytes, limits: Limits) -> dict[str, Any]:
    deadline = time.monotonic() + limits.wall_s + _ANSWER_SLACK_S
    data = bytearray()
    try:
        connection.settimeout(limits.wall_s + _ANSWER_SLACK_S)
        connection.sendall(message)
        while part := connection.recv(1 << 20):
            data += part
            connection.settimeout(max(0.001, deadline - time.monotonic()))
    except TimeoutError:
        return {"status": "time", "output": ""}
    except (BrokenPipeError, ConnectionResetError):  # it ended without an answer
        pass
    if not data.startswith(STARTED):
        raise OSError(
            "could not start a process for a program; there may be too many processes, or too little memory"
        )
    start = len(STARTED) + LENGTH.size
    if len(data) <= start:  # it was killed
        return {"status": "error", "output": ""}
    answer = json.loads(data[start:])
    if answer["status"] == "unconfined":
        raise OSError(answer["reason"])
    return answer
