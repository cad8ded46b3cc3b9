"""The shared vocabulary: pairs of ids, one of each tokenizer, that mean the same bytes.

On these tokens the two models' next-token distributions can be compared directly (the set O of SimCT,
arXiv:2605.07711). Equality is of bytes, never of spellings such as 'Ġthe' and '▁the'. Beside the pairs of
content the map holds one bridge between stop tokens: the id that ends the student's turn against the whole
stop set of the teacher, whose probabilities are summed by whoever scores it.

Shape letters: V_S and V_T ids of the two tokenizers, C shared pairs, W ids of one vocabulary shard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.alignment.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, kw_only=True)
class AlignmentMap:
    """Pairs (student_ids[i], teacher_ids[i]) with equal bytes, no id twice on either side, specials
    excluded.
    """

    student_ids: np.ndarray
    """int32 [C], ascending."""
    teacher_ids: np.ndarray
    """int32 [C]"""
    stop_student_id: int
    stop_teacher_ids: tuple[int, ...]
    """All stop tokens of the teacher; the first ends a retokenized response."""
    student_vocab_size: int
    """V_S, without padding."""
    teacher_vocab_size: int
    """V_T"""
    student_fingerprint: str
    teacher_fingerprint: str
    """Fingerprints of the token tables: a map is only valid for the two tokenizers it was built from."""
    student_id_of_bytes: dict[bytes, int] = field(repr=False)
    """Bytes of each shared pair -> its student id."""

    @property
    def num_shared(self) -> int:
        """C, the number of byte pairs; the stop bridge is not counted."""
        return self.student_ids.size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the pairs and the stop bridge."""
        pairs = np.stack([self.student_ids, self.teacher_ids])
        stops = (self.stop_student_id, self.stop_teacher_ids)
        return hashlib.sha256(pairs.tobytes() + repr(stops).encode()).hexdigest()

    @cached_property
    def teacher_of_student(self) -> np.ndarray:
        """int32 [V_S]: the teacher id that each student id is paired with, -1 for none."""
        teacher_of_student = np.full(self.student_vocab_size, -1, dtype=np.int32)
        teacher_of_student[self.student_ids] = self.teacher_ids
        return teacher_of_student

    def is_shared(self, teacher_ids: np.ndarray, student_ids: np.ndarray) -> np.ndarray:
        """bool [n]: whether each pair of content ids (both int [n]) is a pair of the map."""
        return self.teacher_of_student[student_ids] == teacher_ids

    def shared_student_id(self, data: bytes) -> int:
        """The student id of the shared token that spells `data`, -1 if none does."""
        return self.student_id_of_bytes.get(data, -1)

    def shared_student_ids_of(self, teacher_ids: np.ndarray) -> np.ndarray:
        """int32 [n]: the student id that each teacher id (content, int [n]) is paired with, -1 for none."""
        place = self._by_teacher[0].searchsorted(teacher_ids).clip(max=max(0, self.num_shared - 1))
        if self.num_shared == 0:
            return np.full(len(teacher_ids), -1, dtype=np.int32)
        found = self._by_teacher[0][place] == teacher_ids
        return np.where(found, self._by_teacher[1][place], -1).astype(np.int32)

    @cached_property
    def _by_teacher(self) -> tuple[np.ndarray, np.ndarray]:
        """Teacher ids, ascending, and their student ids."""
        order = self.teacher_ids.argsort()
        return self.teacher_ids[order], self.student_ids[order]

    def placement(self, *, shard_start: int, shard_end: int, stop_bridge: bool = True) -> VocabPlacement:
        """The pairs whose student ids lie in [shard_start, shard_end) of the padded vocabulary, and the stop
        bridge.

        Raises ValueError if that range is empty or starts below 0.
        """
        if not 0 <= shard_start < shard_end:
            raise ValueError(f"[{shard_start}, {shard_end}) is not a range of student ids")
        columns, teacher_rows = self.student_ids.astype(np.int64), self.teacher_ids.astype(np.int64)
        rows_per_column = np.ones(self.num_shared, dtype=np.int64)
        if stop_bridge:
            at = columns.searchsorted(self.stop_student_id)
            columns = np.insert(columns, at, self.stop_student_id)
            teacher_rows = np.insert(teacher_rows, at, self.stop_teacher_ids)
            rows_per_column = np.insert(rows_per_column, at, len(self.stop_teacher_ids))
        row_offsets = np.append(0, rows_per_column.cumsum())
        first, last = columns.searchsorted([shard_start, shard_end])
        return VocabPlacement(
            student_vocab_size=self.student_vocab_size,
            teacher_vocab_size=self.teacher_vocab_size,
            shard_start=shard_start,
            shard_end=shard_end,
            columns=columns[first:last] - shard_start,
            row_offsets=row_offsets[first : last + 1] - row_offsets[first],
            teacher_rows=teacher_rows[row_offsets[first] : row_offsets[last]],
        )


def build_alignment_map(student: Tokenizer, teacher: Tokenizer) -> AlignmentMap:
    """Pairs all content ids with equal bytes. Raises ValueError for a tokenizer without stop tokens.

    If several ids of one tokenizer have the same bytes, the id is paired that encoding these bytes gives (the
    one that the model was trained to use), else the lowest.
    """
    for tokenizer in (student, teacher):
        if not tokenizer.table.stop_ids:
            raise ValueError(f'tokenizer "{tokenizer.name}" has no stop token')
    of_student, of_teacher = id_of_bytes(student), id_of_bytes(teacher)
    pairs = sorted((i, of_teacher[data], data) for data, i in of_student.items() if data in of_teacher)
    return AlignmentMap(
        student_ids=np.array([i for i, _, _ in pairs], dtype=np.int32),
        teacher_ids=np.array([i for _, i, _ in pairs], dtype=np.int32),
        stop_student_id=student.table.stop_ids[0],
        stop_teacher_ids=teacher.table.stop_ids,
        student_vocab_size=student.table.num_ids,
        teacher_vocab_size=teacher.table.num_ids,
        student_fingerprint=student.table.fingerprint,
        teacher_fingerprint=teacher.table.fingerprint,
        student_id_of_bytes={data: i for i, _, data in pairs},
    )


def identity_map(student: Tokenizer, teacher: Tokenizer) -> AlignmentMap:
    """Every real id with itself, special ones included: for two models of one tokenizer (interface `kd`).

    Raises ValueError for tokenizers that are not the same.
    """
    table = student.table
    if table.fingerprint != teacher.table.fingerprint:
        if replace(table, stop_ids=()).fingerprint == replace(teacher.table, stop_ids=()).fingerprint:
            raise ValueError(
                f'tokenizers "{student.name}" and "{teacher.name}" are the same, but the student stops at '
                f"ids {list(table.stop_ids)} and the teacher at {list(teacher.table.stop_ids)}; give both "
                "the same by --stop-token-ids and --teacher-stop-token-ids"
            )
        raise ValueError(
            f'tokenizers "{student.name}" and "{teacher.name}" are not the same, so their ids cannot be '
            "compared one by one; choose another --simct-interface than kd"
        )
    if not table.stop_ids:
        raise ValueError(f'tokenizer "{student.name}" has no stop token')
    ids = np.delete(np.arange(table.num_ids, dtype=np.int32), table.stop_ids[0])
    return AlignmentMap(
        student_ids=ids,
        teacher_ids=ids,
        stop_student_id=table.stop_ids[0],
        stop_teacher_ids=table.stop_ids[:1],
        student_vocab_size=table.num_ids,
        teacher_vocab_size=table.num_ids,
        student_fingerprint=table.fingerprint,
        teacher_fingerprint=table.fingerprint,
        student_id_of_bytes=id_of_bytes(student),
    )


def released_map(student: Tokenizer, teacher: Tokenizer) -> AlignmentMap:
    """The shared vocabulary of SimCT's released code: ids whose strings in tokenizer.json are equal, 'Ġ' read
    as '▁'.

    So it misses pairs whose files spell bytes in different ways (a line end, accents), and pairs a character
    of one file with a single byte of the other. The stop tokens are bridged as in every map, and in no pair.
    Raises ValueError for a tokenizer of another file.
    """
    by_string: list[dict[str, int]] = []
    for tokenizer in (student, teacher):
        if tokenizer.strings is None:
            raise ValueError(
                f'--simct-shared released: tokenizer "{tokenizer.name}" is not a tokenizer.json, whose '
                "strings it compares"
            )
        ids: dict[str, int] = {}
        for text, token_id in sorted(tokenizer.strings().items(), key=lambda item: item[1]):
            if token_id not in tokenizer.table.stop_ids:
                ids.setdefault(text.replace("Ġ", "▁"), token_id)
        by_string.append(ids)
    pairs = sorted((i, by_string[1][text]) for text, i in by_string[0].items() if text in by_string[1])
    return replace(
        build_alignment_map(student, teacher),
        student_ids=np.array([i for i, _ in pairs], dtype=np.int32),
        teacher_ids=np.array([i for _, i in pairs], dtype=np.int32),
        student_id_of_bytes={},
    )


def id_of_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Content bytes -> the one id that is paired for them."""
    found: dict[bytes, int] = {}
    rivals: dict[bytes, set[int]] = {}
    for token_id, data in enumerate(tokenizer.table.pieces()):
        # Special ids have no bytes, and a content id without bytes has no counterpart.
        if data and found.setdefault(data, token_id) != token_id:
            rivals.setdefault(data, {found[data]}).add(token_id)
    for data, ids in rivals.items():
        encoded = tokenizer.encode(data)
        if encoded.size == 1 and int(encoded[0]) in ids:
            found[data] = int(encoded[0])
    return found
