"""Tiny random models of every family: Megatron computes the same as transformers in every layout, weights go
there and back bit by bit, and the comparison notices every change that it should notice.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import ParallelConfig
from megatron_simct.losses.vocab_parallel import soft_cap
from megatron_simct.models.build import build_model, chunks_of, padded_vocab_size
from megatron_simct.models.families import FAMILIES, Architecture, read_architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.hf_mapping import parameters_of
from megatron_simct.models.layers import Layer
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.parallel.pipeline import hand_on, tensor_from_last_stage
from megatron_simct.preflight.memory import Sizes, stage_parameters
from megatron_simct.records import Prompt
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.teacher.forward import TeacherForward, TeacherRequest
from tests.distributed import run_ranks
from tests.huggingface import save_model

pytest.importorskip("transformers")

LENGTH = 40
VOCAB = 90  # of the tokenizer: fewer ids than the models' rows
WINDOW = 6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 3.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.5,
}
GEMMA2 = {"head_dim": 8, "sliding_window": WINDOW, "scale": 0.5}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.2, 3.0, 5.0],
}
PHI3 = {"rope_parameters": LONGROPE}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
ROUTED = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "head_dim": 8,
}
ERNIE = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 20, "head_dim": 8}
MINIMAX = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20, "head_dim": 8}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    **{name: value for name, value in ROUTED.items() if name != "head_dim"},
}
INDEXER = {"index_topk": LENGTH, "index_n_heads": 2, "index_head_dim": 8}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
GROWING = MSCALE | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3}
HUNYUAN = {
    "rope_type": "dynamic",
    "alpha": 9.0,
    "factor": 1.0,
    "rope_theta": 1e2,
    "mscale": 1.0,
    "beta_fast": 32,
}
OLMO3 = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.5,
    "logits_scaling": 2.0,
}
DELTA = {
    "scale": 0.1,  # at larger weights delta nets magnify rounding: transformers' own logits move by 1e-4
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["full_attention", "linear_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5},
}
DELTA_MOE = {
    **DELTA,
    **{
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    },
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_key_value_heads": 4},
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MODELS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16},
    ],
    "mistral": [
        {"sliding_window": WINDOW},
        {"sliding_window": None, "tie_word_embeddings": True, "num_attention_heads": 8, "vocab_size": 101},
    ],
    "ministral3": [
        {"sliding_window": WINDOW, "head_dim": 8, "rope_parameters": GROWING},
        {"head_dim": 16, "tie_word_embeddings": True, "vocab_size": 101, "rope_parameters": GROWING},
    ],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 48, "vocab_size": 97},
    ],
    "qwen3": [
        {"head_dim": 8},
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "vocab_size": 93,
            "num_attention_heads": 8,
        },
    ],
    "qwen3_moe": [
        MOE | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": WINDOW},
        MOE
        | {
            "norm_topk_prob": False,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "vocab_size": 97,
            "num_attention_heads": 8,
        },
    ],
    "qwen3_5_text": [
        DELTA,
        DELTA
        | {
            "linear_conv_kernel_dim": 3,
            "linear_num_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 101,
        }
        | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    ],
    "qwen3_next": [
        DELTA_MOE,
        DELTA_MOE | {"norm_topk_prob": False, "linear_num_value_heads": 4, "vocab_size": 101},
    ],
    "gemma2": [
        GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        GEMMA2 | {"tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16, "num_key_value_heads": 4},
    ],
    "gemma3_text": [
        GEMMA2
        | {
            "num_hidden_layers": 8,  # five with the window, then one without
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
        GEMMA2 | {"tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16, "num_key_value_heads": 4},
    ],
    "phi3": [
        PHI3 | {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
        PHI3 | {"original_max_position_embeddings": 8, "tie_word_embeddings": True, "vocab_size": 101},
        {"num_attention_heads": 8, "num_key_value_heads": 8},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
        {
            "no_rope_layers": [0, 1, 1, 0],
            "tie_word_embeddings": True,
            "vocab_size": 101,
            "num_attention_heads": 8,
        },
    ],
    "glm4_moe": [
        ROUTED
        | {"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True}
        | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
        ROUTED | {"first_k_dense_replace": 2, "norm_topk_prob": False, "vocab_size": 101},
    ],
    "solar_open": [ROUTED | {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}}],
    "dots1": [ROUTED | {"first_k_dense_replace": 1, "sliding_window": WINDOW, "max_window_layers": 2}],
    "ernie4_5_moe": [
        ERNIE | {"moe_layer_end_index": 2, "moe_norm_min": 0.9},
        ERNIE | {"moe_layer_start_index": 0, "moe_layer_interval": 2, "tie_word_embeddings": True},
    ],
    "minimax_m2": [MINIMAX | {"num_key_value_heads": 4, "rotary_dim": 4}],
    "deepseek_v3": [
        LATENT | {"rope_parameters": MSCALE, "rms_norm_eps": 1e-2},
        LATENT
        | {"q_lora_rank": None, "rope_interleave": False, "first_k_dense_replace": 2, "vocab_size": 101},
    ],
    "deepseek_v32": [LATENT | {"rope_parameters": MSCALE, **INDEXER}],
    "glm4_moe_lite": [
        {k: v for k, v in LATENT.items() if k != "first_k_dense_replace"}
        | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
    ],
    "gpt_oss": [
        {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20, "head_dim": 8}
        | {"sliding_window": WINDOW, "swiglu_limit": 0.4, "rope_parameters": YARN | {"truncate": False}}
    ],
    "seed_oss": [{"attention_dropout": 0.0, "residual_dropout": 0.0, "rope_parameters": YARN}],
    "ernie4_5": [{"head_dim": 8}],
    "granite": [GRANITE, GRANITE | {"tie_word_embeddings": True, "vocab_size": 101}],
    "hunyuan_v1_dense": [
        {"head_dim": 8, "rope_parameters": HUNYUAN},
        {"head_dim": 16, "tie_word_embeddings": True, "vocab_size": 101, "num_attention_heads": 8},
    ],
    "olmo2": [{"num_key_value_heads": 4, "rms_norm_eps": 1e-2}],
    "olmo3": [{"num_key_value_heads": 4, "sliding_window": WINDOW, "rope_parameters": OLMO3}],
    "exaone4": [
        {"sliding_window": WINDOW, "sliding_window_pattern": 2},
        {"sliding_window": None, "layer_types": ["full_attention"] * 4, "vocab_size": 101},
    ],
}
# Changes of config.json that the logits of a family's first model must show.
CONTROLS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32} | change}
        for change in (
            {"rope_theta": 2e3},
            {"factor": 4.0},
            {"low_freq_factor": 0.7},
            {"high_freq_factor": 4.0},
            {"original_max_position_embeddings": 64},
        )
    ],
    "mistral": [
        {"sliding_window": None},
        {"sliding_window": WINDOW + 1},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "ministral3": [
        {"sliding_window": WINDOW + 1},
        *(
            {"rope_parameters": GROWING | change}
            for change in ({"llama_4_scaling_beta": 0.0}, {"factor": 3.0})
        ),
    ],
    "qwen2": [
        {"use_sliding_window": False, "layer_types": None},
        {"max_window_layers": 1, "layer_types": None},
        {"sliding_window": WINDOW - 1},
    ],
    "qwen3": [{"rope_parameters": {"rope_theta": 2e4}}, {"rms_norm_eps": 1e-2}],
    "qwen3_moe": [
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 3},
        {"use_sliding_window": False},
        {"sliding_window": WINDOW + 1},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "qwen3_5_text": [
        {"rope_parameters": DELTA["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        {"rms_norm_eps": 1e-2},
    ],
    "qwen3_next": [{"norm_topk_prob": False}, {"num_experts_per_tok": 3}],
    "gemma2": [
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 2.1},
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 3.1},
        {"query_pre_attn_scalar": 8},
        {"sliding_window": WINDOW + 1},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "gemma3_text": [
        {"query_pre_attn_scalar": 8},
        {"sliding_window": WINDOW + 1},
        {"layer_types": ["sliding_attention"] * 8},
        {"rope_parameters": None, "rope_theta": 1e3, "rope_local_base_freq": 1e2},
        {"rope_parameters": None, "rope_theta": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"layer_types": None, "sliding_window_pattern": 2},
    ],
    "phi3": [
        {"sliding_window": None},
        {"original_max_position_embeddings": LENGTH - 1},
        {"original_max_position_embeddings": 128},
        {"max_position_embeddings": 512},
        {"rope_parameters": LONGROPE | {"attention_factor": 1.0}},
        {"rope_parameters": LONGROPE | {"factor": 2.0}},
        {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.5, 2.5]}},
        {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 1.0}},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 1, 1, 1]},
        {"no_rope_layers": [1, 0, 1, 1]},
        {"no_rope_layers": [0, 0, 1, 0]},
        {"use_sliding_window": False, "layer_types": None},
        {"sliding_window": WINDOW + 1},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "glm4_moe": [
        *({"n_group": 1, "topk_group": 1}, {"topk_group": 3}, {"num_experts_per_tok": 2}),
        *({"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}),
        *(
            {"rope_parameters": YARN | {"partial_rotary_factor": 0.5} | change}
            for change in (
                *({"factor": 2.0}, {"beta_slow": 2.0}, {"attention_factor": 1.0}),
                *(
                    {"original_max_position_embeddings": 16},
                    {"truncate": False},
                    {"partial_rotary_factor": 1.0},
                ),
                {"mscale": 0.7, "mscale_all_dim": 1.3},
            )
        ),
    ],
    "solar_open": [{"norm_topk_prob": False}, {"topk_group": 3}],
    "dots1": [{"sliding_window": None, "layer_types": None}, {"max_window_layers": 1, "layer_types": None}],
    "ernie4_5_moe": [{"moe_norm_min": 1e-12}, {"moe_k": 2}],
    "minimax_m2": [
        {"num_experts_per_tok": 2},
        {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.5}},
    ],
    "deepseek_v3": [
        {"rope_interleave": False},
        {"topk_group": 3},
        *({"rope_parameters": MSCALE | change} for change in ({"mscale": 1.0}, {"mscale_all_dim": 1.0})),
    ],
    "deepseek_v32": [{"topk_group": 3}, {"rope_parameters": MSCALE | {"mscale_all_dim": 1.0}}],
    "glm4_moe_lite": [{"rope_interleave": False}],
    "gpt_oss": [
        *({"swiglu_limit": 0.5}, {"sliding_window": WINDOW + 1}, {"num_experts_per_tok": 2}),
        *({"layer_types": ["full_attention"] * 4}, {"rope_parameters": YARN | {"truncate": True}}),
        {"rope_parameters": YARN | {"truncate": False, "beta_fast": 5.0}},
    ],
    "seed_oss": [{"rope_parameters": YARN | {"factor": 3.0}}],
    "ernie4_5": [{"rope_parameters": {"rope_theta": 2e3}}],
    "granite": [{name: value * 1.1} for name, value in GRANITE.items()],
    "hunyuan_v1_dense": [
        *({"rope_parameters": HUNYUAN | change} for change in ({"alpha": 4.0}, {"rope_theta": 1e3})),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e2}},
    ],
    "olmo2": [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_theta": 2e4}}],
    "olmo3": [
        *({"layer_types": ["full_attention"] * 4}, {"sliding_window": WINDOW + 1}),
        {"rope_parameters": OLMO3 | {"full_attention": OLMO3["sliding_attention"]}},
        {"rope_parameters": OLMO3 | {"sliding_attention": YARN}},
    ],
    "exaone4": [{"sliding_window": None, "layer_types": None}, {"layer_types": ["sliding_attention"] * 4}],
}
# Changes of all layers of a family's first model, or of the whole model, that no field of config.json makes.
RECORDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "qwen3_5_text": [("model", {"zero_centered_norm": False})],
    "gemma2": [("model", {"zero_centered_norm": False}), ("model", {"embedding_scale": 1.0})],
    "gemma3_text": [("model", {"zero_centered_norm": False}), ("model", {"embedding_scale": 1.0})],
    "glm4_moe": [("mlp", {"score": "softmax"})],
    "minimax_m2": [("mlp", {"score": "softmax"}), ("mlp", {"normalized": False})],
    "ernie4_5_moe": [("mlp", {"score": "sigmoid"}), ("rope", {"interleaved": False})],
    "ernie4_5": [("rope", {"interleaved": False})],
    "deepseek_v3": [("mlp", {"factor": 1.0}), ("mlp", {"normalized": False})],
}
# Fields that config.json must have.
REQUIRED: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    **dict.fromkeys(("glm4_moe", "solar_open", "dots1"), ROUTED),
    "ernie4_5_moe": ERNIE,
    "minimax_m2": MINIMAX,
    "qwen3_next": {name: value for name, value in DELTA_MOE.items() if name not in ("layer_types", "scale")},
    "gpt_oss": {"num_local_experts": 6},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT | {"num_key_value_heads": 8}),
}
# A family's first model in the spelling of older files.
SPELLED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"model_type": "kimi_k2"},  # transformers has no class of that name
    "llama": {
        "rope_parameters": None,
        "rope_theta": 1e3,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
        | {"original_max_position_embeddings": 32},
    },
    "gemma3_text": {
        "layer_types": None,
        "rope_parameters": None,
        "rope_theta": 1e3,
        "rope_local_base_freq": 1e2,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma2": {"layer_types": None},
    "phi3": {
        "rope_parameters": None,
        "rope_theta": 1e3,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope"}
        | {k: v for k, v in LONGROPE.items() if k.endswith("g_factor") or k == "short_factor"},
    },
    "qwen2": {"layer_types": None},
    "qwen3_moe": {"num_experts": 6, "max_window_layers": 48},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None},
}
LAYOUTS = {"one": (1, 1, 1), "TP2": (2, 1, 1), "PP2": (1, 2, 1), "TP2xPP2": (2, 2, 1)}  # TP, PP, EP
MOE_LAYOUTS = {
    "EP2": (1, 1, 2),
    "EP3": (1, 1, 3),
    "TP2xEP2": (2, 1, 2),
    "PP2xEP2": (1, 2, 2),
    "TP4": (4, 1, 1),
}
WITH_EXPERTS = [family for family in MODELS if FAMILIES[family].experts is not None]
LAYOUTS |= MOE_LAYOUTS
TOKENS = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
EMPTY = np.zeros(0, np.int32)
NOT_EXPORTED = ("deepseek_v32",)
PROMPTS = [  # of several lengths, shorter than the window, equal to it and longer: padded on the left
    Prompt(sample_id=i, student_ids=TOKENS[i % 3, :n].numpy().astype(np.int32), teacher_ids=EMPTY)
    for i, n in enumerate((2, WINDOW, 3 * WINDOW, 25))
]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_len=12, seed=1)
GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], list[tuple[Path, torch.nn.Module]]]:
    """Folders and models of a family, made at the first request."""
    made: dict[str, list[tuple[Path, torch.nn.Module]]] = {}

    def make(family: str) -> list[tuple[Path, torch.nn.Module]]:
        if family not in made:
            made[family] = []
            for fields in MODELS[family]:
                folder = tmp_path_factory.mktemp(family)
                made[family].append(
                    (folder, save_model(folder, family, **deepcopy({"num_hidden_layers": 4} | fields)))
                )
        return made[family]

    return make


def test_every_family_is_here() -> None:
    assert MODELS.keys() == CONTROLS.keys() == FAMILIES.keys() - {"kimi_k2"}  # see SPELLED


def _run(rank: int, world_size: int, folders: list[str], layout: str, save: str | None) -> list[tuple]:
    """Logits [B, S, published vocabulary], rollouts, and largest padding of each folder. Writes
    each again to `save`.
    """
    tp, pp, ep = LAYOUTS[layout]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    with process_groups(parallel, seed=3) as groups:
        return [
            _one(folder, parallel, groups, f"{save}/{i}" if save else None)
            for i, folder in enumerate(folders)
        ]


def _one(folder: str, parallel: ParallelConfig, groups: Any, save: str | None) -> tuple:
    architecture = read_architecture(folder, flag="")
    if (change := Path(folder) / "change.json").exists():
        architecture = changed(architecture, *json.loads(change.read_text()))
    model = build_model(architecture, parallel, groups, vocab_size=VOCAB, divisible_by=8, bf16=False, flag="")
    rows = padded_vocab_size(architecture.vocab_size, divisible_by=8, tp_size=groups.tp_size)
    sizes = Sizes(architecture=architecture, parallel=parallel, vocab_size=rows, bf16=False)
    planned = stage_parameters(sizes, stage=groups.pp.rank())
    assert sum(parameter.numel() for parameter in model.parameters()) == planned, (
        "the memory plan counts them"
    )
    load_hf_weights(model, architecture, folder, groups, flag="")
    logits = _logits(model, groups)[..., : architecture.vocab_size]
    rollouts = None
    if save is not None and not architecture.teacher_only:
        engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=[VOCAB], batch_size=4)
        rollouts = engine.generate(PROMPTS, SAMPLING)
        if groups.pp.size() == 1:
            rollouts += engine.generate(PROMPTS, GREEDY)
    if save is not None and architecture.model_type not in NOT_EXPORTED:
        save_hf_weights(model, architecture, groups, template=folder, save=save, dtype=torch.float32)
    return logits, rollouts


@torch.no_grad()
def _logits(model: Any, groups: Any) -> torch.Tensor:
    positions = torch.arange(LENGTH).expand_as(TOKENS)

    def stage(chunk: Any, received: torch.Tensor | None) -> torch.Tensor:
        chunk.set_input_tensor(received)
        return chunk(TOKENS, positions, None)

    hidden = torch.empty(LENGTH, len(TOKENS), model.config.hidden_size)
    for chunk in chunks_of(model.eval()):
        if not chunk.pre_process:
            hand_on(None, hidden, groups.pp)
        hidden = stage(chunk, None if chunk.pre_process else hidden)
        if not chunk.post_process:
            hand_on(hidden, None, groups.pp)
    width = model.vocab_shard[1] - model.vocab_shard[0]
    logits = torch.empty(len(TOKENS), LENGTH, width * groups.tp_size)
    if groups.is_last_stage:
        shard = soft_cap(hidden @ model.output_weight.T, model.logit_softcap).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
        dist.all_gather(shards, shard, group=groups.tp)
        logits = torch.cat(shards, dim=-1)
    return tensor_from_last_stage(logits, groups.pp)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check_rollouts(rollouts: list, model: torch.nn.Module) -> None:
    """The log-probs of tokens sampled with a KV cache are transformers' for the whole sequence, and tokens
    that were chosen greedily are the likeliest.
    """
    assert len(rollouts) in (len(PROMPTS), 2 * len(PROMPTS))
    for i, rollout in enumerate(rollouts):
        prompt = PROMPTS[i % len(PROMPTS)]
        ids = torch.from_numpy(np.concatenate([prompt.student_ids, rollout.student_ids]).astype(np.int64))
        rows = model(ids[None]).logits[0, len(prompt.student_ids) - 1 : -1, :VOCAB].double().log_softmax(-1)
        if i >= len(PROMPTS):
            assert torch.equal(ids[len(prompt.student_ids) :], rows.argmax(dim=-1))
            continue
        expected = rows.gather(1, ids[len(prompt.student_ids) :, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_transformers_computes_and_gives_every_tensor_back(
    folders, tmp_path, layout
) -> None:
    from safetensors.torch import load_file

    models = [
        (family, *model)
        for family in (WITH_EXPERTS if layout in MOE_LAYOUTS else MODELS)
        for model in folders(family)
    ]
    paths = [str(folder) for _, folder, _ in models]
    with torch.no_grad():
        expected = [model(TOKENS).logits for _, _, model in models]
    found = run_ranks(math.prod(LAYOUTS[layout]), _run, paths, layout, str(tmp_path))
    wrong = []
    for answers in found:
        for (family, _, model), (logits, rollouts), theirs in zip(models, answers, expected, strict=True):
            if not relative(logits, theirs) < 1e-4:
                wrong.append((family, relative(logits, theirs)))
            if not FAMILIES[family].teacher_only:
                check_rollouts(rollouts, model)
    assert wrong == []
    for i, folder in enumerate(paths):
        if models[i][0] in NOT_EXPORTED:
            continue
        tensors = load_file(f"{folder}/model.safetensors")
        again = {
            name: t
            for path in (tmp_path / str(i)).glob("*.safetensors")
            for name, t in load_file(path).items()
        }
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), folder


@pytest.mark.parametrize(
    "change",
    [{}, {"sliding_window": WINDOW}, {"use_sliding_window": True, "max_window_layers": 1}],
    ids=["nothing", "window", "used"],
)
@pytest.mark.parametrize("family", MODELS)
def test_what_config_json_leaves_out_is_read_as_transformers_reads_it(tmp_path, family, change) -> None:
    """Files written by hand, or by another library, lack fields for which transformers has a default."""
    from transformers import AutoConfig

    known = FAMILIES[family].read | FAMILIES[family].neutral - {"sliding_window"}
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        **REQUIRED.get(family, {}),
        **{name: value for name, value in change.items() if name in known},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | fields))
    ours, theirs = read_architecture(str(tmp_path), flag=""), AutoConfig.for_model(family, **fields)
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 7
    found = tuple(layer.window for layer in ours.layers)
    assert found == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    attention = ours.layers[0].attention
    if isinstance(attention, GroupedQuery):
        assert attention.head_dim == (getattr(theirs, "head_dim", None) or 64 // 8)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range
    ropes = theirs.rope_parameters
    thetas = (
        {ropes["rope_theta"]} if "rope_theta" in ropes else {kind["rope_theta"] for kind in ropes.values()}
    )
    assert {rope.theta for rope in ours.ropes} == thetas


def changed(architecture: Architecture, part: str, change: dict[str, Any]) -> Architecture:
    """Another model: with a change of the architecture itself, or of the part of each layer
    that has the field.
    """
    if part == "model":
        return replace(architecture, **change)

    def of(layer: Layer) -> Layer:
        record = getattr(layer, part)
        return (
            replace(layer, **{part: replace(record, **change)})
            if hasattr(record, next(iter(change)))
            else layer
        )

    return replace(architecture, layers=tuple(of(layer) for layer in architecture.layers))


def respelled(folder: Path, copy: Path, change: dict[str, Any]) -> Path:
    """A copy of the folder with changes of its config.json."""
    shutil.copytree(folder, copy)
    fields = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(fields))
    return copy


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_and_every_setting_shows_in_the_logits(folders, tmp_path, family) -> None:
    from safetensors.torch import load_file, save_file

    folder, model = folders(family)[0]
    again = folder if family not in SPELLED else respelled(folder, tmp_path / "respelled", SPELLED[family])
    with torch.no_grad():
        expected = model(TOKENS).logits
    tensors = load_file(str(folder / "model.safetensors"))
    copies, names = [], []
    gates = [name for name in tensors if "q_proj" in name and FAMILIES[family].output_gate]
    for name in (*tensors, *gates):
        if (".layers." in name and ".layers.1." not in name) or re.search(r"experts\.[1-9]", name):
            continue
        if ".indexer." in name:  # not read
            continue
        row = int(TOKENS[0, 0]) if "embed_tokens" in name else 0
        copy = tmp_path / name
        if copy.exists():  # the gate of the last head, after its query
            copy, row = tmp_path / f"{name} gate", -1
        shutil.copytree(folder, copy)
        # A change of one expert is made to all, since a few tokens may not choose it.
        changed = {
            other: tensors[other].clone()
            for other in tensors
            if re.sub(r"experts\.\d+", "experts.0", other) == name
        }
        for one in changed.values():
            if "correction" in name:
                one.neg_()
            else:
                one[row] += 1.0
        save_file(tensors | changed, str(copy / "model.safetensors"), {"format": "pt"})
        copies.append(copy)
        names.append(name)
    for i, change in enumerate(CONTROLS[family]):
        copies.append(respelled(folder, tmp_path / f"control {i}", change))
        names.append(str(change))
    for i, change in enumerate(RECORDS.get(family, [])):
        copies.append(shutil.copytree(folder, tmp_path / f"record {i}"))
        (copies[-1] / "change.json").write_text(json.dumps(change))
        names.append(str(change))
    (answers,) = run_ranks(1, _run, [str(again), *map(str, copies)], "one", None)
    assert relative(answers[0][0], expected) < 1e-4
    for name, (logits, _) in zip(names, answers[1:], strict=True):
        assert relative(logits, expected) > 1e-3, name


# Published names of tensors of multi-token prediction, and the field that gives the number of their layers.
MTP = {
    "glm4_moe": (
        ("model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight"),
        "num_nextn",
    ),
    "deepseek_v3": (
        ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.norm.weight"),
        "num_nextn",
    ),
    "ernie4_5_moe": (
        ("model.mtp_block.0.input_layernorm.weight", "model.mtp_linear_proj.0.weight"),
        "num_nextn",
    ),
    "qwen3_5_text": (("mtp.fc.weight", "mtp.layers.0.input_layernorm.weight"), "mtp_num"),
    "qwen3_next": (("mtp.norm.weight", "mtp.layers.0.mlp.experts.3.down_proj.weight"), "mtp_num"),
}


def test_layers_of_multi_token_prediction_are_named_and_not_read(folders, tmp_path, capfd) -> None:
    from safetensors.torch import load_file, save_file

    copies, expected = [], []
    for family, (names, begin) in MTP.items():
        folder, model = folders(family)[0]
        field = begin + {"mtp_num": "_hidden_layers", "num_nextn": "_predict_layers"}[begin]
        copies.append(respelled(folder, tmp_path / family, {field: 1}))
        tensors = load_file(str(folder / "model.safetensors"))
        more = {name: torch.ones(3, 5) for name in names}
        save_file(tensors | more, str(copies[-1] / "model.safetensors"), {"format": "pt"})
        expected.append((model, tensors.keys(), names, field))
    (answers,) = run_ranks(1, _run, [str(copy) for copy in copies], "one", str(tmp_path / "again"))
    said = capfd.readouterr().out
    for i, ((logits, _), (model, tensors, names, field)) in enumerate(zip(answers, expected, strict=True)):
        with torch.no_grad():
            assert relative(logits, model(TOKENS).logits) < 1e-4
        assert re.search(rf"{copies[i]}: 2 tensors are not read \({re.escape(min(names))}", said), said
        again = tmp_path / "again" / str(i)
        assert json.loads((again / "config.json").read_text())[field] == 0
        assert {name for path in again.glob("*.safetensors") for name in load_file(path)} == set(tensors)


def _too_long(rank: int, world_size: int, folder: str) -> None:
    architecture = read_architecture(folder, flag="")
    with process_groups(ParallelConfig(), seed=3) as groups:
        options = {"vocab_size": VOCAB, "divisible_by": 8, "bf16": False, "flag": ""}
        forward = TeacherForward(
            build_model(architecture, ParallelConfig(), groups, **options), groups, vocab_size=VOCAB
        )
        ids = TOKENS.flatten().numpy().astype(np.int32)
        options = {"sample_id": 0, "prompt_ids": ids[:9], "rows": EMPTY, "hidden": False, "topk": 0}
        options |= {"token_ids": False, "byte_side": None}
        (answer,) = forward.run([[TeacherRequest(**options, label_ids=ids[: LENGTH - 9])]])
        assert len(answer.own_logit) == LENGTH - 9
        with pytest.raises(
            ValueError, match=f"has {LENGTH + 1} tokens, .* up to its index_topk = {LENGTH}; lower --"
        ):
            forward.run([[TeacherRequest(**options, label_ids=ids[: LENGTH - 8])]])


@torch.no_grad()
def test_what_an_indexer_leaves_out_shows_past_its_length(folders) -> None:
    """Up to index_topk positions deepseek_v32 is dense attention. Beyond it, transformers
    computes something else.
    """
    folder, model = folders("deepseek_v32")[0]
    assert read_architecture(str(folder), flag="").index_length == LENGTH
    run_ranks(1, _too_long, str(folder))
    dense = model(TOKENS).logits
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = LENGTH // 2
    try:
        assert relative(model(TOKENS).logits, dense) > 1e-3
    finally:
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = LENGTH


STUDENTS = [family for family in MODELS if not FAMILIES[family].teacher_only]
WEIGHTS = torch.randn(3, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2))


def _gradients(rank: int, world_size: int, folders: list[str]) -> list[dict[str, torch.Tensor]]:
    """Gradients of a sum of logits times WEIGHTS, for every tensor of each folder."""
    with process_groups(ParallelConfig(), seed=3) as groups:
        return [_gradients_of(folder, groups) for folder in folders]


def _gradients_of(folder: str, groups: Any) -> dict[str, torch.Tensor]:
    architecture = read_architecture(folder, flag="")
    model = build_model(
        architecture, ParallelConfig(), groups, vocab_size=VOCAB, divisible_by=8, bf16=False, flag=""
    )
    load_hf_weights(model, architecture, folder, groups, flag="")
    hidden = model(TOKENS, torch.arange(LENGTH).expand_as(TOKENS), None)
    logits = soft_cap(hidden @ model.output_weight.T, model.logit_softcap).transpose(0, 1)[..., :VOCAB]
    (logits * WEIGHTS).sum().backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found: dict[str, torch.Tensor] = {}
    for rule, place, shard in parameters_of(model, architecture, tp_rank=0, tp_size=1):
        for piece in rule.pieces(shard, place):
            whole = found.setdefault(piece.name, torch.zeros(piece.shape))
            target = whole.narrow(piece.axis, piece.begin, piece.end - piece.begin)
            target.copy_(piece.view.reshape(target.shape))
    return found


def test_gradients_of_every_tensor_of_every_student_are_those_of_transformers(folders, tmp_path) -> None:
    from safetensors.torch import load_file

    models = [(family, *model) for family in STUDENTS for model in folders(family)]
    (answers,) = run_ranks(1, _gradients, [str(folder) for _, folder, _ in models])
    wrong = []
    for i, ((family, _, model), found) in enumerate(zip(models, answers, strict=True)):
        copy = deepcopy(model)
        (copy(TOKENS).logits[..., :VOCAB] * WEIGHTS).sum().backward()
        for parameter in copy.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # under the names of the folder, a tensor for each expert
        copy.save_pretrained(str(tmp_path / str(i)))
        theirs = load_file(tmp_path / str(i) / "model.safetensors")
        assert found.keys() == theirs.keys()
        least = 1e-4 * max(float(gradient.abs().max()) for gradient in theirs.values())
        for name, gradient in theirs.items():
            if name.endswith("correction_bias"):
                continue  # a buffer
            error = float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
            if not error < 3e-4:
                wrong.append((family, name, error))
    assert wrong == []
