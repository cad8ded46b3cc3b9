"""The student job: sample, align, score, update. Start it with torchrun, or directly as one process.

    torchrun --nproc-per-node 2 -m megatron_simct.train --tensor-model-parallel-size 2 ...

`train` is the whole loop; `job.py` builds the parts that it calls.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_simct.config.command_line import command, loading

with loading("megatron_simct.train"):
    from megatron_simct.job import Job, build_job

from megatron_simct.config.flags import parse_config, to_yaml
from megatron_simct.config.options import Config
from megatron_simct.files import write_whole
from megatron_simct.losses import comparisons, known_failure
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.parallel.disk import sole_owner
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.records import AlignedPair, MicroBatch, Prompt, Rollout, ScoredPair
from megatron_simct.reporting.monitor import Stopwatch
from megatron_simct.rollout.engine import RacingEngine, responses
from megatron_simct.teacher.routing import unscored
from megatron_simct.teacher.scorer import TeacherError, without_content
from megatron_simct.update.advantages import Advantages
from megatron_simct.update.step import NonFiniteError


def train(job: Job) -> None:
    """Each iteration: sample, align and ask the teacher (`begin`), collect its scores, update, publish."""
    job.exit_watch.loaded()
    training, output = job.config.training, job.config.output
    iteration, done = job.start, evaluate(job, iteration=job.start)
    ahead = deque[Batch]()
    while iteration < training.train_iters and not done:
        clock = Stopwatch()
        job.before_step(iteration + 1)
        with clock("teacher"), saved_without_teacher(job, iteration):
            for coming in range(
                iteration + len(ahead), min(iteration + training.lag + 1, training.train_iters)
            ):
                ahead.append(begin(job, coming, clock))
            batch = ahead.popleft()
            check_lag(batch.rollouts, iteration, job.config.max_lag)
            batch, scores = collect(job, batch, clock)
        with clock("update"), kept_for_replay(job, batch.all_rollouts, iteration):
            report = job.updater.step(pack(job, batch, scores))
            job.after_update(iteration)
        iteration += 1
        job.engine.publish(iteration)
        job.monitor.step(
            *(iteration, batch.rollouts, batch.pairs, report, clock.seconds, job.teacher.status_text()),
            rewarded={} if scores.rewards is None else scores.rewards.metrics,
            more={
                **batch.more,
                **job.measure(batch.prompts, batch.rollouts, clock.seconds, given=batch.given),
            },
            timers=job.timers(iteration),
        )
        job.log_samples(iteration, batch.rollouts, batch.pairs, report)
        job.finish_save(wait=False)
        done = evaluate(job, iteration=iteration) or exit_is_due(job, iteration=iteration)
        if output.save_interval and iteration % output.save_interval == 0:
            job.save(iteration)
    if output.save:
        job.save(iteration)  # unless the last iteration was saved already
    job.finish_save()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The records of one step, in one order, after its pairs were sent to the teacher."""

    prompts: Sequence[Prompt]
    rollouts: Sequence[Rollout]
    pairs: Sequence[AlignedPair]
    more: Mapping[str, float]
    """Metrics of the sampling."""
    rewards: Mapping[int, Future[float]]
    """Rewards by sample id, on the rank that asks for them; empty without --reward."""
    given: tuple[Sequence[Prompt], Sequence[Rollout]]
    """Rows of the step that come with their response; empty without --given-share."""
    unscored: Sequence[tuple[Prompt, Rollout, AlignedPair]] = ()
    """Rows that add nothing to the step, because their teacher is missing (--missing-teacher drop)."""

    @property
    def all_rollouts(self) -> list[Rollout]:
        """The responses of all rows of the step."""
        return [*self.rollouts, *(rollout for _, rollout, _ in self.unscored)]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the update of a batch compares its responses with."""

    teacher: list[ScoredPair]
    start: Mapping[int, tuple[AlignedPair, ScoredPair]] | None
    """Scores of the student's own start by sample id; None without --reference-kl-weight."""
    rewards: Advantages | None
    """None without --reward."""


def begin(job: Job, iteration: int, clock: Stopwatch) -> Batch:
    """Samples a step's prompts. Responses that are sampled are aligned and sent to the teacher while others
    are still being sampled: one by one or in waves, depending on the engine."""
    prompts: dict[int, Prompt] = {}
    rollouts: dict[int, Rollout] = {}
    sent: list[Future[list[AlignedPair]]] = []
    rewards: dict[int, Future[float]] = {}
    arrived: list[float] = []
    coming = responses_of(job, iteration)
    while True:
        with clock("rollout"):
            both = next(coming, None)
        if both is None:
            break
        asked, sampled = [prompt for prompt, _ in both], [rollout for _, rollout in both]
        prompts |= {one.sample_id: one for one in asked}
        rollouts |= {one.sample_id: one for one in sampled}
        arrived += [time.perf_counter()] * len(sampled)
        if job.rewarding is not None:
            rewards |= job.rewarding.submit(asked, sampled)
        sent.append(job.background.submit(align_and_submit, job, asked, sampled))
    with clock("alignment"):
        pairs = {pair.sample_id: pair for some in sent for pair in some.result()}
    more = {"seconds_rollout_tail": tail_s(arrived)} if job.config.rollout.rollout_engine == "vllm" else {}
    if job.oversampling is not None:
        more |= job.oversampling.metrics
    order = sorted(prompts)
    return Batch(
        prompts=[prompts[sample_id] for sample_id in order],
        rollouts=[rollouts[sample_id] for sample_id in order],
        pairs=[pairs[sample_id] for sample_id in order],
        more=more,
        rewards=rewards,
        given=([], []) if job.given is None else job.given.batch(iteration),
    )


def collect(job: Job, batch: Batch, clock: Stopwatch) -> tuple[Batch, Scores]:
    """Waits for the teacher's scores of a batch, and for its rewards if the run has any. The batch is that of
    the rows that have scores."""
    teacher = list(job.teacher.collect(batch.pairs))
    start = None if job.reference is None else job.reference.score(batch.prompts, batch.rollouts)
    rewards = None
    if job.rewarding is not None:
        with clock("reward"):
            rewards = job.rewarding.collect(batch.rollouts, batch.rewards)
    return with_scores(job, batch, teacher), Scores(teacher=teacher, start=start, rewards=rewards)


def with_scores(job: Job, batch: Batch, scored: Sequence[ScoredPair]) -> Batch:
    """The batch without the rows whose teacher is missing, which are counted."""
    if job.count_missing is None:
        return batch
    missing = job.count_missing(scored)
    found = {one.sample_id for one in scored}
    rows = list(zip(batch.prompts, batch.rollouts, batch.pairs, strict=True))
    kept = [row for row in rows if row[0].sample_id in found]
    return replace(
        batch,
        prompts=[prompt for prompt, _, _ in kept],
        rollouts=[rollout for _, rollout, _ in kept],
        pairs=[pair for _, _, pair in kept],
        more={**batch.more, **missing},
        unscored=[(*row[:2], unscored(row[2])) for row in rows if row[0].sample_id not in found],
    )


def pack(job: Job, batch: Batch, scores: Scores) -> list[MicroBatch]:
    """The micro-batches of a step; those of given rows come last."""
    micro_batches = job.pack(
        [*batch.prompts, *(prompt for prompt, _, _ in batch.unscored)],
        [*batch.rollouts, *(rollout for _, rollout, _ in batch.unscored)],
        [*batch.pairs, *(pair for _, _, pair in batch.unscored)],
        [*scores.teacher, *(without_content(pair.sample_id) for _, _, pair in batch.unscored)],
        advantages=None if scores.rewards is None else scores.rewards.of_samples,
        reference=scores.start,
    )
    if job.given is None:
        return micro_batches
    return micro_batches + job.given.micro_batches(*batch.given, sampled=batch.rollouts)


def responses_of(job: Job, iteration: int) -> Iterator[list[tuple[Prompt, Rollout]]]:
    """A step's prompts with their responses, as they finish or in waves."""
    if job.oversampling is not None:
        assert isinstance(job.engine, RacingEngine), "check() refuses --rollout-oversample for others"
        yield from job.oversampling.step(job.engine, iteration, job.sampling)
        return
    prompts = job.prompts.batch(iteration)
    size = job.config.rollout.rollout_wave_size or len(prompts)
    of = {prompt.sample_id: prompt for prompt in prompts}
    for start in range(0, len(prompts), size):
        for some in responses(job.engine, prompts[start : start + size], job.sampling):
            yield [(of[one.sample_id], one) for one in some]


def tail_s(arrived: Sequence[float]) -> float:
    """Seconds between the arrival of nine tenths of the responses and of the last. arrived: arrival times,
    ascending.
    """
    return arrived[-1] - arrived[math.ceil(0.9 * len(arrived)) - 1]


def align_and_submit(job: Job, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[AlignedPair]:
    """The pairs of some responses, aligned in the background; each is sent to the teacher as soon as it is
    aligned.
    """
    pairs = []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        pair = job.align(prompt, rollout)
        job.teacher.submit([pair])
        pairs.append(pair)
    return pairs


def check_lag(rollouts: Sequence[Rollout], iteration: int, most: int | None) -> None:
    """Raises ValueError if a response was sampled by weights that are too old."""
    oldest = min((rollout for rollout in rollouts), key=lambda rollout: rollout.weight_version, default=None)
    if most is None or oldest is None or oldest.weight_version < 0:  # -1: a given response
        return
    if iteration - oldest.weight_version > most:
        raise ValueError(
            f"--rollout-max-lag {most}: sample {oldest.sample_id} was sampled by weights after "
            f"{oldest.weight_version} steps, but the student has done {iteration}; raise it to allow older "
            "weights"
        )


def evaluate(job: Job, *, iteration: int) -> bool:
    """Measures held-out accuracy if it is due; returns whether it has reached --exit-eval-accuracy."""
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
    """Whether to save and exit before --train-iters, because of a signal or the time limit; the same on all
    ranks.
    """
    reason = job.exit_watch.reason()
    if reason is not None:
        job.monitor.say(f" {reason}: saving and exiting after iteration {iteration}")
    return reason is not None


@contextlib.contextmanager
def saved_without_teacher(job: Job, iteration: int) -> Iterator[None]:
    """Saves a checkpoint if the teacher's job does not come back."""
    try:
        yield
    except TeacherError as error:
        saved = ""
        if job.config.output.save:
            job.save(iteration)
            job.finish_save()
            saved = f"; saved after iteration {iteration}: --load {job.config.output.save}"
        raise TeacherError(f"{error}{saved}") from None


@contextlib.contextmanager
def kept_for_replay(job: Job, rollouts: Sequence[Rollout], iteration: int) -> Iterator[None]:
    """Writes the rollouts of a step whose update finds a number that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        job.finish_save()
        folder = job.keep_batch(rollouts, iteration)
        replay = "--load-debug-rollout-data " if job.oversampling is None else ""
        kept = f"; the step's rollouts are kept: {replay}{folder}" if folder is not None else ""
        raise NonFiniteError(f"{error}{kept}") from None


@command("megatron_simct.train", also=(NonFiniteError, TeacherError))
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(argv)
    with process_groups(
        config.parallel,
        seed=config.training.seed,
        bf16=config.training.bf16,
        deterministic=config.update.deterministic_mode,
    ) as groups:
        config.check(data_parallel_size=groups.dp_size)
        with sole_owner({"--save": config.output.save, "--run-dir": config.output.run_dir}):
            job = build_job(config, groups)
            write_config(job.config, groups)
            report_random_weights(config, groups, resumed=job.start > 0)
            report_interface(config, groups)
            report_precision(config, groups)
            with contextlib.ExitStack() as parts:
                for part in (job.monitor, job.profiler, job.rewarding, job.environment):
                    if part is not None:
                        parts.callback(part.close)
                train(job)


def report_random_weights(config: Config, groups: Groups, *, resumed: bool) -> None:
    """Logs a line if a model starts from random weights."""
    sides = {} if resumed else {"--hf-checkpoint": config.model}
    if config.needs_teacher:
        sides |= {f"--{teacher.prefix}hf-checkpoint": teacher.model for teacher in config.teachers}
    random = [
        f"{flag} {options.hf_checkpoint}"
        for flag, options in sides.items()
        if options.pretrained_checkpoint is None and find_weights(options.folder, flag=flag) is None
    ]
    if random and groups.is_first_rank:
        print(f" random weights: {', '.join(random)}", flush=True)


def report_interface(config: Config, groups: Groups) -> None:
    """Logs the interface and its known failure; those of the teachers, if they differ."""
    if not groups.is_first_rank:
        return
    of_teachers = comparisons(config)
    if len(config.interface_names) == 1:
        of_teachers = {"": next(iter(of_teachers.values()))}
    for name, interface in of_teachers.items():
        failure = known_failure(interface)
        known = f"; known failure: {failure}" if failure else ""
        print(f" interface {f'of {name}: ' if name else ''}{interface.interface}{known}", flush=True)


def report_precision(config: Config, groups: Groups) -> None:
    """Logs a line for float32 on a GPU."""
    if groups.is_first_rank and groups.device.type == "cuda" and not config.training.bf16:
        print(" float32 on GPUs: twice the memory, a fraction of the speed; use --bf16", flush=True)


def write_config(config: Config, groups: Groups) -> None:
    """Writes the resolved options into the folder of the metrics."""
    if config.output.run_dir is not None and groups.is_first_rank:
        write_whole(Path(config.output.run_dir) / "config.yaml", to_yaml(config))


if __name__ == "__main__":
    sys.exit(main())
