"""Two runs that start together with one --save: one runs, one is refused, nothing is lost."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from json import dumps
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_simct.ownership import Owner
from megatron_simct.parallel import disk
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.teacher.endpoints import Endpoint, publish, read_endpoints, withdraw
from megatron_simct.update.checkpoint import TRACKER
from tests.distributed import run_ranks
from tests.runs import assert_same_run, run
from tests.tiny import build_files, command_line

fork = multiprocessing.get_context("fork")


def argv(files: Path, folder: Path, iterations: int, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--save-interval", "1"),
        *("--rollout-batch-size", "2", "--rollout-max-response-len", "3", "--run-dir", str(folder / "run")),
        *("--save", str(folder / "save"), "--load", str(folder / "save"), *flags),
    )


def _until_the_other_has_ended(rank: int, world_size: int, arguments: list[str], other_ended: Event) -> list:
    """The command. The run that owns the folder continues to its first step when the other one has ended."""
    generate = MegatronEngine.generate

    def wait_and_generate(self: MegatronEngine, *args: object) -> object:
        assert other_ended.wait(60), "the other run has not been refused"
        return generate(self, *args)

    MegatronEngine.generate = wait_and_generate  # type: ignore[method-assign]
    return [*run(rank, world_size, arguments)]


def two_together(files: Path, folder: Path, world_size: int) -> list[tuple[int, str]]:
    """Exit code and standard error of the first ranks of two identical runs."""
    ended, start = fork.Event(), fork.Barrier(2)
    receiver, sender = fork.Pipe(duplex=False)

    def job() -> None:
        start.wait()
        results = run_ranks(
            world_size, _until_the_other_has_ended, argv(files, folder, 2, *TP[world_size]), ended
        )
        ended.set()
        sender.send((results[0][0], results[0][2]))

    jobs = [fork.Process(target=job) for _ in range(2)]
    for one in jobs:
        one.start()
    sender.close()
    outcomes = [receiver.recv() for _ in jobs]
    for one in jobs:
        one.join()
    return sorted(outcomes)


TP = {1: (), 2: ("--tensor-model-parallel-size", "2")}


def check_two(files: Path, folder: Path, reference: Path, world_size: int) -> None:
    """Raises AssertionError if they do not end as they should."""
    (code, err), (refused, line) = two_together(files, folder, world_size)
    assert (code, err, refused) == (0, "", 1), (err, line)
    assert line.count("\n") == 1 and f"--save {folder / 'save'}: another run writes there (process " in line
    assert_same_run(folder, reference)
    assert sorted(path.name for path in (folder / "save").iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        TRACKER,
    ]
    assert not list((folder / "run").glob(".*"))


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> dict[int, Path]:
    """One run alone, by its number of ranks."""
    folders = {world_size: tmp_path_factory.mktemp("alone") for world_size in TP}
    for world_size, folder in folders.items():
        results = run_ranks(world_size, run, argv(tiny, folder, 2, *TP[world_size]))
        assert all(code == 0 for code, _, _ in results), results
    return folders


@pytest.mark.parametrize("world_size", [1, 1, 1, 2, 2])
def test_of_two_runs_that_start_together_one_runs(tiny, reference, tmp_path, world_size) -> None:
    check_two(tiny, tmp_path, reference[world_size], world_size)


# One after the other


def _killed(rank: int, world_size: int, arguments: list[str]) -> list:
    """kill -9 in the second step."""
    generate, steps = MegatronEngine.generate, iter(range(9))

    def generate_or_die(self: MegatronEngine, *args: object) -> object:
        if next(steps) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, *args)

    MegatronEngine.generate = generate_or_die  # type: ignore[method-assign]
    return [*run(rank, world_size, arguments)]


def test_a_run_that_was_killed_is_followed_by_the_next(tiny, reference, tmp_path) -> None:
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(1, _killed, argv(tiny, tmp_path, 2))
    assert (tmp_path / "save" / ".owner.1.lock").exists() and (tmp_path / "run" / ".owner.1.lock").exists()
    ((code, out, err),) = run_ranks(1, run, argv(tiny, tmp_path, 2))
    assert code == 0 and "after iteration 1" in out, err
    assert_same_run(tmp_path, reference[1])
    assert not list(tmp_path.glob("*/.owner*"))


@pytest.mark.parametrize("name", ["save", "run"])
def test_every_rank_is_refused_in_the_same_words(tiny, tmp_path, name) -> None:
    flag = {"save": "--save", "run": "--run-dir"}[name]
    elsewhere = replace(Owner.this_process(), host="node7", job="")
    (tmp_path / name).mkdir()
    (tmp_path / name / ".owner.1.lock").write_text(dumps(asdict(elsewhere)))
    results = run_ranks(2, run, argv(tiny, tmp_path, 1, *TP[2]))
    for rank, (code, _, err) in enumerate(results):
        start = (
            f"megatron_simct.train: error on rank {rank}: {flag} {tmp_path / name}: another run writes there"
        )
        assert code == 1 and err.startswith(start) and err.count("\n") == 1, err
        assert err.endswith(f"if it has: rm {tmp_path / name / '.owner.1.lock'}\n")
    assert [path.name for path in tmp_path.iterdir()] == [name], "what was made for the run is gone again"


def _own_twice(rank: int, world_size: int, folder: str) -> list[str]:
    with disk.sole_owner({"--save": folder, "--run-dir": f"{folder}/../{Path(folder).name}", "--x": None}):
        names = [path.name for path in Path(folder).iterdir()]
        # the first rank gives up the folder and removes it, but not before the other has looked
        dist.barrier()
    return names


def test_one_folder_for_both_has_one_lock(tmp_path) -> None:
    assert run_ranks(2, _own_twice, str(tmp_path / "both"))[0] == [".owner.1.lock"]
    assert list(tmp_path.iterdir()) == []


# Teachers


def test_a_replica_has_its_files_until_it_is_gone(tmp_path) -> None:
    folder = tmp_path / "teacher"
    first = Endpoint(replica="a", address="tcp://x:1", life="1", host="h", pid=os.getpid())
    publish(folder, first)
    assert folder.stat().st_mode & 0o777 == 0o700
    receiver, sender = fork.Pipe(duplex=False)

    def other() -> None:
        """Another process whose host and number look the same, as in two containers."""
        try:
            publish(folder, replace(first, life="2"))
        except ValueError as error:
            sender.send(str(error))
        publish(folder, replace(first, replica="b", life="3", pid=0))
        sender.send("published")

    process = fork.Process(target=other)
    process.start()
    assert "teacher replica a: another run writes there (process " in receiver.recv()
    assert receiver.recv() == "published"
    process.join()
    assert set(read_endpoints(folder)) == {"a", "b"} and read_endpoints(folder)["a"] == first
    publish(folder, replace(first, replica="c"))
    assert set(read_endpoints(folder)) == {"a", "c"}, "b has ended, and could not say so"
    for replica in ("a", "c"):
        withdraw(folder, replace(first, replica=replica))
    assert list(folder.iterdir()) == []


def main() -> None:
    """python -m tests.parallel.test_two_jobs N: two runs together, N times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("times", type=int, metavar="N")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = root / "files"
        files.mkdir()
        build_files(files)
        ended: Counter[str] = Counter()
        for world_size in TP:
            results = run_ranks(world_size, run, argv(files, root / f"alone{world_size}", 2, *TP[world_size]))
            assert all(code == 0 for code, _, _ in results), results
        for number in range(times):
            world_size = 1 + number % 2
            check_two(files, root / f"two{number}", root / f"alone{world_size}", world_size)
            ended[f"{world_size} rank(s): one ran as if alone, one was refused"] += 1
        print(dict(ended))


if __name__ == "__main__":
    main()
