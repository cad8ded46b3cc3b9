"""The teacher on the student's own ranks and in its groups, forward only through Megatron's schedule.

Under pipeline parallelism only the last stage, where the loss is, gets what the teacher says; the others yield pairs
without content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_simct.losses.bytes import ByteOrder, teacher_byte_statistics
from megatron_simct.losses.tiles import OutputLayer, likeliest
from megatron_simct.losses.vocab_parallel import label_statistics, num_real_columns
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.packing import label_rows, pack_byte_sides, pad_right
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.scorer import without_content

with megatron_imports():
    from megatron.core.pipeline_parallel import get_forward_backward_func


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
        """vocab_size is the teacher's real one; ids past it are never scored. byte_order: for pairs that need bytes."""
        self._byte_order = byte_order
        self._model = model.eval().requires_grad_(False)
        self._groups = groups
        self._vocab_size = vocab_size
        self._micro_batch_size = micro_batch_size

    def score(self, pairs: Iterable[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer.score. Sequences of similar length share a micro-batch."""
        ordered = sorted(pairs, key=lambda pair: len(pair.teacher_prompt_ids) + len(pair.teacher_ids))
        size = self._micro_batch_size
        micro_batches = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
        if not micro_batches:
            return
        schedule = get_forward_backward_func()
        chunks = chunks_of(self._model)
        answers = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(len(p.teacher_prompt_ids) + len(p.teacher_ids) for p in ordered),
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self._groups.is_last_stage:
            yield from (without_content(pair.sample_id) for pair in ordered)
        for answer in answers:
            yield from answer

    @torch.no_grad()
    def _forward_step(self, micro_batches: Iterator[Sequence[AlignedPair]], model: HiddenStateModel) -> tuple[Any, Any]:
        pairs = next(micro_batches)
        sequences = [np.concatenate([pair.teacher_prompt_ids, pair.teacher_ids]) for pair in pairs]
        multiple = self._groups.tp_size if model.config.sequence_parallel else 1
        tokens, positions = (tensor.to(self._groups.device) for tensor in pad_right(sequences, multiple_of=multiple))
        return model(tokens, positions, None), partial(self._statistics, pairs)

    @torch.no_grad()
    def _statistics(
        self, pairs: Sequence[AlignedPair], hidden: torch.Tensor, non_loss_data: bool = True
    ) -> list[ScoredPair]:
        """What the pairs need of the micro-batch's hidden states [S, B, H_T]."""
        lens = [len(pair.teacher_ids) for pair in pairs]
        rows = torch.from_numpy(label_rows([len(pair.teacher_prompt_ids) for pair in pairs], lens)).to(hidden.device)
        hidden = hidden.flatten(0, 1)[rows]
        labels = torch.from_numpy(np.concatenate([pair.teacher_ids for pair in pairs]).astype(np.int64))
        labels = labels.to(hidden.device)
        weight, shard_start, group = self._model.output_weight, self._model.vocab_shard[0], self._groups.tp
        byte_logprobs: Sequence[torch.Tensor | None] = [None] * len(pairs)
        if pairs[0].needs.byte_events:
            side = pack_byte_sides([pair.byte_events.teacher for pair in pairs], lens).to(hidden.device)
            slots, own_logit, lse = teacher_byte_statistics(
                hidden,
                weight,
                labels,
                side,
                order=self._byte_order,
                shard_start=shard_start,
                group=group,
                logit_softcap=self._model.logit_softcap,
            )
            byte_logprobs = slots.split([pair.byte_events.slot_event.size for pair in pairs])
        else:
            own_logit, lse = label_statistics(
                hidden,
                weight,
                labels,
                shard_start=shard_start,
                vocab_size=self._vocab_size,
                group=group,
                logit_softcap=self._model.logit_softcap,
            )
        scored = []
        split = (hidden.split(lens), own_logit.split(lens), lse.split(lens))
        for pair, h, own, z, slots in zip(pairs, *split, byte_logprobs, strict=True):
            requested = torch.from_numpy(pair.teacher_rows.astype(np.int64)).to(h.device)
            wanted = None if pair.needs.hidden_rows == "none" else h[requested]
            topk = None
            if pair.needs.topk:
                width = num_real_columns(
                    shard_start=shard_start, shard_width=weight.shape[0], vocab_size=self._vocab_size
                )
                source = OutputLayer(wanted, weight, num_columns=width, soft_cap=self._model.logit_softcap)
                topk = likeliest(source, z[requested], pair.needs.topk, vocab_size=self._vocab_size, group=group)
                wanted = None
            scored.append(
                ScoredPair(
                    sample_id=pair.sample_id, own_logit=own, lse=z, hidden=wanted, topk=topk, byte_logprobs=slots
                )
            )
        return scored
