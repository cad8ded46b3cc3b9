"""tools/prepare_prompts.py: which rows are kept or dropped, the reasons, and that
training reads the result.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from megatron_simct.alignment import load_tokenizer, templates
from megatron_simct.commands import prepare_prompts
from megatron_simct.data.prompts import read_prompts
from tests.huggingface import save_byte_fallback, save_byte_level


@pytest.fixture
def prepare(tmp_path, capsys) -> Callable[..., tuple[int, list[Any], dict[str, Any], str]]:
    """prepare(files, mixture, *flags) -> exit code, rows, report, standard error"""

    def prepare(files, mixture, *flags, output="out") -> tuple[int, list[Any], dict[str, Any], str]:
        for name, rows in files.items():
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        (tmp_path / "mixture.yaml").write_text(
            mixture if isinstance(mixture, str) else yaml.safe_dump(mixture)
        )
        argv = ["--mixture", str(tmp_path / "mixture.yaml"), "--data-root", str(tmp_path)]
        code = prepare_prompts.main([*argv, "--output-dir", str(tmp_path / output), *flags])
        error = capsys.readouterr().err
        if code:
            assert error.count("\n") == 1 and not list((tmp_path / output).glob("*"))
            return code, [], {}, error
        text = (tmp_path / output / "prompts.jsonl").read_text()
        report = json.loads((tmp_path / output / "report.json").read_text())
        return code, [json.loads(line) for line in text.splitlines()], report, error

    return prepare


def numbered(count: int, word: str = "apples") -> list[dict]:
    return [{"prompt": f"{i} {word}?", "label": str(i)} for i in range(count)]


def one(**keys) -> dict:
    return {"sources": [{"name": "a", "path": "a.jsonl"} | keys]}


def test_rows_say_where_they_come_from_and_training_reads_them(prepare, tmp_path) -> None:
    code, rows, report, _ = prepare({"a.jsonl": numbered(20)}, one(label_key="label", suffix="\nThink."))
    assert code == 0 and report["rows"] == len(rows) == 20
    assert sorted(row["id"] for row in rows) == sorted(f"a/{i}" for i in range(20))
    assert all(
        row["prompt"] == f"{row['label']} apples?\nThink." and row["id"] == f"a/{row['label']}"
        for row in rows
    )
    assert [row["label"] for row in rows] != sorted((row["label"] for row in rows), key=int), "not shuffled"
    read = read_prompts(
        str(tmp_path / "out" / "prompts.jsonl"),
        flag="",
        input_key="prompt",
        response_key="response",
        label_key="label",
        need_response=False,
        need_label=True,
    )
    assert [(r.prompt, r.label) for r in read] == [(row["prompt"], row["label"]) for row in rows]


def test_counts_and_weights(prepare) -> None:
    files = {f"{name}.jsonl": numbered(50, name) for name in "abc"}
    sources = [{"name": name, "path": f"{name}.jsonl"} for name in "abc"]
    sources = [sources[0] | {"count": 11}, sources[1] | {"weight": 2}, sources[2] | {"weight": 1.0}]
    _, rows, report, _ = prepare(files, {"size": 30, "sources": sources})
    assert [report["sources"][name]["kept"] for name in "abc"] == [11, 13, 6]
    assert len(rows) == 30
    sources[2]["weight"] = 100
    _, _, report, _ = prepare(files, {"size": 90, "sources": sources}, output="short")
    assert (report["sources"]["c"]["wanted"], report["sources"]["c"]["kept"]) == (77, 50)


def test_the_seed_decides_which_and_in_what_order(prepare) -> None:
    results = [
        prepare({"a.jsonl": numbered(40)}, {"seed": seed} | one(count=20), output=str(i))[1:3]
        for i, seed in enumerate((1, 1, 2))
    ]
    (first, report), (again, same_report), (other, _) = results
    assert first == again and report == same_report
    assert {row["id"] for row in first} != {row["id"] for row in other}


def test_every_reason_is_counted(prepare) -> None:
    good = {"prompt": "How many apples?", "label": "#### 7"}
    rows = [
        good,
        good | {"prompt": "  how MANY\napples? "},  # a duplicate
        good | {"prompt": " "},
        {"label": "#### 7"},
        good | {"prompt": "short"},
        good | {"prompt": "x" * 200},
        good | {"prompt": "Taken from a test?"},
        good | {"prompt": "No label here?", "label": "seven"},
        good | {"prompt": "Half of \ud83d?"},
        {"messages": [{"role": "user"}], "label": "#### 7"},
        {"messages": [{"role": "assistant", "content": "Hello there, hello"}], "label": "#### 7"},
    ]
    mixture = one(min_chars=8, max_chars=100, label_key="label", label_pattern="#### (.*)")
    mixture["exclude"] = [{"path": "test.jsonl", "prompt_key": "question"}]
    files = {"a.jsonl": rows, "test.jsonl": [{"question": "taken FROM a test?"}, {"other": 1}]}
    _, kept, report, _ = prepare(files, mixture)
    assert [(row["label"], row["prompt"].split()[-1]) for row in kept] == [("7", "apples?")]
    assert report["sources"]["a"]["dropped"] == {
        "duplicate": 1,
        "empty": 1,
        "no prompt": 1,
        "too few characters": 1,
        "too many characters": 1,
        "excluded": 1,
        "no label": 1,
        "half a surrogate pair": 1,
        "messages without role and content": 1,
        "messages that do not end with a user message": 1,
    }
    assert report["sources"]["a"]["looked_at"] == len(rows)


def test_duplicates_are_found_across_sources_and_forms(prepare) -> None:
    files = {
        "a.jsonl": [{"prompt": "Same?"}],
        "b.jsonl": [
            {"messages": [{"role": "user", "content": "same?"}, {"role": "assistant", "content": "Yes."}]}
        ],
    }
    sources = [{"name": name, "path": f"{name}.jsonl"} for name in "ab"]
    _, rows, report, _ = prepare(files, {"sources": sources})
    assert [row["prompt"] for row in rows] == ["Same?"]
    assert report["sources"]["b"]["dropped"] == {"duplicate": 1}
    _, rows, _, _ = prepare({}, {"sources": sources[1:]}, output="other")
    assert (rows[0]["messages"], rows[0]["response"]) == ([{"role": "user", "content": "same?"}], "Yes.")


def test_both_templates_count_tokens_and_refuse(prepare, tmp_path) -> None:
    save_byte_level(tmp_path / "student")
    save_byte_fallback(tmp_path / "teacher")
    # not for the teacher
    system = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
    ]
    files = {"a.jsonl": [{"prompt": "the cat sat?"}, {"prompt": "9" * 60}, {"messages": system}]}
    flags = (
        "--hf-checkpoint",
        str(tmp_path / "student"),
        "--teacher-hf-checkpoint",
        str(tmp_path / "teacher"),
    )
    _, rows, report, _ = prepare(files, one(), *flags, "--apply-chat-template", "--max-prompt-len", "40")
    assert report["sources"]["a"]["dropped"] == {
        "too long for the student": 1,
        "refused by the teacher's template": 1,
    }
    said = "teacher's template does not render it: no role system"
    assert report["sources"]["a"]["refused"] == {said: {"count": 1, "first": 2}}
    (row,) = rows
    assert 5 < row["student_tokens"] < 40 and 5 < row["teacher_tokens"] < 40
    code, _, _, error = prepare(files, one(), *flags, output="other")
    assert code == 1 and "messages need --apply-chat-template" in error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A template with its variables, and the text that it writes for the message Hi?"""

    name: str
    template: str
    text: str
    flags: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "written",
    [
        Written(
            name="training tag",
            template="{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            text="Hi?",
        ),
        Written(
            name="today's date",
            template="{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}",
            text="TODAY Hi?",
        ),
        Written(
            name="a date of another length",
            template="{{ strftime_now('%A') }}",
            text="Wednesday",
            flags=("--chat-template-date", "2025-12-31"),
        ),
        Written(
            name="a switch",
            template="{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}",
            text="Hi?<think></think>",
            flags=("--chat-template-kwargs", '{"enable_thinking": false}'),
        ),
        Written(
            name="JSON",
            template="{{ messages[0] | tojson(indent=1) }}",
            text='{\n "role": "user",\n "content": "Hi?"\n}',
        ),
    ],
    ids=lambda written: written.name,
)
def test_tokens_are_those_of_what_the_template_writes(prepare, tmp_path, written) -> None:
    save_byte_level(tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text(written.template)
    flags = ("--hf-checkpoint", str(tmp_path / "student"), "--apply-chat-template", *written.flags)
    _, rows, report, error = prepare({"a.jsonl": [{"prompt": "Hi?"}]}, one(), *flags)
    date = report["chat_template"]["chat_template_date"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    text = written.text.replace("TODAY", date)
    expected = load_tokenizer(str(tmp_path / "student")).encode_chat(text)
    assert [row["student_tokens"] for row in rows] == [len(expected)]


def test_reasons_of_templates_are_counted_and_the_first_one_ends_an_empty_mixture(
    prepare, tmp_path, capsys
) -> None:
    save_byte_level(tmp_path / "student")
    template = "{{ raise_exception('too many words in ' ~ messages[0].content) }}"
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    flags = ("--hf-checkpoint", str(tmp_path / "student"), "--apply-chat-template")
    code, _, _, error = prepare({"a.jsonl": [{"prompt": "Hi?"}]}, one(), *flags)
    assert code == 1
    assert (
        "1 refused by the student's template (student's template does not render it: too many words in Hi?)"
        in error
    )
    template = "{% if '9' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}a"
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"{'9' if i else '1'} {i}" + "x" * 500 * (i == 1)} for i in range(40)]
    _, kept, report, _ = prepare({"a.jsonl": rows}, one(), *flags)
    assert len(kept) == 1
    refused = report["sources"]["a"]["refused"]
    assert len(refused) == prepare_prompts.MAX_REASONS
    assert max(map(len, refused)) <= prepare_prompts.MAX_REASON
    assert report["sources"]["a"]["dropped"] == {"refused by the student's template": 39}


def test_a_template_beyond_a_limit_ends_it(prepare, tmp_path, monkeypatch) -> None:
    save_byte_level(tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text("{{ 'a' * 2000 }}")
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 1999)
    flags = ("--hf-checkpoint", str(tmp_path / "student"), "--apply-chat-template")
    code, _, _, error = prepare({"a.jsonl": numbered(3)}, one(), *flags)
    assert code == 1 and error.endswith("student: chat_template.jinja writes more than 1,999 characters\n")


def test_files_of_every_format(prepare, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet and Arrow files are read by pyarrow")
    from pyarrow import parquet

    names = ["list.json", "lines.jsonl.gz", "table.parquet", "stream.arrow", "file.arrow"]
    tables = {
        name: pyarrow.Table.from_pylist([{"prompt": f"{name} {i}?"} for i in range(3)]) for name in names
    }
    parquet.write_table(tables["table.parquet"], tmp_path / "table.parquet")
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), tables[name].schema) as writer:
            writer.write_table(tables[name])
    (tmp_path / "list.json").write_text(json.dumps(tables["list.json"].to_pylist()))
    files = {"lines.jsonl.gz": tables["lines.jsonl.gz"].to_pylist()}
    _, rows, _, _ = prepare(files, {"sources": [{"name": "all", "path": names}]})
    assert sorted(row["prompt"] for row in rows) == sorted(f"{name} {i}?" for name in names for i in range(3))


@pytest.mark.parametrize(
    "mixture, message",
    [
        ("sources: [", "not YAML"),
        ("seed: 2024-13-45", "not YAML"),
        ("sources: []", "sources must be a list of sources"),
        (
            {"sources": [{"name": "a", "path": "a.jsonl", "weigth": 1}]},
            "source 1: unknown key 'weigth'; did you mean 'wei",
        ),
        ({"sources": [{"name": "a"}]}, "source 1: missing 1 required key: 'path'"),
        (one(count=3, weight=1), "has both count and weight"),
        (one(weight=1), "the mixture has no size"),
        ({"size": 3} | one(), "has neither count nor weight"),
        (one(count=0), "must be above 0"),
        (one(prompt_key="a", messages_key="b"), "has both prompt_key and messages_key"),
        (one(label_pattern="("), "label_pattern is not a regular expression"),
        (one(path="absent.jsonl"), "absent.jsonl: No such file"),
        (one(path="mixture.yaml"), "mixture.yaml, line 1: not JSON"),
        (one(path="broken.jsonl"), "source a: "),
        (one(path="broken.jsonl"), "broken.jsonl, line 3: not JSON (Expecting"),
        (one(path="broken.jsonl.gz"), "broken.jsonl.gz: Error -3 while decompressing"),
        (one(path=[]), "source a: path is empty"),
        (one(path=3), "source 1: path 3: expected str | list[str]"),
        (one(count="3"), "source 1: count '3': expected int"),
        (one(count=1.5), "source 1: count 1.5: expected int"),
        (one(suffix=True), "source 1: suffix True: expected str"),
        ({"sources": "a.jsonl"}, "sources 'a.jsonl': expected list"),
        ({"seed": "x"} | one(), "seed 'x': expected int"),
        ({"seed": -1} | one(), "seed -1: must be at least 0"),
        ({"size": 2} | one(count=3), "the counts add up to 3, but size is 2"),
        ({"size": 4} | one(count=3), "the counts add up to 3, but size is 4"),
        (one(label_pattern="(.)"), "has a label_pattern but no label_key"),
        (one(label_key="label", label_pattern="[0-9]+"), "label_pattern '[0-9]+' has no group"),
        (one() | {"exclude": "a.jsonl"}, "exclude 'a.jsonl': expected list"),
        (
            one() | {"exclude": [{"path": "a.jsonl", "promt_key": "label"}]},
            "exclude 1: unknown key 'promt_key'; did you",
        ),
        (
            one() | {"exclude": [{"path": "a.jsonl", "prompt_key": "text"}]},
            "no row has the key text, so it excludes nothing",
        ),
        (one(max_chars=1), "all 3 rows were dropped"),
        ({"sources": one()["sources"] * 2}, "two sources have the same name"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(prepare, tmp_path, mixture, message) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{')
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:12] + b"no deflate")
    code, _, _, error = prepare({"a.jsonl": numbered(3)}, mixture)
    assert code == 1 and message in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--apply-chat-template",),
            "--apply-chat-template: needs --hf-checkpoint or --teacher-hf-checkpoint",
        ),
        (("--max-prompt-len", "0"), "--max-prompt-len 0: must be at least 1"),
        (("--chat-template-kwargs", "{}"), "--chat-template-kwargs: needs --apply-chat-template"),
        (
            ("--teacher-chat-template-kwargs", "{}"),
            "--teacher-chat-template-kwargs: needs --apply-chat-template",
        ),
        (("--chat-template-date", "2025-12-31"), "--chat-template-date: needs --apply-chat-template"),
        (
            ("--apply-chat-template", "--chat-template-date", "31.12.2025"),
            "--chat-template-date 31.12.2025: not a date",
        ),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(prepare, flags, message) -> None:
    code, _, _, error = prepare({"a.jsonl": numbered(3)}, one(), *flags)
    assert code == 1 and message in error


def test_names_are_no_markup(prepare) -> None:
    code, _, report, _ = prepare({"a.jsonl": numbered(3)}, one(name="a[/b]"))
    assert code == 0 and list(report["sources"]) == ["a[/b]"]


def test_an_empty_prompt_may_be_asked_for(prepare, tmp_path) -> None:
    save_byte_level(tmp_path / "student")
    _, rows, _, _ = prepare(
        {"a.jsonl": [{"prompt": ""}]}, one(min_chars=0), "--hf-checkpoint", str(tmp_path / "student")
    )
    assert [row["prompt"] for row in rows] == [""]


def test_nothing_is_overwritten(prepare, tmp_path) -> None:
    prepare({"a.jsonl": numbered(3)}, one())
    before = (tmp_path / "out" / "prompts.jsonl").read_bytes()
    argv = ["--mixture", str(tmp_path / "mixture.yaml"), "--data-root", str(tmp_path)]
    assert prepare_prompts.main([*argv, "--output-dir", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == before


def test_the_mixture_of_the_paper_has_its_sizes() -> None:
    path = str(
        prepare_prompts.Path(prepare_prompts.__file__).parents[2] / "examples" / "prompts" / "paper_10k.yaml"
    )
    counts = prepare_prompts.wanted_counts(prepare_prompts.read_mixture(path))
    assert counts == {"gsm8k": 1800, "orca_math": 2200, "openmathinstruct": 1000, "math": 800, "code": 4200}
