"""Reports of a training job: timers, metrics of all ranks, and responses that are written to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_simct.config.options import Config
from megatron_simct.loading import Pair
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.operations import Operations, peak_operations
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, Prompt, Rollout
from megatron_simct.reporting.monitor import Throughput, slowest_ranks
from megatron_simct.reporting.samples import SampleLog
from megatron_simct.rollout.engine import write_rollouts
from megatron_simct.update.distributed_state import parts_of
from megatron_simct.update.step import StepReport

with megatron_imports():
    from megatron.core.timers import Timers


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
        teachers={name: teacher.tokenizer for name, teacher in pair.by_name.items()},
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
