"""Ranks of a machine divide what all of them need at the start: nothing is done twice, and the results are
those of one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import megatron_simct.data.prompts
import megatron_simct.loading
from megatron_simct.job import build_job
from megatron_simct.loading import open_pair
from megatron_simct.parallel import node
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.parallel.node import Node
from megatron_simct.records import Prompt
from tests.distributed import run_ranks
from tests.tiny import config

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")


def counted(module: Any, name: str) -> Counter[str]:
    """Counts the calls of a function by the text or the file of its first arguments, in this process."""
    calls: Counter[str] = Counter()
    function = getattr(module, name)

    def call(*args: Any) -> Any:
        calls[" | ".join(getattr(one, "name", one) for one in args)] += 1
        return function(*args)

    setattr(module, name, call)
    return calls


def two_machines(rank: int) -> None:
    """From now on ranks 0 and 1 are on one machine, and 2 and 3 on another."""
    node._place = lambda: f"machine {rank // 2}"


def plain(value: Any) -> Any:
    """Arrays as their type and numbers, so that records can be compared."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def samples(prompts: Any) -> list[dict[str, Any]]:
    found: list[Prompt] = prompts.samples(range(60))
    return [plain(asdict(prompt)) for prompt in found]


# A job


def _start(rank: int, world_size: int, folder: Path, machines: int, *flags: str) -> tuple[Any, ...]:
    if machines == 2:
        two_machines(rank)
    resolved = config(folder, "--eval-prompt-data", str(folder / "held_out.jsonl"), *flags)
    calls = counted(megatron_simct.data.prompts, "render_prompt")
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
    return calls, samples(job.prompts), [plain(asdict(one)) for one in job.prompts.batch(1)]


@pytest.mark.parametrize(
    "world_size, machines, flags",
    [(2, 1, ()), (2, 1, TP2), (4, 1, (*TP2, *PP2)), (4, 2, TP2)],
    ids=["dp2", "tp2", "tp2 pp2", "tp2 dp2 on two machines"],
)
def test_a_machine_renders_each_prompt_once(tiny, world_size, machines, flags) -> None:
    ((calls, expected, whole),) = run_ranks(1, _start, tiny, 1)
    assert len(calls) == 2 * 48 and sum(calls.values()) == 2 * 48 + 8  # the held-out ones are the student's
    ranks = run_ranks(world_size, _start, tiny, machines, *flags)
    size = world_size // machines
    for first in range(0, world_size, size):
        of_machine = [calls for calls, _, _ in ranks[first : first + size]]
        assert sum(of_machine, Counter()) == calls and all(of_machine)
    for _, found, share in ranks:
        assert found == expected
        assert len(share) * len({str(one) for _, _, one in ranks}) == len(whole)
        assert all(one in whole for one in share)


def _tables(rank: int, world_size: int, folder: Path) -> tuple[Any, ...]:
    resolved = config(folder, "--simct-interface", "bytes", "--simct-byte-bounds", "any")
    calls = counted(megatron_simct.loading, "with_continuations")
    said: list[str] = []
    pair = open_pair(resolved, say=said.append, divide=Node.of_this_rank().divided)
    sides = (pair.student, pair.teachers[0].tokenizer)
    return calls, said, [(plain(one.continuations.rows), plain(one.continuations.row_of)) for one in sides]


def test_a_machine_finds_continuations_once(tiny) -> None:
    ((calls, said, expected),) = run_ranks(1, _tables, tiny)
    assert len(calls) == len(said) == 2 and set(calls.values()) == {1}
    ranks = run_ranks(3, _tables, tiny)
    assert sum((found for found, _, _ in ranks), Counter()) == calls
    assert [(found, lines) for _, lines, found in ranks] == [(expected, said)] * 3


# The exchange


def _make(some: range) -> dict[str, np.ndarray]:
    return {
        "numbers": np.array(some, dtype=np.int32),
        "grid": np.ones((len(some), 3), dtype=bool),
        "none": np.zeros(0, dtype=np.int64),
    }


def _exchange(rank: int, world_size: int, folder: Path, count: int) -> tuple[Any, ...]:
    tempfile.tempdir = str(folder)
    parts = Node.of_this_rank().divided(count, _make)
    dist.barrier()
    assert not list(folder.glob("megatron_simct-*"))
    writable = [array.flags.writeable for part in parts for array in part.values()]
    return [plain(part) for part in parts], any(writable)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_parts_are_consecutive_and_cover_everything(tmp_path, count) -> None:
    for world_size in (1, 2, 3):
        for parts, writable in run_ranks(world_size, _exchange, tmp_path, count):
            assert len(parts) == world_size and writable == (world_size == 1)
            numbers = [part["numbers"] for part in parts]
            assert [one for _, _, some in numbers for one in some] == list(range(count))
            assert parts == [
                plain(_make(range(some[0], some[-1] + 1) if some else range(0))) for _, _, some in numbers
            ]


def _problem(rank: int, world_size: int, folder: Path, prepare: Callable[[int, Path], Any]) -> str:
    tempfile.tempdir = str(folder)
    here = Node.of_this_rank()
    make = prepare(rank, folder) or _make
    try:
        here.divided(4, make)
    except ValueError as error:
        dist.barrier()
        assert not list(folder.glob("megatron_simct-*"))
        return str(error)
    return ""


def _refuses(rank: int, folder: Path) -> Callable[[range], dict[str, np.ndarray]]:
    def make(some: range) -> dict[str, np.ndarray]:
        raise ValueError(f"row {some[0]}")

    return make if rank else _make


def _no_room(rank: int, folder: Path) -> None:
    folder.rmdir() if rank == 0 else None
    dist.barrier()


@pytest.mark.parametrize(
    "prepare, expected",
    [
        (_refuses, r"^row 2$"),
        (_no_room, r"^TMPDIR \S+: No such file or directory; set it to a folder with more room$"),
    ],
)
def test_every_rank_raises_the_first_problem(tmp_path, prepare, expected) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    first, second = run_ranks(2, _problem, folder, prepare)
    assert first == second
    with pytest.raises(ValueError, match=expected):
        raise ValueError(first)


def _damaged(change: Callable[[Path], Any], rank: int, folder: Path) -> None:
    """What the second rank has written is changed before the first reads it."""
    write = node._write

    def write_and_change(to: Path, arrays: Any) -> None:
        write(to, arrays)
        if rank == 1:
            change(to)

    node._write = write_and_change


def _flip(folder: Path) -> None:
    data = bytearray((folder / "numbers.npy").read_bytes())
    data[-1] ^= 1
    (folder / "numbers.npy").write_bytes(data)


def _cut(folder: Path) -> None:
    os.truncate(folder / "numbers.npy", (folder / "numbers.npy").stat().st_size - 1)


def _as_text(folder: Path) -> None:
    (folder / "numbers.npy").write_text("numbers")


def _add(folder: Path) -> None:
    np.save(folder / "more.npy", np.zeros(1))
    (folder / "more.npy").chmod(0o600)


def _remove(folder: Path) -> None:
    (folder / "none.npy").unlink()


def _link(folder: Path) -> None:
    (folder / "numbers.npy").rename(folder.parent / "elsewhere.npy")
    (folder / "numbers.npy").symlink_to(folder.parent / "elsewhere.npy")


def _open_file(folder: Path) -> None:
    (folder / "numbers.npy").chmod(0o640)


def _open_folder(folder: Path) -> None:
    folder.chmod(0o770)


def _foreign(folder: Path) -> None:
    os.chown(folder / "numbers.npy", 12345, -1)


def _of_pickle(folder: Path) -> None:
    np.save(folder / "numbers.npy", np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "change, expected",
    [
        (_flip, "does not hold what its rank has written"),
        (_add, "does not hold what its rank has written"),
        (_remove, "does not hold what its rank has written"),
        (_cut, "numbers.npy is damaged"),
        (_as_text, "numbers.npy is damaged"),
        (_of_pickle, "numbers.npy is damaged"),
        (_link, "numbers.npy is not private to this user"),
        (_open_file, "numbers.npy is not private to this user"),
        (_open_folder, "-1 is not private to this user"),
        pytest.param(
            _foreign,
            "numbers.npy is not private to this user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user"),
        ),
    ],
)
def test_a_changed_or_foreign_file_is_not_believed(tmp_path, change, expected) -> None:
    first, second = run_ranks(2, _problem, tmp_path, partial(_damaged, change))
    assert first == second
    assert first.startswith(f"TMPDIR {tmp_path}: ") and expected in first
    assert first.endswith("; set it to another folder of this machine")


# Folders of ranks that were killed

DAY = 24 * 3600


def folder_of_a_rank(place: Path, number: int) -> Path:
    return place / f"megatron_simct-{number:032x}-{number}"


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def _hold(folder: Path) -> subprocess.Popen[bytes]:
    """A rank that has written its folder and waits for the others."""
    program = f"""if True:
        import sys, numpy
        from pathlib import Path
        from megatron_simct.parallel import node
        with node._new_folder(Path({str(folder)!r})):
            node._write(Path({str(folder)!r}), {{"numbers": numpy.arange(3)}})
            print(flush=True)
            sys.stdin.read()
    """
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_next_job_removes_the_folder_of_a_rank_that_was_killed(tmp_path) -> None:
    folder = folder_of_a_rank(tmp_path, 1)
    with _hold(folder) as rank:
        try:
            assert rank.stdout is not None and rank.stdout.readline() == b"\n"
        finally:
            rank.kill()
    assert [path.name for path in folder.iterdir()] == ["numbers.npy"]
    aged(folder, 1.1 * DAY)
    run_ranks(2, _exchange, tmp_path, 3)  # which finds no folder at its end
    assert not folder.exists()


def test_a_folder_that_is_in_use_stays_however_old_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = folder_of_a_rank(tmp_path, 1)
    with _hold(folder) as rank:
        try:
            assert rank.stdout is not None and rank.stdout.readline() == b"\n"
            aged(folder, 2 * DAY)
            node._remove_abandoned()
            assert (folder / "numbers.npy").exists()
        finally:
            rank.kill()
    node._remove_abandoned()
    assert not folder.exists()


def test_only_old_folders_of_this_user_and_of_this_name_are_removed(tmp_path, monkeypatch) -> None:
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    old, young, open_to_others, link = (folder_of_a_rank(place, number) for number in range(4))
    other_names = [place / "megatron_simct-1-0", place / f"megatron_simct-{0:032x}-0.old", place / "data"]
    elsewhere = tmp_path / "elsewhere"
    for folder in (old, young, open_to_others, *other_names, elsewhere):
        folder.mkdir(mode=0o700)
        (folder / "numbers.npy").touch()
    open_to_others.chmod(0o770)
    link.symlink_to(elsewhere)
    file = folder_of_a_rank(place, 4)
    file.touch(mode=0o600)
    for path in place.iterdir():
        aged(path, 0.9 * DAY if path == young else 1.1 * DAY)
    node._remove_abandoned()
    assert set(place.iterdir()) == {young, open_to_others, link, file, *other_names}
    assert (elsewhere / "numbers.npy").exists()


def test_folders_for_temporary_files_that_cannot_be_listed_are_no_matter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    node._remove_abandoned()
