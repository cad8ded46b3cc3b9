"""Training steps of a job and their reports; a teacher's scores of pairs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_simct.job import Job
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.scorer import TeacherScorer
from megatron_simct.train import train
from megatron_simct.update.step import StepReport


def scores_of(teacher: TeacherScorer, pairs: Sequence[AlignedPair]) -> list[ScoredPair]:
    """The teacher's scores of these pairs."""
    teacher.submit(pairs)
    return list(teacher.collect(pairs))


def train_and_record(job: Job) -> list[StepReport]:
    """Run the loop to its end; the report of every step."""
    step, reports = job.updater.step, []

    def recording_step(batches) -> StepReport:
        reports.append(step(batches))
        return reports[-1]

    job.updater.step = recording_step
    train(job)
    return reports
