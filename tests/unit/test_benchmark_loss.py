"""tools/benchmark/loss.py: its plain-torch loss is the same loss, and the table comes out."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_simct.losses import cross_tokenizer_loss

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark" / "loss.py"


def test_small_run_reports_every_variant():
    sizes = ["--labels", "24", "--vocab", "64", "--hidden", "8", "--repeats", "1", "--threads", "1"]
    ran = subprocess.run([sys.executable, TOOL, *sizes, "--json"], capture_output=True, text=True, check=True)
    rows = json.loads(ran.stdout)["variants"]
    assert set(rows) == {"dense", "logits", "fused", "products"}
    assert all(row["seconds"] > 0 and row["extra_mib"] >= 0 for row in rows.values())


def test_several_sizes_are_one_object_a_line_and_bytes_between_ranks_are_counted():
    sizes = ["--labels", "20", "--vocab", "512,640", "--hidden", "8", "--repeats", "1", "--threads", "1"]
    sizes += ["--tensor-model-parallel-size", "2", "--variants", "fused,bytes"]
    ran = subprocess.run([sys.executable, TOOL, *sizes, "--json"], capture_output=True, text=True, check=True)
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [report["vocab"] for report in reports] == [512, 640]
    for report in reports:
        fused = report["variants"]["fused"]["sent_bytes_per_label"]
        # Of a label: one maximum, two sums and the teacher's three; of a row: three more maxima and three sums at most.
        assert 24 <= fused["statistics"] <= 64 and fused["rows"] == 0
        assert fused["states"] == 8 * 4  # the gradient of the hidden states
        assert report["variants"]["bytes"]["sent_bytes_per_label"]["statistics"] > 64


def test_dense_variant_is_the_same_loss():
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
    expected = float(cross_tokenizer_loss(student, teacher, **sample).loss)
    assert float(dense_paper(student, teacher, sample)) == pytest.approx(expected, rel=1e-5)
