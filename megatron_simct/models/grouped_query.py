"""Grouped-query attention: n query heads in g groups, each of which shares a head of keys and one of values.

Shape letters: B sequences, S padded prompt, K cached positions, H hidden size, n query heads and g key heads
of this tensor-parallel rank, d entries of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from megatron_simct.models.attention import CoreAttention, SelfAttention
from megatron_simct.models.kernels import Scores
from megatron_simct.models.layers import Angles, Layer, Share, Step, check_divisor
from megatron_simct.models.norm import (
    NormedRowParallelLinear,
    RMSNorm,
    UnweightedNorm,
    WholeNorm,
    row_parallel,
)
from megatron_simct.models.rotary import Rope
from megatron_simct.models.rules import Columns, FusedQKV, Heads, PackedQKV, PerGroup, Rows, Rule, Run, Whole
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQuery:
    """See the module."""

    heads: int
    groups: int
    head_dim: int
    scale: float
    """Factor of the product of query and key."""
    softcap: float | None = None
    """cap * tanh(score / cap) bounds the scores; None: not bounded."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Beside qkv_bias, and with biases in the MLPs."""
    sinks: bool = False
    """Each head has one additional score in its softmax, without a value."""
    qk_norm: bool = False
    """Queries and keys are normalized by heads."""
    whole_norm: bool = False
    """The norm is over all heads together."""
    norm_after_rope: bool = False
    """The norm comes after the rotary embedding."""
    packed: bool = False
    """The folder has one tensor of queries, keys and values."""
    output_gate: bool = False
    """Each head's output is multiplied by the sigmoid of a gate, which the folder has
    behind the head's query.
    """

    def check_divides(self, tp: int, *, flag: str) -> None:
        if self.groups % tp and tp % self.groups:
            raise ValueError(
                f"--tensor-model-parallel-size {tp} neither divides num_query_groups ({self.groups}) of "
                f"{flag} nor is a multiple of it"
            )
        check_divisor(tp, "num_attention_heads", self.heads, flag=flag)
        if self.whole_norm or self.output_gate:
            check_divisor(tp, "num_query_groups", self.groups, flag=flag)

    @property
    def scores(self) -> Scores:
        return Scores(
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            shares_keys=self.groups < self.heads,
            bounded=self._is_bounded,
        )

    @property
    def has_context_parallel(self) -> bool:
        return True

    @property
    def has_transformer_engine(self) -> bool:
        return not (self.whole_norm or self.norm_after_rope or self.sinks or self.output_bias)

    def options(self) -> dict[str, Any]:
        biases = {"add_bias_linear": True} if self.output_bias else {}
        return biases | {
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "add_qkv_bias": self.qkv_bias,
            "attention_output_gate": self.output_gate,
            # Norms of single heads are alike on all ranks, so Megatron adds up their gradients.
            "qk_layernorm": self.qk_norm and not self.whole_norm,
        }

    def spec(self, layer: Layer, backend: BackendSpecProvider, ropes: Sequence[Rope]) -> ModuleSpec:
        fused = backend.fuse_layernorm_and_linear()
        query_norm: Any = IdentityOp
        key_norm: Any = IdentityOp
        whole_norms = None
        if self.whole_norm:
            whole_norms = partial(WholeNorm, heads=self.heads), partial(WholeNorm, heads=self.groups)
        elif self.norm_after_rope:
            query_norm = key_norm = UnweightedNorm
        elif self.qk_norm:
            query_norm = key_norm = backend.layer_norm(for_qk=True) if fused else RMSNorm
        project = backend.column_parallel_layer_norm_linear() if fused else ColumnParallelLinear
        return ModuleSpec(
            module=SelfAttention,
            params={
                "attn_mask_type": AttnMaskType.causal,
                "rope": layer.rope,
                "rope_index": None if layer.rope is None else ropes.index(layer.rope),
                "whole_norms": whole_norms,
            },
            submodules=SelfAttentionSubmodules(
                linear_qkv=project,
                core_attention=partial(
                    CoreAttention,
                    window=layer.window,
                    scores=layer.scores,
                    scale=self.scale,
                    cap=self.softcap,
                    sinks=self.heads if self.sinks else 0,
                    rope=layer.rope,
                ),
                linear_proj=NormedRowParallelLinear
                if layer.norms != "before"
                else backend.row_parallel_linear(),
                q_layernorm=query_norm,
                k_layernorm=key_norm,
            ),
        )

    def rules(self) -> dict[str, Rule]:
        ours, theirs = "self_attention.", "model.layers.*.self_attn."
        heads = Heads(self.heads, self.groups, self.head_dim)
        kinds = ("weight", "bias") if self.qkv_bias else ("weight",)
        rules: dict[str, Rule] = {}
        for kind in kinds:
            query, key, value = (f"{theirs}{part}_proj.{kind}" for part in "qkv")
            packed = PackedQKV(f"{theirs}qkv_proj.{kind}", heads)
            rules[f"{ours}linear_qkv.{kind}"] = packed if self.packed else FusedQKV(query, key, value, heads)
            if self.output_gate:
                rules[f"{ours}linear_qkv.{kind}"] = PerGroup(self._gated_runs(query, key, value), self.groups)
        rules[f"{ours}linear_proj.weight"] = Columns(f"{theirs}o_proj.weight")
        if self.output_bias:
            rules[f"{ours}linear_proj.bias"] = Whole(f"{theirs}o_proj.bias")
        if self.sinks:
            rules[f"{ours}core_attention.sinks"] = Rows(f"{theirs}sinks")
        if self.qk_norm:
            rule = Rows if self.whole_norm else Whole
            names = ("query_layernorm", "key_layernorm") if self.norm_after_rope else ("q_norm", "k_norm")
            for part, name in zip("qk", names, strict=True):
                rules[f"{ours}{part}_layernorm.weight"] = rule(f"{theirs}{name}.weight")
        return rules

    def _gated_runs(self, query: str, key: str, value: str) -> tuple[Run, ...]:
        """Rows of a group: its query heads, their gates, its key head, its value head."""
        each, dim = self.heads // self.groups, self.head_dim
        queries, gates = (
            [Run(query, 2 * self.heads * dim, (2 * i + part) * dim, dim, 2 * each * dim) for i in range(each)]
            for part in (0, 1)
        )
        return (*queries, *gates, *(Run(name, self.groups * dim, 0, dim) for name in (key, value)))

    def parameters(self, share: Share) -> int:
        # Ranks that outnumber the query groups hold a part of a group each.
        queries = 2 * self.heads if self.output_gate else self.heads
        qkv = (queries + 2 * self.groups) * self.head_dim // share.tp
        count = share.hidden_size * qkv + self.heads * self.head_dim // share.tp * share.hidden_size
        if self.whole_norm:
            count += (self.heads + self.groups) // share.tp * self.head_dim
        elif self.qk_norm:
            count += 2 * self.head_dim
        if self.qkv_bias:
            count += qkv
        if self.output_bias:
            count += share.hidden_size
        if self.sinks:
            count += self.heads // share.tp
        return count

    @property
    def _is_bounded(self) -> bool:
        return self.softcap is not None or self.sinks

    def _heads(self, share: Share) -> tuple[int, int]:
        return math.ceil(self.heads / share.tp), math.ceil(self.groups / share.tp)

    def kept_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """3 (n + g) d values a token: queries, keys and values before and after the rotation; norms keep two
        thirds more. Where scores are held, a soft-cap keeps tanh and softmax of all of them, and sinks as
        much: 8 B n S^2 bytes."""
        n, g = self._heads(share)
        kept = (5 if self.qk_norm else 3) * (n + g) * self.head_dim * share.value_bytes * batch * length
        if self.output_gate:  # the gate, its sigmoid in float32, the product
            kept += n * self.head_dim * (2 * share.value_bytes + 8) * batch * length
        return kept + (8 * (self._is_bounded and share.holds_scores) * batch * n * length**2)

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        n, g = self._heads(share)
        held = 3 * (n + g) * self.head_dim * share.value_bytes * batch * length
        return held + (12 * (self._is_bounded and share.holds_scores) * batch * n * length**2)

    def cache_bytes(self, share: Share, *, batch: int, length: int) -> int:
        groups = self._heads(share)[1]
        return 2 * batch * length * groups * self.head_dim * share.value_bytes

    def cache(self, module: Any, angles: Angles | None, *, rows: int, length: int) -> KeyValueCache:
        return KeyValueCache(module, angles, rows=rows, length=length)


class KeyValueCache:
    """Keys and values of one layer, [rows, g, keys and values, length, d]."""

    def __init__(self, module: SelfAttention, angles: Angles | None, *, rows: int, length: int) -> None:
        self._module = module
        self._angles = angles
        weight = next(module.parameters())
        # Zeros, not uninitialised memory: attention weighs positions that a row has not reached with 0, and
        # 0 times nan is nan.
        self._kept = torch.zeros(
            *(rows, module.num_query_groups_per_partition, 2, length, module.hidden_size_per_attention_head),
            dtype=weight.dtype,
            device=weight.device,
        )

    def prefill(self, hidden: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        length = hidden.shape[1]
        qkv, gate = self._qkv(hidden, slice(length))  # [B, S, g, n / g + 2, d]
        self._kept[rows[0], :, :, :length] = qkv[..., -2:, :].permute(0, 2, 3, 1, 4)[rows[1]]
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        mixed = self._module.core_attention(*(t.transpose(0, 1) for t in (query, key, value)), None)
        return row_parallel(self._module.linear_proj, _gated(mixed.transpose(0, 1), gate))

    def decode(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        cos, sin = (None, None) if self._angles is None else step.angles(self._angles)
        qkv, gate = self._projected(hidden)  # [B, g, n / g + 2, d]
        interleaved = self._angles is not None and self._angles.interleaved
        query = step.regions.rotate_and_cache(qkv, cos, sin, self._kept, step.rows, step.where, interleaved)
        seen = self._kept[: len(hidden), :, :, : step.num_keys]
        mixed = self._module.core_attention.decode(query, seen[:, :, 0], seen[:, :, 1], step)
        return row_parallel(self._module.linear_proj, _gated(mixed, gate))

    def move(self, source: int, target: int, length: int) -> None:
        self._kept[target, :, :, :length] = self._kept[source, :, :, :length]

    def _qkv(
        self, hidden: torch.Tensor, positions: slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., H] -> [..., g, n / g + 2, d]: of each key head its query heads, itself and its values; the
        first two rotated by their positions' angles, in layers that have a rotary embedding. And the gates
        [..., n d], if any.
        """
        qkv, gate = self._projected(hidden)
        if self._angles is not None:
            self._angles.apply_(qkv[..., :-1, :], positions)
        return qkv, gate

    def _projected(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """QKV projection before the rotary embedding, and gates."""
        module = self._module
        projection, rope = module.linear_qkv, module.rope
        if (
            type(projection) is not ColumnParallelLinear
            or module.config.num_query_groups < module.pg_collection.tp.size()
        ):
            gated = {"output_gate": True} if module.config.attention_output_gate else {}
            query, *others = module.get_query_key_value_tensors(
                hidden.reshape(-1, 1, hidden.shape[-1]), None, **gated
            )
            gate = others.pop().reshape(*hidden.shape[:-1], -1) if gated else None
            heads = [
                query.unflatten(2, (others[0].shape[2], -1)),
                *(tensor.unsqueeze(3) for tensor in others),
            ]
            return torch.cat(heads, dim=3).unflatten(0, hidden.shape[:-1]).squeeze(hidden.dim() - 1), gate
        qkv = linear(hidden, projection.weight, projection.bias)
        qkv = qkv.unflatten(
            -1, (module.num_query_groups_per_partition, -1, module.hidden_size_per_attention_head)
        )
        gate = None
        if module.config.attention_output_gate:
            each = (qkv.shape[-2] - 2) // 2
            query, gate, others = qkv.split([each, each, 2], dim=-2)
            qkv, gate = torch.cat([query, others], dim=-2), gate.flatten(-3)
        if not isinstance(module.q_layernorm, IdentityOp | None):
            query = qkv[..., :-2, :]
            qkv[..., :-2, :] = module.q_layernorm(query.flatten(-3, -2)).view_as(query)
            qkv[..., -2, :] = module.k_layernorm(qkv[..., -2, :])
        if rope is not None and rope.attention_factor != 1.0:
            qkv[..., :-2, : rope.dim] *= rope.attention_factor**2  # see SelfAttention
        return qkv, gate


def _gated(mixed: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return mixed if gate is None else (mixed * gate.float().sigmoid()).to(mixed.dtype)
