"""Alignment maps as folders: they are read as they were written, every defect has its own error,
and the tool's report.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_simct.alignment import Tokenizer, TokenTable, build_alignment_map
from megatron_simct.alignment.coverage import measure_coverage
from megatron_simct.alignment.map_files import load_map, placement_balance, save_map
from megatron_simct.commands import build_alignment_map as tool
from megatron_simct.preflight.bias import COMPARED
from tests.oracles.alignment import greedy_encoder

STUDENT = [b"ha", b"ppy", b" cat", b" the", b"x", b"<eos>", b"h", b"p", b"a", b"y", b" ", b"c", b"t"]
TEACHER = [
    b"hap",
    b"py",
    b" cat",
    b" the",
    b"x",
    b"<end>",
    b"h",
    b"y",
    b"p",
    b"<eot>",
    b"a",
    b" ",
    b"c",
    b"t",
]


def tokenizer(pieces: list[bytes], stop_ids: tuple[int, ...]) -> Tokenizer:
    table = TokenTable.from_bytes(pieces, stop_ids=stop_ids)
    return Tokenizer(name="test", table=table, encode_text=greedy_encoder(table.pieces()))


@pytest.fixture
def pair() -> tuple[Tokenizer, Tokenizer]:
    return tokenizer(STUDENT, (5,)), tokenizer(TEACHER, (9, 5))


@pytest.fixture
def saved(pair, tmp_path) -> Path:
    student, teacher = pair
    folder = tmp_path / "map"
    save_map(folder, build_alignment_map(student, teacher), student=student.table, teacher=teacher.table)
    return folder


def test_a_map_comes_back(pair, saved) -> None:
    student, teacher = pair
    built, loaded = (
        build_alignment_map(student, teacher),
        load_map(saved, student=student.table, teacher=teacher.table),
    )
    for name in ("student_ids", "teacher_ids"):
        assert getattr(loaded, name).dtype == np.int32
        assert np.array_equal(getattr(loaded, name), getattr(built, name))
    for name in (
        "stop_student_id", "stop_teacher_ids", "student_vocab_size", "teacher_vocab_size",
        "student_fingerprint", "teacher_fingerprint", "student_id_of_bytes", "fingerprint", "num_shared",
    ):  # fmt: skip
        assert getattr(loaded, name) == getattr(built, name)
    assert {path.name for path in saved.iterdir()} == {"map.json", "map.safetensors"}
    assert load_map(saved).fingerprint == built.fingerprint


def test_saving_again_replaces_a_map_and_nothing_else(pair, saved, tmp_path) -> None:
    student, teacher = pair
    other = tokenizer(STUDENT[:-1], (5,))
    save_map(saved, build_alignment_map(other, teacher), student=other.table, teacher=teacher.table)
    assert load_map(saved).student_vocab_size == len(STUDENT) - 1
    assert [path.name for path in tmp_path.iterdir()] == ["map"]
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").write_text("keep")
    with pytest.raises(ValueError, match="is not an alignment map"):
        save_map(folder, build_alignment_map(student, teacher), student=student.table, teacher=teacher.table)
    assert (folder / "file").read_text() == "keep"


def test_a_map_is_only_saved_with_its_own_tables(pair, tmp_path) -> None:
    student, teacher = pair
    with pytest.raises(ValueError, match="roles are swapped"):
        save_map(
            tmp_path / "m",
            build_alignment_map(student, teacher),
            student=teacher.table,
            teacher=student.table,
        )
    assert not list(tmp_path.iterdir())


def test_wrong_tokenizers_are_named(pair, saved) -> None:
    student, teacher = pair
    with pytest.raises(ValueError, match="roles are swapped"):
        load_map(saved, student=teacher.table, teacher=student.table)
    with pytest.raises(ValueError, match="roles are swapped"):
        load_map(saved, student=teacher.table)
    revision = tokenizer([*TEACHER[:-1], b"T"], (9, 5))
    with pytest.raises(ValueError, match="the teacher's tokenizer is not the one .* another revision"):
        load_map(saved, student=student.table, teacher=revision.table)
    stops = tokenizer(TEACHER, (5, 9))
    with pytest.raises(ValueError, match="other stop tokens"):
        load_map(saved, student=student.table, teacher=stops.table)


def damage(folder, name, change) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("map.safetensors", lambda data: data[:-1], "damaged or truncated"),
        (
            "map.safetensors",
            lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "damaged or truncated",
        ),
        ("map.safetensors", lambda data: b"", "damaged or truncated"),
        ("map.json", lambda data: data[:40], "map.json is damaged"),
        ("map.json", lambda data: b"[]", "map.json is damaged"),
        (
            "map.json",
            lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
            "format version 2",
        ),
        ("map.json", lambda data: data.replace(b'"stop_pair"', b'"stop_pears"'), "lacks stop_pair"),
        ("map.json", lambda data: data.replace(b'"student": 5', b'"student": 6'), "does not belong"),
        (
            "map.json",
            lambda data: data.replace(b'"student_fingerprint": "', b'"student_fingerprint": "0'),
            "bytes",
        ),
    ],
)
def test_damaged_files_are_named(saved, name, change, message) -> None:
    damage(saved, name, change)
    with pytest.raises(ValueError, match=message) as error:
        load_map(saved)
    assert str(saved) in str(error.value) and "build it again" in str(error.value)


def test_missing_files_are_named(saved, tmp_path) -> None:
    (saved / "map.safetensors").unlink()
    with pytest.raises(ValueError, match="map.safetensors cannot be read"):
        load_map(saved)
    with pytest.raises(ValueError, match="no map.json"):
        load_map(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_ids": [2, 3, 4, 99]}, "student ids from 2 to 99 in a vocabulary of 13"),
        ({"teacher_ids": [-1, 3, 4, 6]}, "teacher ids from -1 to 6 in a vocabulary of 14"),
        ({"student_ids": [2, 3, 4, 4]}, "a student id is in several pairs"),
        ({"teacher_ids": [2, 3, 3, 4]}, "a teacher id is in several pairs"),
        ({"student_ids": [3, 2, 4, 6], "teacher_ids": [3, 2, 4, 6]}, "not sorted"),
        ({"teacher_ids": [2, 3, 4, 7]}, "different bytes"),
        ({"teacher_ids": [2, 3, 4]}, "student ids"),
    ],
)
def test_pairs_that_are_none(saved, change, message) -> None:
    """With a right checksum: a map that was built wrongly, and not damaged."""
    import hashlib

    tensors = load_file(saved / "map.safetensors")
    tensors |= {
        "student_ids": np.array([2, 3, 4, 6], np.int32),
        "teacher_ids": np.array([2, 3, 4, 6], np.int32),
    }
    tensors |= {name: np.array(ids, np.int32) for name, ids in change.items()}
    save_file(tensors, saved / "map.safetensors")
    settings = json.loads((saved / "map.json").read_text())
    settings["tensors_sha256"] = hashlib.sha256((saved / "map.safetensors").read_bytes()).hexdigest()
    (saved / "map.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        load_map(saved)


def test_balance_counts_the_rows_of_the_fullest_rank() -> None:
    """300 ids of the student over two ranks of 256 ids: 200 shared ones on the first, 10 and the
    stop on the second.
    """
    student = tokenizer([b"s%d" % i for i in range(299)] + [b"<s>"], (299,))
    shared = [b"s%d" % i for i in (*range(200), *range(256, 266))]
    teacher = tokenizer([*shared, *(b"t%d" % i for i in range(100)), b"<e>", b"<f>", b"<g>"], (310, 311, 312))
    balance = placement_balance(build_alignment_map(student, teacher), (1, 2, 4))
    assert balance == {1: 213 / 313, 2: 2 * 200 / 313, 4: 4 * 128 / 313}


def test_coverage_counts_units_by_kind(pair) -> None:
    student, teacher = pair
    # student ha|ppy| cat|x, teacher hap|py| cat|x; then student " ","t"|..., both sides alike
    coverage = measure_coverage(
        ["happy catx", "hap", " t"],
        student=student,
        teacher=teacher,
        alignment_map=build_alignment_map(student, teacher),
    )
    # "happy" 2:2, " cat" 1:1, "x" 1:1; "hap" = hap against ha|p, 1:2; " " 1:1, "t" 1:1
    assert (coverage.student_tokens, coverage.teacher_tokens, coverage.units, coverage.bytes) == (8, 7, 6, 15)
    assert coverage.student_token_shares == {"1_1": 4 / 8, "1_n": 2 / 8, "n_1": 0, "n_m": 2 / 8}
    assert coverage.byte_shares == {"1_1": 7 / 15, "1_n": 3 / 15, "n_1": 0, "n_m": 5 / 15}
    assert coverage.shared_token_share == 4 / 8
    assert coverage.bytes_dropped == {}
    assert coverage.longest_units[0] == {"text": "happy", "student_tokens": 2, "teacher_tokens": 2}
    assert coverage.student_shared_vocabulary_share == 5 / 7


def tiktoken_file(folder, name, extra, stop) -> str:
    """Ranks of all bytes and some merges, as load_tokenizer reads them."""
    import base64

    pieces = [bytes([i]) for i in range(256)] + extra
    lines = [base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(pieces)]
    path = folder / f"{name}.tiktoken"
    path.write_bytes(b"\n".join(lines))
    settings = {"pattern": r"\s*\S+|\s+", "special_tokens": {stop: len(pieces)}, "stop_tokens": [stop]}
    path.with_name(path.name + ".json").write_text(json.dumps(settings))
    return str(path)


def test_the_tool(tmp_path, capsys) -> None:
    teacher = tiktoken_file(tmp_path, "teacher", [b"he", b"hel", b"lo"], "<t>")
    student = tiktoken_file(tmp_path, "student", [b"he", b"ll"], "<s>")
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("hello\nhello")
    rows.write_text('{"text": "he"}\n\n{"text": "é"}\n')
    arguments = [
        "--teacher-tokenizer",
        teacher,
        "--student-tokenizer",
        student,
        "--output",
        str(tmp_path / "map"),
    ]
    assert tool.main([*arguments, "--corpus", str(text), str(rows), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_shared"], report["teacher_vocab_size"], report["student_vocab_size"]) == (
        257,
        260,
        259,
    )
    assert report["stop_pair"] == {"student": 258, "teacher": [259]}
    assert set(report["placement_balance"]) == {"1", "2", "4", "8", "16"}
    first, second = report["corpora"]
    # hello: teacher hel|lo, student he|ll|o -> one unit of 2:3; the line end is 1:1
    assert (first["student_tokens"], first["teacher_tokens"], first["units"]) == (7, 5, 3)
    assert (first["share_1_1"], first["share_n_m"], first["share_n_1"]) == (1 / 7, 6 / 7, 0)
    assert (second["student_tokens"], second["units"], second["share_1_1"]) == (3, 3, 1)
    assert load_map(tmp_path / "map").num_shared == 257
    described = json.loads((tmp_path / "map/map.json").read_text())
    assert all(described[name] == report[name] for name in ("corpora", "bias_nats_a_word"))
    # The words are "hello", the same after a line end, "he" and "é".
    biases = report["bias_nats_a_word"]
    assert set(biases) == set(COMPARED) and {bias["words"] for bias in biases.values()} == {4}
    assert biases["bytes, any"]["perfect"] < 1e-12 < 0.1 < biases["paper"]["perfect"]

    assert tool.main([*arguments, "--corpus", str(text)]) == 0
    shown = capsys.readouterr().out
    assert "257 shared tokens" in shown and "85.7%" in shown and "student already right" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "{dir}/missing.txt"], "missing.txt"),
        (["--corpus", "{dir}/latin.txt"], "latin.txt: not UTF-8 at byte 1"),
        (["--corpus", "{dir}/rows.jsonl"], "rows.jsonl, line 2: not a JSON object with 'text'; give the key"),
        (["--student-tokenizer", "{dir}/none.json"], "--student-tokenizer: "),
        (["--teacher-stop-token-ids", "999"], "--teacher-tokenizer: "),
        (["--output", "{dir}"], "--output .* exists and is not an alignment map"),
    ],
)
def test_the_tools_errors(tmp_path, capsys, arguments, message) -> None:
    import re

    teacher = tiktoken_file(tmp_path, "teacher", [], "<t>")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"words": "a"}\n')
    base = ["--teacher-tokenizer", teacher, "--student-tokenizer", teacher, "--output", str(tmp_path / "map")]
    assert tool.main([*base, *(argument.format(dir=tmp_path) for argument in arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.replace("\n", " ")), error
    assert not (tmp_path / "map").exists()


def test_a_lossy_tokenizer_is_refused_or_its_loss_reported(tmp_path, capsys) -> None:
    teacher = tiktoken_file(tmp_path, "teacher", [], "<t>")
    folder = tmp_path / "wordpiece"
    folder.mkdir()
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "he", "##llo", "a", "##a"])}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **special} for text, i in (("[UNK]", 0), ("[SEP]", 1))],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]",
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text("hello aa")
    base = [
        "--teacher-tokenizer",
        teacher,
        "--student-tokenizer",
        str(folder),
        "--student-stop-token-ids",
        "1",
    ]
    base += ["--output", str(tmp_path / "map"), "--corpus", str(tmp_path / "a.txt"), "--json"]
    assert tool.main(base) == 1
    assert "WordPiece has no tokens for every text" in capsys.readouterr().err
    assert tool.main([*base, "--allow-lossy"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "WordPiece" in report["lossy"]["student"] and "Lowercase" in report["lossy"]["student"]
    # "hello" is spelled, the space is lost, and the text after it cannot be compared.
    (corpus,) = report["corpora"]
    assert corpus["bytes_dropped"] == {"mismatch": 2, "student_rewrites": 1}
    assert corpus["share_lost"] == 3 / 8
    assert tool.main([*base[:-3], "--allow-lossy"]) == 1
    assert "--allow-lossy needs --corpus" in capsys.readouterr().err
