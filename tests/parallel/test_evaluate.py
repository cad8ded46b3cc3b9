"""tools/evaluate.py with the tiny model: the same responses in every layout, resumed where it stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_simct import train
from megatron_simct.commands import evaluate, select_responses
from megatron_simct.evaluation import sandbox
from tests.distributed import run_ranks
from tests.tiny import command_line

ROWS = [
    {
        "task_id": i,
        "prompt": f"Tom has {i}.",
        "code": "",
        "test_imports": [],
        "test_list": [f"assert {i} > 1"],
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def run(tiny, weights, tmp_path_factory) -> Callable[..., tuple[int, str]]:
    """run(folder, *flags, ranks) -> exit code, and the first rank's standard error"""
    data = tmp_path_factory.mktemp("data") / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(folder, *flags, ranks=1) -> tuple[int, str]:
        argv = [
            *("--benchmark", "mbpp", "--data", str(data), "--output-dir", str(folder)),
            *("--hf-checkpoint", str(tiny / "student"), "--tokenizer-model", str(tiny / "student.model")),
            *(
                "--make-vocab-size-divisible-by",
                "8",
                *weights[:2],
                "--max-response-len",
                "6",
                "--workers",
                "2",
            ),
            *("--samples", "2", "--temperature", "1", "--part-size", "3", *flags),
        ]
        return run_ranks(ranks, _main, argv)[0]

    return run


def _main(rank, world_size, argv) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        return evaluate.main(argv), errors.getvalue()


def parts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.glob("*/*.jsonl"))}


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder) == (0, "")
    return folder


@pytest.fixture
def alone(finished, tmp_path) -> Path:
    """A copy of the folder that one process has written."""
    return Path(shutil.copytree(finished, tmp_path / "alone"))


def test_a_run_leaves_responses_grades_and_results(alone) -> None:
    files = parts(alone)
    assert list(files) == [f"{kind}/{i:06d}.jsonl" for kind in ("grades", "responses") for i in range(4)]
    rows = [
        json.loads(line) for name, text in files.items() if "responses" in name for line in text.splitlines()
    ]
    assert [(row["problem_id"], row["sample"]) for row in rows] == [
        (str(i), s) for i in range(5) for s in (0, 1)
    ]
    assert len({row["response"] for row in rows}) > 5
    results = json.loads((alone / "results.json").read_text())
    grades = [
        json.loads(line) for name, text in files.items() if "grades" in name for line in text.splitlines()
    ]
    share = sum(row["right"]["pass"] for row in grades) / len(grades)
    assert results["metrics"]["pass"]["avg@2"]["mean"] == pytest.approx(share)
    assert (results["benchmark"], results["problems"], results["samples"]) == ("mbpp", 5, 2)
    assert results["stop_rate"] == sum(row["finish"] == "stop" for row in rows) / len(rows)


@pytest.mark.parametrize(
    "flags, ranks", [((), 2), (("--tensor-model-parallel-size", "2"), 2)], ids=["DP2", "TP2"]
)
def test_every_layout_gives_the_same_files(run, alone, tmp_path, flags, ranks) -> None:
    assert run(tmp_path / "other", *flags, ranks=ranks) == (0, "")
    assert parts(tmp_path / "other") == parts(alone)


def test_a_stopped_run_generates_what_is_missing(run, alone) -> None:
    before = parts(alone)
    kept = {path: path.stat().st_mtime_ns for path in alone.glob("*/00000[02].jsonl")}
    for name in ("responses/000001.jsonl", "grades/000001.jsonl", "grades/000003.jsonl", "results.json"):
        (alone / name).unlink()
    assert run(alone, "--tensor-model-parallel-size", "2", ranks=2) == (0, "")
    assert parts(alone) == before and (alone / "results.json").exists()
    assert kept == {path: path.stat().st_mtime_ns for path in alone.glob("*/00000[02].jsonl")}


def test_another_run_is_not_mixed_into_the_folder(run, alone) -> None:
    code, error = run(alone, "--seed", "7", "--top-k", "9")
    assert code == 1 and "contains a run that differs in seed, top_k; name another directory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--temperature", "0"), "--samples 2 would all be the same"),
        (("--top-p", "0"), "--top-p 0.0: must be above 0"),
        (("--max-prompt-len", "3"), "--max-prompt-len 3: 0 has"),
        (("--apply-chat-template",), "chat"),
        (("--responses", "x"), "--hf-checkpoint to sample responses from a model, or --responses"),
        (("--part-size", "0"), "--part-size 0: must be at least 1"),
        (("--top-k", "0"), "--top-k 0: must be at least 1, or -1 for all tokens"),
        (("--chat-responses",), "--chat-responses: describes --responses"),
        (("--tokenizer-model", "absent.model"), "absent.model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, tmp_path, flags, message) -> None:
    code, error = run(tmp_path, *flags)
    assert code == 1 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "the right command would find another run there"


def test_newer_weights_under_the_same_name_are_another_run(run, weights, alone) -> None:
    tracker = Path(weights[1]) / "latest_checkpointed_iteration.txt"
    before = tracker.read_text()
    try:
        tracker.write_text("7")
        code, error = run(alone)
    finally:
        tracker.write_text(before)
    assert code == 1 and "contains a run that differs in iteration; name another directory" in error


def test_a_folder_of_something_else_is_not_taken(run, tmp_path) -> None:
    (tmp_path / "run.json").write_text("[1]")
    code, error = run(tmp_path)
    assert code == 1 and "run.json there was not written by this command" in error and error.count("\n") == 1


def test_given_responses_are_graded_without_a_model(tmp_path) -> None:
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = [
        {"problem_id": i, "response": "x = 1" if sample else "("} for i in range(5) for sample in range(2)
    ]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    argv = [
        "--benchmark",
        "mbpp",
        "--data",
        str(tmp_path / "problems.jsonl"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    argv += ["--responses", str(tmp_path / "given.jsonl"), "--workers", "2"]
    assert _main(0, 1, [*argv, "--samples", "2"]) == (0, "")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["pass"]
    assert (metrics["avg@2"]["mean"], metrics["pass@2"]["mean"]) == (0.3, 0.6)
    assert [name.split("/")[0] for name in parts(tmp_path / "out")] == ["grades", "responses"]
    select = [
        "--responses",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "problems.jsonl"),
        "--min-characters",
        "1",
    ]
    assert select_responses.main([*select, "--output", str(tmp_path / "right.jsonl")]) == 0
    assert (tmp_path / "right.jsonl").read_text().count("x = 1") == 3
    code, error = _main(0, 1, [*argv, "--output-dir", str(tmp_path / "another")])
    assert code == 1 and "0 has 2 responses, but --samples is 1" in error


def test_programs_are_confined_as_asked_and_the_results_say_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Landlock `strict` neither grades nor accepts grades, and the table says what
    programs could read.
    """
    (tmp_path / "problems.jsonl").write_text(json.dumps(ROWS[2]) + "\n")
    (tmp_path / "given.jsonl").write_text(json.dumps({"problem_id": 2, "response": "x = 1"}) + "\n")
    data = ["--data", str(tmp_path / "problems.jsonl")]
    grade = ["--benchmark", "mbpp", *data, "--responses", str(tmp_path / "given.jsonl"), "--workers", "1"]
    monkeypatch.setattr(evaluate, "landlock_version", lambda: 0)
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    code, error = _main(0, 1, [*grade, "--output-dir", str(tmp_path / "out"), "--sandbox", "strict"])
    assert code == 1 and "--sandbox strict: this kernel has no Landlock" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with contextlib.redirect_stdout(io.StringIO()) as table:
        assert evaluate.main([*grade, "--output-dir", str(tmp_path / "out")]) == 0
    assert "could read this user's files: this kernel has no Landlock" in table.getvalue()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["landlock"] == 0
    monkeypatch.setattr(evaluate, "landlock_version", lambda: 7)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        assert evaluate.main([*grade, "--output-dir", str(tmp_path / "out")]) == 0
    assert "could read this user's files" in table.getvalue(), "its part was graded before"
    take = [
        "--responses",
        str(tmp_path / "out"),
        *data,
        "--min-characters",
        "1",
        "--output",
        str(tmp_path / "right"),
    ]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert select_responses.main([*take, "--sandbox", "strict"]) == 1
    assert (
        "were graded on a kernel without Landlock" in errors.getvalue() and errors.getvalue().count("\n") == 1
    )
    assert select_responses.main(take) == 0
    with contextlib.redirect_stdout(io.StringIO()) as table:
        assert evaluate.main([*grade, "--output-dir", str(tmp_path / "again")]) == 0
    assert "confined by seccomp and Landlock (version 7)" in table.getvalue()
    take[1] = str(tmp_path / "again")
    assert select_responses.main([*take, "--sandbox", "strict"]) == 0


def _train(rank, world_size, argv) -> int:
    return train.main(argv)


def test_a_teachers_right_answers_are_what_a_student_is_warmed_up_on(tiny, weights, tmp_path) -> None:
    """Sample and check, select, sft: each command reads the output of the one before."""

    def sample(folder: Path, labels: list[str]) -> list[dict]:
        rows = [{"prompt": f"Tom has {i}.", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = [
            *(
                "--benchmark",
                "exact_match",
                "--data",
                str(tmp_path / "problems.jsonl"),
                "--output-dir",
                str(folder),
            ),
            *("--hf-checkpoint", str(tiny / "student"), "--tokenizer-model", str(tiny / "student.model")),
            *(
                "--make-vocab-size-divisible-by",
                "8",
                *weights[:2],
                "--max-response-len",
                "6",
                "--workers",
                "1",
            ),
            *("--samples", "4", "--temperature", "1", "--stop-token-ids", *map(str, range(260, 310))),
        ]
        assert run_ranks(1, _main, argv) == [(0, "")]
        return [json.loads(line) for line in (folder / "responses" / "000000.jsonl").read_text().splitlines()]

    said = sample(tmp_path / "first", ["?"] * 12)
    whole = [
        row for row in said if row["finish"] == "stop" and row["response"] and "\ufffd" not in row["response"]
    ]
    ended = {row["problem_id"]: row["response"] for row in whole}
    assert len(ended) >= 2, "the model ends some of its answers"
    sample(tmp_path / "second", [ended.get(str(i), "?") for i in range(12)])
    argv = ["--responses", str(tmp_path / "second"), "--data", str(tmp_path / "problems.jsonl")]
    argv += ["--min-characters", "1", "--output", str(tmp_path / "warm_up.jsonl")]
    assert select_responses.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "warm_up.jsonl").read_text().splitlines()]
    assert {row["id"]: row["response"] for row in rows} == ended
    argv = command_line(tiny, "--simct-interface", "sft", "--prompt-data", str(tmp_path / "warm_up.jsonl"))
    argv += ["--rollout-batch-size", "2", "--train-iters", "1", "--run-dir", str(tmp_path / "run")]
    assert run_ranks(1, _train, argv) == [0]
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["loss"] > 0 and step["stop_rate"] == 1


@pytest.mark.parametrize("flags, ranks", [((), 1), ((), 2), (("--tensor-model-parallel-size", "2"), 2)])
def test_a_benchmark_while_training_is_graded_as_afterwards(tiny, weights, tmp_path, flags, ranks) -> None:
    """The model's text follows a comment sign, so a program is right if its first line is."""
    data = tmp_path / "problems.jsonl"
    rows = [
        {
            "task_id": f"T/{i}",
            "prompt": f"def f(): return {i}  # ",
            "test": "def check(f):\n    assert f() % 3 == 0",
            "entry_point": "f",
        }
        for i in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        *("--benchmark", "humaneval", "--data", str(data), "--output-dir", str(tmp_path / "afterwards")),
        *("--hf-checkpoint", str(tiny / "student"), "--tokenizer-model", str(tiny / "student.model")),
        *("--make-vocab-size-divisible-by", "8", *weights[:2], "--max-response-len", "12", "--workers", "1"),
    ]
    assert run_ranks(1, _main, argv) == [(0, "")]
    grades = [
        json.loads(line)
        for line in (tmp_path / "afterwards" / "grades" / "000000.jsonl").read_text().splitlines()
    ]
    expected = [int(row["right"]["pass"]) for row in grades]
    assert 0 < sum(expected) < 5
    argv = command_line(
        tiny, *weights[:2], "--eval-benchmark", "humaneval", "--eval-prompt-data", str(data), *flags
    )
    argv += ["--eval-samples", "0", "--train-iters", "1", "--run-dir", str(tmp_path / "run")]
    assert run_ranks(ranks, _train, argv) == [0] * ranks
    evaluation = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (evaluation["kind"], evaluation["iteration"], evaluation["greedy_right"]) == (
        "evaluation",
        0,
        expected,
    )
    assert evaluation["greedy_accuracy"] == sum(expected) / 5
