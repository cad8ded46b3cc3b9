"""The student as it was at the start of the run, which --reference-kl-weight keeps it near.

    w KL(p || p_0)        p the student, p_0 its start, over the whole vocabulary, at every sampled label

Both read the student's own tokens, so this is the interface `kd` with the start as its teacher: each label is
a segment of its own. The start's weights are read a second time from where the student's came from, into a
second model of the student's layout on the same ranks. A rank's columns of both heads are the same ids: no
row of the head moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_simct.alignment import Tokenizer
from megatron_simct.alignment.alignment_map import identity_map
from megatron_simct.losses import SharedColumns, SharedHead
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.packing import Cut
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, Prompt, Rollout, ScoredPair, SegmentKind, TeacherNeeds
from megatron_simct.teacher.colocated import ColocatedScorer

NEEDS = TeacherNeeds(hidden_rows="all")


class Reference:
    """The frozen start. Collective over one model replica."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        *,
        student: Tokenizer,
        weight: float,
        cut: Cut,
        packed: bool,
        multiple_of: int,
    ) -> None:
        """model: with the start's weights, and no one else's. weight: of the term. cut, packed, multiple_of:
        as of ColocatedScorer."""
        self.weight = weight
        self._scorer = ColocatedScorer(
            model,
            groups,
            vocab_size=student.table.num_ids,
            cut=cut,
            packed=packed,
            multiple_of=multiple_of,
            context_parallel_size=groups.cp_size,
        )
        start, end = model.vocab_shard
        self.placement = identity_map(student, student).placement(shard_start=start, shard_end=end)
        self.head: SharedHead | None = None
        """On the last stage."""
        if groups.is_last_stage:
            self.head = SharedHead(
                weight=model.output_weight.detach()[: len(self.placement.columns)],
                columns=SharedColumns.from_placement(self.placement, groups.device),
            )
        self.logit_softcap = model.logit_softcap

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
    ) -> dict[int, tuple[AlignedPair, ScoredPair]]:
        """By sample id, what the start says of every label; only the last pipeline stage is told."""
        pairs = [
            own_labels(prompt, rollout, weight=self.weight)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        scores = {score.sample_id: score for score in self._scorer.collect(pairs)}
        return {pair.sample_id: (pair, scores[pair.sample_id]) for pair in pairs}


def own_labels(prompt: Prompt, rollout: Rollout, *, weight: float) -> AlignedPair:
    """A response beside itself: every label is a segment, with this weight."""
    count = len(rollout.student_ids)
    index = np.arange(count, dtype=np.int32)
    return AlignedPair(
        sample_id=rollout.sample_id,
        teacher_prompt_ids=prompt.student_ids,
        teacher_ids=rollout.student_ids,
        segments=np.stack([index, index + 1, index, index + 1], axis=1),
        kinds=np.full(count, SegmentKind.SHARED, np.int8),
        replaced_columns=np.full(count, -1, np.int32),
        teacher_first_columns=np.full(count, -1, np.int32),
        weights=np.full(count, weight, np.float32),
        teacher_rows=index,
        needs=NEEDS,
    )
