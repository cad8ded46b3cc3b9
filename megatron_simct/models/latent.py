"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of a token come
from a short vector.

    c = norm(A_kv x)[: rank],   k_r = (A_kv x)[rank :], rotated by its position, one for all heads
    q = B_q norm(A_q x)         or B_q x; the last rope_dim entries of each head are rotated
    k_h = [K_h c, k_r],  v_h = V_h c

For teachers only: there is no cache, so it cannot generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_simct.models.attention import CoreAttention
from megatron_simct.models.kernels import Scores
from megatron_simct.models.layers import Angles, Cache, Layer, Share, check_divisor
from megatron_simct.models.norm import RMSNorm
from megatron_simct.models.rotary import Rope, apply_rotary
from megatron_simct.models.rules import Columns, Rows, Rule, Whole
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec

_EPSILON = 1e-6
"""Epsilon of its own norms in transformers, whatever the one in config.json is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """See the module."""

    heads: int
    query_rank: int | None
    """None: queries come from the hidden state itself."""
    rank: int
    nope_dim: int
    """Entries of a head's query and key that are not rotated."""
    rope_dim: int
    value_dim: int
    scale: float
    """Multiplies the product of query and key."""

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def check_divides(self, tp: int, *, flag: str) -> None:
        check_divisor(tp, "num_attention_heads", self.heads, flag=flag)
        check_divisor(tp, "kv_lora_rank + qk_rope_head_dim", self.rank + self.rope_dim, flag=flag)
        if self.query_rank is not None:
            check_divisor(tp, "q_lora_rank", self.query_rank, flag=flag)

    @property
    def scores(self) -> Scores:
        return Scores(key_dim=self.key_dim, value_dim=self.value_dim, shares_keys=False, bounded=False)

    @property
    def has_context_parallel(self) -> bool:
        return True

    @property
    def has_transformer_engine(self) -> bool:
        return False

    def options(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "num_query_groups": self.heads,
            "kv_channels": self.value_dim,
        }

    def spec(self, layer: Layer, backend: BackendSpecProvider, ropes: Sequence[Rope]) -> ModuleSpec:
        assert layer.rope is not None and layer.norms == "before", "no family has another"
        core = partial(CoreAttention, window=layer.window, scores=layer.scores, scale=self.scale, cap=None)
        return ModuleSpec(
            module=LatentAttention,
            params={"latent": self, "rope": layer.rope, "rope_index": ropes.index(layer.rope), "core": core},
        )

    def rules(self) -> dict[str, Rule]:
        ours, theirs = "self_attention.", "model.layers.*.self_attn."
        query: dict[str, Rule] = {f"{ours}linear_q.weight": Rows(f"{theirs}q_proj.weight")}
        if self.query_rank is not None:
            query = {
                f"{ours}linear_q_down.weight": Rows(f"{theirs}q_a_proj.weight"),
                f"{ours}query_norm.weight": Whole(f"{theirs}q_a_layernorm.weight"),
                f"{ours}linear_q.weight": Rows(f"{theirs}q_b_proj.weight"),
            }
        return query | {
            f"{ours}linear_kv_down.weight": Rows(f"{theirs}kv_a_proj_with_mqa.weight"),
            f"{ours}norm.weight": Whole(f"{theirs}kv_a_layernorm.weight"),
            f"{ours}linear_kv.weight": Rows(f"{theirs}kv_b_proj.weight"),
            f"{ours}linear_proj.weight": Columns(f"{theirs}o_proj.weight"),
        }

    def parameters(self, share: Share) -> int:
        h, heads = share.hidden_size, self.heads // share.tp
        down = (self.rank + self.rope_dim) // share.tp * h + self.rank
        up = heads * (self.nope_dim + self.value_dim) * self.rank
        query = heads * self.key_dim * h
        if self.query_rank is not None:
            query = self.query_rank // share.tp * h + self.query_rank + heads * self.key_dim * self.query_rank
        return query + down + up + heads * self.value_dim * h

    def kept_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """Queries and keys before and after the rotation, values and what they are mixed
        to, the short vectors.
        """
        values = self.heads / share.tp * (4 * self.key_dim + 3 * self.value_dim)
        values += 3 * (self.rank + self.rope_dim + (self.query_rank or 0))
        return values * share.value_bytes * batch * length

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        values = self.heads / share.tp * (4 * self.key_dim + 3 * self.value_dim)
        return values * share.value_bytes * batch * length

    def cache_bytes(self, share: Share, *, batch: int, length: int) -> int:
        return 0

    def cache(self, module: Any, angles: Angles | None, *, rows: int, length: int) -> Cache:
        raise ValueError("models with latent attention are teachers only: nothing is generated with them")


class LatentAttention(MegatronModule):
    """See the module."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        latent: Latent,
        rope: Rope,
        rope_index: int,
        core: Any,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        """rope_index: the index of its angles in Rotary's output.

        Other arguments of Megatron's attention are ignored.
        """
        super().__init__(config=config)
        self._latent, self._rope, self._rope_index = latent, rope, rope_index
        self._tp = pg_collection.tp
        hidden = config.hidden_size

        def column(size_in: int, size_out: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                size_in,
                size_out,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_bias_add=False,
                tp_group=self._tp,
            )

        query_input = hidden
        if latent.query_rank is not None:
            self.linear_q_down = column(hidden, latent.query_rank)
            self.query_norm = RMSNorm(config, latent.query_rank, _EPSILON)
            query_input = latent.query_rank
        self.linear_q = column(query_input, latent.heads * latent.key_dim)
        self.linear_kv_down = column(hidden, latent.rank + latent.rope_dim)
        self.norm = RMSNorm(config, latent.rank, _EPSILON)
        self.linear_kv = column(latent.rank, latent.heads * (latent.nope_dim + latent.value_dim))
        self.core_attention = core(config=config, layer_number=layer_number)
        self.linear_proj = RowParallelLinear(
            latent.heads * latent.value_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self._tp,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> [S, B, H]. rotary_pos_emb: of all kinds of layers, see Rotary."""
        latent, angles = self._latent, rotary_pos_emb[self._rope_index]
        query_input = hidden_states
        if latent.query_rank is not None:
            query_input = self.query_norm(self._per_position(self._down(self.linear_q_down, hidden_states)))
        query = self.linear_q(query_input)[0].unflatten(-1, (-1, latent.key_dim))
        short, rope_key = self._down(self.linear_kv_down, hidden_states).split(
            [latent.rank, latent.rope_dim], -1
        )
        # Each rank's heads give a part of its gradient.
        rope_key = copy_to_tensor_model_parallel_region(rope_key.contiguous(), group=self._tp)
        key_value = self.linear_kv(self.norm(self._per_position(short)))[0]
        key_value = key_value.unflatten(-1, (-1, latent.nope_dim + latent.value_dim))
        plain, rotary = query.split([latent.nope_dim, latent.rope_dim], dim=-1)
        # The factor belongs to query and key alike; a product sees its square.
        rotary = apply_rotary(rotary, angles, self._rope) * self._rope.attention_factor**2
        query = torch.cat([plain, rotary], dim=-1)
        plain, value = key_value.split([latent.nope_dim, latent.value_dim], dim=-1)
        rope_key = apply_rotary(rope_key[..., None, :], angles, self._rope)
        key = torch.cat([plain, rope_key.expand(*plain.shape[:-1], -1)], dim=-1)
        mixed = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(mixed)

    def _down(self, projection: ColumnParallelLinear, hidden: torch.Tensor) -> torch.Tensor:
        """The complete short vector of every position."""
        return gather_from_tensor_model_parallel_region(projection(hidden)[0], group=self._tp)

    def _per_position(self, short: torch.Tensor) -> torch.Tensor:
        """Under sequence parallelism the vectors of this rank's positions, which a
        column-parallel layer reads.
        """
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(short.contiguous(), group=self._tp)
        return short
