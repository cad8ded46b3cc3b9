"""Several teachers, each for the rows of --prompt-data that name it, alone or in a mixture.

A mixture is of distributions over the next byte, whatever the tokenizers are (losses/kinds/bytes.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.losses.kinds.bytes import mixed_log_masses
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import total
from megatron_simct.records import AlignedPair, ScoredPair, TeacherNeeds
from megatron_simct.teacher.scorer import TeacherError, TeacherScorer


class RoutedScorer:
    """Scores each pair by the teacher that it names, or by the mixture of several. See TeacherScorer."""

    def __init__(self, scorers: Mapping[str, TeacherScorer], groups: Groups) -> None:
        """scorers: by name, in the same order on every rank."""
        self._scorers, self._groups = scorers, groups
        self.missing = dict.fromkeys(scorers, 0)
        """Number of pairs that each teacher has not scored in the last `collect`."""

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """Ask the teachers of each pair, each in its own tokens."""
        for pair in pairs:
            for part in (pair, *pair.others):
                assert part.teacher is not None, f"sample {pair.sample_id} has no teacher"
                self._scorers[part.teacher].submit([part])

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. Every teacher is collected from on every rank, in one order, whether or not the
        rank has a pair of it. A pair has a score if all its teachers have scored it; own logits and
        log-sum-exps are those of the first.
        """
        found: dict[str | None, dict[int, ScoredPair]] = {}
        for name, scorer in self._scorers.items():
            parts = [part for pair in pairs for part in (pair, *pair.others) if part.teacher == name]
            found[name] = {scored.sample_id: scored for scored in scorer.collect(parts)}
            self.missing[name] = len(parts) - len(found[name])
        for pair in pairs:
            parts = [pair, *pair.others]
            answers = [found[part.teacher].get(pair.sample_id) for part in parts]
            scores = [answer for answer in answers if answer is not None]
            if len(scores) == len(parts):
                yield self._mixed(pair, scores) if pair.others else scores[0]

    def _mixed(self, pair: AlignedPair, scores: Sequence[ScoredPair]) -> ScoredPair:
        if not self._groups.is_last_stage:
            return scores[0]
        masses = [one.byte_logprobs for one in scores if one.byte_logprobs is not None]
        assert len(masses) == len(scores) and pair.byte_events is not None, "a mixture is of byte events"
        weights = [part.teacher_weight for part in (pair, *pair.others)]
        return replace(scores[0], byte_logprobs=mixed_log_masses(masses, weights, pair.byte_events))

    def status_text(self) -> str:
        """The teachers' texts, each behind its name."""
        texts = {name: scorer.status_text() for name, scorer in self._scorers.items()}
        return ", ".join(f"{name}: {text}" for name, text in texts.items() if text)


def count_missing(
    scorer: RoutedScorer, scored: Sequence[ScoredPair], *, group: dist.ProcessGroup
) -> dict[str, float]:
    """`missing/NAME` for each teacher: pairs that it has not scored in the last `collect`, over all ranks.

    Collective over the data-parallel group. Raises TeacherError, on all its ranks, if no pair has a score.
    """
    counts = torch.tensor([*scorer.missing.values(), len(scored)], dtype=torch.int64)
    *missing, num_scored = total(counts, group).tolist()
    if not num_scored:
        names = ", ".join(scorer.missing)
        raise TeacherError(
            f"--missing-teacher drop: no row of the step has a teacher that answers; they are {names}"
        )
    return {f"missing/{name}": count for name, count in zip(scorer.missing, missing, strict=True)}


def unscored(pair: AlignedPair) -> AlignedPair:
    """The pair of a response that nobody has scored: without a segment, and without a teacher."""
    none = np.zeros(0, np.int32)
    return replace(
        pair,
        teacher=None,
        teacher_ids=none,
        teacher_labels=None,
        segments=none.reshape(0, 4),
        kinds=none.astype(np.int8),
        replaced_columns=none,
        teacher_first_columns=none,
        weights=none.astype(np.float32),
        teacher_rows=none,
        needs=TeacherNeeds(teacher=False, hidden_rows="none"),
        byte_events=None,
        others=(),
    )
