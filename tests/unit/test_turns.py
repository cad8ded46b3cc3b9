"""Several responses in one sequence: the joined plan is that of the responses one after another, shifted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_simct.alignment import Tokenizer, build_alignment_map, load_tokenizer
from megatron_simct.alignment.cut_rules import with_continuations
from megatron_simct.alignment.plan import plan_mixture, plan_pair, plan_without_teacher
from megatron_simct.alignment.turns import plan_turns
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.packing import pack_byte_events
from megatron_simct.records import AlignedPair, ByteSide, Prompt, Rollout, TeacherNeeds, Transcript, Turns
from tests.huggingface import save_byte_fallback, save_byte_level

TEXTS = ["the cat sat", "Tom has 1234 apples", "", "Привет"]
"""The responses; the empty one is its stop token alone."""
BETWEEN = ["\nHow many?", " mat ", "12\n"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """The student's, and those of two teachers."""
    root = tmp_path_factory.mktemp("turns")
    save_byte_level(root / "student")
    save_byte_fallback(root / "first")
    save_byte_level(root / "second", vocab_size=300)
    return [with_continuations(load_tokenizer(str(root / name))) for name in ("student", "first", "second")]


def turns_of(tokenizer: Tokenizer) -> Turns:
    ids: list[int] = []
    spans = []
    for k, text in enumerate(TEXTS):
        start = len(ids)
        ids += [*tokenizer.encode(text.encode()), tokenizer.table.stop_ids[0]]
        spans.append((start, len(ids)))
        ids += tokenizer.encode(BETWEEN[k].encode()).tolist() if k < len(BETWEEN) else []
    return Turns(ids=np.array(ids, np.int32), spans=np.array(spans, np.int32))


def rollout_of(ids: np.ndarray, transcript: Transcript | None = None) -> Rollout:
    return Rollout(
        sample_id=5,
        weight_version=0,
        student_ids=ids,
        logprobs=np.zeros(len(ids), np.float32),
        finish="stop",
        transcript=transcript,
    )


PROMPT = Prompt(
    sample_id=5,
    student_ids=np.zeros(2, np.int32),
    teacher_ids=np.zeros(3, np.int32),
    other_teacher_ids=(np.zeros(4, np.int32),),
)


def of_labels(side: ByteSide, labels: np.ndarray) -> list[list[int]]:
    """The arrays of a side, its rows counted over labels only; a row between them is one unused segment."""
    inside = np.isin(side.segment_row, labels)
    between = np.flatnonzero(~inside)
    assert not np.isin(side.entry_segment, between).any()
    assert sorted(side.segment_row[between]) == sorted(set(range(labels[-1] + 1)) - set(labels.tolist()))
    assert not side.segment_start[between].any() and (np.diff(side.segment_row) >= 0).all()
    number = inside.cumsum() - 1
    return [
        np.searchsorted(labels, side.segment_row[inside]).tolist(),
        side.segment_start[inside].tolist(),
        side.entry_slot.tolist(),
        number[side.entry_segment].tolist(),
        np.searchsorted(labels, side.last_row).tolist(),
    ]


def check_events(joined: AlignedPair, apart: list[AlignedPair], student: Turns, teacher: Turns) -> None:
    """The joined events are the packed events of the responses."""
    events = [pair.byte_events for pair in apart if pair.byte_events is not None]
    assert joined.byte_events is not None and len(events) == len(TEXTS)
    found = joined.byte_events
    for mine, turns in (("student", student), ("teacher", teacher)):
        swapped = [replace(one, student=getattr(one, mine)) for one in events]
        sizes = [end - start for start, end in turns.spans.tolist()]
        expected = pack_byte_events(swapped, sizes, [torch.zeros(one.slot_event.size) for one in events])
        # The student's rows are labels; the teacher's are all tokens from the first response on.
        labels = np.arange(sum(sizes)) if mine == "student" else turns.labels
        names = ("segment_row", "segment_start", "entry_slot", "entry_segment", "last_row")
        assert of_labels(getattr(found, mine), labels) == [
            getattr(expected.student, name).tolist() for name in names
        ]
        assert found.num_positions == expected.num_positions > 20
        assert found.slot_position.tolist() == expected.slot_position.tolist()
        assert found.slot_event.tolist() == expected.slot_event.tolist()
        for name in ("slot_cap", "student_loose", "teacher_loose"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None) and (one is None or one.tolist() == other.tolist())


@pytest.mark.parametrize("bounds", ["any", "longest-match"])
def test_byte_events_of_a_mixture_are_those_of_the_responses(
    tokenizers: list[Tokenizer], bounds: str
) -> None:
    student, *teachers = tokenizers
    plan = partial(
        plan_mixture,
        student=student,
        teachers=teachers,
        needs=TeacherNeeds(hidden_rows="none", byte_events=True),
        interface=InterfaceConfig(interface="bytes", byte_bounds=bounds),
    )
    given = Transcript(
        student=turns_of(student), teachers=tuple(map(turns_of, teachers)), counts={"turns": len(TEXTS)}
    )
    joined = plan_turns(plan, student.table, PROMPT, rollout_of(given.student.ids, given))
    apart = [plan(PROMPT, rollout_of(given.student.ids[a:b])) for a, b in given.student.spans.tolist()]
    check_events(joined, apart, given.student, given.teachers[0])
    (other,) = joined.others
    assert len(other.teacher_prompt_ids) == 4 and other.teacher_ids.tolist() == given.teachers[1].ids.tolist()
    check_events(other, [pair.others[0] for pair in apart], given.student, given.teachers[1])
    assert joined.counts["bytes"] == sum(len(text.encode()) for text in TEXTS) and joined.counts["turns"] == 4


def test_segments_rows_and_weights_are_shifted(tokenizers: list[Tokenizer]) -> None:
    student, teacher, _ = tokenizers
    plan = partial(
        plan_pair,
        student=student,
        teacher=teacher,
        alignment_map=build_alignment_map(student, teacher),
        needs=TeacherNeeds(hidden_rows="all"),
        interface=InterfaceConfig(unit_weight="student_length"),
    )
    given = Transcript(student=turns_of(student), teachers=(turns_of(teacher),))
    joined = plan_turns(plan, student.table, PROMPT, rollout_of(given.student.ids, given))
    apart = [plan(PROMPT, rollout_of(given.student.ids[a:b])) for a, b in given.student.spans.tolist()]
    labels = given.student.ids[given.student.labels]
    assert rollout_of(given.student.ids, given).label_ids.tolist() == labels.tolist()
    assert joined.teacher_rows.tolist() == given.teachers[0].labels.tolist()
    for name in ("kinds", "weights", "replaced_columns", "teacher_first_columns"):
        assert getattr(joined, name).tolist() == [x for pair in apart for x in getattr(pair, name).tolist()]
    assert len(joined.segments) == sum(len(pair.segments) for pair in apart) > 8
    for ts, te, ss, se in joined.segments.tolist():
        assert student.decode(labels[ss:se]) == teacher.decode(given.teachers[0].ids[ts:te])
    assert joined.segments[-1, 1] == len(given.teachers[0].ids) and joined.segments[-1, 3] == len(labels)
    wrong = replace(given, teachers=(replace(given.teachers[0], ids=given.teachers[0].ids[::-1]),))
    with pytest.raises(AssertionError, match="not among the tokens that the teacher reads"):
        plan_turns(plan, student.table, PROMPT, rollout_of(given.student.ids, wrong))


def test_each_response_draws_units_of_its_own(tokenizers: list[Tokenizer]) -> None:
    student, teacher, _ = tokenizers
    alignment_map = build_alignment_map(student, teacher)
    given = Transcript(student=turns_of(student), teachers=(turns_of(teacher),))
    spans = given.student.spans.tolist()
    differ = 0
    for seed in range(8):
        plan = partial(
            plan_pair,
            student=student,
            teacher=teacher,
            alignment_map=alignment_map,
            needs=TeacherNeeds(),
            interface=InterfaceConfig(drop_units=0.5, interface_seed=seed),
        )

        def weights(turns: Sequence[int], plan: Callable[..., AlignedPair] = plan) -> list[float]:
            """Those of all responses, planned alone as these turns."""
            responses = [rollout_of(given.student.ids[start:end]) for start, end in spans]
            pairs = [plan(PROMPT, replace(one, turn=k)) for one, k in zip(responses, turns, strict=True)]
            return [weight for pair in pairs for weight in pair.weights.tolist()]

        joined = plan_turns(plan, student.table, PROMPT, rollout_of(given.student.ids, given))
        assert joined.weights.tolist() == weights(range(len(spans)))
        differ += joined.weights.tolist() != weights([0] * len(spans))
    assert differ, "the draws of all responses are those of the first"


def test_without_a_teacher_the_bytes_of_all_responses_are_counted(tokenizers: list[Tokenizer]) -> None:
    student = tokenizers[0]
    needs = TeacherNeeds(teacher=False, hidden_rows="none")
    given = Transcript(student=turns_of(student), teachers=())
    plan = partial(plan_without_teacher, student=student, needs=needs)
    joined = plan_turns(plan, student.table, PROMPT, rollout_of(given.student.ids, given))
    assert joined.counts["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert joined.counts["student_labels"] == len(given.student.labels) and not len(joined.segments)
