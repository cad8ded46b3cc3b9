"""The page of options and metrics agrees with the code."""

from __future__ import annotations

import re

from tools.reference import PAGE, reference


def test_the_page_is_that_of_this_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tools/reference.py"


def test_a_row_of_a_table_is_one_row() -> None:
    """No bar, tag or line break of a help text ends a cell."""
    rows = [line for line in reference().splitlines() if line.startswith("| ")]
    assert len(rows) > 150
    for row in rows:
        bars = len(re.findall(r"(?<!\\)\|", row))
        assert bars in (4, 5) and "<" not in row, row
