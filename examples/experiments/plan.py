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

    @property
    def warm_start(self) -> str:
        """The name of the folder of its teacher and its student."""
        if self.part != "e":
            return self.name
        return f"{self.options['grid']}-start-{self.options['warm_start_seed']}"


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


ARMS = ("kd", "sft", "paper", "strict", "exact", "alm", "bytes_any")
"""Part e: a teacher with the student's tokenizer, training on the teacher's answers, and interfaces."""
RATES = (2e-4, 6e-5, 6e-4)
"""The middle one is run first."""
CONFIRMED = (2, 3)
"""Seeds of the runs with the best rate. Seed 1 has chosen the rate."""
JUDGED = 200
"""Number of validation problems of part e, and of its held-out problems."""
SFT_STEPS = 300
"""Steps of `sft` that take about as much of the processor as 100 steps on policy."""
GRIDS = {
    "e-student-groups": (
        "digits disagree: the student groups digits, the teacher spells them",
        {"pair": "digits-disagree", "direction": "student-groups", "words": "plain"},
    ),
    "e-teacher-groups": (
        "digits disagree: the teacher groups digits, the student spells them",
        {"pair": "digits-disagree", "direction": "teacher-groups", "words": "plain"},
    ),
    "e-merges-cross": (
        "merges disagree: digits agree, every name and thing is cut across the other's tokens",
        {"pair": "digits-agree", "direction": "teacher-groups", "words": "crossing"},
    ),
}
"""The pairs of part e: title and options."""


def _grid_setting(grid: str, name: str, seeds: int, warm_start: int, **options: Any) -> Setting:
    title, of_pair = GRIDS[grid]
    common = TOY | {"grid": grid, "eval_samples": 2, "teacher_iters": 1600, "warm_start_seed": warm_start}
    return Setting(
        part="e",
        name=name,
        title=title,
        interfaces=ARMS,
        seeds=seeds,
        options={**of_pair, **common, **options},
    )


RATE_SETTINGS = tuple(
    _grid_setting(grid, f"{grid}-rate-{rate:.0e}", 1, WARM_STARTS[0], lr=rate)
    for rate in RATES
    for grid in GRIDS
)
"""Every arm at every rate, one run each."""
BEST_SETTINGS = tuple(
    _grid_setting(grid, f"{grid}-best-start-{warm_start}", len(CONFIRMED), warm_start)
    for warm_start in WARM_STARTS
    for grid in GRIDS
)
"""Every arm at its best rate by validation, from every warm start."""


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
        """Everything that the result depends on, except the code. In part e, a run at the best rate has no
        `lr` before that rate is known.
        """
        found = {
            "setting": self.setting.name,
            "interface": self.interface,
            "seed": self.seed,
            **self.setting.options,
        }
        if self.setting in BEST_SETTINGS and (rate := best_rate(self.setting, self.interface)):
            found["lr"] = rate
        if self.setting.part == "e" and self.interface == "sft":
            found["train_iters"] = SFT_STEPS
        return found

    @property
    def ready(self) -> bool:
        """Whether its learning rate is known."""
        return "lr" in self.configuration

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the run; None if it has not been run, or only with another configuration."""
        path = RESULTS / f"{self.name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("fingerprint") == self.fingerprint else None


def best_rate(setting: Setting, interface: str) -> float | None:
    """Part e: the rate after which most validation problems are right, greedily; among equals, of most right
    samples, then the lowest. None if a rate's run is missing.
    """
    found = {}
    for of_rate in RATE_SETTINGS:
        if of_rate.options["grid"] == setting.options["grid"]:
            result = Run(setting=of_rate, interface=interface, seed=1).result
            if result is None:
                return None
            greedy, sampled = (
                sum(map(int, result["outcomes"][name][:JUDGED])) for name in ("greedy", "sampled")
            )
            rate = of_rate.options["lr"]
            found[greedy, sampled, -rate] = rate
    return found[max(found)]


def grid_runs() -> list[Run]:
    """Part e: all arms of all pairs at one rate before the next rate, then all of one seed and warm start."""
    runs = [
        Run(setting=setting, interface=arm, seed=1) for setting in RATE_SETTINGS for arm in setting.interfaces
    ]
    return runs + [
        Run(setting=setting, interface=arm, seed=seed)
        for seed in CONFIRMED
        for setting in BEST_SETTINGS
        for arm in setting.interfaces
    ]


def planned_runs() -> list[Run]:
    """Every run. Parts a to d: seed 1 comes first, with the interfaces that all settings have before the
    others, so that a study that is stopped early is balanced. Part e follows.
    """
    runs = [
        Run(setting=setting, interface=interface, seed=seed)
        for setting in (*SETTINGS, *BOUNDS)
        for interface in setting.interfaces
        for seed in range(1, setting.seeds + 1)
    ]
    return sorted(runs, key=lambda run: (run.seed, run.interface not in SOME)) + grid_runs()
