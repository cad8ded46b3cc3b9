"""The shipped run files with folders of the published architectures instead of downloaded models.

Tokenizers are small ones of the same kind. The models' config.json is as published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from megatron_simct.config.run_file import RunFile, read_run_file
from tests.huggingface import save_byte_fallback, save_byte_level

_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "gemma-2-2b-it": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": _LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 94,
        "mlp_only_layers": [],
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PARAMETERS = {
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "gemma-2-2b-it": 2_614_341_888,
    "Phi-4-mini-instruct": 3_836_021_760,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen3-235B-A22B": 235_093_634_560,
}
"""The published numbers."""
ROOT = "/shared/simct"
"""The folder of all models and data in the shipped files."""


def stand_in(path: Path, folder: Path) -> RunFile:
    """The run file, with `folder` instead of ROOT, and all the files that it names in `folder`."""
    text = path.read_text()
    for name, config in CONFIGS.items():
        if f"{ROOT}/models/{name}\n" not in text:
            continue
        model = folder / "models" / name
        model.parent.mkdir(exist_ok=True)
        (save_byte_fallback if name.startswith("gemma") else save_byte_level)(model)
        (model / "config.json").write_text(json.dumps(config))
        save_file({}, model / "model.safetensors")
    for name in ("data", "images"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "images" / "simct.sqsh").touch()
    rows = [{"prompt": f"Tom has {i} apples and gets {i + 7} more. How many?"} for i in range(20)]
    (folder / "data" / "prompts_10k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy = folder / "run.yaml"
    copy.write_text(text.replace(ROOT, str(folder)))
    return read_run_file(str(copy))
