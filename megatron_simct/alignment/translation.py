"""The teacher's tokens in those of the student, by their bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, eq=False, kw_only=True)
class Translation:
    """For losses that get a teacher's tokens by id.

    Lists in place of arrays: they are read one number at a time.
    """

    student: list[bytes]
    """The bytes of every id; b"" for special ones."""
    teacher: list[bytes]
    student_of_bytes: Mapping[bytes, int]
    """The one student token that is taken for these bytes."""
    stop_student_id: int | None
    """The student's stop token, which stands for all of the teacher's; None if they are not compared."""
    stop_teacher_ids: Collection[int]
    _beginning: dict[bytes, list[int]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def same(self) -> list[int]:
        """For each of the teacher's tokens the student's of the same bytes, -1 if there is none."""
        return [self.student_of_bytes.get(piece, -1) if piece else -1 for piece in self.teacher]

    @cached_property
    def begins(self) -> list[int]:
        """For each of the teacher's tokens the longest of the student's that it begins with, -1 if there
        is none.
        """
        return [self.longest_prefix(piece) for piece in self.teacher]

    def longest_prefix(self, text: bytes) -> int:
        """The longest of the student's tokens that the text begins with, -1 if there is none."""
        found = self.student_of_bytes
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[:size] in found:
                return found[text[:size]]
        return -1

    @cached_property
    def roots(self) -> list[bytes]:
        """For each of the teacher's tokens that the student has none for: the shortest of these that it
        begins with, itself perhaps; b"" for the others."""
        missing = {piece for piece, other in zip(self.teacher, self.same, strict=True) if piece and other < 0}
        prefixes = ((piece[:size] for size in range(1, len(piece) + 1)) for piece in self.teacher)
        return [
            next((prefix for prefix in of_piece if prefix in missing), b"") if piece in missing else b""
            for piece, of_piece in zip(self.teacher, prefixes, strict=True)
        ]

    def beginning_with(self, text: bytes) -> list[int]:
        """The student's tokens that begin with the text."""
        if text not in self._beginning:
            pieces, ids = self._in_order
            start = end = bisect_left(pieces, text)
            while end < len(pieces) and pieces[end].startswith(text):
                end += 1
            self._beginning[text] = ids[start:end]
        return self._beginning[text]

    @cached_property
    def _in_order(self) -> tuple[list[bytes], list[int]]:
        """The bytes of the student's tokens, ascending, and their ids."""
        order = sorted((piece, i) for i, piece in enumerate(self.student) if piece)
        return [piece for piece, _ in order], [i for _, i in order]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.student_of_bytes), default=0)
