"""Conversations in each model's own chat template: rows with messages, the rendered ids, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, load_tokenizer
from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.data.rendering import ChatTemplate, render_prompt
from tests.huggingface import save_byte_fallback, save_byte_level

CONVERSATIONS = [
    [{"role": "user", "content": "How many apples?"}],
    [
        {"role": "user", "content": "the cat sat  on\nПривет"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": " {{ bos_token }} 😀"},
    ],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    save_byte_level(root / "qwen")
    save_byte_fallback(root / "llama")
    save_byte_fallback(root / "metaspace", metaspace=True)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def sides(folders) -> dict[str, tuple[Tokenizer, ChatTemplate]]:
    return {
        name: (load_tokenizer(str(folder)), ChatTemplate.load(str(folder), flag="--hf-checkpoint"))
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", ["qwen", "llama", "metaspace"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_ids_are_those_of_transformers(folders, sides, name, messages) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer, template = sides[name]
    reference = transformers.AutoTokenizer.from_pretrained(str(folders[name]))
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = template.render(messages, tokenizer)
    assert ids.dtype == np.int32 and ids.tolist() == expected


def test_special_tokens_are_single_ids_and_bos_stands_once(sides) -> None:
    tokenizer, template = sides["qwen"]
    ids = template.render(CONVERSATIONS[0], tokenizer)
    start, end = 317, 318
    assert (ids == start).sum() == 2 and (ids == end).sum() == 1 and ids[0] == start
    assert tokenizer.decode(ids) == b"user\nHow many apples?\nassistant\n"
    tokenizer, template = sides["llama"]
    ids = template.render(CONVERSATIONS[1], tokenizer)
    assert (ids == tokenizer.bos_id).sum() == 1 and ids[0] == tokenizer.bos_id
    assert (ids == tokenizer.table.stop_ids[0]).sum() == 1
    # A plain prompt still starts with it.
    assert render_prompt("the cat", tokenizer)[0] == tokenizer.bos_id


def load(folder: Path, template: object = None, **settings: object) -> ChatTemplate:
    """The template of a folder with these settings."""
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return ChatTemplate.load(str(folder), flag="--teacher-hf-checkpoint")


def text_of(template: ChatTemplate) -> str:
    recorder = Tokenizer(
        name="", table=None, encode_text=list, encode_chat=lambda text: [ord(c) for c in text]
    )
    return "".join(map(chr, template.render(CONVERSATIONS[0], recorder)))


def test_where_a_template_comes_from(tmp_path) -> None:
    assert text_of(load(tmp_path, "a")) == "a"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert text_of(load(tmp_path, named)) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text_of(load(tmp_path, "a")) == "file"


def test_what_a_template_finds(tmp_path) -> None:
    tokens = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "pad_token": None}
    assert text_of(load(tmp_path, "{{ bos_token }}{{ eos_token }}{{ pad_token }}.", **tokens)) == "<b><e>."
    assert text_of(load(tmp_path, "{{ messages | tojson }}")) == json.dumps(CONVERSATIONS[0])
    assert (
        text_of(
            load(tmp_path, "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        )
        == "1"
    )
    assert text_of(load(tmp_path, "  {% if add_generation_prompt %}\n  a\n  {% endif %}\n")) == "  a\n"
    assert text_of(load(tmp_path, "{{ 'é<' | tojson }}")) == '"é<"'


@pytest.mark.parametrize(
    "template, words",
    [
        (None, ["has no chat template", "--apply-chat-template"]),
        ([{"name": "tool_use", "template": "t"}], ["has no chat template"]),
        ("a\n{% for %}", ["tokenizer_config.json has an invalid template: line 2 of it: "]),
        ("{% break %}", ["tokenizer_config.json has an invalid template: 'break' outside loop"]),
        ("{{ " + "(" * 5000 + "1 }}", ["has an invalid template", "recursion"]),
        (
            5,
            [
                "tokenizer_config.json: chat_template = 5; expected a string, or a list, each entry an "
                "object with"
            ],
        ),
        ({"default": 5}, ["tokenizer_config.json: chat_template = {'default': 5}; expected a string"]),
        ({"tool_use": "t"}, ["has no chat template named default; tokenizer_config.json has tool_use"]),
        (["d"], ["tokenizer_config.json: chat_template = ['d']; expected a string"]),
        (
            [{"name": "default"}],
            ["tokenizer_config.json: chat_template = [{'name': 'default'}]; expected a string"],
        ),
    ],
)
def test_folders_without_a_readable_template(tmp_path, template, words) -> None:
    with pytest.raises(ValueError) as error:
        load(tmp_path, template)
    assert str(error.value).startswith(f"--teacher-hf-checkpoint {tmp_path}: ") and "\n" not in str(
        error.value
    )
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('only\ntwo') }}", ["does not render it: only two"]),
        ("{{ messages[0].content.x.y }}", ["does not render it"]),
        ("{{ messages[0] + 1 }}", ["does not render it"]),
        ("{{ messages.append(1) }}", ["does not render it"]),
        ("{{ messages.__class__.__mro__ }}", ["does not render it"]),
        ("{% if false %}a{% endif %}", ["renders an empty text"]),
        ("{{ 1 / 0 }}", ["does not render it: division by zero"]),
        ("{{ range(1000000) | list }}", ["does not render it: Range too big"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["does not render it: maximum recursion depth"]),
    ],
)
def test_templates_that_fail_on_the_messages(tmp_path, template, words) -> None:
    with pytest.raises(ValueError) as error:
        text_of(load(tmp_path, template))
    assert str(error.value).startswith(f"--teacher-hf-checkpoint {tmp_path}: tokenizer_config.json ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Rows.


@pytest.fixture
def read(tmp_path) -> Callable[..., list[Row]]:
    def read(*rows: object, **overrides) -> list[Row]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "flag": "--prompt-data",
            "input_key": "prompt",
            "response_key": "response",
            "label_key": "label",
            "need_response": False,
            "need_label": False,
            "chat": True,
        }
        return read_prompts(str(path), **(options | overrides))

    return read


def test_rows_hold_messages_or_the_text_of_one(read) -> None:
    messages = CONVERSATIONS[1]
    rows = read({"messages": messages, "label": "l"}, {"prompt": "a"}, {"prompt": messages})
    assert [row.prompt for row in rows] == [messages, [{"role": "user", "content": "a"}], messages]
    assert [row.label for row in rows] == ["l", None, None]
    # --input-key takes precedence over `messages`.
    assert read({"messages": messages, "q": "a"}, input_key="q")[0].prompt == [
        {"role": "user", "content": "a"}
    ]
    assert read({"prompt": "a"}, chat=False)[0].prompt == "a"


@pytest.mark.parametrize(
    "row, overrides, words",
    [
        ({"messages": CONVERSATIONS[0]}, {"chat": False}, ["messages need --apply-chat-template"]),
        ({"messages": []}, {}, ["neither a string nor messages under 'messages'"]),
        ({"messages": "a"}, {"input_key": "messages"}, None),
        ({"messages": [CONVERSATIONS[0][0], "a"]}, {}, ["message 2 is not an object"]),
        ({"prompt": [{"role": "user"}]}, {}, ["message 1", "'role' and 'content'"]),
        ({"messages": [{"role": "user", "content": None}]}, {}, ["message 1"]),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, {}, ["message 1", "surrogate"]),
        ({"messages": 5}, {}, ["neither a string nor messages under 'messages'"]),
    ],
)
def test_wrong_messages_are_named_with_flag_and_line(read, tmp_path, row, overrides, words) -> None:
    if words is None:
        assert len(read({"prompt": "a", "messages": "b"}, row, **overrides)) == 2
        return
    with pytest.raises(ValueError) as error:
        read({"prompt": "a"}, row, **overrides)
    message = str(error.value)
    assert message.startswith(f"--prompt-data {tmp_path / 'rows.jsonl'}, line 2: ") and "\n" not in message
    for word in words:
        assert word in message


def source(rows: list[Row], sides) -> PromptSource:
    student, student_chat = sides["qwen"]
    return PromptSource(
        rows,
        student=student,
        batch_size=1,
        samples_per_prompt=1,
        max_prompt_len=200,
        shuffle=False,
        seed=0,
        dp_rank=0,
        dp_size=1,
        flag="--prompt-data",
        student_chat=student_chat,
        teachers=[sides["llama"]],
    )


def test_each_model_reads_its_own_template(read, sides) -> None:
    (prompt,) = source(read({"messages": CONVERSATIONS[0]}), sides).batch(0)
    for name, ids in (("qwen", prompt.student_ids), ("llama", prompt.teacher_ids)):
        tokenizer, template = sides[name]
        assert ids.tolist() == template.render(CONVERSATIONS[0], tokenizer).tolist()
    assert prompt.student_ids[0] == 317 and prompt.teacher_ids[0] == 1


def test_a_row_that_a_template_refuses_is_named(read, sides) -> None:
    rows = read(
        {"prompt": "a"}, {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    )
    with pytest.raises(
        ValueError, match=r"^--prompt-data \S+, line 2: --hf-checkpoint \S+: chat_template\.jinja does not "
    ):
        source(rows, sides)
