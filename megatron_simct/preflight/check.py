"""All checks of one run file, in the order in which a user would meet their failures.

All of them except the bias take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_simct.config.run_file import RunFile
from megatron_simct.data.prompts import Row
from megatron_simct.loading import open_alignment_map
from megatron_simct.losses import comparisons
from megatron_simct.preflight import pair
from megatron_simct.preflight.bias import Bias
from megatron_simct.preflight.cluster import check_cluster
from megatron_simct.preflight.engines import check_engines
from megatron_simct.preflight.findings import failed, warned
from megatron_simct.preflight.lengths import check_lengths, check_traffic
from megatron_simct.preflight.memory import MemoryPlan
from megatron_simct.preflight.model import check_model
from megatron_simct.preflight.options import check_options
from megatron_simct.preflight.plans import check_fit, plan_student, plan_teacher
from megatron_simct.preflight.prompts import check_prompts
from megatron_simct.preflight.proposals import propose_batch_and_layout, propose_stages
from megatron_simct.preflight.report import Numbers, Report
from megatron_simct.preflight.state import Compared, State


def check_run(run: RunFile, *, device_memory_gib: float | None = None, bias: bool = False) -> Report:
    """Run every check that the file allows. User errors are returned as findings, not raised.

    device_memory_gib overrides cluster.device_memory_gib. bias: measure the loss of a student that is already
    right. This takes some seconds, and up to a minute for large vocabularies.
    """
    state = State(run, device_memory_gib or run.cluster.device_memory_gib)
    findings = state.findings
    findings += check_cluster(state.run)
    check_options(state)
    student = check_model(state, "student", state.config.model)
    sides: dict[str, pair.Side | None] = {}
    if state.needs_teacher:
        sides = {name: check_model(state, name, one.model) for name, one in state.teachers.items()}
        if not state.config.routes_rows:  # of a mixture the first teacher is compared
            sides = dict(list(sides.items())[:1])
    elif state.jobs:
        message = (
            f"--simct-interface {state.config.interface.interface} uses no teacher; leave out the "
            "teachers' jobs"
        )
        findings.append(failed(next(iter(state.jobs)), "interface", message))
    findings += check_engines(state.run, state.device_memory_gib)
    teachers = [side for side in sides.values() if side is not None]
    if student is None or len(teachers) < len(sides) or (state.needs_teacher and not sides):
        return Report(findings=findings)
    rows = check_prompts(state, student, teachers)
    compared, biases = [], []
    for side in teachers:
        begin = len(findings)
        one, measured = _compare(state, student, side, rows, bias=bias)
        compared.append(one)
        biases.append(measured)
        if state.config.routes_rows:
            findings[begin:] = [replace(found, side=side.name) for found in findings[begin:]]
    findings += check_lengths(state, student, compared)
    average = state.config.teacher_job.ema
    if average is not None and teachers and teachers[0].architecture != student.architecture:
        said = (
            f"{average}: teacher and student must have the same architecture, but "
            "--teacher-hf-checkpoint "
            "has another"
        )
        findings.append(failed("teacher", "weights", said, flag="--teacher-ema"))
    plans = _check_memory(state, student, compared)
    numbers = {
        one.options.name: Numbers(traffic=check_traffic(state, one), coverage=one.coverage, bias=measured)
        for one, measured in zip(compared, biases, strict=True)
    }
    by_teacher = state.config.routes_rows
    return Report(
        findings=findings,
        plans=plans,
        numbers=Numbers() if by_teacher else next(iter(numbers.values()), Numbers()),
        teachers=numbers if by_teacher else {},
        prompts=_show_prompt(student, teachers, rows) if rows else {},
    )


def _compare(
    state: State, student: pair.Side, teacher: pair.Side, rows: Sequence[Row], *, bias: bool
) -> tuple[Compared, Bias | None]:
    """Compare the student with one teacher, on the prompts that this teacher reads."""
    findings, options = state.findings, state.teachers[teacher.name]
    if state.config.routes_rows and rows:
        rows = [row for row in rows if teacher.name in row.teachers]
        if not rows:
            message = "no row of --prompt-data names this teacher"
            findings.append(warned(teacher.name, "prompts", message, flag="--teachers"))
    interface = comparisons(state.config)[options.name]
    alignment_map = state.attempt(
        "pair",
        "shared vocabulary",
        lambda: open_alignment_map(options, student.tokenizer, teacher.tokenizer, interface=interface),
        lambda found: f"{found.num_shared:,} tokens",
    )
    coverage, measured = None, None
    if alignment_map is not None and rows:
        coverage = pair.coverage_of(rows, student=student, teacher=teacher, alignment_map=alignment_map)
        findings += pair.check_coverage(coverage)
        findings += pair.check_interface(interface.interface, coverage, student=student, teacher=teacher)
        if bias:
            measured = state.attempt(
                "pair", "bias", lambda: pair.bias_of(rows, interface, student=student, teacher=teacher)
            )
        if measured is not None:
            findings += pair.check_bias(measured, interface)
    one = Compared(
        side=teacher,
        options=options,
        interface=interface,
        rows=rows,
        alignment_map=alignment_map,
        coverage=coverage,
    )
    return one, measured


def _show_prompt(student: pair.Side, teachers: Sequence[pair.Side], rows: Sequence[Row]) -> dict[str, str]:
    """The first prompt as the student and its teacher read it."""
    named = {side.name: side for side in teachers}
    first = next(iter(teachers), None)
    return pair.side_by_side(student, named.get(next(iter(rows[0].teachers), ""), first), rows[0])


def _check_memory(state: State, student: pair.Side, compared: Sequence[Compared]) -> dict[str, MemoryPlan]:
    """The memory plan of each job. Adds whether it fits, and proposals, to the findings."""
    plans: dict[str, MemoryPlan] = {}
    if "student" in state.sound and not state.undivided & ({"student"} | state.colocated):
        plans["student"] = plan_student(state, student, compared)
        check_fit(state, "student", plans["student"], state.run.student)
        propose_stages(state, student, compared)
        if state.device_memory_gib is not None:
            propose_batch_and_layout(state, student, compared, state.device_memory_gib)
    for name, (job, teacher_config) in state.jobs.items():
        if name in state.sides and name in state.sound - state.undivided and not state.has_engine(name):
            plans[name] = plan_teacher(state, state.sides[name], job, teacher_config)
            check_fit(state, name, plans[name], job)
    return plans
