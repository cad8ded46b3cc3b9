"""Answers on disk: which are found again, which are not, and a disk that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_simct.records import AlignedPair, ScoredPair, TeacherNeeds
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import read_scored
from megatron_simct.teacher.store import AnswerStore, SavingScorer
from tests.teacher_jobs import FINGERPRINTS, answer_of, make_request, same_answer

MARKS = FINGERPRINTS | {"teacher_config": "c", "teacher_weights": "w", "longest_sequence": None}


def open_store(folder, **changes) -> AnswerStore:
    return AnswerStore(str(folder), MARKS | changes, flag="--teacher-cache")


def test_an_answer_is_found_by_what_was_asked_and_by_nothing_else(tmp_path) -> None:
    rng = np.random.default_rng(0)
    requests = [make_request(rng, sample_id) for sample_id in range(30)]
    store = open_store(tmp_path)
    for request in requests:
        store.put(request, answer_of(request))
    again = open_store(tmp_path)
    for request in requests:
        other = replace(request, sample_id=request.sample_id + 1000)  # another sample with the same text
        _, message = again.get(other)
        assert same_answer(read_scored(message), other)
        assert again.get(replace(request, prompt_ids=request.prompt_ids + 1)) is None
        assert again.get(replace(request, hidden=not request.hidden)) is None


def test_answers_with_ids_are_others_than_those_without(tmp_path) -> None:
    store, request = (
        open_store(tmp_path),
        replace(make_request(np.random.default_rng(3), 0), hidden=False, topk=2),
    )
    request = replace(request, byte_side=None)
    topk = -torch.arange(2.0 * len(request.rows)).reshape(-1, 2)
    answer = replace(answer_of(request), hidden=None, byte_logprobs=None, topk=topk)
    store.put(request, answer)
    with_ids = replace(request, token_ids=True)
    assert store.get(with_ids) is None and store.get(request) is not None
    store.put(with_ids, replace(answer, topk_ids=torch.ones(topk.shape, dtype=torch.int32)))
    assert read_scored(store.get(with_ids)[1]).topk_ids is not None
    assert read_scored(store.get(request)[1]).topk_ids is None
    assert not list(tmp_path.rglob(".*")), "nothing half-written is left"


def test_bfloat16_stays_bfloat16(tmp_path) -> None:
    request = replace(make_request(np.random.default_rng(1), 0), hidden=True, byte_side=None)
    answer = answer_of(request)
    store = open_store(tmp_path)
    store.put(request, replace(answer, hidden=answer.hidden.bfloat16()))
    found = read_scored(store.get(request)[1])
    assert found.hidden.dtype == torch.bfloat16 and torch.equal(found.hidden, answer.hidden.bfloat16())


def test_answers_of_another_teacher_are_refused(tmp_path) -> None:
    open_store(tmp_path)
    open_store(tmp_path, teacher_weights=None)
    with pytest.raises(
        ValueError, match="--teacher-cache .*: teacher weights: w at the teacher, other at the student"
    ):
        open_store(tmp_path, teacher_weights="other")


def test_a_damaged_answer_is_none(tmp_path, capsys) -> None:
    request = make_request(np.random.default_rng(2), 0)
    store = open_store(tmp_path)
    store.put(request, answer_of(request))
    (path,) = tmp_path.rglob("*.bin")
    data = path.read_bytes()
    for damaged in (data[:-3], data[:40] + bytes([data[40] ^ 1]) + data[41:], b""):
        path.write_bytes(damaged)
        assert store.get(request) is None
        assert "a damaged answer is asked for again" in capsys.readouterr().err


class _Echo:
    def collect(self, pairs) -> Iterator[ScoredPair]:
        yield from (answer_of(_request(pair)) for pair in pairs)


def _pair(sample_id: int) -> AlignedPair:
    ids = np.arange(sample_id + 1, dtype=np.int32)
    return AlignedPair(
        sample_id=sample_id,
        teacher_prompt_ids=ids,
        teacher_ids=ids,
        segments=np.zeros((0, 4), np.int32),
        kinds=np.zeros(0, np.int8),
        replaced_columns=np.zeros(0, np.int32),
        teacher_first_columns=np.zeros(0, np.int32),
        weights=np.zeros(0, np.float32),
        teacher_rows=ids[:1],
        needs=TeacherNeeds(),
    )


def _request(pair: AlignedPair) -> TeacherRequest:
    request = make_request(np.random.default_rng(0), pair.sample_id)
    changes = {
        "prompt_ids": pair.teacher_prompt_ids,
        "label_ids": pair.teacher_ids,
        "rows": pair.teacher_rows,
    }
    return replace(request, hidden=True, byte_side=None, **changes)


def test_a_full_disk_costs_no_sample(tmp_path, monkeypatch, capsys) -> None:
    """It is reported once. Earlier answers stay readable, and no half-written file remains."""
    store = open_store(tmp_path)
    replaced, kept = os.replace, []

    def full_after_two(*paths) -> None:
        if len(kept) == 2:
            raise OSError(28, "No space left on device")
        kept.append(paths)
        return replaced(*paths)

    monkeypatch.setattr("os.replace", full_after_two)
    pairs = [_pair(i) for i in range(6)]
    scored = list(SavingScorer(_Echo(), store, writes=True).collect(pairs))
    assert [same_answer(s, _request(p)) for s, p in zip(scored, pairs, strict=True)] == [True] * 6
    err = capsys.readouterr().err
    assert err.count("WARNING") == 1 and "No space left on device; nothing more is kept" in err
    assert [store.get(_request(pair)) is not None for pair in pairs] == [True] * 2 + [False] * 4
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
