"""Ratios from sums, Megatron's log line, metrics.jsonl, and the warning about mass that
the loss does not see.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_simct import train
from megatron_simct.alignment.turns import MASK_REASONS
from megatron_simct.records import AlignedPair, Rollout, TeacherNeeds
from megatron_simct.reporting.monitor import METRICS, Monitor, Stopwatch, log_line, ratios, sample_sums
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks

SUMS = {
    "loss": 6.0,
    "num_labels": 24.0,
    "student_nll_sum": 30.0,
    "teacher_nll_sum": 12.0,
    "num_teacher_labels": 20.0,
    "loss_shared_sum": 2.0,
    "loss_unit_sum": 3.0,
    "loss_stop_sum": 1.0,
    "rows_shared": 8.0,
    "rows_unit": 4.0,
    "rows_stop": 0.0,
    "student_mass_outside_u_sum": 3.0,
    "teacher_mass_outside_u_sum": 6.0,
    "rows_same_top": 9.0,
}
SAMPLES = {
    "samples": 4.0,
    "stopped": 3.0,
    "rollout_nll_sum": 27.6,
    "bytes": 60.0,
    "bytes_one_to_one": 45.0,
    "bytes_unit": 12.0,
    "bytes_dropped_mismatch": 3.0,
    "bytes_dropped_special": 0.0,
    "bytes_dropped_one_stop": 0.0,
    "bytes_dropped_no_bytes": 0.0,
    "bytes_dropped_walk": 0.0,
    "bytes_dropped_invalid_utf8": 0.0,
    "segments_shared": 11.0,
    "segments_unit": 4.0,
    "segments_stop": 1.0,
    "segments_blank": 2.0,
    "canonical": 2.0,
}


def report(**changes: float) -> StepReport:
    return StepReport(sums=SUMS | changes, grad_norm=0.5, learning_rate=1e-4)


# ratios


def test_every_ratio_is_formed_from_the_right_sums() -> None:
    values = ratios(report(), SAMPLES, sampled=True)
    expected = {
        "loss": 6 / 24,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "response_length": 24 / 4,
        "stop_rate": 3 / 4,
        "student_nats_per_byte": 30 / 60,
        "teacher_nats_per_byte": 12 / 60,
        "loss_one_to_one": 2 / 8,
        "loss_unit": 3 / 4,
        "coverage_one_to_one": 45 / 60,
        "coverage_unit": 12 / 60,
        "student_mass_outside_u": 3 / 12,
        "teacher_mass_outside_u": 6 / 12,
        "canonical_rollouts": 2 / 4,
        "dropped_mismatch": 3 / 60,
        "dropped_special": 0.0,
        "dropped_one_stop": 0.0,
        "dropped_no_bytes": 0.0,
        "dropped_walk": 0.0,
        "dropped_invalid_utf8": 0.0,
        "rollout_logprob_gap": 2.4 / 24,
        "top1_agreement": 9 / 12,
        "blank_segments": 2 / 16,
        "student_entropy": 27.6 / 24,
    }
    assert math.isnan(values.pop("loss_stop")), "no stop row: the ratio has no value"
    assert values == pytest.approx(expected)


def test_the_glossary_has_every_metric_and_no_other() -> None:
    of_bytes = dict.fromkeys(
        ("byte_positions", "loss_bytes_sum", "bytes_student_rest_sum", "bytes_teacher_rest_sum"), 1.0
    )
    names = ratios(report(), SAMPLES, sampled=True).keys()
    names |= ratios(report(**of_bytes, bytes_merged=0.0), SAMPLES, sampled=True).keys()
    unresolved = {
        f"bytes_{name}_sum": 0.0 for name in ("student_unresolved", "teacher_unresolved", "may_agree")
    }
    names |= ratios(report(**of_bytes, **unresolved), SAMPLES, sampled=True).keys()
    parts = dict.fromkeys(("gradient_cosine_units", "gradient_ratio_units"), 1.0)
    names |= ratios(replace(report(), gradient_parts=parts), SAMPLES, sampled=True).keys()
    of_sampling = dict.fromkeys(("rollout_gap_sum", "rollout_gap_largest", "importance_weight_sum"), 1.0)
    names |= ratios(report(**of_sampling), SAMPLES, sampled=True).keys() | {"seconds_rollout_tail"}
    names |= {"rollout_carried", "seconds_rollout_longest"}
    of_rewards = {"loss_reward_sum": 0.0, "reward_clipped_sum": 0.0}
    names |= ratios(report(**of_rewards), SAMPLES, sampled=True).keys()
    of_terms = {"given_nll_sum": 1.0, "num_given_labels": 2.0, "reference_kl_sum": 1.0}
    names |= ratios(report(**of_terms), SAMPLES, sampled=True).keys()
    of_one = ("loss", "num_labels", "teacher_nll_sum", "samples", "bytes")
    of_teachers = {f"{name}/TEACHER": 1.0 for name in of_one}
    names |= ratios(report(), SAMPLES | of_teachers, sampled=True).keys()
    names |= {"missing/TEACHER"}
    names |= ratios(report(), SAMPLES | OF_TURNS, sampled=False).keys()
    names |= {"reward", "reward_spread", "reward_silent", "reward_failed"}
    hops = set(re.findall(r'clock\("(\w+)"\)', inspect.getsource(train)))
    names |= {f"seconds_{hop}" for hop in hops} | {"seconds", "peak_memory_gib", "rollout_tokens_per_second"}
    names |= {"rollout_lag"} | {
        f"{kind}_{what}" for kind in ("greedy", "sampled") for what in ("accuracy", "right")
    }
    over_ranks = {f"seconds_{hop}_slowest" for hop in hops} | {"seconds_slowest_rank"}
    over_ranks |= {
        "peak_memory_gib_most",
        "peak_memory_most_rank",
        "update_tflops",
        "update_mfu",
        "rollout_tflops",
    }
    assert names | over_ranks == METRICS.keys()


OF_TURNS = {
    "turns": 10,
    "bytes_between": 20,
    "bytes_of_turns": 80,
    **{f"bytes_masked_{reason}": number for number, reason in enumerate(MASK_REASONS)},
}
"""Four transcripts, whose compared bytes are the 60 of SAMPLES."""


def test_what_transcripts_mask_is_a_share_of_the_assistants_text() -> None:
    values = ratios(report(), SAMPLES | OF_TURNS, sampled=False)
    assert values["turns"] == 10 / 4 and values["between_turns"] == 20 / (20 + 60)
    assert values["masked_student_template"] == 0 and values["masked_blank"] == 3 / 80
    assert sum(values[f"masked_{reason}"] for reason in MASK_REASONS) == pytest.approx(21 / 80)


def test_given_responses_have_no_gap_and_no_teacher_no_coverage() -> None:
    values = ratios(report(num_teacher_labels=0.0), SAMPLES, sampled=False)
    assert values.keys() == {
        *("loss", "grad_norm", "learning_rate", "response_length", "stop_rate", "student_nats_per_byte")
    }


# sample_sums


def records(sample_id: int, counts: dict[str, int]) -> tuple[Rollout, AlignedPair]:
    empty = np.zeros(0, np.int32)
    return (
        Rollout(
            sample_id=sample_id,
            weight_version=0,
            student_ids=empty,
            logprobs=np.array([-0.5, -sample_id], np.float32),
            finish="stop" if sample_id else "length",
        ),
        AlignedPair(
            sample_id=sample_id,
            teacher_prompt_ids=empty,
            teacher_ids=empty,
            segments=empty.reshape(0, 4),
            kinds=empty.astype(np.int8),
            replaced_columns=empty,
            teacher_first_columns=empty,
            weights=np.zeros(0, np.float32),
            teacher_rows=empty,
            needs=TeacherNeeds(),
            counts=counts,
        ),
    )


def _sample_sums(rank, world_size) -> dict[str, float]:
    samples = [records(2 * rank + i, {"bytes": 10 * rank + i, "canonical": 1}) for i in range(2)]
    rollouts, pairs = zip(*samples, strict=True)
    return sample_sums(rollouts, pairs, dist.group.WORLD)


def test_sums_are_over_all_ranks() -> None:
    for sums in run_ranks(2, _sample_sums):
        assert sums["samples"] == 4 and sums["stopped"] == 3
        assert sums["bytes"] == 0 + 1 + 10 + 11 and sums["canonical"] == 4
        assert sums["rollout_nll_sum"] == 4 * 0.5 + 0 + 1 + 2 + 3
        assert sums["bytes_dropped_mismatch"] == 0, "a count that no pair has is zero"


def _sums_by_teacher(rank, world_size) -> dict[str, float]:
    samples = [records(2 * rank + i, {"bytes": 10 * rank + i + 1}) for i in range(2)]
    rollouts, pairs = zip(*samples, strict=True)
    pairs = [replace(pair, teacher="a" if rank else "ab"[i]) for i, pair in enumerate(pairs)]
    return sample_sums(rollouts, pairs, dist.group.WORLD, teachers=["a", "b", "c"])


def test_sums_by_teacher_are_there_for_teachers_without_a_row() -> None:
    for sums in run_ranks(2, _sums_by_teacher):
        found = {name: sums[name] for name in sums if "/" in name}
        assert found == {
            **{"samples/a": 3, "bytes/a": 1 + 11 + 12, "samples/b": 1, "bytes/b": 2},
            **{"samples/c": 0, "bytes/c": 0},
        }


# log_line

VALUES = {"loss": 0.25, "grad_norm": 0.5, "learning_rate": 1e-4, "loss_unit": float("nan"), "stop_rate": 0.75}


def test_the_line_starts_as_megatron_s() -> None:
    line = log_line(1, 100, VALUES, {"rollout": 0.25, "update": 1.0}, batch_size=64)
    assert line.startswith(
        " iteration        1/     100 | consumed samples:           64 | elapsed time per iteration (ms): "
        "1250.0 | learning rate: 1.000000E-04 | global batch size:    64 | loss: 2.500000E-01 | grad norm: "
        "0.500 | "
    )
    assert line.endswith(" | stop rate: 0.7500 | seconds: rollout 0.25 update 1.00 |")


def test_consumed_samples_count_up() -> None:
    assert "consumed samples:          192 |" in log_line(3, 100, VALUES, {}, batch_size=64)


def test_the_line_leaves_out_what_has_no_value_or_did_not_happen() -> None:
    line = log_line(1, 2, VALUES | {"dropped_special": 0.0, "dropped_mismatch": 0.1}, {}, batch_size=1)
    assert "nan" not in line and "loss unit" not in line and "dropped special" not in line
    assert "dropped mismatch: 0.1000" in line


# Monitor


def _run_monitor(rank, world_size, masses, run_dir, log_interval) -> str:
    """The output of a run with these shares of mass outside U on this rank. The first rank runs first."""
    # One rank in the data-parallel group, so the sums are those of `report`.
    group = [dist.new_group([i]) for i in range(world_size)][rank]
    groups = SimpleNamespace(dp=group, is_first_rank=rank == 0)
    out = io.StringIO()
    if rank > 0:
        dist.barrier()
    with contextlib.redirect_stdout(out):
        monitor = Monitor(
            groups,
            run_dir=run_dir,
            train_iters=len(masses),
            log_interval=log_interval,
            batch_size=1,
            sampled=True,
        )
        monitor.evaluation(0, {"greedy_accuracy": 0.25, "greedy_right": [0, 1, 0, 0]})
        rollouts, pairs = ([record] for record in records(1, {"bytes": 60}))
        for iteration, mass in enumerate(masses, start=1):
            sums = report(student_mass_outside_u_sum=12.0 * mass)
            monitor.step(iteration, rollouts, pairs, sums, {"rollout": 0.5, "update": 0.25})
        monitor.close()
    if rank == 0 and world_size > 1:
        dist.barrier()
    return out.getvalue()


def warned(masses: list[float]) -> list[str]:
    (text,) = run_ranks(1, _run_monitor, masses, None, 1)
    return re.findall(r"^ WARNING: .*$", text, re.MULTILINE)


def test_the_warning_comes_once() -> None:
    (warning,) = warned([0.10, 0.14, 0.16, 0.40, 0.10, 0.30])
    assert "rose from 0.100 to 0.160" in warning


def test_no_warning_while_the_mass_does_not_rise_by_a_twentieth() -> None:
    assert warned([0.30, 0.34, 0.01, 0.345]) == []


def test_the_rise_counts_from_the_first_step_that_has_a_mass() -> None:
    assert len(warned([math.nan, 0.2, 0.24, math.nan, 0.26])) == 1


def test_metrics_are_strict_json_of_the_first_rank(tmp_path) -> None:
    folder = tmp_path / "a" / "run"
    first, second = run_ranks(2, _run_monitor, [0.25, 0.25, 0.25], str(folder), 2)
    assert second == ""

    def refuse(constant) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    evaluation = {"kind": "evaluation", "iteration": 0, "greedy_accuracy": 0.25, "greedy_right": [0, 1, 0, 0]}
    assert lines[0] == evaluation
    assert [(line["kind"], line["iteration"]) for line in lines[1:]] == [
        ("step", 1),
        ("step", 2),
        ("step", 3),
    ]
    for line in lines[1:]:
        assert line["loss"] == 0.25 and line["student_mass_outside_u"] == 0.25
        assert (line["seconds"], line["seconds_rollout"], line["seconds_update"]) == (0.75, 0.5, 0.25)
        assert line["rollout_tokens_per_second"] == 48.0
        assert "loss_stop" not in line, "a ratio without a value is left out"
    printed = re.findall(r"^ iteration +(\d+)/ +3 \|", first, re.MULTILINE)
    assert printed == ["2", "3"], "every second line, and the last"
    assert " evaluation at iteration 0 | greedy_accuracy: 0.2500\n" in first


def test_a_terminal_shows_whole_lines_above_a_progress_bar(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    (text,) = run_ranks(1, _run_on_a_terminal)
    assert re.search(r"responses.*2/4", text), "while they are sampled"
    assert "responses" not in text[text.index("iteration        1/       1") :], "no longer"
    (line,) = [line for line in text.splitlines() if "iteration        1/       1" in line]
    assert re.search(r"\| loss: 2\.500000E-01 \|.*\|$", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)), (
        "cut or wrapped"
    )


def _run_on_a_terminal(rank, world_size) -> str:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    original, sys.stdout = sys.stdout, terminal
    try:
        groups = SimpleNamespace(dp=dist.group.WORLD, is_first_rank=True)
        monitor = Monitor(groups, run_dir=None, train_iters=1, log_interval=1, batch_size=1, sampled=True)
        rollouts, pairs = ([record] for record in records(1, {"bytes": 60}))
        for finished in (0, 2, 4):
            monitor.responses(finished, 4)
            monitor._progress.refresh()  # otherwise when its thread runs
        monitor.step(1, rollouts, pairs, report(), {"rollout": 0.5})
        monitor.close()
    finally:
        sys.stdout = original
    return terminal.getvalue()


# Stopwatch


def test_seconds_add_up_by_hop() -> None:
    clock = Stopwatch()
    for _ in range(2):
        with clock("rollout"):
            time.sleep(0.02)
    with clock("update"):
        pass
    assert list(clock.seconds) == ["rollout", "update"]
    assert clock.seconds["rollout"] >= 0.04 > 0.02 > clock.seconds["update"] >= 0
