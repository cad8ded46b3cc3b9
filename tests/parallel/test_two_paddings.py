"""One tokenizer, and two models whose embeddings are padded to different sizes, as Qwen2.5's are (151,936
rows and 152,064): rows without an id of the tokenizer count on neither side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_simct.alignment import build_alignment_map, load_tokenizer
from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.steps import train_and_record
from tests.tiny import config

transformers = pytest.importorskip("transformers")

ANSWERS = ["Tom has 11 apples.", "Nora has 13 shells.", "Anna has 15 pencils.", "Привет, мир"]
ROWS = {"student": 383, "teacher": 450}
IDS = 360
"""Ids of the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step on given answers."""

    sums: dict[str, float]
    prompts: dict[int, list[int]]
    """Ids by the number of the sample."""


def _step(rank: int, world_size: int, files: Path, models: Path, *flags: str) -> Step:
    shared = str(files / "student.model")
    resolved = config(
        files,
        *("--tokenizer-model", shared, "--teacher-tokenizer-model", shared),
        *("--hf-checkpoint", str(models / "student"), "--teacher-hf-checkpoint", str(models / "teacher")),
        *("--train-iters", "1", "--rollout-max-response-len", "40", "--rollout-batch-size", "4"),
        *flags,
    )
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        prompts = {prompt.sample_id: prompt.student_ids.tolist() for prompt in job.prompts.batch(0)}
        return Step(sums=train_and_record(job)[0].sums, prompts=prompts)


def _step_of(files: Path, models: Path, *flags: str, tp: int = 1) -> Step:
    layout = ("--tensor-model-parallel-size", str(tp))
    return run_ranks(tp, _step, files, models, *flags, *layout)[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The published sizes. Rows without an id have numbers that would dominate all others."""
    folder = tmp_path_factory.mktemp("padded")
    for side, tied in (("student", True), ("teacher", False)):
        save_model(folder / side, "qwen2", vocab_size=ROWS[side], tie_word_embeddings=tied)
        _change(folder / side, lambda tensor: torch.cat([tensor[:IDS], tensor[IDS:] * 100]))
    return folder


@pytest.fixture(scope="module")
def trimmed(models, tmp_path_factory) -> Path:
    """The same models without those rows."""
    folder = tmp_path_factory.mktemp("trimmed")
    for side in ROWS:
        (folder / side).mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / side / name).write_bytes((models / side / name).read_bytes())
        _change(folder / side, lambda tensor: tensor[:IDS].clone())
        fields = json.loads((folder / side / "config.json").read_text())
        (folder / side / "config.json").write_text(json.dumps(fields | {"vocab_size": IDS}))
    return folder


def _change(folder: Path, change) -> None:
    """Rewrite the embedding and the head."""
    path = str(folder / "model.safetensors")
    tensors = load_file(path)
    changed = {
        name: change(t)
        for name, t in tensors.items()
        if name.endswith(("embed_tokens.weight", "head.weight"))
    }
    save_file(tensors | changed, path, {"format": "pt"})


@pytest.fixture(scope="module")
def sampled(tiny, models, tmp_path_factory) -> Path:
    """Rollouts that the padded student sampled."""
    folder = tmp_path_factory.mktemp("sampled")
    _step_of(tiny, models, "--simct-interface", "kd", "--save-debug-rollout-data", str(folder))
    return folder


@pytest.fixture(scope="module")
def given(tiny, sampled, tmp_path_factory) -> Path:
    """The same samples with ANSWERS instead of a random model's responses."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = load_tokenizer(str(tiny / "student.model"))
    for file in sampled.glob("*.json"):
        rows = json.loads(file.read_text())
        for row, answer in zip(rows, ANSWERS, strict=True):
            row["student_ids"] = [*tokenizer.encode(answer.encode()).tolist(), tokenizer.table.stop_ids[0]]
            row["logprobs"] = [-1.0] * len(row["student_ids"])
            row["finish"] = "stop"
        (folder / file.name).write_text(json.dumps(rows))
    return folder


def _rows(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("*.json")):
        yield from json.loads(file.read_text())


def test_no_id_of_a_padded_row_is_sampled(tiny, sampled) -> None:
    assert load_tokenizer(str(tiny / "student.model")).table.num_ids == IDS
    ids = np.concatenate([row["student_ids"] for row in _rows(sampled)])
    assert ids.size > 100 and ids.max() < IDS


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("interface", ["kd", "paper", "bytes"])
def test_a_step_is_that_of_the_models_without_padding(tiny, models, trimmed, given, interface, tp) -> None:
    flags = ("--simct-interface", interface, "--load-debug-rollout-data", str(given))
    found, expected = _step_of(tiny, models, *flags, tp=tp).sums, _step_of(tiny, trimmed, *flags).sums
    assert expected["loss"] > 1
    assert found.keys() == expected.keys()
    for name in found.keys() - {"grad_norm"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("interface", ["kd", "paper"])
def test_the_loss_is_that_of_transformers_logits_in_float64(tiny, models, given, interface, tp) -> None:
    """A softmax over the ids of the tokenizer on both sides; with `paper`, over the tokens that both have."""
    tokenizer = load_tokenizer(str(tiny / "student.model"))
    stop = tokenizer.table.stop_ids[0]
    if interface == "kd":
        compared = np.arange(IDS)
    else:
        compared = np.append(build_alignment_map(tokenizer, tokenizer).student_ids, stop)
    step = _step_of(
        tiny, models, "--simct-interface", interface, "--load-debug-rollout-data", str(given), tp=tp
    )
    expected, num_labels = 0.0, 0
    for row in _rows(given):
        prompt, answer = step.prompts[row["sample_id"]], row["student_ids"]
        student, teacher = (
            _logits(models / side, [*prompt, *answer])[len(prompt) - 1 : -1, compared].log_softmax(-1)
            for side in ROWS
        )
        expected += float((student.exp() * (student - teacher)).sum())
        num_labels += len(answer)
    assert step.sums["loss"] == pytest.approx(expected, rel=1e-5)
    assert step.sums["rows_shared"] + step.sums["rows_stop"] == num_labels


@torch.no_grad()
def _logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of every row of the model, padding included."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    logits = model(torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float64 and logits.shape[-1] in ROWS.values()
    return logits
