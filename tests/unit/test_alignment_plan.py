"""plan_pair: kinds, replaced columns, requested rows and counts, on small vocabularies and on a real pair."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, TokenTable, build_alignment_map, load_tokenizer, plan_pair
from megatron_simct.alignment.alignment_map import identity_map
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.records import AlignedPair, Prompt, Rollout, SegmentKind, TeacherNeeds
from tests.oracles.alignment import greedy_encoder

SHARED, UNIT, STOP = (int(kind) for kind in (SegmentKind.SHARED, SegmentKind.UNIT, SegmentKind.STOP))


def tokenizer(pieces: list[bytes], stop_ids, special_ids=()) -> Tokenizer:
    table = TokenTable.from_bytes(pieces, special_ids=special_ids, stop_ids=stop_ids)
    return Tokenizer(name="test", table=table, encode_text=greedy_encoder(table.pieces()))


HAPPY_STUDENT = tokenizer([b"ha", b"ppy", b" cat", b" the", b"x", b"<eos>", b"h", b"p"], [5])
HAPPY_TEACHER = tokenizer([b"hap", b"py", b" cat", b" the", b"x", b"<|im_end|>", b"h", b"y", b"p"], [5])
# Student: a duplicate of "8" (id 6), single bytes of "é", two stop tokens. Teacher: "82" in one token.
DIGIT_STUDENT = tokenizer(
    [b"8", b"2", b"82", b"</s>", b"<end>", b"<pad>", b"8", b"\xc3", b"\xa9", b" "], [3, 4], special_ids=[5]
)
DIGIT_TEACHER = tokenizer(
    [b"82", b"8", b"2", b"<|end|>", b"<|eos|>", "é".encode(), b" ", b"\xc3", b"\xa9"], [3, 4]
)


def plan(
    student: Tokenizer,
    teacher: Tokenizer,
    student_ids: list[int],
    finish: str = "stop",
    needs: TeacherNeeds = TeacherNeeds(),  # noqa: B008  (frozen)
) -> AlignedPair:
    ids = np.array(student_ids, dtype=np.int32)
    prompt = Prompt(sample_id=7, student_ids=ids[:0], teacher_ids=np.array([1, 2], dtype=np.int32))
    rollout = Rollout(
        sample_id=7,
        weight_version=3,
        student_ids=ids,
        logprobs=np.zeros(ids.size, dtype=np.float32),
        finish=finish,
    )
    alignment_map = build_alignment_map(student, teacher)
    return plan_pair(
        prompt, rollout, student=student, teacher=teacher, alignment_map=alignment_map, needs=needs
    )


def test_happy_cat() -> None:
    pair = plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 2, 5])
    assert pair.sample_id == 7 and pair.teacher_prompt_ids.tolist() == [1, 2]
    assert pair.teacher_ids.tolist() == [0, 1, 2, 5]
    assert pair.segments.tolist() == [[0, 2, 0, 2], [2, 3, 2, 3], [3, 4, 3, 4]]
    assert pair.kinds.tolist() == [UNIT, SHARED, STOP]
    assert pair.replaced_columns.tolist() == [-1, -1, -1]
    assert pair.counts == {
        "bytes": 9,
        "bytes_one_to_one": 4,
        "bytes_unit": 5,
        "student_labels": 4,
        "student_labels_dropped": 0,
        "teacher_labels": 4,
        "teacher_labels_dropped": 0,
        "segments_shared": 1,
        "segments_unit": 1,
        "segments_stop": 1,
        "segments_blank": 0,
        "canonical": 1,
    }
    arrays = {"teacher_ids": "int32", "segments": "int32", "kinds": "int8", "replaced_columns": "int32"}
    for name, dtype in {**arrays, "teacher_rows": "int32"}.items():
        assert getattr(pair, name).dtype == dtype, name


@pytest.mark.parametrize(
    ("hidden_rows", "rows"),
    [("none", []), ("one_to_one", [2, 3]), ("first", [0, 2, 3]), ("all", [0, 1, 2, 3])],
)
def test_requested_rows(hidden_rows, rows) -> None:
    needs = TeacherNeeds(hidden_rows=hidden_rows)
    pair = plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 2, 5], needs=needs)
    assert pair.teacher_rows.tolist() == rows and pair.teacher_rows.dtype == np.int32
    assert pair.needs == needs


def test_a_unit_that_spells_a_shared_token_replaces_its_column() -> None:
    pair = plan(DIGIT_STUDENT, DIGIT_TEACHER, [0, 1, 9, 4])
    assert pair.teacher_ids.tolist() == [0, 6, 3]
    assert pair.kinds.tolist() == [UNIT, SHARED, STOP]
    assert pair.replaced_columns.tolist() == [2, -1, -1]
    assert pair.counts["canonical"] == 0


def test_an_unpaired_id_with_shared_bytes_is_a_unit_of_one_token() -> None:
    pair = plan(DIGIT_STUDENT, DIGIT_TEACHER, [6, 9, 3])
    assert pair.segments.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 3]]
    assert pair.kinds.tolist() == [UNIT, SHARED, STOP]
    assert pair.replaced_columns.tolist() == [0, -1, -1]
    assert (pair.counts["bytes_unit"], pair.counts["bytes_one_to_one"]) == (1, 1)
    assert plan(DIGIT_STUDENT, DIGIT_TEACHER, [0, 9, 3]).kinds.tolist() == [SHARED, SHARED, STOP]


def test_a_piece_without_bytes_makes_a_unit_of_its_neighbour() -> None:
    student = tokenizer([b"8", b"", b"<e>"], [2])
    pair = plan(student, DIGIT_TEACHER, [0, 1, 0, 2])
    assert pair.segments.tolist() == [[0, 1, 0, 2], [1, 2, 2, 3], [2, 3, 3, 4]]
    assert pair.kinds.tolist() == [UNIT, SHARED, STOP] and pair.replaced_columns.tolist() == [0, -1, -1]


def test_a_response_cut_by_length_gets_no_stop_token() -> None:
    pair = plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 2], finish="length")
    assert pair.teacher_ids.tolist() == [0, 1, 2]
    assert pair.kinds.tolist() == [UNIT, SHARED]
    assert pair.counts["segments_stop"] == 0 and pair.counts["canonical"] == 1


@pytest.mark.parametrize(("ids", "finish", "num_labels"), [([5], "stop", 1), ([], "length", 0)])
@pytest.mark.parametrize("hidden_rows", ["none", "one_to_one", "first", "all"])
def test_empty_responses(ids, finish, num_labels, hidden_rows) -> None:
    needs = TeacherNeeds(hidden_rows=hidden_rows)
    pair = plan(HAPPY_STUDENT, HAPPY_TEACHER, ids, finish=finish, needs=needs)
    assert pair.segments.shape == (num_labels, 4) and pair.teacher_ids.tolist() == ids
    assert pair.segments.tolist() == [[0, 1, 0, 1]] * num_labels
    assert pair.kinds.tolist() == [STOP] * num_labels
    assert pair.teacher_rows.tolist() == [0] * (num_labels if hidden_rows != "none" else 0)
    assert (pair.counts["bytes"], pair.counts["student_labels"]) == (0, num_labels)


@pytest.mark.parametrize(
    ("teacher_pieces", "aligned"), [([b"a", b"b", b"<eos>"], 1), ([b"ab", b"a", b"<eos>"], 0)]
)
def test_a_byte_that_the_teacher_has_no_token_for_ends_the_common_text(teacher_pieces, aligned) -> None:
    """Byte-level libraries leave such a byte out; a token that is merged across it takes
    its own unit along.
    """
    student = tokenizer([b"a", b"\x04", b"b", b"<end>"], [3])
    teacher = tokenizer(teacher_pieces, [2])
    greedy = teacher.encode_text
    teacher = dataclasses.replace(teacher, encode_text=lambda text: greedy(text.replace("\x04", "")))
    pair = plan(student, teacher, [0, 1, 2, 3], needs=TeacherNeeds(byte_events=True))
    assert len(pair.segments) == aligned and pair.counts["segments_stop"] == 0
    assert pair.counts["bytes_dropped_mismatch"] == 3 - aligned and pair.counts["bytes"] == 3
    assert pair.counts["student_labels_dropped"] == 4 - aligned
    # Positions: that of "a"; the byte behind it is one that only the student has.
    assert pair.byte_events.num_positions <= 1 and not (pair.byte_events.slot_event == 4).any()


def test_bytes_that_are_not_utf8_end_the_teachers_text() -> None:
    # "8", half of "é", "2", stop: the teacher reads "8".
    pair = plan(DIGIT_STUDENT, DIGIT_TEACHER, [0, 7, 1, 3])
    assert pair.teacher_ids.tolist() == [1, 3]
    assert pair.segments.tolist() == [[0, 1, 0, 1]]
    assert pair.kinds.tolist() == [SHARED]
    assert pair.counts["bytes_dropped_invalid_utf8"] == 2
    assert (pair.counts["student_labels"], pair.counts["student_labels_dropped"]) == (4, 3)
    # The whole character is fine, though the student says it in two tokens.
    whole = plan(DIGIT_STUDENT, DIGIT_TEACHER, [7, 8, 3])
    assert whole.segments.tolist() == [[0, 1, 0, 2], [1, 2, 2, 3]] and whole.replaced_columns.tolist() == [
        -1,
        -1,
    ]


def test_nothing_behind_a_special_token_is_aligned_or_read_by_the_teacher() -> None:
    pair = plan(DIGIT_STUDENT, DIGIT_TEACHER, [2, 9, 5, 0, 1, 3])
    assert pair.teacher_ids.tolist() == [0, 6, 3]
    assert pair.segments.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]
    assert pair.counts["bytes_dropped_special"] == 2 and pair.counts["bytes"] == 5
    assert pair.counts["student_labels_dropped"] == 4 and pair.counts["canonical"] == 0


def test_a_teacher_that_rewrites_text_is_aligned_up_to_there() -> None:
    lossy = Tokenizer(
        name="lossy",
        table=DIGIT_TEACHER.table,
        encode_text=lambda text: DIGIT_TEACHER.encode_text(text.replace("é", "2")),
    )
    pair = plan(DIGIT_STUDENT, lossy, [0, 9, 7, 8, 3])
    assert pair.segments.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]
    assert pair.counts["bytes_dropped_mismatch"] == 2 and "bytes_dropped_invalid_utf8" not in pair.counts
    # The text was rewritten before the bytes stop being UTF-8: that is what ended the common prefix.
    pair = plan(DIGIT_STUDENT, lossy, [0, 9, 7, 8, 7, 3])
    assert len(pair.segments) == 2 and pair.counts["bytes_dropped_mismatch"] == 3
    # A teacher that adds text: all of the student's bytes are aligned, but not the stop tokens.
    longer = Tokenizer(
        name="longer", table=lossy.table, encode_text=lambda text: DIGIT_TEACHER.encode_text(text + " ")
    )
    pair = plan(DIGIT_STUDENT, longer, [0, 3])
    assert pair.segments.tolist() == [[0, 1, 0, 1]]
    assert pair.counts["bytes_dropped_mismatch"] == 0 and pair.counts["segments_stop"] == 0


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r'sample 7 finished by "stop" but its last id is 2, not one of .* \[5\]'
    ):
        plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 2])
    with pytest.raises(ValueError, match='finished by "stop" but its last id is None'):
        plan(HAPPY_STUDENT, HAPPY_TEACHER, [])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        plan(HAPPY_STUDENT, HAPPY_TEACHER, [8, 5])
    ids = np.array([5], dtype=np.int32)
    rollout = Rollout(sample_id=7, weight_version=0, student_ids=ids, logprobs=ids * 1.0, finish="stop")
    both = {"student": HAPPY_STUDENT, "teacher": HAPPY_TEACHER, "needs": TeacherNeeds()}
    with pytest.raises(ValueError, match="prompt of sample 8 but rollout of sample 7"):
        prompt = Prompt(sample_id=8, student_ids=ids, teacher_ids=ids)
        plan_pair(prompt, rollout, alignment_map=build_alignment_map(HAPPY_STUDENT, HAPPY_TEACHER), **both)
    with pytest.raises(ValueError, match="was not built from"):
        prompt = Prompt(sample_id=7, student_ids=ids, teacher_ids=ids)
        plan_pair(prompt, rollout, alignment_map=build_alignment_map(HAPPY_STUDENT, HAPPY_STUDENT), **both)


def test_random_ids_of_a_real_pair_keep_the_books() -> None:
    """Any sampled ids, canonical or not: bytes and labels add up, and aligned segments
    spell the same bytes.
    """
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("the package mistral-common, whose tokenizer files this test reads, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    spm = load_tokenizer(str(folder / "mistral_instruct_tokenizer_240323.model.v3"))
    tekken = load_tokenizer(str(folder / "tekken_240718.json"))
    random = np.random.default_rng(0)
    for student, teacher in ((spm, tekken), (tekken, spm)):
        alignment_map = build_alignment_map(student, teacher)
        num_complete = 0
        for trial in range(40):
            ids = random.integers(2000, 20000, size=30).astype(np.int32)
            if trial % 4 == 3:
                ids[15] = random.integers(3, student.table.num_ids)
            ids[-1] = 2
            prompt = Prompt(sample_id=trial, student_ids=ids[:1], teacher_ids=ids[:1])
            rollout = Rollout(
                sample_id=trial,
                weight_version=0,
                student_ids=ids,
                logprobs=ids.astype(np.float32),
                finish="stop",
            )
            pair = plan_pair(
                prompt,
                rollout,
                student=student,
                teacher=teacher,
                alignment_map=alignment_map,
                needs=TeacherNeeds(),
            )
            counts = pair.counts
            dropped = sum(value for key, value in counts.items() if key.startswith("bytes_dropped_"))
            assert counts["bytes"] == counts["bytes_one_to_one"] + counts["bytes_unit"] + dropped
            assert counts["bytes"] == len(student.decode(ids)) and counts["student_labels"] == 30
            for (ts, te, ss, se), kind, replaced in zip(
                pair.segments.tolist(), pair.kinds, pair.replaced_columns, strict=True
            ):
                data = student.decode(ids[ss:se])
                assert teacher.decode(pair.teacher_ids[ts:te]) == data
                if kind == UNIT:
                    assert replaced == alignment_map.shared_student_id(data)
                else:
                    assert replaced == -1 and (te - ts, se - ss) == (1, 1)
                if kind == SHARED:
                    assert alignment_map.teacher_of_student[ids[ss]] == pair.teacher_ids[ts]
            if counts["student_labels_dropped"] == 0:
                assert dropped == 0 and pair.kinds[-1] == STOP
                num_complete += 1
        assert num_complete > 5


def test_the_released_walk_has_its_own_units() -> None:
    """The walk includes the 1:1 token after a mismatch, joins it with the stop tokens, and
    replaces no column.
    """
    needs = TeacherNeeds(segmentation="authors")
    pair = plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 2, 4, 5], needs=needs)
    assert pair.segments.tolist() == [[0, 3, 0, 3], [3, 4, 3, 4], [4, 5, 4, 5]]
    assert pair.kinds.tolist() == [UNIT, SHARED, STOP]
    fused = plan(HAPPY_STUDENT, HAPPY_TEACHER, [0, 1, 5], needs=needs)
    assert (fused.segments.tolist(), fused.kinds.tolist()) == ([[0, 3, 0, 3]], [UNIT])
    # The walk's unit "82" + "x" spells the shared token "82x", whose column stays beside the unit's.
    student = tokenizer([b"8", b"2", b"x", b"82x", b"</s>"], [4])
    table = TokenTable.from_bytes([b"82", b"x", b"82x", b"</s>"], stop_ids=[3])
    teacher = Tokenizer(name="test", table=table, encode_text=lambda text: [0, 1])
    walked = plan(student, teacher, [0, 1, 2, 4], needs=needs)
    assert (walked.segments.tolist(), walked.replaced_columns.tolist()) == (
        [[0, 2, 0, 3], [2, 3, 3, 4]],
        [-1, -1],
    )
    # Its match of an id with duplicate bytes, which is no pair of the map, has no unit column; by bytes it is
    # a unit.
    twice = tokenizer([b"a", b"b", b"a", b"</s>"], [3])
    assert plan(twice, tokenizer([b"a", b"b", b"</s>"], [2]), [2, 1, 3], needs=needs).kinds.tolist() == [
        0,
        0,
        STOP,
    ]
    assert plan(twice, tokenizer([b"a", b"b", b"</s>"], [2]), [2, 1, 3]).kinds.tolist() == [UNIT, 0, STOP]


# Weights and ablations

BYTES = [bytes([b]) for b in b"abcd 12"]
SPACED_STUDENT = tokenizer([*BYTES, b"ab", b"<s>"], [8])
SPACED_TEACHER = tokenizer([*BYTES, b"cd", b"12", b"<t>"], [9])


def planned(ids, sample_id=0, finish="stop", **options) -> AlignedPair:
    prompt = Prompt(sample_id=sample_id, student_ids=np.zeros(1, np.int32), teacher_ids=np.zeros(1, np.int32))
    student_ids, logprobs = np.array(ids, np.int32), np.zeros(len(ids), np.float32)
    rollout = Rollout(
        sample_id=sample_id, weight_version=0, student_ids=student_ids, logprobs=logprobs, finish=finish
    )
    return plan_pair(
        prompt,
        rollout,
        student=SPACED_STUDENT,
        teacher=SPACED_TEACHER,
        alignment_map=build_alignment_map(SPACED_STUDENT, SPACED_TEACHER),
        needs=TeacherNeeds(),
        interface=InterfaceConfig(**options),
    )


TEXT = [7, 4, 5, 6, 2, 3, 4, 0, 8]
"""ab|_|1 2|c d|_|a|stop; the teacher's tokens are a b|_|12|cd|_|a|stop."""


def test_weights_follow_the_options() -> None:
    plain = planned(TEXT)
    assert plain.segments[:, 2:].tolist() == [[0, 1], [1, 2], [2, 4], [4, 6], [6, 7], [7, 8], [8, 9]]
    assert plain.kinds.tolist() == [UNIT, SHARED, UNIT, UNIT, SHARED, SHARED, STOP]
    assert plain.weights.dtype == np.float32 and plain.weights.tolist() == [1] * 7
    # "a", "12" and "cd" are the teacher's
    assert plain.teacher_first_columns.tolist() == [
        0,
        -1,
        -1,
        -1,
        -1,
        -1,
        -1,
    ]
    assert plain.counts["segments_blank"] == 2
    assert planned(TEXT, unit_weight="student_length").weights.tolist() == [1, 1, 2, 2, 1, 1, 1]
    assert planned(TEXT, mask_whitespace=True).weights.tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert planned(TEXT, stop_bridge=False).weights.tolist() == [1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("scalar, weights", [("dpca", [1, 0, 0, 1]), ("spread", [1, 1, 1, 1])])
def test_dpca_leaves_out_what_ends_inside_a_character(scalar, weights) -> None:
    pieces = [b"", b"x", "é".encode()[:1], "é".encode()[1:]]
    both = tokenizer(pieces, [0])
    config = InterfaceConfig(interface="scalar", scalar=scalar)
    rollout = Rollout(
        sample_id=0,
        weight_version=0,
        student_ids=np.array([1, 2, 3, 0], np.int32),
        logprobs=np.zeros(4, np.float32),
        finish="stop",
    )
    prompt = Prompt(sample_id=0, student_ids=np.zeros(1, np.int32), teacher_ids=np.zeros(1, np.int32))
    needs = TeacherNeeds(hidden_rows="none")
    pair = plan_pair(
        prompt, rollout, student=both, teacher=both, alignment_map=None, needs=needs, interface=config
    )
    assert pair.weights.tolist() == weights


def test_no_unit_loss_leaves_a_share_of_the_units_out() -> None:
    weights = [planned(TEXT, sample_id=i, interface="no_unit_loss", rho=0.3).weights for i in range(400)]
    assert all(w[[1, 4, 5, 6]].tolist() == [1, 1, 1, 1] for w in weights)
    assert np.mean([w[[0, 2, 3]] for w in weights]) == pytest.approx(0.7, abs=0.05)
    assert planned(TEXT, interface="no_unit_loss", rho=0.0).weights.tolist() == [1] * 7
    again = planned(TEXT, sample_id=3, interface="no_unit_loss", rho=0.3).weights
    assert again.tolist() == weights[3].tolist()
    others = [
        planned(TEXT, sample_id=i, interface="no_unit_loss", rho=0.3, interface_seed=1).weights
        for i in range(9)
    ]
    assert any(a.tolist() != b.tolist() for a, b in zip(others, weights, strict=False))


def test_random_unit_joins_marked_positions_with_the_next_one() -> None:
    same = planned(TEXT, interface="random_unit", rho=0.0)
    assert same.segments.tolist() == planned(TEXT).segments.tolist()
    assert same.weights.tolist() == [0, 1, 0, 0, 1, 1, 1]
    text = [0, 1, 2, 3, 4, 0, 1, 7, 0, 8]  # eight 1:1 positions except "cd", "ab": a b|cd|_|a|b|ab|a
    for seed in range(20):
        pair = planned(text, interface="random_unit", rho=0.5, interface_seed=seed)
        singles = planned(text)
        single = singles.kinds == SHARED
        assert (
            pair.segments[:, 3].max() == len(text)
            and (pair.segments[1:, ::2] == pair.segments[:-1, 1::2]).all()
        )
        ends = set(singles.segments[:, 3].tolist())
        assert {int(e) for e in pair.segments[:, 3]} <= ends
        for (_, _, ss, se), kind, weight in zip(
            pair.segments.tolist(), pair.kinds, pair.weights, strict=True
        ):
            inside = [i for i, s in enumerate(singles.segments.tolist()) if ss <= s[2] and s[3] <= se]
            if len(inside) > 1:
                assert kind == UNIT and weight == 1 and single[inside].all()
            elif singles.kinds[inside[0]] == UNIT:
                assert weight == 0
            else:
                assert weight == 1 and kind == singles.kinds[inside[0]]
    whole = planned(text, interface="random_unit", rho=1.0)
    runs = [se - ss for _, _, ss, se in whole.segments.tolist()]
    assert max(runs) >= 3, "a run of marked positions is one unit"


def test_kd_pairs_every_id_with_itself() -> None:
    pairs = identity_map(SPACED_STUDENT, SPACED_STUDENT)
    placement = pairs.placement(shard_start=0, shard_end=9)
    assert placement.columns.tolist() == list(range(9)) == placement.teacher_rows.tolist()
    # A second stop token is a column of its own, so it is not added to that of the first.
    several = identity_map(DIGIT_STUDENT, DIGIT_STUDENT).placement(shard_start=0, shard_end=10)
    assert several.columns.tolist() == list(range(10)) == several.teacher_rows.tolist()
    with pytest.raises(ValueError, match="not the same"):
        identity_map(SPACED_STUDENT, SPACED_TEACHER)


def test_without_the_stop_bridge_the_stop_token_is_not_shared() -> None:
    pairs = build_alignment_map(SPACED_STUDENT, SPACED_TEACHER)
    bridged, plain = (pairs.placement(shard_start=0, shard_end=9, stop_bridge=b) for b in (True, False))
    assert bridged.columns.tolist() == [*plain.columns.tolist(), 8] and len(plain.columns) == pairs.num_shared
