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

from megatron_simct.losses import bodies
from megatron_simct.losses.divergences import Norms, RunningSums, mean_deficits, score_gradient_
from megatron_simct.losses.rows import Statistics
from megatron_simct.losses.shared_head import SharedColumns, TeacherScores
from megatron_simct.losses.tiles import StudentLogits
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    LabelSums,
    add_at_,
    add_exponentials_,
    finite_reference,
    own_logits,
    reduce_packed,
    soft_cap,
)

MAX_TILE_COLUMNS = 4096
"""Wider tiles gain nothing: the products are as fast."""
MIN_TILE_COLUMNS = 64
ROWS_FIRST_ELEMENTS = 1 << 20
"""Elements of a tile of whole rows, if logits exist, on a CPU: the scores are read again in another order,
from the cache.
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
        which are shared rows, of which each row is one segment's at most.

        dense bool [N]: rows whose gradient needs the softmax. special int64 [segments, K]: ids, read at dense
        first rows only. How many rows are of which kind decides shapes, so the host waits for the device
        here, once.
        """
        num_rows = len(dense)
        # The row of a segment that is not shared is none: one row more, cut off behind.
        rows = torch.where(shared, starts, num_rows)
        is_first = dense.new_zeros(num_rows + 1).index_fill_(0, rows, True)[:num_rows]
        first_dense = shared & torch.cat([dense, dense.new_zeros(1)])[rows]
        counts = torch.stack([shared.sum(), first_dense.sum(), (dense & ~is_first).sum()])
        num_shared, num_first, num_others = counts.tolist()
        # Sparse first rows go before dense ones, each kind in the order of the segments.
        segments = torch.where(shared, first_dense.long(), 2).argsort(stable=True)[:num_shared]
        num_sparse = num_shared - num_first
        # The rows behind the first ones: the later labels of units, for example, and the rest.
        behind = torch.where(is_first, 0, torch.where(dense, 1, 2)).argsort(stable=True)[num_shared:]
        chosen = segments[num_sparse:]
        return RowPlan(
            order=torch.cat([starts[segments], behind]),
            segments=segments,
            num_sparse=num_sparse,
            num_first=num_first,
            num_dense=num_first + num_others,
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
        on_cpu = bodies.by_blocks(source.device)
        if on_cpu:
            _keep_freed_memory()
        self._source, self._teacher, self._plan, self._columns = source, teacher, plan, columns
        # Local columns; a label of another rank lies outside of [0, W).
        self._labels = labels[plan.order] - shard_start
        self._shard_start, self._group = shard_start, group
        self._empty = torch.zeros(0, dtype=source.dtype, device=source.device)
        num_rows = source.num_rows + (0 if teacher is None else plan.num_shared)
        # A tile of each model; a second one while a soft-cap or a narrower type is converted.
        width = _columns_of_memory(memory_mib, 2 * num_rows * self._empty.element_size())
        self._width = max(MIN_TILE_COLUMNS, min(MAX_TILE_COLUMNS, width))
        self._height = max(1, source.num_rows)
        # Logits that exist are read along the memory: all columns of as many rows as stay in the cache.
        if source.rows_first:
            self._width = max(1, source.num_columns)
            elements = ROWS_FIRST_ELEMENTS if on_cpu else (memory_mib << 20) // 8  # two tiles of float32
            self._height = max(1, elements // self._width)

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
        if bodies.by_blocks(self._source.device):
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
        first_pass = bodies.body(_first_pass, source.device)
        for chunk, start, end in self._tiles():
            logits = source.read(start, end, chunk)
            teacher, index = self._teacher_tile(chunk, start, end)
            for rows in self._blocks(chunk.start, chunk.stop, end - start):
                block = logits[relative(rows, chunk)]
                # Shared rows come first in the plan's order, so they are the first rows of the block.
                shared = common(rows, slice(0, plan.num_shared))
                if shared is None or (teacher is None and not self._outside):
                    seen.add(block, rows, start, cap=source.soft_cap)
                    continue
                compared = None
                if teacher is not None and index is not None:
                    compared = (teacher[relative(shared, chunk)], index, running.at(shared))
                first_pass(
                    block,
                    start,
                    source.soft_cap,
                    seen.at(rows),
                    self._temperature,
                    compared,
                    self._taken_out(shared, start, end, (special_s, special_t)),
                    self._special_columns(shared, start) if self._outside else None,
                    outside[shared] if self._outside else None,
                )
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
        running.rescale(student_max, teacher_max)
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

    def _special_columns(self, rows: slice, start: int) -> torch.Tensor:
        """[rows, K]: the special columns of a block of first rows, counted from column `start`."""
        # With `outside` no row is sparse, so first row i of the plan is row i of `special`.
        return self._plan.special[rows] - self._shard_start - start

    def deficits(self, norms: Norms) -> list[torch.Tensor]:
        """The sums of js over the shared columns, [A] each: another look at the tiles, one SUM reduction."""
        plan = self._plan
        total = [self._empty.new_zeros(plan.num_shared) for _ in range(4)]
        add_deficits = bodies.body(_add_deficits, self._source.device)
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
                    add_deficits(
                        student[relative(rows, piece)],
                        teacher[relative(rows, chunk)],
                        self._taken_out(rows, start, end),
                        norms.at(rows),
                        self._temperature,
                        self._beta,
                        [sums[rows] for sums in total],
                    )
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
                sparse_gradient = bodies.body(_sparse_gradient_, source.device)
                for rows in self._blocks(sparse.start, sparse.stop, student.shape[1]):
                    block_rows = relative(rows, sparse)
                    sparse_gradient(
                        student[block_rows],
                        teacher[block_rows],
                        _at(weights.shared, rows),
                        self._temperature,
                        self._divergence,
                        self._beta,
                    )
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
        dense_gradient = bodies.body(_dense_gradient_, self._source.device)
        for rows in self._blocks(dense.start, dense.stop, end - start):
            block, shared = logits[relative(rows, dense)], common(rows, slice(0, plan.num_shared))
            compared = outside = special = None
            if shared is not None:
                if teacher is not None and index is not None:
                    scores = teacher[relative(shared, dense)]
                    taken_out = self._taken_out(shared, start, end)
                    compared = (scores, index, taken_out, _at(weights.shared, shared))
                if self._outside:
                    all_columns_weight = None if all_columns is None else all_columns[shared]
                    outside = (self._special_columns(shared, start), all_columns_weight)
                if weights.special_weight is not None:
                    first = relative(shared, plan.dense)
                    named = plan.special[first]
                    # Of special columns that no token is named for, -1, the weight is 0.
                    special = (named - self._shard_start - start, named >= 0, weights.special_weight[first])
            dense_gradient(
                block,
                self._labels[rows],
                start,
                own[rows],
                softmax[rows],
                label_max[rows],
                self._temperature,
                self._divergence,
                self._beta,
                compared,
                outside,
                special,
            )
        self._source.add_gradient(start, end, logits, dense)

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

    def _taken_out(
        self, rows: slice, start: int, end: int, read: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> TakenOut | None:
        """The special columns of shared rows in a tile; None where they have none."""
        plan = self._plan
        if plan.special.numel() == 0 or rows.start < plan.num_sparse:
            return None
        assert self._columns is not None, "special columns are shared tokens"
        first, _ = self._columns.within(start, end)
        chosen = relative(rows, plan.dense)
        # Places in the block, whose columns are the shared tokens [first, first + c).
        views = None if read is None else (read[0][chosen], read[1][chosen])
        return self._special_position[chosen] - first, views


TakenOut = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]
"""Special columns of a block: places [rows, K] among the c shared tokens, outside of [0, c) for none, and
where their logits [rows, K] of both models are written to, if anywhere."""
OfShared = tuple[Norms, torch.Tensor, torch.Tensor]
"""GradientWeights.shared of some rows."""


def _at(shared: OfShared | None, rows: slice) -> OfShared:
    assert shared is not None, "a teacher's scores are compared"
    norms, offset, scale = shared
    return norms.at(rows), offset[rows], scale[rows]


# Bodies of tiles (bodies.py). Blocks are [rows, w]; `left` is the block's first column among this rank's.


def _first_pass(
    block: torch.Tensor,
    left: int,
    cap: float | None,
    seen: tuple[torch.Tensor, ...],
    temperature: float,
    compared: tuple[torch.Tensor, torch.Tensor, RunningSums] | None,
    taken_out: TakenOut | None,
    special: torch.Tensor | None,
    outside: torch.Tensor | None,
) -> None:
    """Add a block that begins with shared rows to the sums of pass 1.

    block: in the source's type, before the cap; seen: LabelSums.at; compared: the teacher's scores [a, c] of
    the a shared rows, their columns int64 [c] in the block and their running sums; special: columns [a, K] in
    the block; outside: sums [a].
    """
    labels, own, maxima, sums = seen
    block = soft_cap(block.to(own.dtype), cap)
    if compared is not None:
        teacher, index, running = compared
        s, t = block[: len(teacher)].gather(1, index.expand(len(teacher), -1)), bodies.scratch(teacher)
        _take_out_(s, t, taken_out)
        running.add(_scaled_(s, temperature), _scaled_(t, temperature))
    own.add_(own_logits(block, labels, left))
    exponentials, shrink = add_exponentials_(block, maxima, sums)
    if outside is not None:
        assert special is not None, "both are of the rows whose columns outside are summed"
        exponentials = exponentials[: len(outside)]
        if compared is not None:
            exponentials.index_fill_(1, compared[1], 0)
        _without_(exponentials, special)
        outside.mul_(shrink[: len(outside)]).add_(exponentials.sum(1))


def _add_deficits(
    student: torch.Tensor,
    teacher: torch.Tensor,
    taken_out: TakenOut | None,
    norms: Norms,
    temperature: float,
    beta: float,
    total: list[torch.Tensor],
) -> None:
    """Add a block's sums of js, [rows] each, to `total`; student, teacher [rows, c]: logits of the shared
    tokens, which are overwritten."""
    s, t = bodies.scratch(student), bodies.scratch(teacher)
    _take_out_(s, t, taken_out)
    log_p = _scaled_(s, temperature).sub_(norms.student_max.unsqueeze(1))
    log_q = _scaled_(t, temperature).sub_(norms.teacher_max.unsqueeze(1))
    log_p = log_p.sub_(norms.student_log_z.unsqueeze(1))
    log_q = log_q.sub_(norms.teacher_log_z.unsqueeze(1))
    for sums, part in zip(total, mean_deficits(log_p, log_q, beta), strict=True):
        sums.add_(part)


def _sparse_gradient_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    shared: OfShared,
    temperature: float,
    divergence: str,
    beta: float,
) -> torch.Tensor:
    """The gradient at the shared columns, in place of the student's logits [rows, c]; the teacher's are
    overwritten too."""
    norms, offset, scale = shared
    return score_gradient_(
        _scaled_(student, temperature),
        _scaled_(bodies.scratch(teacher), temperature),
        norms,
        offset=offset,
        scale=scale,
        divergence=divergence,
        beta=beta,
    )


def _dense_gradient_(
    block: torch.Tensor,
    labels: torch.Tensor,
    left: int,
    own: torch.Tensor,
    softmax: torch.Tensor,
    label_max: torch.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
    compared: tuple[torch.Tensor, torch.Tensor, TakenOut | None, OfShared] | None,
    outside: tuple[torch.Tensor, torch.Tensor | None] | None,
    special: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    """The gradient of a block of dense rows, which begins with its shared rows, in place of its logits.

    compared: the teacher's scores [a, c] of the shared rows, their columns int64 [c] in the block, the
    special columns among them and the weights of the rows; outside: special columns [a, K] in the block, and
    the weight [a] of all columns; special: the same columns, which of them are there, and their weight.
    """
    # The gradient at the shared columns is made before the logits of the block become e^(z - max).
    gradient = None
    if compared is not None:
        teacher, index, taken_out, of_shared = compared
        index_of_rows = index.expand(len(teacher), -1)
        s, t = block[: len(teacher)].gather(1, index_of_rows), bodies.scratch(teacher)
        _take_out_(s, t, taken_out)
        gradient = _sparse_gradient_(s, t, of_shared, temperature, divergence, beta)
    block.sub_(label_max.unsqueeze(1)).exp_()
    of_all_columns = None
    if outside is not None and outside[1] is not None:
        of_all_columns = block[: len(outside[1])] * outside[1].unsqueeze(1)
    block.mul_(softmax.unsqueeze(1))
    if outside is not None:
        # The softmax term is for unshared columns alone: special columns get 0 here, and the shared ones are
        # overwritten below, not added to.
        _without_(block[: len(outside[0])], outside[0])
    if gradient is not None and outside is not None:
        block[: len(gradient)].scatter_(1, index_of_rows, gradient)
    elif gradient is not None:
        block[: len(gradient)].scatter_add_(1, index_of_rows, gradient)
    if of_all_columns is not None:
        block[: len(of_all_columns)].add_(of_all_columns)
    add_at_(block, labels.unsqueeze(1) - left, own.unsqueeze(1))
    if special is not None:
        columns, is_there, weight = special
        add_at_(block[: len(columns)], columns, torch.where(is_there, weight, 0))


def _scaled_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits.div_(temperature)


def _without_(values: torch.Tensor, columns: torch.Tensor) -> None:
    """Put 0 at columns [rows, K] of values [rows, w]; others than [0, w) are left out."""
    if torch.compiler.is_compiling():
        for k in range(columns.shape[1]):
            values.masked_fill_(bodies.is_column(values, columns[:, k]), 0)
        return
    is_local = (columns >= 0) & (columns < values.shape[1])
    places = columns.clamp(0, values.shape[1] - 1)
    # One column at a time: clamped places may coincide, and one write must not undo another.
    for k in range(places.shape[1]):
        column = places[:, k : k + 1]
        values.scatter_(1, column, values.gather(1, column).masked_fill(is_local[:, k : k + 1], 0))


def _take_out_(student: torch.Tensor, teacher: torch.Tensor, taken_out: TakenOut | None) -> None:
    """Take the special columns out of a block [rows, c]: -inf for both models."""
    if taken_out is None:
        return
    position, read = taken_out
    is_local = (position >= 0) & (position < student.shape[1])
    index = position.clamp(0, student.shape[1] - 1)
    if read is not None:
        for logits, values in zip((student, teacher), read, strict=True):
            values.copy_(torch.where(is_local, logits.gather(1, index), values))
    if torch.compiler.is_compiling():
        for k in range(index.shape[1]):
            taken = bodies.is_column(student, position[:, k])
            student.masked_fill_(taken, NEGATIVE_INFINITY)
            teacher.masked_fill_(taken, NEGATIVE_INFINITY)
        return
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


def _columns_of_memory(memory_mib: int, column_bytes: int) -> int:
    return (memory_mib << 20) // max(1, column_bytes)


def relative(rows: slice, outer: slice) -> slice:
    """The same rows, counted from the first row of `outer`."""
    return slice(rows.start - outer.start, rows.stop - outer.start)


def common(a: slice, b: slice) -> slice | None:
    """The rows of both slices; None if they have none in common."""
    both = slice(max(a.start, b.start), min(a.stop, b.stop))
    return both if both.start < both.stop else None
