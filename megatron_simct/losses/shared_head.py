"""The frozen teacher's output rows of the shared tokens, on the rank that owns their student column.

The student's output layer is split by vocabulary, and shared token i has its student id on one rank and its
teacher id anywhere. The teacher's head is frozen, so where its rows lie is ours to choose: next to the
student's columns. Both scores of a shared token are then local, and the loss exchanges a few numbers a row
instead of logits.

`gather_shared_head` brings the rows there: every rank asks the owners of the rows it wants, and only those
rows move. No rank ever holds the whole head.

Shapes: `c` shared tokens of this rank, `r` teacher rows of this rank (r > c if the stop token is here and the
teacher has several), `W_T` this rank's slice of the teacher's vocabulary, `H_T` its hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.losses.vocab_parallel import in_place, soft_cap


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedColumns:
    """The index tensors of one VocabPlacement, on a device."""

    student: torch.Tensor
    """int64 [c], ascending: local student column of each shared token."""
    position: torch.Tensor
    """int64 [W]: the inverse: which shared token a local student column is, or -1."""
    first_row: torch.Tensor
    """int64 [c]: the first teacher row of each shared token."""
    several_rows: torch.Tensor
    """int64 [q, k]: all rows of the q shared tokens that have several, filled up with the first one."""
    several_filled: torch.Tensor
    """bool [q, k]: which entries of `several_rows` only fill up."""
    columns: np.ndarray
    """int64 [c]: `student` on the host, where tiles are cut."""
    row_offsets: np.ndarray
    """int64 [c + 1]: the teacher rows of shared token i are [row_offsets[i], row_offsets[i + 1])."""
    several: np.ndarray
    """int64 [q], ascending: the shared tokens that have several teacher rows."""

    @staticmethod
    def from_placement(placement: VocabPlacement, device: torch.device | str = "cpu") -> SharedColumns:
        """Raises ValueError if the CSR is not one (a column without a teacher row, or offsets that do not
        fit), and for columns that do not ascend (a token shared twice) or are not real tokens."""
        offsets, width = placement.row_offsets, placement.shard_end - placement.shard_start
        counts = np.diff(offsets)
        num_columns, num_rows = len(placement.columns), len(placement.teacher_rows)
        if (
            len(offsets) != num_columns + 1
            or offsets[0] != 0
            or offsets[-1] != num_rows
            or (counts < 1).any()
        ):
            raise ValueError(
                f"the placement's row_offsets must rise from 0 to {num_rows} teacher rows in {num_columns} "
                f"steps of at least one row; got {len(offsets)} offsets from {offsets[0]} to {offsets[-1]}, "
                f"smallest step {counts.min(initial=1)}"
            )
        real_end = min(placement.student_vocab_size, placement.shard_end) - placement.shard_start
        if num_columns and not 0 <= placement.columns.min() <= placement.columns.max() < real_end:
            raise ValueError(
                f"shared columns must be real tokens of this shard, in [0, {real_end}); "
                f"got {placement.columns.min()} to {placement.columns.max()}"
            )
        wrong = np.flatnonzero(np.diff(placement.columns) <= 0)
        if len(wrong):
            one, two = placement.columns[wrong[0]], placement.columns[wrong[0] + 1]
            raise ValueError(
                f"shared columns must ascend, each student token once: {two} follows {one} at place "
                f"{wrong[0] + 1}"
            )
        # position is the inverse of `columns`: local student column -> shared token.
        position = np.full(width, -1, dtype=np.int64)
        position[placement.columns] = np.arange(num_columns)
        several = np.flatnonzero(counts > 1)
        # Tokens with several rows (the stop token) as a rectangle [q, k]: row numbers offset + 0, 1, ..., and
        # the first one again where a token has fewer than k.
        step = np.arange(counts[several].max(initial=1))[None, :]
        filled = step >= counts[several][:, None]
        several_rows = offsets[several][:, None] + np.where(filled, 0, step)

        def index(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

        return SharedColumns(
            student=index(placement.columns),
            position=index(position),
            first_row=index(offsets[:-1]),
            several_rows=index(several_rows),
            several_filled=torch.from_numpy(filled).to(device),
            columns=np.asarray(placement.columns),
            row_offsets=np.asarray(offsets),
            several=several,
        )

    def within(self, start: int, end: int) -> tuple[int, int]:
        """The shared tokens [first, last) whose local student columns lie in [start, end)."""
        first, last = np.searchsorted(self.columns, [start, end])
        return int(first), int(last)

    def join(self, teacher_logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """[A, rows of the shared tokens [first, last)] -> [A, last - first]: the teacher's score of each.

        The mass of a stop set is the sum of its members' probabilities, so their scores join by log-sum-exp;
        the row's own normalizer is the same for all of them and may be subtracted before or after.
        """
        low, high = np.searchsorted(self.several, [first, last])
        if low == high:
            return teacher_logits
        # teacher_logits begins at the first row of shared token `first`: row numbers are relative to it.
        top = int(self.row_offsets[first])
        scores = teacher_logits.index_select(1, self.first_row[first:last] - top)
        rows = teacher_logits[:, self.several_rows[low:high] - top]
        joined = rows.masked_fill(self.several_filled[low:high], float("-inf")).logsumexp(dim=2)
        for i in range(low, high):
            scores[:, int(self.several[i]) - first] = joined[:, i - low]
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHead:
    """This rank's part of the teacher's output layer."""

    weight: torch.Tensor
    """[r, H_T]: row j is the teacher token VocabPlacement.teacher_rows[j]."""
    columns: SharedColumns


class HeadScores:
    """The teacher's logits of the shared tokens, made for a tile at a time from hidden states."""

    def __init__(
        self, hidden: torch.Tensor, head: SharedHead, *, soft_cap: float | None, dtype: torch.dtype
    ) -> None:
        """hidden [A, H_T]; scores are of `dtype`."""
        self._hidden = hidden.detach().to(head.weight.dtype)
        self._head, self._soft_cap, self._dtype = head, soft_cap, dtype

    def scores(self, first: int, last: int, rows: slice) -> torch.Tensor:
        """[rows, last - first], a new tensor: capped scores of the shared tokens [first, last)."""
        columns = self._head.columns
        of_head = slice(int(columns.row_offsets[first]), int(columns.row_offsets[last]))
        logits = linear(self._hidden[rows], self._head.weight[of_head]).to(self._dtype)
        return columns.join(soft_cap(logits, self._soft_cap), first, last)


class GivenScores:
    """The teacher's logits of the shared tokens, read from a tensor."""

    def __init__(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        columns: SharedColumns,
        *,
        teacher_rows: torch.Tensor | None,
        soft_cap: float | None,
        dtype: torch.dtype,
    ) -> None:
        """logits [R, X] before the soft-cap; row a of the scores is row index[a].

        teacher_rows int64 [r]: the column of `logits` of each teacher row of the placement; None: they are
        the columns.
        """
        self._logits, self._index, self._columns = logits.detach(), index, columns
        self._places = index.tolist()
        self._teacher_rows, self._soft_cap, self._dtype = teacher_rows, soft_cap, dtype

    def scores(self, first: int, last: int, rows: slice) -> torch.Tensor:
        """See HeadScores.scores."""
        low, high = int(self._columns.row_offsets[first]), int(self._columns.row_offsets[last])
        # A view if the wanted rows follow one another in memory, else a copy.
        place = in_place(self._places[rows])
        logits = self._logits.index_select(0, self._index[rows]) if place is None else self._logits[place]
        if self._teacher_rows is None:
            logits = logits[:, low:high].clone()
        else:
            logits = logits.gather(1, self._teacher_rows[low:high].expand(len(logits), -1))
        return self._columns.join(soft_cap(logits.to(self._dtype), self._soft_cap), first, last)


TeacherScores = HeadScores | GivenScores


def gather_shared_head(
    teacher_weight_shard: torch.Tensor,
    teacher_shard_start: int,
    placement: VocabPlacement,
    group: dist.ProcessGroup | None = None,
) -> SharedHead:
    """Move each wanted teacher row from the rank that owns it to the rank that owns the student's column.

    teacher_weight_shard [W_T, H_T] holds the teacher's ids from `teacher_shard_start` on; shards are
    contiguous and of equal size (W_T = padded V_T / tp, rank i starts at i * W_T) over the same group that
    splits the student's vocabulary. Collective: every rank of the group calls it once, at start-up. What
    moves is how many rows each rank asks of each other, their ids, and the rows themselves.

    Raises ValueError for a shard that does not start at rank * W_T, and for teacher ids outside
    the real vocabulary.
    """
    shard_size = teacher_weight_shard.shape[0]
    world_size = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    if teacher_shard_start != rank * shard_size:
        raise ValueError(
            f"teacher vocabulary shards must be contiguous and of equal size: rank {rank} of {world_size} "
            f"holds {shard_size} rows and must start at id {rank * shard_size}, not {teacher_shard_start}"
        )
    wanted = placement.teacher_rows
    limit = min(placement.teacher_vocab_size, world_size * shard_size)
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < limit:
        raise ValueError(
            f"teacher rows must be ids in [0, {limit}) (real vocabulary {placement.teacher_vocab_size}, "
            f"{world_size} shards of {shard_size}); got {wanted.min()} to {wanted.max()}"
        )
    device = teacher_weight_shard.device
    columns = SharedColumns.from_placement(placement, device)
    source = teacher_weight_shard.detach()
    ids = torch.from_numpy(np.ascontiguousarray(wanted, dtype=np.int64)).to(device)
    if world_size == 1:
        return SharedHead(weight=source.index_select(0, ids), columns=columns)

    # Ask: ids sorted by owner, so that what is meant for one rank is one piece.
    owner = torch.div(ids, shard_size, rounding_mode="floor")
    order = torch.argsort(owner, stable=True)
    # asked[j]: rows that this rank wants of rank j; to_answer[j]: rows that rank j wants of this one.
    asked = torch.bincount(owner, minlength=world_size)
    to_answer = torch.empty_like(asked)
    dist.all_to_all_single(to_answer, asked, group=group)
    asked_sizes, answer_sizes = asked.tolist(), to_answer.tolist()
    requests = ids.new_empty(sum(answer_sizes))
    dist.all_to_all_single(requests, ids[order], answer_sizes, asked_sizes, group=group)

    # Answer: the rows come back in the order of the sorted ids.
    answers = source.index_select(0, requests - teacher_shard_start)
    received = source.new_empty(len(ids), source.shape[1])
    dist.all_to_all_single(received, answers, asked_sizes, answer_sizes, group=group)
    # received[i] is the row of the i-th sorted id: back to the order in which they are wanted.
    weight = torch.empty_like(received)
    weight[order] = received
    return SharedHead(weight=weight, columns=columns)
