"""A function of the user's, called in a process of its own: of --reward and of --environment.

The function may block, crash or print there. What it prints goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from typing import Any

START_TIMEOUT_S = 300.0
"""Importing a user's module may import a large library."""


ENDED = {"problem": "its process ended"}
"""The last message of a process."""


class NoAnswer(Exception):
    """The reason why a call has no answer."""


class Function:
    """A user's function in a separate process, which is killed if it does not answer in time."""

    def __init__(self, place: str, *, flag: str, timeout_s: float) -> None:
        """place: MODULE:FUNCTION, the value of the flag."""
        self._place = place
        self._flag = flag
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ValueError, naming the flag, if the function cannot be imported.

        The calling thread must live as long as the process: the kernel ends the process with that thread.
        """
        worker = "megatron_simct.evaluation.function_worker"
        self._process = subprocess.Popen(
            [sys.executable, "-m", worker, self._place, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        answer = self._answer(START_TIMEOUT_S)
        if answer is None or "problem" in answer:
            self.close()
            why = f"not imported in {START_TIMEOUT_S:g} s" if answer is None else answer["problem"]
            raise ValueError(f"{self._flag} {self._place}: {why}")

    def ask(self, *arguments: Any) -> Any:
        """The function's value of the arguments; both are JSON. Raises NoAnswer if it has none."""
        if self._process is None:
            try:
                self.start()
            except ValueError as error:
                raise NoAnswer(str(error)) from None
        process = self._process
        assert process is not None and process.stdin is not None, "it was started"
        asked = json.dumps(arguments, default=str)
        with contextlib.suppress(BrokenPipeError):  # the process has ended meanwhile, so there is no answer
            process.stdin.write(asked.encode() + b"\n")
            process.stdin.flush()
        answer = self._answer(self._timeout_s)
        if answer is None:
            self.close()
            raise NoAnswer(f"no answer in {self._timeout_s:g} s")
        if answer == ENDED:
            self.close()
        if "problem" in answer:
            raise NoAnswer(answer["problem"])
        return answer["value"]

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line of the process, or ENDED; None if no line arrives in time."""
        assert self._process is not None and self._process.stdout is not None, "it was started"
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else ENDED

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "both are pipes"
            with contextlib.suppress(BrokenPipeError):  # it still holds input that the process did not read
                pipe.close()
        self._process = None
