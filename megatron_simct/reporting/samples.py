"""RUN_DIR/samples.jsonl: a few responses in the course of a run, cut into units, with the loss of each.

One object a line:

    {"kind": "sample", "iteration": 20, "sample_id": 1216, "finish": "stop", "prompt": "...",
     "units": [{"student": ["ha", "ppy"], "teacher": ["hap", "py"], "loss": 0.41}, ...]}

A unit is a segment, or a student label that is in none (then `teacher` is empty). Its loss, in nats, is what
its labels add to the sum that the step divides once by the global number of labels (LossOutput.label_losses).
With --teachers a sample has the name of its teacher too, under `teacher`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_simct.alignment.tokenizer import Tokenizer, readable
from megatron_simct.records import AlignedPair, Rollout
from megatron_simct.reporting.writers import JsonLines
from megatron_simct.update.step import StepReport

SAMPLES = 2
"""Responses that are kept of a step."""


class SampleLog:
    """Sample log.

    It exists on the one rank that has both the loss and the first samples: last stage, first replica.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        interval: int,
        train_iters: int,
        start: int,
        student: Tokenizer,
        teachers: Mapping[str, Tokenizer],
    ) -> None:
        """interval: steps between records; the first and the last step are kept too. start: see JsonLines.

        teachers: by AlignedPair.teacher; empty without a teacher."""
        self._file = JsonLines(run_dir, start=start, name="samples.jsonl")
        self._interval, self._train_iters = interval, train_iters
        self._student, self._teachers = student, teachers

    def step(
        self, iteration: int, rollouts: Sequence[Rollout], pairs: Sequence[AlignedPair], report: StepReport
    ) -> None:
        """Keep some responses of a finished step where they are due; `iteration` counts from 1."""
        if iteration % self._interval and iteration not in (1, self._train_iters):
            return
        for rollout, pair in list(zip(rollouts, pairs, strict=True))[:SAMPLES]:
            losses = report.label_losses[rollout.sample_id].float().cpu().numpy()
            teacher = self._teachers.get(pair.teacher or "")
            prompt = "" if teacher is None else readable(teacher.decode(pair.teacher_prompt_ids), keep="\n")
            self._file.write(
                "sample",
                iteration,
                {
                    "sample_id": rollout.sample_id,
                    "finish": rollout.finish,
                    **({"teacher": pair.teacher} if pair.teacher else {}),
                    "prompt": prompt,
                    "units": self._units(rollout, pair, losses),
                },
            )

    def _units(self, rollout: Rollout, pair: AlignedPair, losses: np.ndarray) -> list[dict[str, Any]]:
        label_ids = rollout.label_ids
        units, position = [], 0
        for ts, te, ss, se in [
            *pair.segments[np.argsort(pair.segments[:, 2])].tolist(),
            (0, 0, len(label_ids), len(label_ids)),
        ]:
            spans = [(label, label + 1, 0, 0) for label in range(position, ss)] + [(ss, se, ts, te)] * (
                se > ss
            )
            for first, last, first_t, last_t in spans:
                units.append(
                    {
                        "student": _pieces(self._student, label_ids[first:last]),
                        "teacher": _pieces(
                            self._teachers.get(pair.teacher or ""), pair.teacher_ids[first_t:last_t]
                        )
                        if last_t > first_t
                        else [],
                        "loss": float(losses[first:last].sum()),
                    }
                )
            position = se
        return units


def _pieces(tokenizer: Tokenizer | None, ids: np.ndarray) -> list[str]:
    """What each token says; a special one, which says nothing, by its id.

    Without a tokenizer there are no tokens.
    """
    if tokenizer is None:
        return []
    return [readable(tokenizer.table.bytes_of(int(i)), keep="\n") or f"<{int(i)}>" for i in ids]
