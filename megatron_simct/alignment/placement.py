"""The part of the shared vocabulary that lies on one vocabulary shard, as the loss needs it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabPlacement:
    """The part of the shared vocabulary on one tensor-parallel rank of the student.

    The student's output weight is split by vocabulary: this rank owns columns [shard_start, shard_end).
    Teacher rows are placed with the student's columns, so both scores of a shared token are on one rank. The
    relation is a CSR: the stop column has as many teacher rows as the teacher has stop tokens, every other
    shared column has one.

    Invariants: columns ascending, no duplicates; row_offsets[0] == 0 and row_offsets[-1]
    == len(teacher_rows).
    """

    student_vocab_size: int
    """V_S, without padding: ids from here to the padded size are never scored."""
    teacher_vocab_size: int
    """V_T: the same of the teacher."""
    shard_start: int
    shard_end: int
    """Student ids [shard_start, shard_end) of the padded vocabulary live here; W = shard_end - shard_start.
    """
    columns: np.ndarray
    """int64 [c]: local student column (id - shard_start) of each shared token of this rank."""
    row_offsets: np.ndarray
    """int64 [c + 1]: the teacher rows of columns[i] are teacher_rows[row_offsets[i]:row_offsets[i + 1]]."""
    teacher_rows: np.ndarray
    """int64 [r]: teacher ids."""

    @classmethod
    def student_only(cls, *, student_vocab_size: int, shard_start: int, shard_end: int) -> VocabPlacement:
        """The placement of an interface without a teacher: nothing is shared."""
        return cls(
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=0,
            shard_start=shard_start,
            shard_end=shard_end,
            columns=np.zeros(0, np.int64),
            row_offsets=np.zeros(1, np.int64),
            teacher_rows=np.zeros(0, np.int64),
        )
