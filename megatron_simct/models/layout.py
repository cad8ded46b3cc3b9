"""The sequence and position of each token of a forward pass.

A batch is B padded sequences beside each other, [S, B], or sequences packed one after another in one row, [S,
1]. Megatron passes a Layout to every layer as `packed_seq_params` and reads only its format: for Megatron the
tokens are always [S, B]. Rotary embeddings and attention read the rest.

With context parallelism the S tokens of a row are cut into two pieces a rank, rank r of C holding pieces r
and 2 C - 1 - r (`context_pieces`): what is early and sees few keys, and what is late and sees many. Each rank
computes the queries that it has; the keys and values are gathered from all ranks, [S, B] in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.flex import BlockMask, block_mask
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

ROUNDED = 128
"""The tokens of a row are rounded up to this on a GPU, so that functions are compiled for few shapes."""


def token_multiple(parallel: ParallelConfig, device: torch.device, *, context_parallel_size: int) -> int:
    """The number of tokens of a row must be a multiple of this."""
    shared = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    pieces = 2 * context_parallel_size if context_parallel_size > 1 else 1
    return math.lcm(pieces * shared, ROUNDED if device.type == "cuda" else 1)


def context_pieces(num_tokens: int, rank: int, size: int) -> list[slice]:
    """The tokens of a row that a context-parallel rank holds, in their order; without context parallelism all
    of them.

    num_tokens: a multiple of twice the ranks.
    """
    if size == 1:
        return [slice(0, num_tokens)]
    assert num_tokens % (2 * size) == 0, f"{num_tokens} tokens for {size} context-parallel ranks"
    width = num_tokens // (2 * size)
    return [slice(i * width, (i + 1) * width) for i in (rank, 2 * size - 1 - rank)]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive queries of one sequence, and the keys that they may see."""

    queries: slice
    keys: slice
    """From the start of the sequence to the last of the queries."""


class Layout(PackedSeqParams):
    """The sequences of one forward pass, and the masks that its layers have in common."""

    def __init__(
        self,
        positions: torch.Tensor,
        lengths: Sequence[int] | None = None,
        context: dist.ProcessGroup | None = None,
    ) -> None:
        """positions: int64, of this rank's tokens of any row. lengths: of packed sequences; None: each row is
        one. context: the ranks that share the rows, if several do."""
        super().__init__(qkv_format="sbhd")
        self.positions = positions
        self._context = None if context is None or context.size() == 1 else context
        rank, size = (0, 1) if self._context is None else (self._context.rank(), self._context.size())
        num_tokens = len(positions) * size
        lengths = (num_tokens,) if lengths is None else tuple(lengths)
        assert sum(lengths) == num_tokens, f"sequences of {sum(lengths)} tokens, rows of {num_tokens}"
        self.longest = max(lengths)
        """Tokens of the longest sequence."""
        sequences = [(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
        if self._context is None:
            # Megatron's name, read by layers that process one sequence after another.
            self.cu_seqlens_q = torch.tensor([0, *(end for _, end in sequences)], dtype=torch.int32)
        self.pieces: list[Piece] = []
        """All queries of this rank, in their order."""
        # Queries are numbered on this rank: `offset` counts the tokens of its pieces before this one.
        offset = 0
        for piece in context_pieces(num_tokens, rank, size):
            for start, end in sequences:
                # The part of the sequence that lies in the piece.
                first, last = max(start, piece.start), min(end, piece.stop)
                if first < last:
                    queries = slice(offset + first - piece.start, offset + last - piece.start)
                    self.pieces.append(Piece(queries, slice(start, last)))
            offset += piece.stop - piece.start
        self.num_keys = num_tokens
        """Tokens of a row, on all ranks that share it."""
        self._visible: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    def all_keys(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S / C, B, g, d] of all ranks: [S, B, g, d] in the order of the row. Their gradient is that of all
        ranks' queries. One all-gather, and one reduce-scatter on the way back."""
        if self._context is None:
            return key, value
        size, width = self._context.size(), key.shape[-1]
        both = torch.cat([key, value], dim=-1)
        gathered = gather_from_sequence_parallel_region(
            both, tensor_parallel_output_grad=True, group=self._context
        )
        pieces = gathered.chunk(2 * size)  # rank 0's first and second piece, rank 1's, ...
        ordered = torch.cat([*pieces[::2], *reversed(pieces[1::2])])
        key, value = ordered.split([width, ordered.shape[-1] - width], dim=-1)
        return key, value

    def visible_keys(self, num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
        """`visible_keys` on the device of the positions; made once for all layers."""
        shape = (num_queries, num_keys, window)
        if shape not in self._visible:
            self._visible[shape] = visible_keys(*shape, device=self.positions.device)
        return self._visible[shape]

    def blocks(self, window: int | None) -> BlockMask:
        """The mask of all queries of this rank over all keys of a row, for flex_attention; made
        once for all layers.
        """
        window = window if window is not None and window < self.longest else None
        if window not in self._blocks:
            starts, ends = [], []
            for piece in self.pieces:
                count = piece.queries.stop - piece.queries.start
                starts.append(torch.full((count,), piece.keys.start))
                ends.append(torch.arange(piece.keys.stop - count, piece.keys.stop))
            first, last = torch.stack([torch.cat(starts), torch.cat(ends)]).to(self.positions.device)
            if window is not None:
                first = torch.maximum(first, last - window + 1)
            self._blocks[window] = block_mask(first, last, self.num_keys)
        return self._blocks[window]


def visible_keys(
    num_queries: int, num_keys: int, window: int | None, *, device: torch.device
) -> torch.Tensor:
    """Which keys each query sees, bool [S, K]; the queries are the last S of the K positions."""
    keys = torch.arange(num_keys, device=device)
    back = keys[num_keys - num_queries :, None] - keys
    return back >= 0 if window is None else (back >= 0) & (back < window)
