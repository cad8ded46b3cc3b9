"""Given conversations whose answers are all trained on: where each answer lies in what a template writes.

A template may write a text of a message as it is, strip it, rewrite it or leave it out. Which of these it
does is found out, not guessed: the conversation is rendered a second time with a mark in the place of each of
the assistant's texts. A text is at the mark's place if both renderings are equal in everything else, and if
what stands there is the text itself, less blanks at its ends. Where a text cannot be placed so beside the
others, because a template looks into it, it is marked alone. What all models' templates write is compared;
all other text of the assistant is masked and counted by its reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_simct.alignment import templates
from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.alignment.turns import MASK_REASONS
from megatron_simct.data.rendering import ChatTemplate, Messages
from megatron_simct.records import Transcript, Turns

THINKING_END, THINKING_START = "</think>", "<think>"
"""Marks of thinking inside a content, which some templates cut apart."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model, and the messages that it reads."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    messages: Messages


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A text of the assistant: characters [start, end) of the string under `key` of a message."""

    message: int
    key: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A template writes characters [skipped, skipped + length) of a part from `start` of its text on."""

    start: int
    skipped: int
    length: int


def read_transcript(
    student: Side, teachers: Sequence[Side], *, max_len: int
) -> tuple[list[np.ndarray], Transcript | None]:
    """The prompt of each model, int32 [p], up to the first compared text, and the responses behind it.

    max_len: tokens that may follow the prompt, of any model; responses that do not fit are masked. The
    transcript is None if no text can be compared. Its counts, in bytes of the messages' own text:
        turns                     compared responses; thinking before an answer is one of its own
        bytes_of_turns            all text of the assistant; the next ones and the compared bytes sum to it
        bytes_masked_<reason>     MASK_REASONS
        bytes_between             the student's text between the first and the last response: the template's
                                  marks, messages of others, and masked text of the assistant
    A response has its stop token if in every model's text one stands behind it.

    Raises ValueError, naming the template, if it refuses the messages.
    """
    sides = [student, *teachers]
    parts = [_parts(side.messages) for side in sides]
    if any(len(of_teacher) != len(parts[0]) for of_teacher in parts):
        raise ValueError("the teacher's own messages do not have as many answers as the student's")
    counts = Counter({f"bytes_masked_{reason}": 0 for reason in MASK_REASONS})
    counts["bytes_masked_tool_calls"] = _bytes_of_calls(student.messages)
    counts["bytes_masked_marks"] = _bytes_of_marks(student.messages, parts[0])
    counts["bytes_of_turns"] = sum(counts.values()) + sum(_size(part.text) for part in parts[0])
    texts = [_text(side, side.messages) for side in sides]
    places = [_placed(*of_side) for of_side in zip(sides, texts, parts, strict=True)]

    compared: list[_Spans] = []
    for number, part in enumerate(parts[0]):
        found = _common([of_side[number] for of_side in parts], [of_side[number] for of_side in places])
        if not isinstance(found, str) and not all(
            len(side.tokenizer.encode(text[slice(*span)].encode()))
            for side, text, span in zip(sides, texts, found, strict=True)
        ):
            found = "blank"
        if (
            not isinstance(found, str)
            and compared
            and any(start < end for (start, _), (_, end) in zip(found, compared[-1], strict=True))
        ):
            found = "teacher_template"  # it writes them in another order
        if isinstance(found, str):
            counts[f"bytes_masked_{found}"] += _size(part.text)
            continue
        counts["bytes_masked_blank"] += _size(part.text) - _size(texts[0][slice(*found[0])])
        compared.append(found)

    prompts, turns = _tokens(sides, texts, compared)
    fits = sum(all(of_side.spans[k, 1] <= max_len for of_side in turns) for k in range(len(compared)))
    counts["bytes_masked_too_long"] += sum(_size(texts[0][slice(*spans[0])]) for spans in compared[fits:])
    if not fits:
        return prompts, None
    of_student = [spans[0] for spans in compared[:fits]]
    between = texts[0][of_student[0][0] : of_student[-1][1]]
    counts["bytes_between"] = _size(between) - sum(_size(texts[0][slice(*span)]) for span in of_student)
    counts["turns"] = fits
    first, *others = (
        Turns(ids=of_side.ids[: of_side.spans[fits - 1, 1]], spans=of_side.spans[:fits]) for of_side in turns
    )
    return prompts, Transcript(student=first, teachers=tuple(others), counts=dict(counts))


_Spans = list[tuple[int, int]]
"""A response's characters [start, end) in the text that each model's template writes."""


# The parts


def _parts(messages: Messages) -> list[_Part]:
    """Texts of the assistant, in order: its reasoning, then the content, which may hold thinking too."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        key = next((key for key in templates.REASONING if isinstance(message.get(key), str)), None)
        if key is not None:
            found.append(_part(number, key, message[key], 0, len(message[key])))
        content = message["content"]
        end = content.rfind(THINKING_END)
        if end >= 0:
            start = content.find(THINKING_START, 0, end)
            begin = start + len(THINKING_START) if start >= 0 else 0
            found.append(_part(number, "content", content, begin, end))
        begin = end + len(THINKING_END) if end >= 0 else 0
        found.append(_part(number, "content", content, begin, len(content)))
    return found


def _part(message: int, key: str, text: str, start: int, end: int) -> _Part:
    return _Part(message=message, key=key, start=start, end=end, text=text[start:end])


def _bytes_of_marks(messages: Messages, parts: Sequence[_Part]) -> int:
    """Bytes of the assistant's contents that are in no part."""
    contents = sum(_size(message["content"]) for message in messages if message["role"] == "assistant")
    return contents - sum(_size(part.text) for part in parts if part.key == "content")


def _bytes_of_calls(messages: Messages) -> int:
    """Bytes of the assistant's tool calls, as JSON."""
    calls = [m["tool_calls"] for m in messages if m["role"] == "assistant" and m.get("tool_calls")]
    return sum(_size(json.dumps(call, ensure_ascii=False)) for call in calls)


def _size(text: str) -> int:
    return len(text.encode())


# Their places


def _text(side: Side, messages: Messages) -> str:
    try:
        return side.chat.text(messages, answered=True)
    except templates.TemplateLimit as error:
        raise templates.TemplateLimit(f"{side.chat.name} {error}") from None
    except ValueError as error:
        raise ValueError(f"{side.chat.name} does not render it: {error}") from None


def _placed(side: Side, text: str, parts: Sequence[_Part]) -> list[_Place | None]:
    """Where the template writes each part; None if it does not write it as it is."""
    salt = next(
        s for s in map("qx{}zj".format, range(1 << 30)) if s not in text and s not in str(side.messages)
    )
    marks = [f"{salt}n{number}n" for number in range(len(parts))]

    def of(numbers: Sequence[int]) -> list[_Place | None] | None:
        chosen = [(parts[number], marks[number]) for number in numbers]
        try:
            marked = side.chat.text(_marked(side.messages, chosen), answered=True)
        except templates.TemplateLimit:
            raise
        except ValueError:  # the template refuses a mark in this place
            return None
        return _matched(text, marked, chosen)

    written = [number for number, part in enumerate(parts) if part.text]
    found = of(written)
    if found is None:
        found = [(of([number]) or [None])[0] for number in written]
    places = dict(zip(written, found, strict=True))
    return [places.get(number) for number in range(len(parts))]


def _marked(messages: Messages, chosen: Sequence[tuple[_Part, str]]) -> Messages:
    """The messages with a mark in the place of each chosen part."""
    marked = [dict(message) for message in messages]
    for part, mark in reversed(chosen):  # of one string, the last part first
        message = marked[part.message]
        message[part.key] = message[part.key][: part.start] + mark + message[part.key][part.end :]
    return marked


def _matched(text: str, marked: str, chosen: Sequence[tuple[_Part, str]]) -> list[_Place | None] | None:
    """The place of each chosen part; None for one that is not written. None for all if the two texts differ
    in anything but the parts."""
    order = sorted((marked.find(mark), k) for k, (_, mark) in enumerate(chosen) if mark in marked)
    ends = [where for where, _ in [*order, (len(marked), -1)][1:]]
    places: list[_Place | None] = [None] * len(chosen)
    position = order[0][0] if order else len(marked)
    if text[:position] != marked[:position]:
        return None
    for (where, k), end in zip(order, ends, strict=True):
        part, mark = chosen[k]
        behind = marked[where + len(mark) : end]
        found = next(
            (
                (left, right)
                for left, right in _stripped(part.text, blanks=_blanks_at(text, position))
                if text.startswith(behind, position + right - left)
                and text.startswith(part.text[left:right], position)
            ),
            None,
        )
        if found is None:
            return None
        places[k] = _Place(start=position, skipped=found[0], length=found[1] - found[0])
        position += found[1] - found[0] + len(behind)
    return places if position == len(text) else None


def _stripped(text: str, *, blanks: int) -> Iterator[tuple[int, int]]:
    """Ranges of a text that leave out only blanks at its ends, the longest first. At most as many as it has
    characters, and one. blanks: with how many blanks the range begins, unless the text is blank."""
    head, tail = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    if head == len(text):  # any of its ends
        yield from ((left, len(text)) for left in range(head + 1))
    elif blanks <= head:
        yield from ((head - blanks, len(text) - right) for right in range(tail + 1))


def _blanks_at(text: str, position: int) -> int:
    """The number of blanks in a text from a position on."""
    end = position
    while end < len(text) and text[end].isspace():
        end += 1
    return end - position


def _common(parts: Sequence[_Part], places: Sequence[_Place | None]) -> _Spans | str:
    """What all models' texts have of a part, or why it is masked."""
    if any(part.text != parts[0].text for part in parts):
        return "other_text"
    if places[0] is None:
        return "student_template"
    found = [place for place in places if place is not None]
    if len(found) < len(places):
        return "teacher_template"
    first = max(place.skipped for place in found)
    last = min(place.skipped + place.length for place in found)
    if last <= first:
        return "blank"
    return [(place.start + first - place.skipped, place.start + last - place.skipped) for place in found]


# Their tokens


def _tokens(
    sides: Sequence[Side], texts: Sequence[str], compared: Sequence[_Spans]
) -> tuple[list[np.ndarray], list[Turns]]:
    """Each model's prompt, and all responses with what lies between them.

    A response is tokenized apart from what stands around it, as when it is sampled. Teachers read what the
    student's tokens spell, which is the text in another normal form if its tokenizer has one (NFC).
    """
    prompts, contents, behind = [], [], []
    written = [texts[0][slice(*of_sides[0])].encode() for of_sides in compared]
    spelled = [sides[0].tokenizer.decode(sides[0].tokenizer.encode(data)) for data in written]
    for i, (side, text) in enumerate(zip(sides, texts, strict=True)):
        spans = [of_sides[i] for of_sides in compared]
        ends = [*(start for start, _ in spans), len(text)]
        assert side.tokenizer.encode_chat is not None, f"{side.tokenizer.name} cannot encode a chat template"
        prompts.append(np.asarray(side.tokenizer.encode_chat(text[: ends[0]]), np.int32))
        if not prompts[-1].size:
            raise ValueError(f"{side.chat.name} writes nothing before the first answer")
        contents.append([side.tokenizer.encode(data) for data in (spelled if i else written)])
        behind.append(
            [inside_ids(side.tokenizer, text[end:to]) for (_, end), to in zip(spans, ends[1:], strict=True)]
        )
    stops = [
        all(
            of_side[k].size and int(of_side[k][0]) in side.tokenizer.table.stop_ids
            for side, of_side in zip(sides, behind, strict=True)
        )
        for k in range(len(compared))
    ]
    turns = []
    for of_side, marks in zip(contents, behind, strict=True):
        sizes = [len(ids) + stop for ids, stop in zip(of_side, stops, strict=True)]
        whole = [len(ids) + len(after) for ids, after in zip(of_side, marks, strict=True)]
        starts = np.cumsum([0, *whole])[:-1].astype(np.int32)
        turns.append(
            Turns(
                ids=np.concatenate(
                    [
                        np.zeros(0, np.int32),
                        *(ids for pair in zip(of_side, marks, strict=True) for ids in pair),
                    ]
                ),
                spans=np.stack([starts, starts + np.array(sizes, np.int32)], axis=1),
            )
        )
    return prompts, turns


def inside_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of text inside a rendered template, int32: without the blank that some tokenizers put first."""
    assert tokenizer.encode_chat is not None, f"{tokenizer.name} cannot encode a chat template"
    ids = np.asarray(tokenizer.encode_chat(text), np.int32)
    special = tokenizer.table.special[ids]
    first = int(special.argmax()) if special.any() else ids.size
    lead = tokenizer.decode(ids[:first])
    if lead.startswith(b" ") and not text.encode().startswith(lead):
        ids = np.concatenate([tokenizer.encode(lead[1:]), ids[first:]])
    return ids
