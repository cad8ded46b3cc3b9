"""All checks of one run file, in the order in which a user would meet their failures.

All of them except the bias take seconds.
"""

from __future__ import annotations

from megatron_simct.alignment import AlignmentMap
from megatron_simct.config.run_file import RunFile
from megatron_simct.loading import open_alignment_map
from megatron_simct.preflight import pair
from megatron_simct.preflight.cluster import check_cluster
from megatron_simct.preflight.engines import check_engines
from megatron_simct.preflight.findings import failed
from megatron_simct.preflight.lengths import check_lengths, check_traffic
from megatron_simct.preflight.memory import MemoryPlan
from megatron_simct.preflight.model import check_model
from megatron_simct.preflight.options import check_options
from megatron_simct.preflight.plans import check_fit, plan_student, plan_teacher
from megatron_simct.preflight.prompts import check_prompts
from megatron_simct.preflight.proposals import propose_batch_and_layout, propose_stages
from megatron_simct.preflight.report import Report
from megatron_simct.preflight.state import State


def check_run(run: RunFile, *, device_memory_gib: float | None = None, bias: bool = False) -> Report:
    """Run every check that the file allows. User errors are returned as findings, not raised.

    device_memory_gib overrides cluster.device_memory_gib. bias: measure the loss of a student that is already
    right. This takes some seconds, and up to a minute for large vocabularies.
    """
    state = State(run, device_memory_gib or run.cluster.device_memory_gib)
    findings = state.findings
    findings += check_cluster(state.run)
    check_options(state)
    student, teacher = check_model(state, "student", state.config.model), None
    if state.needs_teacher:
        first, *others = state.jobs or ["teacher"]
        teacher = check_model(state, first, state.config.teacher)
        for name in others:
            check_model(state, name, state.config.second_teacher)
    elif state.jobs:
        message = (
            f"--simct-interface {state.config.interface.interface} uses no teacher; leave out the "
            "teachers' jobs"
        )
        findings.append(failed(next(iter(state.jobs)), "interface", message))
    findings += check_engines(state.run, state.device_memory_gib)
    if student is None or (teacher is None and state.needs_teacher):
        return Report(findings=findings)
    rows = check_prompts(state, student, teacher)
    coverage, alignment_map, measured = None, None, None
    if teacher is not None:
        alignment_map = state.attempt(
            "pair",
            "shared vocabulary",
            lambda: open_alignment_map(state.config, student.tokenizer, teacher.tokenizer),
            lambda found: f"{found.num_shared:,} tokens",
        )
    if teacher is not None and alignment_map is not None and rows:
        coverage = pair.coverage_of(rows, student=student, teacher=teacher, alignment_map=alignment_map)
        findings += pair.check_coverage(coverage)
        findings += pair.check_interface(
            state.config.interface.interface, coverage, student=student, teacher=teacher
        )
        interface = state.config.interface
        if bias:
            measured = state.attempt(
                "pair", "bias", lambda: pair.bias_of(rows, interface, student=student, teacher=teacher)
            )
        if measured is not None:
            findings += pair.check_bias(measured, interface)
    findings += check_lengths(state, student, teacher, coverage)
    average = state.config.teacher_job.ema
    if average is not None and teacher is not None and teacher.architecture != student.architecture:
        said = (
            f"{average}: teacher and student must have the same architecture, but --teacher-hf-checkpoint "
            "has another"
        )
        findings.append(failed("teacher", "weights", said, flag="--teacher-ema"))
    plans = _check_memory(state, student, teacher, alignment_map)
    traffic = check_traffic(state, teacher, coverage) if teacher is not None else None
    prompts = pair.side_by_side(student, teacher, rows[0]) if rows else {}
    return Report(
        findings=findings, plans=plans, traffic=traffic, coverage=coverage, bias=measured, prompts=prompts
    )


def _check_memory(
    state: State, student: pair.Side, teacher: pair.Side | None, alignment_map: AlignmentMap | None
) -> dict[str, MemoryPlan]:
    """The memory plan of each job. Adds whether it fits, and proposals, to the findings."""
    plans: dict[str, MemoryPlan] = {}
    on_its_ranks = {"student", "teacher"} if state.colocated else {"student"}
    if "student" in state.sound and not state.undivided & on_its_ranks:
        plans["student"] = plan_student(state, student, teacher, alignment_map)
        check_fit(state, "student", plans["student"], state.run.student)
        propose_stages(state, student, teacher, alignment_map)
        if state.device_memory_gib is not None:
            propose_batch_and_layout(state, student, teacher, alignment_map, state.device_memory_gib)
    for name, (job, teacher_config) in state.jobs.items():
        if name in state.sides and name in state.sound - state.undivided and not state.has_engine(name):
            plans[name] = plan_teacher(state, state.sides[name], job, teacher_config)
            check_fit(state, name, plans[name], job)
    return plans
