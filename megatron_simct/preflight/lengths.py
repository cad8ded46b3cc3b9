"""Lengths of prompts and responses: whether they fit into the models, and the bytes that a step sends."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_simct.alignment.coverage import Coverage
from megatron_simct.losses import teacher_needs
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import Finding, failed, passed
from megatron_simct.preflight.memory import size_text
from megatron_simct.preflight.state import Compared, State
from megatron_simct.preflight.traffic import Traffic, step_traffic

_VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def check_lengths(state: State, student: pair.Side, compared: Sequence[Compared]) -> list[Finding]:
    rollout = state.config.rollout
    lengths = {
        "prompt_len": rollout.rollout_max_prompt_len,
        "response_len": rollout.rollout_max_response_len,
    }
    findings = pair.check_length(student, **lengths)
    for one in compared:
        lengths["response_len"] = teacher_labels(state, one.coverage)
        findings += pair.check_length(one.side, **lengths)
        job = state.jobs.get(one.side.name)
        limit = None if job is None else job[1].serving.max_tokens_per_batch
        if limit is not None and sum(lengths.values()) > limit:
            message = f"--max-tokens-per-batch {limit}: {sum(lengths.values()):,} tokens would be refused"
            findings.append(
                failed(one.side.name if state.config.routes_rows else "teacher", "context", message)
            )
    return findings


def check_traffic(state: State, one: Compared) -> Traffic:
    """The most that a step sends to a teacher, if it scores all rows, and gets back."""
    config, teacher, coverage = state.config, one.side, one.coverage
    needs = teacher_needs(one.interface)
    labels = teacher_labels(state, coverage)
    rows = labels
    if coverage is not None and needs.hidden_rows == "first":
        rows = round(labels * coverage.units / max(coverage.teacher_tokens, 1))
    elif coverage is not None and needs.hidden_rows == "one_to_one":
        one_to_one = coverage.student_token_shares["1_1"] * coverage.student_tokens
        rows = round(labels * one_to_one / max(coverage.teacher_tokens, 1))
    elif needs.hidden_rows == "none":
        rows = 0
    job = state.jobs.get(teacher.name)
    hidden_dtype = "bf16" if job is None else job[1].serving.teacher_hidden_dtype
    traffic = step_traffic(
        needs,
        sequences=config.global_batch_size,
        prompt_len=config.rollout.rollout_max_prompt_len,
        teacher_labels=labels,
        rows=rows,
        hidden_size=teacher.architecture.hidden_size,
        value_bytes=_VALUE_BYTES[hidden_dtype],
        vocab_size=teacher.tokenizer.table.num_ids,
    )
    said = (
        f"at most {size_text(traffic.requests)} to the teacher and {size_text(traffic.answers)} back a "
        f"step; full logits would be {size_text(traffic.logits)}"
    )
    state.findings.append(passed(one.options.name if config.routes_rows else "pair", "traffic", said))
    return traffic


def teacher_labels(state: State, coverage: Coverage | None) -> int:
    """Number of teacher tokens in a response of full length."""
    ratio = 1.0 if coverage is None else coverage.teacher_tokens / max(coverage.student_tokens, 1)
    return round(state.config.rollout.rollout_max_response_len * ratio)
