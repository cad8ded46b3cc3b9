"""One run at a time writes to a folder. A lock is taken over only if its owner is provably gone."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_simct import ownership
from megatron_simct.ownership import Lock, Owner, forget, is_gone, owner_of, take

fork = multiprocessing.get_context("fork")


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """Run function(*args) in another process, which ends. Returns its result, or the
    text of its ValueError.
    """
    receiver, sender = fork.Pipe(duplex=False)

    def work() -> None:
        try:
            sender.send(function(*args))
        except ValueError as error:
            sender.send(str(error))

    process = fork.Process(target=work)
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def take_here(folder: Path) -> str:
    """Take the lock and end without releasing it, like a process that is killed."""
    take(folder, what="--save x")
    return "taken"


def write_lock(folder: Path, owner: Owner) -> None:
    folder.mkdir(exist_ok=True)
    (folder / ".owner.1.lock").write_text(json.dumps(asdict(owner)))


def test_a_folder_has_one_owner_until_it_is_let_go(tmp_path) -> None:
    folder = tmp_path / "new" / "save"
    lock = take(folder, what="--save x")
    message = elsewhere(take_here, folder)
    assert message.startswith("--save x: another run writes there (process ") and message.count("\n") == 0
    assert f"process {os.getpid()} on {lock.owner.host}, since " in message and "end it first" in message
    assert [path.name for path in folder.iterdir()] == [".owner.1.lock"]
    lock.release()
    assert list(folder.iterdir()) == []
    assert elsewhere(take_here, folder) == "taken"


def test_a_name_has_its_own_owner(tmp_path) -> None:
    take(tmp_path, name="a", what="a")
    assert elsewhere(lambda: take(tmp_path, name="b", what="b").path.name) == ".b.1.lock"
    assert owner_of(tmp_path, name="a").pid == os.getpid() and owner_of(tmp_path) is None
    forget(tmp_path, name="a")
    forget(tmp_path, name="b")  # its process has ended
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, reaped) -> None:
    receiver, sender = fork.Pipe(duplex=False)

    def hold() -> None:
        take(tmp_path, what="--save x")
        sender.send("taken")
        signal.pause()

    process = fork.Process(target=hold)
    process.start()
    assert receiver.recv() == "taken"
    assert "another run writes there" in elsewhere(take_here, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    # it is dead, and still in the process table
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        process.join()
    lock = take(tmp_path, what="--save x")
    assert lock.path.name == ".owner.2.lock" and [path.name for path in tmp_path.iterdir()] == [
        ".owner.2.lock"
    ]
    process.join()


def test_a_number_that_another_process_has_got_is_no_owner(tmp_path) -> None:
    me = Owner.this_process()
    write_lock(tmp_path, replace(me, pid=os.getppid(), start="1"))  # it runs, but started at another time
    assert take(tmp_path, what="").owner.pid == os.getpid()


@dataclass(frozen=True, kw_only=True)
class Case:
    """Properties of another process, and of this one."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    gone: bool


SLURM = {"host": "node7", "job": "41", "cluster": "c"}
CASES = {
    "another host": Case(theirs={"host": "node7"}, ours={}, gone=False),
    "another host of the same name": Case(theirs={"machine": "m"}, ours={}, gone=False),
    "before a reboot": Case(theirs={"boot": "b"}, ours={}, gone=True),
    "another container": Case(theirs={"pids": "pid:[1]", "pid": 2**22 - 1}, ours={}, gone=False),
    "no such process": Case(theirs={"pid": 2**22 + 1}, ours={}, gone=True),
    "this process": Case(theirs={}, ours={}, gone=False),
    "the job, queued again": Case(theirs=SLURM, ours=SLURM | {"host": "node8", "requeues": 1}, gone=True),
    "another step of the job": Case(theirs=SLURM, ours=SLURM | {"host": "node8"}, gone=False),
    "that job of another cluster": Case(
        theirs=SLURM, ours=SLURM | {"cluster": "d", "host": "node8", "requeues": 1}, gone=False
    ),
    "a job that Slurm does not know": Case(theirs=SLURM, ours={"job": "55", "cluster": "c"}, gone=True),
    "a job that has ended": Case(theirs=SLURM | {"job": "42"}, ours={"cluster": "c"}, gone=True),
    "a job that runs": Case(theirs=SLURM | {"job": "43"}, ours={"job": "55", "cluster": "c"}, gone=False),
    "Slurm does not answer": Case(theirs=SLURM | {"job": "44"}, ours={"cluster": "c"}, gone=False),
    "a job of another cluster": Case(theirs=SLURM, ours={"job": "55", "cluster": "d"}, gone=False),
    "no number of a job": Case(theirs=SLURM | {"job": "41; true"}, ours={"cluster": "c"}, gone=False),
}

SQUEUE = """#!/bin/sh
case "$2" in
--jobs=41) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
--jobs=42) exit 0 ;;
--jobs=43) echo COMPLETING ;;
*) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_only_a_proof_says_that_an_owner_is_gone(tmp_path, monkeypatch, case) -> None:
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    me = Owner.this_process({})
    assert is_gone(replace(me, **case.theirs), replace(me, **case.ours)) == case.gone


def test_without_squeue_a_job_may_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    me = Owner.this_process({})
    assert not is_gone(replace(me, **SLURM), replace(me, job="55", cluster="c"))


def test_slurm_names_the_job(tmp_path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "2"}
    owner = Owner.this_process(env)
    assert (owner.job, owner.cluster, owner.requeues) == ("7", "c", 2) and "Slurm job 7" in str(owner)


def test_where_nothing_is_proved_the_line_that_removes_the_lock_works(tmp_path) -> None:
    folder = tmp_path / "it's here"
    write_lock(folder, replace(Owner.this_process(), host="node7"))
    with pytest.raises(
        ValueError, match="on node7, since .* and this host cannot check whether it has ended; if it has: rm "
    ) as e:
        take(folder, what="--save x")
    subprocess.run(["sh", "-c", str(e.value).partition("if it has: ")[2]], check=True)
    take(folder, what="--save x").release()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"pid": 1}', "[" * 5000])
def test_a_lock_that_cannot_be_read_is_nobodys_to_take(tmp_path, text) -> None:
    (tmp_path / ".owner.3.lock").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read; if no run writes there: rm \S+/\.owner\.3\.lock"):
        take(tmp_path, what="--save x")


def test_wrong_types_are_no_owner(tmp_path) -> None:
    write_lock(tmp_path, replace(Owner.this_process(), pid="1"))  # type: ignore[arg-type]
    assert owner_of(tmp_path) is None


def test_a_lock_that_is_not_ones_own_stays(tmp_path) -> None:
    lock = take(tmp_path, what="")
    other = Owner.this_process()
    write_lock(tmp_path, other)
    lock.release()
    assert owner_of(tmp_path) == other


# Several at once


def _contend(folder: Path, start: Any, tried: Any, won: Any) -> None:
    start.wait()
    lock: Lock | None = None
    try:
        lock = take(folder, what="--save x")
        with won.get_lock():
            won.value += 1
    except ValueError:
        pass
    tried.wait()  # the owner keeps it until all have tried
    if lock is not None:
        lock.release()


@pytest.mark.parametrize("left", ["nothing", "a lock of the dead", "two of them"])
def test_of_many_that_start_together_at_most_one_goes_on(tmp_path, left) -> None:
    dead = replace(Owner.this_process(), pid=2**22 + 1)
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for number in range(1, 1 + {"nothing": 0, "a lock of the dead": 1, "two of them": 2}[left]):
            (folder / f".owner.{number}.lock").write_text(json.dumps(asdict(dead)))
        start, tried, won = fork.Barrier(5), fork.Barrier(5), fork.Value("i", 0)
        processes = [fork.Process(target=_contend, args=(folder, start, tried, won)) for _ in range(5)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert won.value == 1 and list(folder.iterdir()) == []


def test_one_who_comes_at_the_same_moment_is_seen(tmp_path, monkeypatch) -> None:
    """This process finds a dead process's lock. Before it has made the next one, others have taken and
    released it several times.
    """
    dead = replace(Owner.this_process(), pid=2**22 + 1)
    write_lock(tmp_path, dead)
    newcomer = replace(Owner.this_process(), host="node7")
    link = os.link

    def late(source: str, target: str) -> None:
        write_lock(tmp_path, newcomer)
        link(source, target)

    monkeypatch.setattr(ownership.os, "link", late)
    with pytest.raises(ValueError, match="on node7"):
        take(tmp_path, what="--save x")
    assert owner_of(tmp_path) == newcomer and [path.name for path in tmp_path.iterdir()] == [".owner.1.lock"]


# File systems


def test_a_file_system_without_links(tmp_path, monkeypatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(ownership.os, "link", refuse)
    lock = take(tmp_path, what="--save x")
    assert "another run writes there" in elsewhere(take_here, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".owner.1.lock"]
    lock.release()


def test_an_answer_that_got_lost_is_no_failure(tmp_path, monkeypatch) -> None:
    link = os.link

    def lost(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")  # NFS repeats the request, and the link exists

    monkeypatch.setattr(ownership.os, "link", lost)
    assert take(tmp_path, what="").path.exists()


def test_a_disk_that_refuses_says_so(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "file" / "save", what="--save x")
