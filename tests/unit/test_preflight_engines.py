"""Findings of the pre-flight about inference engines and their fronts."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.quickstart.run import ARCHITECTURE
from examples.quickstart.task import write_task
from examples.quickstart.tokenizer_files import sides
from megatron_simct.config.run_file import read_run_file
from megatron_simct.preflight.check import check_run
from tests.preflight import build_pair, edit_json, write_run

ROOT = Path(__file__).parents[2]
Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def folder(tmp_path) -> Path:
    build_pair(tmp_path)
    return tmp_path


def with_engine(change: Change | None = None) -> Change:
    """The run as a list of jobs on this machine, with an engine under the teacher."""

    def listed(run: dict[str, Any], folder: Path) -> None:
        student, teacher = run.pop("student"), run.pop("teacher")
        run["cluster"] = {"kind": "local", "device_memory_gib": 80.0}
        del student["bf16"], student["tensor_model_parallel_size"]
        options = {"teacher_hf_checkpoint": teacher["teacher_hf_checkpoint"]}
        command = ["-m", "engine", "--model", str(folder / "teacher"), "--port", str(unused_port())]
        run["jobs"] = [
            {"name": "student", "kind": "student", "options": student},
            {"name": "front", "kind": "teacher", "engine": "vllm", "options": options},
            {"name": "vllm", "kind": "engine", "python": sys.executable, "command": command},
        ]
        head = {"lm_head.weight": np.zeros((400, 64), np.float32)}
        save_file(head, folder / "teacher" / "model.safetensors")
        if change is not None:
            change(run, folder)

    return listed


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def engine(**changes: Any) -> Change:
    return lambda run, _: run["jobs"][2].update(changes)


def command_with(*words: str) -> Change:
    """These words come first: of a repeated option the first is read."""
    return lambda run, _: run["jobs"][2].update(command=[*words, *run["jobs"][2]["command"]])


def heavy(run: dict[str, Any], folder: Path) -> None:
    with (folder / "teacher" / "model-2.safetensors").open("wb") as file:
        file.truncate(300 << 30)  # a sparse file, which takes no room on the disk


def heavy_on_few(run: dict[str, Any], folder: Path) -> None:
    heavy(run, folder)
    engine(gpus_per_node=2)(run, folder)
    command_with("--tensor-parallel-size", "4")(run, folder)


def of_the_student(run: dict[str, Any], folder: Path) -> None:
    command_with("--model", str(folder / "student"))(run, folder)


ENGINES = {
    "nothing": (None, None, ()),
    "no environment": (engine(python=None), "environment", ("jobs.vllm.python is missing",)),
    "no such environment": (
        engine(python="/nowhere/bin/python"),
        "environment",
        ("/nowhere/bin/python: no such program",),
    ),
    "another folder": (of_the_student, "folder", ("is not the model that front expects",)),
    "no folder": (command_with("--model=/nowhere"), "folder", ("/nowhere: no config.json there",)),
    "memory": (heavy, "memory", ("300.0 GiB of weights over 1 ranks", "raise --tensor-parallel-size")),
    "ranks": (heavy_on_few, "processes", ("uses 4 GPUs, but gpus_per_node is 2",)),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_cannot_work_is_found(name, folder) -> None:
    change, check, words = ENGINES[name]
    report = check_run(read_run_file(str(write_run(folder, with_engine(change)))))
    found = [f for f in report.findings if f.level == "fail" and f.side == "vllm"]
    assert [f.check for f in found] == ([] if check is None else [check]), found
    assert all(word in f.message for word, f in zip(words, [*found, *found], strict=False))
    assert "front" not in report.plans, "the engine has the layers"
    assert not any(f.level == "fail" for f in report.findings if f.side != "vllm")


def test_a_port_in_use_and_an_engine_for_nobody_are_found(folder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        change = command_with("--port", str(taken.getsockname()[1]))
        report = check_run(read_run_file(str(write_run(folder, with_engine(change)))))
    (found,) = [f for f in report.findings if f.level == "fail"]
    assert found.check == "port" and "in use on this machine" in found.message
    alone = with_engine(lambda run, _: run["jobs"][1].pop("engine"))
    findings = check_run(read_run_file(str(write_run(folder, alone)))).findings
    assert any(f.level == "warn" and "no job uses this engine" in f.message for f in findings)


@pytest.mark.parametrize(
    "interface, more, words",
    [
        ({"simct_interface": "alm"}, {}, None),
        ({"simct_interface": "topk_kl", "simct_teacher_topk": 20}, {}, None),
        ({"simct_interface": "topk_kl", "simct_teacher_topk": 50}, {}, "returns 20: add --max-logprobs"),
        ({"simct_interface": "topk_kl", "simct_teacher_topk": 50}, {"max_logprobs": "64"}, None),
        (
            {"simct_interface": "topk_kl", "simct_teacher_topk": 5},
            {"engine_answers": "echo"},
            "but not --simct-interface topk_kl",
        ),
        ({"simct_interface": "bytes"}, {}, "but not --simct-interface bytes"),
    ],
)
def test_what_a_server_that_generates_can_teach(folder, interface, more, words) -> None:
    def change(run, _) -> None:
        run["jobs"][0]["options"] |= interface
        run["jobs"][1]["options"]["engine_answers"] = more.get("engine_answers", "prompt_logprobs")
        if "max_logprobs" in more:
            run["jobs"][2]["command"] += ["--max-logprobs", more["max_logprobs"]]

    findings = check_run(read_run_file(str(write_run(folder, with_engine(change))))).findings
    found = [f for f in findings if f.side == "front" and f.check == "interface"]
    assert [f.level for f in found] == (["pass"] if words is None else ["fail"]), findings
    assert "alm" in found[0].message if words is None else words in found[0].message, found


@pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: pip install --no-deps -r examples/quickstart/requirements.txt",
)
def test_the_shipped_run_file_passes(tmp_path, monkeypatch) -> None:
    """With the files that its prepare.sh makes, except the weights."""
    models = tmp_path / "runs" / "engines" / "models"
    teacher, student = sides("digits-agree", "teacher-groups", models / "tokenizers")
    write_task(models)
    for name, side in (("teacher", teacher), ("student", student)):
        folder = models / f"{name}-hf"
        folder.mkdir()
        fields = ARCHITECTURE | {"num_attention_heads": 3, "vocab_size": side.vocab_size}
        (folder / "config.json").write_text(json.dumps(fields))
        rows = np.zeros((side.vocab_size, ARCHITECTURE["hidden_size"]), np.float16)
        save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    python = [f"jobs.{name}.python={sys.executable}" for name in ("scorer", "sampler")]
    monkeypatch.chdir(tmp_path)
    run = read_run_file(str(ROOT / "examples" / "engines" / "run.yaml"), python)
    found = [f for f in check_run(run).findings if f.level != "pass"]
    assert [f for f in found if f.check != "port"] == [], "its ports may be in use: it may be running"
    (sampler,) = [job for job in run.of_kind("engine") if job.name == "sampler"]
    assert f"http://127.0.0.1:{sampler.port}" in run.config.rollout.rollout_engine_endpoint


def test_an_engine_serves_a_family_that_is_not_known(folder) -> None:
    edit_json(folder / "teacher" / "config.json", model_type="cohere", logit_scale=0.5)
    report = check_run(read_run_file(str(write_run(folder, with_engine()))))
    assert not report.failed
    assert any(f.side == "front" and "LM head lm_head.weight" in f.message for f in report.findings)
    assert check_run(read_run_file(str(write_run(folder)))).failed
