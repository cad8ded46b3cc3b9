"""Generation by the training weights themselves, with a KV cache, on the same ranks.

Publishing new weights copies and gathers nothing: the next call samples from the parameters that the
optimizer has updated. Samples of one prompt share its forward pass. As sequences finish, their rows of the KV
cache are filled with waiting prompts, or closed up.

Pipeline stages: a token needs all of them in turn, so the sequences are divided into as many lanes as there
are stages, and while a stage computes one lane, the others compute the other lanes. Every rank goes through
the same slots, one after another; rank r computes slot s at tick r + s:

    slot of a rank     0  1  2  3  4  5     (two stages, lanes a and b)
    first rank         a  b  a  b  a  b
    second rank           a  b  a  b  a  b

At the end of a tick the tokens of the lane that has left the last stage are broadcast, and hidden states are
handed on. All ranks are at the same tick then, so the order of messages is fixed. With interleaved stages the
lanes go through a rank's first stage, then through its second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
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
from megatron_simct.parallel.pipeline import hand_on, tensor_from_last_stage
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.decoder import Decoder
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.graphs import StepGraphs, Stepping
from megatron_simct.rollout.sampling import sample_tokens

PREFILL_TOKENS = 8192
"""Limit of the prompt tokens, including padding, of one forward pass; a longer prompt has its own pass."""

_NO_PROMPT = np.zeros(1, np.int32)


class MegatronEngine:
    """Samples responses from a HiddenStateModel under tensor and pipeline parallelism."""

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
        """vocab_size: without padding. batch_size: most sequences that are decoded at a time, but at least
        one for each pipeline stage; it bounds the KV cache.

        progress: called before each pass with the numbers of finished and of all responses of a call.
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
        """All ranks of a replica take the same branches: what a lane does next follows from its own tokens,
        and from the order of the slots.
        """
        pp, stages = self._groups.pp, chunks_of(self._model)
        lanes = self._lanes(sequences, sampling)
        waiting = deque(_by_prompt(sequences))
        # The passes of this rank's last slots, if they went through its last stage. When its newest slot is
        # computed, the last rank computes the one that is pp.size() - 1 - pp.rank() slots older.
        leaving: deque[_Pass | None] = deque([None] * pp.size(), maxlen=pp.size())
        sent: torch.Tensor | None = None
        for number, lane in cycle(product(range(len(stages)), lanes)):
            self._take_tokens(leaving[pp.rank()])
            if number == 0:
                if not self._begin_pass(lane, lanes, waiting):
                    break
                self._progress(sum(s.finish is not None for s in sequences), len(sequences))
            stage, one = stages[number], lane.current
            received = None if one is None or stage.pre_process else self._hidden_states(one.shape)
            hand_on(sent, received, pp)
            sent = None
            if one is not None:
                hidden = one.forward(number, received)
                if not stage.post_process:
                    sent = hidden
                elif one.sequences:
                    one.chosen = self._choose(one, hidden)
            leaving.append(one if number == len(stages) - 1 else None)
        for lane in lanes:
            lane.read(self._stop_ids, late=0)
        self._progress(len(sequences), len(sequences))

    def _lanes(self, sequences: Sequence[_Sequence], sampling: Sampling) -> list[_Lane]:
        """The rows, divided into a lane for each pipeline stage."""
        stages, rows = self._groups.pp.size(), min(self._batch_size, len(sequences))
        length = max((s.longest for s in sequences), default=1 + sampling.max_response_len)
        return [
            _Lane(
                _Run(
                    self._model,
                    self._groups,
                    self._stepping,
                    sampling,
                    rows=max(1, len(range(number, rows, stages))),
                    length=length,
                )
            )
            for number in range(stages)
        ]

    def _begin_pass(self, lane: _Lane, lanes: Sequence[_Lane], waiting: deque[list[_Sequence]]) -> bool:
        """Decide on the lane's next pass, None if it has nothing to do. False when no lane has."""
        lane.read(self._stop_ids, late=self._stepping.late)
        lane.close_up()
        if not lane.prompts:
            divides = len(lanes) > 1
            lane.prompts += _passes(_admitted(waiting, lane.run.rows, len(lane.active), divides=divides))
        unfinished = len(waiting) + sum(len(one.active) + len(one.prompts) for one in lanes)
        prefills, decodes, unfinished = self._most(bool(lane.prompts), bool(lane.active), unfinished)
        lane.current = None
        if prefills:
            lane.current = self._prefill(lane, lane.prompts.popleft() if lane.prompts else [])
        elif decodes:
            lane.current = self._decode(lane)
        return bool(unfinished)

    def _most(self, *counts: int) -> Sequence[int]:
        """The largest of each count of the ranks that share experts: all must pass through a layer together,
        and an idle rank runs a forward pass on one dummy token."""
        if not self._groups.passes_together:
            return counts
        largest = torch.tensor(counts, dtype=torch.int64, device=self._groups.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.exchange)
        return largest.tolist()

    def _prefill(self, lane: _Lane, batch: Sequence[Sequence[_Sequence]]) -> _Pass:
        """The pass over the prompts of a batch; their samples get the lane's next rows. An element of the
        batch is the samples of one prompt."""
        device, run, first = self._groups.device, lane.run, len(lane.active)
        token_ids = [samples[0].prompt.student_ids for samples in batch] or [_NO_PROMPT]
        tokens = pad_right(token_ids)[0].to(device)
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        prompt_of_row = [i for i, samples in enumerate(batch) for _ in samples]
        rows = list(range(first, first + len(prompt_of_row)))
        places = torch.tensor([rows, prompt_of_row], dtype=torch.int64, device=device)
        sequences = [sequence for samples in batch for sequence in samples]
        lane.active += sequences
        if rows:
            run.start(rows, sequences, lengths[places[1]])

        def forward(number: int, received: torch.Tensor | None) -> torch.Tensor:
            stage = run.stages[number]
            hidden = stage.prefill(tokens, received, lengths, places)
            return hidden[places[1]] if stage.is_last else hidden

        return _Pass(lane, sequences, first=first, shape=tuple(tokens.shape), forward=forward)

    def _decode(self, lane: _Lane) -> _Pass:
        """The pass for one more token of all sequences of the lane."""
        longest = max((sequence.length for sequence in lane.active), default=1)
        rows, keys = lane.run.bucket(len(lane.active), longest)

        def forward(number: int, received: torch.Tensor | None) -> torch.Tensor:
            return lane.run.step(number, received, rows, keys)

        return _Pass(lane, list(lane.active), first=0, shape=(rows,), forward=forward)

    def _hidden_states(self, shape: Sequence[int]) -> torch.Tensor:
        """Room for hidden states of another stage, [*shape, H]."""
        config = self._model.config
        return torch.empty(
            *shape, config.hidden_size, dtype=config.pipeline_dtype, device=self._groups.device
        )

    def _choose(self, one: _Pass, hidden: torch.Tensor) -> torch.Tensor:
        """The next token of each sequence of the pass and its log-prob, float64 [2, B]; hidden [B, H] may
        have more rows."""
        run = one.lane.run
        ids, scores = sample_tokens(
            soft_cap(hidden @ self._model.output_weight.T, self._model.logit_softcap),
            run.uniforms_of(slice(one.first, one.first + len(hidden))),
            shard_start=self._model.vocab_shard[0],
            vocab_size=self._vocab_size,
            temperature=run.sampling.temperature,
            top_p=run.sampling.top_p,
            top_k=run.sampling.top_k,
            group=self._groups.tp,
        )
        # float64 represents ids and float32 log-probs exactly
        return torch.stack([ids.double(), scores.double()])[:, : len(one.sequences)].contiguous()

    def _take_tokens(self, one: _Pass | None) -> None:
        """Broadcast the tokens of a pass that has just left the last stage. The host does not read them
        here."""
        if one is None or not one.sequences:
            return
        chosen = one.chosen
        if chosen is None:
            chosen = torch.empty(2, len(one.sequences), dtype=torch.float64, device=self._groups.device)
        tensor_from_last_stage(chosen, self._groups.pp)
        one.lane.run.go_on(slice(one.first, one.first + len(one.sequences)), chosen[0])
        for sequence in one.sequences:
            sequence.asked += 1
        one.lane.unread.append(_Unread(one.sequences, chosen))


@dataclass(slots=True)
class _Lane:
    """Sequences that are decoded together. Row r of the cache holds active[r]."""

    run: _Run
    active: list[_Sequence] = field(default_factory=list)
    prompts: deque[list[list[_Sequence]]] = field(default_factory=deque)
    """Batches of prompts that have been admitted, a pass for each."""
    unread: deque[_Unread] = field(default_factory=deque)
    current: _Pass | None = None
    """The pass that goes through the stages."""

    def read(self, stop_ids: frozenset[int], *, late: int) -> None:
        """Read the tokens of all passes but the last `late` ones."""
        while len(self.unread) > late:
            self.unread.popleft().read(stop_ids)

    def close_up(self) -> None:
        """Drop finished sequences; the last row moves to the place of a dropped one."""
        before = len(self.active)
        for row in reversed(range(before)):
            if not self.active[row].is_open:
                last = self.active.pop()
                if row < len(self.active):
                    self.active[row] = last
                    self.run.move(len(self.active), row, last.length)
        if len(self.active) < before:
            self.run.free(len(self.active))


@dataclass(slots=True)
class _Pass:
    """One forward pass of a lane: of prompts, or of one more token of its sequences."""

    lane: _Lane
    sequences: list[_Sequence]
    """Those that it gives a token."""
    first: int
    """The row of the first of them; the others follow."""
    shape: tuple[int, ...]
    """Shape of the hidden states between stages, without H."""
    forward: Callable[[int, torch.Tensor | None], torch.Tensor]
    """The index of a stage of this rank, and the hidden states of the stage before -> those of this one; of
    the last stage the input of the LM head, a row for each sequence."""
    chosen: torch.Tensor | None = None
    """On the last stage the tokens and their log-probs, float64 [2, B]."""


class _Run:
    """State of a lane on the device: caches, and the last token and next position of each row."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        groups: Groups,
        stepping: Stepping,
        sampling: Sampling,
        *,
        rows: int,
        length: int,
    ) -> None:
        """length: positions of the longest sequence."""
        device = groups.device
        regions = compiled() if stepping.compiled else EAGER
        self.sampling, self.rows = sampling, rows
        self.stages = [
            Decoder(chunk, rows=rows, length=length, regions=regions) for chunk in chunks_of(model)
        ]
        self._stepping, self._length = stepping, length
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
        captures = stepping.graphs and device.type == "cuda" and alone
        self._graphs = StepGraphs(self._first_stage, capture=captures)

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
        return min(rows_up, self.rows), min(keys_up, self._length)

    def step(self, number: int, received: torch.Tensor | None, rows: int, keys: int) -> torch.Tensor:
        """One more token of the first rows, through this rank's stage of this index; see Decoder.decode."""
        if received is None:
            return self._graphs(rows, keys)
        return self.stages[number].decode(self._tokens[:rows], received, self._where[:rows], keys)

    def _first_stage(self, rows: int, keys: int) -> torch.Tensor:
        return self.stages[0].decode(self._tokens[:rows], None, self._where[:rows], keys)

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


def _admitted(
    waiting: deque[list[_Sequence]], rows: int, num_active: int, *, divides: bool
) -> list[list[_Sequence]]:
    """Take from `waiting` the prompts that fit into the free rows of a lane, all samples of a prompt at once.

    divides: the samples of the last one may be divided; other lanes have rows for the rest, and rows that
    stay free for long cost more than a second pass over the prompt. Takes none before an eighth of the rows
    is free: a forward pass for one prompt costs nearly as much as for several.
    """
    admitted: list[list[_Sequence]] = []
    free = rows - num_active
    if num_active and free < rows / 8:
        return admitted
    while waiting and free:
        samples = waiting.popleft()
        most = free if divides else rows  # a prompt with more samples than rows comes in parts
        if len(samples) > most:
            waiting.appendleft(samples[most:])
            samples = samples[:most]
        if len(samples) > free:
            waiting.appendleft(samples)
            break
        admitted.append(samples)
        free -= len(samples)
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
