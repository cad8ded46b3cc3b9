"""Two passes over the vocabulary: statistics of every row, then the gradient. The one place that cuts tiles.

Pass 1 reads the student's logits of a tile of columns for all rows, and the teacher's scores of the tile's
shared tokens, and carries maxima and sums from tile to tile. `reduce` joins the ranks. An interface then
decides, from a few numbers a row, what the loss is and how its gradient is weighted; pass 2 makes the tiles
again and forms the gradient in place. Neither model's logits exist for more than a tile.

The rows of the student are put in an order in which every kind of work is a slice:

    [ sparse first rows | dense first rows | other dense rows | the rest ]
      `-------- shared rows: one a segment -'
                          `-- dense rows: gradient everywhere

A *shared row* is the row of a segment's first label: there the shared tokens of both models are compared. A
*dense row* needs the whole softmax in its gradient; a sparse one only its shared columns, and the rest none.

The gradient of a row of logits z, with x_c the score z_c / tau of a shared token:

    own_weight onehot(label)  +  softmax_weight softmax(z)  +  scale p_c (D_c - offset) at the shared columns

A row may have *special columns*: shared tokens taken out of the sums (and of the last term) whose
scores every rank gets to know, so that the interface can put them back as it likes;
`special_weight` is their gradient.

An interface may ask for the probability that a first row gives to the columns that are not shared
(`outside`). It is summed, not taken as what the shared ones leave of 1: where they leave little, that would
be rounding. The second term of such a row is then that of the columns outside alone.

Where an interface compares only a few columns of a row, the likeliest ones, see top_columns.py.

Shapes: `N` student rows, `A` shared rows in the order above, `F` of them dense, `K` special columns, `c`
shared tokens and `w` columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.losses.divergences import Norms, RunningSums, mean_deficits, score_gradient_
from megatron_simct.losses.rows import Statistics
from megatron_simct.losses.shared_head import SharedColumns, TeacherScores
from megatron_simct.losses.tiles import StudentLogits
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    LabelSums,
    add_at_,
    finite_reference,
    reduce_packed,
)

MAX_TILE_COLUMNS = 4096
"""Wider tiles gain nothing: the products are as fast."""
MIN_TILE_COLUMNS = 64
ROWS_FIRST_ELEMENTS = 1 << 20
"""Elements of a tile of whole rows, if logits exist: the scores are read again in another
order, from the cache.
"""
CACHED_ELEMENTS = 1 << 19
"""On a CPU, elementwise work goes over blocks of rows that stay in the cache; the products
take the whole tile.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Which rows need what; the order of the module's docstring."""

    order: torch.Tensor
    """int64 [N]: row i of the order is row order[i] of the student."""
    segments: torch.Tensor
    """int64 [A]: the segment of each shared row."""
    num_sparse: int
    num_first: int
    """F"""
    num_dense: int
    special: torch.Tensor
    """int64 [F, K]: student ids of the special columns of the dense first rows, or -1."""

    @property
    def num_shared(self) -> int:
        return self.num_sparse + self.num_first

    @property
    def dense(self) -> slice:
        """The dense rows."""
        return slice(self.num_sparse, self.num_sparse + self.num_dense)

    @staticmethod
    def build(
        starts: torch.Tensor, *, shared: torch.Tensor, dense: torch.Tensor, special: torch.Tensor | None
    ) -> RowPlan:
        """starts int64 [segments]: each segment's first student row; shared bool [segments]:
        which are shared rows.

        dense bool [N]: rows whose gradient needs the softmax. special int64 [segments, K]: ids, read at dense
        first rows only. How many rows are of which kind decides shapes, so on a GPU this waits for the
        labels' transfer.
        """
        num_rows = len(dense)
        segments = shared.nonzero().squeeze(1)
        rows = starts[segments]
        # Sparse first rows go before dense ones, each kind in the order of the segments.
        first_dense = dense[rows] if len(rows) else rows.bool()
        segments = torch.cat([segments[~first_dense], segments[first_dense]])
        rows = starts[segments]
        num_first = int(first_dense.sum())
        is_first = torch.zeros_like(dense).index_fill_(0, rows, True)
        # Dense rows other than first rows: the later labels of units, for example.
        others = (dense & ~is_first).nonzero().squeeze(1)
        rest = (~dense & ~is_first).nonzero().squeeze(1)
        num_sparse = len(rows) - num_first
        chosen = segments[num_sparse:]
        return RowPlan(
            order=torch.cat([rows, others, rest]) if num_rows else rows,
            segments=segments,
            num_sparse=num_sparse,
            num_first=num_first,
            num_dense=num_first + len(others),
            special=chosen.new_zeros(len(chosen), 0) if special is None else special[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientWeights:
    """How the gradient of the loss is weighted; see the module's docstring."""

    own_weight: torch.Tensor
    """[N], in the student's order."""
    softmax_weight: torch.Tensor
    """[N], in the student's order; read at dense rows.

    With `outside`, at first rows, only of the columns outside.
    """
    all_columns_weight: torch.Tensor | None = None
    """[N], with `outside`: the same at first rows, of all columns; None: 0."""
    shared: tuple[Norms, torch.Tensor, torch.Tensor] | None = None
    """Norms, offset [A] and scale [A] of the shared columns."""
    special_weight: torch.Tensor | None = None
    """[F, K]"""
    top_weight: torch.Tensor | None = None
    """[A, k]: gradient of the top columns' logits (top_columns.py)."""
    entry_weight: torch.Tensor | None = None
    """[E]: gradient of the entries' logits (entries.py)."""
    own_outside_dense: bool = False
    """Whether own_weight is read at rows that are not dense, too."""


class Tiles:
    """Iterates over tiles and blocks of one micro-batch's logits on one rank."""

    def __init__(
        self,
        source: StudentLogits,
        teacher: TeacherScores | None,
        plan: RowPlan,
        *,
        labels: torch.Tensor,
        columns: SharedColumns | None,
        shard_start: int,
        memory_mib: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """source reads rows in the plan's order; teacher gives the scores of the shared rows in that order.

        labels int64 [N], in the student's order. teacher is None if no scores of shared tokens are read.
        """
        if source.device.type == "cpu":
            _keep_freed_memory()
        self._source, self._teacher, self._plan, self._columns = source, teacher, plan, columns
        # Local columns; a label of another rank lies outside of [0, W).
        self._labels = labels[plan.order] - shard_start
        self._shard_start, self._group = shard_start, group
        self._empty = torch.zeros(0, dtype=source.dtype, device=source.device)
        num_rows = source.num_rows + (0 if teacher is None else plan.num_shared)
        # A tile of each model; a second one while a soft-cap or a narrower type is converted.
        width = (memory_mib << 20) // max(1, 2 * num_rows * self._empty.element_size())
        self._width = max(MIN_TILE_COLUMNS, min(MAX_TILE_COLUMNS, width))
        self._height = max(1, source.num_rows)
        # Logits that exist are read along the memory: all columns of as many rows as stay in the cache.
        if source.rows_first:
            self._width = max(1, source.num_columns)
            self._height = max(1, ROWS_FIRST_ELEMENTS // self._width)

    @property
    def _sparse(self) -> slice:
        return slice(0, self._plan.num_sparse)

    def _tiles(self) -> Iterator[tuple[slice, int, int]]:
        """Rows and columns [start, end): all rows of some columns, or some rows of all columns."""
        for run in self._source.runs():
            for top in range(run.start, run.stop, self._height):
                chunk = slice(top, min(top + self._height, run.stop))
                for start in range(0, self._source.num_columns, self._width):
                    yield chunk, start, min(start + self._width, self._source.num_columns)

    def _blocks(self, start: int, stop: int, width: int) -> Iterator[slice]:
        """Rows [start, stop) in blocks; a block is either before, in or behind the dense first rows."""
        size = max(1, stop - start)
        if self._source.device.type == "cpu":
            size = max(1, CACHED_ELEMENTS // max(1, width))
        # A block never crosses a border between kinds of rows, so all its rows have the same needs.
        borders = [b for b in (self._plan.num_sparse, self._plan.num_shared) if start < b < stop]
        for low, high in zip([start, *borders], [*borders, stop], strict=True):
            for top in range(low, high, size):
                yield slice(top, min(top + size, high))

    def _teacher_tile(
        self, chunk: slice, start: int, end: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher scores of the tile's shared rows and tokens, and these tokens' columns in the tile; None
        for none.
        """
        rows = common(chunk, slice(0, self._plan.num_shared))
        if self._teacher is None or rows is None:
            return None, None
        assert self._columns is not None, "a teacher's scores need their columns"
        first, last = self._columns.within(start, end)
        # Columns [start, end) of the student hold the shared tokens [first, last), because both ascend.
        if first == last:
            return None, None
        return self._teacher.scores(first, last, rows), self._columns.student[first:last] - start

    def _add_own(self, weight: torch.Tensor) -> None:
        """The labels' own gradient at rows that no dense tile covers; weight [N] in the plan's order."""
        if self._source.num_columns == 0:
            return
        is_local = (self._labels >= 0) & (self._labels < self._source.num_columns)
        columns = torch.where(is_local, self._labels, 0).unsqueeze(1)
        self._source.add_gradient_of_entries(columns, torch.where(is_local, weight, 0).unsqueeze(1))

    def _statistics(
        self, label_max: torch.Tensor, label_sum: torch.Tensor, own: torch.Tensor, **others: Any
    ) -> Statistics:
        """From numbers [N] of the ranks together, in the plan's order."""
        log_sum = label_sum.log()
        label_max, log_sum, own = (self._in_student_order(values) for values in (label_max, log_sum, own))
        # Not own - LSE: the rounding of a large log-sum-exp would be that of the result.
        log_probs = own - label_max - log_sum
        return Statistics(label_max=label_max, label_log_sum=log_sum, own=own, log_probs=log_probs, **others)

    def _in_student_order(self, values: torch.Tensor) -> torch.Tensor:
        """[N], from the plan's order."""
        return torch.empty_like(values).index_copy_(0, self._plan.order, values)


class TwoPass(Tiles):
    """Sums over the shared columns of every shared row."""

    def __init__(
        self,
        *given: Any,
        divergence: str,
        beta: float,
        temperature: float,
        outside: bool = False,
        **named: Any,
    ) -> None:
        """`given` and `named` as in Tiles. outside: all shared rows are dense, and their columns that are not
        shared have one gradient."""
        super().__init__(*given, **named)
        self._divergence, self._beta, self._temperature = divergence, beta, temperature
        self._outside = outside
        assert not (outside and self._plan.num_sparse), (
            "a sparse row has no gradient outside of its shared columns"
        )
        self._special_position = self._positions(self._plan.special)

    def statistics(self) -> Statistics:
        """Pass 1, one MAX and one SUM reduction."""
        source, plan = self._source, self._plan
        seen = LabelSums(self._labels, like=self._empty)
        running = RunningSums(
            plan.num_shared, divergence=self._divergence, temperature=self._temperature, like=self._empty
        )
        # [F, K]. At most one rank holds a special column; the others keep -inf, so a MAX joins them.
        special_s = self._empty.new_full(plan.special.shape, NEGATIVE_INFINITY)
        special_t = torch.full_like(special_s, NEGATIVE_INFINITY)
        outside = self._empty.new_zeros(plan.num_shared if self._outside else 0)
        for chunk, start, end in self._tiles():
            logits = source.read(start, end, chunk)
            teacher, index = self._teacher_tile(chunk, start, end)
            for rows in self._blocks(chunk.start, chunk.stop, end - start):
                block = logits[relative(rows, chunk)]
                shared = slice(rows.start, min(rows.stop, plan.num_shared))
                # Shared rows come first in the plan's order, so they are the first `num_shared` rows of the
                # block.
                num_shared = shared.stop - shared.start
                if teacher is not None and index is not None and num_shared > 0:
                    s = block[:num_shared].gather(1, index.expand(num_shared, -1))
                    t = teacher[relative(shared, chunk)]
                    self._mask_special(s, t, shared, start, end, read=(special_s, special_t))
                    running.add(self._scaled(s), self._scaled(t), shared)
                exponentials, shrink = seen.add(block, rows, start)
                if self._outside and num_shared > 0:
                    outside[shared] *= shrink[:num_shared]
                    outside[shared] += self._outside_sums(exponentials[:num_shared], index, shared, start)
        return self._reduce(seen, running, special_s, special_t, outside)

    def _reduce(
        self,
        seen: LabelSums,
        running: RunningSums,
        special_s: torch.Tensor,
        special_t: torch.Tensor,
        outside: torch.Tensor,
    ) -> Statistics:
        shape = special_s.shape
        label_max, student_max, teacher_max, special_s, special_t = reduce_packed(
            [
                seen.exponentials.maxima,
                running.student_max,
                running.teacher_max,
                special_s.flatten(),
                special_t.flatten(),
            ],
            dist.ReduceOp.MAX,
            self._group,
        )
        # Sums are relative to this rank's maxima: make them relative to those of all ranks, then add.
        label_max = finite_reference(label_max)
        shrink = seen.exponentials.shrink_to(label_max)
        outside = outside * shrink[: len(outside)]
        # Which ranks hold a token that is the likeliest of both: in bf16 several tokens may be the student's.
        agrees = (running.student_max == student_max) & (running.teacher_at_top == teacher_max)
        running.rescale(student_max.clone(), teacher_max.clone(), slice(None))
        label_sum, own, num_agree, outside, *shared = reduce_packed(
            [seen.exponentials.sums, seen.own, agrees.to(label_max.dtype), outside, *running.sums.values()],
            dist.ReduceOp.SUM,
            self._group,
        )
        return self._statistics(
            label_max,
            label_sum,
            own,
            student_max=finite_reference(student_max),
            teacher_max=finite_reference(teacher_max),
            same_top=(num_agree > 0) & (teacher_max > NEGATIVE_INFINITY),
            sums=dict(zip(running.sums, shared, strict=True)),
            special_student=special_s.reshape(shape),
            special_teacher=special_t.reshape(shape),
            outside=outside,
        )

    def _outside_sums(
        self, exponentials: torch.Tensor, index: torch.Tensor | None, rows: slice, start: int
    ) -> torch.Tensor:
        """[rows]: over the columns of a block that are not shared; the block is overwritten."""
        if index is not None:
            exponentials.index_fill_(1, index, 0)
        self._without_special_(exponentials, rows, start)
        return exponentials.sum(1)

    def _without_special_(self, values: torch.Tensor, rows: slice, start: int) -> None:
        """Put 0 at the special columns of a block of first rows; values [rows, w] from column `start` on."""
        # With `outside` no row is sparse, so first row i of the plan is row i of `special`.
        special = self._plan.special[rows] - self._shard_start - start
        is_local = (special >= 0) & (special < values.shape[1])
        places = special.clamp(0, values.shape[1] - 1)
        # One column at a time: clamped places may coincide, and one write must not undo another.
        for k in range(places.shape[1]):
            column = places[:, k : k + 1]
            values.scatter_(1, column, values.gather(1, column).masked_fill(is_local[:, k : k + 1], 0))

    def deficits(self, norms: Norms) -> list[torch.Tensor]:
        """The sums of js over the shared columns, [A] each: another look at the tiles, one SUM reduction."""
        plan = self._plan
        total = [self._empty.new_zeros(plan.num_shared) for _ in range(4)]
        for chunk, start, end in self._tiles():
            teacher, index = self._teacher_tile(chunk, start, end)
            if teacher is None or index is None:
                continue
            # Sparse rows are read at the shared columns only; dense first rows at all columns of the tile.
            # The same products as in pass 2: what js subtracts must be rounded alike.
            pieces: list[tuple[slice, torch.Tensor]] = []
            sparse, dense = common(chunk, self._sparse), common(chunk, plan.dense)
            if sparse is not None:
                pieces.append((sparse, self._source.logits_at(index + start, sparse)))
            if dense is not None and dense.start < plan.num_shared:
                first = slice(dense.start, min(dense.stop, plan.num_shared))
                logits = self._source.logits(start, end, dense)[: first.stop - first.start]
                pieces.append((first, logits.gather(1, index.expand(len(logits), -1))))
            for piece, student in pieces:
                for rows in self._blocks(piece.start, piece.stop, student.shape[1]):
                    s = student[relative(rows, piece)]
                    t = teacher[relative(rows, chunk)]
                    self._mask_special(s, t, rows, start, end)
                    row_norms = norms.at(rows)
                    log_p = (
                        self._scaled(s)
                        .sub_(row_norms.student_max.unsqueeze(1))
                        .sub_(row_norms.student_log_z.unsqueeze(1))
                    )
                    log_q = (
                        self._scaled(t)
                        .sub_(row_norms.teacher_max.unsqueeze(1))
                        .sub_(row_norms.teacher_log_z.unsqueeze(1))
                    )
                    for sums, part in zip(total, mean_deficits(log_p, log_q, self._beta), strict=True):
                        sums[rows] += part
        return reduce_packed(total, dist.ReduceOp.SUM, self._group)

    def add_gradient(self, statistics: Statistics, weights: GradientWeights) -> None:
        """Pass 2: hand the gradient of every tile to the source."""
        source, plan = self._source, self._plan
        order = plan.order
        own = weights.own_weight[order]
        label_max = statistics.label_max[order]
        # softmax(z) = e^(z - label_max) / e^(label_log_sum): the division is part of the weight of a row.
        over_sum = (-statistics.label_log_sum).exp()
        softmax = (weights.softmax_weight * over_sum)[order]
        all_columns = weights.all_columns_weight
        if all_columns is not None:
            all_columns = (all_columns * over_sum)[order]
        for chunk, start, end in self._tiles():
            teacher, index = self._teacher_tile(chunk, start, end)
            sparse, dense = common(chunk, self._sparse), common(chunk, plan.dense)
            if teacher is not None and index is not None and sparse is not None:
                columns = index + start  # one tensor for both calls: an output layer gathers its rows once
                student = source.logits_at(columns, sparse)
                for rows in self._blocks(sparse.start, sparse.stop, student.shape[1]):
                    block_rows = relative(rows, sparse)
                    self._shared_gradient_(student[block_rows], teacher[block_rows], rows, weights)
                source.add_gradient_at(columns, student, sparse)
            if dense is not None:
                # The teacher's first row is that of the chunk, whose sparse rows come before its dense ones.
                of_dense = None if teacher is None else teacher[dense.start - chunk.start :]
                self._dense_tile(
                    dense, start, end, of_dense, index, weights, own, softmax, all_columns, label_max
                )
        # Dense tiles have added the labels' own gradient at dense rows.
        if weights.own_outside_dense:
            own[plan.dense] = 0
            self._add_own(own)

    def _dense_tile(
        self,
        dense: slice,
        start: int,
        end: int,
        teacher: torch.Tensor | None,
        index: torch.Tensor | None,
        weights: GradientWeights,
        own: torch.Tensor,
        softmax: torch.Tensor,
        all_columns: torch.Tensor | None,
        label_max: torch.Tensor,
    ) -> None:
        """Dense rows of a tile; `teacher` has the scores of those of them that are shared rows."""
        plan = self._plan
        logits = self._source.logits(start, end, dense)
        for rows in self._blocks(dense.start, dense.stop, end - start):
            block = logits[relative(rows, dense)]
            shared = slice(rows.start, min(rows.stop, plan.num_shared))
            # The gradient at the shared columns is made before the logits of the block become e^(z - max).
            gradient = None
            if teacher is not None and index is not None and shared.start < shared.stop:
                index_of_rows = index.expand(shared.stop - shared.start, -1)
                s = block[: len(index_of_rows)].gather(1, index_of_rows)
                t = teacher[relative(shared, dense)]
                self._mask_special(s, t, shared, start, end)
                gradient = self._shared_gradient_(s, t, shared, weights)
            block.sub_(label_max[rows].unsqueeze(1)).exp_()
            of_all_columns = None
            if all_columns is not None and shared.start < shared.stop:
                of_all_columns = block[: shared.stop - shared.start] * all_columns[shared].unsqueeze(1)
            block.mul_(softmax[rows].unsqueeze(1))
            # With `outside` the softmax term is for unshared columns alone: special ones get 0 here, and the
            # shared ones are overwritten, not added to.
            if self._outside and shared.start < shared.stop:
                # The softmax term is for unshared columns alone: special columns get 0 here, and the shared
                # ones are overwritten below, not added to.
                self._without_special_(block[: shared.stop - shared.start], shared, start)
            if gradient is not None:
                if self._outside:
                    block[: len(gradient)].scatter_(1, index_of_rows, gradient)
                else:
                    block[: len(gradient)].scatter_add_(1, index_of_rows, gradient)
            if of_all_columns is not None:
                block[: len(of_all_columns)].add_(of_all_columns)
            add_at_(block, self._labels[rows].unsqueeze(1) - start, own[rows].unsqueeze(1))
            if weights.special_weight is not None and shared.start < shared.stop:
                first = relative(shared, plan.dense)
                special = plan.special[first] - self._shard_start - start
                values = torch.where(plan.special[first] >= 0, weights.special_weight[first], 0)
                add_at_(block[: shared.stop - shared.start], special, values)
        self._source.add_gradient(start, end, logits, dense)

    def _shared_gradient_(
        self, student: torch.Tensor, teacher: torch.Tensor, rows: slice, weights: GradientWeights
    ) -> torch.Tensor:
        """The gradient at the shared columns of a block; it overwrites both models' logits."""
        assert weights.shared is not None, "a teacher's scores are compared"
        norms, offset, scale = weights.shared
        return score_gradient_(
            self._scaled(student),
            self._scaled(teacher),
            norms.at(rows),
            offset=offset[rows],
            scale=scale[rows],
            divergence=self._divergence,
            beta=self._beta,
        )

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._temperature == 1 else logits.div_(self._temperature)

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of this rank's shared tokens each student id is, or -1."""
        if ids.numel() == 0:
            return ids
        assert self._columns is not None, "special columns are shared tokens"
        # Ids outside of this rank's columns, and -1, are clamped for the look-up and masked behind it.
        position = self._columns.position
        local = ids - self._shard_start
        is_local = (ids >= 0) & (local >= 0) & (local < len(position))
        return torch.where(is_local, position[local.clamp(0, len(position) - 1)], -1)

    def _mask_special(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        rows: slice,
        start: int,
        end: int,
        *,
        read: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Take the special columns out of a block [rows, c]: -inf for both models.

        `read` receives their logits.
        """
        plan = self._plan
        if plan.special.numel() == 0 or rows.start < plan.num_sparse:
            return
        assert self._columns is not None, "special columns are shared tokens"
        first, _ = self._columns.within(start, end)
        chosen = relative(rows, plan.dense)
        # Places in the block, whose columns are the shared tokens [first, first + c).
        position = self._special_position[chosen] - first
        is_local = (position >= 0) & (position < student.shape[1])
        index = position.clamp(0, student.shape[1] - 1)
        values_s, values_t = student.gather(1, index), teacher.gather(1, index)
        if read is not None:
            read[0][chosen] = torch.where(is_local, values_s, read[0][chosen])
            read[1][chosen] = torch.where(is_local, values_t, read[1][chosen])
        # One column at a time: clamped places may coincide, and one write must not undo another.
        for k in range(index.shape[1]):
            for block in (student, teacher):
                current = block.gather(1, index[:, k : k + 1])
                block.scatter_(
                    1, index[:, k : k + 1], current.masked_fill(is_local[:, k : k + 1], NEGATIVE_INFINITY)
                )


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed, up to 62 MiB: it would hand every tile's memory back,
    and fault it in again.

    glibc keeps twice the largest block that was ever freed, if that is below 32 MiB. Allocating and freeing
    one untouched block is enough.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def relative(rows: slice, outer: slice) -> slice:
    """The same rows, counted from the first row of `outer`."""
    return slice(rows.start - outer.start, rows.stop - outer.start)


def common(a: slice, b: slice) -> slice | None:
    """The rows of both slices; None if they have none in common."""
    both = slice(max(a.start, b.start), min(a.stop, b.stop))
    return both if both.start < both.stop else None
