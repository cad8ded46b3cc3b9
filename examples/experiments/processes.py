"""Where commands run: a folder in which one study works at a time, even after the study itself was killed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Workplace:
    """A folder. This process and every command that it starts hold it as long as any of them lives."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if another study works there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--run-dir {folder}: a study, or a command that a killed one has left, is at work there; "
                "wait for it, or name another directory"
            ) from None

    def command(self, command: Sequence[str], *, log: Path) -> dict[str, float]:
        """Run the command on one thread, with its output in a file; returns {seconds, cpu_seconds}. Raises
        RuntimeError if it fails.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        begin = time.monotonic()
        with open(log, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"exit code {process.returncode}; the end of {log}:\n{end}")
        seconds = {"seconds": time.monotonic() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        return {name: round(value, 1) for name, value in seconds.items()}
