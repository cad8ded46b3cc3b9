"""The command with Hugging Face folders on both sides: weights, tokenizer, stop ids and
chat template of each.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.commands import evaluate
from megatron_simct.data import rendering
from megatron_simct.train import main
from tests.distributed import run_ranks
from tests.huggingface import (
    save_byte_fallback,
    save_byte_level,
    save_model,
    save_real_byte_fallback,
    save_real_byte_level,
)
from tests.runs import assert_same_run, metrics

pytest.importorskip("transformers")

ROWS = [{"prompt": f"Tom has {i} apples and gets {i % 7} more. How many?"} for i in range(16)]
CHATS = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A student folder of qwen2 in many files, a teacher folder of llama in one, and prompts."""
    root = tmp_path_factory.mktemp("folders")
    save_model(
        root / "student", "qwen2", tie_word_embeddings=True, vocab_size=333, shard_size="30KB", scale=0.1
    )
    save_byte_level(root / "student")
    save_model(root / "teacher", "llama", vocab_size=340, hidden_size=48, scale=0.1)
    save_byte_fallback(root / "teacher")
    for name, rows in (("plain", ROWS), ("chat", CHATS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command_line(files: Path, *flags: str) -> list[str]:
    return [
        *("--hf-checkpoint", str(files / "student"), "--teacher-hf-checkpoint", str(files / "teacher")),
        *("--prompt-data", str(files / "plain.jsonl"), "--train-iters", "2", "--rollout-batch-size", "8"),
        *(
            "--micro-batch-size",
            "2",
            "--rollout-max-response-len",
            "12",
            "--make-vocab-size-divisible-by",
            "8",
        ),
        *("--teacher-make-vocab-size-divisible-by", "8", "--lr", "1e-3", "--lr-warmup-fraction", "0"),
        *flags,
    ]


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("prompts", ["plain", "chat"])
def test_two_steps_from_folders_alone(files, tmp_path, prompts) -> None:
    flags = ["--prompt-data", str(files / f"{prompts}.jsonl")] + ["--apply-chat-template"] * (
        prompts == "chat"
    )
    layouts = {"one": (1, []), "tp2": (2, ["--tensor-model-parallel-size", "2"])}
    layouts["pp2"] = (2, ["--pipeline-model-parallel-size", "2"])
    metrics = {}
    for name, (world_size, layout) in layouts.items():
        argv = command_line(files, *flags, *layout, "--run-dir", str(tmp_path / name))
        for code, out, err in run_ranks(world_size, _main, argv):
            assert code == 0, err
            assert "random weights" not in out
        metrics[name] = [
            json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["iteration"] for line in metrics[name]] == [1, 2]
        for step in metrics[name]:
            assert step["loss"] > 0 and step["rollout_logprob_gap"] < 1e-4
            assert 0 < step["coverage_one_to_one"] + step["coverage_unit"] <= 1
    # The folder's weights do not depend on the layout, so the first step does not either.
    for name in ("tp2", "pp2"):
        for metric in ("loss", "grad_norm"):
            assert metrics[name][0][metric] == pytest.approx(metrics["one"][0][metric], rel=1e-5)


# The date and the arguments of chat templates


def _on_day(
    rank: int, world_size: int, argv: list[str], days: list[str], command: Any = main
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, if the clock of each rank shows its day."""

    class Clock(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return cls.fromisoformat(days[rank])

    rendering.Date = Clock
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(argv)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def dated(files, tmp_path_factory) -> Path:
    """The student's folder, whose template writes the day and, unless an argument prevents it, a word."""
    folder = tmp_path_factory.mktemp("dated") / "student"
    shutil.copytree(files / "student", folder)
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%A, %d %B %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% "
        "endfor %}{% if enable_thinking is not defined or enable_thinking %}the cat{% endif %}"
    )
    return folder


def test_a_run_that_goes_on_another_day_has_the_prompts_of_the_first(files, dated, tmp_path) -> None:
    def trained(folder: Path, days: list[str], iterations: int, *flags: str, world_size: int = 1) -> str:
        argv = command_line(
            files, "--apply-chat-template", "--hf-checkpoint", str(dated), "--micro-batch-size", "1"
        )
        argv += [
            "--prompt-data",
            str(files / "chat.jsonl"),
            "--train-iters",
            str(iterations),
            "--lr-decay-style",
        ]
        argv += ["constant", "--run-dir", str(folder / "run"), "--save", str(folder / "save")]
        results = run_ranks(world_size, _on_day, [*argv, "--load", str(folder / "save"), *flags], days)
        assert all(code == 0 for code, _, _ in results), results
        return results[0][1]

    first, later = "2025-12-31", "2026-05-01"
    trained(tmp_path / "undisturbed", [first], 3)
    trained(tmp_path / "resumed", [first], 1)
    text = trained(tmp_path / "resumed", [later], 3)
    assert "after iteration 1" in text and "chat_template_date" not in text
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")
    assert f"chat_template_date: '{first}'" in (tmp_path / "resumed" / "run" / "config.yaml").read_text()
    (run_file,) = (tmp_path / "resumed" / "save").glob("iter_0000003/run.json")
    assert json.loads(run_file.read_text())["config"]["chat_template_date"] == first
    # Another date and another argument give other prompts; both are reported.
    flags = ("--chat-template-date", later, "--chat-template-kwargs", '{"enable_thinking": false}')
    text = trained(tmp_path / "resumed", [later], 4, *flags)
    assert f"chat_template_date {first} -> {later}" in text
    assert 'chat_template_kwargs None -> {"enable_thinking": false}' in text
    # A rank whose clock is past midnight uses the first rank's date.
    trained(tmp_path / "two", [first, later], 1, world_size=2)
    trained(tmp_path / "one", [first, first], 1, world_size=2)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    trained(tmp_path / "other", [later, later], 1, world_size=2)
    assert metrics(tmp_path / "other") != metrics(tmp_path / "one")


def test_an_evaluation_that_goes_on_another_day_asks_as_on_the_first(dated, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"label": "1"}) + "\n" for row in ROWS[:4]))

    def evaluated(folder: Path, days: list[str], *flags: str) -> tuple[int, str]:
        argv = [
            "--benchmark",
            "exact_match",
            "--data",
            str(tmp_path / "rows.jsonl"),
            "--output-dir",
            str(folder),
        ]
        argv += [
            "--hf-checkpoint",
            str(dated),
            "--make-vocab-size-divisible-by",
            "8",
            "--max-response-len",
            "8",
        ]
        argv += ["--part-size", "2", "--temperature", "1", "--apply-chat-template", *flags]
        code, _, err = run_ranks(len(days), _on_day, argv, days, evaluate.main)[0]
        return code, err

    def responses(folder: Path) -> list[str]:
        return [path.read_text() for path in sorted((folder / "responses").iterdir())]

    first, later = "2025-12-31", "2026-05-01"
    assert evaluated(tmp_path / "a", [first, later]) == (0, "")
    assert json.loads((tmp_path / "a" / "results.json").read_text())["chat_template_date"] == first
    expected = responses(tmp_path / "a")
    for path in [*(tmp_path / "a").glob("*/000001.jsonl"), tmp_path / "a" / "results.json"]:
        path.unlink()
    assert evaluated(tmp_path / "a", [later]) == (0, "")
    assert responses(tmp_path / "a") == expected
    for flags, name in (
        (("--chat-template-date", later), "chat_template_date"),
        (("--chat-template-kwargs", '{"enable_thinking": false}'), "chat_template_kwargs"),
    ):
        code, err = evaluated(tmp_path / "a", [first], *flags)
        assert code == 1 and f"contains a run that differs in {name}; name another directory" in err
        assert evaluated(tmp_path / name, [first], *flags) == (0, "")
        assert responses(tmp_path / name) != expected


def test_two_steps_with_real_vocabularies(tmp_path) -> None:
    save_model(tmp_path / "student", "llama", vocab_size=20001, scale=0.1)
    save_real_byte_level(tmp_path / "student")
    save_model(tmp_path / "teacher", "qwen2", vocab_size=32768, scale=0.1)
    save_real_byte_fallback(tmp_path / "teacher")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = command_line(tmp_path, "--rollout-max-response-len", "6", "--run-dir", str(tmp_path / "run"))
    ((code, out, err),) = run_ranks(1, _main, argv)
    assert code == 0, err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_goes_before_the_folder_s_weights(files, tmp_path) -> None:
    argv = command_line(files, "--train-iters", "1", "--pretrained-checkpoint", str(tmp_path))
    ((code, _, err),) = run_ranks(1, _main, argv)
    assert code == 1 and f"--pretrained-checkpoint {tmp_path}: no checkpoint there" in err


def test_folders_without_weights_are_reported_once(files, tmp_path) -> None:
    shutil.copytree(files / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    argv = command_line(files, "--teacher-hf-checkpoint", str(tmp_path / "teacher"), "--train-iters", "1")
    results = run_ranks(2, _main, argv)
    assert [code for code, _, _ in results] == [0, 0]
    lines = [line for _, out, _ in results for line in out.splitlines() if line.startswith(" random weights")]
    assert lines == [f" random weights: --teacher-hf-checkpoint {tmp_path / 'teacher'}"]


# Invalid folders: one line that names the flag, and exit code 1.


def drop_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def lowercase(folder: Path) -> None:
    save_byte_level(folder, normalizer={"type": "Lowercase"})


def no_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


def long_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_shard(folder: Path) -> None:
    next(folder.glob("model-00002-of-*")).unlink()


def shrink_vocabulary(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": 300}))


@pytest.mark.parametrize("side", ["", "teacher-"])
@pytest.mark.parametrize(
    "damage, words",
    [
        (
            drop_tensor,
            ["hf-checkpoint", "tensor model.norm.weight is missing in model.safetensors.index.json"],
        ),
        (remove_shard, ["hf-checkpoint", "model-00002-of-", "which is missing"]),
        (lowercase, ["tokenizer-model: ", "tokenizer.json", "Lowercase rewrites text"]),
        (shrink_vocabulary, ["hf-checkpoint", "the tokenizer has 320 ids", "vocab_size 300"]),
        (remove_tokenizer, ["missing --", "tokenizer-model"]),
        (no_template, ["hf-checkpoint", "has no chat template"]),
        (long_template, ["hf-checkpoint", "chat_template.jinja writes more than 16,777,216 characters"]),
    ],
)
def test_a_wrong_folder_is_one_line_that_names_the_flag(files, tmp_path, side, damage, words) -> None:
    shutil.copytree(files / "student", tmp_path / "copy")
    damage(tmp_path / "copy")
    argv = command_line(files, "--apply-chat-template", f"--{side}hf-checkpoint", str(tmp_path / "copy"))
    ((code, out, err),) = run_ranks(1, _main, argv)
    assert code == 1 and out == ""
    assert err.startswith("megatron_simct.train: error: ") and err.count("\n") == 1
    assert f"--{side}" in err
    for word in words:
        assert word in err


def test_messages_need_the_flag_and_a_tokenizer_that_reads_chats(files, tiny) -> None:
    ((code, _, err),) = run_ranks(1, _main, command_line(files, "--prompt-data", str(files / "chat.jsonl")))
    assert code == 1 and "chat.jsonl, line 1: " in err and "need --apply-chat-template" in err
    argv = command_line(files, "--apply-chat-template", "--tokenizer-model", str(tiny / "student.model"))
    ((code, _, err),) = run_ranks(1, _main, argv)
    assert code == 1 and "--apply-chat-template: --tokenizer-model " in err and "student.model" in err
