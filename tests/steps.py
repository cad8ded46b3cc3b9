"""Training steps of a job, and what each of them reported."""

from __future__ import annotations

from megatron_simct.job import Job
from megatron_simct.train import train
from megatron_simct.update.step import StepReport


def train_and_record(job: Job) -> list[StepReport]:
    """Run the loop to its end; the report of every step."""
    step, reports = job.updater.step, []

    def recording_step(batches):
        reports.append(step(batches))
        return reports[-1]

    job.updater.step = recording_step
    train(job)
    return reports
