"""Two tokenizations of one response, cut into the smallest pieces that both can express.

Let B_T and B_S be the byte offsets where tokens of the teacher and of the student end. A common unit can only end where
both have a token end, so the units of the finest common partition are the gaps between consecutive members of
B_T ∩ B_S (SimCT, arXiv:2605.07711, Theorem 1: minimal units are unique and every other valid partition is coarser).
A unit of one token on each side is an ordinary 1:1 position.

What real text adds to that:
- The two byte strings may differ (a tokenizer that normalizes, a response that is not UTF-8). Only their longest
  common prefix is aligned; the rest is masked and counted, never guessed.
- A special token inside a response has no bytes and no counterpart: it ends the common prefix.
- Pieces of zero bytes attach to the segment on their left, at offset 0 to the first segment.
- The stop tokens are their own segment at the end, if both sides stopped and nothing was masked before them.

Shape letters: M teacher labels, N student labels, A segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_simct.alignment.token_table import TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """What `align` found out. Byte counts are of the student's content, specials and stop token have no bytes."""

    segments: np.ndarray
    """int32 [A, 4] of (ts, te, ss, se): teacher labels [ts, te) and student labels [ss, se) spell the same bytes."""
    byte_ends: np.ndarray
    """int64 [A]: byte offset where each segment ends; the stop segment ends where the one before it does."""
    stop: bool
    """Whether the last segment is the pair of stop tokens."""
    dropped: dict[str, int]
    """Why labels are in no segment -> bytes masked for that reason (0: only labels without bytes are). At most one of
    mismatch     the byte strings differ, or one is a prefix of the other
    special      a special token inside one side's response
    one_stop     bytes agree, but only one side ends in a stop token
    no_bytes     zero-length pieces in a response that has no bytes, so that there is no segment to attach them to
    """
    common_prefix_bytes: int
    """Length of the longest common byte prefix; up to one unit of it may be masked, where a token crosses its end."""
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
    segmentation: Literal["minimal"] = "minimal",
) -> Alignment:
    """Cuts teacher labels [M] and student labels [N] (int32, stop tokens included) into minimal common units.

    Integers only, O(M + N + bytes). Raises ValueError for an id outside its table or an unknown segmentation.
    """
    if segmentation != "minimal":
        raise ValueError(f'segmentation "{segmentation}" is unknown; use "minimal"')
    teacher_data, teacher_ends, _, teacher_stops, teacher_cut = _content(teacher_table, teacher_ids)
    student_data, student_ends, student_bytes, student_stops, student_cut = _content(student_table, student_ids)

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


def _content(table: TokenTable, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, bool, bool]:
    """Bytes [L] and token ends [n] up to the first special token; all content bytes; ends in a stop token; was cut."""
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

    Ends are ascending and at most `prefix`. Tokens of zero bytes repeat the end of the token before them; counting the
    last of equal ends puts them left of the boundary.
    """
    # tokens_to[b]: number of teacher tokens up to offset b if one ends there, else 0. Of equal indices the last wins.
    tokens_to = np.zeros(prefix + 1, dtype=np.int64)
    tokens_to[teacher_ends] = np.arange(1, teacher_ends.size + 1)
    tokens_to[0] = 0
    te = tokens_to[student_ends]
    is_boundary = te > 0
    is_boundary[:-1] &= student_ends[1:] != student_ends[:-1]
    last = is_boundary.nonzero()[0]
    return te[last], last + 1
