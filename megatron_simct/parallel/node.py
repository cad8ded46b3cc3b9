"""Work whose result every rank of a machine needs: its ranks divide it, and map each other's results.

Results are arrays in files, for a moment in private folders below that for temporary files (TMPDIR). Every
rank maps the files of all ranks of its machine; then the folders are removed, and the pages stay as long as
they are mapped. So a machine holds each array once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.parallel.disk import raise_together
from megatron_simct.stopping import at_sudden_end

Arrays = Mapping[str, np.ndarray]
_PREFIX = "megatron_simct-"
_NAME = re.compile(_PREFIX + r"[0-9a-f]{32}-[0-9]+")
_ABANDONED_S = 24 * 3600
"""Age in seconds from which a folder may be an abandoned one. A folder gets its lock a moment after it is
made, another host may not see the lock, and no start needs a folder for a day.
"""


@dataclass(frozen=True, slots=True)
class Node:
    """The ranks of one machine that see the same temporary files."""

    ranks: tuple[int, ...]
    """Ascending; this rank is one of them."""

    @classmethod
    def of_this_rank(cls) -> Node:
        """Collective over the whole job."""
        place = int.from_bytes(hashlib.sha256(_place().encode()).digest()[:7], "big")
        places = _gathered(torch.tensor([place]))[:, 0].tolist()
        return cls(tuple(rank for rank, other in enumerate(places) if other == place))

    def divided(self, count: int, make: Callable[[range], Arrays]) -> list[Arrays]:
        """make(some) for consecutive parts of range(count), one on each rank of the machine: all results, in
        their order.

        With several ranks the arrays are read-only. Collective over the whole job. Raises ValueError on every
        rank, with the problem of the first that has one: the OSError or ValueError of make(), or files that
        cannot be written or are not those that were written.
        """
        place, size = self.ranks.index(dist.get_rank()), len(self.ranks)
        mine = range(count * place // size, count * (place + 1) // size)
        if place == 0:
            _remove_abandoned()
        with _private_folders() as folder_of, contextlib.ExitStack() as held:
            made: Arrays = {}
            problem = None
            try:
                made = make(mine)
                if size > 1:
                    held.enter_context(_new_folder(folder_of(dist.get_rank())))
                    _write(folder_of(dist.get_rank()), made)
            except (OSError, ValueError) as error:
                problem = str(error)
            raise_together(problem)
            hashes = _gathered(torch.frombuffer(bytearray(_hash(made)), dtype=torch.uint8))
            if size == 1:
                return [made]
            found: list[Arrays] = []
            try:
                found = [_mapped(folder_of(rank), hashes[rank].numpy().tobytes()) for rank in self.ranks]
            except (OSError, ValueError) as error:
                problem = f"TMPDIR {tempfile.gettempdir()}: {error}; set it to another folder of this machine"
            raise_together(problem)  # behind it every rank has mapped every file
            return found


def _place() -> str:
    """Equal on ranks that see the same temporary files: kernel, mounts, user and folder."""
    parts = [socket.gethostname(), str(os.geteuid()), os.path.realpath(tempfile.gettempdir())]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/mnt"))
    return "\n".join(parts)


def _gathered(mine: torch.Tensor) -> torch.Tensor:
    """The tensor of each rank, [ranks, n] on the CPU. mine: [n], of the same size and type on every rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = mine.to(device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every).cpu()


@contextlib.contextmanager
def _private_folders() -> Iterator[Callable[[int], Path]]:
    """The path of each rank's folder, the same on all ranks. This rank's own is removed at the end."""
    name = [secrets.token_hex(16)]
    dist.broadcast_object_list(name, src=0)

    def folder_of(rank: int) -> Path:
        return Path(tempfile.gettempdir()) / f"{_PREFIX}{name[0]}-{rank}"

    def remove() -> None:
        shutil.rmtree(folder_of(dist.get_rank()), ignore_errors=True)

    try:
        with at_sudden_end(remove):
            yield folder_of
    finally:
        remove()


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Makes it, and holds a lock on it, which the kernel takes away when this process ends. Raises ValueError
    if the system refuses the folder.
    """
    with _room():
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned() -> None:
    """Removes this user's folders of ranks that were killed: nobody holds their lock, and they are old."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).iterdir():
            if _NAME.fullmatch(folder.name):
                with contextlib.suppress(OSError, ValueError):
                    _check_private(folder, stat.S_IFDIR)
                    if time.time() - folder.lstat().st_mtime > _ABANDONED_S:
                        _remove_if_unlocked(folder)


def _remove_if_unlocked(folder: Path) -> None:
    """Raises OSError if a process holds its lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _write(folder: Path, arrays: Arrays) -> None:
    """Files that only this user can read. Raises ValueError if the system refuses."""
    with _room():
        for name, array in arrays.items():
            descriptor = os.open(folder / f"{name}.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Raises ValueError for an OSError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"TMPDIR {tempfile.gettempdir()}: {error.strerror or error}; set it to a folder with more room"
        ) from None


def _mapped(folder: Path, expected: bytes) -> dict[str, np.ndarray]:
    """The arrays of a rank's folder. Raises ValueError if they are not those with this hash, or if another
    user can write them.
    """
    _check_private(folder, stat.S_IFDIR)
    found = {}
    for path in sorted(folder.iterdir()):
        _check_private(path, stat.S_IFREG)
        try:
            found[path.stem] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error})") from None
    if _hash(found) != expected:
        raise ValueError(f"{folder} does not hold what its rank has written")
    return found


def _check_private(path: Path, kind: int) -> None:
    """Raises ValueError if it is a link, or another user's, or open to others."""
    found = path.lstat()
    if stat.S_IFMT(found.st_mode) != kind or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ValueError(f"{path} is not private to this user")


def _hash(arrays: Arrays) -> bytes:
    """sha256 of all names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()
