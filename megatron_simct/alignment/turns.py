"""The plan of a sequence of several responses: each is aligned on its own, and the results are joined.

Student labels are counted over the responses alone; teacher labels are all the teacher's tokens behind its
prompt, for these are what it reads and answers. What lies between two responses is in no segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.records import AlignedPair, ByteEvents, ByteSide, Prompt, Rollout, Turns

MASK_REASONS = (
    "student_template",
    "teacher_template",
    "other_text",
    "blank",
    "marks",
    "tool_calls",
    "too_long",
)
"""Why text of the assistant is not compared: the student's or a teacher's template does not write it as it
is (such as thinking of earlier turns); the teacher's messages have other text in its place; blanks that one
of the templates strips; marks of thinking inside a content; calls of tools, which each template writes in its
own form; it does not fit into --rollout-max-response-len.
"""


def plan_turns(
    plan: Callable[[Prompt, Rollout], AlignedPair], student: TokenTable, prompt: Prompt, rollout: Rollout
) -> AlignedPair:
    """The pair of a rollout with a transcript; `plan` makes the pair of one response."""
    transcript = rollout.transcript
    if transcript is None:
        return plan(prompt, rollout)
    pairs = []
    for turn, (start, end) in enumerate(transcript.student.spans.tolist()):
        ids = rollout.student_ids[start:end]
        response = replace(
            rollout,
            student_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            finish="stop" if int(ids[-1]) in student.stop_ids else "length",
            transcript=None,
            turn=turn,
        )
        pairs.append(plan(prompt, response))
    sizes = [end - start for start, end in transcript.student.spans.tolist()]
    num_teachers = len(pairs[0].others) + pairs[0].needs.teacher
    assert len(transcript.teachers) == num_teachers, (
        f"sample {prompt.sample_id}: {num_teachers} teachers read it, but its responses are in the tokens of "
        f"{len(transcript.teachers)}"
    )
    if not transcript.teachers:
        return replace(pairs[0], counts=_counts([pair.counts for pair in pairs]) | transcript.counts)
    first, *others = transcript.teachers
    joined = _joined(pairs, first, sizes)
    return replace(
        joined,
        counts=joined.counts | transcript.counts,
        others=tuple(
            _joined([pair.others[i] for pair in pairs], turns, sizes) for i, turns in enumerate(others)
        ),
    )


def _joined(pairs: Sequence[AlignedPair], teacher: Turns, sizes: Sequence[int]) -> AlignedPair:
    """sizes: student labels of each response."""
    labels_before = np.cumsum([0, *sizes])[:-1].tolist()
    segments = []
    for pair, (start, end), before in zip(pairs, teacher.spans.tolist(), labels_before, strict=True):
        # The last token may be a stop: the template's own one here, the first of all stops in the pair.
        read = teacher.ids[start:end]
        assert len(pair.teacher_ids) == len(read) and np.array_equal(pair.teacher_ids[:-1], read[:-1]), (
            f"sample {pair.sample_id}: a response is not among the tokens that the teacher reads"
        )
        segments.append(pair.segments + np.array([start, start, before, before], np.int32))
    starts = teacher.spans[:, 0].tolist()
    events = [pair.byte_events for pair in pairs if pair.byte_events is not None]
    return replace(
        pairs[0],
        teacher_ids=teacher.ids,
        teacher_labels=teacher.labels,
        segments=np.concatenate(segments),
        kinds=np.concatenate([pair.kinds for pair in pairs]),
        replaced_columns=np.concatenate([pair.replaced_columns for pair in pairs]),
        teacher_first_columns=np.concatenate([pair.teacher_first_columns for pair in pairs]),
        weights=np.concatenate([pair.weights for pair in pairs]),
        teacher_rows=np.concatenate(
            [pair.teacher_rows + np.int32(start) for pair, start in zip(pairs, starts, strict=True)]
        ),
        byte_events=_joined_events(events, labels_before, sum(sizes), starts, teacher) if events else None,
        counts=_counts([pair.counts for pair in pairs]),
    )


def _counts(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums; a sequence is canonical if all its responses are."""
    names = dict.fromkeys(name for of_one in counts for name in of_one)
    joined = {name: sum(of_one.get(name, 0) for of_one in counts) for name in names}
    return joined | {name: min(of_one[name] for of_one in counts) for name in names if name == "canonical"}


def _joined_events(
    events: Sequence[ByteEvents],
    student_starts: Sequence[int],
    num_student: int,
    teacher_starts: Sequence[int],
    teacher: Turns,
) -> ByteEvents:
    positions = np.cumsum([0, *(one.num_positions for one in events)])[:-1].tolist()
    slots = np.cumsum([0, *(one.slot_event.size for one in events)])[:-1].tolist()

    def flags(name: str) -> np.ndarray | None:
        found = [getattr(one, name) for one in events]
        return None if found[0] is None else np.concatenate(found)

    caps = [
        None if one.slot_cap is None else np.where(one.slot_cap >= 0, one.slot_cap + np.int32(before), -1)
        for one, before in zip(events, slots, strict=True)
    ]
    return ByteEvents(
        num_positions=sum(one.num_positions for one in events),
        slot_position=_behind([one.slot_position for one in events], positions),
        slot_event=np.concatenate([one.slot_event for one in events]),
        student=_joined_side([one.student for one in events], student_starts, num_student, slots),
        teacher=_joined_side([one.teacher for one in events], teacher_starts, len(teacher.ids), slots),
        slot_cap=None if caps[0] is None else np.concatenate([cap for cap in caps if cap is not None]),
        student_loose=flags("student_loose"),
        teacher_loose=flags("teacher_loose"),
    )


def _joined_side(
    sides: Sequence[ByteSide], starts: Sequence[int], num_rows: int, slots: Sequence[int]
) -> ByteSide:
    """starts: the first row of each response. num_rows: rows of the sequence; one that lies between two
    responses is one segment, which no slot adds."""
    segments = np.cumsum([0, *(side.segment_row.size for side in sides)])[:-1].tolist()
    rows = _behind([side.segment_row for side in sides], starts)
    between = np.setdiff1d(np.arange(num_rows, dtype=np.int32), rows)
    rows = np.concatenate([rows, between])
    order = rows.argsort(kind="stable")
    place = np.empty(order.size, np.int32)
    place[order] = np.arange(order.size, dtype=np.int32)
    segment_start = np.concatenate([*(side.segment_start for side in sides), np.zeros_like(between)])
    return ByteSide(
        segment_row=rows[order],
        segment_start=segment_start[order],
        entry_slot=_behind([side.entry_slot for side in sides], slots),
        entry_segment=place[_behind([side.entry_segment for side in sides], segments)],
        last_row=_behind([side.last_row for side in sides], starts),
    )


def _behind(arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> np.ndarray:
    """int32: the arrays one after another, each shifted by its own offset."""
    return np.concatenate([array + np.int32(by) for array, by in zip(arrays, offsets, strict=True)])
