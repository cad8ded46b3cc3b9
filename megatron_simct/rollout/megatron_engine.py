"""Generation by the training weights themselves, with a KV cache, on the same ranks.

Publishing new weights copies and gathers nothing: the next call samples from the parameters that the
optimizer has updated. Samples of one prompt share its forward pass. As sequences finish, their rows of the KV
cache are filled with waiting prompts, or closed up.
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
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.regions import EAGER, compiled
from megatron_simct.packing import pad_right
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import tensor_from_last_stage, through_stage
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.decoder import Decoder
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.graphs import StepGraphs, Stepping
from megatron_simct.rollout.sampling import sample_tokens

PREFILL_TOKENS = 8192
"""Limit of the prompt tokens, including padding, of one forward pass; a longer prompt has its own pass."""

_NO_PROMPT = np.zeros(1, np.int32)


class MegatronEngine:
    """Samples responses from a HiddenStateModel under tensor and pipeline parallelism.

    Hidden states go from stage to stage; the last stage chooses the tokens and broadcasts them.
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
        before_reading_weights: Callable[[], None] = lambda: None,
        stepping: Stepping | None = None,
    ) -> None:
        """vocab_size: without padding. batch_size: most sequences that are decoded together; it
        bounds the KV cache.

        progress: called after each token with the numbers of finished and of all responses of a call.
        before_reading_weights: brings the weights up to date. stepping: None: the default of the device.
        """
        self._model = model
        self._groups = groups
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._batch_size = batch_size
        self._progress = progress
        self._stepping = stepping or Stepping.on(groups.device)
        self._before_reading_weights = before_reading_weights
        self._weight_version = 0

    def publish(self, weight_version: int) -> None:
        self._weight_version = weight_version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine.generate. Collective over the tensor-, pipeline- and expert-parallel groups."""
        self._before_reading_weights()
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
        """Row r of the cache holds active[r].

        All ranks of a replica take the same branches, because they see the same tokens.
        """
        rows = max(1, min(self._batch_size, len(sequences)))
        length = max((s.longest for s in sequences), default=1 + sampling.max_response_len)
        run = _Run(
            self._model,
            self._groups,
            self._stepping,
            sampling,
            through=self._through,
            rows=rows,
            length=length,
        )
        waiting = deque(_by_prompt(sequences))
        active: list[_Sequence] = []
        unread: deque[_Unread] = deque()
        while True:
            batches = _passes(_admitted(waiting, rows, len(active)))
            started = sum(len(samples) for batch in batches for samples in batch)
            going_on = len(active) + (started if sampling.max_response_len > 1 else 0)
            unfinished = len(waiting) + len(active) + started
            passes, decodes, unfinished = self._most(len(batches), going_on, unfinished)
            if not unfinished:
                break
            for number in range(passes):
                batch = batches[number] if number < len(batches) else []
                new = [sequence for samples in batch for sequence in samples]
                unread += self._choose(run, new, self._prefill(run, batch, len(active)), first=len(active))
                active += new
            self._read(unread, self._stepping.late)
            _close_up(active, run)
            if active or (decodes and self._groups.passes_together):
                unread += self._choose(run, active, self._decode(run, active), first=0)
            self._read(unread, self._stepping.late)
            _close_up(active, run)
            self._progress(sum(s.finish is not None for s in sequences), len(sequences))
        self._read(unread, 0)
        self._progress(len(sequences), len(sequences))

    def _read(self, unread: deque[_Unread], late: int) -> None:
        """Read the tokens of all steps but the last `late` ones."""
        while len(unread) > late:
            unread.popleft().read(self._stop_ids)

    def _most(self, *counts: int) -> Sequence[int]:
        """The largest of each count of the ranks that share experts: all must pass through a layer together,
        and an idle rank runs a forward pass on one dummy token."""
        if not self._groups.passes_together:
            return counts
        largest = torch.tensor(counts, device=self._groups.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.exchange)
        return largest.tolist()

    def _prefill(self, run: _Run, batch: Sequence[Sequence[_Sequence]], first_row: int) -> torch.Tensor:
        """One forward pass over the prompts of a batch; their samples get the rows from first_row on. Returns
        the input of the LM head for each sample. An element of the batch is the samples of one prompt."""
        device = self._groups.device
        token_ids = [samples[0].prompt.student_ids for samples in batch] or [_NO_PROMPT]
        tokens = pad_right(token_ids)[0].to(device)
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        prompt_of_row = [i for i, samples in enumerate(batch) for _ in samples]
        rows = list(range(first_row, first_row + len(prompt_of_row)))
        places = torch.tensor([rows, prompt_of_row], dtype=torch.int64, device=device)
        hidden = self._through(
            run.stages, tokens.shape, lambda stage, received: stage.prefill(tokens, received, lengths, places)
        )
        if rows:
            run.start(rows, [sequence for samples in batch for sequence in samples], lengths[places[1]])
        return hidden[places[1]] if self._groups.is_last_stage else hidden

    def _decode(self, run: _Run, active: Sequence[_Sequence]) -> torch.Tensor:
        """The input of the LM head for one more token of all active sequences."""
        longest = max((sequence.length for sequence in active), default=1)
        return run.step(*run.bucket(len(active), longest))

    def _through(
        self,
        stages: Sequence[Decoder],
        shape: Sequence[int],
        forward: Callable[[Decoder, torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """The result of the last of this rank's stages; hidden states between stages are [*shape, H]."""
        config = self._model.config
        received = torch.empty(
            *shape, config.hidden_size, dtype=config.pipeline_dtype, device=self._groups.device
        )
        for stage in stages:
            hidden = through_stage(
                partial(forward, stage), received, self._groups.pp, first=stage.is_first, last=stage.is_last
            )
        return hidden

    def _choose(
        self, run: _Run, sequences: Sequence[_Sequence], hidden: torch.Tensor, *, first: int
    ) -> list[_Unread]:
        """Choose the next token of each sequence, whose rows begin at `first`; hidden [B, H] is read on the
        last stage only, and may have more rows. The tokens are not read here."""
        if not sequences:
            return []
        rows = slice(first, first + max(len(sequences), len(hidden) if self._groups.is_last_stage else 0))
        chosen = torch.empty(2, len(sequences), dtype=torch.float64, device=self._groups.device)
        if self._groups.is_last_stage:
            ids, scores = sample_tokens(
                soft_cap(hidden @ self._model.output_weight.T, self._model.logit_softcap),
                run.uniforms_of(rows),
                shard_start=self._model.vocab_shard[0],
                vocab_size=self._vocab_size,
                temperature=run.sampling.temperature,
                top_p=run.sampling.top_p,
                top_k=run.sampling.top_k,
                group=self._groups.tp,
            )
            # float64 represents ids and float32 log-probs exactly
            chosen = torch.stack([ids.double(), scores.double()])[:, : len(sequences)]
        chosen = tensor_from_last_stage(chosen.contiguous(), self._groups.pp)
        run.go_on(slice(first, first + len(sequences)), chosen[0])
        for sequence in sequences:
            sequence.asked += 1
        return [_Unread(sequences, chosen)]


class _Run:
    """State of one call of `generate` on the device: caches, and the last token and next
    position of each row.
    """

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        stepping: Stepping,
        sampling: Sampling,
        *,
        through: Callable[..., torch.Tensor],
        rows: int,
        length: int,
    ) -> None:
        """through: see MegatronEngine. length: positions of the longest sequence."""
        device = groups.device
        regions = compiled() if stepping.compiled else EAGER
        self.sampling, self._through = sampling, through
        self.stages = [
            Decoder(chunk, rows=rows, length=length, regions=regions) for chunk in chunks_of(model)
        ]
        self._stepping, self._num_rows, self._length = stepping, rows, length
        self._tokens, self._where, self._drawn = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        """The last token of each row, its position, and how many tokens have been chosen."""
        self._uniforms = torch.zeros(rows, sampling.max_response_len, dtype=torch.float64, device=device)
        # Ranks of other stages, and of experts, are waited for by the host; and a step runs twice when it is
        # captured, which a cache of keys and values does not notice, and a running state does.
        kinds = self.stages[0].kinds
        alone = groups.pp.size() == 1 and not any(layer.mlp.num_experts for layer in kinds)
        alone = alone and all(isinstance(layer.attention, GroupedQuery) for layer in kinds)
        self._graphs = StepGraphs(self._forward, capture=stepping.graphs and device.type == "cuda" and alone)

    def start(self, rows: Sequence[int], sequences: Sequence[_Sequence], lengths: torch.Tensor) -> None:
        """Register sequences whose prompts, of lengths int64 [R], have been read into
        these consecutive rows.
        """
        part = slice(rows[0], rows[-1] + 1)
        self._uniforms[part] = torch.from_numpy(np.stack([sequence.uniforms for sequence in sequences])).to(
            self._uniforms.device
        )
        self._where[part] = lengths - 1
        self._drawn[part] = 0

    def bucket(self, rows: int, keys: int) -> tuple[int, int]:
        """The bucket: numbers of rows and positions that a step for these numbers computes."""
        rows_up, keys_up = (
            -(-n // step) * step
            for n, step in ((max(rows, 1), self._stepping.rows), (keys, self._stepping.keys))
        )
        return min(rows_up, self._num_rows), min(keys_up, self._length)

    def step(self, rows: int, keys: int) -> torch.Tensor:
        """One more token of the first rows; see Decoder.decode."""
        return self._graphs(rows, keys)

    def _forward(self, rows: int, keys: int) -> torch.Tensor:
        tokens, where = self._tokens[:rows], self._where[:rows]
        return self._through(
            self.stages, tokens.shape, lambda stage, received: stage.decode(tokens, received, where, keys)
        )

    def uniforms_of(self, rows: slice) -> torch.Tensor:
        """The uniform number that the next token of each row is drawn with, float64 [B]."""
        return self._uniforms[rows].gather(1, self._drawn[rows, None])[:, 0]

    def go_on(self, rows: slice, tokens: torch.Tensor) -> None:
        """Store the tokens that have been chosen, and advance the rows."""
        self._tokens[rows] = tokens.long()
        self._where[rows] += 1
        self._drawn[rows] += 1

    def move(self, source: int, target: int, length: int) -> None:
        """Move row `source` to row `target`; `length` positions of its sequence have been computed."""
        for stage in self.stages:
            stage.move(source, target, length)
        for state in (self._tokens, self._where, self._drawn, self._uniforms):
            state[target] = state[source]

    def free(self, first: int) -> None:
        """Free the rows from `first` on. A step that computes them writes to their first position."""
        self._where[first:], self._drawn[first:] = 0, 0


class _Unread:
    """Chosen tokens and log-probs that the host has not read yet."""

    def __init__(self, sequences: Sequence[_Sequence], chosen: torch.Tensor) -> None:
        """chosen float64 [2, B]."""
        self._sequences = list(sequences)
        self._there: torch.cuda.Event | None = None
        self._chosen = chosen
        if chosen.is_cuda:
            self._chosen = torch.empty_like(chosen, device="cpu", pin_memory=True).copy_(
                chosen, non_blocking=True
            )
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self, stop_ids: frozenset[int]) -> None:
        """Wait for the tokens, and append each to its sequence."""
        if self._there is not None:
            self._there.synchronize()
        ids, scores = self._chosen.tolist()
        for sequence, token, score in zip(self._sequences, ids, scores, strict=True):
            if sequence.finish is None:  # else the sequence has stopped before
                sequence.append(int(token), score, stop_ids=stop_ids)


class _Sequence:
    """One response in progress."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Literal["stop", "length"] | None = None
        self.asked = 0
        """Number of tokens that have been chosen; the last of them may not be in `ids` yet."""
        most = sampling.max_response_len
        self._max_len = most if prompt.room is None else min(most, prompt.room)
        # A counter-based generator, seeded by seed and sample id alone: any rank can draw the same numbers.
        generator = np.random.Generator(np.random.Philox(key=[sampling.seed, prompt.sample_id]))
        self.uniforms = generator.random(most)
        """One for each token."""

    @property
    def longest(self) -> int:
        """The most tokens that prompt and response may have."""
        return len(self.prompt.student_ids) + self._max_len

    @property
    def length(self) -> int:
        """Tokens of prompt and response that have been chosen."""
        return len(self.prompt.student_ids) + self.asked

    @property
    def is_open(self) -> bool:
        """Whether it needs another token, as far as its tokens have been read."""
        return self.finish is None and self.asked < self._max_len

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
    """The samples of each distinct prompt, longest prompts first, so that neighbours in a batch
    are of like length.
    """
    groups: dict[bytes, list[_Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt.student_ids.tobytes(), []).append(sequence)
    return sorted(groups.values(), key=lambda samples: -samples[0].length)


def _admitted(waiting: deque[list[_Sequence]], rows: int, num_active: int) -> list[list[_Sequence]]:
    """Take from `waiting` the prompts that fit into the free rows, all samples of a prompt at once.

    Takes none before an eighth of the rows is free: a forward pass for one prompt costs nearly as
    much as for several.
    """
    if waiting and len(waiting[0]) > rows:  # a prompt with more samples than rows comes in parts
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
    """Cut into parts of at most PREFILL_TOKENS padded prompt tokens each; groups are
    sorted, the longest first.
    """
    passes: list[list[list[_Sequence]]] = []
    for samples in groups:
        if not passes or (len(passes[-1]) + 1) * passes[-1][0][0].length > PREFILL_TOKENS:
            passes.append([])
        passes[-1].append(samples)
    return passes


def _close_up(active: list[_Sequence], run: _Run) -> None:
    """Drop finished sequences; the last row moves to the place of a dropped one."""
    before = len(active)
    for row in reversed(range(before)):
        if not active[row].is_open:
            last = active.pop()
            if row < len(active):
                active[row] = last
                run.move(len(active), row, last.length)
    if len(active) < before:
        run.free(len(active))
