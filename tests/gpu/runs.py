"""Whole runs as a user starts them, in separate processes on one device: training, a
resume, a teacher's job.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_simct.teacher.endpoints import endpoint_folder, read_endpoints
from tests.gpu.checks import Line
from tests.gpu.tables import GEMMA2_2B, QWEN2_7B, shapes_of
from tests.tiny import build_files, command_line


def _precision(device: torch.device) -> list[str]:
    return ["--bf16"] if device.type == "cuda" else []


def _train(argv: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "megatron_simct.train", *argv], check=True)


def _metrics(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def training(device: torch.device) -> list[Line]:
    """Tiny models: three steps, saved; then resumed to five.

    Returns losses, and the difference between sampled and trained log-probs.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        build_files(files)
        run_dir, save = files / "run", str(files / "save")
        for iterations in (3, 5):
            flags = [
                "--train-iters",
                str(iterations),
                "--lr-decay-style",
                "constant",
                "--run-dir",
                str(run_dir),
            ]
            _train(command_line(files, *flags, "--save", save, "--load", save, *_precision(device)))
        rows = _metrics(run_dir)
    lines = [Line(check="steps before and after a resume", value=abs(len(rows) - 5), limit=0)]
    lines.append(Line(check="loss of the last step", value=rows[-1]["loss"], unit="nats"))
    gap = max(row["rollout_logprob_gap"] for row in rows)
    limit = 0.2 if device.type == "cuda" else 1e-3
    return [*lines, Line(check="sampled log-probs against trained, largest gap", value=gap, limit=limit)]


def full_size(device: torch.device) -> list[Line]:
    """A teacher with random weights of Qwen2.5-7B's shapes and a student of Gemma-2-2B's, tokenizers of the
    tiny pair: seconds and memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        build_files(files)
        for side, config in (("student", GEMMA2_2B), ("teacher", QWEN2_7B)):
            (files / side / "config.json").write_text(json.dumps(shapes_of(config, device)))
        sizes = ("32", "512") if device.type == "cuda" else ("4", "8")
        flags = ["--train-iters", "3", "--run-dir", str(files / "run"), "--recompute-granularity", "full"]
        flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
        flags += [
            "--rollout-batch-size",
            sizes[0],
            "--rollout-max-response-len",
            sizes[1],
            "--micro-batch-size",
            "1",
        ]
        flags += ["--rollout-engine-batch-size", sizes[0], "--lr", "1e-6", *_precision(device)]
        _train(command_line(files, *flags))
        last = _metrics(files / "run")[-1]
    names = [name for name in last if name.startswith("seconds") or "memory" in name]
    return [
        Line(check=name, value=last[name], unit="s" if name.startswith("seconds") else "GiB")
        for name in names
    ]


def teacher_job(device: torch.device) -> list[Line]:
    """A teacher's job and a student's: two processes on one device, and an encrypted socket between them."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        build_files(files)
        base = command_line(files, *_precision(device))
        shared = ["--seed", "5"]
        run_dir = files / "run"
        colocated = files / "weights"
        _train(
            [
                *base,
                *shared,
                "--train-iters",
                "1",
                "--run-dir",
                str(files / "first"),
                "--save",
                str(colocated),
            ]
        )
        serve = [sys.executable, "-m", "megatron_simct.serve_teacher", "--run-dir", str(run_dir)]
        serve += ["--bind", "tcp://127.0.0.1", "--teacher-hf-checkpoint", str(files / "student")]
        serve += ["--teacher-pretrained-checkpoint", str(colocated)]
        serve += ["--teacher-tokenizer-model", str(files / "student.model")]
        serve += ["--teacher-make-vocab-size-divisible-by", "8", *_precision(device)]
        teacher = subprocess.Popen(serve)
        try:
            while not read_endpoints(endpoint_folder(str(run_dir))):
                if teacher.poll() is not None:
                    raise RuntimeError(f"the teacher's job ended with code {teacher.returncode}")
                time.sleep(0.2)
            student = [*base, "--teacher-hf-checkpoint", str(files / "student")]
            student += ["--teacher-tokenizer-model", str(files / "student.model")]
            student += [
                "--teacher-pretrained-checkpoint",
                str(colocated),
                "--teacher-make-vocab-size-divisible-by",
                "8",
            ]
            _train(
                [
                    *student,
                    "--train-iters",
                    "3",
                    "--teacher-endpoint",
                    str(run_dir),
                    "--run-dir",
                    str(run_dir),
                ]
            )
            teacher.send_signal(signal.SIGTERM)
            code = teacher.wait(30)
        finally:
            if teacher.poll() is None:
                os.kill(teacher.pid, signal.SIGKILL)
                teacher.wait()
        steps = len(_metrics(run_dir))
    return [
        Line(check="steps missing of three", value=3 - steps, limit=0),
        Line(check="exit code of the teacher told to stop", value=code, limit=0),
    ]
