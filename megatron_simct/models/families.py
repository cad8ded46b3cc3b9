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
    rope_scaling_factor: float | None
    """Factor of the llama3 scaling of rotary frequencies; None: not scaled."""
    qkv_bias: bool
    tied_embeddings: bool
    init_std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Which fields of config.json a family has, beside those that all families share."""

    fixed: dict[str, tuple[Any, ...]]
    """Fields that are implemented at these values only."""
    neutral: frozenset[str] = frozenset()
    """Fields that say nothing about the forward pass while the fixed ones have their values."""
    qkv_bias: bool = False


FAMILIES = {
    "llama": Family(fixed={"attention_bias": (False,), "mlp_bias": (False,)}),
    "qwen2": Family(
        fixed={"use_sliding_window": (False,)},
        neutral=frozenset({"sliding_window", "max_window_layers"}),
        qkv_bias=True,
    ),
}

# For every family.
_NEUTRAL = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    pretraining_tp _name_or_path""".split()
)

_READ = frozenset(
    """num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings initializer_range
    layer_types""".split()
)

_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}

# Megatron-Core takes the factor of the llama3 scaling and has these three in its source.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def read_architecture(hf_checkpoint: str, *, flag: str) -> Architecture:
    """The architecture of the folder's config.json.

    Raises ValueError, naming `flag` and the file, for a missing or unreadable file, a family that is not supported, or
    a field that is not implemented.
    """
    path = Path(hf_checkpoint) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {hf_checkpoint}: cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not JSON (line {error.lineno}: {error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not UTF-8") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{flag} {hf_checkpoint}: {path} holds no JSON object")
    if "quantization_config" in fields:
        method = (fields["quantization_config"] or {}).get("quant_method", "of an unnamed kind")
        raise ValueError(f"{flag} {hf_checkpoint}: {path} says it is quantised ({method}); such weights are not read")
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"{flag} {hf_checkpoint}: model_type {name!r} is not supported; this version knows: {', '.join(FAMILIES)}"
        )
    return _architecture(fields, FAMILIES[name], where=f"{flag} {hf_checkpoint}: {path}")


def _architecture(fields: dict[str, Any], family: Family, *, where: str) -> Architecture:
    name = fields["model_type"]
    fixed = _FIXED | family.fixed
    for field, value in fields.items():
        if field in fixed and value not in fixed[field]:
            raise ValueError(f"{where}: {field} = {value!r} is not implemented for {name}")
        if field not in _NEUTRAL | _READ | fixed.keys() | family.neutral:
            raise ValueError(f"{where}: field {field!r} is not known for {name}, so it cannot be honoured")
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{where}: layer_types other than full_attention are not implemented for {name}")
    theta, factor = _rope(fields, where=where)
    try:
        heads = fields["num_attention_heads"]
        return Architecture(
            num_layers=fields["num_hidden_layers"],
            hidden_size=fields["hidden_size"],
            ffn_hidden_size=fields["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            vocab_size=fields["vocab_size"],
            max_position_embeddings=fields["max_position_embeddings"],
            norm_epsilon=fields["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling_factor=factor,
            qkv_bias=family.qkv_bias,
            tied_embeddings=fields.get("tie_word_embeddings", False),
            init_std=fields.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is missing") from None


def _rope(fields: dict[str, Any], *, where: str) -> tuple[float, float | None]:
    """Base and scaling factor of the rotary embedding.

    Two spellings: rope_theta beside rope_scaling (None, or a dictionary with a type), and one dictionary
    rope_parameters with the base in it.
    """
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = dict(fields.get(key) or {})
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default" and not rope:
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: {key} = {fields[key]!r} is not implemented; only rope_type default and llama3 are")
    factor = rope.pop("factor", None)
    if factor is None or rope != _LLAMA3_CONSTANTS:
        wanted = ", ".join(f"{name} {value}" for name, value in _LLAMA3_CONSTANTS.items())
        raise ValueError(f"{where}: {key} = {fields[key]!r} is not implemented; llama3 needs a factor, {wanted}")
    return theta, factor
