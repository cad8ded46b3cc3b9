"""Samples side by side in a micro-batch: every label finds the row that predicts it, and every
segment its labels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_simct.packing import (
    by_number,
    by_teacher,
    by_tokens,
    pack_micro_batches,
    pad_right,
    sequence_batch,
)
from megatron_simct.records import AlignedPair, MicroBatch, Prompt, Rollout, ScoredPair, TeacherNeeds

TEACHER_WIDTH = 3


def sample(
    sample_id: int,
    *,
    prompt: int,
    response: int,
    segments: list[list[int]],
    teacher_rows: list[int],
    teacher_labels: int,
    needs: TeacherNeeds = TeacherNeeds(),  # noqa: B008  (frozen)
) -> tuple[Prompt, Rollout, AlignedPair, ScoredPair]:
    """Records in which every number encodes its place: 100 * sample + position."""
    base = 100 * sample_id
    return (
        Prompt(
            sample_id=sample_id,
            student_ids=np.arange(base, base + prompt, dtype=np.int32),
            teacher_ids=np.zeros(2, np.int32),
        ),
        Rollout(
            sample_id=sample_id,
            weight_version=0,
            student_ids=np.arange(base + prompt, base + prompt + response, dtype=np.int32),
            logprobs=np.zeros(response, np.float32),
            finish="length",
        ),
        AlignedPair(
            sample_id=sample_id,
            teacher_prompt_ids=np.zeros(2, np.int32),
            teacher_ids=np.zeros(teacher_labels, np.int32),
            segments=np.array(segments, np.int32).reshape(-1, 4),
            kinds=np.array([i % 3 for i in range(len(segments))], np.int8),
            replaced_columns=np.array([base + i - 1 for i in range(len(segments))], np.int32),
            teacher_first_columns=np.array([base + 2 * i for i in range(len(segments))], np.int32),
            weights=np.array([base + 0.5 * i for i in range(len(segments))], np.float32),
            teacher_rows=np.array(teacher_rows, np.int32),
            needs=needs,
        ),
        ScoredPair(
            sample_id=sample_id,
            own_logit=torch.arange(teacher_labels) + float(base),
            lse=torch.arange(teacher_labels) + base + 0.5,
            hidden=None
            if needs.hidden_rows == "none"
            else torch.tensor([base + row for row in teacher_rows], dtype=torch.float32)[:, None].expand(
                -1, TEACHER_WIDTH
            ),
        ),
    )


SAMPLES = (
    sample(
        1,
        prompt=2,
        response=3,
        teacher_labels=4,
        segments=[[0, 2, 0, 1], [2, 3, 1, 2], [3, 4, 2, 3]],
        teacher_rows=[0, 3],  # the segment that starts at label 2 requests no row
    ),
    sample(2, prompt=5, response=1, teacher_labels=1, segments=[], teacher_rows=[]),
    sample(
        3, prompt=1, response=6, teacher_labels=3, segments=[[0, 1, 0, 2], [2, 3, 4, 6]], teacher_rows=[2]
    ),
    sample(4, prompt=1, response=1, teacher_labels=2, segments=[[1, 2, 0, 1]], teacher_rows=[0, 1]),
)
# Lengths 5, 6, 7, 2: in packed order samples 3, 2 and 1, 4.


def pack(
    samples, scored=None, *, micro_batch_size=2, check=lambda batch: None, **options
) -> list[MicroBatch]:
    prompts, rollouts, pairs, scores = zip(*samples, strict=True)
    scored = scores if scored is None else scored
    cut = partial(by_number, size=micro_batch_size)
    return pack_micro_batches(prompts, rollouts, pairs, scored, cut=cut, check=check, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_label_rows_pick_the_row_that_predicts_each_label(micro_batch_size, packed) -> None:
    """A causal 'model' whose output at (s, b) is the token at that place: the row of a
    label is one before it.
    """
    for batch in pack(SAMPLES, micro_batch_size=micro_batch_size, packed=packed, multiple_of=3):
        output = batch.sequences.tokens.T[:, :, None]  # [S, B, 1], as Megatron's models return it
        read = output.flatten(0, 1)[batch.sequences.label_rows, 0]
        # Ids count up inside a sample, so the one before a label is one less.
        assert read.tolist() == (batch.labels.student_labels - 1).tolist()
        assert sum(batch.num_labels) == len(read)


@pytest.mark.parametrize("packed", [False, True])
def test_label_rows_against_a_loop(packed) -> None:
    prompt_lens, label_lens = [3, 1, 4], [2, 5, 0]
    expected, start = [], 0
    for b in range(3):
        for label in range(label_lens[b]):
            position = prompt_lens[b] + label - 1
            expected.append(start + position if packed else position * 3 + b)
        start += prompt_lens[b] + label_lens[b]
    batch = sequence_batch(
        [np.zeros(n) for n in prompt_lens], [np.zeros(n) for n in label_lens], packed=packed
    )
    assert batch.label_rows.tolist() == expected


def test_packed_sequences_follow_one_another_and_fill_up_a_multiple() -> None:
    prompts, responses = [np.array([1, 2]), np.array([6])], [np.array([3]), np.array([7, 8])]
    batch = sequence_batch(prompts, responses, packed=True, multiple_of=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 6, 7, 8, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.lengths == (3, 3, 2)
    assert sequence_batch(prompts, responses, packed=True, multiple_of=3).lengths == (3, 3)


# Divided by teacher


def test_micro_batches_have_one_teacher_each_and_are_as_many_as_all_need() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths, teachers = random.integers(1, 30, 12).tolist(), random.choice(list("abc"), 12).tolist()
        for cut in (partial(by_number, size=4), partial(by_tokens, max_tokens=40)):
            needed: list[int] = []
            found = by_teacher(lengths, teachers=teachers, cut=cut, agree=lambda n: needed.append(n) or n + 2)  # noqa: B023
            assert len(found) == needed[0] + 2
            assert sorted(i for chosen in found for i in chosen) == list(range(12))
            assert all(len({teachers[i] for i in chosen}) == 1 for chosen in found)
    # The three of a need two micro-batches, and one more is halved.
    chosen = by_teacher(
        [5, 6, 7, 1], teachers=list("aaab"), cut=partial(by_number, size=2), agree=lambda count: count + 1
    )
    assert chosen == [[2], [1], [0], [3]]


def test_a_micro_batch_has_the_name_of_its_teacher() -> None:
    prompts, rollouts, pairs, scores = zip(*SAMPLES, strict=True)
    named = [replace(pair, teacher=name) for pair, name in zip(pairs, "abab", strict=True)]
    cut = partial(
        by_teacher, teachers=list("abab"), cut=partial(by_number, size=4), agree=lambda count: count
    )
    batches = pack_micro_batches(prompts, rollouts, named, scores, cut=cut, check=lambda batch: None)
    assert {batch.teacher: batch.sample_ids for batch in batches} == {"a": (3, 1), "b": (2, 4)}
    with pytest.raises(AssertionError, match="a micro-batch has one teacher"):
        pack(list(zip(prompts, rollouts, named, scores, strict=True)))


# Divided by tokens


def test_micro_batches_hold_no_more_than_their_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    batches = by_tokens(lengths, max_tokens=64)
    assert sorted(i for chosen in batches for i in chosen) == list(range(200))
    totals = [sum(lengths[i] for i in chosen) for chosen in batches]
    assert totals == sorted(totals, reverse=True) and totals[0] <= 64
    assert len(batches) <= 11 / 9 * sum(lengths) / 64 + 1  # the bound of first-fit decreasing


def test_a_long_sequence_is_alone() -> None:
    assert by_tokens([3, 90, 5, 9], max_tokens=10) == [[1], [3], [2, 0]]


@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_ranks_agree_on_the_number_of_micro_batches(number) -> None:
    lengths = [5, 4, 3, 3, 2, 1]
    asked = []

    def agree(count) -> int:
        asked.append(count)
        return number

    batches = by_tokens(lengths, max_tokens=9, agree=agree)
    assert asked == [2] and len(batches) == number
    assert sorted(i for chosen in batches for i in chosen) == list(range(6))
    totals = [sum(lengths[i] for i in chosen) for chosen in batches]
    assert totals == sorted(totals, reverse=True) and totals[-1] > 0


def test_the_longest_come_first() -> None:
    batches = pack(SAMPLES)
    assert [batch.sample_ids for batch in batches] == [(3, 2), (1, 4)]
    assert [batch.sequences.tokens.shape for batch in batches] == [(2, 7), (2, 5)]


def test_equal_lengths_keep_their_order() -> None:
    samples = [
        sample(i, prompt=2, response=1, teacher_labels=1, segments=[[0, 1, 0, 1]], teacher_rows=[0])
        for i in (3, 1, 2, 0)
    ]
    assert [batch.sample_ids for batch in pack(samples)] == [(3, 1), (2, 0)]


def test_tokens_are_padded_on_the_right() -> None:
    _, batch = pack(SAMPLES)
    sequences = batch.sequences
    assert sequences.tokens.tolist() == [[100, 101, 102, 103, 104], [400, 401, 0, 0, 0]]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2 and sequences.lengths is None
    assert sequences.tokens.dtype == sequences.position_ids.dtype == sequences.label_rows.dtype == torch.int64


def test_pad_right_of_one() -> None:
    tokens, positions = pad_right([np.array([4, 5], np.int32)])
    assert tokens.tolist() == [[4, 5]] and positions.tolist() == [[0, 1]]


def test_pad_right_to_a_multiple() -> None:
    tokens, positions = pad_right([np.arange(1, 6), np.arange(1, 4)], multiple_of=4)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert positions.tolist() == [list(range(8))] * 2
    assert pad_right([np.arange(8)], multiple_of=4)[0].shape == (1, 8)


def test_a_multiple_changes_the_width_alone() -> None:
    for wide, narrow in zip(pack(SAMPLES, multiple_of=3), pack(SAMPLES), strict=True):
        wide, narrow = wide.sequences, narrow.sequences
        width = narrow.tokens.shape[1]
        assert wide.tokens.shape[1] == wide.position_ids.shape[1] == -(-width // 3) * 3 > width
        assert torch.equal(wide.tokens[:, :width], narrow.tokens)
        assert torch.equal(wide.label_rows, narrow.label_rows)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_everything_of_a_segment_is_its_own_sample_s(micro_batch_size) -> None:
    by_id = {s[0].sample_id: s for s in SAMPLES}
    for batch in pack(SAMPLES, micro_batch_size=micro_batch_size):
        labels = batch.labels
        samples = [by_id[i] for i in batch.sample_ids]
        expected = []
        for prompt, _, pair, _ in samples:
            base = 100 * prompt.sample_id
            for (ts, te, ss, se), kind, column in zip(
                pair.segments.tolist(), pair.kinds.tolist(), pair.replaced_columns.tolist(), strict=True
            ):
                expected.append(
                    {
                        "student": [base + len(prompt.student_ids) + p for p in range(ss, se)],
                        "own": [base + p for p in range(ts, te)],
                        "lse": [base + p + 0.5 for p in range(ts, te)],
                        "kind": kind,
                        "column": column,
                        "hidden": base + ts if ts in pair.teacher_rows else None,
                    }
                )
        found = []
        for a, (ts, te, ss, se) in enumerate(labels.segments.tolist()):
            row = int(labels.teacher_hidden_index[a])
            assert row >= -1
            found.append(
                {
                    "student": labels.student_labels[ss:se].tolist(),
                    "own": labels.teacher_own_logit[ts:te].tolist(),
                    "lse": labels.teacher_lse[ts:te].tolist(),
                    "kind": int(labels.kinds[a]),
                    "column": int(labels.replaced_columns[a]),
                    "hidden": None if row < 0 else float(labels.teacher_hidden[row, 0]),
                }
            )
        assert found == expected
        assert len(labels.student_labels) == sum(len(rollout.student_ids) for _, rollout, _, _ in samples)
        assert len(labels.teacher_lse) == sum(len(pair.teacher_ids) for _, _, pair, _ in samples)
        assert labels.segments.dtype == labels.kinds.dtype == labels.teacher_hidden_index.dtype == torch.int64


def test_a_segment_that_asked_for_no_row_has_index_minus_one() -> None:
    (batch,) = pack(SAMPLES, micro_batch_size=4)
    # Samples 3, 2, 1, 4; rows [2], [], [0, 3], [0, 1]; segments start at labels 0, 2 | | 0, 2, 3 | 1.
    assert batch.labels.teacher_hidden_index.tolist() == [-1, 0, 1, -1, 2, 4]


def test_no_hidden_states_where_none_were_asked_for() -> None:
    needs = TeacherNeeds(hidden_rows="none")
    samples = [
        sample(
            i, prompt=2, response=1, teacher_labels=1, segments=[[0, 1, 0, 1]], teacher_rows=[], needs=needs
        )
        for i in range(2)
    ]
    (batch,) = pack(samples)
    assert batch.labels.teacher_hidden is None
    assert batch.labels.teacher_hidden_index.tolist() == [-1, -1]


def test_without_a_teacher_there_are_no_segments() -> None:
    samples = [
        sample(
            i,
            prompt=2,
            response=2,
            teacher_labels=0,
            segments=[],
            teacher_rows=[],
            needs=TeacherNeeds(teacher=False, hidden_rows="none"),
        )
        for i in range(2)
    ]
    (batch,) = pack(samples)
    assert batch.labels.segments.shape == (0, 4)
    assert batch.labels.student_labels.tolist() == [2, 3, 102, 103]
    assert batch.labels.teacher_own_logit.shape == batch.labels.teacher_lse.shape == (0,)


def test_scores_may_come_in_any_order() -> None:
    expected = pack(SAMPLES)
    found = pack(SAMPLES, iter([s[3] for s in reversed(SAMPLES)]))
    for a, b in zip(found, expected, strict=True):
        assert a.sample_ids == b.sample_ids
        assert torch.equal(a.labels.teacher_own_logit, b.labels.teacher_own_logit)
        assert torch.equal(a.labels.teacher_hidden, b.labels.teacher_hidden)


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 3]], ids=["missing", "other", "twice"]
)
def test_a_score_that_is_missing_or_comes_twice_is_refused(chosen) -> None:
    with pytest.raises(AssertionError, match=r"every pair is scored once: samples \[1, 2, 3, 4\]"):
        pack(SAMPLES, [SAMPLES[i][3] for i in chosen])


def test_an_unknown_score_is_refused() -> None:
    stranger = sample(9, prompt=1, response=1, teacher_labels=1, segments=[], teacher_rows=[])
    with pytest.raises(AssertionError, match="every pair is scored once"):
        pack(SAMPLES, [s[3] for s in (*SAMPLES, stranger)])


def test_a_sample_id_that_occurs_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="unique"):
        pack([SAMPLES[0], SAMPLES[0]])


def test_records_in_different_orders_are_refused() -> None:
    prompts, rollouts, pairs, scores = zip(*SAMPLES, strict=True)
    with pytest.raises(AssertionError, match="in one order"):
        cut = partial(by_number, size=2)
        pack_micro_batches(prompts, rollouts[::-1], pairs, scores, cut=cut, check=lambda batch: None)


def test_every_micro_batch_is_checked() -> None:
    seen = []
    batches = pack(SAMPLES, check=seen.append)
    assert [id(batch) for batch in seen] == [id(batch) for batch in batches]
