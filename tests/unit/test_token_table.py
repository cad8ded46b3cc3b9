"""TokenTable: bytes of ids, special ids without bytes, spelling of sequences, fingerprint."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_simct.alignment import TokenTable

PIECES = [b"</s>", b"a", b"", b"\xf0\x9f", b" the", b"<pad>"]


@pytest.fixture
def table() -> TokenTable:
    return TokenTable.from_bytes(PIECES, special_ids=[5], stop_ids=[0])


def test_special_and_stop_ids_have_no_bytes(table) -> None:
    assert table.special.tolist() == [True, False, False, False, False, True]
    assert table.pieces() == [b"", b"a", b"", b"\xf0\x9f", b" the", b""]
    assert [table.bytes_of(i) for i in range(table.num_ids)] == table.pieces()
    assert table.lengths.tolist() == [0, 1, 0, 2, 4, 0]
    assert (table.num_ids, table.stop_ids) == (6, (0,))


def test_special_spelling_is_not_the_content_of_the_same_bytes() -> None:
    table = TokenTable.from_bytes([b"</s>", b"</s>"], stop_ids=[0])
    assert table.bytes_of(0) == b"" and table.bytes_of(1) == b"</s>"


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=8), st.data())
def test_spell_concatenates(pieces, data) -> None:
    ids = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12))
    spelled, ends = TokenTable.from_bytes(pieces).spell(np.array(ids, dtype=np.int32))
    assert spelled.tobytes() == b"".join(pieces[i] for i in ids)
    assert ends.tolist() == [sum(len(pieces[j]) for j in ids[: i + 1]) for i in range(len(ids))]


@pytest.mark.parametrize("bad", [6, 7, -1])
def test_ids_outside_the_vocabulary_are_refused(table, bad) -> None:
    with pytest.raises(ValueError, match=rf"ids \[{bad}\] lie outside the vocabulary of 6 ids"):
        table.spell(np.array([1, bad], dtype=np.int32))
    with pytest.raises(ValueError, match=f"id {bad} lies outside"):
        table.bytes_of(bad)


def test_bad_special_and_stop_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2\] lie outside the vocabulary of 2 ids"):
        TokenTable.from_bytes([b"a", b"b"], special_ids=[2])
    with pytest.raises(ValueError, match=r"\[-1\] lie outside"):
        TokenTable.from_bytes([b"a", b"b"], stop_ids=[-1])
    with pytest.raises(ValueError, match="twice"):
        TokenTable.from_bytes([b"a", b"b"], stop_ids=[1, 1])


def test_fingerprint_sees_bytes_specials_stops_and_where_pieces_end(table) -> None:
    same = TokenTable.from_bytes(PIECES, special_ids=[5], stop_ids=[0])
    assert same.fingerprint == table.fingerprint == pickle.loads(pickle.dumps(table)).fingerprint
    others = [
        TokenTable.from_bytes([b"</s>", b"b", *PIECES[2:]], special_ids=[5], stop_ids=[0]),
        TokenTable.from_bytes([b"</s>", b"", b"a", *PIECES[3:]], special_ids=[5], stop_ids=[0]),
        TokenTable.from_bytes(PIECES, special_ids=[2, 5], stop_ids=[0]),
        TokenTable.from_bytes(PIECES, special_ids=[0], stop_ids=[5]),
        TokenTable.from_bytes(PIECES, stop_ids=[0, 5]),
        TokenTable.from_bytes(PIECES, stop_ids=[5, 0]),
    ]
    assert len({table.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_the_table_cannot_be_written(table) -> None:
    for array in (table.flat, table.offsets, table.special, table.lengths):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_the_fingerprint_covers_the_normalizer() -> None:
    tables = [
        TokenTable.from_bytes([b"a", b"<e>"], stop_ids=[1], normalizer=name) for name in ("", "NFC", "NFC")
    ]
    assert tables[0].fingerprint != tables[1].fingerprint == tables[2].fingerprint
