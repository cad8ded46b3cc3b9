"""Rows of a prompt file and their errors; the rows of each step and rank."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, TokenTable
from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.data.rendering import render_prompt


def byte_tokenizer(*, bos_id: int | None = None, step: int = 1) -> Tokenizer:
    """One token a byte (or a repetition of it), ids 256 stop and 257 start."""
    table = TokenTable.from_bytes(
        [bytes([i]) for i in range(256)] + [b"", b""], special_ids=[257], stop_ids=[256]
    )
    return Tokenizer(
        name="bytes", table=table, encode_text=lambda text: list(text.encode()) * step, bos_id=bos_id
    )


STUDENT = byte_tokenizer(bos_id=257)
TEACHER = byte_tokenizer(step=2)


# read_prompts


@pytest.fixture
def read(tmp_path) -> Callable[..., list[Row]]:
    def read(content: str | bytes, **overrides) -> list[Row]:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {
            "flag": "--prompt-data",
            "input_key": "prompt",
            "response_key": "response",
            "label_key": "label",
            "need_response": False,
            "need_label": False,
        }
        return read_prompts(str(path), **(options | overrides))

    return read


def test_rows_in_file_order_and_blank_lines_are_skipped(read) -> None:
    rows = read('{"prompt": "a", "response": "r", "label": "l", "more": 1}\n\n  \n{"prompt": "b"}')
    assert rows == [
        Row(prompt="a", response="r", label="l"),
        Row(prompt="b", response=None, label=None),
    ]


def test_keys_can_be_renamed(read) -> None:
    rows = read('{"q": "a", "r": "b", "l": "c"}', input_key="q", response_key="r", label_key="l")
    assert rows == [Row(prompt="a", response="b", label="c")]


def test_a_line_end_of_unicode_inside_a_string_does_not_end_the_row(read) -> None:
    text = "a\u2028b\u0085c\x1cd é"
    rows = read(
        json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" + json.dumps({"prompt": "b"}) + "\r\n"
    )
    assert [row.prompt for row in rows] == [text, "b"]


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"^--eval-prompt-data /nowhere/x\.jsonl: No such file or directory$"
    ):
        read_prompts(
            "/nowhere/x.jsonl",
            flag="--eval-prompt-data",
            input_key="prompt",
            response_key="response",
            label_key="label",
            need_response=False,
            need_label=False,
        )


@pytest.mark.parametrize(
    "content, overrides, words",
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', {}, ["line 3", "not JSON"]),
        ('{"prompt": "a"}\n["prompt"]\n', {}, ["line 2", "expected a JSON object"]),
        ('{"question": "a", "n": 1}\n', {}, ["line 1", "no prompt", "question, n"]),
        ('{"prompt": 5}\n', {}, ["line 1", "neither a string nor messages under 'prompt'"]),
        ("{}\n", {}, ["line 1", "no keys"]),
        ('{"prompt": ""}\n', {}, ["line 1", "the prompt is empty"]),
        ('{"prompt": "\\ud800"}\n', {}, ["line 1", "'prompt'", "surrogate"]),
        ('{"prompt": "a"}\n', {"need_response": True}, ["line 1", "no response", "the row has prompt"]),
        (
            '{"prompt": "a", "label": {}}\n',
            {"need_label": True},
            ["line 1", "a label that is not a string or a number"],
        ),
        ("", {}, ["no prompts in the file"]),
        ("\n \n", {}, ["no prompts in the file"]),
        (b'{"prompt": "\xff"}\n', {}, ["not UTF-8", "byte 12"]),
    ],
)
def test_wrong_files_are_named_with_flag_and_line(read, tmp_path, content, overrides, words) -> None:
    with pytest.raises(ValueError) as error:
        read(content, **overrides)
    message = str(error.value)
    assert message.startswith(f"--prompt-data {tmp_path / 'rows.jsonl'}") and "\n" not in message
    for word in words:
        assert word in message


# render_prompt


def test_a_prompt_starts_with_the_tokenizer_s_first_token() -> None:
    assert render_prompt("é", STUDENT).tolist() == [257, 0xC3, 0xA9]
    assert render_prompt("ab", TEACHER).tolist() == [97, 98, 97, 98]
    assert render_prompt("ab", TEACHER).dtype == np.int32


# PromptSource

ROWS = [Row(prompt="p" * (i + 1), response=f"r{i}", label=f"l{i}") for i in range(10)]


def source(**overrides) -> PromptSource:
    options = {
        "student": STUDENT,
        "teachers": [(TEACHER, None)],
        "batch_size": 4,
        "samples_per_prompt": 1,
        "max_prompt_len": 100,
        "shuffle": True,
        "seed": 3,
        "dp_rank": 0,
        "dp_size": 1,
        "flag": "--prompt-data",
    }
    rows = overrides.pop("rows", ROWS)
    return PromptSource(rows, **(options | overrides))


def row_of(prompt) -> int:
    return int(prompt.label[1:])


def test_a_sample_carries_its_row() -> None:
    (first, *_) = source(shuffle=False).batch(0)
    assert first.sample_id == 0
    assert first.student_ids.tolist() == [257, ord("p")]
    assert first.teacher_ids.tolist() == [ord("p")] * 2
    assert (first.response, first.label) == ("r0", "l0")
    assert source(teachers=[]).batch(0)[0].teacher_ids.tolist() == []


def test_the_teacher_reads_its_own_prompt_where_a_row_has_one() -> None:
    rows = [
        Row(prompt="p", response=None, label=None, teacher_prompt="pq"),
        Row(prompt="p", response=None, label=None),
    ]
    prompts = source(rows=rows, shuffle=False, teachers=[(TEACHER, None), (STUDENT, None)])
    first, second = prompts.batch(0)[:2]
    assert first.student_ids.tolist() == second.student_ids.tolist() == [257, ord("p")]
    assert first.teacher_ids.tolist() == [ord("p"), ord("q")] * 2
    assert first.other_teacher_ids[0].tolist() == [257, ord("p"), ord("q")]
    assert second.teacher_ids.tolist() == [ord("p")] * 2
    assert prompts.num_teacher_prompts == 1
    assert source(rows=rows, teachers=[]).num_teacher_prompts == 0
    # The teacher's own prompt also counts for the length limit.
    short = source(rows=rows, max_prompt_len=3)
    assert (len(short), short.num_skipped, short.num_teacher_prompts) == (1, 1, 0)


def test_the_teachers_that_a_row_names_read_it() -> None:
    rows = [
        Row(prompt="p", response=None, label=None, teachers=weights)
        for weights in ({"a": 1.0}, {"b": 1.0}, {"b": 0.75, "a": 0.25})
    ]
    named = {"a": (STUDENT, None), "b": (TEACHER, None)}
    prompts = source(rows=rows, shuffle=False, teachers=(), named_teachers=named, batch_size=3).batch(0)
    by_a, by_b = [257, ord("p")], [ord("p")] * 2
    assert [one.teacher_ids.tolist() for one in prompts] == [by_a, by_b, by_b]
    assert [one.teacher for one in prompts] == ["a", "b", "b"]
    assert [one.mixture for one in prompts] == [(), (), (("b", 0.75), ("a", 0.25))]
    assert [[ids.tolist() for ids in one.other_teacher_ids] for one in prompts] == [[], [], [by_a]]


def test_every_row_once_an_epoch_then_in_another_order() -> None:
    prompts = source()
    rows = [row_of(p) for step in range(5) for p in prompts.batch(step)]  # 20 samples: two epochs of 10
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))


def test_without_shuffling_the_order_is_the_file_s() -> None:
    prompts = source(shuffle=False)
    assert [row_of(p) for step in range(5) for p in prompts.batch(step)] == 2 * list(range(10))


def test_sample_ids_count_on_and_a_batch_depends_on_the_step_alone() -> None:
    prompts = source()
    ids = [p.sample_id for step in range(7) for p in prompts.batch(step)]
    assert ids == list(range(28))
    in_order = [row_of(p) for p in prompts.batch(3)]
    prompts.batch(6)
    assert [row_of(p) for p in prompts.batch(3)] == in_order == [row_of(p) for p in source().batch(3)]


def test_the_order_depends_on_the_seed() -> None:
    def order(seed) -> list[int]:
        return [row_of(p) for step in range(2) for p in source(seed=seed).batch(step)]

    assert order(3) == order(3) != order(4)


@pytest.mark.parametrize("dp_size", [2, 4])
@pytest.mark.parametrize("samples_per_prompt", [1, 3])
def test_ranks_share_a_batch(dp_size, samples_per_prompt) -> None:
    whole = source(samples_per_prompt=samples_per_prompt)
    shares = [
        source(samples_per_prompt=samples_per_prompt, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    for step in range(6):
        expected = {p.sample_id: row_of(p) for p in whole.batch(step)}
        batches = [share.batch(step) for share in shares]
        assert {len(batch) for batch in batches} == {4 * samples_per_prompt // dp_size}
        together = [(p.sample_id, row_of(p)) for batch in batches for p in batch]
        assert len(together) == len(expected) and dict(together) == expected


def test_samples_of_one_prompt_stand_together_with_ids_of_their_own() -> None:
    prompts = source(samples_per_prompt=3)
    samples = [p for step in range(5) for p in prompts.batch(step)]  # 60 samples: 20 prompts
    assert [p.sample_id for p in samples] == list(range(60))
    rows = [row_of(p) for p in samples]
    assert rows[0::3] == rows[1::3] == rows[2::3]
    assert Counter(rows[:30]) == dict.fromkeys(range(10), 3)


def test_long_prompts_of_either_side_are_left_out_and_counted() -> None:
    by_teacher = source(max_prompt_len=8)  # twice the text: rows 0..3
    assert (len(by_teacher), by_teacher.num_skipped) == (4, 6)
    assert sorted(row_of(p) for p in by_teacher.batch(0)) == [0, 1, 2, 3]
    by_student = source(max_prompt_len=8, teachers=[])  # the text and a first token: rows 0..6
    assert (len(by_student), by_student.num_skipped) == (7, 3)
    assert source().num_skipped == 0


def test_no_prompt_remains() -> None:
    with pytest.raises(
        ValueError, match=r"^--prompt-data: all 10 prompts exceed --rollout-max-prompt-len 1$"
    ):
        source(max_prompt_len=1)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_evaluation_gets_every_row_once_in_file_order(dp_size) -> None:
    shares = [source(dp_rank=rank, dp_size=dp_size).share() for rank in range(dp_size)]
    together = sorted((p for share in shares for p in share), key=lambda p: p.sample_id)
    assert [(p.sample_id, row_of(p)) for p in together] == [(i, i) for i in range(10)]
    for share in shares:
        assert [p.sample_id for p in share] == sorted(p.sample_id for p in share)


def test_an_epoch_can_end_inside_a_batch_larger_than_the_file() -> None:
    samples = source(rows=ROWS[:3], batch_size=8).batch(0)
    rows = [row_of(p) for p in samples]
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2] and len(set(rows[6:])) == 2
