"""The interface of all teachers: pairs are submitted, and their scores are collected, matched by sample id.

Code outside of `teacher/` does not know whether the model shares these ranks or runs on other nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_simct.records import AlignedPair, ScoredPair


class TeacherError(RuntimeError):
    """The teacher refuses, or has not answered in time. Raised on every rank before any weight changes."""


class TeacherMissing(TeacherError):
    """No replica of the teacher has answered in time; one that starts later may answer other requests."""


class TeacherScorer(Protocol):
    """Anything that scores the teacher's tokens of a response."""

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """Request the scores of these pairs.

        Does not wait, and may be called by another thread than `collect`.
        """
        ...

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """The scores of pairs that were submitted, each once, in any order, with exactly the statistics of
        its `needs`. With --missing-teacher drop, pairs whose teacher does not answer have none.

        Collective over one model replica. Only the last pipeline stage gets content: on the others the
        tensors are empty.
        """
        ...

    def status_text(self) -> str:
        """The teacher's part of the log line; may be empty."""
        ...


def without_content(sample_id: int) -> ScoredPair:
    """An answer with empty tensors, on ranks that do not score or do not read the score."""
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
