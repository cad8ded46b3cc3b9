"""The loss for people with their own training loop: tensors in, a loss out. No Megatron model, no records.

`cross_tokenizer_loss` compares two sources, each either the logits of a model or what enters its output
layer. It runs in one process, or on the ranks of a tensor-parallel group that hold equal consecutive slices
of both vocabularies. Row p of a source is the one that PREDICTS label p, not the one at label p.

Example: the student's tokens are "ha" "ppy", the teacher's "hap" "py", and then the stop token of each:

    >>> import torch
    >>> from megatron_simct.alignment import TokenTable
    >>> from megatron_simct.losses import Logits, Response, SharedVocabulary, cross_tokenizer_loss
    >>> student_tokens = TokenTable.from_bytes([b"ha", b"ppy", b" cat", b" the", b"x", b""], stop_ids=[5])
    >>> teacher_tokens = TokenTable.from_bytes([b"hap", b"py", b" cat", b" the", b"x", b""], stop_ids=[5])
    >>> pair = SharedVocabulary.of(student_tokens, teacher_tokens)
    >>> response = Response.of(pair, student_labels=[0, 1, 5], teacher_labels=[0, 1, 5])
    >>> response.segments.tolist()
    [[0, 2, 0, 2], [2, 3, 2, 3]]
    >>> generator = torch.Generator().manual_seed(0)
    >>> student = torch.randn(3, 6, generator=generator, requires_grad=True)
    >>> teacher = torch.randn(3, 6, generator=generator)
    >>> output = cross_tokenizer_loss(Logits(student), Logits(teacher), pair, response)
    >>> output.loss.backward()
    >>> int(output.count), bool(student.grad.abs().sum() > 0), bool(student.grad.sum(1).abs().max() < 1e-6)
    (3, True, True)

Several responses, micro-batches or data-parallel ranks: give every call the same `normalizer`, the number of
student labels of the whole global batch. Then their losses and gradients add up to those of one large batch.

Shapes: records.py's legend; `n` student labels, `m` teacher labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.byte_bounds import Side, plan_byte_bounds
from megatron_simct.alignment.byte_events import plan_byte_events
from megatron_simct.alignment.continuations import Continuations
from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.alignment.segments import align
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.alignment.translation import Translation
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.checks import check_config, check_labels, compares_shared_tokens, teacher_needs
from megatron_simct.losses.kinds.bytes import ByteOrder, slot_log_masses
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.kinds.teacher_topk import Likely
from megatron_simct.losses.loss import LossOutput, interface_loss, interface_loss_from_logits
from megatron_simct.losses.shared_head import SharedColumns, SharedHead, gather_shared_head
from megatron_simct.losses.tiles import GivenLogits, OutputLayer, StudentLogits, top_k_log_probs
from megatron_simct.losses.vocab_parallel import label_statistics, logit_statistics, num_real_columns
from megatron_simct.packing import pack_byte_events, pack_byte_sides
from megatron_simct.records import ByteEvents, LabelBatch, SegmentKind


@dataclass(frozen=True, slots=True)
class Logits:
    """A model by its logits, before any soft-cap."""

    values: torch.Tensor
    """[n, V]; with a group [n, W]: rank i holds columns [i W, (i + 1) W)."""
    vocab_size: int | None = None
    """Real tokens; what lies behind them is padding and never scored. None: all columns of all ranks."""
    soft_cap: float | None = None

    @property
    def width(self) -> int:
        """Columns of this rank."""
        return self.values.shape[1]

    @property
    def rows(self) -> torch.Tensor:
        """One row a label."""
        return self.values


@dataclass(frozen=True, slots=True)
class Head:
    """A model by what enters its output layer; its logits never exist for more than a tile."""

    hidden: torch.Tensor
    """[n, H], equal on every rank."""
    weight: torch.Tensor
    """[V, H], or this rank's equal slice of the rows."""
    vocab_size: int | None = None
    soft_cap: float | None = None
    placed: SharedHead | None = None
    """The teacher's, from `place_shared_head`: its rows beside the student's columns.

    None: copied at every call.
    """

    @property
    def width(self) -> int:
        """Columns of this rank."""
        return self.weight.shape[0]

    @property
    def rows(self) -> torch.Tensor:
        """One row a label."""
        return self.hidden


Source = Logits | Head


@dataclass(frozen=True, kw_only=True)
class SharedVocabulary:
    """Which tokens of two vocabularies mean the same."""

    student_ids: torch.Tensor
    """int64 [C]: with teacher_ids pairs of equal bytes, each id once, without the stop ids."""
    teacher_ids: torch.Tensor
    stop_student_id: int | None = None
    """With stop_teacher_ids one shared token more, with the added-up probability of the latter."""
    stop_teacher_ids: tuple[int, ...] = ()
    tables: tuple[TokenTable, TokenTable] | None = None
    """The bytes of every token, student's and teacher's: for `Response.of`, and for interfaces that compare
    bytes or tokens by id."""
    continuations: tuple[Continuations | None, Continuations | None] = (None, None)
    """What may follow each token in the tokenizer's own cut of a text (alignment/continuations.py), for
    byte_bounds="any"; None: nothing is known, and the loss is the lower for it."""

    def translation(self, interface: str) -> Translation:
        """The teacher's tokens in the student's; made once.

        `interface` is the one that needs it, for errors.
        """
        if self.tables is None:
            raise ValueError(f"interface {interface} needs the pair's tables, the bytes of every token")
        return self._translation

    @cached_property
    def _translation(self) -> Translation:
        assert self.tables is not None, "the caller has looked"
        student, teacher = self.tables
        pieces = student.pieces()
        return Translation(
            student=pieces,
            teacher=teacher.pieces(),
            # Of several tokens with the same bytes the lowest id.
            student_of_bytes={piece: i for i, piece in reversed(list(enumerate(pieces))) if piece},
            stop_student_id=self.stop_student_id,
            stop_teacher_ids=frozenset(self.stop_teacher_ids),
        )

    @staticmethod
    def of(student: TokenTable, teacher: TokenTable) -> SharedVocabulary:
        """All content tokens of equal bytes, the lowest id where several have them; and the stop tokens."""
        sides: list[dict[bytes, int]] = []
        for table in (student, teacher):
            ids: dict[bytes, int] = {}
            for i, piece in enumerate(table.pieces()):
                if piece:
                    ids.setdefault(piece, i)
            sides.append(ids)
        pairs = sorted((i, sides[1][piece]) for piece, i in sides[0].items() if piece in sides[1])
        both_stop = student.stop_ids and teacher.stop_ids
        return SharedVocabulary(
            student_ids=torch.tensor([i for i, _ in pairs], dtype=torch.int64),
            teacher_ids=torch.tensor([i for _, i in pairs], dtype=torch.int64),
            stop_student_id=student.stop_ids[0] if both_stop else None,
            stop_teacher_ids=teacher.stop_ids if both_stop else (),
            tables=(student, teacher),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response, or several one after another, in the tokens of both models.

    Several: not for interface "bytes", nor for child_weight unless each ends in its stop token.
    """

    segments: torch.Tensor
    """int64 [A, 4] of (ts, te, ss, se), ascending: labels [ts, te) and student labels [ss, se)
    spell the same bytes.
    """
    student_labels: torch.Tensor
    """int64 [n]"""
    teacher_labels: torch.Tensor
    """int64 [m]"""
    replaced_columns: torch.Tensor | None = None
    """int64 [A]: the shared student id whose bytes a unit of several tokens spells ("8" "2" where "82" is
    shared), or -1. None: none."""
    weights: torch.Tensor | None = None
    """[A]: what the loss of each segment is multiplied by. None: 1."""

    @staticmethod
    def of(
        pair: SharedVocabulary, *, student_labels: Sequence[int], teacher_labels: Sequence[int]
    ) -> Response:
        """Cut into minimal common units; both sides may end in a stop token. On the CPU."""
        if pair.tables is None:
            raise ValueError("Response.of needs the pair's tables, the bytes of every token")
        student, teacher = pair.tables
        sides = [np.asarray(labels, dtype=np.int32) for labels in (student_labels, teacher_labels)]
        segments = align(teacher, sides[1], student, sides[0]).segments.astype(np.int64)
        shared = {student.bytes_of(int(i)): int(i) for i in pair.student_ids}
        partner = dict(zip(pair.student_ids.tolist(), pair.teacher_ids.tolist(), strict=True))
        replaced = []
        for ts, te, ss, se in segments.tolist():
            one_pair = (te - ts, se - ss) == (1, 1) and partner.get(int(sides[0][ss])) == int(sides[1][ts])
            text = b"".join(student.bytes_of(int(i)) for i in sides[0][ss:se])
            replaced.append(-1 if one_pair else shared.get(text, -1))
        return Response(
            segments=torch.from_numpy(segments),
            student_labels=torch.from_numpy(sides[0].astype(np.int64)),
            teacher_labels=torch.from_numpy(sides[1].astype(np.int64)),
            replaced_columns=torch.tensor(replaced, dtype=torch.int64),
        )


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
    student: Source,
    teacher: Source | None,
    pair: SharedVocabulary,
    response: Response,
    options: InterfaceConfig | None = None,
    *,
    normalizer: float | torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> CrossTokenizerLoss:
    """The loss of `options` (default: `paper`); differentiable in the tensors of `student`.
    Collective over `group`.

    teacher: None for interface "sft". Student and teacher are both Logits or both Head.
    normalizer: what the sum is divided by; default: n, or 1 where that is 0.

    Between Logits on several ranks, the columns of the teacher's that another rank needs are sent to it, 4
    bytes a row each; with Head none. Where Megatron's DistributedDataParallel owns the student's output
    weight, its gradient goes to main_grad in this call, so no factor may come after: use `interface_loss`,
    whose sum is divided once in Megatron's finalize_model_grads.

    Raises ValueError for shapes and ids that do not fit, ids given twice, options without a meaning or that
    act on how segments are made (drop_units, ...: do that to `response`), and for a loss that is not finite
    (nan or inf in either model's logits): no such gradient reaches the weights.
    """
    options = InterfaceConfig() if options is None else options
    check_config(options)
    _check_applies(options)
    needs = teacher_needs(options)
    _check_rows("student", student, response.student_labels)
    given = teacher if needs.teacher else None
    if needs.teacher and given is None:
        raise ValueError(f"interface {options.interface} compares with a teacher: it needs one")
    if given is not None and isinstance(given, Head) != isinstance(student, Head):
        raise ValueError("student and teacher must both be Logits or both be Head")
    placement = _placement(
        student.width, student.vocab_size, None if teacher is None else teacher, pair, group
    )
    device = response.student_labels.device
    on_host = _on_host(response)
    shared_head, columns, teacher_rows, values = None, None, None, None
    own = lse = torch.zeros(0, dtype=torch.float32, device=student.rows.device)
    if given is not None:
        _check_rows("teacher", given, response.teacher_labels)
        _check_ids("teacher_labels", on_host.teacher_labels, placement.teacher_vocab_size)
        own, lse = _statistics(given, response.teacher_labels, placement, group)
        start, compares = _rank(group) * given.width, compares_shared_tokens(options)
        values = given.rows.detach()
        if isinstance(given, Head):
            shared_head = given.placed if compares else None
            if compares and shared_head is None:
                shared_head = gather_shared_head(given.weight.detach(), start, placement, group)
        elif compares and group is None:
            columns = SharedColumns.from_placement(placement, student.rows.device)
            teacher_rows = torch.from_numpy(placement.teacher_rows).to(student.rows.device)
        elif compares:
            # The transposed logits [W, n] have the shape of a head: the columns of shared tokens move like
            # its rows.
            moved = gather_shared_head(values.T.contiguous(), start, placement, group)
            columns, values = moved.columns, moved.weight.T
    needs_segments = needs.teacher and not needs.byte_events
    as_authors = needs.segmentation == "authors"
    labels = _labels(
        on_host,
        pair,
        placement,
        own,
        lse,
        values,
        needs_segments=needs_segments,
        matches_are_shared=as_authors,
    )
    byte_order = None
    if needs.byte_events:
        assert given is not None, "checked above"
        tables = _checked_tables(pair, placement)
        order, start = _byte_order(tables[1], given.width, group, device)
        sides = [
            Side(table=table, ids=ids.numpy().astype(np.int32), continuations=continuations)
            for table, ids, continuations in zip(
                tables, (on_host.student_labels, on_host.teacher_labels), pair.continuations, strict=True
            )
        ]
        events = _byte_events(sides[0], sides[1], bounds=options.byte_bounds)
        labels = _with_bytes(
            labels, events, response, _frozen(given, len(order.columns)), order, start, group
        )
        byte_order, _ = _byte_order(tables[0], student.width, group, device)
    elif needs.topk:
        assert given is not None, "checked above"
        size = placement.teacher_vocab_size
        width = num_real_columns(
            shard_start=_rank(group) * given.width, shard_width=given.width, vocab_size=size
        )
        start, teacher_tiles = _rank(group) * given.width, _frozen(given, width)
        log_q, ids = top_k_log_probs(
            teacher_tiles,
            lse,
            needs.topk,
            vocab_size=size,
            shard_start=start,
            group=group,
            ids=needs.token_ids,
        )
        labels, entries_of = replace(labels, teacher_topk=log_q), interface_of(options).entries
        if entries_of is not None:
            assert ids is not None, "they were asked for"
            teacher_labels = on_host.teacher_labels.tolist()
            likely = Likely.of(range(len(teacher_labels)), ids, log_q, teacher_labels, own - lse)
            both = (on_host.student_labels.tolist(), teacher_labels)
            entries = entries_of(options)(
                on_host.segments.tolist(), both, likely, pair.translation(options.interface)
            )
            labels = replace(labels, entries=entries)
    check_labels(labels, placement=placement, config=options)
    labels = labels.to(device)
    common: dict[str, Any] = {
        "placement": placement,
        "config": options,
        "group": group,
        "student_logit_softcap": student.soft_cap,
        "teacher_logit_softcap": None if given is None else given.soft_cap,
        "byte_order": byte_order,
    }
    if isinstance(student, Head):
        output = interface_loss(student.hidden, student.weight, labels, shared_head=shared_head, **common)
    else:
        output = interface_loss_from_logits(
            student.values, values, labels, columns=columns, teacher_rows=teacher_rows, **common
        )
    return _finish(output, normalizer)


def place_shared_head(
    teacher: Head,
    pair: SharedVocabulary,
    *,
    student_width: int,
    student_vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Head:
    """The teacher with its output rows beside the student's columns, once for a whole training. Collective.

    student_width: rows of this rank's slice of the student's output layer. The hidden states may be replaced
    later: `dataclasses.replace(head, hidden=...)`.
    """
    placement = _placement(student_width, student_vocab_size, teacher, pair, group)
    start = _rank(group) * teacher.width
    return replace(teacher, placed=gather_shared_head(teacher.weight.detach(), start, placement, group))


def _on_host(response: Response) -> Response:
    """The response on the CPU, where it is checked: one wait for the device, a second one for weights."""
    given = {field.name: getattr(response, field.name) for field in fields(response)}
    integers = {name: x.detach() for name, x in given.items() if x is not None and name != "weights"}
    if all(x.device.type == "cpu" for x in integers.values()):
        return response
    packed = torch.cat([x.flatten().long() for x in integers.values()]).cpu()
    pieces = packed.split([x.numel() for x in integers.values()])
    changes = {name: piece.view(x.shape) for (name, x), piece in zip(integers.items(), pieces, strict=True)}
    weights = None if response.weights is None else response.weights.detach().cpu()
    return replace(response, weights=weights, **changes)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _frozen(source: Source, num_columns: int) -> StudentLogits:
    """The teacher, to be read tile by tile."""
    if isinstance(source, Logits):
        return GivenLogits(source.values.detach(), num_columns=num_columns, soft_cap=source.soft_cap)
    return OutputLayer(
        source.hidden.detach(), source.weight.detach(), num_columns=num_columns, soft_cap=source.soft_cap
    )


def _statistics(
    source: Source, labels: torch.Tensor, placement: VocabPlacement, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's logit and its row's log-sum-exp, of the teacher."""
    named: dict[str, Any] = {
        "shard_start": _rank(group) * source.width,
        "vocab_size": placement.teacher_vocab_size,
        "group": group,
        "logit_softcap": source.soft_cap,
    }
    if isinstance(source, Logits):
        return logit_statistics(source.values.detach(), labels, **named)
    return label_statistics(source.hidden.detach(), source.weight.detach(), labels, **named)


def _placement(
    student_width: int,
    student_vocab_size: int | None,
    teacher: Source | None,
    pair: SharedVocabulary,
    group: dist.ProcessGroup | None,
) -> VocabPlacement:
    """This rank's part of the shared vocabulary.

    Raises ValueError for ids given twice or outside the vocabularies.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    teacher_width = 0 if teacher is None else teacher.width
    sizes = []
    for side, width, given in (
        ("student", student_width, student_vocab_size),
        ("teacher", teacher_width, None if teacher is None else teacher.vocab_size),
    ):
        size = width * world_size if given is None else given
        if not 0 <= size <= width * world_size:
            raise ValueError(
                f"{side} vocab_size {size}: {world_size} slices of {width} hold {width * world_size} ids"
            )
        sizes.append(size)
    stop, stops = pair.stop_student_id, np.asarray(pair.stop_teacher_ids, dtype=np.int64)
    if (stop is None) != (len(stops) == 0):
        raise ValueError(
            f"stop_student_id {stop} and stop_teacher_ids {stops.tolist()} go together: give both"
        )
    pairs_s, pairs_t = (
        ids.detach().cpu().numpy().astype(np.int64) for ids in (pair.student_ids, pair.teacher_ids)
    )
    if pairs_s.ndim != 1 or pairs_s.shape != pairs_t.shape:
        raise ValueError(
            f"student_ids and teacher_ids are pairs, [C] each; got {pairs_s.shape} and {pairs_t.shape}"
        )
    students = pairs_s if stop is None else np.append(pairs_s, stop)
    teachers = np.concatenate([pairs_t, stops])
    for name, ids, size in (("student", students, sizes[0]), ("teacher", teachers, sizes[1])):
        if teacher_width and len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(f"shared {name} ids must lie in [0, {size}); got {ids.min()} to {ids.max()}")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{int((counts > 1).sum())} shared {name} ids are given more than once, stop ids included; "
                f"the first is {values[counts > 1][0]}"
            )
    start = _rank(group) * student_width
    # Shared token i has the teacher rows teachers[offsets[i] : offsets[i + 1]]: one, but the stop token,
    # which is the last, has all stop ids.
    counts = np.ones(len(students), dtype=np.int64)
    if stop is not None:
        counts[-1] = len(stops)
    offsets = np.concatenate([[0], counts.cumsum()])
    local = ((students >= start) & (students < start + student_width)).nonzero()[0]
    # Ascending by student column, as SharedColumns needs; none without a teacher.
    local = local[students[local].argsort()] if teacher_width else local[:0]
    rows = [teachers[offsets[i] : offsets[i + 1]] for i in local]
    return VocabPlacement(
        student_vocab_size=sizes[0],
        teacher_vocab_size=sizes[1],
        shard_start=start,
        shard_end=start + student_width,
        columns=students[local] - start,
        row_offsets=np.concatenate([[0], counts[local].cumsum()]),
        teacher_rows=np.concatenate([np.zeros(0, np.int64), *rows]),
    )


def _labels(
    response: Response,
    pair: SharedVocabulary,
    placement: VocabPlacement,
    own: torch.Tensor,
    lse: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    *,
    needs_segments: bool,
    matches_are_shared: bool,
) -> LabelBatch:
    """The kind of each segment: SHARED for one label on each side that are a pair, STOP, else UNIT.

    matches_are_shared: any one label on each side is SHARED, as in SimCT's released code.
    """
    student_labels, teacher_labels = response.student_labels, response.teacher_labels
    device, n, m = student_labels.device, len(student_labels), len(teacher_labels)
    segments, weights, replaced = response.segments, response.weights, response.replaced_columns
    if not needs_segments:
        segments, weights, replaced = segments[:0], None, None
    if segments.ndim != 2 or segments.shape[1] != 4:
        raise ValueError(f"segments must be [A, 4] of (ts, te, ss, se); got {list(segments.shape)}")
    segments = segments.to(device=device, dtype=torch.int64)
    outside = (segments < 0) | (segments > torch.tensor([m, m, n, n], device=device))
    if bool(outside.any()):
        a = int(outside.any(1).nonzero()[0])
        raise ValueError(
            f"segment {a} is {segments[a].tolist()}: it leaves the {m} teacher labels or the {n} student "
            "labels"
        )
    kinds = torch.full((len(segments),), int(SegmentKind.UNIT), device=device)
    teacher_first = torch.full_like(kinds, -1)
    shared_s, shared_t = (ids.to(device).long() for ids in (pair.student_ids, pair.teacher_ids))
    if len(segments):
        _check_ids("student_labels", student_labels, placement.student_vocab_size)
        # partner[student id]: the teacher id of the same bytes, -1 if it is not shared; student_of is the
        # inverse.
        partner = torch.full((placement.student_vocab_size,), -1, dtype=torch.int64, device=device)
        partner[shared_s] = shared_t
        # An empty or overlapping segment is refused by check_labels; here it only must not fault.
        label_s = student_labels[segments[:, 2].clamp(max=n - 1)]
        label_t = teacher_labels[segments[:, 0].clamp(max=m - 1)]
        # Columns 0 and 2 of (ts, te, ss, se) are starts, 1 and 3 ends: one label on each side.
        single = ((segments[:, 1::2] - segments[:, 0::2]) == 1).all(1)
        kinds[single & ((partner[label_s] == label_t) | matches_are_shared)] = SegmentKind.SHARED
        if pair.stop_student_id is not None:
            stops = torch.tensor(pair.stop_teacher_ids, device=device)
            kinds[single & (label_s == pair.stop_student_id) & torch.isin(label_t, stops)] = SegmentKind.STOP
        student_of = torch.full((placement.teacher_vocab_size,), -1, dtype=torch.int64, device=device)
        student_of[shared_t] = shared_s
        teacher_first = torch.where(kinds == SegmentKind.UNIT, student_of[label_t], -1)
    if weights is None:
        weights = torch.ones(len(segments), device=device)
    if weights.shape != kinds.shape:
        raise ValueError(
            f"weights needs one number a segment: {list(weights.shape)} for {len(kinds)} segments"
        )
    if replaced is None:
        replaced = torch.full_like(kinds, -1)
    elif not bool(torch.isin(replaced.to(device), torch.cat([shared_s, shared_s.new_tensor([-1])])).all()):
        raise ValueError("replaced_columns must be -1 or one of the pair's student_ids")
    return LabelBatch(
        student_labels=student_labels,
        segments=segments,
        kinds=kinds,
        replaced_columns=replaced.to(device=device, dtype=torch.int64),
        teacher_first_columns=teacher_first,
        weights=weights.to(device=device, dtype=torch.float32),
        teacher_own_logit=own,
        teacher_lse=lse,
        teacher_hidden=teacher_hidden,
        teacher_hidden_index=segments[:, 0],
    )


def _checked_tables(pair: SharedVocabulary, placement: VocabPlacement) -> tuple[TokenTable, TokenTable]:
    if pair.tables is None:
        raise ValueError("interface bytes needs the pair's tables, the bytes of every token")
    for side, table, size in zip(
        ("student", "teacher"),
        pair.tables,
        (placement.student_vocab_size, placement.teacher_vocab_size),
        strict=True,
    ):
        if table.num_ids != size:
            raise ValueError(
                f"the {side}'s table has {table.num_ids} ids, its vocabulary {size}: they must be equal"
            )
    return pair.tables


def _byte_order(
    table: TokenTable, width: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[ByteOrder, int]:
    """This rank's columns in the order of their bytes, and where they start."""
    start = _rank(group) * width
    return ByteOrder.of(table, shard_start=start, shard_end=start + width, device=device), start


def _byte_events(student: Side, teacher: Side, *, bounds: str) -> ByteEvents:
    """The byte events of one response."""
    alignment = align(teacher.table, teacher.ids, student.table, student.ids)
    stopped = student.ids.size and int(student.ids[-1]) in student.table.stop_ids
    spelled, _ = student.table.spell(student.ids[:-1] if stopped else student.ids)
    text = spelled[: alignment.common_prefix_bytes]
    if bounds == "any":
        (events,) = plan_byte_bounds(text, stop=alignment.stop, student=student, teachers=[teacher])
        return events
    return plan_byte_events(
        text,
        stop=alignment.stop,
        student=student.table,
        student_ids=student.ids,
        teacher=teacher.table,
        teacher_ids=teacher.ids,
    )


def _with_bytes(
    labels: LabelBatch,
    events: ByteEvents,
    response: Response,
    teacher: StudentLogits,
    order: ByteOrder,
    teacher_start: int,
    group: dist.ProcessGroup | None,
) -> LabelBatch:
    """The labels with the events and the teacher's log-probabilities of them."""
    device = labels.teacher_lse.device
    side = pack_byte_sides([events.teacher], [len(response.teacher_labels)]).to(device)
    masses = slot_log_masses(
        teacher, response.teacher_labels, side, order=order, shard_start=teacher_start, group=group
    )
    batch = pack_byte_events([events], [len(labels.student_labels)], [masses.cpu()])
    return replace(labels, byte_batch=batch.to(device))


def _finish(output: LossOutput, normalizer: float | torch.Tensor | None) -> CrossTokenizerLoss:
    """Divide once. Raises ValueError if the sum is not finite."""
    count = output.num_labels
    divisor = count.clamp(min=1) if normalizer is None else normalizer
    # One wait for both; where the divisor is our own it is positive.
    is_positive = torch.as_tensor(1 if normalizer is None else normalizer, device=count.device) > 0
    finite, positive = torch.stack([torch.isfinite(output.sum), is_positive.reshape(())]).tolist()
    if not finite:
        raise ValueError(
            f"the loss is {float(output.sum.detach())}: nan or inf in the logits of either model, or a "
            "candidate that only one of them finds impossible"
        )
    if not positive:
        raise ValueError(
            f"normalizer {float(divisor)}: must be positive, the student labels of the global batch"
        )
    return CrossTokenizerLoss(
        loss=output.sum / divisor, sum=output.sum.detach(), count=count, metrics=output.metrics
    )


def _check_applies(options: InterfaceConfig) -> None:
    """Raises ValueError for options that only a run reads, when it makes its segments."""
    of_a_run = ("drop_units", "random_units", "unit_weight", "mask_whitespace", "stop_bridge", "shared")
    method, default = options.method(), InterfaceConfig()
    changed = [name for name in of_a_run if getattr(method, name) != getattr(default, name)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: read where a run makes its segments; here, give other segments, weights "
            "or pairs"
        )


def _check_rows(side: str, source: Source, labels: torch.Tensor) -> None:
    if source.rows.ndim != 2 or labels.ndim != 1 or len(source.rows) != len(labels):
        raise ValueError(
            f"{side} needs one row a label: got {list(source.rows.shape)} for labels {list(labels.shape)}"
        )


def _check_ids(name: str, ids: torch.Tensor, size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"{name} must lie in [0, {size}); got {int(ids.min())} to {int(ids.max())}")
