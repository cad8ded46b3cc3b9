"""The command lines of a run. Nothing else spells them.

A command is a list of arguments and never a line of text: whoever writes it into a script
quotes each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_simct.config.flags import SERVE_TEACHER, TRAIN, Option, flag_text, options
from megatron_simct.config.run_file import Job, JobSize

SIGNALS = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun answers by stopping its processes within 30 s. Not SIGTERM: on it a run saves first, which
may take longer, so it is sent to the run's processes and torchrun waits for their end."""


def command_of(job: Job, *, without: Sequence[str] = ()) -> list[str]:
    """What the interpreter of a job's processes runs: a module and its flags, or an engine's own command.

    without: keys of options that are left out.
    """
    if job.kind == "engine":
        return list(job.command)
    entry = TRAIN if job.kind == "student" else SERVE_TEACHER
    values = {key: value for key, value in job.options.items() if key not in without}
    return ["-m", entry.module, *flags(values, options(entry.config))]


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
            arguments.append(f"{option.flag}={flag_text(value)}")
    return arguments


def torchrun(size: JobSize) -> list[str]:
    """-m torch.distributed.run and what does not depend on where the job is started."""
    return [
        *("-m", "torch.distributed.run", f"--nnodes={size.nodes}", f"--nproc-per-node={size.processes}"),
        *(f"--max-restarts={size.max_restarts}", f"--signals-to-handle={SIGNALS}", "--rdzv-backend=c10d"),
    ]
