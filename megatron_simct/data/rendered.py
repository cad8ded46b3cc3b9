"""Rendered rows as a few flat arrays, which the ranks of a machine can share.

    numbers   int32 [Z]   a record for each row: the prompts of all models, then the row's transcript
    ends      int64 [n]   where the record of each row ends
    longest   int32 [n]   tokens of the longest prompt of a row
    compared  bool [n]    whether the row has a transcript

Shape letters: n rows, Z numbers of all records, K models that read a row, p tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megatron_simct.alignment.turns import MASK_REASONS
from megatron_simct.records import Transcript, Turns

Rendering = tuple[Sequence[np.ndarray], Transcript | None]
"""The ids of a row's prompt for each model that reads it, int32 [p], and its transcript if it has one."""

COUNTS = (*(f"bytes_masked_{reason}" for reason in MASK_REASONS), "bytes_of_turns", "bytes_between", "turns")
"""The counts of a transcript, in the order of a record."""


def flat(rows: Iterable[Rendering]) -> dict[str, np.ndarray]:
    """The arrays of some rows."""
    records, longest, compared = [], [], []
    for ids, transcript in rows:
        records.append(_record(ids, transcript))
        longest.append(max(map(len, ids)))
        compared.append(transcript is not None)
    return {
        "numbers": np.concatenate([np.zeros(0, np.int32), *records]),
        "ends": np.cumsum([len(record) for record in records], dtype=np.int64),
        "longest": np.array(longest, dtype=np.int32),
        "compared": np.array(compared, dtype=bool),
    }


def _record(ids: Sequence[np.ndarray], transcript: Transcript | None) -> np.ndarray:
    """int32: K, the length of each prompt, the prompts. For a transcript also each model's responses (number
    of ids, number of responses, ids, spans) and the counts.
    """
    parts = [[len(ids)], [len(of_model) for of_model in ids], *ids]
    if transcript is not None:
        sides = (transcript.student, *transcript.teachers)
        assert len(sides) == len(ids) and transcript.counts.keys() == set(COUNTS), "one for each model"
        for turns in sides:
            parts += [[len(turns.ids), len(turns.spans)], turns.ids, turns.spans.reshape(-1)]
        parts.append([transcript.counts[name] for name in COUNTS])
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


class RenderedRows:
    """Rows that were rendered in one part, or in consecutive parts."""

    def __init__(self, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        """parts: what `flat` returned for each."""
        self._parts = parts
        self._first = np.cumsum([0, *(len(part["ends"]) for part in parts)])
        self.longest = np.concatenate([part["longest"] for part in parts])
        """int32 [n]"""
        self.compared = np.concatenate([part["compared"] for part in parts])
        """bool [n]"""

    def __len__(self) -> int:
        return len(self.longest)

    def __getitem__(self, index: int) -> tuple[list[np.ndarray], Transcript | None]:
        """The ids of each prompt of a row, copied, and its transcript."""
        which = int(self._first.searchsorted(index, side="right")) - 1
        part, place = self._parts[which], index - int(self._first[which])
        start, end = int(part["ends"][place - 1]) if place else 0, int(part["ends"][place])
        reader = _Reader(np.array(part["numbers"][start:end]))
        (models,) = reader.take(1).tolist()
        ids = [reader.take(size) for size in reader.take(models).tolist()]
        if not part["compared"][place]:
            return ids, None
        sides = []
        for _ in range(models):
            size, responses = reader.take(2).tolist()
            sides.append(Turns(ids=reader.take(size), spans=reader.take(2 * responses).reshape(-1, 2)))
        counts = dict(zip(COUNTS, reader.take(len(COUNTS)).tolist(), strict=True))
        return ids, Transcript(student=sides[0], teachers=tuple(sides[1:]), counts=counts)


class _Reader:
    """The numbers of a record, from the first on."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers, self._position = numbers, 0

    def take(self, count: int) -> np.ndarray:
        self._position += count
        return self._numbers[self._position - count : self._position]
