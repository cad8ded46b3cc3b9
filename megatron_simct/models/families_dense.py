"""Families whose layers are grouped-query attention and a dense MLP."""

from __future__ import annotations

from typing import Any

from megatron_simct.models.family import SCALED, Family

_GEMMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),  # not read by transformers, which has hidden_activation
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}
_GEMMA_READ = frozenset(
    {"query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
)
_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN_DEFAULTS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GRANITE_MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}

DENSE: dict[str, Family] = {
    "llama": Family(fixed={"attention_bias": (False,), "mlp_bias": (False,)}, ropes=SCALED),
    "mistral": Family(
        fixed={}, read=frozenset({"sliding_window"}), defaults={"sliding_window": 4096}, windows="all"
    ),
    "ministral3": Family(
        fixed={},
        read=frozenset({"sliding_window"}),
        defaults={
            "sliding_window": None,
            "head_dim": 128,
            "rope_parameters": {
                **{"type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0},
                **{"mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
                "original_max_position_embeddings": 16384,
            },
        },
        ropes=("yarn",),
        windows="all",
        growing_queries=True,
    ),
    "qwen2": Family(
        fixed={},
        read=frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
        neutral=frozenset({"attention_bias"}),  # the family has these biases in any case
        defaults=_QWEN_DEFAULTS,
        windows="upper",
        qkv_bias=True,
    ),
    "qwen3": Family(
        fixed={"attention_bias": (False,)},
        read=frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        windows="upper",
        qk_norm=True,
    ),
    "gemma2": Family(
        fixed=_GEMMA_FIXED,
        read=_GEMMA_READ,
        neutral=frozenset({"sliding_window_size"}),  # published beside sliding_window
        defaults=_GEMMA_DEFAULTS
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows="pattern",
        zero_centered_norm=True,
        norms="around",
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        fixed=_GEMMA_FIXED,
        read=_GEMMA_READ | {"rope_local_base_freq", "sliding_window_pattern"},
        neutral=frozenset({"_sliding_window_pattern"}),
        defaults=_GEMMA_DEFAULTS
        | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ropes=("default", "linear"),
        windows="pattern",
        qk_norm=True,
        zero_centered_norm=True,
        norms="around",
        scaled_embedding=True,
        local_rope=True,
    ),
    "phi3": Family(
        fixed={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "resid_pdrop": (0.0,),
            "embd_pdrop": (0.0,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        read=frozenset({"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"}),
        defaults={"original_max_position_embeddings": 4096},
        ropes=("default", "longrope"),
        windows="all",
        packed=True,
    ),
    "smollm3": Family(
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
        read=frozenset({"use_sliding_window", "sliding_window", "no_rope_layers", "no_rope_layer_interval"}),
        defaults={
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        windows="no_rope",
        rope_layers="listed",
    ),
    "seed_oss": Family(
        fixed={
            "attention_out_bias": (False,),
            "mlp_bias": (False,),
            "attention_dropout": (0.0, 0.1),  # published with this value; dropout is not implemented
            "residual_dropout": (0.0, 0.1),
        },
        read=frozenset({"attention_bias"}),
        defaults={"attention_bias": True, "head_dim": 128},
        ropes=SCALED,
        qkv_bias="attention_bias",
    ),
    "ernie4_5": Family(
        fixed={"use_bias": (False,)},
        defaults={"head_dim": 128, "rope_theta": 5e5, "tie_word_embeddings": True},
        interleaved_rope=True,
    ),
    "granite": Family(
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
        read=frozenset(_GRANITE_MULTIPLIERS),
        defaults=_GRANITE_MULTIPLIERS,
        ropes=SCALED,
    ),
    "hunyuan_v1_dense": Family(
        fixed={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "use_qk_norm": (True,),
            "use_rotary_pos_emb": (True,),
            "norm_type": ("rms",),
            "num_experts": (1,),
        },
        neutral=frozenset(
            """attention_head_dim cla_share_factor class_num dense_list pool_type org_vocab_size
            enable_lm_head_fp32 eod_token_id pad_id im_start_id im_end_id im_newline_id text_start_id
            text_end_id mask_init_id""".split()
        ),
        ropes=("default", "dynamic"),
        qk_norm=True,
        norm_after_rope=True,
    ),
    "olmo2": Family(
        fixed={"attention_bias": (False,)}, ropes=SCALED, qk_norm=True, whole_norm=True, norms="after"
    ),
    "olmo3": Family(
        fixed={"attention_bias": (False,)},
        read=frozenset({"sliding_window"}),
        defaults={
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_theta": 5e5,
            "rope_local_base_freq": 5e5,
        },
        windows="pattern",
        qk_norm=True,
        whole_norm=True,
        norms="after",
        local_rope=True,
    ),
    "exaone4": Family(
        fixed={"reorder_and_qk_norm": (True,)},
        read=frozenset({"sliding_window"}),
        neutral=frozenset({"sliding_window_pattern"}),  # layer_types decides
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
        ropes=SCALED,
        windows="pattern",
        rope_layers="windows",
        qk_norm=True,
        norms="after",
    ),
}
"""By model_type."""
