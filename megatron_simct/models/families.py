"""Reads config.json into the architecture that Megatron builds. Each family is an entry of a table.

A field of config.json that would change the mathematics and that we do not implement is an error naming it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from megatron_simct.json_fields import (
    BOOL,
    NULL,
    OBJECT,
    STRING,
    Kind,
    check_fields,
    integer,
    list_of,
    number,
)
from megatron_simct.models.delta_net import DeltaNet
from megatron_simct.models.dense import Dense
from megatron_simct.models.families_dense import DENSE
from megatron_simct.models.families_experts import EXPERTS
from megatron_simct.models.families_linear import LINEAR
from megatron_simct.models.family import Family
from megatron_simct.models.formats import find_format
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.kernels import Scores
from megatron_simct.models.latent import Latent
from megatron_simct.models.layers import Layer, Mlp
from megatron_simct.models.rotary import Rope, RopeKind
from megatron_simct.models.tensor_files import has_own_head, text_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The architecture of a decoder."""

    layers: tuple[Layer, ...]
    hidden_size: int
    vocab_size: int
    """Rows of the embedding as published; the tokenizer may use fewer."""
    max_position_embeddings: int
    norm_epsilon: float
    logit_scale: float = 1.0
    """Factor of the logits."""
    final_logit_softcap: float | None = None
    """cap * tanh(logit / cap) bounds the logits; None: not bounded."""
    embedding_scale: float = 1.0
    """Factor of the embedding of a token."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    tied_embeddings: bool
    """The LM head is the embedding."""
    init_std: float
    model_type: str = ""
    body: str = "model."
    """Prefix of the names of the folder's tensors, except the head."""
    head: str = "lm_head.weight"
    is_nested: bool = False
    """The folder also has tensors for images."""
    has_mtp: bool = False
    """The folder may have layers of multi-token prediction after the last one; they are ignored."""
    teacher_only: bool = False
    """Generation and training are not implemented for it."""
    index_length: int | None = None
    """Number of positions that an indexer, which is not implemented, would choose for a query. Longer
    sequences are refused; in shorter ones a query sees all earlier positions."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Distinct rotary embeddings of the layers, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """Distinct layers."""
        return tuple(dict.fromkeys(self.layers))

    @property
    def scores(self) -> list[Scores]:
        """What kernels must know of the layers that have a softmax."""
        found = (layer.scores for layer in self.layers)
        return [scores for scores in found if scores is not None]

    @property
    def num_experts(self) -> int:
        """Number of experts of each layer with experts; 0: no layer has experts."""
        return max(layer.mlp.num_experts for layer in self.layers)


FAMILIES = DENSE | EXPERTS | LINEAR

_MTP_FIELDS = frozenset({"num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"})
"""A family that reads one of them may have layers of multi-token prediction."""

NESTED: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{"model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216},
        **{"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_5": {"model_type": "qwen3_5_text", "tie_word_embeddings": False},
}
"""Models whose language model is text_config, and what that may leave out."""

_OUTER = frozenset(
    """text_config vision_config tie_word_embeddings initializer_range mm_tokens_per_image boi_token_index
    eoi_token_index image_token_index image_token_id boi_token_id eoi_token_id projector_hidden_act
    vision_feature_layer multimodal_projector_bias spatial_merge_size video_token_id vision_start_token_id
    vision_end_token_id""".split()
)
"""Fields beside text_config that are read, or that images alone need."""

INERT = frozenset(
    # Names of the model, of its files and of what wrote them.
    """architectures model_type torch_dtype dtype transformers_version transformers.js_config tokenizer_class
    name_or_path _name_or_path _model_name_or_path _commit_hash is_llama_config"""
    # Ids of special tokens: the tokenizer has them.
    """ bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id"""
    # Implementation choices with equal results, and additional outputs of transformers' forward pass.
    """ pretraining_tp use_cache cache_implementation attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attn
    gradient_checkpointing chunk_size_feed_forward torchscript use_bfloat16 output_attentions
    output_hidden_states return_dict"""
    # Limits that the model does not apply, and windows of layers without one.
    """ max_sequence_length model_max_length max_window_layers"""
    # Classifiers.
    """ num_labels id2label label2id problem_type finetuning_task task_specific_params"""
    # Options of generation, which belong to generation_config.json.
    """ bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p
    typical_p""".split()
)
"""Fields that never change the mathematics, whatever their value."""

_ON_BY_DEFAULT = frozenset(
    "is_causal use_rope use_rotary scale_attn_weights sliding_window attention_chunk_size".split()
)
"""Fields where false is not the same as no field; is_causal: null too, which transformers takes for false."""

_READ = frozenset(
    """num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    tie_word_embeddings initializer_range layer_types""".split()
)

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        """num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size
        max_position_embeddings no_rope_layer_interval sliding_window_pattern num_experts num_local_experts
        num_experts_per_tok moe_intermediate_size n_routed_experts moe_num_experts moe_k moe_layer_interval
        rotary_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim full_attention_interval
        linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads shared_expert_intermediate_size index_topk""".split(),
        integer(1),
    ),
    **dict.fromkeys(
        "num_key_value_heads head_dim sliding_window n_group topk_group q_lora_rank".split(),
        integer(1) | NULL,
    ),
    **dict.fromkeys("n_shared_experts first_k_dense_replace".split(), integer(0) | NULL),
    **dict.fromkeys("max_window_layers moe_num_shared_experts moe_layer_start_index".split(), integer(0)),
    "moe_layer_end_index": integer(-1),
    "original_max_position_embeddings": integer(2),  # its logarithm divides
    **dict.fromkeys("rms_norm_eps initializer_range moe_norm_min".split(), number(least=0)),
    **dict.fromkeys(
        """rope_theta rope_local_base_freq query_pre_attn_scalar partial_rotary_factor routed_scaling_factor
        embedding_multiplier residual_multiplier attention_multiplier logits_scaling swiglu_limit""".split(),
        number(above=0),
    ),
    **dict.fromkeys("attn_logit_softcapping final_logit_softcapping".split(), number(above=0) | NULL),
    **dict.fromkeys(
        "tie_word_embeddings use_sliding_window norm_topk_prob use_qk_norm rope_interleave".split(), BOOL
    ),
    "attention_bias": BOOL | NULL,
    **dict.fromkeys("rope_scaling rope_parameters".split(), OBJECT | NULL),
    **dict.fromkeys("layer_types mlp_layer_types".split(), list_of(STRING) | NULL),
    "attn_type_list": list_of(integer(0)) | NULL,
    "no_rope_layers": list_of(integer(0)) | NULL,
}
"""Allowed values of every field that is read."""

_ROPE_KINDS: dict[str, Kind] = {
    **dict.fromkeys("rope_type type".split(), STRING),
    **dict.fromkeys(
        "rope_theta partial_rotary_factor low_freq_factor high_freq_factor".split(), number(above=0)
    ),
    "alpha": number(above=0),
    **dict.fromkeys("factor attention_factor beta_fast beta_slow".split(), number(above=0) | NULL),
    **dict.fromkeys("mscale mscale_all_dim".split(), number(least=0) | NULL),
    "truncate": BOOL,
    "llama_4_scaling_beta": number(least=0),
    **dict.fromkeys("short_factor long_factor".split(), list_of(number(above=0))),
    "original_max_position_embeddings": integer(2),
}
"""Allowed values of every field of rope_scaling and rope_parameters."""

_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}

_ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"alpha"}),
    "longrope": frozenset(
        {"short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"}
    ),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        }
    ),
}


def read_architecture(hf_checkpoint: str, *, flag: str) -> Architecture:
    """The architecture of the folder's config.json; weights with a head of their own
    override tied embeddings.

    Raises ValueError, naming `flag` and the file, for a missing or unreadable file, a family that is not
    supported, a field that is not implemented, or an adapter instead of a model.
    """
    _check_not_adapter(Path(hf_checkpoint), flag=flag)
    path = Path(hf_checkpoint) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {hf_checkpoint}: cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{flag} {hf_checkpoint}: {path} is not JSON (line {error.lineno}: {error.msg})"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets within brackets
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{flag} {hf_checkpoint}: {path} holds no JSON object")
    # raises for quantised weights of another format
    find_format(fields, where=f"{flag} {hf_checkpoint}: {path}")
    fields.pop("quantization_config", None)
    name = fields.get("model_type")
    is_nested = isinstance(name, str) and name in NESTED
    if is_nested:
        fields = _text_fields(fields, where=f"{flag} {hf_checkpoint}: {path}")
        name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join((*FAMILIES, *NESTED))
        raise ValueError(
            f"{flag} {hf_checkpoint}: model_type {name!r} is not supported; this version knows: {known}"
        )
    architecture = _architecture(fields, FAMILIES[name], where=f"{flag} {hf_checkpoint}: {path}")
    if is_nested:
        body, head = text_names(hf_checkpoint, flag=flag)
        architecture = replace(architecture, body=body, head=head, is_nested=True)
    if architecture.tied_embeddings:
        own = has_own_head(
            hf_checkpoint,
            embedding=f"{architecture.body}embed_tokens.weight",
            head=architecture.head,
            flag=flag,
        )
        architecture = replace(architecture, tied_embeddings=not own)
    return architecture


def _text_fields(fields: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of the language model in a model that also reads images."""
    name, nested = fields["model_type"], NESTED[fields["model_type"]]
    check_fields(fields, {"text_config": OBJECT}, where=where)
    if "text_config" not in fields:
        raise ValueError(f"{where}: field 'text_config' is missing")
    for key, value in fields.items():
        if key not in _OUTER and not _is_inert(key, value, name):
            raise ValueError(
                f"{where}: field {key!r} is not known for {name}, so {value!r} cannot be honoured; if you "
                f"know that the model computes the same without it, delete the line of {json.dumps(key)}"
            )
    tied = fields.get("tie_word_embeddings", nested.get("tie_word_embeddings", True))
    return nested | fields["text_config"] | {"tie_word_embeddings": tied}


def check_student(architecture: Architecture, *, flag: str) -> None:
    """ValueError, naming the flag, if the model cannot be a student."""
    if architecture.teacher_only:
        raise ValueError(
            f"{flag}: model_type {architecture.model_type!r} is supported as a teacher only, neither trained "
            "nor generated with; choose another student"
        )


def _check_not_adapter(folder: Path, *, flag: str) -> None:
    """Raises ValueError if the folder holds an adapter of peft, whose base model is elsewhere."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return
    settings: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings = settings if isinstance(settings, dict) else {}
    kind, base = settings.get("peft_type", "LORA"), settings.get("base_model_name_or_path")
    kind = "LoRA" if kind == "LORA" else kind
    raise ValueError(
        f"{flag} {folder}: holds {found[0]}, so it is an adapter ({kind}) of {base or 'another model'} and "
        "not a model; merge the two with peft "
        "(AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)) and give "
        f"NEW, or delete {' and '.join(found)} if the weights there are merged already"
    )


def _architecture(fields: dict[str, Any], family: Family, *, where: str) -> Architecture:
    name = fields["model_type"]
    fixed = _FIXED | family.fixed
    for key, value in fields.items():
        off = value is None and not fixed.get(key, (True,))[0]
        if key in fixed and value not in fixed[key] and not off:
            raise ValueError(f"{where}: {key} = {value!r} is not implemented for {name}")
        if key not in _READ | fixed.keys() | family.read | family.neutral and not _is_inert(key, value, name):
            raise ValueError(
                f"{where}: field {key!r} is not known for {name}, so {value!r} cannot be honoured; if you "
                f"know that the model computes the same without it, delete the line of {json.dumps(key)}"
            )
    fields = family.defaults | fields
    check_fields(
        fields, {key: kind for key, kind in _KINDS.items() if key not in family.neutral}, where=where
    )
    try:
        num_layers = fields["num_hidden_layers"]
        linear = _linear(fields, family, where=where)
        indexed = fields.get("index_topk")
        if indexed and not set(fields.get("layer_types") or ()) <= {"indexed_attention"}:
            raise ValueError(
                f"{where}: layer_types = {fields['layer_types']!r} is not implemented for {name}"
            )
        if indexed or family.delta_net != "none":
            fields = {name: value for name, value in fields.items() if name != "layer_types"}
        windows = _windows(fields, family, num_layers, where=where)
        with_rope = _layers_with_rope(fields, family, windows, where=where)
        head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        head_dim = fields["qk_rope_head_dim"] if family.latent else head_dim
        ropes = _ropes(fields, family, head_dim, where=where)
        attention = (
            _latent(fields, where=where)
            if family.latent
            else _grouped_query(fields, family, head_dim, where=where)
        )
        return Architecture(
            layers=tuple(
                Layer(
                    attention=_delta_net(fields, family, where=where) if is_linear else attention,
                    mlp=mlp,
                    rope=ropes[family.local_rope and window is not None]
                    if has_rope and not is_linear
                    else None,
                    window=window,
                    norms=family.norms,
                    residual_scale=fields.get("residual_multiplier", 1.0),
                )
                for mlp, has_rope, window, is_linear in zip(
                    _mlps(fields, family, where=where), with_rope, windows, linear, strict=True
                )
            ),
            hidden_size=fields["hidden_size"],
            vocab_size=fields["vocab_size"],
            max_position_embeddings=min(
                fields["max_position_embeddings"], indexed or fields["max_position_embeddings"]
            ),
            norm_epsilon=fields["rms_norm_eps"],
            final_logit_softcap=fields.get("final_logit_softcapping"),
            embedding_scale=(
                fields["hidden_size"] ** 0.5
                if family.scaled_embedding
                else fields.get("embedding_multiplier", 1.0)
            ),
            logit_scale=1 / fields.get("logits_scaling", 1.0),
            zero_centered_norm=family.zero_centered_norm,
            tied_embeddings=fields.get("tie_word_embeddings", False),
            init_std=fields.get("initializer_range", 0.02),
            model_type=fields["model_type"],
            has_mtp=not family.neutral.isdisjoint(_MTP_FIELDS),
            teacher_only=family.teacher_only,
            index_length=indexed,
        )
    except KeyError as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is missing") from None


def _is_inert(key: str, value: Any, model_type: str) -> bool:
    """Whether a field that the family does not read has no effect on the mathematics."""
    if key in INERT or key.startswith("unsloth_"):
        return True
    if key == "auto_map":
        return _names_own_code(value, model_type)
    return _is_off(key, value)


def _is_off(key: str, value: Any) -> bool:
    """Whether the field switches something off: null, false, nothing, a multiplier of 1, a dropout or a
    number of 0.
    """
    if key == "is_causal":
        return value is True
    if value is None or value == [] or value == {}:
        return True
    if isinstance(value, bool):
        return value is False and key not in _ON_BY_DEFAULT
    if key == "attention_multiplier":  # replaces 1 / sqrt(head_dim)
        return False
    if key.endswith(("multiplier", "scale", "scaling", "factor")):
        return value == 1
    return value == 0 and (key.endswith(("dropout", "pdrop", "layerdrop")) or key.startswith(("num_", "n_")))


def _names_own_code(auto_map: Any, model_type: str) -> bool:
    """Whether auto_map names classes that transformers has itself, as in folders of a family that it has
    adopted. Then neither this package nor transformers reads the code beside the weights."""
    models = (
        [auto_map[key] for key in auto_map if key.startswith("AutoModel")]
        if isinstance(auto_map, dict)
        else [None]
    )
    stem = {"kimi_k2": "deepseekv3"}.get(model_type, model_type.removesuffix("_text").replace("_", ""))
    return all(
        isinstance(name, str)
        and re.fullmatch(rf"{stem}(for|model).*", name.rpartition(".")[2].lower().replace("_", ""))
        for name in models
    )


def _grouped_query(fields: dict[str, Any], family: Family, head_dim: int, *, where: str) -> GroupedQuery:
    heads = fields["num_attention_heads"]
    groups = fields.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"{where}: num_key_value_heads = {groups}; expected a divisor of {heads} heads")

    def has(part: bool | str) -> bool:
        return bool(fields[part]) if isinstance(part, str) else part

    return GroupedQuery(
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        scale=fields.get("attention_multiplier", fields.get("query_pre_attn_scalar", head_dim) ** -0.5),
        softcap=fields.get("attn_logit_softcapping"),
        qkv_bias=has(family.qkv_bias),
        qk_norm=has(family.qk_norm),
        output_bias=family.output_bias,
        sinks=family.sinks,
        whole_norm=family.whole_norm,
        norm_after_rope=family.norm_after_rope,
        packed=family.packed,
        output_gate=family.output_gate,
    )


def _linear(fields: dict[str, Any], family: Family, *, where: str) -> list[bool]:
    """Which layers have a gated delta net; without layer_types all but every full_attention_interval-th."""
    layers, listed = range(fields["num_hidden_layers"]), fields.get("layer_types")
    if family.delta_net == "none":
        return [False for _ in layers]
    if listed is None:
        return [(i + 1) % fields["full_attention_interval"] != 0 for i in layers]
    if len(listed) != len(layers) or not set(listed) <= {"linear_attention", "full_attention"}:
        raise ValueError(f"{where}: layer_types = {listed!r} is not implemented for {fields['model_type']}")
    if "full_attention" not in listed:
        raise ValueError(
            f"{where}: layer_types = {listed!r}: a model without full_attention is not implemented"
        )
    return [kind == "linear_attention" for kind in listed]


def _delta_net(fields: dict[str, Any], family: Family, *, where: str) -> DeltaNet:
    keys, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    if values % keys:
        raise ValueError(
            f"{where}: linear_num_value_heads = {values}; expected a multiple of {keys} key heads"
        )
    return DeltaNet(
        key_heads=keys,
        value_heads=values,
        key_dim=fields["linear_key_head_dim"],
        value_dim=fields["linear_value_head_dim"],
        window=fields["linear_conv_kernel_dim"],
        packed=family.delta_net == "packed",
    )


def _latent(fields: dict[str, Any], *, where: str) -> Latent:
    """Multi-head latent attention. Where YaRN stretches the positions, mscale_all_dim scales the scores."""
    heads, groups = fields["num_attention_heads"], fields.get("num_key_value_heads")
    if groups not in (None, heads):
        raise ValueError(
            f"{where}: num_key_value_heads = {groups} is not implemented; expected {heads}, as heads"
        )
    scale = (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" and rope.get("mscale_all_dim"):
        scale *= _mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return Latent(
        heads=heads,
        query_rank=fields["q_lora_rank"],
        rank=fields["kv_lora_rank"],
        nope_dim=fields["qk_nope_head_dim"],
        rope_dim=fields["qk_rope_head_dim"],
        value_dim=fields["v_head_dim"],
        scale=scale,
    )


def _mlps(fields: dict[str, Any], family: Family, *, where: str) -> list[Mlp]:
    """The MLP of each layer."""
    layers = fields["num_hidden_layers"]
    experts = family.experts(fields, where) if family.experts is not None else None
    dense = [experts is None] * layers if family.is_dense is None else family.is_dense(fields)

    def mlp(is_dense: bool) -> Mlp:
        if experts is not None and not is_dense:
            return experts
        activation = fields.get("hidden_activation", "silu")
        return Dense(width=fields["intermediate_size"], activation=activation, packed=family.packed)

    return [mlp(is_dense) for is_dense in dense]


def _layers_with_rope(
    fields: dict[str, Any], family: Family, windows: Sequence[int | None], *, where: str
) -> list[bool]:
    """Whether each layer has a rotary embedding.

    Where these are the layers with a sliding window and the model has none, all have a rotary embedding.
    Despite its name, a 1 in no_rope_layers means that the layer has one. Without the list, all layers but
    every no_rope_layer_interval-th have one."""
    num_layers = len(windows)
    if family.rope_layers == "windows" and fields.get("sliding_window"):
        return [window is not None for window in windows]
    if family.rope_layers != "listed":
        return [True] * num_layers
    listed, interval = fields.get("no_rope_layers"), fields["no_rope_layer_interval"]
    if listed is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(listed) < num_layers or any(has_rope not in (0, 1) for has_rope in listed):
        raise ValueError(
            f"{where}: no_rope_layers = {listed!r} is not a 0 or 1 for each of {num_layers} layers"
        )
    return [has_rope == 1 for has_rope in listed[:num_layers]]


def _windows(
    fields: dict[str, Any], family: Family, num_layers: int, *, where: str
) -> tuple[int | None, ...]:
    """The sliding window of each layer, None if it has none."""
    name, listed = fields["model_type"], fields.get("layer_types")
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    layers = range(num_layers)
    match family.windows:
        case "none":
            slides = [False for _ in layers]
        case "all":
            slides = [window is not None for _ in layers]
        case "upper":
            slides = [window is not None and i >= fields["max_window_layers"] for i in layers]
        case "pattern":
            every = fields["sliding_window_pattern"]
            if listed is None and window is not None and not (isinstance(every, int) and every > 0):
                raise ValueError(
                    f"{where}: sliding_window_pattern = {every!r} is not implemented without layer_types"
                )
            slides = [listed is None and window is not None and (i + 1) % every != 0 for i in layers]
        case "no_rope":
            with_rope = _layers_with_rope(fields, family, [None] * num_layers, where=where)
            slides = [window is not None and not has_rope for has_rope in with_rope]
    if listed is not None:
        wanted = [kind == "sliding_attention" for kind in listed]
        known = set(listed) <= {"full_attention", "sliding_attention"} and len(listed) == num_layers
        # transformers ignores this field if all layers are alike.
        if not known or (family.windows in ("none", "all") and wanted != slides):
            raise ValueError(f"{where}: layer_types = {listed!r} is not implemented for {name}")
        slides = wanted
    if any(slides) and window is None:
        raise ValueError(f"{where}: layer_types has sliding_attention, but sliding_window is {window!r}")
    return tuple(window if slide else None for slide in slides)


def _ropes(fields: dict[str, Any], family: Family, head_dim: int, *, where: str) -> tuple[Rope, ...]:
    """The rotary embedding, and after it that of layers with a sliding window where they have their own.

    Two spellings: rope_theta beside rope_scaling (None, or a dictionary with a type), and one dictionary
    rope_parameters with the base in it; where there are two kinds of layers, with a dictionary for each.
    Where a file has both, what counts is what counts in transformers: rope_scaling before rope_parameters,
    and a base in either of them before rope_theta.
    """
    theta = {"rope_theta": fields.get("rope_theta", 10000.0)}
    scaling, parameters = fields.get("rope_scaling") or {}, fields.get("rope_parameters") or {}
    if not family.local_rope:
        key = "rope_parameters" if parameters and not scaling else "rope_scaling"
        return (_rope(theta | (scaling or parameters), key, fields, family, head_dim, where=where),)
    layers = ("full_attention", "sliding_attention")
    if not parameters.keys() <= set(layers):
        raise ValueError(
            f"{where}: rope_parameters = {parameters!r} is not known: it has full_attention and "
            "sliding_attention"
        )
    check_fields(parameters, dict.fromkeys(layers, OBJECT | NULL), where=f"{where}: rope_parameters")
    full, sliding = (parameters.get(layer) or {} for layer in layers)
    if scaling:
        # transformers adds it to the dictionary of these layers, which has a default type.
        full = (full or {"rope_type": "default"}) | scaling
    local = {"rope_theta": fields["rope_local_base_freq"]} | sliding
    full_key = "rope_scaling" if scaling else "rope_parameters.full_attention"
    return (
        _rope(theta | full, full_key, fields, family, head_dim, where=where),
        _rope(local, "rope_parameters.sliding_attention", fields, family, head_dim, where=where),
    )


def _rope(
    rope: dict[str, Any], key: str, fields: dict[str, Any], family: Family, head_dim: int, *, where: str
) -> Rope:
    """One rotary embedding from its dictionary, which config.json has under `key`."""
    check_fields(rope, _ROPE_KINDS, where=f"{where}: {key}")
    values = {name: value for name, value in rope.items() if value is not None}
    theta = values.pop("rope_theta")
    if family.delta_net != "none":
        # A text token has the same position in each section of the head, so the sections have no effect.
        values = {name: value for name, value in values.items() if not name.startswith("mrope_")}
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in family.ropes:
        raise ValueError(
            f"{where}: {key} = {rope!r} is not implemented for {fields['model_type']}; "
            f"rope_type {', '.join(family.ropes)} are"
        )
    dim = head_dim
    if "partial_rotary_factor" in family.read:
        given = fields.get("partial_rotary_factor", 1.0)
        if "rotary_dim" in family.read and fields.get("rotary_dim") is not None:
            given = fields.get("partial_rotary_factor", fields["rotary_dim"] / head_dim)
        dim = int(head_dim * values.pop("partial_rotary_factor", given))
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(
            f"{where}: of a head's {head_dim} entries {dim} would be rotated; expected an even number"
        )
    if kind == "longrope":
        # An extended model has its original length outside of the dictionary, and transformers reads it
        # there.
        original = fields["original_max_position_embeddings"]
        factor = values.pop("factor", fields["max_position_embeddings"] / original)
        unscaled = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values.setdefault("attention_factor", unscaled)
        values["original_max_position_embeddings"] = original
    if kind in ("llama3", "yarn"):
        values.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    growth = 0.0
    if family.growing_queries:
        values.pop("max_position_embeddings", None)
        growth = values.pop("llama_4_scaling_beta")
    if kind == "yarn":
        values = _yarn(values, fields)
    if kind == "dynamic" and values.get("alpha"):
        # Published like this; it means another base, whatever the length is.
        kind, theta, values = "default", theta * values["alpha"] ** (dim / (dim - 2)), {}
    values = {
        name: value
        for name, value in values.items()
        if name in _ROPE_FIELDS[kind] or not _is_off(name, value)
    }
    lengths = {len(values.get(name, ())) for name in ("short_factor", "long_factor")}
    if values.keys() != _ROPE_FIELDS[kind] or (kind == "longrope" and lengths != {dim // 2}):
        wanted = ", ".join(sorted(_ROPE_FIELDS[kind])) or "nothing else"
        counted = f", with {dim // 2} factors each" if kind == "longrope" else ""
        raise ValueError(
            f"{where}: {key} = {rope!r} is not implemented; rope_type {kind} has {wanted}{counted}"
        )
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(f"{where}: {key} = {rope!r}; expected a high_freq_factor above low_freq_factor")
    names = {
        "original_max_position_embeddings": "original_length",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    }
    values = {names.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    interleaved = fields["rope_interleave"] if family.latent else family.interleaved_rope
    return Rope(
        theta=theta,
        dim=dim,
        kind=cast(RopeKind, kind),
        interleaved=interleaved,
        query_growth=growth,
        **values,
    )


def _yarn(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The values with defaults for missing ones, and the attention factor in place of mscale."""
    factor = values.setdefault(
        "factor", fields["max_position_embeddings"] / values["original_max_position_embeddings"]
    )
    over, under = values.pop("mscale", 0), values.pop("mscale_all_dim", 0)
    unscaled = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1.0)
    return {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": unscaled} | values


def _mscale(factor: float, mscale: float) -> float:
    """The attention factor for positions that are stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
