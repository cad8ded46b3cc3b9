"""The gated delta rule (arXiv:2412.06464), token by token.

S <- e^g S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q
"""

from __future__ import annotations

import torch


def recurrence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, heads, k] twice, [B, S, heads, v], [B, S, heads] twice -> [B, S, heads, v], and
    S [B, heads, k, v].
    """
    state = torch.zeros(query.shape[0], query.shape[2], query.shape[3], value.shape[3], dtype=query.dtype)
    outputs = []
    for t in range(query.shape[1]):
        state = state * decay[:, t].exp()[..., None, None]
        predicted = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        update = beta[:, t, :, None] * (value[:, t] - predicted)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], update)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, dim=1), state
