"""A layer of a decoder as a record of its parts. Each part defines its modules, parameters and memory.

    Layer(attention, mlp, rope, window)

A kind of attention or MLP is one record beside its modules, in one file: `grouped_query`, `dense`, `experts`.
The record gives the module's specification and options of Megatron's configuration (`build`), the rules of
its parameters (`hf_mapping`), their number and the bytes of activations and caches (`preflight.memory`), and
what generation keeps (`rollout.decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from megatron_simct.models.kernels import Scores
from megatron_simct.models.norm import RMSNorm
from megatron_simct.models.regions import Regions, apply_rotary_
from megatron_simct.models.rotary import Rope
from megatron_simct.models.rules import Rule, Whole
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The share of a model on one rank, for counting parameters and bytes."""

    hidden_size: int
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    """Ranks that share each expert; None: tp."""
    value_bytes: int = 4
    """Bytes of a parameter or an activation."""
    holds_scores: bool = True
    """Soft-caps and sinks are computed with all scores in memory, see `kernels`."""
    fused: bool = False
    """The activation of an MLP is one function, which keeps what enters it."""

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.tp if self.etp is None else self.etp


class Cache(Protocol):
    """State of one layer's attention for sequences in generation, one row for each."""

    def prefill(self, hidden: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, S, H] of whole prompts, padded on the right; lengths int64 [B] -> the attention's output, [B,
        S, H], before a norm that may come after it.

        rows int64 [2, R]: the rows to fill, and which of the B prompts each of them holds.
        """

    def decode(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, H] of one more token of the first B rows -> [B, H], before a norm that may come after it."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""


class Attention(Protocol):
    """A kind of attention."""

    @property
    def heads(self) -> int:
        """Heads of queries."""

    def check_divides(self, tp: int, *, flag: str) -> None:
        """ValueError, naming the flag, if the tensor-parallel size does not divide it."""

    @property
    def scores(self) -> Scores | None:
        """What a kernel must know of it; None: it has no softmax."""

    @property
    def has_context_parallel(self) -> bool:
        """Whether ranks can share a sequence."""

    @property
    def has_transformer_engine(self) -> bool:
        """Whether TransformerEngine's modules can express it."""

    def options(self) -> dict[str, Any]:
        """Options of Megatron's TransformerConfig."""

    def spec(self, layer: Layer, backend: BackendSpecProvider, ropes: Sequence[Rope]) -> ModuleSpec:
        """Its module in the layer. ropes: of the whole model, see Rotary."""

    def rules(self) -> dict[str, Rule]:
        """The rule of each parameter, by its name within the layer."""

    def parameters(self, share: Share) -> int:
        """Parameters of one rank."""

    def kept_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """Bytes that autograd keeps for `batch` sequences of `length` positions on one rank."""

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """The most that a forward pass without gradients holds at one time."""

    def cache_bytes(self, share: Share, *, batch: int, length: int) -> int:
        """Bytes of the cache of `batch` sequences of up to `length` positions on one rank."""

    def cache(self, module: Any, angles: Angles | None, *, rows: int, length: int) -> Cache:
        """An empty cache for its module. angles: of the layer's rotary embedding, None without one."""


class Mlp(Protocol):
    """A kind of MLP."""

    def check_divides(self, tp: int, expert_tp: int, *, flag: str) -> None:
        """ValueError, naming the flag, if these numbers of ranks do not divide it. expert_tp:
        those of an expert.
        """

    @property
    def num_experts(self) -> int:
        """Number of experts; 0: a dense MLP."""

    @property
    def has_transformer_engine(self) -> bool:
        """Whether TransformerEngine's modules can express it."""

    def options(self) -> dict[str, Any]:
        """Options of Megatron's TransformerConfig."""

    def spec(self, layer: Layer, backend: BackendSpecProvider) -> ModuleSpec:
        """Its module in the layer."""

    def rules(self) -> dict[str, Rule]:
        """The rule of each parameter, by its name within the layer."""

    def parameters(self, share: Share) -> int:
        """Parameters of one rank."""

    def expert_parameters(self, share: Share) -> int:
        """Those of the experts that ranks share out among them."""

    def kept_bytes(self, share: Share, *, hidden_size: float, batch: float, length: int) -> float:
        """Bytes that autograd keeps on one rank. hidden_size: of a token on this rank, less under
        sequence parallelism.
        """

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """The most that a forward pass without gradients holds at one time."""


@dataclass(frozen=True, slots=True)
class Angles:
    """Angles of every position, [length, rotated entries of a head]: cosines, and sines with
    the rotation's sign.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @staticmethod
    def of(angles: torch.Tensor, rope: Rope, dtype: torch.dtype) -> Angles:
        """angles: float [length, d] of Rotary."""
        sign = torch.ones_like(angles[0])
        sign[0 :: 2 if rope.interleaved else 1][: len(sign) // 2] = -1.0
        return Angles(angles.cos().to(dtype), (angles.sin() * sign).to(dtype), rope.interleaved)

    def apply_(self, x: torch.Tensor, positions: slice | torch.Tensor) -> None:
        """Rotate the first entries of x [..., g, heads, d] in place; `positions` has one for
        each row of g heads.
        """
        cos, sin = self.cos[positions, None, None], self.sin[positions, None, None]
        apply_rotary_(x, cos, sin, interleaved=self.interleaved)


class Step:
    """Inputs of a decoding step that all layers share: positions, masks and angles of the new tokens."""

    def __init__(self, where: torch.Tensor, num_keys: int, *, dtype: torch.dtype, regions: Regions) -> None:
        """where int64 [B]: the tokens' positions. num_keys: cached positions to read, at least up to the
        last position.
        """
        self.where, self.num_keys, self.regions = where, num_keys, regions
        self.rows = torch.arange(len(where), device=where.device)
        self._dtype = dtype
        self._back = where[:, None] - torch.arange(num_keys, device=where.device)
        self._visible: dict[int | None, torch.Tensor] = {}
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def visible(self, window: int | None) -> torch.Tensor:
        """Mask that is added to the scores, [B, 1, 1, num_keys]: 0 if a query sees the key, else -inf."""
        window = window if window is not None and window < self.num_keys else None
        if window not in self._visible:
            hidden = self._back < 0 if window is None else (self._back < 0) | (self._back >= window)
            zeros = torch.zeros((), dtype=self._dtype, device=hidden.device)
            self._visible[window] = torch.where(hidden, float("-inf"), zeros)[:, None, None]
        return self._visible[window]

    def angles(self, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at the tokens' positions, [B, 1, 1, rotated entries of a head]."""
        if id(angles) not in self._angles:
            pair = angles.cos[self.where, None, None], angles.sin[self.where, None, None]
            self._angles[id(angles)] = pair
        return self._angles[id(angles)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a decoder."""

    attention: Attention
    mlp: Mlp
    rope: Rope | None
    """None: the layer has no rotary embedding."""
    window: int | None = None
    """Number of positions that a query sees, including its own; None: all."""
    norms: Literal["before", "around", "after"] = "before"
    """Norms of the inputs of attention and MLP, of their outputs, or of both."""
    residual_scale: float = 1.0
    """Factor of the outputs of attention and MLP before the residual."""

    @property
    def scores(self) -> Scores | None:
        """What a kernel must know of its attention; None: that has no softmax."""
        found = self.attention.scores
        return None if found is None else replace(found, window=self.window)

    @property
    def has_transformer_engine(self) -> bool:
        """Whether TransformerEngine's modules can express it."""
        if self.norms != "before" or self.residual_scale != 1.0:
            return False
        return self.attention.has_transformer_engine and self.mlp.has_transformer_engine

    def spec(self, backend: BackendSpecProvider, ropes: Sequence[Rope]) -> ModuleSpec:
        """Megatron's layer with these parts; our own norm, or TransformerEngine's where it is
        fused with a linear.
        """
        fused = backend.fuse_layernorm_and_linear()
        norm = IdentityOp if fused or self.norms == "after" else RMSNorm
        mlp_norm = backend.layer_norm() if fused and self.mlp.num_experts else norm
        add = get_bias_dropout_add if self.residual_scale == 1.0 else scaled_add(self.residual_scale)
        # TransformerEngine's names of the same norms, so that a checkpoint fits both.
        keys = {}
        if norm is RMSNorm:
            keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
            if not self.mlp.num_experts:
                keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=self.attention.spec(self, backend, ropes),
                self_attn_bda=add,
                pre_mlp_layernorm=mlp_norm,
                mlp=self.mlp.spec(self, backend),
                mlp_bda=add,
                sharded_state_dict_keys_map=keys,
            ),
        )

    def rules(self) -> dict[str, Rule]:
        """The rule of each parameter, by its name within the layer."""
        layer = "model.layers.*."
        before = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
        after = {
            "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
            "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
        }
        around = before | {"pre_mlp_layernorm": "pre_feedforward_layernorm"} | after
        names = {"before": before, "after": after, "around": around}[self.norms]
        norms: dict[str, Rule] = {
            f"{ours}.weight": Whole(f"{layer}{name}.weight") for ours, name in names.items()
        }
        return norms | self.attention.rules() | self.mlp.rules()

    def parameters(self, share: Share) -> int:
        """Parameters of one rank."""
        norms = (4 if self.norms == "around" else 2) * share.hidden_size
        return norms + self.attention.parameters(share) + self.mlp.parameters(share)


def check_divisor(
    tp: int, name: str, value: int, *, flag: str, option: str = "--tensor-model-parallel-size"
) -> None:
    """ValueError, naming the flag, if the tensor-parallel size does not divide a number of the model."""
    if value % tp:
        raise ValueError(f"{option} {tp} does not divide {name} ({value}) of {flag}")


def scaled_add(scale: float) -> Callable[..., Any]:
    """Replaces Megatron's addition to the residual."""

    def choose(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        def add(output: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
            return residual + output[0] * scale

        return add

    return choose
