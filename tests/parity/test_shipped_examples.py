"""The pre-flight of every shipped run file, with the real tokenizers: no failure, and no
warning without a cause.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_simct.alignment import Tokenizer
from megatron_simct.loading import open_tokenizer
from megatron_simct.preflight import model as module
from megatron_simct.preflight.check import check_run
from tests.examples import stand_in
from tests.huggingface import LLAMA_TEMPLATE
from tools.benchmark.real_inputs import Unavailable, tokenizer_path

ROOT = Path(__file__).parents[2]
TOKENIZERS = {
    "Qwen2.5-7B-Instruct": "qwen2.5",
    "gemma-2-2b-it": "gemma2",
    "Phi-4-mini-instruct": "gpt4o",
    "Llama-3.1-8B-Instruct": "llama3-hf",
    "Qwen3-235B-A22B": "qwen2.5",
}
SHARED_FOLDER = ("folders", "must be the same folder on every node")
# The student splits digits one by one, the teacher in groups of up to three; the recipe uses paper.
DIGITS = (
    "interface",
    "split digits differently",
)
WARNINGS = {
    "qwen2.5_7b_to_gemma2_2b": [],
    "qwen2.5_7b_to_phi4_mini": [DIGITS],
    "phi4_mini_to_gemma2_2b": [DIGITS],
    "slurm": [SHARED_FOLDER],
    "large_teacher": [SHARED_FOLDER],
}


def test_every_shipped_file_is_here() -> None:
    """The run file of the engines needs models that are trained for it:
    tests/unit/test_preflight_engines.py.
    """
    assert WARNINGS.keys() | {"engines"} == {
        path.parent.name for path in (ROOT / "examples").glob("*/run.yaml")
    }


@pytest.fixture(scope="module")
def opened() -> dict[str, Tokenizer]:
    """By model: files of this size take a second or two to open."""
    return {}


@pytest.mark.parametrize("name", WARNINGS)
def test_only_what_has_a_cause_is_warned_of(name, tmp_path, opened, monkeypatch) -> None:
    def open_once(model, *, prefix) -> Tokenizer:
        key = Path(model.hf_checkpoint).name
        if key not in opened:
            opened[key] = open_tokenizer(model, prefix=prefix)
        return opened[key]

    monkeypatch.setattr(module, "open_tokenizer", open_once)
    run = stand_in(ROOT / "examples" / name / "run.yaml", tmp_path)
    for model in (tmp_path / "models").iterdir():
        (model / "generation_config.json").unlink(missing_ok=True)
        (model / "chat_template.jinja").unlink(missing_ok=True)
        try:
            files = tokenizer_path(TOKENIZERS[model.name]).parent
        except Unavailable as error:
            pytest.skip(str(error))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(files / file, model)
        if "chat_template" not in (model / "tokenizer_config.json").read_text():  # base models have none
            (model / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    findings = [f for f in check_run(run).findings if f.level != "pass"]
    assert [f for f in findings if f.level != "warn"] == []
    assert sorted(f.check for f in findings) == sorted(what for what, _ in WARNINGS[name])
    for what, words in WARNINGS[name]:
        assert any(f.check == what and words in f.message for f in findings)
