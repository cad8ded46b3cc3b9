"""The teacher on the student's own ranks and in its groups.

Under pipeline parallelism only the last stage, where the loss is, gets the teacher's scores; the others
yield pairs without content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_simct.losses.kinds.bytes import ByteOrder
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.packing import Cut
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
        cut: Cut,
        byte_order: ByteOrder | None = None,
        packed: bool = False,
        multiple_of: int = 1,
        context_parallel_size: int = 1,
    ) -> None:
        """cut: which sequences share a micro-batch. context_parallel_size: number of ranks that share a
        sequence: 1, or the student's. Other arguments: see TeacherForward."""
        self._forward = TeacherForward(
            model,
            groups,
            vocab_size=vocab_size,
            byte_order=byte_order,
            packed=packed,
            multiple_of=multiple_of,
            context=groups.cp if context_parallel_size > 1 else None,
        )
        self._groups = groups
        self._make_batches = cut
        self._deals_out = context_parallel_size < groups.cp_size

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """Does nothing: the model runs in `collect`."""

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. The model runs now; sequences of similar length share a micro-batch."""
        everything = [TeacherRequest.of(pair) for pair in pairs]
        requests = everything[self._groups.cp_rank :: self._groups.cp_size] if self._deals_out else everything
        batches = self._make_batches([request.num_tokens for request in requests])
        answers = self._forward.run([[requests[i] for i in chosen] for chosen in batches])
        if not self._groups.is_last_stage:
            answers = [without_content(request.sample_id) for request in everything]
        elif self._deals_out:
            answers = self._forward.exchanged(everything, answers, self._groups.cp)
        yield from answers

    def status_text(self) -> str:
        return ""
