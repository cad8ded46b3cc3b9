"""Ensures that only one run at a time writes into a folder, by a lock file that names its owner.

    DIR/.owner.1.lock    host, process, Slurm job and time of the run that writes into DIR; removed at its end

A run that was killed leaves its lock. The next one takes over where the owner is provably gone: the same host
has no such process, Slurm has queued the same job again, or Slurm no longer knows the job. Everything else is
refused with the line that removes the lock. A lock gets its name by a hard link, which one of several runs
gets, on NFS too. Who takes over makes the next number and looks again before it counts as the owner, so that
of two runs that both find a lock of the dead at most one goes on. The kernel's own locks would need a lock
service on every file system.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from megatron_simct.files import owner_tag

_ATTEMPTS = 40
_SQUEUE_S = 20.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a file system without hard links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that writes, with what other processes need to check whether it still runs."""

    life: str
    """A random id, different at every start."""
    host: str
    machine: str
    boot: str
    """Boot id of the machine's kernel; it changes with a reboot."""
    pids: str
    """The namespace in which `pid` counts."""
    pid: int
    start: str
    """Start time of the process, in the kernel's units."""
    job: str
    """Slurm job id; empty outside Slurm."""
    cluster: str
    requeues: int
    since: str

    @classmethod
    def this_process(cls, env: Mapping[str, str] = os.environ) -> Owner:
        """The owner record of this process, with a new id."""
        count = env.get("SLURM_RESTART_COUNT", "0")
        return cls(
            life=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            pids=_link("/proc/self/ns/pid"),
            pid=os.getpid(),
            start=_start(os.getpid()),
            job=env.get("SLURM_JOB_ID", ""),
            cluster=env.get("SLURM_CLUSTER_NAME", ""),
            requeues=int(count) if count.isdigit() else 0,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_process_of(self, other: Owner) -> bool:
        """Whether both records are of the same process."""
        return (self.host, self.pids, self.pid, self.start) == (
            other.host,
            other.pids,
            other.pid,
            other.start,
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A folder, or what `name` says of it, that is this process's own until `release`."""

    path: Path
    owner: Owner

    def release(self) -> None:
        """Remove the lock, unless somebody has removed it and another run has come."""
        with contextlib.suppress(OSError):
            if _read(self.path) == self.owner:
                self.path.unlink()


def take(folder: Path, *, name: str = "owner", what: str) -> Lock:
    """Make the folder this process's own. It is made where it is missing.

    what: begins the message, a flag and its value. Raises ValueError where another run owns it, or may own
    it; OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = Owner.this_process()
    for _ in range(_ATTEMPTS):
        found = _locks(folder, name)
        for path, owner in found.values():
            if owner is None or not (owner.is_process_of(ours) or is_gone(owner, ours)):
                raise ValueError(_refusal(what, path, owner, ours))
        number = max(found, default=0) + 1
        lock = Lock(path=folder / f".{name}.{number}.lock", owner=ours)
        if not _link_new(lock):
            continue
        others = {n: owner for n, (_, owner) in _locks(folder, name).items() if n != number}
        if all(n in found and found[n][1] == owner for n, owner in others.items()):
            for path, _ in found.values():
                path.unlink(missing_ok=True)
            return lock
        lock.release()  # another run came at the same moment: both check again
        time.sleep(random.random() * 0.05)
    raise ValueError(
        f"{what}: another run is starting there at the same moment; start this one again when the other has "
        "ended"
    )


def owner_of(folder: Path, *, name: str = "owner") -> Owner | None:
    """The owner of the lock; None if there is no readable lock."""
    found = _locks(folder, name)
    return found[max(found)][1] if found else None


def forget(folder: Path, *, name: str) -> None:
    """Remove the locks of an owner that is gone, or is this process."""
    ours = Owner.this_process()
    for path, owner in _locks(folder, name).values():
        if owner is not None and (owner.is_process_of(ours) or is_gone(owner, ours)):
            path.unlink(missing_ok=True)


def is_gone(owner: Owner, ours: Owner) -> bool:
    """Whether the owner provably does not run any more."""
    same_cluster = owner.cluster == ours.cluster
    if owner.job and owner.job == ours.job and same_cluster and owner.requeues < ours.requeues:
        return True
    if owner.host == ours.host and owner.machine == ours.machine:
        if owner.boot != ours.boot:
            return True
        if owner.pids == ours.pids:
            return not _runs(owner.pid, owner.start)
    return bool(owner.job) and owner.job != ours.job and same_cluster and _unknown_to_slurm(owner.job)


def _refusal(what: str, path: Path, owner: Owner | None, ours: Owner) -> str:
    remedy = f"rm {shlex.quote(str(path))}"
    if owner is None:
        return f"{what}: its lock {path} cannot be read; if no run writes there: {remedy}"
    if owner.host == ours.host and owner.pids == ours.pids:
        return f"{what}: another run writes there ({owner}); end it first, or name another directory"
    return (
        f"{what}: another run writes there ({owner}), and this host cannot check whether it has ended; if it "
        f"has: {remedy}"
    )


def _link_new(lock: Lock) -> bool:
    """Write the lock whole and give it its name; False where the name is taken."""
    temporary = lock.path.with_name(f"{lock.path.name}.{owner_tag()}.{lock.owner.life}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(lock.owner)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, lock.path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _make_new(lock)
        # An answer of NFS that got lost looks like a failure: what counts is whether the file has two names.
        return temporary.stat().st_nlink == 2
    finally:
        temporary.unlink(missing_ok=True)


def _make_new(lock: Lock) -> bool:
    """The same on a file system without hard links, where a lock that is being written is one
    that nobody can read.
    """
    try:
        descriptor = os.open(lock.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(lock.owner)) + "\n")
    return True


def _locks(folder: Path, name: str) -> dict[int, tuple[Path, Owner | None]]:
    """Path and owner of every lock, by number; one whose run ends meanwhile is left out."""
    found: dict[int, tuple[Path, Owner | None]] = {}
    prefix, suffix = f".{name}.", ".lock"
    for entry in os.listdir(folder):
        number = entry[len(prefix) : -len(suffix)]
        if entry.startswith(prefix) and entry.endswith(suffix) and number.isdecimal():
            path = folder / entry
            with contextlib.suppress(FileNotFoundError):
                found[int(number)] = path, _read(path)
    return found


def _read(path: Path) -> Owner | None:
    """None if the file is not a lock of this package."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = isinstance(owner.pid, int) and isinstance(owner.requeues, int)
    texts = all(isinstance(value, str) for key, value in fields.items() if key not in ("pid", "requeues"))
    return owner if numbers and texts and owner.pid > 0 else None


def _runs(pid: int, start: str) -> bool:
    """Whether this host has the process; a number that another process has got since does not count."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    with contextlib.suppress(psutil.Error):
        if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
    now = _start(pid)
    return not now or not start or now == start  # if it is unknown, it may be the same


def _start(pid: int) -> str:
    """Start time of a process; empty if it cannot be read.

    Linux counts from the boot: no clock moves it.
    """
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(psutil.Error):
        return str(round(psutil.Process(pid).create_time()))
    return ""


def _unknown_to_slurm(job: str) -> bool:
    """Whether Slurm answers that it has no such job, or has ended it."""
    if shutil.which("squeue") is None or not job.isdecimal():
        return False
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SQUEUE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if result.returncode:
        return "Invalid job id" in result.stderr
    return not result.stdout.strip()


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""
