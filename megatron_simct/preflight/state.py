"""State that the checks of one run share: its options, the findings so far, and the models that were read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_simct.config.run_file import RunFile
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import Finding, failed, passed

T = TypeVar("T")


class State:
    """Collects findings. A check whose input another check has refused is left out."""

    def __init__(self, run: RunFile, device_memory_gib: float | None) -> None:
        self.run = run
        self.device_memory_gib = device_memory_gib
        self.findings: list[Finding] = []
        config = self.config = run.config
        self.jobs = {job.name: (job, run.teacher_configs[job.name]) for job in run.of_kind("teacher")}
        """Teachers in jobs of their own."""
        self.flags = dict(zip(self.jobs, ("teacher-", "second-teacher-"), strict=False))
        self.flags |= {"student": ""} | ({} if self.jobs else {"teacher": "teacher-"})
        """Prefix of each model's flags in the student's command."""
        self.teacher_job = next((config for _, config in self.jobs.values()), None)
        self.colocated = not config.teacher_job.endpoint and config.rollout.load_debug_scored_data is None
        self.needs_teacher = config.needs_teacher
        self.sides: dict[str, pair.Side] = {}
        self.sound: set[str] = set()
        """Jobs whose options are valid. Other jobs get neither a layout nor a memory plan."""
        self.undivided: set[str] = set()
        """Models whose layout does not divide them. They get no memory plan."""

    def attempt(
        self, side: str, check: str, function: Callable[[], T], said: Callable[[T], str] | None = None
    ) -> T | None:
        """The function's value. If it raises ValueError: None, and a failed finding with the error's text."""
        try:
            value = function()
        except ValueError as error:
            self.findings.append(failed(side, check, str(error)))
            return None
        if said is not None:
            self.findings.append(passed(side, check, said(value)))
        return value

    def has_engine(self, name: str) -> bool:
        """Whether an engine computes the hidden states of this model."""
        return name in self.jobs and bool(self.jobs[name][1].engine.endpoint)
