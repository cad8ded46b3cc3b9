"""tools/benchmark/loss.py: its plain-torch loss is the same loss, and it prints the table."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.public_loss import from_logits

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark" / "loss.py"


def test_small_run_reports_every_variant() -> None:
    sizes = ["--labels", "24", "--vocab", "64", "--hidden", "8", "--repeats", "1", "--threads", "1"]
    ran = subprocess.run([sys.executable, TOOL, *sizes, "--json"], capture_output=True, text=True, check=True)
    rows = json.loads(ran.stdout)["variants"]
    assert set(rows) == {"dense", "logits", "fused", "products"}
    assert all(row["seconds"] > 0 and row["extra_mib"] >= 0 for row in rows.values())


def test_sizes_by_commas_are_all_combinations() -> None:
    tool = runpy.run_path(str(TOOL))
    flags = ["--labels", "20,24", "--vocab", "512,640", "--tensor-model-parallel-size", "1,2"]
    found = tool["sizes"](tool["parse"](flags))
    assert [(one.tensor_model_parallel_size, one.labels, one.vocab) for one in found] == [
        (tp, labels, vocab) for tp in (1, 2) for labels in (20, 24) for vocab in (512, 640)
    ]
    assert all(one.teacher_vocab == one.vocab and one.shared == int(0.7 * one.vocab) for one in found)
    assert [("dense" in one.variants) for one in found] == [True] * 4 + [False] * 4


def sent(rank: int, world_size: int, variant: str) -> dict[str, int]:
    tool = runpy.run_path(str(TOOL))
    flags = [
        "--labels",
        "20",
        "--vocab",
        "512",
        "--hidden",
        "8",
        "--tensor-model-parallel-size",
        str(world_size),
    ]
    (args,) = tool["sizes"](tool["parse"](flags))
    call, _ = tool["build"](args, variant, rank, dist.group.WORLD)
    with tool["count_bytes"]() as counted:
        call()
    return counted


def test_what_crosses_ranks_is_counted_by_kind() -> None:
    found = {variant: run_ranks(2, sent, variant)[0] for variant in ("fused", "bytes", "logits")}
    for variant in ("fused", "bytes"):
        assert found[variant]["states"] == 20 * 8 * 4  # the gradient of the hidden states
        assert found[variant]["rows"] == 0
    # For a label one maximum and two sums of either model; for a row up to five numbers more.
    assert 24 <= found["fused"]["statistics"] / 20 <= 64 < found["bytes"]["statistics"] / 20
    assert found["logits"]["states"] == 0 and found["logits"]["rows"] > 0


def test_dense_variant_is_the_same_loss() -> None:
    dense_paper = runpy.run_path(str(TOOL))["dense_paper"]
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 9, generator=generator), torch.randn(4, 11, generator=generator)
    sample = {
        "segments": torch.tensor([[0, 1, 0, 1], [1, 3, 1, 3], [3, 4, 3, 4]]),
        "student_labels": torch.tensor([2, 0, 1, 5]),
        "teacher_labels": torch.tensor([3, 9, 8, 6]),
        "shared_student_ids": torch.tensor([2, 4, 5, 7]),
        "shared_teacher_ids": torch.tensor([3, 4, 6, 1]),
    }
    expected = float(from_logits(student, teacher, **sample).loss)
    assert float(dense_paper(student, teacher, sample)) == pytest.approx(expected, rel=1e-5)
