"""The command on Hugging Face folders of both sides: weights, tokenizer, stop ids and chat template of each."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from megatron_simct.train import main
from tests.distributed import run_ranks
from tests.huggingface import (
    save_byte_fallback,
    save_byte_level,
    save_model,
    save_real_byte_fallback,
    save_real_byte_level,
)

pytest.importorskip("transformers")

ROWS = [{"prompt": f"Tom has {i} apples and gets {i % 7} more. How many?"} for i in range(16)]
CHATS = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A student folder of qwen2 in many files, a teacher folder of llama in one, and prompts."""
    root = tmp_path_factory.mktemp("folders")
    save_model(root / "student", "qwen2", tie_word_embeddings=True, vocab_size=333, shard_size="30KB", scale=0.1)
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
        *("--micro-batch-size", "2", "--rollout-max-response-len", "12", "--make-vocab-size-divisible-by", "8"),
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
def test_two_steps_from_folders_alone(files, tmp_path, prompts):
    flags = ["--prompt-data", str(files / f"{prompts}.jsonl")] + ["--apply-chat-template"] * (prompts == "chat")
    layouts = {"one": (1, []), "tp2": (2, ["--tensor-model-parallel-size", "2"])}
    layouts["pp2"] = (2, ["--pipeline-model-parallel-size", "2"])
    metrics = {}
    for name, (world_size, layout) in layouts.items():
        argv = command_line(files, *flags, *layout, "--run-dir", str(tmp_path / name))
        for code, out, err in run_ranks(world_size, _main, argv):
            assert code == 0, err
            assert "random weights" not in out
        metrics[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in metrics[name]] == [1, 2]
        for step in metrics[name]:
            assert step["loss"] > 0 and step["rollout_logprob_gap"] < 1e-4
            assert 0 < step["coverage_one_to_one"] + step["coverage_unit"] <= 1
    # The weights of the folder do not depend on the layout, so neither does the first step.
    for name in ("tp2", "pp2"):
        for metric in ("loss", "grad_norm"):
            assert metrics[name][0][metric] == pytest.approx(metrics["one"][0][metric], rel=1e-5)


def test_two_steps_with_real_vocabularies(tmp_path):
    save_model(tmp_path / "student", "llama", vocab_size=20001, scale=0.1)
    save_real_byte_level(tmp_path / "student")
    save_model(tmp_path / "teacher", "qwen2", vocab_size=32768, scale=0.1)
    save_real_byte_fallback(tmp_path / "teacher")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = command_line(tmp_path, "--rollout-max-response-len", "6", "--run-dir", str(tmp_path / "run"))
    ((code, out, err),) = run_ranks(1, _main, argv)
    assert code == 0, err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_goes_before_the_folder_s_weights(files, tmp_path):
    argv = command_line(files, "--train-iters", "1", "--pretrained-checkpoint", str(tmp_path))
    ((code, _, err),) = run_ranks(1, _main, argv)
    assert code == 1 and f"--pretrained-checkpoint {tmp_path}: no checkpoint there" in err


def test_folders_without_weights_are_reported_once(files, tmp_path):
    shutil.copytree(files / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    argv = command_line(files, "--teacher-hf-checkpoint", str(tmp_path / "teacher"), "--train-iters", "1")
    results = run_ranks(2, _main, argv)
    assert [code for code, _, _ in results] == [0, 0]
    lines = [line for _, out, _ in results for line in out.splitlines() if line.startswith(" random weights")]
    assert lines == [f" random weights: --teacher-hf-checkpoint {tmp_path / 'teacher'}"]


# Wrong folders: one line that names the flag, and exit code 1.


def drop_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def lowercase(folder: Path) -> None:
    save_byte_level(folder, normalizer={"type": "Lowercase"})


def no_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


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
        (drop_tensor, ["hf-checkpoint", "tensor model.norm.weight is missing in model.safetensors.index.json"]),
        (remove_shard, ["hf-checkpoint", "model-00002-of-", "which is missing"]),
        (lowercase, ["tokenizer-model: ", "tokenizer.json", "Lowercase rewrites text"]),
        (shrink_vocabulary, ["hf-checkpoint", "the tokenizer has 320 ids", "vocab_size 300"]),
        (remove_tokenizer, ["missing --", "tokenizer-model"]),
        (no_template, ["hf-checkpoint", "has no chat template"]),
    ],
)
def test_a_wrong_folder_is_one_line_that_names_the_flag(files, tmp_path, side, damage, words):
    shutil.copytree(files / "student", tmp_path / "copy")
    damage(tmp_path / "copy")
    argv = command_line(files, "--apply-chat-template", f"--{side}hf-checkpoint", str(tmp_path / "copy"))
    ((code, out, err),) = run_ranks(1, _main, argv)
    assert code == 1 and out == ""
    assert err.startswith("megatron_simct.train: error: ") and err.count("\n") == 1
    assert f"--{side}" in err
    for word in words:
        assert word in err


def test_messages_need_the_flag_and_a_tokenizer_that_reads_chats(files, tiny):
    ((code, _, err),) = run_ranks(1, _main, command_line(files, "--prompt-data", str(files / "chat.jsonl")))
    assert code == 1 and "chat.jsonl, line 1: " in err and "need --apply-chat-template" in err
    argv = command_line(files, "--apply-chat-template", "--tokenizer-model", str(tiny / "student.model"))
    ((code, _, err),) = run_ranks(1, _main, argv)
    assert code == 1 and "--apply-chat-template: --tokenizer-model " in err and "student.model" in err
