"""Exact match of responses with the labels of held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.prompts import PromptSource
from megatron_simct.parallel.reductions import sum_over_ranks
from megatron_simct.records import Prompt
from megatron_simct.rollout.engine import RolloutEngine, Sampling


class Evaluator:
    """Greedy and sampled accuracy of an engine on a fixed set of prompts.

    The sampled draws depend on the seed alone, so two evaluations of one set of weights agree.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        tokenizer: Tokenizer,
        group: dist.ProcessGroup,
        *,
        max_response_len: int,
        temperature: float,
        samples: int,
        seed: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._group = group
        self._greedy_prompts = prompts.share()
        self._samples = samples
        self._sampled_prompts = prompts.batch(0) if samples else []
        self._greedy = Sampling(temperature=0.0, top_p=1.0, max_response_len=max_response_len, seed=seed)
        self._sampled = Sampling(temperature=temperature, top_p=1.0, max_response_len=max_response_len, seed=seed)

    def measure(self) -> dict[str, float]:
        """greedy_accuracy and, where samples were asked for, sampled_accuracy. Collective over all ranks."""
        accuracy = {"greedy_accuracy": self._accuracy(self._greedy_prompts, self._greedy)}
        if self._samples:
            accuracy["sampled_accuracy"] = self._accuracy(self._sampled_prompts, self._sampled)
        return accuracy

    def _accuracy(self, prompts: Sequence[Prompt], sampling: Sampling) -> float:
        hits = sum(
            rollout.finish == "stop" and self._tokenizer.decode(rollout.student_ids[:-1]) == str(prompt.label).encode()
            for prompt, rollout in zip(prompts, self._engine.generate(prompts, sampling), strict=True)
        )
        counts = {"hits": torch.tensor(hits), "prompts": torch.tensor(len(prompts))}
        counts = sum_over_ranks(counts, self._group)
        return counts["hits"] / counts["prompts"]
