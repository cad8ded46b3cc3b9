"""The seam behind which the teacher lies: pairs stream in, scored pairs stream out, unordered, matched by sample id.

Nothing outside `teacher/` knows whether the model shares these ranks or answers from other nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from megatron_simct.records import AlignedPair, ScoredPair


class TeacherError(RuntimeError):
    """The teacher refuses, or has not answered in time. Every rank raises it, and no weight has changed."""


class TeacherScorer(Protocol):
    """Anything that scores the teacher's tokens of a response."""

    def score(self, pairs: Iterable[AlignedPair]) -> Iterator[ScoredPair]:
        """Each pair once, in any order, with exactly what its `needs` ask for.

        It takes all pairs before it returns, and may be called beside the thread that trains. That one iterates the
        answers, which is collective over one model replica. Only the last pipeline stage is told: on the others the
        tensors are empty.
        """
        ...

    def note(self) -> str:
        """What the log line says of the teacher; may be nothing."""
        ...


def without_content(sample_id: int) -> ScoredPair:
    """The answer where nobody scores, or where nobody reads the score."""
    empty = torch.zeros(0)
    return ScoredPair(sample_id=sample_id, own_logit=empty, lse=empty, hidden=None)


class NoTeacher:
    """Answers with nothing, for an interface that needs no teacher."""

    def score(self, pairs: Iterable[AlignedPair]) -> Iterator[ScoredPair]:
        pairs = list(pairs)
        for pair in pairs:
            assert not pair.needs.teacher, f"sample {pair.sample_id} needs a teacher"
        return iter([without_content(pair.sample_id) for pair in pairs])

    def note(self) -> str:
        return ""
