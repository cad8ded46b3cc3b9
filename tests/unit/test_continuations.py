"""The bytes that may follow a token: the rule of merges equals a trial of every pair, and no text
contradicts a table.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_simct.alignment.continuations import (
    END,
    Continuations,
    Merges,
    inside_pretokens,
    longest_match,
    within_characters,
)
from megatron_simct.alignment.languages import byte_pairs, random_byte_pairs
from megatron_simct.alignment.languages import longest_match as cut_longest
from megatron_simct.alignment.token_table import TokenTable

EVERYWHERE = np.ones((256, 256), dtype=bool)


def tables(seed: int) -> list[tuple[list[bytes], list[tuple[bytes, bytes]] | None]]:
    """Two random merge tables, and one whose merges are all joins that are pieces."""
    rng = random.Random(seed)
    pieces = [b"", b"a", b"b", b"c"][: rng.randint(3, 4)]
    for _ in range(rng.randint(3, 12)):
        a, b = rng.choice(pieces[1:]), rng.choice(pieces[1:])
        if len(a + b) <= 6 and a + b not in pieces:
            pieces.append(a + b)
    pair = random_byte_pairs(seed)
    return [*zip(pair.pieces, pair.merges, strict=True), (pieces, None)]


@pytest.mark.parametrize("seed", range(25))
def test_merges_permit_what_some_pair_of_neighbours_shows(seed) -> None:
    for pieces, merges in tables(seed):
        cut = byte_pairs(pieces, merges)
        symbols = sorted({b for piece in pieces for b in piece})
        table = TokenTable.from_bytes(pieces, [0], [0])
        found = inside_pretokens(Merges.of(pieces, merges), table, symbols=symbols, inside=EVERYWHERE)
        used = [i for i, piece in enumerate(pieces) if piece and cut(piece) == [i]]
        for one in used:
            assert found.may_follow(one, END)
            for byte in symbols:
                shown = any(cut(pieces[one] + pieces[w]) == [one, w] for w in used if pieces[w][0] == byte)
                assert found.may_follow(one, byte) == shown, (pieces, merges, one, byte)


def test_where_a_border_may_fall_and_behind_exempt_tokens_everything_may_follow() -> None:
    pieces = [b"", b"a", b"b", b"ab"]
    table = TokenTable.from_bytes(pieces, [0], [0])
    merges = Merges.of(pieces)
    assert not inside_pretokens(merges, table, symbols=b"ab", inside=EVERYWHERE).may_follow(1, ord("b"))
    assert inside_pretokens(merges, table, symbols=b"ab", inside=~EVERYWHERE).may_follow(1, ord("b"))
    assert inside_pretokens(merges, table, symbols=b"ab", inside=EVERYWHERE, exempt=[1]).may_follow(
        1, ord("b")
    )


def test_the_longest_match() -> None:
    pieces = [b"", b"a", b"b", b"ab", b"aba"]
    known, cut = longest_match(TokenTable.from_bytes(pieces, [0], [0])), cut_longest(pieces)
    assert known.may_follow(np.array([1, 1, 3, 3]), np.array([97, 98, 97, 98])).tolist() == [
        True,
        False,
        False,
        True,
    ]
    for seed in range(20):
        text = bytes(random.Random(seed).choices(b"ab", k=12))
        table = TokenTable.from_bytes(pieces, [0], [0])
        assert not known.contradictions(np.array(cut(text)), table).size


def test_characters_are_not_left_in_the_middle() -> None:
    pieces = [b"", b"a", b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5", "日".encode(), b"\xf0\x9f\x98", b"a\xc3"]
    known = within_characters(TokenTable.from_bytes(pieces, [0], [0]))
    continuing = [known.may_follow(i, 0xA9) for i in range(1, len(pieces))]
    assert continuing == [False, True, True, True, True, False, True, True]
    others = [known.may_follow(i, symbol) for i in range(1, len(pieces)) for symbol in (ord("a"), END)]
    assert others == [x for y in (True, False, True, False, True, True, False, False) for x in (y, y)]


def test_tables_are_joined_and_have_a_fingerprint() -> None:
    a, b = (Continuations.of(np.random.default_rng(seed).random((5, 257)) < 0.5) for seed in (0, 1))
    both = a & b
    ids, symbols = np.arange(5)[:, None], np.arange(257)[None]
    assert np.array_equal(
        both.may_follow(ids, symbols), a.may_follow(ids, symbols) & b.may_follow(ids, symbols)
    )
    assert len({a.fingerprint, b.fingerprint, both.fingerprint}) == 3
    assert (a & Continuations.everything(5)).may_follow(ids, symbols).tolist() == a.may_follow(
        ids, symbols
    ).tolist()
