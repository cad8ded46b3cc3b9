"""The parts of a training job: the record `Job`, and `build_job`, the one place that knows every part.

`build_job` builds the parts in order. Most of them have a function in `job_parts/` that reads their options.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from megatron_simct.alignment import report_notes
from megatron_simct.config.flags import to_dict
from megatron_simct.config.options import Config, InterfaceConfig
from megatron_simct.data.prompts import PromptSource
from megatron_simct.evaluation.environment import Environment
from megatron_simct.job_parts.engines import (
    build_engine,
    build_environment,
    build_vllm_engine,
    with_turns,
)
from megatron_simct.job_parts.grading import build_evaluator, build_rewarding
from megatron_simct.job_parts.labels import (
    build_alignment,
    build_cut,
    build_entries,
    build_packing,
    build_placements,
)
from megatron_simct.job_parts.prompts import (
    build_given_rows,
    build_oversampling,
    build_prompts,
    read_training_rows,
    with_prompt_date,
)
from megatron_simct.job_parts.reports import build_measure, build_sample_log, build_timers, keep_batch
from megatron_simct.job_parts.student import (
    build_following,
    build_reference,
    check_experts,
    check_update,
    identity,
    load_student,
    resume,
)
from megatron_simct.loading import build_byte_order, open_pair
from megatron_simct.losses import check_comparisons, comparisons
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.node import Node
from megatron_simct.records import AlignedPair, MicroBatch, Prompt, Rollout, ScoredPair
from megatron_simct.reporting.monitor import Monitor
from megatron_simct.reporting.profiling import Profiler
from megatron_simct.reporting.writers import check_writers, open_writers
from megatron_simct.rewarding import Rewarding
from megatron_simct.rollout.engine import RolloutEngine, Sampling, SharedEngine
from megatron_simct.rollout.given_rows import GivenRows
from megatron_simct.rollout.held_out import Evaluator
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.rollout.oversampling import Oversampling
from megatron_simct.rollout.vllm_engine import VllmEngine
from megatron_simct.stopping import ExitWatch
from megatron_simct.teacher.build import build_teachers
from megatron_simct.teacher.reference import Reference
from megatron_simct.teacher.routing import RoutedScorer, count_missing
from megatron_simct.teacher.scorer import TeacherScorer
from megatron_simct.update.checkpoint import Checkpoints
from megatron_simct.update.optimizer import build_optimizer, gather_weights, wrap_data_parallel
from megatron_simct.update.step import StepReport, Updater


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of one rank's training: one for each hop, and the writers of its files."""

    config: Config
    prompts: PromptSource
    oversampling: Oversampling | None
    """With --rollout-oversample: decides which prompts a step begins and which responses it takes."""
    engine: RolloutEngine
    sampling: Sampling
    align: Callable[[Prompt, Rollout], AlignedPair]
    teacher: TeacherScorer
    background: ThreadPoolExecutor
    """One background thread, which aligns sampled responses and sends them to the teacher."""
    rewarding: Rewarding | None
    """None without --reward."""
    environment: Environment | None
    """What answers responses; None without --environment, and on ranks that do not ask."""
    given: GivenRows | None
    """None without --given-share."""
    reference: Reference | None
    """None without --reference-kl-weight."""
    pack: Callable[..., list[MicroBatch]]
    updater: Updater
    count_missing: Callable[[Sequence[ScoredPair]], dict[str, float]] | None
    """With --missing-teacher drop: metrics of the pairs without a score; collective over the job."""
    teacher_follows: Callable[[], None]
    """After an update: --teacher-ema averages the student's weights into the teacher's."""
    monitor: Monitor
    log_samples: Callable[[int, Sequence[Rollout], Sequence[AlignedPair], StepReport], None]
    """Writes some responses of a step with their units and losses to samples.jsonl, if they are due."""
    evaluator: Evaluator | None
    start: int
    """The iteration that training goes on from; 0 unless it resumes."""
    save: Callable[[int], None]
    """Writes the checkpoint of an iteration, or starts to write it."""
    finish_save: Callable[..., None]
    """Completes the checkpoint that is being written; with wait=False, only if all its files are written."""
    keep_batch: Callable[[Sequence[Rollout], int], str | None]
    """Writes the rollouts of a failed step, and returns their folder."""
    exit_watch: ExitWatch
    profiler: Profiler
    measure: Callable[..., dict[str, float]]
    """Metrics of a step that are about all ranks, from its prompts, its rollouts and the seconds of this one;
    given: prompts and responses that were not sampled. Collective over the job."""
    timers: Callable[[int], str]
    """The times of Megatron's timers for an iteration, if a log line is due; collective over the job."""

    def before_step(self, iteration: int) -> None:
        """Work at the start of each step, such as garbage collection."""
        self.profiler.step(iteration)
        update = self.config.update
        if update.manual_gc and iteration % update.manual_gc_interval == 0:
            gc.collect()

    def after_update(self, iteration: int) -> None:
        """Work that follows the update of a step: a teacher that follows the student, and the responses that
        no later step continues."""
        self.teacher_follows()
        if self.oversampling is not None:
            self.oversampling.trained(iteration)


def build_job(config: Config, groups: Groups) -> Job:
    """Build every part from its group of options. Raises ValueError, naming the flag, if the
    configuration is invalid."""
    config.check(data_parallel_size=groups.dp_size)
    config = with_prompt_date(config)
    check_comparisons(config)
    check_writers(config.output)
    exit_watch = ExitWatch(
        on_signal=config.output.exit_signal_handler,
        after_minutes=config.output.exit_duration_in_mins,
        device=groups.device,
    )
    check_experts(config)
    check_update(config, groups)
    node = Node.of_this_rank()
    pair = open_pair(
        config,
        say=partial(print, flush=True) if groups.is_first_rank else lambda line: None,
        divide=node.divided,
    )
    student = pair.student
    if groups.is_first_rank:
        report_notes(student, *(teacher.tokenizer for teacher in pair.teachers))

    rows = read_training_rows(config)
    prompts = build_prompts(config, groups, pair, rows, divide=node.divided)
    oversampling = build_oversampling(config, groups, prompts)
    model = load_student(config, groups, student)
    placements = build_placements(config, model, pair)
    teacher_cut = build_cut(
        config,
        groups,
        context_parallel_size=config.teacher_context_parallel_size,
        agrees=not config.names_teachers,
    )
    teaching = build_teachers(config, groups, pair, placements, teacher_cut, model)
    reference = build_reference(config, groups, student)
    chunks = wrap_data_parallel(model, config.parallel, config.update)
    optimizer, scheduler = build_optimizer(chunks, config.training, config.update)
    timers = build_timers(config, chunks, optimizer)
    if config.update.manual_gc:
        gc.disable()
        gc.collect()
    checkpoints = Checkpoints(
        model,
        optimizer,
        scheduler,
        dp=groups.dp_cp,
        writes_in_parallel=config.output.ckpt_fully_parallel_save,
        reads_in_parallel=config.output.ckpt_fully_parallel_load,
        in_background=config.output.async_save,
        before_reading_weights=partial(gather_weights, chunks),
        save_dir=config.output.save,
        retain=config.output.save_retain,
        identity=identity(config, pair),
        config=to_dict(config),
        average=teaching.average,
        carried_over=oversampling,
    )
    start = resume(config, groups, checkpoints)
    monitor = Monitor(
        groups,
        run_dir=config.output.run_dir,
        train_iters=config.training.train_iters,
        log_interval=config.output.log_interval,
        batch_size=config.global_batch_size,
        sampled=config.samples,
        start=start,
        teachers=list(pair.by_name) if config.routes_rows else [],
        writers=open_writers(config.output, to_dict(config), start=start) if groups.is_first_rank else (),
    )
    sampler: RolloutEngine = MegatronEngine(
        model,
        groups,
        vocab_size=student.table.num_ids,
        stop_ids=student.table.stop_ids,
        batch_size=config.rollout.rollout_engine_batch_size,
        progress=monitor.responses,
        before_reading_weights=partial(gather_weights, chunks),
    )
    if config.rollout.rollout_engine == "vllm":
        if groups.cp_size > 1:
            raise ValueError(
                f"--context-parallel-size {groups.cp_size}: not with --rollout-engine vllm in this version; "
                "leave one of them out"
            )
        source: RolloutEngine = build_vllm_engine(
            config, groups, model, student, before_reading_weights=partial(gather_weights, chunks)
        )
    else:
        if groups.cp_size > 1:
            sampler = SharedEngine(sampler, groups.cp)
        source = sampler
    environment = build_environment(config, groups)
    engine = build_engine(
        config, groups, with_turns(config, groups, pair, source, environment, scored=True), student
    )
    engine.publish(start)
    sampling = Sampling(
        temperature=config.rollout.rollout_temperature,
        top_p=config.rollout.rollout_top_p,
        top_k=config.rollout.rollout_top_k,
        max_response_len=config.rollout.rollout_max_response_len,
        seed=config.training.seed,
    )
    return Job(
        config=config,
        prompts=prompts,
        oversampling=oversampling,
        engine=engine,
        sampling=sampling,
        align=build_alignment(config, pair),
        teacher=teaching.scorer,
        background=ThreadPoolExecutor(max_workers=1, thread_name_prefix="alignment"),
        rewarding=build_rewarding(config, groups, student),
        environment=environment,
        given=build_given_rows(
            config,
            groups,
            student,
            rows,
            sampling=sampling,
            pack=build_packing(config, groups, placements, interfaces={"": InterfaceConfig(interface="sft")}),
            divide=node.divided,
        ),
        reference=reference,
        pack=build_packing(
            config, groups, placements, interfaces=comparisons(config), entries=build_entries(pair)
        ),
        updater=Updater(
            chunks,
            optimizer,
            scheduler,
            groups,
            teachers=teaching.heads,
            byte_order=(
                build_byte_order(model, groups, student)
                if any(teacher.needs.byte_events for teacher in pair.teachers)
                else None
            ),
            gradient_parts_interval=config.output.gradient_parts_interval,
            importance_cap=config.rollout.rollout_importance_weights,
            check_sampling=(
                source.check_step
                if isinstance(source, VllmEngine)
                and not config.rollout.load_debug_rollout_data
                and not config.max_lag
                else None
            ),
            reference=reference,
            may_miss=config.routing.missing_teacher == "drop",
        ),
        count_missing=(
            partial(count_missing, teaching.scorer, group=groups.dp)
            if config.routing.missing_teacher == "drop" and isinstance(teaching.scorer, RoutedScorer)
            else None
        ),
        teacher_follows=build_following(
            teaching.average, before_reading_weights=partial(gather_weights, chunks)
        ),
        monitor=monitor,
        log_samples=build_sample_log(config, groups, pair, start=start),
        evaluator=build_evaluator(
            config,
            groups,
            with_turns(config, groups, pair, source, environment, scored=False),
            student,
            divide=node.divided,
        ),
        start=start,
        save=checkpoints.save,
        finish_save=checkpoints.finish,
        keep_batch=partial(keep_batch, config, groups),
        exit_watch=exit_watch,
        profiler=Profiler(config.output),
        measure=build_measure(config, groups, model),
        timers=timers,
    )
