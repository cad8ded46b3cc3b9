"""Rewards of responses: requested when a response is sampled, collected together with the teacher's scores.

One rank of each model replica asks, so that all ranks of a replica train on the same numbers; responses to
one prompt are compared over all replicas (update/advantages.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.evaluation.rewards import NoReward, Response, Rewards
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.held_out import response_text
from megatron_simct.update.advantages import Advantages, exchange

MAX_SAID = 5
"""Log lines about responses without a reward, in a run."""


@dataclass(kw_only=True)
class Rewarding:
    """Collective where it says so."""

    rewards: Rewards | None
    """None on ranks that do not ask for rewards."""
    student: Tokenizer
    marks: Mapping[int, str]
    """Special tokens that a response is written with: those around thinking."""
    batch_size: int
    """Samples of a step."""
    group_size: int
    weight: float
    first_place: int | None = None
    """With --rollout-oversample each rank has whole groups: the place of its first sample in the step. None:
    a step has consecutive sample ids, dealt out one by one."""
    say: Callable[[str], None] = print
    _said: int = field(default=0, init=False)

    def submit(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[int, Future[float]]:
        """Requests the rewards of these samples; returns them by sample id."""
        if self.rewards is None:
            return {}
        asked = self.rewards.submit(self._response(p, r) for p, r in zip(prompts, rollouts, strict=True))
        return dict(zip((rollout.sample_id for rollout in rollouts), asked, strict=True))

    def collect(self, rollouts: Sequence[Rollout], asked: Mapping[int, Future[float]]) -> Advantages:
        """The weighted advantages of a step's samples. Collective over the whole job."""
        rewards = None if self.rewards is None else [self._reward(r, asked[r.sample_id]) for r in rollouts]
        ids = [rollout.sample_id for rollout in rollouts]
        found = exchange(
            ids,
            rewards,
            places=[
                id % self.batch_size if self.first_place is None else self.first_place + i
                for i, id in enumerate(ids)
            ],
            batch_size=self.batch_size,
            group_size=self.group_size,
        )
        weighted = {sample_id: self.weight * value for sample_id, value in found.of_samples.items()}
        return Advantages(of_samples=weighted, metrics=found.metrics)

    def close(self) -> None:
        """Ends the processes that call the reward function."""
        if self.rewards is not None:
            self.rewards.close()

    def _response(self, prompt: Prompt, rollout: Rollout) -> Response:
        assert prompt.asked is not None, "the rows of prompts were kept"
        text = response_text(rollout, self.student, self.marks)
        return Response(prompt=prompt.asked.prompt, text=text, row=prompt.asked.row)

    def _reward(self, rollout: Rollout, asked: Future[float]) -> float:
        try:
            return asked.result()
        except NoReward as why:
            self._said += 1
            if self._said <= MAX_SAID:
                last = "; further failures are only counted (reward_failed)" if self._said == MAX_SAID else ""
                self.say(f" --reward: sample {rollout.sample_id} has none: {why}{last}")
            return math.nan
