"""The student job: sample, align, score, update. Start it with torchrun, or directly as one process.

    torchrun --nproc-per-node 2 -m megatron_simct.train --tensor-model-parallel-size 2 ...

`train` is the whole loop; `job.py` builds the parts that it calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from megatron_simct.command_line import command  # isort: skip  (before what takes seconds to load)
from megatron_simct.arguments import parse_config, to_yaml
from megatron_simct.config import Config
from megatron_simct.files import write_whole
from megatron_simct.job import Job, build_job
from megatron_simct.losses import known_failure
from megatron_simct.models.hf_load import find_weights
from megatron_simct.monitoring import Stopwatch
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.records import AlignedPair, Prompt, Rollout, ScoredPair
from megatron_simct.teacher.scorer import TeacherError
from megatron_simct.update.step import NonFiniteError


def train(job: Job) -> None:
    """Roll out, align, score, update, publish; once an iteration."""
    job.exit_watch.loaded()
    training, output = job.config.training, job.config.output
    iteration, done = job.start, evaluate(job, iteration=job.start)
    ahead = deque[Batch]()
    while iteration < training.train_iters and not done:
        clock = Stopwatch()
        with clock("teacher"), saved_without_teacher(job, iteration):
            for coming in range(iteration + len(ahead), min(iteration + training.lag + 1, training.train_iters)):
                ahead.append(begin(job, coming, clock))
            batch = ahead.popleft()
            scored = list(batch.scores)
        with clock("update"), kept_for_replay(job, batch.rollouts, iteration):
            report = job.updater.step(job.pack(batch.prompts, batch.rollouts, batch.pairs, scored))
        iteration += 1
        job.engine.publish(iteration)
        job.monitor.step(iteration, batch.rollouts, batch.pairs, report, clock.seconds, job.teacher.note())
        job.log_samples(iteration, batch.rollouts, batch.pairs, report)
        done = evaluate(job, iteration=iteration) or exit_is_due(job, iteration=iteration)
        if output.save_interval and iteration % output.save_interval == 0:
            job.save(iteration)
    if output.save:
        job.save(iteration)  # unless it has just been saved


Wave = list[tuple[Prompt, Rollout]]


@dataclass(kw_only=True)
class Batch:
    """The records of one step on their way."""

    prompts: Sequence[Prompt]
    rollouts: list[Rollout] = field(default_factory=list)
    pairs: list[AlignedPair] = field(default_factory=list)
    scores: Iterator[ScoredPair] = iter(())


def begin(job: Job, iteration: int, clock: Stopwatch) -> Batch:
    """Send the prompts of a step on their way: a wave is aligned and goes to the teacher while the next is sampled."""
    batch, finished = Batch(prompts=job.prompts.batch(iteration)), SimpleQueue[Wave | None]()
    size = job.config.rollout.rollout_wave_size or len(batch.prompts)
    try:
        sending = job.background.submit(job.teacher.score, aligned(job, batch, finished))
        for start in range(0, len(batch.prompts), size):
            wave = batch.prompts[start : start + size]
            with clock("rollout"):
                rollouts = job.engine.generate(wave, job.sampling)
            batch.rollouts += rollouts
            finished.put(list(zip(wave, rollouts, strict=True)))
    finally:
        finished.put(None)  # after a Ctrl-C too: the thread would wait for waves, and the process for the thread
    with clock("alignment"):
        batch.scores = sending.result()
    return batch


def aligned(job: Job, batch: Batch, finished: SimpleQueue[Wave | None]) -> Iterator[AlignedPair]:
    """The pairs of the waves, in the background; they are kept in the batch."""
    while (wave := finished.get()) is not None:
        for prompt, rollout in wave:
            batch.pairs.append(job.align(prompt, rollout))
            yield batch.pairs[-1]


def evaluate(job: Job, *, iteration: int) -> bool:
    """Measure held-out accuracy where it is due; whether it has reached --exit-eval-accuracy."""
    config = job.config.evaluation
    interval = config.eval_interval or job.config.training.train_iters
    if job.evaluator is None or (iteration % interval and iteration != job.config.training.train_iters):
        return False
    accuracy = job.evaluator.measure()
    job.monitor.evaluation(iteration, accuracy)
    greedy = accuracy["greedy_accuracy"]
    assert isinstance(greedy, float), "an accuracy is one number"
    return config.exit_eval_accuracy is not None and greedy >= config.exit_eval_accuracy


def exit_is_due(job: Job, *, iteration: int) -> bool:
    """Whether to save and exit before --train-iters, on a signal or because time is over; agreed by all ranks."""
    reason = job.exit_watch.reason()
    if reason is not None:
        job.monitor.say(f" {reason}: saving and exiting after iteration {iteration}")
    return reason is not None


@contextlib.contextmanager
def saved_without_teacher(job: Job, iteration: int) -> Iterator[None]:
    """Where the teacher's job is gone for good, save what has been trained."""
    try:
        yield
    except TeacherError as error:
        saved = ""
        if job.config.output.save:
            job.save(iteration)
            saved = f"; saved after iteration {iteration}: --load {job.config.output.save}"
        raise TeacherError(f"{error}{saved}") from None


@contextlib.contextmanager
def kept_for_replay(job: Job, rollouts: Sequence[Rollout], iteration: int) -> Iterator[None]:
    """Where the update finds a number that is not finite, keep the rollouts that led to it."""
    try:
        yield
    except NonFiniteError as error:
        folder = job.keep_batch(rollouts, iteration)
        kept = f"; the step's rollouts are kept: --load-debug-rollout-data {folder}" if folder is not None else ""
        raise NonFiniteError(f"{error}{kept}") from None


@command("megatron_simct.train", also=(NonFiniteError, TeacherError))
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(argv)
    with process_groups(config.parallel, seed=config.training.seed) as groups:
        job = build_job(config, groups)
        write_config(config, groups)
        report_random_weights(config, groups, resumed=job.start > 0)
        report_interface(config, groups)
        with contextlib.closing(job.monitor):
            train(job)


def report_random_weights(config: Config, groups: Groups, *, resumed: bool) -> None:
    """One log line where a model starts from random weights."""
    sides = {"--hf-checkpoint": config.model, "--teacher-hf-checkpoint": config.teacher}
    if resumed:
        del sides["--hf-checkpoint"]
    if config.interface.interface == "sft":
        del sides["--teacher-hf-checkpoint"]
    random = [
        f"{flag} {options.hf_checkpoint}"
        for flag, options in sides.items()
        if options.pretrained_checkpoint is None and find_weights(options.folder, flag=flag) is None
    ]
    if random and groups.is_first_rank:
        print(f" random weights: {', '.join(random)}", flush=True)


def report_interface(config: Config, groups: Groups) -> None:
    """One log line: which interface runs, and when it is known to harm."""
    failure = known_failure(config.interface)
    if groups.is_first_rank:
        known = f"; known failure: {failure}" if failure else ""
        print(f" interface {config.interface.interface}{known}", flush=True)


def write_config(config: Config, groups: Groups) -> None:
    """The resolved options, beside the metrics."""
    if config.output.run_dir is not None and groups.is_first_rank:
        write_whole(Path(config.output.run_dir) / "config.yaml", to_yaml(config))


if __name__ == "__main__":
    sys.exit(main())
