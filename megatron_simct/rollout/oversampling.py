"""Steps that close before their slowest responses are finished: --rollout-oversample.

A group is the set of responses to one prompt. Each data-parallel replica samples more groups at a time than
it needs for a step. A step closes as soon as enough groups are finished. The unfinished responses keep their
text and are carried over: the next step asks the server to continue them.

The server continues them under the weights of the next step, because it holds one set of weights. To finish
them under the old weights, the update would have to wait, which is what carrying over avoids. Each token
keeps the log-probability under the weights that sampled it, so importance weights are right for a response
that several versions sampled. Rollout.weight_version is the version of the first token.

--rollout-max-lag bounds how old a first token may be. If a group would exceed the bound in the next step,
the step waits for it instead.

A checkpoint stores which prompts were begun, and every response that no update has used. After a kill, a run
trains on each prompt once, in any data-parallel layout.
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
    """The prompt's number in the run. Sample ids start at number x --n-samples-per-prompt."""
    prompts: Sequence[Prompt]
    """One for each sample: the same prompt with the sample's id."""
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """By sample id: the finished responses, and the unfinished ones (finish "open") that have a token."""

    @property
    def is_whole(self) -> bool:
        """Whether all responses are finished."""
        return not self.missing

    @property
    def missing(self) -> list[Prompt]:
        """Prompts of the samples that are not finished."""
        return [
            prompt
            for prompt in self.prompts
            if prompt.sample_id not in self.rollouts or self.rollouts[prompt.sample_id].finish == "open"
        ]

    @property
    def oldest(self) -> int | None:
        """Version of the weights that sampled the first token; None if no token was sampled."""
        return min((rollout.weight_version for rollout in self.rollouts.values()), default=None)


class Oversampling:
    """The groups of one data-parallel rank that were begun and are not trained on yet."""

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
        """share: groups that this rank needs for a step. more: groups that it samples in addition.

        gather: returns the argument of every data-parallel rank, by rank; collective over these ranks.
        record: called with the responses of each step, and `step`.
        """
        self._prompts, self._share, self._more = prompts, share, more
        self._samples_per_prompt, self._max_lag = samples_per_prompt, max_lag
        self._dp_rank, self._gather, self._record = dp_rank, gather, record
        self._next = 0
        """The first group that no rank has begun."""
        self._open: dict[int, Group] = {}
        self._counts = [0] * len(gather(None))
        """Open groups of each rank: from these, every rank knows which new groups the others begin."""
        self._taken: dict[int, list[Group]] = {}
        """By step: groups that `step` has returned, until `trained` is called."""
        self._asked_at: dict[int, float] = {}
        self.metrics: dict[str, float] = {}
        """Metrics of the last step."""

    def begin_at(self, step: int) -> None:
        """Start without open groups: a new run, or a resumed run that carried nothing over."""
        self._next = step * self._share * len(self._counts)

    def step(
        self, engine: RacingEngine, step: int, sampling: Sampling
    ) -> Iterator[list[tuple[Prompt, Rollout]]]:
        """Yields the responses of a step, in whole groups as these are finished. Collective over the job.

        The state changes only at the end. A step that is interrupted can be started again.
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
            """Takes the whole groups that the step has room for. It reserves room for those in too_old."""
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
        prefixes = {
            sample_id: rollout for group in groups.values() for sample_id, rollout in group.rollouts.items()
        }
        now = time.monotonic()
        for prompt in asked:
            self._asked_at.setdefault(prompt.sample_id, now)
        waited = 0.0
        for some in engine.race(
            asked,
            sampling,
            begun={p.sample_id: prefixes[p.sample_id] for p in asked if p.sample_id in prefixes},
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
        of_ranks = self._gather((sum(len(g.prompts) for g in taken if g.number in begun), waited))
        self.metrics = {
            "rollout_carried": float(sum(carried for carried, _ in of_ranks)),
            "seconds_rollout_longest": max(longest for _, longest in of_ranks),
        }

    def trained(self, step: int) -> None:
        """Tell that an update has used the responses of a step."""
        self._taken.pop(step, None)

    def state(self) -> bytes:
        """State of all ranks, for a checkpoint. Collective over the data-parallel ranks."""
        local = [
            *self._open.values(),
            *(group for groups in self._taken.values() for group in groups),
        ]
        rows = [
            {
                "number": group.number,
                "prompt": _digest(group.prompts[0]),
                "rollouts": [rollout_row(rollout) for rollout in group.rollouts.values()],
            }
            for group in local
        ]
        all_rows = sorted((row for part in self._gather(rows) for row in part), key=lambda row: row["number"])
        content = {"next": self._next, "samples_per_prompt": self._samples_per_prompt, "groups": all_rows}
        return json.dumps(content).encode()

    def load(self, data: bytes) -> None:
        """Restore what `state` returned, with any number of ranks.

        Raises ValueError, naming the flag, if the prompts are not those of the state.
        """
        content = json.loads(data)
        if content["samples_per_prompt"] != self._samples_per_prompt:
            raise ValueError(
                f"--n-samples-per-prompt {self._samples_per_prompt}: the checkpoint carries over groups of "
                f"{content['samples_per_prompt']} responses; do not change it"
            )
        self._next = content["next"]
        size = len(self._counts)
        self._counts = [len(content["groups"][rank::size]) for rank in range(size)]
        self._open = {}
        for row in content["groups"][self._dp_rank :: size]:
            group = self._new(row["number"])
            if _digest(group.prompts[0]) != row["prompt"]:
                raise ValueError(
                    f"--prompt-data: prompt {group.number} is not the one whose response the checkpoint "
                    "carries over; do not change the file, --rollout-shuffle, or --seed"
                )
            found = [rollout_from_row(one) for one in row["rollouts"]]
            group.rollouts.update({rollout.sample_id: rollout for rollout in found})
            self._open[group.number] = group

    def _topped_up(self) -> tuple[int, list[int], dict[int, Group]]:
        """The state after new groups are begun: the next group, open groups of each rank, and
        groups of this rank."""
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
