"""config.json -> Architecture: families, both spellings of rotary scaling, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.models import families
from megatron_simct.models.delta_net import DeltaNet
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_mapping import unread_names
from megatron_simct.models.latent import Latent
from megatron_simct.models.layers import Layer
from megatron_simct.models.rotary import Rope

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": True,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = {
    "kind": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}


@pytest.fixture
def read(tmp_path) -> Callable[[dict[str, Any]], Architecture]:
    def read(fields) -> Architecture:
        (tmp_path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return read_architecture(str(tmp_path), flag="--hf-checkpoint")

    return read


def windows_of(architecture: families.Architecture) -> tuple[int | None, ...]:
    return tuple(layer.window for layer in architecture.layers)


def test_defaults_of_llama(read) -> None:
    found = read(LLAMA)
    attention = GroupedQuery(heads=8, groups=8, head_dim=8, scale=8**-0.5)
    layer = Layer(attention=attention, mlp=Dense(width=96), rope=Rope(theta=10000.0, dim=8))
    assert (found.layers, found.tied_embeddings) == ((layer,) * 3, False)


def test_qwen2_has_biases_and_its_window_is_neutral_while_unused(read) -> None:
    found = read(QWEN2 | {"num_key_value_heads": 2, "rope_theta": 1e6})
    assert (found.layers[2].attention.groups, found.ropes[0].theta) == (2, 1e6)
    assert found.layers[0].attention.qkv_bias and found.tied_embeddings


@pytest.mark.parametrize(
    "fields, windows",
    [
        (MISTRAL, (5, 5, 5)),
        (MISTRAL | {"sliding_window": None}, (None, None, None)),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
            (None, 32768, 32768),
        ),
        (QWEN2 | {"use_sliding_window": True}, (None, None, None)),
        (
            QWEN2
            | {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            (32768, None, None),
        ),
    ],
)
def test_which_layers_have_a_window(read, fields, windows) -> None:
    assert windows_of(read(fields)) == windows


@pytest.mark.parametrize(
    "rope, theta, scaling",
    [
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, {}),
        ({"rope_parameters": None, "rope_theta": 7.0}, 7.0, {}),
        ({"rope_theta": 7.0, "rope_scaling": LLAMA3}, 7.0, SCALED),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 7.0}}, 7.0, SCALED),
        ({"rope_theta": 7.0, "rope_scaling": LLAMA3 | {"type": "llama3"}}, 7.0, SCALED),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "original_max_position_embeddings": 64}},
            10000.0,
            SCALED | {"low_freq_factor": 2.0, "original_length": 64},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"kind": "linear", "factor": 2.0}),
    ],
)
def test_both_spellings_of_the_rotary_embedding(read, rope, theta, scaling) -> None:
    found = read(LLAMA | rope)
    assert found.ropes == (Rope(theta=theta, dim=8, **scaling),)


GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
    "query_pre_attn_scalar": 144,
}
PHI4_MINI = LLAMA | {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3, 4]},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}


QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_window_layers": 3,
    "sliding_window": None,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def test_experts_of_qwen3_moe(read) -> None:
    found = read(QWEN3_MOE)
    assert found.num_experts == 8 and found.layers[0].attention.qk_norm
    assert {layer.mlp for layer in found.layers} == {Experts(count=8, chosen=2, width=24, normalized=True)}
    left_out = {k: v for k, v in QWEN3_MOE.items() if k not in ("norm_topk_prob", "num_experts")}
    found = read(left_out | {"num_local_experts": 8, "num_experts_per_tok": 1, "sliding_window": 4096})
    assert (found.layers[0].mlp.normalized, windows_of(found)) == (False, (None, None, None))
    assert windows_of(read(QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 5})) == (5, 5, 5)
    assert read(LLAMA).num_experts == 0


def test_what_gemma2_leaves_out(read) -> None:
    found = read(GEMMA2)
    layer = found.layers[0]
    assert (layer.attention.head_dim, found.tied_embeddings, layer.attention.scale) == (256, True, 144**-0.5)
    assert (layer.attention.softcap, found.final_logit_softcap) == (50.0, 30.0)
    assert (windows_of(found), found.embedding_scale) == ((4096, None, 4096), 8.0)
    assert (
        found.zero_centered_norm and layer.norms == "around" and layer.mlp.activation == "gelu_pytorch_tanh"
    )
    assert read(GEMMA2 | {"attn_logit_softcapping": None}).layers[0].attention.softcap is None


def test_gemma3_has_two_rotary_embeddings(read) -> None:
    fields = GEMMA2 | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512}
    found = read(fields)
    full, local = Rope(theta=1e6, dim=256), Rope(theta=1e4, dim=256)
    assert [layer.rope for layer in found.layers] == [*[local] * 5, full, local] and found.ropes == (
        local,
        full,
    )
    assert windows_of(found) == (*[512] * 5, None, 512)
    attention = found.layers[0].attention
    assert (attention.softcap, found.final_logit_softcap, attention.qk_norm) == (None, None, True)


def test_phi4_mini_turns_a_part_of_each_head_by_longrope(read) -> None:
    found = read(PHI4_MINI)
    (rope,) = found.ropes
    assert (rope.kind, rope.dim, rope.original_length) == ("longrope", 4, 4096)
    assert (rope.short_factors, rope.long_factors) == ((1.0, 2.0), (3, 4))
    assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # log2(32) / log2(4096)
    assert (
        found.layers[0].attention.packed and found.layers[0].mlp.packed and windows_of(found) == (262144,) * 3
    )


SMOLLM3 = LLAMA | {
    "model_type": "smollm3",
    "num_hidden_layers": 5,
    "sliding_window": 7,
    "max_window_layers": 28,
}


@pytest.mark.parametrize(
    "fields, with_rope",
    [
        ({}, (0, 0, 0, None, 0)),
        ({"no_rope_layer_interval": 2}, (0, None, 0, None, 0)),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 0], "no_rope_layer_interval": 2}, (None, 0, 0, None, 0)),
    ],
)
def test_layers_of_smollm3_without_rotary_embedding_have_the_window(read, fields, with_rope) -> None:
    found = read(SMOLLM3 | fields)
    rope = Rope(theta=2e6, dim=8)
    assert [layer.rope for layer in found.layers] == [None if one is None else rope for one in with_rope]
    assert (windows_of(found), found.tied_embeddings) == ((None,) * 5, True)
    found = read(SMOLLM3 | fields | {"use_sliding_window": True})
    assert windows_of(found) == tuple(7 if one is None else None for one in with_rope)
    found = read(SMOLLM3 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 5})
    assert windows_of(found) == (None,) * 5


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A config.json that is refused, and the error line."""

    base: dict[str, Any]
    change: dict[str, Any] = field(default_factory=dict)
    without: str | None = None
    """A field that is left out."""
    words: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in (self.base | self.change).items() if name != self.without}


def switch(base: dict[str, Any], name: str, value: Any) -> Refused:
    """A field of which only other values are implemented."""
    words = (f"{name} = {value!r} is not implemented for {base['model_type']}",)
    return Refused(base=base, change={name: value}, words=words)


def unknown(base: dict[str, Any], name: str, value: Any) -> Refused:
    """A field that the family does not have, at a value that would have an effect."""
    words = (
        f"field {name!r} is not known for {base['model_type']}, so {value!r} cannot be honoured",
        f'computes the same without it, delete the line of "{name}"',
    )
    return Refused(base=base, change={name: value}, words=words)


def scaled(base: dict[str, Any], rope: dict[str, Any], *words: str, key: str = "rope_scaling") -> Refused:
    """A rotary embedding that is not implemented."""
    return Refused(base=base, change={key: rope}, words=(key, *words))


DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 5,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}
GLM4_MOE = LLAMA | {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "head_dim": 8,
    **{
        name: value
        for name, value in DEEPSEEK.items()
        if "expert" in name or name.startswith(("moe_int", "norm_to"))
    },
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "rope_scaling": None,
    "rope_theta": 1000000,
}
SOLAR = GLM4_MOE | {
    "model_type": "solar_open",
    "attention_bias": False,
    "use_qk_norm": False,
    "first_k_dense_replace": 0,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 0,
}
DOTS = {
    name: value for name, value in GLM4_MOE.items() if name not in ("partial_rotary_factor", "use_qk_norm")
} | {
    "model_type": "dots1",
    "attention_bias": False,
    "sliding_window": None,
    "scoring_func": "noaux_tc",
    "moe_layer_freq": 1,
}
ERNIE_MOE = LLAMA | {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_intermediate_size": 24,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
    "moe_gate": "topk",
    "moe_capacity": [64, 64, 64],
    "use_bias": False,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
    "rope_theta": 500000,
}
MINIMAX = LLAMA | {
    "model_type": "minimax_m2",
    "attn_type_list": [1, 1, 1],
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "num_mtp_modules": 3,
    "mtp_transformer_layers": 1,
    "use_mtp": True,
    "qk_norm_type": "per_layer",
    "use_qk_norm": True,
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "rotary_dim": 4,
    "rope_theta": 5000000,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "sliding_window": None,
}
GPT_OSS = LLAMA | {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 8,
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_experts_per_tok": 4,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
}
MINISTRAL3 = LLAMA | {
    "model_type": "ministral3",
    "rope_parameters": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
        **{
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1e6,
            "type": "yarn",
        },
        **{"rope_type": "yarn", "max_position_embeddings": 262144},
    },
}
GLM_FLASH = {name: value for name, value in DEEPSEEK.items() if name not in ("auto_map", "rope_scaling")} | {
    "model_type": "glm4_moe_lite",
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", *["sparse"] * 4],
    "partial_rotary_factor": 1.0,
}
del GLM_FLASH["first_k_dense_replace"]
SEED = LLAMA | {
    "model_type": "seed_oss",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "attention_out_bias": False,
    "mlp_bias": False,
    "head_dim": 8,
    "rope_scaling": {"rope_type": "default"},
}
ERNIE = LLAMA | {"model_type": "ernie4_5", "use_bias": False, "head_dim": 8, "tie_word_embeddings": True}
GRANITE = LLAMA | {
    "model_type": "granite",
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "residual_multiplier": 0.22,
    "attention_bias": False,
    "mlp_bias": False,
}
HUNYUAN = LLAMA | {
    "model_type": "hunyuan_v1_dense",
    **dict.fromkeys(("add_classification_head", "attention_bias", "mlp_bias", "use_cla"), False),
    **dict.fromkeys(("attention_head_dim", "head_dim"), 8),
    **{
        "attention_dropout": 0.0,
        "cla_share_factor": 2,
        "class_num": 0,
        "dense_list": [64, 0],
        "norm_type": "rms",
    },
    **{
        "org_vocab_size": 90,
        "pool_type": "last",
        "num_experts": 1,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    **{
        "eod_token_id": 3,
        "pad_id": 2,
        "mask_init_id": 12,
        "im_start_id": 4,
        "im_end_id": 5,
        "im_newline_id": 11,
    },
    **{"text_start_id": 6, "text_end_id": 7, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "rope_scaling": {
        **{
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        },
        "type": "dynamic",
    },
}
OLMO2 = LLAMA | {"model_type": "olmo2", "attention_bias": False, "rope_theta": 500000}
OLMO3 = LLAMA | {
    "model_type": "olmo3",
    "attention_bias": False,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4096,
    "rope_theta": 500000,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
}
EXAONE4 = LLAMA | {
    "model_type": "exaone4",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "reorder_and_qk_norm": True,
    "rope_scaling": LLAMA3,
    "rope_theta": 1000000,
}


def test_the_layers_of_deepseek_v3(read) -> None:
    found = read(DEEPSEEK)
    dense, experts = found.layers[2].mlp, found.layers[3].mlp
    assert [layer.mlp for layer in found.layers] == [dense] * 3 + [experts] * 2
    assert dense == Dense(width=96) and found.teacher_only and found.has_mtp
    assert experts == Experts(
        count=16,
        width=24,
        chosen=8,
        score="sigmoid",
        groups=8,
        chosen_groups=4,
        factor=2.5,
        corrected=True,
        shared_width=24,
    )
    mscale = 0.1 * math.log(40) + 1
    attention = Latent(
        heads=8, query_rank=12, rank=16, nope_dim=6, rope_dim=4, value_dim=8, scale=10**-0.5 * mscale**2
    )
    rope = Rope(
        theta=10000, dim=4, kind="yarn", factor=40, original_length=4096, beta_fast=32, interleaved=True
    )
    assert found.layers[0].attention == attention and found.ropes == (rope,)
    with pytest.raises(ValueError, match="--x: model_type 'deepseek_v3' is supported as a teacher only"):
        families.check_student(found, flag="--x")
    families.check_student(read(GLM4_MOE), flag="--x")


def test_deepseek_v32_is_deepseek_v3_up_to_its_index_length(read) -> None:
    found, dense = read(DEEPSEEK_V32), read(DEEPSEEK)
    assert found.layers == dense.layers and found.teacher_only
    assert (found.index_length, found.max_position_embeddings) == (2048, 2048) and dense.index_length is None
    by_type = {"mlp_layer_types": ["dense", *["sparse"] * 4], "layer_types": ["indexed_attention"] * 5}
    assert read(DEEPSEEK_V32 | by_type).layers == read(DEEPSEEK | {"first_k_dense_replace": 1}).layers
    unread = unread_names(found)
    for name in (
        "layers.4.self_attn.indexer.wq_b.weight",
        "layers.5.eh_proj.weight",
        "layers.0.self_attn.indexer.k_norm.bias",
    ):
        assert unread.fullmatch(f"model.{name}")
    assert not unread.fullmatch("model.layers.4.self_attn.q_a_proj.weight")
    assert not unread_names(dense).fullmatch("model.layers.4.self_attn.indexer.wq_b.weight")


def test_yarn_takes_what_the_file_leaves_out(read) -> None:
    (rope,) = read(QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).ropes
    expected = Rope(theta=10000.0, dim=8, kind="yarn", factor=4.0, original_length=512)
    assert rope == replace(expected, attention_factor=0.1 * math.log(4) + 1)


def test_hunyuan_stretches_the_base(read) -> None:
    found = read(HUNYUAN)
    assert found.ropes == (Rope(theta=10000.0 * 1000 ** (8 / 6), dim=8),) and found.tied_embeddings
    assert found.layers[0].attention.norm_after_rope and not found.layers[0].has_transformer_engine


GEMMA3 = GEMMA2 | {"model_type": "gemma3_text"}
DEEPSEEK_V32 = {name: value for name, value in DEEPSEEK.items() if name != "auto_map"} | {
    **{"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
    **{"max_position_embeddings": 163840, "num_nextn_predict_layers": 1},
}
LATENT = (DEEPSEEK, DEEPSEEK | {"model_type": "kimi_k2"}, DEEPSEEK_V32, GLM_FLASH)
QWEN3 = LLAMA | {"model_type": "qwen3"}
QWEN3_5 = LLAMA | {
    "model_type": "qwen3_5_text",
    "attn_output_gate": True,
    "head_dim": 8,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e7,
        "rope_type": "default",
    },
}
QWEN3_NEXT = QWEN3_MOE | {
    **{name: value for name, value in QWEN3_5.items() if name.startswith(("linear_", "full_", "head_"))},
    "model_type": "qwen3_next",
    "shared_expert_intermediate_size": 24,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "num_hidden_layers": 4,
}
del QWEN3_NEXT["sliding_window"], QWEN3_NEXT["max_window_layers"]
DELTA_SWITCHES = {
    "attention_bias": True,
    "attn_output_gate": False,
    "mamba_ssm_dtype": "bfloat16",
    "mlp_only_layers": [1],
}
NESTED = {"full_attention": {"rope_type": "default"}}
REFUSED = [
    # Models of no family here.
    Refused(
        base=LLAMA,
        change={"model_type": "gpt2"},
        words=("'gpt2' is not supported", "this version knows: llama, "),
    ),
    Refused(base=GEMMA2, change={"model_type": "gemma3"}, words=("'text_config' is missing",)),
    Refused(base=LLAMA, change={"model_type": ["llama"]}, words=("model_type ['llama'] is not supported",)),
    Refused(
        base=QWEN2, change={"quantization_config": {"quant_method": "awq"}}, words=("it is quantised (awq)",)
    ),
    Refused(
        base=LLAMA, change={"quantization_config": ["fp8"]}, words=("it is quantised (of an unnamed kind)",)
    ),
    Refused(base=LLAMA, change={"quantization_config": {}}, words=("it is quantised (of an unnamed kind)",)),
    Refused(base=LLAMA, without="vocab_size", words=("'vocab_size' is missing",)),
    Refused(base=QWEN3_MOE, without="moe_intermediate_size", words=("'moe_intermediate_size' is missing",)),
    # Every switch, at a value that is not implemented.
    *(
        switch(base, "hidden_act", "gelu")
        for base in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI4_MINI, SMOLLM3)
    ),
    *(
        switch(base, "attention_dropout", 0.1)
        for base in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, PHI4_MINI, SMOLLM3)
    ),
    *(
        switch(base, "attention_bias", True)
        for base in (LLAMA, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI4_MINI, SMOLLM3)
    ),
    *(switch(base, "mlp_bias", True) for base in (LLAMA, PHI4_MINI, SMOLLM3)),
    *(switch(base, "hidden_activation", "gelu") for base in (GEMMA2, GEMMA3)),
    *(switch(base, "hidden_act", "silu") for base in (GEMMA2, GEMMA3)),
    *(switch(base, "use_bidirectional_attention", True) for base in (GEMMA2, GEMMA3)),
    *(switch(base, name, value) for base in (QWEN3_5, QWEN3_NEXT) for name, value in DELTA_SWITCHES.items()),
    switch(QWEN3_NEXT, "decoder_sparse_step", 2),
    switch(QWEN3_NEXT, "output_router_logits", True),
    Refused(
        base=QWEN3_5, change={"linear_num_value_heads": 3}, words=("expected a multiple of 2 key heads",)
    ),
    Refused(base=QWEN3_5, change={"layer_types": ["sliding_attention"] * 4}, words=("layer_types = ",)),
    Refused(
        base=QWEN3_5, change={"layer_types": ["linear_attention"] * 4}, words=("without full_attention",)
    ),
    switch(QWEN3_MOE, "decoder_sparse_step", 2),
    switch(QWEN3_MOE, "decoder_sparse_step", None),
    switch(QWEN3_MOE, "mlp_only_layers", [0]),
    switch(QWEN3_MOE, "output_router_logits", True),
    switch(PHI4_MINI, "lm_head_bias", True),
    switch(PHI4_MINI, "resid_pdrop", 0.1),
    switch(PHI4_MINI, "embd_pdrop", 0.1),
    switch(PHI4_MINI, "full_attn_mod", 2),
    switch(PHI4_MINI, "interpolate_factor", 2),
    # Fields of other families.
    unknown(LLAMA, "sliding_window", 4096),
    unknown(LLAMA, "sliding_window", False),  # transformers' cache checks whether it is null
    unknown(LLAMA, "use_sliding_window", True),
    unknown(LLAMA, "partial_rotary_factor", 0.5),
    unknown(LLAMA, "original_max_position_embeddings", 64),  # transformers prefers it to that of the scaling
    unknown(LLAMA, "rope_interleaved", True),
    unknown(LLAMA, "is_causal", False),
    unknown(LLAMA, "is_causal", None),  # transformers checks whether it is true
    unknown(LLAMA, "use_rope", False),
    unknown(LLAMA, "attention_chunk_size", 8),
    unknown(LLAMA, "per_layer_config", {"0": {"head_dim": 4}}),
    unknown(LLAMA, "hidden_dropout", 0.1),
    unknown(LLAMA, "embedding_multiplier", 12.0),
    unknown(LLAMA, "attention_multiplier", 1.0),  # it replaces the root of head_dim
    unknown(LLAMA, "logit_scale", 0.0625),
    unknown(LLAMA, "final_logit_softcapping", 30.0),
    unknown(LLAMA, "num_nextn_predict_layers", 1),
    unknown(LLAMA, "num_experts", 8),
    unknown(LLAMA, "moe_layer_freq", 1),
    unknown(LLAMA, "layer_norm_eps", 1e-5),
    unknown(LLAMA, "unslothed", True),
    unknown(QWEN2, "use_mrope", True),
    unknown(QWEN2, "use_qk_norm", True),
    unknown(MISTRAL, "attention_bias", True),
    unknown(MISTRAL, "use_sliding_window", True),
    unknown(GEMMA2, "sliding_window_pattern", 3),
    unknown(QWEN3, "norm_topk_prob", True),
    unknown(LLAMA, "auto_map", {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}),
    unknown(LLAMA, "auto_map", {"AutoModel": "modeling_mine.BidirectionalLlamaModel"}),
    unknown(LLAMA, "auto_map", {"AutoModelForCausalLM": None}),
    # Families with experts, and the small ones after them.
    *(
        switch(base, "output_router_logits", True)
        for base in (GLM4_MOE, SOLAR, DOTS, ERNIE_MOE, MINIMAX, *LATENT)
    ),
    *(switch(base, "scoring_func", "softmax") for base in (GLM4_MOE, SOLAR, DOTS, MINIMAX, *LATENT)),
    *(switch(base, "topk_method", "greedy") for base in (GLM4_MOE, SOLAR, DOTS, *LATENT)),
    *(switch(base, "moe_layer_freq", 2) for base in (GLM4_MOE, SOLAR, DOTS, *LATENT)),
    *(switch(base, "attention_bias", True) for base in (SOLAR, DOTS, *LATENT, GRANITE, OLMO2, OLMO3)),
    *(switch(base, "use_bias", True) for base in (ERNIE_MOE, ERNIE)),
    *(switch(base, "mlp_bias", True) for base in (SEED, GRANITE)),
    switch(SOLAR, "use_qk_norm", True),
    switch(SOLAR, "first_k_dense_replace", 1),
    switch(ERNIE_MOE, "moe_gate", "top2"),
    switch(ERNIE_MOE, "moe_use_aux_free", False),
    switch(MINIMAX, "router_jitter_noise", 0.1),
    switch(DEEPSEEK_V32, "rope_interleave", False),
    switch(DEEPSEEK_V32, "mlp_bias", True),
    Refused(base=DEEPSEEK_V32, change={"layer_types": ["full_attention"] * 5}, words=("layer_types = ",)),
    Refused(base=DEEPSEEK_V32, change={"index_topk": 0}, words=("index_topk = 0",)),
    unknown(DEEPSEEK, "index_topk", 2048),
    switch(GLM_FLASH, "first_k_dense_replace", 2),
    switch(GPT_OSS, "output_router_logits", True),
    switch(GPT_OSS, "attention_bias", False),
    switch(GPT_OSS, "swiglu_alpha", 1.5),
    Refused(base=GPT_OSS, change={"num_experts_per_tok": 9}, words=("num_experts_per_tok = 9 of 8 experts",)),
    scaled(MINISTRAL3, {"rope_type": "default"}, "not implemented", key="rope_parameters"),
    switch(MINIMAX, "qk_norm_type", "per_head"),
    switch(MINIMAX, "use_qk_norm", False),
    switch(MINIMAX, "use_routing_bias", False),
    switch(MINIMAX, "shared_intermediate_size", 8),
    switch(MINIMAX, "attn_type_list", [1, 0, 1]),
    switch(SEED, "attention_out_bias", True),
    switch(SEED, "residual_dropout", 0.2),
    *(switch(HUNYUAN, name, True) for name in ("attention_bias", "mlp_bias")),
    *(switch(HUNYUAN, name, False) for name in ("use_qk_norm", "use_rotary_pos_emb")),
    *(switch(HUNYUAN, name, value) for name, value in (("norm_type", "layer"), ("num_experts", 8))),
    unknown(HUNYUAN, "use_cla", True),
    unknown(HUNYUAN, "add_classification_head", True),
    scaled(HUNYUAN, {"type": "dynamic", "factor": 2.0}, "rope_type dynamic has alpha"),
    switch(EXAONE4, "reorder_and_qk_norm", False),
    Refused(base=DEEPSEEK, change={"n_group": 3}, words=("n_group = 3, topk_group = 4", "not implemented")),
    Refused(base=DEEPSEEK, change={"topk_group": 3}, words=("num_experts_per_tok = 8 of 16 experts",)),
    Refused(base=DEEPSEEK, change={"n_group": 16}, words=("hold two at least",)),
    Refused(
        base=DEEPSEEK, change={"num_key_value_heads": 4}, words=("num_key_value_heads = 4", "expected 8")
    ),
    Refused(base=ERNIE_MOE, change={"moe_k": 9}, words=("moe_k = 9 of 8 experts",)),
    Refused(
        base=EXAONE4, without="layer_types", words=("sliding_window_pattern = 'LLLG'", "without layer_types")
    ),
    # Layers and windows.
    Refused(
        base=QWEN2, change={"layer_types": ["full_attention", "sliding_attention"]}, words=("layer_types",)
    ),
    Refused(base=QWEN2, change={"layer_types": ["sliding_attention"] * 3}, words=("sliding_window is None",)),
    Refused(base=LLAMA, change={"layer_types": ["sliding_attention"] * 3}, words=("layer_types", "llama")),
    Refused(base=MISTRAL, change={"layer_types": ["full_attention"] * 3}, words=("layer_types", "mistral")),
    Refused(
        base=QWEN2,
        change={"layer_types": ["chunked_attention"] * 3},
        words=("layer_types", "chunked_attention"),
    ),
    Refused(
        base=SMOLLM3, change={"layer_types": ["sliding_attention"] * 5}, words=("sliding_window is None",)
    ),
    Refused(
        base=SMOLLM3,
        change={"no_rope_layers": [1, 1, 1, 0]},
        words=("no_rope_layers = [1, 1, 1, 0]", "each of 5 layers"),
    ),
    Refused(
        base=SMOLLM3, change={"no_rope_layers": [1, 1, 1, 0, 2]}, words=("no_rope_layers = [1, 1, 1, 0, 2]",)
    ),
    Refused(base=SMOLLM3, change={"no_rope_layers": 4}, words=("no_rope_layers = 4",)),
    Refused(base=SMOLLM3, change={"no_rope_layer_interval": 0}, words=("no_rope_layer_interval = 0",)),
    # Experts.
    Refused(base=QWEN3_MOE, change={"num_experts": 1}, words=("num_experts_per_tok = 2 of 1 experts",)),
    Refused(
        base=QWEN3_MOE, change={"num_local_experts": 4}, words=("num_experts = 8, num_local_experts = 4",)
    ),
    Refused(base=QWEN3_MOE, without="num_experts", words=("num_experts", "neither is there")),
    Refused(
        base=QWEN3_MOE, change={"num_experts_per_tok": 9}, words=("num_experts_per_tok = 9 of 8 experts",)
    ),
    Refused(
        base=QWEN3_MOE,
        change={"num_experts_per_tok": 1},
        words=("num_experts_per_tok = 1", "norm_topk_prob = True"),
    ),
    # Heads.
    Refused(
        base=LLAMA,
        change={"num_key_value_heads": 3},
        words=("num_key_value_heads = 3; expected a divisor of 8 heads",),
    ),
    Refused(
        base=LLAMA,
        change={"num_attention_heads": 128},
        words=("of a head's 0 entries 0 would be rotated; expected an even",),
    ),
    Refused(
        base=LLAMA,
        change={"head_dim": 7},
        words=("of a head's 7 entries 7 would be rotated; expected an even number",),
    ),
    # The rotary embedding.
    scaled(LLAMA, LLAMA3 | {"beta": 2.0}, "beta", "rope_type llama3 has factor"),
    scaled(LLAMA, {"type": "llama3", "factor": 2.0}, "high_freq_factor"),
    scaled(
        LLAMA, LLAMA3 | {"high_freq_factor": 1.0}, "{", "expected a high_freq_factor above low_freq_factor"
    ),
    scaled(LLAMA, {"type": "default", "factor": 2.0}, "rope_type default has nothing else"),
    scaled(
        LLAMA,
        {"type": "dynamic", "factor": 2.0},
        "'dynamic'",
        "llama",
        "rope_type default, linear, llama3, yarn are",
    ),
    scaled(LLAMA, {"rope_type": "linear", "factor": 2.0, "finetuned": True}, "rope_type linear has factor"),
    scaled(
        LLAMA, {"rope_type": "yarn", "factor": 2.0, "ramp": 2.0}, "rope_type yarn has", key="rope_parameters"
    ),
    scaled(LLAMA, {"rope_theta": 1.0, "partial_rotary_factor": 0.5}, "nothing else", key="rope_parameters"),
    scaled(LLAMA, NESTED, "nothing else", key="rope_parameters"),
    scaled(QWEN2, {"type": "linear", "factor": 2.0}, "'linear'", "qwen2", "rope_type default"),
    scaled(QWEN2, {"type": "mrope", "mrope_section": [2, 1, 1]}, "'mrope'"),
    scaled(QWEN2, {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}, "nothing else"),
    scaled(GEMMA3, {"type": "linear", "factor": 2.0}, "'rope_type': 'default'", "nothing else"),
    scaled(
        GEMMA3,
        {"rope_type": "linear", "factor": 2.0},
        "it has full_attention and sliding",
        key="rope_parameters",
    ),
    scaled(GEMMA3, NESTED | {"chunked_attention": {}}, "is not known", key="rope_parameters"),
    Refused(
        base=PHI4_MINI,
        change={"partial_rotary_factor": 1.0},
        words=("rope_type longrope has", "with 4 factors each"),
    ),
    Refused(
        base=PHI4_MINI,
        change={"partial_rotary_factor": 0.4},
        words=("of a head's 8 entries 3 would be rotated",),
    ),
    Refused(
        base=PHI4_MINI,
        change={"partial_rotary_factor": 2},
        words=("of a head's 8 entries 16 would be rotated",),
    ),
]


def assert_refused(read: Any, tmp_path: Path, content: dict[str, Any] | str, words: Sequence[str]) -> None:
    with pytest.raises(ValueError) as error:
        read(content)
    assert str(error.value).startswith(f"--hf-checkpoint {tmp_path}: ") and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "case", REFUSED, ids=lambda case: f"{case.base['model_type']}-{case.without or [*case.change]}"
)
def test_what_is_refused(read, tmp_path, case) -> None:
    assert_refused(read, tmp_path, case.fields, case.words)


def test_every_switch_is_in_the_table_of_refusals() -> None:
    tried = {(case.base["model_type"], name) for case in REFUSED for name in case.change}
    for name, family in families.FAMILIES.items():
        for key in families._FIXED.keys() | family.fixed.keys():
            # The same line refuses fields for all families.
            assert (name, key) in tried or key in families._FIXED, (name, key)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"hidden_size": ' + "1" * 5000 + "}", ["not JSON", "5000 digits"]),
        ("[" * 100000, ["not JSON", "recursion"]),
        ("{", ["not JSON (line 1"]),
        ("[]", ["holds no JSON object"]),
    ],
)
def test_a_file_that_is_not_an_object_is_refused(read, tmp_path, content, words) -> None:
    assert_refused(read, tmp_path, content, words)


# As published, except the sizes.
PUBLISHED = {
    "SmolLM2": LLAMA
    | {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_scaling": None}
    | {
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "attention_bias": False,
        "mlp_bias": False,
    },
    "R1-Distill-Qwen": QWEN2 | {"use_mrope": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16"},
    "unsloth": QWEN2
    | {"unsloth_fixed": True, "unsloth_version": "2025.1.1", "pad_token_id": 3, "rope_scaling": None},
    "merged after QLoRA": LLAMA | {"quantization_config": None, "_attn_implementation_autoset": True},
    "huggyllama": LLAMA | {"max_sequence_length": 2048, "pad_token_id": -1},
    "a dump of every field": LLAMA
    | {"pruned_heads": {}, "chunk_size_feed_forward": 0, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    | {
        "is_encoder_decoder": False,
        "tie_encoder_decoder": False,
        "cross_attention_hidden_size": None,
        "num_beams": 1,
    }
    | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torchscript": False, "return_dict": True},
    "a sliding window that llama has not": LLAMA | {"use_sliding_window": False, "sliding_window": None},
    "with biases by name": QWEN2 | {"attention_bias": True},
    "Granite's fields at llama's values": LLAMA | {"logits_scaling": 1.0, "residual_multiplier": 1.0},
    "Phi-4-mini": PHI4_MINI | {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
    "moved into transformers": QWEN3
    | {
        "auto_map": {
            "AutoConfig": "configuration_qwen3.Qwen3Config",
            "AutoModel": "modeling_qwen3.Qwen3Model",
        }
    },
    "DeepSeek-V3": DEEPSEEK | {"aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
    "Kimi-K2": DEEPSEEK
    | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "GLM-4.6": GLM4_MOE,
    "GLM-4.7-Flash": GLM_FLASH | {"first_k_dense_replace": 1},
    "Solar-Open": SOLAR,
    "dots.llm1": DOTS,
    "ERNIE-4.5-A3B": ERNIE_MOE,
    "MiniMax-M2": MINIMAX
    | {"auto_map": {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"}},
    "gpt-oss": GPT_OSS,
    "Ministral-3": MINISTRAL3,
    "Seed-OSS": SEED,
    "ERNIE-4.5-0.3B": ERNIE,
    "Granite-3.3": GRANITE,
    "Olmo-3": OLMO3,
    "EXAONE-4.0": EXAONE4,
    "null for false": SMOLLM3 | {"attention_bias": None, "attention_dropout": None},
}


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED)
def test_what_changes_nothing_is_accepted(read, fields) -> None:
    known = families._READ | families.FAMILIES[fields["model_type"]].read | {"model_type"}
    assert read(fields) == read({name: value for name, value in fields.items() if name in known})


@pytest.mark.parametrize(
    "fields, field, values, expected",
    [
        (LLAMA, "hidden_size", ["64", 0, -1, None, 64.0, True, [64], 2**64], "a whole number, at least 1"),
        (LLAMA, "num_hidden_layers", [0, 2.5, "3"], "a whole number, at least 1"),
        (LLAMA, "num_attention_heads", [0, -8, "8"], "a whole number, at least 1"),
        (LLAMA, "num_key_value_heads", [0, "2"], "a whole number, at least 1, or null"),
        (LLAMA, "head_dim", [0, 8.0], "a whole number, at least 1, or null"),
        (LLAMA, "intermediate_size", [0, None], "a whole number, at least 1"),
        (LLAMA, "vocab_size", ["100", 0], "a whole number, at least 1"),
        (LLAMA, "max_position_embeddings", [0, "512", math.inf], "a whole number, at least 1"),
        (LLAMA, "rms_norm_eps", [None, "1e-5", -1e-5, math.nan], "a number, at least 0"),
        (LLAMA, "initializer_range", ["0.02", -0.02, math.inf], "a number, at least 0"),
        (LLAMA, "rope_theta", ["x", 0, None, False, 10**400], "a number above 0"),
        (LLAMA, "rope_scaling", [[], "linear", 2.0], "an object, or null"),
        (LLAMA, "rope_parameters", [["default"], 1], "an object, or null"),
        (LLAMA, "tie_word_embeddings", ["yes", 1, None], "true or false"),
        (
            LLAMA,
            "layer_types",
            ["full_attention", [["full_attention"]], 3],
            "a list, each entry a string, or null",
        ),
        (MISTRAL, "sliding_window", [0, "4096", 4096.0], "a whole number, at least 1, or null"),
        (QWEN2, "use_sliding_window", ["no"], "true or false"),
        (QWEN2, "max_window_layers", [-1, None, "28"], "a whole number, at least 0"),
        (QWEN3_MOE, "num_experts", [0, "8"], "a whole number, at least 1"),
        (QWEN3_MOE, "num_experts_per_tok", [0, "2"], "a whole number, at least 1"),
        (QWEN3_MOE, "moe_intermediate_size", [0, None], "a whole number, at least 1"),
        (QWEN3_MOE, "norm_topk_prob", ["true"], "true or false"),
        (GEMMA2, "query_pre_attn_scalar", [0, -256, "256"], "a number above 0"),
        (GEMMA2, "final_logit_softcapping", [0, "30"], "a number above 0, or null"),
        (GEMMA3, "sliding_window_pattern", [0, None], "a whole number, at least 1"),
        (GEMMA3, "rope_local_base_freq", [0, None], "a number above 0"),
        (PHI4_MINI, "original_max_position_embeddings", [1, None, "4096"], "a whole number, at least 2"),
        (PHI4_MINI, "partial_rotary_factor", [0, "0.5"], "a number above 0"),
        (SMOLLM3, "no_rope_layer_interval", [0, "4"], "a whole number, at least 1"),
        (SMOLLM3, "no_rope_layers", [4, ["1"]], "a list, each entry a whole number, at least 0, or null"),
    ],
)
def test_a_value_without_a_meaning_is_named(read, tmp_path, fields, field, values, expected) -> None:
    for value in values:
        with pytest.raises(ValueError) as error:
            read(fields | {field: value})
        where = f"--hf-checkpoint {tmp_path}: {tmp_path / 'config.json'}"
        assert str(error.value) == f"{where}: {field} = {value!r}; expected {expected}"


@pytest.mark.parametrize(
    "fields, scaling, change, said",
    [
        (LLAMA, LLAMA3, {"factor": "32"}, "rope_scaling: factor = '32'; expected a number above 0, or null"),
        (
            LLAMA,
            LLAMA3,
            {"low_freq_factor": 0},
            "rope_scaling: low_freq_factor = 0; expected a number above 0",
        ),
        (LLAMA, LLAMA3, {"rope_type": ["llama3"]}, "rope_scaling: rope_type = ['llama3']; expected a string"),
        (LLAMA, LLAMA3, {"rope_theta": None}, "rope_scaling: rope_theta = None; expected a number above 0"),
        (
            PHI4_MINI,
            PHI4_MINI["rope_scaling"],
            {"short_factor": 2},
            "rope_scaling: short_factor = 2; expected a list",
        ),
        (
            PHI4_MINI,
            PHI4_MINI["rope_scaling"],
            {"long_factor": [1, "2"]},
            "rope_scaling: long_factor = [1, '2']",
        ),
    ],
)
def test_a_value_without_a_meaning_in_the_scaling_is_named(
    read, tmp_path, fields, scaling, change, said
) -> None:
    with pytest.raises(ValueError) as error:
        read(fields | {"rope_scaling": scaling | change})
    assert str(error.value).startswith(f"--hf-checkpoint {tmp_path}: {tmp_path / 'config.json'}: {said}")


def test_both_rotary_embeddings_of_gemma3_are_objects(read) -> None:
    both = {"full_attention": {"rope_type": "default"}, "sliding_attention": 1e4}
    with pytest.raises(
        ValueError, match=r"rope_parameters: sliding_attention = 10000\.0; expected an object"
    ):
        read(GEMMA3 | {"rope_parameters": both})


def test_every_field_that_is_read_says_what_it_may_hold() -> None:
    assert (
        families._READ.union(*(family.read for family in families.FAMILIES.values()))
        <= families._KINDS.keys()
    )
    assert set().union(*families._ROPE_FIELDS.values()) <= families._ROPE_KINDS.keys()


@pytest.mark.parametrize(
    "files, words",
    [
        (
            {"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'},
            [
                "holds adapter_config.json, so it is an adapter (LoRA) of a/b and not a model",
                "delete adapter_config.json if",
            ],
        ),
        (
            {
                "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": null}',
                "adapter_model.safetensors": "",
                "config.json": json.dumps(LLAMA),  # as some trainers write it beside the adapter
            },
            [
                "an adapter (LoRA) of another model",
                "delete adapter_config.json and adapter_model.safetensors if",
            ],
        ),
        ({"adapter_model.bin": ""}, ["holds adapter_model.bin, so it is an adapter (LoRA) of another model"]),
        ({"adapter_config.json": '{"peft_type": "IA3"}'}, ["an adapter (IA3) of"]),
        ({"adapter_config.json": "["}, ["an adapter (LoRA) of another model"]),
        ({"adapter_config.json": "[]"}, ["an adapter (LoRA) of another model"]),
    ],
)
def test_an_adapter_is_named_as_one(tmp_path, files, words) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert str(error.value).startswith(f"--hf-checkpoint {tmp_path}: ") and "\n" not in str(error.value)
    for word in (*words, "merge the two with peft", "merge_and_unload"):
        assert word in str(error.value)


def test_a_merged_model_without_its_adapter_is_read(read, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        read(LLAMA)
    (tmp_path / "adapter_config.json").unlink()
    assert read(LLAMA).num_layers == 3


def test_published_configurations_with_a_gated_delta_net(read) -> None:
    for base, packed in ((QWEN3_5, False), (QWEN3_NEXT, True)):
        found = read(base)
        kinds = [type(layer.attention) for layer in found.layers]
        assert kinds == [DeltaNet] * 3 + [GroupedQuery] and found.has_mtp and not found.teacher_only
        delta, attention = found.layers[0].attention, found.layers[3].attention
        assert (delta.key_heads, delta.value_heads, delta.window, delta.packed) == (2, 4, 4, packed)
        assert attention.output_gate and attention.qk_norm and found.zero_centered_norm
        assert found.layers[0].rope is None and found.layers[3].rope.dim == 4
    assert found.layers[0].mlp.shared_width == 24 and found.layers[0].mlp.shared_gate
