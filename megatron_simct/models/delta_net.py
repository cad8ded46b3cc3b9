"""Gated delta net (arXiv:2412.06464): linear attention whose state is corrected by its prediction error.

For each value head a state S [dk, dv], over the tokens of a sequence, from S = 0 on:

    S <- e^g S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q / sqrt(dk)
    g = -e^A softplus(a + bias) <= 0,   beta = sigmoid(b)

q, k and v come from one projection, then a causal convolution of each channel over the last tokens, then
silu; q and k are divided by their length. A key head serves V / K value heads that follow one another. Each
head's o is normalized, multiplied by silu(z), and goes through the output projection.

`delta_rule` computes it in chunks of tokens, in products of matrices (section 3.3 of the paper). Within
a chunk, with G the sum of g up to a token, (I + A) U = beta v and (I + A) W = beta e^G k, where A_ij =
beta_i e^(G_i - G_j) <k_i, k_j> for j < i. The state at the beginning of a chunk corrects U by W S. All
of it is in float32.

Shape letters: B sequences, S tokens, C tokens of a chunk, K key heads and V value heads, dk
and dv their entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import conv1d, linear, pad, silu, softplus

from megatron_simct.models.layers import Angles, Layer, Share, Step, check_divisor
from megatron_simct.models.layout import Layout
from megatron_simct.models.norm import row_parallel
from megatron_simct.models.rotary import Rope
from megatron_simct.models.rules import Columns, PerGroup, Rows, Rule, Run, Whole
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

CHUNK = 64
"""Tokens of a chunk."""
_LENGTH_EPSILON = 1e-6
"""Added to the square of a key's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNet:
    """See the module."""

    key_heads: int
    value_heads: int
    key_dim: int
    """Entries of a head of queries or keys."""
    value_dim: int
    window: int
    """Tokens that the convolution sees."""
    packed: bool
    """The folder has one tensor of queries, keys, values and gates, ordered by key heads, and one of b and a.
    """

    @property
    def heads(self) -> int:
        return self.value_heads

    @property
    def _values(self) -> int:
        """Entries of the values of one key head."""
        return self.value_heads // self.key_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return self.key_heads * (2 * self.key_dim + self._values)

    def check_divides(self, tp: int, *, flag: str) -> None:
        check_divisor(tp, "linear_num_key_heads", self.key_heads, flag=flag)

    @property
    def scores(self) -> None:
        return None

    @property
    def has_context_parallel(self) -> bool:
        return False

    @property
    def has_transformer_engine(self) -> bool:
        return False

    def options(self) -> dict[str, Any]:
        return {}

    def spec(self, layer: Layer, backend: BackendSpecProvider, ropes: Sequence[Rope]) -> ModuleSpec:
        assert layer.rope is None and layer.window is None and layer.norms == "before", (
            "no family has another"
        )
        return ModuleSpec(module=GatedDeltaNet, params={"delta": self})

    def rules(self) -> dict[str, Rule]:
        ours, theirs = "self_attention.", "model.layers.*.linear_attn."
        keys, values, each = self.key_heads, self.value_heads, self.value_heads // self.key_heads

        def mixed(name: str) -> tuple[Run, ...]:
            """Queries, keys and values, which are consecutive in one tensor."""
            return (
                Run(name, self.channels, 0, self.key_dim),
                Run(name, self.channels, keys * self.key_dim, self.key_dim),
                Run(name, self.channels, 2 * keys * self.key_dim, self._values),
            )

        if self.packed:
            projections: dict[str, Rule] = {
                f"{ours}linear_in.weight": Rows(f"{theirs}in_proj_qkvz.weight"),
                f"{ours}linear_ba.weight": Rows(f"{theirs}in_proj_ba.weight"),
            }
        else:
            gates = Run(f"{theirs}in_proj_z.weight", values * self.value_dim, 0, self._values)
            b, a = (Run(f"{theirs}in_proj_{name}.weight", values, 0, each) for name in "ba")
            projections = {
                f"{ours}linear_in.weight": PerGroup((*mixed(f"{theirs}in_proj_qkv.weight"), gates), keys),
                f"{ours}linear_ba.weight": PerGroup((b, a), keys),
            }
        return projections | {
            f"{ours}convolution": PerGroup(mixed(f"{theirs}conv1d.weight"), keys),
            f"{ours}A_log": Rows(f"{theirs}A_log"),
            f"{ours}dt_bias": Rows(f"{theirs}dt_bias"),
            f"{ours}norm_weight": Whole(f"{theirs}norm.weight"),
            f"{ours}linear_proj.weight": Columns(f"{theirs}out_proj.weight"),
        }

    def parameters(self, share: Share) -> int:
        values = self.value_heads * self.value_dim
        rows = self.channels + values + 2 * self.value_heads
        split = share.hidden_size * (rows + values) + self.channels * self.window + 2 * self.value_heads
        return split // share.tp + self.value_dim

    def _widths(self, share: Share) -> tuple[float, float]:
        """Channels, and entries of all values, of one rank."""
        return self.channels / share.tp, self.value_heads * self.value_dim / share.tp

    def kept_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """A token keeps its channels before and after the convolution and silu, the gates, and in float32
        queries and keys of each value head, values, corrections and outputs several times; a chunk keeps its
        products C x C and the state at its beginning, for each value head. Chunks are whole."""
        channels, values = self._widths(share)
        heads = self.value_heads / share.tp
        a_token = (3 * channels + 3 * values) * share.value_bytes
        in_chunks = heads * (8 * self.key_dim + 8 * self.value_dim + 5 * CHUNK)
        a_chunk = 4 * (CHUNK * in_chunks + heads * 2 * self.key_dim * self.value_dim)
        return batch * (length * a_token + -(-length // CHUNK) * a_chunk)

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        channels, values = self._widths(share)
        heads = self.value_heads / share.tp
        a_token = 2 * (channels + values) * share.value_bytes
        a_token += 4 * heads * (4 * self.key_dim + 4 * self.value_dim + 3 * CHUNK)
        return batch * length * a_token

    def cache_bytes(self, share: Share, *, batch: int, length: int) -> int:
        state = 4 * self.value_heads // share.tp * self.key_dim * self.value_dim
        return batch * (state + (self.window - 1) * self.channels // share.tp * share.value_bytes)

    def cache(self, module: Any, angles: Angles | None, *, rows: int, length: int) -> StateCache:
        return StateCache(module, rows=rows)


class GatedDeltaNet(MegatronModule):
    """See the module. Each tensor-parallel rank has some key heads, with their value heads and gates."""

    @property
    def state_operations(self) -> float:
        """Operations of a token beside those of matrices: its key reads and writes the state [dk, dv] of each
        value head, and its query reads it."""
        heads = self.delta.value_heads // self.tp_group.size()
        return 6.0 * heads * self.delta.key_dim * self.delta.value_dim

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, delta: DeltaNet, pg_collection: Any, **_: Any
    ) -> None:
        """Other arguments of Megatron's attention are ignored."""
        super().__init__(config=config)
        self.delta = delta
        self.tp_group = pg_collection.tp
        size = self.tp_group.size()
        values = delta.value_heads * delta.value_dim

        def column(rows: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                config.hidden_size,
                rows,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_bias_add=False,
                tp_group=self.tp_group,
            )

        self.linear_in = column(delta.channels + values)
        self.linear_ba = column(2 * delta.value_heads)
        self.linear_proj = RowParallelLinear(
            values,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        dtype, heads = config.params_dtype, delta.value_heads // size
        self.convolution = torch.nn.Parameter(
            torch.randn(delta.channels // size, 1, delta.window, dtype=dtype) * delta.window**-0.5
        )
        self.A_log = torch.nn.Parameter(torch.empty(heads, dtype=dtype).uniform_(0.01, 16).log())
        self.dt_bias = torch.nn.Parameter(torch.ones(heads, dtype=dtype))
        for parameter in (self.convolution, self.A_log, self.dt_bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.norm_weight = torch.nn.Parameter(torch.ones(delta.value_dim, dtype=dtype))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Layout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> [S, B, H]. packed_seq_params: the sequences of a row; None: one, padded
        at its end at most.
        """
        projected, ba = self.linear_in(hidden_states)[0], self.linear_ba(hidden_states)[0]
        parts = [(projected.transpose(0, 1), ba.transpose(0, 1))]
        if packed_seq_params is not None and len(packed_seq_params.pieces) > 1:
            packed, packed_ba = parts[0]
            parts = [
                (packed[:, piece.queries], packed_ba[:, piece.queries]) for piece in packed_seq_params.pieces
            ]
        mixed = torch.cat([self.mix(one, its_ba)[0] for one, its_ba in parts], dim=1)
        return self.linear_proj(mixed.transpose(0, 1).contiguous())

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., channels and gates] -> channels [..., .], gates [..., V, dv]."""
        delta = self.delta
        by_head = projected.unflatten(-1, (-1, 2 * delta.key_dim + 2 * delta._values))
        channels, gates = by_head.split([2 * delta.key_dim + delta._values, delta._values], dim=-1)
        return channels.flatten(-2), gates.reshape(*gates.shape[:-2], -1, delta.value_dim)

    def rates(self, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., 2 V] -> g and beta, float32 [..., V]."""
        b, a = ba.unflatten(-1, (-1, 2 * self.delta.value_heads // self.delta.key_heads)).chunk(2, dim=-1)
        decay = -self.A_log.float().exp() * softplus(a.flatten(-2).float() + self.dt_bias)
        return decay, b.flatten(-2).sigmoid().float()

    def heads(self, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output of the convolution, [..., channels] -> q, k [..., V, dk], v [..., V, dv], float32.

        q and k have the length 1, q over the root of dk.
        """
        delta = self.delta
        by_head = silu(channels).unflatten(-1, (-1, 2 * delta.key_dim + delta._values)).float()
        query, key, value = by_head.split([delta.key_dim, delta.key_dim, delta._values], dim=-1)
        query, key = (
            x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _LENGTH_EPSILON) for x in (query, key)
        )
        each = delta.value_heads // delta.key_heads
        query, key = (x.repeat_interleave(each, dim=-2) for x in (query * delta.key_dim**-0.5, key))
        return query, key, value.reshape(*value.shape[:-2], -1, delta.value_dim)

    def gated(self, mixed: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """float32 [..., V, dv] and gates -> [..., V dv] in the gates' type."""
        # Each rank's heads give a part of its gradient.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        mixed = mixed.to(gates.dtype).float()
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        return ((weight * mixed.to(gates.dtype)) * silu(gates.float())).to(gates.dtype).flatten(-2)

    def mix(
        self, projected: torch.Tensor, ba: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, .] -> the input of the output projection [B, S, V dv], and the cache for the next token.

        The cache is the last inputs of the convolution [B, channels, window - 1], and the state [B, V, dk,
        dv]. lengths: int64 [B], tokens of each sequence; None: all have S.
        """
        channels, gates = self.split(projected)
        decay, beta = self.rates(ba)
        before = self.delta.window - 1
        padded = pad(channels, (0, 0, before, 0))
        tail = padded[:, padded.shape[1] - before :]
        if lengths is not None:
            steps = torch.arange(ba.shape[1], device=ba.device)
            inside = (steps < lengths[:, None]).unsqueeze(-1)
            decay, beta = decay * inside, beta * inside  # padding must not change the state
            tail = padded[torch.arange(len(lengths))[:, None], lengths[:, None] + steps[:before]]
        channels = conv1d(
            padded.transpose(1, 2), self.convolution, groups=self.convolution.shape[0]
        ).transpose(1, 2)
        mixed, state = delta_rule(*self.heads(channels), decay, beta)
        return self.gated(mixed, gates), tail.transpose(1, 2), state

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For a checkpoint: parameters that are split over the heads, beside the linear layers."""
        assert metadata is not None, "the model gives it to its layers"
        own = {name: getattr(self, name) for name in ("convolution", "A_log", "dt_bias")}
        return super().sharded_state_dict(
            prefix, sharded_offsets, metadata
        ) | make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, S, V, dk], v [B, S, V, dv], g and beta [B, S, V] -> o [B, S, V, dv] and the
    state [B, V, dk, dv].
    """
    length = query.shape[1]
    missing = -length % CHUNK
    # [B, V, chunks, C, .]; padding of the last chunk has beta = 0 and g = 0, so it does not change the state.
    query, key, value = (_in_chunks(pad(x, (0, 0, 0, 0, 0, missing))) for x in (query, key, value))
    decay, beta = (_in_chunks(pad(x, (0, 0, 0, missing)).unsqueeze(-1)) for x in (decay, beta))
    total = decay.cumsum(dim=-2)  # G
    ones = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device)
    # e^(G_i - G_j) for j <= i; masked before the exponential, which would overflow above the diagonal.
    ratio = (total - total.transpose(-1, -2)).masked_fill(ones.triu(1), -torch.inf).exp()
    scaled_key = key * beta
    system = torch.eye(CHUNK, device=query.device) + (scaled_key @ key.transpose(-1, -2) * ratio).tril(-1)
    right = torch.cat([value * beta, scaled_key * total.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    wanted, from_state = solved.split([value.shape[-1], key.shape[-1]], dim=-1)  # U, W
    within = query @ key.transpose(-1, -2) * ratio
    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for i in range(query.shape[2]):
        corrected = wanted[:, :, i] - from_state[:, :, i] @ state
        outputs.append((query[:, :, i] * total[:, :, i].exp()) @ state + within[:, :, i] @ corrected)
        last = total[:, :, i, -1:]
        kept = key[:, :, i] * (last - total[:, :, i]).exp()
        state = state * last.exp() + kept.transpose(-1, -2) @ corrected
    return torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length].transpose(1, 2), state


def _in_chunks(x: torch.Tensor) -> torch.Tensor:
    """[B, S, V, d] -> [B, V, chunks, C, d]"""
    return x.transpose(1, 2).unflatten(2, (-1, CHUNK))


class StateCache:
    """The state of each sequence and the last inputs of its convolution: the same size for every length."""

    def __init__(self, module: GatedDeltaNet, *, rows: int) -> None:
        self._module = module
        delta, weight = module.delta, module.convolution
        heads = len(module.A_log)
        self._tail = weight.new_zeros(rows, len(weight), delta.window - 1)
        self._state = torch.zeros(rows, heads, delta.key_dim, delta.value_dim, device=weight.device)

    def prefill(self, hidden: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        module = self._module
        projected, ba = (linear(hidden, part.weight) for part in (module.linear_in, module.linear_ba))
        mixed, tail, state = module.mix(projected, ba, lengths)
        self._tail[rows[0]], self._state[rows[0]] = tail[rows[1]], state[rows[1]]
        return row_parallel(module.linear_proj, mixed)

    def decode(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        module, batch = self._module, len(hidden)
        channels, gates = module.split(linear(hidden, module.linear_in.weight))
        decay, beta = module.rates(linear(hidden, module.linear_ba.weight))
        seen = torch.cat([self._tail[:batch], channels.unsqueeze(-1)], dim=-1)
        self._tail[:batch] = seen[..., 1:]
        query, key, value = module.heads((seen * module.convolution[:, 0]).sum(-1))  # [B, V, .]
        state = self._state[:batch].mul_(decay.exp()[..., None, None])
        wrong = (value - (key.unsqueeze(-2) @ state).squeeze(-2)) * beta.unsqueeze(-1)
        state += key.unsqueeze(-1) * wrong.unsqueeze(-2)
        mixed = (query.unsqueeze(-2) @ state).squeeze(-2)
        return row_parallel(module.linear_proj, module.gated(mixed, gates))

    def move(self, source: int, target: int, length: int) -> None:
        self._tail[target], self._state[target] = self._tail[source], self._state[source]
