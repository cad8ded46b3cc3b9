"""Single columns of single rows: the passes of interfaces that compare a list of (label, token) pairs.

Pass 1 reads the student's logit of every entry beside the log-sum-exp of every row; the ranks exchange one
number an entry. Pass 2 is the softmax of the dense rows (two_pass.py), and the entries' own gradient.

Shapes: as in two_pass.py, and `E` entries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.losses.rows import Statistics
from megatron_simct.losses.two_pass import GradientWeights, Tiles, common, relative
from megatron_simct.losses.vocab_parallel import LabelSums, add_at_, finite_reference, reduce_packed, soft_cap
from megatron_simct.records import EntryBatch


class Entries(Tiles):
    """The logits of an EntryBatch; every row that has an entry is a dense one."""

    def __init__(self, *given: Any, entries: EntryBatch, **named: Any) -> None:
        super().__init__(*given, **named)
        order = self._plan.order
        # place: the inverse of the plan's order, from a label to its row in it.
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        self._rows, self._columns_of = place[entries.label], entries.column - self._shard_start

    def _within(self, rows: slice, start: int, end: int) -> tuple[torch.Tensor, ...]:
        """Which entries [E] are in these rows and columns, and their place in the block, of others any."""
        row, column = self._rows, self._columns_of
        is_local = (row >= rows.start) & (row < rows.stop) & (column >= start) & (column < end)
        return is_local, torch.where(is_local, row - rows.start, 0), torch.where(is_local, column - start, 0)

    def statistics(self) -> Statistics:
        """Pass 1: one MAX and one SUM reduction."""
        seen = LabelSums(self._labels, like=self._empty)
        values = self._empty.new_zeros(len(self._rows))
        for chunk, start, end in self._tiles():
            logits = self._source.read(start, end, chunk)
            is_local, row, column = self._within(chunk, start, end)
            # An entry lies in one tile of one rank; the others keep 0, so a SUM joins them.
            found = soft_cap(logits[row, column].to(values.dtype), self._source.soft_cap)
            values = torch.where(is_local, found, values)
            for rows in self._blocks(chunk.start, chunk.stop, end - start):
                seen.add(logits[relative(rows, chunk)], rows, start, cap=self._source.soft_cap)
        (label_max,) = reduce_packed([seen.exponentials.maxima], dist.ReduceOp.MAX, self._group)
        label_max = finite_reference(label_max)
        seen.exponentials.shrink_to(label_max)
        label_sum, own, values = reduce_packed(
            [seen.exponentials.sums, seen.own, values], dist.ReduceOp.SUM, self._group
        )
        return self._statistics(label_max, label_sum, own, entries=values)

    def add_gradient(self, statistics: Statistics, weights: GradientWeights) -> None:
        """Pass 2: hand the gradient to the source."""
        source, plan = self._source, self._plan
        assert weights.entry_weight is not None, "entries have a gradient"
        own, label_max = weights.own_weight[plan.order], statistics.label_max[plan.order]
        softmax = (weights.softmax_weight * (-statistics.label_log_sum).exp())[plan.order]
        for chunk, start, end in self._tiles():
            dense = common(chunk, plan.dense)
            if dense is None:
                continue
            logits = source.logits(start, end, dense)
            # softmax_weight softmax(z), then own_weight at the label, then each entry's own gradient.
            logits.sub_(label_max[dense].unsqueeze(1)).exp_().mul_(softmax[dense].unsqueeze(1))
            add_at_(logits, self._labels[dense].unsqueeze(1) - start, own[dense].unsqueeze(1))
            is_local, row, column = self._within(dense, start, end)
            entry_weight = torch.where(is_local, weights.entry_weight, 0)
            logits.index_put_((row, column), entry_weight, accumulate=True)
            source.add_gradient(start, end, logits, dense)
