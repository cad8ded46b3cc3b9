"""Rewards in whole runs: every layout takes the same steps, and a resumed run the same as
an undisturbed one.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.oracles.loss_cases import evaluate
from tests.runs import assert_same_run, metrics, run
from tests.steps import train_and_record
from tests.tiny import command_line, config
from tests.unit.test_rewards import rewarded

FUNCTION = """
def vowels(prompt, response, row):
    if "Tom" in row["prompt"] and len(response) % 5 == 0:
        raise ValueError("no reward for this one")
    return sum(letter in "aeiou" for letter in response) / (1 + len(response)) + len(prompt) % 3
"""
REWARD = ("--reward", "tiny_rewards:vowels", "--reward-weight", "0.7", "--reward-workers", "1")
GROUPS = ("--n-samples-per-prompt", "4", "--rollout-batch-size", "4")


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory) -> Any:
    """The function's module, in a folder that the worker's interpreter searches."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "tiny_rewards.py").write_text(FUNCTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{folder}")
        yield


def _steps(rank: int, world_size: int, files: Path, flags: tuple[str, ...]) -> list[tuple[float, float]]:
    resolved = config(files, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        reports = train_and_record(job)
        assert job.rewarding is not None
        if job.rewarding.rewards is not None:
            job.rewarding.rewards.close()
        return [(r.sums["loss"], r.grad_norm) for r in reports]


@pytest.fixture(scope="module", params=["paper", "bytes", "reward"])
def one_process(request, tiny, weights) -> tuple[tuple[str, ...], list[tuple[float, float]]]:
    flags = (*weights, *REWARD, *GROUPS, "--simct-interface", request.param, "--lr", "1e-3")
    return flags, run_ranks(1, _steps, tiny, flags)[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ("--micro-batch-size", "4")),
        (2, ("--context-parallel-size", "2")),
    ],
    ids=["TP2", "PP2", "DP2", "CP2"],
)
def test_every_layout_takes_the_same_steps(tiny, one_process, ranks, layout) -> None:
    flags, expected = one_process
    # On policy the term's value is near 0, whatever its gradient.
    assert all(norm > 0.1 for _, norm in expected)
    for found in run_ranks(ranks, _steps, tiny, (*flags, *layout)):
        for ours, theirs in zip(found, expected, strict=True):
            # Advantages of about 1 at 192 labels cancel: float32 rounds their sum to 2e-4.
            assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-4)


def _run_and_look(rank: int, world_size: int, argv: list[str]) -> tuple[tuple[int, str, str], list[int]]:
    """Run the command; also returns the number of processes that it has left."""
    with pytest.MonkeyPatch.context() as patch:
        started: list[subprocess.Popen[bytes]] = []
        popen = subprocess.Popen

        def recording(command: list[str], *args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
            process = popen(command, *args, **kwargs)
            if "megatron_simct.evaluation.function_worker" in command:
                started.append(process)
            return process

        patch.setattr(subprocess, "Popen", recording)
        answer = run(rank, world_size, argv)
    assert started, "no process was asked"
    return answer, [sum(process.poll() is None for process in started)]


def test_a_resumed_run_equals_an_undisturbed_one(tiny, tmp_path) -> None:
    def trained(folder: Path, iterations: int) -> str:
        saved = (
            "--save",
            str(folder / "save"),
            "--load",
            str(folder / "save"),
            "--run-dir",
            str(folder / "run"),
        )
        steps = (
            "--train-iters",
            str(iterations),
            "--lr-decay-style",
            "constant",
            "--simct-interface",
            "reward",
        )
        argv = command_line(tiny, *saved, *steps, *REWARD, *GROUPS)
        (((code, out, error), workers),) = run_ranks(1, _run_and_look, argv)
        assert workers == [0], "the processes that call the function end with the run"
        assert code == 0, out + error
        return out

    said = trained(tmp_path / "once", 4)
    assert "has none: ValueError: no reward for this one" in said
    trained(tmp_path / "twice", 2)
    trained(tmp_path / "twice", 4)
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    steps = [row for row in metrics(tmp_path / "once") if row["kind"] == "step"]
    assert any(0 < row["reward_failed"] < 1 for row in steps) and all(
        row["reward_spread"] > 0 for row in steps
    )
    assert all({"reward", "reward_silent", "loss_reward", "reward_clipped"} <= row.keys() for row in steps)


def _on_shards(rank: int, world_size: int, interface: str) -> tuple[float, torch.Tensor]:
    result = evaluate(rewarded(1), InterfaceConfig(interface=interface), group=dist.group.WORLD)
    return float(result.output.sum), result.hidden_gradient


@pytest.mark.parametrize("interface", ["paper", "exact", "strict_topk", "alm"])
def test_vocabulary_shards_find_the_same_term(interface) -> None:
    whole = evaluate(rewarded(1), InterfaceConfig(interface=interface))
    for total, gradient in run_ranks(2, _on_shards, interface):
        assert total == pytest.approx(float(whole.output.sum), rel=1e-9)
        torch.testing.assert_close(gradient, whole.hidden_gradient, rtol=1e-8, atol=1e-9)
