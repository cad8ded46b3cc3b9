"""Families with layers of experts, those with latent attention among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_simct.models.experts import ExpertNames, Experts
from megatron_simct.models.family import Family


def _number_of_experts(fields: dict[str, Any], names: Sequence[str], where: str) -> int:
    """The number of experts. transformers 5 has renamed the field."""
    found = {name: fields[name] for name in names if name in fields}
    if len(set(found.values())) != 1:
        values = ", ".join(f"{name} = {number}" for name, number in found.items()) or "neither is there"
        raise ValueError(f"{where}: {' and '.join(names)} are two names of one number ({values})")
    return next(iter(found.values()))


def qwen_experts(fields: dict[str, Any], where: str) -> Experts:
    count = _number_of_experts(fields, ("num_experts", "num_local_experts"), where)
    chosen, normalized = fields["num_experts_per_tok"], fields["norm_topk_prob"]
    if not (2 if normalized else 1) <= chosen <= count:
        raise ValueError(
            f"{where}: num_experts_per_tok = {chosen} of {count} experts, norm_topk_prob = {normalized} is "
            "not implemented"
        )
    return Experts(count=count, width=fields["moe_intermediate_size"], chosen=chosen, normalized=normalized)


def _deepseek_experts(fields: dict[str, Any], where: str) -> Experts:
    """Sigmoid scores with a correction, groups, shared experts."""
    count = _number_of_experts(fields, ("n_routed_experts", "num_local_experts"), where)
    chosen, groups, chosen_groups = (
        fields["num_experts_per_tok"],
        fields["n_group"] or 1,
        fields["topk_group"] or 1,
    )
    if (
        count % groups
        or chosen_groups > groups
        or chosen > count // groups * chosen_groups
        or count < 2 * groups
    ):
        raise ValueError(
            f"{where}: n_group = {groups}, topk_group = {chosen_groups}, num_experts_per_tok = {chosen} of "
            f"{count} experts is not implemented: groups are equal and hold two at least, and the chosen "
            "hold enough"
        )
    width = fields["moe_intermediate_size"]
    return Experts(
        count=count,
        width=width,
        chosen=chosen,
        score="sigmoid",
        normalized=fields["norm_topk_prob"],
        groups=groups,
        chosen_groups=chosen_groups,
        factor=fields["routed_scaling_factor"],
        corrected=True,
        shared_width=width * (fields["n_shared_experts"] or 0),
    )


def _ernie_experts(fields: dict[str, Any], where: str) -> Experts:
    """Softmax scores with a correction, shared experts."""
    width = fields["moe_intermediate_size"]
    count = _number_of_experts(fields, ("moe_num_experts", "num_experts"), where)
    if fields["moe_k"] > count:
        raise ValueError(f"{where}: moe_k = {fields['moe_k']} of {count} experts")
    return Experts(
        count=count,
        width=width,
        chosen=fields["moe_k"],
        least_sum=fields["moe_norm_min"],
        corrected=True,
        shared_width=width * fields["moe_num_shared_experts"],
        names=ExpertNames(correction="mlp.moe_statics.e_score_correction_bias", correction_row=True),
    )


def _minimax_experts(fields: dict[str, Any], where: str) -> Experts:
    """Sigmoid scores with a correction."""
    if set(fields.get("attn_type_list") or [1]) != {1}:
        raise ValueError(
            f"{where}: attn_type_list = {fields['attn_type_list']!r} is not implemented for minimax_m2"
        )
    count = _number_of_experts(fields, ("num_local_experts", "num_experts"), where)
    if fields["num_experts_per_tok"] > count:
        raise ValueError(f"{where}: num_experts_per_tok = {fields['num_experts_per_tok']} of {count} experts")
    moe = "block_sparse_moe"
    return Experts(
        count=count,
        width=fields["intermediate_size"],
        chosen=fields["num_experts_per_tok"],
        score="sigmoid",
        corrected=True,
        names=ExpertNames(
            router=f"{moe}.gate",
            correction=f"{moe}.e_score_correction_bias",
            experts=f"{moe}.experts",
            parts=("w1", "w3", "w2"),
        ),
    )


def _gpt_oss_experts(fields: dict[str, Any], where: str) -> Experts:
    """Softmax over the chosen, biases everywhere."""
    count = _number_of_experts(fields, ("num_local_experts", "num_experts"), where)
    if fields["num_experts_per_tok"] > count:
        raise ValueError(f"{where}: num_experts_per_tok = {fields['num_experts_per_tok']} of {count} experts")
    return Experts(
        count=count,
        width=fields["intermediate_size"],
        chosen=fields["num_experts_per_tok"],
        clamp=fields["swiglu_limit"],
    )


def _first_are_dense(fields: dict[str, Any]) -> Sequence[bool]:
    return [i < (fields["first_k_dense_replace"] or 0) for i in range(fields["num_hidden_layers"])]


def _dense_between(fields: dict[str, Any]) -> Sequence[bool]:
    """Layers outside of a range, and in it all but every moe_layer_interval-th."""
    layers, end = fields["num_hidden_layers"], fields["moe_layer_end_index"]
    with_experts = range(fields["moe_layer_start_index"], layers if end == -1 else end + 1)
    return [i not in with_experts or (i + 1) % fields["moe_layer_interval"] != 0 for i in range(layers)]


def _dense_by_type_or_first(fields: dict[str, Any]) -> Sequence[bool]:
    return _dense_by_type(fields) if fields.get("mlp_layer_types") else _first_are_dense(fields)


def _dense_by_type(fields: dict[str, Any]) -> Sequence[bool]:
    layers = fields["num_hidden_layers"]
    kinds = fields.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    return [kind == "dense" for kind in kinds[:layers]]


_DEEPSEEK_FIXED: dict[str, tuple[Any, ...]] = {
    "output_router_logits": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
_DEEPSEEK_READ = frozenset(
    """moe_intermediate_size num_experts_per_tok n_routed_experts num_local_experts n_shared_experts n_group
    topk_group routed_scaling_factor norm_topk_prob""".split()
)
_DEEPSEEK_NEUTRAL = frozenset(
    "num_nextn_predict_layers num_mtp_layers ep_size aux_loss_alpha seq_aux".split()
)
_DEEPSEEK_DEFAULTS: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}

_DEEPSEEK = Family(
    fixed=_DEEPSEEK_FIXED | {"attention_bias": (False,)},
    read=_DEEPSEEK_READ
    | frozenset(
        """q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave
        first_k_dense_replace""".split()
    ),
    neutral=_DEEPSEEK_NEUTRAL | {"head_dim", "qk_head_dim"},
    defaults=_DEEPSEEK_DEFAULTS
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
    | {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    | {"rope_interleave": True},
    latent=True,
    experts=_deepseek_experts,
    is_dense=_first_are_dense,
    teacher_only=True,
)
_GLM4_MOE_LITE_DEFAULTS: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}

EXPERTS: dict[str, Family] = {
    "qwen3_moe": Family(
        fixed={
            "attention_bias": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "output_router_logits": (False,),
        },
        read=frozenset(
            """use_sliding_window sliding_window num_experts num_local_experts num_experts_per_tok
            norm_topk_prob moe_intermediate_size""".split()
        ),
        neutral=frozenset({"router_aux_loss_coef"}),
        defaults={"use_sliding_window": False, "sliding_window": 4096, "norm_topk_prob": False},
        windows="all",
        qk_norm=True,
        experts=qwen_experts,
    ),
    "glm4_moe": Family(
        fixed=_DEEPSEEK_FIXED,
        read=_DEEPSEEK_READ
        | {"attention_bias", "use_qk_norm", "partial_rotary_factor", "first_k_dense_replace"},
        neutral=_DEEPSEEK_NEUTRAL,
        defaults=_DEEPSEEK_DEFAULTS
        | {
            "attention_bias": False,
            "use_qk_norm": False,
            "partial_rotary_factor": 0.5,
            "first_k_dense_replace": 1,
        },
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        experts=_deepseek_experts,
        is_dense=_first_are_dense,
    ),
    "solar_open": Family(
        fixed=_DEEPSEEK_FIXED
        | {"attention_bias": (False,), "use_qk_norm": (False,), "first_k_dense_replace": (0,)},
        read=_DEEPSEEK_READ | {"partial_rotary_factor"},
        neutral=_DEEPSEEK_NEUTRAL | {"intermediate_size"},
        defaults=_DEEPSEEK_DEFAULTS | {"head_dim": 128, "rope_theta": 1e6, "partial_rotary_factor": 1.0},
        experts=_deepseek_experts,
    ),
    "dots1": Family(
        fixed=_DEEPSEEK_FIXED | {"attention_bias": (False,), "scoring_func": ("sigmoid", "noaux_tc")},
        read=_DEEPSEEK_READ | {"sliding_window", "max_window_layers", "first_k_dense_replace"},
        neutral=_DEEPSEEK_NEUTRAL | {"use_sliding_window"},
        defaults=_DEEPSEEK_DEFAULTS
        | {"norm_topk_prob": False, "n_shared_experts": None, "first_k_dense_replace": 0}
        | {"sliding_window": 4096, "max_window_layers": 62},
        windows="upper",
        qk_norm=True,
        experts=_deepseek_experts,
        is_dense=_first_are_dense,
    ),
    "ernie4_5_moe": Family(
        fixed={
            "use_bias": (False,),
            "output_router_logits": (False,),
            "moe_gate": ("topk",),
            "moe_use_aux_free": (True,),
        },
        read=frozenset(
            """moe_num_experts num_experts moe_k moe_intermediate_size moe_num_shared_experts moe_norm_min
            moe_layer_start_index moe_layer_end_index moe_layer_interval""".split()
        ),
        neutral=_DEEPSEEK_NEUTRAL | {"router_aux_loss_coef", "moe_capacity"},
        defaults={
            "moe_k": 6,
            "moe_num_shared_experts": 2,
            "moe_norm_min": 1e-12,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
        interleaved_rope=True,
        experts=_ernie_experts,
        is_dense=_dense_between,
    ),
    "minimax_m2": Family(
        fixed={
            "output_router_logits": (False,),
            "router_jitter_noise": (0.0,),
            "qk_norm_type": ("per_layer",),
            "use_qk_norm": (True,),
            "use_routing_bias": (True,),
            "scoring_func": ("sigmoid",),
            "shared_intermediate_size": (0,),
        },
        read=frozenset(
            """num_local_experts num_experts num_experts_per_tok partial_rotary_factor rotary_dim
            attn_type_list""".split()
        ),
        neutral=frozenset(
            """router_aux_loss_coef use_mtp num_mtp_modules mtp_transformer_layers shared_moe_mode
            sliding_window""".split()
        ),
        defaults={"head_dim": 128, "rope_theta": 5e6, "num_experts_per_tok": 8},
        qk_norm=True,
        whole_norm=True,
        experts=_minimax_experts,
    ),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "deepseek_v32": replace(
        _DEEPSEEK,
        fixed=_DEEPSEEK.fixed | {"mlp_bias": (False,), "rope_interleave": (True,)},
        read=_DEEPSEEK.read | {"mlp_layer_types", "index_topk"},
        neutral=_DEEPSEEK.neutral | {"index_head_dim", "index_n_heads"},
        defaults=_DEEPSEEK.defaults | {"index_topk": 2048},
        is_dense=_dense_by_type_or_first,
    ),
    "glm4_moe_lite": replace(
        _DEEPSEEK,
        fixed=_DEEPSEEK.fixed | {"first_k_dense_replace": (1,)},  # published beside mlp_layer_types
        read=(_DEEPSEEK.read - {"first_k_dense_replace"}) | {"mlp_layer_types"},
        defaults=_DEEPSEEK.defaults | _GLM4_MOE_LITE_DEFAULTS | {"first_k_dense_replace": 1},
        is_dense=_dense_by_type,
    ),
    "gpt_oss": Family(
        fixed={"attention_bias": (True,), "output_router_logits": (False,), "swiglu_alpha": (1.702,)},
        read=frozenset(
            "num_local_experts num_experts num_experts_per_tok swiglu_limit sliding_window".split()
        ),
        neutral=frozenset("router_aux_loss_coef experts_per_token initial_context_length".split()),
        defaults={
            "head_dim": 64,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "rope_theta": 1.5e5,
            "rope_parameters": {
                **{
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                },
                "original_max_position_embeddings": 4096,
            },
        },
        windows="pattern",
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        experts=_gpt_oss_experts,
        teacher_only=True,
    ),
}
"""By model_type."""
