"""Fields of config.json as published, also sizes: they are read as they are, and the memory plan counts as
many parameters as transformers' model has. Layers are fewer; the models are built on no device.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron_simct.models.families import FAMILIES, NESTED, read_architecture
from megatron_simct.preflight.memory import total_parameters

transformers = pytest.importorskip("transformers")

LAYERS = 6
COMMON = {
    **{
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
    },
    **{
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
    "transformers_version": "4.55.0",
}


UNCOUNTED = (".indexer.", "e_score_correction_bias")
"""Tensors that are not computed here, and one that is a buffer."""


def shape(
    hidden: int, width: int, heads: int, groups: int, vocab: int, positions: int = 131072
) -> dict[str, Any]:
    return {
        **{
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_attention_heads": heads,
            "vocab_size": vocab,
        },
        **{"num_key_value_heads": groups, "max_position_embeddings": positions, "rms_norm_eps": 1e-6},
    }


def off(*names: str) -> dict[str, bool]:
    return dict.fromkeys(names, False)


def every(count: int, other: str, last: str) -> list[str]:
    return [last if (i + 1) % count == 0 else other for i in range(LAYERS)]


LLAMA3 = {
    **{
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_type": "llama3",
}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
}
QWEN3 |= {"max_window_layers": 36, "use_sliding_window": False}
QWEN_EXPERTS = {
    **{
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
    },
    "router_aux_loss_coef": 0.001,
}
DELTA = {
    **{"attention_bias": False, "full_attention_interval": 4, "head_dim": 256, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    "linear_value_head_dim": 128,
}
GEMMA = {
    **{"attention_bias": False, "cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"},
    **{"head_dim": 256, "pad_token_id": 0, "query_pre_attn_scalar": 256},
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
YARN |= {"original_max_position_embeddings": 4096}
DEEPSEEK = {
    **{
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "moe_layer_freq": 1,
    },
    **{"moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": YARN, "rope_theta": 10000},
    **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc"},
    "v_head_dim": 128,
}
FP8 = {
    "quantization_config": {
        **{
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    }
}
ROUTED = {
    **{
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 128,
    },
    **{"n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8},
    **{"routed_scaling_factor": 1.0, "rope_scaling": None, "rope_theta": 1000000},
}
GPT_OSS_ROPE = {
    **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
    **{"rope_type": "yarn", "truncate": False},
}
OLMO3_ROPE = {
    **{"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "yarn"},
}
MINISTRAL_ROPE = {
    **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
    **{
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1e6,
        "rope_type": "yarn",
    },
    "type": "yarn",
}
HUNYUAN_ROPE = {
    **{"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0},
    "type": "dynamic",
}
QWEN3_5_TEXT = {
    **shape(4096, 12288, 16, 4, 248320, 262144),
    **DELTA,
    **{
        "model_type": "qwen3_5_text",
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "mamba_ssm_dtype": "float32",
    },
    **{
        "layer_types": every(4, "linear_attention", "full_attention"),
        "mlp_only_layers": [],
        "hidden_act": "silu",
    },
    **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "attention_dropout": 0.0},
    **{"num_hidden_layers": LAYERS, "eos_token_id": 248044, "initializer_range": 0.02, "use_cache": True},
    "rope_parameters": {
        **{"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
        **{"rope_theta": 10000000, "rope_type": "default"},
    },
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": shape(4096, 14336, 32, 8, 128256)
    | off("attention_bias", "mlp_bias")
    | {
        "pretraining_tp": 1,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
    },
    "mistral": shape(4096, 14336, 32, 8, 32768, 32768) | {"rope_theta": 1000000.0, "sliding_window": None},
    "ministral3": shape(4096, 14336, 32, 8, 131072, 262144)
    | {"head_dim": 128, "rope_parameters": MINISTRAL_ROPE, "sliding_window": None},
    "qwen2": shape(3584, 18944, 28, 4, 152064, 32768)
    | {
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
    },
    "qwen3": shape(4096, 12288, 32, 8, 151936, 40960) | QWEN3,
    "qwen3_moe": shape(2048, 6144, 32, 4, 151936, 40960)
    | QWEN3
    | QWEN_EXPERTS
    | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "qwen3_5_text": QWEN3_5_TEXT,
    "qwen3_next": shape(2048, 5120, 16, 2, 151936, 262144)
    | DELTA
    | QWEN_EXPERTS
    | {
        "moe_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "partial_rotary_factor": 0.25,
    }
    | {
        "rope_scaling": None,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
    }
    | off("use_sliding_window"),
    "gemma2": shape(3584, 14336, 16, 8, 256000, 8192)
    | GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh"}
    | {
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **{name: value for name, value in COMMON.items() if name != "hidden_act"},
        **shape(1152, 6912, 4, 1, 262144, 32768),
        **GEMMA,
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_local_base_freq": 10000},
        **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6},
        "tie_word_embeddings": True,
    },
    "phi3": shape(3072, 8192, 24, 8, 200064)
    | off("attention_bias", "mlp_bias", "lm_head_bias")
    | {
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "sliding_window": 262144,
    }
    | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rope_theta": 10000.0}
    | {"rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"}}
    | {"tie_word_embeddings": True, "pad_token_id": 199999}
    | {
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "x.Phi3ForCausalLM",
        }
    },
    "smollm3": shape(2048, 11008, 16, 4, 128256, 65536)
    | off("attention_bias", "mlp_bias", "use_sliding_window")
    | {
        "layer_types": ["full_attention"] * LAYERS,
        "max_window_layers": 28,
        "no_rope_layers": [1, 1, 1, 0, 1, 1],
    }
    | {"no_rope_layer_interval": 4, "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0}
    | {"sliding_window": None, "tie_word_embeddings": True},
    "glm4_moe": shape(4096, 10944, 96, 8, 151552)
    | ROUTED
    | {
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
    },
    "solar_open": shape(4096, 10240, 64, 8, 196608)
    | {name: value for name, value in ROUTED.items() if name not in ("n_group", "topk_group")}
    | {"first_k_dense_replace": 0, "moe_intermediate_size": 1280, "partial_rotary_factor": 1.0}
    | {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}},
    "dots1": shape(4096, 10944, 32, 32, 152064, 32768)
    | {name: value for name, value in ROUTED.items() if name != "head_dim"}
    | {"attention_bias": False, "max_window_layers": 62, "moe_layer_freq": 1, "n_shared_experts": 2}
    | {"num_experts_per_tok": 6, "pretraining_tp": 1, "routed_scaling_factor": 2.5, "rope_theta": 10000000}
    | {
        "scoring_func": "noaux_tc",
        "sliding_window": None,
        "topk_method": "noaux_tc",
        "use_sliding_window": False,
    },
    "ernie4_5_moe": shape(2560, 12288, 20, 4, 103424)
    | {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6}
    | {
        "moe_layer_end_index": LAYERS - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
    }
    | {
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 1,
        "use_bias": False,
    }
    | {"rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "pad_token_id": 0},
    "minimax_m2": shape(3072, 1536, 48, 8, 200064, 196608)
    | {"attn_type_list": [1] * LAYERS, "head_dim": 128, "mtp_transformer_layers": 1, "num_experts_per_tok": 8}
    | {"num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rope_theta": 5000000}
    | {"rotary_dim": 64, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "use_mtp": True, **FP8}
    | {"use_qk_norm": True, "use_routing_bias": True},
    "deepseek_v3": shape(7168, 18432, 128, 128, 129280, 163840)
    | DEEPSEEK
    | FP8
    | {"auto_map": {"AutoConfig": "c.DeepseekV3Config", "AutoModelForCausalLM": "m.DeepseekV3ForCausalLM"}},
    "kimi_k2": shape(7168, 18432, 64, 64, 163840)
    | DEEPSEEK
    | FP8
    | {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "n_routed_experts": 384,
        "topk_group": 1,
        "aux_loss_alpha": 0.001,
    }
    | {"num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True}
    | {"rope_scaling": YARN | {"factor": 32.0}, "pretraining_tp": 1}
    | {"auto_map": {"AutoConfig": "c.DeepseekV3Config", "AutoModelForCausalLM": "m.DeepseekV3ForCausalLM"}},
    "deepseek_v32": shape(7168, 18432, 128, 128, 129280, 163840)
    | DEEPSEEK
    | {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    | {"quantization_config": FP8["quantization_config"] | {"scale_fmt": "ue8m0"}},
    "glm4_moe_lite": shape(2048, 10240, 20, 20, 154880, 202752)
    | {
        name: value
        for name, value in DEEPSEEK.items()
        if name not in ("ep_size", "moe_layer_freq", "scoring_func")
    }
    | {
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "topk_group": 1,
    }
    | {"n_routed_experts": 64, "num_experts_per_tok": 4, "q_lora_rank": 768, "qk_nope_head_dim": 192}
    | {"rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.8, "v_head_dim": 256}
    | {"partial_rotary_factor": 1.0},
    "gpt_oss": shape(2880, 2880, 64, 8, 201088)
    | {"attention_bias": True, "experts_per_token": 4, "head_dim": 64, "initial_context_length": 4096}
    | {"layer_types": every(2, "sliding_attention", "full_attention"), "num_experts_per_tok": 4}
    | {
        "num_local_experts": 32,
        "output_router_logits": False,
        "rope_scaling": GPT_OSS_ROPE,
        "rope_theta": 150000,
    }
    | {"router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0}
    | {
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn"],
            "quant_method": "mxfp4",
        }
    },
    "seed_oss": shape(5120, 27648, 80, 8, 155136, 524288)
    | {"attention_bias": True, "attention_dropout": 0.1, "attention_out_bias": False, "head_dim": 128}
    | {
        "mlp_bias": False,
        "residual_dropout": 0.1,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 1e7,
    },
    "ernie4_5": shape(1024, 3072, 16, 2, 103424)
    | {
        "head_dim": 128,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
    "granite": shape(4096, 12800, 32, 8, 49159)
    | {"attention_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0}
    | {"logits_scaling": 16.0, "mlp_bias": False, "residual_multiplier": 0.22, "rope_scaling": None}
    | {"rope_theta": 10000000.0, "tie_word_embeddings": True},
    "hunyuan_v1_dense": shape(4096, 14336, 32, 8, 128256, 32768)
    | off("add_classification_head", "attention_bias", "mlp_bias", "use_cla")
    | {
        "attention_head_dim": 128,
        "head_dim": 128,
        "cla_share_factor": 2,
        "class_num": 0,
        "dense_list": [4096, 0],
    }
    | {
        "eod_token_id": 127967,
        "enable_lm_head_fp32": True,
        "im_start_id": 4,
        "im_end_id": 5,
        "im_newline_id": 11,
    }
    | {"mask_init_id": 12, "norm_type": "rms", "num_experts": 1, "org_vocab_size": 128167, "pad_id": 127961}
    | {"pool_type": "last", "rope_scaling": HUNYUAN_ROPE, "rope_theta": 10000.0, "text_end_id": 7}
    | {"text_start_id": 6, "use_qk_norm": True, "use_rotary_pos_emb": True, "tie_word_embeddings": True},
    "olmo2": shape(4096, 11008, 32, 32, 100352, 4096)
    | {"attention_bias": False, "rope_scaling": None, "rope_theta": 500000},
    "olmo3": shape(4096, 11008, 32, 32, 100278, 65536)
    | {"attention_bias": False, "layer_types": every(4, "sliding_attention", "full_attention")}
    | {"rope_scaling": OLMO3_ROPE, "rope_theta": 500000, "sliding_window": 4096},
    "exaone4": shape(5120, 27392, 40, 8, 102400)
    | {
        "head_dim": 128,
        "layer_types": every(4, "sliding_attention", "full_attention"),
        "reorder_and_qk_norm": True,
    }
    | {"rope_scaling": LLAMA3 | {"factor": 16.0}, "rope_theta": 1000000, "sliding_window": 4096}
    | {"sliding_window_pattern": "LLLG"},
}
NESTED_PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "initializer_range": 0.02,
        },
        **{"image_token_index": 262144, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16"},
        "text_config": {
            **{
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 6,
            },
            **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        },
        "vision_config": {
            **{
                "hidden_size": 1152,
                "image_size": 896,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
            },
            **{"num_attention_heads": 16, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": False},
        },
    },
    "mistral3": {
        **{"image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu"},
        **{"spatial_merge_size": 2, "vision_feature_layer": -1, "torch_dtype": "bfloat16"},
        "text_config": {
            **shape(5120, 32768, 32, 8, 131072),
            **{"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02},
            **{"model_type": "mistral", "num_hidden_layers": LAYERS, "rope_theta": 1000000000.0},
            **{"sliding_window": None, "use_cache": True},
        },
        "vision_config": {
            **{
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "model_type": "pixtral",
                "num_attention_heads": 16,
            },
            **{"num_hidden_layers": 1, "patch_size": 14, "image_size": 1540, "head_dim": 64},
        },
    },
    "qwen3_5": {
        **{"image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053},
        **{"vision_end_token_id": 248054, "tie_word_embeddings": False, "text_config": QWEN3_5_TEXT},
        "vision_config": {
            **{
                "model_type": "qwen3_5",
                "depth": 1,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
            },
            **{"out_hidden_size": 4096, "patch_size": 16},
        },
    },
}


def on_no_device(fields: dict[str, Any], auto: str) -> torch.nn.Module:
    name = "deepseek_v3" if fields["model_type"] == "kimi_k2" else fields["model_type"]
    given = {key: value for key, value in fields.items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(name, **given))


def read(tmp_path: Any, fields: dict[str, Any]) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_architecture(str(tmp_path), flag="--hf-checkpoint")


def test_every_family_is_here() -> None:
    assert PUBLISHED.keys() == FAMILIES.keys() and NESTED_PUBLISHED.keys() == NESTED.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_are_read_and_parameters_counted(tmp_path, family) -> None:
    common = {} if family in ("gemma3_text", "qwen3_5_text") else COMMON
    fields = {"model_type": family} | common | PUBLISHED[family]
    found, model = read(tmp_path, fields), on_no_device(fields, "AutoModelForCausalLM")
    expected = sum(
        p.numel() for name, p in model.named_parameters() if not any(part in name for part in UNCOUNTED)
    )
    assert found.tied_embeddings == model.config.tie_word_embeddings
    assert total_parameters(found, vocab_size=found.vocab_size) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", NESTED_PUBLISHED)
def test_language_models_within_others(tmp_path, model_type) -> None:
    fields = {"model_type": model_type} | NESTED_PUBLISHED[model_type]
    found, model = read(tmp_path, fields), on_no_device(fields, "AutoModelForImageTextToText")
    parts = ("language_model.", "lm_head.")
    named = [(name, p) for name, p in model.named_parameters() if any(part in name for part in parts)]
    assert found.tied_embeddings == model.config.tie_word_embeddings
    assert total_parameters(found, vocab_size=found.vocab_size) == sum(p.numel() for _, p in named)
