"""Math-Verify in a separate process, because a response can ask for a computation that never ends.

This file has both sides. The child runs it by its path, so it imports nothing from this package.
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import subprocess
import sys


class MathVerifier:
    """Math-Verify in a separate process, because a response can ask for a computation that never ends."""

    TIMEOUT_S = 60.0
    STEP_TIMEOUT_S = 20
    """Time limit that Math-Verify itself applies to one expression. It is long, for a busy machine."""
    MEMORY_MIB = 2048

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(self, gold: str, response: str) -> bool:
        """Whether the response's final answer equals that of the gold text. False if the
        process takes too long.
        """
        # killed since the last answer, not by this one
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._start()
        answer = self._ask(gold, response)
        if answer is None:
            self.close()
        return answer is True

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._ask("$\\frac{1}{2}$", "$\\frac{2}{4}$", timeout_s=180.0) is not True:
            self.close()
            raise ValueError("grading needs the package math-verify: pip install math-verify==0.9.0")

    def _ask(self, gold: str, response: str, *, timeout_s: float = TIMEOUT_S) -> bool | None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None, (
            "it was started"
        )
        try:
            process.stdin.write(json.dumps([gold, response]).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        line = process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
            with contextlib.suppress(BrokenPipeError):  # it still holds input that the process did not read
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def _serve() -> None:
    """Answer questions [gold, response], one on each line, with true or false."""
    from math_verify import parse, verify

    limit, step = MathVerifier.MEMORY_MIB << 20, MathVerifier.STEP_TIMEOUT_S
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        gold, response = json.loads(line)
        try:
            answer = verify(
                gold=parse(gold, parsing_timeout=step),
                target=parse(response, parsing_timeout=step),
                timeout_seconds=step,
            )
        except Exception:  # the parser or sympy may raise anything; then there is no equal answer
            answer = False
        print(json.dumps(bool(answer)), flush=True)


if __name__ == "__main__":
    _serve()
