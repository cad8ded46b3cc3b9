"""The interfaces: which rows and scores compare two models that do not share a tokenizer.

    paper    every segment is a row, scored at its first position. U = the shared tokens, and for a multi-token unit one
             more column: the mean log-probability of its labels, each model over its own k tokens (SimCT,
             arXiv:2605.07711, Eq. 6-9). The default. KNOWN FAILURE: where the student needs several tokens for what
             the teacher says in one, and the first of them is a shared token that the teacher would not say, the row
             pushes the student's correct first token down; and as q is renormalized over U, student mass that leaves
             U costs nothing. `student_mass_outside_u_sum` shows it.
    strict   only segments of one shared token (or the stop tokens) on each side; units are dropped and counted.
    bytes    no rows of tokens: the two models' distributions over the next byte (bytes.py).
    sft      cross entropy on given responses; no teacher.

U is a set of byte strings. If a unit spells the bytes of a shared token w (the student sampled "8" "2", and "82" is
shared), the row has one column for them: the realized unit's score replaces column w, for both models.

What is computed. With z the logits of the segment's first row, LSE their log-sum-exp over the real vocabulary, u the
mean log-probability of the unit and tau the temperature, the scores of a row are (z_c - LSE) / tau and u / tau. The
softmax over U does not see a constant, so LSE is added to all of them: z_c / tau and (u + LSE) / tau. Then the maxima
and sums over shared columns do not wait for LSE, and one MAX and one SUM reduction do for everything that crosses
ranks: 12 bytes a student label and 28 a segment in float32 (js: 8 more in a third reduction, 4 less in the second).

Gradient with respect to the student's logits, with g the divergence's gradient with respect to the scores (zero sum
over a row): the shared columns of the first row get g_c / tau. The unit's share h = g_u / tau goes through each of its
k labels, h / k (onehot - softmax), and comes back through the added LSE, + h softmax at the first row. Each logit row's
gradient adds up to 0. It is formed by hand in the forward pass: differentiating through an all-reduce would give each
rank another gradient.

The loss is a sum over segments and never divided here: one division by the global label count happens in `update`.

Shapes: records.py's legend, and `c` shared tokens of this rank, `r` teacher rows of this rank, `w` real columns of this
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config import InterfaceConfig
from megatron_simct.losses.bytes import ByteOrder, byte_loss
from megatron_simct.losses.divergences import local_sums, row_divergences
from megatron_simct.losses.shared_head import SharedColumns, SharedHead
from megatron_simct.losses.tiles import OutputLayer
from megatron_simct.losses.vocab_parallel import (
    NEGATIVE_INFINITY,
    copy_to_group,
    finite_reference,
    num_real_columns,
    own_logits,
    reduce_packed,
    row_maxima,
    soft_cap,
    statistics_dtype,
)
from megatron_simct.records import LabelBatch, SegmentKind, TeacherNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What one micro-batch adds to the step; equal on every rank of the tensor-parallel group."""

    sum: torch.Tensor
    """0-dim, nats: the sum over rows, not divided by anything. Differentiable."""
    num_labels: torch.Tensor
    """0-dim int64: N, all student labels, dropped ones included: what the sum is later divided by, over all ranks."""
    metrics: dict[str, torch.Tensor]
    """0-dim float64, without gradient. Sums and counts to be added over micro-batches and ranks; ratios come later."""


def teacher_needs(config: InterfaceConfig) -> TeacherNeeds:
    """What an interface asks of the teacher."""
    match config.interface:
        case "paper":
            return TeacherNeeds(hidden_rows="first")
        case "strict":
            return TeacherNeeds(hidden_rows="one_to_one")
        case "bytes":
            return TeacherNeeds(hidden_rows="none", byte_events=True)
        case "sft":
            return TeacherNeeds(teacher=False, hidden_rows="none")
    raise ValueError(f"unknown interface {config.interface!r}: --simct-interface is paper, strict, bytes or sft")


def check_labels(labels: LabelBatch, *, placement: VocabPlacement, config: InterfaceConfig) -> None:
    """Refuse labels that the loss would misread or fault on. For tensors still on the CPU: the loss itself never looks.

    Raises ValueError with the numbers for: ids outside the real vocabulary; segments that are empty, leave their
    labels, or do not ascend without overlap; kinds that do not fit; teacher statistics or hidden states that are
    missing.
    """
    check_config(config)
    student_end = placement.student_vocab_size
    _check_range("student label", labels.student_labels, 0, student_end)
    if config.interface == "sft":
        return
    if config.interface == "bytes":
        if labels.byte_batch is None:
            raise ValueError("interface bytes needs the teacher's log-probabilities of byte events")
        return
    num_segments = len(labels.segments)
    for name in ("kinds", "replaced_columns", "teacher_hidden_index"):
        if len(getattr(labels, name)) != num_segments:
            raise ValueError(f"{num_segments} segments need as many {name}, got {len(getattr(labels, name))}")
    num_teacher_labels = len(labels.teacher_own_logit)
    if len(labels.teacher_lse) != num_teacher_labels:
        raise ValueError(f"{num_teacher_labels} teacher logits but {len(labels.teacher_lse)} log-sum-exps")
    if num_segments == 0:
        return
    _check_side("teacher", labels.segments[:, 0], labels.segments[:, 1], num_teacher_labels)
    _check_side("student", labels.segments[:, 2], labels.segments[:, 3], len(labels.student_labels))
    _check_range("segment kind", labels.kinds, 0, len(SegmentKind))
    _check_range("replaced column", labels.replaced_columns, -1, student_end)
    lengths = labels.segments[:, 1::2] - labels.segments[:, 0::2]
    wrong = ((labels.kinds == SegmentKind.SHARED) & (lengths != 1).any(1)).nonzero()
    if len(wrong):
        a = int(wrong[0])
        raise ValueError(
            f"segment {a} is SHARED but has {int(lengths[a, 0])} teacher and {int(lengths[a, 1])} student labels"
        )
    needed = labels.teacher_hidden_index[_is_row(labels.kinds, config)]
    num_hidden = 0 if labels.teacher_hidden is None else len(labels.teacher_hidden)
    if len(needed) and not 0 <= int(needed.min()) <= int(needed.max()) < num_hidden:
        raise ValueError(
            f"interface {config.interface} needs a teacher hidden state for {len(needed)} of {num_segments} segments, "
            f"with indices in [0, {num_hidden}); got {int(needed.min())} to {int(needed.max())}"
        )


def check_config(config: InterfaceConfig) -> None:
    """Refuse option values for which the loss is not defined."""
    teacher_needs(config)
    if config.divergence not in ("reverse_kl", "forward_kl", "js"):
        raise ValueError(
            f"unknown divergence {config.divergence!r}: --simct-divergence is reverse_kl, forward_kl or js"
        )
    if not config.temperature > 0:
        raise ValueError(f"--simct-temperature must be positive, got {config.temperature}")
    if config.interface == "bytes" and config.temperature != 1:
        raise ValueError(
            f"--simct-temperature {config.temperature}: interface bytes adds probabilities of tokens up, which are "
            "those of the models at 1 only"
        )
    if not 0 < config.js_beta < 1:
        raise ValueError(
            f"--simct-js-beta must lie strictly between 0 and 1, got {config.js_beta}: at 0 and 1 the divergence "
            "vanishes; use --simct-divergence reverse_kl or forward_kl for the limits"
        )


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
) -> LossOutput:
    """The loss of one micro-batch, from what enters the student's output layer and that layer's shard.

    student_hidden [N, H_S], the row that predicts each student label, equal on every rank of `group`; output_weight
    [W, H_S], this rank's rows of the output layer; `labels` passed `check_labels` before it moved to the device. `sum`
    is differentiable: the gradient of student_hidden is the full one on every rank (one all-reduce in backward), that
    of output_weight this rank's. Collective over `group`; all ranks pass the same labels. Empty labels give a zero sum
    with zero gradients. No host synchronization.

    A non-finite logit, of either model, makes the sum non-finite: the step is refused, no row is dropped silently.
    Raises ValueError for options without a meaning and for a missing shared head or teacher hidden states.
    """
    check_config(config)
    if config.interface == "bytes":
        if byte_order is None or labels.byte_batch is None:
            raise ValueError("interface bytes needs byte_order and the labels' byte_batch")
        return _bytes_loss(
            student_hidden,
            output_weight,
            labels,
            byte_order=byte_order,
            placement=placement,
            config=config,
            group=group,
            student_logit_softcap=student_logit_softcap,
        )
    needs_teacher = teacher_needs(config).teacher
    if needs_teacher and shared_head is None:
        raise ValueError(f"interface {config.interface} compares with a teacher: it needs shared_head")
    if config.interface == "paper" and len(labels.segments) and labels.teacher_hidden is None:
        raise ValueError(f"interface paper scores all {len(labels.segments)} segments: it needs teacher_hidden")
    student_logits = linear(copy_to_group(student_hidden, group), output_weight)
    teacher_logits = None
    if needs_teacher and labels.teacher_hidden is not None:
        with torch.no_grad():
            teacher_logits = linear(labels.teacher_hidden.to(shared_head.weight.dtype), shared_head.weight)
            teacher_logits = soft_cap(teacher_logits.to(statistics_dtype(student_logits)), teacher_logit_softcap)
    return _loss_from_logits(
        student_logits,
        teacher_logits,
        labels,
        columns=shared_head.columns if needs_teacher else None,
        placement=placement,
        config=config,
        group=group,
        student_logit_softcap=student_logit_softcap,
    )


def _bytes_loss(
    student_hidden: torch.Tensor,
    output_weight: torch.Tensor,
    labels: LabelBatch,
    *,
    byte_order: ByteOrder,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
    student_logit_softcap: float | None,
) -> LossOutput:
    """`interface_loss` for the interface `bytes`: no logits but those of a tile."""
    source = OutputLayer(
        copy_to_group(student_hidden, group),
        output_weight,
        num_columns=len(byte_order.columns),
        soft_cap=student_logit_softcap,
    )
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
    zero = torch.zeros((), dtype=torch.float64, device=student_hidden.device)
    num_labels = torch.full((), len(labels.student_labels), dtype=torch.int64, device=student_hidden.device)
    teacher_nll = labels.teacher_lse - labels.teacher_own_logit
    metrics = {
        "student_nll_sum": -result.log_probs.sum(dtype=torch.float64),
        "teacher_nll_sum": teacher_nll.sum(dtype=torch.float64),
        "num_student_labels": zero + num_labels,
        "num_teacher_labels": zero + len(teacher_nll),
    }
    poison = 0 * (metrics["student_nll_sum"] + metrics["teacher_nll_sum"])
    return LossOutput(
        sum=result.sum + poison.to(result.sum.dtype), num_labels=num_labels, metrics=metrics | result.metrics
    )


def _loss_from_logits(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: LabelBatch,
    *,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
    student_logit_softcap: float | None,
) -> LossOutput:
    """`interface_loss` from student_logits [N, W] (before any soft-cap) and teacher_logits [R, r] (after it)."""
    form_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        width = num_real_columns(
            shard_start=placement.shard_start,
            shard_width=student_logits.shape[1],
            vocab_size=placement.student_vocab_size,
        )
        logits = soft_cap(student_logits[:, :width].to(statistics_dtype(student_logits)), student_logit_softcap)
        rows = _select_rows(logits, teacher_logits, labels, columns=columns, placement=placement, config=config)
        stats = _reduce(logits, rows, labels, shard_start=placement.shard_start, config=config, group=group)
        result = _compare(rows, stats, labels, config=config, group=group)
        value = _add_up(result, stats, labels)
        metrics = _metrics(rows, stats, result, labels, config=config)
        gradient = None
        if form_gradient:
            gradient = torch.zeros_like(student_logits)
            gradient[:, :width] = _logit_gradient(logits, rows, stats, result, labels, columns, placement.shard_start)
            if student_logit_softcap is not None:
                gradient[:, :width] *= 1 - (logits / student_logit_softcap) ** 2
    if form_gradient:
        value = _KnownGradient.apply(student_logits, value, gradient)
    num_labels = torch.full((), len(labels.student_labels), dtype=torch.int64, device=student_logits.device)
    return LossOutput(sum=value, num_labels=num_labels, metrics=metrics)


class _KnownGradient(torch.autograd.Function):
    """`value` as a function of `logits` whose gradient is `gradient`."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The segments as rows over this rank's shared columns. A = 0 for `sft`."""

    segments: torch.Tensor
    """[A, 4]"""
    kinds: torch.Tensor
    """[A]"""
    used: torch.Tensor
    """bool [A]: False for the rows that the interface drops."""
    has_unit: torch.Tensor
    """bool [A]"""
    student: torch.Tensor
    """[A, c], logits at the first student row."""
    teacher: torch.Tensor
    """[A, c], logits at the first teacher row."""
    replaced: torch.Tensor
    """[A]: which of this rank's shared tokens the unit replaces, or -1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """What the ranks agree on after the two reductions."""

    label_max: torch.Tensor
    """[N], the largest logit of each student row (0 where there is none)."""
    label_sum: torch.Tensor
    """[N], sum of e^{z - label_max} over the real vocabulary."""
    log_probs: torch.Tensor
    """[N], of each student label."""
    student: torch.Tensor
    """[A, c], the rows' scores over the temperature, replaced columns out, relative to `student_max`."""
    teacher: torch.Tensor
    """[A, c]"""
    student_max: torch.Tensor
    """[A], over the shared tokens of all ranks (0 where there is none)."""
    teacher_max: torch.Tensor
    """[A]"""
    sums: list[torch.Tensor]
    """Of `local_sums`, over all ranks."""
    student_mass: torch.Tensor
    """[A], the student's probability of the shared tokens at the first row."""
    teacher_mass: torch.Tensor
    """[A]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """The loss as terms, and its gradient as weights of the three things a logit gradient is made of."""

    row_loss: torch.Tensor
    """[A], 0 for dropped rows."""
    shared_gradient: torch.Tensor
    """[A, c], with respect to the first row's shared logits."""
    own_weight: torch.Tensor
    """[N], of the label's one-hot."""
    softmax_weight: torch.Tensor
    """[N], of the softmax over the real vocabulary."""
    label_loss: torch.Tensor
    """[N], the cross entropy of `sft`; zero for the others."""


def _is_row(kinds: torch.Tensor, config: InterfaceConfig) -> torch.Tensor:
    """[A] -> bool [A]: which segments the interface uses."""
    return kinds != SegmentKind.UNIT if config.interface == "strict" else torch.ones_like(kinds, dtype=torch.bool)


def _select_rows(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: LabelBatch,
    *,
    columns: SharedColumns | None,
    placement: VocabPlacement,
    config: InterfaceConfig,
) -> _Rows:
    """Both models' logits of the shared tokens at the first position of every segment."""
    num_rows = 0 if columns is None else len(labels.segments)
    segments, kinds, replaced = labels.segments[:num_rows], labels.kinds[:num_rows], labels.replaced_columns[:num_rows]
    if num_rows == 0:
        student = teacher = logits.new_zeros(0, 0 if columns is None else len(columns.student))
    else:
        student = logits.index_select(0, segments[:, 2]).index_select(1, columns.student)
        teacher = torch.zeros_like(student)
        if teacher_logits is not None and len(teacher_logits):
            # Dropped rows may have no hidden state (-1): they read row 0, and nothing of them is used.
            index = labels.teacher_hidden_index[:num_rows].clamp(min=0)
            teacher = columns.teacher_columns(teacher_logits.to(logits.dtype)).index_select(0, index)
    if columns is not None:
        local = replaced - placement.shard_start
        here = (replaced >= 0) & (local >= 0) & (local < len(columns.position))
        position = columns.position[local.clamp(0, len(columns.position) - 1)]
        replaced = torch.where(here, position, -1)
    return _Rows(
        segments=segments,
        kinds=kinds,
        used=_is_row(kinds, config),
        has_unit=kinds == SegmentKind.UNIT,
        student=student,
        teacher=teacher,
        replaced=replaced,
    )


def _scores(logits: torch.Tensor, replaced: torch.Tensor, temperature: float) -> torch.Tensor:
    """[A, c] -> [A, c]: logits over the temperature, -inf in the column that the row's unit replaces."""
    scores = logits / temperature
    if scores.shape[1]:
        index = replaced.clamp(min=0).unsqueeze(1)
        current = scores.gather(1, index)
        scores.scatter_(1, index, current.masked_fill(replaced.unsqueeze(1) >= 0, NEGATIVE_INFINITY))
    return scores


def _reduce(
    logits: torch.Tensor,
    rows: _Rows,
    labels: LabelBatch,
    *,
    shard_start: int,
    config: InterfaceConfig,
    group: dist.ProcessGroup | None,
) -> _Statistics:
    """Everything that crosses ranks, apart from js: one MAX and one SUM."""
    student = _scores(rows.student, rows.replaced, config.temperature)
    teacher = _scores(rows.teacher, rows.replaced, config.temperature)
    maxima = [row_maxima(logits), row_maxima(student), row_maxima(teacher)]
    maxima = reduce_packed(maxima, dist.ReduceOp.MAX, group)
    label_max, student_max, teacher_max = (finite_reference(values) for values in maxima)
    student -= student_max.unsqueeze(1)
    teacher -= teacher_max.unsqueeze(1)
    starts_t, starts_s = rows.segments[:, 0], rows.segments[:, 2]
    teacher_lse = labels.teacher_lse.to(logits.dtype)[starts_t]
    label_sum, own, student_mass, teacher_mass, *sums = reduce_packed(
        [
            (logits - label_max.unsqueeze(1)).exp().sum(1),
            own_logits(logits, labels.student_labels, shard_start),
            (rows.student - label_max[starts_s].unsqueeze(1)).exp().sum(1),
            (rows.teacher - teacher_lse.unsqueeze(1)).exp().sum(1),
            *local_sums(student, teacher, config.divergence),
        ],
        dist.ReduceOp.SUM,
        group,
    )
    return _Statistics(
        label_max=label_max,
        label_sum=label_sum,
        # Not own - LSE: the rounding of a large log-sum-exp would be that of the result.
        log_probs=own - label_max - label_sum.log(),
        student=student,
        teacher=teacher,
        student_max=student_max,
        teacher_max=teacher_max,
        sums=sums,
        student_mass=student_mass / label_sum[starts_s],
        teacher_mass=teacher_mass,
    )


def _compare(
    rows: _Rows, stats: _Statistics, labels: LabelBatch, *, config: InterfaceConfig, group: dist.ProcessGroup | None
) -> _Result:
    """Row losses and the weights of their gradient (Eq. 6-9; the cross entropy of `sft`)."""
    zero = torch.zeros_like(stats.log_probs)
    if config.interface == "sft":
        return _Result(
            row_loss=zero[:0],
            shared_gradient=rows.student,
            own_weight=zero - 1,
            softmax_weight=zero + 1,
            label_loss=-stats.log_probs,
        )
    teacher_lse = labels.teacher_lse.to(zero.dtype)
    teacher_log_probs = labels.teacher_own_logit.to(zero.dtype) - teacher_lse
    starts_t, ends_t, starts_s, ends_s = rows.segments.unbind(1)
    # u + LSE relative to the row's maximum. LSE is label_max + log label_sum: the two maxima cancel first.
    tau = config.temperature
    student_unit = (_segment_mean(stats.log_probs, starts_s, ends_s) + stats.label_sum[starts_s].log()) / tau
    student_unit = student_unit + (stats.label_max[starts_s] / tau - stats.student_max)
    teacher_unit = _segment_mean(teacher_log_probs, starts_t, ends_t) / tau
    teacher_unit = teacher_unit + (teacher_lse[starts_t] / tau - stats.teacher_max)
    divergences = row_divergences(
        stats.student,
        stats.teacher,
        stats.sums,
        student_unit=student_unit.masked_fill(~rows.has_unit, NEGATIVE_INFINITY),
        teacher_unit=teacher_unit.masked_fill(~rows.has_unit, NEGATIVE_INFINITY),
        divergence=config.divergence,
        js_beta=config.js_beta,
        group=group,
    )
    # where, not a product with 0: what a dropped row computed may be anything.
    value = torch.where(rows.used, divergences.value, 0)
    shared_gradient = torch.where(rows.used.unsqueeze(1), divergences.shared_gradient, 0) / tau
    unit_gradient = torch.where(rows.used & rows.has_unit, divergences.unit_gradient, 0) / tau
    per_label = _spread(unit_gradient / (ends_s - starts_s), starts_s, ends_s, len(zero))
    return _Result(
        row_loss=value,
        shared_gradient=shared_gradient,
        own_weight=per_label,
        softmax_weight=(-per_label).index_add(0, starts_s, unit_gradient),
        label_loss=zero,
    )


def _add_up(result: _Result, stats: _Statistics, labels: LabelBatch) -> torch.Tensor:
    """The sum over rows (or labels). Finite statistics add nothing to it, non-finite ones make it nan: a model that
    yields nan at a row that the interface does not use is broken all the same."""
    teacher_nll = (labels.teacher_lse - labels.teacher_own_logit).to(stats.log_probs.dtype)
    poison = 0 * stats.log_probs.sum() + 0 * teacher_nll.sum()
    return result.row_loss.sum() + result.label_loss.sum() + poison


def _logit_gradient(
    logits: torch.Tensor,
    rows: _Rows,
    stats: _Statistics,
    result: _Result,
    labels: LabelBatch,
    columns: SharedColumns | None,
    shard_start: int,
) -> torch.Tensor:
    """[N, w]: softmax and one-hot of every label's row by their weights, and the shared columns of the first rows."""
    gradient = (logits - stats.label_max.unsqueeze(1)).exp_()
    gradient *= (result.softmax_weight / stats.label_sum).unsqueeze(1)
    if logits.shape[1] == 0:
        return gradient
    local = labels.student_labels - shard_start
    here = (local >= 0) & (local < logits.shape[1])
    index = local.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    gradient.scatter_add_(1, index, torch.where(here, result.own_weight, 0).unsqueeze(1))
    if columns is not None:
        shared = gradient.new_zeros(len(rows.segments), logits.shape[1])
        gradient.index_add_(0, rows.segments[:, 2], shared.index_copy_(1, columns.student, result.shared_gradient))
    return gradient


def _segment_mean(values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[n] -> [A]: the mean over [starts, ends), which ascend without overlap. Every rank adds in the same order."""
    borders = torch.stack([starts, ends], dim=1).flatten()
    offsets = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(values))])
    # Pieces 1, 3, 5, ... are the segments, those between them the gaps. `unsafe` leaves out a check on the host.
    sums = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)[1::2]
    return sums / (ends - starts)


def _spread(values: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, count: int) -> torch.Tensor:
    """[A] -> [count]: the segment's value at each of its labels, 0 outside of segments."""
    if len(values) == 0:
        return values.new_zeros(count)
    position = torch.arange(count, device=values.device)
    segment = (torch.searchsorted(starts.contiguous(), position, right=True) - 1).clamp(min=0)
    inside = (position >= starts[segment]) & (position < ends[segment])
    return torch.where(inside, values[segment], 0)


def _metrics(
    rows: _Rows, stats: _Statistics, result: _Result, labels: LabelBatch, *, config: InterfaceConfig
) -> dict[str, torch.Tensor]:
    """Additive sums and counts, the same keys for every interface."""

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.sum(dtype=torch.float64)

    metrics = {}
    for kind in SegmentKind:
        chosen = rows.used & (rows.kinds == kind)
        metrics[f"loss_{kind.name.lower()}_sum"] = total(torch.where(chosen, result.row_loss, 0))
        metrics[f"rows_{kind.name.lower()}"] = total(chosen)
    # Mass of the shared tokens alone: a unit's own first step is not added, a replaced column counts.
    metrics["student_mass_outside_u_sum"] = total(torch.where(rows.used, (1 - stats.student_mass).clamp(min=0), 0))
    metrics["teacher_mass_outside_u_sum"] = total(torch.where(rows.used, (1 - stats.teacher_mass).clamp(min=0), 0))
    metrics["rows_dropped"] = total(~rows.used)
    metrics["student_nll_sum"] = total(-stats.log_probs)
    metrics["teacher_nll_sum"] = total(labels.teacher_lse - labels.teacher_own_logit)
    metrics["num_student_labels"] = total(torch.ones_like(stats.log_probs))
    metrics["num_teacher_labels"] = total(torch.ones_like(labels.teacher_lse))
    return metrics


def _check_range(name: str, values: torch.Tensor, start: int, end: int) -> None:
    if len(values) and not start <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(f"{name}s must lie in [{start}, {end}); got {int(values.min())} to {int(values.max())}")


def _check_side(side: str, starts: torch.Tensor, ends: torch.Tensor, num_labels: int) -> None:
    """Segments of one side: not empty, ascending without overlap, inside the labels."""
    previous_ends = torch.cat([ends.new_zeros(1), ends[:-1]])
    wrong = ((starts < previous_ends) | (ends <= starts) | (ends > num_labels)).nonzero()
    if len(wrong):
        a = int(wrong[0])
        raise ValueError(
            f"{side} side of segment {a} is [{int(starts[a])}, {int(ends[a])}): segments must be non-empty, start at "
            f"or after the end of the one before ({int(previous_ends[a])}), and end within the {num_labels} {side} "
            "labels"
        )
