"""The plan of the study: every run's configuration, and the order of the runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SOME = ("paper", "strict", "bytes", "exact", "alm")
ALL = (*SOME, "sum", "code", "strict_topk", "no_unit_loss", "random_unit", "uld")
TOY = {"train_iters": 100, "rollout_batch_size": 32, "eval_samples": 4, "warm_start_seed": 1}
VARIANTS = {"bytes_any": ("bytes", {"--simct-byte-bounds": "any"})}
"""A name of the study that is an interface with flags of its own."""
REAL = {
    "train_iters": 8,
    "rollout_batch_size": 8,
    "response_len": 48,
    "lr": 2e-5,
    "divergence": "reverse_kl",
    "held_out": 10,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A pair of models in one direction. All its runs start from one teacher and one student."""

    part: str
    name: str
    title: str
    interfaces: tuple[str, ...]
    seeds: int
    options: dict[str, Any]
    """Options that are the same for every interface."""


SETTINGS = (
    Setting(
        part="a",
        name="teacher-groups",
        title="digits disagree: the teacher groups digits, the student spells them",
        interfaces=ALL,
        seeds=5,
        options={"pair": "digits-disagree", "direction": "teacher-groups", "lr": 2e-4, **TOY},
    ),
    Setting(
        part="a",
        name="student-groups",
        title="digits disagree: the student groups digits, the teacher spells them",
        interfaces=ALL,
        seeds=5,
        options={"pair": "digits-disagree", "direction": "student-groups", "lr": 3e-4, **TOY},
    ),
    Setting(
        part="b",
        name="digits-agree",
        title="digits agree, words do not",
        interfaces=SOME,
        seeds=3,
        options={"pair": "digits-agree", "direction": "teacher-groups", "lr": 3e-4, **TOY},
    ),
    Setting(
        part="c",
        name="real-weights",
        title="real weights: Gemma-3-270M teaches SmolLM2-135M-Instruct",
        interfaces=SOME,
        seeds=2,
        options=REAL,
    ),
)

WARM_STARTS = (1, 2, 3)
BOUNDS = tuple(
    Setting(
        part="d",
        name=f"{setting.name}-start-{warm_start}",
        title=setting.title,
        interfaces=("bytes", "bytes_any"),
        seeds=2,
        options={**setting.options, "warm_start_seed": warm_start},
    )
    for setting in SETTINGS[:2]
    for warm_start in WARM_STARTS
)
"""`bytes` with either of its bounds, if digits disagree, in both directions."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One distillation."""

    setting: Setting
    interface: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}-{self.interface}-{self.seed}"

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that the result depends on, except the code."""
        return {
            "setting": self.setting.name,
            "interface": self.interface,
            "seed": self.seed,
            **self.setting.options,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the run; None if it has not been run, or only with another configuration."""
        path = RESULTS / f"{self.name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("fingerprint") == self.fingerprint else None


def planned_runs() -> list[Run]:
    """Every run. Seed 1 comes first, with the interfaces that all settings have before the others, so that a
    study that is stopped early is balanced.
    """
    runs = [
        Run(setting=setting, interface=interface, seed=seed)
        for setting in (*SETTINGS, *BOUNDS)
        for interface in setting.interfaces
        for seed in range(1, setting.seeds + 1)
    ]
    return sorted(runs, key=lambda run: (run.seed, run.interface not in SOME))
