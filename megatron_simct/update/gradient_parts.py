"""Compares two parts of a step's gradient: that of the 1:1 positions, and that of all other segments.

With g_1 the gradient of the segments of one shared token on each side and of the stop tokens, and g_u that of
the rest:

    cosine = <g_1, g_u> / (|g_1| |g_u|)        ratio = |g_u| / |g_1|

A cosine below 0 means that the units work against the 1:1 positions (arXiv:2610.08448). The loss is a sum
over segments, so g_u is the step's own gradient minus g_1, which takes one more pass over the same
micro-batches, with the weights of the units set to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.records import MicroBatch, SegmentKind
from megatron_simct.update.distributed_state import parts_of

with megatron_imports():
    from megatron.core.optimizer import MegatronOptimizer


def without_units(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with units of weight 0.

    Its labels count as before: the gradient is divided by their number.
    """
    labels = batch.labels
    weights = labels.weights.masked_fill(labels.kinds == SegmentKind.UNIT, 0)
    return replace(batch, labels=replace(labels, weights=weights))


def gradients(optimizer: MegatronOptimizer) -> list[list[torch.Tensor]]:
    """Copies of the gradients that count for this rank's part of the norm, by optimizer of a chain,
    after `prepare_grads`.
    """
    return [[one.clone() for one in _of_norm(part)] for part in parts_of(optimizer)]


def _of_norm(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients that count for this rank's part of the norm. megatron-core 0.19 has
    renamed the method.
    """
    found = getattr(part, "get_main_grads_for_grad_norm", None) or part.get_grads_for_grad_norm
    return found()


def compare(
    optimizer: MegatronOptimizer, of_one_to_one: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """The metrics, from `gradients` of the pass without units and the whole gradient in the optimizer.

    Collective.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for part, ones in zip(parts_of(optimizer), of_one_to_one, strict=True):
        full_gradients = _of_norm(part)
        device = full_gradients[0].device if full_gradients else None
        local_sums = torch.zeros(3, dtype=torch.float64, device=device)
        for one, full_gradient in zip(ones, full_gradients, strict=True):
            one, rest = one.flatten(), (full_gradient - one).flatten()
            local_sums += torch.stack([one.dot(one), one.dot(rest), rest.dot(rest)]).double()
        dist.all_reduce(local_sums, group=part.get_grad_stats_parallel_group())
        sums += local_sums.cpu()
    of_one, product, of_rest = sums.tolist()
    nothing = of_one == 0 or of_rest == 0
    return {
        "gradient_cosine_units": math.nan if nothing else product / math.sqrt(of_one * of_rest),
        "gradient_ratio_units": math.nan if of_one == 0 else math.sqrt(of_rest / of_one),
    }
