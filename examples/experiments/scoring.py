"""Outcomes of finished runs as scores of held-out problems, and differences between them, with intervals.

The toy's 200 held-out problems are 54 pairs of numbers in different words (`examples/quickstart/task.py`). A
model that can add a pair can add it in any words. Therefore intervals resample pairs, each with all of its
problems, and not problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.quickstart.task import LEFT, RIGHT
from megatron_simct.evaluation.statistics import RESAMPLES, SEED, Estimate, bootstrap

NUM_PAIRS = len(LEFT) * len(RIGHT) // 5
"""Number of held-out pairs of numbers. Problem i belongs to pair i modulo this."""


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
    """[P], one for each held-out problem or text. Their mean is the run's figure of that metric."""
    name = f"{metric}_before" if before else metric
    if "outcomes" in result:
        samples = result["configuration"]["eval_samples"] if metric == "sampled" else 1
        return np.array([int(digit) for digit in result["outcomes"][name]]) / samples
    sums, counts = (np.array(result["texts"][key]) for key in (name, f"{metric}_count"))
    return sums * len(sums) / counts.sum()


def change(results: Sequence[Mapping[str, Any]], metric: str) -> Estimate:
    """The change of a metric by distillation (after - before), averaged over seeds."""
    values = [scores(r, metric) - scores(r, metric, before=True) for r in results]
    return _estimate(np.mean(values, axis=0), results[0])


def difference(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], metric: str
) -> Estimate:
    """Difference between two interfaces (ours - theirs), averaged over common seeds.

    Raises ValueError if there are none.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError("no seed in common")
    values = [scores(ours[s], metric) - scores(theirs[s], metric) for s in seeds]
    return _estimate(np.mean(values, axis=0), ours[seeds[0]])


def _estimate(values: np.ndarray, result: Mapping[str, Any]) -> Estimate:
    return by_clusters(values, NUM_PAIRS) if "outcomes" in result else bootstrap(values)


def by_clusters(values: np.ndarray, num_clusters: int) -> Estimate:
    """values [P]: the mean, and its interval over resampled clusters. Value i belongs to cluster i
    modulo their number.
    """
    cluster = np.arange(len(values)) % num_clusters
    sums, sizes = np.bincount(cluster, weights=values), np.bincount(cluster)
    drawn = np.random.default_rng(SEED).integers(0, len(sizes), (RESAMPLES, len(sizes)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [2.5, 97.5])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


def over_starts(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """values [W, P] of W warm starts, clusters [P]: the mean, and its interval over resampled warm starts and
    clusters. Values [:, i] belong to cluster clusters[i].
    """
    names = np.unique(clusters)
    num_clusters, of_cluster = len(names), clusters[:, None] == names
    sums, sizes = values @ of_cluster, of_cluster.sum(axis=0)
    random = np.random.default_rng(SEED)
    starts = random.integers(0, len(values), (RESAMPLES, len(values)))
    # How often each warm start was drawn; then the sums of every drawn set of them, by cluster.
    counts = (starts[:, :, None] == np.arange(len(values))).sum(axis=1)
    drawn = random.integers(0, num_clusters, (RESAMPLES, num_clusters))
    means = np.take_along_axis(counts @ sums, drawn, axis=1).sum(axis=1) / (
        len(values) * sizes[drawn].sum(axis=1)
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


def verdict(estimate: Estimate, metric: Metric) -> str:
    """better, worse, or undecided if the interval contains 0."""
    low, high = (estimate.low, estimate.high) if metric.higher_is_better else (-estimate.high, -estimate.low)
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
