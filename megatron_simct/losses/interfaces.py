"""The interfaces: which rows and scores compare two models that do not share a tokenizer.

    paper    every segment is a row, scored at its first position. U = the shared tokens, and for a multi-token unit one
             more column: the mean log-probability of its labels, each model over its own k tokens (SimCT,
             arXiv:2605.07711, Eq. 6-9). The default. KNOWN FAILURE: where the student needs several tokens for what
             the teacher says in one, and the first of them is a shared token that the teacher would not say, the row
             pushes the student's correct first token down; and as q is renormalized over U, student mass that leaves
             U costs nothing. `student_mass_outside_u_sum` shows it.
    sum      as paper, with the sum of the unit's log-probabilities.
    code     SimCT's released code: the segments of its walk, raw logits, and the mean raw logit of the unit. Not
             invariant to a constant added to the logits of a unit's inner position. code_gh drops rows where the
             teacher's probability of U is below 1/2.
    exact    a partition: every shared token, the unit and the rest, each with its probability. The shared token that
             the unit's path begins with keeps what does not go on along it. Nothing is renormalized.
    alm      one event a segment: the probability of its bytes, both models' own tokens. No shared tokens, so it says
             nothing of what else could have been said.
    strict   only segments of one shared token (or the stop tokens) on each side; units are dropped and counted.
    strict_topk   as strict, over the student's k likeliest shared tokens of each row.
    uld      1:1 positions; the distance of the two sorted distributions, whatever the tokens. Both vocabularies count,
             so the ranks exchange their k largest probabilities of a row (arXiv:2402.12030).
    no_unit_loss, random_unit   ablations: paper and strict with other weights or other units (alignment/plan.py).
    kd       strict where both models have one tokenizer: U is the whole vocabulary.
    bytes    no rows of tokens: the two models' distributions over the next byte (bytes.py).
    sft      cross entropy on given responses; no teacher.

U is a set of byte strings. If a unit spells the bytes of a shared token w (the student sampled "8" "2", and "82" is
shared), the row has one column for them: the realized unit's score replaces column w, for both models.

What each of them needs and refuses is in needs.py, how the rows and their gradient follow from the logits in
row_terms.py, the passes over the vocabulary in two_pass.py. The gradient is formed by hand: differentiating through an
all-reduce would give each rank another one.

The loss is a sum over segments and never divided here: one division by the global label count happens in `update`.

Shapes: records.py's legend, and `c` shared tokens of this rank, `r` teacher rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config import InterfaceConfig
from megatron_simct.losses.bytes import ByteOrder, byte_loss
from megatron_simct.losses.needs import ALL_TOKENS, ROW_NEEDS, check_config, is_row
from megatron_simct.losses.row_terms import (
    FirstTokens,
    RowInputs,
    RowTerms,
    binary_events,
    compare_over_u,
    compare_top,
    cross_entropy,
    partition_of_events,
    sorted_distance,
    spread,
)
from megatron_simct.losses.shared_head import GivenScores, HeadScores, SharedColumns, SharedHead, TeacherScores
from megatron_simct.losses.tiles import GivenLogits, OutputLayer, StudentLogits
from megatron_simct.losses.two_pass import GradientWeights, RowPlan, Statistics, TwoPass
from megatron_simct.losses.vocab_parallel import copy_to_group, num_real_columns, reduce_packed
from megatron_simct.records import LabelBatch, SegmentKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What one micro-batch adds to the step; equal on every rank of the tensor-parallel group."""

    sum: torch.Tensor
    """0-dim, nats: the sum over rows, not divided by anything. Differentiable."""
    num_labels: torch.Tensor
    """0-dim int64: N, all student labels, dropped ones included: what the sum is later divided by, over all ranks."""
    metrics: dict[str, torch.Tensor]
    """0-dim float64, without gradient. Sums and counts to be added over micro-batches and ranks; ratios come later."""
    label_losses: torch.Tensor
    """[N], nats, without gradient: the sum's parts, a segment's at its first label, a byte position's at the label that
    its byte is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRows:
    """Which rows a context-parallel rank holds of the labels, where each rank holds some of each sequence.

    The labels themselves are few numbers and known to all ranks. A segment belongs to the rank that has the row of its
    first label; a unit that straddles a cut needs the log-probabilities of its other labels, and hands back their
    share of the gradient: 12 bytes a label between the ranks of `group` (4 for the raw logits of `code` on top).
    """

    index: torch.Tensor
    """int64 [n], ascending: the labels whose rows are here, one a row of student_hidden."""
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
) -> LossOutput:
    """The loss of one micro-batch, from what enters the student's output layer and that layer's shard.

    student_hidden [N, H_S], the row that predicts each student label, equal on every rank of `group`; output_weight
    [W, H_S], this rank's rows of the output layer; `labels` passed `check_labels` before it moved to the device. `sum`
    is differentiable: the gradient of student_hidden is the full one on every rank (one all-reduce in backward), that
    of output_weight this rank's; where Megatron's DDP owns output_weight it goes to main_grad in this call (tiles.py
    says what that asks of the caller). Collective over `group`; all ranks pass the same labels. Empty labels give a
    zero sum with zero gradients.

    label_rows: with context parallelism, the rows of student_hidden are those of these labels only; sum, num_labels and
    metrics are then this rank's share, to be added over label_rows.group. Not for interface bytes.

    A non-finite logit, of either model, makes the sum non-finite: the step is refused, no row is dropped silently.
    Raises ValueError for options without a meaning and for a missing shared head or teacher hidden states.
    """
    check_config(config)
    if config.interface == "bytes":
        if byte_order is None or labels.byte_batch is None:
            raise ValueError("interface bytes needs byte_order and the labels' byte_batch")
        if label_rows is not None:
            raise ValueError("interface bytes needs all rows of a response on one rank: no context parallelism")
        source = OutputLayer(
            copy_to_group(student_hidden, group),
            output_weight,
            num_columns=len(byte_order.columns),
            soft_cap=student_logit_softcap,
        )
        return _bytes_loss(source, labels, byte_order=byte_order, placement=placement, config=config, group=group)
    rows = _plan(labels, config, label_rows)
    if ROW_NEEDS[config.interface].shared and shared_head is None:
        raise ValueError(f"interface {config.interface} compares with a teacher: it needs shared_head")
    num_shared = rows.num_shared if ROW_NEEDS[config.interface].shared else 0
    if num_shared and labels.teacher_hidden is None:
        raise ValueError(f"interface {config.interface} scores {num_shared} segments: it needs teacher_hidden")
    source = OutputLayer(
        copy_to_group(student_hidden, group),
        output_weight,
        num_columns=_num_columns(output_weight.shape[0], placement),
        soft_cap=student_logit_softcap,
        order=rows.order,
    )
    teacher = None
    if num_shared:
        assert labels.teacher_hidden is not None and shared_head is not None, "checked above"
        hidden = labels.teacher_hidden.index_select(0, labels.teacher_hidden_index[rows.segments])
        teacher = HeadScores(hidden, shared_head, soft_cap=teacher_logit_softcap, dtype=source.dtype)
    columns = None if shared_head is None else shared_head.columns
    return _loss(
        source, teacher, labels, rows, columns=columns, placement=placement, config=config, group=group,
        label_rows=label_rows,
    )  # fmt: skip


def _bytes_loss(
    source: StudentLogits,
    labels: LabelBatch,
    *,
    byte_order: ByteOrder,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
) -> LossOutput:
    """`interface_loss` for the interface `bytes`; source reads rows in the order of the labels."""
    assert labels.byte_batch is not None, "checked by the callers"
    result = byte_loss(
        source,
        labels.student_labels,
        labels.byte_batch,
        order=byte_order,
        shard_start=placement.shard_start,
        divergence=config.divergence,
        js_beta=config.js_beta,
        group=group,
    )
    zero = torch.zeros((), dtype=torch.float64, device=source.device)
    num_labels = torch.full((), len(labels.student_labels), dtype=torch.int64, device=source.device)
    teacher_nll = labels.teacher_lse - labels.teacher_own_logit
    metrics = {
        "student_nll_sum": -result.log_probs.sum(dtype=torch.float64),
        "teacher_nll_sum": teacher_nll.sum(dtype=torch.float64),
        "num_student_labels": zero + num_labels,
        "num_teacher_labels": zero + len(teacher_nll),
    }
    poison = 0 * (metrics["student_nll_sum"] + metrics["teacher_nll_sum"])
    return LossOutput(
        sum=result.sum + poison.to(result.sum.dtype),
        num_labels=num_labels,
        metrics=metrics | result.metrics,
        label_losses=result.label_losses,
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
    """`interface_loss` from logits that exist: student_logits [N, W], teacher_logits [R, X], before any soft-cap.

    teacher_rows int64 [r]: the column of teacher_logits of each of the placement's teacher rows (in one process, with
    logits over the whole teacher vocabulary: placement.teacher_rows); None: the columns are the placement's rows,
    X = r. The teacher's logits are read a tile at a time. The gradient of student_logits is the only large tensor made.
    """
    check_config(config)
    if config.interface == "bytes":
        if byte_order is None or labels.byte_batch is None:
            raise ValueError("interface bytes needs byte_order and the labels' byte_batch")
        source = GivenLogits(student_logits, num_columns=len(byte_order.columns), soft_cap=student_logit_softcap)
        return _bytes_loss(source, labels, byte_order=byte_order, placement=placement, config=config, group=group)
    rows = _plan(labels, config, None)
    num_shared = rows.num_shared if ROW_NEEDS[config.interface].shared else 0
    if num_shared and teacher_logits is None:
        raise ValueError(f"interface {config.interface} scores {num_shared} segments: it needs teacher_logits")
    source = GivenLogits(
        student_logits,
        num_columns=_num_columns(student_logits.shape[1], placement),
        soft_cap=student_logit_softcap,
        order=rows.order,
    )
    teacher = None
    if num_shared:
        assert teacher_logits is not None and columns is not None, "shared rows need the teacher's logits and columns"
        teacher = GivenScores(
            teacher_logits,
            labels.teacher_hidden_index[rows.segments],
            columns,
            teacher_rows=teacher_rows,
            soft_cap=teacher_logit_softcap,
            dtype=source.dtype,
        )
    return _loss(
        source, teacher, labels, rows, columns=columns, placement=placement, config=config, group=group, label_rows=None
    )


def _num_columns(width: int, placement: VocabPlacement) -> int:
    return num_real_columns(
        shard_start=placement.shard_start, shard_width=width, vocab_size=placement.student_vocab_size
    )


@torch.no_grad()
def _plan(labels: LabelBatch, config: InterfaceConfig, label_rows: LabelRows | None) -> RowPlan:
    """Which rows the interface compares, and which of them need the whole softmax in their gradient; those here."""
    needs = ROW_NEEDS[config.interface]
    used = is_row(labels.kinds, config)
    starts, ends = labels.segments[:, 2], labels.segments[:, 3]
    num_labels = len(labels.student_labels)
    match needs.dense:
        case "none":
            dense = torch.zeros_like(labels.student_labels, dtype=torch.bool)
        case "units":
            dense = spread(used & (labels.kinds == SegmentKind.UNIT), starts, ends, num_labels).bool()
        case "segments":
            dense = spread(used, starts, ends, num_labels).bool()
        case "firsts":
            dense = torch.zeros_like(labels.student_labels, dtype=torch.bool).index_fill_(0, starts[used], True)
        case "labels":
            dense = torch.ones_like(labels.student_labels, dtype=torch.bool)
    match needs.special:
        case "none":
            special = None
        case "replaced":
            special = labels.replaced_columns.unsqueeze(1)
        case "first":
            is_unit = (labels.kinds == SegmentKind.UNIT).unsqueeze(1)
            everywhere = torch.arange(len(starts), device=starts.device)
            special = torch.where(is_unit, _first_tokens(labels, everywhere).special(), -1)
    shared = used if needs.first_rows else torch.zeros_like(used)
    if label_rows is not None:
        starts, dense = _place_here(labels, label_rows)[starts], dense[label_rows.index]
        shared = shared & (starts >= 0)
    return RowPlan.build(starts, shared=shared, dense=dense, special=special)


def _place_here(labels: LabelBatch, label_rows: LabelRows) -> torch.Tensor:
    """int64 [N]: the row of student_hidden that predicts each label, -1 where it is another rank's."""
    place = torch.full_like(labels.student_labels, -1)
    return place.index_copy(0, label_rows.index, torch.arange(len(label_rows.index), device=place.device))


def _first_tokens(labels: LabelBatch, chosen: torch.Tensor) -> FirstTokens:
    return FirstTokens(
        own=labels.student_labels[labels.segments[chosen, 2]],
        teacher=labels.teacher_first_columns[chosen],
        replaced=labels.replaced_columns[chosen],
    )


def _loss(
    source: StudentLogits,
    teacher: TeacherScores | None,
    labels: LabelBatch,
    plan: RowPlan,
    *,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
    label_rows: LabelRows | None,
) -> LossOutput:
    """Pass 1, the interface's algebra, pass 2."""
    if label_rows is None:
        here = torch.arange(len(labels.student_labels), device=source.device)
        mine = torch.ones_like(labels.kinds, dtype=torch.bool)
    else:
        here, mine = label_rows.index, torch.isin(labels.segments[:, 2], label_rows.index)
    with torch.no_grad():
        passes = TwoPass(
            source,
            teacher,
            plan,
            labels=labels.student_labels[here],
            columns=columns,
            shard_start=placement.shard_start,
            divergence=config.divergence,
            beta=config.js_beta,
            temperature=config.temperature,
            memory_mib=config.loss_memory_mib,
            group=group,
            topk=_topk(config, placement),
        )
        stats = passes.statistics()
        of_labels = stats if label_rows is None else _of_all_labels(stats, labels, label_rows, config)
        chosen = plan.segments
        if not ROW_NEEDS[config.interface].first_rows:
            chosen = (mine & is_row(labels.kinds, config)).nonzero().squeeze(1)
        rows = RowInputs(
            segments=labels.segments,
            chosen=chosen,
            has_unit=(labels.kinds == SegmentKind.UNIT)[chosen],
            weight=labels.weights[chosen].to(source.dtype),
            teacher_own=labels.teacher_own_logit.to(source.dtype),
            teacher_lse=labels.teacher_lse.to(source.dtype),
        )
        terms = _row_terms(passes, of_labels, rows, labels, config)
        value = _add_up(terms, stats, rows, here)
        label_losses = torch.zeros_like(terms.label_loss).index_copy(0, here, terms.label_loss[here])
        label_losses = label_losses.index_add(0, labels.segments[chosen, 2], terms.row_loss)
        counts_teacher = label_rows is None or dist.get_rank(label_rows.group) == 0
        metrics = _metrics(terms, stats, rows, labels, config, num_segments=mine.sum(), counts_teacher=counts_teacher)
        if source.needs_gradient:
            weights = terms.weights if label_rows is None else _weights_here(terms.weights, label_rows, config)
            passes.add_gradient(stats, weights)
    num_labels = torch.full((), len(here), dtype=torch.int64, device=source.device)
    return LossOutput(sum=source.attach(value), num_labels=num_labels, metrics=metrics, label_losses=label_losses)


def _of_all_labels(stats: Statistics, labels: LabelBatch, label_rows: LabelRows, config: InterfaceConfig) -> Statistics:
    """The statistics with those of labels [N] that all ranks need; the others are only known, and read, here."""

    def spread_out(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(labels.student_labels)).index_copy(0, label_rows.index, values)

    (log_probs,) = reduce_packed([spread_out(stats.log_probs)], dist.ReduceOp.SUM, label_rows.group)
    own = spread_out(stats.own)
    if _UNIT_SCORE.get(config.interface) == "raw":
        (own,) = reduce_packed([own], dist.ReduceOp.SUM, label_rows.group)
    return replace(
        stats,
        label_max=spread_out(stats.label_max),
        label_log_sum=spread_out(stats.label_log_sum),
        own=own,
        log_probs=log_probs,
    )


def _weights_here(weights: GradientWeights, label_rows: LabelRows, config: InterfaceConfig) -> GradientWeights:
    """The gradient's weights of the labels whose rows are here: what the segments of all ranks give them, added up."""
    own, softmax = weights.own_weight, weights.softmax_weight
    if ROW_NEEDS[config.interface].segments:  # else every rank has all of them itself
        own, softmax = reduce_packed([own, softmax], dist.ReduceOp.SUM, label_rows.group)
    return replace(weights, own_weight=own[label_rows.index], softmax_weight=softmax[label_rows.index])


def _topk(config: InterfaceConfig, placement: VocabPlacement) -> int:
    match config.interface:
        case "strict_topk":
            return config.topk
        case "uld":
            return min(config.uld_topk or ALL_TOKENS, placement.student_vocab_size)
    return 0


_UNIT_SCORE: dict[str, Literal["mean", "sum", "raw"]] = {"sum": "sum", "code": "raw", "code_gh": "raw"}


def _row_terms(
    passes: TwoPass, stats: Statistics, rows: RowInputs, labels: LabelBatch, config: InterfaceConfig
) -> RowTerms:
    least = 0.5 if config.interface == "code_gh" else config.min_teacher_mass
    match config.interface:
        case "sft":
            return cross_entropy(stats)
        case "alm":
            return binary_events(stats, rows, temperature=config.alm_temperature)
        case "uld":
            assert labels.teacher_topk is not None, "check_labels refuses uld without teacher_topk"
            return sorted_distance(stats, rows, labels.teacher_topk[labels.teacher_hidden_index[rows.chosen]])
        case "strict_topk":
            return compare_top(
                stats,
                rows,
                divergence=config.divergence,
                beta=config.js_beta,
                temperature=config.temperature,
                min_teacher_mass=least,
            )
        case "exact":
            return partition_of_events(
                passes,
                stats,
                rows,
                _first_tokens(labels, rows.chosen),
                divergence=config.divergence,
                beta=config.js_beta,
                min_teacher_mass=least,
            )
    return compare_over_u(
        passes,
        stats,
        rows,
        unit_score=_UNIT_SCORE.get(config.interface, "mean"),
        divergence=config.divergence,
        beta=config.js_beta,
        temperature=config.temperature,
        min_teacher_mass=least,
    )


def _add_up(terms: RowTerms, stats: Statistics, rows: RowInputs, here: torch.Tensor) -> torch.Tensor:
    """The sum over rows (or labels). Finite statistics add nothing to it, non-finite ones make it nan: a model that
    yields nan at a row that the interface does not use is broken all the same."""
    poison = 0 * stats.log_probs.sum() + 0 * (rows.teacher_lse - rows.teacher_own).sum()
    return terms.row_loss.sum() + terms.label_loss[here].sum() + poison


def _metrics(
    terms: RowTerms,
    stats: Statistics,
    rows: RowInputs,
    labels: LabelBatch,
    config: InterfaceConfig,
    *,
    num_segments: torch.Tensor,
    counts_teacher: bool,
) -> dict[str, torch.Tensor]:
    """Additive sums and counts, the same keys for every interface; statistics are those of the rows here."""

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.sum(dtype=torch.float64)

    needs, metrics = ROW_NEEDS[config.interface], {}
    kinds, used = labels.kinds[rows.chosen], ~terms.dropped
    for kind in SegmentKind:
        chosen = used & (kinds == kind)
        metrics[f"loss_{kind.name.lower()}_sum"] = total(torch.where(chosen, terms.row_loss, 0))
        metrics[f"rows_{kind.name.lower()}"] = total(chosen)
    # Mass of the shared tokens alone: a unit's own first step is not added, a replaced column counts.
    for name in ("student", "teacher"):
        outside = (1 - getattr(terms, f"{name}_mass")).clamp(min=0)
        metrics[f"{name}_mass_outside_u_sum"] = total(torch.where(used, outside, 0)) * needs.shared
    metrics["rows_same_top"] = total(used & stats.same_top if needs.shared else used[:0])
    metrics["rows_dropped"] = num_segments.double() * needs.segments - total(used)
    metrics["student_nll_sum"] = total(-stats.log_probs)
    metrics["teacher_nll_sum"] = total(labels.teacher_lse - labels.teacher_own_logit) * counts_teacher
    metrics["num_student_labels"] = total(torch.ones_like(stats.log_probs))
    metrics["num_teacher_labels"] = total(torch.ones_like(labels.teacher_lse)) * counts_teacher
    return metrics
