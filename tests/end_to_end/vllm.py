"""Runs of the launcher with a real vLLM server under the teacher; started by vllm.sh.

statistics     for qwen3 the front's results from vLLM's hidden states are those of our own teacher; for
               cohere, which models/ does not know, they are those of the same code from transformers' hidden
               states
training       20 steps of `paper` and of `bytes` from one run file, on stored rollouts: the metrics are those
               with our own teacher, and the engine is killed (-9) in the middle of the first
together       vLLM under the teacher and vLLM that samples, from one run file: 20 steps in which the training
               weights have sampled the responses
oversampling   vLLM's unfinished responses are carried over into the next step, through a kill (-9) of the
               student; the training weights confirm the log-probabilities of every piece
generating     log-probabilities of a prompt's tokens, own and likeliest, are those of our own teacher;
               tensors that it holds as they were sent are told from the others
wrong weights  a head of other weights is found before any student gets an answer
example        examples/engines/run.yaml on models of two steps: the student, then the launcher is killed
               (-9), none of its processes remains, and the same command continues from the checkpoint
faults         100 seeds of faults between front and engine (the stand-in's):
               tests/parallel/test_engine_teacher.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.options import flag_of
from megatron_simct.engine_client import EngineClient
from megatron_simct.models.tensor_files import INDEX
from megatron_simct.rollout.vllm_engine import digests_of, equal_digests
from megatron_simct.teacher.engine_front import PROBE_TEXT
from megatron_simct.teacher.engine_logprobs import rows_of, score
from megatron_simct.teacher.engine_pool import Asked
from tests.distributed import run_ranks
from tests.engines import teach
from tests.huggingface import save_byte_level, save_model
from tests.parallel.test_engine_teacher import by_megatron, front, make_requests, tensors_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
TOLERANCE = 1e-4
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config")
GENERATING = ("--enable-scale-out", "--generation-config", "vllm")
POOLER = '{"task": "token_embed", "use_activation": false}'
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""Heads of 64 numbers: vLLM's attention on a CPU supports no smaller ones than 32."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **WIDE},
    "qwen3": {"model_type": "qwen3", **WIDE, "head_dim": 64},
    "cohere": {"model_type": "cohere", **WIDE, "logit_scale": 0.25, "use_qk_norm": False},
}


def main() -> None:
    folder, python = Path(sys.argv[1]), sys.argv[2]
    tokenizer = None
    for name, fields in FAMILIES.items():
        save_model(folder / name, vocab_size=320, scale=0.05, **fields)
        save_byte_level(folder / name)
        tokenizer = tokenizer or load_tokenizer(str(folder / name))
    assert tokenizer is not None
    save_byte_level(folder / "student", vocab_size=400)
    num_ids = load_tokenizer(str(folder / "student")).table.num_ids
    save_model(folder / "student", "llama", vocab_size=num_ids, scale=0.05, **WIDE)
    teach(folder / "llama", np.array(tokenizer.encode(PROBE_TEXT.encode())), steps=60)
    rows = [{"prompt": f"Tom has {i} apples and gets 7 more. How many?"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    largest = {name: statistics(folder / name, python) for name in FAMILIES if name != "llama"}
    for interface in ("paper", "bytes"):
        largest[interface] = training(folder, python, interface, kill=interface == "paper")
    largest["log-probabilities of sampled tokens"] = together(folder, python)
    oversampling(folder, python)
    largest["log-probabilities of a prompt"] = generating(folder, python)
    wrong_weights(folder)
    example(folder / "checkout", python)
    faults()
    found = ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
    print(
        f"vllm: verified: the front's statistics and {STEPS} steps of two interfaces are those without an "
        f"engine to {TOLERANCE} ({found}), one of the runs with an engine that was killed; unfinished "
        "responses were carried over, through a kill of the student; a head of other weights was refused, "
        "a tensor that did not arrive was named, and the example went on after kill -9 of its student alone, "
        "and of its launcher"
    )


@contextmanager
def engine(folder: Path, python: str, port: int, *flags: str) -> Iterator[str]:
    """A server of the folder, for pooling unless other flags are given. Yields its
    address once it answers.
    """
    log = folder.with_suffix(".log").open("wb")
    process = subprocess.Popen(
        [python, *command_of(folder, port, *flags)],
        env=clean_environment() | ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,  # python -m looks for modules there first
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        client, deadline = EngineClient(address, timeout_s=30), time.monotonic() + 900
        while True:
            assert process.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the engine does not answer"
            try:
                client.served()
                break
            except RuntimeError:
                time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command_of(folder: Path, port: int, *flags: str) -> list[str]:
    """vLLM's server on one thread, in float32. flags: instead of those for pooling."""
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *(flags or (*POOLING, POOLER)),
    ]


def clean_environment() -> dict[str, str]:
    """The environment without the variables that point Python to this checkout: vLLM's environment
    has other versions.
    """
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def statistics(folder: Path, python: str) -> float:
    """The largest difference between the front's answers and the expected ones."""
    requests = make_requests()
    scorer, _, _ = front(folder)
    found = {}
    with engine(folder, python, 8170) as address:
        client = EngineClient(address, hidden_size=scorer.weight.shape[1])
        for request in requests:
            ids = np.concatenate([request.prompt_ids, request.label_ids])
            (scored,) = scorer.score([request], client.hidden_states(ids)[len(request.prompt_ids) - 1 : -1])
            found[scored.sample_id] = tensors_of(scored)
    if folder.name == "cohere":
        expected = by_transformers(folder, requests, scorer)
    else:
        (expected,) = run_ranks(1, by_megatron, folder, requests)
    gaps = [0.0]
    for sample_id, wanted in expected.items():
        assert found[sample_id].keys() == wanted.keys()
        for kind, value in wanted.items():
            finite = torch.isfinite(value)
            assert torch.equal(finite, torch.isfinite(found[sample_id][kind]))
            gaps.append(float((found[sample_id][kind] - value)[finite].abs().max()) if finite.any() else 0.0)
    print(f"{folder.name}: largest difference {max(gaps):.1e}", flush=True)
    assert max(gaps) < TOLERANCE
    return max(gaps)


def by_transformers(folder: Path, requests: list, scorer: Any) -> dict[int, dict[str, torch.Tensor]]:
    """The same code with transformers' hidden states."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    expected = {}
    for request in requests:
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, request.label_ids]).astype(np.int64))
        with torch.no_grad():
            hidden = model.get_decoder()(ids[None]).last_hidden_state[0]
        (scored,) = scorer.score([request], hidden[len(request.prompt_ids) - 1 : -1])
        expected[scored.sample_id] = tensors_of(scored)
    return expected


def training(folder: Path, python: str, interface: str, *, kill: bool) -> float:
    """The largest difference of a metric between a run with our own teacher and one with the engine."""
    options = options_of(folder, interface)
    teacher = {"teacher_hf_checkpoint": str(folder / "llama")}
    rollouts = str(folder / f"rollouts-{interface}")
    own = {"name": "student", "kind": "student"}
    own["options"] = options | teacher | {"save_debug_rollout_data": rollouts}
    launch(write(folder, f"own-{interface}", [own]))
    vllm = {
        "name": "vllm",
        "kind": "engine",
        "max_restarts": 1,
        "python": python,
        "command": command_of(folder / "llama", 8171),
        "env": ENVIRONMENT | {"PYTHONPATH": ""},
    }
    with_front = {"name": "teacher", "kind": "teacher", "engine": "vllm"}
    with_front["options"] = teacher | {"teacher_hidden_dtype": "fp32", "engine_timeout_s": 30}
    student = {"name": "student", "kind": "student"}
    student["options"] = options | {"load_debug_rollout_data": rollouts, "teacher_timeout_minutes": 20}
    student["options"]["distributed_timeout_minutes"] = 25
    path = write(folder, f"engine-{interface}", [vllm, with_front, student])
    killer = threading.Thread(target=kill_engine, args=(folder / f"engine-{interface}",)) if kill else None
    if killer is not None:
        killer.start()
    said = launch(path)
    if killer is not None:
        killer.join()
        assert "the job vllm ended with exit code 137; starting it again" in said, said[-3000:]
    wanted, found = (steps(folder / f"{name}-{interface}") for name in ("own", "engine"))
    assert len(wanted) == len(found) == STEPS
    assert wanted[0]["loss"] > 0.1 and wanted[0]["loss"] != wanted[-1]["loss"]
    gaps = []
    for ours, theirs in zip(found, wanted, strict=True):
        numbers = {
            n for n, v in theirs.items() if isinstance(v, float) and "second" not in n and "memory" not in n
        }
        gaps += [abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])) for name in numbers]
    print(f"{interface}: largest difference of a metric {max(gaps):.1e}", flush=True)
    assert max(gaps) < TOLERANCE
    return max(gaps)


def together(folder: Path, python: str) -> float:
    """The largest difference between the server's log-probabilities and the training
    weights', over the steps.
    """
    environment = ENVIRONMENT | {"PYTHONPATH": "", "VLLM_SERVER_DEV_MODE": "1"}
    pooling = {"name": "vllm", "kind": "engine", "python": python, "env": environment}
    pooling["command"] = command_of(folder / "llama", 8172)
    sampler = {"name": "sampler", "kind": "engine", "python": python, "env": environment}
    sampler["command"] = command_of(folder / "student", 8173, *GENERATING)
    teacher = {"name": "teacher", "kind": "teacher", "engine": "vllm"}
    teacher["options"] = {"teacher_hf_checkpoint": str(folder / "llama"), "teacher_hidden_dtype": "fp32"}
    student = {"name": "student", "kind": "student", "engine": "sampler"}
    student["options"] = options_of(folder, "bytes") | {
        "teacher_timeout_minutes": 20,
        "rollout_engine_timeout_minutes": 20,
        "distributed_timeout_minutes": 25,
        "rollout_logprob_bound": 1e-3,
    }
    launch(write(folder, "together", [student, teacher, pooling, sampler]))
    rows = steps(folder / "together")
    assert len(rows) == STEPS
    gap = max(row["rollout_logprob_difference_largest"] for row in rows)
    print(f"together: losses {[round(row['loss'], 3) for row in rows]}, largest gap {gap:.1e}", flush=True)
    assert gap < TOLERANCE
    return gap


def oversampling(folder: Path, python: str) -> None:
    """A student whose steps carry responses over is killed after its third step and started again."""
    run, rollouts = folder / "oversampling", folder / "rollouts-oversampling"
    student = deep_student(folder)
    with engine(student, python, 8174, *GENERATING, "--max-model-len", "1024") as address:
        options = options_of(folder, "bytes") | {
            "hf_checkpoint": student,
            **{"teacher_hf_checkpoint": folder / "llama", "run_dir": run / "student", "train_iters": 8},
            **{"rollout_max_response_len": 500, "rollout_oversample": 1.0, "micro_batch_size": 4},
            **{"rollout_importance_weights": 2.0, "rollout_logprob_bound": 1e-3, "rollout_batch_size": 4},
            **{"rollout_engine": "vllm", "rollout_engine_endpoint": address},
            **{"rollout_engine_timeout_minutes": 20, "distributed_timeout_minutes": 25},
            **{"save": run / "save", "load": run / "save", "save_interval": 1},
            **{"save_debug_rollout_data": rollouts},
        }
        flags = [word for key, value in options.items() for word in (flag_of(key), str(value))]
        command = [sys.executable, "-m", "megatron_simct.train", *flags]
        log = folder / "oversampling.log"
        with log.open("wb") as file:
            killed = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 900
        while len(steps(run)) < 3:
            assert killed.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout[-3000:]
    trained = {
        step: json.loads((rollouts / f"rollout_{step}.0.json").read_text()) for step in range(8)
    }  # a repeated step has replaced its file
    ids = [row["sample_id"] for rows in trained.values() for row in rows]
    state = json.loads((run / "save" / "iter_0000008" / "carried_over.json").read_text())
    left = [row["number"] for row in state["groups"]]
    assert len(ids) == 32 and sorted(ids + left) == list(range(state["next"]))
    carried = [row for step, rows in trained.items() for row in rows if row["weight_version"] < step]
    counts = [row["rollout_carried"] for row in steps(run)]
    lengths = [len(row["student_ids"]) for row in carried]
    print(f"oversampling: {counts} carried a step, their tokens {lengths}", flush=True)
    assert all(row["finish"] == "stop" or len(row["student_ids"]) == 500 for row in carried)
    whole = {row["sample_id"]: row["student_ids"] for rows in trained.values() for row in rows}
    pieces = [
        (row["student_ids"], whole[row["sample_id"]])
        for path in (run / "save").glob("iter_*/carried_over.json")
        for group in json.loads(path.read_text())["groups"]
        for row in group["rollouts"]
        if row["finish"] == "open" and row["sample_id"] in whole
    ]
    print(
        f"oversampling: {[(len(piece), len(ids)) for piece, ids in pieces]} tokens before, in all", flush=True
    )
    assert pieces and all(len(piece) < len(ids) and ids[: len(piece)] == piece for piece, ids in pieces)


def deep_student(folder: Path) -> Path:
    """A student of 16 layers after a few steps on random text in which a stop token is frequent.

    Its responses end after some sixty tokens, each at another length, so some are unfinished when a step
    closes. The other student would seldom stop before the limit of the length, and samples so fast that all
    responses are finished before the training has looked at the first.
    """
    deep = folder / "deep"
    save_byte_level(deep, vocab_size=400)
    table = load_tokenizer(str(deep)).table
    save_model(deep, "llama", vocab_size=table.num_ids, scale=0.05, num_hidden_layers=16, **WIDE)
    random = np.random.default_rng(1)
    ids = random.integers(0, table.num_ids, 240)
    ids[random.random(len(ids)) < 0.05] = table.stop_ids[0]
    teach(deep, ids, steps=6)
    return deep


def options_of(folder: Path, interface: str) -> dict[str, Any]:
    """Options of all runs of the student."""
    return {
        "hf_checkpoint": str(folder / "student"),
        "prompt_data": str(folder / "prompts.jsonl"),
        "simct_interface": interface,
        "rollout_batch_size": 8,
        "micro_batch_size": 8,
        "rollout_max_prompt_len": 64,
        "rollout_max_response_len": 16,
        "train_iters": STEPS,
        "lr": 1e-3,
        "adam_eps": 1e-4,
        "save_interval": 10,
    }


def write(folder: Path, name: str, jobs: list[dict[str, Any]]) -> Path:
    run = {"run_dir": str(folder / name), "jobs": jobs, "cluster": {"kind": "local"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def launch(path: Path) -> str:
    command = [sys.executable, "-m", "megatron_simct.launch", str(path)]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def steps(run: Path) -> list[dict[str, Any]]:
    path = run / "student" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def kill_engine(run: Path) -> None:
    """SIGKILL to vLLM's server after the third step."""
    deadline = time.monotonic() + 1200
    while len(steps(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "vllm.entrypoints.openai.api_server" in words and "8171" in words:
            process.kill()


def generating(folder: Path, python: str) -> float:
    """The largest difference between a server's and our own teacher's log-probabilities of prompts."""
    requests = [replace(r, byte_side=None, hidden=False) for r in make_requests()]
    requests = [
        replace(r, topk=5, token_ids=True) if r.sample_id % 2 else replace(r, topk=0) for r in requests
    ]
    (expected,) = run_ranks(1, by_megatron, folder / "llama", requests)
    gaps = [0.0]
    with engine(folder / "llama", python, 8174, *GENERATING) as address:
        client = EngineClient(address)
        for request in requests:
            for field in ("prompt_logprobs", "echo"):
                if request.topk and field == "echo":
                    continue
                ids = np.concatenate([request.prompt_ids, request.label_ids])
                asked = Asked(
                    ids=ids, begin=len(request.prompt_ids) - 1, work=SimpleNamespace(request=request)
                )
                (scored,) = score([request], [rows_of(client, asked, field=field)[asked.begin : -1]])
                found, wanted = tensors_of(scored), expected[request.sample_id]
                pairs = [(found["own_logit"], wanted["own_logit"] - wanted["lse"])]
                pairs += [(found["topk"], wanted["topk"])] if request.topk else []
                gaps += [float((a - b).abs().max()) for a, b in pairs if a.numel()]

        def as_sent(held: Path) -> set[str]:
            client.post(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(held)}}
            )
            checksums = client.post("/weight_checker", {"action": "checksum"})["checksums"]
            return equal_digests(checksums, digests_of(str(folder / "llama")))

        same = as_sent(folder / "llama")
        norm = "model.layers.1.input_layernorm.weight"
        assert {norm, "model.norm.weight", "model.embed_tokens.weight"} <= same, same
        other = shutil.copytree(folder / "llama", folder / "other")
        tensors = load_file(other / "model.safetensors")
        tensors[norm] *= 2
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        assert as_sent(other) == same - {norm}
        assert as_sent(folder / "llama") == same
    print(f"generating: largest difference {max(gaps):.1e}", flush=True)
    assert max(gaps) < TOLERANCE
    return max(gaps)


def example(checkout: Path, python: str) -> None:
    """The student of the shipped run file is killed after its third step, then the launcher after another
    two. The same command is given again after each kill.
    """
    checkout.mkdir()
    for name in ("megatron_simct", "tools", "examples"):
        (checkout / name).symlink_to(ROOT / name)
    models = checkout / "runs" / "engines" / "models"
    prepare = [sys.executable, "-m", "examples.engines.prepare", "--smoke", "--run-dir", str(models)]
    subprocess.run(prepare, check=True, timeout=900, stdout=subprocess.DEVNULL)
    (checkout / "runs" / "engines" / "vllm").symlink_to(Path(python).parents[1])
    tokenizer = load_tokenizer(str(models / "tokenizers" / "mistral_v3.model"))
    ids = tokenizer.encode((models / "probe.txt").read_bytes())
    teach(models / "teacher-hf", np.array([tokenizer.bos_id, *ids]), steps=30)
    (models / "teacher-hf" / INDEX).unlink()  # rows of the file that this one has replaced
    iterations = ("jobs.student.options.train_iters=8", "jobs.student.options.save_interval=2")
    command = [sys.executable, "-m", "megatron_simct.launch", "examples/engines/run.yaml", *iterations]
    run, log = checkout / "runs" / "engines" / "run", checkout / "log"
    for victim, after in (("student", 3), ("launcher", 5)):
        with log.open("ab") as file:
            launcher = subprocess.Popen(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 900
        while len(steps(run)) < after:
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        jobs = psutil.Process(launcher.pid).children(recursive=True)
        if victim == "launcher":
            launcher.kill()
        else:
            (student,) = (job for job in jobs if job.cmdline()[2:4] == ["-m", "megatron_simct.train"])
            student.kill()
        assert launcher.wait(timeout=300) != 0
        _, alive = psutil.wait_procs(jobs, timeout=60)
        assert not alive, f"what the launcher has started lives on: {alive}"
    assert "resuming" in log.read_text()
    done = subprocess.run(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout[-3000:]
    rows = steps(run)
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert all(row["rollout_logprob_difference_largest"] < TOLERANCE for row in rows), rows
    print("example: goes on after kill -9 of its student, and of its launcher", flush=True)


def faults() -> None:
    """Every sample is answered once, with its own answer."""
    test = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/parallel/test_engine_teacher.py",
    ]
    environment = os.environ | {"ENGINE_FAULT_SEEDS": "100", "PYTHONPATH": str(ROOT)}
    subprocess.run([*test, "-k", "faults_between"], check=True, timeout=600, cwd=ROOT, env=environment)


def wrong_weights(folder: Path) -> None:
    """A front whose folder has another head than the engine's ends before it answers."""
    from tests.engines import serve_folder

    wrong = shutil.copytree(folder / "llama", folder / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    with serve_folder(folder / "llama") as server:
        command = [
            sys.executable,
            "-m",
            "megatron_simct.serve_teacher",
            "--teacher-hf-checkpoint",
            str(wrong),
        ]
        command += ["--run-dir", str(folder / "w"), "--engine-endpoint", server.address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "the head is not this model's" in result.stderr, result.stderr


if __name__ == "__main__":
    main()
