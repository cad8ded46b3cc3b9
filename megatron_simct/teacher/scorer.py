"""The seam behind which the teacher lies: pairs are submitted, their scores are collected, matched by sample
id.

Nothing outside `teacher/` knows whether the model shares these ranks or answers from other nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_simct.records import AlignedPair, ScoredPair


class TeacherError(RuntimeError):
    """The teacher refuses, or has not answered in time. Every rank raises it, and no weight has changed."""


class TeacherScorer(Protocol):
    """Anything that scores the teacher's tokens of a response."""

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """Ask for the scores of these pairs.

        Does not wait, and may be called beside the thread that trains.
        """
        ...

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """The scores of pairs that were submitted, each once, in any order, with exactly what its `needs` ask
        for.

        Collective over one model replica. Only the last pipeline stage is told: on the others the tensors are
        empty.
        """
        ...

    def status_text(self) -> str:
        """The teacher's part of the log line; may be empty."""
        ...


def without_content(sample_id: int) -> ScoredPair:
    """The answer where nobody scores, or where nobody reads the score."""
    empty = torch.zeros(0)
    return ScoredPair(sample_id=sample_id, own_logit=empty, lse=empty, hidden=None)


class NoTeacher:
    """Answers with nothing, for an interface that needs no teacher."""

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        for pair in pairs:
            assert not pair.needs.teacher, f"sample {pair.sample_id} needs a teacher"

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        return (without_content(pair.sample_id) for pair in pairs)

    def status_text(self) -> str:
        return ""
