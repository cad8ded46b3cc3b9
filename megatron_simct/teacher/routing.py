"""Several teachers, each for the rows of --prompt-data that name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.scorer import TeacherScorer


class RoutedScorer:
    """Scores each pair by the teacher that it names. See TeacherScorer."""

    def __init__(self, scorers: Mapping[str, TeacherScorer]) -> None:
        """scorers: by name, in the same order on every rank."""
        self._scorers = scorers

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """See TeacherScorer."""
        for pair in pairs:
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
