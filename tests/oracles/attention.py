"""Attention in float64, one query at a time."""

from __future__ import annotations

import math

import torch


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
    sinks: torch.Tensor | None = None,
    growth: tuple[float, int] | None = None,
) -> torch.Tensor:
    """[S, B, n, d], [K, B, g, d], [K, B, g, d] -> [S, B, n * d]; the queries are the last S
    of the K positions.

    score = scale * <q, k>, capped to cap * tanh(score / cap); a query at position p weighs the positions of
    (p - window, p] by exp(score) over their sum, to which exp(sinks[h]) of head h is added. growth: (beta,
    length), queries at p are multiplied by 1 + beta * log(1 + floor(p / length)).
    """
    num_queries, num_sequences, heads, _ = query.shape
    num_keys, groups = key.shape[0], key.shape[2]
    sequences = []
    for b in range(num_sequences):
        rows = []
        for i in range(num_queries):
            position = num_keys - num_queries + i
            first = 0 if window is None else max(0, position - window + 1)
            seen = range(first, position + 1)
            row = []
            for h in range(heads):
                g = h // (heads // groups)
                grown = 1.0 if growth is None else 1 + growth[0] * math.log(1 + position // growth[1])
                scores = torch.stack([grown * scale * (query[i, b, h] * key[j, b, g]).sum() for j in seen])
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                weights = scores.exp() / (scores.exp().sum() + (0.0 if sinks is None else sinks[h].exp()))
                row.append(sum(w * value[j, b, g] for w, j in zip(weights, seen, strict=True)))
            rows.append(torch.cat(row))
        sequences.append(torch.stack(rows))
    return torch.stack(sequences, dim=1)
