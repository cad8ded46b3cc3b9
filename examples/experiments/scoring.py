"""Outcomes of finished runs as scores of held-out problems, and differences of them with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_simct.evaluation.statistics import Estimate, bootstrap


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measure of a student."""

    name: str
    title: str
    higher_is_better: bool


ACCURACIES = (
    Metric(name="greedy", title="greedy accuracy", higher_is_better=True),
    Metric(name="sampled", title="sampled accuracy", higher_is_better=True),
)
DISTANCES = (
    Metric(name="nats", title="nats a byte", higher_is_better=False),
    Metric(name="bytes_reverse_kl", title="reverse KL a byte", higher_is_better=False),
    Metric(name="bytes_forward_kl", title="forward KL a byte", higher_is_better=False),
    Metric(name="strict_reverse_kl", title="reverse KL a 1:1 token", higher_is_better=False),
    Metric(name="strict_forward_kl", title="forward KL a 1:1 token", higher_is_better=False),
)


def metrics_of(result: Mapping[str, Any]) -> tuple[Metric, ...]:
    return ACCURACIES if "outcomes" in result else DISTANCES


def scores(result: Mapping[str, Any], metric: str, *, before: bool = False) -> np.ndarray:
    """[P], one a held-out problem or text; their mean is the run's figure of that metric."""
    name = f"{metric}_before" if before else metric
    if "outcomes" in result:
        samples = result["configuration"]["eval_samples"] if metric == "sampled" else 1
        return np.array([int(digit) for digit in result["outcomes"][name]]) / samples
    sums, counts = (np.array(result["texts"][key]) for key in (name, f"{metric}_count"))
    return sums * len(sums) / counts.sum()


def change(results: Sequence[Mapping[str, Any]], metric: str) -> Estimate:
    """Of the distillation, after - before, mean over seeds."""
    return bootstrap(np.mean([scores(r, metric) - scores(r, metric, before=True) for r in results], axis=0))


def difference(ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], metric: str) -> Estimate:
    """Of two interfaces, ours - theirs, mean over the seeds that both have; results by seed. ValueError without any."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError("no seed in common")
    return bootstrap(np.mean([scores(ours[s], metric) - scores(theirs[s], metric) for s in seeds], axis=0))


def verdict(estimate: Estimate, metric: Metric) -> str:
    """better, worse, or undecided where the interval has 0 in it."""
    low, high = (estimate.low, estimate.high) if metric.higher_is_better else (-estimate.high, -estimate.low)
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
