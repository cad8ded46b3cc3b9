"""Run a program that nobody has read, in a child process of its own, within limits.

    no network, no other process, no file written     refused by the kernel's system call filter (confined.py)
    CPU seconds, memory, open files, core dumps       resource limits of the process
    seconds, bytes of output                          watched from here; past them the process is killed

It can read what the user who runs it can read; nothing carries that away but its output, which is compared and dropped.
Linux on x86-64 or aarch64, any user, no privileges; elsewhere code is not run at all.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_simct.evaluation import confined


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_s: int = 10
    wall_s: float = 60.0
    memory_mib: int = 1024
    """Of address space, the interpreter's own included."""
    output_kib: int = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: Literal["ok", "error", "time", "output"]
    """ok: by itself with exit code 0; error: with another one or by a signal; time and output: past that limit."""
    output: str


def run_program(source: str, limits: Limits, *, stdin: str = "", as_script: bool = False, mark: bytes = b"") -> Outcome:
    """Run Python source; its standard output, of at most limits.output_kib.

    as_script: `__name__` is "__main__"; else the source runs as code that is imported. mark: what is written behind the
    source's last statement, if it gets there.
    """
    with tempfile.TemporaryDirectory(prefix="simct_program_") as folder:
        # Half a surrogate pair has no bytes: a question mark makes it a wrong program, not our error.
        (Path(folder) / "program.py").write_bytes(source.encode(errors="replace"))
        (Path(folder) / "input").write_bytes(stdin.encode(errors="replace"))
        (Path(folder) / "mark").write_bytes(mark)
        options = {"cpu_s": limits.cpu_s, "memory_mib": limits.memory_mib, "as_script": as_script}
        with open(Path(folder) / "input", "rb") as given:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", confined.__file__, json.dumps(options)],
                cwd=folder,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            output, past = _read(process, limits)
        finally:
            process.kill()
            process.wait(timeout=60)
            assert process.stdout is not None, "it is a pipe"
            process.stdout.close()
    text = output.decode(errors="replace")
    if past is not None:
        return Outcome(past, text)
    if process.returncode == 0:
        return Outcome("ok", text)
    return Outcome("error", text)


def _read(process: subprocess.Popen, limits: Limits) -> tuple[bytes, Literal["time", "output"] | None]:
    """All output, and which limit was passed. Without one, the process has ended."""
    assert process.stdout is not None, "it is a pipe"
    deadline, output = time.monotonic() + limits.wall_s, bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return bytes(output), "time"
            part = os.read(process.stdout.fileno(), 1 << 16)
            output += part
            if len(output) > limits.output_kib << 10:
                return bytes(output), "output"
            if not part:
                break
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it has closed its output and goes on
        return bytes(output), "time"
    return bytes(output), None


def passes(source: str, limits: Limits) -> bool:
    """Whether source that checks itself runs to its end. To leave early, with whatever exit code, is not to pass.

    The code that is checked and its checks share one interpreter, as in the benchmarks' own graders: code that sets out
    to, such as a class that equals everything, can make a check mean nothing.
    """
    mark = secrets.token_hex(16)
    outcome = run_program(source, limits, mark=mark.encode())
    return outcome.status == "ok" and mark in outcome.output  # what is printed is buffered, and may come after it


def check_sandbox(*, flag: str = "--benchmark") -> None:
    """ValueError, naming the flag that asked for it, where programs cannot be confined on this system."""
    outcome = run_program("", Limits(wall_s=60.0))
    if outcome.status != "ok":
        reason = outcome.output.strip() or outcome.status
        raise ValueError(
            f"{flag}: this system cannot confine programs ({reason}), so benchmarks of code are not run here; it "
            "takes Linux on x86-64 or aarch64 with seccomp"
        )
