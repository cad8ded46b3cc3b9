"""A complete tiny job: two real tokenizer files, two config.json folders, prompts. Built once
for each test session.

The student has a SentencePiece model trained here; the teacher has a tiktoken rank file. They agree on digits
and on short words, and cut longer words differently.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config

WORDS = [
    "apples",
    "shells",
    "pencils",
    "marbles",
    "Tom",
    "Nora",
    "Anna",
    "has",
    "gets",
    "more",
    "How",
    "many",
]
PIECES = [
    " apples",
    " shell",
    "s",
    " pen",
    "cils",
    " marbles",
    "Tom",
    "Nora",
    "Ann",
    "a",
    " has",
    " gets",
    " more",
]
PATTERN = r" ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]+"


def build_files(folder: Path) -> None:
    """Everything that `config` names, under one folder."""
    rows = [_row(i) for i in range(48)]
    _write_rows(folder / "train.jsonl", rows)
    _write_rows(folder / "held_out.jsonl", rows[:8])
    (folder / "corpus.txt").write_text("\n".join(row["prompt"] + " " + row["response"] for row in rows))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "student"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    _write_ranks(folder / "teacher.tiktoken")
    for side, hidden_size, vocab_size in (("student", 32, 360), ("teacher", 48, 300)):
        _write_architecture(folder / side, hidden_size=hidden_size, vocab_size=vocab_size)


def routed(files: Path, rows: Path, teachers: dict[str, Any], *flags: str) -> list[str]:
    """The command line of the tiny job with these teachers in place of its own, of 8 rows a step."""
    argv = command_line(files, *("--prompt-data", str(rows), "--teachers", json.dumps(teachers)), *flags)
    for flag in (
        "--teacher-hf-checkpoint",
        "--teacher-tokenizer-model",
        "--teacher-make-vocab-size-divisible-by",
    ):
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv


def rows_of_teachers(files: Path, path: Path, names: Sequence[str]) -> Path:
    """The tiny job's rows, with the teachers `names` in turn and responses of many lengths; half of the rows
    have a prompt for the teacher alone. Written to `path`, which is returned."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()
    ]
    for number, row in enumerate(rows):
        row |= {"response": row["response"] + " Tom" * (number % 4), "teacher": names[number % len(names)]}
        row |= {"teacher_suffix": f" {row['label']}"} if number % 2 else {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, *flags: str) -> Config:
    """The configuration of `command_line`."""
    return parse_config(command_line(folder, *flags))


def command_line(folder: Path, *flags: str) -> list[str]:
    """A run of two steps from random weights on these files; later flags win."""
    return [
        *("--hf-checkpoint", str(folder / "student"), "--tokenizer-model", str(folder / "student.model")),
        *("--teacher-hf-checkpoint", str(folder / "teacher")),
        *("--teacher-tokenizer-model", str(folder / "teacher.tiktoken")),
        *("--prompt-data", str(folder / "train.jsonl"), "--make-vocab-size-divisible-by", "8"),
        *("--teacher-make-vocab-size-divisible-by", "4", "--rollout-max-response-len", "12"),
        *("--rollout-batch-size", "8", "--micro-batch-size", "2", "--train-iters", "2"),
        *("--lr", "1e-3", "--lr-warmup-fraction", "0", "--seed", "5"),
        *flags,
    ]


def _row(i: int) -> dict[str, str]:
    name, thing = WORDS[4 + i % 3], WORDS[i % 4]
    a, b = 10 + i, 1 + i % 9
    return {
        "prompt": f"{name} has {a} {thing} and gets {b} more. How many?",
        "response": f"{name} has {a + b} {thing}.",
        "label": f"{name} has {a + b} {thing}.",
    }


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_ranks(path: Path) -> None:
    """Every byte, then the prefixes that let byte-pair merging build each of PIECES."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in PIECES:
        for end in range(2, len(piece) + 1):
            ranks.setdefault(piece[:end].encode(), len(ranks))
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    first_special = len(ranks)
    sidecar = {
        "pattern": PATTERN,
        "special_tokens": {"<|end|>": first_special, "<|im_end|>": first_special + 1},
        "stop_tokens": ["<|end|>", "<|im_end|>"],
    }
    path.with_name(path.name + ".json").write_text(json.dumps(sidecar))


def _write_architecture(folder: Path, *, hidden_size: int, vocab_size: int) -> None:
    folder.mkdir()
    fields = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": hidden_size == 32,
        "hidden_act": "silu",
        "initializer_range": 0.3,
    }
    (folder / "config.json").write_text(json.dumps(fields))
