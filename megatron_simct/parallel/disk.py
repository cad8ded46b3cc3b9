"""Actions on a shared disk: one rank acts, and all ranks get its outcome."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_simct.ownership import Lock, take
from megatron_simct.stopping import at_sudden_end


def on_first_rank(action: Callable[[], None], directory: str, *, flag: str = "--save") -> None:
    """Run action() on the first rank while the others wait. Raises ValueError on every rank if action()
    raises one, or an OSError.
    """
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = f"{flag} {directory}: {_refused(error)}"
        except ValueError as error:
            problem = str(error)
    raise_together(problem)


def check_all_wrote(refused: OSError | None, directory: str) -> None:
    """Raises the same ValueError on every rank if one of them had an error of the disk. Collective over the
    whole job.

    refused: this rank's error. The rank must have continued up to this call, because others would wait for it
    in collectives before.
    """
    raise_together(None if refused is None else f"--save {directory}: {_refused(refused)}")


def raise_together(problem: str | None) -> None:
    """Raises ValueError on every rank with the first problem of a rank. Collective over the whole job."""
    found = first_of(problem)
    if found is not None:
        raise ValueError(found)


def first_of(problem: str | None) -> str | None:
    """The first problem of a rank, on every rank; None if no rank has one.

    Collective over the whole job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    first = torch.tensor(world_size if problem is None else rank, device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    source = int(first)
    if source == world_size:
        return None
    found = [problem]
    dist.broadcast_object_list(found, src=source)
    return found[0]


@contextlib.contextmanager
def sole_owner(folders: Mapping[str, str | None], *, beside: bool = False) -> Iterator[None]:
    """Own the folders, by the flags that name them, while the context lasts. None: no such folder.

    beside: the folders will be made later, so their locks lie beside them. The first rank holds the locks.
    Raises ValueError on every rank if another run writes into one of the folders.
    """
    held: dict[Path, Lock] = {}
    made: list[Path] = []

    def own(folder: Path, what: str) -> None:
        place = folder.resolve()
        if place in held:
            return
        if not beside and not folder.exists():
            made.append(folder)
        try:
            held[place] = (
                take(place.parent, name=place.name, what=what) if beside else take(folder, what=what)
            )
        except OSError as error:
            raise ValueError(f"{what}: {_refused(error)}; choose a path that can be written to") from None

    def let_go() -> None:
        for lock in held.values():
            lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # the folder and its files stay
                folder.rmdir()

    try:
        for flag, name in folders.items():
            if name is not None:
                folder, what = Path(name), f"{flag} {name}"
                on_first_rank(lambda folder=folder, what=what: own(folder, what), name, flag=flag)  # type: ignore[misc]
        with at_sudden_end(let_go):
            yield
    finally:
        let_go()


def _refused(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})"
