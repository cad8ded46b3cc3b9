"""Families most of whose layers have a gated delta net."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_simct.models.experts import ExpertNames, Experts
from megatron_simct.models.families_experts import qwen_experts
from megatron_simct.models.family import Family


def _qwen_next_experts(fields: dict[str, Any], where: str) -> Experts:
    """And one shared expert with a gate."""
    shared = fields["shared_expert_intermediate_size"]
    names = ExpertNames(shared="mlp.shared_expert")
    return replace(qwen_experts(fields, where), shared_width=shared, shared_gate=True, names=names)


_DELTA_NEUTRAL = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
_DELTA_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32", None),
    "mlp_only_layers": ([], None),
}
_DELTA_READ = frozenset(
    """partial_rotary_factor full_attention_interval linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads""".split()
)
_DELTA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_DELTA: dict[str, Any] = {"qk_norm": True, "zero_centered_norm": True, "output_gate": True}

LINEAR: dict[str, Family] = {
    "qwen3_5_text": Family(
        fixed=_DELTA_FIXED,
        read=_DELTA_READ,
        neutral=_DELTA_NEUTRAL,
        defaults=_DELTA_DEFAULTS,
        **_DELTA,
        delta_net="split",
    ),
    "qwen3_next": Family(
        fixed=_DELTA_FIXED
        | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "output_router_logits": (False,)},
        read=_DELTA_READ
        | frozenset(
            """num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size
            shared_expert_intermediate_size""".split()
        ),
        neutral=_DELTA_NEUTRAL | {"router_aux_loss_coef", "intermediate_size"},
        defaults=_DELTA_DEFAULTS
        | {"norm_topk_prob": True, "num_experts_per_tok": 10, "num_experts": 512, "intermediate_size": 5632}
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        **_DELTA,
        delta_net="packed",
        experts=_qwen_next_experts,
    ),
}
"""By model_type."""
