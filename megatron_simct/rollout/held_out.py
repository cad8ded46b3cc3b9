"""Accuracy of responses to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.prompts import PromptSource
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import total
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import RolloutEngine, Sampling


class Evaluator:
    """Greedy and sampled accuracy of an engine on a fixed set of prompts.

    The sampled draws depend on the seed alone, so two evaluations of one set of weights agree.
    One rank of each model replica judges the replica's responses, in `right`, so that all ranks
    have the same result.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        right: Callable[[Sequence[Prompt], Sequence[Rollout]], Sequence[bool]],
        groups: Groups,
        *,
        max_response_len: int,
        temperature: float,
        samples: int,
        seed: int,
    ) -> None:
        self._engine = engine
        self._right = right
        self._groups = groups
        self._num_prompts = len(prompts)
        self._greedy_prompts = prompts.share()
        self._samples = samples
        self._sampled_prompts = prompts.batch(0) if samples else []
        self._greedy = Sampling(temperature=0.0, top_p=1.0, max_response_len=max_response_len, seed=seed)
        self._sampled = Sampling(
            temperature=temperature, top_p=1.0, max_response_len=max_response_len, seed=seed
        )

    def measure(self) -> dict[str, float | list[int]]:
        """greedy_accuracy and, if samples are configured, sampled_accuracy; greedy_right and
        sampled_right: how many responses to each held-out prompt were right, in the order of the file.
        Collective over all ranks."""
        found = self._measure("greedy", self._greedy_prompts, self._greedy, 1)
        if self._samples:
            found |= self._measure("sampled", self._sampled_prompts, self._sampled, self._samples)
        return found

    def _measure(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling, samples: int
    ) -> dict[str, float | list[int]]:
        right = torch.zeros(self._num_prompts, dtype=torch.int64)
        rollouts = self._engine.generate(prompts, sampling)
        if self._groups.writes_samples:
            for prompt, is_right in zip(prompts, self._right(prompts, rollouts), strict=True):
                right[prompt.sample_id // samples] += is_right
        world = dist.group.WORLD
        assert world is not None, "ranks know each other"
        counts = total(right, world).tolist()
        return {f"{name}_accuracy": sum(counts) / (self._num_prompts * samples), f"{name}_right": counts}


def response_text(rollout: Rollout, tokenizer: Tokenizer, marks: Mapping[int, str]) -> str:
    """The text of a rollout without its stop token; invalid UTF-8 is replaced. With several responses that of
    the last one.

    Special tokens have no bytes. Those in `marks` are written as the given text.
    """
    content = _last_content(rollout)
    pieces, start = [], 0
    for end, token_id in enumerate(content.tolist()):
        if token_id in marks:
            pieces += [tokenizer.decode(content[start:end]), marks[token_id].encode()]
            start = end + 1
    return b"".join([*pieces, tokenizer.decode(content[start:])]).decode(errors="replace")


def _last_content(rollout: Rollout) -> np.ndarray:
    """int32: the tokens of the last response without its stop token."""
    start = 0 if rollout.transcript is None else int(rollout.transcript.student.spans[-1, 0])
    end = len(rollout.student_ids) - (rollout.finish == "stop")
    return rollout.student_ids[start:end]


def special_marks(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[int, str]:
    """The texts that are special tokens of the tokenizer, by id."""
    if tokenizer.encode_chat is None:
        return {}
    spelled = {text: list(tokenizer.encode_chat(text)) for text in texts if text}
    return {
        ids[0]: text for text, ids in spelled.items() if len(ids) == 1 and tokenizer.table.special[ids[0]]
    }


def equals_label(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, tokenizer: Tokenizer
) -> list[bool]:
    """Whether each response has a stop token and exactly the bytes of the label."""
    return [
        rollout.finish == "stop" and tokenizer.decode(_last_content(rollout)) == str(prompt.label).encode()
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
