"""A process beside the local launcher that ends its jobs where it cannot: where it has been killed.

An engine does not notice that nobody reads its output, and would keep its port from the next start. The
launcher writes the process ids of its jobs, one a line; the end of the stream is its own end.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import psutil


class Guard:
    """The launcher's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, pid: int) -> None:
        """End this process, and what it has started, after the launcher's end."""
        assert self._process.stdin is not None
        with contextlib.suppress(psutil.NoSuchProcess, BrokenPipeError):
            self._process.stdin.write(f"{pid} {psutil.Process(pid).create_time()}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """After the jobs have ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Read to the end, then kill what is still there. Signals are the launcher's business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    jobs = [line.split() for line in sys.stdin]
    found: list[psutil.Process] = []
    for pid, created in jobs:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # else another process has got its number
                found += [process, *process.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    main()
