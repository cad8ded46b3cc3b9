"""The student's logits, a tile of columns at a time, and the way back of their gradient.

A loss over a vocabulary of 10^5 columns needs no more than a few thousand of them at once. It reads them from
a source and hands the gradient of a tile back to it:

    GivenLogits     the logits exist as a tensor; so does their gradient
    OutputLayer     the logits are hidden @ weight^T, made for a tile and dropped; the gradient of a tile adds
                    gradient @ weight_tile to that of `hidden` and gradient^T @ hidden to that of `weight`

A loss written against this seam is one code for both. How it is used:

    source = OutputLayer(hidden, weight, ...)
    with torch.no_grad():
        ... source.logits(start, end) ...                       as often as needed
        if source.needs_gradient:
            ... source.add_gradient(start, end, gradient) ...   of the loss's sum, in the forward pass
    return source.attach(value)                                 differentiable

The gradient is formed in the forward pass because its scale is known there (the loss is a sum) and because
the tiles are at hand. Backward multiplies it by the incoming scalar, in place: a second backward pass is an
error of autograd.

Where Megatron's DistributedDataParallel owns the weight, its gradient goes straight to `weight.main_grad`, as
in Megatron's fused linear layer (tensor_parallel/layers.py): no second tensor of that size exists. Sums
commute, so it does not matter that the schedule runs a micro-batch's forward pass ahead of another's
backward; overlapped reduction starts in the last micro-batch's backward pass, after all forward passes. What
is added cannot be scaled later, so backward insists on a scale of 1, and every forward pass with gradients
must be followed by its backward pass. Backward marks `weight.grad_added_to_main_grad` and returns a gradient
of the right shape, so that DDP's hook counts the weight as ready: zeros, which a tied embedding's own
gradient may be added to.

Logits are float32, or float64 for float64 inputs, and capped where the model caps them. Only real columns are
read: a source knows where padding starts.

Shapes: `n` rows, `H` hidden size, `W` this rank's columns (padding included), `w` columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY, in_place, soft_cap, statistics_dtype

ALL_ROWS = slice(None)
TOP_COLUMNS = 4096
"""Columns of a tile of `top_k_log_probs`."""


class GivenLogits:
    """Logits that exist as a tensor."""

    rows_first = True
    """Whether tiles are some rows of all columns: nothing is computed, and reading follows the memory."""

    def __init__(
        self,
        logits: torch.Tensor,
        *,
        num_columns: int,
        soft_cap: float | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """logits [n, W] before the soft-cap; the first `num_columns` columns are real.

        order [n], a permutation: row i of this source is row order[i] of `logits`; None is the identity. Rows
        that are requested by a slice must be consecutive in `logits` too: `runs` returns such slices.
        """
        self.num_rows, self.num_columns = logits.shape[0], num_columns
        self.dtype = statistics_dtype(logits)
        self.device = logits.device
        self.soft_cap = soft_cap
        self.needs_gradient = torch.is_grad_enabled() and logits.requires_grad
        self._input = logits
        self._logits = logits.detach()
        self._order = order
        self._positions = list(range(self.num_rows)) if order is None else order.tolist()
        self._gradient = (
            torch.zeros_like(self._logits, memory_format=torch.contiguous_format)
            if self.needs_gradient
            else None
        )

    def runs(self) -> list[slice]:
        """All rows, as slices that are consecutive in memory."""
        if self.num_rows == 0:
            return []
        # A run ends where the next row of this source is not the next row in memory.
        borders = [i for i in range(1, self.num_rows) if self._positions[i] != self._positions[i - 1] + 1]
        return [slice(*ends) for ends in zip([0, *borders], [*borders, self.num_rows], strict=True)]

    def logits(self, start: int, end: int, rows: slice = ALL_ROWS) -> torch.Tensor:
        """[n, end - start], a new tensor: the capped logits of local columns [start, end) at
        a slice of the rows.
        """
        tile = self._logits[self._memory_slice(rows), start:end].to(self.dtype, copy=True)
        return soft_cap(tile, self.soft_cap, in_place=True)

    def read(self, start: int, end: int, rows: slice = ALL_ROWS) -> torch.Tensor:
        """`logits` as they are, in the source's own type and before the cap; not to be overwritten."""
        return self._logits[self._memory_slice(rows), start:end]

    def logits_at(self, columns: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
        """[n, w], a new tensor: the capped logits of local columns `columns` int64 [w]."""
        logits = self._logits[self._memory_slice(rows)]
        tile = logits.gather(1, columns.expand(len(logits), -1)).to(self.dtype)
        return soft_cap(tile, self.soft_cap, in_place=True)

    def add_gradient(self, start: int, end: int, gradient: torch.Tensor, rows: slice = ALL_ROWS) -> None:
        """Add [n, end - start], the gradient with respect to the capped logits of `logits(start, end, rows)`.

        `gradient` may be overwritten.
        """
        if self.soft_cap is not None:
            gradient = _through_cap_(gradient, self.logits(start, end, rows), self.soft_cap)
        assert self._gradient is not None, "the logits need no gradient"
        self._gradient[self._memory_slice(rows), start:end] += gradient.to(self._gradient.dtype)

    def add_gradient_at(self, columns: torch.Tensor, gradient: torch.Tensor, rows: slice = ALL_ROWS) -> None:
        """Take [n, w], the gradient with respect to `logits_at(columns, rows)`: the first
        that these entries get.
        """
        if self.soft_cap is not None:
            gradient = _through_cap_(gradient, self.logits_at(columns, rows), self.soft_cap)
        assert self._gradient is not None, "the logits need no gradient"
        target = self._gradient[self._memory_slice(rows)]
        target.scatter_(1, columns.expand(len(gradient), -1), gradient.to(target.dtype))

    def add_gradient_of_entries(
        self, columns: torch.Tensor, gradient: torch.Tensor, rows: slice = ALL_ROWS
    ) -> None:
        """Add [n, k], the gradient with respect to the capped logits at local columns int64 [n, k], each row
        its own.

        Entries with gradient 0 may name any real column.
        """
        order = torch.arange(self.num_rows, device=self.device) if self._order is None else self._order
        # [n, 1] rows in memory beside [n, k] columns: entry (i, j) is column columns[i, j] of row i.
        index = (order[rows].unsqueeze(1), columns)
        if self.soft_cap is not None:
            capped = soft_cap(self._logits[index].to(self.dtype), self.soft_cap)
            gradient = _through_cap_(gradient, capped, self.soft_cap)
        assert self._gradient is not None, "the logits need no gradient"
        self._gradient.index_put_(index, gradient.to(self._gradient.dtype), accumulate=True)

    def attach(self, value: torch.Tensor) -> torch.Tensor:
        """`value`, differentiable with the gradient that was added; `value` itself where none is needed."""
        if not self.needs_gradient:
            return value
        return _KnownGradient.apply(value, self._gradient, self._input)

    def _memory_slice(self, rows: slice) -> slice:
        """The slice of `logits` that holds these rows."""
        place = in_place(self._positions[rows])
        assert place is not None, f"rows {rows} do not follow one another in memory"
        return place


class OutputLayer:
    """Logits of an output layer, made for a tile at a time."""

    rows_first = False
    """Tiles are all rows of some columns: products of few rows are slow."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        *,
        num_columns: int,
        soft_cap: float | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """hidden [n, H], weight [W, H]; the first `num_columns` rows of the weight are real.

        order [n], a permutation: row i of this source is row order[i] of `hidden`; None is the identity.
        The gradient of `hidden` is that of this rank's columns: the caller sums it over tensor-parallel
        ranks (`copy_to_group`).
        """
        self.num_rows, self.num_columns = hidden.shape[0], num_columns
        self.dtype = statistics_dtype(hidden)
        self.device = hidden.device
        self.soft_cap = soft_cap
        enabled = torch.is_grad_enabled()
        self._inputs = (hidden, weight)
        self._order = order
        self._hidden = hidden.detach() if order is None else hidden.detach().index_select(0, order)
        self._weight = weight.detach()
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hidden_gradient: torch.Tensor | None = None
        self._weight_gradient: torch.Tensor | None = None
        self._in_main_grad = False
        if enabled and hidden.requires_grad:
            self._hidden_gradient = torch.zeros_like(self._hidden, dtype=self.dtype)
        if enabled and weight.requires_grad:
            # Megatron's DDP gives each parameter a gradient buffer, main_grad, and this mark.
            self._in_main_grad = weight.is_leaf and hasattr(weight, "grad_added_to_main_grad")
            if self._in_main_grad:
                self._weight_gradient = weight.main_grad  # type: ignore[attr-defined]  # of Megatron's DDP
            else:
                self._weight_gradient = torch.zeros_like(self._weight)
        self.needs_gradient = self._hidden_gradient is not None or self._weight_gradient is not None

    def runs(self) -> list[slice]:
        """See GivenLogits.runs: one, the rows were put in order."""
        return [slice(0, self.num_rows)] if self.num_rows else []

    def logits(self, start: int, end: int, rows: slice = ALL_ROWS) -> torch.Tensor:
        """See GivenLogits.logits."""
        return self._tile(self._weight[start:end], rows)

    def read(self, start: int, end: int, rows: slice = ALL_ROWS) -> torch.Tensor:
        """See GivenLogits.read."""
        return linear(self._hidden[rows], self._weight[start:end])

    def logits_at(self, columns: torch.Tensor, rows: slice = ALL_ROWS) -> torch.Tensor:
        """See GivenLogits.logits_at."""
        return self._tile(self._rows_at(columns), rows)

    def add_gradient(self, start: int, end: int, gradient: torch.Tensor, rows: slice = ALL_ROWS) -> None:
        """See GivenLogits.add_gradient."""
        weight = self._weight[start:end]
        gradient = self._add_to_hidden(weight, gradient, rows)
        if self._weight_gradient is not None:
            # dL/dW of the tile's rows is gradient^T hidden; in one operation if the types agree.
            target = self._weight_gradient[start:end]
            if target.dtype == gradient.dtype:
                target.addmm_(gradient.t(), self._hidden[rows])
            else:
                target += gradient.t() @ self._hidden[rows]

    def add_gradient_at(self, columns: torch.Tensor, gradient: torch.Tensor, rows: slice = ALL_ROWS) -> None:
        """See GivenLogits.add_gradient_at."""
        gradient = self._add_to_hidden(self._rows_at(columns), gradient, rows)
        if self._weight_gradient is not None:
            of_rows = gradient.t() @ self._hidden[rows]
            self._weight_gradient.index_add_(0, columns, of_rows.to(self._weight_gradient.dtype))

    def add_gradient_of_entries(
        self, columns: torch.Tensor, gradient: torch.Tensor, rows: slice = ALL_ROWS
    ) -> None:
        """See GivenLogits.add_gradient_of_entries."""
        hidden = self._hidden[rows]
        for k in range(columns.shape[1]):  # one [n, H] at a time
            weight, value = self._weight.index_select(0, columns[:, k]), gradient[:, k : k + 1]
            if self.soft_cap is not None:
                logits = (hidden.to(self.dtype) * weight.to(self.dtype)).sum(1, keepdim=True)
                value = _through_cap_(value.clone(), soft_cap(logits, self.soft_cap), self.soft_cap)
            if self._hidden_gradient is not None:
                self._hidden_gradient[rows] += value * weight
            if self._weight_gradient is not None:
                self._weight_gradient.index_add_(
                    0, columns[:, k], (value * hidden).to(self._weight_gradient.dtype)
                )

    def attach(self, value: torch.Tensor) -> torch.Tensor:
        """See GivenLogits.attach."""
        if not self.needs_gradient:
            return value
        hidden, weight = self._inputs
        of_hidden = self._hidden_gradient
        if of_hidden is not None:
            if self._order is not None:
                # Back from this source's order to the caller's: row i of the source is row order[i] of
                # `hidden`.
                of_hidden = torch.empty_like(of_hidden).index_copy_(0, self._order, of_hidden)
            of_hidden = of_hidden.to(hidden.dtype)
        if self._in_main_grad:
            return _KnownGradientInMainGrad.apply(value, of_hidden, hidden, weight)
        return _KnownGradients.apply(value, of_hidden, self._weight_gradient, hidden, weight)

    def _tile(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return soft_cap(linear(self._hidden[rows], weight).to(self.dtype), self.soft_cap, in_place=True)

    def _rows_at(self, columns: torch.Tensor) -> torch.Tensor:
        """The weight rows of a gathered tile; kept until another tile is asked for, as each is
        read several times.
        """
        if self._gathered is None or self._gathered[0] is not columns:
            self._gathered = (columns, self._weight.index_select(0, columns))
        return self._gathered[1]

    def _add_to_hidden(self, weight: torch.Tensor, gradient: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add a tile's part to the hidden states' gradient; returns the gradient of the
        logits before the cap.
        """
        if self.soft_cap is not None:
            gradient = _through_cap_(gradient, self._tile(weight, rows), self.soft_cap)
        gradient = gradient.to(self._hidden.dtype)
        if self._hidden_gradient is not None:
            target = self._hidden_gradient[rows]
            if target.dtype == gradient.dtype:
                target.addmm_(gradient, weight)
            else:
                target += gradient @ weight
        return gradient


StudentLogits = GivenLogits | OutputLayer


@torch.no_grad()
def top_k_log_probs(
    source: StudentLogits,
    lse: torch.Tensor,
    k: int,
    *,
    vocab_size: int,
    shard_start: int,
    group: dist.ProcessGroup | None,
    ids: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[n, min(k, vocab_size)], descending: log-probabilities of each row's likeliest tokens, and with `ids`
    which they are, int64. No gradient.

    lse [n] is over the whole vocabulary of `vocab_size` real tokens; `source` is this rank's, from
    shard_start on. Between ranks go k numbers a row from each, with `ids` k more.
    """
    k = min(k, vocab_size)
    best = torch.full((source.num_rows, k), NEGATIVE_INFINITY, dtype=source.dtype, device=source.device)
    names = torch.zeros(best.shape, dtype=torch.int64, device=source.device)
    for start in range(0, source.num_columns, TOP_COLUMNS):
        end = min(start + TOP_COLUMNS, source.num_columns)
        # The k best so far compete with the tile; `chosen` indexes both, one behind the other.
        best, chosen = torch.cat([best, source.logits(start, end)], dim=1).topk(k, dim=1)
        if ids:
            of_tile = torch.arange(start, end, device=names.device) + shard_start
            names = torch.cat([names, of_tile.expand(len(names), -1)], dim=1).gather(1, chosen)
    if group is not None and dist.get_world_size(group) > 1:
        # The k best of all columns are among the k best of each rank.
        best, chosen = _gathered(best, group).topk(k, dim=1)
        names = _gathered(names, group).gather(1, chosen) if ids else names
    return best - lse.unsqueeze(1), names if ids else None


def _gathered(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, k] -> [n, k ranks]"""
    everybody = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, values, group=group)
    return torch.cat(everybody, dim=1)


def _through_cap_(gradient: torch.Tensor, capped: torch.Tensor, cap: float) -> torch.Tensor:
    """d(cap tanh(z / cap)) / dz = 1 - tanh^2."""
    return gradient.mul_(capped.div_(cap).square_().neg_().add_(1))


class _KnownGradient(torch.autograd.Function):
    """`value` as a function of `logits` whose gradient is `gradient`."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient.mul_(scale.to(gradient.dtype))


class _KnownGradients(torch.autograd.Function):
    """`value` as a function of hidden states and an output weight with known gradients;
    None if not needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        of_hidden: torch.Tensor | None,
        of_weight: torch.Tensor | None,
        hidden: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(of_hidden, of_weight)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if saved is None else saved.mul_(scale.to(saved.dtype)) for saved in ctx.saved_tensors]
        return None, None, None, *scaled


_ZEROS: dict[tuple[torch.Size, torch.dtype, torch.device], torch.Tensor] = {}


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    """Zeros of the weight's shape, in the same memory at each call. Nobody writes to it: autograd adds to
    what no one else holds, and DDP's hook takes it from `weight.grad`."""
    key = (weight.shape, weight.dtype, weight.device)
    if key not in _ZEROS:
        _ZEROS[key] = torch.zeros_like(weight, requires_grad=False)
    return _ZEROS[key].detach()


class _KnownGradientInMainGrad(torch.autograd.Function):
    """As _KnownGradients, for a weight whose gradient is in main_grad already."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        of_hidden: torch.Tensor | None,
        hidden: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(of_hidden)
        ctx.weight = weight
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        torch._assert_async(
            (scale == 1).all(),
            "the loss's sum must reach backward with gradient 1: the weight's gradient is in main_grad "
            "already, so no loss scale can be applied to it; the one division happens in "
            "finalize_model_grads",
        )
        (of_hidden,) = ctx.saved_tensors
        ctx.weight.grad_added_to_main_grad = True
        return None, None, of_hidden, _zeros(ctx.weight)
