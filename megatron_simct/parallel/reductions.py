"""Sums and maxima of a few numbers over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist


def sum_over_ranks(sums: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, float]:
    """Each entry (0-dim) summed over the group, in float64: one small all-reduce.

    Every rank passes the same names.
    """
    names = sorted(sums)
    values = total(torch.stack([sums[name].detach().double().reshape(()) for name in names]), group)
    return dict(zip(names, values.tolist(), strict=True))


def total(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the group, of any shape, on the group's device; `values` may be overwritten."""
    values = values.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(values, group=group)
    return values


def largest(value: int, group: dist.ProcessGroup) -> int:
    """The largest of the ranks' numbers."""
    values = torch.tensor(
        value, dtype=torch.int64, device="cuda" if dist.get_backend(group) == "nccl" else "cpu"
    )
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return int(values)
