"""Other options that would also fit, and be faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_simct.config.options import ParallelConfig
from megatron_simct.losses import teacher_needs
from megatron_simct.models.build import check_divides, layers_of_stages
from megatron_simct.parallel.initialize import check_layout
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import passed
from megatron_simct.preflight.memory import GIB
from megatron_simct.preflight.plans import MEMORY_WARN, known, plan_student
from megatron_simct.preflight.stages import (
    even_stages,
    layer_operations,
    layout_text,
    loss_operations,
    unevenness,
)
from megatron_simct.preflight.state import Compared, State
from megatron_simct.records import TeacherNeeds


def propose_batch_and_layout(
    state: State,
    student: pair.Side,
    compared: Sequence[Compared],
    device: float,
) -> None:
    """Propose more sequences decoded together, or less tensor parallelism, if they would also fit."""
    config, world_size = state.config, state.run.student.world_size
    parallel = config.parallel

    def fits(**changes: Any) -> bool:
        return plan_student(state, student, compared, **changes).peak <= MEMORY_WARN * device * GIB

    ranks = parallel.model_parallel_size
    share = -(-config.global_batch_size * ranks // world_size)
    asked = best = min(config.rollout.rollout_engine_batch_size, share)
    while best < share and fits(engine_batch_size=min(2 * best, share)):
        best = min(2 * best, share)
    if best > asked and state.needs_teacher:
        said = (
            f"--rollout-engine-batch-size {best} would also fit, instead of {asked}: fewer rounds of decoding"
        )
        state.findings.append(passed("student", "proposal", said))
    tp = 1
    while tp < parallel.tensor_model_parallel_size:
        less = replace(
            parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=parallel.sequence_parallel and tp > 1,
        )
        if _can_run(state, student, less) and fits(parallel=less):
            said = (
                f"--tensor-model-parallel-size {tp} would also fit, instead of "
                f"{parallel.tensor_model_parallel_size}"
            )
            state.findings.append(passed("student", "proposal", said))
            return
        tp *= 2


def propose_stages(state: State, student: pair.Side, compared: Sequence[Compared]) -> None:
    """Propose another number of layers for each pipeline stage, if one stage has much more
    work than the others.
    """
    config, parallel = state.config, state.config.parallel
    pp, architecture = parallel.pipeline_model_parallel_size, known(student.architecture)
    if pp == 1 or parallel.num_virtual_stages_per_pipeline_rank > 1 or not _can_run(state, student, parallel):
        return
    rollout = config.rollout
    costs = [
        layer_operations(
            layer,
            hidden_size=architecture.hidden_size,
            tokens=rollout.rollout_max_prompt_len + rollout.rollout_max_response_len,
            computed_again=config.update.recompute_granularity == "full",
        )
        for layer in architecture.layers
    ]
    sending = [one for one in compared if _sends_rows(teacher_needs(one.interface))]
    maps = [one.alignment_map for one in sending if one.alignment_map is not None]
    last = loss_operations(
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        teacher_rows=max((tables.teacher_vocab_size for tables in maps), default=0),
        teacher_hidden_size=max((one.side.architecture.hidden_size for one in compared), default=0),
        labels=rollout.rollout_max_response_len,
    )
    layers = even_stages(costs, last=last, stages=pp)
    now = unevenness(layers_of_stages(architecture, parallel), costs, last=last)
    then = unevenness(layers, costs, last=last)
    if now > 1.05 * then:
        text = layout_text(layers)
        fitting = replace(parallel.for_teacher, pipeline_model_parallel_layout=text)
        plan = plan_student(state, student, compared, parallel=fitting)
        device = state.device_memory_gib
        if _can_run(state, student, fitting) and (device is None or plan.peak <= MEMORY_WARN * device * GIB):
            said = (
                f"--pipeline-model-parallel-layout '{text}' would balance the stages: the stage with the "
                f"most work has {then:.2f} times the mean of the matrix products, instead of {now:.2f} "
                "(the last has the loss)"
            )
            state.findings.append(passed("student", "proposal", said))


def _sends_rows(needs: TeacherNeeds) -> bool:
    """Whether the loss reads hidden states of the teacher, and so its head."""
    return needs.hidden_rows != "none" and not needs.topk


def _can_run(state: State, student: pair.Side, parallel: ParallelConfig) -> bool:
    """Whether a layout divides the student and its batch."""
    world_size = state.run.student.world_size
    try:
        check_layout(parallel, world_size)
        check_divides(known(student.architecture), parallel, flag="")
        replicas = world_size // parallel.model_parallel_size
        replace(state.config, parallel=parallel).check(data_parallel_size=replicas)
    except ValueError:
        return False
    return True
