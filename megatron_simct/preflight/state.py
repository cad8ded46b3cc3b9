"""State that the checks of one run share: its options, the findings so far, and the models that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_simct.alignment import AlignmentMap
from megatron_simct.alignment.coverage import Coverage
from megatron_simct.config.options import InterfaceConfig, TeacherOptions
from megatron_simct.config.run_file import RunFile
from megatron_simct.data.prompts import Row
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import Finding, failed, passed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A teacher that the student is compared with, and what both have in common."""

    side: pair.Side
    options: TeacherOptions
    interface: InterfaceConfig
    """How its rows are compared."""
    rows: Sequence[Row]
    """The rows of --prompt-data that it scores."""
    alignment_map: AlignmentMap | None
    coverage: Coverage | None = None


class State:
    """Collects findings. A check whose input another check has refused is left out."""

    def __init__(self, run: RunFile, device_memory_gib: float | None) -> None:
        self.run = run
        self.device_memory_gib = device_memory_gib
        self.findings: list[Finding] = []
        config = self.config = run.config
        self.jobs = {job.name: (job, run.teacher_configs[job.name]) for job in run.of_kind("teacher")}
        """Teachers in jobs of their own."""
        self.teachers = self._name_teachers()
        """The options of each teacher, by the name of its job, or of --teachers."""
        self.flags = {"student": ""} | {name: of.prefix for name, of in self.teachers.items()}
        """Prefix of each model's flags in the student's command."""
        stored = config.rollout.load_debug_scored_data is not None
        self.colocated = {name for name, of in self.teachers.items() if not of.job.endpoint and not stored}
        """Teachers on the student's ranks."""
        self.needs_teacher = config.needs_teacher
        self.sides: dict[str, pair.Side] = {}
        self.sound: set[str] = set()
        """Jobs whose options are valid. Other jobs get neither a layout nor a memory plan."""
        self.undivided: set[str] = set()
        """Models whose layout does not divide them. They get no memory plan."""

    def _name_teachers(self) -> dict[str, TeacherOptions]:
        try:
            teachers = self.config.teachers
        except ValueError:
            return {}  # the check of options reports it
        if self.config.routes_rows:
            return {one.name: one for one in teachers}
        return dict(zip(list(self.jobs) or ["teacher"], teachers, strict=False))

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
