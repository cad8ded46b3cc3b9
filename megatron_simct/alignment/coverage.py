"""The share of a text that an interface can compare under two tokenizers, by kinds of units.

A unit is of kind 1:1, 1:n (one teacher token, several student tokens), n:1 (one student token) or n:m:
teacher first, as in a segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_simct.alignment.alignment_map import AlignmentMap
from megatron_simct.alignment.segments import align
from megatron_simct.alignment.tokenizer import Tokenizer

KINDS = ("1_1", "1_n", "n_1", "n_m")
_LONGEST = 5


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Coverage of an alignment on one corpus, which each model's own tokenizer spells."""

    student_tokens: int
    teacher_tokens: int
    units: int
    bytes: int
    bytes_dropped: dict[str, int]
    """Bytes of the text in no unit, by reason: those of `Alignment.dropped`, and `student_rewrites` for what
    the student's own normalizer changes."""
    student_token_shares: dict[str, float]
    """Kind of unit -> share of the student's tokens."""
    byte_shares: dict[str, float]
    """Kind of unit -> share of the bytes."""
    shared_token_share: float
    """Share of the student's tokens that are 1:1 with their pair of the shared vocabulary."""
    student_shared_vocabulary_share: float
    """Share of the different student tokens in this text that the shared vocabulary holds."""
    longest_units: list[dict[str, Any]]
    """The units of most bytes: text, and the number of tokens on each side."""

    def as_json(self) -> dict[str, Any]:
        """One flat object; `share_*` are shares of the student's tokens; kinds name the
        teacher's side first.
        """
        return {
            "student_tokens": self.student_tokens,
            "teacher_tokens": self.teacher_tokens,
            "units": self.units,
            "bytes": self.bytes,
            "bytes_dropped": self.bytes_dropped,
            "share_lost": sum(self.bytes_dropped.values()) / max(self.bytes, 1),
            **{f"share_{kind}": self.student_token_shares[kind] for kind in KINDS},
            **{f"byte_share_{kind}": self.byte_shares[kind] for kind in KINDS},
            "shared_token_share": self.shared_token_share,
            "student_shared_vocabulary_share": self.student_shared_vocabulary_share,
            "longest_units": self.longest_units,
        }


def measure_coverage(
    texts: Iterable[str], *, student: Tokenizer, teacher: Tokenizer, alignment_map: AlignmentMap
) -> Coverage:
    """Tokenize each text with both tokenizers, apart from each other, and count."""
    totals: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    tokens, sizes = np.zeros(4, np.int64), np.zeros(4, np.int64)
    seen = np.zeros(student.table.num_ids, dtype=bool)
    longest: dict[bytes, tuple[int, int]] = {}
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        student_ids, teacher_ids = student.encode(data), teacher.encode(data)
        found = align(teacher.table, teacher_ids, student.table, student_ids)
        ts, te, ss, se = found.segments.T
        num_teacher, num_student = te - ts, se - ss
        unit_bytes = np.diff(found.byte_ends, prepend=0)
        # 0: 1:1, 1: one teacher token, 2: one student token, 3: several on both sides.
        kind = np.where(num_teacher > 1, 2, 0) + np.where(num_student > 1, 1, 0)
        tokens += np.bincount(kind, weights=num_student, minlength=4).astype(np.int64)
        sizes += np.bincount(kind, weights=unit_bytes, minlength=4).astype(np.int64)
        seen[student_ids] = True
        one = kind == 0
        totals["shared"] += int(alignment_map.is_shared(teacher_ids[ts[one]], student_ids[ss[one]]).sum())
        totals["student"] += student_ids.size
        totals["teacher"] += teacher_ids.size
        totals["units"] += len(found.segments)
        totals["bytes"] += len(data)
        dropped.update(found.dropped)
        dropped["student_rewrites"] += max(0, len(data) - found.student_bytes)
        for a in np.argsort(unit_bytes, kind="stable")[::-1][:_LONGEST]:
            spelled = student.decode(student_ids[ss[a] : se[a]])
            longest[spelled] = (int(num_student[a]), int(num_teacher[a]))
        longest = {unit: longest[unit] for unit in sorted(longest, key=len, reverse=True)[:_LONGEST]}
    different = np.flatnonzero(seen)
    return Coverage(
        student_tokens=totals["student"],
        teacher_tokens=totals["teacher"],
        units=totals["units"],
        bytes=totals["bytes"],
        bytes_dropped={reason: count for reason, count in dropped.items() if count},
        student_token_shares=_shares(tokens, totals["student"]),
        byte_shares=_shares(sizes, totals["bytes"]),
        shared_token_share=totals["shared"] / max(totals["student"], 1),
        student_shared_vocabulary_share=float(
            (alignment_map.teacher_of_student[different] >= 0).sum() / max(different.size, 1)
        ),
        longest_units=[
            {"text": unit.decode(errors="backslashreplace"), "student_tokens": n, "teacher_tokens": m}
            for unit, (n, m) in longest.items()
        ],
    )


def _shares(counts: np.ndarray, total: int) -> dict[str, float]:
    return {kind: float(counts[i] / max(total, 1)) for i, kind in enumerate(KINDS)}
