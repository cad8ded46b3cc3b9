"""Exact match of responses with the labels of held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.prompts import PromptSource
from megatron_simct.parallel.reductions import total
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
        self._num_prompts = len(prompts)
        self._greedy_prompts = prompts.share()
        self._samples = samples
        self._sampled_prompts = prompts.batch(0) if samples else []
        self._greedy = Sampling(temperature=0.0, top_p=1.0, max_response_len=max_response_len, seed=seed)
        self._sampled = Sampling(temperature=temperature, top_p=1.0, max_response_len=max_response_len, seed=seed)

    def measure(self) -> dict[str, float | list[int]]:
        """greedy_accuracy and, where samples were asked for, sampled_accuracy; greedy_right and sampled_right: how many
        responses to each held-out prompt were right, in the order of the file. Collective over all ranks."""
        found = self._measure("greedy", self._greedy_prompts, self._greedy, 1)
        if self._samples:
            found |= self._measure("sampled", self._sampled_prompts, self._sampled, self._samples)
        return found

    def _measure(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling, samples: int
    ) -> dict[str, float | list[int]]:
        right = torch.zeros(self._num_prompts, dtype=torch.int64)
        for prompt, rollout in zip(prompts, self._engine.generate(prompts, sampling), strict=True):
            response = self._tokenizer.decode(rollout.student_ids[:-1])
            right[prompt.sample_id // samples] += rollout.finish == "stop" and response == str(prompt.label).encode()
        counts = total(right, self._group).tolist()
        return {f"{name}_accuracy": sum(counts) / (self._num_prompts * samples), f"{name}_right": counts}
