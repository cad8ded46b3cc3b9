"""The gated MLP of all tokens: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from megatron_simct.models.layers import Layer, Share, check_divisor
from megatron_simct.models.norm import NormedRowParallelLinear
from megatron_simct.models.rules import Columns, GatedMLP, PackedMLP, Rule
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """See the module."""

    width: int
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    packed: bool = False
    """The folder has one tensor of gate and up projection."""

    def check_divides(self, tp: int, expert_tp: int, *, flag: str) -> None:
        check_divisor(tp, "ffn_hidden_size", self.width, flag=flag)

    @property
    def num_experts(self) -> int:
        return 0

    @property
    def has_transformer_engine(self) -> bool:
        return True

    def options(self) -> dict[str, Any]:
        return {"ffn_hidden_size": self.width, "activation_func": _ACTIVATIONS[self.activation]}

    def spec(self, layer: Layer, backend: BackendSpecProvider) -> ModuleSpec:
        fused = backend.fuse_layernorm_and_linear()
        return ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=backend.column_parallel_layer_norm_linear() if fused else ColumnParallelLinear,
                linear_fc2=NormedRowParallelLinear
                if layer.norms != "before"
                else backend.row_parallel_linear(),
            ),
        )

    def rules(self) -> dict[str, Rule]:
        mlp = "model.layers.*.mlp."
        gated = GatedMLP(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        return {
            "mlp.linear_fc1.weight": PackedMLP(f"{mlp}gate_up_proj.weight") if self.packed else gated,
            "mlp.linear_fc2.weight": Columns(f"{mlp}down_proj.weight"),
        }

    def expert_parameters(self, share: Share) -> int:
        return 0

    def parameters(self, share: Share) -> int:
        return 3 * share.hidden_size * math.ceil(self.width / share.tp)

    def kept_bytes(self, share: Share, *, hidden_size: float, batch: float, length: int) -> float:
        """5 f values a token: the two halves, their activation, its product and the copy of a half. Fused
        3 f: the two halves and the product."""
        values = 3 if share.fused and self.activation == "silu" else 5
        return values * self.width / share.tp * share.value_bytes * batch * length

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        return 4 * self.width / share.tp * share.value_bytes * batch * length
