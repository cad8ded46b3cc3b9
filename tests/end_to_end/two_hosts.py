"""The checks of two_hosts.sh, between the two network namespaces that it makes.

    teacher and student     on a host each: the link is cut for a while and a rank of the teacher killed,
                            whose torchrun starts it again; the student, which only waits, ends as with a
                            teacher of its own
    a student on both       DP2 and PP2, one torchrun a host and the rendezvous on the first, as the launcher
                            starts them; a rank on the second is killed, both start again and resume: the
                            first steps are as on one host

All processes that it starts end with the script's namespaces.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_simct.config.run_file import FRESH_STORE, JobSize
from megatron_simct.launch.commands import torchrun
from megatron_simct.teacher.endpoints import read_endpoints
from tests.distributed import run_ranks
from tests.runs import metrics, run
from tests.tiny import build_files, command_line
from tests.weights import random_weights

ROOT = Path(__file__).parents[2]
ADDRESSES = {"host1": "10.213.7.1", "host2": "10.213.7.2"}
TEACHER, STUDENT = ADDRESSES
LINK = "veth0"
LAYOUTS = {"DP2": (), "PP2": ("--pipeline-model-parallel-size", "2")}
STEPS = 6
LONG = 40
"""Steps of a student that is disturbed: far more than it makes before that, however late it is."""
CUT_S = 15.0
WAIT_S = 300.0


def main() -> None:
    make_hosts()
    folder = Path(tempfile.mkdtemp())
    files = folder / "files"
    files.mkdir()
    build_files(files)
    weights = random_weights(files, folder / "weights")
    gap = teacher_elsewhere(folder / "teacher-elsewhere", files, weights)
    print(
        f"two_hosts: {LONG} steps of a student (TP2) with a teacher (TP2) on another host, over tcp with "
        f"CURVE; the link was cut for {CUT_S:g} s, and the teacher killed and started again: every metric of "
        f"the first {STEPS} steps is that of a colocated teacher to {gap:.0e}",
        flush=True,
    )
    gaps = {name: student_on_both(folder / name, files, weights, flags) for name, flags in LAYOUTS.items()}
    print(
        "two_hosts: verified: a teacher on another host, its link cut, killed, started again; a student on "
        f"both hosts, killed on one of them after 3 of {LONG} steps, started again by torchrun, resumed: "
        f"every metric of the first {STEPS} steps is that of an undisturbed run on one host "
        f"({', '.join(f'{name} to {gap:.0e}' for name, gap in gaps.items())})"
    )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def make_hosts() -> None:
    """Two namespaces with one link between them."""
    for name in ADDRESSES:
        ip("netns", "add", name)
    ip("link", "add", "name", LINK, "netns", TEACHER, "type", "veth", "peer", "name", LINK, "netns", STUDENT)
    for name, address in ADDRESSES.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
        for device in (LINK, "lo"):
            ip("-n", name, "link", "set", device, "up")


def teacher_elsewhere(folder: Path, files: Path, weights: tuple[str, ...]) -> float:
    """The largest difference of a metric from those with a colocated teacher."""
    size = JobSize(processes_per_node=2, max_restarts=1)
    layout = ("--tensor-model-parallel-size", "2")
    teacher = start(
        folder / "teacher.log",
        TEACHER,
        size,
        "megatron_simct.serve_teacher",
        *("--teacher-hf-checkpoint", str(files / "teacher"), *weights[2:], *layout, "--run-dir", str(folder)),
        *("--teacher-tokenizer-model", str(files / "teacher.tiktoken"), "--teacher-hidden-dtype", "fp32"),
        *("--teacher-make-vocab-size-divisible-by", "4", "--bind", f"tcp://{ADDRESSES[TEACHER]}"),
    )
    wait(folder, "the teacher's endpoint", lambda: bool(read_endpoints(folder / "teacher")), teacher)
    (first,) = read_endpoints(folder / "teacher").values()
    flags = [*command_line(files, *weights, *layout, "--train-iters", str(LONG))]
    remote = ("--teacher-endpoint", str(folder), "--run-dir", str(folder / "remote" / "run"))
    student = start(folder / "student.log", STUDENT, size, "megatron_simct.train", *flags, *remote)
    wait(folder, "the second step", lambda: num_steps(folder / "remote") >= 2, teacher, student)
    ip("-n", STUDENT, "link", "set", LINK, "down")
    stand_still(folder)
    os.kill(first.pid, signal.SIGKILL)
    ip("-n", STUDENT, "link", "set", LINK, "up")
    wait(folder, "the student's end", lambda: student.poll() == 0, teacher, student)
    (second,) = read_endpoints(folder / "teacher").values()
    if second.life == first.life:
        fail(folder, "the teacher was not started again")
    os.kill(second.pid, signal.SIGTERM)
    wait(folder, "the teacher's end", lambda: teacher.poll() == 0, teacher)
    return compare(folder / "remote", one_host(folder / "alone", flags), tolerance=1e-4)


def stand_still(folder: Path) -> None:
    """Wait until the student has made no step for CUT_S seconds. It may finish steps whose answers it has."""
    known, since = num_steps(folder / "remote"), time.monotonic()
    while time.monotonic() < since + CUT_S:
        if (steps := num_steps(folder / "remote")) != known:
            known, since = steps, time.monotonic()
        if known == LONG:
            fail(folder, "the student went on without a link")
        time.sleep(0.1)


def student_on_both(folder: Path, files: Path, weights: tuple[str, ...], layout: tuple[str, ...]) -> float:
    """The largest difference of a metric from that of an undisturbed run on one host."""
    size = JobSize(nodes=2, max_restarts=1)
    flags = command_line(files, *weights, *layout, "--train-iters", str(LONG))
    both = folder / "both"
    resumed = ("--save", str(both / "save"), "--load", str(both / "save"), "--save-interval", "2")
    command = ("megatron_simct.train", *flags, *resumed, "--run-dir", str(both / "run"))
    jobs = [start(folder / f"{host}.log", host, size, *command, rendezvous=TEACHER) for host in ADDRESSES]
    wait(folder, "the third step", lambda: num_steps(both) >= 3, *jobs)
    (rank,) = psutil.Process(jobs[1].pid).children()
    rank.kill()
    wait(folder, "the last step", lambda: all(job.poll() == 0 for job in jobs), *jobs)
    if not re.search(r"resuming .* after iteration \d", (folder / "host1.log").read_text()):
        fail(folder, "the run was not resumed")
    return compare(both, one_host(folder / "alone", flags), tolerance=1e-5)


def start(
    log: Path, host: str, size: JobSize, *command: str, rendezvous: str | None = None
) -> subprocess.Popen[bytes]:
    """Start torchrun on a host in the same way as the launcher's script for Slurm."""
    log.parent.mkdir(exist_ok=True)
    meeting = [f"--rdzv-endpoint={ADDRESSES[rendezvous or host]}:29500"]
    meeting += [f"--rdzv-conf=is_host={int(rendezvous in (None, host))}"]
    # Names do not resolve to a namespace.
    meeting += [f"--local-addr={ADDRESSES[host]}"]
    variables = FRESH_STORE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
    place = ["ip", "netns", "exec", host, sys.executable]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*place, *torchrun(size), *meeting, "-m", *command],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def one_host(folder: Path, flags: list[str]) -> Path:
    """The same flags on two ranks of one host, with the teacher's model on them."""
    for code, _, err in run_ranks(2, run, [*flags, "--run-dir", str(folder / "run")]):
        if code:
            fail(folder, f"the run on one host:\n{err}")
    return folder


def compare(found: Path, expected: Path, *, tolerance: float) -> float:
    """The largest difference of a metric of the first steps, relative to its value or to 0.1."""
    largest = 0.0
    pairs = list(zip(metrics(found), metrics(expected), strict=True))
    for ours, wanted in pairs[:STEPS]:  # the mean over many steps, until a rounding has changed a sample
        assert ours.keys() == wanted.keys()
        for name in ours.keys() - {"kind"}:
            largest = max(largest, abs(ours[name] - wanted[name]) / max(abs(wanted[name]), 0.1))
            if not math.isclose(ours[name], wanted[name], rel_tol=tolerance, abs_tol=0.1 * tolerance):
                fail(found, f"{name} is {ours[name]}, on one host {wanted[name]}")
    return largest


def num_steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait(folder: Path, what: str, arrived: Callable[[], bool], *jobs: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not arrived():
        if any(job.poll() for job in jobs):
            fail(folder, f"a job ended before {what}")
        if time.monotonic() > deadline:
            fail(folder, f"{what} did not come within {WAIT_S:.0f} s")
        time.sleep(0.1)


def fail(folder: Path, what: str) -> NoReturn:
    logs = [f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("*.log"))]
    raise SystemExit("\n".join([*logs, f"two_hosts: FAILED: {what}"]))


if __name__ == "__main__":
    main()
