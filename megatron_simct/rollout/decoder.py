"""A lean forward pass without autograd over the parameters of a HiddenStateModel, with a KV cache.

Megatron's modules hold the parameters and say how they are split; the arithmetic of their layers is done here, in few
operations. A part that is not one of Megatron's plain modules (experts, TransformerEngine's layers, fewer key heads
than ranks) runs as it is.

Sequences stand from position 0 on, so nothing is padded on the left, and what a token computes depends on its own
sequence alone.

Shape letters: B sequences, S padded prompt, K cached positions, H hidden size, n query heads and g key heads of this
tensor-parallel rank, d entries of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from megatron_simct.models.attention import SelfAttention
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.models.norm import NormedRowParallelLinear
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer


class Decoder:
    """One pipeline stage and the keys and values of its layers, for a fixed number of sequences (rows)."""

    def __init__(self, stage: HiddenStateModel, groups: Groups, *, rows: int, length: int) -> None:
        """length: positions of the longest sequence. Reads the parameters at every call: nothing is copied."""
        self._stage = stage
        self._layers: list[TransformerLayer] = list(stage.decoder.layers)
        self._tp = groups.tp
        self.is_first = stage.pre_process
        self.is_last = stage.post_process
        """Whether it is the whole model's first or last stage."""
        weight = next(stage.parameters())
        heads = self._layers[0].self_attention
        # Not left to what lies in memory: attention weighs what a row has not reached with 0, and 0 times nan is nan.
        self._cache = torch.zeros(
            *(len(self._layers), rows, heads.num_query_groups_per_partition, 2, length),
            heads.hidden_size_per_attention_head,
            dtype=weight.dtype,
            device=weight.device,
        )
        """[layers, rows, g, keys and values, length, d]"""
        angles = stage.rotary_pos_emb(length)[:, :, 0, 0]
        half = angles.shape[-1] // 2
        sign = torch.cat([-torch.ones(half), torch.ones(half)]).to(angles.device)
        self._cos, self._sin = angles.cos().to(weight.dtype), (angles.sin() * sign).to(weight.dtype)
        """[kinds, length, turned entries of a head]; the first half of the sines with the sign of the rotation"""

    def prefill(
        self, tokens: torch.Tensor, received: torch.Tensor | None, lengths: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Whole prompts, tokens int64 [B, S], padded on the right to S; lengths int64 [B].

        rows int64 [2, R]: the cache rows to fill, and which of the B prompts each of them holds. received: hidden
        states [B, S, H] of the stage before. Returns what the next stage reads, or of the last one what enters the LM
        head at the prompts' last tokens, [B, H].
        """
        length = tokens.shape[1]
        hidden = self._embed(tokens) if received is None else received
        cos, sin = self._cos[:, :length, None, None], self._sin[:, :length, None, None]
        for index, layer in enumerate(self._layers):
            attention = layer.self_attention
            qkv = self._turned(attention, layer.input_layernorm(hidden), cos, sin)  # [B, S, g, n / g + 2, d]
            self._cache[index, rows[0], :, :, :length] = qkv[..., -2:, :].permute(0, 2, 3, 1, 4)[rows[1]]
            query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
            mixed = attention.core_attention(*(t.transpose(0, 1) for t in (query, key, value)), None)
            hidden = hidden + self._reduced(attention.linear_proj, mixed.transpose(0, 1))
            hidden = hidden + self._mlp(layer, layer.pre_mlp_layernorm(hidden))
        if not self.is_last:
            return hidden
        return self._stage.decoder.final_layernorm(hidden[torch.arange(len(lengths)), lengths - 1])

    def decode(self, tokens: torch.Tensor, received: torch.Tensor | None, positions: Sequence[int]) -> torch.Tensor:
        """One more token of the first B rows: tokens int64 [B], and where each of them stands.

        received: hidden states [B, H] of the stage before. Returns hidden states [B, H], of the last stage those that
        enter the LM head.
        """
        batch, num_keys = len(tokens), max(positions) + 1
        where = torch.tensor(positions, device=tokens.device)
        level = None if min(positions) + 1 == num_keys else where
        hidden = self._embed(tokens) if received is None else received
        cos, sin = self._cos[:, where, None, None], self._sin[:, where, None, None]
        rows = torch.arange(batch, device=tokens.device)
        for index, layer in enumerate(self._layers):
            attention = layer.self_attention
            qkv = self._turned(attention, layer.input_layernorm(hidden), cos, sin)  # [B, g, n / g + 2, d]
            cache = self._cache[index]
            if level is None:
                cache[:batch, :, :, num_keys - 1] = qkv[:, :, -2:]
            else:
                cache[rows, :, :, where] = qkv[:, :, -2:]
            keys, values = cache[:batch, :, 0, :num_keys], cache[:batch, :, 1, :num_keys]
            mixed = attention.core_attention.decode(qkv[:, :, :-2].flatten(1, 2), keys, values, level)
            hidden = hidden + self._reduced(attention.linear_proj, mixed)
            hidden = hidden + self._mlp(layer, layer.pre_mlp_layernorm(hidden))
        return self._stage.decoder.final_layernorm(hidden) if self.is_last else hidden

    def move(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row, in place of another's."""
        self._cache[:, target, :, :, :length] = self._cache[:, source, :, :, :length]

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self._stage.embedding.word_embeddings(tokens)
        scale = self._stage.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def _turned(
        self, attention: SelfAttention, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[..., H] -> [..., g, n / g + 2, d]: of each key head its query heads, itself and its values; the first two
        turned by their positions' angles, in layers that have a rotary embedding."""
        qkv, rope = self._projected(attention, hidden), attention.rope
        if rope is None:
            return qkv
        turned = qkv[..., :-1, : rope.dim]
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat([second, first], dim=-1)
        turned.mul_(cos[attention.rope_index]).addcmul_(swapped, sin[attention.rope_index])
        return qkv

    def _projected(self, attention: SelfAttention, hidden: torch.Tensor) -> torch.Tensor:
        """What _turned turns."""
        projection, rope = attention.linear_qkv, attention.rope
        if type(projection) is not ColumnParallelLinear or attention.config.num_query_groups < self._tp.size():
            query, *others = attention.get_query_key_value_tensors(hidden.reshape(-1, 1, hidden.shape[-1]), None)
            heads = [query.unflatten(2, (others[0].shape[2], -1)), *(tensor.unsqueeze(3) for tensor in others)]
            return torch.cat(heads, dim=3).unflatten(0, hidden.shape[:-1]).squeeze(hidden.dim() - 1)
        qkv = linear(hidden, projection.weight, projection.bias)
        qkv = qkv.unflatten(
            -1, (attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head)
        )
        if attention.q_layernorm is not None:
            qkv[..., :-2, :] = attention.q_layernorm(qkv[..., :-2, :])
            qkv[..., -2, :] = attention.k_layernorm(qkv[..., -2, :])
        if rope is not None and rope.attention_factor != 1.0:
            qkv[..., :-2, : rope.dim] *= rope.attention_factor**2  # see SelfAttention
        return qkv

    def _mlp(self, layer: TransformerLayer, hidden: torch.Tensor) -> torch.Tensor:
        mlp = layer.mlp
        if type(mlp) is not MLP or type(mlp.linear_fc1) is not ColumnParallelLinear:
            output, _ = mlp(hidden.reshape(-1, 1, hidden.shape[-1]))
            return output.view_as(hidden)
        gate, up = linear(hidden, mlp.linear_fc1.weight).chunk(2, dim=-1)
        return self._reduced(mlp.linear_fc2, mlp.config.activation_func(gate).mul_(up))

    def _reduced(self, projection: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """A row-parallel layer's output, with the norm that comes after it in some families."""
        if not isinstance(projection, RowParallelLinear):
            return projection(hidden)[0]
        output = linear(hidden, projection.weight)
        if self._tp.size() > 1:
            dist.all_reduce(output, group=self._tp)
        return projection.post_layernorm(output) if isinstance(projection, NormedRowParallelLinear) else output
