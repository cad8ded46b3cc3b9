"""Stages of part e: other problems, a second teacher with the student's tokenizer, training on answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.experiments.problems import write_problems
from examples.quickstart.run import ARCHITECTURE, INITIALIZER_RANGE, Recipe
from examples.stages import Stage

SAME = "same-tokenizer-teacher"


class Arms(Recipe):
    """One pair of tokenizers. Training of teachers and warm-up stop on the validation problems."""

    def __init__(self, options: argparse.Namespace, folder: Path, words: str, teacher_iters: int) -> None:
        """`words`: a key of problems.WORDS. `teacher_iters`: most steps of a teacher's training."""
        training, validation, self._judged = write_problems(folder, words)
        super().__init__(options, folder, problems=(training, validation), teacher_iters=teacher_iters)
        self._sides[SAME] = self._sides["student"]
        self._write_architecture(SAME, self._sides[SAME], INITIALIZER_RANGE["teacher"], ARCHITECTURE)
        self.same = self._teacher(SAME)

    @property
    def warm_start(self) -> list[Stage]:
        """The models of all arms, and the teacher's answers for `sft`."""
        return [*super().warm_start, *self.same.needs, self.same, self.sample, self.select]

    def distil(self, interface: str, name: str, *flags: str) -> Stage:
        """One arm. It is judged by validation and held-out problems, before and after."""
        flags = (*flags, "--eval-prompt-data", str(self._judged))
        if interface != "sft":
            return self._distil(interface, name, self.same if interface == "kd" else self.teacher, *flags)
        start = (*self._model("student"), "--pretrained-checkpoint", self._checkpoint("student"))
        chosen = ("--simct-interface", "sft", "--lr-decay-style", "constant")
        return self._stage(
            *("sft on the teacher's answers", name, self.select.output, 32, [*start, *chosen, *flags]),
            needs=(self.select, self.student),
        )
