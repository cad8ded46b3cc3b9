"""Verifies that the files of a checkpoint are the ones that were written.

    iter_0000100/run.json    "files": size and SHA-256 of every other file; "sha256", its last field: of
                             run.json itself

Each rank hashes the files that it writes, while they are written. Before a checkpoint is used each file is
read once a job: the files are distributed over the ranks, and all ranks get the name of the first file that
has changed. This detects damage by disks, networks and people; it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_simct.files import FileHash, hash_file
from megatron_simct.parallel.disk import first_of

RUN_FILE = "run.json"
_POLL_S = 0.01
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n\}\n\Z')
"""The end of run.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of `verify`."""

    damage: str | None
    """The first file that has changed, and how; None if none has."""
    num_files: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.num_files} files, {self.num_bytes / 2**20:.1f} MiB, verified in {self.seconds:.2f} s"


# Writing


class Following:
    """Hashes files while other processes write them sequentially.

    The bytes come from the page cache, and the processors are idle while the disk writes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._done = threading.Event()
        self.hashes: dict[str, FileHash] = {}
        """By name, after `finish`."""
        self.refused: OSError | None = None
        """The error if a file could not be read."""
        self._threads = [threading.Thread(target=self._follow, args=(path,), daemon=True) for path in paths]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Hash the rest, now that the files are complete."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, path: Path) -> None:
        try:
            while not path.exists():
                if self._done.wait(_POLL_S):
                    if path.exists():
                        break
                    return  # its writer has failed, and reports the error itself
            self.hashes[path.name] = hash_file(path, whole=self._done)
        except OSError as error:
            error.filename = error.filename or str(path)
            self.refused = error


def sealed(content: Mapping[str, Any], files: Mapping[str, FileHash]) -> bytes:
    """The bytes of a run.json with these fields."""
    hashes = {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(files.items())}
    text = json.dumps({**content, "files": hashes, "sha256": "0" * 64}, indent=2) + "\n"
    return _with_seal(text.encode())


def _with_seal(blank: bytes) -> bytes:
    head, tail = blank[:-68], blank[-68:]
    assert tail == b"0" * 64 + b'"\n}\n', "the seal is the last field"
    return head + hashlib.sha256(blank).hexdigest().encode() + tail[64:]


# Reading


class Damaged(ValueError):
    """A file of a checkpoint is not as it was written."""


def read_run_file(folder: Path) -> tuple[dict[str, Any], dict[str, FileHash] | None]:
    """The fields of run.json, and the hashes; None if it is of an earlier version, without hashes.

    Raises FileNotFoundError if the file is missing, and Damaged if it has changed.
    """
    data = (folder / RUN_FILE).read_bytes()
    seal = _SEAL.search(data)
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        if seal is None and "files" not in content and "sha256" not in content:
            return content, None
        if seal is None or _with_seal(data[: seal.start(1)] + b"0" * 64 + data[seal.end(1) :]) != data:
            raise ValueError("its SHA-256 is another one")
        return content, {str(name): FileHash(**entry) for name, entry in content["files"].items()}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Damaged(f"{RUN_FILE} ({' '.join(str(error).split())[:200]})") from None


def verify(folder: Path) -> Verdict | None:
    """Compare every file with run.json; None if that has no hashes, or is missing.

    Collective over the whole job.
    """
    begin = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    files: Mapping[str, FileHash] | None = {}
    problem = None
    try:
        _, files = read_run_file(folder)
    except FileNotFoundError:
        files = None
    except (OSError, Damaged) as error:
        problem = _reason(error)
    has_hashes = first_of(None if files is None else "yes")
    if has_hashes is None:
        return None
    if files is None:
        problem, files = f"{RUN_FILE} (another rank can read it, rank {rank} cannot)", {}
    by_size = sorted(files, key=lambda name: (-files[name].size, name))
    for name in by_size[rank::world_size]:
        problem = problem or _difference(folder, name, files[name])
    return Verdict(
        damage=first_of(problem),
        num_files=len(files),
        num_bytes=sum(file.size for file in files.values()),
        seconds=time.perf_counter() - begin,
    )


def _difference(folder: Path, name: str, wanted: FileHash) -> str | None:
    """How a file differs from the written one; None if it does not."""
    if Path(name).name != name:
        return f"{RUN_FILE} (names a file outside of the checkpoint)"
    path = folder / name
    try:
        size = path.stat().st_size
        if size != wanted.size:
            return f"{name} ({size} bytes, {wanted.size} were written)"
        return None if hash_file(path) == wanted else f"{name} (its SHA-256 is another one)"
    except OSError as error:
        return f"{name} ({_reason(error)})"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
