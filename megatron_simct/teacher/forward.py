"""The teacher's forward pass: sequences in, what was wanted of their labels out. Both kinds of teacher use it.

It runs through Megatron's own forward-only schedule, under the layout of the job that it is in, and sums what it
returns on vocabulary shards: nothing as large as a row of logits leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from megatron_simct.losses.bytes import ByteOrder, teacher_byte_statistics
from megatron_simct.losses.tiles import OutputLayer, likeliest
from megatron_simct.losses.vocab_parallel import label_statistics, num_real_columns
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.packing import label_rows, pack_byte_sides, pad_right
from megatron_simct.records import AlignedPair, ByteSide, ScoredPair

with megatron_imports():
    from megatron.core.pipeline_parallel import get_forward_backward_func

HiddenDtype = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRequest:
    """What the teacher reads of one AlignedPair."""

    sample_id: int
    prompt_ids: np.ndarray
    """int32 [pt]"""
    label_ids: np.ndarray
    """int32 [m]"""
    rows: np.ndarray
    """int32 [R], ascending: AlignedPair.teacher_rows."""
    hidden: bool
    """Whether the hidden states of `rows` are wanted."""
    topk: int
    """Log-probabilities of the likeliest tokens wanted of each of `rows`, in place of hidden states; 0: none."""
    byte_side: ByteSide | None
    """What to sum for `bytes`; None where that is not wanted."""

    @classmethod
    def of(cls, pair: AlignedPair) -> TeacherRequest:
        events = pair.byte_events if pair.needs.byte_events else None
        return cls(
            sample_id=pair.sample_id,
            prompt_ids=pair.teacher_prompt_ids,
            label_ids=pair.teacher_ids,
            rows=pair.teacher_rows,
            hidden=pair.needs.hidden_rows != "none" and not pair.needs.topk,
            topk=pair.needs.topk,
            byte_side=None if events is None else events.teacher,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.label_ids)


class TeacherForward:
    """A frozen HiddenStateModel that answers requests. Collective over one model replica."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        *,
        vocab_size: int,
        byte_order: ByteOrder | None = None,
        hidden_dtype: HiddenDtype | None = None,
    ) -> None:
        """vocab_size is the teacher's real one; ids past it are never scored. byte_order: for requests of `bytes`.

        hidden_dtype: hidden states are rounded to it before anything is made of them; None: they stay as they are.
        """
        self._model = model.eval().requires_grad_(False)
        self._groups = groups
        self._vocab_size = vocab_size
        self._byte_order = byte_order
        self._hidden_dtype = hidden_dtype

    def run(self, micro_batches: Sequence[Sequence[TeacherRequest]]) -> list[ScoredPair]:
        """An answer a request, in their order, on the last pipeline stage; on the others none."""
        if not micro_batches:
            return []
        schedule = get_forward_backward_func()
        chunks = chunks_of(self._model)
        answers = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(request.num_tokens for batch in micro_batches for request in batch),
            micro_batch_size=max(len(batch) for batch in micro_batches),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return [scored for answer in answers for scored in answer]

    @torch.no_grad()
    def _forward_step(
        self, micro_batches: Iterator[Sequence[TeacherRequest]], model: HiddenStateModel
    ) -> tuple[Any, Any]:
        requests = next(micro_batches)
        sequences = [np.concatenate([request.prompt_ids, request.label_ids]) for request in requests]
        multiple = self._groups.tp_size if model.config.sequence_parallel else 1
        tokens, positions = (tensor.to(self._groups.device) for tensor in pad_right(sequences, multiple_of=multiple))
        return model(tokens, positions, None), partial(self._statistics, requests)

    @torch.no_grad()
    def _statistics(
        self, requests: Sequence[TeacherRequest], hidden: torch.Tensor, non_loss_data: bool = True
    ) -> list[ScoredPair]:
        """What is wanted of the micro-batch's hidden states [S, B, H_T]."""
        lens = [len(request.label_ids) for request in requests]
        rows = torch.from_numpy(label_rows([len(request.prompt_ids) for request in requests], lens)).to(hidden.device)
        hidden = hidden.flatten(0, 1)[rows]
        if self._hidden_dtype is not None:
            hidden = rounded(hidden, self._hidden_dtype)
        labels = torch.from_numpy(np.concatenate([request.label_ids for request in requests]).astype(np.int64))
        labels = labels.to(hidden.device)
        weight, shard_start, group = self._model.output_weight, self._model.vocab_shard[0], self._groups.tp
        byte_logprobs: Sequence[torch.Tensor | None] = [None] * len(requests)
        byte_sides = [request.byte_side for request in requests if request.byte_side is not None]
        if byte_sides:
            assert self._byte_order is not None, "byte events need the order of the vocabulary"
            side = pack_byte_sides(byte_sides, lens).to(hidden.device)
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
            byte_logprobs = slots.split([side.last_row.size for side in byte_sides])
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
        split = zip(requests, hidden.split(lens), own_logit.split(lens), lse.split(lens), byte_logprobs, strict=True)
        for request, h, own, z, log_masses in split:
            rows = torch.from_numpy(request.rows.astype(np.int64)).to(h.device)
            scored.append(
                ScoredPair(
                    sample_id=request.sample_id,
                    own_logit=own,
                    lse=z,
                    hidden=h[rows] if request.hidden else None,
                    topk=self._likeliest(h[rows], z[rows], request.topk) if request.topk else None,
                    byte_logprobs=log_masses,
                )
            )
        return scored

    def _likeliest(self, hidden: torch.Tensor, lse: torch.Tensor, k: int) -> torch.Tensor:
        """float32 [R, k], descending: log-probabilities of each row's likeliest tokens."""
        weight, start = self._model.output_weight, self._model.vocab_shard[0]
        width = num_real_columns(shard_start=start, shard_width=weight.shape[0], vocab_size=self._vocab_size)
        source = OutputLayer(hidden, weight, num_columns=width, soft_cap=self._model.logit_softcap)
        return likeliest(source, lse, k, vocab_size=self._vocab_size, group=self._groups.tp)


def by_length(requests: Sequence[TeacherRequest], *, max_tokens: int) -> list[list[TeacherRequest]]:
    """Micro-batches of requests of similar length and of one kind, none of more than max_tokens padded tokens.

    A request that is longer alone is a micro-batch of its own.
    """
    batches: list[list[TeacherRequest]] = []
    for request in sorted(requests, key=lambda r: (r.byte_side is not None, r.num_tokens)):
        last = batches[-1] if batches else []
        same = bool(last) and (last[0].byte_side is None) == (request.byte_side is None)
        if same and (len(last) + 1) * request.num_tokens <= max_tokens:
            last.append(request)
        else:
            batches.append([request])
    return batches


def rounded(hidden: torch.Tensor, dtype: HiddenDtype) -> torch.Tensor:
    """The hidden states as they are after a journey in that type, in their own type."""
    match dtype:
        case "fp32":
            return hidden
        case "bf16":
            return hidden.to(torch.bfloat16).to(hidden.dtype)
        case "int8":
            codes, scale = quantized(hidden)
            return dequantized(codes, scale).to(hidden.dtype)
    raise AssertionError(dtype)


def quantized(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, H] -> codes int8 [R, H] and scale float32 [R]: a rotated row's largest entry is 127 steps from 0.

    A few channels of a hidden state are many times larger than the rest. The rotation spreads them, so that one scale
    fits the whole row; it is its own inverse.
    """
    hidden = _rotated(hidden.float())
    scale = hidden.abs().amax(dim=1) / 127 if hidden.shape[1] else hidden.new_zeros(len(hidden))
    steps = torch.where(scale > 0, scale, 1).unsqueeze(1)
    return (hidden / steps).round().clamp(-127, 127).to(torch.int8), scale


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [R, H] of `quantized`."""
    return _rotated(codes.float() * scale.unsqueeze(1))


def _rotated(rows: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of a row's blocks, as long as the largest power of 2 in its width."""
    width = rows.shape[1]
    block = width & -width
    for half in (1 << i for i in range(block.bit_length() - 1)):
        pairs = rows.view(len(rows), width // (2 * half), 2, half)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).flatten(1)
    return rows / max(block, 1) ** 0.5
