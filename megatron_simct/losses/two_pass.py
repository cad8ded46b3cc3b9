"""Two passes over the vocabulary: statistics of every row, then the gradient. The one place that cuts tiles.

Pass 1 reads the student's logits of a tile of columns for all rows, and the teacher's scores of the tile's shared
tokens, and carries maxima and sums from tile to tile. `reduce` joins the ranks. An interface then decides, from a few
numbers a row, what the loss is and how its gradient is weighted; pass 2 makes the tiles again and forms the gradient in
place. Neither model's logits exist for more than a tile.

The rows of the student are put in an order in which every kind of work is a slice:

    [ sparse first rows | dense first rows | other dense rows | the rest ]
      `-------- shared rows: one a segment -'
                          `-- dense rows: gradient everywhere

A *shared row* is the row of a segment's first label: there the shared tokens of both models are compared. A *dense row*
needs the whole softmax in its gradient; a sparse one only its shared columns, and the rest none.

The gradient of a row of logits z, with x_c the score z_c / tau of a shared token:

    own_weight  onehot(label)  +  softmax_weight  softmax(z)  +  scale  p_c (D_c - offset)  at the shared columns

A row may have *special columns*: shared tokens taken out of the sums (and of the last term) whose scores every rank
gets to know, so that the interface can put them back as it likes; `special_weight` is their gradient.

Where an interface compares only a few columns of a row, the likeliest ones (`topk`), there are no sums and no last
term: the ranks exchange k scores a row, and `top_weight` is the gradient of these columns.

Shapes: `N` student rows, `A` shared rows in the order above, `F` of them dense, `K` special columns, `c` shared tokens
and `w` columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_simct.losses.divergences import Norms, RunningSums, mean_deficits, score_gradient_
from megatron_simct.losses.shared_head import SharedColumns, TeacherScores
from megatron_simct.losses.tiles import StudentLogits
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    add_at_,
    finite_reference,
    own_logits,
    reduce_packed,
    row_maxima,
)

MAX_TILE_COLUMNS = 4096
"""Wider tiles gain nothing: the products are as fast."""
MIN_TILE_COLUMNS = 64
ROWS_FIRST_ELEMENTS = 1 << 20
"""Of a tile of whole rows, where logits exist: scores that are read in another order should stay in the cache."""
CACHED_ELEMENTS = 1 << 19
"""On a CPU, elementwise work goes over blocks of rows that stay in the cache; the products take the whole tile."""


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
        """starts int64 [segments]: each segment's first student row; shared bool [segments]: which are shared rows.

        dense bool [N]: rows whose gradient needs the softmax. special int64 [segments, K]: ids, read at dense first
        rows only. How many rows are of which kind decides shapes, so on a GPU this waits for the labels' transfer.
        """
        num_rows = len(dense)
        segments = shared.nonzero().squeeze(1)
        rows = starts[segments]
        first_dense = dense[rows] if len(rows) else rows.bool()
        segments = torch.cat([segments[~first_dense], segments[first_dense]])
        rows = starts[segments]
        num_first = int(first_dense.sum())
        is_first = torch.zeros_like(dense).index_fill_(0, rows, True)
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
class Statistics:
    """What the ranks agree on after the reductions."""

    label_max: torch.Tensor
    """[N], the largest logit of each student row (0 where there is none)."""
    label_log_sum: torch.Tensor
    """[N], log of the sum of e^(z - label_max) over the real vocabulary."""
    own: torch.Tensor
    """[N], each label's logit."""
    log_probs: torch.Tensor
    """[N], of each student label."""
    student_max: torch.Tensor
    """[A], of the scores of the shared tokens, special columns left out (0 where there is none)."""
    teacher_max: torch.Tensor
    """[A]"""
    same_top: torch.Tensor
    """bool [A]: whether both models find the same of the compared tokens likeliest, special columns left out."""
    sums: dict[str, torch.Tensor]
    """Of RunningSums."""
    special_student: torch.Tensor
    """[F, K], logits (before the temperature) of the special columns; -inf where the token is not a shared one."""
    special_teacher: torch.Tensor
    """[F, K]"""
    top: TopColumns | None = None
    """With topk: those of the shared rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopColumns:
    """The student's likeliest columns of each shared row, over all ranks, in descending order."""

    student: torch.Tensor
    """[A, k]: logits; -inf where a row has fewer columns."""
    teacher: torch.Tensor
    """[A, k]: the teacher's logits of the same shared tokens; of no meaning without a teacher."""
    local: torch.Tensor
    """int64 [A, k]: local column; 0 where the column is another rank's."""
    here: torch.Tensor
    """bool [A, k]: whether the column is this rank's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientWeights:
    """How the gradient of the loss is weighted; see the module's docstring."""

    norms: Norms
    offset: torch.Tensor
    """[A]"""
    scale: torch.Tensor
    """[A]"""
    own_weight: torch.Tensor
    """[N], in the student's order."""
    softmax_weight: torch.Tensor
    """[N], in the student's order; read at dense rows."""
    special_weight: torch.Tensor | None = None
    """[F, K]"""
    own_outside_dense: bool = False
    """Whether own_weight is read at rows that are not dense, too."""
    top_weight: torch.Tensor | None = None
    """[A, k]: gradient of the top columns' logits; then norms, offset and scale are not read."""


class TwoPass:
    """The tiles of one micro-batch on one rank."""

    def __init__(
        self,
        source: StudentLogits,
        teacher: TeacherScores | None,
        plan: RowPlan,
        *,
        labels: torch.Tensor,
        columns: SharedColumns | None,
        shard_start: int,
        divergence: str,
        beta: float,
        temperature: float,
        memory_mib: int,
        group: dist.ProcessGroup | None,
        topk: int = 0,
    ) -> None:
        """source reads rows in the plan's order; teacher gives the scores of the shared rows in that order.

        labels int64 [N], in the student's order. teacher is None where no rows are shared, or where topk columns are
        to be found among all of the student's.
        """
        if source.device.type == "cpu":
            _keep_freed_memory()
        self._topk = topk
        self._source, self._teacher, self._plan, self._columns = source, teacher, plan, columns
        self._labels = labels[plan.order] - shard_start
        self._shard_start = shard_start
        self._divergence, self._beta, self._temperature = divergence, beta, temperature
        self._group = group
        self._empty = torch.zeros(0, dtype=source.dtype, device=source.device)
        num_rows = source.num_rows + (0 if teacher is None else plan.num_shared)
        # A tile of each model; a second one while a soft-cap or a narrower type is converted.
        width = (memory_mib << 20) // max(1, 2 * num_rows * self._empty.element_size())
        self._width = max(MIN_TILE_COLUMNS, min(MAX_TILE_COLUMNS, width))
        self._height = max(1, source.num_rows)
        if source.rows_first:
            self._width = max(1, source.num_columns)
            self._height = max(1, ROWS_FIRST_ELEMENTS // self._width)
        self._special_position = self._positions(plan.special)

    def statistics(self) -> Statistics:
        """Pass 1, one MAX and one SUM reduction."""
        source, plan = self._source, self._plan
        maxima = self._empty.new_full((source.num_rows,), NEGATIVE_INFINITY)
        sums, own = torch.zeros_like(maxima), torch.zeros_like(maxima)
        running = RunningSums(
            plan.num_shared, divergence=self._divergence, temperature=self._temperature, like=self._empty
        )
        special_s = self._empty.new_full(plan.special.shape, NEGATIVE_INFINITY)
        special_t = torch.full_like(special_s, NEGATIVE_INFINITY)
        top = _LocalTop(plan.num_shared, self._topk, like=self._empty)
        for chunk, start, end in self._tiles():
            logits = source.read(start, end, chunk)
            own[chunk] += own_logits(logits, self._labels[chunk], start)
            teacher, index = self._teacher_tile(chunk, start, end)
            for rows in self._blocks(chunk.start, chunk.stop, end - start):
                block = logits[rows.start - chunk.start : rows.stop - chunk.start]
                shared = slice(rows.start, min(rows.stop, plan.num_shared))
                if teacher is not None and index is not None and shared.start < shared.stop:
                    s = block[: shared.stop - shared.start].gather(1, index.expand(shared.stop - shared.start, -1))
                    t = teacher[shared.start - chunk.start : shared.stop - chunk.start]
                    self._cut(s, t, shared, start, end, read=(special_s, special_t))
                    if self._topk:
                        top.add(s, t, index, start, shared)
                    else:
                        running.add(self._scaled(s), self._scaled(t), shared)
                elif self._topk and self._teacher is None and shared.start < shared.stop:
                    top.add(block[: shared.stop - shared.start], None, None, start, shared)
                new = torch.maximum(maxima[rows], row_maxima(block))
                reference = finite_reference(new)
                sums[rows] *= (maxima[rows] - reference).exp()
                sums[rows] += (block - reference.unsqueeze(1)).exp_().sum(1)
                maxima[rows] = new
        statistics = self._reduce(maxima, sums, own, running, special_s, special_t)
        if self._topk:
            best = top.over_ranks(self._group)
            compared = best.teacher.masked_fill(best.student == NEGATIVE_INFINITY, NEGATIVE_INFINITY)
            statistics = replace(statistics, top=best, same_top=compared.argmax(dim=1) == 0)
        return statistics

    def _reduce(
        self,
        maxima: torch.Tensor,
        sums: torch.Tensor,
        own: torch.Tensor,
        running: RunningSums,
        special_s: torch.Tensor,
        special_t: torch.Tensor,
    ) -> Statistics:
        shape = special_s.shape
        label_max, student_max, teacher_max, special_s, special_t = reduce_packed(
            [maxima, running.student_max, running.teacher_max, special_s.flatten(), special_t.flatten()],
            dist.ReduceOp.MAX,
            self._group,
        )
        label_max = finite_reference(label_max)
        sums = sums * (maxima - label_max).exp()
        # Which ranks hold a token that is the likeliest of both: in bf16 several tokens may be the student's.
        agrees = (running.student_max == student_max) & (running.teacher_at_top == teacher_max)
        running.rescale(student_max.clone(), teacher_max.clone(), slice(None))
        label_sum, own, num_agree, *shared = reduce_packed(
            [sums, own, agrees.to(sums.dtype), *running.sums.values()], dist.ReduceOp.SUM, self._group
        )
        label_log_sum = label_sum.log()
        natural = torch.empty_like(self._plan.order)
        natural[self._plan.order] = torch.arange(len(natural), device=natural.device)
        label_max, label_log_sum, own = label_max[natural], label_log_sum[natural], own[natural]
        return Statistics(
            label_max=label_max,
            label_log_sum=label_log_sum,
            own=own,
            # Not own - LSE: the rounding of a large log-sum-exp would be that of the result.
            log_probs=own - label_max - label_log_sum,
            student_max=finite_reference(student_max),
            teacher_max=finite_reference(teacher_max),
            same_top=(num_agree > 0) & (teacher_max > NEGATIVE_INFINITY),
            sums=dict(zip(running.sums, shared, strict=True)),
            special_student=special_s.reshape(shape),
            special_teacher=special_t.reshape(shape),
        )

    def deficits(self, norms: Norms) -> list[torch.Tensor]:
        """The sums of js over the shared columns, [A] each: another look at the tiles, one SUM reduction."""
        plan = self._plan
        total = [self._empty.new_zeros(plan.num_shared) for _ in range(4)]
        for chunk, start, end in self._tiles():
            teacher, index = self._teacher_tile(chunk, start, end)
            if teacher is None or index is None:
                continue
            # The same products as in pass 2: what js subtracts must be rounded alike.
            pieces: list[tuple[slice, torch.Tensor]] = []
            sparse, dense = _common(chunk, self._sparse), _common(chunk, plan.dense)
            if sparse is not None:
                pieces.append((sparse, self._source.logits_at(index + start, sparse)))
            if dense is not None and dense.start < plan.num_shared:
                first = slice(dense.start, min(dense.stop, plan.num_shared))
                logits = self._source.logits(start, end, dense)[: first.stop - first.start]
                pieces.append((first, logits.gather(1, index.expand(len(logits), -1))))
            for piece, student in pieces:
                for rows in self._blocks(piece.start, piece.stop, student.shape[1]):
                    s = student[rows.start - piece.start : rows.stop - piece.start]
                    t = teacher[rows.start - chunk.start : rows.stop - chunk.start]
                    self._cut(s, t, rows, start, end)
                    here = norms.at(rows)
                    log_p = self._scaled(s).sub_(here.student_max.unsqueeze(1)).sub_(here.student_log_z.unsqueeze(1))
                    log_q = self._scaled(t).sub_(here.teacher_max.unsqueeze(1)).sub_(here.teacher_log_z.unsqueeze(1))
                    for whole, part in zip(total, mean_deficits(log_p, log_q, self._beta), strict=True):
                        whole[rows] += part
        return reduce_packed(total, dist.ReduceOp.SUM, self._group)

    def add_gradient(self, statistics: Statistics, weights: GradientWeights) -> None:
        """Pass 2: hand the gradient of every tile to the source."""
        source, plan = self._source, self._plan
        order = plan.order
        own = weights.own_weight[order]
        label_max = statistics.label_max[order]
        softmax = (weights.softmax_weight * (-statistics.label_log_sum).exp())[order]
        for chunk, start, end in self._tiles():
            teacher, index = (None, None) if self._topk else self._teacher_tile(chunk, start, end)
            sparse, dense = _common(chunk, self._sparse), _common(chunk, plan.dense)
            if teacher is not None and index is not None and sparse is not None:
                columns = index + start  # one tensor for both calls: an output layer gathers its rows once
                student = source.logits_at(columns, sparse)
                for rows in self._blocks(sparse.start, sparse.stop, student.shape[1]):
                    here = slice(rows.start - sparse.start, rows.stop - sparse.start)
                    self._shared_gradient_(student[here], teacher[here], rows, weights)
                source.add_gradient_at(columns, student, sparse)
            if dense is not None:
                # The teacher's first row is that of the chunk, whose sparse rows come before its dense ones.
                of_dense = None if teacher is None else teacher[dense.start - chunk.start :]
                self._dense_tile(dense, start, end, of_dense, index, statistics, weights, own, softmax, label_max)
        if weights.own_outside_dense:
            own[plan.dense] = 0
            self._add_own(own)
        if weights.top_weight is not None and plan.num_sparse:
            rows, top = self._sparse, statistics.top
            assert top is not None, "gradients of top columns need their statistics"
            values = torch.where(top.here[rows], weights.top_weight[rows], 0)
            source.add_gradient_of_entries(top.local[rows], values, rows)

    def _dense_tile(
        self,
        dense: slice,
        start: int,
        end: int,
        teacher: torch.Tensor | None,
        index: torch.Tensor | None,
        statistics: Statistics,
        weights: GradientWeights,
        own: torch.Tensor,
        softmax: torch.Tensor,
        label_max: torch.Tensor,
    ) -> None:
        """Dense rows of a tile; `teacher` has the scores of those of them that are shared rows."""
        plan = self._plan
        logits = self._source.logits(start, end, dense)
        for rows in self._blocks(dense.start, dense.stop, end - start):
            block = logits[rows.start - dense.start : rows.stop - dense.start]
            shared = slice(rows.start, min(rows.stop, plan.num_shared))
            gradient = None
            if teacher is not None and index is not None and shared.start < shared.stop:
                index_of_rows = index.expand(shared.stop - shared.start, -1)
                s = block[: len(index_of_rows)].gather(1, index_of_rows)
                t = teacher[shared.start - dense.start : shared.stop - dense.start]
                self._cut(s, t, shared, start, end)
                gradient = self._shared_gradient_(s, t, shared, weights)
            block.sub_(label_max[rows].unsqueeze(1)).exp_().mul_(softmax[rows].unsqueeze(1))
            if gradient is not None:
                block[: len(gradient)].scatter_add_(1, index_of_rows, gradient)
            add_at_(block, self._labels[rows].unsqueeze(1) - start, own[rows].unsqueeze(1))
            if weights.special_weight is not None and shared.start < shared.stop:
                first = slice(shared.start - plan.num_sparse, shared.stop - plan.num_sparse)
                special = plan.special[first] - self._shard_start - start
                values = torch.where(plan.special[first] >= 0, weights.special_weight[first], 0)
                add_at_(block[: shared.stop - shared.start], special, values)
            if weights.top_weight is not None and shared.start < shared.stop:
                top = statistics.top
                assert top is not None, "gradients of top columns need their statistics"
                columns = torch.where(top.here[shared], top.local[shared] - start, -1)
                add_at_(block[: shared.stop - shared.start], columns, weights.top_weight[shared])
        self._source.add_gradient(start, end, logits, dense)

    def _shared_gradient_(
        self, student: torch.Tensor, teacher: torch.Tensor, rows: slice, weights: GradientWeights
    ) -> torch.Tensor:
        """From a block of both models' logits, in place of the student's."""
        return score_gradient_(
            self._scaled(student),
            self._scaled(teacher),
            weights.norms.at(rows),
            offset=weights.offset[rows],
            scale=weights.scale[rows],
            divergence=self._divergence,
            beta=self._beta,
        )

    def _add_own(self, weight: torch.Tensor) -> None:
        """The labels' own gradient at rows that no dense tile covers; weight [N] in the plan's order."""
        if self._source.num_columns == 0:
            return
        here = (self._labels >= 0) & (self._labels < self._source.num_columns)
        columns = torch.where(here, self._labels, 0).unsqueeze(1)
        self._source.add_gradient_of_entries(columns, torch.where(here, weight, 0).unsqueeze(1))

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
        size = max(1, CACHED_ELEMENTS // max(1, width)) if self._source.device.type == "cpu" else max(1, stop - start)
        borders = [b for b in (self._plan.num_sparse, self._plan.num_shared) if start < b < stop]
        for low, high in zip([start, *borders], [*borders, stop], strict=True):
            for top in range(low, high, size):
                yield slice(top, min(top + size, high))

    def _teacher_tile(self, chunk: slice, start: int, end: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher scores of the tile's shared rows and tokens, and these tokens' columns in the tile; None for none."""
        rows = _common(chunk, slice(0, self._plan.num_shared))
        if self._teacher is None or rows is None:
            return None, None
        assert self._columns is not None, "a teacher's scores need their columns"
        first, last = self._columns.within(start, end)
        if first == last:
            return None, None
        return self._teacher.scores(first, last, rows), self._columns.student[first:last] - start

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._temperature == 1 else logits.div_(self._temperature)

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of this rank's shared tokens each student id is, or -1."""
        if ids.numel() == 0:
            return ids
        assert self._columns is not None, "special columns are shared tokens"
        position = self._columns.position
        local = ids - self._shard_start
        here = (ids >= 0) & (local >= 0) & (local < len(position))
        return torch.where(here, position[local.clamp(0, len(position) - 1)], -1)

    def _cut(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        rows: slice,
        start: int,
        end: int,
        *,
        read: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Take the special columns out of a block [rows, c]: -inf for both models. `read` receives their logits."""
        plan = self._plan
        if plan.special.numel() == 0 or rows.start < plan.num_sparse:
            return
        assert self._columns is not None, "special columns are shared tokens"
        first, _ = self._columns.within(start, end)
        chosen = slice(rows.start - plan.num_sparse, rows.stop - plan.num_sparse)
        position = self._special_position[chosen] - first
        here = (position >= 0) & (position < student.shape[1])
        index = position.clamp(0, student.shape[1] - 1)
        values_s, values_t = student.gather(1, index), teacher.gather(1, index)
        if read is not None:
            read[0][chosen] = torch.where(here, values_s, read[0][chosen])
            read[1][chosen] = torch.where(here, values_t, read[1][chosen])
        for k in range(index.shape[1]):  # one at a time: two may name the same place, one of them to leave it alone
            for block in (student, teacher):
                current = block.gather(1, index[:, k : k + 1])
                block.scatter_(1, index[:, k : k + 1], current.masked_fill(here[:, k : k + 1], NEGATIVE_INFINITY))


class _LocalTop:
    """The k largest scores of each shared row among this rank's columns, while tiles go by."""

    def __init__(self, num_rows: int, k: int, *, like: torch.Tensor) -> None:
        self._student = like.new_full((num_rows, k), NEGATIVE_INFINITY)
        self._teacher = torch.zeros_like(self._student)
        self._columns = torch.zeros(num_rows, k, dtype=torch.int64, device=like.device)

    def add(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        index: torch.Tensor | None,
        start: int,
        rows: slice,
    ) -> None:
        """Scores [rows, c] of the tile's columns `start + index`, index int64 [c]; None: all of the tile."""
        k = self._student.shape[1]
        index = torch.arange(student.shape[1], device=student.device) if index is None else index
        values, chosen = torch.cat([self._student[rows], student], dim=1).topk(k, dim=1)
        columns = torch.cat([self._columns[rows], (index + start).expand(len(student), -1)], dim=1)
        self._student[rows], self._columns[rows] = values, columns.gather(1, chosen)
        if teacher is not None:
            self._teacher[rows] = torch.cat([self._teacher[rows], teacher], dim=1).gather(1, chosen)

    def over_ranks(self, group: dist.ProcessGroup | None) -> TopColumns:
        """The k largest of all ranks': one all-gather of 2 k numbers a row."""
        k, rank, world_size = self._student.shape[1], 0, 1
        student, teacher = self._student, self._teacher
        if group is not None:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
            both = torch.stack([student, teacher])
            everybody = [torch.empty_like(both) for _ in range(world_size)]
            dist.all_gather(everybody, both, group=group)
            student, teacher = torch.cat(everybody, dim=2).unbind(0)
        values, chosen = student.topk(k, dim=1)
        here = (chosen // k == rank) & (values > NEGATIVE_INFINITY)
        return TopColumns(
            student=values,
            teacher=teacher.gather(1, chosen),
            local=torch.where(here, self._columns.gather(1, torch.where(here, chosen % k, 0)), 0),
            here=here,
        )


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed, up to 62 MiB: it would hand every tile's memory back, and fault it in again.

    glibc keeps twice the largest block that was ever freed, if that is below 32 MiB. One that is never touched will do.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _common(a: slice, b: slice) -> slice | None:
    """The rows of both, None for none."""
    both = slice(max(a.start, b.start), min(a.stop, b.stop))
    return both if both.start < both.stop else None
