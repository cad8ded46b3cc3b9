"""The experts of a token and their weights, in float64, one token at a time."""

from __future__ import annotations

import torch


def route(
    logits: torch.Tensor,
    *,
    chosen: int,
    score: str,
    correction: list[float] | None = None,
    groups: int = 1,
    chosen_groups: int = 1,
    normalized: bool = True,
    least_sum: float = 0.0,
    factor: float = 1.0,
) -> torch.Tensor:
    """[T, experts] -> weights of the same shape, 0 for experts that are not chosen.

    s = exp(z) / sum exp(z), or 1 / (1 + exp(-z)). A group's rank is the sum of its two largest s +
    correction. The `chosen` largest s + correction of the `chosen_groups` best groups are chosen. Their
    weight is factor * s, divided by their sum if normalized.
    """
    rows = []
    for z in logits:
        s = (
            [e / sum(v.exp() for v in z) for e in z.exp()]
            if score == "softmax"
            else [1 / (1 + (-v).exp()) for v in z]
        )
        rank = [float(v.detach()) + (0.0 if correction is None else correction[i]) for i, v in enumerate(s)]
        size = len(rank) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        if groups > 1:
            members.sort(key=lambda group: -sum(sorted((rank[i] for i in group), reverse=True)[:2]))
        allowed = [i for group in members[:chosen_groups] for i in group]
        best = sorted(allowed, key=lambda i: -rank[i])[:chosen]
        total = sum(s[i] for i in best)
        total = total if float(total.detach()) > least_sum else torch.tensor(least_sum, dtype=logits.dtype)
        row = [torch.zeros((), dtype=logits.dtype)] * len(rank)
        for i in best:
            row[i] = factor * (s[i] / total if normalized else s[i])
        rows.append(torch.stack(row))
    return torch.stack(rows)
