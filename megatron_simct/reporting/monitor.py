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
    "loss": ("nats a label", "the loss, over all student labels of the step, dropped ones included"),
    "loss_one_to_one": ("nats a row", "the loss of segments that are one shared token on each side"),
    "loss_unit": ("nats a row", "the loss of multi-token units"),
    "loss_stop": ("nats a row", "the loss of the stop tokens"),
    "loss_bytes": ("nats a position", "interface bytes: the loss, over byte positions that are compared"),
    "grad_norm": ("", "norm of the gradient before --clip-grad"),
    "gradient_cosine_units": (
        "",
        "--gradient-parts-interval: cosine between the gradient of 1:1 positions (stop tokens too) and that "
        "of multi-token units; below 0 they pull the student apart",
    ),
    "gradient_ratio_units": ("", "the same: norm of the units' gradient over that of the 1:1 positions"),
    "learning_rate": ("", "of this step"),
    "response_length": ("tokens", "mean length of a response, its stop token included"),
    "stop_rate": ("share of samples", "responses that end in a stop token"),
    "student_nats_per_byte": ("nats a byte", "surprise of the student at the responses"),
    "teacher_nats_per_byte": ("nats a byte", "surprise of the teacher at the same bytes"),
    "student_entropy": (
        "nats a label",
        "surprise at the tokens as they were sampled: at rollout temperature 1, top-p 1 an estimate of the "
        "entropy",
    ),
    "rollout_logprob_gap": (
        "nats a label",
        "how far the mean log-prob of the samples in training is from that in sampling; 0 but for rounding "
        "unless the weights have changed",
    ),
    "rollout_logprob_difference": (
        "nats a label",
        "mean size of the difference between a sampled token's log-prob in training and in sampling",
    ),
    "rollout_logprob_difference_largest": ("nats", "the largest of these differences"),
    "rollout_importance_weight": (
        "",
        "--rollout-importance-weights: mean factor of the labels; 1 where training's weights sampled",
    ),
    "seconds_rollout_tail": (
        "s",
        "--rollout-engine vllm: of the sampling, with at most a tenth of the first rank's responses still to "
        "come",
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
        "responses that the student's tokenizer cuts as they were sampled",
    ),
    "reward": ("reward", "--reward: mean over the responses that have one"),
    "reward_spread": (
        "reward",
        "--reward: standard deviation among the responses to one prompt, mean over prompts",
    ),
    "reward_silent": (
        "share of prompts",
        "--reward: prompts whose responses all have one reward, which teach nothing",
    ),
    "reward_failed": ("share of samples", "--reward: responses without a reward"),
    "loss_reward": ("nats a label", "--reward: the policy-gradient term, part of the loss"),
    "reward_clipped": (
        "share of labels",
        "--reward: labels whose probability has moved too far to be moved further",
    ),
    "given_cross_entropy": (
        "nats a label",
        "--given-share: cross entropy of the given responses, before --sft-weight",
    ),
    "reference_kl": (
        "nats a label",
        "--reference-kl-weight: KL of the student from its start at sampled labels, before the weight",
    ),
    "seconds_reward": ("s", "of it in waiting for rewards"),
    "coverage_one_to_one": ("share of bytes", "bytes in segments of one shared token on each side"),
    "coverage_unit": ("share of bytes", "bytes in multi-token units"),
    "blank_segments": ("share of segments", "segments of white space only"),
    "top1_agreement": (
        "share of rows",
        "rows where both models' likeliest token, of those compared, is the same",
    ),
    "student_mass_outside_u": (
        "probability",
        "what the student gives tokens that are not shared; a loss over shared tokens does not see it",
    ),
    "teacher_mass_outside_u": ("probability", "what the teacher gives tokens that are not shared"),
    "bytes_student_rest": (
        "probability",
        "bytes with --simct-byte-bounds longest-match: the student's probability of all bytes outside the "
        "event set",
    ),
    "bytes_teacher_rest": ("probability", "the teacher's probability of the same"),
    "bytes_merged": (
        "events a position",
        "likewise: events that were joined to the rest or left out, as the models may agree on them",
    ),
    "bytes_student_unresolved": (
        "probability",
        "interface bytes: the student's mass that has left the realised tokens, so that its next byte is not "
        "known",
    ),
    "bytes_teacher_unresolved": ("probability", "interface bytes: the same of the teacher"),
    "bytes_may_agree": (
        "share of positions",
        "interface bytes: positions where the unresolved mass permits that both models are the same, so the "
        "loss is 0",
    ),
    "dropped_mismatch": ("share of bytes", "left out: the two tokenizers' bytes differ"),
    "dropped_special": ("share of bytes", "left out: from a special token within the response on"),
    "dropped_one_stop": ("share of bytes", "left out: only one side ends in a stop token"),
    "dropped_no_bytes": ("share of bytes", "left out: tokens without bytes in a response that has none"),
    "dropped_walk": ("share of bytes", "left out: lost by the released code's walk (interface code)"),
    "dropped_invalid_utf8": ("share of bytes", "left out: from bytes that are not UTF-8 on"),
    "seconds": ("s", "wall time of the step"),
    "seconds_rollout": ("s", "of it in sampling"),
    "seconds_alignment": ("s", "of it in alignment"),
    "seconds_teacher": ("s", "of it in scoring, or in waiting for the teacher's job"),
    "seconds_update": ("s", "of it in the forward and backward passes, and the optimizer"),
    "peak_memory_gib": (
        "GiB",
        "the most that the first rank's process has held so far, on its GPU or resident",
    ),
    "seconds_rollout_slowest": ("s", "the most that any rank took in sampling; the others wait for it"),
    "seconds_alignment_slowest": ("s", "the same in alignment"),
    "seconds_teacher_slowest": ("s", "the same in scoring, or in waiting for the teacher's job"),
    "seconds_reward_slowest": ("s", "the same in waiting for rewards"),
    "seconds_update_slowest": ("s", "the same in the update"),
    "seconds_slowest_rank": (
        "rank",
        "the one that took most in sampling, or in the update where nothing is sampled",
    ),
    "peak_memory_gib_most": ("GiB", "the most that any rank's process has held so far"),
    "peak_memory_most_rank": ("rank", "that rank"),
    "update_tflops": (
        "TFLOP/s a rank",
        "--log-throughput: operations of forward and backward passes, those that are computed again apart, "
        "in a second of the update",
    ),
    "update_mfu": (
        "share of the peak",
        "--log-throughput: the same over the GPU's peak in bf16, where that is known",
    ),
    "rollout_tflops": ("TFLOP/s a rank", "--log-throughput: the same of sampling"),
    "rollout_tokens_per_second": ("tokens a second", "sampled, over all ranks"),
    "greedy_accuracy": ("share of prompts", "evaluation: greedy responses that are right (--eval-benchmark)"),
    "sampled_accuracy": ("share of responses", "evaluation: sampled responses that are right"),
    "greedy_right": (
        "count a prompt",
        "evaluation: right greedy responses to each held-out prompt, in file order",
    ),
    "sampled_right": ("count a prompt", "evaluation: the same of the sampled ones"),
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
        return self._count(lengths, sum(len(rollout.student_ids) for rollout in rollouts)) if lengths else 0.0


def sample_sums(
    rollouts: Sequence[Rollout], pairs: Sequence[AlignedPair], group: dist.ProcessGroup
) -> dict[str, float]:
    """Sums over the global batch of what samples say of themselves.

    Collective over the data-parallel group.
    """
    sums: dict[str, float] = {name: sum(pair.counts.get(name, 0) for pair in pairs) for name in COUNTS}
    sums |= {
        "samples": len(rollouts),
        "stopped": sum(r.finish == "stop" for r in rollouts),
        "rollout_nll_sum": -sum(float(np.sum(r.logprobs, dtype=np.float64)) for r in rollouts),
    }
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
    elif sums.get("num_teacher_labels"):
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
    if "loss_reward_sum" in sums:
        values["loss_reward"] = _ratio(sums["loss_reward_sum"], sums["num_labels"])
        values["reward_clipped"] = _ratio(sums["reward_clipped_sum"], sums["num_labels"])
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
        writers: Sequence[Writer] = (),
    ) -> None:
        """sampled: responses come from the student; else they are given, and have no log-probs of their own.

        start: the iteration that a resumed run goes on from. writers: where metrics go beside metrics.jsonl.
        """
        self._group = groups.dp
        self._active = groups.is_first_rank
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._batch_size = batch_size
        self._sampled = sampled
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
        values = ratios(report, sample_sums(rollouts, pairs, self._group), sampled=self._sampled) | dict(
            rewarded
        )
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
