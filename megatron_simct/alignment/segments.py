"""Two tokenizations of one response, cut into the smallest pieces that both can express.

Let B_T and B_S be the byte offsets where tokens of the teacher and of the student end. A common unit can only
end where both have a token end, so the units of the finest common partition are the gaps between consecutive
members of B_T ∩ B_S (SimCT, arXiv:2605.07711, Theorem 1: minimal units are unique and every other valid
partition is coarser). A unit of one token on each side is an ordinary 1:1 position.

What real text adds to that:
- The two byte strings may differ (a tokenizer that normalizes, a response that is not UTF-8). Only their
  longest common prefix is aligned; the rest is masked and counted, never guessed.
- A special token inside a response has no bytes and no counterpart: it ends the common prefix.
- Pieces of zero bytes attach to the segment on their left, at offset 0 to the first segment.
- The stop tokens are their own segment at the end, if both sides stopped and nothing was masked before them.

The segmentation "authors" is the walk of SimCT's released code instead (`_walk`), for comparison
with their results.

Shape letters: M teacher labels, N student labels, A segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_simct.alignment.token_table import TokenTable

Segmentation = Literal["minimal", "authors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The result of `align`.

    Byte counts are of the student's content, specials and stop token have no bytes.
    """

    segments: np.ndarray
    """int32 [A, 4] of (ts, te, ss, se): teacher labels [ts, te) and student labels [ss, se)
    spell the same bytes.
    """
    byte_ends: np.ndarray
    """int64 [A]: byte offset where each segment ends; the stop segment ends where the one before it does."""
    stop: bool
    """Whether the last segment is the pair of stop tokens."""
    dropped: dict[str, int]
    """Why labels are in no segment -> bytes masked for that reason (0: only labels without bytes are). At
    most one of
    mismatch     the byte strings differ, or one is a prefix of the other
    special      a special token inside one side's response
    one_stop     bytes agree, but only one side ends in a stop token
    no_bytes     zero-length pieces in a response that has no bytes, so that there is no segment to attach
                 them to
    walk         behind the last match of segmentation "authors"
    """
    common_prefix_bytes: int
    """Length of the longest common byte prefix; up to one unit of it may be masked, where a
    token crosses its end.
    """
    student_bytes: int
    """Bytes of the student's whole content, masked or not."""
    student_labels_dropped: int
    teacher_labels_dropped: int


def align(
    teacher_table: TokenTable,
    teacher_ids: np.ndarray,
    student_table: TokenTable,
    student_ids: np.ndarray,
    *,
    segmentation: Segmentation = "minimal",
) -> Alignment:
    """Cuts teacher labels [M] and student labels [N] (int32, stop tokens included) into minimal common units.

    Integers only, O(M + N + bytes). Raises ValueError for an id outside its table or an unknown segmentation.
    """
    if segmentation == "authors":
        return _walk(teacher_table, teacher_ids, student_table, student_ids)
    if segmentation != "minimal":
        raise ValueError(f'segmentation "{segmentation}" is unknown; use "minimal" or "authors"')
    teacher_data, teacher_ends, _, teacher_stops, teacher_cut = _content(teacher_table, teacher_ids)
    student_data, student_ends, student_bytes, student_stops, student_cut = _content(
        student_table, student_ids
    )

    prefix, equal = _common_prefix(teacher_data, student_data)
    if not equal:
        teacher_ends = teacher_ends[: teacher_ends.searchsorted(prefix, side="right")]
        student_ends = student_ends[: student_ends.searchsorted(prefix, side="right")]
    te, se = _common_boundaries(teacher_ends, student_ends, prefix)
    content_segments = te.size
    byte_ends = student_ends[se - 1]

    # A special token also ends the prefix if the other side's bytes go on behind it.
    special = (teacher_cut and prefix == teacher_data.size) or (student_cut and prefix == student_data.size)
    complete = equal and not special
    stop = teacher_stops and student_stops and complete
    segments = np.empty((content_segments + stop, 4), dtype=np.int32)
    segments[:content_segments, 1] = te
    segments[:content_segments, 3] = se
    if stop:
        segments[-1] = (len(teacher_ids) - 1, len(teacher_ids), len(student_ids) - 1, len(student_ids))
        byte_ends = np.append(byte_ends, prefix)
    if content_segments:
        segments[0, ::2] = 0
        segments[1:content_segments, ::2] = segments[: content_segments - 1, 1::2]

    teacher_dropped = len(teacher_ids) - (int(te[-1]) if content_segments else 0) - stop
    student_dropped = len(student_ids) - (int(se[-1]) if content_segments else 0) - stop
    if special:
        reason = "special"
    elif not equal:
        reason = "mismatch"
    elif teacher_stops != student_stops:
        reason = "one_stop"
    else:
        reason = "no_bytes"
    aligned_bytes = int(byte_ends[-1]) if byte_ends.size else 0
    return Alignment(
        segments=segments,
        byte_ends=byte_ends,
        stop=stop,
        dropped={reason: student_bytes - aligned_bytes} if teacher_dropped or student_dropped else {},
        common_prefix_bytes=prefix,
        student_bytes=student_bytes,
        student_labels_dropped=student_dropped,
        teacher_labels_dropped=teacher_dropped,
    )


def align_batch(
    teacher_table: TokenTable,
    teacher_ids: Sequence[np.ndarray],
    student_table: TokenTable,
    student_ids: Sequence[np.ndarray],
    *,
    segmentation: Segmentation = "minimal",
) -> list[Alignment]:
    """`align` of each sample: the same results, in one pass over all of them where
    nothing has to be masked.
    """
    samples = list(zip(teacher_ids, student_ids, strict=True))
    results: list[Alignment | None] = [None] * len(samples)
    if segmentation == "minimal" and samples:
        teacher, student = _Side.of(teacher_table, teacher_ids), _Side.of(student_table, student_ids)
        plain = teacher.plain & student.plain & (teacher.stops == student.stops)
        plain &= np.diff(teacher.bytes_to) == np.diff(student.bytes_to)
        if plain.all():
            if np.array_equal(teacher.data, student.data):
                return _align_plain(teacher, student)
            differences = np.append(0, (teacher.data != student.data).cumsum())
            plain &= np.diff(differences[student.bytes_to]) == 0
        chosen = plain.nonzero()[0]
        if chosen.size:
            found = align_batch(
                teacher_table,
                [teacher_ids[i] for i in chosen],
                student_table,
                [student_ids[i] for i in chosen],
            )
            for i, alignment in zip(chosen, found, strict=True):
                results[i] = alignment
    return [
        align(teacher_table, t, student_table, s, segmentation=segmentation) if result is None else result
        for (t, s), result in zip(samples, results, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side's samples, back to back, without their stop tokens."""

    data: np.ndarray
    """uint8 [L]"""
    ends: np.ndarray
    """int64 [n], where each token ends in `data`."""
    tokens_to: np.ndarray
    """int64 [samples + 1], ascending: tokens before each sample."""
    bytes_to: np.ndarray
    """int64 [samples + 1]: bytes before each sample."""
    stops: np.ndarray
    """bool [samples]"""
    plain: np.ndarray
    """bool [samples]: has bytes, and in every token some (so no special token either)."""

    @staticmethod
    def of(table: TokenTable, samples: Sequence[np.ndarray]) -> _Side:
        stops = np.array([bool(len(ids)) and int(ids[-1]) in table.stop_ids for ids in samples])
        content = [ids[:-1] if stop else ids for ids, stop in zip(samples, stops, strict=True)]
        tokens_to = np.append(0, np.cumsum([len(ids) for ids in content]))
        data, ends = table.spell(np.concatenate(content))
        bytes_before = np.append(0, ends)
        empty_before = np.append(0, (np.diff(bytes_before) == 0).cumsum())
        bytes_to = bytes_before[tokens_to]
        plain = (np.diff(empty_before[tokens_to]) == 0) & (np.diff(bytes_to) > 0)
        return _Side(data=data, ends=ends, tokens_to=tokens_to, bytes_to=bytes_to, stops=stops, plain=plain)


def _align_plain(teacher: _Side, student: _Side) -> list[Alignment]:
    """Align samples whose bytes agree: every sample ends in a common boundary, so all can be cut together."""
    te, se = _common_boundaries(teacher.ends, student.ends, student.data.size)
    byte_ends = student.ends[se - 1]
    # The segments of sample i are [segments_to[i], segments_to[i + 1]); with the stops' they are rows_to's.
    segments_to = np.append(0, byte_ends.searchsorted(student.bytes_to[1:]) + 1)
    rows_to = segments_to + np.append(0, student.stops.cumsum())
    counts = np.diff(segments_to)
    at_stop = rows_to[1:][student.stops] - 1
    is_content = np.ones(rows_to[-1], dtype=bool)
    is_content[at_stop] = False

    def column(ends: np.ndarray, before: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Ends relative to the sample, and the stop segment's own behind them."""
        values = np.empty(is_content.size, dtype=np.int64)
        values[is_content] = ends - before[:-1].repeat(counts)
        values[at_stop] = last[student.stops]
        return values

    segments = np.zeros((is_content.size, 4), dtype=np.int32)
    segments[:, 1] = column(te, teacher.tokens_to, np.diff(teacher.tokens_to) + 1)
    segments[:, 3] = column(se, student.tokens_to, np.diff(student.tokens_to) + 1)
    all_ends = column(byte_ends, student.bytes_to, np.diff(student.bytes_to))
    segments[1:, ::2] = segments[:-1, 1::2]
    segments[rows_to[:-1], ::2] = 0
    bounds, sizes = rows_to.tolist(), np.diff(student.bytes_to).tolist()
    return [
        Alignment(
            segments=segments[first:last],
            byte_ends=all_ends[first:last],
            stop=stop,
            dropped={},
            common_prefix_bytes=size,
            student_bytes=size,
            student_labels_dropped=0,
            teacher_labels_dropped=0,
        )
        for first, last, stop, size in zip(
            bounds[:-1], bounds[1:], student.stops.tolist(), sizes, strict=True
        )
    ]


def _walk(
    teacher_table: TokenTable, teacher_ids: np.ndarray, student_table: TokenTable, student_ids: np.ndarray
) -> Alignment:
    """The segmentation of SimCT's released code, one token at a time over texts.

    Each token is decoded alone, so bytes that are not a character become U+FFFD. Two positions match if
    the texts before them are equal and the next pieces are equal or both stop tokens. Elsewhere the side
    whose text is shorter advances, both if they are equally long. A segment runs up to and including a match;
    what follows the last match is dropped.
    """
    left, right = _texts(teacher_table, teacher_ids), _texts(student_table, student_ids)
    segments: list[tuple[int, int, int, int]] = []
    i = j = first_i = first_j = 0
    text_i = text_j = ""  # since the last match: up to there both are equal
    while i < len(left) and j < len(right):
        if text_i == text_j and left[i] == right[j]:
            segments.append((first_i, i + 1, first_j, j + 1))
            i, j, text_i, text_j = i + 1, j + 1, "", ""
            first_i, first_j = i, j
            continue
        # A stop token has no text.
        advance_i, advance_j = len(text_i) <= len(text_j), len(text_j) <= len(text_i)
        if advance_i:
            text_i += left[i] or ""
            i += 1
        if advance_j:
            text_j += right[j] or ""
            j += 1
    _, ends = student_table.spell(student_ids)
    found = np.array(segments, dtype=np.int32).reshape(-1, 4)
    byte_ends = ends[found[:, 3] - 1]
    student_bytes = int(ends[-1]) if ends.size else 0
    aligned = int(byte_ends[-1]) if byte_ends.size else 0
    student_dropped, teacher_dropped = len(student_ids) - first_j, len(teacher_ids) - first_i
    return Alignment(
        segments=found,
        byte_ends=byte_ends,
        stop=bool(segments) and left[first_i - 1] is None and tuple(np.diff(found[-1])[::2]) == (1, 1),
        dropped={"walk": student_bytes - aligned} if student_dropped or teacher_dropped else {},
        common_prefix_bytes=aligned,
        student_bytes=student_bytes,
        student_labels_dropped=student_dropped,
        teacher_labels_dropped=teacher_dropped,
    )


def _texts(table: TokenTable, ids: np.ndarray) -> list[str | None]:
    """The text of each id decoded alone; None for a stop token."""
    data, ends = table.spell(ids)
    text, bounds = data.tobytes(), [0, *ends.tolist()]
    return [
        None if int(token_id) in table.stop_ids else text[start:end].decode(errors="replace")
        for token_id, start, end in zip(ids, bounds[:-1], bounds[1:], strict=True)
    ]


def _content(table: TokenTable, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, bool, bool]:
    """Bytes [L] and token ends [n] up to the first special token; all content bytes; ends in a stop token;
    was cut.
    """
    stops = bool(len(ids)) and int(ids[-1]) in table.stop_ids
    content = ids[:-1] if stops else ids
    data, ends = table.spell(content)
    special = table.special.take(content)
    if not special.any():
        return data, ends, data.size, stops, False
    first = int(special.argmax())
    return data[: ends[first]], ends[:first], data.size, stops, True


def _common_prefix(left: np.ndarray, right: np.ndarray) -> tuple[int, bool]:
    """Length of the longest common prefix of two byte arrays, and whether they are equal."""
    size = min(left.size, right.size)
    same = left[:size] == right[:size]
    if same.all():
        return size, left.size == right.size
    return int(same.argmin()), False


def _common_boundaries(
    teacher_ends: np.ndarray, student_ends: np.ndarray, prefix: int
) -> tuple[np.ndarray, np.ndarray]:
    """B_T ∩ B_S without 0, as numbers of tokens up to each common boundary: te, se, both [A].

    Ends are ascending and at most `prefix`. Tokens of zero bytes repeat the end of the token before them;
    counting the last of equal ends puts them left of the boundary.
    """
    # tokens_to[b]: number of teacher tokens up to offset b if one ends there, else 0. Of equal indices the
    # last wins.
    tokens_to = np.zeros(prefix + 1, dtype=np.int64)
    tokens_to[teacher_ends] = np.arange(1, teacher_ends.size + 1)
    tokens_to[0] = 0
    te = tokens_to[student_ends]
    is_boundary = te > 0
    is_boundary[:-1] &= student_ends[1:] != student_ends[:-1]
    last = is_boundary.nonzero()[0]
    return te[last], last + 1
