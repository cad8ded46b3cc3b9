"""Files that are complete or do not exist."""

from __future__ import annotations

import os

import pytest

from megatron_simct.files import read_rows, write_rows, write_whole


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_whole(path, "one\r\n")
    assert path.read_bytes() == b"one\r\n"

    def refuse(descriptor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "two")
    assert path.read_bytes() == b"one\r\n"


def test_rows_come_back(tmp_path) -> None:
    rows = [{"text": "a\u2028b\r", "n": 1}, {}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows and [p.name for p in tmp_path.iterdir()] == [
        "rows.jsonl"
    ]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", "text")
        assert (tmp_path / "pipe").is_fifo() and os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "pipe"]
