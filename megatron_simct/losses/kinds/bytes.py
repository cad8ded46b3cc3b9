"""The interface `bytes`: two models compared as distributions over the next byte.

With A_k the probability of a model's first k tokens of the response, the mass of a slot at byte position i is

    sum over its entries (row k, segment)  of  A_k / A_K * (probability of the segment's tokens in row k)

K being the row of the last boundary at or before i: relative to the realized path, in log
space. Two definitions:

    --simct-byte-bounds any             (alignment/byte_bounds.py) the position's loss is the least divergence
                                        that both models' known and unresolved masses permit (byte_bounds.py):
                                        0, its gradient too, whenever both are the same distribution over
                                        texts, each written out in its own tokenizer's cut, whatever that is
    --simct-byte-bounds longest-match   (alignment/byte_events.py) divided by their sum over the events of the
                                        position the masses are P_S and P_T, floored at FLOOR. A loose byte,
                                        which the models only bound, is an event of its own where the bounds
                                        of the two models lie apart; else it is part of the rest, or left out
                                        where there is no rest. 0 for tokenizers that take the longest match

Several teachers are mixed slot by slot before (`mixed_log_masses`), and then are one.

What is computed. Segments are consecutive in the order of the tokens' bytes, so a tile of columns in that
order is summed in one pass (`segment_reduce`). One MAX and one SUM over the tensor-parallel group, of one and
of 258 + (the segments behind the realized token's first byte) numbers a row; all that follows is a few
hundred numbers a byte, the same on every rank. Its gradient with respect to the segments' log-probabilities
g_s and the realized tokens' h comes back to the logits of row k as

    softmax * (g_s / probability of the segment - sum over the row's segments of g_s - h)  +  h * one-hot

in a second pass over the tiles, in the forward pass like every other interface.

Context parallelism. Each rank has the rows of some labels, and computes the positions whose last row it has.
It needs the log-probability of every label, 4 bytes each, for the A_k; and of segments of rows before the
last one that are another rank's, which only positions near a cut have: 4 bytes for each of these. Their
gradients go back the same way.

Shapes: `n` rows, `G` segments, `E` slots, `P` positions, `w` this rank's real columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.byte_events import byte_trie
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.losses.kinds.byte_bounds import Bounds, least_divergence
from megatron_simct.losses.tiles import OutputLayer, StudentLogits
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    add_at_,
    finite_reference,
    own_logits,
    reduce_packed,
    row_maxima,
)
from megatron_simct.records import (
    CAP,
    ENDED,
    FREE,
    OTHERS,
    REST,
    SLACK,
    STOP,
    ByteBatch,
    ByteEvents,
    ByteSideBatch,
    ByteSidePart,
)

FLOOR = 1e-8
"""Lower bound of every event probability: a model may give an event none at all."""
BOUND_TOLERANCE = 1e-4
"""Relative difference of bounds that counts as none: rounding."""
TILE = 4096
"""Columns at a time, at most ..."""
TILE_LOGITS = 1 << 22
"""... and logits at a time, at most (unless one column alone has more rows)."""

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""From the labels' log-probabilities [n] to what the positions of each label's bytes are multiplied by [n].
"""


@dataclass(frozen=True, eq=False)
class ByteOrder:
    """This rank's real columns in the order of their bytes."""

    columns: torch.Tensor
    """int64 [w]: local columns."""
    local: torch.Tensor
    """int64 [V + 1]: how many of this rank's columns come before each place in the whole vocabulary's order.
    """

    @classmethod
    def of(cls, table: TokenTable, *, shard_start: int, shard_end: int, device: torch.device) -> ByteOrder:
        """Byte order of the ids [shard_start, shard_end), padding included."""
        # order[j]: the id at place j of the whole vocabulary's byte order. `columns` keeps those of this
        # rank; `local` turns a place in the whole order into a place among them.
        order = byte_trie(table).order
        is_local = (order >= shard_start) & (order < shard_end)
        return cls(
            columns=torch.from_numpy(order[is_local] - shard_start).to(device),
            local=torch.from_numpy(np.append(0, is_local.cumsum())).to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowSums:
    """Statistics after the two all-reduces; identical on every rank."""

    maxima: torch.Tensor
    """[n]"""
    segments: torch.Tensor
    """[G], sums of e^{z - maximum of the row}."""
    totals: torch.Tensor
    """[n], the same over whole rows."""
    log_probs: torch.Tensor
    """[n], of the rows' own labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """The rows of a context-parallel rank, and what it sums of them."""

    part: ByteSidePart
    index: torch.Tensor
    """int64 [n], ascending: the labels whose rows this rank holds."""
    num_labels: int
    """N, of all ranks."""
    group: dist.ProcessGroup

    def complete(
        self, log_segments: torch.Tensor, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([G], [N]) for `part.sums`, from those of the rows that this rank holds. One all-reduce."""
        # Every exchanged segment is summed by one rank, the others send 0: a SUM gathers the values.
        exchanged = log_segments.new_zeros(self.part.num_exchanged)
        exchanged[self.part.sent] = log_segments[self.part.sent_segment]
        of_all = log_probs.new_zeros(self.num_labels).index_copy(0, self.index, log_probs)
        exchanged, of_all = reduce_packed([exchanged, of_all], dist.ReduceOp.SUM, self.group)
        return torch.cat([log_segments, exchanged[self.part.received]]), of_all

    def gradients(
        self, of_segments: torch.Tensor, of_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of what `complete` was given, from those of what it returned. One all-reduce."""
        # Of what `complete` returned, the first num_local segments are this rank's own; the others came from
        # ranks that need their gradient back.
        num_local = len(self.part.rows.segment_row)
        exchanged = of_segments.new_zeros(self.part.num_exchanged)
        exchanged[self.part.received] = of_segments[num_local:]
        exchanged, of_labels = reduce_packed([exchanged, of_labels], dist.ReduceOp.SUM, self.group)
        local_segments = of_segments[:num_local].index_add(
            0, self.part.sent_segment, exchanged[self.part.sent]
        )
        return local_segments, of_labels[self.index]


@torch.no_grad()
def teacher_byte_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    side: ByteSideBatch,
    *,
    order: ByteOrder,
    shard_start: int,
    group: dist.ProcessGroup | None,
    logit_softcap: float | None = None,
    shared: SharedRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probability of every slot [E], own logit [n], log-sum-exp [n]) from what enters a
    frozen output layer.

    hidden [n, H] and weight [W, H] as in `label_statistics`, whose two answers are the last two. shared: the
    rows are a context-parallel rank's; all ranks get all slots.
    """
    source = OutputLayer(hidden, weight, num_columns=len(order.columns), soft_cap=logit_softcap)
    rows = side if shared is None else shared.part.rows
    sums = _row_sums(source, labels, rows, order=order, shard_start=shard_start, group=group)
    lse = sums.maxima + sums.totals.log()
    log_segments, log_probs = _log_probs(sums, rows), sums.log_probs
    if shared is None:
        return log_masses(log_segments, log_probs, side), log_probs + lse, lse
    # A slot is added up by the rank that has its last row; the others send 0.
    slots = log_segments.new_zeros(len(side.last_row))
    slots[shared.part.slots] = log_masses(*shared.complete(log_segments, log_probs), shared.part.sums)
    dist.all_reduce(slots, group=shared.group)
    return slots, log_probs + lse, lse


def slot_log_masses(
    source: StudentLogits,
    labels: torch.Tensor,
    side: ByteSideBatch,
    *,
    order: ByteOrder,
    shard_start: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """[E]: one model's log-probability of every slot relative to its realized path, equal on
    every rank. No gradient.

    labels int64 [n], whose rows are those of `source`, in one order.
    """
    with torch.no_grad():
        sums = _row_sums(source, labels, side, order=order, shard_start=shard_start, group=group)
        return log_masses(_log_probs(sums, side), sums.log_probs, side)


@torch.no_grad()
def mixed_log_masses(
    log_masses: Sequence[torch.Tensor], weights: Sequence[float], events: ByteEvents
) -> torch.Tensor:
    """[E]: the log-probability of every slot in a mixture of teachers, from those in each of them.

    log_masses [E] each, relative to that teacher's path; weights: positive, adding up to 1; events: of
    a mixture, any of them. A teacher's share of a slot is of all it has at the position, events and what is
    outside of them; the mixture's is the weighted sum of those, its slack too.
    """
    device = log_masses[0].device
    position = torch.from_numpy(events.slot_position).long().to(device)
    # SLACK and CAP are parts of other slots.
    is_slack = torch.from_numpy(np.isin(events.slot_event, (SLACK, CAP))).to(device)
    shares = []
    for values, weight in zip(log_masses, weights, strict=True):
        total = _log_sums(values.masked_fill(is_slack, NEGATIVE_INFINITY), position, events.num_positions)
        shares.append(values - total[position] + math.log(weight))
    return torch.stack(shares).logsumexp(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLoss:
    """The loss of a micro-batch, equal on every rank."""

    sum: torch.Tensor
    """0-dim, nats."""
    log_probs: torch.Tensor
    """[n], of the student's labels; no gradient."""
    label_losses: torch.Tensor
    """[n]: the positions of the bytes in each label, added up; no gradient."""
    metrics: dict[str, torch.Tensor]
    """0-dim float64, additive."""


def byte_loss(
    source: StudentLogits,
    labels: torch.Tensor,
    batch: ByteBatch,
    *,
    order: ByteOrder,
    shard_start: int,
    divergence: str,
    js_beta: float,
    group: dist.ProcessGroup | None,
    shared: SharedRows | None = None,
    label_terms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weigh: Weigh | None = None,
) -> ByteLoss:
    """Sum over byte positions, differentiable through `source`. Collective over `group`.

    shared: `source` and `labels` are of a context-parallel rank's rows, the positions and the answer too, but
    for label_losses [N]. label_terms: what each label adds, [n], a function of its log-probability.
    """
    side = batch.student
    rows = side if shared is None else shared.part.rows
    with torch.no_grad():
        sums = _row_sums(source, labels, rows, order=order, shard_start=shard_start, group=group)
        log_segments, log_probs = _log_probs(sums, rows), sums.log_probs
        if shared is not None:
            log_segments, log_probs = shared.complete(log_segments, log_probs)
        # All slots of a position have one last row, so it does not matter which write wins.
        label_of_position = side.last_row.new_zeros(batch.num_positions)
        label_of_position.scatter_(0, batch.slot_position, side.last_row)
        factors = None
        if weigh is not None:
            assert shared is None, "weights need the log-probabilities of whole responses"
            factors = weigh(log_probs)[label_of_position]
    with torch.set_grad_enabled(source.needs_gradient):
        inputs = (log_segments.detach().requires_grad_(), log_probs.detach().requires_grad_())
        student = log_masses(inputs[0], inputs[1], side)
        if batch.slot_cap is not None:
            # The derivatives are known, so `student` itself is differentiated, weighted by them.
            values, of_student, shares = bounded_divergences(
                student.detach(), batch.teacher_logprobs, batch, divergence=divergence, js_beta=js_beta
            )
            if factors is not None:
                values, of_student = values * factors, of_student * factors[batch.slot_position]
            differentiated, weights = student, of_student
        else:
            teacher = batch.teacher_logprobs.to(student.dtype)
            values, shares = position_divergences(
                student, teacher, batch, divergence=divergence, js_beta=js_beta
            )
            values = values if factors is None else values * factors
            differentiated, weights = values.sum(), None
        total = values.sum()
        own = sums.log_probs.detach().requires_grad_()
        terms = None if label_terms is None else label_terms(own)
        if terms is not None:
            total = total + terms.sum()
        if source.needs_gradient:
            of_segments, of_labels = torch.autograd.grad(differentiated, inputs, weights)
            if shared is not None:
                # From the segments and labels that slots of this rank read to those whose rows it holds.
                of_segments, of_labels = shared.gradients(of_segments, of_labels)
            if terms is not None:
                of_labels = of_labels + torch.autograd.grad(terms.sum(), own)[0]
            _add_gradient(
                source, labels, rows, sums, of_segments, of_labels, order=order, shard_start=shard_start
            )
    with torch.no_grad():
        num_positions = values.new_full((), len(values))
        metrics = {"loss_bytes_sum": values.sum(), "byte_positions": num_positions} | shares
        label_losses = torch.zeros_like(log_probs).index_add(0, label_of_position, values.to(log_probs.dtype))
        if terms is not None:
            if shared is None:
                label_losses += terms
            else:
                label_losses.index_add_(0, shared.index, terms)
    return ByteLoss(
        sum=source.attach(total.detach()),
        log_probs=sums.log_probs,
        label_losses=label_losses,
        metrics={name: value.detach().double() for name, value in metrics.items()},
    )


@torch.no_grad()
def position_values(
    student: torch.Tensor, batch: ByteBatch, *, divergence: str, js_beta: float
) -> torch.Tensor:
    """[P]: the loss of each position. student [E]: log masses; the teacher's are the batch's."""
    divergences = position_divergences if batch.slot_cap is None else bounded_divergences
    teacher = batch.teacher_logprobs.to(student.dtype)
    return divergences(student, teacher, batch, divergence=divergence, js_beta=js_beta)[0]


@torch.no_grad()
def bounded_divergences(
    student: torch.Tensor, teacher: torch.Tensor, batch: ByteBatch, *, divergence: str, js_beta: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """([P], derivatives with respect to `student` [E], sums for the metrics). student,
    teacher [E]: log masses.
    """
    assert batch.slot_cap is not None, "events of plan_byte_bounds"
    position, event, num_positions = batch.slot_position, batch.slot_event, batch.num_positions
    is_event, is_free = (event <= STOP) | (event == OTHERS), event == FREE
    # Three kinds of slots: events with known mass, unresolved mass (FREE, ENDED), and CAP, which is a part of
    # ENDED and therefore not counted in the total.
    is_unresolved = is_free | (event == ENDED)
    has_cap, cap = batch.slot_cap >= 0, batch.slot_cap.clamp(min=0)
    shares, unresolved, caps = [], [], []
    for values in (student.double(), teacher.double()):
        total = _log_sums(values.masked_fill(event == CAP, NEGATIVE_INFINITY), position, num_positions)
        share = (values - total[position]).exp()
        zero = share.new_zeros(num_positions)
        free = zero.index_add(0, position, torch.where(is_free, share, 0))
        unresolved.append(zero.index_add(0, position, torch.where(is_unresolved, share, 0)))
        caps.append((free[position] + torch.where(has_cap, share[cap], 0))[is_event])
        shares.append(share)
    bounds = Bounds(
        position=position[is_event],
        known=(shares[0][is_event], shares[1][is_event]),
        caps=(caps[0], caps[1]),
        unresolved=(unresolved[0], unresolved[1]),
    )
    found = least_divergence(bounds, divergence=divergence, js_beta=js_beta)

    share = shares[0]
    # Chain rule: an event's cap is FREE + the slot that slot_cap names, so the caps' derivatives are added to
    # these two; then from shares to log masses, with the total of the position as the normalizer.
    of_share = torch.where(is_unresolved, found.of_unresolved[position], 0)
    of_share[is_event] = found.of_known
    of_caps = torch.zeros_like(share)
    of_caps[is_event] = found.of_caps
    of_free = share.new_zeros(num_positions).index_add(0, position, of_caps)
    of_share += torch.where(is_free, of_free[position], 0)
    of_share.index_add_(0, cap[has_cap], of_caps[has_cap])
    products = torch.where(share > 0, of_share * share, 0)
    common = share.new_zeros(num_positions).index_add(0, position, products)
    gradient = products - torch.where(event == CAP, 0, share * common[position])
    sums = {
        "bytes_student_unresolved_sum": unresolved[0].sum(),
        "bytes_teacher_unresolved_sum": unresolved[1].sum(),
        "bytes_may_agree_sum": ((found.values == 0) & (unresolved[0] + unresolved[1] > 0)).sum(),
    }
    return found.values, gradient.to(student.dtype), sums


def position_divergences(
    student: torch.Tensor, teacher: torch.Tensor, batch: ByteBatch, *, divergence: str, js_beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[P], and sums for the metrics. student, teacher [E]: log masses; differentiable in the student's."""
    position, event = batch.slot_position, batch.slot_event
    is_event, is_rest = event < SLACK, event == REST
    num_positions = batch.num_positions
    # The rest's slot of each position, and -1 for none.
    rest = torch.full((num_positions,), -1, dtype=torch.int64, device=position.device)
    index = torch.arange(len(position), device=position.device)
    rest = rest.scatter_reduce(0, position, torch.where(is_rest, index, -1), "amax")[position]
    with torch.no_grad():
        merged = _may_agree(student, teacher, batch, is_event=is_event, has_rest=rest >= 0)
    # A merged byte is added to the rest of its position; without a rest it is left out (`used`).
    target = torch.where(merged & (rest >= 0), rest, index)
    used = is_event & ((rest >= 0) | ~merged)
    alive = is_event & ~merged
    p = _floored(student, target, position, used, num_positions)
    q = _floored(teacher, target, position, used, num_positions)
    match divergence:
        case "reverse_kl":
            terms = p * (p / q).log()
        case "forward_kl":
            terms = q * (q / p).log()
        case "js":
            m = js_beta * q + (1 - js_beta) * p
            terms = js_beta * q * (q / m).log() + (1 - js_beta) * p * (p / m).log()
        case _:
            raise AssertionError(f"unknown divergence {divergence!r}")
    values = terms.new_zeros(num_positions).index_add(0, position, torch.where(alive, terms, 0))
    with torch.no_grad():
        shares = {
            "bytes_student_rest_sum": torch.where(alive & is_rest, p, 0).sum(),
            "bytes_teacher_rest_sum": torch.where(alive & is_rest, q, 0).sum(),
            "bytes_merged": merged.sum(),
        }
    return values, shares


def _may_agree(
    student: torch.Tensor,
    teacher: torch.Tensor,
    batch: ByteBatch,
    *,
    is_event: torch.Tensor,
    has_rest: torch.Tensor,
) -> torch.Tensor:
    """bool [E]: loose bytes whose probability may be the same in both models, for all that is known."""
    assert batch.student_loose is not None and batch.teacher_loose is not None, "bounds of the longest match"
    bounds = [
        _bounds(values, loose, batch, is_event=is_event, has_rest=has_rest)
        for values, loose in ((student, batch.student_loose), (teacher, batch.teacher_loose))
    ]
    (lower_s, upper_s), (lower_t, upper_t) = bounds
    overlap = (lower_s <= upper_t * (1 + BOUND_TOLERANCE)) & (lower_t <= upper_s * (1 + BOUND_TOLERANCE))
    return (batch.student_loose | batch.teacher_loose) & overlap


def _bounds(
    values: torch.Tensor,
    loose: torch.Tensor,
    batch: ByteBatch,
    *,
    is_event: torch.Tensor,
    has_rest: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Between what the probability of each byte lies, among the events of its position; both [E]."""
    position = batch.slot_position
    log_reference = _log_sums(values.masked_fill(~is_event, NEGATIVE_INFINITY), position, batch.num_positions)
    masses = (values - log_reference[position]).exp()  # events of a position add up to 1
    # The SLACK slot is empty for a model without loose bytes. OUTSIDE mass (mixtures) is not part of the
    # slack.
    is_slack = batch.slot_event == SLACK
    of_positions = masses.new_zeros(batch.num_positions)
    slack = of_positions.index_add(0, position, torch.where(is_slack, masses, 0))[position]
    total = torch.where(has_rest, 1, 1 + slack)  # the rest includes the slack
    upper = torch.where(loose, (masses + slack) / total, masses)
    return masses / total, upper


def _floored(
    log_masses: torch.Tensor,
    target: torch.Tensor,
    position: torch.Tensor,
    used: torch.Tensor,
    num_positions: int,
) -> torch.Tensor:
    """[E]: probabilities of the events that are left, at least FLOOR."""
    log_masses = torch.where(used, log_masses, NEGATIVE_INFINITY)
    # Log masses of a position are normalized relative to their maximum.
    reference = torch.full(
        (num_positions,), NEGATIVE_INFINITY, dtype=log_masses.dtype, device=log_masses.device
    )
    reference = finite_reference(reference.scatter_reduce(0, position, log_masses.detach(), "amax"))
    masses = (log_masses - reference[position]).exp()
    totals = masses.new_zeros(num_positions).index_add(0, position, masses).clamp(min=FLOOR)
    masses = torch.zeros_like(masses).index_add(0, target, masses)
    return (masses / totals[position]).clamp(min=FLOOR)


def log_masses(log_segments: torch.Tensor, log_probs: torch.Tensor, side: ByteSideBatch) -> torch.Tensor:
    """[G], [n] -> [E]: the entries of each slot added up, each relative to the realized path."""
    # log A_k; in float64, as the sums over a whole micro-batch are long and their differences short.
    path = torch.cat([log_probs.new_zeros(1, dtype=torch.float64), log_probs.double().cumsum(0)])
    # path[k] is log A_k, the log-probability of the first k labels, over all responses of the micro-batch:
    # only differences within a response are read.
    row, last = side.segment_row[side.entry_segment], side.last_row[side.entry_slot]
    terms = log_segments[side.entry_segment] + (path[row] - path[last]).to(log_segments.dtype)
    return _log_sums(terms, side.entry_slot, len(side.last_row))


def _log_sums(terms: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """[X] -> [size]: the log-sum-exp of the terms of each index; -inf, with gradient 0,
    where there are none.
    """
    maxima = torch.full((size,), NEGATIVE_INFINITY, dtype=terms.dtype, device=terms.device)
    maxima = finite_reference(maxima.scatter_reduce(0, index, terms.detach(), "amax"))
    sums = terms.new_zeros(size).index_add(0, index, (terms - maxima[index]).exp())
    empty = sums == 0
    return torch.where(empty, NEGATIVE_INFINITY, maxima + torch.where(empty, 1, sums).log())


def _log_probs(sums: _RowSums, side: ByteSideBatch) -> torch.Tensor:
    """[G]: log-probability of each segment in its row."""
    return sums.segments.log() - sums.totals.log()[side.segment_row]


def _row_sums(
    source: StudentLogits,
    labels: torch.Tensor,
    side: ByteSideBatch,
    *,
    order: ByteOrder,
    shard_start: int,
    group: dist.ProcessGroup | None,
) -> _RowSums:
    """Maxima, segment sums and own logits of every row: one MAX and one SUM over the ranks."""
    maxima = torch.full((source.num_rows,), NEGATIVE_INFINITY, dtype=source.dtype, device=source.device)
    segments = maxima.new_zeros(len(side.segment_row))
    own = torch.zeros_like(maxima)
    own_place = _own_places(labels, order, shard_start)
    for start, end, lengths in _tiles(side, order, source.num_rows):
        # Columns come in byte order, so that every segment is a run of columns in its row of the tile.
        tile = source.logits_at(order.columns[start:end])
        own += own_logits(tile, own_place, start)
        new_maxima = torch.maximum(maxima, row_maxima(tile))
        reference = finite_reference(new_maxima)
        segments *= (maxima - reference).exp()[side.segment_row]
        tile = (tile - reference.unsqueeze(1)).exp_()
        # The segments of the tile, row by row, cover it: one flat reduction with their lengths.
        segments += torch.segment_reduce(tile.flatten(), "sum", lengths=lengths, unsafe=True)
        maxima = new_maxima
    (global_maxima,) = reduce_packed([maxima], dist.ReduceOp.MAX, group)
    reference = finite_reference(global_maxima)
    segments *= (maxima - reference).exp()[side.segment_row]
    segments, own = reduce_packed([segments, own], dist.ReduceOp.SUM, group)
    totals = torch.zeros_like(own).index_add(0, side.segment_row, segments)
    return _RowSums(
        maxima=reference, segments=segments, totals=totals, log_probs=own - reference - totals.log()
    )


def _add_gradient(
    source: StudentLogits,
    labels: torch.Tensor,
    side: ByteSideBatch,
    sums: _RowSums,
    of_segments: torch.Tensor,
    of_labels: torch.Tensor,
    *,
    order: ByteOrder,
    shard_start: int,
) -> None:
    """Add the gradient of the logits, from those of the segments' [G] and the labels'
    [n] log-probabilities.
    """
    # log p(segment) = log(segment sum) - log(row sum): its gradient g gives every e^z of the segment g /
    # segment sum, and takes g / row sum from every e^z of the row. So does the label's gradient from its row.
    whole_row = of_labels.index_add(0, side.segment_row, of_segments) / sums.totals
    weights = torch.where(sums.segments > 0, of_segments / sums.segments, 0) - whole_row[side.segment_row]
    own_place = _own_places(labels, order, shard_start)
    for start, end, lengths in _tiles(side, order, source.num_rows):
        columns = order.columns[start:end]
        tile = (source.logits_at(columns) - sums.maxima.unsqueeze(1)).exp_()
        tile *= weights.repeat_interleave(lengths, output_size=tile.numel()).view_as(tile)
        add_at_(tile, (own_place - start).unsqueeze(1), of_labels.unsqueeze(1))
        source.add_gradient_at(columns, tile)


def _tiles(side: ByteSideBatch, order: ByteOrder, num_rows: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Ranges of this rank's columns in byte order, and how many columns of the range each segment [G] has."""
    num_columns = len(order.columns)
    first = order.local[side.segment_start]
    # A segment ends where the next one of its row begins, the last one of a row behind all columns.
    last_of_row = torch.ones_like(side.segment_row, dtype=torch.bool)
    last_of_row[:-1] = side.segment_row[1:] != side.segment_row[:-1]
    ends = torch.where(last_of_row, num_columns, first.roll(-1))
    width = min(TILE, max(1, TILE_LOGITS // max(1, num_rows)))
    for start in range(0, num_columns, width):
        end = min(start + width, num_columns)
        yield start, end, ends.clamp(start, end) - first.clamp(start, end)


def _own_places(labels: torch.Tensor, order: ByteOrder, shard_start: int) -> torch.Tensor:
    """int64 [n]: the place of each label among this rank's columns in byte order, -1 if
    another rank has it.
    """
    num_columns = len(order.columns)
    # place: from a local column to its place in byte order; one entry more, for padding and other ranks.
    place = labels.new_full((num_columns + 1,), -1)
    place[order.columns] = torch.arange(num_columns, device=labels.device)
    local = labels - shard_start
    return torch.where((local >= 0) & (local < num_columns), place[local.clamp(0, num_columns)], -1)
