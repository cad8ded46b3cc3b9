"""What the ranks of a job do on the disk that they share: one of them acts, and all know how it ended."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist


def on_first_rank(action: Callable[[], None], directory: str) -> None:
    """action() on the first rank while the others wait. Where the disk refuses, ValueError on every rank."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [f"--save {directory}: {error.strerror} ({error.filename})"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])
