"""The stream of prompts. The step number alone determines which rows belong to a step and to a rank.

No cursor is saved: step, seed and file determine the batch, for every data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_simct import prompt_files
from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.rendered import RenderedRows, Rendering, flat
from megatron_simct.data.rendering import ChatTemplate, Messages, render_prompt
from megatron_simct.data.transcripts import Side, read_transcript
from megatron_simct.prompt_files import (
    CONVERSATION_KEYS,
    Message,
    RowError,
    label_of,
    prompt_of,
    response_of,
    teacher_prompt_of,
    teachers_of,
)
from megatron_simct.records import Asked, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the file."""

    prompt: str | Messages
    """Messages if chat templates are applied."""
    response: str | None
    label: str | None
    answer: Message | None = None
    """The assistant's message that closes a transcript. Its other answers are in the prompt."""
    teacher_prompt: str | Messages | None = None
    """The prompt that the teacher reads instead of `prompt`. None: it reads the same."""
    teachers: Mapping[str, float] = field(default_factory=dict)
    """The weights of the teachers that score the row, by name, the largest first; empty without --teachers.
    """
    where: str = field(default="", compare=False)
    """Flag, file and line, for error messages."""
    fields: Mapping[str, Any] | None = field(default=None, compare=False)
    """All fields of the row, if a reward is a function of them."""

    @property
    def read_by_teacher(self) -> str | Messages:
        return self.prompt if self.teacher_prompt is None else self.teacher_prompt


def read_prompts(
    path: str,
    *,
    flag: str,
    input_key: str,
    response_key: str,
    label_key: str,
    need_response: bool,
    need_label: bool,
    chat: bool = False,
    keep_fields: bool = False,
    teachers: Sequence[str] = (),
    mixes: Mapping[str, object] = MappingProxyType({}),
    transcripts: bool = False,
) -> list[Row]:
    """The rows of a file. With `chat` a prompt is a list of messages, or a text that becomes one user
    message. keep_fields: set Row.fields. teachers: the names of --teachers; each row has one of them, or
    several that can be mixed (mixes: see teachers_of). transcripts: rows of messages keep their last answer
    as a message, and every other row needs a response.

    Raises ValueError, naming the flag, the file and the line, if the file is invalid.
    """
    rows = []
    for where, fields in prompt_files.read_rows(path, name=f"{flag} {path}"):
        try:
            text_or_messages, answer = prompt_of(fields, (input_key, *CONVERSATION_KEYS))
            in_messages = transcripts and chat and answer is not None
            response = response_of(
                fields, response_key, answer, needed=need_response or (transcripts and not in_messages)
            )
            label = _label(fields, label_key, needed=need_label)
            prompt = _as_read(text_or_messages, chat, where)
            to_teacher = teacher_prompt_of(fields, prompt)
            teacher_prompt = None if to_teacher is None else _as_read(to_teacher, chat, where)
            weights = teachers_of(fields, teachers, mixes=mixes)
        except RowError as error:
            raise ValueError(f"{where}: {error}") from None
        rows.append(
            Row(
                prompt=prompt,
                response=response,
                answer=_closing(response, answer) if transcripts and chat else None,
                label=label,
                teacher_prompt=teacher_prompt,
                teachers=weights,
                where=where,
                fields=fields if keep_fields else None,
            )
        )
    if not rows:
        raise ValueError(f"{flag} {path}: no prompts in the file")
    return rows


def _closing(response: str | None, answer: Message | None) -> Message:
    """The message that closes a transcript: the row's own one, or its response as one."""
    if answer is not None:
        return answer
    assert response is not None, "response_of refuses a row without one"
    return {"role": "assistant", "content": response}


def _as_read(prompt: str | list[Message], chat: bool, where: str) -> str | list[Message]:
    """A prompt as it is rendered: with chat templates, a text becomes one user message.

    Raises ValueError if it cannot be a prompt.
    """
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty, but at least one token must precede the response")
    if not isinstance(prompt, str) and not chat:
        raise ValueError(f"{where}: messages need --apply-chat-template")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and chat else prompt


def _label(fields: dict[str, Any], key: str, *, needed: bool) -> str | None:
    try:
        return label_of(fields, key)
    except RowError:
        if needed:
            raise
        return None


def _render(
    prompt: str | Messages, tokenizer: Tokenizer, chat: ChatTemplate | None, *, where: str
) -> np.ndarray:
    """The ids of a row's prompt for one model, int32 [p]."""
    if isinstance(prompt, str):
        return render_prompt(prompt, tokenizer)
    assert chat is not None, f"{where}: messages without a chat template"
    try:
        return chat.render(prompt, tokenizer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


Reader = tuple[Tokenizer, ChatTemplate | None]
"""One model that reads the prompts."""


Divide = Callable[[int, Callable[[range], Mapping[str, np.ndarray]]], Sequence[Mapping[str, np.ndarray]]]
"""divide(n, make) is [make(a part of range(n)), ...] for all parts, in their order; other ranks may have made
some of them (parallel/node.py)."""


def undivided(
    count: int, make: Callable[[range], Mapping[str, np.ndarray]]
) -> Sequence[Mapping[str, np.ndarray]]:
    """Everything is one part, made here."""
    return [make(range(count))]


def _rendered(
    row: Row, student: Reader, teachers: Sequence[Reader], max_response_len: int | None
) -> Rendering:
    """The ids of the student's prompt, then those of each teacher's prompt. For a row with an answer its
    transcript too, or None if nothing of that can be compared.
    """
    if row.answer is not None:
        assert max_response_len is not None, "transcripts have a limit"
        of_student = _reading(row.prompt, row.answer, student)
        of_teachers = [_reading(row.read_by_teacher, row.answer, teacher) for teacher in teachers]
        try:
            return read_transcript(of_student, of_teachers, max_len=max_response_len)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{row.where}: {error}") from None
    ids = [
        _render(row.prompt, *student, where=row.where),
        *(_render(row.read_by_teacher, *teacher, where=row.where) for teacher in teachers),
    ]
    return ids, None


def _reading(prompt: str | Messages, answer: Message, reader: Reader) -> Side:
    tokenizer, chat = reader
    assert chat is not None and not isinstance(prompt, str), "transcripts are messages"
    return Side(tokenizer=tokenizer, chat=chat, messages=[*prompt, answer])


class PromptSource:
    """Batches of prompts for one data-parallel rank."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        student: Tokenizer,
        batch_size: int | None,
        samples_per_prompt: int,
        max_prompt_len: int,
        shuffle: bool,
        seed: int,
        dp_rank: int,
        dp_size: int,
        flag: str,
        student_chat: ChatTemplate | None = None,
        teachers: Sequence[Reader] = (),
        named_teachers: Mapping[str, Reader] = MappingProxyType({}),
        max_response_len: int | None = None,
        divide: Divide = undivided,
    ) -> None:
        """batch_size counts prompts of the whole job; None: all of them. Prompts of more than max_prompt_len
        tokens on either side are left out and counted in `num_skipped`. `teachers` read the prompts too; if
        a row has a prompt for the teacher, they read that one, and `num_teacher_prompts` counts the row.
        named_teachers: instead of `teachers`; each reads the rows that name it. Chat templates render prompts
        that are messages. max_response_len: the tokens behind the prompt that a transcript (a row with an
        answer) may have; one of which nothing can be compared is left out and counted in `num_masked`.
        divide: who renders which rows. Raises ValueError if no prompt remains, or if a template refuses a
        row.
        """

        def readers(row: Row) -> Sequence[Reader]:
            return [named_teachers[name] for name in row.teachers] if named_teachers else teachers

        def render(some: range) -> Mapping[str, np.ndarray]:
            of = (rows[index] for index in some)
            return flat(_rendered(row, (student, student_chat), readers(row), max_response_len) for row in of)

        self._rows, self._rendered = rows, RenderedRows(divide(len(rows), render))
        fits = self._rendered.longest <= max_prompt_len
        has_answer = np.array([row.answer is not None for row in rows], dtype=bool)
        kept = fits & ~(has_answer & ~self._rendered.compared)
        self._kept = kept.nonzero()[0]
        """int64: the rows that are left, in file order."""
        self.num_skipped = int((~fits).sum())
        self.num_masked = int((fits & ~kept).sum())
        has_teacher = bool(teachers or named_teachers)
        self.num_teacher_prompts = (
            sum(rows[index].teacher_prompt is not None for index in self._kept) if has_teacher else 0
        )
        if not fits.any():
            raise ValueError(
                f"{flag}: all {len(rows)} prompts exceed --rollout-max-prompt-len {max_prompt_len}"
            )
        if not self._kept.size:
            raise ValueError(
                f"{flag}: no answer in any of {int(fits.sum())} rows stands in every chat template's text as "
                f"it is and fits into --rollout-max-response-len {max_response_len}"
            )
        self._batch_size = len(self._kept) if batch_size is None else batch_size
        self._samples_per_prompt = samples_per_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, step: int) -> list[Prompt]:
        """This rank's samples of a step: every dp_size-th of its batch_size x samples_per_prompt samples."""
        total = self._batch_size * self._samples_per_prompt
        return [self._sample(step * total + i) for i in range(self._dp_rank, total, self._dp_size)]

    def samples(self, sample_ids: Iterable[int]) -> list[Prompt]:
        """Any samples of the run, of any rank and step."""
        return [self._sample(sample_id) for sample_id in sample_ids]

    def share(self) -> list[Prompt]:
        """This rank's share of all rows once, in file order, for evaluation."""
        return [self._prompt(i, sample_id=i) for i in range(self._dp_rank, len(self._kept), self._dp_size)]

    def _sample(self, sample_id: int) -> Prompt:
        epoch, position = divmod(sample_id // self._samples_per_prompt, len(self._kept))
        return self._prompt(int(self._epoch_order(epoch)[position]), sample_id=sample_id)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self._kept))
            if self._shuffle:
                np.random.default_rng([self._seed, epoch]).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def _prompt(self, index: int, *, sample_id: int) -> Prompt:
        row = self._rows[self._kept[index]]
        (student_ids, *teachers), transcript = self._rendered[int(self._kept[index])]
        return Prompt(
            sample_id=sample_id,
            student_ids=student_ids,
            teacher_ids=teachers[0] if teachers else np.zeros(0, np.int32),
            other_teacher_ids=tuple(teachers[1:]),
            teacher=next(iter(row.teachers), ""),
            mixture=tuple(row.teachers.items()) if len(row.teachers) > 1 else (),
            response=row.response,
            transcript=transcript,
            label=row.label,
            asked=None
            if row.fields is None
            else Asked(prompt=row.prompt, row=row.fields, teacher_prompt=row.teacher_prompt),
        )
