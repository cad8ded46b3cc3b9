"""Starts a run on this machine, or queues it with Slurm.

    python -m megatron_simct.launch run.yaml                            start it, or queue it
    python -m megatron_simct.launch run.yaml --dry-run                  print exactly what would run
    python -m megatron_simct.launch run.yaml student.lr=2e-6 cluster.teacher.nodes=2
    python -m megatron_simct.launch status run.yaml                     show its Slurm job; `cancel` ends it
    python -m megatron_simct.launch logs run.yaml --follow              show the output of all its Slurm jobs

The smallest run file; without the section `teacher` both models share the student's processes, and
teacher_hf_checkpoint belongs under student:

    run_dir: runs/first
    student: {hf_checkpoint: STUDENT_DIR, prompt_data: prompts.jsonl}  # flags of megatron_simct.train
    teacher: {teacher_hf_checkpoint: TEACHER_DIR}  # flags of megatron_simct.serve_teacher

For a second teacher, or an inference engine in its own environment, the file has a list `jobs` instead of the
sections student and teacher; megatron_simct/config/run_file.py describes it. With that list,
jobs.teacher.nodes=2 and jobs.student.options.lr=2e-6 override values.

If the pre-flight fails, the run is not started (tools/check_pair.py shows all checks). Set secrets such as
WANDB_API_KEY in the environment of this command; all jobs inherit it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_simct.config.command_line import Parser, command
from megatron_simct.config.run_file import RunFile, read_run_file
from megatron_simct.launch import local, slurm

_COMMANDS = ("status", "logs", "cancel")


@command("megatron_simct.launch")
def main(argv: Sequence[str] | None = None) -> int:
    """The student's exit code for a local run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    action = arguments.pop(0) if arguments[:1] and arguments[0] in _COMMANDS else "start"
    options = _parser(action).parse_intermixed_args(arguments)
    run = read_run_file(options.run_file, options.overrides)
    if action == "start":
        return _start(run, dry_run=options.dry_run)
    if run.cluster.kind != "slurm":
        raise ValueError(f"{run.path}: cluster.kind is local: {action} is only available for Slurm runs")
    return {"status": _status, "logs": _logs, "cancel": _cancel}[action](run, options)


def _parser(action: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m megatron_simct.launch" + ("" if action == "start" else f" {action}"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_file",
        metavar="RUN.yaml",
        help="YAML file of the run; megatron_simct/config/run_file.py describes it",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="values that replace those of the file",
    )
    if action == "start":
        parser.add_argument(
            "--dry-run", action="store_true", help="print what would run, without starting it"
        )
    if action == "logs":
        parser.add_argument("--follow", action="store_true", help="follow the log until Ctrl-C")
    return parser


def _start(run: RunFile, *, dry_run: bool) -> int:
    from megatron_simct.preflight.check import check_run
    from megatron_simct.preflight.table import console, show

    report = check_run(run)
    show(report, console(stderr=True), only_problems=True)
    if dry_run:
        print(
            local.dry_run(run)
            if run.cluster.kind == "local"
            else slurm.job_script(run, directory=os.getcwd()),
            end="",
        )
        return int(report.failed)
    if report.failed:
        raise ValueError(
            f"{run.path}: the pre-flight failed, so nothing was started; tools/check_pair.py shows all checks"
        )
    if run.cluster.kind == "local":
        return local.start(run)
    number = slurm.submit(run, directory=os.getcwd())
    print(f"job {number} of {slurm.script_path(run)}; status, logs and cancel take the same run file")
    return 0


def _status(run: RunFile, options: argparse.Namespace) -> int:
    found = slurm.status(run)
    if not found["components"]:
        print(f"job {found['job_id']}: no longer queued")
    for row in found["components"]:
        print(f"job {row['id']} ({row['name']}): {row['state']} for {row['time']}, {row['where']}")
    step = found["step"]
    if step is not None:
        print(f"iteration {step['iteration']} of {run.config.training.train_iters}, loss {step['loss']:.6f}")
    return 0


def _cancel(run: RunFile, options: argparse.Namespace) -> int:
    print(f"job {slurm.cancel(run)} cancelled")
    return 0


def _logs(run: RunFile, options: argparse.Namespace) -> int:
    """Every line with its file's name before it."""
    read: dict[Path, int] = {}
    while True:
        for path in slurm.log_files(run):
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                text = file.read()
            whole = len(text) if not options.follow else text.rfind(b"\n") + 1
            read[path] = read.get(path, 0) + whole
            for line in text[:whole].decode(errors="replace").splitlines():
                print(f"[{path.stem}] {line}")
        sys.stdout.flush()
        if not options.follow:
            return 0
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
