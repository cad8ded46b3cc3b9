"""Attention by torch's flex_attention: one call for all queries of a row, whatever sequences they belong to.

A query sees keys that stand one after another: from the start of its sequence, or of its window, to itself.
So the mask of a row is two numbers a query, and blocks of keys that no query of a block sees are not
computed. On CUDA the function is compiled; what is not compiled computes the same with all scores in memory,
and is for tests.

Shape letters: B sequences beside each other (1 where they are packed), S queries, K keys, n query heads and g
key heads of this rank, d entries of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 128
"""Queries and keys of a block, as the kernel has them."""


def block_mask(first: torch.Tensor, last: torch.Tensor, num_keys: int) -> BlockMask:
    """Query i sees the keys first[i] to last[i]; int64 [S] both.

    Blocks of keys before all first or behind all last are skipped, and those between the largest first and
    the smallest last have no mask. What is in doubt is masked key by key.
    """
    num_queries = len(first)
    missing = -num_queries % BLOCK
    rows = [pad(x[None], (0, missing), mode="replicate")[0].unflatten(0, (-1, BLOCK)) for x in (first, last)]
    (first_least, first_most), (last_least, last_most) = (x.aminmax(dim=1) for x in rows)
    start = torch.arange(0, num_keys, BLOCK, device=first.device)
    end = start + BLOCK - 1
    seen = (first_least[:, None] <= end) & (last_most[:, None] >= start)
    # The last block of keys may have fewer than BLOCK; then no query sees all of it.
    whole = (first_most[:, None] <= start) & (last_least[:, None] >= end)
    if missing:
        whole[-1] = False

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (first[q] <= k) & (k <= last[q])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [blocks of queries, blocks of keys] -> how many each row has, and which, these first."""
    numbers = blocks.int()
    order = numbers.argsort(dim=1, descending=True, stable=True).int()
    return numbers.sum(dim=1, dtype=torch.int32)[None, None], order[None, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[B, n, S, d], [B, g, K, d], [B, g, K, d] -> [B, n, S, d]; sinks [n] as in capped_attention.

    A sink takes exp sink / (exp lse + exp sink) of the weights from a query whose scores have the logarithm
    lse of their sum.
    """
    function: Any = _compiled() if query.is_cuda else flex_attention
    options: dict[str, Any] = {"block_mask": mask, "scale": 1.0, "enable_gqa": True}
    if cap is None and scale == query.shape[-1] ** -0.5:
        options["scale"] = None  # which is that
    else:
        options["score_mod"] = _scaled(scale, cap, query.device)
    if sinks is None:
        return function(query, key, value, **options)
    mixed, more = function(query, key, value, **options, return_aux=AuxRequest(lse=True))
    rest = torch.sigmoid(more.lse - sinks.to(more.lse.dtype)[:, None])
    return (mixed * rest[..., None]).to(mixed.dtype)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _scaled(scale: float, cap: float | None, device: torch.device) -> Callable[..., torch.Tensor]:
    """scale * score, and its soft-cap. The numbers are tensors: of Python's numbers that differ between two
    layers the compiler makes variables, which the kernel does not take."""
    with torch.inference_mode(False), torch.device(device):
        inner = torch.tensor(scale if cap is None else scale / cap, dtype=torch.float32)
        outer = torch.tensor(cap or 1.0, dtype=torch.float32)

    def plain(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return score * inner

    def capped(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return torch.tanh(score * inner) * outer

    return plain if cap is None else capped
