"""Options of the evaluation on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option

Benchmark = Literal["gsm8k", "math500", "mbpp", "humaneval", "livecodebench", "exact_match", "math_label"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Accuracy of greedy and sampled responses to held-out prompts."""

    eval_benchmark: Benchmark = option(
        "exact_match",
        "what --eval-prompt-data contains and how a response is graded: exact_match: by the row's label; "
        "others: by the benchmark's first metric in tools/evaluate.py; mbpp, humaneval and livecodebench "
        "run programs in a sandbox",
    )
    eval_interval: int | None = option(
        None, "steps between evaluations; default: only before the first step and after the last", at_least=0
    )
    eval_temperature: float = option(1.0, "temperature of the sampled responses", at_least=0)
    eval_samples: int = option(1, "number of sampled responses to each prompt; 0: greedy only", at_least=0)
    exit_eval_accuracy: float | None = option(
        None, "stop training if greedy accuracy reaches this share", at_least=0, at_most=1
    )
