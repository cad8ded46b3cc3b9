"""Alignment on real tokenizers and real texts in many scripts: nothing lost, nothing wrong, units
as small as possible.

The tokenizers come from packages (tools/benchmark/real_inputs.py); one that cannot be fetched is skipped with
the reason. The expected results are computed here in plain Python, from the bytes of each token.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, align, align_batch, build_alignment_map
from megatron_simct.alignment.alignment_map import released_map
from tools.benchmark import real_inputs
from tools.benchmark.alignment import overlap
from tools.benchmark.real_inputs import Unavailable

PAIRS = [
    ("llama3", "qwen2.5"),
    ("qwen2.5", "gemma2"),
    ("gemma3", "qwen2.5"),
    ("gpt4o", "gemma2"),
    ("deepseek", "llama4"),
    ("mistral-v1", "cl100k"),
    ("tekken", "mistral-v3"),
    ("qwen", "gpt2"),
    ("gemma3", "llama3-hf"),
]
PIECES: dict[str, list[bytes]] = {}
NUM_TEXTS = {"humaneval": 15, "champ": 15, "udhr": 31, "gsm8k": 50, "marks": 6}


def tokenizer(name) -> Tokenizer:
    try:
        return real_inputs.tokenizer(name)
    except Unavailable as error:
        pytest.skip(str(error))


@cache
def texts() -> list[bytes]:
    found = []
    for name, count in NUM_TEXTS.items():
        try:
            found += [text.encode() for text in real_inputs.TEXTS[name]()[:count]]
        except Unavailable as error:
            if name != "gsm8k":
                pytest.skip(str(error))
    return found


def ends_of(name: str, ids: np.ndarray) -> tuple[bytes, list[int]]:
    pieces = PIECES.setdefault(name, real_inputs.tokenizer(name).table.pieces())
    spelled = [pieces[i] for i in ids]
    return b"".join(spelled), list(accumulate(map(len, spelled)))


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_every_shared_byte_is_in_a_minimal_unit(teacher_name, student_name) -> None:
    teacher, student = tokenizer(teacher_name), tokenizer(student_name)
    samples = [(teacher.encode(data), student.encode(data)) for data in texts()]
    batch = align_batch(teacher.table, [t for t, _ in samples], student.table, [s for _, s in samples])
    swapped = align_batch(student.table, [s for _, s in samples], teacher.table, [t for t, _ in samples])
    whole = changed = 0
    for data, (teacher_ids, student_ids), found, mirror in zip(texts(), samples, batch, swapped, strict=True):
        teacher_bytes, teacher_ends = ends_of(teacher_name, teacher_ids)
        student_bytes, student_ends = ends_of(student_name, student_ids)
        size = min(len(teacher_bytes), len(student_bytes))
        common = next((i for i in range(size) if teacher_bytes[i] != student_bytes[i]), size)
        boundaries = sorted(b for b in set(teacher_ends) & set(student_ends) if b <= common)
        # The units are the gaps between all common boundaries: as many as possible.
        assert [student_ends[se - 1] for se in found.segments[:, 3]] == boundaries
        assert [teacher_ends[te - 1] for te in found.segments[:, 1]] == boundaries
        starts = np.vstack([np.zeros((1, 4), np.int32), found.segments])[:-1, 1::2]
        assert np.array_equal(found.segments[:, ::2], starts[: len(found.segments)])
        for ts, te, ss, se in found.segments.tolist():
            first_t, first_s = teacher_ends[ts - 1] if ts else 0, student_ends[ss - 1] if ss else 0
            assert (
                teacher_bytes[first_t : teacher_ends[te - 1]] == student_bytes[first_s : student_ends[se - 1]]
            )
        assert np.array_equal(mirror.segments, found.segments[:, [2, 3, 0, 1]])
        if teacher_bytes == student_bytes == data:
            whole += len(data)
            assert boundaries[-1] == len(data) and not found.dropped and not found.student_labels_dropped
        else:
            changed += 1
    # Few texts are rewritten: by Qwen's NFC, and by SentencePiece's mark for a space.
    assert changed <= 8 and whole > 60_000


@pytest.mark.parametrize(
    ("student_name", "teacher_name", "expected", "released"),
    [("qwen2.5", "gemma2", 97_675, 64_272), ("qwen2.5", "gemma3", 95_968, 63_638)],
)
def test_shared_vocabulary_of_large_pairs(student_name, teacher_name, expected, released) -> None:
    student, teacher = tokenizer(student_name), tokenizer(teacher_name)
    alignment_map = build_alignment_map(student, teacher)
    content = [set(t.table.pieces()) - {b""} for t in (student, teacher)]
    assert alignment_map.num_shared == expected == len(content[0] & content[1])
    assert released_map(student, teacher).num_shared == released
    shared, share = overlap(student, teacher)
    assert shared == expected and share == pytest.approx(
        expected / min(len(t.table.lengths) for t in (student, teacher))
    )


def test_the_released_walk_loses_what_the_minimal_units_keep() -> None:
    """Chinese between two byte-level tokenizers: they cut characters in different places, and the
    walk loses its place.
    """
    teacher, student = tokenizer("llama3"), tokenizer("qwen2.5")
    data = "".join(text for text in real_inputs.udhr() if "世界人权宣言" in text).encode()
    teacher_ids, student_ids = teacher.encode(data), student.encode(data)
    covered = {
        segmentation: 1 - align(
            teacher.table, teacher_ids, student.table, student_ids, segmentation=segmentation
        ).student_labels_dropped / len(student_ids)
        for segmentation in ("minimal", "authors")
    }  # fmt: skip
    assert covered["minimal"] == 1
    assert covered["authors"] < 0.5
