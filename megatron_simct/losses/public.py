"""The loss for people with their own training loop: tensors in, a loss out. No Megatron model, no records.

`cross_tokenizer_loss` takes both models' logits, `fused_cross_tokenizer_loss` what enters their output layers. Both run
in one process, or on the ranks of a tensor-parallel group that hold equal consecutive slices of both vocabularies.

What the caller prepares (megatron_simct.alignment does it for real tokenizers):
    segments          [A, 4] of (ts, te, ss, se): teacher labels [ts, te) and student labels [ss, se) spell equal bytes
    shared ids        [C], [C]: the tokens of equal bytes in both vocabularies, by pairs
    stop ids          the student's stop token and all of the teacher's, whose probabilities are added up
    rows              row p of the logits (or hidden states) is the one that PREDICTS label p, not the one at label p

Example, a student that says "ha" "ppy" where the teacher says "hap" "py", then the stop token of each:

    >>> import torch
    >>> from megatron_simct.losses import cross_tokenizer_loss
    >>> generator = torch.Generator().manual_seed(0)
    >>> student = torch.randn(3, 8, generator=generator, requires_grad=True)
    >>> teacher = torch.randn(3, 9, generator=generator)
    >>> output = cross_tokenizer_loss(
    ...     student,
    ...     teacher,
    ...     segments=torch.tensor([[0, 2, 0, 2], [2, 3, 2, 3]]),
    ...     student_labels=torch.tensor([0, 1, 5]),
    ...     teacher_labels=torch.tensor([0, 1, 5]),
    ...     shared_student_ids=torch.tensor([2, 3, 4]),
    ...     shared_teacher_ids=torch.tensor([2, 3, 4]),
    ...     stop_student_id=5,
    ...     stop_teacher_ids=[5],
    ... )
    >>> output.loss.backward()
    >>> int(output.count), bool(student.grad.abs().sum() > 0), bool(student.grad.sum(1).abs().max() < 1e-6)
    (3, True, True)

Several micro-batches, or data-parallel ranks: give every call the same `normalizer`, the number of student labels of
the whole global batch. Then their losses and gradients add up to those of one large batch.

Shapes: records.py's legend; `n` student labels, `m` teacher labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.byte_events import plan_byte_events
from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.alignment.segments import align
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.config import Divergence, Interface, InterfaceConfig
from megatron_simct.losses.bytes import ByteOrder, slot_log_masses
from megatron_simct.losses.interfaces import LossOutput, interface_loss, interface_loss_from_logits
from megatron_simct.losses.needs import check_config, check_labels, compares_shared_tokens, teacher_needs
from megatron_simct.losses.shared_head import SharedColumns, SharedHead, gather_shared_head
from megatron_simct.losses.tiles import GivenLogits, OutputLayer, StudentLogits, likeliest
from megatron_simct.losses.vocab_parallel import (
    label_statistics,
    logit_statistics,
    num_real_columns,
)
from megatron_simct.parallel.packing import pack_byte_events, pack_byte_sides
from megatron_simct.records import LabelBatch, SegmentKind


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTokenizerLoss:
    """The same on every rank of the group."""

    loss: torch.Tensor
    """0-dim, nats a student label: sum / normalizer. Differentiable."""
    sum: torch.Tensor
    """0-dim, nats: the sum over rows. Without gradient."""
    count: torch.Tensor
    """0-dim int64: the student labels of this call, those in no segment included."""
    metrics: dict[str, torch.Tensor]
    """0-dim float64, additive sums and counts (`rows_dropped`, `student_mass_outside_u_sum`, ...)."""


def cross_tokenizer_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    segments: torch.Tensor,
    student_labels: torch.Tensor,
    teacher_labels: torch.Tensor,
    shared_student_ids: torch.Tensor,
    shared_teacher_ids: torch.Tensor,
    *,
    interface: Interface = "paper",
    divergence: Divergence = "reverse_kl",
    temperature: float = 1.0,
    js_beta: float = 0.5,
    topk: int = 16,
    uld_topk: int = 1024,
    alm_temperature: float = float("inf"),
    min_teacher_mass: float = 0.0,
    segment_weights: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    normalizer: float | torch.Tensor | None = None,
    stop_student_id: int | None = None,
    stop_teacher_ids: Sequence[int] = (),
    replaced_columns: torch.Tensor | None = None,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_table: TokenTable | None = None,
    teacher_table: TokenTable | None = None,
) -> CrossTokenizerLoss:
    """The loss from logits, before any soft-cap; differentiable in student_logits.

    student_logits [n, V_S] and teacher_logits [m, V_T] in one process; with `group`, [n, W_S] and [m, W_T]: rank i
    holds columns [i W, (i + 1) W) of each. The real sizes `student_vocab_size` and `teacher_vocab_size` default to all
    columns of all ranks; what lies behind them is padding and never scored. Labels and segments are int64, equal on
    every rank; segments ascend without overlap.

    shared_student_ids, shared_teacher_ids [C]: pairs of equal bytes, each id once, without the stop ids.
    stop_student_id and stop_teacher_ids: one shared token more, with the added-up probability of the latter.
    replaced_columns [A]: the shared student id whose bytes are those of a unit of several tokens ("8" "2" where "82" is
    shared), or -1; default: none.
    segment_weights [A]: what the loss of each segment is multiplied by; default: 1.
    normalizer: what the sum is divided by; default: n, or 1 where that is 0.
    student_table, teacher_table: the bytes of every token, for interface "bytes" (TokenTable.from_bytes). It reads the
    labels as ONE response, and neither segments nor shared ids, which may be empty. Several responses: one call each,
    with one normalizer.

    With `group`, the columns of teacher_logits that another rank needs are sent to it, 4 bytes a row each; where the
    output layers are at hand, `fused_cross_tokenizer_loss` sends none.

    Raises ValueError for shapes and ids that do not fit, ids given twice, options without a meaning, and for a loss
    that is not finite (nan or inf in either model's logits): no such gradient reaches the weights.
    """
    config = InterfaceConfig(
        interface=interface, divergence=divergence, temperature=temperature, js_beta=js_beta, topk=topk,
        uld_topk=uld_topk, alm_temperature=alm_temperature, min_teacher_mass=min_teacher_mass,
    )  # fmt: skip
    check_config(config)
    needs_teacher = teacher_needs(config).teacher
    _check_shapes(student_logits, student_labels, "student_logits", "student_labels")
    placement = _placement(
        student_logits.shape[1],
        0 if teacher_logits is None else teacher_logits.shape[1],
        shared_student_ids,
        shared_teacher_ids,
        stop_student_id,
        stop_teacher_ids,
        student_vocab_size=student_vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        group=group,
    )
    own = lse = torch.zeros(0, dtype=torch.float32, device=student_logits.device)
    columns = teacher_rows = None
    if needs_teacher:
        if teacher_logits is None:
            raise ValueError(f"interface {interface} compares with a teacher: it needs teacher_logits")
        _check_shapes(teacher_logits, teacher_labels, "teacher_logits", "teacher_labels")
        _check_ids("teacher_labels", teacher_labels, placement.teacher_vocab_size)
        teacher_logits = teacher_logits.detach()
        whole_teacher_logits = teacher_logits
        own, lse = logit_statistics(
            teacher_logits,
            teacher_labels,
            shard_start=_rank(group) * teacher_logits.shape[1],
            vocab_size=placement.teacher_vocab_size,
            group=group,
            logit_softcap=teacher_logit_softcap,
        )
        if compares_shared_tokens(config) and group is None:
            columns = SharedColumns.from_placement(placement, student_logits.device)
            teacher_rows = torch.from_numpy(placement.teacher_rows).to(student_logits.device)
        elif compares_shared_tokens(config):
            start = dist.get_rank(group) * teacher_logits.shape[1]
            moved = gather_shared_head(teacher_logits.T.contiguous(), start, placement, group)
            columns, teacher_logits = moved.columns, moved.weight.T
    labels = _labels(
        segments, student_labels, teacher_labels, own, lse, placement, replaced_columns, stop_student_id,
        stop_teacher_ids, shared_student_ids, shared_teacher_ids, segment_weights, teacher_hidden=teacher_logits,
        needs_segments=needs_teacher and interface != "bytes",
    )  # fmt: skip
    byte_order = None
    if interface == "bytes":
        student_table, teacher_table = _checked_tables(student_table, teacher_table, placement)
        order, start = _byte_order(teacher_table, whole_teacher_logits.shape[1], group, student_logits.device)
        source = GivenLogits(whole_teacher_logits, num_columns=len(order.columns), soft_cap=teacher_logit_softcap)
        labels = _with_bytes(labels, teacher_labels, student_table, teacher_table, source, order, start, group)
        byte_order, _ = _byte_order(student_table, student_logits.shape[1], group, student_logits.device)
    elif interface == "uld":
        source = GivenLogits(
            whole_teacher_logits,
            num_columns=_num_columns(whole_teacher_logits.shape[1], placement, group),
            soft_cap=teacher_logit_softcap,
        )
        labels = replace(labels, teacher_topk=_top(source, lse, uld_topk, placement, group))
    check_labels(labels, placement=placement, config=config)
    output = interface_loss_from_logits(
        student_logits,
        teacher_logits if needs_teacher else None,
        labels,
        columns=columns,
        placement=placement,
        config=config,
        group=group,
        teacher_rows=teacher_rows,
        teacher_logit_softcap=teacher_logit_softcap,
        student_logit_softcap=student_logit_softcap,
        byte_order=byte_order,
    )
    return _finish(output, normalizer)


def fused_cross_tokenizer_loss(
    student_hidden: torch.Tensor,
    output_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    segments: torch.Tensor,
    student_labels: torch.Tensor,
    teacher_labels: torch.Tensor,
    shared_student_ids: torch.Tensor,
    shared_teacher_ids: torch.Tensor,
    *,
    interface: Interface = "paper",
    divergence: Divergence = "reverse_kl",
    temperature: float = 1.0,
    js_beta: float = 0.5,
    topk: int = 16,
    uld_topk: int = 1024,
    alm_temperature: float = float("inf"),
    min_teacher_mass: float = 0.0,
    segment_weights: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    normalizer: float | torch.Tensor | None = None,
    stop_student_id: int | None = None,
    stop_teacher_ids: Sequence[int] = (),
    replaced_columns: torch.Tensor | None = None,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_table: TokenTable | None = None,
    teacher_table: TokenTable | None = None,
    shared_head: SharedHead | None = None,
) -> CrossTokenizerLoss:
    """`cross_tokenizer_loss` from what enters the output layers; neither model's logits exist for more than a tile.

    student_hidden [n, H_S] and teacher_hidden [m, H_T], equal on every rank; output_weight [V_S, H_S] and
    teacher_weight [V_T, H_T], or this rank's equal slice of their rows. Differentiable in student_hidden and
    output_weight. All else as in `cross_tokenizer_loss`.

    shared_head: the teacher's rows beside the student's columns, from `place_shared_head`; without it they are copied
    at every call.

    Where Megatron's DistributedDataParallel owns output_weight, its gradient goes to main_grad in this call, so no
    factor may come after: use `interface_loss`, whose sum is divided once in Megatron's finalize_model_grads.
    """
    config = InterfaceConfig(
        interface=interface, divergence=divergence, temperature=temperature, js_beta=js_beta, topk=topk,
        uld_topk=uld_topk, alm_temperature=alm_temperature, min_teacher_mass=min_teacher_mass,
    )  # fmt: skip
    check_config(config)
    needs_teacher = teacher_needs(config).teacher
    _check_shapes(student_hidden, student_labels, "student_hidden", "student_labels")
    placement = _placement(
        output_weight.shape[0],
        0 if teacher_weight is None else teacher_weight.shape[0],
        shared_student_ids,
        shared_teacher_ids,
        stop_student_id,
        stop_teacher_ids,
        student_vocab_size=student_vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        group=group,
    )
    own = lse = torch.zeros(0, dtype=torch.float32, device=student_hidden.device)
    if needs_teacher:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError(
                f"interface {interface} compares with a teacher: it needs teacher_hidden and teacher_weight"
            )
        _check_shapes(teacher_hidden, teacher_labels, "teacher_hidden", "teacher_labels")
        _check_ids("teacher_labels", teacher_labels, placement.teacher_vocab_size)
        teacher_hidden = teacher_hidden.detach()
        start = _rank(group) * teacher_weight.shape[0]
        own, lse = label_statistics(
            teacher_hidden,
            teacher_weight,
            teacher_labels,
            shard_start=start,
            vocab_size=placement.teacher_vocab_size,
            group=group,
            logit_softcap=teacher_logit_softcap,
        )
        if shared_head is None and compares_shared_tokens(config):
            shared_head = gather_shared_head(teacher_weight.detach(), start, placement, group)
    labels = _labels(
        segments, student_labels, teacher_labels, own, lse, placement, replaced_columns, stop_student_id,
        stop_teacher_ids, shared_student_ids, shared_teacher_ids, segment_weights, teacher_hidden=teacher_hidden,
        needs_segments=needs_teacher and interface != "bytes",
    )  # fmt: skip
    byte_order = None
    if interface == "bytes":
        student_table, teacher_table = _checked_tables(student_table, teacher_table, placement)
        assert teacher_hidden is not None and teacher_weight is not None, "bytes needs a teacher: checked above"
        order, start = _byte_order(teacher_table, teacher_weight.shape[0], group, student_hidden.device)
        source = OutputLayer(
            teacher_hidden, teacher_weight.detach(), num_columns=len(order.columns), soft_cap=teacher_logit_softcap
        )
        labels = _with_bytes(labels, teacher_labels, student_table, teacher_table, source, order, start, group)
        byte_order, _ = _byte_order(student_table, output_weight.shape[0], group, student_hidden.device)
    elif interface == "uld":
        assert teacher_hidden is not None and teacher_weight is not None, "uld needs a teacher: checked above"
        source = OutputLayer(
            teacher_hidden,
            teacher_weight.detach(),
            num_columns=_num_columns(teacher_weight.shape[0], placement, group),
            soft_cap=teacher_logit_softcap,
        )
        labels = replace(labels, teacher_topk=_top(source, lse, uld_topk, placement, group))
    check_labels(labels, placement=placement, config=config)
    output = interface_loss(
        student_hidden,
        output_weight,
        labels,
        shared_head=shared_head if needs_teacher else None,
        placement=placement,
        config=config,
        group=group,
        teacher_logit_softcap=teacher_logit_softcap,
        student_logit_softcap=student_logit_softcap,
        byte_order=byte_order,
    )
    return _finish(output, normalizer)


def place_shared_head(
    teacher_weight: torch.Tensor,
    shared_student_ids: torch.Tensor,
    shared_teacher_ids: torch.Tensor,
    *,
    student_width: int,
    stop_student_id: int | None = None,
    stop_teacher_ids: Sequence[int] = (),
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> SharedHead:
    """The teacher's output rows beside the student's columns, once for a whole training. Collective over `group`.

    teacher_weight [V_T, H_T], or this rank's slice; student_width: rows of this rank's `output_weight`.
    """
    placement = _placement(
        student_width,
        teacher_weight.shape[0],
        shared_student_ids,
        shared_teacher_ids,
        stop_student_id,
        stop_teacher_ids,
        student_vocab_size=student_vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        group=group,
    )
    return gather_shared_head(teacher_weight.detach(), _rank(group) * teacher_weight.shape[0], placement, group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _placement(
    student_width: int,
    teacher_width: int,
    shared_student_ids: torch.Tensor,
    shared_teacher_ids: torch.Tensor,
    stop_student_id: int | None,
    stop_teacher_ids: Sequence[int],
    *,
    student_vocab_size: int | None,
    teacher_vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> VocabPlacement:
    """This rank's part of the shared vocabulary. Raises ValueError for ids given twice or outside the vocabularies."""
    world_size = 1 if group is None else dist.get_world_size(group)
    sizes = []
    for side, width, given in (
        ("student", student_width, student_vocab_size),
        ("teacher", teacher_width, teacher_vocab_size),
    ):
        size = width * world_size if given is None else given
        if not 0 <= size <= width * world_size:
            raise ValueError(f"{side}_vocab_size {size}: {world_size} slices of {width} hold {width * world_size} ids")
        sizes.append(size)
    if (stop_student_id is None) != (len(stop_teacher_ids) == 0):
        raise ValueError(
            f"stop_student_id {stop_student_id} and stop_teacher_ids {list(stop_teacher_ids)} go together: give both"
        )
    pairs_s, pairs_t = (ids.detach().cpu().numpy().astype(np.int64) for ids in (shared_student_ids, shared_teacher_ids))
    if pairs_s.ndim != 1 or pairs_s.shape != pairs_t.shape:
        raise ValueError(
            f"shared_student_ids and shared_teacher_ids are pairs, [C] each; got {pairs_s.shape} and {pairs_t.shape}"
        )
    stops = np.asarray(stop_teacher_ids, dtype=np.int64)
    students = pairs_s if stop_student_id is None else np.append(pairs_s, stop_student_id)
    teachers = np.concatenate([pairs_t, stops])
    for name, ids, size in (("student", students, sizes[0]), ("teacher", teachers, sizes[1])):
        if teacher_width and len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(f"shared {name} ids must lie in [0, {size}); got {ids.min()} to {ids.max()}")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{int((counts > 1).sum())} shared {name} ids are given more than once, stop ids included; the first "
                f"is {values[counts > 1][0]}"
            )
    start = _rank(group) * student_width
    counts = np.ones(len(students), dtype=np.int64)
    if stop_student_id is not None:
        counts[-1] = len(stops)
    offsets = np.concatenate([[0], counts.cumsum()])
    here = ((students >= start) & (students < start + student_width)).nonzero()[0]
    here = here[students[here].argsort()]
    rows = [teachers[offsets[i] : offsets[i + 1]] for i in here] if teacher_width else []
    return VocabPlacement(
        student_vocab_size=sizes[0],
        teacher_vocab_size=sizes[1],
        shard_start=start,
        shard_end=start + student_width,
        columns=students[here] - start if teacher_width else here[:0],
        row_offsets=np.concatenate([[0], counts[here].cumsum()]) if teacher_width else np.zeros(1, np.int64),
        teacher_rows=np.concatenate(rows) if rows else np.zeros(0, np.int64),
    )


def _labels(
    segments: torch.Tensor,
    student_labels: torch.Tensor,
    teacher_labels: torch.Tensor,
    own: torch.Tensor,
    lse: torch.Tensor,
    placement: VocabPlacement,
    replaced_columns: torch.Tensor | None,
    stop_student_id: int | None,
    stop_teacher_ids: Sequence[int],
    shared_student_ids: torch.Tensor,
    shared_teacher_ids: torch.Tensor,
    segment_weights: torch.Tensor | None,
    *,
    teacher_hidden: torch.Tensor | None,
    needs_segments: bool,
) -> LabelBatch:
    """Every segment is told its kind: SHARED for one label on each side that are a pair, STOP, else UNIT."""
    device = student_labels.device
    if not needs_segments:
        segments, segment_weights = segments[:0], None
    if segments.ndim != 2 or segments.shape[1] != 4:
        raise ValueError(f"segments must be [A, 4] of (ts, te, ss, se); got {list(segments.shape)}")
    segments = segments.to(device=device, dtype=torch.int64)
    n, m = len(student_labels), len(teacher_labels)
    ends = torch.tensor([m, m, n, n], device=device)
    if len(segments) and bool(((segments < 0) | (segments > ends)).any()):
        a = int(((segments < 0) | (segments > ends)).any(1).nonzero()[0])
        raise ValueError(
            f"segment {a} is {segments[a].tolist()}: it leaves the {m} teacher labels or the {n} student labels"
        )
    kinds = torch.full((len(segments),), int(SegmentKind.UNIT), device=device)
    teacher_first = torch.full_like(kinds, -1)
    if len(segments):
        _check_ids("student_labels", student_labels, placement.student_vocab_size)
        partner = torch.full((placement.student_vocab_size,), -1, dtype=torch.int64, device=device)
        partner[shared_student_ids.to(device).long()] = shared_teacher_ids.to(device).long()
        # An empty or overlapping segment is refused by check_labels; here it only must not fault.
        label_s = student_labels[segments[:, 2].clamp(max=n - 1)]
        label_t = teacher_labels[segments[:, 0].clamp(max=m - 1)]
        single = ((segments[:, 1::2] - segments[:, 0::2]) == 1).all(1)
        kinds[single & (partner[label_s] == label_t)] = SegmentKind.SHARED
        if stop_student_id is not None:
            stops = torch.tensor(list(stop_teacher_ids), device=device)
            kinds[single & (label_s == stop_student_id) & torch.isin(label_t, stops)] = SegmentKind.STOP
        student_of = torch.full((placement.teacher_vocab_size,), -1, dtype=torch.int64, device=device)
        student_of[shared_teacher_ids.to(device).long()] = shared_student_ids.to(device).long()
        teacher_first = torch.where(kinds == SegmentKind.UNIT, student_of[label_t], -1)
    if segment_weights is None:
        segment_weights = torch.ones(len(segments), device=device)
    if segment_weights.shape != kinds.shape:
        raise ValueError(
            f"segment_weights needs one number a segment: got {list(segment_weights.shape)} for {len(kinds)} segments"
        )
    if replaced_columns is None or not needs_segments:
        replaced_columns = torch.full_like(kinds, -1)
    else:
        known = torch.cat([shared_student_ids.to(device).long(), torch.tensor([-1], device=device)])
        if not bool(torch.isin(replaced_columns.to(device), known).all()):
            raise ValueError("replaced_columns must be -1 or one of shared_student_ids")
    return LabelBatch(
        student_labels=student_labels,
        segments=segments,
        kinds=kinds,
        replaced_columns=replaced_columns.to(device=device, dtype=torch.int64),
        teacher_first_columns=teacher_first,
        weights=segment_weights.to(device=device, dtype=torch.float32),
        teacher_own_logit=own,
        teacher_lse=lse,
        teacher_hidden=teacher_hidden,
        teacher_hidden_index=segments[:, 0],
    )


def _checked_tables(
    student: TokenTable | None, teacher: TokenTable | None, placement: VocabPlacement
) -> tuple[TokenTable, TokenTable]:
    def checked(side: str, table: TokenTable | None, size: int) -> TokenTable:
        if table is None:
            raise ValueError(f"interface bytes needs {side}_table, the bytes of every token")
        if table.num_ids != size:
            raise ValueError(
                f"{side}_table has {table.num_ids} ids, the {side}'s vocabulary {size}: they must be equal"
            )
        return table

    return (
        checked("student", student, placement.student_vocab_size),
        checked("teacher", teacher, placement.teacher_vocab_size),
    )


def _byte_order(
    table: TokenTable, width: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[ByteOrder, int]:
    """This rank's columns in the order of their bytes, and where they start."""
    start = _rank(group) * width
    return ByteOrder.of(table, shard_start=start, shard_end=start + width, device=device), start


def _with_bytes(
    labels: LabelBatch,
    teacher_labels: torch.Tensor,
    student_table: TokenTable,
    teacher_table: TokenTable,
    teacher: StudentLogits,
    order: ByteOrder,
    teacher_start: int,
    group: dist.ProcessGroup | None,
) -> LabelBatch:
    """The labels with the byte events of the one response that they spell."""
    student_ids, teacher_ids = (
        ids.detach().cpu().numpy().astype(np.int32) for ids in (labels.student_labels, teacher_labels)
    )
    alignment = align(teacher_table, teacher_ids, student_table, student_ids)
    stopped = student_ids.size and int(student_ids[-1]) in student_table.stop_ids
    spelled, _ = student_table.spell(student_ids[:-1] if stopped else student_ids)
    events = plan_byte_events(
        spelled[: alignment.common_prefix_bytes],
        stop=alignment.stop,
        student=student_table,
        student_ids=student_ids,
        teacher=teacher_table,
        teacher_ids=teacher_ids,
    )
    device = labels.student_labels.device
    side = pack_byte_sides([events.teacher], [teacher_ids.size]).to(device)
    masses = slot_log_masses(teacher, teacher_labels, side, order=order, shard_start=teacher_start, group=group)
    batch = pack_byte_events([events], [student_ids.size], [masses.cpu()])
    return replace(labels, byte_batch=batch.to(device))


def _num_columns(width: int, placement: VocabPlacement, group: dist.ProcessGroup | None) -> int:
    """Real columns of this rank's slice of the teacher's vocabulary."""
    return num_real_columns(
        shard_start=_rank(group) * width, shard_width=width, vocab_size=placement.teacher_vocab_size
    )


def _top(
    source: StudentLogits, lse: torch.Tensor, k: int, placement: VocabPlacement, group: dist.ProcessGroup | None
) -> torch.Tensor:
    size = placement.teacher_vocab_size
    return likeliest(source, lse, k or size, vocab_size=size, group=group)


def _finish(output: LossOutput, normalizer: float | torch.Tensor | None) -> CrossTokenizerLoss:
    """Divide once; refuse what is not finite."""
    if not bool(torch.isfinite(output.sum)):
        raise ValueError(
            f"the loss is {float(output.sum.detach())}: nan or inf in the logits of either model, or a candidate that "
            "only one of them finds impossible"
        )
    count = output.num_labels
    divisor = count.clamp(min=1) if normalizer is None else normalizer
    if not bool(torch.as_tensor(divisor) > 0):
        raise ValueError(f"normalizer {float(divisor)}: must be positive, the student labels of the global batch")
    return CrossTokenizerLoss(loss=output.sum / divisor, sum=output.sum.detach(), count=count, metrics=output.metrics)


def _check_shapes(rows: torch.Tensor, labels: torch.Tensor, rows_name: str, labels_name: str) -> None:
    if rows.ndim != 2 or labels.ndim != 1 or len(rows) != len(labels):
        raise ValueError(
            f"{rows_name} needs one row a label: got {list(rows.shape)} for {labels_name} {list(labels.shape)}"
        )


def _check_ids(name: str, ids: torch.Tensor, size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"{name} must lie in [0, {size}); got {int(ids.min())} to {int(ids.max())}")
