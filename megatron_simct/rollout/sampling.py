"""Exact sampling from logits that are split by vocabulary, without gathering them.

Only numbers per row cross ranks: a maximum, a sum, each shard's probability mass, and the chosen id. A token
is chosen by inverting the cumulative distribution in the order of ids at a given uniform number, so a sample
does not depend on how the vocabulary is split (up to rounding).

Shape letters: B rows, W this rank's columns, P ranks of the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    shard_start: int,
    vocab_size: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = -1,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    logits [B, W]: this rank's columns, ids [shard_start, shard_start + W); ids >= vocab_size are padding.
    uniforms [B] float64 in [0, 1): the same on every rank; not read when temperature is 0 (greedy; of equal
    logits the lowest id). top_k (-1: all) cuts before top_p, which is a share of what top_k leaves. Returns
    ids int64 [B] and their log-probs float32 [B] under the untempered, untruncated softmax, the same on every
    rank. A row with nan gives some real id and the log-prob nan.
    """
    logits = logits.float()
    num_real = min(max(vocab_size - shard_start, 0), logits.shape[1])
    if num_real < logits.shape[1]:
        logits = logits.masked_fill(
            torch.arange(logits.shape[1], device=logits.device) >= num_real, float("-inf")
        )
    top = _reduce(logits.amax(dim=1), dist.ReduceOp.MAX, group)
    normalizer = _reduce((logits - top[:, None]).exp().sum(dim=1).double(), dist.ReduceOp.SUM, group)

    if temperature == 0.0:
        local = _lowest_argmax(logits, top)
        owned = local < logits.shape[1]
        ids = torch.where(owned, local + shard_start, torch.iinfo(torch.int64).max)
        ids = _reduce(ids, dist.ReduceOp.MIN, group).clamp(max=vocab_size - 1)
        return ids, (-normalizer.log()).float()

    weights = ((logits - top[:, None]) / temperature).exp()
    if 0 < top_k < vocab_size:
        weights = weights * (weights >= kth_weight(weights, top_k, group=group)[:, None])
    if top_p < 1.0:
        weights = weights * (weights >= nucleus_cutoff(weights, top_p, group=group)[:, None])
    local, owned = _invert_cdf(weights, uniforms, group)
    own_logit = logits.gather(1, local[:, None])[:, 0].double() - top
    chosen = torch.stack([(local + shard_start).double(), own_logit])
    chosen = _reduce(torch.where(owned, chosen, 0.0), dist.ReduceOp.SUM, group)
    return chosen[0].long().clamp(max=vocab_size - 1), (chosen[1] - normalizer.log()).float()


def kth_weight(weights: torch.Tensor, top_k: int, *, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The top_k-th largest weight of each row, [B]; ties with it are kept too.

    weights [B, W] >= 0. Each rank offers its top_k largest weights, so none of the row's top_k is missing.
    """
    offered = weights.new_zeros(len(weights), top_k)  # a shard narrower than top_k offers all its columns
    heaviest = weights.topk(min(top_k, weights.shape[1]), dim=1).values
    offered[:, : heaviest.shape[1]] = heaviest
    return _gather(offered, group).transpose(0, 1).flatten(1).topk(top_k, dim=1).values[:, -1]


def nucleus_cutoff(
    weights: torch.Tensor, top_p: float, *, group: dist.ProcessGroup | None, candidates: int = 64
) -> torch.Tensor:
    """The smallest weight of the nucleus: the fewest tokens, from the largest weight on, that hold top_p of
    the mass. [B]

    weights [B, W] >= 0, not normalised. Each rank offers its largest weights; the answer is exact once no
    rank can hold an unseen token above the cutoff, else all ranks offer twice as many. Ties with the cutoff
    are in the nucleus.
    """
    wanted = top_p * _reduce(weights.sum(dim=1, dtype=torch.float64), dist.ReduceOp.SUM, group)
    width = weights.shape[1]
    while True:
        count = min(candidates, width)
        offered = weights.topk(count, dim=1).values
        shards = _gather(offered, group)  # [P, B, count]
        ordered = shards.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        mass = ordered.double().cumsum(dim=1)
        reached = mass >= wanted[:, None] * (1.0 - 1e-12)
        position = reached.int().argmax(dim=1)
        cutoff = ordered.gather(1, position[:, None])[:, 0]
        cutoff = torch.where(reached.any(dim=1), cutoff, torch.zeros_like(cutoff))
        unseen = shards[:, :, -1].amax(dim=0) > cutoff
        # Agreed: the sums behind it may differ in their last bits from rank to rank, and each waits for the
        # others.
        undecided = _reduce(unseen.any().int(), dist.ReduceOp.MAX, group)
        if count == width or not bool(undecided):
            return cutoff
        candidates *= 2


def _invert_cdf(
    weights: torch.Tensor, uniforms: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The local column that holds the uniform's quantile [B], and whether this rank is the
    one that holds it [B].
    """
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    mass = cumulative[:, -1].contiguous()
    masses = _gather(mass, group)  # [P, B]
    ends = masses.cumsum(dim=0)
    target = uniforms * ends[-1]
    owner = (ends <= target).sum(dim=0).clamp(max=len(masses) - 1)
    rank = 0 if group is None else group.rank()
    begin = ends[rank] - masses[rank]
    # Rounding may put the target on the very end of the shard, where no token with mass begins.
    inside = (target - begin).clamp(min=0.0).minimum(torch.nextafter(mass, torch.zeros_like(mass)))
    local = torch.searchsorted(cumulative, inside[:, None], right=True)[:, 0]
    return local.clamp(max=weights.shape[1] - 1), owner == rank


def _lowest_argmax(logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The first column equal to the row's global maximum, or W where this shard has none. [B]"""
    is_top = logits == top[:, None]
    return torch.where(is_top.any(dim=1), is_top.int().argmax(dim=1), logits.shape[1])


def _reduce(
    value: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(value, op=op, group=group)
    return value


def _gather(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[P, ...]: the value of every rank."""
    if group is None or group.size() == 1:
        return value[None]
    values = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(values, value.contiguous(), group=group)
    return torch.stack(values)
