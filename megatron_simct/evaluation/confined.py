"""The child process of sandbox.py: gives up what a program does not need, then runs it.

    python -I -B confined.py '{"cpu_s": 10, "memory_mib": 1024, "as_script": false}'

runs ./program.py. If that gets to its end, what the file ./mark held is written to standard output.

Standard library only. The kernel refuses every system call that is not listed here (seccomp): what opens sockets,
starts processes, sends signals to others, opens a file to write, or changes the file system or a terminal. Nothing of
it can be taken back, and the program runs in this very process, so there is no one else to kill.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys

CANNOT_CONFINE = 120
"""The exit code, with the reason on standard output, where this system offers no such filter."""

# System calls and their numbers on x86-64 and on aarch64, where it has them.
_ALLOWED = {
    # bytes of open files
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62)},
    **{"pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "dup": (32, 23), "dup2": (33, None)},
    **{"dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "close_range": (436, 436), "eventfd2": (290, 19)},
    # names of files
    **{"access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "stat": (4, None), "lstat": (6, None)},
    **{"newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "getcwd": (79, 17)},
    **{"readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "chdir": (80, 49)},
    # waiting
    **{"poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None)},
    **{"epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22)},
    **{"pause": (34, None), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "sched_yield": (24, 124)},
    # memory
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216)},
    **{"mincore": (27, 232), "madvise": (28, 233), "membarrier": (324, 283)},
    # its own signals, timers and threads
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "alarm": (37, None)},
    **{"getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128), "futex": (202, 98)},
    **{"set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293), "arch_prctl": (158, None)},
    **{"set_tid_address": (218, 96), "exit": (60, 93), "exit_group": (231, 94)},
    # what there is to know
    **{"getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175)},
    **{
        "getgid": (104, 176),
        "getegid": (108, 177),
        "getpgrp": (111, None),
        "getpgid": (121, 155),
        "getsid": (124, 156),
    },
    **{"uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153), "getrlimit": (97, 163), "getrusage": (98, 165)},
    **{"sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120)},
    **{"time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    "getrandom": (318, 278),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and the name that the kernel has for the architecture."""
_CLONE_THREAD, _F_SETLKW, _F_DUPFD_CLOEXEC = 0x10000, 7, 1030
_QUESTIONS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""What ioctl may be asked: TCGETS and TCGETS2 (is it a terminal), TIOCGWINSZ, FIONREAD, and of the program's own
descriptors FIONBIO, FIONCLEX, FIOCLEX. Others type into a terminal (TIOCSTI) or change a file that is open to read."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _REFUSE, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def system_call_filter(machine: str, pid: int) -> bytes:
    """The filter as the kernel reads it, struct sock_filter (code u16, jumps u8 u8, constant u32) each."""
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
    program += call((435, 435), (_RETURN, 0, 0, _NO_SUCH_CALL))  # clone3: the C library goes on to clone
    program += call((234, 131), argument(0), (_EQUAL, 0, 1, pid), allow, refuse)  # tgkill: itself
    program += call((302, 261), argument(0), (_EQUAL, 0, 1, 0), allow, refuse)  # prlimit64: itself
    commands = ((_EQUAL, 1, 0, _F_DUPFD_CLOEXEC), (_ABOVE, 1, 0, _F_SETLKW), allow, refuse)
    program += call((72, 25), argument(1), *commands)  # fcntl: not the commands by which it signals others
    program.append(refuse)
    return b"".join(struct.pack("HBBI", *step) for step in program)


def confine(*, cpu_s: int, memory_mib: int) -> None:
    """Set the limits and the filter. OSError or KeyError where this system has none."""
    code = system_call_filter(platform.machine(), os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)

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
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    steps = Filter(len(code) // 8, code)
    for arguments in ((no_new_privileges, 1, 0, 0, 0), (set_seccomp, mode_filter, ctypes.byref(steps), 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}): {os.strerror(ctypes.get_errno())}")


def main() -> None:
    options = json.loads(sys.argv[1])
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    with open("mark", "rb") as file:
        marks = [file.read()]
    os.unlink("mark")
    sys.argv = ["program.py"]
    try:
        confine(cpu_s=options["cpu_s"], memory_mib=options["memory_mib"])
    except (OSError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(CANNOT_CONFINE)
    namespace = {"__name__": "__main__"} if options["as_script"] else {}
    # Meanwhile the mark is an argument of a call that waits for its next one: on the interpreter's stack, in no file,
    # no variable and no object that the program could look up, to say early that it has run to its end.
    _finish(marks.pop(), exec(compile(source, "program.py", "exec"), namespace))  # type: ignore[func-returns-value]


def _finish(mark: bytes, _: None) -> None:
    os.write(1, mark)


if __name__ == "__main__":
    main()
