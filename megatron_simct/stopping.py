"""When to stop before the end: a signal from a scheduler or a terminal, or the time that was allowed.

Ranks see a signal or a clock at different moments, so after each step they agree: one that has seen it stops
all. While a job is loading there is nothing to finish, and each rank ends by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from threading import Lock, Thread
from typing import Any

import torch
import torch.distributed as dist

_TOGETHER_S = 1.0
"""Signals within this time count as one: a scheduler may send it to all processes, and
torchrun again to its own."""


class EndSignals:
    """Signals that end the process at once until `defer`; after it they set `received`.

    A thread receives them: Python would wait until the main thread returns from a library that waits in C for
    a file or for other ranks, which may take minutes.
    """

    def __init__(
        self, endings: Mapping[signal.Signals, tuple[int, str]], *, again_ends: bool = False
    ) -> None:
        """endings: exit code, and what is written to stderr before it. again_ends: one more signal ends at
        once too.

        Made by the main thread. Only the instance made last receives signals.
        """
        self.received = False
        self.last: Callable[[], object] = _nothing
        """Called before a signal ends the process at once."""
        self._endings, self._again_ends = dict(endings), again_ends
        self._defers = False
        self._received_at = 0.0
        self._lock = Lock()
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        Thread(target=self._listen, name="end-signals", daemon=True).start()
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in self._endings:
            signal.signal(number, _nothing)

    def defer(self, device: torch.device) -> None:
        """From now on a signal sets `received`: there is something to finish.

        Collective over the job: ranks that wait here still end at once.
        """
        loaded = torch.ones((), dtype=torch.int32, device=device)
        dist.all_reduce(loaded)
        assert int(loaded) == dist.get_world_size(), "every rank takes part"
        with self._lock:
            self._defers = True

    def _listen(self) -> None:
        while numbers := self._receiver.recv(64):
            for number in numbers:
                if number in self._endings:  # others that Python handles come here too
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        now = time.monotonic()
        with self._lock:
            if self._defers and not self.received:
                self.received, self._received_at = True, now
            elif not self._defers or (self._again_ends and now - self._received_at > _TOGETHER_S):
                self._end(number)

    def _end(self, number: signal.Signals) -> None:
        """Exits without Python's shutdown, which would wait for other threads and other ranks."""
        code, line = self._endings[number]
        for action in (self.last, *_at_sudden_end):
            with contextlib.suppress(Exception):
                action()
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        os._exit(code)


_at_sudden_end: list[Callable[[], object]] = []


@contextlib.contextmanager
def at_sudden_end(action: Callable[[], object]) -> Iterator[None]:
    """Call action() where a signal ends the process at once while the context lasts: no
    `finally` runs then.
    """
    _at_sudden_end.append(action)
    try:
        yield
    finally:
        _at_sudden_end.remove(action)


def _nothing(*_: Any) -> None:
    pass


_children_end_with: int | None = None
"""The process whose forked children are killed when it ends."""


@contextlib.contextmanager
def children_end_with_me() -> Iterator[None]:
    """While the context lasts, a process that is forked from this one is killed when this one ends, by kill
    -9 too.

    megatron-core forks processes that write a checkpoint. One that waits for a parent that was
    killed would wait for ever. The kernel counts a child as its thread's: fork from a thread that
    lives as long as the child.
    """
    global _children_end_with
    before, _children_end_with = _children_end_with, os.getpid()
    try:
        yield
    finally:
        _children_end_with = before


def _in_a_fork() -> None:
    """A process that is forked from one with EndSignals would tell its parent of its own signals."""
    global _children_end_with
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    if _children_end_with is not None:
        with contextlib.suppress(AttributeError):  # a system that is not Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _children_end_with:  # the parent has ended already
            os._exit(1)
        _children_end_with = os.getpid()


_PR_SET_PDEATHSIG = 1
os.register_at_fork(after_in_child=_in_a_fork)


class ExitWatch:
    """Answers after each step whether the run is to save and exit."""

    def __init__(self, *, on_signal: bool, after_minutes: float | None, device: torch.device) -> None:
        """on_signal: SIGTERM is deferred, or ends a job that loads with exit code 0.

        Time counts from here.
        """
        self._after_minutes = after_minutes
        self._begin_s = time.monotonic()
        self._active = on_signal or after_minutes is not None
        self._device = device
        self._signals = None
        if on_signal:
            line = " SIGTERM: exiting before the first step\n" if dist.get_rank() == 0 else ""
            self._signals = EndSignals({signal.SIGTERM: (0, line)})

    def loaded(self) -> None:
        """From now on a signal waits for the end of a step. Collective over the whole job."""
        if self._signals is not None:
            self._signals.defer(self._device)

    def reason(self) -> str | None:
        """The reason to exit now, the same on every rank; None to continue. Collective over the whole job."""
        if not self._active:
            return None
        minutes = (time.monotonic() - self._begin_s) / 60
        late = self._after_minutes is not None and minutes > self._after_minutes
        received = self._signals is not None and self._signals.received
        seen = torch.tensor([int(received), int(late)], dtype=torch.int32, device=self._device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        signalled, late = seen.tolist()
        if signalled:
            return "SIGTERM"
        return f"--exit-duration-in-mins {self._after_minutes:g} has passed" if late else None
