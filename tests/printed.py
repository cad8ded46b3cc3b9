"""Compares the output of a command with the output on a page of docs/."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = r"\d[\d,]*(\.\d+)?"


def commands_of(page: Path) -> list[tuple[str, str]]:
    """The page's commands in order, each with the text below it as its output."""
    return re.findall(r"```bash\n(.*?)```\n```text\n(.*?)```", page.read_text(), re.DOTALL)


def same_but_for_numbers(expected: str, printed: str) -> bool:
    """Compares line by line, without numbers and the widths of tables: a run of two steps gives other numbers
    than a whole one. A line "..." of the page stands for any lines, and "..." within one for any text.
    """
    return _same(expected, printed, numbers=False)


def same(expected: str, printed: str) -> bool:
    """As same_but_for_numbers, with numbers."""
    return _same(expected, printed, numbers=True)


def _same(expected: str, printed: str, *, numbers: bool) -> bool:
    def plain(text: str) -> str:
        text = text.replace("...", "\0")
        return re.sub(r"[ ━]+", " ", text if numbers else re.sub(_NUMBER, "#", text)).strip()

    pattern = ""
    for line in expected.strip("\n").split("\n"):
        pattern += "(.*\n)*?" if line == "..." else re.escape(plain(line)).replace("\0", ".*") + "\n"
    found = "".join(plain(line) + "\n" for line in printed.strip("\n").split("\n"))
    return re.match(pattern, found) is not None
