"""The text of a chat template: as by transformers' apply_chat_template, construct by
construct, and within limits.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pytest

from megatron_simct.alignment import load_tokenizer, template_worker, templates
from megatron_simct.data.rendering import ChatTemplate, read_date
from tests.huggingface import save_byte_level

DATE = "2024-02-29"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Wie heiß ist es in Köln? <b>&\n"},
    {"role": "assistant", "content": "31"},
    {"role": "user", "content": "Und nachts?"},
]
CALL = [
    TALK[1],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"function": {"name": "wetter", "arguments": {"ort": "Köln", "tage": [1, 2.5, True, None]}}}
        ],
    },
    {"role": "tool", "content": "31"},
]
THOUGHT = [TALK[1], {"role": "assistant", "content": "31", "reasoning_content": "warm"}, TALK[3]]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "é"}],
    }
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A template, and its variables."""

    name: str
    template: str
    messages: list[dict[str, Any]] = field(default_factory=lambda: TALK)
    arguments: dict[str, Any] = field(default_factory=dict)
    says: str | None = None
    """The reason of the refusal, if it differs from transformers'."""


def each(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


RENDERED = [
    # The training tag
    Case(name="generation", template=each("{% generation %}{{ m.content }}{% endgeneration %}|")),
    Case(
        name="generation with dashes",
        template=each("  {%- generation -%}  {{ m.content }}  {%- endgeneration -%}  "),
    ),
    Case(
        name="what generation sets stays inside",
        template="{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    ),
    Case(
        name="the loop inside generation",
        template=each("{% generation %}{{ loop.index }}{% endgeneration %}"),
    ),
    Case(
        name="a namespace inside generation",
        template="{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}",
    ),
    Case(
        name="generation inside if",
        template=each("{% if m.role != 'user' %}{% generation %}a{% endgeneration %}{% endif %}"),
    ),
    Case(
        name="nested generation",
        template="{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
    ),
    Case(name="a line behind generation", template="{% generation %}\na\n{% endgeneration %}\nb"),
    # The clock
    Case(name="date", template="{{ strftime_now('%d %b %Y') }}"),
    Case(name="date in ISO form", template="Today: {{ strftime_now('%Y-%m-%d') }}"),
    Case(name="weekday", template="{{ strftime_now('%A, %B %d, %j') }}"),
    Case(name="time of day", template="{{ strftime_now('%H:%M:%S') }}"),
    Case(
        name="date if there is a clock",
        template="{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}",
    ),
    Case(
        name="date that arguments replace",
        template="{% if not date is defined %}{% set date = strftime_now('%d') %}{% endif %}{{ date }}",
        arguments={"date": "1 Jan"},
    ),
    # tojson
    Case(name="tojson", template="{{ messages | tojson }}"),
    Case(name="tojson keeps letters", template="{{ messages | tojson(ensure_ascii=False) }}"),
    Case(name="tojson in ASCII", template="{{ messages | tojson(ensure_ascii=True) }}"),
    Case(name="tojson by position", template="{{ messages | tojson(true, 2) }}"),
    Case(name="tojson indent", template="{{ messages | tojson(indent=4) }}"),
    Case(name="tojson indent of text", template="{{ messages | tojson(indent='\t') }}"),
    Case(name="tojson separators", template="{{ messages | tojson(separators=(',', ':')) }}"),
    Case(name="tojson separators as a list", template="{{ messages | tojson(separators=[';', '=']) }}"),
    Case(name="tojson sorted", template="{{ {'b': 1, 'a': {'d': 2, 'c': 3}} | tojson(sort_keys=True) }}"),
    Case(name="tojson unsorted", template="{{ {'b': 1, 'a': 2} | tojson }}"),
    Case(
        name="tojson of a call",
        template=each("{{ (m.tool_calls or []) | tojson(ensure_ascii=False) }}"),
        messages=CALL,
    ),
    Case(name="tojson escapes no HTML", template="{{ '<b>&\\'\"' | tojson }}"),
    Case(name="tojson of numbers", template="{{ [1, 1.0, 1e30, -0.0, true, none] | tojson }}"),
    Case(name="tojson of a tuple", template="{{ (1, 2) | tojson }}"),
    Case(name="tojson of another script", template="{{ '你好 😀' | tojson(ensure_ascii=True) }}"),
    # Given variables
    Case(name="tools are none", template="{{ tools is defined }}{{ tools is none }}{{ tools }}"),
    Case(name="tools are false", template="{% if tools %}tools{% else %}none{% endif %}"),
    Case(name="documents are none", template="{{ documents is defined }}{{ documents is none }}"),
    Case(name="tools is not none", template="{% if tools is not none %}tools{% endif %}."),
    Case(
        name="prompt is asked for", template="{{ add_generation_prompt }}{{ add_generation_prompt is true }}"
    ),
    Case(name="special tokens", template="{{ eos_token }}|{{ bos_token }}|{{ unk_token is defined }}"),
    Case(name="special tokens in sums", template="{{ eos_token + 'x' }}{{ eos_token ~ bos_token }}"),
    Case(
        name="undefined",
        template="{{ enable_thinking is defined }}|{{ enable_thinking }}|{{ nothing | default('d') }}",
    ),
    Case(
        name="thinking switched off",
        template="{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% "
        "endif %}",
        arguments={"enable_thinking": False},
    ),
    Case(
        name="thinking by default",
        template="{{ enable_thinking | default(true) }}",
        arguments={"enable_thinking": None},
    ),
    Case(
        name="arguments of every type",
        template="{{ a }}{{ b | tojson }}",
        arguments={"a": "x", "b": [1, {"c": None}]},
    ),
    Case(name="an argument replaces a token", template="{{ eos_token }}", arguments={"eos_token": "<e>"}),
    Case(
        name="an argument named date", template="{{ date }}{{ source }}", arguments={"date": 1, "source": 2}
    ),
    # Messages
    Case(
        name="a key that is null",
        template=each("{{ m.name is defined }}"),
        messages=[TALK[1] | {"name": None}],
    ),
    Case(
        name="content that is null",
        template=each("{{ 'content' in m }}"),
        messages=[{"role": "user", "content": None}],
    ),
    Case(
        name="reasoning",
        template=each("{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}|"),
        messages=THOUGHT,
    ),
    Case(
        name="reasoning under another name",
        template=each("{{ m.reasoning_content }},{{ m.thinking }},{{ m.reasoning }}"),
        messages=[{"role": "assistant", "content": "a", "reasoning": "r"}],
    ),
    Case(
        name="two kinds of reasoning",
        template=each("{{ m.reasoning_content }},{{ m.thinking }}"),
        messages=[{"role": "assistant", "content": "a", "thinking": "t", "reasoning": "r"}],
    ),
    Case(name="order of keys", template=each("{{ m.keys() | list }}"), messages=THOUGHT),
    Case(
        name="parts",
        template=each("{% for p in m.content %}{{ p.text if p.type == 'text' else '<i>' }}{% endfor %}"),
        messages=PARTS,
    ),
    Case(
        name="content is a text",
        template=each("{{ m.content is string }}{{ m.content is mapping }}"),
        messages=PARTS + TALK,
    ),
    Case(name="items", template=each("{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}")),
    Case(name="keys and methods", template=each("{{ m['role'] }}{{ m.get('x', 'y') }}")),
    # Loops
    Case(name="break", template=each("{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}")),
    Case(
        name="continue", template=each("{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}")
    ),
    Case(
        name="break in the inner loop",
        template=each("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
    ),
    Case(
        name="loop variables",
        template=each("{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}"),
    ),
    Case(
        name="neighbours",
        template=each(
            "{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if loop.nextitem is "
            "defined }};"
        ),
    ),
    Case(
        name="loop with a condition",
        template="{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% "
        "endfor %}",
    ),
    Case(name="loop over nothing", template="{% for m in [] %}a{% else %}none{% endfor %}"),
    Case(
        name="recursive loop",
        template="{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}",
    ),
    Case(
        name="backwards",
        template="{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ (messages | reverse | "
        "list)[0].role }}",
    ),
    Case(
        name="slices",
        template="{{ messages[1:][0].role }}{{ messages[-1].content }}{{ messages[1:3] | length }}",
    ),
    Case(name="cycle", template=each("{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}")),
    # Names
    Case(
        name="set in a loop stays inside",
        template="{% set x = 0 %}" + each("{% set x = x + 1 %}") + "{{ x }}",
    ),
    Case(
        name="namespace",
        template="{% set n = namespace(x=0) %}" + each("{% set n.x = n.x + 1 %}") + "{{ n.x }}",
    ),
    Case(name="namespace of a mapping", template="{% set n = namespace({'a': 1}, b=2) %}{{ n.a }}{{ n.b }}"),
    Case(name="namespace with self", template="{% set n = namespace(self=1) %}{{ n.self }}"),
    Case(name="set of a block", template="{% set x %}a{{ 1 + 1 }}{% endset %}{{ x }}{{ x | length }}"),
    Case(name="with", template="{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}"),
    Case(
        name="macro",
        template="{% macro f(x, y='d') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}{{ f('a', y=1) }}",
    ),
    Case(name="call", template="{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}a{% endcall %}"),
    Case(name="dict", template="{{ dict(a=1, b=[2]) | tojson }}{{ dict.fromkeys(['a', 'b'], 0) | tojson }}"),
    Case(name="dict has no attributes", template="{{ dict.mro is defined }}{{ dict.__base__ is defined }}"),
    Case(
        name="joiner and cycler",
        template="{% set j = joiner(', ') %}{% set c = cycler(1, 2) %}" + each("{{ j() }}{{ c.next() }}"),
    ),
    # White space
    Case(name="trimmed blocks", template="  {% if true %}\n  a\n  {% endif %}\n  b\n"),
    Case(name="dashes", template="a  {%- if true -%}  b  {%- endif -%}  c {#- d -#} e"),
    Case(name="plus", template="a\n  {%+ if true %}b{% endif +%}\nc"),
    Case(name="comments", template="a\n{# b #}\nc{# d #}\n"),
    Case(name="raw", template="{% raw %}{{ a }}{% endraw %}"),
    Case(name="the last line", template="a\n\n"),
    Case(name="carriage returns", template="a\r\n{{ 'b' }}\r\nc"),
    # Expressions
    Case(
        name="strip",
        template=each("[{{ m.content | trim }}][{{ m.content.strip() }}][{{ m.content.lstrip('\n ') }}]"),
    ),
    Case(
        name="split", template="{{ '<think>a</think>b'.split('</think>')[-1] }}{{ 'a b'.split() | tojson }}"
    ),
    Case(
        name="starts and ends", template=each("{{ m.content.startswith('Be') }}{{ m.content.endswith('?') }}")
    ),
    Case(
        name="replace", template=each("{{ m.content | replace('e', 'E') }}{{ m.content.replace('i', '1') }}")
    ),
    Case(
        name="upper and title",
        template=each("{{ m.role | upper }}{{ m.role.title() }}{{ m.role | capitalize }}"),
    ),
    Case(name="no HTML escapes", template=each("{{ m.content }}")),
    Case(name="escape filter", template=each("{{ m.content | e }}{{ m.content | safe }}")),
    Case(name="map and join", template="{{ messages | map(attribute='role') | join(', ') }}"),
    Case(
        name="select",
        template="{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
    ),
    Case(
        name="first and last",
        template="{{ (messages | first).role }}{{ (messages | last).role }}{{ messages | length }}",
    ),
    Case(name="sort and unique", template="{{ messages | map(attribute='role') | unique | sort | list }}"),
    Case(name="dictsort", template="{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}"),
    Case(
        name="groupby",
        template="{% for r, g in messages | groupby('role') %}{{ r }}{{ g | length }}{% endfor %}",
    ),
    Case(name="indent", template=each("{{ m.content | indent(2, true) }}")),
    Case(name="format", template="{{ '%s-%03d' | format('a', 7) }}{{ '{}:{b}'.format(1, b=2) }}"),
    Case(
        name="numbers",
        template="{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ 3.0 | int }}{{ 2.567 | round(1) }}",
    ),
    Case(
        name="comparisons",
        template="{{ 1 < 2 <= 2 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ none is none }}",
    ),
    Case(name="inline if", template="{{ 'a' if messages else 'b' }}{{ 'a' if false }}"),
    Case(name="and and or", template="{{ none or 'a' }}{{ 0 and 1 }}{{ not [] }}"),
    Case(
        name="tests",
        template="{{ 3 is odd }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is sequence }}{{ true is boolean "
        "}}",
    ),
    Case(name="concatenation", template="{{ 'a' ~ 1 ~ none ~ true }}"),
    Case(name="unicode", template="「{{ messages[1].content }}」😀\u00a0\u200b"),
    Case(name="escapes in texts", template="{{ 'a\\n\\t\\\\b' }}{{ \"'\" }}"),
    Case(
        name="private attributes are undefined",
        template="{{ ''.__class__ }}{{ messages.__class__ is defined }}",
    ),
    Case(name="a block", template="{% block a %}x{{ eos_token }}{% endblock %}"),
    Case(name="the filter block", template="{% filter upper %}a{{ 'b' }}{% endfilter %}"),
]

REFUSED = [
    Case(
        name="by the template", template="{{ raise_exception('roles must alternate: ' ~ messages[0].role) }}"
    ),
    Case(
        name="by a condition",
        template=each("{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"),
    ),
    Case(name="an attribute of nothing", template="{{ a.b }}"),
    Case(name="a sum with nothing", template="{{ a + 'b' }}"),
    Case(name="a text and a number", template="{{ 'a' + 1 }}"),
    Case(name="messages are not changed", template="{{ messages.append(1) }}"),
    Case(name="a message is not changed", template="{{ messages[0].update(role='x') }}"),
    Case(name="a private name", template="{% set n = namespace(_a=1) %}", says="'_a': the name begins"),
    Case(
        name="a private name set later",
        template="{% set n = namespace() %}{% set n._a = 1 %}",
        says="'_a': the name begins",
    ),
    Case(name="private attributes are not called", template="{{ ''.__class__.__mro__ }}"),
    Case(name="the class of a format", template="{{ '{0.__class__.__mro__}'.format(1) }}"),
    Case(name="a long range", template="{% for i in range(10**9) %}a{% endfor %}"),
    Case(name="division by zero", template="{{ 1 / 0 }}"),
    Case(name="tojson of nothing", template="{{ nothing | tojson }}"),
    Case(
        name="tojson of an argument it lacks",
        template="{{ messages | tojson(default=1) }}",
        says="unexpected keyword argument 'default'",
    ),
    Case(name="an unknown filter", template="{{ messages | tokenize }}"),
    Case(name="an unknown tag", template="{% generate %}"),
    Case(name="generation without an end", template="{% generation %}a"),
    Case(name="break outside of a loop", template="{% break %}"),
    Case(name="another file", template="{% include 'a' %}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_byte_level(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def write(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


@pytest.fixture
def reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """reference(messages, **arguments) -> transformers' text for the template of the folder and DATE"""
    transformers = pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    def text(messages: list[dict[str, Any]], **arguments: Any) -> str:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )

    return text


def ours(folder: Path, case: Case) -> str:
    arguments = json.dumps(case.arguments) if case.arguments else None
    return ChatTemplate.load(str(folder), flag="--hf-checkpoint", kwargs=arguments, date=DATE).text(
        case.messages
    )


def test_names_of_the_cases_are_unique() -> None:
    names = [case.name for case in RENDERED + REFUSED]
    assert len(set(names)) == len(names) > 100


@pytest.mark.parametrize("case", RENDERED, ids=lambda case: case.name)
def test_text_is_that_of_transformers(folder: Path, reference: Any, case: Case) -> None:
    write(folder, case.template)
    assert ours(folder, case) == reference(case.messages, **case.arguments)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refusals_are_those_of_transformers(folder: Path, reference: Any, case: Case) -> None:
    write(folder, case.template)
    with pytest.raises(Exception) as theirs:
        reference(case.messages, **case.arguments)
    with pytest.raises(ValueError) as refusal:
        ours(folder, case)
    assert "\n" not in str(refusal.value)
    assert (case.says or str(theirs.value)) in str(refusal.value)


# The choice among several templates


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Templates in a folder, by the name of the file; `settings` is that of tokenizer_config.json."""

    name: str
    settings: object = None
    files: dict[str, str] = field(default_factory=dict)


LIST = [{"name": "tool_use", "template": "list tools"}, {"name": "default", "template": "list"}]
LAYOUTS = [
    Layout(name="a text", settings="text"),
    Layout(name="a list", settings=LIST),
    Layout(name="a list with one name twice", settings=[*LIST, {"name": "default", "template": "again"}]),
    Layout(name="an object", settings={"default": "object", "tool_use": "object tools"}),
    Layout(name="a file", files={"chat_template.jinja": "file"}),
    Layout(name="a file before a text", settings="text", files={"chat_template.jinja": "file"}),
    Layout(name="a file before a list", settings=LIST, files={"chat_template.jinja": "file"}),
    Layout(
        name="a file and another for tools",
        settings="text",
        files={"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
    ),
    Layout(
        name="a default among the further files",
        settings="text",
        files={"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "further"},
    ),
    Layout(
        name="a file that is not a template", settings="text", files={"additional_chat_templates/a.txt": "a"}
    ),
]
WITHOUT_DEFAULT = [
    Layout(name="a list", settings=LIST[:1]),
    Layout(name="an object", settings={"tool_use": "object tools"}),
    Layout(name="a file", settings="text", files={"additional_chat_templates/tool_use.jinja": "tools"}),
]


def save(folder: Path, layout: Layout) -> None:
    save_byte_level(folder)
    write(folder, layout.settings)
    for name, text in layout.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path, layout: Layout) -> None:
    transformers = pytest.importorskip("transformers")
    save(tmp_path, layout)
    expected = transformers.AutoTokenizer.from_pretrained(str(tmp_path)).get_chat_template()
    assert ChatTemplate.load(str(tmp_path), flag="--hf-checkpoint").text(TALK) == expected


@pytest.mark.parametrize("layout", WITHOUT_DEFAULT, ids=lambda layout: layout.name)
def test_templates_without_a_default_are_refused_by_both(tmp_path: Path, layout: Layout) -> None:
    transformers = pytest.importorskip("transformers")
    save(tmp_path, layout)
    with pytest.raises(ValueError, match="no default"):
        transformers.AutoTokenizer.from_pretrained(str(tmp_path)).get_chat_template()
    with pytest.raises(
        ValueError, match=r"^--hf-checkpoint \S+: has no chat template named default.*tool_use$"
    ):
        ChatTemplate.load(str(tmp_path), flag="--hf-checkpoint")


def test_the_end_of_a_turn_is_found_behind_the_training_tag(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    write(tmp_path, each("{{ m.role }}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"))
    assert load_tokenizer(str(tmp_path)).stop_sources[316] == "chat template"


# Arguments and the date


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A value of --teacher-chat-template-kwargs, and the error line."""

    value: str
    says: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong(value="{enable_thinking: false}", says="{enable_thinking: false}: not JSON ("),
        Wrong(value="[1]", says='[1]: expected a JSON object such as {"enable_thinking": false}'),
        Wrong(value='{"messages": []}', says="messages is set for every prompt and cannot be replaced"),
        Wrong(value='{"add_generation_prompt": false}', says="add_generation_prompt is set for every prompt"),
        Wrong(value='{"tools": []}', says="tools is set for every prompt"),
        Wrong(value='{"documents": []}', says="documents is set for every prompt"),
        Wrong(value='{"raise_exception": 1}', says="raise_exception is set for every prompt"),
        Wrong(
            value='{"strftime_now": "2024"}',
            says="strftime_now is a function; --chat-template-date sets its date",
        ),
        Wrong(value='{"enable_thinkng": false}', says="does not read enable_thinkng"),
    ],
    ids=lambda wrong: wrong.value,
)
def test_an_argument_without_an_effect_is_refused_by_name(tmp_path: Path, wrong: Wrong) -> None:
    save_byte_level(tmp_path)
    write(tmp_path, "{{ messages }}{{ tools }}{{ enable_thinking }}{{ eos_token }}{{ strftime_now('%d') }}")
    with pytest.raises(ValueError) as refusal:
        ChatTemplate.load(str(tmp_path), flag="--teacher-hf-checkpoint", kwargs=wrong.value)
    assert str(refusal.value).startswith("--teacher-chat-template-kwargs") and wrong.says in str(
        refusal.value
    )
    assert "\n" not in str(refusal.value)
    if "thinkng" in wrong.value:
        assert str(refusal.value).endswith(
            "in addition to messages and special tokens it reads enable_thinking"
        )


@pytest.mark.parametrize("text", ["yesterday", "2024-02-30", "20240229", "2024-02-29T10:00", ""])
def test_a_date_has_one_form(text: str) -> None:
    with pytest.raises(ValueError, match=f"^--chat-template-date {text}: not a date; write YYYY-MM-DD$"):
        read_date(text)
    assert read_date("2024-02-29") == "2024-02-29"


def test_without_a_date_it_is_today(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    write(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.date.today().isoformat()
    found = ChatTemplate.load(str(tmp_path), flag="--hf-checkpoint").text(TALK)
    assert before <= found <= datetime.date.today().isoformat()


# Limits


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small limits, and a new process afterwards."""
    monkeypatch.setattr(templates, "MAX_CPU_S", 0.5)
    monkeypatch.setattr(templates, "MAX_MEMORY_MIB", 256)
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 100_000)
    yield
    templates.close()


def render(source: str, **variables: Any) -> str:
    return templates.render(source, TALK, variables=variables, date=DATE, add_generation_prompt=True)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A template, and the limit that it exceeds."""

    template: str
    says: str

    @property
    def cpu_s(self) -> float:
        """Far more than a slow processor needs to reach the other limits."""
        return 0.5 if "CPU time" in self.says else 30.0


@pytest.mark.parametrize(
    "excess",
    [
        Excess(template=ENDLESS, says="takes more than 0.5 s of CPU time"),
        Excess(template="{{ 7 ** (10 ** 9) }}", says="takes more than 0.5 s of CPU time"),
        Excess(
            template="{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ "
            "f(80) }}",
            says="takes more than 0.5 s of CPU time",
        ),
        Excess(template="{{ 'a' * 10 ** 10 }}", says="takes more than 256 MiB of memory"),
        Excess(
            template="{{ messages[0].content.ljust(10 ** 10) }}", says="takes more than 256 MiB of memory"
        ),
        Excess(template=GROWING, says="takes more than 256 MiB of memory"),
        Excess(
            template="{% for i in range(1000) %}{{ 'a' * 101 }}{% endfor %}",
            says="writes more than 100,000 charact",
        ),
        Excess(
            template=" " * (templates.MAX_SOURCE + 1),
            says="has 1,048,577 characters; a template may have 1,048,576",
        ),
    ],
    ids=lambda excess: f"{excess.says[:22]} {excess.template[:20]}",
)
def test_a_template_beyond_a_limit_is_one_line(
    limits: None, monkeypatch: pytest.MonkeyPatch, excess: Excess
) -> None:
    monkeypatch.setattr(templates, "MAX_CPU_S", excess.cpu_s)
    with pytest.raises(templates.TemplateLimit) as refusal:
        render(excess.template)
    assert excess.says in str(refusal.value) and "\n" not in str(refusal.value)
    assert render("{{ messages[3].content }}") == "Und nachts?", "the next template is not rendered"


def test_the_folder_of_an_endless_template_is_refused_by_name(limits: None, tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    write(tmp_path, ENDLESS)
    tokenizer = load_tokenizer(str(tmp_path))  # it looks in vain for the end of a turn
    template = ChatTemplate.load(str(tmp_path), flag="--hf-checkpoint")
    expected = f"^--hf-checkpoint {tmp_path}: tokenizer_config.json takes more than 0.5 s of CPU time$"
    with pytest.raises(templates.TemplateLimit, match=expected):
        template.render(TALK, tokenizer)


def test_a_text_of_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair"):
        render("{{ '\\ud800' }}")


# The process


def test_one_process_renders_and_can_be_replaced() -> None:
    render("a")
    process = templates._process
    assert process is not None
    render("b")
    assert templates._process is process
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert render("c") == "c" and templates._process is not process
    templates.close()
    assert templates._process is None and render("d") == "d"


def test_an_idle_process_ends_and_the_next_template_starts_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    templates.close()
    monkeypatch.setattr(templates, "MAX_IDLE_S", 0.2)
    assert render("a") == "a"
    process = templates._process
    assert process is not None and process.wait(timeout=60) == 0
    assert render("b") == "b" and templates._process is not process
    templates.close()


def test_a_process_that_ends_while_it_is_asked_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    templates.close()
    monkeypatch.setattr(templates, "MAX_IDLE_S", 0.2)
    render("a")
    process, start = templates._process, templates._started
    assert process is not None and process.wait(timeout=60) == 0
    found = iter([process])  # as if it ended between the check and the request
    monkeypatch.setattr(templates, "_started", lambda: next(found, None) or start())
    monkeypatch.setattr(templates, "MAX_IDLE_S", 60.0)
    assert render("b") == "b"


def test_the_process_ends_with_the_one_that_started_it() -> None:
    code = "\n".join(
        [
            "from megatron_simct.alignment import templates",
            "templates.render('a', [], variables={}, date='2024-02-29', add_generation_prompt=True)",
            "print(templates._process.pid, flush=True)",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    try:
        descriptor = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert ended, "the process that renders outlives its owner"


def test_a_forked_process_renders_in_one_of_its_own() -> None:
    render("a")
    ours = templates._process
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        text = "failed"
        try:
            text = render("b") + ("b" if templates._process is not ours else "same process")
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        assert file.read() == "bb"
    assert render("c") == "c" and templates._process is ours


def test_what_the_process_imports_is_none_of_the_package() -> None:
    source = Path(template_worker.__file__).read_text()
    assert "megatron_simct" not in source


def test_the_process_has_jinja2_from_its_parent_alone() -> None:
    """-S: without the packages of its interpreter. The request is that of `templates.variables_of`."""
    limits = {"max_characters": 10, "max_cpu_s": 10.0, "max_memory_mib": 512}
    request = {"source": "{{ bos_token }}", "date": DATE, "variables": None, **limits}
    files = (markupsafe.__file__, jinja2.__file__)
    command = [sys.executable, "-I", "-S", "-B", template_worker.__file__, "60"]
    given, none = (
        subprocess.run(
            [*command, *packages],
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        for packages in (files, ())
    )
    assert json.loads(given.stdout)["reads"] == ["bos_token"], given.stderr
    assert "No module named 'jinja2'" in none.stderr and none.stdout == ""
