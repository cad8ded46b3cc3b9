"""tools/select_responses.py: the responses of a teacher that warm up a student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_simct.commands import evaluate, select_responses
from megatron_simct.data.prompts import read_prompts
from megatron_simct.evaluation.benchmarks import digest_of, read_problems
from megatron_simct.files import write_rows

GOOD = "The answer is surely four."
LONG = "The answer, after some thought about it, is four."


def leave(folder: Path, responses: list[list[tuple[str, bool, str]]], *, chat: bool = False) -> list[str]:
    """Write the output of tools/evaluate.py, with (text, whether it is right, finish) of each sample. Returns
    flags that read it.
    """
    data = folder / "problems.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"2 + {i}?", "label": "4"} for i in range(len(responses))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_problems("exact_match", str(data))
    for number, samples in enumerate(responses):
        given, grades = [], []
        for sample, (text, right, finish) in enumerate(samples):
            key = {"problem_id": f"p{number}", "sample": sample}
            given.append(key | {"response": text, "finish": finish, "tokens": 1})
            grades.append(key | {"right": {"exact_match": right, "other": not right}})
        write_rows(folder / "run" / "responses" / f"{number:06d}.jsonl", given)
        write_rows(folder / "run" / "grades" / f"{number:06d}.jsonl", grades)
    run = {"benchmark": "exact_match", "chat": chat, "problems": len(rows)}
    evaluate.write_json(folder / "run" / "results.json", run | {"problems_sha256": digest_of(problems)})
    return [
        "--responses",
        str(folder / "run"),
        "--data",
        str(data),
        "--output",
        str(folder / "warm_up.jsonl"),
    ]


def kept(folder: Path) -> list[str]:
    return [json.loads(line)["response"] for line in (folder / "warm_up.jsonl").read_text().splitlines()]


def test_the_shortest_right_response_to_each_problem_is_kept(tmp_path, capsys) -> None:
    wrong, cut_off = ("The answer is five, no?", False, "stop"), ("The answer is four, and", True, "length")
    argv = leave(
        tmp_path,
        [[(LONG, True, "stop"), wrong, (GOOD, True, "stop"), cut_off], [wrong], [(LONG, True, "stop")]],
    )
    assert select_responses.main(argv) == 0
    rows = read_prompts(
        *(str(tmp_path / "warm_up.jsonl"),),
        flag="--prompt-data", input_key="prompt", response_key="response", label_key="label",
        need_response=True, need_label=False,
    )  # fmt: skip
    assert [(row.prompt, row.response) for row in rows] == [("2 + 0?", GOOD), ("2 + 2?", LONG)]
    assert (
        "2 of 3 problems have a response; responses: 3 right, 2 wrong, 1 cut off" in capsys.readouterr().out
    )
    assert select_responses.main([*argv, "--metric", "other"]) == 0
    assert kept(tmp_path) == [wrong[0], wrong[0]]


@pytest.mark.parametrize(
    "text, flags, reason",
    [
        ("a" * 19, (), "too short"),
        ("a" * 20, (), None),
        ("a" * 4001, (), "too long"),
        ("a" * 4000, (), None),
        ("one two three four " * 5, (), "repetitive"),
        ("one two three four " * 5, ("--max-repetition", "0.8"), None),
        ("a" * 19, ("--min-characters", "1"), None),
        ("half a character: \ufffd", (), "not UTF-8"),
    ],
)
def test_what_a_response_must_be(tmp_path, capsys, text, flags, reason) -> None:
    argv = leave(tmp_path, [[(text, True, "stop")], [(GOOD, True, "stop")]])
    assert select_responses.main([*argv, *flags]) == 0
    assert kept(tmp_path) == ([GOOD] if reason else [text, GOOD])
    assert (f"1 {reason}" in capsys.readouterr().out) == (reason is not None)


def test_repetition_is_the_share_of_sequences_that_came_before() -> None:
    assert select_responses.repetition("a b c") == select_responses.repetition("a b c d e f") == 0
    assert select_responses.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert select_responses.repetition("a " * 13) == pytest.approx(9 / 10)


def test_what_cannot_be_selected_from_is_said_in_a_line(tmp_path, capsys) -> None:
    argv = leave(tmp_path, [[(GOOD, False, "stop")]])

    def error(*flags: str) -> str:
        assert select_responses.main([*argv, *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no response is left (responses: 1 wrong)" in error()
    assert not (tmp_path / "warm_up.jsonl").exists()
    assert "--metric pass: the responses were graded by exact_match, other" in error("--metric", "pass")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "a", "label": "b"}) + "\n")
    assert "has other problems than" in error("--data", str(tmp_path / "other.jsonl"))
    (tmp_path / "run" / "results.json").unlink()
    assert "not a finished run of tools/evaluate.py" in error()
