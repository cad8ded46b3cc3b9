"""Output of commands on a terminal, with and without colours, and without a terminal."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_user_mistakes import COMMANDS, RIGHT, desk  # noqa: F401
from tests.tiny import command_line

ROOT = Path(__file__).resolve().parents[2]
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|4[0-7]|38|48|9[0-7])[0-9;]*m")
ESCAPE = re.compile(r"\x1b")
SHOWN = {
    "inspect": "teacher tokens : student tokens of a unit",
    "check_pair": "0 failed",
    "evaluate": "95 % interval",
    "train": "evaluation at iteration 1",
}
"""A part of each command's output."""
BARS = {"evaluate": "grading"}
"""The text beside the progress bar of a slow command. Training's bar: tests/unit/test_monitoring.py."""
NOISE = re.compile(r"warning|deprecat|traceback|no cuda|found, using", re.IGNORECASE)


def _argv(name: str, folder: Path, out: Path) -> list[str]:
    if name == "train":
        held_out = str(folder / "tiny" / "held_out.jsonl")
        right = command_line(folder / "tiny", "--train-iters", "1", "--eval-prompt-data", held_out)
    else:
        right = shlex.split(
            RIGHT[name].replace("--format html --output out/page.html", "").replace(" out", f" {out}")
        )
    module = COMMANDS[name]
    if ".commands." in module:
        return [sys.executable, str(ROOT / "tools" / f"{module.rpartition('.')[2]}.py"), *right]
    return [sys.executable, "-m", module, *right]


def _environment(**more: str) -> dict[str, str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    }
    return clean | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **more}


def _on_a_terminal(command: list[str], folder: Path, **more: str) -> str:
    """The output to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    environment = _environment(COLUMNS="100", **more)
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 1 << 16):
            sent += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0, sent[-2000:].decode()
    return sent.decode()


@pytest.mark.parametrize("name", SHOWN)
def test_a_pipe_gets_plain_lines_and_nothing_else(name, desk, tmp_path) -> None:  # noqa: F811
    command = _argv(name, desk, tmp_path)
    done = subprocess.run(command, cwd=desk, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SHOWN[name] in done.stdout
    assert not ESCAPE.search(done.stdout + done.stderr) and "\r" not in done.stdout + done.stderr
    assert not NOISE.search(done.stdout.replace("0 warned", "")) and done.stderr == ""


@pytest.mark.parametrize("name", ["inspect", "check_pair", "evaluate"])
def test_a_terminal_gets_colours_and_bars_unless_no_color_is_set(name, desk, tmp_path) -> None:  # noqa: F811
    coloured = _on_a_terminal(_argv(name, desk, tmp_path / "first"), desk)
    plain = _on_a_terminal(_argv(name, desk, tmp_path / "second"), desk, NO_COLOR="1")
    assert COLOUR.search(coloured) and not COLOUR.search(plain)
    for text in (coloured, plain):
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        assert SHOWN[name] in shown and not NOISE.search(shown.replace("0 warned", ""))
        if name in BARS:
            assert re.search(rf"{BARS[name]}.*[━╸╺]", shown)
