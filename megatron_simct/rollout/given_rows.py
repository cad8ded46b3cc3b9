"""Rows of a step that come with their given response: --given-share.

The loss of a step is the mean over the labels of sampled responses, and beside it w times the mean cross
entropy over the labels of given ones. Both sums are divided once, by the number S of sampled labels; so that
the second is a mean over its own G labels, each of them is multiplied by w S / G. Both numbers are known
before the step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_simct.alignment.plan import plan_without_teacher
from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.prompts import PromptSource
from megatron_simct.parallel.reductions import total
from megatron_simct.records import MicroBatch, Prompt, Rollout, ScoredPair, TeacherNeeds
from megatron_simct.rollout.engine import GivenResponses, Sampling

NEEDS = TeacherNeeds(teacher=False, hidden_rows="none")


@dataclass(frozen=True, kw_only=True)
class GivenRows:
    """Where they come from, and their micro-batches."""

    prompts: PromptSource
    """The prompts of rows that have a response."""
    student: Tokenizer
    sampling: Sampling
    """For the length of a response."""
    weight: float
    """w, the --sft-weight."""
    group: dist.ProcessGroup
    """Ranks that have other rows each."""
    pack: Callable[..., list[MicroBatch]]

    def batch(self, step: int) -> tuple[list[Prompt], list[Rollout]]:
        """This rank's rows of a step. Their sample ids are below 0, as others have those from 0 on."""
        prompts = [replace(one, sample_id=-1 - one.sample_id) for one in self.prompts.batch(step)]
        return prompts, GivenResponses(self.student).generate(prompts, self.sampling)

    def micro_batches(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, sampled: Sequence[Rollout]
    ) -> list[MicroBatch]:
        """The micro-batches of given rows. sampled: the responses of this rank that are in the same step.

        Collective over the group.
        """
        pairs = [
            plan_without_teacher(prompt, rollout, student=self.student, needs=NEEDS)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        nothing = torch.zeros(0)
        scored = [
            ScoredPair(sample_id=pair.sample_id, own_logit=nothing, lse=nothing, hidden=None)
            for pair in pairs
        ]
        batches = self.pack(prompts, rollouts, pairs, scored)
        counts = [sum(len(one.label_ids) for one in some) for some in (sampled, rollouts)]
        of_sampled, of_given = total(torch.tensor(counts, dtype=torch.int64), self.group).tolist()
        return [_weighted(batch, self.weight * of_sampled / of_given) for batch in batches]


def _weighted(batch: MicroBatch, weight: float) -> MicroBatch:
    weights = torch.full((sum(batch.num_labels),), weight)
    return replace(batch, labels=replace(batch.labels, label_weights=weights), is_given=True)
