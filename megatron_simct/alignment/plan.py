"""From one rollout to one AlignedPair: the request to the teacher, and the labels that can be compared.

The student's sampled ids are kept as they are, canonical or not: retokenizing them would make those rows
off-policy. Only their bytes go through the teacher's tokenizer. The plan is made before any model runs,
so it also lists the teacher's rows that the interface will need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_simct.alignment.alignment_map import AlignmentMap
from megatron_simct.alignment.byte_bounds import Side, plan_byte_bounds
from megatron_simct.alignment.byte_events import plan_byte_events, plan_mixture_events
from megatron_simct.alignment.segments import Alignment, align
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.alignment.tokenizer import Tokenizer, utf8_prefix_bytes
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.records import AlignedPair, ByteEvents, Prompt, Rollout, SegmentKind, TeacherNeeds

DROP_REASONS = ("mismatch", "special", "one_stop", "no_bytes", "walk", "invalid_utf8")
"""Why bytes of a response are in no segment: those of `Alignment.dropped`, and those that `plan_pair`
distinguishes.
"""


def plan_pair(
    prompt: Prompt,
    rollout: Rollout,
    *,
    student: Tokenizer,
    teacher: Tokenizer,
    alignment_map: AlignmentMap | None,
    needs: TeacherNeeds,
    interface: InterfaceConfig | None = None,
) -> AlignedPair:
    """Retokenizes the response for the teacher, cuts both into minimal units, classifies and weights these.

    interface: decides which segments are joined, and their weights; random choices depend only on its seed,
    on the sample's id and on the turn.

    The teacher's side ends in its stop token if and only if the student stopped. Counts of the result, all
    additive:
        bytes                     content bytes of the response; the next three sum to it
        bytes_one_to_one          in segments of kind SHARED
        bytes_unit                in segments of kind UNIT
        bytes_dropped_<reason>    in no segment: the reasons of `Alignment.dropped`, and invalid_utf8 where
                                  the teacher's text ends because the response's bytes are no longer UTF-8
        student_labels            labels of the response, the normaliser of the loss: dropped ones count too
        student_labels_dropped, teacher_labels, teacher_labels_dropped
        segments_shared, segments_unit, segments_stop, and of them all segments_blank, of white space only
        canonical                 1 if the student's tokenizer would spell the response in just these ids

    alignment_map: which tokens are shared; None if nothing compares tokens (`bytes`).

    Raises ValueError for records of different samples, a rollout that stopped without a stop token, or a map
    that belongs to other tokenizers.
    """
    read = _read(prompt, rollout, student=student, teacher=teacher, alignment_map=alignment_map, needs=needs)
    interface = (interface or InterfaceConfig()).method()
    events = None
    if needs.byte_events and interface.byte_bounds == "any":
        (events,) = plan_byte_bounds(
            read.common,
            stop=read.alignment.stop,
            student=_side(student, rollout.student_ids),
            teachers=[_side(teacher, read.teacher_ids)],
        )
    elif needs.byte_events:
        events = plan_byte_events(
            read.common,
            stop=read.alignment.stop,
            student=student.table,
            student_ids=rollout.student_ids,
            teacher=teacher.table,
            teacher_ids=read.teacher_ids,
        )
    return _pair(read, prompt.teacher_ids, rollout, student, alignment_map, needs, interface, events)


def plan_mixture(
    prompt: Prompt,
    rollout: Rollout,
    *,
    student: Tokenizer,
    teachers: Sequence[Tokenizer],
    needs: TeacherNeeds,
    interface: InterfaceConfig | None = None,
) -> AlignedPair:
    """As `plan_pair`, for several teachers that are mixed (`plan_mixture_events`): that of the first, with
    `others`.

    The counts are those of the first teacher.
    """
    reads = [
        _read(prompt, rollout, student=student, teacher=teacher, alignment_map=None, needs=needs)
        for teacher in teachers
    ]
    interface = (interface or InterfaceConfig()).method()
    text, stop = min((read.common for read in reads), key=len), all(read.alignment.stop for read in reads)
    parts = list(zip(teachers, reads, strict=True))
    if interface.byte_bounds == "any":
        events = plan_byte_bounds(
            text,
            stop=stop,
            student=_side(student, rollout.student_ids),
            teachers=[_side(teacher, read.teacher_ids) for teacher, read in parts],
        )
    else:
        events = plan_mixture_events(
            text,
            stop=stop,
            student=student.table,
            student_ids=rollout.student_ids,
            teachers=[(teacher.table, read.teacher_ids) for teacher, read in parts],
        )
    first, *others = (
        _pair(read, prompt_ids, rollout, student, None, needs, interface, of_teacher)
        for read, prompt_ids, of_teacher in zip(
            reads, (prompt.teacher_ids, *prompt.other_teacher_ids), events, strict=True
        )
    )
    return replace(first, others=tuple(others))


def _side(tokenizer: Tokenizer, ids: np.ndarray) -> Side:
    return Side(table=tokenizer.table, ids=ids, continuations=tokenizer.continuations)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The response in one teacher's tokens."""

    data: bytes
    """The student's bytes, up to its first special token."""
    teacher_ids: np.ndarray
    alignment: Alignment
    common: np.ndarray
    """uint8: the bytes that both sides begin with."""


def _read(
    prompt: Prompt,
    rollout: Rollout,
    *,
    student: Tokenizer,
    teacher: Tokenizer,
    alignment_map: AlignmentMap | None,
    needs: TeacherNeeds,
) -> _Read:
    _check(prompt, rollout, student=student, teacher=teacher, alignment_map=alignment_map)
    stopped = rollout.finish == "stop"
    content_ids = rollout.student_ids[:-1] if stopped else rollout.student_ids
    data = bytes_before_special(student.table, content_ids)
    teacher_ids = teacher.encode(data)
    if stopped:
        teacher_ids = np.append(teacher_ids, np.int32(teacher.table.stop_ids[0]))
    alignment = align(
        teacher.table, teacher_ids, student.table, rollout.student_ids, segmentation=needs.segmentation
    )
    common = np.frombuffer(data, np.uint8)[: alignment.common_prefix_bytes]
    return _Read(data=data, teacher_ids=teacher_ids, alignment=alignment, common=common)


def bytes_before_special(table: TokenTable, ids: np.ndarray) -> bytes:
    """The bytes of ids [n] up to the first special token.

    Behind it nothing can be aligned, so the teacher does not read on either.
    """
    spelled, ends = table.spell(ids)
    special = table.special[ids]
    return spelled[: ends[special.argmax()] if special.any() else None].tobytes()


def _pair(
    read: _Read,
    teacher_prompt_ids: np.ndarray,
    rollout: Rollout,
    student: Tokenizer,
    alignment_map: AlignmentMap | None,
    needs: TeacherNeeds,
    interface: InterfaceConfig,
    byte_events: ByteEvents | None,
) -> AlignedPair:
    alignment, teacher_ids, data = read.alignment, read.teacher_ids, read.data
    matches_are_shared = needs.segmentation == "authors"
    kinds = _kinds(alignment, teacher_ids, rollout.student_ids, None if matches_are_shared else alignment_map)
    weights = np.ones(kinds.size, np.float32)
    random = np.random.default_rng([interface.interface_seed, rollout.sample_id, rollout.turn])
    if interface.random_units is not None:
        alignment, kinds, weights = _joined_at_random(alignment, kinds, interface.random_units, random)
    weights *= _weights(alignment, kinds, data, interface, random)

    content_ids = rollout.student_ids[:-1] if rollout.finish == "stop" else rollout.student_ids
    canonical = np.array_equal(student.encode(data), content_ids)
    return AlignedPair(
        sample_id=rollout.sample_id,
        teacher_prompt_ids=teacher_prompt_ids,
        teacher_ids=teacher_ids,
        segments=alignment.segments,
        kinds=kinds,
        # The walk's units are columns of their own, whatever they spell.
        replaced_columns=(
            _replaced_columns(alignment, kinds, data, alignment_map)
            if needs.segmentation == "minimal" and alignment_map is not None
            else np.full(kinds.size, -1, dtype=np.int32)
        ),
        teacher_first_columns=_teacher_first_columns(alignment, kinds, teacher_ids, alignment_map),
        weights=weights,
        teacher_rows=_teacher_rows(alignment.segments, kinds, teacher_ids.size, needs),
        needs=needs,
        byte_events=byte_events,
        counts=_counts(alignment, kinds, data)
        | {
            "student_labels": rollout.student_ids.size,
            "teacher_labels": teacher_ids.size,
            "canonical": int(canonical),
        },
    )


def _check(
    prompt: Prompt,
    rollout: Rollout,
    *,
    student: Tokenizer,
    teacher: Tokenizer,
    alignment_map: AlignmentMap | None,
) -> None:
    if prompt.sample_id != rollout.sample_id:
        raise ValueError(f"prompt of sample {prompt.sample_id} but rollout of sample {rollout.sample_id}")
    last_id = int(rollout.student_ids[-1]) if rollout.student_ids.size else None
    if rollout.finish == "stop" and last_id not in student.table.stop_ids:
        raise ValueError(
            f'sample {rollout.sample_id} finished by "stop" but its last id is {last_id}, not one of the '
            f"stop ids {list(student.table.stop_ids)}"
        )
    if alignment_map is None:
        return
    expected = (alignment_map.student_fingerprint, alignment_map.teacher_fingerprint)
    if expected != (student.table.fingerprint, teacher.table.fingerprint):
        raise ValueError(f'the alignment map was not built from "{student.name}" and "{teacher.name}"')


def _kinds(
    alignment: Alignment, teacher_ids: np.ndarray, student_ids: np.ndarray, alignment_map: AlignmentMap | None
) -> np.ndarray:
    """int8 [A] of SegmentKind. One token on each side is SHARED only if the map, if any, holds that pair of
    ids.

    The released code gives a match of its walk no unit column, whatever the ids: there the map is not asked.
    """
    ts, te, ss, se = alignment.segments.T
    one_to_one = (te - ts == 1) & (se - ss == 1)
    shared = one_to_one
    if alignment_map is not None:
        shared = shared & alignment_map.is_shared(teacher_ids[ts], student_ids[ss])
    kinds = np.where(shared, SegmentKind.SHARED, SegmentKind.UNIT).astype(np.int8)
    if alignment.stop:
        kinds[-1] = SegmentKind.STOP
    return kinds


def _teacher_first_columns(
    alignment: Alignment, kinds: np.ndarray, teacher_ids: np.ndarray, alignment_map: AlignmentMap | None
) -> np.ndarray:
    """int32 [A]: the shared token that a UNIT's first teacher label is, -1 if it is not shared."""
    if alignment_map is None:
        return np.full(kinds.size, -1, dtype=np.int32)
    first = alignment_map.shared_student_ids_of(teacher_ids[alignment.segments[:, 0]])
    return np.where(kinds == SegmentKind.UNIT, first, -1).astype(np.int32)


def _joined_at_random(
    alignment: Alignment, kinds: np.ndarray, share: float, random: np.random.Generator
) -> tuple[Alignment, np.ndarray, np.ndarray]:
    """The ablation `random_units`: what coarser units cost (alignment, kinds and weights of the segments).

    Of the n 1:1 positions round(n share) are marked; a longest run of marked neighbours and the position
    behind it become one unit. The real units have weight 0: at share 0 this is `strict`.
    """
    single = (kinds == SegmentKind.SHARED).nonzero()[0]
    marked = np.zeros(kinds.size, dtype=bool)
    marked[random.permutation(single)[: round(single.size * share)]] = True
    # A segment is joined to the one before it, if that one is marked and both are 1:1 positions.
    is_single = kinds == SegmentKind.SHARED
    joined = np.append(False, marked[:-1] & is_single[1:])[: kinds.size]
    first = (~joined).nonzero()[0]
    last = np.append(first[1:], kinds.size)[: first.size] - 1
    segments = np.stack(
        [alignment.segments[of, i] for i, of in enumerate((first, last, first, last))], axis=1
    )
    new_kinds = np.where(last > first, SegmentKind.UNIT, kinds[first]).astype(np.int8)
    weights = np.where((last == first) & (new_kinds == SegmentKind.UNIT), 0, 1).astype(np.float32)
    return replace(alignment, segments=segments, byte_ends=alignment.byte_ends[last]), new_kinds, weights


def _weights(
    alignment: Alignment,
    kinds: np.ndarray,
    data: bytes,
    interface: InterfaceConfig,
    random: np.random.Generator,
) -> np.ndarray:
    """float32 [A]"""
    weights, units = np.ones(kinds.size, np.float32), kinds == SegmentKind.UNIT
    if interface.unit_weight == "student_length":
        weights = np.where(units, alignment.segments[:, 3] - alignment.segments[:, 2], weights)
    if interface.drop_units:
        weights = np.where(units & (random.random(kinds.size) < interface.drop_units), 0, weights)
    if interface.interface == "scalar" and interface.scalar == "dpca":
        weights = np.where(_ends_inside_character(alignment, data), 0, weights)
    if interface.mask_whitespace:
        weights = np.where(_is_blank(alignment, data), 0, weights)
    if not interface.stop_bridge:
        weights = np.where(kinds == SegmentKind.STOP, 0, weights)
    return weights.astype(np.float32)


def _ends_inside_character(alignment: Alignment, data: bytes) -> np.ndarray:
    """bool [A]: segments whose own bytes, as text, end in a replacement character."""
    bounds = zip(np.append(0, alignment.byte_ends)[:-1].tolist(), alignment.byte_ends.tolist(), strict=True)
    texts = (data[start:end].decode("utf-8", "replace") for start, end in bounds)
    return np.array([text.endswith("\ufffd") for text in texts], dtype=bool)


def _is_blank(alignment: Alignment, data: bytes) -> np.ndarray:
    """bool [A]: segments whose bytes are ASCII blanks only, at least one."""
    bounds = zip(np.append(0, alignment.byte_ends)[:-1].tolist(), alignment.byte_ends.tolist(), strict=True)
    return np.array([data[start:end].isspace() for start, end in bounds], dtype=bool)


def _replaced_columns(
    alignment: Alignment, kinds: np.ndarray, data: bytes, alignment_map: AlignmentMap
) -> np.ndarray:
    """int32 [A]: the shared token that spells the same bytes as a UNIT, -1 if none does.

    U is a set of byte strings, so such a row has one column for both.
    """
    ends = alignment.byte_ends
    starts = np.append(0, ends)[:-1]
    replaced = np.full(kinds.size, -1, dtype=np.int32)
    units = (kinds == SegmentKind.UNIT).nonzero()[0]
    bounds = zip(starts[units].tolist(), ends[units].tolist(), strict=True)
    replaced[units] = [alignment_map.shared_student_id(data[start:end]) for start, end in bounds]
    return replaced


def _teacher_rows(
    segments: np.ndarray, kinds: np.ndarray, num_labels: int, needs: TeacherNeeds
) -> np.ndarray:
    """int32 [R], ascending: the teacher labels whose predicting hidden state is requested."""
    first = segments[:, 0]
    match needs.hidden_rows:
        case "none":
            return first[:0].copy()
        case "one_to_one":
            return first[kinds != SegmentKind.UNIT]
        case "first":
            return first.copy()
        case "all":
            return np.arange(num_labels, dtype=np.int32)
    raise ValueError(
        f'hidden_rows "{needs.hidden_rows}" is unknown; use "none", "one_to_one", "first" or "all"'
    )


def _counts(alignment: Alignment, kinds: np.ndarray, data: bytes) -> dict[str, int]:
    segment_bytes = np.diff(alignment.byte_ends, prepend=0)
    counts = Counter(
        bytes=alignment.student_bytes,
        bytes_one_to_one=int(segment_bytes[kinds == SegmentKind.SHARED].sum()),
        bytes_unit=int(segment_bytes[kinds == SegmentKind.UNIT].sum()),
        student_labels_dropped=alignment.student_labels_dropped,
        teacher_labels_dropped=alignment.teacher_labels_dropped,
        segments_shared=int((kinds == SegmentKind.SHARED).sum()),
        segments_unit=int((kinds == SegmentKind.UNIT).sum()),
        segments_stop=int((kinds == SegmentKind.STOP).sum()),
        segments_blank=int(_is_blank(alignment, data).sum()),
    )
    valid_bytes = utf8_prefix_bytes(data)
    for reason, num_bytes in alignment.dropped.items():
        if reason == "mismatch" and valid_bytes < len(data) and alignment.common_prefix_bytes == valid_bytes:
            reason = "invalid_utf8"
        counts[f"bytes_dropped_{reason}"] = num_bytes
    return dict(counts)


def plan_without_teacher(
    prompt: Prompt, rollout: Rollout, *, student: Tokenizer, needs: TeacherNeeds
) -> AlignedPair:
    """The plan of an interface that needs no teacher: nothing to compare, only the response's bytes to
    count.
    """
    content_ids = rollout.student_ids[:-1] if rollout.finish == "stop" else rollout.student_ids
    nothing = np.zeros(0, np.int32)
    return AlignedPair(
        sample_id=rollout.sample_id,
        teacher_prompt_ids=nothing,
        teacher_ids=nothing,
        segments=np.zeros((0, 4), np.int32),
        kinds=np.zeros(0, np.int8),
        replaced_columns=nothing,
        teacher_first_columns=nothing,
        weights=np.zeros(0, np.float32),
        teacher_rows=nothing,
        needs=needs,
        counts={"bytes": len(student.decode(content_ids)), "student_labels": rollout.student_ids.size},
    )
