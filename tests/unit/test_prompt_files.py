"""Files of prompts as people have them: the meaning of each form for every reader, and named refusals."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_simct.commands import build_alignment_map, evaluate, prepare_prompts, select_responses
from megatron_simct.data.prompts import Row, read_prompts
from megatron_simct.evaluation.benchmarks import read_problems
from megatron_simct.prompt_files import RowError, label_of, prompt_of, read_rows, teacher_prompt_of

BOM = b"\xef\xbb\xbf"
ROW = {"prompt": "Grüße?", "label": "7"}
ASKED = {"role": "user", "content": "What is 17 times 3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is 51."}


def train(path: Path, **overrides: Any) -> list[Row]:
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


def prepare(path: Path, **keys: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of a file that tools/prepare_prompts.py keeps, and the number that it
    drops for each reason.
    """
    mixture = path.parent / "mixture.yaml"
    source = {"name": "a", "path": path.name} | keys
    mixture.write_text(yaml.safe_dump({"sources": [source, {"name": "kept", "path": "kept.jsonl"}]}))
    (path.parent / "kept.jsonl").write_text('{"prompt": "so that one row is left"}')
    root = str(path.parent)
    rows, report = prepare_prompts.mix(prepare_prompts.read_mixture(str(mixture)), Path(root), {}, 100)
    kept = sorted((row for row in rows if row["source"] == "a"), key=lambda row: int(row["id"].split("/")[1]))
    return kept, report["sources"]["a"]["dropped"]


def write(folder: Path, content: Any, name: str = "rows.jsonl") -> Path:
    """A file of these bytes, or with one row on each line."""
    rows = content if isinstance(content, list) else [content]
    data = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(data)
    return folder / name


# Files


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form that rows may have in a file."""

    name: str
    file: str = "rows.jsonl"
    content: bytes


LINE = json.dumps(ROW, ensure_ascii=False).encode()
OTHER = json.dumps({"prompt": "Zwei?", "label": 8}).encode()
LIST = json.dumps([ROW, json.loads(OTHER)], indent=2, ensure_ascii=False).encode()
FORMS = [
    Form(name="lines", content=LINE + b"\n" + OTHER),
    Form(name="a mark before the first row", content=BOM + LINE + b"\n" + OTHER),
    Form(name="two files with marks, joined by cat", content=BOM + LINE + b"\n" + BOM + OTHER + b"\n" + BOM),
    Form(
        name="lines as Windows ends them, and blank ones",
        content=b"\r\n" + LINE + b"\r\n \t\r\n" + OTHER + b"\r\n",
    ),
    Form(name="UTF-16, as PowerShell writes it", content=(LINE + b"\r\n" + OTHER).decode().encode("utf-16")),
    Form(name="a list", file="rows.json", content=LIST),
    Form(name="a list with a mark", file="rows.json", content=BOM + LIST),
    Form(name="a list called lines", content=LIST),
    Form(name="lines called a list", file="rows.json", content=LINE + b"\n" + OTHER),
    Form(name="lines by another name", file="rows.ndjson", content=LINE + b"\n" + OTHER),
    Form(name="packed lines", file="rows.jsonl.gz", content=gzip.compress(BOM + LINE + b"\n" + OTHER)),
    Form(name="a packed list", file="rows.json.gz", content=gzip.compress(LIST)),
    Form(name="packed without saying so", content=gzip.compress(LINE + b"\n" + OTHER)),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_reader_reads_every_form(tmp_path: Path, form: Form) -> None:
    path = write(tmp_path, form.content, form.file)
    texts, labels = ["Grüße?", "Zwei?"], ["7", "8"]
    rows = train(path, chat=False, need_label=True)
    assert ([row.prompt for row in rows], [row.label for row in rows]) == (texts, labels)
    kept, dropped = prepare(path, label_key="label")
    assert ([row["prompt"] for row in kept], [row["label"] for row in kept], dropped) == (texts, labels, {})
    assert [problem.chat for problem in read_problems("math_label", str(path))] == texts


def test_tables_are_read_by_every_reader(tmp_path: Path) -> None:
    """A table adds to each message and each part the keys that another one has."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet and Arrow files are read by pyarrow")
    from pyarrow import parquet

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "17 times 3?"}]
    rows = [
        {"prompt": None, "messages": [{"role": "user", "content": parts, "name": None}], "label": 51.5},
        {"prompt": "Zwei?", "messages": None, "label": 8.0},
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.arrow"):
        read = train(path, need_label=True)
        assert [row.prompt for row in read] == [[ASKED], [{"role": "user", "content": "Zwei?"}]]
        assert [row.label for row in read] == ["51.5", "8.0"]
        kept, _ = prepare(path, label_key="label")
        assert [row.get("messages", row.get("prompt")) for row in kept] == [[ASKED], "Zwei?"]
        assert [problem.chat for problem in read_problems("math_label", str(path))] == [
            ASKED["content"],
            "Zwei?",
        ]
        assert [where for where, _ in read_rows(path, name="F")] == ["F, row 1", "F, row 2"]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file that no reader accepts, and each reader's message after the file's name."""

    name: str
    file: str = "rows.jsonl"
    content: bytes
    message: str


EXPECTED = "; expected one JSON object on each line, or one JSON list of objects"
UNREADABLE = [
    Unreadable(
        name="a comma behind a row",
        content=LINE + b"\n" + OTHER + b",\n",
        message=", line 2: not JSON (Extra data at column 32)" + EXPECTED,
    ),
    Unreadable(
        name="a comma behind the last key",
        content=LINE + b'\n{"prompt": "a",}',
        message=", line 2: not JSON (",
    ),
    Unreadable(
        name="a comma behind the last row of a list",
        file="rows.json",
        content=b"[\n" + LINE + b",\n]",
        message=": not JSON (",
    ),
    Unreadable(
        name="one row over several lines",
        file="rows.json",
        content=b'{\n "prompt": "a"\n}\n',
        message=", line 1: not JSON (Expecting property name enclosed in double quotes at column 2)"
        + EXPECTED,
    ),
    Unreadable(
        name="Python's quotes",
        content=b"{'prompt': 'a'}",
        message=", line 1: not JSON (Expecting property name enclosed in double quotes at column 2)"
        + EXPECTED,
    ),
    Unreadable(
        name="CSV",
        file="rows.csv",
        content=b"prompt,label\na,7\n",
        message="; for a CSV file, pandas.read_csv(FILE)",
    ),
    Unreadable(
        name="cut off",
        content=LINE + b"\n" + OTHER[:-5],
        message=", line 2: not JSON (",
    ),
    Unreadable(
        name="a row that is a list",
        content=LINE + b"\n[1]\n",
        message=", line 2: expected a JSON object, found",
    ),
    Unreadable(
        name="a list of texts", content=b'["a"]', message=", row 1: expected a JSON object, found str"
    ),
    Unreadable(
        name="a key that stands twice",
        content=LINE + b'\n{"prompt": "a", "label": "7", "prompt": "b"}',
        message=", line 2: the key 'prompt' occurs twice in one object",
    ),
    Unreadable(
        name="a key of a message that stands twice",
        content=b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
        message=", line 1: the key 'role' occurs twice in one object",
    ),
    Unreadable(
        name="a number of too many digits",
        content=b'{"prompt": "a", "label": ' + b"1" * 5000 + b"}",
        message=", line 1: Exceeds the limit",
    ),
    Unreadable(
        name="too deep",
        content=b'{"prompt": ' + b"[" * 200_000,
        message=", line 1: ",
    ),
    Unreadable(
        name="Latin-1",
        content='{"prompt": "Grüße?"}'.encode("latin-1"),
        message=": not UTF-8 (byte 14: ",
    ),
    Unreadable(
        name="half of a UTF-16 file",
        content=b"\xff\xfe{\x00\x00",
        message=": not UTF-16 (byte 4: truncated data)",
    ),
    Unreadable(name="a zip archive", content=b"PK\x03\x04rest", message=": a zip archive; unpack it"),
    Unreadable(
        name="zstd", file="rows.zst", content=b"\x28\xb5\x2f\xfdrest", message=": packed by zstd; unpack it"
    ),
    Unreadable(name="xz", content=b"\xfd7zXZ\x00rest", message=": packed by xz; unpack it"),
    Unreadable(name="bzip2", content=b"BZh9rest", message=": packed by bzip2; unpack it"),
    Unreadable(
        name="Parquet by another name", content=b"PAR1rest", message=": a Parquet file; its name must end"
    ),
    Unreadable(
        name="Arrow by another name", content=b"ARROW1rest", message=": an Arrow file; its name must end"
    ),
    Unreadable(name="no archive", file="rows.jsonl.gz", content=LINE, message=": Not a gzipped file"),
    Unreadable(
        name="half an archive",
        file="rows.jsonl.gz",
        content=gzip.compress(LINE)[:-9],
        message=": Compressed file ended before the end-of-stream marker was reached",
    ),
    Unreadable(name="no Parquet", file="rows.parquet", content=LINE, message=": "),
    Unreadable(name="no Arrow", file="rows.arrow", content=LINE, message=": "),
]


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda case: case.name)
def test_every_reader_refuses_a_file_in_the_same_line(tmp_path: Path, case: Unreadable) -> None:
    if case.file.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow", reason="Parquet and Arrow files are read by pyarrow")
    path = write(tmp_path, case.content, case.file)
    readers = {
        f"--prompt-data {path}": lambda: train(path),
        f"--data {path}": lambda: read_problems("math_label", str(path)),
        f"--data-root: source a: {path}": lambda: prepare(path),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError) as error:
            read()
        message = str(error.value)
        assert message.startswith(name) and case.message in message.removeprefix(name) and "\n" not in message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.jsonl", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^--prompt-data {path}: {reason}$"):
            train(path)
    with pytest.raises(ValueError, match=r"no\.parquet: No such file or directory$"):
        train(tmp_path / "no.parquet")


def test_responses_and_a_corpus_are_read_like_prompts(tmp_path: Path) -> None:
    problems = write(
        tmp_path, [{"id": 0, "prompt": "a", "label": 7}, {"id": 1, "prompt": "b", "label": True}]
    )
    given = [{"problem_id": 0, "response": 7}, {"problem_id": 1, "response": "true"}]
    responses = write(tmp_path, BOM + json.dumps(given).encode(), "given.json")
    argv = ["--benchmark", "exact_match", "--data", str(problems), "--responses", str(responses)]
    assert evaluate.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["exact_match"]["pass@1"]["mean"] == 1
    corpus = write(tmp_path, BOM + b'{"text": "a"}\n' + BOM + b'{"text": "b"}', "corpus.jsonl")
    assert list(build_alignment_map.read_corpus(str(corpus), "text")) == ["a", "b"]
    text = write(tmp_path, BOM + b"a", "corpus.txt")
    assert list(build_alignment_map.read_corpus(str(text), "text")) == ["a"]


@pytest.mark.parametrize("response", [None, ["a"], {"text": "a"}], ids=str)
def test_a_response_that_is_no_text_is_not_graded(tmp_path: Path, capsys: Any, response: Any) -> None:
    problems = write(tmp_path, {"id": 0, "prompt": "a", "label": "None"})
    given = write(tmp_path, {"problem_id": 0, "response": response}, "given.jsonl")
    argv = ["--benchmark", "exact_match", "--data", str(problems), "--responses", str(given)]
    assert evaluate.main([*argv, "--output-dir", str(tmp_path / "out")]) == 1
    assert f"--responses {given}, line 1: not a row of problem_id and response: " in capsys.readouterr().err


# Conversations


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row, its question and its answer."""

    name: str
    row: dict[str, Any]
    messages: list[dict[str, Any]]
    response: str | None = None


ROUND = [ASKED, {"role": "assistant", "content": "51?"}, {"role": "user", "content": "Yes."}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
CONVERSATIONS = [
    Conversation(name="a question", row={"messages": [ASKED]}, messages=[ASKED]),
    Conversation(
        name="an answer closes it", row={"messages": [ASKED, ANSWER]}, messages=[ASKED], response="It is 51."
    ),
    Conversation(
        name="answered under the key of the prompt",
        row={"prompt": [SYSTEM, ASKED, ANSWER]},
        messages=[SYSTEM, ASKED],
        response="It is 51.",
    ),
    Conversation(
        name="an answer within stays",
        row={"messages": [*ROUND, ANSWER]},
        messages=ROUND,
        response="It is 51.",
    ),
    Conversation(
        name="content in parts",
        row={
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is "},
                        {"type": "text", "text": "17 times 3?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "It is 51."}]},
            ]
        },
        messages=[ASKED],
        response="It is 51.",
    ),
    Conversation(
        name="ShareGPT",
        row={
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "What is 17 times 3?"},
                {"from": "gpt", "value": "It is 51."},
            ],
        },
        messages=[SYSTEM, ASKED],
        response="It is 51.",
    ),
    Conversation(
        name="roles and contents under ShareGPT's key",
        row={"conversations": [ASKED, ANSWER]},
        messages=[ASKED],
        response="It is 51.",
    ),
    Conversation(name="another key", row={"conversation": [ASKED]}, messages=[ASKED]),
    Conversation(name="a null for a prompt", row={"prompt": None, "messages": [ASKED]}, messages=[ASKED]),
    Conversation(
        name="a place for the answer",
        row={"messages": [ASKED, {"role": "assistant", "content": ""}]},
        messages=[ASKED],
    ),
    Conversation(
        name="an answer that calls a tool is more than a text",
        row={"messages": [ASKED, CALL]},
        messages=[ASKED],
    ),
    Conversation(
        name="a tool's result is answered",
        row={"messages": [ASKED, CALL, {"role": "tool", "content": "51"}, ANSWER]},
        messages=[ASKED, CALL, {"role": "tool", "content": "51"}],
        response="It is 51.",
    ),
    Conversation(
        name="what a template may read besides",
        row={"messages": [ASKED | {"name": "Tom"}, ANSWER]},
        messages=[ASKED | {"name": "Tom"}],
        response="It is 51.",
    ),
    Conversation(
        name="the same answer twice",
        row={"messages": [ASKED, ANSWER], "response": "It is 51."},
        messages=[ASKED],
        response="It is 51.",
    ),
    Conversation(
        name="the answer as a message in its column",
        row={"prompt": [ASKED], "response": [ANSWER]},
        messages=[ASKED],
        response="It is 51.",
    ),
    Conversation(
        name="empty columns beside", row={"messages": [ASKED], "tools": [], "system": ""}, messages=[ASKED]
    ),
]


@pytest.mark.parametrize("case", CONVERSATIONS, ids=lambda case: case.name)
def test_a_conversation_means_the_same_to_every_reader(tmp_path: Path, case: Conversation) -> None:
    path = write(tmp_path, case.row | {"label": "51"})
    (row,) = train(path)
    assert (row.prompt, row.response) == (case.messages, case.response)
    keys = {"response_key": "response"} if "response" in case.row else {}
    (kept,), dropped = prepare(path, label_key="label", **keys)
    assert (kept["messages"], kept.get("response"), dropped) == (case.messages, case.response, {})
    (problem,) = read_problems("math_label", str(path))
    assert problem.messages == case.messages
    # The output of preparation is a prompt file with the same meaning.
    prepared = write(tmp_path, kept, "prepared.jsonl")
    assert train(prepared) == [row]


def test_sft_reads_the_answer_that_closes_a_conversation(tmp_path: Path) -> None:
    (row,) = train(write(tmp_path, {"messages": [ASKED, ANSWER]}), need_response=True)
    assert (row.prompt, row.response) == ([ASKED], "It is 51.")
    for rows, words in (
        (
            {"messages": [ASKED]},
            "line 1: no response (expected a string, or messages that end with an answer; the row has "
            "messages)",
        ),
        ({"messages": [ASKED, CALL]}, "line 1: an answer with tool_calls ("),
        (
            {"messages": [ASKED, ANSWER | {"reasoning_content": "3 times 17"}]},
            "line 1: an answer with reasoning_content",
        ),
    ):
        with pytest.raises(ValueError) as error:
            train(write(tmp_path, rows), need_response=True)
        assert words in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A row that no reader accepts. Preparation counts it under `reason`."""

    name: str
    row: dict[str, Any]
    reason: str
    detail: str = ""


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
REFUSED = [
    Refused(name="nothing", row={}, reason="no prompt", detail="the row has no keys"),
    Refused(name="another column", row={"question": "a"}, reason="no prompt", detail="the row has question"),
    Refused(name="a null", row={"prompt": None}, reason="no prompt", detail="the row has prompt"),
    Refused(name="a number", row={"prompt": 3}, reason="neither a string nor messages under 'prompt'"),
    Refused(
        name="an object", row={"messages": ASKED}, reason="neither a string nor messages under 'messages'"
    ),
    Refused(
        name="no messages", row={"messages": []}, reason="neither a string nor messages under 'messages'"
    ),
    Refused(
        name="half a surrogate pair in a text",
        row={"prompt": "\ud83d"},
        reason="half a surrogate pair",
        detail="in 'prompt'",
    ),
    Refused(
        name="half a surrogate pair in a message",
        row={"messages": [ASKED | {"content": "\ud83d"}]},
        reason="half a surrogate pair",
        detail="in message 1",
    ),
    Refused(
        name="messages in quotes",
        row={"messages": json.dumps([ASKED])},
        reason="a conversation that is a string under 'messages'",
        detail="write it as a JSON list",
    ),
    Refused(
        name="messages in Python's quotes",
        row={"prompt": str([ASKED])},
        reason="a conversation that is a string under 'prompt'",
    ),
    Refused(
        name="a text among the messages",
        row={"messages": [ASKED, "It is 51."]},
        reason="messages without role and content",
        detail="message 2 is not an object",
    ),
    Refused(
        name="no content",
        row={"messages": [{"role": "user"}]},
        reason="messages without role and content",
        detail="message 1 needs",
    ),
    Refused(
        name="a null for a content",
        row={"messages": [ASKED, {"role": "assistant", "content": None}]},
        reason="messages without role and content",
        detail="message 2 needs",
    ),
    Refused(
        name="parts without roles",
        row={"prompt": [{"type": "text", "text": "a"}]},
        reason="messages without role and content",
    ),
    Refused(
        name="Gemini's parts",
        row={"messages": [{"role": "user", "parts": [{"text": "a"}]}]},
        reason="messages without role and content",
    ),
    Refused(
        name="an image",
        row={"messages": [ASKED | {"content": [{"type": "text", "text": "What is it?"}, IMAGE]}]},
        reason="a part that is not text: image_url",
        detail="message 1",
    ),
    Refused(
        name="a part of no type",
        row={"messages": [ASKED | {"content": [{"text": "a"}]}]},
        reason="a part that is not text: None",
    ),
    Refused(
        name="a text part without text",
        row={"messages": [ASKED | {"content": [{"type": "text"}]}]},
        reason="a part of type 'text' without a string 'text'",
    ),
    Refused(
        name="a speaker of ShareGPT that has no role",
        row={"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
        reason="messages from the unknown speaker 'bing'",
        detail="message 2; known are human, user, gpt",
    ),
    Refused(
        name="a system message alone",
        row={"messages": [SYSTEM]},
        reason="messages that do not end with a user message",
        detail="the last role is 'system'",
    ),
    Refused(
        name="a system message and its answer",
        row={"messages": [SYSTEM, ANSWER]},
        reason="messages that do not end with a user message",
        detail="the last role is 'system'",
    ),
    Refused(
        name="an answer alone",
        row={"messages": [ANSWER]},
        reason="messages that do not end with a user message",
        detail="there is no message before the answer",
    ),
    Refused(
        name="two answers in a row",
        row={"messages": [ASKED, ANSWER, ANSWER]},
        reason="messages that do not end with a user message",
        detail="the last role is 'assistant'",
    ),
    Refused(
        name="the beginning of an answer",
        row={"messages": [ASKED, ANSWER | {"prefix": True}]},
        reason="an unfinished answer",
        detail="message 2 has 'prefix': true",
    ),
    Refused(
        name="a system prompt in a column",
        row={"messages": [ASKED], "system": "Be brief."},
        reason="'system' next to messages",
        detail="make it the first message",
    ),
    Refused(
        name="tools in a column",
        row={"messages": [ASKED], "tools": [{"name": "f"}]},
        reason="'tools' next to messages",
        detail="chat templates only get messages",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_row_is_refused_by_every_reader_for_the_same_reason(tmp_path: Path, case: Refused) -> None:
    path = write(tmp_path, [{"prompt": "a", "label": "7"}, case.row])
    with pytest.raises(ValueError) as error:
        train(path)
    message = str(error.value)
    assert message.startswith(f"--prompt-data {path}, line 2: {case.reason}")
    assert case.detail in message and "\n" not in message
    kept, dropped = prepare(path)
    assert len(kept) == 1 and dropped == {case.reason: 1}
    problems = write(tmp_path, [{"prompt": "a", "label": "7"}, case.row | {"label": "8"}])
    with pytest.raises(ValueError) as error:
        read_problems("math_label", str(problems))
    assert f"line 2 is not a row of math_label (RowError: {case.reason}" in str(error.value)


def test_two_answers_that_differ_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [ASKED, ANSWER], "response": "It is 52."})
    with pytest.raises(ValueError, match="line 1: two answers .'response' differs from the answer that ends"):
        train(path)
    assert prepare(path, response_key="response") == ([], {"two answers": 1})
    # A mixture that does not name the column does not use it.
    assert prepare(path)[0][0]["response"] == "It is 51."


# Labels


@pytest.mark.parametrize(
    "value, text",
    [
        ("7", "7"),
        (" 7", " 7"),
        (7, "7"),
        (-3, "-3"),
        (0, "0"),
        (0.5, "0.5"),
        (42.0, "42.0"),
        (True, "true"),
        (False, "false"),
    ],
)
def test_a_label_of_any_scalar_is_its_text(tmp_path: Path, value: Any, text: str) -> None:
    path = write(tmp_path, {"prompt": "a", "label": value})
    assert train(path, need_label=True)[0].label == text
    assert prepare(path, label_key="label")[0][0]["label"] == text
    (problem,) = read_problems("exact_match", str(path))
    assert label_of(problem.fields, "label") == text


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "no label"),
        (float("nan"), "no label"),
        (float("inf"), "no label"),
        (["7"], "a label that is not a string or a number"),
        ({"answer": "7"}, "a label that is not a string or a number"),
        ("\ud83d", "half a surrogate pair"),
    ],
)
def test_what_is_no_label_is_refused_if_one_is_needed(tmp_path: Path, value: Any, reason: str) -> None:
    path = write(tmp_path, {"prompt": "a", "label": value})
    assert train(path)[0].label is None
    with pytest.raises(ValueError, match=f"line 1: {reason}"):
        train(path, need_label=True)
    assert prepare(path, label_key="label")[1] == {reason: 1}
    with pytest.raises(ValueError, match=f"line 1 is not a row of exact_match .RowError: {reason}"):
        read_problems("exact_match", str(path))


def test_the_answer_of_a_problem_may_be_a_number(tmp_path: Path) -> None:
    (problem,) = read_problems("math500", str(write(tmp_path, {"problem": "How many?", "answer": 204})))
    assert label_of(problem.fields, "answer") == "204"


# Keys


def test_the_key_that_is_named_goes_before_the_usual_ones() -> None:
    row = {"prompt": "a", "messages": [ASKED], "q": "b"}
    assert prompt_of(row, ("q", "messages")) == ("b", None)
    assert prompt_of(row, ("x", "messages")) == ([ASKED], None)
    with pytest.raises(RowError, match="^no x .the row has prompt, messages, q.$"):
        prompt_of(row, ("x",))


def test_a_conversation_of_a_problem_needs_a_template(tmp_path: Path, capsys: Any) -> None:
    problems = write(tmp_path, {"id": 0, "messages": [SYSTEM, ASKED], "label": "It is fifty-one, surely."})
    given = write(tmp_path, {"problem_id": 0, "response": "It is fifty-one, surely."}, "given.jsonl")
    argv = ["--benchmark", "exact_match", "--data", str(problems), "--responses", str(given)]
    argv += ["--output-dir", str(tmp_path / "out")]
    assert evaluate.main(argv) == 1
    assert "0 is a conversation; it needs --chat-responses" in capsys.readouterr().err
    assert evaluate.main([*argv, "--chat-responses"]) == 0
    # The selected response follows the whole conversation.
    selected = tmp_path / "warm_up.jsonl"
    argv = ["--responses", str(tmp_path / "out"), "--data", str(problems), "--output", str(selected)]
    assert select_responses.main(argv) == 0
    (row,) = train(selected, need_response=True)
    assert (row.prompt, row.response) == ([SYSTEM, ASKED], "It is fifty-one, surely.")


# Prompts that only the teacher reads


HINT = " Hint: 51."
HINTED = {"role": "user", "content": ASKED["content"] + HINT}
AS_EXPERT = {"role": "system", "content": "You know the answer."}


@pytest.mark.parametrize(
    ("keys", "prompt", "expected"),
    [
        ({}, "q", None),
        ({"teacher_prompt": None, "teacher_suffix": None}, "q", None),
        ({"teacher_prompt": "other"}, "q", "other"),
        ({"teacher_prompt": [AS_EXPERT, ASKED]}, "q", [AS_EXPERT, ASKED]),
        ({"teacher_messages": [AS_EXPERT, ASKED]}, [ASKED], [AS_EXPERT, ASKED]),
        ({"teacher_suffix": HINT}, "q", "q" + HINT),
        ({"teacher_suffix": HINT}, [SYSTEM, ASKED], [SYSTEM, HINTED]),
        ({"teacher_system": AS_EXPERT["content"]}, [SYSTEM, ASKED], [AS_EXPERT, ASKED]),
        ({"teacher_system": AS_EXPERT["content"]}, [ASKED], [AS_EXPERT, ASKED]),
        ({"teacher_system": AS_EXPERT["content"], "teacher_suffix": HINT}, [ASKED], [AS_EXPERT, HINTED]),
        ({"teacher_system": AS_EXPERT["content"]}, ASKED["content"], [AS_EXPERT, ASKED]),
    ],
)
def test_a_row_may_have_a_prompt_for_the_teacher_alone(keys, prompt, expected) -> None:
    assert teacher_prompt_of(keys, prompt) == expected


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"teacher_prompt": "a", "teacher_messages": [ASKED]}, "two prompts for the teacher"),
        ({"teacher_prompt": "a", "teacher_suffix": HINT}, "two prompts for the teacher"),
        ({"teacher_messages": [ASKED, ANSWER]}, "'teacher_messages' ends with an answer"),
        ({"teacher_messages": [SYSTEM]}, "messages that do not end with a user message"),
        ({"teacher_suffix": 51}, "'teacher_suffix' is not a string"),
        ({"teacher_system": ""}, "an empty 'teacher_system'"),
        ({"teacher_suffix": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_prompt_for_the_teacher_that_has_no_meaning_is_refused(keys, reason, tmp_path) -> None:
    with pytest.raises(RowError) as refused:
        teacher_prompt_of(keys, [ASKED])
    assert refused.value.reason == reason
    path = write(tmp_path, {"messages": [ASKED]} | keys)
    with pytest.raises(ValueError, match=f"^--prompt-data {path}, line 1: {reason}"):
        train(path)
    assert prepare(path) == ([], {reason: 1})


def test_training_and_preparation_read_the_teachers_prompt_alike(tmp_path) -> None:
    rows = [
        {"prompt": "q", "teacher_suffix": HINT},
        {"prompt": "q2", "teacher_prompt": "other"},
        {"prompt": "q3"},
    ]
    path = write(tmp_path, rows)
    expected = [f"q{HINT}", "other", None]
    assert [row.teacher_prompt for row in train(path, chat=False)] == expected
    kept, dropped = prepare(path)
    assert not dropped
    prepared = write(tmp_path, kept, "prepared.jsonl")
    assert [row.teacher_prompt for row in train(prepared, chat=False)] == expected
    by_the_user = [None if text is None else [{"role": "user", "content": text}] for text in expected]
    assert [row.teacher_prompt for row in train(prepared)] == by_the_user


def test_a_mixture_names_teachers(tmp_path) -> None:
    """Those that the mixture names, else those of the rows; training reads them."""
    path = write(tmp_path, [{"prompt": "3 + 4?", "teacher": "maths"}, {"prompt": "Who?", "teacher": 5}])
    kept, dropped = prepare(path)
    assert [row.get("teacher") for row in sorted(kept, key=lambda row: row["id"])] == ["maths", None]
    assert not dropped
    kept, _ = prepare(path, teacher="code")
    read = train(write(tmp_path, kept, "prepared.jsonl"), chat=False, teachers=["maths", "code"])
    assert [row.teachers for row in read] == [{"code": 1.0}, {"code": 1.0}]
    path = write(tmp_path, {"prompt": "q", "teachers": {"maths": 1, "code": 3}})
    kept, _ = prepare(path)
    options = {"chat": False, "teachers": ["maths", "code"], "mixes": {"maths": 1, "code": 1}}
    (row,) = train(write(tmp_path, kept, "prepared.jsonl"), **options)
    assert list(row.teachers.items()) == [("code", 0.75), ("maths", 0.25)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"teachers": {"maths": 1, "law": 1}}, "the unknown teacher 'law'"),
        ({"teachers": {"maths": 0, "code": 1}}, "a weight that is not a number from 1e-6 to 1e6 .*'maths'"),
        (
            {"teachers": {"maths": 1e300, "code": 1e-300}},
            "a weight that is not a number from 1e-6 to 1e6 .*'maths'",
        ),
        (
            {"teachers": {"maths": 10**400, "code": 0.5}},
            "a weight that is not a number from 1e-6 to 1e6 .*'maths'",
        ),
        ({"teachers": {"maths": True}}, "a weight that is not a number from 1e-6 to 1e6"),
        ({"teachers": {"maths": "1"}}, "a weight that is not a number from 1e-6 to 1e6"),
        ({"teachers": ["maths"]}, "'teachers' are not weights by name"),
        ({"teachers": {}}, "no teacher"),
        ({"teachers": {"maths": 1}, "teacher": "maths"}, "two keys for the teacher"),
        ({}, "no teacher"),
    ],
)
def test_teachers_that_cannot_be_mixed_are_named(tmp_path, row, words) -> None:
    path = write(tmp_path, {"prompt": "q"} | row)
    with pytest.raises(ValueError, match=f"line 1: {words}"):
        train(path, chat=False, teachers=["maths", "code"], mixes={"maths": 1, "code": 1})


def test_only_bytes_are_mixed(tmp_path) -> None:
    path = write(tmp_path, {"prompt": "q", "teachers": {"maths": 1, "code": 1}})
    with pytest.raises(ValueError, match="line 1: several teachers .only --simct-interface bytes mixes"):
        train(path, chat=False, teachers=["maths", "code"])
    with pytest.raises(ValueError, match="mixes teachers, not that of code; name one of them"):
        train(path, chat=False, teachers=["maths", "code"], mixes={"maths": 1})
    with pytest.raises(ValueError, match="--simct options of maths and code differ, and a mixture has one"):
        train(path, chat=False, teachers=["maths", "code"], mixes={"maths": 1, "code": 2})
    path = write(tmp_path, {"prompt": "q", "teachers": {"maths": 2}})
    assert train(path, chat=False, teachers=["maths", "code"])[0].teachers == {"maths": 1.0}


def test_a_mixture_writes_hints_from_columns(tmp_path) -> None:
    rows = [{"prompt": "3 + 4?", "solution": "7", "steps": 1}, {"prompt": "1 + 1?"}]
    path = write(tmp_path, rows)
    keys = {"teacher_system": "Look it up.", "teacher_suffix": "\nIt is {solution}, in {steps} step."}
    kept, dropped = prepare(path, **keys)
    assert dropped == {"no solution": 1}
    read = train(write(tmp_path, kept, "prepared.jsonl"))
    assert read[0].prompt == [{"role": "user", "content": "3 + 4?"}]
    assert read[0].teacher_prompt == [
        {"role": "system", "content": "Look it up."},
        {"role": "user", "content": "3 + 4?\nIt is 7, in 1 step."},
    ]
    own = write(tmp_path, {"prompt": "q", "hinted": [AS_EXPERT, ASKED]})
    kept, _ = prepare(own, teacher_messages_key="hinted")
    assert kept[0]["teacher_messages"] == [AS_EXPERT, ASKED]
    assert prepare(write(tmp_path, rows), teacher_messages_key="hinted") == ([], {"no hinted": 2})
    with pytest.raises(
        ValueError, match="source a has teacher_messages_key together with teacher_system or teacher_suffix"
    ):
        prepare(path, teacher_messages_key="hinted", teacher_suffix=HINT)
