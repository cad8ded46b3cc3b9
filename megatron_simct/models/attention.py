"""Softmax attention: replaces Megatron's DotProductAttention. By torch's own operations on any device, or
by the kernel that `kernels` says.

    score(q, k) = scale * <q, k>, then cap * tanh(score / cap) where the architecture has a soft-cap
    weight(q, k) = exp score(q, k) / sum of these over the visible keys, and over exp(sink) where a head has
    one
    query i sees key j of its own sequence  iff  0 <= i - j < window

Padding stands behind the tokens that it follows, so none of them sees it; what it computes
itself, nothing reads.

Shape letters: S queries, K keys, B sequences (1 where they are packed one after another), n query heads and g
key heads of this tensor-parallel rank, d entries of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_simct.config.options import AttentionBackend
from megatron_simct.models import flex
from megatron_simct.models.kernels import Kernel, Scores, kernel_of
from megatron_simct.models.layout import Layout, visible_keys
from megatron_simct.models.norm import RMSNorm, UnweightedNorm
from megatron_simct.models.rotary import Rope
from megatron_simct.parallel.cpu import megatron_imports

if TYPE_CHECKING:
    from megatron_simct.models.layers import Step

with megatron_imports():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class SelfAttention(MegatronSelfAttention):
    """Megatron's, with the rotary angles of this layer's kind, or without any."""

    def __init__(
        self,
        *args: Any,
        rope: Rope | None,
        rope_index: int | None,
        whole_norms: tuple[Callable[..., torch.nn.Module], ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """rope_index: the index of its angles in Rotary's output. None: the layer has no rotary
        embedding. whole_norms: of all heads of queries, and of keys, together; Megatron has norms
        of single heads only."""
        super().__init__(*args, **kwargs)
        if whole_norms is not None:
            self.q_layernorm, self.k_layernorm = (
                norm(
                    hidden_size=self.hidden_size_per_attention_head,
                    config=self.config,
                    eps=self.config.layernorm_epsilon,
                )
                for norm in whole_norms
            )
        self.rope, self.rope_index = rope, rope_index
        if isinstance(self.q_layernorm, UnweightedNorm):
            self.core_attention.norms_after_rope = (self.q_layernorm, self.k_layernorm)

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """rotary_pos_emb: of all kinds of layers, see Rotary."""
        angles = None if self.rope_index is None else rotary_pos_emb[self.rope_index]
        return super().forward(*args, rotary_pos_emb=angles, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        query, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.rope is not None and self.rope.attention_factor != 1.0:
            # The factor belongs to the rotated entries of query and key alike; a product sees its square.
            rotated, others = query.split([self.rope.dim, query.shape[-1] - self.rope.dim], dim=-1)
            query = torch.cat([rotated * self.rope.attention_factor**2, others], dim=-1)
        return query, *rest


class CoreAttention(torch.nn.Module):
    """softmax(score) @ values, for one layer."""

    def __init__(
        self,
        *,
        window: int | None,
        scale: float,
        cap: float | None,
        sinks: int = 0,
        rope: Rope | None = None,
        scores: Scores | None = None,
        config: TransformerConfig | None = None,
        **_: Any,
    ) -> None:
        """sinks: number of query heads with a sink, 0 or all. scores: what `choose` reads. Other arguments:
        see Megatron."""
        super().__init__()
        self.sinks = None
        if sinks and config is not None:
            own = sinks // parallel_state.get_tensor_model_parallel_world_size()
            self.sinks = torch.nn.Parameter(torch.zeros(own, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.sinks, True, 0, 1)
        self._scores = scores
        self.kernel: Kernel = "torch"
        self._window = window
        self._scale = scale
        self._cap = cap
        self._growing = rope if rope is not None and rope.query_growth else None
        # In a tuple, so that their weights are parameters of SelfAttention only.
        self.norms_after_rope: tuple[RMSNorm, ...] = ()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: Layout | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[S, B, n, d], [K, B, g, d], [K, B, g, d] -> [S, B, n * d].

        packed_seq_params: the sequences. None: each row is a sequence, the queries
        the last S of the K.
        """
        assert attention_mask is None, "the Layout defines the masks"
        query = self._weighted(query)
        layout = packed_seq_params
        if layout is None:
            return self._attend(query, key, value, None)
        key, value = layout.all_keys(key, value)
        if self._takes_flex(layout):
            return self._in_one(query, key, value, layout)
        parts = [self._attend(query[p.queries], key[p.keys], value[p.keys], layout) for p in layout.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def choose(self, backend: AttentionBackend, *, on_gpu: bool, bf16: bool) -> None:
        """Set the kernel; see `kernels`."""
        assert self._scores is not None, "the layer says what its attention is"
        self.kernel = kernel_of(self._scores, backend, on_gpu=on_gpu, bf16=bf16)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For a checkpoint: sinks are split as the heads are."""
        own = {} if self.sinks is None else {"sinks": self.sinks}
        return make_sharded_tensors_for_checkpoint(own, prefix, {"sinks": 0}, sharded_offsets)

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """One query a head over cached keys: [B, g, n / g, d], [B, g, K, d], [B, g, K, d] -> [B, n * d].

        The heads that share keys are treated as queries of one head.
        """
        assert self.sinks is None, "generation does not compute sinks"
        visible = step.visible(self._window)
        query = self._weighted(query)
        if self._growing is not None:
            query = query * grown(step.where, self._growing)[:, None, None, None].to(query.dtype)
        if self._cap is None:
            out = scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=self._scale)
        else:
            products = query @ keys.transpose(2, 3)
            weights = step.regions.capped_weights(products, visible, self._scale, self._cap)
            out = weights.to(values.dtype) @ values
        return out.flatten(1)

    def _takes_flex(self, layout: Layout) -> bool:
        if self.kernel != "either":
            return self.kernel == "flex"
        is_cut = self._window is not None and self._window < layout.longest
        return is_cut or len(layout.pieces) > 1

    def _in_one(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """All queries of this rank, whatever sequences they belong to, by flex_attention."""
        if self._growing is not None:
            query = query * grown(layout.positions, self._growing)[:, None, None, None].to(query.dtype)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = layout.blocks(self._window)
        out = flex.attend(query, key, value, mask, scale=self._scale, cap=self._cap, sinks=self.sinks)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _weighted(self, query: torch.Tensor) -> torch.Tensor:
        """Queries times the weights of UnweightedNorm: a product of query and key sees
        the product of both.
        """
        if not self.norms_after_rope:
            return query
        ours, theirs = (norm.weight for norm in self.norms_after_rope)
        return query * (ours * theirs)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout | None
    ) -> torch.Tensor:
        """Consecutive queries of one sequence, or of B padded ones; the masks are those of
        the layout, if any.
        """
        num_queries, num_keys = query.shape[0], key.shape[0]
        if self._growing is not None:
            where = torch.arange(num_keys - num_queries, num_keys, device=query.device)
            query = query * grown(where, self._growing)[:, None, None, None].to(query.dtype)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        window = self._window if self._window is not None and self._window < num_keys else None
        is_triangle = num_queries == num_keys and window is None and self._cap is None and self.sinks is None
        visible = None
        if not is_triangle and layout is not None:
            visible = layout.visible_keys(num_queries, num_keys, window)
        elif not is_triangle:
            visible = visible_keys(num_queries, num_keys, window, device=query.device)
        if self._cap is None and self.sinks is None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.kernel == "flash" else nullcontext():
                out = scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=visible,
                    is_causal=is_triangle,
                    scale=self._scale,
                    enable_gqa=True,
                )
        else:
            out = capped_attention(
                query, key, value, visible, scale=self._scale, cap=self._cap, sinks=self.sinks
            )
        return out.permute(2, 0, 1, 3).flatten(2)


def grown(positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """float32: the factor of queries at these positions."""
    return 1 + rope.query_growth * torch.log(1 + torch.floor(positions.float() / rope.original_length))


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    cap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, n, S, d], [B, g, K, d], [B, g, K, d] -> [B, n, S, d]. Holds all scores; the softmax is in float32.

    sinks [n]: one more score of each head, whose weight goes to no value. visible: which keys each query
    sees, a bool that broadcasts to [B, n, S, K]; None: all of them.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    weights = weights if sinks is None else weights[..., :-1]
    return weights.to(value.dtype) @ value
