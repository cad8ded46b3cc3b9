"""The reference in the README is what the code says."""

from __future__ import annotations

import re

from tests.reference import README, reference, with_reference


def test_the_readme_has_the_reference_of_this_code():
    text = README.read_text(encoding="utf-8")
    assert with_reference(text) == text, "run: python -m tests.reference"


def test_a_row_of_a_table_is_one_row():
    """No bar, tag or line break of a help text ends a cell."""
    rows = [line for line in reference().splitlines() if line.startswith("| ")]
    assert len(rows) > 150
    for row in rows:
        bars = len(re.findall(r"(?<!\\)\|", row))
        assert bars in (4, 5) and "<" not in row, row
