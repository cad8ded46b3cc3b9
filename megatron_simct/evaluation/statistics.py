"""The score of a model on a benchmark, and its uncertainty.

With k samples a problem, avg@k is the mean over problems of the share of right samples: an unbiased
estimate of pass@1. pass@k is the share of problems with a right sample. Intervals are percentiles of the
mean over problems that are drawn again with replacement. They show how the score varies with the set of
problems, not with the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimates(right: np.ndarray) -> dict[str, Estimate]:
    """right: bool [P, k], problems and their samples -> pass@1, or avg@k and pass@k if k > 1."""
    k = right.shape[1]
    if k == 1:
        return {"pass@1": bootstrap(right[:, 0])}
    return {f"avg@{k}": bootstrap(right.mean(axis=1)), f"pass@{k}": bootstrap(np.any(right, axis=1))}


def bootstrap(scores: np.ndarray) -> Estimate:
    """scores [P], one for each problem."""
    scores = scores.astype(np.float64)
    rng = np.random.default_rng(SEED)
    at_a_time = max(1, 2**20 // len(scores))
    means = [
        scores[rng.integers(0, len(scores), (min(at_a_time, RESAMPLES - start), len(scores)))].mean(axis=1)
        for start in range(0, RESAMPLES, at_a_time)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(mean=float(scores.mean()), low=float(low), high=float(high))
