"""Nodes, times, containers and paths of a run: what the scheduler would find out late, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_simct.arguments import options
from megatron_simct.config import Config, TeacherConfig
from megatron_simct.launch.run_file import Container, RunFile
from megatron_simct.preflight.findings import Finding, failed, passed, warned

_OTHER = re.compile(r"tiktoken:|tcp://")
"""What stands in the place of a path and is none."""
_OF_A_NODE = ("/tmp", "/dev/shm", "/var/tmp")
"""Folders that every node has for itself."""


def check_cluster(run: RunFile) -> list[Finding]:
    """Everything about where the jobs run, the models' layouts apart."""
    findings = [*_sizes(run), *_times(run), *_container(run), *_folders(run), *_environment(run)]
    return findings or [passed("cluster", "cluster", _summary(run))]


def _summary(run: RunFile) -> str:
    sizes = {"student": run.cluster.student} | ({"teacher": run.cluster.teacher} if run.teacher is not None else {})
    return f"{run.cluster.kind}: " + ", ".join(
        f"{name} {size.nodes} x {size.processes} processes" for name, size in sizes.items()
    )


def _sizes(run: RunFile) -> Iterator[Finding]:
    cluster = run.cluster
    jobs = {"student": run.config.parallel.tensor_model_parallel_size}
    if run.teacher_config is not None:
        jobs["teacher"] = run.teacher_config.parallel.tensor_model_parallel_size
    for name, tp in jobs.items():
        size = cluster.student if name == "student" else cluster.teacher
        where = f"cluster.{name}"
        if cluster.kind == "local" and size.nodes != 1:
            yield failed(name, "nodes", f"{where}.nodes {size.nodes}: a local run has one node; use cluster.kind slurm")
        if size.gpus_per_node and size.processes > size.gpus_per_node:
            yield failed(
                name,
                "processes",
                f"{where}.processes_per_node {size.processes} exceeds gpus_per_node {size.gpus_per_node}: NCCL refuses "
                "two processes on one GPU",
            )
        if size.nodes > 1 and size.gpus_per_node and tp > size.gpus_per_node:
            yield warned(
                name,
                "nodes",
                f"tensor parallelism over {tp} ranks leaves the node of {size.gpus_per_node} GPUs: every layer waits "
                "for the network; use pipeline stages",
                flag="--tensor-model-parallel-size",
            )
        bf16 = _is_bf16(run, name)
        if bf16 and not size.gpus_per_node:
            yield failed(name, "precision", f"--bf16 needs GPUs, and {where}.gpus_per_node is 0")
        if name == "teacher" and cluster.kind == "slurm" and (run.teacher or {}).get("bind") == "ipc":
            message = "--bind ipc is for one machine, and the jobs get nodes of their own; leave it out"
            yield failed(name, "address", message)
        if size.gpus_per_node and not bf16:
            yield warned(name, "precision", "float32 on GPUs: twice the memory, a fraction of the speed", flag="--bf16")


def _is_bf16(run: RunFile, name: str) -> bool:
    if name == "student":
        return run.config.training.bf16
    return run.teacher_config is not None and run.teacher_config.serving.bf16


def _times(run: RunFile) -> Iterator[Finding]:
    if run.cluster.kind == "slurm" and run.cluster.time is None:
        yield warned(
            "cluster",
            "time",
            "no time limit is asked for, so that of the partition ends the run without a last checkpoint",
            flag="cluster.time",
        )
    output = run.config.output
    if run.cluster.kind == "slurm" and run.cluster.requeue:
        if output.save is None or output.load is None or Path(output.save).resolve() != Path(output.load).resolve():
            yield failed(
                "student",
                "resuming",
                f"--load {output.load} is not the directory of --save {output.save}: a job that is queued again would "
                "start over; leave both out, or set cluster.requeue to false",
            )
        elif output.save_interval is None:
            yield warned(
                "student",
                "resuming",
                "no checkpoint is written before the end or a signal; a node that fails takes all steps with it",
                flag="--save-interval",
            )


def _container(run: RunFile) -> Iterator[Finding]:
    container = run.cluster.container
    if container is None:
        return
    if run.cluster.kind == "local":
        yield failed("cluster", "container", "cluster.container: a local run starts in this environment; leave it out")
        return
    image = container.image
    if (container.runtime == "apptainer" or image.endswith(".sqsh")) and "://" not in image and not _exists(image):
        yield failed("cluster", "container", f"cluster.container.image {image}: no such file")
    for mount in container.mounts:
        host = mount.split(":")[0]
        if not _exists(host):
            yield failed("cluster", "container", f"cluster.container.mounts: {host} does not exist here")
    for key, path in dict.fromkeys(_paths(run)):
        if not os.path.isabs(path):
            yield failed(
                "cluster",
                "container",
                f"{key} {path}: a relative path has no meaning inside the image; write the absolute one",
            )
        elif not _is_mounted(path, container):
            finding = failed(
                "cluster",
                "container",
                f"{key} {path} lies under no mount, so the image does not see it; add it",
                flag="cluster.container.mounts",
            )
            # apptainer mounts home, /tmp and the current directory by itself, unless its administrator says otherwise.
            own = [Path.home(), Path("/tmp"), Path.cwd()]
            if container.runtime == "apptainer" and any(Path(path).is_relative_to(folder) for folder in own):
                continue
            yield finding


def _paths(run: RunFile) -> Iterator[tuple[str, str]]:
    """Every path that a job reads or writes, by its flag."""
    yield "run_dir", run.run_dir
    of_student = [(option, run.student.get(option.key)) for option in options(Config)]
    of_teacher = [(option, (run.teacher or {}).get(option.key)) for option in options(TeacherConfig)]
    for option, value in [*of_student, *of_teacher]:
        for path in value if isinstance(value, list) else [value]:
            if option.metavar in ("DIR", "FILE") and isinstance(path, str) and not _OTHER.match(path):
                yield option.flag, path


def _is_mounted(path: str, container: Container) -> bool:
    inside = [mount.split(":")[1] for mount in container.mounts]
    return any(Path(path).is_relative_to(folder) for folder in inside)


def _folders(run: RunFile) -> Iterator[Finding]:
    path = Path(run.run_dir)
    existing = next(folder for folder in (path, *path.parents) if _exists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield failed("cluster", "folders", f"run_dir {run.run_dir}: {existing} cannot be written to")
    elif run.cluster.kind == "slurm" and any(path.is_relative_to(folder) for folder in _OF_A_NODE):
        yield warned("cluster", "folders", f"{run.run_dir}: is it the same folder on every node?", flag="run_dir")


def _environment(run: RunFile) -> Iterator[Finding]:
    parallel, name = run.config.parallel, "CUDA_DEVICE_MAX_CONNECTIONS"
    if run.cluster.student.gpus_per_node and parallel.sequence_parallel and run.env.get(name) != "1":
        yield warned(
            "student",
            "environment",
            f"Megatron overlaps the communication of sequence parallelism where {name} is 1 (GPUs before Blackwell)",
            flag=f"env.{name}",
        )


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False
