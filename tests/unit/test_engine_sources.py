"""Given responses from the data, and responses that are replayed from files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, TokenTable
from megatron_simct.records import Prompt, Rollout, Transcript, Turns
from megatron_simct.rollout.engine import GivenResponses, ReplayEngine, Sampling

TABLE = TokenTable.from_bytes([bytes([i]) for i in range(256)] + [b"", b""], stop_ids=[257, 256])
TOKENIZER = Tokenizer(name="bytes", table=TABLE, encode_text=lambda text: list(text.encode()))
EMPTY = np.zeros(0, np.int32)


def sampling(max_response_len: int = 8) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, max_response_len=max_response_len, seed=0)


def prompt(sample_id: int, response: str | None = None) -> Prompt:
    return Prompt(sample_id=sample_id, student_ids=EMPTY, teacher_ids=EMPTY, response=response)


# GivenResponses


@pytest.mark.parametrize(
    "response, limit, ids, finish",
    [
        ("ab", 8, [97, 98, 257], "stop"),
        ("ab", 3, [97, 98, 257], "stop"),
        ("ab", 2, [97, 98], "length"),
        ("ab", 1, [97], "length"),
        ("", 1, [257], "stop"),
    ],
)
def test_a_given_response_ends_in_the_stop_token_where_it_fits(response, limit, ids, finish) -> None:
    (rollout,) = GivenResponses(TOKENIZER).generate([prompt(5, response)], sampling(limit))
    assert rollout.student_ids.tolist() == ids and rollout.student_ids.dtype == np.int32
    assert rollout.finish == finish
    assert (rollout.sample_id, rollout.weight_version) == (5, -1)
    assert rollout.logprobs.tolist() == [0.0] * len(ids) and rollout.logprobs.dtype == np.float32


def test_given_responses_keep_the_order_of_the_prompts() -> None:
    engine = GivenResponses(TOKENIZER)
    engine.publish(3)
    rollouts = engine.generate([prompt(2, "b"), prompt(1, "a")], sampling())
    assert [(r.sample_id, int(r.student_ids[0])) for r in rollouts] == [(2, 98), (1, 97)]


def test_a_missing_response_names_its_sample() -> None:
    with pytest.raises(AssertionError, match="sample 5 has no given response"):
        GivenResponses(TOKENIZER).generate([prompt(5)], sampling())


# ReplayEngine


class Scripted:
    """Answers a prompt with numbers that depend on the sample and on the published version."""

    def __init__(self) -> None:
        self.version = 0
        self.calls = 0

    def generate(self, prompts, sampling) -> list[Rollout]:
        self.calls += 1
        return [
            Rollout(
                sample_id=p.sample_id,
                weight_version=self.version,
                student_ids=np.array([p.sample_id, 7 + self.version], np.int32),
                logprobs=np.array([-1 / 3, -p.sample_id * 1e-7], np.float32),
                finish="length" if p.sample_id % 2 else "stop",
            )
            for p in prompts
        ]

    def publish(self, weight_version: int) -> None:
        self.version = weight_version


def writer(folder, *, dp_rank: int = 0, writes: bool = True) -> ReplayEngine:
    return ReplayEngine(Scripted(), save_dir=str(folder), load_dir=None, dp_rank=dp_rank, writes=writes)


def reader(folder) -> ReplayEngine:
    return ReplayEngine(Scripted(), save_dir=None, load_dir=str(folder), dp_rank=0, writes=True)


def assert_equal(found: list[Rollout], expected: list[Rollout]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.sample_id, a.weight_version, a.finish) == (b.sample_id, b.weight_version, b.finish)
        for name in ("student_ids", "logprobs"):
            assert getattr(a, name).dtype == getattr(b, name).dtype
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_what_was_written_is_read_back_bit_by_bit(tmp_path) -> None:
    engine = writer(tmp_path / "new" / "folder")
    expected = {}
    for step in (0, 1, 10):
        engine.publish(step)
        expected[step] = engine.generate([prompt(1), prompt(2)], sampling())
    replay = reader(tmp_path / "new" / "folder")
    for step in (10, 1, 0):  # step 1 is not step 10
        replay.publish(step)
        assert_equal(replay.generate([prompt(1), prompt(2)], sampling()), expected[step])
    assert replay._engine.calls == 0 and replay._engine.version == 0


def test_writing_passes_on_what_the_engine_answers(tmp_path) -> None:
    assert_equal(
        writer(tmp_path).generate([prompt(1)], sampling()), Scripted().generate([prompt(1)], sampling())
    )


def test_a_reader_takes_its_samples_from_all_ranks_files_in_its_own_order(tmp_path) -> None:
    writer(tmp_path, dp_rank=0).generate([prompt(0), prompt(2)], sampling())
    writer(tmp_path, dp_rank=1).generate([prompt(1), prompt(3)], sampling())
    assert [r.sample_id for r in reader(tmp_path).generate([prompt(3), prompt(0)], sampling())] == [3, 0]


def test_only_one_rank_of_a_replica_writes(tmp_path) -> None:
    writer(tmp_path, writes=False).generate([prompt(0)], sampling())
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_complete_files_is_left(tmp_path) -> None:
    writer(tmp_path, dp_rank=2).generate([prompt(0)], sampling())
    assert [path.name for path in tmp_path.iterdir()] == ["rollout_0.2.json"]


def test_the_calls_of_each_step_are_counted_from_its_first(tmp_path) -> None:
    engine = writer(tmp_path)
    for step in (4, 5):
        engine.publish(step)
        for i in range(2):
            engine.generate([prompt(i)], sampling())
    names = ["rollout_4.0.1.json", "rollout_4.0.json", "rollout_5.0.1.json", "rollout_5.0.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_missing_step_names_flag_and_file(tmp_path) -> None:
    writer(tmp_path).generate([prompt(0)], sampling())
    replay = reader(tmp_path)
    replay.publish(4)
    with pytest.raises(ValueError, match=r"^--load-debug-rollout-data .*: no file rollout_4\.\*\.json$"):
        replay.generate([prompt(0)], sampling())


def test_missing_samples_are_counted(tmp_path) -> None:
    writer(tmp_path).generate([prompt(0)], sampling())
    with pytest.raises(
        ValueError, match=r"^--load-debug-rollout-data .*: step 0 lacks sample 8 \(2 missing\)"
    ):
        reader(tmp_path).generate([prompt(0), prompt(8), prompt(9)], sampling())


@pytest.mark.parametrize("content", ["[{", json.dumps([{"sample_id": 0}]), json.dumps({"a": 1})])
def test_a_file_of_another_kind_names_flag_and_file(tmp_path, content) -> None:
    (tmp_path / "rollout_0.0.json").write_text(content)
    with pytest.raises(ValueError, match=r"^--load-debug-rollout-data .*rollout_0\.0\.json: "):
        reader(tmp_path).generate([prompt(0)], sampling())


def given_row(ids: list[int], *teachers: list[int]) -> Prompt:
    """A row with one answer of these ids."""
    student, *others = (
        Turns(ids=np.array(of_one, np.int32), spans=np.array([[0, len(of_one)]], np.int32))
        for of_one in (ids, *teachers)
    )
    return replace(prompt(1), transcript=Transcript(student=student, teachers=tuple(others)))


def test_given_rows_are_read_back_with_the_teachers_of_this_run(tmp_path) -> None:
    ReplayEngine(
        GivenResponses(TOKENIZER), save_dir=str(tmp_path), load_dir=None, dp_rank=0, writes=True
    ).generate([given_row([97, 98])], sampling())  # of an interface without a teacher
    row = given_row([97, 98], [5, 6, 7])
    (rollout,) = reader(tmp_path).generate([row], sampling())
    assert rollout.transcript is row.transcript and rollout.student_ids.tolist() == [97, 98]
    with pytest.raises(ValueError, match="^--load-debug-rollout-data .*sample 1 is not what --prompt-data"):
        reader(tmp_path).generate([given_row([97, 99], [5, 6, 7])], sampling())
