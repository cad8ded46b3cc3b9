"""The teacher's command as a user starts it, on a Hugging Face folder, and a student that trains with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_simct import serve_teacher
from megatron_simct.models.head import load_head_rows, read_head
from megatron_simct.serve_teacher import main
from megatron_simct.teacher.endpoints import read_endpoints
from tests.distributed import run_ranks
from tests.huggingface import save_byte_fallback, save_byte_level, save_model
from tests.runs import metrics, run

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A student folder of qwen2, and a teacher folder of gemma2 (soft-caps, tied
    embeddings) in many files.
    """
    root = tmp_path_factory.mktemp("folders")
    save_model(root / "student", "qwen2", tie_word_embeddings=True, vocab_size=333, scale=0.1)
    save_byte_level(root / "student")
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
    save_model(
        root / "teacher", "gemma2", vocab_size=340, hidden_size=48, scale=0.1, shard_size="30KB", **gemma
    )
    save_byte_fallback(root / "teacher")
    rows = [{"prompt": f"Tom has {i} apples and gets {i % 7} more. How many?"} for i in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def student(files: Path, folder: Path, *flags: str) -> list[str]:
    return [
        *("--hf-checkpoint", str(files / "student"), "--teacher-hf-checkpoint", str(files / "teacher")),
        *("--prompt-data", str(files / "prompts.jsonl"), "--train-iters", "2", "--rollout-batch-size", "8"),
        *(
            "--micro-batch-size",
            "2",
            "--rollout-max-response-len",
            "12",
            "--make-vocab-size-divisible-by",
            "8",
        ),
        *("--teacher-make-vocab-size-divisible-by", "8", "--lr", "1e-3", "--lr-warmup-fraction", "0"),
        *("--run-dir", str(folder / "run"), *flags),
    ]


def test_torchrun_serves_a_folder_and_sigterm_ends_it(files, tmp_path) -> None:
    """A student on two ranks reads from the folder only the rows that it shares, and trains as with
    a colocated teacher.
    """
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_simct.serve_teacher", "--teacher-hf-checkpoint", str(files / "teacher")),
        *("--run-dir", str(tmp_path), "--tensor-model-parallel-size", "2", "--teacher-hidden-dtype", "fp32"),
        *("--teacher-make-vocab-size-divisible-by", "8"),
    ]
    teacher = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 150
        while not read_endpoints(tmp_path / "teacher"):
            assert teacher.poll() is None and time.monotonic() < deadline, "the teacher did not start"
            time.sleep(0.2)
        tp = ("--tensor-model-parallel-size", "2")
        remote = student(files, tmp_path / "remote", *tp, "--teacher-endpoint", str(tmp_path))
        for argv in (remote, student(files, tmp_path / "colocated", *tp)):
            for code, _, err in run_ranks(2, run, argv):
                assert code == 0, err
        ours, wanted = metrics(tmp_path / "remote"), metrics(tmp_path / "colocated")
        assert len(wanted) == 2 and wanted[0]["loss"] > 0.01
        for found, expected in zip(ours, wanted, strict=True):
            assert found.pop("kind") == expected.pop("kind")
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        (endpoint,) = read_endpoints(tmp_path / "teacher").values()
        status = json.loads((tmp_path / "teacher" / f"{endpoint.replica}.status").read_text())
        assert (
            status["requests"] == 16
            and status["queue"] == status["malformed"] == 0
            and status["memory_mib"] > 50
        )
        os.kill(endpoint.pid, signal.SIGTERM)  # one rank of its replica is enough: it tells the other
        out, _ = teacher.communicate(timeout=60)
        assert teacher.returncode == 0, out
        assert " teacher replica 0 stops: 16 requests, " in out
        assert not read_endpoints(tmp_path / "teacher") and not list((tmp_path / "teacher").glob("*.status"))
    finally:
        if teacher.poll() is None:  # torchrun's workers are in their own sessions: torchrun ends them itself
            teacher.terminate()
            teacher.wait(60)


@pytest.mark.parametrize("side, name", [("teacher", "model.embed_tokens.weight"), ("student", None)])
def test_rows_of_the_head_are_those_of_the_folder(files, side, name) -> None:
    tensors = {k: v for file in (files / side).glob("*.safetensors") for k, v in load_file(file).items()}
    whole = tensors[name or "model.embed_tokens.weight"]
    folder = str(files / side)
    ids = np.random.default_rng(0).permutation(len(whole))[:50]
    for wanted in (ids, np.arange(7, 19), ids[:0], np.array([len(whole) - 1, 0, 1, 1])):
        rows = load_head_rows(read_head(folder, flag="--x"), folder, wanted, dtype=torch.float32, flag="--x")
        assert torch.equal(rows, whole[torch.from_numpy(wanted)])


@pytest.mark.parametrize(
    "more, code, words",
    [
        (["--teacher-hf-checkpoint", "/nowhere"], 1, ["missing --teacher-tokenizer-model"]),
        (["--run-dir"], 2, ["--run-dir"]),
        (["--bind", "tcp://*"], 1, ["--bind tcp://*", "tcp://HOST"]),
        (["--bind", "tcp://256.1.1.1"], 1, ["--bind tcp://256.1.1.1"]),
        (["--bind", "tcp://127.0.0.1:99999"], 1, ["--bind tcp://127.0.0.1:99999"]),
        (["--bind", "tcp://127.0.0.1:TAKEN"], 1, ["--bind tcp://127.0.0.1:", "in use"]),
        (
            ["--simct-alignment-map", "/nowhere"],
            1,
            ["--simct-alignment-map: ", "/nowhere", "there is no map.json"],
        ),
        (["--max-tokens-per-batch", "0"], 1, ["--max-tokens-per-batch 0"]),
        (["--lr", "1"], 2, ["unknown flag --lr"]),
        (["--num-layers", "1"], 2, ["--num-layers", "Megatron-LM"]),
        (["--tensor-model-parallel-size", "2"], 1, ["world size (1)", "--tensor-model-parallel-size (2)"]),
    ],
)
def test_wrong_input_is_one_line_that_names_the_flag_before_the_model_is_loaded(
    files, tmp_path, more, code, words
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        more = [value.replace("TAKEN", str(taken.getsockname()[1])) for value in more]
        argv = ["--teacher-hf-checkpoint", str(files / "teacher"), "--run-dir", str(tmp_path), *more]
        ((found, err),) = run_ranks(1, _main, argv)
    assert found == code and err.count("\n") == 1, err
    prefix = (
        "megatron_simct.serve_teacher: error: "
        if code == 1
        else "python -m megatron_simct.serve_teacher: error: "
    )
    assert err.startswith(prefix)
    for word in words:
        assert word in err


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    def load(*_, **__) -> None:
        raise AssertionError("the model was loaded first")

    serve_teacher.open_model = load
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = exit_.code
    return code, err.getvalue()


def test_a_folder_without_weights_is_no_teacher(tiny, tmp_path) -> None:
    argv = ["--teacher-hf-checkpoint", str(tiny / "teacher"), "--run-dir", str(tmp_path)]
    ((code, err),) = run_ranks(1, _main, [*argv, "--teacher-tokenizer-model", str(tiny / "teacher.tiktoken")])
    assert code == 1 and "has no weights, but a teacher needs them" in err and err.count("\n") == 1
