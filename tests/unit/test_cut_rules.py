"""A tokenizer's own rules for neighbouring tokens: groups of digits, endings, merges inside a word;
texts confirm them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_simct.alignment.continuations import END, Continuations
from megatron_simct.alignment.cut_rules import check, with_continuations
from megatron_simct.alignment.tokenizer import Tokenizer
from megatron_simct.alignment.tokenizer_files import load_tokenizer

PATTERN = r"(?i:'s|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MERGES = ["th", "the", " t", " the", "er", "ther", "'s", "re", "'re", " a", "..", "...", "./"]
NUMBERS = [f"{number:0{size}d}" for size in (2, 3) for number in range(10**size)]
TEXTS = [
    "there the 1234 81 8 12381 they're hers x'sa'rex 'S  the\n the",
    "8123 81 1 99 123123 the'the a 12the12",
    "a....b ..... ../x ..../ . _-_ ./. ..._",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    pieces = [bytes([b]) for b in range(256)] + [piece.encode() for piece in MERGES + NUMBERS]
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces)))
    settings = {"pattern": PATTERN, "special_tokens": {"<end>": len(pieces)}, "stop_tokens": ["<end>"]}
    path.with_name("small.tiktoken.json").write_text(json.dumps(settings))
    return with_continuations(load_tokenizer(str(path)))


def may(tokenizer: Tokenizer, token: str, symbol: str | None) -> bool:
    pieces = tokenizer.table.pieces()
    assert tokenizer.continuations is not None
    return bool(
        tokenizer.continuations.may_follow(
            pieces.index(token.encode()), END if symbol is None else ord(symbol)
        )
    )


def test_inside_a_word_the_merges_decide(tokenizer) -> None:
    assert not may(tokenizer, "t", "h")
    assert may(tokenizer, "t", "e")
    assert not may(tokenizer, " ", "a"), "' a' is one token, and a blank before a letter belongs to its word"
    assert may(tokenizer, "t", None)
    assert may(tokenizer, "e", "r"), "'re' is an ending, and may come first"


def test_between_signs_the_merges_decide_too(tokenizer) -> None:
    assert not may(tokenizer, ".", "."), "two are one token"
    assert not may(tokenizer, ".", "/")
    assert may(tokenizer, "..", ".") and not may(tokenizer, "...", "."), "four are two and two"
    assert may(tokenizer, "...", "_") and may(tokenizer, ".", "_")
    assert may(tokenizer, ".", "a") and may(tokenizer, "a", "."), "a border of pretokens falls there"


def test_behind_an_ending_anything_may_come(tokenizer) -> None:
    assert may(tokenizer, "'re", "r")
    assert may(tokenizer, "s", "h")


def test_groups_of_digits_are_all_tried(tokenizer) -> None:
    assert not may(tokenizer, "8", "1"), "every group is one token"
    assert not may(tokenizer, "12", "3")
    assert may(tokenizer, "123", "4"), "a group is full"
    assert may(tokenizer, "1", "x")
    assert may(tokenizer, "1", None)


def test_texts_hold_the_table_and_a_wrong_one_is_found(tokenizer) -> None:
    assert check(tokenizer, TEXTS) == 76
    with pytest.raises(ValueError, match="writes .* before .*, which its merges do not explain"):
        check(
            replace(
                tokenizer,
                continuations=Continuations.of(np.zeros((len(tokenizer.table.lengths), END + 1), bool)),
            ),
            TEXTS,
        )
