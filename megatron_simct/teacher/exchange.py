"""Broadcasts messages from the rank with the socket to the other ranks of its group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

Parts = Sequence[bytes | memoryview]
"""One encoded message."""

MAX_SHARED_BYTES = 1 << 28
"""Messages that have arrived are broadcast together, up to about this many bytes."""


def share(
    messages: Sequence[Parts] | None, group: dist.ProcessGroup, *, source: int, device: torch.device
) -> list[Parts] | None:
    """The messages of the group's rank `source` on every rank, or None if it has None.
    Collective over the group.

    Two small broadcasts of sizes, and one of the bytes themselves.
    """
    if group.size() == 1:
        return None if messages is None else list(messages)
    root = dist.get_global_rank(group, source)
    is_source = group.rank() == source
    counts = [len(parts) for parts in messages or ()] if is_source else []
    sizes = [len(part) for parts in messages or () for part in parts] if is_source else []
    head = torch.tensor(
        [-1 if messages is None else len(counts), len(sizes)], dtype=torch.int64, device=device
    )
    dist.broadcast(head, root, group=group)
    num_messages, num_parts = head.tolist()
    if num_messages < 0:
        return None
    if num_messages == 0:
        return []
    lengths = torch.empty(num_messages + num_parts, dtype=torch.int64, device=device)
    if is_source:
        lengths.copy_(torch.tensor(counts + sizes))
    dist.broadcast(lengths, root, group=group)
    # First the number of parts of each message, then the bytes of each part, message by message.
    counts, sizes = (part.tolist() for part in lengths.split([num_messages, num_parts]))
    payload = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if messages is not None and is_source:
        joined = bytearray(b"".join(part for parts in messages for part in parts))
        payload.copy_(torch.frombuffer(joined, dtype=torch.uint8))
    dist.broadcast(payload, root, group=group)
    if messages is not None and is_source:
        return list(messages)
    view = payload.cpu().numpy().data
    shared: list[Parts] = []
    part = begin = 0
    for count in counts:
        parts = []
        for size in sizes[part : part + count]:
            parts.append(view[begin : begin + size])
            begin += size
        part += count
        shared.append(parts)
    return shared
