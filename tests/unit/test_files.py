"""Files that are whole or not there."""

from __future__ import annotations

import os

import pytest

from megatron_simct.files import read_rows, write_rows, write_whole


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "one\r\n")
    assert path.read_bytes() == b"one\r\n"

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two")
    assert path.read_bytes() == b"one\r\n"


def test_rows_come_back(tmp_path):
    rows = [{"text": "a\u2028b\r", "n": 1}, {}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
