"""AlignmentMap: pairs by bytes, several tokens of equal bytes, the stop bridge, shards; real pairs
against brute force.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_simct.alignment import AlignmentMap, Tokenizer, TokenTable, build_alignment_map, load_tokenizer
from megatron_simct.alignment.alignment_map import identity_map, released_map
from tests.oracles.alignment import greedy_encoder

STUDENT = [b"ha", b"ppy", b" cat", b" the", b"x", b"<eos>", b"h", b"p"]
TEACHER = [b"hap", b"py", b" cat", b" the", b"x", b"<|im_end|>", b"h", b"y", b"p"]


def tokenizer(pieces: list[bytes], stop_ids=(5,), special_ids=()) -> Tokenizer:
    table = TokenTable.from_bytes(pieces, special_ids=special_ids, stop_ids=stop_ids)
    return Tokenizer(name="test", table=table, encode_text=greedy_encoder(table.pieces()))


def pairs(alignment_map: AlignmentMap) -> list[tuple[int, int]]:
    return list(zip(alignment_map.student_ids.tolist(), alignment_map.teacher_ids.tolist(), strict=True))


def test_small_pair() -> None:
    student, teacher = tokenizer(STUDENT), tokenizer(TEACHER)
    alignment_map = build_alignment_map(student, teacher)
    assert pairs(alignment_map) == [(2, 2), (3, 3), (4, 4), (6, 6), (7, 8)]
    assert alignment_map.num_shared == 5
    assert (alignment_map.stop_student_id, alignment_map.stop_teacher_ids) == (5, (5,))
    assert (alignment_map.student_vocab_size, alignment_map.teacher_vocab_size) == (8, 9)
    assert alignment_map.student_fingerprint == student.table.fingerprint
    assert alignment_map.teacher_fingerprint == teacher.table.fingerprint
    assert alignment_map.student_ids.dtype == alignment_map.teacher_ids.dtype == np.int32
    assert [alignment_map.shared_student_id(data) for data in (b"p", b"x", b"hap", b"ha", b"<eos>", b"")] == [
        7, 4, -1, -1, -1, -1,
    ]  # fmt: skip
    shared = alignment_map.is_shared(np.array([8, 7, 5, 2]), np.array([7, 7, 5, 2]))
    assert shared.tolist() == [True, False, False, True]


def test_every_id_with_itself() -> None:
    alignment_map = identity_map(tokenizer(STUDENT), tokenizer(STUDENT))
    assert pairs(alignment_map) == [(i, i) for i in range(8) if i != 5]
    assert (alignment_map.stop_student_id, alignment_map.stop_teacher_ids) == (5, (5,))


@pytest.mark.parametrize(
    "teacher, words",
    [
        (tokenizer(TEACHER), "are not the same, so their ids cannot be compared"),
        (tokenizer([*STUDENT, b"y"]), "are not the same, so their ids cannot be compared"),
        (
            tokenizer(STUDENT, stop_ids=(4, 5), special_ids=(0, 4)),
            r"stops at ids \[5\] and the teacher at \[4, 5\]; .*--teacher-stop-token-ids",
        ),
        (
            tokenizer(STUDENT, stop_ids=(5, 0), special_ids=(0, 4)),
            r"stops at ids \[5\] and the teacher at \[5, 0\]; .*--stop-token-ids",
        ),
    ],
)
def test_ids_of_different_tokenizers_are_not_paired(teacher, words) -> None:
    with pytest.raises(ValueError, match=words):
        identity_map(tokenizer(STUDENT, special_ids=(0, 4) if "stops" in words else ()), teacher)


def test_special_spellings_and_empty_pieces_are_not_shared() -> None:
    student = tokenizer([b"<s>", b"<s>", b"", b"a", b"<p>", b"<e>"], special_ids=[0, 4])
    teacher = tokenizer([b"<s>", b"", b"<p>", b"<e>", b"a", b"<e>"], special_ids=[2])
    assert pairs(build_alignment_map(student, teacher)) == [(1, 0), (3, 4)]


def test_of_equal_bytes_the_id_that_encoding_gives_is_kept_else_the_lowest() -> None:
    pieces = [b"A", b"b", b"A", b"\xff", b"\xff", b"<e>", b"AA", b"AA"]
    table = TokenTable.from_bytes(pieces, stop_ids=[5])
    answers = {"A": [2], "AA": [2, 2]}
    student = Tokenizer(name="test", table=table, encode_text=lambda text: answers.get(text, []))
    teacher = tokenizer([b"AA", b"A", b"\xff", b"b", b"c", b"<e>"])
    assert pairs(build_alignment_map(student, teacher)) == [(1, 3), (2, 1), (3, 2), (6, 0)]
    assert pairs(build_alignment_map(teacher, student)) == [(0, 6), (1, 2), (2, 3), (3, 1)]


def test_same_tokenizer_gives_the_identity() -> None:
    student = tokenizer(STUDENT)
    assert pairs(build_alignment_map(student, student)) == [(i, i) for i in range(8) if i != 5]


def test_the_first_stop_token_of_the_student_meets_all_of_the_teachers() -> None:
    alignment_map = build_alignment_map(
        tokenizer(STUDENT, stop_ids=(4, 5), special_ids=(0, 4)), tokenizer(TEACHER, stop_ids=(5, 4))
    )
    assert (alignment_map.stop_student_id, alignment_map.stop_teacher_ids) == (4, (5, 4))
    assert pairs(alignment_map) == [(2, 2), (3, 3), (6, 6), (7, 8)]


def test_a_tokenizer_without_stop_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no stop token"):
        build_alignment_map(tokenizer(STUDENT), tokenizer(TEACHER, stop_ids=()))


def test_placement_of_all_columns() -> None:
    alignment_map = build_alignment_map(tokenizer(STUDENT), tokenizer(TEACHER + [b"<e>"], stop_ids=(9, 5)))
    whole = alignment_map.placement(shard_start=0, shard_end=16)
    assert whole.columns.tolist() == [2, 3, 4, 5, 6, 7]
    assert whole.row_offsets.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert whole.teacher_rows.tolist() == [2, 3, 4, 9, 5, 6, 8]
    assert (whole.student_vocab_size, whole.teacher_vocab_size) == (8, 10)
    assert whole.columns.dtype == whole.row_offsets.dtype == whole.teacher_rows.dtype == np.int64


@pytest.mark.parametrize("stop_id", [0, 5, 7])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 16])
def test_shards_add_up(num_shards, stop_id) -> None:
    teacher = tokenizer(TEACHER + [b"<e>"], stop_ids=(9, 5))
    alignment_map = build_alignment_map(tokenizer(STUDENT, stop_ids=(stop_id,)), teacher)
    relation = []
    bounds = np.linspace(0, 16, num_shards + 1).astype(int)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        shard = alignment_map.placement(shard_start=int(start), shard_end=int(end))
        assert (shard.shard_start, shard.shard_end) == (start, end)
        assert shard.row_offsets[0] == 0 and shard.row_offsets[-1] == shard.teacher_rows.size
        for i, column in enumerate(shard.columns):
            assert 0 <= column < end - start
            rows = shard.teacher_rows[shard.row_offsets[i] : shard.row_offsets[i + 1]]
            relation += [(int(column + start), int(row)) for row in rows]
    expected = pairs(alignment_map) + [(stop_id, 9), (stop_id, 5)]
    assert relation == sorted(expected, key=lambda pair: pair[0])


def test_bad_shards_are_refused() -> None:
    alignment_map = build_alignment_map(tokenizer(STUDENT), tokenizer(TEACHER))
    for start, end in [(-1, 4), (4, 4), (5, 4)]:
        with pytest.raises(ValueError, match="is not a range"):
            alignment_map.placement(shard_start=start, shard_end=end)


# Real pairs. The bytes of each file's ids are read here a second time, without the package.


def folder() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("the package mistral-common, whose tokenizer files these tests read, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


def sentencepiece_bytes(path: Path) -> set[bytes]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    result = set()
    for i in range(len(sp)):
        if sp.is_byte(i):
            result.add(bytes.fromhex(sp.id_to_piece(i)[3:-1]))
        elif not sp.is_control(i) and not sp.is_unknown(i):
            result.add(sp.id_to_piece(i).replace("\u2581", "\x20").encode())
    return result


def tekken_bytes(path: Path) -> set[bytes]:
    vocab = json.loads(path.read_text())["vocab"]
    return {base64.b64decode(entry["token_bytes"]) for entry in vocab if entry["rank"] < 131072 - 1000}


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_real_pair_shares_what_brute_force_finds(version) -> None:
    path, tekken_path = folder() / version, folder() / "tekken_240718.json"
    student, teacher = load_tokenizer(str(path)), load_tokenizer(str(tekken_path))
    shared = sentencepiece_bytes(path) & tekken_bytes(tekken_path)
    forward, backward = build_alignment_map(student, teacher), build_alignment_map(teacher, student)
    assert forward.num_shared == backward.num_shared == len(shared) > 29000
    assert set(pairs(forward)) == {(s, t) for t, s in pairs(backward)}
    for alignment_map, tokenizers in ((forward, (student, teacher)), (backward, (teacher, student))):
        assert (np.diff(alignment_map.student_ids) > 0).all()
        assert np.unique(alignment_map.teacher_ids).size == alignment_map.num_shared
        for student_id, teacher_id in pairs(alignment_map):
            assert tokenizers[0].table.bytes_of(student_id) == tokenizers[1].table.bytes_of(teacher_id) != b""
    # "A" is also the byte piece <0x41>, a lower id that the model never emits.
    assert forward.shared_student_id(b"A") == student.encode(b"A")[0] > 1000


def test_real_identity() -> None:
    tekken = load_tokenizer(str(folder() / "tekken_240718.json"))
    alignment_map = build_alignment_map(tekken, tekken)
    assert alignment_map.num_shared == 131072 - 1000
    np.testing.assert_array_equal(alignment_map.student_ids, alignment_map.teacher_ids)


def test_released_pairs_are_of_equal_strings() -> None:
    """A space is '▁' on both sides. Pairs that the files spell differently are missed, and different
    bytes may be paired.
    """

    def with_strings(pieces: list[bytes], strings: list[str], stop: int) -> Tokenizer:
        table = TokenTable.from_bytes(pieces, stop_ids=[stop])
        ids = {text: i for i, text in enumerate(strings)}
        return Tokenizer(name="test", table=table, encode_text=lambda text: [], strings=lambda: ids)

    student = with_strings([b" the", b"\n", b"\xe9", b"<s>", b"<end>"], ["Ġthe", "Ċ", "é", "<s>", "<end>"], 4)
    teacher = with_strings(
        [b"<end>", "é".encode(), b" the", b"\n", b"<s>"], ["<end>", "é", "▁the", "\n", "<s>"], 0
    )
    assert pairs(released_map(student, teacher)) == [(0, 2), (2, 1), (3, 4)]
    assert pairs(build_alignment_map(student, teacher)) == [(0, 2), (1, 3), (3, 4)]
    assert released_map(student, teacher).stop_teacher_ids == (0,)
    with pytest.raises(ValueError, match="--simct-shared released: .*is not a tokenizer.json"):
        released_map(student, dataclasses.replace(teacher, strings=None))
