"""The stream of prompts: which rows belong to which step and to which rank is arithmetic on the step number.

There is no cursor to save: step, seed and file determine the batch, under any data-parallel size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.data.rendering import ChatTemplate, Messages, render_prompt
from megatron_simct.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the file."""

    prompt: str | Messages
    """Messages where chat templates are applied."""
    response: str | None
    label: str | None
    where: str = field(default="", compare=False)
    """For messages: flag, file and line."""


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
) -> list[Row]:
    """The rows of a JSONL file. With `chat` a prompt is a list of messages, or a text that is the user's one message.

    Raises ValueError, naming the flag, the file and the line, for whatever is wrong with the file.
    """
    rows = []
    try:
        # Not splitlines(): a JSON string may hold U+2028 and other line ends of Unicode as they are.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: not UTF-8 (byte {error.start}: {error.reason})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{flag} {path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected a JSON object")
        prompt_key = "messages" if input_key not in fields and "messages" in fields else input_key
        messages = isinstance(fields.get(prompt_key), list)
        if messages:
            _check_messages(fields[prompt_key], chat=chat, where=f"{where}: the messages under {prompt_key!r}")
        needed = [prompt_key] * (not messages) + [response_key] * need_response + [label_key] * need_label
        for key in needed:
            if not isinstance(fields.get(key), str):
                raise ValueError(
                    f"{where}: needs a string under the key {key!r}; it has {', '.join(fields) or 'no keys'}"
                )
            if not _is_text(fields[key]):
                raise ValueError(f"{where}: the string under {key!r} holds half a surrogate pair, so it has no bytes")
        prompt = fields[prompt_key]
        if not prompt:
            raise ValueError(f"{where}: the prompt under {prompt_key!r} is empty; no token would precede the response")
        if chat and not messages:
            prompt = [{"role": "user", "content": prompt}]
        rows.append(Row(prompt=prompt, response=fields.get(response_key), label=fields.get(label_key), where=where))
    if not rows:
        raise ValueError(f"{flag} {path}: no prompts in the file")
    return rows


def _check_messages(messages: list[Any], *, chat: bool, where: str) -> None:
    """ValueError where a list is not one of messages, or nothing would write it as a text."""
    if not chat:
        raise ValueError(f"{where} need --apply-chat-template")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: number {number} is no object with the strings 'role' and 'content'")
        if not _is_text(json.dumps(message, ensure_ascii=False)):
            raise ValueError(f"{where}: number {number} holds half a surrogate pair, so it has no bytes")


def _is_text(value: str) -> bool:
    """Whether the string can be encoded: JSON may escape half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _render(row: Row, tokenizer: Tokenizer | None, chat: ChatTemplate | None) -> np.ndarray:
    """The ids of a row's prompt for one model, int32 [p]; none where there is no such model."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    if isinstance(row.prompt, str):
        return render_prompt(row.prompt, tokenizer)
    assert chat is not None, f"{row.where}: messages without a chat template"
    try:
        return chat.render(row.prompt, tokenizer)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


class PromptSource:
    """Batches of prompts for one data-parallel rank."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        student: Tokenizer,
        teacher: Tokenizer | None,
        batch_size: int | None,
        samples_per_prompt: int,
        max_prompt_len: int,
        shuffle: bool,
        seed: int,
        dp_rank: int,
        dp_size: int,
        flag: str,
        student_chat: ChatTemplate | None = None,
        teacher_chat: ChatTemplate | None = None,
        others: Sequence[tuple[Tokenizer, ChatTemplate | None]] = (),
    ) -> None:
        """batch_size counts prompts of the whole job; None: all of them. Prompts longer than max_prompt_len tokens on
        either side are left out and counted in `num_skipped`; ValueError where none remain. `teacher` is None where
        none reads them; `others` are those that it is mixed with. The chat templates write prompts that are messages;
        ValueError where one refuses a row."""
        readers = [(student, student_chat), (teacher, teacher_chat), *others]
        rendered = [(row, [_render(row, *reader) for reader in readers]) for row in rows]
        self._rows = [(row, ids) for row, ids in rendered if max(map(len, ids)) <= max_prompt_len]
        self.num_skipped = len(rendered) - len(self._rows)
        if not self._rows:
            raise ValueError(f"{flag}: all {len(rows)} prompts exceed --rollout-max-prompt-len {max_prompt_len}")
        self._batch_size = len(self._rows) if batch_size is None else batch_size
        self._samples_per_prompt = samples_per_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, step: int) -> list[Prompt]:
        """This rank's samples of a step: every dp_size-th of the step's batch_size x samples_per_prompt samples."""
        total = self._batch_size * self._samples_per_prompt
        return [self._sample(step * total + i) for i in range(self._dp_rank, total, self._dp_size)]

    def share(self) -> list[Prompt]:
        """This rank's part of all rows once, in file order: for evaluation."""
        return [self._prompt(i, sample_id=i) for i in range(self._dp_rank, len(self._rows), self._dp_size)]

    def _sample(self, sample_id: int) -> Prompt:
        epoch, position = divmod(sample_id // self._samples_per_prompt, len(self._rows))
        return self._prompt(int(self._epoch_order(epoch)[position]), sample_id=sample_id)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self._rows))
            if self._shuffle:
                np.random.default_rng([self._seed, epoch]).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def _prompt(self, index: int, *, sample_id: int) -> Prompt:
        row, (student_ids, teacher_ids, *others) = self._rows[index]
        return Prompt(
            sample_id=sample_id,
            student_ids=student_ids,
            teacher_ids=teacher_ids,
            other_teacher_ids=tuple(others),
            response=row.response,
            label=row.label,
        )
