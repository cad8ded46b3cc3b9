"""Options of sampling, and of rewards for what was sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option
from megatron_simct.config.options.evaluation import Benchmark


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling from the student's current weights."""

    rollout_batch_size: int = option(64, "prompts a step", at_least=1, at_most=2**24)
    n_samples_per_prompt: int = option(1, "responses a prompt", at_least=1, at_most=2**16)
    rollout_temperature: float = option(
        1.0, "0 is greedy; log-probs are always of the untempered distribution", at_least=0
    )
    rollout_top_p: float = option(
        1.0, "sample from the smallest set of tokens with this much probability", above=0, at_most=1
    )
    rollout_top_k: int = option(
        -1,
        "sample from this many most probable tokens, before --rollout-top-p; -1: from all",
        at_least=1,
        other=-1,
        note=", or -1 for all tokens",
    )
    rollout_max_prompt_len: int = option(
        2048, "prompts with more student or teacher tokens are skipped and counted", at_least=1, at_most=2**24
    )
    rollout_max_response_len: int = option(
        1024, "response tokens, the stop token included", at_least=1, at_most=2**24
    )
    rollout_engine_batch_size: int = option(
        64, "sequences decoded together on one rank: bounds the KV cache", at_least=1
    )
    rollout_engine: Literal["megatron", "vllm"] = option(
        "megatron",
        "what samples: the training weights on their own ranks, or vLLM servers of "
        "--rollout-engine-endpoint, which are handed the weights after each step",
    )
    rollout_engine_endpoint: tuple[str, ...] = option(
        (),
        "http://HOST:PORT of vLLM servers that generate; each data-parallel replica asks one",
        metavar="URL",
    )
    rollout_engine_weights: str | None = option(
        None,
        "directory through which weights are handed over, which the servers see under the same name (on one "
        "host a folder in memory such as /dev/shm/NAME); default: engine_weights under --run-dir",
        metavar="DIR",
    )
    rollout_engine_timeout_minutes: float = option(
        5.0,
        "how long to wait for a rollout engine that does not answer, or for one of its responses",
        above=0,
    )
    rollout_logprob_bound: float = option(
        0.1,
        "stop where an engine's log-probs of a response differ from the training weights' by more nats in "
        "the mean",
        above=0,
    )
    rollout_importance_weights: float | None = option(
        None,
        "multiply the loss behind a response's first tokens by how likely these are under the weights in "
        "training, relative to those that sampled them, at most by so much (2 is usual); default: no weights",
        at_least=1,
    )
    rollout_max_lag: int | None = option(
        None,
        "stop where a response was sampled by weights that are more optimizer steps old; default: 0, with "
        "--schedule one_step_off 1, and stored responses may be of any age",
        at_least=0,
    )
    rollout_wave_size: int | None = option(
        None,
        "prompts that one rank samples before they go to the teacher, while it samples the next; default: "
        "all at once",
        at_least=1,
    )
    save_debug_rollout_data: str | None = option(
        None, "write each step's rollouts under this directory", metavar="DIR"
    )
    load_debug_rollout_data: str | None = option(
        None, "read each step's rollouts from this directory, instead of sampling", metavar="DIR"
    )
    save_debug_scored_data: str | None = option(
        None, "write what the teacher says of each rollout under this directory", metavar="DIR"
    )
    load_debug_scored_data: str | None = option(
        None, "read what the teacher says from this directory; no teacher is loaded or asked", metavar="DIR"
    )


GRADED_REWARDS: dict[str, Benchmark] = {"exact_match": "exact_match", "math": "math_label", "code": "mbpp"}
"""Values of --reward that are graders of ours, and the benchmark whose rows each of them reads."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward beside the comparison, or alone (--simct-interface reward)."""

    reward: str | None = option(
        None,
        "what a response is worth: MODULE:FUNCTION, called with prompt, response and row; or exact_match "
        "(the row's label), math (the same by Math-Verify), code (programs by the row's test_list, confined)",
        metavar="FUNCTION",
    )
    reward_weight: float = option(1.0, "weight of its policy-gradient term beside --simct-interface", above=0)
    reward_workers: int = option(4, "processes of each model replica that call the function", at_least=1)
    reward_timeout_seconds: float = option(10.0, "a response that takes longer has no reward", above=0)
