"""A teacher whose layers run in an inference engine answers as our own does, and detects a wrong engine.

The engine is a server with transformers' hidden states, or one without a model that misbehaves by a seed.
tests/end_to_end/vllm.sh uses the real vLLM.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.flags import SERVE_TEACHER, parse_config
from megatron_simct.config.options import TeacherConfig
from megatron_simct.engine_client import EngineClient, EngineRefusal
from megatron_simct.loading import build_byte_order, open_model, open_tokenizer
from megatron_simct.losses import ByteOrder
from megatron_simct.models.head import read_head
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.serve_teacher import main as serve_main
from megatron_simct.teacher.endpoints import endpoint_folder, read_endpoints
from megatron_simct.teacher.engine_front import PROBE_TEXT, Probe, by_head, nothing, open_head, serve_engine
from megatron_simct.teacher.engine_logprobs import LogprobProbe, refusal, rows_of
from megatron_simct.teacher.engine_logprobs import score as score_of_logprobs
from megatron_simct.teacher.engine_pool import Asked, EnginePool, hidden_states
from megatron_simct.teacher.forward import LabelScorer, TeacherForward, TeacherRequest
from megatron_simct.teacher.service import ReplicaServer
from tests.distributed import run_ranks
from tests.engines import EngineServer, serve_folder, teach
from tests.huggingface import save_byte_level, save_model
from tests.runs import metrics, run
from tests.teacher_jobs import FINGERPRINTS, HIDDEN, VOCAB, collect, make_request, open_client

FOLDERS = {
    "llama": {"model_type": "llama"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.5, "tie_word_embeddings": True, "scale": 0.5},
}
"""The last is of a family that models/ does not know: its logits are scaled, and its norm is a LayerNorm."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    for name, fields in FOLDERS.items():
        save_model(root / name, **{"scale": 0.2, **fields}, vocab_size=320)
        save_byte_level(root / name)
    tokenizer = open_tokenizer(parse(root / "llama").teacher, prefix="teacher-")
    for name in ("llama", "cohere"):
        teach(root / name, np.array(tokenizer.encode(PROBE_TEXT.encode())))
    return {name: root / name for name in FOLDERS}


def parse(folder: Path, *flags: str) -> TeacherConfig:
    argv = [
        "--teacher-hf-checkpoint",
        str(folder),
        "--run-dir",
        "x",
        "--teacher-hidden-dtype",
        "fp32",
        *flags,
    ]
    return parse_config(argv, SERVE_TEACHER)


def front(folder: Path, *flags: str) -> tuple[LabelScorer, Probe, Tokenizer]:
    config = parse(folder, *flags)
    tokenizer = open_tokenizer(config.teacher, prefix="teacher-")
    head, scorer, norm = open_head(config, tokenizer, torch.device("cpu"))
    return scorer, Probe(head, scorer, tokenizer, norm=norm, where=str(folder)), tokenizer


def make_requests(count: int = 16) -> list[TeacherRequest]:
    """Requests for hidden rows or sums of bytes, at random; every fourth asks for the likeliest tokens."""
    rng = np.random.default_rng(3)
    requests = [make_request(rng, sample_id) for sample_id in range(count)]
    return [
        TeacherRequest(
            **{f: getattr(r, f) for f in r.__slots__} | {"topk": 5, "token_ids": True, "hidden": False}
        )
        if r.sample_id % 4 == 0 and r.byte_side is None
        else r
        for r in requests
    ]


def by_engine(folder: Path, requests: list[TeacherRequest]) -> dict[int, dict[str, torch.Tensor]]:
    scorer, _, _ = front(folder)
    answers = {}
    with serve_folder(folder) as server:
        client = EngineClient(server.address, hidden_size=scorer.weight.shape[1])
        for request in requests:
            ids = np.concatenate([request.prompt_ids, request.label_ids])
            hidden = client.hidden_states(ids)[len(request.prompt_ids) - 1 : -1]
            (scored,) = scorer.score([request], hidden)
            answers[scored.sample_id] = tensors_of(scored)
    return answers


def by_megatron(rank: int, world_size: int, folder: Path, requests: list[TeacherRequest]) -> dict[int, Any]:
    config = parse(folder)
    with process_groups(config.parallel, seed=1) as groups:
        tokenizer = open_tokenizer(config.teacher, prefix="teacher-")
        model = open_model(
            config.teacher, config.parallel, groups, tokenizer, prefix="teacher-", bf16=False, longest=64
        )
        order = build_byte_order(model, groups, tokenizer)
        forward = TeacherForward(
            model, groups, vocab_size=tokenizer.table.num_ids, byte_order=order, hidden_dtype="fp32"
        )
        return {s.sample_id: tensors_of(s) for request in requests for s in forward.run([[request]])}


def tensors_of(scored) -> dict[str, torch.Tensor]:
    named = {
        name: getattr(scored, name)
        for name in ("own_logit", "lse", "hidden", "topk", "topk_ids", "byte_logprobs")
    }
    return {name: value.clone() for name, value in named.items() if value is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_same_statistics_as_our_own_teacher(folders, name) -> None:
    requests = make_requests()
    (expected,) = run_ranks(1, by_megatron, folders[name], requests)
    found = by_engine(folders[name], requests)
    kinds = set()
    for sample_id, wanted in expected.items():
        assert found[sample_id].keys() == wanted.keys()
        kinds |= wanted.keys()
        for kind, value in wanted.items():
            assert torch.allclose(found[sample_id][kind], value, rtol=0, atol=1e-4), (sample_id, kind)
    assert kinds == {"own_logit", "lse", "hidden", "topk", "topk_ids", "byte_logprobs"}


def test_a_family_that_models_does_not_know(folders) -> None:
    """Its log-probabilities are those of transformers' logits in float64, scale and all."""
    import transformers

    requests = make_requests()
    found = by_engine(folders["cohere"], requests)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folders["cohere"]), dtype=torch.float64
    ).eval()
    for request in requests:
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, request.label_ids]).astype(np.int64))
        with torch.no_grad():
            rows = model(ids[None]).logits[0].log_softmax(dim=-1)[len(request.prompt_ids) - 1 : -1]
        own = rows.gather(1, torch.from_numpy(request.label_ids.astype(np.int64))[:, None])[:, 0]
        answer = found[request.sample_id]
        assert torch.allclose((answer["own_logit"] - answer["lse"]).double(), own, rtol=0, atol=1e-4)
        if request.topk:
            likeliest = rows[torch.from_numpy(request.rows.astype(np.int64))].topk(5).values
            assert torch.allclose(answer["topk"].double(), likeliest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field", ["prompt_logprobs", "echo"])
def test_log_probabilities_of_a_server_that_generates(folders, field) -> None:
    """Own log-probabilities are those of our own teacher, and so are the likeliest tokens if
    the answers have ids.
    """
    requests = [replace(r, byte_side=None, hidden=False) for r in make_requests()]
    requests = [
        replace(r, topk=5, token_ids=True) if r.sample_id % 2 else replace(r, topk=0) for r in requests
    ]
    (expected,) = run_ranks(1, by_megatron, folders["llama"], requests)
    with serve_folder(folders["llama"]) as server:
        client = EngineClient(server.address)
        for request in requests:
            if field == "echo" and request.topk:
                reason = refusal(request, field=field)
                assert reason is not None and "--engine-answers echo" in reason
                continue
            assert refusal(request, field=field) is None
            asked = Asked(
                ids=np.concatenate([request.prompt_ids, request.label_ids]),
                begin=len(request.prompt_ids) - 1,
                work=SimpleNamespace(request=request),
            )
            (scored,) = score_of_logprobs([request], [rows_of(client, asked, field=field)[asked.begin : -1]])
            found, wanted = tensors_of(scored), expected[request.sample_id]
            nats = wanted["own_logit"] - wanted["lse"]
            assert torch.allclose(found["own_logit"] - found["lse"], nats, rtol=0, atol=1e-4)
            if request.topk:
                assert torch.allclose(found["topk"], wanted["topk"], rtol=0, atol=1e-4)
                assert torch.equal(found["topk_ids"].long(), wanted["topk_ids"].long())
    assert refusal(replace(requests[0], hidden=True), field="prompt_logprobs")


def _fields(folder: Path, **changes) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("llama", {"dim_model_base": 256}, "dim_model_base 256 may change the logits"),
        ("llama", {"logits_soft_cap": 30.0}, "logits_soft_cap 30.0 may change the logits"),
        ("llama", {"hidden_size": None}, "has none of the fields hidden_size"),
        ("llama", {"hidden_size": 16}, "0 tensors of 16 columns may be the LM head"),
        ("cohere", {"tie_word_embeddings": False}, "0 tensors of 32 columns may be the LM head (none)"),
        ("cohere", {"logit_scale": -1}, "logit_scale: expected a number above 0"),
    ],
)
def test_what_a_head_may_not_have(folders, tmp_path, name, changes, words) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "changed")
    _fields(folder, **changes)
    with pytest.raises(ValueError, match=r"--x .*changed") as error:
        read_head(str(folder), flag="--x")
    assert words in str(error.value)


def test_a_default_that_config_json_leaves_out_and_a_nested_folder(folders, tmp_path) -> None:
    folder = shutil.copytree(folders["gemma2"], tmp_path / "changed")
    _fields(folder, final_logit_softcapping=None)
    # we do not read this format, but the head is not quantised
    _fields(folder, quantization_config={"quant_method": "awq"})
    assert read_head(str(folder), flag="").final_logit_softcap == 30.0
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": fields}))
    assert read_head(str(folder), flag="").hidden_size == 32


def test_the_probe_knows_a_wrong_head_and_a_wrong_engine(folders, tmp_path) -> None:
    scorer, probe, tokenizer = front(folders["llama"])
    with serve_folder(folders["llama"]) as server:
        client = EngineClient(server.address, hidden_size=32)
        probe(client)
        assert (
            probe.served is not None and probe.served.root == str(folders["llama"]) and probe.mean_nats > -1
        )
        assert probe.compare(client, client) < 1e-4

        def probed(where: Path, **more) -> str:
            _, other, _ = front(where, **more)
            with pytest.raises((ValueError, EngineRefusal)) as error:
                other(client)
            return str(error.value)

        from safetensors.torch import load_file, save_file

        for change, words in {
            "head": "nats a token under the head",
            "norm": "do not come out of the norm model.norm.weight",
        }.items():
            folder = shutil.copytree(folders["llama"], tmp_path / change)
            tensors = load_file(folder / "model.safetensors")
            if change == "head":
                tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
            else:
                tensors["model.norm.weight"] *= 1.2
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            assert words in probed(folder)
        # The head of a later checkpoint is similar enough to pass, but the generating server
        # computes other numbers.
        folder = shutil.copytree(folders["llama"], tmp_path / "later")
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] *= 0.7
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _, later, _ = front(folder)
        later(client)
        with pytest.raises(ValueError, match="--engine-check-endpoint .* are not the same"):
            later.compare(client, client)

        # An engine that begins to serve another model gets no more requests.
        good = server.hidden_states
        server.hidden_states = lambda ids: good(np.roll(ids, 1))
        with pytest.raises(ValueError, match="must serve the same model|under a shuffled one"):
            probe(client)
        server.hidden_states = lambda ids: 1e6 * good(ids)
        with pytest.raises(
            EngineRefusal, match="--engine-hidden-dtype float16: a hidden state is beyond 65504"
        ):
            EngineClient(server.address, hidden_size=32, dtype="float16").hidden_states(probe.ids)
        with pytest.raises(EngineRefusal, match=r"hidden states of \[32\] numbers, but config.json says 48"):
            EngineClient(server.address, hidden_size=48).hidden_states(probe.ids)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--engine-timeout-s", "5"], "--engine-endpoint is missing"),
        (
            ["--engine-endpoint", "http://h:1", "--tensor-model-parallel-size", "2"],
            "loads only the LM head, on one rank",
        ),
        (
            ["--engine-endpoint", "http://h:1", "--teacher-pretrained-checkpoint", "x"],
            "serves Hugging Face folders",
        ),
        (
            ["--engine-endpoint", "http://h:1", "--engine-timeout-s", "0"],
            "--engine-timeout-s 0.0: must be above 0",
        ),
    ],
)
def test_options_without_a_meaning(folders, flags, words) -> None:
    with pytest.raises(ValueError, match=words):
        parse(folders["llama"], *flags).check()
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        EngineClient("host:8000")


def sums_of(ids: np.ndarray) -> np.ndarray:
    """Hidden states without a model: they depend on every token up to theirs."""
    return np.outer(np.cumsum(ids.astype(np.float64)) % 97, 1 + np.arange(HIDDEN)).astype(np.float32) / 97


@contextmanager
def serving(
    folder: Path,
    clients: list[EngineClient],
    *,
    score,
    probe,
    ask=hidden_states,
    refused=nothing,
) -> Iterator[EnginePool]:
    """A front between a server and engines, in threads."""
    server = ReplicaServer(
        folder,
        name=uuid.uuid4().hex[:8],
        address="ipc",
        number=0,
        keys=None,
        fingerprints=FINGERPRINTS,
        vocab_size=VOCAB,
        max_tokens=1000,
        life=uuid.uuid4().hex,
    )
    server.start()
    stop = threading.Event()
    pool = EnginePool(clients, probe=probe, ask=ask)
    more = {
        "replicas": len(clients),
        "max_tokens": 64,
        "hidden_dtype": "fp32",
        "stop": stop.is_set,
        "refused": refused,
    }
    thread = threading.Thread(target=serve_engine, args=(server, pool, score), kwargs=more, daemon=True)
    thread.start()
    try:
        yield pool
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def model_free_scorer() -> LabelScorer:
    order = torch.arange(VOCAB)
    return LabelScorer(
        weight=torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(2)),
        shard_start=0,
        group=None,
        vocab_size=VOCAB,
        logit_softcap=None,
        byte_order=ByteOrder(columns=order, local=torch.arange(VOCAB + 1)),
        hidden_dtype="fp32",
    )


SEEDS = range(int(os.environ.get("ENGINE_FAULT_SEEDS", "20")))
"""vllm.sh runs 100 of them."""


@pytest.mark.parametrize("answers", ["hidden_states", "prompt_logprobs", "echo"])
def test_faults_between_front_and_engine_cost_time_only(short_tmp, monkeypatch, answers) -> None:
    """Every sample is answered once, with its own answer, for all faults in the answers of two engines."""
    monkeypatch.setattr("megatron_simct.teacher.engine_pool._FIRST_WAIT_S", 0.01)
    scorer = model_free_scorer()
    faults: dict[str, int] = {}

    def logits(ids: np.ndarray) -> np.ndarray:
        return sums_of(ids) @ scorer.weight.numpy().T

    servers = [EngineServer(sums_of, logits=logits, hang_s=0.4, share=0.25, seed=i) for i in range(2)]
    clients = [EngineClient(server.address, hidden_size=HIDDEN, timeout_s=0.2) for server in servers]
    parts: dict[str, Any] = {"score": by_head(scorer)}
    if answers != "hidden_states":
        parts = {"score": score_of_logprobs, "ask": partial(rows_of, field=answers)}
        parts["refused"] = partial(refusal, field=answers)
    with serving(short_tmp / "run", clients, probe=lambda client: client.served(), **parts) as pool:
        with contextlib.closing(open_client(short_tmp / "run", window_tokens=10_000)) as client:
            for seed in SEEDS:
                for number, server in enumerate(servers):
                    server.random.seed(2 * seed + number)
                rng = np.random.default_rng(seed)
                requests = [make_request(rng, sample_id) for sample_id in range(6)]
                if answers != "hidden_states":
                    requests = [replace(request, hidden=False, byte_side=None) for request in requests]
                found_of = {s.sample_id: s for s in collect(client, requests)}
                assert sorted(found_of) == list(range(6))
                for request in requests:
                    ids = np.concatenate([request.prompt_ids, request.label_ids])
                    rows = sums_of(ids)[len(request.prompt_ids) - 1 : -1]
                    (wanted,) = scorer.score([request], torch.from_numpy(rows))
                    found, expected = tensors_of(found_of[request.sample_id]), tensors_of(wanted)
                    if answers != "hidden_states":
                        expected = {
                            "own_logit": expected["own_logit"] - expected["lse"],
                            "lse": 0 * expected["lse"],
                        }
                    assert found.keys() == expected.keys()
                    assert all(
                        torch.allclose(found[kind], value, rtol=1e-4, atol=1e-3)
                        for kind, value in expected.items()
                    )
    for server in servers:
        faults = {kind: faults.get(kind, 0) + count for kind, count in server.faults.items()}
        server.stop()
    assert all(count > 0 for count in faults.values()), faults
    assert pool.counts["answers"] == 6 * len(SEEDS)


class Front:
    """A front's job in a forked process. It is entered when the server is up, and ended by
    SIGTERM with exit code 0.
    """

    def __init__(self, folder: Path, run_dir: Path, address: str, *flags: str) -> None:
        """flags: instead of a comparison with the same server's log-probabilities."""
        self._argv = [
            "--teacher-hf-checkpoint",
            str(folder),
            "--run-dir",
            str(run_dir),
            "--engine-endpoint",
            address,
        ]
        self._argv += ["--teacher-hidden-dtype", "fp32", *(flags or ("--engine-check-endpoint", address))]
        self.folder = endpoint_folder(str(run_dir))

    def __enter__(self) -> Front:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=run_ranks, args=(1, _serve, self._argv), kwargs={"timeout_s": 300}
        )
        self._process.start()
        deadline = time.monotonic() + 90
        while not read_endpoints(self.folder):
            assert self._process.is_alive() and time.monotonic() < deadline, "the front did not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        for endpoint in read_endpoints(self.folder).values():
            os.kill(endpoint.pid, signal.SIGTERM)
        self._process.join(60)
        assert self._process.exitcode == 0

    def in_work(self) -> int:
        found = [json.loads(path.read_text())["in_work"] for path in self.folder.glob("*.status")]
        return sum(found)


def _serve(rank: int, world_size: int, argv: list[str]) -> None:
    assert serve_main(argv) == 0


def _train(
    folders: dict[str, Path], files: Path, out: Path, teacher: str, interface: str, *flags: str
) -> list[dict]:
    argv = [
        *("--hf-checkpoint", str(folders["student"]), "--prompt-data", str(files / "train.jsonl")),
        *("--teacher-hf-checkpoint", str(folders[teacher]), "--simct-interface", interface),
        *(
            "--rollout-batch-size",
            "4",
            "--micro-batch-size",
            "2",
            "--train-iters",
            "2",
            "--rollout-max-response-len",
        ),
        *("8", "--lr", "1e-3", "--adam-eps", "1e-4", "--run-dir", str(out / "run"), *flags),
    ]
    ((code, _, err),) = run_ranks(1, run, argv)
    assert code == 0, err
    return [row for row in metrics(out) if row["kind"] == "step"]


def test_a_run_with_an_engine_is_the_run_with_our_own_teacher(tiny, folders, tmp_path, short_tmp) -> None:
    """Also if the engine dies while it has requests and comes back, and with a teacher that
    models/ cannot build.
    """
    save_model(tmp_path / "student", "llama", vocab_size=400, scale=0.2)
    save_byte_level(tmp_path / "student", vocab_size=400)
    folders = folders | {"student": tmp_path / "student"}
    with (
        serve_folder(folders["llama"]) as server,
        Front(folders["llama"], short_tmp / "t", server.address) as front,
    ):

        def come_back_when_asked() -> None:
            deadline = time.monotonic() + 60
            while not front.in_work() and time.monotonic() < deadline:
                time.sleep(0.05)
            server.come_back()

        for interface in ("paper", "bytes"):
            rollouts = str(tmp_path / interface)
            own = ("--save-debug-rollout-data", rollouts)
            wanted = _train(folders, tiny, tmp_path / f"{interface}1", "llama", interface, *own)
            fault = threading.Thread(target=come_back_when_asked)
            if interface == "bytes":
                server.go_down()
                fault.start()
            engine = ("--load-debug-rollout-data", rollouts, "--teacher-endpoint", str(short_tmp / "t"))
            found = _train(folders, tiny, tmp_path / f"{interface}2", "llama", interface, *engine)
            assert len(found) == len(wanted) == 2 and wanted[0]["loss"] > 0.05
            for ours, theirs in zip(found, wanted, strict=True):
                numbers = {name for name, value in theirs.items() if isinstance(value, float)}
                assert ours.keys() == theirs.keys() and {"loss", "grad_norm"} <= numbers
                for name in numbers:
                    assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), (interface, name)
            if interface == "bytes":
                fault.join()
    with serve_folder(folders["cohere"]) as server, Front(folders["cohere"], short_tmp / "u", server.address):
        for row in _train(
            folders, tiny, tmp_path / "u", "cohere", "paper", "--teacher-endpoint", str(short_tmp / "u")
        ):
            assert np.isfinite(row["loss"]) and row["loss"] > 0.05


def test_a_server_that_generates_teaches_alm_and_what_compares_likeliest_tokens(
    tiny, folders, tmp_path, short_tmp
) -> None:
    """Metrics are those with our own teacher. Interfaces that need more are refused with the reason, and
    so is another model.
    """
    save_model(tmp_path / "student", "llama", vocab_size=400, scale=0.2)
    save_byte_level(tmp_path / "student", vocab_size=400)
    folders = folders | {"student": tmp_path / "student"}
    with serve_folder(folders["llama"]) as server:
        probe = LogprobProbe(front(folders["llama"])[2], field="echo", text=PROBE_TEXT, where="x")
        probe(EngineClient(server.address))
        good = server.logits
        server.logits = lambda ids: 0 * good(ids)
        with pytest.raises(ValueError, match="which is chance"):
            probe(EngineClient(server.address))
        server.logits = lambda ids: 0.5 * good(ids)
        with pytest.raises(ValueError, match="every server must serve the same model"):
            probe(EngineClient(server.address))
        server.logits = good
        flags = ("--engine-answers", "prompt_logprobs")
        with Front(folders["llama"], short_tmp / "t", server.address, *flags):
            for interface in ("alm", "topk_kl"):
                rollouts = str(tmp_path / interface)
                own = ("--save-debug-rollout-data", rollouts)
                wanted = _train(folders, tiny, tmp_path / f"{interface}1", "llama", interface, *own)
                engine = ("--load-debug-rollout-data", rollouts, "--teacher-endpoint", str(short_tmp / "t"))
                found = _train(folders, tiny, tmp_path / f"{interface}2", "llama", interface, *engine)
                assert len(found) == len(wanted) == 2 and wanted[0]["loss"] > 0.01
                for ours, theirs in zip(found, wanted, strict=True):
                    for name in ("loss", "grad_norm", "teacher_nats_per_byte"):
                        assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), (
                            interface,
                            name,
                        )
            with pytest.raises(
                AssertionError, match="--engine-answers prompt_logprobs: the server gives log-prob"
            ):
                _train(
                    folders,
                    tiny,
                    tmp_path / "bytes",
                    "llama",
                    "bytes",
                    "--teacher-endpoint",
                    str(short_tmp / "t"),
                )
