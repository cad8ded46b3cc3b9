"""Responses by a vLLM server: they come from the training weights, in every layout, or the run stops.

The server is a stand-in that samples by transformers; tests/end_to_end/vllm.sh uses the real one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.flags import parse_config
from megatron_simct.rollout.vllm_engine import digests_of, equal_digests
from tests.distributed import run_ranks
from tests.engines import GeneratingServer
from tests.huggingface import save_byte_level, save_model
from tests.runs import metrics, run


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("student") / "model", more_rows=0)


def build(folder: Path, *, more_rows: int) -> Path:
    """more_rows: ids of the model that the tokenizer does not have."""
    save_byte_level(folder, vocab_size=400)
    rows = load_tokenizer(str(folder)).table.num_ids
    save_model(folder, "llama", vocab_size=rows + more_rows, scale=0.2)
    return folder


def command(tiny: Path, student: Path, out: Path, server: GeneratingServer, *flags: str) -> list[str]:
    return [
        *(
            "--hf-checkpoint",
            str(student),
            "--prompt-data",
            str(tiny / "train.jsonl"),
            "--simct-interface",
            "bytes",
        ),
        *("--teacher-hf-checkpoint", str(tiny / "teacher"), "--teacher-tokenizer-model"),
        *(
            str(tiny / "teacher.tiktoken"),
            "--rollout-batch-size",
            "4",
            "--micro-batch-size",
            "2",
            "--train-iters",
            "3",
        ),
        *("--rollout-max-response-len", "6", "--lr", "1e-2", "--lr-warmup-fraction", "0", "--lr-decay-style"),
        *("constant", "--run-dir", str(out / "run"), "--rollout-engine", "vllm"),
        *(
            "--rollout-engine-endpoint",
            server.server.address,
            "--rollout-engine-timeout-minutes",
            "1",
            *flags,
        ),
    ]


@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_responses_are_of_the_training_weights(tiny, student, tmp_path, tp, pp, dp) -> None:
    layout = ("--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp))
    held_out = ("--eval-prompt-data", str(tiny / "held_out.jsonl"), "--eval-samples", "0") if tp == 2 else ()
    with GeneratingServer(student) as server:
        results = run_ranks(tp * pp * dp, run, command(tiny, student, tmp_path, server, *layout, *held_out))
    assert [code for code, _, _ in results] == [0] * len(results), results[0][2]
    steps = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    assert len(steps) == 3 and all(row["rollout_logprob_gap"] < 1e-4 for row in steps)
    assert steps[2]["student_nats_per_byte"] != steps[0]["student_nats_per_byte"]
    assert server.loaded == [f"version-{i}" for i in range(4)]
    assert [path.name for path in (tmp_path / "run" / "engine_weights").iterdir()] == ["version-3"]


def test_replicas_that_share_experts_score_and_ask_again_together(tiny, tmp_path) -> None:
    """The server of both loses a tensor after an update and gets it again; one of them has
    nothing to evaluate.
    """
    student = tmp_path / "student"
    save_byte_level(student, vocab_size=400)
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
    save_model(
        student, "qwen3_moe", vocab_size=load_tokenizer(str(student)).table.num_ids, scale=0.2, **shape
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((tiny / "held_out.jsonl").read_text().splitlines()[0] + "\n")
    flags = ("--expert-model-parallel-size", "2", "--eval-prompt-data", str(held_out), "--eval-samples", "0")
    with GeneratingServer(student) as server:
        load = server._load

        def lose(body) -> Any:
            answer = load(body)
            if server.loaded.count("version-1") == 1 and server.loaded[-1] == "version-1":
                with torch.no_grad():
                    server._model.get_parameter("model.norm.weight").mul_(2)
            return answer

        server.server.routes["/collective_rpc"] = lose
        bound = ("--rollout-logprob-bound", "1e-3")
        results = run_ranks(2, run, command(tiny, student, tmp_path, server, *flags, *bound))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    assert server.loaded == ["version-0", "version-1", "version-1", "version-1", "version-2", "version-3"]
    rows = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    assert len(rows) == 3 and all(row["rollout_logprob_difference_largest"] < 1e-4 for row in rows)


def test_a_server_that_is_started_again_gets_the_weights_again(tiny, student, tmp_path) -> None:
    """After each of the last two updates it has the weights of its folder again.
    Log-probabilities show it first.
    """
    with GeneratingServer(student) as server:
        load = server._load

        def forget(body) -> Any:
            answer = load(body)
            if (
                server.loaded[-1] in ("version-1", "version-2")
                and server.loaded.count(server.loaded[-1]) == 1
            ):
                server.start_again()
            return answer

        server.server.routes["/collective_rpc"] = forget
        bound = ("--rollout-logprob-bound", "1e-4")
        ((code, _, err),) = run_ranks(1, run, command(tiny, student, tmp_path, server, *bound))
    assert code == 0, err
    assert all(row["rollout_logprob_gap"] < 1e-4 for row in metrics(tmp_path) if row["kind"] == "step")
    assert server.loaded == ["version-0", "version-1", "version-1", "version-2", "version-2", "version-3"]


def test_an_answer_of_other_weights_does_not_count(tiny, student, tmp_path) -> None:
    """The server is another process from the seventh answer on, after the answers that are scored here."""
    with GeneratingServer(student) as server:
        generate, lock, answers = server._generate, threading.Lock(), []

        def forget(body) -> Any:
            with lock:
                answers.append(generate(body))
                if len(answers) == 7:
                    server.start_again()
                return answers[-1]

        server.server.routes["/inference/v1/generate"] = forget
        flags = ("--rollout-batch-size", "8", "--rollout-logprob-bound", "1e-4")
        ((code, _, err),) = run_ranks(1, run, command(tiny, student, tmp_path, server, *flags))
    assert code == 0, err
    assert server.loaded == ["version-0", "version-0", "version-1", "version-2", "version-3"]
    rows = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    assert len(answers) == 8 * len(rows) + 1, "the eighth was asked for again"
    assert all(row["rollout_logprob_difference_largest"] < 1e-4 for row in rows)
    assert all(row["rollout_logprob_difference"] <= row["rollout_logprob_difference_largest"] for row in rows)


@pytest.mark.parametrize("after", [0, 6])
def test_a_tensor_that_did_not_arrive_is_named(tiny, student, tmp_path, after) -> None:
    """Found in the first responses of a call or, if these were right, in the step."""
    name = "model.layers.0.mlp.down_proj.weight"
    with GeneratingServer(student) as server:
        load, generate, lock, answers = server._load, server._generate, threading.Lock(), []

        def spoil() -> None:
            with torch.no_grad():
                server._model.get_parameter(name).mul_(3)

        def lose(body) -> Any:
            answer = load(body)
            if server.loaded[-1] == "version-1" and not after:
                spoil()
            return answer

        def lose_late(body) -> Any:
            with lock:
                answers.append(body)
                if len(answers) == 8 + after:
                    spoil()
                return generate(body)

        server.server.routes |= {
            "/collective_rpc": lose,
            "/inference/v1/generate": lose_late if after else generate,
        }
        flags = ("--rollout-batch-size", "8", "--rollout-logprob-bound", "1e-3")
        ((code, _, err),) = run_ranks(1, run, command(tiny, student, tmp_path, server, *flags))
    words = "responses differ from those in training by" if after else "differ from the training weights' by"
    assert code == 1 and words in err, err
    assert "1 of 15 comparable tensors differ on the server from" in err and f"version-1: {name}" in err, err
    assert len([row for row in metrics(tmp_path) if row["kind"] == "step"]) == 1, (
        "no update was made of its responses"
    )


SEED = 1234 * 1_000_003 % (1 << 31)
"""Seed in the requests of sample 0 in a run with the default --seed."""
OVERSAMPLED = ("--rollout-oversample", "0.5", "--rollout-importance-weights", "2")
OVERSAMPLED += ("--rollout-logprob-bound", "1e-4")  # part of the tokens that the step's weights sampled


def slow(server: GeneratingServer, samples: set[int]) -> None:
    """The server gives these samples two tokens, and no third one before it is asked to continue them."""
    server.waits_at = lambda body: 2 if body["sampling_params"]["seed"] - SEED in samples else None


def recorded(folder: Path) -> dict[int, list[dict]]:
    """The responses on which each step trained, from --save-debug-rollout-data."""
    steps: dict[int, list[dict]] = {}
    for path in sorted(folder.iterdir()):
        steps.setdefault(int(path.name.split(".")[0].removeprefix("rollout_")), []).extend(
            json.loads(path.read_text())
        )
    return steps


def test_a_step_closes_before_its_slowest_responses_which_go_on_in_the_next(tiny, student, tmp_path) -> None:
    """Six prompts are open, two more than a step needs; two are slow in every step."""
    flags = (*OVERSAMPLED, "--save-debug-rollout-data", str(tmp_path / "rollouts"))
    with GeneratingServer(student) as server:
        slow(server, {1, 2, 6, 9, 10, 11})
        ((code, _, err),) = run_ranks(1, run, command(tiny, student, tmp_path, server, *flags))
    assert code == 0, err
    steps = recorded(tmp_path / "rollouts")
    assert {step: [row["sample_id"] for row in rows] for step, rows in steps.items()} == {
        0: [0, 3, 4, 5],
        1: [1, 2, 7, 8],
        2: [6, 9, 12, 13],
    }
    told = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    assert [row["rollout_carried"] for row in told] == [0, 2, 2]
    assert [row.get("rollout_lag", 0) for row in told] == [0, 0.5, 0.5]
    assert abs(told[0]["rollout_importance_weight"] - 1) < 1e-4
    assert all(abs(row["rollout_importance_weight"] - 1) > 1e-4 for row in told[1:])
    assert all(row["seconds_rollout_longest"] > 0 for row in json_rows(tmp_path) if row["kind"] == "step")

    pieces: dict[tuple[int, ...], tuple[str, dict]] = {}
    for body, answer in server.answers:
        label = answer["weight_versions"][0]["version"] if answer["weight_versions"] else ""
        pieces[tuple(body["token_ids"])] = (label, answer)
    carried = 0
    for step, rows in steps.items():
        for row in rows:
            (prompt,) = [key for key, (_, answer) in pieces.items() if starts(answer, row["student_ids"])]
            label, first = pieces[prompt]
            assert label.endswith(f"-{row['weight_version']}") and len(row["student_ids"]) <= 6
            logprobs = [entry["logprob"] for entry in first["logprobs"]["content"]]
            if row["weight_version"] < step:
                carried += 1
                later, rest = pieces[prompt + tuple(first["token_ids"])]
                assert first["finish_reason"] == "abort" and later.endswith(f"-{step}")
                logprobs += [entry["logprob"] for entry in rest["logprobs"]["content"]]
                assert row["student_ids"] == first["token_ids"] + rest["token_ids"]
            assert row["logprobs"] == [float(np.float32(x)) for x in logprobs]
    assert carried == 4


def starts(answer: dict, ids: list[int]) -> bool:
    """Whether this is the server's first answer to a response."""
    count = len(answer["token_ids"])
    return 0 < count and answer["token_ids"] == ids[:count]


def json_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_after_a_kill_nothing_is_lost_or_sampled_twice(tiny, student, tmp_path) -> None:
    """The run has done one step more than is saved, and continues on two replicas."""
    saved = ("--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"), "--save-interval", "1")
    with GeneratingServer(student) as server:

        def go(ranks: int, name: str, *more: str) -> None:
            flags = (*OVERSAMPLED, *saved, "--save-debug-rollout-data", str(tmp_path / name), *more)
            results = run_ranks(ranks, run, command(tiny, student, tmp_path, server, *flags))
            assert [code for code, _, _ in results] == [0] * ranks, results[0][2]

        slow(server, {1, 2, 6, 9, 10, 11, 14, 17, 20, 21})
        go(1, "killed")
        go(2, "rollouts", "--ckpt-step", "2", "--train-iters", "5")
        command_without = command(tiny, student, tmp_path, server, *saved, "--train-iters", "6")
        ((code, _, err),) = run_ranks(1, run, command_without)
    assert code == 1 and "carries unfinished responses over; resume it with --rollout-oversample" in err
    steps = recorded(tmp_path / "killed")
    first = {row["sample_id"]: row["student_ids"] for row in steps.pop(2)}
    steps |= recorded(tmp_path / "rollouts")
    ids = {step: sorted(row["sample_id"] for row in rows) for step, rows in steps.items()}
    assert ids == {
        **{0: [0, 3, 4, 5], 1: [1, 2, 7, 8], 2: [6, 9, 12, 13]},
        **{3: [10, 11, 15, 16], 4: [14, 17, 18, 19]},
    }
    state = json.loads((tmp_path / "save" / "iter_0000005" / "carried_over.json").read_text())
    assert state["next"] == 22 and [row["number"] for row in state["groups"]] == [20, 21]
    again = {row["sample_id"]: row["student_ids"] for row in steps[2]}
    assert all(again[sample][:2] == first[sample][:2] for sample in (6, 9)), "their text was kept"


def test_what_a_server_holds_as_it_was_sent(tmp_path) -> None:
    sent = {"a.q_proj.weight": torch.ones(2, 2), "a.k_proj.weight": torch.zeros(1, 2), "n": torch.ones(3)}
    sent |= {"a.v_proj.weight": torch.full((1, 2), 2.0), "x": torch.arange(4.0).view(2, 2)}
    save_file(sent, tmp_path / "model.safetensors")
    digests = digests_of(str(tmp_path))
    fused = torch.cat([sent[f"a.{one}_proj.weight"] for one in "qkv"])

    def digest(tensor) -> str:
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    held = {"dp0:pp0:pcp0:tp0:a.qkv_proj.weight": digest(fused), "dp0:pp0:pcp0:tp0:n": digest(sent["n"])}
    assert equal_digests(held, digests) == {"a.qkv_proj.weight", "n"}
    parts = {f"dp0:pp0:pcp0:tp{i}:x": digest(sent["x"][i]) for i in range(2)}
    assert equal_digests(held | parts, digests) == {"a.qkv_proj.weight", "n"}, "each rank has a part of it"
    replica = {"dp1:pp0:pcp0:tp0:n": digest(sent["x"])}
    assert equal_digests(held | replica, digests) == {"a.qkv_proj.weight"}


def test_ids_without_a_token_are_drawn_again(tiny, tmp_path) -> None:
    """A twentieth of this model's samples are such ids. They are part of the server's
    distribution, not of ours.
    """
    student = build(tmp_path / "student", more_rows=16)
    with GeneratingServer(student) as server:
        ((code, _, err),) = run_ranks(1, run, command(tiny, student, tmp_path, server))
    assert code == 0, err
    gaps = [row["rollout_logprob_gap"] for row in metrics(tmp_path) if row["kind"] == "step"]
    assert all(1e-3 < gap < 0.1 for gap in gaps), gaps


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rollout-engine", "vllm"], "needs --rollout-engine-endpoint"),
        (["--rollout-engine-endpoint", "http://h:1"], "need --rollout-engine vllm"),
        (
            ["--rollout-engine", "vllm", "--rollout-engine-endpoint", "http://h:1"],
            "or --run-dir to put them under",
        ),
        (["--rollout-importance-weights", "0.5"], "--rollout-importance-weights 0.5: must be at least 1"),
        (
            ["--rollout-importance-weights", "2", "--simct-interface", "scalar"],
            "already has an importance ratio",
        ),
        (
            ["--rollout-importance-weights", "2", "--context-parallel-size", "2"],
            "needs whole responses on a rank",
        ),
    ],
)
def test_options_without_a_meaning(tiny, flags, words) -> None:
    base = ["--teacher-tokenizer-model", "t"]
    base += ["--hf-checkpoint", "x", "--prompt-data", "y", "--teacher-hf-checkpoint", "z"]
    with pytest.raises(ValueError, match=words):
        parse_config([*base, *flags]).check(data_parallel_size=1)
