"""Files of prompts as people have them, and what the prompt, the answer and the label of a row are.

Rows are JSON lines, one JSON list, Parquet or Arrow; text may be packed by gzip and may have byte order
marks. A prompt is a text or a conversation. Training, preparation, evaluation and the check before a run read
files through this module only, so a row means the same to each of them, or each of them refuses it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_simct.json_fields import object_of_pairs

CONVERSATION_KEYS = ("messages", "conversations", "conversation")
"""Keys of a conversation, read if a row has no prompt."""

TEACHER_KEYS = ("teacher_messages", "teacher_prompt", "teacher_system", "teacher_suffix")
"""Keys that only the teacher's prompt uses: see `teacher_prompt_of`."""

_EXPECTED = "expected one JSON object on each line, or one JSON list of objects"
_CSV = "; for a CSV file, pandas.read_csv(FILE).to_json(NEW, orient='records', lines=True) makes JSON lines"
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file; its name must end with .parquet",
    b"ARROW1": "an Arrow file; its name must end with .arrow",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it, or pack it by gzip",
    b"\xfd7zXZ": "packed by xz; unpack it, or pack it by gzip",
    b"BZh": "packed by bzip2; unpack it, or pack it by gzip",
}
"""First bytes of unsupported files."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""The role of each `from` in ShareGPT's format."""
_ANSWERED_ROLES = ("user", "tool")
"""Roles whose messages an assistant answers."""
_BESIDE_MESSAGES = {
    "system": "it would be ignored; make it the first message, with the role 'system'",
    "tools": "they would be ignored: chat templates only get messages",
}
"""Columns that would change a conversation, and are refused."""
_MORE_OF_AN_ANSWER = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Keys of an assistant's message that hold more of its answer than the content."""
_QUOTED_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")

Message = dict[str, Any]
"""{"role": ..., "content": ...}, both strings, and any other keys that a template may read."""


class RowError(ValueError):
    """A row that cannot be used.

    `reason` is the same for all rows of a kind, so rows can be counted by it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


# Rows


def read_rows(path: str | Path, *, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, for messages: `name`, which is the flag and the file, and a line or a row
    number.

    Raises ValueError of one line, beginning with `name` or the place, if the file or one of its rows cannot
    be read.
    """
    kind = Path(path).suffix
    rows = (
        _table_rows(Path(path), kind, name)
        if kind in (".parquet", ".arrow")
        else _text_rows(Path(path), name)
    )
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row


def _text_rows(path: Path, name: str) -> Iterable[tuple[str, Any]]:
    text = _read_text(path, name)
    hint = _EXPECTED + (_CSV if path.suffix in (".csv", ".tsv") else "")
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, name, hint, line=1), start=1):
            yield f"{name}, row {number}", row
        return
    # Not splitlines(): a JSON string may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        # `cat` leaves a byte order mark in front of each file that it joins.
        row_text = line.lstrip("\ufeff")
        if row_text.strip():
            yield f"{name}, line {number}", _parsed(row_text, name, hint, line=number)


def _read_text(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz" or data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: {_reason(error)}") from None
    for start, what in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise ValueError(f"{name}: {what}")
    # PowerShell writes UTF-16, with its mark.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not {encoding.upper()} (byte {error.start}: {error.reason})") from None


def _parsed(text: str, name: str, hint: str, *, line: int) -> Any:
    """The JSON value of a text that starts at this line of the file."""
    try:
        return json.loads(text, object_pairs_hook=object_of_pairs)
    except json.JSONDecodeError as error:
        where = f"{name}, line {line + error.lineno - 1}"
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); {hint}") from None
    except (ValueError, RecursionError) as error:  # too many digits, too deep, a key that stands twice
        raise ValueError(f"{name}, line {line}: {error}") from None


def _table_rows(path: Path, kind: str, name: str) -> Iterable[tuple[str, Any]]:
    try:
        for number, row in enumerate(_arrow_rows(path, kind), start=1):
            yield f"{name}, row {number}", row
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The error of the system or a library, in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{reason}; change its permissions" if isinstance(error, PermissionError) else reason


def _arrow_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("needs the package pyarrow: pip install pyarrow==26.0.1") from None
    with open(path, "rb") as file:
        if kind == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches()
        else:  # a stream, as the library `datasets` writes it, or a file with an index
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
            )
        for batch in batches:
            yield from batch.to_pylist()


# What a row means


def prompt_of(row: dict[str, Any], keys: Sequence[str]) -> tuple[str | list[Message], Message | None]:
    """The prompt under the first of these keys that the row has, and the assistant's message that closes it,
    if any.

    A prompt is a text, or messages up to the one that the assistant answers. Raises RowError.
    """
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise RowError(f"no {keys[0]}", _has(row))
    prompt = row[key]
    if isinstance(prompt, str):
        if _QUOTED_CONVERSATION.match(prompt):
            raise RowError(
                f"a conversation that is a string under {key!r}", "write it as a JSON list, not as a string"
            )
        _check_encodable(prompt, repr(key))
        return prompt, None
    if not isinstance(prompt, list) or not prompt:
        raise RowError(f"neither a string nor messages under {key!r}")
    for beside, way_out in _BESIDE_MESSAGES.items():
        if row.get(beside):
            raise RowError(f"{beside!r} next to messages", way_out)
    messages = [_message(message, f"message {number}") for number, message in enumerate(prompt, start=1)]
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    last = messages[-1]["role"] if messages else None
    if last not in _ANSWERED_ROLES:
        what = "there is no message before the answer" if last is None else f"the last role is {last!r}"
        raise RowError("messages that do not end with a user message", what)
    return messages, answer


def teacher_prompt_of(row: dict[str, Any], prompt: str | Sequence[Message]) -> str | list[Message] | None:
    """The teacher's own prompt, if the row has one; otherwise None.

    `teacher_messages` and `teacher_prompt` replace the prompt. `teacher_system` replaces or adds the first
    message, of the role "system"; `teacher_suffix` is appended to the last message or the text. `prompt` is
    the student's prompt: a text, or messages. Raises RowError."""
    given = [key for key in TEACHER_KEYS if row.get(key) is not None]
    whole = [key for key in given if key in ("teacher_messages", "teacher_prompt")]
    if not given:
        return None
    if whole and len(given) > 1:
        raise RowError("two prompts for the teacher", f"{given[0]!r} and {given[1]!r}; leave one of them out")
    if whole:
        own, answer = prompt_of(row, whole)
        if answer is not None:
            raise RowError(
                f"{whole[0]!r} ends with an answer",
                "the teacher scores the student's response; leave the answer out",
            )
        return own
    for key in given:
        if not isinstance(row[key], str):
            raise RowError(f"{key!r} is not a string", f"its type is {type(row[key]).__name__}")
        _check_encodable(row[key], repr(key))
    suffix, system = row.get("teacher_suffix") or "", row.get("teacher_system")
    if isinstance(prompt, str):
        if system is None:
            return prompt + suffix
        prompt = [{"role": "user", "content": prompt}]
    *before, last = prompt
    messages = [*before, last | {"content": last["content"] + suffix}]
    if system is None:
        return messages
    if not system:
        raise RowError(
            "an empty 'teacher_system'", "leave it out, or write 'teacher_messages' without the role system"
        )
    return [{"role": "system", "content": system}, *messages[messages[0]["role"] == "system" :]]


def teachers_of(
    row: dict[str, Any], names: Sequence[str], *, mixes: Mapping[str, object]
) -> dict[str, float]:
    """The teachers of a row and their weights, which add up to 1: the one under `teacher`, or several under
    `teachers`, {NAME: weight}, that with the largest weight first. Empty without names.

    A row that names none has the only teacher, if there is one. names: of all teachers. mixes: the
    names of those that can be mixed, each with what must be the same of all that a row mixes. Raises RowError
    for another name, for none among several, for several that cannot be mixed, and for weights that are not
    numbers from 1e-6 to 1e6.
    """
    if not names:
        return {}
    one, several = row.get("teacher"), row.get("teachers")
    known = f"the teachers are {', '.join(names)}"
    if one is not None and several is not None:
        raise RowError("two keys for the teacher", "'teacher' and 'teachers'; leave one of them out")
    if one is None and several is None:
        if len(names) > 1:
            raise RowError("no teacher", f"{known}; {_has(row)}")
        return {names[0]: 1.0}
    if several is None:
        several = {one: 1.0}
    if not isinstance(several, dict):
        raise RowError("'teachers' are not weights by name", 'write {"NAME": 0.5, "OTHER": 0.5}')
    # A table has a null for each name that only other rows have.
    weights = {name: weight for name, weight in several.items() if weight is not None}
    for name, weight in weights.items():
        if name not in names:
            raise RowError(f"the unknown teacher {name!r}", known)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-6 <= weight <= 1e6:
            raise RowError("a weight that is not a number from 1e-6 to 1e6", f"that of the teacher {name!r}")
    if not weights:
        raise RowError("no teacher", f"{known}; {_has(row)}")
    if len(weights) > 1:
        for name in weights:
            if name not in mixes:
                why = f"only --simct-interface bytes mixes teachers, not that of {name}; name one of them"
                raise RowError("several teachers", why)
        first = next(iter(weights))
        other = next((name for name in weights if mixes[name] != mixes[first]), None)
        if other is not None:
            why = f"--simct options of {first} and {other} differ, and a mixture has one comparison"
            raise RowError("several teachers", f"{why}; name one of them")
    total = sum(weights.values())
    order = sorted(weights, key=lambda name: (-weights[name], names.index(name)))
    return {name: weights[name] / total for name in order}


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError("messages without role and content", f"{where} is not an object")
    # A table has a null for each key that only other rows' messages have.
    message = {key: content for key, content in value.items() if content is not None}
    if {"from", "value"} <= message.keys() and not {"role", "content"} & message.keys():
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            known = ", ".join(_SPEAKERS)
            raise RowError(f"messages from the unknown speaker {speaker!r}", f"{where}; known are {known}")
        message = {"role": _SPEAKERS[speaker], "content": message.pop("value")} | message
    if message.get("tool_calls") and message.get("role") == "assistant":
        message.setdefault("content", "")  # a message that only calls tools may have none
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list):
        raise RowError(
            "messages without role and content", f"{where} needs 'role' and 'content', both strings"
        )
    if message.get("prefix") is True:
        raise RowError("an unfinished answer", f"{where} has 'prefix': true")
    message["content"] = _content(message["content"], where)
    try:
        _check_encodable(json.dumps(message, ensure_ascii=False), where)
    except TypeError as error:
        raise RowError("messages that are not JSON", f"{where}: {error}") from None
    return message


def _content(content: str | list[Any], where: str) -> str:
    """The text of a message, whose content may come in parts."""
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError(
                f"a part that is not text: {str(kind)[:40]}",
                f"{where}; only parts of type 'text' are supported",
            )
        if not isinstance(part.get("text"), str):
            raise RowError("a part of type 'text' without a string 'text'", where)
    return "".join(part["text"] for part in content)


def response_of(row: dict[str, Any], key: str, answer: Message | None, *, needed: bool) -> str | None:
    """The given response: the text or the assistant's message under `key`, otherwise the answer that ends the
    conversation.

    Raises RowError if there are two that differ, and, if one is needed, if there is none.
    """
    given = row.get(key)
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict) and "role" in given[0]:
        given = _answer_text(_message(given[0], f"the message under {key!r}"), needed=needed)
    closing = None if answer is None else _answer_text(answer, needed=needed and given is None)
    if isinstance(given, str):
        _check_encodable(given, repr(key))
        if closing is not None and closing != given:
            raise RowError("two answers", f"{key!r} differs from the answer that ends the messages")
        return given
    if needed and closing is None:
        raise RowError(f"no {key}", f"expected a string, or messages that end with an answer; {_has(row)}")
    return closing


def _answer_text(answer: Message, *, needed: bool) -> str | None:
    """The text of the assistant's answer. If the answer has more than text: None, or RowError if it is
    needed."""
    for key in _MORE_OF_AN_ANSWER:
        if answer.get(key):
            if needed:
                raise RowError(
                    f"an answer with {key}",
                    "a response must be a string; write it as the chat template renders it",
                )
            return None
    return answer["content"] or None  # an empty string is a placeholder for an answer


def _has(row: dict[str, Any]) -> str:
    return f"the row has {', '.join(row) or 'no keys'}"


def label_of(row: dict[str, Any], key: str) -> str:
    """The label as a string; a number or a boolean in its JSON form.

    Raises RowError.
    """
    value = row.get(key)
    if value is None:
        raise RowError(f"no {key}", _has(row))
    if isinstance(value, str):
        _check_encodable(value, repr(key))
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"no {key}", f"it is {value}")
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise RowError(f"a {key} that is not a string or a number", f"its type is {type(value).__name__}")


def _check_encodable(text: str, where: str) -> None:
    """JSON may escape half a surrogate pair, which has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("half a surrogate pair", f"in {where}; it has no bytes") from None
