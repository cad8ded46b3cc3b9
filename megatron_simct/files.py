"""Atomic file writes: neither a reader nor a run that resumes after a kill sees a partly written file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def owner_tag() -> str:
    """Process id and host in the name of a temporary file, so that no two processes write the same file."""
    return f"{socket.gethostname()}.{os.getpid()}".replace("/", "_")


def write_whole(path: Path, content: str | bytes) -> None:
    """Bytes, or a text in UTF-8. The file gets its name when it is whole and on disk.
    OSError where that fails.

    Folders above it are made. A link stays, and what it points to is written; so does a device or a pipe
    (/dev/null), which is never half there.
    """
    data = content.encode() if isinstance(content, str) else content
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with named_errors(path), open(path, "wb") as file:
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{owner_tag()}.tmp")
    try:
        with named_errors(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_private(
    path: Path, text: str, *, mode: int = 0o600, replace: bool = True, on_disk: bool = True
) -> None:
    """Write a file whole, or not at all. Without `replace`, a file that is there already stays. on_disk: it
    survives a power failure; without, whatever reads it sees a whole file, and the disk is not waited for."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.{owner_tag()}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            if on_disk:
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Where the system refuses to write or read an open file, its error does not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines as write_whole does."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON lines file that this package has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


_BLOCK = 4 << 20
"""Bytes that are read for each hash update."""
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHash:
    """What tells whether a file is the one that was written."""

    size: int
    sha256: str


def hash_file(path: Path, *, whole: threading.Event | None = None) -> FileHash:
    """Hash a whole file, or one that grows until `whole` is set. Raises OSError if it cannot be read."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with named_errors(path), open(path, "rb", buffering=0) as file:
        while True:
            # checked before the read, so that data written later is read in the next round
            is_whole = whole is None or whole.is_set()
            count = file.readinto(buffer)
            if count:
                digest.update(buffer[:count])
                size += count
            elif is_whole:
                return FileHash(size=size, sha256=digest.hexdigest())
            else:
                assert whole is not None
                whole.wait(_POLL_S)


_SAMPLE = 1 << 16


def sampled_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names and sizes of the files, and over three samples of each.

    Enough to tell checkpoints and revisions apart without reading hundreds of gigabytes; it is no proof that
    two files are equal in every byte.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for begin in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(begin)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
