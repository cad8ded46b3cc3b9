"""The rules by which a tokenizer cuts a text, from its files, and the continuations that they permit.

`with_continuations` gives a tokenizer the table of continuations.py. It takes seconds, so only interfaces
that compare bytes do it.

Borders of pretokens are found by trying: every pair of kinds of ASCII characters in several
contexts. An apostrophe and one or two letters ("'s", "'re") end a pretoken inside a word; tokens
that can end such a pretoken may be followed by anything. `check` holds the whole table against the
neighbours in real texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from megatron_simct.alignment.continuations import (
    END,
    Continuations,
    CutRules,
    inside_pretokens,
    within_characters,
)
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.alignment.tokenizer import Tokenizer, readable

_KINDS = {
    "lower": "abcdefghijklmnopqrstuvwxyz",
    "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": "0123456789",
    "blank": " ",
    "tab": "\t",
    "line": "\n\r",
    "apostrophe": "'",
    "sign": '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~',
}
_TRIED = {
    "lower": "asl",
    "upper": "AS",
    "digit": "1",
    "blank": " ",
    "tab": "\t",
    "line": "\n",
    "sign": _KINDS["sign"],
}
_BEFORE = (
    "",
    "a",
    "A",
    "1",
    "12",
    " ",
    "  ",
    "\n",
    ".",
    "'",
    "a'",
    "ab",
    "a ",
    "1 ",
    ". ",
    "\t",
    "aB",
    "é",
    "日",
)
_BEHIND = ("", "a", "A", "1", " ", ".", "\n")
_ENDINGS = [
    f"'{a}{b}" for a in _KINDS["lower"] + _KINDS["upper"] for b in ("", *_KINDS["lower"], *_KINDS["upper"])
]
_MOST_ENDINGS = 200
_MOST_DIGITS = 3


def with_continuations(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with its table of continuations, which is made once."""
    if tokenizer.continuations is not None:
        return tokenizer
    found = within_characters(tokenizer.table)
    rules = tokenizer.cut_rules() if tokenizer.cut_rules is not None else None
    if rules is not None:
        found &= _of_merges(rules, tokenizer.table)
    digits = _of_digits(tokenizer)
    if digits is not None:
        found &= digits
    return replace(tokenizer, continuations=found)


def check(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """The number of neighbouring tokens in the texts.

    Raises ValueError for neighbours that the table forbids.
    """
    assert tokenizer.continuations is not None, "of with_continuations"
    count = 0
    for text in texts:
        ids = tokenizer.encode(text.encode(errors="replace"))
        content = ids[tokenizer.table.lengths[ids] > 0]
        wrong = tokenizer.continuations.contradictions(content, tokenizer.table)
        if wrong.size:
            one, other = (
                readable(tokenizer.table.bytes_of(int(i))) for i in content[wrong[0] : wrong[0] + 2]
            )
            raise ValueError(
                f'tokenizer "{tokenizer.name}" writes {one!r} before {other!r}, which its merges do not '
                "explain; use "
                "--simct-byte-bounds longest-match, or another interface, and report the tokenizer"
            )
        count += max(0, content.size - 1)
    return count


def _of_merges(rules: CutRules, table: TokenTable) -> Continuations:
    inside, endings = _inside(rules.pretokens)
    suffixes = {ending[-size:].encode() for ending in endings for size in range(1, len(ending) + 1)}
    ending_bytes = tuple(ending.encode() for ending in endings)
    exempt = {
        i for i, piece in enumerate(table.pieces()) if piece in suffixes or piece.endswith(ending_bytes)
    } | rules.added
    first_of_added = {int(table.flat[table.offsets[i]]) for i in rules.added if table.lengths[i]}
    symbols = [ord(c) for c in "".join(_KINDS.values()) if ord(c) not in first_of_added]
    return inside_pretokens(rules.merges, table, symbols=symbols, inside=inside, exempt=exempt)


def _inside(pretokens: Callable[[str], Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """bool [256, 256], between which characters no border falls, and the endings that make
    a border in a word.
    """
    endings = [e for e in _ENDINGS if len(pretokens(f"x{e}a")) > len(pretokens(f"x{e}"))]
    inside = np.zeros((256, 256), dtype=bool)
    for (one, ones), (other, others) in itertools.product(_TRIED.items(), repeat=2):
        if len(endings) <= _MOST_ENDINGS and not _has_border(pretokens, ones, others):
            inside[np.ix_([*_KINDS[one].encode()], [*_KINDS[other].encode()])] = True
    return inside, endings


def _has_border(pretokens: Callable[[str], Sequence[str]], ones: str, others: str) -> bool:
    """Whether a pretoken ever ends between a character of `ones` and one of `others`, but for the endings."""
    for before, one, other, behind in itertools.product(_BEFORE, ones, others, _BEHIND):
        end = 0
        for pretoken in pretokens(before + one + other + behind):
            end += len(pretoken)
            if end == len(before) + 1 and not re.search("'[A-Za-z]{1,2}$", pretoken):
                return True
    return False


def _of_digits(tokenizer: Tokenizer) -> Continuations | None:
    """Where runs of digits are cut into groups from the left, each for itself, every group
    is tried; else None.
    """
    table = tokenizer.table
    pieces = table.pieces()
    numbers = {i for i, piece in enumerate(pieces) if re.fullmatch(rb"[0-9]+", piece)}
    if any(re.fullmatch(rb" [0-9]+", piece) for piece in pieces):
        return None  # a blank may belong to the first group
    random = np.random.default_rng(0)
    runs = [
        "".join(map(str, random.integers(0, 10, size=size)))
        for size in (*range(1, 13), 17, 24)
        for _ in range(6)
    ]

    def cut(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text.encode())]

    def groups(run: str, size: int) -> list[int]:
        return [i for at in range(0, len(run), size) for i in cut(run[at : at + size])]

    def as_groups(size: int) -> bool:
        contexts = (("", ""), ("a", "b"), (" ", " "), (".", ","), ("$", "%"))
        return all(
            [i for i in cut(before + run + behind) if i in numbers] == groups(run, size)
            for run in runs
            for before, behind in contexts
        )

    size = next((size for size in range(1, _MOST_DIGITS + 1) if as_groups(size)), None)
    if size is None:
        return None
    allowed = np.ones((table.num_ids, END + 1), dtype=bool)
    digits = list(b"0123456789")
    allowed[np.ix_(sorted(numbers), digits)] = False
    for length in range(1, size + 1):
        for number in range(10**length):
            ids = cut(f"{number:0{length}d}")
            for one, other in itertools.pairwise(ids):
                allowed[one, pieces[other][0]] = True
            if length == size:
                allowed[ids[-1], digits] = True
    return Continuations.of(allowed)
