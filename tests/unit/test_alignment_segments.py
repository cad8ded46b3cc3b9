"""`align` against worked examples, against a set-intersection oracle, and by its defining properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_simct.alignment import Alignment, TokenTable, align, align_batch
from tests.oracles.alignment import SPECIAL, STOP, Piece, minimal_units

EXAMPLES = {
    # name: (teacher, student, segments). "<>" is a stop token, "_" a blank, "''" a piece of zero bytes, x9F
    # one byte.
    "same tokens": ("a b c <>", "a b c <>", [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3), (3, 4, 3, 4)]),
    "crossing": ("ab c <>", "a bc <>", [(0, 2, 0, 2), (2, 3, 2, 3)]),
    "two units": ("ab cd _x <>", "a b c d _x <>", [(0, 1, 0, 2), (1, 2, 2, 4), (2, 3, 4, 5), (3, 4, 5, 6)]),
    "neighbours": ("ab c de f <>", "a bc d ef <>", [(0, 2, 0, 2), (2, 4, 2, 4), (4, 5, 4, 5)]),
    "one to three": ("abc <>", "a b c <>", [(0, 1, 0, 3), (1, 2, 3, 4)]),
    "cut by length": ("ab", "a b", [(0, 1, 0, 2)]),
    "zero bytes": ("x '' y <>", "x y <>", [(0, 2, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3)]),
    "student goes on": ("x <>", "x y <>", [(0, 1, 0, 1)]),
    "digits": ("12 3 45 6 _ <>", "123 456 _ <>", [(0, 2, 0, 1), (2, 4, 1, 2), (4, 5, 2, 3), (5, 6, 3, 4)]),
    "words and digits": (
        "hap py 12 3 45 _the <>",
        "ha ppy 123 45 _the <>",
        [(0, 2, 0, 2), (2, 4, 2, 3), (4, 5, 3, 4), (5, 6, 4, 5), (6, 7, 5, 6)],
    ),
    "split character": (
        "hello xF0 x9F x98 x80 _cat <>",
        "hello xF09F x98 x80 _cat <>",
        [(0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 3), (4, 5, 3, 4), (5, 6, 4, 5), (6, 7, 5, 6)],
    ),
}


def pieces_of(text: str) -> list[Piece]:
    special = {"<>": STOP, "<?>": SPECIAL, "''": b""}

    def piece(word: str) -> Piece:
        if word in special:
            return special[word]
        return (
            bytes.fromhex(word[1:]) if word[0] == "x" and len(word) > 1 else word.replace("_", " ").encode()
        )

    return [piece(word) for word in text.split()]


def as_ids(pieces: list[Piece]) -> tuple[TokenTable, np.ndarray]:
    """A table in which every position has its own id, and the ids of `pieces`.

    Two stop tokens, one special.
    """
    content = [piece for piece in pieces if isinstance(piece, bytes)]
    table = TokenTable.from_bytes(
        [b"<eos>", b"<end>", b"<special>", *content], special_ids=[2], stop_ids=[0, 1]
    )
    fresh = iter(range(3, 3 + len(content)))
    ids = [1 if piece == STOP else 2 if piece == SPECIAL else next(fresh) for piece in pieces]
    return table, np.array(ids, dtype=np.int32)


def aligned(teacher: list[Piece], student: list[Piece]) -> Alignment:
    return align(*as_ids(teacher), *as_ids(student))


def segment_list(alignment: Alignment) -> list[tuple[int, int, int, int]]:
    return [tuple(row) for row in alignment.segments.tolist()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name) -> None:
    teacher, student, expected = EXAMPLES[name]
    alignment = aligned(pieces_of(teacher), pieces_of(student))
    assert segment_list(alignment) == expected
    assert alignment.segments.dtype == np.int32
    assert minimal_units(pieces_of(teacher), pieces_of(student))[0] == expected
    if name != "student goes on":
        assert (
            alignment.dropped == {}
            and alignment.student_labels_dropped == alignment.teacher_labels_dropped == 0
        )


def test_what_is_masked_is_counted() -> None:
    alignment = aligned(pieces_of("x <>"), pieces_of("x y <>"))
    assert alignment.dropped == {"mismatch": 1}
    assert (alignment.student_labels_dropped, alignment.teacher_labels_dropped) == (2, 1)
    assert (alignment.common_prefix_bytes, alignment.student_bytes, alignment.stop) == (1, 2, False)


@pytest.mark.parametrize(
    ("teacher", "student", "segments", "dropped", "prefix"),
    [
        ("x y <>", "x <>", [(0, 1, 0, 1)], {"mismatch": 0}, 1),
        # The bytes agree up to offset 2, but a teacher token crosses it: only offset 1 is a common boundary.
        ("a bc <>", "a b d <>", [(0, 1, 0, 1)], {"mismatch": 2}, 2),
        ("abc", "abd", [], {"mismatch": 3}, 2),
        ("q", "a", [], {"mismatch": 1}, 0),
        ("a b <>", "a <?> b <>", [(0, 1, 0, 1)], {"special": 1}, 1),
        ("a <?> b <>", "a b <>", [(0, 1, 0, 1)], {"special": 1}, 1),
        ("a b <>", "a b <?> <>", [(0, 1, 0, 1), (1, 2, 1, 2)], {"special": 0}, 2),
        ("a <?> b <>", "a <?> b <>", [(0, 1, 0, 1)], {"special": 1}, 1),
        ("a q <>", "a b <?> <>", [(0, 1, 0, 1)], {"mismatch": 1}, 1),
        ("a <> b", "a b", [(0, 1, 0, 1)], {"special": 1}, 1),
        ("a <>", "a", [(0, 1, 0, 1)], {"one_stop": 0}, 1),
        ("'' <>", "<>", [(1, 2, 0, 1)], {"no_bytes": 0}, 0),
        ("'' a ''", "'' '' a '' ''", [(0, 3, 0, 5)], {}, 1),
        ("'' a '' b", "ab ''", [(0, 4, 0, 2)], {}, 2),
        ("<>", "<>", [(0, 1, 0, 1)], {}, 0),
        ("", "", [], {}, 0),
        ("", "a", [], {"mismatch": 1}, 0),
    ],
)
def test_edges(teacher, student, segments, dropped, prefix) -> None:
    alignment = aligned(pieces_of(teacher), pieces_of(student))
    assert (segment_list(alignment), alignment.dropped) == (segments, dropped)
    assert alignment.common_prefix_bytes == prefix
    assert minimal_units(pieces_of(teacher), pieces_of(student)) == (segments, dropped, prefix)


def test_errors() -> None:
    table, ids = as_ids(pieces_of("a b"))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        align(table, ids, table, np.array([99], dtype=np.int32))
    with pytest.raises(ValueError, match='segmentation "steps" is unknown'):
        align(table, ids, table, ids, segmentation="steps")


@st.composite
def cut(draw, data: bytes, allow_empty: bool) -> list[Piece]:
    """A random segmentation of `data`."""
    minimum = 0 if allow_empty else 1
    pieces: list[Piece] = []
    while data:
        size = draw(st.integers(minimum, min(4, len(data))))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


byte_strings = st.lists(st.sampled_from([0x20, 0x61, 0x62, 0xC3, 0xA9, 0x00]), max_size=14).map(bytes)


@st.composite
def pairs(draw, allow_empty: bool = False) -> tuple[list[Piece], list[Piece]]:
    """Two segmentations of the same bytes, both with or both without a stop token."""
    data = draw(byte_strings)
    end = [STOP] if draw(st.booleans()) else []
    return draw(cut(data, allow_empty)) + end, draw(cut(data, allow_empty)) + end


@st.composite
def damaged_pairs(draw) -> tuple[list[Piece], list[Piece]]:
    """As `pairs`, with pieces exchanged, removed or inserted on either side, including
    specials and stop tokens.
    """
    sides = draw(pairs(allow_empty=True))
    for side in sides:
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(side)))
            new = draw(st.lists(st.sampled_from([SPECIAL, STOP, b"", b"a", b"\xc3\xa9"]), max_size=1))
            side[at : at + draw(st.integers(0, 1))] = new
    return sides


@settings(max_examples=600, deadline=None)
@given(damaged_pairs())
def test_matches_the_oracle(sides) -> None:
    alignment = aligned(*sides)
    segments, dropped, prefix = minimal_units(*sides)
    assert (segment_list(alignment), alignment.dropped) == (segments, dropped)
    assert alignment.common_prefix_bytes == prefix


def spelled(pieces: list[Piece]) -> bytes:
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))


@settings(max_examples=300, deadline=None)
@given(damaged_pairs())
def test_segments_spell_equal_bytes_and_tile_what_is_not_dropped(sides) -> None:
    teacher, student = sides
    alignment = aligned(teacher, student)
    at_t = at_s = num_bytes = 0
    for (ts, te, ss, se), end in zip(segment_list(alignment), alignment.byte_ends.tolist(), strict=True):
        assert spelled(teacher[ts:te]) == spelled(student[ss:se])
        num_bytes += len(spelled(student[ss:se]))
        assert num_bytes == end
        if "no_bytes" not in alignment.dropped:
            assert (ts, ss) == (at_t, at_s)
        assert te > ts and se > ss
        at_t, at_s = te, se
    covered_t, covered_s = (alignment.segments[:, [1, 3]] - alignment.segments[:, [0, 2]]).sum(axis=0)
    assert covered_t + alignment.teacher_labels_dropped == len(teacher)
    assert covered_s + alignment.student_labels_dropped == len(student)
    assert alignment.student_bytes == num_bytes + sum(alignment.dropped.values())
    assert bool(alignment.dropped) == bool(
        alignment.teacher_labels_dropped or alignment.student_labels_dropped
    )


@given(pairs())
def test_no_interior_offset_is_common(sides) -> None:
    teacher, student = sides
    for ts, te, ss, se in segment_list(aligned(teacher, student)):
        interior_t = {len(spelled(teacher[ts:i])) for i in range(ts + 1, te)}
        interior_s = {len(spelled(student[ss:i])) for i in range(ss + 1, se)}
        assert not interior_t & interior_s


@given(damaged_pairs())
def test_swapping_the_sides_swaps_the_segments(sides) -> None:
    teacher, student = sides
    forward, backward = aligned(teacher, student), aligned(student, teacher)
    np.testing.assert_array_equal(forward.segments, backward.segments[:, [2, 3, 0, 1]])
    assert set(forward.dropped) == set(backward.dropped)


@given(pairs())
def test_identical_tokens_are_all_one_to_one(sides) -> None:
    pieces, _ = sides
    alignment = aligned(pieces, pieces)
    assert segment_list(alignment) == [(i, i + 1, i, i + 1) for i in range(len(pieces))]


@given(st.data())
def test_a_refining_teacher_leaves_one_student_token_a_segment(data) -> None:
    student = data.draw(cut(data.draw(byte_strings), False))
    teacher = [finer for piece in student for finer in data.draw(cut(piece, False))]
    assert [(ss, se) for _, _, ss, se in segment_list(aligned(teacher, student))] == [
        (i, i + 1) for i in range(len(student))
    ]


# method 7.1: teacher pieces, student pieces ("<T>" and "<S>" stop), the authors' segments, the minimal ones.
GOLDEN = [
    ("a b c <T>", "a b c <S>", "0101 1212 2323 3434", "0101 1212 2323 3434"),
    ("ab c <T>", "a bc <S>", "0303", "0202 2323"),
    ("ab cd _x <T>", "a b c d _x <S>", "0305 3456", "0102 1224 2345 3456"),
    ("ab c de f <T>", "a bc d ef <S>", "0505", "0202 2424 4545"),
    ("abc <T>", "a b c <S>", "0204", "0103 1234"),
    ("ab", "a b", "", "0102"),
    ("x 0 y <T>", "x y <S>", "0101 1413", "0201 2312 3423"),
    ("x <T>", "x y <S>", "0101", "0101"),
    ("12 3 45 6 _ <T>", "123 456 _ <S>", "0503 5634", "0201 2412 4523 5634"),
    ("hap py 12 3 45 _the <T>", "ha ppy 123 45 _the <S>", "0504 5645 6756", "0202 2423 4534 5645 6756"),
    (
        "hello \xf0 \x9f \x98 \x80 _cat <T>",
        "hello \xf0\x9f \x98 \x80 _cat <S>",
        "0101 1212 2323 3434",
        "0101 1312 3423 4534 5645 6756",
    ),
]


@pytest.mark.parametrize(("teacher", "student", "authors", "minimal"), GOLDEN)
def test_golden_segments(teacher, student, authors, minimal) -> None:
    def side(text) -> tuple[TokenTable, np.ndarray]:
        words = text.split(" ")
        pieces = [b"" if word == "0" else word.replace("_", " ").encode("latin-1") for word in words]
        stops = [i for i, word in enumerate(words) if word in ("<T>", "<S>")]
        return TokenTable.from_bytes(pieces, stop_ids=stops), np.arange(len(words), dtype=np.int32)

    (teacher_table, teacher_ids), (student_table, student_ids) = side(teacher), side(student)
    for segmentation, expected in (("authors", authors), ("minimal", minimal)):
        found = align(teacher_table, teacher_ids, student_table, student_ids, segmentation=segmentation)
        assert ["".join(map(str, segment)) for segment in found.segments.tolist()] == expected.split()
        last = found.segments[-1] if len(found.segments) else np.zeros(4, int)
        assert found.student_labels_dropped == len(student_ids) - last[3]
        assert found.teacher_labels_dropped == len(teacher_ids) - last[1]
        ones = [segment for segment in expected.split() if int(segment[1]) - int(segment[0]) == 1]
        assert found.stop == (
            bool(ones) and expected.split()[-1] == f"{len(teacher_ids) - 1}{len(teacher_ids)}"
            f"{len(student_ids) - 1}{len(student_ids)}"
        )  # fmt: skip
        assert (
            found.byte_ends.tolist() == student_table.spell(student_ids)[1][found.segments[:, 3] - 1].tolist()
        )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_batch_is_its_samples(data) -> None:
    """Also samples that differ, are empty, stop on one side, or contain pieces without bytes
    and special tokens.
    """
    pieces = [b"a", b"b", b"ab", b"ba", b"aba", b"", b"<special>", b"<stop>", b"<stop2>"]
    table = TokenTable.from_bytes(pieces, special_ids=[6], stop_ids=[7, 8])
    content = st.lists(
        st.sampled_from([0, 1, 2, 3, 4, 4, 2, 0, 1] + data.draw(st.sampled_from([[], [5, 6]]))), max_size=8
    )
    teacher_samples, student_samples = [], []
    for _ in range(data.draw(st.integers(0, 5))):
        teacher, student = data.draw(content), data.draw(content)
        if data.draw(st.booleans()):
            student = data.draw(st.permutations(teacher))
        if data.draw(st.booleans()):
            student = [i for token in teacher for i in {2: [0, 1], 4: [0, 3]}.get(token, [token])]
        tails = data.draw(st.sampled_from([([], []), ([7], [7]), ([8], [7]), ([7], [])]))
        teacher_samples.append(np.array(teacher + tails[0], dtype=np.int32))
        student_samples.append(np.array(student + tails[1], dtype=np.int32))
    for segmentation in ("minimal", "authors"):
        batch = align_batch(table, teacher_samples, table, student_samples, segmentation=segmentation)
        assert len(batch) == len(teacher_samples)
        for found, teacher, student in zip(batch, teacher_samples, student_samples, strict=True):
            alone = align(table, teacher, table, student, segmentation=segmentation)
            for name in Alignment.__slots__:
                a, b = getattr(found, name), getattr(alone, name)
                assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, name
            assert found.segments.dtype == alone.segments.dtype


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_vocabularies(data) -> None:
    """The six properties if ids repeat, as in a real vocabulary: any bytes, two vocabularies
    with some in common.
    """
    some_bytes = st.binary(min_size=1, max_size=4)
    common = data.draw(st.lists(some_bytes, max_size=6))
    vocabularies = [data.draw(st.lists(some_bytes, max_size=8)) + common for _ in range(2)]
    text = b"".join(
        data.draw(st.lists(st.sampled_from([*vocabularies[0], *vocabularies[1], b"a"]), max_size=12))
    )
    tables, sides = [], []
    for vocabulary in vocabularies:
        pieces = [bytes([byte]) for byte in range(256)] + vocabulary
        tables.append(TokenTable.from_bytes([*pieces, b"</s>"], stop_ids=[len(pieces)]))
        ids, rest = [], text
        while rest:  # any segmentation that the vocabulary allows, not the longest match only
            ids.append(
                data.draw(st.sampled_from([i for i, piece in enumerate(pieces) if rest.startswith(piece)]))
            )
            rest = rest[len(pieces[ids[-1]]) :]
        sides.append(np.array([*ids, len(pieces)], dtype=np.int32))
    (teacher_table, student_table), (teacher, student) = tables, sides
    found = align(teacher_table, teacher, student_table, student)
    ends = [set(table.spell(ids[:-1])[1].tolist()) for table, ids in zip(tables, sides, strict=True)]
    units = found.segments[:-1].tolist()
    assert found.stop and not found.dropped
    # (i), (ii), (iii): both sides spell the text between neighbours of the common token ends, which tile it.
    assert found.byte_ends[:-1].tolist() == sorted(ends[0] & ends[1])
    starts = [0, *found.byte_ends[:-1].tolist()]
    for (ts, te, ss, se), start, end in zip(units, starts[:-1], starts[1:], strict=True):
        assert teacher_table.spell(teacher[ts:te])[0].tobytes() == text[start:end]
        assert student_table.spell(student[ss:se])[0].tobytes() == text[start:end]
    # (iv), (v), (vi): swapped roles, the same ids, a teacher of single bytes, which refines every student.
    swapped = align(student_table, student, teacher_table, teacher)
    assert np.array_equal(swapped.segments, found.segments[:, [2, 3, 0, 1]])
    assert (np.diff(align(student_table, student, student_table, student).segments)[:, ::2] == 1).all()
    finest = np.array([*text, len(teacher_table.lengths) - 1], dtype=np.int32)
    refined = align(teacher_table, finest, student_table, student).segments
    assert refined[:, 2:].tolist() == [[i, i + 1] for i in range(len(student))]
