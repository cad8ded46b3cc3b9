"""One entry a model family: config.json fields -> what Megatron needs to build the same architecture.

A field of config.json that would change the mathematics and that we do not implement is an error naming it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The architecture of a decoder, in the terms of config.json."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding as published; the tokenizer may use fewer."""
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    init_std: float


# Fields that say nothing about the mathematics of the forward pass, for every family.
_NEUTRAL = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    pretraining_tp _name_or_path""".split()
)

_LLAMA_FIELDS = frozenset(
    """num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size
    max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings initializer_range""".split()
)

# Fields that are implemented at one value only.
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
}


def read_architecture(hf_checkpoint: str, *, flag: str) -> Architecture:
    """The architecture of the folder's config.json.

    Raises ValueError, naming `flag` and the file, for a missing or unreadable file, a family that is not supported, or
    a field that is not implemented.
    """
    path = Path(hf_checkpoint) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{flag} {hf_checkpoint}: cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not JSON (line {error.lineno}: {error.msg})") from None
    family = fields.get("model_type")
    if family != "llama":
        raise ValueError(f"{flag} {hf_checkpoint}: model_type {family!r} is not supported; this version knows: llama")
    return _llama(fields, where=f"{flag} {hf_checkpoint}: {path}")


def _llama(fields: dict[str, Any], *, where: str) -> Architecture:
    for name, value in fields.items():
        if name in _LLAMA_FIXED and value not in _LLAMA_FIXED[name]:
            raise ValueError(f"{where}: {name} = {value!r} is not implemented for llama")
        if name not in _NEUTRAL | _LLAMA_FIELDS | _LLAMA_FIXED.keys():
            raise ValueError(f"{where}: field {name!r} is not known for llama, so it cannot be honoured")
    try:
        heads = fields["num_attention_heads"]
        return Architecture(
            num_layers=fields["num_hidden_layers"],
            hidden_size=fields["hidden_size"],
            ffn_hidden_size=fields["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=fields.get("num_key_value_heads", heads),
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            vocab_size=fields["vocab_size"],
            max_position_embeddings=fields["max_position_embeddings"],
            norm_epsilon=fields["rms_norm_eps"],
            rope_theta=fields.get("rope_theta", 10000.0),
            tied_embeddings=fields.get("tie_word_embeddings", False),
            init_std=fields.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is missing") from None
