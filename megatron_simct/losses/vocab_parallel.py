"""Statistics over a vocabulary that is split between the ranks of a tensor-parallel group.

Every rank holds the logits of its own W columns. What a softmax over the whole vocabulary needs from the
others is one maximum and one sum a row, so that is all that crosses ranks: a row costs a few numbers,
whatever the vocabulary. Everything here is a function of tensors with an explicit process group; `group=None`
is a single process.

Columns from the real vocabulary size on are padding (Megatron pads the table, so do published checkpoints):
they are cut off before any statistic is formed and can neither win a maximum nor add to a sum.

Statistics are float32 whatever the type of the logits, and float64 if the logits are: the same code then
serves as its own high-precision check.

Shapes: `n` rows, `H` hidden size, `W` this rank's columns (padding included), `V` the real vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from megatron_simct.losses import bodies

NEGATIVE_INFINITY = float("-inf")
LABEL_STATISTICS_ROWS, LABEL_STATISTICS_COLUMNS = 4096, 1024
"""16 MiB of float32: malloc hands larger blocks back to the system each time."""
LABEL_STATISTICS_COLUMNS_GPU = 8192
"""128 MiB of float32."""
ROWS_OF_LOGITS, ROWS_OF_LOGITS_GPU = 8, 1024
"""At a time, of logits that exist: on a CPU what is computed of them should stay in the cache."""


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def num_real_columns(*, shard_start: int, shard_width: int, vocab_size: int) -> int:
    """How many of the columns [shard_start, shard_start + shard_width) are real tokens;
    the rest is padding.
    """
    return max(0, min(shard_width, vocab_size - shard_start))


def soft_cap(logits: torch.Tensor, cap: float | None, *, in_place: bool = False) -> torch.Tensor:
    """cap * tanh(logits / cap), the final soft-cap of families such as Gemma-2; the identity for None."""
    if cap is None:
        return logits
    if in_place:
        return logits.div_(cap).tanh_().mul_(cap)
    return cap * torch.tanh(logits / cap)


def row_maxima(scores: torch.Tensor) -> torch.Tensor:
    """[n, w] -> [n]: the maximum of each row; -inf where this rank has no column (w = 0)."""
    if scores.shape[1] == 0:
        return scores.new_full((scores.shape[0],), NEGATIVE_INFINITY)
    return scores.amax(dim=1)


def finite_reference(maxima: torch.Tensor) -> torch.Tensor:
    """The maxima, or 0 where a row has none: `x - reference` is then -inf and not nan for an empty row.

    nan and +inf pass: they must reach the loss.
    """
    return torch.where(maxima == NEGATIVE_INFINITY, torch.zeros_like(maxima), maxima)


def in_place(rows: list[int]) -> slice | None:
    """The rows as a slice, which selects a view, if they are consecutive; else None."""
    first = rows[0] if rows else 0
    return slice(first, first + len(rows)) if rows == list(range(first, first + len(rows))) else None


def reduce_packed(
    values: list[torch.Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """All-reduce several vectors as one message.

    Every rank passes the same shapes; `group=None` sends nothing.
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    packed = torch.cat(values)
    dist.all_reduce(packed, op=op, group=group)
    return list(packed.split([value.numel() for value in values]))


class OnlineLogSumExp:
    """log sum e^x of each row over columns that come a tile at a time: the maximum, and the
    sum relative to it.
    """

    def __init__(self, num_rows: int, *, like: torch.Tensor) -> None:
        self.maxima = like.new_full((num_rows,), NEGATIVE_INFINITY)
        self.sums = like.new_zeros(num_rows)

    def shrink_to(self, maxima: torch.Tensor) -> torch.Tensor:
        """Make the sums relative to larger or equal maxima, such as those of all ranks;
        returns the factor.
        """
        shrink = (self.maxima - maxima).exp()
        self.sums *= shrink
        return shrink


def add_exponentials_(
    tile: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a tile [n, w] to the state [n] of its rows in OnlineLogSumExp. Returns e^(tile - maxima), a new
    tensor, and what older sums shrank by."""
    larger = torch.maximum(maxima, row_maxima(tile))
    reference = finite_reference(larger)
    # Older sums are relative to the old maximum: multiplied by e^(old - new) they are relative to the new.
    shrink = (maxima - reference).exp()
    exponentials = (tile - reference.unsqueeze(1)).exp_()
    sums.mul_(shrink).add_(exponentials.sum(1))
    maxima.copy_(larger)
    return exponentials, shrink


def add_labels_(
    tile: torch.Tensor,
    labels: torch.Tensor,
    left: int,
    cap: float | None,
    own: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """A body: LabelSums.add for its state [n] of the tile's rows, [n, w] of any type and before the cap."""
    tile = soft_cap(tile.to(own.dtype), cap, in_place=tile.dtype != own.dtype)  # a new one if converted
    own.add_(own_logits(tile, labels, left))
    add_exponentials_(tile, maxima, sums)


def own_logits(logits: torch.Tensor, labels: torch.Tensor, shard_start: int) -> torch.Tensor:
    """[n, w], [n] -> [n]: each row's logit of its label, 0 where the label's column is on
    another rank (for a SUM).
    """
    if logits.shape[1] == 0:
        return logits.new_zeros(logits.shape[0])
    # A label of another rank lies outside of [0, w): clamped for the look-up, and masked behind it.
    local = labels - shard_start
    is_local = (local >= 0) & (local < logits.shape[1])
    own = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(is_local, own, torch.zeros_like(own))


def add_at_(block: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """block[i, columns[i, k]] += values[i, k] where the column is one of the block."""
    if torch.compiler.is_compiling():
        for k in range(columns.shape[1]):
            at_column = bodies.is_column(block, columns[:, k])
            block.add_(torch.where(at_column, values[:, k : k + 1], 0).to(block.dtype))
        return
    # Columns outside of the block add 0 to the nearest column in it.
    is_local = (columns >= 0) & (columns < block.shape[1])
    block.scatter_add_(
        1, columns.clamp(0, block.shape[1] - 1), torch.where(is_local, values, 0).to(block.dtype)
    )


@torch.no_grad()
def label_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    shard_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    logit_softcap: float | None = None,
    row_chunk: int = LABEL_STATISTICS_ROWS,
    column_chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's logit and its row's log-sum-exp over the real vocabulary, without keeping the
    logits. No gradient.

    hidden [n, H], equal on every rank; weight [W, H], this rank's rows of the output layer from id
    `shard_start` on; labels [n], ids below `vocab_size`. Returns (own_logit [n], lse [n]), float32 (float64
    for float64 inputs), after the soft-cap, equal on every rank; own_logit - lse is the label's
    log-probability in nats.

    At most row_chunk x column_chunk logits exist at a time: the maximum and the sum of a row are carried from
    one tile of columns to the next. column_chunk: None for what suits the device. Between ranks go 12 bytes a
    row.
    """
    if column_chunk is None:
        on_cpu = bodies.by_blocks(hidden.device)
        column_chunk = LABEL_STATISTICS_COLUMNS if on_cpu else LABEL_STATISTICS_COLUMNS_GPU
    like = torch.empty(0, dtype=statistics_dtype(hidden), device=hidden.device)
    sums = LabelSums(labels - shard_start, like=like)
    width = num_real_columns(shard_start=shard_start, shard_width=weight.shape[0], vocab_size=vocab_size)
    for top in range(0, hidden.shape[0], row_chunk):
        rows = slice(top, min(top + row_chunk, hidden.shape[0]))
        for left in range(0, width, column_chunk):
            tile = linear(hidden[rows], weight[left : min(left + column_chunk, width)])
            sums.add(tile, rows, left, cap=logit_softcap)
    return sums.over_ranks(group)


@torch.no_grad()
def logit_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    shard_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`label_statistics` from logits [n, W] that exist, before any soft-cap: some rows at a time."""
    like = torch.empty(0, dtype=statistics_dtype(logits), device=logits.device)
    sums = LabelSums(labels - shard_start, like=like)
    width = num_real_columns(shard_start=shard_start, shard_width=logits.shape[1], vocab_size=vocab_size)
    height = ROWS_OF_LOGITS if bodies.by_blocks(logits.device) else ROWS_OF_LOGITS_GPU
    for top in range(0, logits.shape[0] if width else 0, height):
        rows = slice(top, min(top + height, logits.shape[0]))
        sums.add(logits[rows, :width], rows, 0, cap=logit_softcap)
    return sums.over_ranks(group)


class LabelSums:
    """Each row's label, and the log-sum-exp of the row, over the tiles seen so far."""

    def __init__(self, labels: torch.Tensor, *, like: torch.Tensor) -> None:
        """labels int64 [n]: local columns; those of other ranks lie outside of this rank's."""
        self._labels = labels
        self.own = like.new_zeros(len(labels))
        self.exponentials = OnlineLogSumExp(len(labels), like=like)

    def at(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """Labels of a slice of the rows, and views of their logits, maxima and sums."""
        return (
            self._labels[rows],
            self.own[rows],
            self.exponentials.maxima[rows],
            self.exponentials.sums[rows],
        )

    def add(self, tile: torch.Tensor, rows: slice, left: int, *, cap: float | None = None) -> None:
        """tile [rows, w]: this rank's columns from `left` on, of any type and before the cap."""
        labels, *state = self.at(rows)
        bodies.body(add_labels_, tile.device)(tile, labels, left, cap, *state)

    def over_ranks(self, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(own_logit, lse), equal on every rank: one MAX and one SUM."""
        (maxima,) = reduce_packed([self.exponentials.maxima], dist.ReduceOp.MAX, group)
        reference = finite_reference(maxima)
        self.exponentials.shrink_to(reference)
        sums, own = reduce_packed([self.exponentials.sums, self.own], dist.ReduceOp.SUM, group)
        return own, reference + sums.log()


class _CopyToGroup(torch.autograd.Function):
    """The identity forward, the sum over the group backward: how a replicated tensor enters
    column-parallel work.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.group is None or dist.get_world_size(ctx.group) == 1:
            return gradient, None
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=ctx.group)
        return total, None


def copy_to_group(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`tensor`, equal on every rank of the group, for use with each rank's own columns; its
    gradient is summed.
    """
    return _CopyToGroup.apply(tensor, group)
