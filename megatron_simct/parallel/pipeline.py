"""Communication between the ranks of a model replica outside of Megatron's training schedule.

The schedule leaves its results on the last stage, the one with the LM head. These functions broadcast them to
the other stages, so that every rank of a replica continues with the same numbers, and send hidden states from
stage to stage during generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_simct.parallel.initialize import Groups

T = TypeVar("T")


def from_last_stage(values: T, pp: dist.ProcessGroup) -> T:
    """The last stage's values, which are pickled, on every stage; those of other stages are not read."""
    if pp.size() == 1:
        return values
    carrier = [values]
    dist.broadcast_object_list(carrier, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
    return carrier[0]


def from_writer(values: T, groups: Groups) -> T:
    """The values of the rank that writes a model replica's samples (Groups.writes_samples), on every rank of
    the replica; they are pickled, and those of other ranks are not read. Collective over each replica.
    """
    carrier = [values]
    for group in (groups.pp, groups.tp_cp):  # of the ranks of tp_cp the first one has them by then
        if group.size() > 1:
            dist.broadcast_object_list(carrier, src=dist.get_global_rank(group, 0), group=group)
    return carrier[0]


def tensor_from_last_stage(tensor: torch.Tensor, pp: dist.ProcessGroup) -> torch.Tensor:
    """`tensor` of the last stage, in place of what the other stages hold: the same shape
    and type everywhere.
    """
    if pp.size() > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
    return tensor


def through_stage(
    forward: Callable[[torch.Tensor | None], torch.Tensor],
    received: torch.Tensor,
    pp: dist.ProcessGroup,
    *,
    first: bool,
    last: bool,
) -> torch.Tensor:
    """Run forward(hidden states of the stage before; None on the first), and send its
    result to the next stage.

    `received` gives shape and type of what comes from the stage before; it is written to. An interleaved
    pipeline goes around the ranks more than once, so `first` and `last` are about the stage, not the rank.
    """
    rank, size = pp.rank(), pp.size()
    if not first:
        dist.recv(received, src=dist.get_global_rank(pp, (rank - 1) % size), group=pp)
    hidden = forward(None if first else received)
    if not last:
        dist.send(hidden.contiguous(), dst=dist.get_global_rank(pp, (rank + 1) % size), group=pp)
    return hidden
