"""A mixture of several teachers, each in a job of its own: `bytes` compares distributions over the next byte,
which can be mixed with fixed weights whatever the tokenizers are (losses/kinds/bytes.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_simct.losses.kinds.bytes import mixed_log_masses
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.scorer import TeacherScorer


class MixtureScorer:
    """Scores pairs of `plan_mixture`. See TeacherScorer."""

    def __init__(self, scorers: Sequence[TeacherScorer], weights: Sequence[float], groups: Groups) -> None:
        """One scorer and one weight a teacher; the weights are positive and add up to 1."""
        self._scorers, self._weights, self._groups = scorers, weights, groups

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """Ask every teacher, each in its own tokens."""
        for pair in pairs:
            for scorer, part in zip(self._scorers, (pair, *pair.others), strict=True):
                scorer.submit([part])

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See RemoteScorer.collect. Own logits and log-sum-exps are those of the first teacher."""
        first, *others = ({s.sample_id: s for s in scorer.collect(pairs)} for scorer in self._scorers)
        for pair in pairs:
            scored = first[pair.sample_id]
            if self._groups.is_last_stage:
                answers = [of[pair.sample_id].byte_logprobs for of in (first, *others)]
                masses = [answer for answer in answers if answer is not None]
                assert len(masses) == len(answers) and pair.byte_events is not None, (
                    "a mixture is of byte events"
                )
                scored = replace(
                    scored, byte_logprobs=mixed_log_masses(masses, self._weights, pair.byte_events)
                )
            yield scored

    def status_text(self) -> str:
        texts = [scorer.status_text() for scorer in self._scorers]
        return ", ".join(text for text in texts if text)
