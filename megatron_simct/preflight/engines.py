"""Inference engines of a run: their interpreter, folder, port and memory, before they are started."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from megatron_simct.config.interfaces import METHODS, Interface
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.config.run_file import Job, RunFile
from megatron_simct.engine_client import LogprobField
from megatron_simct.losses import comparisons, teacher_needs
from megatron_simct.losses.rows import ALL_TOKENS
from megatron_simct.preflight.findings import Finding, failed, passed, warned
from megatron_simct.teacher.engine_logprobs import serves

_MAX_LOGPROBS = 20
"""vLLM's default of --max-logprobs."""
_WEIGHTS_SHARE = 0.9
"""Share of a device's memory that weights may take. The rest is for activations and the cache
of keys and values.
"""


def check_engines(run: RunFile, device_memory_gib: float | None) -> list[Finding]:
    """All checks of the jobs of kind engine that are possible before they start."""
    findings: list[Finding] = []
    for job in run.of_kind("engine"):
        found = [
            *_interpreter(run, job),
            *_port(run, job),
            *_model(run, job),
            *_memory(run, job, device_memory_gib),
        ]
        findings += found or [passed(job.name, "engine", f"{' '.join(job.command)}"[:100])]
        if not any(other.engine == job.name for other in run.jobs):
            message = f"no job uses this engine; set it in a teacher or the student by engine: {job.name}"
            findings.append(warned(job.name, "engine", message, flag=f"jobs.{job.name}"))
    for job in run.of_kind("teacher"):
        findings += _answers(run, job)
    return findings


def served_by(field: LogprobField) -> list[str]:
    """The interfaces that work with a server that returns log-probabilities of tokens in this field."""
    names = [name for name in METHODS if name != "sft"]
    return [name for name in names if _is_served(InterfaceConfig(interface=cast(Interface, name)), field)]


def _is_served(config: InterfaceConfig, field: LogprobField) -> bool:
    needs = teacher_needs(config)
    hidden = needs.hidden_rows != "none" and not needs.topk
    return serves(field, hidden=hidden, topk=bool(needs.topk), byte_events=needs.byte_events)


def _answers(run: RunFile, job: Job) -> Iterator[Finding]:
    """Check that servers which return no hidden states serve the run's interface."""
    field = run.teacher_configs[job.name].engine.answers
    if field == "hidden_states":
        return
    config, flag = run.config, "--engine-answers"
    try:
        interface = comparisons(config).get(job.name, config.interface)
    except ValueError:
        return  # the check of options reports it
    names = ", ".join(served_by(field))
    if not _is_served(interface, field):
        message = (
            f"{flag} {field} supports {names}, but not --simct-interface {interface.interface}; choose one "
            "of them"
        )
        yield failed(job.name, "interface", f"{message}, or servers that return hidden_states", flag=flag)
        return
    engine, k = run.engine_of(job), teacher_needs(interface).topk
    most = (engine.flag_of_command("--max-logprobs") if engine is not None else None) or str(_MAX_LOGPROBS)
    if engine is not None and most != "-1" and most.isascii() and most.isdigit() and k > int(most):
        asked = (
            f"--simct-interface {interface.interface} needs {k} tokens at each position"
            if k < ALL_TOKENS
            # fmt: skip
            else (f"--simct-interface {interface.interface} needs the whole vocabulary at each position")
        )
        message = (
            f"{asked}, but jobs.{engine.name} returns {most}: add --max-logprobs to its command, or use fewer"
        )
        yield failed(job.name, "interface", message, flag=f"jobs.{engine.name}.command")
        return
    yield passed(job.name, "interface", f"{flag} {field} supports {names}")


def _interpreter(run: RunFile, job: Job) -> Iterator[Finding]:
    if run.container_of(job) is not None:
        return
    python = run.python_of(job)
    if job.python is None:
        message = (
            f"jobs.{job.name}.python is missing: an engine needs its own Python environment, or a container"
        )
        yield failed(job.name, "environment", message)
    elif shutil.which(python) is None:
        yield failed(
            job.name,
            "environment",
            f"jobs.{job.name}.python {python}: no such program; create the environment",
        )


def _port(run: RunFile, job: Job) -> Iterator[Finding]:
    if run.cluster.kind != "local":
        return
    others = [other.name for other in run.of_kind("engine") if other is not job and other.port == job.port]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(job.port)))
            in_use = False
        except OSError:
            in_use = True
    if in_use or others:
        who = f"also the port of {others[0]}" if others else "in use on this machine"
        message = f"jobs.{job.name}.command: --port {job.port} is {who}; choose another port"
        yield failed(job.name, "port", message, flag=f"jobs.{job.name}.command")


def _model(run: RunFile, job: Job) -> Iterator[Finding]:
    model, flag = job.flag_of_command("--model"), f"jobs.{job.name}.command"
    if model is None:
        return
    if os.path.isabs(model) and run.container_of(job) is None and not (Path(model) / "config.json").is_file():
        yield failed(job.name, "folder", f"{flag}: --model {model}: no config.json there", flag=flag)
        return
    for other in run.jobs:
        folder = other.options.get("hf_checkpoint" if other.kind == "student" else "teacher_hf_checkpoint")
        if (
            other.engine == job.name
            and folder is not None
            and Path(folder).resolve() != Path(model).resolve()
        ):
            message = f"{flag}: --model {model} is not the model that {other.name} expects ({folder})"
            yield failed(job.name, "folder", message, flag=flag)


def _memory(run: RunFile, job: Job, device_memory_gib: float | None) -> Iterator[Finding]:
    model = job.flag_of_command("--model")
    size = (
        sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / (1 << 30) if model else 0.0
    )
    if not size or device_memory_gib is None:
        return
    ranks = 1
    for names in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        text = job.flag_of_command(*names)
        ranks *= int(text) if text is not None and text.isascii() and text.isdigit() else 1
    if job.gpus_per_node and ranks > job.gpus_per_node:
        message = f"jobs.{job.name}: its command uses {ranks} GPUs, but gpus_per_node is {job.gpus_per_node}"
        yield failed(job.name, "processes", message, flag=f"jobs.{job.name}.gpus_per_node")
        return
    share = size / ranks
    if share > _WEIGHTS_SHARE * device_memory_gib:
        message = (
            f"{size:.1f} GiB of weights over {ranks} ranks are {share:.1f} GiB each; a GPU has "
            f"{device_memory_gib:g} GiB, also for activations and the cache: raise --tensor-parallel-size"
        )
        yield failed(job.name, "memory", message, flag=f"jobs.{job.name}.command")
