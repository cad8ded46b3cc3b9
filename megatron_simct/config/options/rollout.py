"""Options of sampling, and of rewards for what was sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option
from megatron_simct.config.options.evaluation import Benchmark

ENVIRONMENT_WORKERS = 4
"""Processes of each model replica that call the function of --environment."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling from the student's current weights."""

    rollout_batch_size: int = option(64, "prompts a step", at_least=1, at_most=2**24)
    n_samples_per_prompt: int = option(1, "responses a prompt", at_least=1, at_most=2**16)
    rollout_temperature: float = option(
        1.0, "0: greedy; the stored log-probabilities are always those at temperature 1", at_least=0
    )
    rollout_top_p: float = option(
        1.0, "sample from the smallest set of tokens that has this much probability", above=0, at_most=1
    )
    rollout_top_k: int = option(
        -1,
        "sample from this many most probable tokens, before --rollout-top-p; -1: from all",
        at_least=1,
        other=-1,
        note=", or -1 for all tokens",
    )
    rollout_max_prompt_len: int = option(
        2048, "a prompt with more student or teacher tokens is skipped and counted", at_least=1, at_most=2**24
    )
    rollout_max_response_len: int = option(
        1024, "maximum number of tokens in a response, including the stop token", at_least=1, at_most=2**24
    )
    environment: str | None = option(
        None,
        "what answers a response: MODULE:FUNCTION, called with the messages so far; it returns None, or a "
        "reply, behind which the student goes on in the same sequence",
        metavar="FUNCTION",
    )
    environment_timeout_seconds: float = option(
        10.0, "a conversation whose reply takes longer than this ends without one", above=0
    )
    rollout_engine_batch_size: int = option(
        64, "sequences decoded together on one rank; limits the KV cache", at_least=1
    )
    rollout_engine: Literal["megatron", "vllm"] = option(
        "megatron",
        "what samples the responses: megatron: the training weights on their own ranks; vllm: the servers "
        "of --rollout-engine-endpoint, which receive the weights after each step",
    )
    rollout_engine_endpoint: tuple[str, ...] = option(
        (),
        "http://HOST:PORT of vLLM servers that generate; each data-parallel replica uses one",
        metavar="URL",
    )
    rollout_engine_weights: str | None = option(
        None,
        "directory in which the servers receive the weights; they must see it under the same path (on one "
        "host, a folder in memory such as /dev/shm/NAME); default: engine_weights under --run-dir",
        metavar="DIR",
    )
    rollout_engine_timeout_minutes: float = option(
        5.0,
        "how long to wait for a rollout engine that does not answer, or for one response",
        above=0,
    )
    rollout_logprob_bound: float = option(
        0.1,
        "stop if the mean difference between an engine's log-probabilities of a response and those of the "
        "training weights is above this many nats",
        above=0,
    )
    rollout_importance_weights: float | None = option(
        None,
        "multiply the loss at each position by the probability of the response before it under the "
        "training weights, divided by that under the sampling weights, and at most by this number (2 is "
        "common); default: no weights",
        at_least=1,
    )
    rollout_max_lag: int | None = option(
        None,
        "stop if a response was sampled by weights that are more than this many optimizer steps old; "
        "default: 0, or 1 with --schedule one_step_off, or no limit for stored responses. "
        "--rollout-oversample adds 1 to the default, and a step then waits for each response that would be "
        "too old in the next step",
        at_least=0,
    )
    rollout_oversample: float = option(
        0.0,
        "with --rollout-engine vllm: sample this share of --rollout-batch-size in addition to the prompts "
        "that a step needs (rounded up on each data-parallel replica). A step closes when it has all "
        "responses to --rollout-batch-size prompts; the next steps continue the unfinished responses",
        at_least=0,
        at_most=1,
    )
    rollout_wave_size: int | None = option(
        None,
        "number of prompts that one rank samples before it sends them to the teacher and samples the next; "
        "default: all prompts of a step",
        at_least=1,
    )
    save_debug_rollout_data: str | None = option(
        None, "write each step's rollouts under this directory", metavar="DIR"
    )
    load_debug_rollout_data: str | None = option(
        None, "read each step's rollouts from this directory, instead of sampling", metavar="DIR"
    )
    save_debug_scored_data: str | None = option(
        None, "write the teacher's scores of each rollout under this directory", metavar="DIR"
    )
    load_debug_scored_data: str | None = option(
        None, "read the teacher's scores from this directory; no teacher is loaded or asked", metavar="DIR"
    )


GRADED_REWARDS: dict[str, Benchmark] = {"exact_match": "exact_match", "math": "math_label", "code": "mbpp"}
"""Values of --reward that name a grader, and the benchmark whose rows the grader reads."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward that is added to the comparison, or replaces it (--simct-interface reward)."""

    reward: str | None = option(
        None,
        "reward of a response: MODULE:FUNCTION, called with prompt, response and row; or exact_match "
        "(compares with the row's label), math (compares with it by Math-Verify), code (runs the row's "
        "test_list in a sandbox)",
        metavar="FUNCTION",
    )
    reward_weight: float = option(
        1.0, "weight of the policy-gradient term that is added to --simct-interface", above=0
    )
    reward_workers: int = option(4, "processes of each model replica that call the function", at_least=1)
    reward_timeout_seconds: float = option(
        10.0, "a response whose reward takes longer than this has no reward", above=0
    )
