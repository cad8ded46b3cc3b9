"""The memory plan of each job of a run, and whether it fits on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from megatron_simct.alignment.map_files import placement_balance
from megatron_simct.config.options import AttentionBackend, ModelConfig, ParallelConfig, TeacherConfig
from megatron_simct.config.run_file import Job, JobSize
from megatron_simct.losses import teacher_needs
from megatron_simct.models.build import padded_vocab_size
from megatron_simct.models.families import Architecture
from megatron_simct.models.head import Head
from megatron_simct.models.layers import Layer
from megatron_simct.models.lora import adapter_parameters
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import failed, passed, warned
from megatron_simct.preflight.memory import GIB, MemoryPlan, Sizes, size_text, student_plan, teacher_plan
from megatron_simct.preflight.state import Compared, State

MEMORY_WARN = 0.9
"""Share of the device from which a plan gets a warning."""


def plan_student(
    state: State,
    student: pair.Side,
    compared: Sequence[Compared],
    *,
    parallel: ParallelConfig | None = None,
    engine_batch_size: int | None = None,
) -> MemoryPlan:
    """The student's memory plan. parallel and engine_batch_size replace those of the run."""
    config, job = state.config, state.run.student
    parallel, rollout = parallel or config.parallel, config.rollout
    sizes_of = partial(_sizes, bf16=config.training.bf16, attention_backend=config.training.attention_backend)
    sizes = sizes_of(student, config.model, parallel)
    data_parallel_size = max(1, job.world_size // parallel.model_parallel_size)
    share = -(-config.global_batch_size // data_parallel_size)
    # One rank's part of a micro-batch, and of a step, in sequences.
    context = parallel.context_parallel_size
    sequences, of_step = config.training.micro_batch_size / context, share / context
    if config.training.max_tokens_per_gpu is not None:
        longest = rollout.rollout_max_prompt_len + rollout.rollout_max_response_len
        sequences = max(1.0 / context, config.training.max_tokens_per_gpu / longest)
    width = max((one.side.architecture.hidden_size for one in compared), default=0)
    values, tp = 0, parallel.tensor_model_parallel_size  # of the teachers' heads on the fullest rank
    for one in compared:
        tables, needs = one.alignment_map, teacher_needs(one.interface)
        if tables is not None and needs.hidden_rows != "none" and not needs.topk:
            rows = round(placement_balance(tables, (tp,))[tp] * tables.teacher_vocab_size / tp)
            values += rows * one.side.architecture.hidden_size
    return student_plan(
        sizes,
        optimizer=config.training.optimizer,
        micro_batch_size=min(sequences, of_step),
        num_micro_batches=max(1, int(of_step / sequences)),
        engine_batch_size=min(engine_batch_size or rollout.rollout_engine_batch_size, math.ceil(of_step)),
        update=config.update,
        data_parallel_size=data_parallel_size,
        prompt_len=rollout.rollout_max_prompt_len,
        response_len=rollout.rollout_max_response_len,
        loss_memory=config.interface.loss_memory_mib << 20,
        trains_on_given=not config.samples,
        on_gpu=job.gpus_per_node > 0,
        teachers=[
            sizes_of(one.side, one.options.model, parallel.for_teacher)
            for one in compared
            if one.side.name in state.colocated
        ],
        shared_rows=math.ceil(values / width) if width else 0,
        teacher_hidden_size=width,
        adapters=_adapters(state, student),
        averages_teacher=config.teacher_job.ema is not None,
        keeps_start=config.terms.reference_kl_weight > 0,
    )


def _adapters(state: State, student: pair.Side) -> dict[Layer, int] | None:
    """Number of each layer's adapter parameters; None if the weights themselves are trained."""
    if not state.config.lora.rank:
        return None
    return state.attempt(
        "student",
        "adapters",
        lambda: adapter_parameters(
            known(student.architecture),
            state.config.lora,
            tp_size=state.config.parallel.tensor_model_parallel_size,
            flag=f"--hf-checkpoint {student.folder}",
        ),
    )


def plan_teacher(state: State, teacher: pair.Side, job: Job, config: TeacherConfig) -> MemoryPlan:
    length = state.config.rollout.rollout_max_prompt_len + state.config.rollout.rollout_max_response_len
    return teacher_plan(
        _sizes(
            teacher,
            config.teacher,
            config.parallel,
            bf16=config.serving.bf16,
            attention_backend=config.serving.attention_backend,
        ),
        tokens=config.serving.max_tokens_per_batch,
        length=min(length, config.serving.max_tokens_per_batch),
        on_gpu=job.gpus_per_node > 0,
    )


def _sizes(
    side: pair.Side,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    bf16: bool,
    attention_backend: AttentionBackend,
) -> Sizes:
    rows = padded_vocab_size(
        side.architecture.vocab_size,
        divisible_by=model.make_vocab_size_divisible_by,
        tp_size=parallel.tensor_model_parallel_size,
    )
    return Sizes(
        architecture=known(side.architecture),
        parallel=parallel,
        vocab_size=rows,
        bf16=bf16,
        attention_backend=attention_backend,
    )


def check_fit(state: State, job: str, plan: MemoryPlan, size: JobSize) -> None:
    device, peak = state.device_memory_gib, plan.peak / GIB
    parts = plan.held | plan.phases[plan.peak_phase]
    largest = max(parts, key=lambda name: parts[name])
    said = (
        f"{size_text(plan.peak)} a rank, in {plan.peak_phase}; the largest part is {largest} "
        f"({size_text(parts[largest])})"
    )
    if device is None:
        if size.gpus_per_node:
            message = f"{said}; GPU memory is not configured, so the plan was not checked against it"
            state.findings.append(warned(job, "memory", message, flag="--device-memory"))
        else:
            state.findings.append(passed(job, "memory", said))
        return
    if peak > device:
        flag, change = _remedy(job, plan, largest)
        state.findings.append(failed(job, "memory", f"{said}; a GPU has {device:g} GiB: {change}", flag=flag))
    elif peak > MEMORY_WARN * device:
        flag, change = _remedy(job, plan, largest)
        state.findings.append(warned(job, "memory", f"{said}, of {device:g} GiB: almost full", flag=flag))
    else:
        state.findings.append(passed(job, "memory", f"{said}, of {device:g} GiB"))


def _remedy(job: str, plan: MemoryPlan, largest: str) -> tuple[str, str]:
    """The flag of the job that lowers the largest part, and what to do with it."""
    if largest == "KV cache" or plan.peak_phase == "rollout" and largest == "forward pass":
        return "--rollout-engine-batch-size", "lower it, so that fewer sequences are decoded together"
    if largest == "activations" and job == "student":
        return "--micro-batch-size", "lower it, or add --recompute-granularity full"
    if largest in ("activations", "loss", "forward pass", "hidden states", "logits"):
        return "--micro-batch-size" if job == "student" else "--max-tokens-per-batch", "lower it"
    if largest == "start's hidden states":
        return "--rollout-batch-size", "lower it"
    if largest == "teacher weights":
        return (
            "--tensor-model-parallel-size",
            "raise it, or run the teacher in its own job (section teacher)",
        )
    more = ", or add --use-distributed-optimizer" if largest == "optimizer" else ""
    return "--tensor-model-parallel-size", f"raise it or --pipeline-model-parallel-size{more}"


def known(architecture: Architecture | Head) -> Architecture:
    assert isinstance(architecture, Architecture), "only models of a known family are built here"
    return architecture
