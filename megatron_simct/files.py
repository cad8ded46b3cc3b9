"""Files that are whole or not there: a reader, and a run that goes on after a kill, never meet half of one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Bytes, or a text in UTF-8. The file gets its name when it is whole and on disk. OSError where that fails.

    Folders above it are made. A link stays, and what it points to is written; so does a device or a pipe (/dev/null),
    which is never half there.
    """
    data = content.encode() if isinstance(content, str) else content
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with named_errors(path), open(path, "wb") as file:
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with named_errors(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Where the system refuses to write or read an open file, its error does not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, likewise."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of JSON lines that this package wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
