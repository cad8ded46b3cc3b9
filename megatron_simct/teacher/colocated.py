"""The teacher on the student's own ranks and in its groups.

Under pipeline parallelism only the last stage, where the loss is, gets what the teacher says; the others yield pairs
without content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_simct.losses.bytes import ByteOrder
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.forward import TeacherForward, TeacherRequest
from megatron_simct.teacher.scorer import without_content


class ColocatedScorer:
    """Scores pairs with a frozen HiddenStateModel in this process."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        *,
        vocab_size: int,
        micro_batch_size: int,
        byte_order: ByteOrder | None = None,
    ) -> None:
        """See TeacherForward."""
        self._forward = TeacherForward(model, groups, vocab_size=vocab_size, byte_order=byte_order)
        self._groups = groups
        self._micro_batch_size = micro_batch_size

    def score(self, pairs: Iterable[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer.score. Sequences of similar length share a micro-batch."""
        return self._answers(sorted(map(TeacherRequest.of, pairs), key=lambda request: request.num_tokens))

    def _answers(self, ordered: Sequence[TeacherRequest]) -> Iterator[ScoredPair]:
        size = self._micro_batch_size
        answers = self._forward.run([ordered[begin : begin + size] for begin in range(0, len(ordered), size)])
        if not self._groups.is_last_stage:
            answers = [without_content(request.sample_id) for request in ordered]
        yield from answers

    def note(self) -> str:
        return ""
