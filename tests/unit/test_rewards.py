"""Rewards: what a function may do, the advantage of a response among others, and the term of the loss."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_simct.config.options import InterfaceConfig, RewardConfig
from megatron_simct.evaluation.answers import Thinking
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.rewards import Called, NoReward, Response, Rewards
from megatron_simct.losses.policy_gradient import policy_gradient
from megatron_simct.update.advantages import EPSILON, group_advantages
from tests.oracles import byte_cases
from tests.oracles.loss_cases import CONFIGS, EXACT, OTHERS, LossCase, evaluate, name_of, random_case
from tests.tiny import config

FUNCTIONS = """
import math, os, sys, time

def length(prompt, response, row):
    print("not an answer", flush=True)
    return len(prompt) + 10 * len(response) + 100 * row["points"]

def trouble(prompt, response, row):
    match response:
        case "raise":
            raise LookupError("no such thing")
        case "hang":
            open("hanging", "w").close()
            time.sleep(600)
        case "leave":
            os._exit(3)
        case "text":
            return "much"
        case "nan":
            return math.nan
    return 1

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}")
    return tmp_path


def rewards(reward: str, **options: float) -> Rewards:
    return Rewards(RewardConfig(reward=reward, **options), chat=True, thinking=Thinking())


def ask(rewards: Rewards, *texts: str, row: dict | None = None) -> list[float | str]:
    asked = rewards.submit(Response(prompt="1 + 1?", text=text, row=row or {}) for text in texts)
    found: list[float | str] = []
    for future in asked:
        try:
            found.append(future.result(timeout=120))
        except NoReward as why:
            found.append(str(why))
    return found


def test_a_function_sees_prompt_response_and_row(module) -> None:
    asked = rewards("my_rewards:length", reward_workers=2)
    assert ask(asked, "a", "bb", "ccc", row={"points": 7}) == [716.0, 726.0, 736.0]
    asked.close()


def test_what_a_function_does_wrong_costs_its_own_response_only(module) -> None:
    asked = rewards("my_rewards:trouble", reward_workers=1, reward_timeout_seconds=15.0)
    texts = ("fine", "raise", "fine", "hang", "fine", "leave", "fine", "text", "nan", "fine")
    found = ask(asked, *texts)
    assert [answer for text, answer in zip(texts, found, strict=True) if text == "fine"] == [1.0] * 5
    why = dict(zip(texts, found, strict=True))
    assert why["raise"] == "LookupError: no such thing"
    assert why["hang"] == "no answer in 15 s" and why["leave"] == "its process ended"
    assert "could not convert" in why["text"] and why["nan"] == "the reward is nan"
    processes = [rewarder._process for rewarder in asked._rewarders]
    asked.close()
    assert all(process is None or process.returncode is not None for process in processes)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("my_rewards:other", "AttributeError"),
        ("my_rewards:value", "value is not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(module, place, words) -> None:
    with pytest.raises(ValueError, match=f"^--reward {place}: .*{words}"):
        rewards(place)


def test_graders_are_rewards_and_a_row_without_an_answer_has_none() -> None:
    asked = rewards("exact_match", reward_workers=1)
    assert ask(asked, "2", "two", row={"label": 2}) == [1.0, 0.0]
    assert "no label" in ask(asked, "2")[0]
    asked.close()


def test_a_grader_that_cannot_run_is_an_error_at_the_start(monkeypatch) -> None:
    monkeypatch.setattr(MathVerifier, "_ask", lambda *_, **__: None)
    with pytest.raises(ValueError, match="needs the package math-verify"):
        rewards("math", reward_workers=1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--simct-interface", "reward"), "--simct-interface reward needs --reward"),
        (("--reward-weight", "2"), "--reward-weight needs --reward"),
        (("--reward", "exact_match"), "--n-samples-per-prompt must be at least 2"),
        (
            ("--reward", "a b", "--n-samples-per-prompt", "2"),
            "--reward a b: must be one of exact_match, math, code, or",
        ),
        (("--reward", "exact_match", "--simct-interface", "sft"), "trains on given responses"),
    ],
)
def test_options_without_a_meaning_are_refused(tiny, flags, words) -> None:
    with pytest.raises(ValueError) as refused:
        config(tiny, *flags).check(data_parallel_size=1)
    assert words in str(refused.value)


# Advantages


def test_advantages_are_relative_to_the_group() -> None:
    found = group_advantages(np.array([1.0, 0, 0, 1, 5, 5, math.nan, 2, math.nan, math.nan, math.nan, 3]), 4)
    expected = []
    for group in ([1.0, 0, 0, 1], [5.0, 5, None, 2], [None, None, None, 3.0]):
        known = [reward for reward in group if reward is not None]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / len(known))
        expected += [0 if reward is None else (reward - mean) / (std + EPSILON) for reward in group]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert group_advantages(np.full(4, math.nan), 2).tolist() == [0, 0, 0, 0]


# The loss


def rewarded(seed: int, *, softcap: bool = False) -> LossCase:
    """A case whose labels have advantages of both signs, and ratios on both sides of the bounds."""
    case = random_case(seed, softcap=softcap)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        today = own_log_probs(case, case.student_hidden.double(), case.student_weight.double())
    old = (today.numpy() + rng.normal(0, 0.3, len(today))).tolist()
    return replace(case, old_log_probs=old, advantages=rng.normal(0, 2, len(today)).tolist())


def own_log_probs(case: LossCase, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    if case.student_softcap is not None:
        logits = case.student_softcap * torch.tanh(logits / case.student_softcap)
    return torch.log_softmax(logits, dim=1).gather(1, torch.tensor(case.student_labels)[:, None]).squeeze(1)


def term(log_probs: torch.Tensor, old: list[float], advantages: list[float]) -> torch.Tensor:
    """PPO, Eq. 7, label by label."""
    total = torch.zeros((), dtype=torch.float64)
    for log_prob, before, advantage in zip(log_probs, old, advantages, strict=True):
        ratio = torch.exp(log_prob - before)
        bounded = min(max(float(ratio.detach()), 0.8), 1.28) * advantage
        unbounded = ratio * advantage
        total = total - (unbounded if float(unbounded.detach()) <= bounded else bounded)
    return total


@pytest.mark.parametrize(
    "config", [InterfaceConfig(interface="reward"), *CONFIGS, *OTHERS, *EXACT], ids=name_of
)
def test_the_term_is_added_to_every_interface(config) -> None:
    """Value and gradient of the sum are those without a reward, which other tests verify,
    plus the oracle's term.
    """
    if config.interface == "sft":
        return  # it has no samples to reward: --reward refuses it
    for seed in range(2):
        case = rewarded(seed, softcap=bool(seed))
        hidden = case.student_hidden.double().clone().requires_grad_()
        weight = case.student_weight.double().clone().requires_grad_()
        own = term(own_log_probs(case, hidden, weight), case.old_log_probs, case.advantages)
        own.backward()
        base = evaluate(replace(case, advantages=None), config)
        result = evaluate(case, config)
        size = max(float(case.student_weight.abs().max()), float(case.student_hidden.abs().sum(0).max()))
        expected = float(base.output.sum) + float(own.detach())
        assert float(result.output.sum) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        found = result.hidden_gradient - base.hidden_gradient
        torch.testing.assert_close(found, hidden.grad, rtol=1e-8, atol=1e-9 * size)
        found = (result.weight_gradient - base.weight_gradient)[: len(weight)]
        torch.testing.assert_close(found, weight.grad, rtol=1e-8, atol=1e-9 * size)
        assert float(result.output.label_losses.sum()) == pytest.approx(expected, rel=1e-7, abs=1e-7)
        assert 0 < result.metric("reward_clipped_sum") < len(case.student_labels)


@pytest.mark.parametrize("bounds", ["any", "longest-match"])
def test_the_term_beside_bytes_equals_the_oracle(bounds) -> None:
    cases = byte_cases.random_cases(3)
    base = byte_cases.evaluate(cases, bounds=bounds)
    labels = torch.tensor([label for student, _ in cases for label in student.labels])
    logits = torch.cat([student.logits.detach() for student, _ in cases]).double().requires_grad_()
    log_probs = torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    rng = np.random.default_rng(0)
    old = (log_probs.detach().numpy() + rng.normal(0, 0.3, len(labels))).tolist()
    advantages = rng.normal(0, 2, len(labels)).tolist()
    expected = term(log_probs, old, advantages)
    expected.backward()
    found = byte_cases.evaluate(
        cases,
        bounds=bounds,
        label_terms=lambda own: policy_gradient(
            own, torch.tensor(old, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64)
        ),
    )
    assert float(found.sum - base.sum) == pytest.approx(float(expected.detach()), rel=1e-10)
    width = logits.shape[1]
    torch.testing.assert_close(
        (found.gradient - base.gradient)[:, :width], logits.grad, rtol=1e-9, atol=1e-10
    )
    assert float(found.label_losses.sum()) == pytest.approx(float(found.sum), rel=1e-9)


def test_a_process_that_is_gone_is_started_again(module) -> None:
    called = Called("my_rewards:trouble", timeout_s=30.0)
    called.start()
    assert called._process is not None
    called._process.kill()
    called._process.wait()
    response = Response(prompt="", text="fine", row={})
    with pytest.raises(NoReward, match="its process ended"):
        called(response)
    assert called(response) == 1.0
    called.close()


def test_a_function_that_hangs_ends_with_the_rank_that_is_killed(module) -> None:
    """The rank names the process that hangs, and is killed with -9 in the middle of the call."""
    code = "import my_rewards\nfrom megatron_simct.evaluation.rewards import Called, Response\n"
    code += "called = Called('my_rewards:trouble', timeout_s=600.0)\ncalled.start()\n"
    code += "print(called._process.pid, flush=True)\ncalled(Response(prompt='', text='hang', row={}))\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        worker = int(rank.stdout.readline())
        _until((module / "hanging").exists, "the function is not called")
        rank.kill()
    _until(lambda: not _lives(worker), "the function's process has outlived its rank")


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    """False for a zombie for which no process has waited."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
