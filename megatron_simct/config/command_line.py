"""How a command reads its flags, and how it ends: a user's mistake is one line on stderr,
without a traceback.

Commands import libraries that take seconds inside of `loading`, so that a Ctrl-C meanwhile is one line too.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from megatron_simct.config.environment import Environment

DEBUG = "--debug"
FAILED, INTERRUPTED, NO_READER = 1, 128 + 2, 128 + 13
"""Exit codes; the last two are a shell's for SIGINT and SIGPIPE. A wrong command line is 2, as everywhere."""

_WAYS_OUT = {
    errno.ENOSPC: "free some space, or choose another path",
    errno.EDQUOT: "free some space, or choose another path",
    errno.EROFS: "choose a path that can be written to",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
}


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated flags; its error is one line, which names the nearest known flag.

    It adds --debug.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)
        self.add_argument(
            DEBUG, action="store_true", help="show the traceback of an error, instead of one line"
        )

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Reports an unknown flag first: argparse would report that the correct one is missing."""
        known = self._option_string_actions
        for argument in list(sys.argv[1:] if args is None else args) if self._subparsers is None else ():
            if argument == "--":
                break
            flag = argument.split("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in known:
                self.error(self.unknown_flag(flag))
        return super().parse_known_args(args, namespace)

    def unknown_flag(self, flag: str) -> str:
        """The message about a flag that the command does not have."""
        return f"unknown flag {flag}{nearest(flag, list(self._option_string_actions))}"

    def error(self, message: str) -> NoReturn:
        """Prints one line per host, as for other errors; argparse would print the usage too."""
        self.exit(2, None if Environment.read().local_rank else f"{self.prog}: error: {message}\n")


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of an error about an unknown name: the most similar of `names`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


Main = Callable[[Sequence[str] | None], int | None]


def command(program: str, *, also: tuple[type[Exception], ...] = ()) -> Callable[[Main], Callable[..., int]]:
    """Decorator of a command's main(argv), whose exit code it returns.

    ValueError, OSError and the exceptions of `also` are mistakes that the user can mend: `PROGRAM: error:
    LINE` and exit code 1. Ctrl-C is a line and 130. Any other exception is an error of this package and keeps
    its traceback; with --debug all of them do.
    """

    mistakes: tuple[type[BaseException], ...] = (KeyboardInterrupt, ValueError, OSError, *also)

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            given = list(sys.argv[1:] if argv is None else argv)
            try:
                code = main(given) or 0
                sys.stdout.flush()  # a full disk is reported here as this command's error
                return code
            except mistakes as error:
                if DEBUG in given:
                    raise
                return _report(program, error, given)

        return run

    return decorate


@contextlib.contextmanager
def loading(program: str) -> Iterator[None]:
    """Around the imports of a command that take seconds: a Ctrl-C is a line and 130, as in its main."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if DEBUG in sys.argv:
            raise
        sys.exit(_report(program, interrupt, sys.argv))


def _report(program: str, error: BaseException, argv: Sequence[str]) -> int:
    """Prints the error, and returns the exit code."""
    environment = Environment.read()
    try:
        sys.stdout.flush()
    except OSError as refused:
        with contextlib.suppress(
            OSError
        ):  # or the interpreter tries again when it exits, and prints an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(refused, BrokenPipeError):
            return NO_READER
        if isinstance(error, OSError):
            error.filename = error.filename or "standard output"
    if isinstance(error, KeyboardInterrupt):
        if environment.rank == 0:
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    text = _os_error(error, argv) if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(filter(None, map(str.strip, text.splitlines()))) or type(error).__name__
    rank = f" on rank {environment.rank}" if environment.world_size > 1 else ""
    print(f"{program}: error{rank}: {line}", file=sys.stderr, flush=True)
    return FAILED


def _os_error(error: OSError, argv: Sequence[str]) -> str:
    """The system's error, with the flag that has the path, and the way out."""
    way_out = f"; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else ""
    path = error.filename2 or error.filename  # the target of a rename, otherwise the file
    if not isinstance(path, str | os.PathLike):
        return f"{error.strerror}{way_out}"
    shown, path = path, os.path.abspath(path)
    flag, around = "", ""
    for argument in argv:
        is_flag = argument.startswith("--")
        flag, _, value = argument.partition("=") if is_flag else (flag, "", argument)
        named = f"{flag} {value}".lstrip()
        if value and path == os.path.abspath(value):
            return f"{named}: {error.strerror}{way_out}"
        if value and not around and _belongs(path, os.path.abspath(value)):
            around = f"{named}: "
    return f"{around}{shown}: {error.strerror}{way_out}"


def _belongs(path: str, named: str) -> bool:
    """Whether a path is that of an argument, is inside or above it, or is its temporary file."""
    folder, name = os.path.split(named)
    common = os.path.commonpath([path, named])
    beside = os.path.relpath(path, folder).startswith((f"{name}.", f".{name}."))
    return common in (named, path) or beside
