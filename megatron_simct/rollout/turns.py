"""Responses that an environment answers: the student goes on behind each reply, in one sequence.

    environment(messages) -> reply or None

Whatever engine samples a response, the environment reads the conversation so far. Its reply is written in
each model's chat template behind the response, and the student is asked for another one, until there is no
reply or --rollout-max-response-len tokens stand behind the prompt. What the student wrote stays as it is,
token by token; the replies have no loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch.distributed as dist

from megatron_simct.alignment.plan import bytes_before_special
from megatron_simct.data.prompts import Reader
from megatron_simct.data.transcripts import inside_ids
from megatron_simct.parallel.reductions import largest
from megatron_simct.prompt_files import Message
from megatron_simct.records import Prompt, Rollout, Transcript, Turns
from megatron_simct.rollout.engine import RolloutEngine, Sampling

Replies = Callable[[Mapping[int, list[Message]]], Mapping[int, Message | None]]
"""The environment's replies to conversations, by sample id; of some of them None."""

SEEDS_OF_A_TURN = 1 << 40
"""The draws of turn k are those of the seed plus k times this."""


class TurnsEngine:
    """A RolloutEngine that samples with another one, turn by turn. Collective over the whole job."""

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        replies: Replies | None,
        in_replica: Callable[[dict[int, Message | None]], dict[int, Message | None]],
        student: Reader,
        teachers: Callable[[Prompt], Sequence[Reader]],
    ) -> None:
        """replies: None on ranks that do not ask. in_replica: gives every rank of a model replica what the
        one that asks has. teachers: those that read the responses to a prompt."""
        self._engine = engine
        self._replies, self._in_replica = replies, in_replica
        self._student, self._teachers = student, teachers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See RolloutEngine.generate."""
        most = sampling.max_response_len
        talks = [_Talk.begin(prompt, self._student, self._teachers(prompt), most) for prompt in prompts]
        turn, anyone = 0, True
        while anyone:
            going_on = [talk for talk in talks if talk.is_open]
            sampled = self._engine.generate(
                [talk.next_prompt() for talk in going_on],
                replace(sampling, seed=sampling.seed + turn * SEEDS_OF_A_TURN),
            )
            for talk, rollout in zip(going_on, sampled, strict=True):
                talk.add(rollout)
            asked = {talk.prompt.sample_id: talk for talk in going_on if talk.is_open}
            replies = self._ask({i: talk.conversation for i, talk in asked.items()})
            for sample_id, talk in asked.items():
                talk.answer(replies[sample_id])
            turn, anyone = turn + 1, self._anyone(any(talk.is_open for talk in talks))
        return [talk.rollout() for talk in talks]

    def publish(self, weight_version: int) -> None:
        self._engine.publish(weight_version)

    def readers_of(self, prompt: Prompt) -> str:
        """The fingerprint that the responses to this prompt have: Transcript.readers."""
        return _fingerprint([self._student, *self._teachers(prompt)])

    def _ask(self, conversations: Mapping[int, list[Message]]) -> dict[int, Message | None]:
        """The replies: one rank of each model replica asks. Collective over the replica."""
        return self._in_replica({} if self._replies is None else dict(self._replies(conversations)))

    @staticmethod
    def _anyone(is_open: bool) -> bool:
        """Whether a conversation of any rank goes on: ranks sample together."""
        world = dist.group.WORLD
        assert world is not None, "ranks know each other"
        return bool(largest(int(is_open), world))


@dataclass
class _Written:
    """One model's tokens behind its prompt."""

    reader: Reader
    messages: list[Message]
    ids: list[np.ndarray] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def say(self, ids: np.ndarray) -> None:
        """A response."""
        self.spans.append((self.length, self.length + len(ids)))
        self.read(ids)

    def read(self, ids: np.ndarray) -> None:
        """What stands between two responses."""
        self.ids.append(ids)
        self.length += len(ids)

    def behind(self, reply: Message) -> np.ndarray:
        """The ids of what stands between a response and the next one: the end of the turn, the reply, and the
        beginning of the next turn. Without a chat template the reply alone."""
        tokenizer, chat = self.reader
        if chat is None:
            return tokenizer.encode(reply["content"].encode())
        said = str([*self.messages, reply])
        mark = next(mark for mark in map("qx{}zj".format, range(1 << 30)) if mark not in said)
        try:
            text = chat.text([*self.messages, {"role": "assistant", "content": mark}, reply])
        except ValueError as error:
            raise ValueError(
                f"--environment: {chat.name} does not render a reply of the role {reply['role']!r}: {error}"
            ) from None
        if text.count(mark) != 1:
            raise ValueError(f"--environment: {chat.name} writes an answer {text.count(mark)} times")
        return inside_ids(tokenizer, text.split(mark)[1])

    def turns(self) -> Turns:
        """Up to the end of the last response."""
        spans = np.array(self.spans, np.int32).reshape(-1, 2)
        end = int(spans[-1, 1]) if len(spans) else 0
        ids = np.concatenate([np.zeros(0, np.int32), *self.ids])[:end].astype(np.int32)
        return Turns(ids=ids, spans=spans)


@dataclass
class _Talk:
    """One conversation."""

    prompt: Prompt
    student: _Written
    teachers: list[_Written]
    most: int
    """Tokens that may follow the prompt, of any model."""
    is_open: bool = True
    versions: list[int] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    last: Rollout | None = None
    """The newest response. It is not written yet, for what follows decides whether its stop token belongs to
    it."""
    num_bytes: int = 0
    """Bytes of all responses."""

    @classmethod
    def begin(cls, prompt: Prompt, student: Reader, teachers: Sequence[Reader], most: int) -> _Talk:
        asked = prompt.asked
        assert asked is not None, "the rows of prompts were kept"
        to_teacher = asked.prompt if asked.teacher_prompt is None else asked.teacher_prompt
        return cls(
            prompt=prompt,
            student=_Written(student, _messages(asked.prompt)),
            teachers=[_Written(teacher, _messages(to_teacher)) for teacher in teachers],
            most=most,
        )

    @property
    def conversation(self) -> list[Message]:
        """The student's messages, its newest response the last of them."""
        return [*self.student.messages, {"role": "assistant", "content": self._data.decode(errors="replace")}]

    @property
    def _data(self) -> bytes:
        """The bytes of the newest response, up to its first special token."""
        assert self.last is not None, "a response was sampled"
        stopped = self.last.finish == "stop"
        ids = self.last.student_ids[:-1] if stopped else self.last.student_ids
        return bytes_before_special(self.student.reader[0].table, ids)

    def next_prompt(self) -> Prompt:
        """All that the student has read and written so far."""
        ids = np.concatenate([self.prompt.student_ids, *self.student.ids])
        return replace(self.prompt, student_ids=ids, room=self.most - self.student.length)

    def add(self, rollout: Rollout) -> None:
        """The newest response."""
        self.last = rollout
        self.versions.append(rollout.weight_version)
        self.is_open = rollout.finish == "stop"

    def answer(self, reply: Message | None) -> None:
        """Writes the newest response and the reply, if there is one and another response fits behind it."""
        assert self.last is not None, "a response was sampled"
        sides = [self.student, *self.teachers]
        self.is_open = reply is not None
        if reply is None:
            return
        behind = [side.behind(reply) for side in sides]
        plain = self.student.reader[1] is None
        stops = plain or all(
            len(ids) and int(ids[0]) in side.reader[0].table.stop_ids
            for side, ids in zip(sides, behind, strict=True)
        )
        data = self._data
        said = [self.last.student_ids if stops else self.last.student_ids[:-1]]
        for side, ids in zip(sides[1:], behind[1:], strict=True):
            tokenizer = side.reader[0]
            stop = [tokenizer.table.stop_ids[0]] if plain else ids[:1]
            said.append(np.append(tokenizer.encode(data), stop if stops else []).astype(np.int32))
        between = [ids[1:] if stops and not plain else ids for ids in behind]
        if any(
            side.length + len(one) + len(other) >= self.most
            for side, one, other in zip(sides, said, between, strict=True)
        ):
            self.is_open = False
            return
        self._write(said, data)
        for side, ids in zip(sides, between, strict=True):
            side.read(ids)
            side.messages += [{"role": "assistant", "content": data.decode(errors="replace")}, reply]
        self.last = None

    def _write(self, said: Sequence[np.ndarray], data: bytes) -> None:
        assert self.last is not None, "a response was sampled"
        if not len(said[0]):
            return  # it was a stop token that the template does not have
        for side, ids in zip([self.student, *self.teachers], said, strict=True):
            side.say(ids)
        self.logprobs.append(self.last.logprobs[: len(said[0])])
        self.num_bytes += len(data)

    def rollout(self) -> Rollout:
        """The whole of it, once it has ended."""
        assert self.last is not None, "the newest response is written at the end"
        data, finish = self._data, self.last.finish
        of_teachers = []
        for side in self.teachers:
            tokenizer = side.reader[0]
            stop = [tokenizer.table.stop_ids[0]] if finish == "stop" else []
            of_teachers.append(np.append(tokenizer.encode(data), stop).astype(np.int32))
        self._write([self.last.student_ids, *of_teachers], data)
        turns = self.student.turns()
        spelled = self.student.reader[0].decode(turns.ids)
        return Rollout(
            sample_id=self.prompt.sample_id,
            weight_version=self.versions[0],
            student_ids=turns.ids,
            logprobs=np.concatenate(self.logprobs),
            finish=finish,
            transcript=Transcript(
                student=turns,
                teachers=tuple(side.turns() for side in self.teachers),
                counts={"turns": len(turns.spans), "bytes_between": len(spelled) - self.num_bytes},
                readers=_fingerprint([side.reader for side in (self.student, *self.teachers)]),
            ),
        )


def _fingerprint(readers: Sequence[Reader]) -> str:
    """The same for equal tokenizers and templates, which write what stands between two responses."""
    parts = [
        (
            tokenizer.table.fingerprint,
            None if chat is None else [chat.source, dict(chat.special_tokens), dict(chat.arguments)],
        )
        for tokenizer, chat in readers
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _messages(prompt: str | Sequence[Mapping[str, object]]) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]
