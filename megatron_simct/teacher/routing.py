"""Several teachers, each for the rows of --prompt-data that name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.parallel.reductions import total
from megatron_simct.records import AlignedPair, ScoredPair, TeacherNeeds
from megatron_simct.teacher.scorer import TeacherError, TeacherScorer


class RoutedScorer:
    """Scores each pair by the teacher that it names. See TeacherScorer."""

    def __init__(self, scorers: Mapping[str, TeacherScorer]) -> None:
        """scorers: by name, in the same order on every rank."""
        self._scorers = scorers

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """See TeacherScorer."""
        for pair in pairs:
            assert pair.teacher is not None, f"sample {pair.sample_id} has no teacher"
            self._scorers[pair.teacher].submit([pair])

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. Every teacher is collected from on every rank, in one order, whether or not the
        rank has a pair of it."""
        for name, scorer in self._scorers.items():
            yield from scorer.collect([pair for pair in pairs if pair.teacher == name])

    def status_text(self) -> str:
        """The teachers' texts, each behind its name."""
        texts = {name: scorer.status_text() for name, scorer in self._scorers.items()}
        return ", ".join(f"{name}: {text}" for name, text in texts.items() if text)


def count_missing(
    pairs: Sequence[AlignedPair],
    scored: Sequence[ScoredPair],
    *,
    names: Sequence[str],
    group: dist.ProcessGroup,
) -> dict[str, float]:
    """`missing/NAME` for each name: pairs of that teacher that have no score, over all ranks.

    Collective over the data-parallel group. Raises TeacherError, on all its ranks, if no pair has a score.
    """
    found = {one.sample_id for one in scored}
    missing = [pair.teacher for pair in pairs if pair.sample_id not in found]
    counts = torch.tensor([*map(missing.count, names), len(found)], dtype=torch.int64)
    *of_names, num_scored = total(counts, group).tolist()
    if not num_scored:
        raise TeacherError(
            f"--missing-teacher drop: no row of the step has a teacher; of {', '.join(names)} none answers"
        )
    return {f"missing/{name}": count for name, count in zip(names, of_names, strict=True)}


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
    )
