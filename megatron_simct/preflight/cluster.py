"""Nodes, time limits, environments and paths of a run: mistakes that the scheduler would
report late, or never.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_simct.config.flags import options
from megatron_simct.config.options import Config, TeacherConfig
from megatron_simct.config.run_file import Container, Job, RunFile
from megatron_simct.preflight.findings import Finding, failed, passed, warned

_OTHER = re.compile(r"tiktoken:|tcp://")
"""Values that are not paths."""
_OF_A_NODE = ("/tmp", "/dev/shm", "/var/tmp")
"""Node-local directories."""


def check_cluster(run: RunFile) -> list[Finding]:
    """Check where the jobs run. The models' layouts are checked elsewhere."""
    findings = [*_sizes(run), *_times(run), *_container(run), *_folders(run), *_environment(run)]
    return findings or [passed("cluster", "cluster", _summary(run))]


def _summary(run: RunFile) -> str:
    return f"{run.cluster.kind}: " + ", ".join(
        f"{job.name} {job.nodes} x {1 if job.kind == 'engine' else job.processes} processes"
        for job in run.jobs
    )


def _sizes(run: RunFile) -> Iterator[Finding]:
    cluster = run.cluster
    for job in run.jobs:
        name, where = job.name, run.where(job)
        if cluster.kind == "local" and job.nodes != 1:
            yield failed(
                name, "nodes", f"{where}.nodes {job.nodes}: a local run has one node; use cluster.kind slurm"
            )
        if job.kind == "engine":
            continue
        if job.gpus_per_node and job.processes > job.gpus_per_node:
            yield failed(
                name,
                "processes",
                f"{where}.processes_per_node {job.processes} exceeds gpus_per_node {job.gpus_per_node}: NCCL "
                "refuses two processes on one GPU",
            )
        parallel = (run.config if job.kind == "student" else run.teacher_configs[name]).parallel
        tp = parallel.tensor_model_parallel_size
        if job.nodes > 1 and job.gpus_per_node and tp > job.gpus_per_node:
            yield warned(
                name,
                "nodes",
                f"tensor parallelism over {tp} ranks exceeds the {job.gpus_per_node} GPUs of a node: every "
                "layer would wait for the network; use pipeline stages",
                flag="--tensor-model-parallel-size",
            )
        bf16 = run.config.training.bf16 if job.kind == "student" else run.teacher_configs[name].serving.bf16
        if bf16 and not job.gpus_per_node:
            yield failed(name, "precision", f"--bf16 needs GPUs, but {where}.gpus_per_node is 0")
        if job.kind == "teacher" and cluster.kind == "slurm" and job.options.get("bind") == "ipc":
            message = "--bind ipc works on one machine only, but each job gets its own nodes; leave it out"
            yield failed(name, "address", message)
        if job.gpus_per_node and not bf16:
            yield warned(
                name, "precision", "float32 on GPUs: twice the memory, a fraction of the speed", flag="--bf16"
            )


def _times(run: RunFile) -> Iterator[Finding]:
    if run.cluster.kind == "slurm" and run.cluster.time is None:
        yield warned(
            "cluster",
            "time",
            "no time limit is set, so the partition's limit ends the run without a last checkpoint",
            flag="cluster.time",
        )
    output = run.config.output
    if run.cluster.kind == "slurm" and run.cluster.requeue:
        if (
            output.save is None
            or output.load is None
            or Path(output.save).resolve() != Path(output.load).resolve()
        ):
            yield failed(
                "student",
                "resuming",
                f"--load {output.load} is not the directory of --save {output.save}: a requeued job would "
                "start from the beginning; leave both out, or set cluster.requeue to false",
            )
        elif output.save_interval is None:
            yield warned(
                "student",
                "resuming",
                "no checkpoint is written before the end or a signal; if a node fails, all steps are lost",
                flag="--save-interval",
            )


def _container(run: RunFile) -> Iterator[Finding]:
    for job in run.jobs:
        container = run.container_of(job)
        if container is None:
            continue
        where = f"{run.where(job)}.container" if job.container else "cluster.container"
        if run.cluster.kind == "local":
            yield failed(
                "cluster", "container", f"{where}: a local run starts in this environment; leave it out"
            )
            return
        if job.container or job.kind == "student":  # the cluster's own is reported once
            image = container.image
            is_file = container.runtime == "apptainer" or image.endswith(".sqsh")
            if is_file and "://" not in image and not _exists(image):
                yield failed("cluster", "container", f"{where}.image {image}: no such file")
            for mount in container.mounts:
                host = mount.split(":")[0]
                if not _exists(host):
                    yield failed("cluster", "container", f"{where}.mounts: {host} does not exist here")
        for key, path in dict.fromkeys(_paths(run, job)):
            yield from _inside(key, path, container, where)


def _inside(key: str, path: str, container: Container, where: str) -> Iterator[Finding]:
    """Whether the container sees a path."""
    if not os.path.isabs(path):
        message = f"{key} {path}: a relative path has no meaning in a container; write the absolute path"
        yield failed("cluster", "container", message)
    elif not _is_mounted(path, container):
        # apptainer mounts home, /tmp and the current directory by default, unless its
        # administrator changes this.
        own = [Path.home(), Path("/tmp"), Path.cwd()]
        if container.runtime == "apptainer" and any(Path(path).is_relative_to(folder) for folder in own):
            return
        message = f"{key} {path} is not under a mount, so the container cannot see it; add a mount"
        yield failed("cluster", "container", message, flag=f"{where}.mounts")


def _paths(run: RunFile, job: Job) -> Iterator[tuple[str, str]]:
    """Every path that a job reads or writes, with its flag."""
    if job.kind == "engine":
        model = job.flag_of_command("--model")
        if model is not None:
            yield "--model", model
        return
    if job.kind == "student":
        yield "run_dir", run.run_dir
    for option in options(Config if job.kind == "student" else TeacherConfig):
        value = job.options.get(option.key)
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
        yield warned(
            "cluster",
            "folders",
            f"{run.run_dir}: must be the same folder on every node",
            flag="run_dir",
        )


def _environment(run: RunFile) -> Iterator[Finding]:
    parallel, name = run.config.parallel, "CUDA_DEVICE_MAX_CONNECTIONS"
    if run.student.gpus_per_node and parallel.sequence_parallel and run.env.get(name) != "1":
        yield warned(
            "student",
            "environment",
            f"Megatron overlaps the communication of sequence parallelism only if {name} is 1 (GPUs before "
            "Blackwell)",
            flag=f"env.{name}",
        )


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False
