"""One entry a model family: config.json fields -> what Megatron needs to build the same architecture.

A field of config.json that would change the mathematics and that we do not implement is an error naming it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from megatron_simct.json_fields import BOOL, NULL, OBJECT, STRING, Kind, check_fields, list_of, number, whole

RopeKind = Literal["default", "linear", "llama3", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding of one kind of layer. See models/rotary.py for what the numbers do."""

    theta: float
    dim: int
    """Entries of a head that are turned, from the first on."""
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0
    """Positions that the model was trained for before it was scaled."""
    short_factors: tuple[float, ...] = ()
    """longrope, one for each of the dim / 2 frequencies: for sequences of up to original_length positions."""
    long_factors: tuple[float, ...] = ()
    """The same for longer sequences."""
    attention_factor: float = 1.0
    """Multiplies what is turned, of queries and keys alike."""


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
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[int | None, ...]
    """Which of `ropes` each layer has; None: nothing is turned."""
    windows: tuple[int | None, ...]
    """How many positions each layer's queries see, their own included; None: all."""
    softmax_scale: float
    """Multiplies the product of query and key."""
    attention_softcap: float | None = None
    """cap * tanh(score / cap) bounds the scores; None: not bounded."""
    final_logit_softcap: float | None = None
    """The same for the logits."""
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    embedding_scale: float = 1.0
    """Multiplies the embedding of a token on its way into the first layer."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """Each head of queries and keys is normalized."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    post_norms: bool = False
    """What attention and MLP add to the residual is normalized too."""
    fused_projections: bool = False
    """The folder has one tensor of queries, keys and values, and one of gate and up projection."""
    num_experts: int = 0
    """MLPs of each layer, ffn_hidden_size wide each; 0: one that every token goes through."""
    experts_per_token: int = 0
    """The experts with the highest scores of the router."""
    normalized_routing: bool = True
    """Weights of a token's experts add up to 1; else they are a softmax over all experts."""
    tied_embeddings: bool
    init_std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family has beside what all families share: fields of config.json, and parts of the model."""

    fixed: dict[str, tuple[Any, ...]]
    """Fields that are implemented at these values only."""
    read: frozenset[str] = frozenset()
    """Fields that are read below."""
    neutral: frozenset[str] = frozenset()
    """Fields that say nothing about the forward pass."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Of fields that config.json may leave out: transformers' own."""
    ropes: tuple[str, ...] = ("default",)
    """Kinds of scaling that are implemented."""
    windows: Literal["none", "all", "upper", "pattern", "unturned"] = "none"
    """Layers with the sliding window where layer_types does not say: none, all, from max_window_layers on, all but
    every sliding_window_pattern-th, or those without a rotary embedding."""
    qkv_bias: bool = False
    qk_norm: bool = False
    zero_centered_norm: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    """The embedding of a token is multiplied by the root of hidden_size."""
    fused_projections: bool = False
    local_rope: bool = False
    """Layers with the sliding window have a rotary embedding of their own."""
    experts: bool = False
    """Every layer has experts."""


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
_QWEN_DEFAULTS: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = {
    "llama": Family(fixed={"attention_bias": (False,), "mlp_bias": (False,)}, ropes=("default", "linear", "llama3")),
    "mistral": Family(fixed={}, read=frozenset({"sliding_window"}), defaults={"sliding_window": 4096}, windows="all"),
    "qwen2": Family(
        fixed={},
        read=frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
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
    "qwen3_moe": Family(
        fixed={
            "attention_bias": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "output_router_logits": (False,),
        },
        read=frozenset(
            """use_sliding_window sliding_window num_experts num_local_experts num_experts_per_tok norm_topk_prob
            moe_intermediate_size""".split()
        ),
        neutral=frozenset({"router_aux_loss_coef", "max_window_layers"}),
        defaults={"use_sliding_window": False, "sliding_window": 4096, "norm_topk_prob": False},
        windows="all",
        qk_norm=True,
        experts=True,
    ),
    "gemma2": Family(
        fixed=_GEMMA_FIXED,
        read=_GEMMA_READ,
        neutral=frozenset({"cache_implementation"}),
        defaults=_GEMMA_DEFAULTS
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows="pattern",
        zero_centered_norm=True,
        post_norms=True,
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        fixed=_GEMMA_FIXED,
        read=_GEMMA_READ | {"rope_local_base_freq", "sliding_window_pattern"},
        neutral=frozenset({"cache_implementation", "_sliding_window_pattern"}),
        defaults=_GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ropes=("default", "linear"),
        windows="pattern",
        qk_norm=True,
        zero_centered_norm=True,
        post_norms=True,
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
        neutral=frozenset({"auto_map"}),
        ropes=("default", "longrope"),
        windows="all",
        fused_projections=True,
    ),
    "smollm3": Family(
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
        read=frozenset({"use_sliding_window", "sliding_window", "no_rope_layers", "no_rope_layer_interval"}),
        neutral=frozenset({"max_window_layers"}),
        defaults={
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        windows="unturned",
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

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        """num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size max_position_embeddings
        no_rope_layer_interval sliding_window_pattern num_experts num_local_experts num_experts_per_tok
        moe_intermediate_size""".split(),
        whole(1),
    ),
    **dict.fromkeys("num_key_value_heads head_dim sliding_window".split(), whole(1) | NULL),
    "max_window_layers": whole(0),
    "original_max_position_embeddings": whole(2),  # its logarithm divides
    **dict.fromkeys("rms_norm_eps initializer_range".split(), number(least=0)),
    **dict.fromkeys(
        "rope_theta rope_local_base_freq query_pre_attn_scalar partial_rotary_factor".split(), number(above=0)
    ),
    **dict.fromkeys("attn_logit_softcapping final_logit_softcapping".split(), number(above=0) | NULL),
    **dict.fromkeys("tie_word_embeddings use_sliding_window norm_topk_prob".split(), BOOL),
    **dict.fromkeys("rope_scaling rope_parameters".split(), OBJECT | NULL),
    "layer_types": list_of(STRING) | NULL,
    "no_rope_layers": list_of(whole(0)) | NULL,
}
"""Of every field that is read."""

_ROPE_KINDS: dict[str, Kind] = {
    **dict.fromkeys("rope_type type".split(), STRING),
    **dict.fromkeys("rope_theta partial_rotary_factor low_freq_factor high_freq_factor".split(), number(above=0)),
    **dict.fromkeys("factor attention_factor".split(), number(above=0) | NULL),
    **dict.fromkeys("short_factor long_factor".split(), list_of(number(above=0))),
    "original_max_position_embeddings": whole(2),
}
"""Of every field of rope_scaling and rope_parameters."""

_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}

_ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "longrope": frozenset({"short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


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
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets within brackets
        raise ValueError(f"{flag} {hf_checkpoint}: {path} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{flag} {hf_checkpoint}: {path} holds no JSON object")
    if "quantization_config" in fields:
        settings = fields["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        method = method if isinstance(method, str) else "of an unnamed kind"
        raise ValueError(f"{flag} {hf_checkpoint}: {path} says it is quantised ({method}); such weights are not read")
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{flag} {hf_checkpoint}: model_type {name!r} is not supported; this version knows: {', '.join(FAMILIES)}"
        )
    return _architecture(fields, FAMILIES[name], where=f"{flag} {hf_checkpoint}: {path}")


def _architecture(fields: dict[str, Any], family: Family, *, where: str) -> Architecture:
    name = fields["model_type"]
    fixed = _FIXED | family.fixed
    for key, value in fields.items():
        if key in fixed and value not in fixed[key]:
            raise ValueError(f"{where}: {key} = {value!r} is not implemented for {name}")
        if key not in _NEUTRAL | _READ | fixed.keys() | family.read | family.neutral:
            raise ValueError(f"{where}: field {key!r} is not known for {name}, so it cannot be honoured")
    fields = family.defaults | fields
    check_fields(fields, {key: kind for key, kind in _KINDS.items() if key not in family.neutral}, where=where)
    try:
        heads, num_layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        query_groups = fields.get("num_key_value_heads") or heads
        if heads % query_groups:
            raise ValueError(f"{where}: num_key_value_heads = {query_groups}; expected a divisor of {heads} heads")
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        turned = _turned(fields, family, num_layers, where=where)
        windows = _windows(fields, family, turned, where=where)
        return Architecture(
            num_layers=num_layers,
            hidden_size=fields["hidden_size"],
            ffn_hidden_size=fields["moe_intermediate_size" if family.experts else "intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=query_groups,
            head_dim=head_dim,
            vocab_size=fields["vocab_size"],
            max_position_embeddings=fields["max_position_embeddings"],
            norm_epsilon=fields["rms_norm_eps"],
            ropes=_ropes(fields, family, head_dim, where=where),
            rope_of_layer=tuple(
                int(family.local_rope and window is not None) if turns else None
                for turns, window in zip(turned, windows, strict=True)
            ),
            windows=windows,
            softmax_scale=fields.get("query_pre_attn_scalar", head_dim) ** -0.5,
            attention_softcap=fields.get("attn_logit_softcapping"),
            final_logit_softcap=fields.get("final_logit_softcapping"),
            activation=fields.get("hidden_activation", "silu"),
            embedding_scale=fields["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            fused_projections=family.fused_projections,
            zero_centered_norm=family.zero_centered_norm,
            post_norms=family.post_norms,
            **_experts(fields, family, where=where),
            tied_embeddings=fields.get("tie_word_embeddings", False),
            init_std=fields.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is missing") from None


def _experts(fields: dict[str, Any], family: Family, *, where: str) -> dict[str, Any]:
    """How many experts a layer has and how the router weighs those of a token."""
    if not family.experts:
        return {}
    # transformers 5 writes the second name.
    names = {name for name in ("num_experts", "num_local_experts") if name in fields}
    if len({fields[name] for name in names}) != 1:
        found = ", ".join(f"{name} = {fields[name]}" for name in sorted(names)) or "neither is there"
        raise ValueError(f"{where}: num_experts and num_local_experts are two names of one number ({found})")
    experts, chosen, normalized = fields[names.pop()], fields["num_experts_per_tok"], fields["norm_topk_prob"]
    if not (2 if normalized else 1) <= chosen <= experts:
        raise ValueError(
            f"{where}: num_experts_per_tok = {chosen} of {experts} experts, norm_topk_prob = {normalized} is not "
            "implemented"
        )
    return {"num_experts": experts, "experts_per_token": chosen, "normalized_routing": normalized}


def _turned(fields: dict[str, Any], family: Family, num_layers: int, *, where: str) -> list[bool]:
    """Whether each layer has a rotary embedding: those with a 1 in no_rope_layers, which says the contrary of its name,
    or else all but every no_rope_layer_interval-th."""
    if "no_rope_layers" not in family.read:
        return [True] * num_layers
    listed, interval = fields.get("no_rope_layers"), fields["no_rope_layer_interval"]
    if listed is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(listed) < num_layers or any(turns not in (0, 1) for turns in listed):
        raise ValueError(f"{where}: no_rope_layers = {listed!r} is not a 0 or 1 for each of {num_layers} layers")
    return [turns == 1 for turns in listed[:num_layers]]


def _windows(fields: dict[str, Any], family: Family, turned: Sequence[bool], *, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where it has none. turned: which layers have a rotary embedding."""
    name, listed, num_layers = fields["model_type"], fields.get("layer_types"), len(turned)
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
            slides = [window is not None and (i + 1) % fields["sliding_window_pattern"] != 0 for i in layers]
        case "unturned":
            slides = [window is not None and not turns for turns in turned]
    if listed is not None:
        wanted = [kind == "sliding_attention" for kind in listed]
        known = set(listed) <= {"full_attention", "sliding_attention"} and len(listed) == num_layers
        # transformers does not look at this field where all layers are alike.
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
    """
    theta = fields.get("rope_theta", 10000.0)
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    spelled = [({"rope_theta": theta} | (fields.get(key) or {}), key)]
    if family.local_rope:
        local = {"rope_theta": fields["rope_local_base_freq"]}
        if key == "rope_parameters":
            both = fields[key]
            if both.keys() != {"full_attention", "sliding_attention"}:
                raise ValueError(f"{where}: {key} = {both!r} is not known: it has full_attention and sliding_attention")
            check_fields(both, dict.fromkeys(both, OBJECT), where=f"{where}: {key}")
            spelled = [
                ({"rope_theta": theta} | both["full_attention"], f"{key}.full_attention"),
                (local | both["sliding_attention"], f"{key}.sliding_attention"),
            ]
        else:
            spelled.append((local, "rope_local_base_freq"))
    return tuple(_rope(rope, key, fields, family, head_dim, where=where) for rope, key in spelled)


def _rope(rope: dict[str, Any], key: str, fields: dict[str, Any], family: Family, head_dim: int, *, where: str) -> Rope:
    """One rotary embedding from its dictionary, which config.json has under `key`."""
    check_fields(rope, _ROPE_KINDS, where=f"{where}: {key}")
    values = {name: value for name, value in rope.items() if value is not None}
    theta = values.pop("rope_theta")
    kinds = {values.pop(name) for name in ("rope_type", "type") if name in values} or {"default"}
    kind = kinds.pop()
    kind = "longrope" if kind == "su" else kind  # its first name
    if kinds or kind not in family.ropes:
        raise ValueError(
            f"{where}: {key} = {rope!r} is not implemented for {fields['model_type']}; "
            f"rope_type {', '.join(family.ropes)} are"
        )
    dim = head_dim
    if "partial_rotary_factor" in family.read:
        dim = int(head_dim * values.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)))
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(f"{where}: of a head's {head_dim} entries {dim} would be turned; expected an even number")
    if kind == "longrope":
        # A model that was made longer says its first length outside; transformers prefers that.
        original = values.pop("original_max_position_embeddings", fields["max_position_embeddings"])
        original = fields.get("original_max_position_embeddings", original)
        factor = values.pop("factor", fields["max_position_embeddings"] / original)
        unscaled = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values.setdefault("attention_factor", unscaled)
        values["original_max_position_embeddings"] = original
    lengths = {len(values.get(name, ())) for name in ("short_factor", "long_factor")}
    if values.keys() != _ROPE_FIELDS[kind] or (kind == "longrope" and lengths != {dim // 2}):
        wanted = ", ".join(sorted(_ROPE_FIELDS[kind])) or "nothing else"
        counted = f", with {dim // 2} factors each" if kind == "longrope" else ""
        raise ValueError(f"{where}: {key} = {rope!r} is not implemented; rope_type {kind} has {wanted}{counted}")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(f"{where}: {key} = {rope!r}; expected a high_freq_factor above low_freq_factor")
    names = {
        "original_max_position_embeddings": "original_length",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    }
    values = {names.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Rope(theta=theta, dim=dim, kind=cast(RopeKind, kind), **values)
