"""Parts a, b, d and e: the quick start's pairs.

The teacher and the warmed-up student are made once. A run is one distillation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from statistics import fmean
from typing import Any

from examples.experiments.arms import Arms
from examples.experiments.plan import VARIANTS, Run, Setting
from examples.experiments.processes import ROOT, Workplace
from examples.quickstart import run as quickstart

ENDS = 10
"""The first and the last value of a figure are means of this number of steps."""


class Toy:
    """One pair in one direction, with its warm start."""

    def __init__(self, setting: Setting, workplace: Workplace) -> None:
        """Makes the warm start, unless it exists."""
        self._workplace = workplace
        self._folder = workplace.folder / setting.warm_start
        self._folder.mkdir(parents=True, exist_ok=True)
        options = setting.options
        flags = ("--pair", options["pair"], "--direction", options["direction"], "--processes", "1")
        parsed = quickstart.parse(
            [*flags, "--seed", str(options["warm_start_seed"]), "--run-dir", str(self._folder)]
        )
        self._recipe = (
            Arms(parsed, self._folder, options["words"], options["teacher_iters"])
            if setting.part == "e"
            else quickstart.Recipe(parsed, self._folder)
        )
        for stage in self._recipe.warm_start:
            stage.run(ROOT)

    def run(self, run: Run) -> dict[str, Any]:
        """Figures, outcomes and seconds.

        Raises RuntimeError, with the end of its log, if the distillation fails.
        """
        options = run.configuration
        interface, flags = VARIANTS.get(run.interface, (run.interface, {}))
        flags = {
            **flags,
            "--train-iters": options["train_iters"],
            "--rollout-batch-size": options["rollout_batch_size"],
            "--micro-batch-size": options["rollout_batch_size"],
            "--lr": options["lr"],
            "--eval-samples": options["eval_samples"],
            "--seed": run.seed,
            **(
                {"--simct-interface-seed": run.seed}
                if run.interface in ("no_unit_loss", "random_unit")
                else {}
            ),
        }
        stage = self._recipe.distil(
            *(interface, run.name),
            *(str(part) for item in flags.items() for part in item),
        )
        shutil.rmtree(stage.output, ignore_errors=True)
        seconds = self._workplace.command(stage.command, log=stage.output / "log.txt")
        rows = [json.loads(line) for line in (stage.output / "metrics.jsonl").read_text().splitlines()]
        found = summarize(rows) | seconds | {"warm_start": self._digest()}
        shutil.rmtree(stage.output)
        return found

    def _digest(self) -> str:
        """SHA-256 of the saved weights that every run starts from."""
        digest = hashlib.sha256()
        for name in ("teacher", "student"):
            for path in sorted((self._folder / name / "checkpoint").rglob("*.distcp")):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the rows of metrics.jsonl.

    An outcome has one digit for each held-out problem: the number of right responses.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    before, after = (row for row in rows if row["kind"] == "evaluation")

    def mean(name: str, part: slice) -> float | None:
        values = [step[name] for step in steps[part] if name in step]
        return round(fmean(values), 6) if values else None

    first, last = slice(None, ENDS), slice(-ENDS, None)
    return {
        "figures": {
            "greedy_before": before["greedy_accuracy"],
            "greedy": after["greedy_accuracy"],
            "sampled_before": before["sampled_accuracy"],
            "sampled": after["sampled_accuracy"],
            "loss_first": mean("loss", first),
            "loss_last": mean("loss", last),
            "coverage_one_to_one": mean("coverage_one_to_one", slice(None)),
            "coverage_unit": mean("coverage_unit", slice(None)),
            "mass_outside_first": mean("student_mass_outside_u", first),
            "mass_outside_last": mean("student_mass_outside_u", last),
            "stop_rate_last": mean("stop_rate", last),
            "response_length_last": mean("response_length", last),
        },
        "outcomes": {
            f"{name}{when}": "".join(map(str, row[f"{name}_right"]))
            for when, row in (("_before", before), ("", after))
            for name in ("greedy", "sampled")
        },
    }
