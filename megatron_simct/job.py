"""The parts of a training job, and how they are built. The one place that knows every part.

`build_job` comes first, then a function for each part, which reads the part's options.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment import Tokenizer, VocabPlacement, report_notes
from megatron_simct.alignment.alignment_map import id_of_bytes
from megatron_simct.alignment.plan import plan_mixture, plan_pair, plan_without_teacher
from megatron_simct.alignment.translation import Translation
from megatron_simct.alignment.turns import plan_turns
from megatron_simct.config.flags import to_dict
from megatron_simct.config.options import Config, InterfaceConfig
from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.engine_client import EngineClient
from megatron_simct.evaluation.benchmarks import CODE, Problem
from megatron_simct.evaluation.grading import Graders
from megatron_simct.evaluation.rewards import Rewards
from megatron_simct.evaluation.sandbox import Limits, check_sandbox
from megatron_simct.files import sampled_fingerprint
from megatron_simct.loading import (
    Pair,
    build_byte_order,
    load_model,
    open_chat_template,
    open_held_out,
    open_pair,
    open_thinking,
    prompt_date,
)
from megatron_simct.losses import check_config, check_has_units, check_labels, teacher_needs
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.kinds.teacher_topk import response_entries
from megatron_simct.models.build import (
    HiddenStateModel,
    InterleavedModel,
    uses_transformer_engine,
    whole_sequences,
)
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.layout import context_pieces, token_multiple
from megatron_simct.models.lora import adapter_parameters, add_adapters
from megatron_simct.models.operations import Operations, peak_operations
from megatron_simct.models.tensor_files import find_weights, weight_files
from megatron_simct.packing import Context, Cut, Entries, by_number, by_tokens, pack_micro_batches
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.disk import on_first_rank
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import largest
from megatron_simct.records import AlignedPair, LabelBatch, MicroBatch, Prompt, Rollout
from megatron_simct.reporting.monitor import Monitor, Throughput, slowest_ranks
from megatron_simct.reporting.profiling import Profiler
from megatron_simct.reporting.samples import SampleLog
from megatron_simct.reporting.writers import check_writers, open_writers
from megatron_simct.rewarding import Rewarding
from megatron_simct.rollout.engine import (
    GivenResponses,
    ReplayEngine,
    RolloutEngine,
    Sampling,
    SharedEngine,
    write_rollouts,
)
from megatron_simct.rollout.given_rows import GivenRows
from megatron_simct.rollout.held_out import Evaluator, equals_label, response_text, special_marks
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.rollout.oversampling import Oversampling
from megatron_simct.rollout.vllm_engine import VllmEngine
from megatron_simct.stopping import ExitWatch
from megatron_simct.teacher.average import Average
from megatron_simct.teacher.build import build_teacher, teacher_logit_softcap
from megatron_simct.teacher.fingerprints import weights_fingerprint
from megatron_simct.teacher.forward import TeacherForward, own_tokens
from megatron_simct.teacher.reference import Reference
from megatron_simct.teacher.scorer import TeacherScorer
from megatron_simct.update.checkpoint import TRACKER, Checkpoints, has_checkpoint, numbered
from megatron_simct.update.distributed_state import parts_of
from megatron_simct.update.optimizer import build_optimizer, gather_weights, wrap_data_parallel
from megatron_simct.update.step import StepReport, Updater
from megatron_simct.update.support import check_support

with megatron_imports():
    from megatron.core.timers import Timers

EVAL_WORKERS = 4
"""Number of benchmark responses that one rank of each model replica grades at the same time."""


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
    given: GivenRows | None
    """None without --given-share."""
    reference: Reference | None
    """None without --reference-kl-weight."""
    pack: Callable[..., list[MicroBatch]]
    updater: Updater
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
    check_config(config.interface, context_parallel_size=config.parallel.context_parallel_size)
    if config.output.gradient_parts_interval:
        check_has_units(config.interface, flag="--gradient-parts-interval")
    check_writers(config.output)
    exit_watch = ExitWatch(
        on_signal=config.output.exit_signal_handler,
        after_minutes=config.output.exit_duration_in_mins,
        device=groups.device,
    )
    check_experts(config)
    check_update(config, groups)
    pair = open_pair(config, say=partial(print, flush=True) if groups.is_first_rank else lambda line: None)
    student = pair.student
    if groups.is_first_rank:
        report_notes(student, *(teacher.tokenizer for teacher in pair.teachers))

    rows = read_training_rows(config)
    prompts = build_prompts(config, groups, pair, rows)
    oversampling = build_oversampling(config, groups, prompts)
    model = load_student(config, groups, student)
    placement = build_placement(config, model, pair)
    teacher_cut = build_cut(config, groups, context_parallel_size=config.teacher_context_parallel_size)
    teaching = build_teacher(config, groups, pair, placement, teacher_cut, model)
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
    engine = build_engine(config, groups, source, student)
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
        given=build_given_rows(
            config,
            groups,
            student,
            rows,
            sampling=sampling,
            pack=build_packing(config, groups, placement, interface=InterfaceConfig(interface="sft")),
        ),
        reference=reference,
        pack=build_packing(
            config, groups, placement, interface=config.interface, entries=build_entries(config, pair)
        ),
        updater=Updater(
            chunks,
            optimizer,
            scheduler,
            groups,
            shared_head=teaching.shared_head,
            placement=placement,
            interface=config.interface,
            byte_order=build_byte_order(model, groups, student) if pair.needs.byte_events else None,
            teacher_logit_softcap=teacher_logit_softcap(config) if pair.teachers else None,
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
        ),
        teacher_follows=build_following(
            teaching.average, before_reading_weights=partial(gather_weights, chunks)
        ),
        monitor=monitor,
        log_samples=build_sample_log(config, groups, pair, start=start),
        evaluator=build_evaluator(config, groups, source, student),
        start=start,
        save=checkpoints.save,
        finish_save=checkpoints.finish,
        keep_batch=partial(keep_batch, config, groups),
        exit_watch=exit_watch,
        profiler=Profiler(config.output),
        measure=build_measure(config, groups, model),
        timers=timers,
    )


def build_packing(
    config: Config,
    groups: Groups,
    placement: VocabPlacement,
    *,
    interface: InterfaceConfig,
    entries: Entries | None = None,
) -> Callable[..., list[MicroBatch]]:
    """The function that packs a rank's samples into micro-batches for the loss of this interface."""
    context = None
    if groups.cp_size > 1:
        pieces = partial(context_pieces, size=groups.cp_size)
        context = Context(rank=groups.cp_rank, size=groups.cp_size, pieces=pieces)
    return partial(
        pack_micro_batches,
        cut=build_cut(config, groups, context_parallel_size=groups.cp_size),
        check=(
            partial(check_labels, placement=placement, config=interface)
            if groups.is_last_stage
            else _leave_to_last_stage
        ),
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(config.parallel, groups.device, context_parallel_size=groups.cp_size),
        context=context,
        entries=entries,
    )


def build_reference(config: Config, groups: Groups, student: Tokenizer) -> Reference | None:
    """The student at its start, for --reference-kl-weight. Raises ValueError if it has no weights."""
    weight = config.terms.reference_kl_weight
    if not weight:
        return None
    if start_fingerprint(config) is None:
        raise ValueError(
            f"--reference-kl-weight {weight}: --hf-checkpoint {config.model.folder} has no weights to stay "
            "near"
        )
    return Reference(
        load_model(config, config.model, groups, student, prefix=""),
        groups,
        student=student,
        weight=weight,
        cut=build_cut(config, groups, context_parallel_size=groups.cp_size),
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(config.parallel, groups.device, context_parallel_size=groups.cp_size),
    )


def start_fingerprint(config: Config) -> str | None:
    """The weights from which the run starts, for --reference-kl-weight; None without weights."""
    return weights_fingerprint(config.model, prefix="") if config.terms.reference_kl_weight else None


def build_given_rows(
    config: Config,
    groups: Groups,
    student: Tokenizer,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    pack: Callable[..., list[MicroBatch]],
) -> GivenRows | None:
    """The rows of --given-share; None without it. Raises ValueError if no row has a response."""
    if not config.given_rows:
        return None
    with_response = [row for row in rows if row.response is not None]
    flag = f"--given-share {config.terms.given_share}"
    if not with_response:
        raise ValueError(
            f"{flag}: no row of --prompt-data {config.data.prompt_data} has a response, under "
            f"{config.data.response_key!r} or as the answer that closes its messages"
        )
    prompts = PromptSource(
        with_response,
        student=student,
        batch_size=config.given_rows,
        samples_per_prompt=1,
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=config.data.rollout_shuffle,
        seed=config.training.seed + 1,  # another order than that of the sampled rows
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--prompt-data",
        student_chat=open_chat_template(config, config.model, student, prefix=""),
    )
    if groups.is_first_rank:
        print(
            f" {flag}: {config.given_rows} of {config.global_batch_size} sequences of a step come with their "
            f"response, from {len(prompts)} of {len(rows)} rows",
            flush=True,
        )
    return GivenRows(
        prompts=prompts,
        student=student,
        sampling=sampling,
        weight=config.sft_weight,
        group=groups.dp,
        pack=pack,
    )


def build_following(
    average: Average | None, *, before_reading_weights: Callable[[], None]
) -> Callable[[], None]:
    """The function that averages the student's weights into the teacher's; without --teacher-ema it does
    nothing."""

    def follow() -> None:
        if average is not None:
            before_reading_weights()
            average.follow()

    return follow


def build_timers(config: Config, chunks: Sequence[Any], optimizer: Any) -> Callable[[int], str]:
    """Megatron's timers, in its schedule and its optimizer, for --timing-log-level."""
    output = config.output
    if not output.timing_log_level:
        return lambda iteration: ""
    timers = Timers(output.timing_log_level, "minmax")
    for ddp in chunks:
        ddp.module.config.timers = timers
    for part in parts_of(optimizer):
        part.config.timers = timers

    def timers_text(iteration: int) -> str:
        if iteration % output.log_interval and iteration != config.training.train_iters:
            return ""
        return timers.get_all_timers_string(barrier=True) or ""

    return timers_text


def build_measure(
    config: Config, groups: Groups, model: HiddenStateModel | InterleavedModel
) -> Callable[..., dict[str, float]]:
    """Metrics of the slowest rank and, with --log-throughput, of operations per second."""
    name = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else ""
    peak = peak_operations(name) if config.training.bf16 else None
    throughput = Throughput(Operations(model).forward, device=groups.device, peak=peak)
    sampled = config.samples

    def measure(
        prompts: Sequence[Prompt],
        rollouts: Sequence[Rollout],
        seconds: dict[str, float],
        *,
        given: tuple[Sequence[Prompt], Sequence[Rollout]] = ((), ()),
    ) -> dict[str, float]:
        found = slowest_ranks(seconds, groups.device)
        if config.output.log_throughput:
            found |= throughput.step(prompts, rollouts, seconds, sampled=sampled, given=given)
        return found

    return measure


def build_entries(config: Config, pair: Pair) -> Entries | None:
    """The function that lists the single tokens to compare from a teacher's scores; None if the interface
    compares none.
    """
    entries_of, tables = interface_of(config.interface).entries, pair.alignment_map
    if entries_of is None:
        return None
    assert pair.teacher is not None and tables is not None, "this interface compares tokens with a teacher's"
    compares_stops = config.interface.stop_bridge
    translation = Translation(
        student=pair.student.table.pieces(),
        teacher=pair.teacher.table.pieces(),
        student_of_bytes=id_of_bytes(pair.student),
        stop_student_id=tables.stop_student_id if compares_stops else None,
        stop_teacher_ids=frozenset(tables.stop_teacher_ids),
    )
    return partial(response_entries, entries_of(config.interface), translation)


def build_cut(config: Config, groups: Groups, *, context_parallel_size: int) -> Cut:
    """The function that divides a rank's sequences into micro-batches, equally many on every rank.

    context_parallel_size: ranks that share each of them.
    """
    training, parallel = config.training, config.parallel
    if training.max_tokens_per_gpu is None:
        return partial(by_number, size=training.micro_batch_size)
    # The interleaved schedule needs a multiple of the number of stages.
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    stages = parallel.pipeline_model_parallel_size if interleaved else 1

    def agree(count: int) -> int:
        return -(-largest(count, groups.dp_cp) // stages) * stages

    return partial(by_tokens, max_tokens=training.max_tokens_per_gpu * context_parallel_size, agree=agree)


def with_prompt_date(config: Config) -> Config:
    """The configuration with the date of its prompts; the first rank's date, because others may start after
    midnight."""
    date = [prompt_date(config)]
    dist.broadcast_object_list(date, src=0)
    return replace(config, data=replace(config.data, chat_template_date=date[0]))


def check_experts(config: Config) -> None:
    """Raises ValueError for options of experts if neither model has experts."""
    sides = [(config.model.folder, "--hf-checkpoint")]
    if teacher_needs(config.interface).teacher:
        sides.append((config.teacher.folder, "--teacher-hf-checkpoint"))
    parallel = config.parallel
    ep = parallel.expert_model_parallel_size
    given = {
        "--expert-model-parallel-size": ep if ep > 1 else None,
        "--expert-tensor-parallel-size": parallel.expert_tensor_parallel_size,
    }
    for flag, value in given.items():
        if value is not None and not any(
            read_architecture(folder, flag=side).num_experts for folder, side in sides
        ):
            folders = " and ".join(f"{side} {folder}" for folder, side in sides)
            raise ValueError(f"{flag} {value}: no experts in {folders}; leave it out")


def load_student(config: Config, groups: Groups, tokenizer: Tokenizer) -> HiddenStateModel | InterleavedModel:
    """The model to train: all its weights, or adapters. Raises ValueError, naming the flag."""
    if not config.lora.rank:
        return load_model(config, config.model, groups, tokenizer, prefix="")
    folder = f"--hf-checkpoint {config.model.folder}"
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    if find_weights(config.model.folder, flag="--hf-checkpoint") is None:
        raise ValueError(
            f"--lora-rank {config.lora.rank}: {folder} has no weights to which adapters could be added"
        )
    counts = adapter_parameters(architecture, config.lora, tp_size=groups.tp_size, flag=folder)
    model = load_model(config, config.model, groups, tokenizer, prefix="")
    add_adapters(
        model, architecture, config.lora, tp_size=groups.tp_size, seed=config.training.seed, flag=folder
    )
    if groups.is_first_rank:
        count = sum(counts[layer] for layer in architecture.layers)
        trained = f"{count:,} adapter parameters are trained on each tensor-parallel rank"
        print(f" --lora-rank {config.lora.rank}: {trained}; the weights are frozen", flush=True)
    return model


def check_update(config: Config, groups: Groups) -> None:
    """Raises ValueError for an option of the update that the student or its layout does not support."""
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    check_support(
        config.update,
        config.parallel,
        architecture,
        transformer_engine=not config.lora.rank and uses_transformer_engine(architecture, groups.device),
        flag=f"--hf-checkpoint {config.model.folder}",
    )


def identity(config: Config, pair: Pair) -> dict[str, object]:
    """Properties that a checkpoint and this run must share, so that the run can resume it."""
    return {
        "model": json.loads(
            json.dumps(asdict(read_architecture(config.model.folder, flag="--hf-checkpoint")))
        ),
        "tokenizer": pair.student.table.fingerprint,
        "teacher_tokenizer": None,
        "alignment_map": pair.alignment_map.fingerprint if pair.alignment_map is not None else None,
        "adapters": adapter_identity(config),
        "start": start_fingerprint(config),
    } | {
        f"{teacher.prefix.replace('-', '_')}tokenizer": teacher.tokenizer.table.fingerprint
        for teacher in pair.teachers
    }


def adapter_identity(config: Config) -> dict[str, object] | None:
    """Properties that adapters of a checkpoint must share with those of this run; None without adapters."""
    if not config.lora.rank:
        return None
    files = weight_files(config.model.folder, flag="--hf-checkpoint")
    return json.loads(json.dumps(asdict(config.lora))) | {"base": sampled_fingerprint(files)}


def resume(config: Config, groups: Groups, checkpoints: Checkpoints) -> int:
    """The iteration of the checkpoint in --load, or 0. Logs it, and the options that have changed since."""
    output = config.output
    if output.load is None:
        return 0
    same = output.save is not None and Path(output.load).resolve() == Path(output.save).resolve()
    if same and output.ckpt_step is None and not has_checkpoint(output.load):
        start, line = 0, f" --load {output.load}: no checkpoint there yet, starting from the beginning"
    else:
        start, changed = checkpoints.resume(
            output.load, step=output.ckpt_step, verified=output.verify_checkpoint
        )
        line = f" resuming {output.load} after iteration {start}"
        newer = [iteration for iteration in numbered(output.load) if iteration > start]
        if newer and output.ckpt_step is None:
            line += f", the one in {TRACKER}; there are newer ones: {', '.join(map(str, newer))}"
        if changed:
            line += "; changed: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    if groups.is_first_rank:
        print(line, flush=True)
    return start


def build_sample_log(
    config: Config, groups: Groups, pair: Pair, *, start: int
) -> Callable[[int, Sequence[Rollout], Sequence[AlignedPair], StepReport], None]:
    """The sample log of the rank that has both the loss and the first samples; it does nothing on the
    others."""
    output = config.output
    if output.run_dir is None or not groups.owns_teacher_socket or groups.dp_rank > 0:
        return lambda *_: None
    return SampleLog(
        output.run_dir,
        interval=output.sample_interval,
        train_iters=config.training.train_iters,
        start=start,
        student=pair.student,
        teacher=pair.teacher,
    ).step


def keep_batch(config: Config, groups: Groups, rollouts: Sequence[Rollout], iteration: int) -> str | None:
    """Writes a step's rollouts in the format of ReplayEngine, next to the metrics or the checkpoints; returns
    the folder."""
    parent = config.output.run_dir or config.output.save
    if parent is None:
        return None
    folder = Path(parent) / "not_finite"
    if groups.writes_samples:
        write_rollouts(folder, rollouts, step=iteration, dp_rank=groups.dp_rank)
    return str(folder)


def read_training_rows(config: Config) -> list[Row]:
    """The rows of --prompt-data."""
    assert config.data.prompt_data is not None, "check() refuses a job without --prompt-data"
    return read_prompts(
        config.data.prompt_data,
        flag="--prompt-data",
        input_key=config.data.input_key,
        response_key=config.data.response_key,
        label_key=config.data.label_key,
        chat=config.data.apply_chat_template,
        need_response=config.interface.interface == "sft" and config.data.simct_on == "sampled",
        need_label=False,
        keep_fields=config.reward.reward is not None,
        transcripts=config.data.simct_on == "given",
    )


def build_prompts(config: Config, groups: Groups, pair: Pair, rows: Sequence[Row]) -> PromptSource:
    """The training prompts of each rank; with `sft` those with given responses."""
    source = PromptSource(
        rows,
        student=pair.student,
        batch_size=config.sampled_prompts,
        samples_per_prompt=config.rollout.n_samples_per_prompt,
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=config.data.rollout_shuffle,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--prompt-data",
        student_chat=open_chat_template(config, config.model, pair.student, prefix=""),
        teachers=[
            (t.tokenizer, open_chat_template(config, t.options, t.tokenizer, prefix=t.prefix))
            for t in pair.teachers
        ],
        max_response_len=config.rollout.rollout_max_response_len,
    )
    report_skipped(config, groups, source, "prompts", of=len(rows))
    if source.num_masked and groups.is_first_rank:
        print(
            f" {source.num_masked} of {len(rows)} rows are left out: no answer in them stands in every chat "
            "template's text as it is and fits into --rollout-max-response-len",
            flush=True,
        )
    if source.num_teacher_prompts and groups.is_first_rank:
        print(
            f" the teacher has its own prompt in {source.num_teacher_prompts} of {len(source)} rows",
            flush=True,
        )
    return source


def build_oversampling(config: Config, groups: Groups, prompts: PromptSource) -> Oversampling | None:
    """The responses that steps carry over; None without --rollout-oversample."""
    rollout = config.rollout
    if not rollout.rollout_oversample:
        return None
    assert config.max_lag is not None, "check() refuses stored responses"
    share = config.sampled_prompts // groups.dp_size

    def gather(local: Any) -> list[Any]:
        values = [None] * groups.dp_size
        dist.all_gather_object(values, local, group=groups.dp)
        return values

    return Oversampling(
        prompts,
        share=share,
        more=math.ceil(rollout.rollout_oversample * share - 1e-6),
        samples_per_prompt=rollout.n_samples_per_prompt,
        max_lag=config.max_lag,
        dp_rank=groups.dp_rank,
        gather=gather,
        record=(
            partial(write_rollouts, Path(rollout.save_debug_rollout_data), dp_rank=groups.dp_rank)
            if rollout.save_debug_rollout_data is not None and groups.writes_samples
            else None
        ),
    )


def report_skipped(config: Config, groups: Groups, source: PromptSource, what: str, *, of: int) -> None:
    """Logs a line if prompts of a file are too long."""
    if source.num_skipped and groups.is_first_rank:
        limit = f"--rollout-max-prompt-len {config.rollout.rollout_max_prompt_len}"
        print(f" {source.num_skipped} of {of} {what} exceed {limit} and are left out", flush=True)


def build_rewarding(config: Config, groups: Groups, student: Tokenizer) -> Rewarding | None:
    """The part that asks for rewards; None without --reward. Raises ValueError if a rank cannot ask."""
    options = config.reward
    if options.reward is None:
        return None
    chat = open_chat_template(config, config.model, student, prefix="")
    thinking = open_thinking(chat)
    rewards, problem = None, ""
    if groups.writes_samples:
        try:
            if options.reward == "code":
                check_sandbox(flag="--reward")
            rewards = Rewards(options, chat=config.data.apply_chat_template, thinking=thinking)
        except ValueError as error:
            problem = str(error)
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise ValueError(next(filter(None, problems)))
    return Rewarding(
        rewards=rewards,
        student=student,
        marks=special_marks(student, (thinking.start, thinking.end)),
        batch_size=config.global_batch_size - config.given_rows,
        group_size=config.rollout.n_samples_per_prompt,
        weight=options.reward_weight,
        first_place=(
            groups.dp_rank * (config.sampled_prompts // groups.dp_size) * config.rollout.n_samples_per_prompt
            if config.rollout.rollout_oversample
            else None
        ),
    )


def build_evaluator(
    config: Config, groups: Groups, engine: RolloutEngine, student: Tokenizer
) -> Evaluator | None:
    """The evaluation: held-out prompts, how to sample responses, and how to grade them."""
    if config.data.eval_prompt_data is None:
        return None
    rows, problems = open_held_out(config)
    chat = open_chat_template(config, config.model, student, prefix="")
    prompts = PromptSource(
        rows,
        student=student,
        batch_size=None,
        samples_per_prompt=max(1, config.evaluation.eval_samples),
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=False,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--eval-prompt-data",
        student_chat=chat,
    )
    report_skipped(config, groups, prompts, "held-out prompts", of=len(rows))
    return Evaluator(
        engine,
        prompts,
        judge(config, problems, student, chat),
        groups,
        max_response_len=config.rollout.rollout_max_response_len,
        temperature=config.evaluation.eval_temperature,
        samples=config.evaluation.eval_samples,
        seed=config.training.seed + 1,
    )


def judge(
    config: Config, problems: Sequence[Problem], student: Tokenizer, chat: ChatTemplate | None
) -> Callable[[Sequence[Prompt], Sequence[Rollout]], Sequence[bool]]:
    """The grader of --eval-benchmark. Raises ValueError for a benchmark of programs if they cannot be
    sandboxed."""
    benchmark = config.evaluation.eval_benchmark
    if benchmark == "exact_match":
        return partial(equals_label, tokenizer=student)
    if benchmark in CODE:
        check_sandbox(flag="--eval-benchmark")
    thinking = open_thinking(chat)
    marks = special_marks(student, (thinking.start, thinking.end))
    graders = Graders(
        benchmark,
        chat=config.data.apply_chat_template,
        workers=EVAL_WORKERS,
        limits=Limits(),
        thinking=thinking,
    )

    def right(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[bool]:
        graded = graders.grade(
            (problems[int(str(prompt.label))], response_text(rollout, student, marks))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        )
        return [next(iter(metrics.values())) for metrics in graded]

    return right


def build_vllm_engine(
    config: Config,
    groups: Groups,
    model: HiddenStateModel | InterleavedModel,
    student: Tokenizer,
    *,
    before_reading_weights: Callable[[], None],
) -> VllmEngine:
    """An engine that samples with vLLM servers, which receive the weights in a folder.

    before_reading_weights: see MegatronEngine.
    """
    rollout, flag = config.rollout, "--rollout-engine-weights"
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    root = Path(rollout.rollout_engine_weights or f"{config.output.run_dir}/engine_weights").absolute()
    forward = TeacherForward(model, groups, vocab_size=student.table.num_ids, frozen=False)

    def write_weights(version: int) -> str:
        before_reading_weights()
        folder = root / f"version-{version}"

        def make_room() -> None:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in root.glob("version-*"):
                shutil.rmtree(old)

        on_first_rank(make_room, str(root), flag=flag)
        dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        save_hf_weights(
            model, architecture, groups, template=config.model.folder, save=str(folder), dtype=dtype
        )
        return str(folder)

    def log_probs(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        before_reading_weights()
        was_training = model.training
        model.eval()
        try:
            with whole_sequences(model):
                requests = [
                    own_tokens(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)
                ]
                return [(s.own_logit - s.lse).float().cpu().numpy() for s in forward.run([requests])]
        finally:
            model.train(was_training)

    timeout_s = 60 * rollout.rollout_engine_timeout_minutes
    return VllmEngine(
        [EngineClient(url, timeout_s=timeout_s) for url in rollout.rollout_engine_endpoint],
        groups,
        vocab_size=student.table.num_ids,
        stop_ids=student.table.stop_ids,
        write_weights=write_weights,
        log_probs=log_probs,
        bound_nats=rollout.rollout_logprob_bound,
        timeout_s=timeout_s,
    )


def build_engine(config: Config, groups: Groups, sampler: RolloutEngine, student: Tokenizer) -> RolloutEngine:
    """The source of the training responses."""
    engine: RolloutEngine = sampler if config.samples else GivenResponses(student)
    save_dir, load_dir = config.rollout.save_debug_rollout_data, config.rollout.load_debug_rollout_data
    if (save_dir or load_dir) and not config.rollout.rollout_oversample:  # it records by itself
        engine = ReplayEngine(
            engine, save_dir=save_dir, load_dir=load_dir, dp_rank=groups.dp_rank, writes=groups.writes_samples
        )
    return engine


def build_alignment(config: Config, pair: Pair) -> Callable[[Prompt, Rollout], AlignedPair]:
    """The function that aligns a response: without a teacher, with one, or with several that are mixed."""
    given: dict[str, Any] = {"student": pair.student, "needs": pair.needs}
    match [teacher.tokenizer for teacher in pair.teachers]:
        case []:
            plan = partial(plan_without_teacher, **given)
        case [teacher]:
            given |= {"alignment_map": pair.alignment_map, "interface": config.interface}
            plan = partial(plan_pair, teacher=teacher, **given)
        case teachers:
            plan = partial(plan_mixture, teachers=teachers, interface=config.interface, **given)
    return partial(plan_turns, plan, pair.student.table)


def build_placement(config: Config, model: HiddenStateModel | InterleavedModel, pair: Pair) -> VocabPlacement:
    """The shared vocabulary on this rank's slice of the student's."""
    start, end = model.vocab_shard
    if pair.alignment_map is None:
        vocab_size = pair.student.table.num_ids
        return VocabPlacement.student_only(student_vocab_size=vocab_size, shard_start=start, shard_end=end)
    return pair.alignment_map.placement(
        shard_start=start, shard_end=end, stop_bridge=config.interface.stop_bridge
    )


def _leave_to_last_stage(labels: LabelBatch) -> None:
    """Only the last stage has the teacher's scores of the labels."""
