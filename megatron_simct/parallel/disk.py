"""What the ranks of a job do on the disk that they share: one of them acts, and all know how it ended."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist


def on_first_rank(action: Callable[[], None], directory: str) -> None:
    """action() on the first rank while the others wait. Where the disk refuses, ValueError on every rank."""
    refused: OSError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            refused = error
    check_all_wrote(refused, directory)


def check_all_wrote(refused: OSError | None, directory: str) -> None:
    """ValueError on every rank, in the same words, where the disk refused one of them. Collective over the whole job.

    refused: what this rank met; it must have gone on to here, for others would wait in whatever comes between.
    """
    problem = None if refused is None else f"--save {directory}: {refused.strerror} ({refused.filename})"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ValueError(found)
