"""An AlignmentMap on disk: a folder that training can use and people can read.

    map.json            sizes, stop tokens, fingerprints, balance, coverage; the sha256 of the other file
    map.safetensors     the pairs, and the bytes of every id of both tokenizers (so the folder defines what a
                        pair spells without either tokenizer)

Nothing in it is executed. It is written into a temporary folder that takes its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import megatron_simct
from megatron_simct.alignment.alignment_map import AlignmentMap
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.files import named_errors

FORMAT_VERSION = 1
_SETTINGS, _TENSORS = "map.json", "map.safetensors"
_SIDES = ("student", "teacher")


def placement_balance(
    alignment_map: AlignmentMap, tp_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> dict[int, float]:
    """Tensor-parallel size P -> teacher rows on the fullest rank over V_T / P: 1 is the
    share of an even split.

    The student's vocabulary is split as Megatron does it by default: padded to a multiple of 128 P, in P
    equal ranges.
    """
    balance = {}
    columns = np.append(alignment_map.student_ids, alignment_map.stop_student_id)
    rows = np.append(np.ones(alignment_map.num_shared), len(alignment_map.stop_teacher_ids))
    for size in tp_sizes:
        width = -(-alignment_map.student_vocab_size // (128 * size)) * 128
        fullest = np.bincount(columns // width, weights=rows).max()
        balance[size] = float(fullest * size / alignment_map.teacher_vocab_size)
    return balance


def is_map(folder: str | Path) -> bool:
    """Whether the folder holds a map, intact or damaged."""
    return (Path(folder) / _SETTINGS).exists()


def save_map(
    folder: str | Path,
    alignment_map: AlignmentMap,
    *,
    student: TokenTable,
    teacher: TokenTable,
    description: Mapping[str, Any] | None = None,
) -> None:
    """Write the map as `folder`; a map that is there already is replaced. `description` goes into map.json as
    it is.

    Raises ValueError if the folder holds anything else, and for tables that the map was not built from.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    if folder.exists() and not is_map(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an alignment map: give another folder")
    tables = {"student": student, "teacher": teacher}
    _check_fingerprints(folder, _fingerprints(alignment_map), tables)
    tensors = {"student_ids": alignment_map.student_ids, "teacher_ids": alignment_map.teacher_ids}
    for side, table in tables.items():
        tensors[f"{side}_bytes"] = table.flat
        tensors[f"{side}_lengths"] = table.lengths.astype(np.int32)
        tensors[f"{side}_special"] = table.special.astype(np.uint8)
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    settings = {
        "format_version": FORMAT_VERSION,
        "tool_version": megatron_simct.__version__,
        "num_shared": alignment_map.num_shared,
        "student_vocab_size": alignment_map.student_vocab_size,
        "teacher_vocab_size": alignment_map.teacher_vocab_size,
        "stop_pair": stop_pair(alignment_map),
        "student_stop_ids": list(student.stop_ids),
        "student_normalizer": student.normalizer,
        "teacher_normalizer": teacher.normalizer,
        "student_fingerprint": alignment_map.student_fingerprint,
        "teacher_fingerprint": alignment_map.teacher_fingerprint,
        "fingerprint": alignment_map.fingerprint,
        "placement_balance": {str(size): share for size, share in placement_balance(alignment_map).items()},
        **(description or {}),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        _write(temporary / _TENSORS, data)
        _write(temporary / _SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        if folder.exists():
            # A folder cannot be replaced in one step: the old one leaves its name first.
            old = temporary.with_name(temporary.name + ".old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stop_pair(alignment_map: AlignmentMap) -> dict[str, Any]:
    """The stop bridge as map.json spells it."""
    return {"student": alignment_map.stop_student_id, "teacher": list(alignment_map.stop_teacher_ids)}


def load_map(
    folder: str | Path, *, student: TokenTable | None = None, teacher: TokenTable | None = None
) -> AlignmentMap:
    """Read the map of a folder, for these two tokenizers where they are given.

    Raises ValueError, naming the folder and the cause, for a folder that holds no map or one of another
    version, files that are damaged, fingerprints that do not fit (roles swapped, a tokenizer of another
    revision), and pairs that are not pairs: ids twice or beyond the vocabulary, bytes that differ.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    tables = {side: _table(folder, settings, tensors, side) for side in _SIDES}
    _check_fingerprints(folder, {side: settings[f"{side}_fingerprint"] for side in _SIDES}, tables, own=True)
    given = {side: table for side, table in (("student", student), ("teacher", teacher)) if table is not None}
    _check_fingerprints(folder, {side: table.fingerprint for side, table in tables.items()}, given)
    student_ids, teacher_ids = tensors["student_ids"], tensors["teacher_ids"]
    _check_pairs(folder, student_ids, teacher_ids, tables)
    stop = settings["stop_pair"]
    spelled, ends = tables["student"].spell(student_ids)
    data, bounds = spelled.tobytes(), [0, *ends.tolist()]
    alignment_map = AlignmentMap(
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        stop_student_id=int(stop["student"]),
        stop_teacher_ids=tuple(int(i) for i in stop["teacher"]),
        student_vocab_size=tables["student"].num_ids,
        teacher_vocab_size=tables["teacher"].num_ids,
        student_fingerprint=tables["student"].fingerprint,
        teacher_fingerprint=tables["teacher"].fingerprint,
        student_id_of_bytes={
            data[start:end]: i
            for i, start, end in zip(student_ids.tolist(), bounds[:-1], bounds[1:], strict=True)
        },
    )
    if alignment_map.fingerprint != settings["fingerprint"]:
        raise ValueError(f"alignment map {folder}: {_SETTINGS} does not belong to {_TENSORS}; build it again")
    return alignment_map


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Both files, checked as files."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not is_map(folder):
        raise ValueError(
            f"alignment map {folder}: there is no {_SETTINGS}; tools/build_alignment_map.py makes one"
        )
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        version = settings["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"alignment map {folder}: {_SETTINGS} is damaged ({error!r}); build it again"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"alignment map {folder}: format version {version}, this package reads {FORMAT_VERSION}; build "
            "it again"
        )
    try:
        data = (folder / _TENSORS).read_bytes()
    except OSError as error:
        raise ValueError(
            f"alignment map {folder}: {_TENSORS} cannot be read ({error}); build it again"
        ) from None
    names = {"student_ids", "teacher_ids"} | {
        f"{s}_{n}" for s in _SIDES for n in ("bytes", "lengths", "special")
    }
    keys = {"tensors_sha256", "fingerprint", "stop_pair", "student_stop_ids"}
    keys |= {f"{side}_{name}" for side in _SIDES for name in ("fingerprint", "normalizer")}
    missing = sorted(keys - set(settings))
    if missing:
        raise ValueError(f"alignment map {folder}: {_SETTINGS} lacks {', '.join(missing)}; build it again")
    if hashlib.sha256(data).hexdigest() != settings["tensors_sha256"]:
        raise ValueError(
            f"alignment map {folder}: {_TENSORS} ({len(data)} bytes) is damaged or truncated, its sha256 is "
            f"not the one in {_SETTINGS}; build it again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"alignment map {folder}: {_TENSORS} is damaged ({error}); build it again") from None
    if set(tensors) != names:
        raise ValueError(f"alignment map {folder}: {_TENSORS} holds {sorted(tensors)}; build it again")
    return settings, tensors


def _table(folder: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray], side: str) -> TokenTable:
    lengths = tensors[f"{side}_lengths"].astype(np.int64)
    stop_ids = settings["student_stop_ids"] if side == "student" else settings["stop_pair"]["teacher"]
    try:
        return TokenTable(
            flat=tensors[f"{side}_bytes"],
            offsets=np.append(0, lengths.cumsum()),
            special=tensors[f"{side}_special"].astype(bool),
            stop_ids=tuple(int(i) for i in stop_ids),
            normalizer=str(settings[f"{side}_normalizer"]),
        )
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"alignment map {folder}: the {side}'s bytes are damaged ({error}); build it again"
        ) from None


def _fingerprints(alignment_map: AlignmentMap) -> dict[str, str]:
    return {"student": alignment_map.student_fingerprint, "teacher": alignment_map.teacher_fingerprint}


def _check_fingerprints(
    folder: Path, expected: Mapping[str, str], tables: Mapping[str, TokenTable], *, own: bool = False
) -> None:
    """Whether the tables are those that the map was built from. own: the tables are the folder's."""
    found = {side: table.fingerprint for side, table in tables.items()}
    wrong = [side for side in found if found[side] != expected[side]]
    if not wrong:
        return
    if own:
        raise ValueError(
            f"alignment map {folder}: the {wrong[0]}'s fingerprint is not that of its bytes; build it again"
        )
    other = {"student": "teacher", "teacher": "student"}
    if expected["student"] != expected["teacher"] and all(
        found[side] == expected[other[side]] for side in found
    ):
        raise ValueError(
            f"alignment map {folder}: the roles are swapped: its student is the teacher here; build another"
        )
    side = wrong[0]
    raise ValueError(
        f"alignment map {folder}: the {side}'s tokenizer is not the one that the map was built from, or a "
        f"tokenizer of another revision or with other stop tokens (fingerprint {expected[side][:12]} in the "
        f"map, {found[side][:12]} here); build it again"
    )


def _check_pairs(
    folder: Path, student_ids: np.ndarray, teacher_ids: np.ndarray, tables: Mapping[str, TokenTable]
) -> None:
    if student_ids.shape != teacher_ids.shape or student_ids.ndim != 1:
        raise ValueError(
            f"alignment map {folder}: {student_ids.shape} student ids, {teacher_ids.shape} teacher ids"
        )
    for side, ids in (("student", student_ids), ("teacher", teacher_ids)):
        size = tables[side].num_ids
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"alignment map {folder}: {side} ids from {ids.min()} to {ids.max()} in a vocabulary of "
                f"{size}"
            )
        if np.unique(ids).size != ids.size:
            raise ValueError(f"alignment map {folder}: a {side} id is in several pairs")
    if (np.diff(student_ids) < 0).any():
        raise ValueError(f"alignment map {folder}: the pairs are not sorted by student id")
    (student, student_ends), (teacher, teacher_ends) = (
        tables["student"].spell(student_ids),
        tables["teacher"].spell(teacher_ids),
    )
    if not (np.array_equal(student_ends, teacher_ends) and np.array_equal(student, teacher)):
        raise ValueError(f"alignment map {folder}: a pair's two ids spell different bytes")


def _write(path: Path, data: bytes) -> None:
    with named_errors(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
