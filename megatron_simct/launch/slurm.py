"""One heterogeneous Slurm job: component 0 is the student, the others are teachers and engines
in the file's order.

The script is written into run_dir/job.sh, readable and runnable by hand. Every value that comes from the run
file goes through shlex.quote on its way into it (`_environment` does so to whatever the template writes), and
what an #SBATCH line holds has been checked to need none.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2

from megatron_simct.config.options import flag_of
from megatron_simct.config.run_file import Job, RunFile
from megatron_simct.files import write_private
from megatron_simct.launch.commands import command_of, torchrun

_TRACKER = "latest_checkpointed_iteration.txt"
_TIMEOUT_S = 60.0
"""For an answer of Slurm's commands."""


def job_script(run: RunFile, *, directory: str) -> str:
    """The text of the job script. `directory`: where the job's processes start."""
    duration = run.config.output.exit_duration_in_mins
    return (
        _environment()
        .get_template("slurm_job.sh.jinja")
        .render(
            script=script_path(run),
            run_dir=run.run_dir,
            directory=directory,
            cluster=run.cluster,
            jobs=[_step(run, job) for job in run.jobs],
            env=run.env,
            tracker=f"{run.config.output.save}/{_TRACKER}",
            train_iters=run.config.training.train_iters,
            may_end_early=run.config.evaluation.exit_eval_accuracy is not None,
            duration_s=1 << 40 if duration is None else int(60 * duration),
        )
    )


def _step(run: RunFile, job: Job) -> dict[str, Any]:
    """What the template writes of one job."""
    task, prefix = _task(run, job)
    engine = run.engine_of(job)
    key = "rollout_engine_endpoint" if job.kind == "student" else "engine_endpoint"
    words = command_of(job, without=(key,) if engine is not None else ())
    return {
        "name": job.name,
        "kind": job.kind,
        "size": job,
        "component": run.jobs.index(job),
        "python": run.python_of(job),
        "command": words if job.kind == "engine" else [*torchrun(job)[2:], *words],
        "binds": job.kind == "teacher" and "bind" not in job.options,
        "engine": (
            None
            if engine is None
            else {"component": run.jobs.index(engine), "port": engine.port, "flag": flag_of(key)}
        ),
        "task": task,
        "prefix": prefix,
        "starts": 1 + job.max_restarts,
    }


def script_path(run: RunFile) -> str:
    """Where the job script is written."""
    return f"{run.run_dir}/job.sh"


def submit(run: RunFile, *, directory: str) -> str:
    """Write the job script and submit it; the job's number. ValueError with what sbatch says."""
    folder = Path(run.run_dir)
    for private in (folder, folder / "logs"):
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
    earlier = job_id(run)
    active = [] if earlier is None else _squeue(earlier)
    if active:
        raise ValueError(f"job {earlier} of {run.run_dir} is still {active[0]['state']}; cancel it first")
    write_private(folder / "job.sh", job_script(run, directory=directory), mode=0o700)
    number = _call("sbatch", "--parsable", script_path(run)).strip().split(";")[0]
    if not _is_number(number):
        raise ValueError(f"sbatch printed {number[:80]!r}, not a job number; look for the job with squeue")
    write_private(folder / "job.json", json.dumps({"job_id": number}) + "\n")
    return number


def job_id(run: RunFile) -> str | None:
    """The number of the run's job; None where none was submitted."""
    try:
        number = json.loads((Path(run.run_dir) / "job.json").read_text())["job_id"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        number = None
    if not isinstance(number, str) or not _is_number(number):  # it becomes an argument of scancel
        raise ValueError(f"{run.run_dir}/job.json is damaged; look for the job with squeue")
    return number


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def status(run: RunFile) -> dict[str, Any]:
    """The job's components in the queue with the names of their jobs, and the last line of
    the student's metrics.
    """
    number = _submitted(run)
    metrics = Path(run.config.output.run_dir or run.run_dir) / "metrics.jsonl"
    last = None
    if metrics.exists():
        lines = metrics.read_text().splitlines()
        for line in lines[-20:]:
            with contextlib.suppress(json.JSONDecodeError):  # of a line that is being written
                row = json.loads(line)
                last = row if row["kind"] == "step" else last
    components = [row | {"name": _name_of(run, row["id"])} for row in _squeue(number)]
    return {"job_id": number, "components": components, "step": last}


def _name_of(run: RunFile, component: str) -> str:
    """The job of a component: squeue writes NUMBER+COMPONENT, or the number alone where there is one."""
    _, _, number = component.partition("+")
    place = int(number) if _is_number(number) else 0
    return run.jobs[place].name if place < len(run.jobs) else "?"


def cancel(run: RunFile) -> str:
    """Cancel the job with all its components; its number."""
    number = _submitted(run)
    _call("scancel", number)
    return number


def log_files(run: RunFile) -> list[Path]:
    """What the job and the tasks of all components have written."""
    return sorted((Path(run.run_dir) / "logs").glob("*.log"))


def _submitted(run: RunFile) -> str:
    number = job_id(run)
    if number is None:
        raise ValueError(f"run_dir {run.run_dir}: no job was submitted from it")
    return number


def _squeue(number: str) -> list[dict[str, str]]:
    """One row a component that is queued or runs; none where the job has ended."""
    try:
        rows = _call("squeue", "--noheader", f"--jobs={number}", "--format=%i|%T|%M|%R").splitlines()
    except ValueError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    names = ("id", "state", "time", "where")
    return [dict(zip(names, row.split("|", 3), strict=True)) for row in rows]


def _call(*command: str) -> str:
    """What a command of Slurm prints. ValueError with its complaint."""
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"cluster.kind slurm: {command[0]} is not on this machine; --dry-run shows the job script"
        )
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            umask=0o077,  # sbatch opens the job's log with the one that it finds
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} did not answer within {_TIMEOUT_S:.0f} s; is slurmctld up?") from None
    if result.returncode:
        complaint = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ValueError(f"{shlex.join(command)}: {complaint}")
    return result.stdout


def _task(run: RunFile, job: Job) -> tuple[list[str], list[str]]:
    """Options of srun for one task a node, and what stands before the command in each task."""
    task = ["--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1", "--open-mode=append"]
    own = ["env", *(f"{name}={value}" for name, value in job.env.items())] if job.env else []
    container = run.container_of(job)
    if container is None:
        return task, own
    if container.runtime == "pyxis":
        task.append(f"--container-image={container.image}")
        if container.mounts:
            task.append(f"--container-mounts={','.join(container.mounts)}")
        if run.env:
            task.append(f"--container-env={','.join(run.env)}")  # before what the image says of them
        return task, own
    gpus, binds = ["--nv"] * bool(job.gpus_per_node), [f"--bind={mount}" for mount in container.mounts]
    return task, ["apptainer", "exec", *gpus, *binds, container.image, *own]


def _environment() -> jinja2.Environment:
    """Templates of this folder, in which every value that is written is quoted for a shell."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=lambda value: shlex.quote(str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
