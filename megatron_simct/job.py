"""The parts of a training job, and how they are built. The one place that knows every part.

`build_job` first, then one function a part, each reading its own group of options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from megatron_simct.alignment import AlignmentMap, Tokenizer, VocabPlacement
from megatron_simct.alignment.plan import plan_mixture, plan_pair, plan_without_teacher
from megatron_simct.arguments import to_dict
from megatron_simct.config import Config
from megatron_simct.data.prompts import PromptSource, read_prompts
from megatron_simct.evaluation.benchmarks import CODE, Problem
from megatron_simct.evaluation.grading import Graders
from megatron_simct.evaluation.sandbox import Limits, check_sandbox
from megatron_simct.loading import (
    build_byte_order,
    load_model,
    open_alignment_map,
    open_chat_template,
    open_held_out,
    open_tokenizer,
)
from megatron_simct.losses import check_config, check_labels, teacher_needs
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import read_architecture
from megatron_simct.monitoring import Monitor
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.packing import pack_micro_batches
from megatron_simct.records import AlignedPair, LabelBatch, MicroBatch, Prompt, Rollout, TeacherNeeds
from megatron_simct.rollout.engine import GivenResponses, ReplayEngine, RolloutEngine, Sampling, write_rollouts
from megatron_simct.rollout.held_out import Evaluator, equals_label, response_text
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.samples import SampleLog
from megatron_simct.stopping import ExitWatch
from megatron_simct.teacher.build import build_mixture, build_teacher, teacher_logit_softcap
from megatron_simct.teacher.scorer import TeacherScorer
from megatron_simct.update.checkpoint import Checkpoints, has_checkpoint
from megatron_simct.update.optimizer import build_optimizer, wrap_data_parallel
from megatron_simct.update.step import StepReport, Updater
from megatron_simct.writers import check_writers, open_writers

EVAL_WORKERS = 4
"""Responses to a benchmark that one rank of each model replica grades at a time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of one rank's training: one for each hop, and what a run leaves behind."""

    config: Config
    prompts: PromptSource
    engine: RolloutEngine
    sampling: Sampling
    align: Callable[[Prompt, Rollout], AlignedPair]
    teacher: TeacherScorer
    background: ThreadPoolExecutor
    """One thread beside the one that trains: it aligns what has been sampled, and hands it to the teacher."""
    pack: Callable[..., list[MicroBatch]]
    updater: Updater
    monitor: Monitor
    log_samples: Callable[[int, Sequence[Rollout], Sequence[AlignedPair], StepReport], None]
    """Keeps a few responses of a step with their units and losses, where they are due."""
    evaluator: Evaluator | None
    start: int
    """The iteration that training goes on from; 0 unless it resumes."""
    save: Callable[[int], None]
    keep_batch: Callable[[Sequence[Rollout], int], str | None]
    """Keeps the rollouts of a step that failed; where."""
    exit_watch: ExitWatch


def build_job(config: Config, groups: Groups) -> Job:
    """Build every part from its group of options. ValueError, naming the flag, for whatever cannot work."""
    config.check(data_parallel_size=groups.dp_size)
    check_config(config.interface)
    check_writers(config.output)
    exit_watch = ExitWatch(
        on_signal=config.output.exit_signal_handler,
        after_minutes=config.output.exit_duration_in_mins,
        device=groups.device,
    )
    needs = teacher_needs(config.interface)
    check_experts(config, needs)
    student = open_tokenizer(config.model, prefix="")
    teacher = open_tokenizer(config.teacher, prefix="teacher-") if needs.teacher else None
    needs_map = not needs.byte_events or config.data.simct_alignment_map is not None
    alignment_map = open_alignment_map(config, student, teacher) if teacher is not None and needs_map else None
    second = open_tokenizer(config.second_teacher, prefix="second-teacher-") if config.mixes_teachers else None

    prompts = build_prompts(config, groups, student, teacher, second)
    model = load_model(config, config.model, groups, student, prefix="")
    placement = build_placement(config, model, student, alignment_map)
    scorer, shared_head = build_teacher(config, groups, student, teacher, alignment_map, placement, needs)
    if second is not None:
        scorer = build_mixture(config, groups, scorer, student, second)
    chunks = wrap_data_parallel(model, config.parallel)
    optimizer, scheduler = build_optimizer(chunks, config.training)
    checkpoints = Checkpoints(
        model,
        optimizer,
        scheduler,
        save_dir=config.output.save,
        retain=config.output.save_retain,
        identity=identity(config, student, teacher, alignment_map, second),
        config=to_dict(config),
    )
    start = resume(config, groups, checkpoints)
    monitor = Monitor(
        groups,
        run_dir=config.output.run_dir,
        train_iters=config.training.train_iters,
        log_interval=config.output.log_interval,
        batch_size=config.global_batch_size,
        sampled=config.interface.interface != "sft",
        start=start,
        writers=open_writers(config.output, to_dict(config), start=start) if groups.is_first_rank else (),
    )
    sampler = MegatronEngine(
        model,
        groups,
        vocab_size=student.table.num_ids,
        stop_ids=student.table.stop_ids,
        batch_size=config.rollout.rollout_engine_batch_size,
        progress=monitor.responses,
    )
    engine = build_engine(config, groups, sampler, student)
    engine.publish(start)
    return Job(
        config=config,
        prompts=prompts,
        engine=engine,
        sampling=Sampling(
            temperature=config.rollout.rollout_temperature,
            top_p=config.rollout.rollout_top_p,
            top_k=config.rollout.rollout_top_k,
            max_response_len=config.rollout.rollout_max_response_len,
            seed=config.training.seed,
        ),
        align=build_alignment(config, student, teacher, second, alignment_map, needs),
        teacher=scorer,
        background=ThreadPoolExecutor(max_workers=1, thread_name_prefix="alignment"),
        pack=partial(
            pack_micro_batches,
            micro_batch_size=config.training.micro_batch_size,
            check=(
                partial(check_labels, placement=placement, config=config.interface)
                if groups.is_last_stage
                else _leave_to_last_stage
            ),
            multiple_of=groups.tp_size if config.parallel.sequence_parallel else 1,
        ),
        updater=Updater(
            chunks,
            optimizer,
            scheduler,
            groups,
            shared_head=shared_head,
            placement=placement,
            interface=config.interface,
            byte_order=build_byte_order(model, groups, student) if needs.byte_events else None,
            teacher_logit_softcap=None if teacher is None else teacher_logit_softcap(config),
        ),
        monitor=monitor,
        log_samples=build_sample_log(config, groups, student, teacher, start=start),
        evaluator=build_evaluator(config, groups, sampler, student),
        start=start,
        save=checkpoints.save,
        keep_batch=partial(keep_batch, config, groups),
        exit_watch=exit_watch,
    )


def check_experts(config: Config, needs: TeacherNeeds) -> None:
    """ValueError where --expert-model-parallel-size is given and neither model has experts."""
    sides = [(config.model.folder, "--hf-checkpoint")]
    if needs.teacher:
        sides.append((config.teacher.folder, "--teacher-hf-checkpoint"))
    ep = config.parallel.expert_model_parallel_size
    if ep > 1 and not any(read_architecture(folder, flag=flag).num_experts for folder, flag in sides):
        folders = " and ".join(f"{flag} {folder}" for folder, flag in sides)
        raise ValueError(f"--expert-model-parallel-size {ep}: no experts in {folders}; leave it out")


def identity(
    config: Config,
    student: Tokenizer,
    teacher: Tokenizer | None,
    alignment_map: AlignmentMap | None,
    second: Tokenizer | None,
) -> dict[str, object]:
    """What a checkpoint must share with this run to be resumed by it."""
    return {
        "model": json.loads(json.dumps(asdict(read_architecture(config.model.folder, flag="--hf-checkpoint")))),
        "tokenizer": student.table.fingerprint,
        "teacher_tokenizer": teacher.table.fingerprint if teacher is not None else None,
        "alignment_map": alignment_map.fingerprint if alignment_map is not None else None,
    } | ({"second_teacher_tokenizer": second.table.fingerprint} if second is not None else {})


def resume(config: Config, groups: Groups, checkpoints: Checkpoints) -> int:
    """The iteration to go on from: that of --load, or 0. Says which, and which options have changed since."""
    output = config.output
    if output.load is None:
        return 0
    same = output.save is not None and Path(output.load).resolve() == Path(output.save).resolve()
    if same and not has_checkpoint(output.load):
        start, line = 0, f" --load {output.load}: no checkpoint there yet, starting afresh"
    else:
        start, changed = checkpoints.resume(output.load)
        line = f" resuming {output.load} after iteration {start}"
        if changed:
            line += "; changed: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    if groups.is_first_rank:
        print(line, flush=True)
    return start


def build_sample_log(
    config: Config, groups: Groups, student: Tokenizer, teacher: Tokenizer | None, *, start: int
) -> Callable[[int, Sequence[Rollout], Sequence[AlignedPair], StepReport], None]:
    """That of the rank which has both the loss and the first samples; nothing on the others."""
    output = config.output
    if output.run_dir is None or not groups.meets_teacher or groups.dp_rank > 0:
        return lambda *_: None
    return SampleLog(
        output.run_dir,
        interval=output.sample_interval,
        train_iters=config.training.train_iters,
        start=start,
        student=student,
        teacher=teacher,
    ).step


def keep_batch(config: Config, groups: Groups, rollouts: Sequence[Rollout], iteration: int) -> str | None:
    """Write a step's rollouts as ReplayEngine reads them, beside the metrics or the checkpoints; where."""
    parent = config.output.run_dir or config.output.save
    if parent is None:
        return None
    folder = Path(parent) / "not_finite"
    if groups.writes_samples:
        write_rollouts(folder, rollouts, step=iteration, dp_rank=groups.dp_rank)
    return str(folder)


def build_prompts(
    config: Config, groups: Groups, student: Tokenizer, teacher: Tokenizer | None, second: Tokenizer | None
) -> PromptSource:
    """Training prompts, each rank its share."""
    assert config.data.prompt_data is not None, "check() refuses a job without --prompt-data"
    rows = read_prompts(
        config.data.prompt_data,
        flag="--prompt-data",
        input_key=config.data.input_key,
        response_key=config.data.response_key,
        label_key=config.data.label_key,
        chat=config.data.apply_chat_template,
        need_response=config.interface.interface == "sft",
        need_label=False,
    )
    source = PromptSource(
        rows,
        student=student,
        teacher=teacher,
        batch_size=config.rollout.rollout_batch_size,
        samples_per_prompt=config.rollout.n_samples_per_prompt,
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=config.data.rollout_shuffle,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--prompt-data",
        student_chat=open_chat_template(config, config.model, student, prefix=""),
        teacher_chat=open_chat_template(config, config.teacher, teacher, prefix="teacher-"),
        others=(
            [(second, open_chat_template(config, config.second_teacher, second, prefix="second-teacher-"))]
            if second is not None
            else ()
        ),
    )
    report_skipped(config, groups, source, "prompts", of=len(rows))
    return source


def report_skipped(config: Config, groups: Groups, source: PromptSource, what: str, *, of: int) -> None:
    """One log line where prompts of a file are too long."""
    if source.num_skipped and groups.is_first_rank:
        limit = f"--rollout-max-prompt-len {config.rollout.rollout_max_prompt_len}"
        print(f" {source.num_skipped} of {of} {what} exceed {limit} and are left out", flush=True)


def build_evaluator(config: Config, groups: Groups, engine: RolloutEngine, student: Tokenizer) -> Evaluator | None:
    """Held-out prompts, how to sample their answers, and what is right."""
    if config.data.eval_prompt_data is None:
        return None
    rows, problems = open_held_out(config)
    prompts = PromptSource(
        rows,
        student=student,
        teacher=None,
        batch_size=None,
        samples_per_prompt=max(1, config.evaluation.eval_samples),
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=False,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--eval-prompt-data",
        student_chat=open_chat_template(config, config.model, student, prefix=""),
    )
    report_skipped(config, groups, prompts, "held-out prompts", of=len(rows))
    return Evaluator(
        engine,
        prompts,
        judge(config, problems, student),
        groups,
        max_response_len=config.rollout.rollout_max_response_len,
        temperature=config.evaluation.eval_temperature,
        samples=config.evaluation.eval_samples,
        seed=config.training.seed + 1,
    )


def judge(
    config: Config, problems: Sequence[Problem], student: Tokenizer
) -> Callable[[Sequence[Prompt], Sequence[Rollout]], Sequence[bool]]:
    """Which responses to held-out prompts are right, by --eval-benchmark. ValueError for programs where they cannot be
    confined."""
    benchmark = config.evaluation.eval_benchmark
    if benchmark == "exact_match":
        return partial(equals_label, tokenizer=student)
    if benchmark in CODE:
        check_sandbox(flag="--eval-benchmark")
    graders = Graders(benchmark, chat=config.data.apply_chat_template, workers=EVAL_WORKERS, limits=Limits())

    def right(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[bool]:
        graded = graders.grade(
            (problems[int(str(prompt.label))], response_text(rollout, student))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        )
        return [next(iter(metrics.values())) for metrics in graded]

    return right


def build_engine(config: Config, groups: Groups, sampler: MegatronEngine, student: Tokenizer) -> RolloutEngine:
    """Where the training responses come from."""
    engine: RolloutEngine = GivenResponses(student) if config.interface.interface == "sft" else sampler
    save_dir, load_dir = config.rollout.save_debug_rollout_data, config.rollout.load_debug_rollout_data
    if save_dir or load_dir:
        engine = ReplayEngine(
            engine, save_dir=save_dir, load_dir=load_dir, dp_rank=groups.dp_rank, writes=groups.writes_samples
        )
    return engine


def build_alignment(
    config: Config,
    student: Tokenizer,
    teacher: Tokenizer | None,
    second: Tokenizer | None,
    alignment_map: AlignmentMap | None,
    needs: TeacherNeeds,
) -> Callable[[Prompt, Rollout], AlignedPair]:
    """How a response is cut for the comparison: with no teacher, with two that are mixed, or with one."""
    if teacher is None:
        return partial(plan_without_teacher, student=student, needs=needs)
    interface = config.interface
    if second is not None:
        return partial(plan_mixture, student=student, teachers=[teacher, second], needs=needs, interface=interface)
    return partial(
        plan_pair, student=student, teacher=teacher, alignment_map=alignment_map, needs=needs, interface=interface
    )


def build_placement(
    config: Config, model: HiddenStateModel | InterleavedModel, student: Tokenizer, alignment_map: AlignmentMap | None
) -> VocabPlacement:
    """The shared vocabulary on this rank's slice of the student's."""
    start, end = model.vocab_shard
    if alignment_map is None:
        return VocabPlacement.student_only(student_vocab_size=student.table.num_ids, shard_start=start, shard_end=end)
    return alignment_map.placement(shard_start=start, shard_end=end, stop_bridge=config.interface.stop_bridge)


def _leave_to_last_stage(labels: LabelBatch) -> None:
    """Only the last stage has what the teacher says of the labels."""
