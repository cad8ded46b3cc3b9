"""tools/benchmark at the smallest sizes: what needs no published files runs to its end. No figure of time is
looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")

from tests.huggingface import save_byte_fallback, save_byte_level, save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A student's and a teacher's, with tokenizers that differ."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocab_size, save_tokenizer in (
        ("student", 320, save_byte_level),
        ("teacher", 340, save_byte_fallback),
    ):
        (folder / name).mkdir()
        save_model(folder / name, "llama", vocab_size=vocab_size)
        save_tokenizer(folder / name)
    return folder / "student", folder / "teacher"


def benchmark(name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark" / name), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_request_of_the_simulation_is_answered() -> None:
    sizes = ("--clients", "3", "--replicas", "2", "--samples", "2", "--tokens", "200", "--scale", "0.5")
    report = benchmark("fan_in.py", *sizes, "--bind", "ipc", "--steps", "even", "straggler")
    assert [step["step"] for step in report["steps"]] == ["even", "straggler"]
    for step in report["steps"]:
        assert step["requests"] == 6 and step["computed"] >= 1


def test_what_a_teachers_answers_cost(folders, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on {i} mats and " * 16 for i in range(8)))
    sizes = ("--samples", "2", "--words", "60", "--repeats", "1", "--steps", "4", "--text-file", str(text))
    student, teacher = map(str, folders)
    report = benchmark(
        "teacher.py", "--teacher-hf-checkpoint", teacher, "--student-hf-checkpoint", student, *sizes
    )
    assert report["labels"] > 0 and len(report["overlap"]) == 3


def test_memory_of_a_student(tmp_path) -> None:
    report = benchmark(
        "memory.py", "--hidden", "128", "--layers", "2", "3", "--tokens", "32", "--options", "none"
    )
    assert report["none"]["plan_gib"] > 0


def test_generation_beside_transformers(folders) -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "4", "--new-tokens", "4", "--repeats", "1")
    assert benchmark("generation.py", "--hf-checkpoint", str(folders[0]), *sizes)["same_tokens"] == 1


def test_the_loss_beside_plain_torch() -> None:
    report = benchmark("loss.py", "--labels", "8", "--vocab", "300", "--hidden", "16", "--repeats", "1")
    assert {"dense", "logits", "fused", "products"} <= report["variants"].keys()
