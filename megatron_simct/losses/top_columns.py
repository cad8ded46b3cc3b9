"""The student's k likeliest columns of every row, over all ranks: the passes of interfaces that
compare only these.

Pass 1 keeps the k largest scores of each shared row among this rank's columns while tiles go by, and the
log-sum-exp of every row; the ranks exchange 2 k numbers a row. Pass 2 makes tiles again only for dense
rows (two_pass.py).

Shapes: as in two_pass.py, and `k` top columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.losses.rows import Statistics
from megatron_simct.losses.two_pass import GradientWeights, Tiles, common, relative
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    LabelSums,
    add_at_,
    finite_reference,
    reduce_packed,
    soft_cap,
)


class TopColumns(Tiles):
    """Without a teacher, the columns are all of the student's; with one, the shared ones."""

    def __init__(self, *given: Any, k: int, **named: Any) -> None:
        super().__init__(*given, **named)
        like = self._empty
        self._scores = like.new_full((self._plan.num_shared, k), NEGATIVE_INFINITY)
        self._teacher_scores = torch.zeros_like(self._scores)
        self._local = torch.zeros(self._scores.shape, dtype=torch.int64, device=like.device)
        """Local columns; after `statistics` those of the result, 0 where they are another rank's."""
        self._is_local = torch.zeros_like(self._local, dtype=torch.bool)

    def statistics(self) -> Statistics:
        """Pass 1: one MAX and one SUM reduction, and one all-gather."""
        seen = LabelSums(self._labels, like=self._empty)
        for chunk, start, end in self._tiles():
            logits = self._source.read(start, end, chunk)
            teacher, index = self._teacher_tile(chunk, start, end)
            for rows in self._blocks(chunk.start, chunk.stop, end - start):
                block = logits[relative(rows, chunk)]
                seen.add(block, rows, start, cap=self._source.soft_cap)
                shared = common(rows, slice(0, self._plan.num_shared))
                if shared is None:
                    continue
                block = block[: shared.stop - shared.start].to(self._source.dtype)
                block = soft_cap(block, self._source.soft_cap)
                if self._teacher is None:
                    self._keep(block, None, torch.arange(start, end, device=block.device), shared)
                elif teacher is not None and index is not None:
                    t = teacher[relative(shared, chunk)]
                    self._keep(block.gather(1, index.expand(len(block), -1)), t, index + start, shared)
        (label_max,) = reduce_packed([seen.exponentials.maxima], dist.ReduceOp.MAX, self._group)
        label_max = finite_reference(label_max)
        seen.exponentials.shrink_to(label_max)
        label_sum, own = reduce_packed([seen.exponentials.sums, seen.own], dist.ReduceOp.SUM, self._group)
        student, teacher = self._over_ranks()
        compared = teacher.masked_fill(student == NEGATIVE_INFINITY, NEGATIVE_INFINITY)
        return self._statistics(
            label_max,
            label_sum,
            own,
            same_top=compared.argmax(dim=1) == 0,
            top_student=student,
            top_teacher=teacher,
        )

    def _keep(
        self, student: torch.Tensor, teacher: torch.Tensor | None, columns: torch.Tensor, rows: slice
    ) -> None:
        """The largest of those so far and the scores [rows, c] of local columns int64 [c]."""
        k = self._scores.shape[1]
        # The k best so far compete with the tile; `chosen` indexes both, one behind the other.
        values, chosen = torch.cat([self._scores[rows], student], dim=1).topk(k, dim=1)
        columns = torch.cat([self._local[rows], columns.expand(len(student), -1)], dim=1)
        self._scores[rows], self._local[rows] = values, columns.gather(1, chosen)
        if teacher is not None:
            self._teacher_scores[rows] = torch.cat([self._teacher_scores[rows], teacher], dim=1).gather(
                1, chosen
            )

    def _over_ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[A, k] each, student and teacher: the k largest of all ranks'."""
        k, rank, group = self._scores.shape[1], 0, self._group
        student, teacher = self._scores, self._teacher_scores
        if group is not None:
            rank = dist.get_rank(group)
            both = torch.stack([student, teacher])
            # Both models' scores of every rank's k best columns, side by side: entry r k + i is rank r's
            # i-th.
            everybody = [torch.empty_like(both) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everybody, both, group=group)
            student, teacher = torch.cat(everybody, dim=2).unbind(0)
        values, chosen = student.topk(k, dim=1)
        self._is_local = (chosen // k == rank) & (values > NEGATIVE_INFINITY)
        # Where the result is this rank's column, its number here; 0, which is masked, elsewhere.
        self._local = torch.where(
            self._is_local, self._local.gather(1, torch.where(self._is_local, chosen % k, 0)), 0
        )
        return values, teacher.gather(1, chosen)

    def add_gradient(self, statistics: Statistics, weights: GradientWeights) -> None:
        """Pass 2: hand the gradient to the source."""
        source, plan, top_weight = self._source, self._plan, weights.top_weight
        assert top_weight is not None, "top columns have a gradient"
        top_weight = torch.where(self._is_local, top_weight, 0)
        own, label_max = weights.own_weight[plan.order], statistics.label_max[plan.order]
        # softmax(z) = e^(z - label_max) / e^(label_log_sum): the division is part of the weight of a row.
        softmax = (weights.softmax_weight * (-statistics.label_log_sum).exp())[plan.order]
        for chunk, start, end in self._tiles():
            dense = common(chunk, plan.dense)
            if dense is None:
                continue
            logits = source.logits(start, end, dense)
            for rows in self._blocks(dense.start, dense.stop, end - start):
                block = logits[relative(rows, dense)]
                block.sub_(label_max[rows].unsqueeze(1)).exp_().mul_(softmax[rows].unsqueeze(1))
                add_at_(block, self._labels[rows].unsqueeze(1) - start, own[rows].unsqueeze(1))
                shared = common(rows, slice(0, plan.num_shared))
                if shared is not None:
                    # -1 lies outside of every tile: columns of other ranks add nothing.
                    columns = torch.where(self._is_local[shared], self._local[shared] - start, -1)
                    add_at_(block[: shared.stop - shared.start], columns, top_weight[shared])
            source.add_gradient(start, end, logits, dense)
        if plan.num_sparse:
            source.add_gradient_of_entries(self._local[self._sparse], top_weight[self._sparse], self._sparse)
