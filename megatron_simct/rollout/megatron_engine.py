"""Generation by the training weights themselves, with a KV cache, on the same ranks.

Nothing is copied or gathered to publish new weights: an optimizer step changes what the next call samples from.
Samples of one prompt share its forward pass. As sequences finish, the rows of the KV cache that they leave are filled
with waiting prompts, or closed up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.losses.vocab_parallel import soft_cap
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of, whole_sequences
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.packing import pad_right
from megatron_simct.parallel.pipeline import tensor_from_last_stage, through_stage
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.decoder import Decoder
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.sampling import sample_tokens

PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, of one forward pass; a longer prompt has one of its own."""

_NO_PROMPT = np.zeros(1, np.int32)


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
        progress: Callable[[int, int], object] = lambda finished, of: None,
    ) -> None:
        """vocab_size is the real one; batch_size bounds the sequences, and so the KV cache, decoded together.

        progress is told after each token how many responses of a call are finished, and of how many.
        """
        self._model = model
        self._groups = groups
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._batch_size = batch_size
        self._progress = progress
        self._weight_version = 0

    def publish(self, weight_version: int) -> None:
        self._weight_version = weight_version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine.generate. Collective over the tensor-, pipeline- and expert-parallel groups."""
        was_training = self._model.training
        self._model.eval()
        try:
            with whole_sequences(self._model):
                sequences = [_Sequence(prompt, sampling) for prompt in prompts]
                self._decode_all(sequences, sampling)
        finally:
            self._model.train(was_training)
        return [sequence.rollout(self._weight_version) for sequence in sequences]

    def _decode_all(self, sequences: Sequence[_Sequence], sampling: Sampling) -> None:
        """Row r of the cache holds active[r]. All ranks of a replica take the same way: they see the same tokens."""
        rows = max(1, min(self._batch_size, len(sequences)))
        length = max((len(s.prompt.student_ids) for s in sequences), default=1) + sampling.max_response_len
        stages = [Decoder(chunk, self._groups, rows=rows, length=length) for chunk in chunks_of(self._model)]
        waiting = deque(_by_prompt(sequences))
        active: list[_Sequence] = []
        while self._most(len(waiting) + len(active)):
            batches = _passes(_admitted(waiting, rows, len(active)))
            for number in range(self._most(len(batches))):
                batch = batches[number] if number < len(batches) else []
                active += self._prefill(stages, batch, sampling, first_row=len(active))
            _close_up(active, stages)
            if self._most(len(active)):
                self._decode(stages, active, sampling)
                _close_up(active, stages)
            unfinished = sum(map(len, waiting)) + len(active)
            self._progress(len(sequences) - unfinished, len(sequences))

    def _most(self, count: int) -> int:
        """The largest count of the ranks that share experts: all must pass through a layer together, and one that has
        nothing to do sends one token of no sequence."""
        if self._groups.ep.size() == 1:
            return count
        largest = torch.tensor(count, device=self._groups.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.ep)
        return int(largest)

    def _prefill(
        self, stages: Sequence[Decoder], batch: Sequence[Sequence[_Sequence]], sampling: Sampling, *, first_row: int
    ) -> list[_Sequence]:
        """One forward pass of the prompts of a batch, and the first token of all their samples, which are returned.

        Each element of the batch is the samples of one prompt.
        """
        device = self._groups.device
        token_ids = [samples[0].prompt.student_ids for samples in batch] or [_NO_PROMPT]
        tokens = pad_right(token_ids)[0].to(device)
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        prompt_of_row = [i for i, samples in enumerate(batch) for _ in samples]
        rows = list(range(first_row, first_row + len(prompt_of_row)))
        places = torch.tensor([rows, prompt_of_row], dtype=torch.int64, device=device)
        hidden = self._through(
            stages, tokens.shape, lambda stage, received: stage.prefill(tokens, received, lengths, places)
        )
        started = [sequence for samples in batch for sequence in samples]
        self._append(started, hidden[places[1]] if self._groups.is_last_stage else hidden, sampling)
        return started

    def _decode(self, stages: Sequence[Decoder], active: Sequence[_Sequence], sampling: Sampling) -> None:
        """One more token of all active sequences."""
        tokens = torch.tensor([sequence.ids[-1] for sequence in active] or [0], device=self._groups.device)
        positions = [sequence.length - 1 for sequence in active] or [0]
        hidden = self._through(stages, tokens.shape, lambda stage, received: stage.decode(tokens, received, positions))
        self._append(active, hidden, sampling)

    def _through(
        self,
        stages: Sequence[Decoder],
        shape: Sequence[int],
        forward: Callable[[Decoder, torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """What the last of this rank's stages returns; hidden states between stages are [*shape, H]."""
        config = self._model.config
        received = torch.empty(*shape, config.hidden_size, dtype=config.pipeline_dtype, device=self._groups.device)
        for stage in stages:
            hidden = through_stage(
                partial(forward, stage), received, self._groups.pp, first=stage.is_first, last=stage.is_last
            )
        return hidden

    def _append(self, sequences: Sequence[_Sequence], hidden: torch.Tensor, sampling: Sampling) -> None:
        """Choose the next token of each sequence. hidden [B, H], read on the last stage only."""
        if not sequences:
            return
        chosen = torch.empty(2, len(sequences), dtype=torch.float64, device=self._groups.device)
        if self._groups.is_last_stage:
            uniforms = np.array([sequence.uniforms[len(sequence.ids)] for sequence in sequences])
            chosen[0], chosen[1] = sample_tokens(
                soft_cap(hidden @ self._model.output_weight.T, self._model.logit_softcap),
                torch.from_numpy(uniforms).to(hidden.device),
                shard_start=self._model.vocab_shard[0],
                vocab_size=self._vocab_size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                group=self._groups.tp,
            )
        ids, scores = tensor_from_last_stage(chosen, self._groups.pp).tolist()  # float64 holds both exactly
        for sequence, token, score in zip(sequences, ids, scores, strict=True):
            sequence.append(int(token), score, stop_ids=self._stop_ids)


class _Sequence:
    """One response while it grows."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Literal["stop", "length"] | None = None
        self._max_len = sampling.max_response_len
        # From the seed and the sample alone, and counter-based, so any rank can draw them.
        generator = np.random.Generator(np.random.Philox(key=[sampling.seed, prompt.sample_id]))
        self.uniforms = generator.random(self._max_len)
        """One for each token."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt.student_ids) + len(self.ids)

    def append(self, token: int, logprob: float, *, stop_ids: frozenset[int]) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in stop_ids:
            self.finish = "stop"
        elif len(self.ids) == self._max_len:
            self.finish = "length"

    def rollout(self, weight_version: int) -> Rollout:
        assert self.finish is not None, f"sample {self.prompt.sample_id} has not finished"
        return Rollout(
            sample_id=self.prompt.sample_id,
            weight_version=weight_version,
            student_ids=np.array(self.ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish=self.finish,
        )


def _by_prompt(sequences: Sequence[_Sequence]) -> list[list[_Sequence]]:
    """The samples of each distinct prompt, longest prompts first, so that neighbours in a batch are of like length."""
    groups: dict[bytes, list[_Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt.student_ids.tobytes(), []).append(sequence)
    return sorted(groups.values(), key=lambda samples: -samples[0].length)


def _admitted(waiting: deque[list[_Sequence]], rows: int, num_active: int) -> list[list[_Sequence]]:
    """Take from `waiting` the prompts that fit into the free rows, all samples of a prompt at once.

    None before an eighth of the rows is free: a forward pass for one prompt costs nearly as much as for several.
    """
    if waiting and len(waiting[0]) > rows:  # more samples than rows: they come in parts
        samples = waiting.popleft()
        waiting.extendleft(samples[i : i + rows] for i in reversed(range(0, len(samples), rows)))
    admitted: list[list[_Sequence]] = []
    free = rows - num_active
    if num_active and free < rows / 8:
        return admitted
    while waiting and len(waiting[0]) <= free:
        admitted.append(waiting.popleft())
        free -= len(admitted[-1])
    return admitted


def _passes(groups: Sequence[list[_Sequence]]) -> list[list[list[_Sequence]]]:
    """Cut into parts of at most PREFILL_TOKENS padded prompt tokens each; groups are sorted, the longest first."""
    passes: list[list[list[_Sequence]]] = []
    for samples in groups:
        if not passes or (len(passes[-1]) + 1) * passes[-1][0][0].length > PREFILL_TOKENS:
            passes.append([])
        passes[-1].append(samples)
    return passes


def _close_up(active: list[_Sequence], stages: Sequence[Decoder]) -> None:
    """Drop finished sequences; the last row takes the place of one that leaves."""
    for row in reversed(range(len(active))):
        if active[row].finish is not None:
            last = active.pop()
            if row < len(active):
                active[row] = last
                for stage in stages:
                    stage.move(len(active), row, last.length)
