"""A mixture of experts: a router picks for each token the MLPs that it goes through, and
weighs their outputs.

    s = softmax(W x) or sigmoid(W x), in float32; the choice falls by s + b, with b a correction that training
    of the model moved to even out its experts, and can be limited to the groups of experts whose two best add
    up to most; w = s of the chosen, over their sum where weights are normalized, times a factor.

Shared experts are one more MLP that every token goes through, with or without a gate sigmoid(v x) of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from megatron_simct.models.layers import Layer, Share, check_divisor
from megatron_simct.models.rules import (
    Columns,
    Exact,
    GatedMLP,
    Rule,
    StackedColumns,
    StackedGatedMLP,
    StackedWhole,
    Whole,
)
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """See the module."""

    count: int
    width: int
    """Width of each expert."""
    chosen: int
    """Number of experts of each token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    """Weights of a token's experts add up to `factor`."""
    least_sum: float = 1e-20
    """Lower bound of the sum by which weights are divided."""
    groups: int = 1
    chosen_groups: int = 1
    """Number of groups from which a token's experts may come."""
    factor: float = 1.0
    """Factor of the weights."""
    corrected: bool = False
    """Experts are chosen by score plus correction."""
    shared_width: int = 0
    """Width of the shared experts together; 0: there are none."""
    shared_gate: bool = False
    clamp: float | None = None
    """Bounds gate and up projection, with biases in router and experts: up + 1 is multiplied by g
    sigmoid(1.702 g), and the folder has the experts of a layer in one tensor (gpt-oss). Teachers only."""
    names: ExpertNames | None = None
    """None: those of most families."""

    def check_divides(self, tp: int, expert_tp: int, *, flag: str) -> None:
        option = "--tensor-model-parallel-size" if expert_tp == tp else "--expert-tensor-parallel-size"
        check_divisor(expert_tp, "moe_ffn_hidden_size", self.width, flag=flag, option=option)
        if self.shared_width:
            check_divisor(tp, "moe_shared_expert_intermediate_size", self.shared_width, flag=flag)

    @property
    def num_experts(self) -> int:
        return self.count

    @property
    def has_transformer_engine(self) -> bool:
        return self.clamp is None

    def options(self) -> dict[str, Any]:
        """No auxiliary loss, no dropped tokens, the router in fp32."""
        options = {
            "activation_func": torch.nn.functional.silu,
            "num_moe_experts": self.count,
            "moe_ffn_hidden_size": self.width,
            "moe_shared_expert_intermediate_size": self.shared_width or None,
            "moe_shared_expert_gate": self.shared_gate,
            "moe_router_topk": self.chosen,
            "moe_router_pre_softmax": True,  # our router does not read it
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
        if self.clamp is not None:
            options |= {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "add_bias_linear": True}
            options["activation_func_clamp_value"] = self.clamp
        return options

    def spec(self, layer: Layer, backend: BackendSpecProvider) -> ModuleSpec:
        spec = get_moe_module_spec_for_backend(
            backend, num_experts=self.count, moe_grouped_gemm=backend.fuse_layernorm_and_linear()
        )
        parts = _submodules(spec)
        parts.router = partial(Router, experts=self)
        if self.clamp is not None:
            _submodules(parts.experts).linear_fc2 = BiasOnce
        return spec

    def rules(self) -> dict[str, Rule]:
        names = self.names or ExpertNames()
        if self.clamp is not None:
            return self._stacked_rules()
        gate, up, down = (f"model.layers.*.{names.experts}.*.{part}.weight" for part in names.parts)
        rules: dict[str, Rule] = {
            "mlp.router.weight": Whole(f"model.layers.*.{names.router}.weight"),
            "mlp.experts.local_experts.*.linear_fc1.weight": GatedMLP(gate, up),
            "mlp.experts.local_experts.*.linear_fc2.weight": Columns(down),
        }
        if self.corrected:
            rules["mlp.router.correction"] = Exact(
                f"model.layers.*.{names.correction}", row=names.correction_row
            )
        if self.shared_width:
            shared = f"model.layers.*.{names.shared}."
            rules |= {
                "mlp.shared_experts.linear_fc1.weight": GatedMLP(
                    f"{shared}gate_proj.weight", f"{shared}up_proj.weight"
                ),
                "mlp.shared_experts.linear_fc2.weight": Columns(f"{shared}down_proj.weight"),
            }
        if self.shared_gate:
            rules["mlp.shared_experts.gate_weight"] = Whole("model.layers.*.mlp.shared_expert_gate.weight")
        return rules

    def _stacked_rules(self) -> dict[str, Rule]:
        mlp, expert = "model.layers.*.mlp.", "mlp.experts.local_experts.*."
        gated, down = f"{mlp}experts.gate_up_proj", f"{mlp}experts.down_proj"
        return {
            "mlp.router.weight": Whole(f"{mlp}router.weight"),
            "mlp.router.bias": Whole(f"{mlp}router.bias"),
            f"{expert}linear_fc1.weight": StackedGatedMLP(gated, self.count),
            f"{expert}linear_fc1.bias": StackedGatedMLP(f"{gated}_bias", self.count),
            f"{expert}linear_fc2.weight": StackedColumns(down, self.count),
            f"{expert}linear_fc2.bias": StackedWhole(f"{down}_bias", self.count),
        }

    def expert_parameters(self, share: Share) -> int:
        expert = 3 * share.hidden_size * math.ceil(self.width / share.expert_tp)
        if self.clamp is not None:
            expert += 2 * math.ceil(self.width / share.expert_tp) + share.hidden_size
        return math.ceil(self.count / share.ep) * expert

    def parameters(self, share: Share) -> int:
        shared = 3 * share.hidden_size * math.ceil(self.shared_width / share.tp)
        rows = self.count + (1 if self.shared_gate else 0)  # of the router, and of the shared experts' gate
        biases = 0 if self.clamp is None else self.count
        return self.expert_parameters(share) + shared + rows * share.hidden_size + biases

    def _widths(self, share: Share) -> float:
        return (self.chosen * self.width + self.shared_width) / share.tp

    def kept_bytes(self, share: Share, *, hidden_size: float, batch: float, length: int) -> float:
        """Each chosen expert as a dense MLP; of the hidden state a copy that enters, from all ranks that
        share the expert, and one that leaves."""
        each = 3 if share.fused and self.clamp is None else 5
        values = each * self._widths(share) + (1 + share.expert_tp) * self.chosen * hidden_size
        return values * share.value_bytes * batch * length

    def forward_bytes(self, share: Share, *, batch: float, length: int) -> float:
        """Every chosen expert gets a copy of the hidden state, and gives one back."""
        values = 4 * self._widths(share) + 2 * self.chosen * share.hidden_size
        return values * share.value_bytes * batch * length

    def route(
        self, logits: torch.Tensor, correction: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, experts], zero of those that are not chosen, and which are, of logits
        float32 [T, experts].
        """
        scores = logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()
        preferred = scores.detach() if correction is None else scores.detach() + correction
        if self.groups > 1:
            in_groups = preferred.unflatten(1, (self.groups, -1))
            best = in_groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.chosen_groups, dim=-1).indices
            allowed = torch.zeros_like(in_groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            preferred = in_groups.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        chosen = preferred.topk(self.chosen, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=self.least_sum)
        weights = torch.zeros_like(scores).scatter(1, chosen, weights * self.factor)
        return weights, torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def _submodules(spec: ModuleSpec | partial[Any]) -> Any:
    """The submodules of a module. megatron-core 0.16 has specifications, later versions partial calls."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of tensors in a folder, within a layer."""

    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"
    correction_row: bool = False
    """The correction is the one row of its tensor."""
    experts: str = "mlp.experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Projections of an expert."""
    shared: str = "mlp.shared_experts"


class Router(TopKRouter):
    """Megatron's router, with the choice and the weights of the model's family."""

    def __init__(self, *args: Any, experts: Experts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._experts = experts
        self.register_buffer("correction", torch.zeros(experts.count) if experts.corrected else None)
        """Always float32, and not trained."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits in float32 [S, B, experts] of hidden states [S, B, H]. Megatron's own product
        wants TransformerEngine."""
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(input.float(), self.weight.float(), bias)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """See Experts.route."""
        return self._experts.route(logits.flatten(0, 1), self.correction)


class BiasOnce(RowParallelLinear):
    """The second matrix of an expert.

    If the outputs of its ranks are summed later, only the first rank adds the bias.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, bias = super().forward(input_)
        if self.explicit_expert_comm and self.tp_group.rank() > 0:
            bias = torch.zeros_like(bias)
        return output, bias
