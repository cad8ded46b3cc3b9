"""Findings of a run, and the numbers behind them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron_simct.alignment.coverage import Coverage
from megatron_simct.preflight.bias import Bias
from megatron_simct.preflight.findings import Finding
from megatron_simct.preflight.memory import GIB, MemoryPlan, as_gib
from megatron_simct.preflight.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What was measured of one teacher. Parts that could not be measured are missing."""

    traffic: Traffic | None = None
    coverage: Coverage | None = None
    bias: Bias | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "traffic_bytes": None if self.traffic is None else dataclasses.asdict(self.traffic),
            "coverage": None if self.coverage is None else self.coverage.as_json(),
            "bias_nats_a_word": None if self.bias is None else self.bias.as_json(),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings, and the numbers behind them. Parts that could not be checked are missing."""

    findings: list[Finding]
    plans: dict[str, MemoryPlan] = field(default_factory=dict)
    """Job -> plan."""
    numbers: Numbers = field(default_factory=Numbers)
    """The numbers of the only teacher, or of the first one of a mixture."""
    teachers: dict[str, Numbers] = field(default_factory=dict)
    """The same of each of --teachers, by name."""
    prompts: dict[str, str] = field(default_factory=dict)
    """The first prompt, as each side reads it."""

    @property
    def failed(self) -> bool:
        return any(finding.level == "fail" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """One JSON object; memory in GiB."""
        return {
            "failed": self.failed,
            "findings": [finding.as_json() for finding in self.findings],
            "memory_gib": {
                job: {
                    "peak": round(plan.peak / GIB, 2),
                    "held": as_gib(plan.held),
                    "phases": {phase: as_gib(parts) for phase, parts in plan.phases.items()},
                    "parameters": plan.num_parameters,
                }
                for job, plan in self.plans.items()
            },
            **self.numbers.as_json(),
            "teachers": {name: of.as_json() for name, of in self.teachers.items()},
            "prompts": self.prompts,
        }
