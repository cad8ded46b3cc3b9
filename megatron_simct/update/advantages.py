"""Advantages of the responses to one prompt, relative to each other.

    A_i = (r_i - mean(r)) / (std(r) + EPSILON)        GRPO, arXiv:2402.03300, section 4.1.2

over the group of responses to one prompt; std with divisor n. A response without a reward has no advantage
and is not part of the mean. Samples of a group may lie on several data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

EPSILON = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """The advantages of the samples of one step."""

    of_samples: dict[int, float]
    """By sample id, for the samples of this rank."""
    metrics: dict[str, float]
    """reward (mean), reward_spread (mean over groups of the standard deviation), reward_silent
    (share of groups whose rewards are all the same, which teach nothing), reward_failed (share of
    responses without one)."""


def group_advantages(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """float64 [n] -> float64 [n], by consecutive groups. nan means no reward; its advantage is 0."""
    groups = rewards.reshape(-1, group_size)
    known = ~np.isnan(groups)
    number = np.maximum(known.sum(axis=1, keepdims=True), 1)
    values = np.where(known, groups, 0)
    centred = np.where(known, groups - values.sum(axis=1, keepdims=True) / number, 0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / number)
    return (centred / (std + EPSILON)).reshape(-1)


def exchange(
    sample_ids: Sequence[int],
    rewards: Sequence[float] | None,
    *,
    places: Sequence[int],
    batch_size: int,
    group_size: int,
) -> Advantages:
    """The advantages of a rank's samples. Collective over the whole job: one sum of two numbers a sample.

    rewards: nan means no reward; None on all but one rank of a model replica. places: of the samples in the
    step, each its own over all replicas; those of a group are side by side. batch_size counts the samples of
    the step.
    """
    sums = torch.zeros(2, batch_size, dtype=torch.float64)
    if rewards is not None and places:
        given = torch.tensor(rewards, dtype=torch.float64)
        sums[0, places], sums[1, places] = given.nan_to_num(nan=0.0), (~given.isnan()).double()
    sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    total, known = sums.cpu().numpy()
    everyone = np.where(known > 0, total, np.nan)
    found = group_advantages(everyone, group_size)
    return Advantages(
        of_samples={
            sample_id: float(found[place]) for sample_id, place in zip(sample_ids, places, strict=True)
        },
        metrics=_metrics(everyone, group_size),
    )


def _metrics(rewards: np.ndarray, group_size: int) -> dict[str, float]:
    groups = rewards.reshape(-1, group_size)
    known = ~np.isnan(groups)
    spreads = [
        float(np.std(group[is_known])) if is_known.any() else 0.0
        for group, is_known in zip(groups, known, strict=True)
    ]
    return {
        "reward": float(rewards[known.reshape(-1)].mean()) if known.any() else 0.0,
        "reward_spread": float(np.mean(spreads)),
        "reward_silent": float(np.mean(np.array(spreads) == 0)),
        "reward_failed": float(1 - known.mean()),
    }
