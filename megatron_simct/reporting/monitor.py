"""What a run says of itself: Megatron's log line, metrics.jsonl, a progress bar on a terminal.

Hops hand over sums; ratios are formed here, once, from sums over the whole global batch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_simct.alignment.plan import DROP_REASONS
from megatron_simct.alignment.turns import MASK_REASONS
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import sum_over_ranks
from megatron_simct.records import AlignedPair, Prompt, Rollout
from megatron_simct.reporting.writers import JsonLines, Writer
from megatron_simct.update.step import StepReport

COUNTS = (
    "bytes",
    "bytes_one_to_one",
    "bytes_unit",
    *(f"bytes_dropped_{reason}" for reason in DROP_REASONS),
    "student_labels_dropped",
    "teacher_labels_dropped",
    "segments_shared",
    "segments_unit",
    "segments_stop",
    "segments_blank",
    "canonical",
    "turns",
    "bytes_of_turns",
    "bytes_between",
    *(f"bytes_masked_{reason}" for reason in MASK_REASONS),
)
"""The counts of an AlignedPair that are logged."""

_OF_BYTE_POSITIONS = {
    "bytes_student_unresolved": "bytes_student_unresolved_sum",
    "bytes_teacher_unresolved": "bytes_teacher_unresolved_sum",
    "bytes_may_agree": "bytes_may_agree_sum",
    "bytes_student_rest": "bytes_student_rest_sum",
    "bytes_teacher_rest": "bytes_teacher_rest_sum",
    "bytes_merged": "bytes_merged",
}
"""Metrics of the interface `bytes`, and the sums over byte positions that they are of."""

METRICS = {
    "loss": ("nats a label", "loss over all student labels of the step, including dropped ones"),
    "loss_one_to_one": ("nats a row", "loss of segments of one shared token on each side"),
    "loss_unit": ("nats a row", "loss of multi-token units"),
    "loss_stop": ("nats a row", "loss of the stop tokens"),
    "loss_bytes": ("nats a position", "interface bytes: loss over the compared byte positions"),
    "grad_norm": ("", "norm of the gradient before --clip-grad"),
    "gradient_cosine_units": (
        "",
        "--gradient-parts-interval: cosine between the gradient of 1:1 positions (with stop tokens) and that "
        "of multi-token units; below 0 they contradict each other",
    ),
    "gradient_ratio_units": (
        "",
        "--gradient-parts-interval: gradient norm of the multi-token units divided by that of the 1:1 "
        "positions",
    ),
    "learning_rate": ("", "learning rate of the step"),
    "response_length": ("tokens", "mean length of a response, including its stop token"),
    "stop_rate": ("share of samples", "responses that end in a stop token"),
    "student_nats_per_byte": ("nats a byte", "the student's -log p of the responses, divided by their bytes"),
    "teacher_nats_per_byte": (
        "nats a byte",
        "the teacher's -log p of the same bytes, divided by their number",
    ),
    "student_entropy": (
        "nats a label",
        "the student's -log p of the sampled tokens; an estimate of its entropy at rollout temperature 1 "
        "and top-p 1",
    ),
    "rollout_logprob_gap": (
        "nats a label",
        "difference between the mean log-probability of the samples in training and in sampling; 0 up to "
        "rounding unless the weights have changed",
    ),
    "rollout_logprob_difference": (
        "nats a label",
        "mean absolute difference between the log-probabilities of a sampled token in training and in "
        "sampling",
    ),
    "rollout_logprob_difference_largest": ("nats", "largest of these differences"),
    "rollout_importance_weight": (
        "",
        "--rollout-importance-weights: mean weight of the labels; 1 if the training weights sampled them",
    ),
    "seconds_rollout_tail": (
        "s",
        "--rollout-engine vllm: part of the sampling in which at most a tenth of the first rank's responses "
        "are unfinished",
    ),
    "seconds_rollout_longest": (
        "s",
        "--rollout-oversample: the longest time from the first request for a response until it was "
        "finished, of the responses that finished in this step; includes the updates in between",
    ),
    "rollout_carried": (
        "responses",
        "--rollout-oversample: responses in this step whose group an earlier step began, over all ranks",
    ),
    "rollout_lag": (
        "steps",
        "optimizer steps between the weights that sampled a response's first token and the training weights, "
        "mean over responses; only logged if above 0",
    ),
    "canonical_rollouts": (
        "share of samples",
        "responses whose tokens are those that the student's tokenizer gives for the text",
    ),
    "reward": ("reward", "--reward: mean over the responses that have a reward"),
    "reward_spread": (
        "reward",
        "--reward: standard deviation among the responses to one prompt, mean over prompts",
    ),
    "reward_silent": (
        "share of prompts",
        "--reward: prompts whose responses all have the same reward, so they have no gradient",
    ),
    "reward_failed": ("share of samples", "--reward: responses without a reward"),
    "loss_reward": ("nats a label", "--reward: the policy-gradient term, part of the loss"),
    "reward_clipped": ("share of labels", "--reward: labels whose importance ratio is clipped"),
    "loss/TEACHER": ("nats a label", "--teachers: loss over the student labels of this teacher's rows"),
    "samples/TEACHER": ("share of samples", "--teachers: responses that this teacher scores"),
    "teacher_nats_per_byte/TEACHER": (
        "nats a byte",
        "--teachers: surprise of this teacher at the responses that it scores",
    ),
    "missing/TEACHER": (
        "responses",
        "--missing-teacher drop: responses that this teacher has not scored, which add nothing to the step",
    ),
    "given_cross_entropy": (
        "nats a label",
        "--given-share: cross entropy of the given responses, before --sft-weight",
    ),
    "reference_kl": (
        "nats a label",
        "--reference-kl-weight: KL of the student from its start at sampled labels, before the weight",
    ),
    "seconds_reward": ("s", "part of the step spent waiting for rewards"),
    "coverage_one_to_one": ("share of bytes", "bytes in segments of one shared token on each side"),
    "coverage_unit": ("share of bytes", "bytes in multi-token units"),
    "blank_segments": ("share of segments", "segments of white space only"),
    "top1_agreement": (
        "share of rows",
        "rows in which both models have the same likeliest token among those compared",
    ),
    "student_mass_outside_u": (
        "probability",
        "student's probability of tokens that are not shared; a loss over shared tokens does not depend on "
        "it",
    ),
    "teacher_mass_outside_u": ("probability", "teacher's probability of tokens that are not shared"),
    "bytes_student_rest": (
        "probability",
        "bytes with --simct-byte-bounds longest-match: student's probability of all bytes outside the event "
        "set",
    ),
    "bytes_teacher_rest": (
        "probability",
        "bytes with --simct-byte-bounds longest-match: teacher's probability of the same bytes",
    ),
    "bytes_merged": (
        "events a position",
        "bytes with --simct-byte-bounds longest-match: events that were merged into the rest or left out, "
        "because the models may agree on them",
    ),
    "bytes_student_unresolved": (
        "probability",
        "interface bytes: student's probability of texts that have left the realised tokens, whose next byte "
        "is therefore unknown",
    ),
    "bytes_teacher_unresolved": ("probability", "interface bytes: the same for the teacher"),
    "bytes_may_agree": (
        "share of positions",
        "interface bytes: positions at which the unresolved probability allows both models to be equal, so "
        "the loss is 0",
    ),
    "dropped_mismatch": ("share of bytes", "dropped: the bytes of the two tokenizers differ"),
    "dropped_special": ("share of bytes", "dropped: a special token inside the response, and all after it"),
    "dropped_one_stop": ("share of bytes", "dropped: only one side ends in a stop token"),
    "dropped_no_bytes": ("share of bytes", "dropped: tokens without bytes, in a response without bytes"),
    "dropped_walk": ("share of bytes", "dropped: lost by the walk of SimCT's released code (interface code)"),
    "dropped_invalid_utf8": ("share of bytes", "dropped: bytes that are not UTF-8, and all after them"),
    "turns": (
        "responses a sequence",
        "--simct-on given, --environment: responses of a sequence that are trained on, mean over sequences",
    ),
    "between_turns": (
        "share of bytes",
        "the same runs: from the first to the last response, text of others and of the chat template",
    ),
    "masked_student_template": (
        "share of bytes",
        "--simct-on given: of the assistant's text, what the student's chat template does not write as it is",
    ),
    "masked_teacher_template": ("share of bytes", "the same for a teacher's chat template"),
    "masked_other_text": ("share of bytes", "the same where the teacher's messages have another answer"),
    "masked_blank": ("share of bytes", "the same: blanks at the ends of an answer that a template strips"),
    "masked_marks": ("share of bytes", "the same: marks of thinking inside a content"),
    "masked_tool_calls": ("share of bytes", "the same: calls of tools, as JSON"),
    "masked_too_long": ("share of bytes", "the same: what does not fit into --rollout-max-response-len"),
    "seconds": ("s", "wall time of the step"),
    "seconds_rollout": ("s", "part of the step spent sampling"),
    "seconds_alignment": ("s", "part of the step spent in alignment"),
    "seconds_teacher": ("s", "part of the step spent scoring, or waiting for the teacher's job"),
    "seconds_update": ("s", "part of the step spent in forward and backward passes and the optimizer"),
    "peak_memory_gib": ("GiB", "peak memory of the first rank's process so far, on its GPU or resident"),
    "seconds_rollout_slowest": ("s", "longest sampling time of any rank; the other ranks wait for it"),
    "seconds_alignment_slowest": ("s", "longest alignment time of any rank"),
    "seconds_teacher_slowest": (
        "s",
        "longest time of any rank for scoring, or for waiting for the teacher's job",
    ),
    "seconds_reward_slowest": ("s", "longest time of any rank for waiting for rewards"),
    "seconds_update_slowest": ("s", "longest update time of any rank"),
    "seconds_slowest_rank": (
        "rank",
        "rank with the longest sampling time, or the longest update time if nothing is sampled",
    ),
    "peak_memory_gib_most": ("GiB", "largest peak memory of any rank's process so far"),
    "peak_memory_most_rank": ("rank", "rank with the largest peak memory"),
    "update_tflops": (
        "TFLOP/s a rank",
        "--log-throughput: operations of forward and backward passes per second of the update, without "
        "recomputation",
    ),
    "update_mfu": (
        "share of the peak",
        "--log-throughput: update_tflops divided by the GPU's peak in bf16, if that is known",
    ),
    "rollout_tflops": ("TFLOP/s a rank", "--log-throughput: operations per second of sampling"),
    "rollout_tokens_per_second": ("tokens a second", "sampled tokens, over all ranks"),
    "greedy_accuracy": ("share of prompts", "evaluation: correct greedy responses (--eval-benchmark)"),
    "sampled_accuracy": ("share of responses", "evaluation: correct sampled responses"),
    "greedy_right": (
        "count a prompt",
        "evaluation: correct greedy responses to each held-out prompt, in file order",
    ),
    "sampled_right": (
        "count a prompt",
        "evaluation: correct sampled responses to each held-out prompt, in file order",
    ),
}
"""Unit and meaning of every name in metrics.jsonl, beside `kind` and `iteration`."""


def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


class Stopwatch:
    """Seconds spent in each hop of one step. Time in a hop within another one is the inner hop's only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def __call__(self, hop: str) -> Iterator[None]:
        begin, outside = time.perf_counter(), self._inner
        self._inner = 0.0
        with torch.profiler.record_function(f"hop: {hop}"), _nvtx_range(hop):
            yield
        elapsed = time.perf_counter() - begin
        self.seconds[hop] = self.seconds.get(hop, 0.0) + elapsed - self._inner
        self._inner = outside + elapsed


def peak_memory_gib() -> float:
    """The most that this process has held so far: allocated on its GPU, or resident where it has none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


_HOPS = ("rollout", "alignment", "teacher", "reward", "update")


def slowest_ranks(seconds: dict[str, float], device: torch.device) -> dict[str, float]:
    """The most that any rank took in each hop, and held, and which rank that is.

    Collective over the whole job.
    """
    hops = [hop for hop in _HOPS if hop in seconds or hop != "reward"]
    held = [*(seconds.get(hop, 0.0) for hop in hops), peak_memory_gib()]
    mine = torch.tensor(held, dtype=torch.float64, device=device)
    most = mine.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    ranks = torch.where(mine == most, dist.get_rank(), -1)  # of several that have the most, the last one
    dist.all_reduce(ranks, op=dist.ReduceOp.MAX)
    longest = 0 if most[0] > 0 else len(hops) - 1
    return {f"seconds_{hop}_slowest": float(most[i]) for i, hop in enumerate(hops)} | {
        "seconds_slowest_rank": float(ranks[longest]),
        "peak_memory_gib_most": float(most[-1]),
        "peak_memory_most_rank": float(ranks[-1]),
    }


class Throughput:
    """Floating-point operations of a step, by the model's own count, a second and a rank."""

    def __init__(
        self, count: Callable[[Sequence[int], int], float], *, device: torch.device, peak: float | None
    ) -> None:
        """count: operations of this rank in a forward pass over sequences of these lengths, with the LM head
        at so many positions. peak: operations a second of the device, if it is known."""
        self._count = count
        self._device = device
        self._peak = peak

    def step(
        self,
        prompts: Sequence[Prompt],
        rollouts: Sequence[Rollout],
        seconds: dict[str, float],
        *,
        sampled: bool,
        given: tuple[Sequence[Prompt], Sequence[Rollout]] = ((), ()),
    ) -> dict[str, float]:
        """Means over all ranks. Collective over the whole job.

        A backward pass is two forward passes. Sampling computes each position once, with its KV cache. given:
        what was trained on beside, and not sampled.
        """
        mine = [self._operations(prompts, rollouts), self._operations(*given)]
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        each, beside = (total / dist.get_world_size()).tolist()
        update = _ratio(3 * (each + beside), seconds.get("update", 0.0))
        values = {"update_tflops": update / 1e12}
        if self._peak is not None:
            values["update_mfu"] = update / self._peak
        if sampled:
            values["rollout_tflops"] = _ratio(each, seconds.get("rollout", 0.0)) / 1e12
        return values

    def _operations(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> float:
        lengths = [
            len(prompt.student_ids) + len(rollout.student_ids)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        return self._count(lengths, sum(len(rollout.label_ids) for rollout in rollouts)) if lengths else 0.0


def sample_sums(
    rollouts: Sequence[Rollout],
    pairs: Sequence[AlignedPair],
    group: dist.ProcessGroup,
    *,
    teachers: Sequence[str] = (),
) -> dict[str, float]:
    """Sums over the global batch of what samples say of themselves. teachers: the names of --teachers.

    Collective over the data-parallel group.
    """
    sums: dict[str, float] = {name: sum(pair.counts.get(name, 0) for pair in pairs) for name in COUNTS}
    sums |= {
        "samples": len(rollouts),
        "stopped": sum(r.finish == "stop" for r in rollouts),
        "rollout_nll_sum": -sum(float(np.sum(r.logprobs, dtype=np.float64)) for r in rollouts),
    }
    for name in teachers:
        own = [pair for pair in pairs if pair.teacher == name]
        sums |= {f"samples/{name}": len(own), f"bytes/{name}": sum(pair.counts["bytes"] for pair in own)}
    return sum_over_ranks({name: torch.tensor(float(value)) for name, value in sums.items()}, group)


def ratios(report: StepReport, samples: dict[str, float], *, sampled: bool) -> dict[str, float]:
    """The metrics of one step. Units: nats for losses, shares in [0, 1], tokens for lengths.

    sampled: the responses came from the student (else they were given, and have no log-probs).
    """
    sums = report.sums | samples
    values = {
        "loss": _ratio(sums["loss"], sums["num_labels"]),
        "grad_norm": report.grad_norm,
        **report.gradient_parts,
        "learning_rate": report.learning_rate,
        "response_length": _ratio(sums["num_labels"], sums["samples"]),
        "stop_rate": _ratio(sums["stopped"], sums["samples"]),
        "student_nats_per_byte": _ratio(sums.get("student_nll_sum"), sums["bytes"]),
    }
    if sums.get("num_teacher_labels"):
        values |= {
            "teacher_nats_per_byte": _ratio(sums["teacher_nll_sum"], sums["bytes"]),
            "canonical_rollouts": _ratio(sums["canonical"], sums["samples"]),
        }
    if "byte_positions" in sums:
        values |= {
            "loss_bytes": _ratio(sums["loss_bytes_sum"], sums["byte_positions"]),
            **{
                name: _ratio(sums[key], sums["byte_positions"])
                for name, key in _OF_BYTE_POSITIONS.items()
                if key in sums
            },
        }
    if "rows_shared" in sums and sums.get("num_teacher_labels"):
        rows = sums["rows_shared"] + sums["rows_unit"] + sums["rows_stop"]
        values |= {
            "loss_one_to_one": _ratio(sums["loss_shared_sum"], sums["rows_shared"]),
            "loss_unit": _ratio(sums["loss_unit_sum"], sums["rows_unit"]),
            "loss_stop": _ratio(sums["loss_stop_sum"], sums["rows_stop"]),
            "coverage_one_to_one": _ratio(sums["bytes_one_to_one"], sums["bytes"]),
            "coverage_unit": _ratio(sums["bytes_unit"], sums["bytes"]),
            "student_mass_outside_u": _ratio(sums["student_mass_outside_u_sum"], rows),
            "teacher_mass_outside_u": _ratio(sums["teacher_mass_outside_u_sum"], rows),
            "top1_agreement": _ratio(sums["rows_same_top"], rows),
            "blank_segments": _ratio(
                sums["segments_blank"],
                sums["segments_shared"] + sums["segments_unit"] + sums["segments_stop"],
            ),
        }
    if sums.get("num_teacher_labels"):
        for reason in DROP_REASONS:
            values[f"dropped_{reason}"] = _ratio(sums[f"bytes_dropped_{reason}"], sums["bytes"])
    if sums.get("turns"):
        values["turns"] = _ratio(sums["turns"], sums["samples"])
        values["between_turns"] = _ratio(sums["bytes_between"], sums["bytes_between"] + sums["bytes"])
        for reason in MASK_REASONS if sums["bytes_of_turns"] else ():
            values[f"masked_{reason}"] = _ratio(sums[f"bytes_masked_{reason}"], sums["bytes_of_turns"])
    if "loss_reward_sum" in sums:
        values["loss_reward"] = _ratio(sums["loss_reward_sum"], sums["num_labels"])
        values["reward_clipped"] = _ratio(sums["reward_clipped_sum"], sums["num_labels"])
    for name in [key.removeprefix("samples/") for key in sums if key.startswith("samples/")]:
        values |= {
            f"loss/{name}": _ratio(sums[f"loss/{name}"], sums[f"num_labels/{name}"]),
            f"samples/{name}": _ratio(sums[f"samples/{name}"], sums["samples"]),
            f"teacher_nats_per_byte/{name}": _ratio(sums[f"teacher_nll_sum/{name}"], sums[f"bytes/{name}"]),
        }
    if "num_given_labels" in sums:
        values["given_cross_entropy"] = _ratio(sums["given_nll_sum"], sums["num_given_labels"])
    if "reference_kl_sum" in sums:
        values["reference_kl"] = _ratio(sums["reference_kl_sum"], sums["num_labels"])
    if sampled:
        # The mean surprise of own samples is an unbiased estimate of the entropy, at rollout temperature 1
        # and top-p 1.
        values["student_entropy"] = _ratio(sums["rollout_nll_sum"], sums["num_labels"])
        gap = abs(sums["student_nll_sum"] - sums["rollout_nll_sum"])
        values["rollout_logprob_gap"] = _ratio(gap, sums["num_labels"])
        if "rollout_gap_sum" in sums:
            values["rollout_logprob_difference"] = _ratio(sums["rollout_gap_sum"], sums["num_labels"])
            values["rollout_logprob_difference_largest"] = sums["rollout_gap_largest"]
        if "importance_weight_sum" in sums:
            values["rollout_importance_weight"] = _ratio(sums["importance_weight_sum"], sums["num_labels"])
    return values


def _ratio(numerator: float | None, denominator: float) -> float:
    return numerator / denominator if numerator is not None and denominator else float("nan")


class Monitor:
    """Forms the metrics on every rank; writes on the first rank only."""

    WARN_MASS_RISE = 0.05

    def __init__(
        self,
        groups: Groups,
        *,
        run_dir: str | None,
        train_iters: int,
        log_interval: int,
        batch_size: int,
        sampled: bool,
        start: int = 0,
        teachers: Sequence[str] = (),
        writers: Sequence[Writer] = (),
    ) -> None:
        """sampled: responses come from the student; else they are given, and have no log-probs of their own.

        start: the iteration that a resumed run goes on from. teachers: the names of --teachers. writers:
        where metrics go beside metrics.jsonl.
        """
        self._group = groups.dp
        self._active = groups.is_first_rank
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._batch_size = batch_size
        self._sampled = sampled
        self._teachers = teachers
        self._first_mass: float | None = None
        self._warned = False
        self._writers = list(writers)
        if self._active and run_dir is not None:
            file = JsonLines(run_dir, start=start)
            self._writers.append(file)
            self._remember_masses([row.get("student_mass_outside_u") for row in file.kept])
        self._progress = None
        if self._active and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console())
            self._steps = self._progress.add_task("steps", total=train_iters, completed=start)
            self._responses = self._progress.add_task("responses", visible=False)

    def step(
        self,
        iteration: int,
        rollouts: Sequence[Rollout],
        pairs: Sequence[AlignedPair],
        report: StepReport,
        seconds: dict[str, float],
        note: str = "",
        *,
        rewarded: Mapping[str, float] = MappingProxyType({}),
        more: Mapping[str, float] = MappingProxyType({}),
        timers: str = "",
    ) -> None:
        """Record one finished step; `iteration` counts from 1. Collective over the data-parallel group.

        note: ends the log line, and is not recorded. rewarded: metrics of rewards. more: what is measured
        over all ranks; it is recorded, and not in the log line. timers: lines of Megatron's timers.
        """
        samples = sample_sums(rollouts, pairs, self._group, teachers=self._teachers)
        values = ratios(report, samples, sampled=self._sampled) | dict(rewarded)
        if self._sampled and any(rollout.weight_version != iteration - 1 for rollout in rollouts):
            values["rollout_lag"] = (
                iteration - 1 - float(np.mean([rollout.weight_version for rollout in rollouts]))
            )
        if not self._active:
            return
        timing = {f"seconds_{hop}": value for hop, value in seconds.items()} | {
            "peak_memory_gib": peak_memory_gib()
        }
        if self._sampled:
            timing["rollout_tokens_per_second"] = _ratio(
                report.sums["num_labels"], seconds.get("rollout", 0.0)
            )
        self._record("step", iteration, {**values, "seconds": sum(seconds.values()), **timing, **more})
        if self._progress is not None:
            self._progress.start()
            self._progress.update(self._steps, completed=iteration)
        if iteration % self._log_interval == 0 or iteration == self._train_iters:
            line = log_line(iteration, self._train_iters, values, seconds, batch_size=self._batch_size)
            self.say("\n".join(filter(None, (f"{line} {note} |" if note else line, timers))))
        self._watch_mass(values.get("student_mass_outside_u"))

    def evaluation(self, iteration: int, values: dict[str, float | list[int]]) -> None:
        """Record an evaluation of the weights after `iteration` steps; lists go to metrics.jsonl only."""
        if self._active:
            self._record("evaluation", iteration, values)
            shown = [f"{name}: {value:.4f}" for name, value in values.items() if not isinstance(value, list)]
            self.say(f" evaluation at iteration {iteration} | " + " | ".join(shown))

    def responses(self, finished: int, of: int) -> None:
        """On a terminal, a bar of the responses that this rank samples, while it does."""
        if self._progress is not None:
            self._progress.start()
            if finished == 0:
                self._progress.reset(self._responses)
            self._progress.update(self._responses, completed=finished, total=of, visible=finished < of)

    def say(self, text: str) -> None:
        """One line on the terminal, above the progress bar where there is one."""
        if self._active:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        for writer in self._writers:
            writer.close()

    def _record(self, kind: str, iteration: int, values: dict[str, float | list[int]]) -> None:
        for writer in self._writers:
            writer.write(kind, iteration, values)

    def _remember_masses(self, masses: Sequence[float | None]) -> None:
        """What `_watch_mass` knew before the run was interrupted."""
        known = [mass for mass in masses if mass is not None]
        if known:
            self._first_mass = known[0]
            self._warned = max(known) > known[0] + self.WARN_MASS_RISE

    def _watch_mass(self, mass: float | None) -> None:
        """Student mass that leaves U costs nothing under a loss over U: say so, once, when it grows."""
        if mass is None or mass != mass:
            return
        if self._first_mass is None:
            self._first_mass = mass
        if not self._warned and mass > self._first_mass + self.WARN_MASS_RISE:
            self._warned = True
            self.say(
                " WARNING: the student's probability outside the compared tokens rose from "
                f"{self._first_mass:.3f} to {mass:.3f}; the loss does not see it"
            )


def log_line(
    iteration: int, train_iters: int, values: dict[str, float], seconds: dict[str, float], *, batch_size: int
) -> str:
    """Megatron-LM's log line: fields between bars, the first ones in its order and words."""
    fields = [
        f" iteration {iteration:8d}/{train_iters:8d}",
        f"consumed samples: {iteration * batch_size:12d}",
        f"elapsed time per iteration (ms): {1000 * sum(seconds.values()):.1f}",
        f"learning rate: {values['learning_rate']:.6E}",
        f"global batch size: {batch_size:5d}",
        f"loss: {values['loss']:.6E}",
        f"grad norm: {values['grad_norm']:.3f}",
    ]
    first = {"learning_rate", "loss", "grad_norm"}
    fields += [
        f"{name.replace('_', ' ')}: {value:.4f}"
        for name, value in values.items()
        if name not in first and value == value and not (name.startswith("dropped_") and value == 0.0)
    ]
    fields.append("seconds: " + " ".join(f"{hop} {value:.2f}" for hop, value in seconds.items()))
    return " | ".join(fields) + " |"
