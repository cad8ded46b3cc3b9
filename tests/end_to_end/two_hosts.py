"""What two_hosts.sh runs: training across a link that is cut for a while ends as training without one."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_simct.teacher.endpoints import read_endpoints
from tests.runs import metrics
from tests.tiny import build_files, command_line
from tests.weights import random_weights

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = f"simct-t{os.getpid()}", f"simct-s{os.getpid()}"
ADDRESSES = {TEACHER: "10.213.7.1", STUDENT: "10.213.7.2"}
LINK = "veth0"
TP2 = ("--tensor-model-parallel-size", "2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def two_namespaces() -> Iterator[None]:
    """Two hosts with one link between them."""
    made = []
    try:
        for name in ADDRESSES:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "name", LINK, "netns", TEACHER, "type", "veth", "peer", "name", LINK, "netns", STUDENT)
        for name, address in ADDRESSES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in (LINK, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in made:
            ip("netns", "del", name)


def torchrun(host: str | None, module: str, *flags: str) -> subprocess.Popen:
    """Two ranks on a host."""
    place = ["ip", "netns", "exec", host] if host else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    return subprocess.Popen(
        [*place, *command, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def ended(job: subprocess.Popen) -> Iterator[None]:
    """Whatever happens, the job does not stay."""
    try:
        yield
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)


def wait(condition: Callable[[], bool], what: str, *jobs: subprocess.Popen, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        for job in jobs:
            if job.poll():
                raise SystemExit(f"two_hosts: FAILED: a job ended before {what}:\n{job.communicate()[0]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"two_hosts: FAILED: {what} did not come within {timeout_s:.0f} s")
        time.sleep(0.1)


def num_steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cut-s", type=float, default=15.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), steps=args.steps, cut_s=args.cut_s)
    print(
        f"two_hosts: verified: {args.steps} steps of a student (TP2) against a teacher (TP2) in another network "
        f"namespace, over tcp with CURVE; the link was cut for {args.cut_s:g} s, which only delayed them: every metric "
        "is that of a colocated run to 1e-4"
    )


def run(folder: Path, *, steps: int, cut_s: float) -> None:
    files = folder / "files"
    files.mkdir()
    build_files(files)
    weights = random_weights(files, folder / "weights")
    student = [*command_line(files, *weights, *TP2, "--train-iters", str(steps)), "--run-dir"]
    alone = torchrun(None, "megatron_simct.train", *student, str(folder / "alone" / "run"))
    with two_namespaces(), ended(alone):
        teacher = torchrun(
            TEACHER,
            "megatron_simct.serve_teacher",
            *("--teacher-hf-checkpoint", str(files / "teacher"), *weights[2:], *TP2, "--run-dir", str(folder)),
            *("--teacher-tokenizer-model", str(files / "teacher.tiktoken"), "--teacher-hidden-dtype", "fp32"),
            *("--teacher-make-vocab-size-divisible-by", "4", "--bind", f"tcp://{ADDRESSES[TEACHER]}"),
        )
        with ended(teacher), contextlib.ExitStack() as stack:
            wait(lambda: bool(read_endpoints(folder / "teacher")), "the teacher's door", teacher)
            remote = folder / "remote"
            trained = torchrun(
                STUDENT,
                "megatron_simct.train",
                *(*student, str(remote / "run"), "--teacher-endpoint", str(folder)),
            )
            stack.enter_context(ended(trained))
            wait(lambda: num_steps(remote) >= 2, "the second step", teacher, trained)
            ip("-n", STUDENT, "link", "set", LINK, "down")
            time.sleep(1.0)  # a step may have had all its answers
            before = num_steps(remote)
            time.sleep(cut_s)
            if num_steps(remote) > before + 1 or num_steps(remote) == steps:
                raise SystemExit("two_hosts: FAILED: the student went on without a link")
            ip("-n", STUDENT, "link", "set", LINK, "up")
            wait(lambda: trained.poll() is not None, "the last step", teacher)
            if trained.returncode:
                raise SystemExit(f"two_hosts: FAILED: the student's job:\n{trained.communicate()[0]}")
            (endpoint,) = read_endpoints(folder / "teacher").values()
            os.kill(endpoint.pid, signal.SIGTERM)
            wait(lambda: teacher.poll() is not None, "the teacher's end")
            if teacher.returncode:
                raise SystemExit(f"two_hosts: FAILED: the teacher's job:\n{teacher.communicate()[0]}")
        if alone.wait(240):
            raise SystemExit(f"two_hosts: FAILED: the colocated run:\n{alone.communicate()[0]}")
    ours, wanted = metrics(folder / "remote"), metrics(folder / "alone")
    assert len(ours) == len(wanted) == steps
    for found, expected in zip(ours, wanted, strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - {"kind"}:
            if not math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5):
                raise SystemExit(f"two_hosts: FAILED: {name} is {found[name]}, {expected[name]} without a link")


if __name__ == "__main__":
    main()
