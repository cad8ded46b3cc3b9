"""Options of the evaluation on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option

Benchmark = Literal["gsm8k", "math500", "mbpp", "humaneval", "livecodebench", "exact_match", "math_label"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How many greedy and sampled responses to held-out prompts are right."""

    eval_benchmark: Benchmark = option(
        "exact_match",
        "what --eval-prompt-data holds, and so what is right: the label itself, or by the first metric that "
        "tools/evaluate.py has for the benchmark; mbpp, humaneval and livecodebench run programs, confined",
    )
    eval_interval: int | None = option(
        None, "evaluate every so many steps; default: before the first and after the last", at_least=0
    )
    eval_temperature: float = option(1.0, "temperature of the sampled responses", at_least=0)
    eval_samples: int = option(1, "sampled responses a prompt; 0: greedy only", at_least=0)
    exit_eval_accuracy: float | None = option(
        None, "stop training when greedy accuracy reaches this share", at_least=0, at_most=1
    )
