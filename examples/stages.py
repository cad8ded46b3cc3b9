"""Commands that follow one another. Each is run again only if it or its inputs have changed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megatron_simct.files import write_whole

console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command, and the file or folder that it makes."""

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[Stage, ...] = ()
    """Stages whose output it reads."""
    inputs: tuple[Path, ...] = ()
    """Other files that it reads."""
    resumes: bool = False
    """The command continues the output of an interrupted run. Otherwise that output is removed."""
    threads: int = 1

    @property
    def record(self) -> Path:
        """The record of the last run of this stage."""
        return self.output.with_name(f".{self.output.name}.stage.json")

    @property
    def digest(self) -> str:
        """Digest of the command and of everything that it reads."""
        parts = [list(self.command), [stage.digest for stage in self.needs]]
        parts.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in self.inputs])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, root: Path) -> float:
        """Seconds that the command takes or took, from the folder `root`. Raises SystemExit if it fails, and
        ValueError if its output exists but no stage has made it.
        """
        digest = self.digest
        record = json.loads(self.record.read_text()) if self.record.exists() else {}
        same = record.get("digest") == digest
        if same and "seconds" in record and self.output.exists():
            self._say(f"already there, {self.output}")
            return record["seconds"]
        if self.output.exists() and not record:
            raise ValueError(f"{self.output}: is there, and was not made here; name another --run-dir")
        if not (same and self.resumes):
            _remove(self.output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.record, json.dumps({"digest": digest}))
        self._say(shlex.join(self.command))
        begin = time.time()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(root)}
        status = subprocess.run(self.command, env=environment, cwd=root).returncode
        if status != 0:
            raise SystemExit(f"{self.name} failed with exit code {status}; its output is above")
        seconds = time.time() - begin
        write_whole(self.record, json.dumps({"digest": digest, "seconds": seconds}))
        return seconds

    def _say(self, text: str) -> None:
        console.print(f"[bold]{self.name}[/bold]: {escape(text)}", soft_wrap=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
