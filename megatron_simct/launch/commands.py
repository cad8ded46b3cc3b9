"""The two command lines of a run. Nothing else spells them.

A command is a list of arguments and never a line of text: whoever writes it into a script quotes each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_simct.arguments import SERVE_TEACHER, TRAIN, Option, options
from megatron_simct.launch.run_file import JobSize, RunFile

SIGNALS = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun answers by stopping its processes within 30 s. Not SIGTERM: on it a run saves first, which may take
longer, so it is sent to the run's processes and torchrun waits for their end."""


def student_command(run: RunFile) -> list[str]:
    """-m megatron_simct.train and its flags."""
    return ["-m", TRAIN.module, *flags(run.student, options(TRAIN.config))]


def teacher_command(run: RunFile) -> list[str]:
    """-m megatron_simct.serve_teacher and its flags."""
    assert run.teacher is not None
    return ["-m", SERVE_TEACHER.module, *flags(run.teacher, options(SERVE_TEACHER.config))]


def flags(values: Mapping[str, Any], known: Iterable[Option]) -> list[str]:
    """The options that are given, as arguments. --flag=value, so that no value is taken for a flag."""
    arguments = []
    for option in known:
        value = values.get(option.key)
        if value is None:
            continue
        if option.kind is bool:
            arguments.append(option.flag if value else option.flag.replace("--", "--no-", 1))
        elif option.many:
            arguments += [option.flag, *map(str, value)]
        else:
            arguments.append(f"{option.flag}={value}")
    return arguments


def torchrun(size: JobSize) -> list[str]:
    """-m torch.distributed.run and what does not depend on where the job is started."""
    return [
        *("-m", "torch.distributed.run", f"--nnodes={size.nodes}", f"--nproc-per-node={size.processes}"),
        *(f"--max-restarts={size.max_restarts}", f"--signals-to-handle={SIGNALS}", "--rdzv-backend=c10d"),
    ]


def interpreter(run: RunFile) -> str:
    """The Python of the nodes."""
    return run.cluster.python or ("python" if run.cluster.container else sys.executable)
