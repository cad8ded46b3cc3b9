"""Tiny models in Hugging Face folders, written by transformers itself, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def build_model(model_type: str, **fields: Any) -> torch.nn.Module:
    """A causal language model with random weights, biases and norms included."""
    import transformers

    defaults = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.AutoConfig.for_model(model_type, **(defaults | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: at their initial ones and zeros they could be swapped unnoticed.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1) * 0.5)
    return model


def save_model(folder: Path, model_type: str, *, shard_size: str = "1GB", **fields: Any) -> torch.nn.Module:
    """The model of `build_model`, written to the folder."""
    model = build_model(model_type, **fields)
    model.save_pretrained(str(folder), max_shard_size=shard_size)
    return model
