"""Communication between the ranks of a model replica outside of Megatron's training schedule.

The schedule leaves its results on the last stage, the one with the LM head. These functions broadcast them to
the other stages, so that every rank of a replica continues with the same numbers, and send hidden states from
stage to stage during generation.
"""

from __future__ import annotations

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


def hand_on(sent: torch.Tensor | None, received: torch.Tensor | None, pp: dist.ProcessGroup) -> None:
    """Send to the next rank of the pipeline and receive from the one before, both at a time; None: nothing.

    `received` gives shape and type of what comes, and is written to. The first rank is next to the last: an
    interleaved pipeline goes around more than once. Every rank whose neighbour sends must receive in the same
    call: for NCCL both are one operation.
    """
    rank, size = pp.rank(), pp.size()
    operations = []
    if sent is not None:
        to = dist.get_global_rank(pp, (rank + 1) % size)
        operations.append(dist.P2POp(dist.isend, sent.contiguous(), to, pp))
    if received is not None:
        source = dist.get_global_rank(pp, (rank - 1) % size)
        operations.append(dist.P2POp(dist.irecv, received, source, pp))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
