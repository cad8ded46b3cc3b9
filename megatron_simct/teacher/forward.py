"""The teacher's forward pass: from sequences to the requested statistics of their labels. Both kinds of
teacher use it.

It runs Megatron's own forward-only schedule, under the layout of its job, and computes the statistics on
vocabulary shards: nothing as large as a row of logits leaves a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.losses.kinds.bytes import ByteOrder, SharedRows, teacher_byte_statistics
from megatron_simct.losses.tiles import OutputLayer, top_k_log_probs
from megatron_simct.losses.vocab_parallel import label_statistics, num_real_columns
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.models.layout import Layout, context_pieces
from megatron_simct.packing import Context, pack_byte_sides, part_of_bytes, sequence_batch
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, ByteSide, Prompt, Rollout, ScoredPair, SequenceBatch

with megatron_imports():
    from megatron.core.pipeline_parallel import get_forward_backward_func

HiddenDtype = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRequest:
    """The part of one AlignedPair that the teacher reads."""

    sample_id: int
    prompt_ids: np.ndarray
    """int32 [pt]"""
    label_ids: np.ndarray
    """int32 [m]"""
    rows: np.ndarray
    """int32 [R], ascending: AlignedPair.teacher_rows."""
    hidden: bool
    """Whether the hidden states of `rows` are requested."""
    topk: int
    """Number of most likely tokens whose log-probabilities are requested at each of `rows`, in place of
    hidden states.
    """
    token_ids: bool
    """Whether the ids of these tokens are requested too."""
    byte_side: ByteSide | None
    """The sums for `bytes`; None if they are not requested."""

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
            token_ids=pair.needs.token_ids,
            byte_side=None if events is None else events.teacher,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.label_ids)

    @property
    def num_bytes(self) -> int:
        arrays = [self.prompt_ids, self.label_ids, self.rows]
        if self.byte_side is not None:
            arrays += [getattr(self.byte_side, field.name) for field in fields(self.byte_side)]
        return sum(array.nbytes for array in arrays)


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
        frozen: bool = True,
        packed: bool = False,
        multiple_of: int = 1,
        context: dist.ProcessGroup | None = None,
    ) -> None:
        """vocab_size is the teacher's real one; ids past it are never scored. byte_order: for
        requests of `bytes`.

        frozen: freeze the model; False for the student's own, which scores its responses too. hidden_dtype:
        hidden states are rounded to it first; None: they are not rounded. packed, multiple_of: how the
        sequences of a micro-batch lie, see packing.py. context: ranks that share each of them, if several do;
        all of these get all answers.
        """
        self._model = model.eval().requires_grad_(False) if frozen else model
        self._groups = groups
        self._vocab_size = vocab_size
        self._byte_order = byte_order
        self._hidden_dtype = hidden_dtype
        self._packed, self._multiple_of = packed, multiple_of
        self._context, self._share = context, None
        if context is not None and context.size() > 1:
            pieces = partial(context_pieces, size=context.size())
            self._share = Context(rank=context.rank(), size=context.size(), pieces=pieces)

    def run(self, micro_batches: Sequence[Sequence[TeacherRequest]]) -> list[ScoredPair]:
        """One answer for each request, in order, on the last pipeline stage; an empty list on the others."""
        if not micro_batches:
            return []
        schedule = get_forward_backward_func()
        chunks = chunks_of(self._model)
        longest = max(request.num_tokens for batch in micro_batches for request in batch)
        limit = chunks[0].architecture.index_length
        if limit is not None and longest > limit:
            raise ValueError(
                f"--teacher-hf-checkpoint: a sequence has {longest} tokens, and this model is implemented up "
                f"to its index_topk = {limit}; lower --rollout-max-response-len or --rollout-max-prompt-len"
            )
        answers = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=longest,
            micro_batch_size=max(len(batch) for batch in micro_batches),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return [scored for answer in answers for scored in answer]

    def exchanged(
        self, requests: Sequence[TeacherRequest], answers: Sequence[ScoredPair], group: dist.ProcessGroup
    ) -> list[ScoredPair]:
        """The answers to all requests on all ranks of the group; rank r has answered
        requests r, r + size, ...

        Each answer is broadcast by the rank that has it.
        """
        own = {answer.sample_id: answer for answer in answers}
        device, dtype = self._groups.device, self._model.output_weight.dtype
        width, k_most = self._model.config.hidden_size, self._vocab_size
        dtypes = {"hidden": dtype, "topk_ids": torch.int32}
        found = []
        # Rank i modulo size has the answer to request i; the others allocate tensors of its shapes.
        for i, request in enumerate(requests):
            labels, rows = len(request.label_ids), len(request.rows)
            shapes: dict[str, tuple[int, ...]] = {"own_logit": (labels,), "lse": (labels,)}
            shapes |= {"hidden": (rows, width)} if request.hidden else {}
            shapes |= {"topk": (rows, min(request.topk, k_most))} if request.topk else {}
            shapes |= {"topk_ids": shapes["topk"]} if request.token_ids else {}
            shapes |= (
                {"byte_logprobs": (request.byte_side.last_row.size,)} if request.byte_side is not None else {}
            )
            values: dict[str, Any] = {"hidden": None}
            for name, shape in shapes.items():
                value = getattr(own.get(request.sample_id), name, None)
                if value is None:
                    value = torch.empty(shape, dtype=dtypes.get(name, torch.float32), device=device)
                assert value.shape == shape, (
                    f"{name} of sample {request.sample_id}: {tuple(value.shape)}, not {shape}"
                )
                values[name] = value = value.contiguous()
                dist.broadcast(value, dist.get_global_rank(group, i % group.size()), group=group)
            found.append(ScoredPair(sample_id=request.sample_id, **values))
        return found

    @torch.no_grad()
    def _forward_step(
        self, micro_batches: Iterator[Sequence[TeacherRequest]], model: HiddenStateModel
    ) -> tuple[Any, Any]:
        requests = next(micro_batches)
        sequences = sequence_batch(
            [request.prompt_ids for request in requests],
            [request.label_ids for request in requests],
            packed=self._packed,
            multiple_of=self._multiple_of,
            context=self._share,
        )
        batch = sequences.to(self._groups.device)
        layout = Layout(batch.position_ids[0], batch.lengths, self._context)
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=layout)
        return output, partial(self._statistics, requests, sequences)

    @torch.no_grad()
    def _statistics(
        self,
        requests: Sequence[TeacherRequest],
        sequences: SequenceBatch,
        hidden: torch.Tensor,
        non_loss_data: bool = True,
    ) -> list[ScoredPair]:
        """The requested statistics of the micro-batch's hidden states [S, B, H_T]."""
        scorer = LabelScorer(
            weight=self._model.output_weight,
            shard_start=self._model.vocab_shard[0],
            group=self._groups.tp,
            vocab_size=self._vocab_size,
            logit_softcap=self._model.logit_softcap,
            byte_order=self._byte_order,
            hidden_dtype=self._hidden_dtype,
        )
        local = None
        if (
            self._context is not None
            and sequences.label_index is not None
            and sequences.label_owner is not None
        ):
            index = sequences.label_index.to(hidden.device)
            local = LocalLabels(index=index, owner=sequences.label_owner, group=self._context)
        return scorer.score(requests, hidden.flatten(0, 1)[sequences.label_rows.to(hidden.device)], local)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLabels:
    """The labels whose rows a context-parallel rank holds."""

    index: torch.Tensor
    """int64 [n], ascending: the labels."""
    owner: torch.Tensor
    """int64 [N], on the CPU: the rank that holds each label's row."""
    group: dist.ProcessGroup

    def on_all(self, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[k, ...] on every rank, from the rows [n, ...] of all ranks. place [k]: the row of `values` for
        each result, -1 if another rank has it. One all-reduce."""
        gathered = values.new_zeros(len(place), *values.shape[1:])
        gathered[place >= 0] = values[place[place >= 0]]
        dist.all_reduce(gathered, group=self.group)
        return gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScorer:
    """Statistics of hidden states, which Megatron or an engine has computed, on this rank's
    slice of the vocabulary.
    """

    weight: torch.Tensor
    """[W, H], this rank's rows of the output layer, from id shard_start on."""
    shard_start: int
    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary."""
    vocab_size: int
    """The teacher's real one; ids past it are never scored."""
    logit_softcap: float | None
    byte_order: ByteOrder | None
    """For requests of `bytes`."""
    hidden_dtype: HiddenDtype | None
    """Hidden states are rounded to it first; None: they are not rounded."""
    hidden_scale: float = 1.0
    """Factor of the hidden states, for a model that scales its logits; our own models have
    applied it already.
    """

    @torch.no_grad()
    def score(
        self, requests: Sequence[TeacherRequest], hidden: torch.Tensor, local: LocalLabels | None = None
    ) -> list[ScoredPair]:
        """One answer for each request. hidden [N, H]: the state that predicts each label, request by request.

        local: hidden has the rows of these labels only; all ranks of its group get all answers.
        """
        lens = [len(request.label_ids) for request in requests]
        labels = torch.from_numpy(
            np.concatenate([request.label_ids for request in requests]).astype(np.int64)
        )
        # place[i]: the row of `hidden` that predicts label i; -1 if another context-parallel rank holds it.
        labels, place = labels.to(hidden.device), torch.arange(len(labels), device=hidden.device)
        if local is not None:
            labels = labels[local.index]
            place = torch.full_like(place, -1).index_copy(0, local.index, place[: len(labels)])
        hidden = hidden * self.hidden_scale
        if self.hidden_dtype is not None:
            hidden = rounded(hidden, self.hidden_dtype)
        byte_logprobs: Sequence[torch.Tensor | None] = [None] * len(requests)
        byte_sides = [request.byte_side for request in requests if request.byte_side is not None]
        if byte_sides:
            assert self.byte_order is not None, "byte events need the order of the vocabulary"
            side, shared = pack_byte_sides(byte_sides, lens), None
            if local is not None:
                part = part_of_bytes(side, local.owner, local.group.rank()).to(hidden.device)
                shared = SharedRows(part=part, index=local.index, num_labels=sum(lens), group=local.group)
            slots, own_logit, lse = teacher_byte_statistics(
                hidden,
                self.weight,
                labels,
                side.to(hidden.device),
                order=self.byte_order,
                shard_start=self.shard_start,
                group=self.group,
                logit_softcap=self.logit_softcap,
                shared=shared,
            )
            byte_logprobs = slots.split([side.last_row.size for side in byte_sides])
        else:
            own_logit, lse = label_statistics(
                hidden,
                self.weight,
                labels,
                shard_start=self.shard_start,
                vocab_size=self.vocab_size,
                group=self.group,
                logit_softcap=self.logit_softcap,
            )
        scored = []
        lse_local = lse
        if local is not None:
            own_logit, lse = local.on_all(own_logit, place), local.on_all(lse, place)
        split = zip(
            requests, place.split(lens), own_logit.split(lens), lse.split(lens), byte_logprobs, strict=True
        )
        for request, places, own, z, log_masses in split:
            rows = places[torch.from_numpy(request.rows.astype(np.int64)).to(hidden.device)]
            found = rows[rows >= 0]
            states = hidden[found] if request.hidden else None
            topk, ids = self._top_k(hidden[found], lse_local[found], request)
            if local is not None:
                # `found` has the rows of this rank only: the place of each requested row among them, or -1.
                order = torch.where(rows >= 0, (rows >= 0).cumsum(0) - 1, -1)
                states, topk, ids = (
                    None if of is None else local.on_all(of, order) for of in (states, topk, ids)
                )
            scored.append(
                ScoredPair(
                    sample_id=request.sample_id,
                    own_logit=own,
                    lse=z,
                    hidden=states,
                    topk=topk,
                    topk_ids=ids,
                    byte_logprobs=log_masses,
                )
            )
        return scored

    def _top_k(
        self, hidden: torch.Tensor, lse: torch.Tensor, request: TeacherRequest
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """float32 [R, k], descending: log-probabilities of each row's most likely tokens, and int32 [R, k]
        their ids.
        """
        if not request.topk:
            return None, None
        width = num_real_columns(
            shard_start=self.shard_start, shard_width=self.weight.shape[0], vocab_size=self.vocab_size
        )
        source = OutputLayer(hidden, self.weight, num_columns=width, soft_cap=self.logit_softcap)
        log_probs, ids = top_k_log_probs(
            source,
            lse,
            request.topk,
            vocab_size=self.vocab_size,
            shard_start=self.shard_start,
            group=self.group,
            ids=request.token_ids,
        )
        return log_probs, None if ids is None else ids.int()


def own_tokens(prompt: Prompt, rollout: Rollout) -> TeacherRequest:
    """A request for the student's log-probabilities of its own response."""
    return TeacherRequest(
        sample_id=rollout.sample_id,
        prompt_ids=prompt.student_ids,
        label_ids=rollout.student_ids,
        rows=np.zeros(0, np.int32),
        hidden=False,
        topk=0,
        token_ids=False,
        byte_side=None,
    )


def by_length(requests: Sequence[TeacherRequest], *, max_tokens: int) -> list[list[TeacherRequest]]:
    """Micro-batches of requests of one kind with at most max_tokens tokens; the shortest requests come first.

    A request that is longer than max_tokens is a micro-batch of its own.
    """
    batches: list[list[TeacherRequest]] = []
    for request in sorted(requests, key=lambda r: (r.byte_side is not None, r.num_tokens)):
        last = batches[-1] if batches else []
        same = bool(last) and (last[0].byte_side is None) == (request.byte_side is None)
        if same and sum(r.num_tokens for r in last) + request.num_tokens <= max_tokens:
            last.append(request)
        else:
            batches.append([request])
    return batches


def rounded(hidden: torch.Tensor, dtype: HiddenDtype) -> torch.Tensor:
    """The hidden states rounded to the values of that type, in their own type."""
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

    A few channels of a hidden state are many times larger than the rest. The rotation distributes them over
    the row, so that one scale fits it; it is its own inverse.
    """
    hidden = _rotated(hidden.float())
    scale = hidden.abs().amax(dim=1) / 127 if hidden.shape[1] else hidden.new_zeros(len(hidden))
    steps = torch.where(scale > 0, scale, 1).unsqueeze(1)
    return (hidden / steps).round().clamp(-127, 127).to(torch.int8), scale


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [R, H]: the inverse of `quantized`."""
    return _rotated(codes.float() * scale.unsqueeze(1))


def _rotated(rows: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of a row's blocks, as long as the largest
    power of 2 in its width.
    """
    width = rows.shape[1]
    block = width & -width
    for half in (1 << i for i in range(block.bit_length() - 1)):
        pairs = rows.view(len(rows), width // (2 * half), 2, half)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).flatten(
            1
        )
    return rows / max(block, 1) ** 0.5
