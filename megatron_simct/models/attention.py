"""Attention in torch's own operations, on any device: in the place of Megatron's DotProductAttention.

    score(q, k) = scale * <q, k>, then cap * tanh(score / cap) where the architecture has a soft-cap
    query i sees key j  iff  0 <= i - j < window, and j is no padding

Shape letters: S queries, K keys, B sequences, T tokens of packed sequences, n query heads and g key heads of this
tensor-parallel rank, d entries of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_simct.models.families import Architecture
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention


class SelfAttention(MegatronSelfAttention):
    """Megatron's, with the rotary angles of this layer's kind, or without any."""

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rope_index = architecture.rope_of_layer[self.layer_number - 1]
        self.rope = None if self.rope_index is None else architecture.ropes[self.rope_index]
        """None: nothing is turned."""

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """rotary_pos_emb: of all kinds of layers, see Rotary."""
        angles = None if self.rope_index is None else rotary_pos_emb[self.rope_index]
        return super().forward(*args, rotary_pos_emb=angles, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        query, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.rope is not None and self.rope.attention_factor != 1.0:
            # The factor belongs to the turned entries of query and key alike; a product sees its square.
            turned, others = query.split([self.rope.dim, query.shape[-1] - self.rope.dim], dim=-1)
            query = torch.cat([turned * self.rope.attention_factor**2, others], dim=-1)
        return query, *rest


class CoreAttention(torch.nn.Module):
    """softmax(score) @ values, for one layer."""

    def __init__(self, *, architecture: Architecture, layer_number: int, **_: Any) -> None:
        """layer_number: in the whole model, counted from 1. Megatron's other arguments say what `architecture` does."""
        super().__init__()
        self._window = architecture.windows[layer_number - 1]
        self._scale = architecture.softmax_scale
        self._cap = architecture.attention_softcap

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[S, B, n, d], [K, B, g, d], [K, B, g, d] -> [S, B, n * d]; packed, [T, n, d] and so on -> [T, n * d].

        The queries are the last S of the K positions. attention_mask: bool [B, 1, 1, K], True where a key is padding,
        or None. A query sees itself in any case: what padding computes is finite, and nothing reads it.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value, attention_mask)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._attend(q[:, None], k[:, None], v[:, None], None)[:, 0] for q, k, v in parts])

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """One query a sequence over cached keys: [B, n, d], [B, g, K, d], [B, g, K, d] -> [B, n * d].

        positions: int64 [B], where each query stands; it sees the keys up to there. None: all stand at K - 1.
        """
        num_keys, groups = keys.shape[2], keys.shape[1]
        window = self._window if self._window is not None and self._window < num_keys else None
        visible = None
        if positions is not None or window is not None:
            steps = torch.arange(num_keys, device=keys.device)
            back = (num_keys - 1 if positions is None else positions[:, None]) - steps
            visible = back >= 0 if window is None else (back >= 0) & (back < window)
            visible = visible.view(-1, 1, 1, num_keys)
        query = query.unflatten(1, (groups, -1))  # the heads that share keys, as queries of one head
        if self._cap is None:
            out = scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=self._scale)
        else:
            out = capped_attention(query, keys, values, visible, scale=self._scale, cap=self._cap)
        return out.flatten(1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        num_queries, num_keys = query.shape[0], key.shape[0]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        window = self._window if self._window is not None and self._window < num_keys else None
        is_triangle = num_queries == num_keys and window is None and is_padding is None and self._cap is None
        visible = None
        if not is_triangle:
            visible = visible_keys(num_queries, num_keys, window=window, is_padding=is_padding, device=query.device)
        if self._cap is None:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=visible, is_causal=is_triangle, scale=self._scale, enable_gqa=True
            )
        else:
            out = capped_attention(query, key, value, visible, scale=self._scale, cap=self._cap)
        return out.permute(2, 0, 1, 3).flatten(2)


def visible_keys(
    num_queries: int, num_keys: int, *, window: int | None, is_padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which keys each query sees, bool [S, K], or [B, 1, S, K] with padding."""
    keys = torch.arange(num_keys, device=device)
    back = keys[num_keys - num_queries :, None] - keys
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    return visible if is_padding is None else (visible & ~is_padding) | (back == 0)


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """[B, n, S, d], [B, g, K, d], [B, g, K, d] -> [B, n, S, d]. Holds all scores; the softmax is in float32.

    visible: which keys each query sees, a bool that broadcasts to [B, n, S, K]; None: all of them.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)) * cap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value
