"""The checks of slurm.sh, on the Slurm that it has set up.

The quick-start pair, from checkpoints of a few steps, through `python -m megatron_simct.launch`:

    one job           pre-empted by a job of higher priority, queued again, resumed: the same metrics as an
                      undisturbed run
    heterogeneous     the teacher on one node, the student on the other; stopped, queued again, resumed to the
                      end
    cancelled         no process of either component is left
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 100
TOKEN = "hf_" + "9fQ2" * 8
"""A secret in the environment from which jobs are launched; they inherit it."""
WAIT_S = 600.0


def main() -> None:
    folder = Path(sys.argv[1])
    nodes = call("sinfo", "--noheader", "--format=%D %T").strip()
    pair = quick_start(folder / "quickstart")
    os.environ["HF_TOKEN"] = TOKEN
    print(f"slurm: nodes {nodes}; the quick start's pair is in {folder / 'quickstart'}", flush=True)

    alone = one_job(folder, pair)
    together = heterogeneous(folder, pair)
    cancelled(folder, pair)
    print(
        f"verified: a Slurm job pre-empted after {alone} of {ITERATIONS} steps, queued again, resumed "
        "bit-identically; a heterogeneous job, teacher and student on a node each, stopped by its signal "
        f"after {together} steps, queued again, finished; a cancelled one leaves no process; no secret in a "
        "log, a command line or a file that others can read",
        flush=True,
    )


def quick_start(folder: Path) -> dict[str, Any]:
    """Sections student and teacher of the quick start's pair, after a few steps of each."""
    command = [
        sys.executable,
        "examples/quickstart/run.py",
        "--smoke",
        "--processes",
        "1",
        "--run-dir",
        str(folder),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=600, stdout=subprocess.DEVNULL)
    run = yaml.safe_load((folder / "distil-paper" / "config.yaml").read_text())
    kept = ("hf_checkpoint", "tokenizer_model", "pretrained_checkpoint")
    student = {key: run[key] for key in (*kept, "prompt_data", "rollout_max_response_len", "min_lr")}
    student |= {"rollout_batch_size": 16, "micro_batch_size": 16, "rollout_max_prompt_len": 64}
    student |= {"train_iters": ITERATIONS, "lr": 3e-4}
    return {"student": student, "teacher": {f"teacher_{key}": run[f"teacher_{key}"] for key in kept}}


def write_run(folder: Path, name: str, pair: dict[str, Any], *, kind: str, with_teacher: bool) -> Path:
    """Write a run file. Without a teacher job the teacher is on the student's ranks."""
    size = {"cpus_per_node": 1}
    run: dict[str, Any] = {
        "run_dir": str(folder / name),
        "student": pair["student"] | ({} if with_teacher else pair["teacher"]),
        "cluster": {"kind": kind, "student": size, "teacher": size, "grace_s": 120, "time": "00:30:00"},
        "env": {"OMP_NUM_THREADS": 1},
    }
    if kind == "slurm":
        run["cluster"]["partition"] = "low"
    if with_teacher:
        run["teacher"] = pair["teacher"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def one_job(folder: Path, pair: dict[str, Any]) -> int:
    """A pre-empted and resumed run against an undisturbed one; returns the step of the pre-emption."""
    launch(write_run(folder, "undisturbed", pair, kind="local", with_teacher=False))
    path = write_run(folder, "preempted", pair, kind="slurm", with_teacher=False)
    launch(path)
    urgent = ["--partition=high", "--nodelist=node1", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
    tell_to_stop(folder / "preempted", "sbatch", *urgent)
    wait("the job to be queued again", lambda: "queued again" in log(folder / "preempted"))
    stopped = int((folder / "preempted" / "checkpoint" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped < ITERATIONS, stopped
    wait("the end", lambda: not call("squeue", "--noheader"))
    for found, wanted in zip(metrics(folder / "preempted"), metrics(folder / "undisturbed"), strict=True):
        assert found == wanted, (found, wanted)
    assert_private(folder / "preempted")
    print(f"slurm: pre-empted after step {stopped}, resumed, equal to the undisturbed run", flush=True)
    return stopped


def heterogeneous(folder: Path, pair: dict[str, Any]) -> int:
    """Both components, stopped and resumed; returns the step of the stop."""
    path = write_run(folder, "both", pair, kind="slurm", with_teacher=True)
    launch(path)
    wait("the first step", lambda: steps(folder / "both") >= 1)
    rows = launch("status", path).splitlines()
    assert [row.split()[-1] for row in rows[:2]] == ["node1", "node2"], rows
    assert rows[-1].startswith("iteration ") and "loss" in rows[-1], rows
    number = json.loads((folder / "both" / "job.json").read_text())["job_id"]
    secrets = {secret for file in (folder / "both").rglob("*_key.json") for secret in keys_of(file)}
    assert len(secrets) == 2
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if any(secret in command for secret in {TOKEN, *secrets})]
    # The signal that Slurm sends to the job's script when grace_s seconds of its time are left.
    tell_to_stop(folder / "both", "scancel", "--batch", "--signal=USR1", number)
    wait("the job to be queued again", lambda: "queued again" in log(folder / "both"))
    stopped = int((folder / "both" / "checkpoint" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped < ITERATIONS, stopped
    wait("the end", lambda: not call("squeue", "--noheader"))
    rows = [row for row in metrics(folder / "both") if row["kind"] == "step"]
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    reference = [row for row in metrics(folder / "undisturbed") if row["kind"] == "step"]
    gaps = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, reference, strict=True)]
    # The teacher's answers are rounded to bfloat16; responses are equal until a rounding changes a sample.
    assert gaps[0] < 5e-3, gaps[0]
    shown = launch("logs", path)
    assert "[teacher-0]  teacher replica 0 of 1 at tcp://" in shown and "[student-0]  iteration " in shown
    assert "0 handed_back, 0 malformed, 0 refused, 0 failed_handshakes" in shown, shown
    assert_private(folder / "both")
    print(f"slurm: both components, stopped after step {stopped}, resumed to the end", flush=True)
    return stopped


def cancelled(folder: Path, pair: dict[str, Any]) -> None:
    path = write_run(folder, "cancelled", pair, kind="slurm", with_teacher=True)
    launch(path)
    wait("the first step", lambda: steps(folder / "cancelled") >= 1)
    assert len(processes(folder / "cancelled")) >= 2
    launch("cancel", path)
    wait("the queue to be empty", lambda: not call("squeue", "--noheader"))
    wait("the last process to end", lambda: not processes(folder / "cancelled"))
    assert "no longer queued" in launch("status", path)


def tell_to_stop(run: Path, *command: str) -> None:
    """Stop the job after the third step. The student is suspended until the signal has reached it, so that it
    does not finish first.
    """
    wait("the first steps", lambda: steps(run) >= 3)
    students = [process for process in processes(run) if is_student(process)]
    for process in students:
        process.suspend()
    try:
        call(*command)
        wait("its signal", lambda: any(has_reached(process, signal.SIGTERM) for process in students))
    finally:
        for process in students:
            if process.is_running():
                process.resume()


def is_student(process: psutil.Process) -> bool:
    """Whether a process is a rank that trains, and not torchrun, which has the same arguments."""
    arguments = process.cmdline()
    return "megatron_simct.train" in arguments and "torch.distributed.run" not in arguments


def has_reached(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a suspended process was sent the signal. Slurm wakes some of the processes that it signals."""
    if not process.is_running() or process.status() != psutil.STATUS_STOPPED:
        return True
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return any(int(fields[name], 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def launch(*arguments: str | Path) -> str:
    """Run python -m megatron_simct.launch; returns its output."""
    return call(sys.executable, "-m", "megatron_simct.launch", *map(str, arguments))


def call(*command: str) -> str:
    """Run a command; returns its output. Slurm's own commands sometimes fail on a busy machine: squeue and
    sinfo, which change nothing, are repeated.
    """
    deadline = time.monotonic() + (WAIT_S if command[0] in ("squeue", "sinfo") else 0.0)
    while True:
        result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
        if result.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert result.returncode == 0, (
        f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    return result.stdout


def wait(what: str, arrived: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not arrived():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}\n{call('squeue')}"
        time.sleep(0.5)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run without time and memory."""
    rows = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if "second" not in key and "memory" not in key}
        for row in rows
    ]


def steps(run: Path) -> int:
    """Number of lines of metrics so far. If the run has failed, its logs are shown."""
    path = run / "student" / "metrics.jsonl"
    if path.exists():
        return len(path.read_text().splitlines())
    assert call("squeue", "--noheader") or path.exists(), "\n".join(
        p.read_text() for p in run.glob("logs/*.log")
    )
    return 0


def log(run: Path) -> str:
    return (run / "logs" / "job.log").read_text()


def processes(run: Path) -> list[psutil.Process]:
    """Processes whose command line contains the run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if any(argument.startswith("--") and str(run) in argument for argument in arguments):
            found.append(process)
    return found


def assert_private(run: Path) -> None:
    """No other user can enter the run's folder or read its files. Secrets are only in the key files."""
    assert run.stat().st_mode & 0o777 == 0o700
    files = [path for path in run.rglob("*") if path.is_file()]
    secrets = {secret for path in files if path.name.endswith("_key.json") for secret in keys_of(path)}
    for path in run.rglob("*"):
        assert not path.stat().st_mode & 0o077, path
    for path in files:
        text = b"" if path.name.endswith("_key.json") else path.read_bytes()
        assert not [path for secret in {TOKEN, *secrets} if secret.encode() in text], path


def keys_of(file: Path) -> set[str]:
    """The secret keys."""
    return {value for name, value in json.loads(file.read_text()).items() if name.endswith("_secret")}


if __name__ == "__main__":
    main()
