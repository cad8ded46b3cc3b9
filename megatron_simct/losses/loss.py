"""The loss of one micro-batch: which rows there are, pass 1, the interface's value function, its gradient,
pass 2.

    kinds/          one method a file: what it compares, its equation, what it needs
    rows.py         what an interface is, and the numbers that its value function sees
    two_pass.py, top_columns.py, entries.py     the passes over the vocabulary
    divergences.py  sums over the shared columns, and what differs between the divergences
    tiles.py        where the student's logits come from, and the way back of their gradient

The loss is a sum over segments and never divided here: one division by the global label count happens in
`update`. The gradient by the logits is formed by hand: differentiating through an all-reduce would give each
rank another one.

Shapes: records.py's legend, and `c` shared tokens of this rank, `r` teacher rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.checks import check_config
from megatron_simct.losses.entries import Entries
from megatron_simct.losses.kinds.bytes import ByteOrder, SharedRows, Weigh, byte_loss
from megatron_simct.losses.kinds.exact import FirstTokens
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.policy_gradient import importance_weights, of_rewards, reward_metrics
from megatron_simct.losses.rows import RowNeeds, Rows, RowValues, Statistics, is_row, segments_to_labels
from megatron_simct.losses.shared_head import (
    GivenScores,
    HeadScores,
    SharedColumns,
    SharedHead,
    TeacherScores,
)
from megatron_simct.losses.tiles import GivenLogits, OutputLayer, StudentLogits
from megatron_simct.losses.top_columns import TopColumns
from megatron_simct.losses.two_pass import GradientWeights, RowPlan, TwoPass
from megatron_simct.losses.vocab_parallel import copy_to_group, num_real_columns, reduce_packed
from megatron_simct.records import LabelBatch, SegmentKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What one micro-batch adds to the step; equal on every rank of the tensor-parallel group."""

    sum: torch.Tensor
    """0-dim, nats: the sum over rows, not divided by anything. Differentiable."""
    num_labels: torch.Tensor
    """0-dim int64: N, all student labels, dropped ones included: what the sum is later divided
    by, over all ranks.
    """
    metrics: dict[str, torch.Tensor]
    """0-dim float64, without gradient.

    Sums and counts to be added over micro-batches and ranks; ratios come later.
    """
    label_losses: torch.Tensor
    """[N], nats, without gradient: the sum's parts, a segment's at its first label, a byte position's at the
    label that its byte is in."""
    log_probs: torch.Tensor
    """[n], nats, without gradient: of the labels whose rows this rank holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRows:
    """Which rows a context-parallel rank holds of the labels, where each rank holds some of each sequence.

    The labels themselves are few numbers and known to all ranks. A segment belongs to the rank that has the
    row of its first label; a unit that straddles a cut needs the log-probabilities of its other labels, and
    hands back their share of the gradient: 12 bytes a label between the ranks of `group` (4 for the raw
    logits of `code` on top). kinds/bytes.py describes what `bytes` exchanges.
    """

    index: torch.Tensor
    """int64 [n], ascending: the labels whose rows this rank holds, one a row of student_hidden."""
    group: dist.ProcessGroup


def interface_loss(
    student_hidden: torch.Tensor,
    output_weight: torch.Tensor,
    labels: LabelBatch,
    *,
    shared_head: SharedHead | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_softcap: float | None = None,
    byte_order: ByteOrder | None = None,
    label_rows: LabelRows | None = None,
    importance_cap: float | None = None,
) -> LossOutput:
    """The loss of one micro-batch, from what enters the student's output layer and that layer's shard.

    student_hidden [N, H_S], the row that predicts each student label, equal on every rank of `group`;
    output_weight [W, H_S], this rank's rows of the output layer; `labels` passed `check_labels` before it
    moved to the device. `sum` is differentiable: the gradient of student_hidden is the full one on every rank
    (one all-reduce in backward), that of output_weight this rank's; where Megatron's DDP owns output_weight
    it goes to main_grad in this call (see tiles.py for the conditions). Collective over `group`;
    all ranks pass the same labels. Empty labels give a zero sum with zero gradients.

    label_rows: with context parallelism, the rows of student_hidden are those of these labels only; sum,
    num_labels and metrics are then this rank's share, to be added over label_rows.group; label_losses too.

    importance_cap: weight each segment, or byte position, by how likely the response before it is, compared
    with when it was sampled, capped at this value (policy_gradient.py); None: no weights.

    A non-finite logit, of either model, makes the sum non-finite: the step is refused, no row is
    dropped silently. Raises ValueError for options without a meaning and for a missing shared head or
    teacher hidden states.
    """
    check_config(config)

    def source(num_columns: int, order: torch.Tensor | None) -> OutputLayer:
        hidden = copy_to_group(student_hidden, group)
        return OutputLayer(
            hidden, output_weight, num_columns=num_columns, soft_cap=student_logit_softcap, order=order
        )

    def teacher(index: torch.Tensor, dtype: torch.dtype) -> HeadScores:
        if shared_head is None:
            raise ValueError(f"interface {config.interface} compares with a teacher: it needs shared_head")
        if labels.teacher_hidden is None:
            raise ValueError(
                f"interface {config.interface} scores {len(index)} segments: it needs teacher_hidden"
            )
        hidden = labels.teacher_hidden.index_select(0, index)
        return HeadScores(hidden, shared_head, soft_cap=teacher_logit_softcap, dtype=dtype)

    columns = None if shared_head is None else shared_head.columns
    return _loss(
        source, teacher, labels, width=output_weight.shape[0], columns=columns, placement=placement,
        config=config, group=group, byte_order=byte_order, label_rows=label_rows,
        importance_cap=importance_cap,
    )  # fmt: skip


def _bytes_loss(
    source: StudentLogits,
    labels: LabelBatch,
    *,
    byte_order: ByteOrder,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
    label_rows: LabelRows | None,
    weigh: Weigh | None,
) -> LossOutput:
    """`interface_loss` for the interface `bytes`; source reads rows in the order of the labels."""
    assert labels.byte_batch is not None, "checked by the callers"
    local, shared = labels.student_labels, None
    if label_rows is not None:
        assert labels.byte_batch.part is not None, "the events of a context-parallel rank"
        local = local[label_rows.index]
        shared = SharedRows(
            part=labels.byte_batch.part,
            index=label_rows.index,
            num_labels=len(labels.student_labels),
            group=label_rows.group,
        )
    index = torch.arange(len(local), device=source.device) if label_rows is None else label_rows.index
    rewards = None if labels.advantages is None else partial(of_rewards, labels=labels, local=index)
    result = byte_loss(
        source,
        local,
        labels.byte_batch,
        order=byte_order,
        shard_start=placement.shard_start,
        divergence=config.divergence,
        js_beta=config.js_beta,
        group=group,
        shared=shared,
        label_terms=rewards,
        weigh=weigh,
    )
    zero = torch.zeros((), dtype=torch.float64, device=source.device)
    num_labels = torch.full((), len(local), dtype=torch.int64, device=source.device)
    teacher_nll = labels.teacher_lse - labels.teacher_own_logit
    if label_rows is not None and dist.get_rank(label_rows.group) > 0:
        teacher_nll = teacher_nll[:0]  # counted by one of the ranks
    metrics = {
        "student_nll_sum": -result.log_probs.sum(dtype=torch.float64),
        "teacher_nll_sum": teacher_nll.sum(dtype=torch.float64),
        "num_student_labels": zero + num_labels,
        "num_teacher_labels": zero + len(teacher_nll),
    }
    if rewards is not None:
        metrics |= reward_metrics(result.log_probs, rewards(result.log_probs), labels, index)
    if weigh is not None:
        metrics["importance_weight_sum"] = weigh(result.log_probs).sum(dtype=torch.float64)
    # 0 if all statistics are finite, else nan: it makes the sum of a broken model non-finite.
    nan_if_not_finite = 0 * (metrics["student_nll_sum"] + metrics["teacher_nll_sum"])
    return LossOutput(
        sum=result.sum + nan_if_not_finite.to(result.sum.dtype),
        num_labels=num_labels,
        metrics=metrics | result.metrics,
        label_losses=result.label_losses,
        log_probs=result.log_probs,
    )


def interface_loss_from_logits(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: LabelBatch,
    *,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None = None,
    teacher_rows: torch.Tensor | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_softcap: float | None = None,
    byte_order: ByteOrder | None = None,
) -> LossOutput:
    """`interface_loss` from logits that exist: student_logits [N, W], teacher_logits [R, X],
    before any soft-cap.

    teacher_rows int64 [r]: the column of teacher_logits of each of the placement's teacher rows (in one
    process, with logits over the whole teacher vocabulary: placement.teacher_rows); None: the columns are the
    placement's rows, X = r. The teacher's logits are read a tile at a time. The gradient of student_logits is
    the only large tensor made.
    """
    check_config(config)

    def source(num_columns: int, order: torch.Tensor | None) -> GivenLogits:
        return GivenLogits(
            student_logits, num_columns=num_columns, soft_cap=student_logit_softcap, order=order
        )

    def teacher(index: torch.Tensor, dtype: torch.dtype) -> GivenScores:
        if teacher_logits is None or columns is None:
            raise ValueError(
                f"interface {config.interface} scores {len(index)} segments: it needs teacher_logits"
            )
        return GivenScores(
            teacher_logits,
            index,
            columns,
            teacher_rows=teacher_rows,
            soft_cap=teacher_logit_softcap,
            dtype=dtype,
        )

    return _loss(
        source, teacher, labels, width=student_logits.shape[1], columns=columns, placement=placement,
        config=config, group=group, byte_order=byte_order, label_rows=None,
    )  # fmt: skip


def _num_columns(width: int, placement: VocabPlacement) -> int:
    return num_real_columns(
        shard_start=placement.shard_start, shard_width=width, vocab_size=placement.student_vocab_size
    )


@torch.no_grad()
def _plan(labels: LabelBatch, needs: RowNeeds, label_rows: LabelRows | None) -> RowPlan:
    """The rows of this rank that the interface compares, and which of them need the whole
    softmax in their gradient.
    """
    used = is_row(labels.kinds, needs)
    # The student's part of (ts, te, ss, se). `dense` is indexed by labels [N], `special` and `shared` by
    # segments.
    starts, ends = labels.segments[:, 2], labels.segments[:, 3]
    num_labels = len(labels.student_labels)
    match needs.dense:
        case "none":
            dense = torch.zeros_like(labels.student_labels, dtype=torch.bool)
        case "units":
            dense = segments_to_labels(labels.kinds == SegmentKind.UNIT, starts, ends, num_labels).bool()
        case "segments":
            dense = segments_to_labels(used, starts, ends, num_labels).bool()
        case "firsts":
            # The row of a segment that is not used is none: one row more, cut off behind.
            rows = torch.where(used, starts, num_labels)
            dense = torch.zeros_like(rows.new_empty(num_labels + 1), dtype=torch.bool)
            dense = dense.index_fill_(0, rows, True)[:num_labels]
        case "labels":
            dense = torch.ones_like(labels.student_labels, dtype=torch.bool)
    match needs.special:
        case "none":
            special = None
        case "replaced":
            special = labels.replaced_columns.unsqueeze(1)
        case "first":
            is_unit = (labels.kinds == SegmentKind.UNIT).unsqueeze(1)
            special = torch.where(is_unit, FirstTokens.of(labels).special(), -1)
    shared = used if needs.first_rows else torch.zeros_like(used)
    if label_rows is not None:
        # From labels to this rank's rows of student_hidden; a segment whose first label is elsewhere gets -1.
        starts, dense = _local_rows_of_labels(labels, label_rows)[starts], dense[label_rows.index]
        shared = shared & (starts >= 0)
    return RowPlan.build(starts, shared=shared, dense=dense, special=special)


def _local_rows_of_labels(labels: LabelBatch, label_rows: LabelRows) -> torch.Tensor:
    """int64 [N]: the row of student_hidden that predicts each label, -1 if it is another rank's."""
    place = torch.full_like(labels.student_labels, -1)
    return place.index_copy(0, label_rows.index, torch.arange(len(label_rows.index), device=place.device))


def _loss(
    make_source: Callable[[int, torch.Tensor | None], StudentLogits],
    make_teacher: Callable[[torch.Tensor, torch.dtype], TeacherScores],
    labels: LabelBatch,
    *,
    width: int,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
    byte_order: ByteOrder | None,
    label_rows: LabelRows | None,
    importance_cap: float | None = None,
) -> LossOutput:
    """make_source: called with the number of real columns and the order of the rows. make_teacher: called
    with the teacher's rows, in that order, and a dtype.
    """
    interface, config = interface_of(config), config.method()
    needs = interface.rows(config)
    weigh = _weigh(labels, importance_cap) if importance_cap is not None else None
    if needs is None or interface.value is None:
        if byte_order is None or labels.byte_batch is None:
            raise ValueError("interface bytes needs byte_order and the labels' byte_batch")
        source = make_source(len(byte_order.columns), None)
        return _bytes_loss(
            source, labels, byte_order=byte_order, placement=placement, config=config, group=group,
            label_rows=label_rows, weigh=weigh,
        )  # fmt: skip
    if needs.entries and label_rows is not None:
        raise ValueError(f"interface {config.interface} needs all rows on one rank: no context parallelism")
    if labels.advantages is not None:
        needs = replace(needs, dense="labels")
    plan = _plan(labels, needs, label_rows)
    source = make_source(_num_columns(width, placement), plan.order)
    teacher = None
    if needs.shared and plan.num_shared:
        teacher = make_teacher(labels.teacher_hidden_index[plan.segments], source.dtype)
    if label_rows is None:
        # local [n]: the labels of this rank's rows. is_local [segments]: the segments that start at one of
        # them.
        local = torch.arange(len(labels.student_labels), device=source.device)
        is_local = torch.ones_like(labels.kinds, dtype=torch.bool)
    else:
        local, is_local = label_rows.index, torch.isin(labels.segments[:, 2], label_rows.index)
    with torch.no_grad():
        passes = _passes(source, teacher, plan, labels, local, needs, columns, placement, config, group)
        stats = passes.statistics()
        if weigh is not None:
            assert label_rows is None and needs.segments, "Config.check refuses what has no weights"
            # The response before a segment ends with the label before its first one, and so does its weight.
            factors = weigh(stats.log_probs)
            labels = replace(labels, weights=labels.weights * factors[labels.segments[:, 2]])
        if needs.first_rows:
            chosen = plan.segments
        else:
            chosen = (is_local & is_row(labels.kinds, needs)).nonzero().squeeze(1)
        rows = Rows(
            config=config,
            labels=labels,
            chosen=chosen,
            weight=labels.weights[chosen].to(source.dtype),
            statistics=stats if label_rows is None else _of_all_labels(stats, labels, label_rows, needs),
            teacher_own=labels.teacher_own_logit.to(source.dtype),
            teacher_lse=labels.teacher_lse.to(source.dtype),
            deficits=passes.deficits if isinstance(passes, TwoPass) else None,
        )
    with torch.set_grad_enabled(source.needs_gradient):
        values = interface.value(rows)
        weight = rows.kept(values.teacher_mass)
        # where, not a product with 0: what a dropped row computed may be anything.
        if needs.segments:
            row_losses = torch.where(weight == 0, 0, values.value * weight)
        else:
            row_losses = values.value[local]
        of_units = _unit_losses(values.units, labels, is_local, like=row_losses)
        total = row_losses.sum() + of_units.sum()
        rewarded = None
        if labels.advantages is not None:
            rewarded = of_rewards(rows.log_probs[local], labels, local)
            total = total + rewarded.sum()
        gradient = _gradient(total, rows, needs) if source.needs_gradient else None
    with torch.no_grad():
        # Finite statistics add nothing, non-finite ones make it nan: a model that yields nan at a row that
        # the interface does not use is broken all the same.
        nan_if_not_finite = 0 * stats.log_probs.sum() + 0 * (rows.teacher_lse - rows.teacher_own).sum()
        label_losses = torch.zeros_like(rows.log_probs)
        # A segment's loss is booked at its first student label.
        label_losses.index_add_(0, rows.start if needs.segments else local, row_losses)
        label_losses.index_add_(0, labels.segments[:, 2], of_units)
        counts_teacher = label_rows is None or dist.get_rank(label_rows.group) == 0
        metrics = _metrics(
            values,
            row_losses,
            weight == 0,
            stats,
            rows,
            needs,
            num_segments=is_local.sum(),
            counts_teacher=counts_teacher,
        )
        if weigh is not None:
            metrics["importance_weight_sum"] = factors.sum(dtype=torch.float64)
        if values.units is not None:
            metrics["loss_unit_sum"] += of_units.sum(dtype=torch.float64)
            counted = (is_local & (labels.kinds == SegmentKind.UNIT) & (labels.weights != 0)).sum()
            metrics["rows_unit"] += counted
            metrics["rows_dropped"] -= counted
        if rewarded is not None:
            label_losses.index_add_(0, local, rewarded)
            metrics |= reward_metrics(rows.log_probs[local], rewarded, labels, local)
        if gradient is not None:
            if label_rows is not None:
                gradient = _local_weights(gradient, label_rows, needs)
            passes.add_gradient(stats, gradient)
    num_labels = torch.full((), len(local), dtype=torch.int64, device=source.device)
    value = total.detach() + nan_if_not_finite
    return LossOutput(
        sum=source.attach(value),
        num_labels=num_labels,
        metrics=metrics,
        label_losses=label_losses,
        log_probs=stats.log_probs,
    )


def _weigh(labels: LabelBatch, cap: float) -> Weigh:
    """From the labels' log-probabilities [N] to the importance weights [N]."""
    old, starts = labels.sampling_log_probs, labels.response_starts
    if old is None or starts is None:
        raise ValueError("importance weights need sampling_log_probs and response_starts of the labels")
    return partial(importance_weights, old_log_probs=old, response_starts=starts, cap=cap)


def _unit_losses(
    units: torch.Tensor | None, labels: LabelBatch, is_local: torch.Tensor, *, like: torch.Tensor
) -> torch.Tensor:
    """[S]: the weighted loss of units without a row; zeros if the interface has none."""
    weight = labels.weights.to(like.dtype)
    if units is None:
        return torch.zeros_like(weight)
    used = is_local & (labels.kinds == SegmentKind.UNIT) & (weight != 0)
    return torch.where(used, units * weight, 0)


def _passes(
    source: StudentLogits,
    teacher: TeacherScores | None,
    plan: RowPlan,
    labels: LabelBatch,
    local: torch.Tensor,
    needs: RowNeeds,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
) -> TwoPass | TopColumns | Entries:
    given = (source, teacher, plan)
    named = {
        # All of these are indexed like this rank's rows, not like the labels of the micro-batch.
        "labels": labels.student_labels[local],
        "columns": columns,
        "shard_start": placement.shard_start,
        "memory_mib": config.loss_memory_mib,
        "group": group,
    }
    if needs.entries:
        assert labels.entries is not None, "check_labels refuses labels without entries"
        return Entries(*given, entries=labels.entries, **named)
    if needs.top:
        k = needs.top if needs.shared else min(needs.top, placement.student_vocab_size)
        return TopColumns(*given, k=k, **named)
    return TwoPass(
        *given,
        divergence=config.divergence,
        beta=config.js_beta,
        temperature=config.temperature,
        outside=needs.outside,
        **named,
    )


def _gradient(total: torch.Tensor, rows: Rows, needs: RowNeeds) -> GradientWeights:
    """The gradient of the sum with respect to the statistics of the rows."""
    leaves = list(rows.leaves.values())
    if rows.shared is not None:
        leaves.append(rows.shared[2])
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    # In the order of Rows.leaves; the scale of the shared columns is there only if a divergence was taken.
    log_probs, own, log_sums, special, outside, top, entries, *scale = found
    # log p(label) = own - log-sum-exp, so a gradient g of log p adds g to the label's logit and -g softmax to
    # its row; log_sums adds the softmax alone.
    softmax = log_sums - log_probs
    softmax_of_all = None
    if needs.outside:
        # The interface does not move its first rows' log-sum-exp: what does is a reward.
        softmax_of_all = softmax if rows.labels.advantages is not None else None
        # `outside` is a sum of e^(z - label_max); the softmax of pass 2 divides by e^(label_log_sum).
        in_softmax = outside * rows.statistics.label_log_sum[rows.start].exp()
        softmax = softmax.index_copy(0, rows.start, in_softmax)
    shared = None
    if rows.shared is not None:
        norms, offset, _ = rows.shared
        # Scores are z / temperature: the chain rule's factor for the logits.
        shared = (norms, offset, scale[0] / rows.config.temperature)
    return GradientWeights(
        own_weight=log_probs + own,
        softmax_weight=softmax,
        all_columns_weight=softmax_of_all,
        shared=shared,
        special_weight=special if needs.special == "first" else None,
        top_weight=top if needs.top else None,
        entry_weight=entries if needs.entries else None,
        own_outside_dense=needs.raw,
    )


def _of_all_labels(
    stats: Statistics, labels: LabelBatch, label_rows: LabelRows, needs: RowNeeds
) -> Statistics:
    """The statistics as numbers of all labels [N]. log_probs (and own, if the interface reads raw logits) are
    gathered from all ranks; the others are only valid, and only read, at this rank's labels.
    """

    def to_all_labels(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(labels.student_labels)).index_copy(0, label_rows.index, values)

    # Each label's row is on one rank, and the others have 0 there: a SUM gathers the values.
    (log_probs,) = reduce_packed([to_all_labels(stats.log_probs)], dist.ReduceOp.SUM, label_rows.group)
    own = to_all_labels(stats.own)
    if needs.raw:
        (own,) = reduce_packed([own], dist.ReduceOp.SUM, label_rows.group)
    return replace(
        stats,
        label_max=to_all_labels(stats.label_max),
        label_log_sum=to_all_labels(stats.label_log_sum),
        own=own,
        log_probs=log_probs,
    )


def _local_weights(weights: GradientWeights, label_rows: LabelRows, needs: RowNeeds) -> GradientWeights:
    """The gradient's weights of the labels whose rows this rank holds, summed over the
    segments of all ranks.
    """
    # [N] on every rank: what this rank's segments ask of all labels, also of those whose rows are elsewhere.
    own, softmax = weights.own_weight, weights.softmax_weight
    if needs.segments:  # else every rank has all of them itself
        own, softmax = reduce_packed([own, softmax], dist.ReduceOp.SUM, label_rows.group)
    all_columns = weights.all_columns_weight
    if all_columns is not None:
        all_columns = all_columns[label_rows.index]
    return replace(
        weights,
        own_weight=own[label_rows.index],
        softmax_weight=softmax[label_rows.index],
        all_columns_weight=all_columns,
    )


def _metrics(
    values: RowValues,
    row_losses: torch.Tensor,
    dropped: torch.Tensor,
    stats: Statistics,
    rows: Rows,
    needs: RowNeeds,
    *,
    num_segments: torch.Tensor,
    counts_teacher: bool,
) -> dict[str, torch.Tensor]:
    """Additive sums and counts, the same keys for every interface; statistics of the rows of this rank."""

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.detach().sum(dtype=torch.float64)

    labels, metrics = rows.labels, {}
    kinds, used = labels.kinds[rows.chosen], ~dropped
    for kind in SegmentKind:
        # Rows without segments (`sft`) are of no kind.
        chosen = used & (kinds == kind)
        metrics[f"loss_{kind.name.lower()}_sum"] = total(
            torch.where(chosen, row_losses, 0) if needs.segments else row_losses[:0]
        )
        metrics[f"rows_{kind.name.lower()}"] = total(chosen)
    # Mass of the shared tokens alone: a unit's own first step is not added, a replaced column counts.
    for name, mass in (("student", values.student_mass), ("teacher", values.teacher_mass)):
        outside = row_losses[:0] if mass is None else torch.where(used, (1 - mass).clamp(min=0), 0)
        metrics[f"{name}_mass_outside_u_sum"] = total(outside)
    metrics["rows_same_top"] = total(used & stats.same_top if needs.shared else used[:0])
    metrics["rows_dropped"] = (num_segments.double() if needs.segments else 0) - total(used)
    metrics["student_nll_sum"] = total(-stats.log_probs)
    # The teacher's labels are known to all context-parallel ranks: one of them counts them.
    teacher_nll = labels.teacher_lse - labels.teacher_own_logit
    if not counts_teacher:
        teacher_nll = teacher_nll[:0]
    metrics["teacher_nll_sum"] = total(teacher_nll)
    metrics["num_student_labels"] = total(torch.ones_like(stats.log_probs))
    metrics["num_teacher_labels"] = total(torch.ones_like(teacher_nll))
    return metrics
