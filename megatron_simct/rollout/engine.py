"""The interface of all sources of responses, and the simple ones.

MegatronEngine samples from the training weights, VllmEngine uses servers that reload them, GivenResponses
reads the data's own responses (sft), and ReplayEngine writes another engine's responses, or reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch.distributed as dist

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.files import write_whole
from megatron_simct.records import Prompt, Rollout, Transcript, Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters. They never change the recorded log-probs."""

    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """Sample from this many most probable tokens, and among these from the nucleus of top_p; -1: from all."""
    max_response_len: int
    """In tokens, including the stop token."""
    seed: int
    """With the sample id it determines every random draw of a sample, whatever the layout or the batch."""


class RolloutEngine(Protocol):
    """A source of responses to prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One Rollout a prompt, in the order of the prompts.

        Collective over the ranks of one model replica.
        """
        ...

    def publish(self, weight_version: int) -> None:
        """Give the engine new weights. weight_version: the number of optimizer steps they have seen."""
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """A RolloutEngine that can return responses as they finish."""

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Each response once, in any order, the same on every rank of the model replica;
        collective over it.
        """
        ...


@runtime_checkable
class RacingEngine(StreamingEngine, Protocol):
    """A StreamingEngine that can stop before all responses are finished, and continue them later."""

    def race(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        begun: Mapping[int, Rollout],
        least: int,
        is_enough: Callable[[], bool],
    ) -> Iterator[list[Rollout]]:
        """As `stream` until is_enough() is true, then yields the rest once: responses that have just finished
        and unfinished ones (finish "open") that have a token. Collective over one model replica.

        begun: unfinished responses to continue, by sample id. least: responses that must finish before
        is_enough() can be true. is_enough: has the same value on every rank of the replica.
        """
        ...


def responses(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[list[Rollout]]:
    """Responses as they finish, if the engine supports it; else all at once."""
    if isinstance(engine, StreamingEngine):
        yield from engine.stream(prompts, sampling)
    else:
        yield engine.generate(prompts, sampling)


class GivenResponses:
    """The data's own responses, tokenized for the student and ended by its stop token, or its transcripts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        return [self._rollout(prompt, sampling.max_response_len) for prompt in prompts]

    def publish(self, weight_version: int) -> None:
        """Given responses do not depend on weights."""

    def _rollout(self, prompt: Prompt, max_response_len: int) -> Rollout:
        if prompt.transcript is not None:
            given = prompt.transcript.student
            return Rollout(
                sample_id=prompt.sample_id,
                weight_version=-1,
                student_ids=given.ids,
                logprobs=np.zeros(len(given.labels), np.float32),
                finish="stop" if int(given.ids[-1]) in self._tokenizer.table.stop_ids else "length",
                transcript=prompt.transcript,
            )
        assert prompt.response is not None, f"sample {prompt.sample_id} has no given response"
        content = self._tokenizer.encode(prompt.response.encode())
        ids = np.append(content, np.int32(self._tokenizer.table.stop_ids[0]))[:max_response_len].astype(
            np.int32
        )
        return Rollout(
            sample_id=prompt.sample_id,
            weight_version=-1,
            student_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            finish="stop" if len(content) < max_response_len else "length",
        )


class SharedEngine:
    """For context parallelism: ranks with the same samples, each of whose engines answers a
    share of the prompts."""

    def __init__(self, engine: RolloutEngine, group: dist.ProcessGroup) -> None:
        self._engine, self._group = engine, group

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine.generate. Collective over the group too; all of its ranks get all answers."""
        rank, size = self._group.rank(), self._group.size()
        shares: list[list[Rollout]] = [[] for _ in range(size)]
        dist.all_gather_object(
            shares, self._engine.generate(prompts[rank::size], sampling), group=self._group
        )
        return [shares[i % size][i // size] for i in range(len(prompts))]

    def publish(self, weight_version: int) -> None:
        self._engine.publish(weight_version)


class ReplayEngine:
    """Writes each batch of rollouts as one file per model replica, or answers from such files.

    The files do not depend on the layout that wrote them: a reader takes its own samples from all files of a
    step. One file is a JSON document with the records of one call, named by the step, the data-parallel rank,
    and which of the step's calls it was.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        save_dir: str | None,
        load_dir: str | None,
        dp_rank: int,
        writes: bool,
        readers_of: Callable[[Prompt], str] | None = None,
    ) -> None:
        """readers_of: with an environment, the Transcript.readers of responses to a prompt."""
        self._engine = engine
        self._readers_of = readers_of
        self._save_dir = Path(save_dir) if save_dir else None
        self._load_dir = Path(load_dir) if load_dir else None
        self._dp_rank = dp_rank
        self._writes = writes
        self._step = self._call = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        found = {rollout.sample_id: rollout for some in self.stream(prompts, sampling) for rollout in some}
        return [found[prompt.sample_id] for prompt in prompts]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[Rollout]]:
        """See StreamingEngine."""
        found: dict[int, Rollout] = {}
        loaded = None if self._load_dir is None else iter([self._load(prompts)])
        for some in loaded or responses(self._engine, prompts, sampling):
            found |= {rollout.sample_id: rollout for rollout in some}
            yield some
        if self._save_dir is not None and self._writes:
            self._save([found[prompt.sample_id] for prompt in prompts])

    def publish(self, weight_version: int) -> None:
        self._step, self._call = weight_version, 0
        self._engine.publish(weight_version)

    def _save(self, rollouts: Sequence[Rollout]) -> None:
        assert self._save_dir is not None
        write_rollouts(self._save_dir, rollouts, step=self._step, dp_rank=self._dp_rank, call=self._call)
        self._call += 1

    def _load(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        assert self._load_dir is not None
        files = sorted(self._load_dir.glob(f"rollout_{self._step}.*.json"))
        if not files:
            raise ValueError(
                f"--load-debug-rollout-data {self._load_dir}: no file rollout_{self._step}.*.json"
            )
        rollouts = {rollout.sample_id: rollout for file in files for rollout in _read(file)}
        missing = [p.sample_id for p in prompts if p.sample_id not in rollouts]
        if missing:
            raise ValueError(
                f"--load-debug-rollout-data {self._load_dir}: step {self._step} lacks sample {missing[0]}"
                f" ({len(missing)} missing); it was written with other prompts, --seed or batch sizes, or "
                "with --rollout-oversample, which chooses the samples of a step"
            )
        return [self._of_this_run(rollouts[prompt.sample_id], prompt) for prompt in prompts]

    def _of_this_run(self, rollout: Rollout, prompt: Prompt) -> Rollout:
        """With --simct-on given, teachers of the run that wrote the file may have had other tokens; with an
        environment such a file is refused, for its replies are in their tokens."""
        if prompt.transcript is None:
            written = rollout.transcript.readers if rollout.transcript is not None else ""
            if self._readers_of is not None and written != self._readers_of(prompt):
                raise ValueError(
                    f"--load-debug-rollout-data {self._load_dir}: step {self._step}: sample "
                    f"{rollout.sample_id} was written without --environment, or with other tokenizers or "
                    "chat templates of the student or its teacher; use those, or sample again"
                )
            return rollout
        if not np.array_equal(rollout.student_ids, prompt.transcript.student.ids):
            raise ValueError(
                f"--load-debug-rollout-data {self._load_dir}: step {self._step}: sample {rollout.sample_id} "
                "is not what --prompt-data gives; it was written with other rows, another tokenizer or chat "
                "template, or without --simct-on given"
            )
        return replace(rollout, transcript=prompt.transcript)


def write_rollouts(
    folder: Path, rollouts: Sequence[Rollout], *, step: int, dp_rank: int, call: int = 0
) -> None:
    """A file of one step and one model replica that ReplayEngine reads."""
    path = folder / (f"rollout_{step}.{dp_rank}.{call}.json" if call else f"rollout_{step}.{dp_rank}.json")
    write_whole(path, json.dumps([rollout_row(rollout) for rollout in rollouts]))


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """A response as JSON; float32 numbers are restored exactly."""
    return {
        "sample_id": rollout.sample_id,
        "weight_version": rollout.weight_version,
        "student_ids": rollout.student_ids.tolist(),
        "logprobs": [float(x) for x in rollout.logprobs],
        "finish": rollout.finish,
    } | ({} if rollout.transcript is None else {"transcript": _transcript_row(rollout.transcript)})


def _transcript_row(transcript: Transcript) -> dict[str, Any]:
    """Where the responses lie, and the teachers' tokens; the student's are those of the rollout."""
    return {
        "spans": transcript.student.spans.tolist(),
        "teachers": [{"ids": t.ids.tolist(), "spans": t.spans.tolist()} for t in transcript.teachers],
        "counts": dict(transcript.counts),
        "readers": transcript.readers,
    }


def _transcript_from_row(row: dict[str, Any], student_ids: np.ndarray) -> Transcript:
    def turns(ids: np.ndarray, spans: Sequence[Sequence[int]]) -> Turns:
        return Turns(ids=ids, spans=np.asarray(spans, np.int32).reshape(-1, 2))

    return Transcript(
        student=turns(student_ids, row["spans"]),
        teachers=tuple(turns(np.asarray(t["ids"], np.int32), t["spans"]) for t in row["teachers"]),
        counts={str(name): int(count) for name, count in row["counts"].items()},
        readers=str(row.get("readers", "")),
    )


def _read(file: Path) -> list[Rollout]:
    try:
        return [rollout_from_row(row) for row in json.loads(file.read_text())]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"--load-debug-rollout-data {file}: not a file of rollouts ({type(error).__name__}: {error})"
        ) from None


def rollout_from_row(row: dict[str, Any]) -> Rollout:
    """The response that `rollout_row` wrote."""
    ids = np.asarray(row["student_ids"], np.int32)
    return Rollout(
        sample_id=row["sample_id"],
        weight_version=row["weight_version"],
        student_ids=ids,
        logprobs=np.asarray(row["logprobs"], np.float32),
        finish=row["finish"],
        transcript=_transcript_from_row(row["transcript"], ids) if "transcript" in row else None,
    )
