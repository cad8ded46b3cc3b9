"""Minimal common units by sets of byte offsets, in plain Python, and a greedy encoder for
small vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

STOP = "stop"
SPECIAL = "special"
Piece = bytes | str
"""The bytes of a content token, or STOP or SPECIAL."""


def minimal_units(
    teacher: Sequence[Piece], student: Sequence[Piece]
) -> tuple[list[tuple[int, int, int, int]], dict[str, int], int]:
    """Segments (ts, te, ss, se), {reason: student bytes in no segment} (at most one reason), and the
    common prefix in bytes.
    """
    teacher_content, teacher_stops = _without_stop(teacher)
    student_content, student_stops = _without_stop(student)
    teacher_head = list(takewhile(lambda piece: isinstance(piece, bytes), teacher_content))
    student_head = list(takewhile(lambda piece: isinstance(piece, bytes), student_content))
    teacher_bytes, student_bytes = b"".join(teacher_head), b"".join(student_head)
    common = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(teacher_bytes, student_bytes, strict=False))
    )

    teacher_spans, student_spans = _spans(teacher_head), _spans(student_head)
    boundaries = {0, *(end for _, end in teacher_spans)} & {0, *(end for _, end in student_spans)}
    offsets = sorted(b for b in boundaries if b <= common)
    segments = []
    for left, right in zip(offsets[:-1], offsets[1:], strict=True):
        owned_t = [i for i, span in enumerate(teacher_spans) if _belongs(span, left, right)]
        owned_s = [i for i, span in enumerate(student_spans) if _belongs(span, left, right)]
        segments.append((owned_t[0], owned_t[-1] + 1, owned_s[0], owned_s[-1] + 1))

    same_bytes = teacher_bytes == student_bytes
    teacher_is_cut, student_is_cut = (
        len(teacher_head) < len(teacher_content),
        len(student_head) < len(student_content),
    )
    if teacher_stops and student_stops and same_bytes and not teacher_is_cut and not student_is_cut:
        segments.append((len(teacher) - 1, len(teacher), len(student) - 1, len(student)))
    covered_t = sum(te - ts for ts, te, _, _ in segments)
    covered_s = sum(se - ss for _, _, ss, se in segments)
    if covered_t == len(teacher) and covered_s == len(student):
        return segments, {}, common
    if teacher_is_cut and common == len(teacher_bytes) or student_is_cut and common == len(student_bytes):
        reason = "special"
    elif not same_bytes:
        reason = "mismatch"
    elif teacher_stops != student_stops:
        reason = "one_stop"
    else:
        reason = "no_bytes"
    all_student_bytes = sum(len(piece) for piece in student_content if isinstance(piece, bytes))
    return segments, {reason: all_student_bytes - offsets[-1]}, common


def _without_stop(pieces: Sequence[Piece]) -> tuple[Sequence[Piece], bool]:
    stops = len(pieces) > 0 and pieces[-1] == STOP
    return (pieces[:-1], True) if stops else (pieces, False)


def _spans(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    return [(len(b"".join(pieces[:i])), len(b"".join(pieces[: i + 1]))) for i in range(len(pieces))]


def _belongs(span: tuple[int, int], left: int, right: int) -> bool:
    start, end = span
    if start < end:
        return left <= start and end <= right
    return end == right or end == left == 0


def greedy_encoder(pieces: Sequence[bytes | None]) -> Callable[[str], list[int]]:
    """Encodes by the longest piece that fits, and the lowest id among equals. Pieces that are
    None have no content.
    """

    def encode(text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            fitting = [i for i, piece in enumerate(pieces) if piece and data.startswith(piece)]
            ids.append(max(fitting, key=lambda i: len(pieces[i])))
            data = data[len(pieces[ids[-1]]) :]
        return ids

    return encode
