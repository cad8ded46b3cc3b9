"""The ratio of the trained policy to the sampling policy: PPO terms and importance weights.

    r_i  = pi(y_i) / pi_old(y_i)
    loss = -min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)    PPO, arXiv:1707.06347, Eq. 7
    w_i  = min(r_1 ... r_{i-1}, cap)                                    truncated as in arXiv:1802.01561

The policy-gradient term is for whatever gives a token an advantage: each token by itself, not divided by
anything. The weight w_i is for a loss that compares whole distributions behind the tokens before y_i: the
tokens are the only thing there that was sampled. Without the cap the weighted mean over pi_old's responses is
the mean over pi's.
"""

from __future__ import annotations

import math

import torch

from megatron_simct.records import LabelBatch

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
"""The upper bound is the wider one (DAPO, arXiv:2503.14476): unlikely tokens may still become likely."""


def log_ratios(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """[N]: log r_i, differentiable by log_probs."""
    return log_probs - old_log_probs.detach()


@torch.no_grad()
def importance_weights(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, response_starts: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """[N]: w_i of each label, in float64 until it is done. response_starts int64 [B],
    ascending: the first labels.
    """
    ratios = log_ratios(log_probs.double(), old_log_probs.double())
    # The sum of log r over all labels before i, less that before the response of i: what is left is the sum
    # within the response. float64, because the sums are long and their differences short.
    before = ratios.cumsum(0) - ratios
    position = torch.arange(len(ratios), device=ratios.device)
    starts = response_starts[torch.searchsorted(response_starts, position, right=True) - 1]
    return (before - before[starts]).clamp(max=math.log(cap)).exp().to(log_probs.dtype)


def policy_gradient(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
) -> torch.Tensor:
    """[N], differentiable by log_probs [N]; old_log_probs and advantages [N] have no gradient."""
    ratio = log_ratios(log_probs, old_log_probs).exp()
    advantages = advantages.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def of_rewards(log_probs: torch.Tensor, labels: LabelBatch, local: torch.Tensor) -> torch.Tensor:
    """[n]: the terms of the labels `local` [n], whose advantages are those of their responses
    (update/advantages.py).

    log_probs [n], of these labels; differentiable by it.
    """
    assert labels.advantages is not None and labels.sampling_log_probs is not None, "there is a reward"
    sampled, advantages = (
        values[local].to(log_probs.dtype) for values in (labels.sampling_log_probs, labels.advantages)
    )
    return policy_gradient(log_probs, sampled, advantages)


@torch.no_grad()
def reward_metrics(
    log_probs: torch.Tensor, terms: torch.Tensor, labels: LabelBatch, local: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums: of the terms, and of the labels whose ratio is clipped, so that they have no gradient."""
    assert labels.advantages is not None and labels.sampling_log_probs is not None, "there is a reward"
    ratio = (log_probs - labels.sampling_log_probs[local].to(log_probs.dtype)).exp()
    advantages = labels.advantages[local]
    clipped = ((ratio > 1 + CLIP_HIGH) & (advantages > 0)) | ((ratio < 1 - CLIP_LOW) & (advantages < 0))
    return {
        "loss_reward_sum": terms.sum(dtype=torch.float64),
        "reward_clipped_sum": clipped.sum(dtype=torch.float64),
    }
