"""Steps that close before their slowest responses have ended, which are carried over into the next ones.

With --rollout-oversample F each replica has the prompts of F steps more in the works than a step needs. A
step closes as soon as as many groups of responses as it needs are whole; a group is the responses to one
prompt. What the others have of their text is kept. The server goes on with it under the weights of the next
step, since these are what it then holds: to finish it under the older ones, the update would have to wait, or
the server to hold both. Each token keeps the log-probability under the weights that sampled it, so importance
weights hold for a response of several weights, whose Rollout.weight_version is that of its first token.

A response is as old as its first token. One that would be older than --rollout-max-lag in the next step is
not carried any further: its step waits for it.

Which prompts have been begun, and what there is of those that no finished update has used, is part of a
checkpoint. So after a kill each prompt is trained on once, in whatever layout the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_simct.data.prompts import PromptSource
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import RacingEngine, Sampling, rollout_from_row, rollout_row


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt whose responses have been begun."""

    number: int
    """Which prompt of the run it is; its samples are number x --n-samples-per-prompt and those after it."""
    prompts: Sequence[Prompt]
    """The same one for each sample, with the sample's id."""
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """By sample id, what there is; those that are not finished say so."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its responses are finished."""
        return not self.missing

    @property
    def missing(self) -> list[Prompt]:
        """The samples that are not finished."""
        return [
            prompt
            for prompt in self.prompts
            if prompt.sample_id not in self.rollouts or self.rollouts[prompt.sample_id].finish == "open"
        ]

    @property
    def oldest(self) -> int | None:
        """The version of the weights that sampled its first token; None where there is no token yet."""
        return min((rollout.weight_version for rollout in self.rollouts.values()), default=None)


class Oversampling:
    """The groups of one data-parallel rank that have been begun and not been trained on."""

    def __init__(
        self,
        prompts: PromptSource,
        *,
        share: int,
        more: int,
        samples_per_prompt: int,
        max_lag: int,
        dp_rank: int,
        gather: Callable[[Any], list[Any]],
        record: Callable[..., None] | None = None,
    ) -> None:
        """share: groups that this rank needs for a step. more: how many it has in the works beside these.

        gather: what every data-parallel rank has said, by rank; collective over them. record: is told of the
        responses of each step, and `step`.
        """
        self._prompts, self._share, self._more = prompts, share, more
        self._samples_per_prompt, self._max_lag = samples_per_prompt, max_lag
        self._dp_rank, self._gather, self._record = dp_rank, gather, record
        self._next = 0
        """The first group that no rank has begun."""
        self._open: dict[int, Group] = {}
        self._counts = [0] * len(gather(None))
        """How many each rank has open: so each knows which new ones are the others'."""
        self._taken: dict[int, list[Group]] = {}
        """By step: what has been handed on, and no update is known to have used."""
        self._asked_at: dict[int, float] = {}
        self.metrics: dict[str, float] = {}
        """Of the step that has closed last."""

    def begin_at(self, step: int) -> None:
        """Where the run that goes on has carried nothing over, or there was none."""
        self._next = step * self._share * len(self._counts)

    def step(
        self, engine: RacingEngine, step: int, sampling: Sampling
    ) -> Iterator[list[tuple[Prompt, Rollout]]]:
        """A step's responses, in whole groups as these get whole. Collective over the whole job.

        Until it has ended nothing has changed: what is asked for again is what was asked for before.
        """
        following, counts, groups = self._topped_up()
        too_old = {
            number
            for number, group in groups.items()
            if group.oldest is not None and step + 1 - group.oldest > self._max_lag
        }
        begun = {number for number, group in groups.items() if group.rollouts}
        taken: list[Group] = []

        def take() -> list[tuple[Prompt, Rollout]]:
            """What is whole now and has a place: places of groups that must come are kept for them."""
            found: list[tuple[Prompt, Rollout]] = []
            for number in sorted(groups):
                kept = 0 if number in too_old else len(too_old & groups.keys())
                if groups[number].is_whole and len(taken) + kept < self._share:
                    group = groups.pop(number)
                    taken.append(group)
                    found += [(prompt, group.rollouts[prompt.sample_id]) for prompt in group.prompts]
            return found

        at_once = take()
        if at_once:
            yield at_once
        asked = [prompt for number in sorted(groups) for prompt in groups[number].missing]
        has = {
            sample_id: rollout for group in groups.values() for sample_id, rollout in group.rollouts.items()
        }
        now = time.monotonic()
        for prompt in asked:
            self._asked_at.setdefault(prompt.sample_id, now)
        waited = 0.0
        for some in engine.race(
            asked,
            sampling,
            begun={prompt.sample_id: has[prompt.sample_id] for prompt in asked if prompt.sample_id in has},
            least=self._share - len(taken),
            is_enough=lambda: len(taken) == self._share,
        ):
            for rollout in some:
                number = rollout.sample_id // self._samples_per_prompt
                groups[number].rollouts[rollout.sample_id] = rollout
                if rollout.finish != "open":
                    waited = max(waited, time.monotonic() - self._asked_at.pop(rollout.sample_id, now))
            more = take()
            if more:
                yield more
        assert len(taken) == self._share, f"{len(taken)} of {self._share} groups are whole"
        self._next, self._open = following, groups
        self._counts = [count - self._share for count in counts]
        self._taken[step] = taken
        if self._record is not None:
            found = [group.rollouts[p.sample_id] for group in taken for p in group.prompts]
            self._record(sorted(found, key=lambda rollout: rollout.sample_id), step=step)
        told = self._gather((sum(len(g.prompts) for g in taken if g.number in begun), waited))
        self.metrics = {
            "rollout_carried": float(sum(carried for carried, _ in told)),
            "seconds_rollout_longest": max(longest for _, longest in told),
        }

    def trained(self, step: int) -> None:
        """An update has used the responses of a step."""
        self._taken.pop(step, None)

    def state(self) -> bytes:
        """What a run needs to go on, of all ranks. Collective over the data-parallel ranks."""
        mine = [
            *self._open.values(),
            *(group for groups in self._taken.values() for group in groups),
        ]
        rows = [
            {
                "number": group.number,
                "prompt": _digest(group.prompts[0]),
                "rollouts": [rollout_row(rollout) for rollout in group.rollouts.values()],
            }
            for group in mine
        ]
        everyone = sorted((row for part in self._gather(rows) for row in part), key=lambda row: row["number"])
        content = {"next": self._next, "samples_per_prompt": self._samples_per_prompt, "groups": everyone}
        return json.dumps(content).encode()

    def load(self, data: bytes) -> None:
        """What `state` gave, under any number of ranks. ValueError, naming the flag, where the prompts are
        others.
        """
        content = json.loads(data)
        if content["samples_per_prompt"] != self._samples_per_prompt:
            raise ValueError(
                f"--n-samples-per-prompt {self._samples_per_prompt}: the run that goes on has begun "
                f"{content['samples_per_prompt']} responses to a prompt; leave it as it was"
            )
        self._next = content["next"]
        size = len(self._counts)
        self._counts = [len(content["groups"][rank::size]) for rank in range(size)]
        self._open = {}
        for row in content["groups"][self._dp_rank :: size]:
            group = self._new(row["number"])
            if _digest(group.prompts[0]) != row["prompt"]:
                raise ValueError(
                    f"--prompt-data: prompt {group.number} is not the one whose response the run that goes "
                    "on has begun; leave the file, --rollout-shuffle and --seed as they were"
                )
            found = [rollout_from_row(one) for one in row["rollouts"]]
            group.rollouts.update({rollout.sample_id: rollout for rollout in found})
            self._open[group.number] = group

    def _topped_up(self) -> tuple[int, list[int], dict[int, Group]]:
        """The next group that nobody has begun, how many each rank has open, and those of this rank, once new
        ones have been dealt out."""
        size = self._share + self._more
        wanted = [max(0, size - count) for count in self._counts]
        following = self._next
        groups = {
            number: Group(number=number, prompts=group.prompts, rollouts=dict(group.rollouts))
            for number, group in self._open.items()
        }
        for turn in range(max(wanted)):
            for rank, count in enumerate(wanted):
                if turn < count:
                    if rank == self._dp_rank:
                        groups[following] = self._new(following)
                    following += 1
        return following, [max(size, count) for count in self._counts], groups

    def _new(self, number: int) -> Group:
        first = number * self._samples_per_prompt
        return Group(
            number=number, prompts=self._prompts.samples(range(first, first + self._samples_per_prompt))
        )


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(prompt.student_ids.tobytes()).hexdigest()
