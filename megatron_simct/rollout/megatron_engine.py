"""Generation by the training weights themselves: Megatron's modules with a KV cache, on the same ranks.

Nothing is copied or gathered to publish new weights: an optimizer step changes what the next call samples from.
Prompts of a batch are padded on the left. Rotary positions are relative, so a shifted prompt scores the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.losses.vocab_parallel import soft_cap
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of, whole_sequences
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import tensor_from_last_stage, through_stage
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.sampling import sample_tokens

with megatron_imports():
    from megatron.core.inference.contexts import StaticInferenceContext


_FILLER = Prompt(sample_id=0, student_ids=np.zeros(1, np.int32), teacher_ids=np.zeros(0, np.int32))
"""What a rank without prompts of its own answers while others that share experts with it have some."""


class MegatronEngine:
    """Samples responses from a HiddenStateModel under tensor and pipeline parallelism.

    Hidden states go from stage to stage, the last stage chooses the tokens and tells the others.
    """

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        batch_size: int,
    ) -> None:
        """vocab_size is the real one; batch_size bounds the sequences, and so the KV cache, decoded together."""
        self._model = model
        self._groups = groups
        self._vocab_size = vocab_size
        self._stop_ids = torch.tensor(list(stop_ids), device=groups.device)
        self._batch_size = batch_size
        self._weight_version = 0

    def publish(self, weight_version: int) -> None:
        self._weight_version = weight_version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine.generate. Collective over the tensor-, pipeline- and expert-parallel groups."""
        was_training = self._model.training
        self._model.eval()
        try:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].student_ids))
            rollouts: dict[int, Rollout] = {}
            for begin in range(0, self._most(len(order)), self._batch_size):
                members = order[begin : begin + self._batch_size]
                with whole_sequences(self._model):
                    answers = self._generate_batch([prompts[i] for i in members] or [_FILLER], sampling)
                rollouts.update(zip(members, answers[: len(members)], strict=True))
        finally:
            self._model.train(was_training)
        return [rollouts[i] for i in range(len(prompts))]

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        device = self._groups.device
        tokens, is_padding = _pad_left([p.student_ids for p in prompts])
        tokens, is_padding = tokens.to(device), is_padding.to(device)
        uniforms = torch.stack([_uniforms(sampling, p.sample_id) for p in prompts]).to(device)
        batch, prompt_len = tokens.shape
        context = StaticInferenceContext(batch, prompt_len + sampling.max_response_len)

        has_padding = bool(is_padding.any())
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        chosen, logprobs, alive = [], [], []
        for step in range(sampling.max_response_len):
            mask = is_padding[:, None, None, :] if has_padding else None
            hidden = self._forward(tokens, mask, context)
            context.sequence_len_offset += tokens.shape[1]
            context.enable_decode_mode()
            ids, scores = self._choose(hidden[-1], uniforms[:, step], sampling)
            chosen.append(ids)
            logprobs.append(scores)
            alive.append(~finished)
            finished = finished | torch.isin(ids, self._stop_ids)
            if not self._most(int(~finished.all())):
                break
            tokens = ids[:, None]
            is_padding = torch.nn.functional.pad(is_padding, (0, 1), value=False)
        return self._records(prompts, torch.stack(chosen, 1), torch.stack(logprobs, 1), torch.stack(alive, 1), finished)

    def _most(self, count: int) -> int:
        """The largest count of the ranks that share experts: all must pass through a layer together."""
        if self._groups.ep.size() == 1:
            return count
        largest = torch.tensor(count, device=self._groups.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.ep)
        return int(largest)

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor | None, context: StaticInferenceContext
    ) -> torch.Tensor:
        """This rank's hidden states [S, B, H] of tokens [B, S], of its last stage."""

        def stage(chunk: HiddenStateModel, received: torch.Tensor | None) -> torch.Tensor:
            chunk.set_input_tensor(received)
            return chunk(tokens, tokens, mask, inference_context=context)

        config = self._model.config
        received = torch.empty(
            tokens.shape[1], tokens.shape[0], config.hidden_size, dtype=config.pipeline_dtype, device=tokens.device
        )
        for chunk in chunks_of(self._model):
            hidden = through_stage(
                partial(stage, chunk), received, self._groups.pp, first=chunk.pre_process, last=chunk.post_process
            )
        return hidden

    def _choose(
        self, hidden: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next ids, int64 [B], and their log-probs, float32 [B], from hidden [B, H]; equal on every stage."""
        chosen = torch.empty(2, len(hidden), dtype=torch.float64, device=hidden.device)
        if self._groups.is_last_stage:
            chosen[0], chosen[1] = sample_tokens(
                soft_cap(hidden @ self._model.output_weight.T, self._model.logit_softcap),
                uniforms,
                shard_start=self._model.vocab_shard[0],
                vocab_size=self._vocab_size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                group=self._groups.tp,
            )
        ids, scores = tensor_from_last_stage(chosen, self._groups.pp)  # float64 holds both exactly
        return ids.long(), scores.float()

    def _records(
        self,
        prompts: Sequence[Prompt],
        chosen: torch.Tensor,
        logprobs: torch.Tensor,
        alive: torch.Tensor,
        finished: torch.Tensor,
    ) -> list[Rollout]:
        lengths = alive.sum(dim=1).tolist()
        ids = chosen.to(torch.int32).cpu().numpy()
        scores = logprobs.cpu().numpy()
        return [
            Rollout(
                sample_id=prompt.sample_id,
                weight_version=self._weight_version,
                student_ids=ids[row, :length],
                logprobs=scores[row, :length],
                finish="stop" if stopped else "length",
            )
            for row, (prompt, length, stopped) in enumerate(zip(prompts, lengths, finished.tolist(), strict=True))
        ]


def _pad_left(sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [B, P] and where they are padding, bool [B, P]."""
    width = max(len(s) for s in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    is_padding = torch.ones(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, width - len(sequence) :] = torch.from_numpy(sequence.astype(np.int64))
        is_padding[row, width - len(sequence) :] = False
    return tokens, is_padding


def _uniforms(sampling: Sampling, sample_id: int) -> torch.Tensor:
    """One uniform number a token, from the seed and the sample alone: counter-based, so any rank can draw them."""
    generator = np.random.Generator(np.random.Philox(key=[sampling.seed, sample_id]))
    return torch.from_numpy(generator.random(sampling.max_response_len))
