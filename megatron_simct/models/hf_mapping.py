"""Tensors of a Hugging Face folder <-> parameters of the Megatron model, for reading and for writing.

`weights` is the whole mapping: the name of a Megatron parameter and the rule that relates it to tensors of the folder.
A rule names the pieces of those tensors that a rank's shard of the parameter consists of. `hf_load` copies the pieces
into the parameter, `hf_export` copies them back.

    Whole, Columns          one tensor, not split over the tensor-parallel ranks or split by its columns
    Vocabulary              one tensor whose rows are ids, then rows of zeros that pad the vocabulary
    FusedQKV                per query group: the group's query heads, its key head, its value head
    PackedQKV               the same from one tensor: all query heads, then all key heads, then all value heads
    GatedMLP                this rank's rows of the gate, then its rows of the up projection
    PackedMLP               the same from one tensor: all of the gate, then all of the up projection

A layer is asked for its own number and that of its experts, so a pipeline stage reads and writes its layers only, and
an expert-parallel rank its experts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.models.families import Architecture


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries [begin, end) along `axis` of one tensor of the folder, and where they lie in a parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    view: torch.Tensor
    """A view of the parameter that has these entries in the same order. Its first dimension runs over blocks of rows
    of the tensor."""
    begin: int
    end: int
    axis: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which part of the whole model a parameter is."""

    architecture: Architecture
    layer: int | None
    """Number in the whole model, counted from 0; None outside the layers."""
    expert: int | None = None
    """Number in the whole layer, counted from 0; None outside the experts."""
    tp_rank: int
    tp_size: int

    def named(self, name: str) -> str:
        """The tensor's name with the number of this layer, and of this expert where it has a second *."""
        return name.replace("*", str(self.layer), 1).replace("*", str(self.expert))


class Rule(Protocol):
    """How a parameter is made of tensors of the folder. Its fields are their names."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        """What a shard of the parameter consists of. What no piece covers pads the vocabulary and is zero."""


@dataclass(frozen=True, slots=True)
class Whole:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        yield Piece(place.named(self.name), tuple(parameter.shape), parameter, 0, len(parameter))


@dataclass(frozen=True, slots=True)
class Columns:
    """Named by what is split: Megatron calls the layer row-parallel."""

    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        rows, width = parameter.shape
        begin = place.tp_rank * width
        yield Piece(place.named(self.name), (rows, width * place.tp_size), parameter, begin, begin + width, axis=1)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        architecture = place.architecture
        name = "model.embed_tokens.weight" if architecture.tied_embeddings else self.name
        width, hidden = parameter.shape
        begin = min(place.tp_rank * width, architecture.vocab_size)
        end = min(place.tp_rank * width + width, architecture.vocab_size)
        if end > begin:
            yield Piece(name, (architecture.vocab_size, hidden), parameter[: end - begin], begin, end)


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """Weights [., H] and biases [.] alike."""

    query: str
    key: str
    value: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        names, sizes = (self.query, self.key, self.value), _qkv_rows(place.architecture)
        for part, begin, rows in _qkv(parameter, place):
            shape = (sizes[part], *parameter.shape[1:])
            yield Piece(place.named(names[part]), shape, rows, begin, begin + len(rows))


@dataclass(frozen=True, slots=True)
class PackedQKV:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        sizes = _qkv_rows(place.architecture)
        shape = (sum(sizes), *parameter.shape[1:])
        for part, begin, rows in _qkv(parameter, place):
            begin += sum(sizes[:part])
            yield Piece(place.named(self.name), shape, rows, begin, begin + len(rows))


def _qkv_rows(architecture: Architecture) -> tuple[int, int, int]:
    """Rows of all query heads, of all key heads and of all value heads."""
    query, key = architecture.num_attention_heads, architecture.num_query_groups
    return query * architecture.head_dim, key * architecture.head_dim, key * architecture.head_dim


def _qkv(parameter: torch.Tensor, place: Place) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The runs of rows of a fused parameter: 0, 1 or 2 for query, key or value, first row among those, the rows.

    With more tensor-parallel ranks than groups, a rank has a part of a group: megatron-core cuts the fused rows evenly.
    """
    groups = place.architecture.num_query_groups
    first = place.tp_rank * len(parameter)
    row = 0
    for group in range(groups):
        for part, size in enumerate(rows // groups for rows in _qkv_rows(place.architecture)):
            begin, end = max(row, first), min(row + size, first + len(parameter))
            if begin < end:
                yield part, group * size + begin - row, parameter[begin - first : end - first]
            row += size


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate: str
    up: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        for name, half in zip((self.gate, self.up), parameter.chunk(2), strict=True):
            rows, hidden = half.shape
            begin = place.tp_rank * rows
            yield Piece(place.named(name), (rows * place.tp_size, hidden), half, begin, begin + rows)


@dataclass(frozen=True, slots=True)
class PackedMLP:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        shape = (len(parameter) * place.tp_size, parameter.shape[1])
        for i, half in enumerate(parameter.chunk(2)):
            begin = (i * place.tp_size + place.tp_rank) * len(half)
            yield Piece(place.named(self.name), shape, half, begin, begin + len(half))


_WEIGHTS: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.layers.*.input_layernorm.weight": Whole("model.layers.*.input_layernorm.weight"),
    "decoder.layers.*.self_attention.linear_qkv.weight": FusedQKV(
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.*.self_attn.k_proj.weight",
        "model.layers.*.self_attn.v_proj.weight",
    ),
    "decoder.layers.*.self_attention.linear_qkv.bias": FusedQKV(
        "model.layers.*.self_attn.q_proj.bias",
        "model.layers.*.self_attn.k_proj.bias",
        "model.layers.*.self_attn.v_proj.bias",
    ),
    "decoder.layers.*.self_attention.linear_proj.weight": Columns("model.layers.*.self_attn.o_proj.weight"),
    "decoder.layers.*.pre_mlp_layernorm.weight": Whole("model.layers.*.post_attention_layernorm.weight"),
    "decoder.layers.*.mlp.linear_fc1.weight": GatedMLP(
        "model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"
    ),
    "decoder.layers.*.mlp.linear_fc2.weight": Columns("model.layers.*.mlp.down_proj.weight"),
    "decoder.final_layernorm.weight": Whole("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}


_QK_NORM: dict[str, Rule] = {
    "decoder.layers.*.self_attention.q_layernorm.weight": Whole("model.layers.*.self_attn.q_norm.weight"),
    "decoder.layers.*.self_attention.k_layernorm.weight": Whole("model.layers.*.self_attn.k_norm.weight"),
}


_POST_NORMS: dict[str, Rule] = {
    "decoder.layers.*.self_attention.linear_proj.post_layernorm.weight": Whole(
        "model.layers.*.post_attention_layernorm.weight"
    ),
    "decoder.layers.*.pre_mlp_layernorm.weight": Whole("model.layers.*.pre_feedforward_layernorm.weight"),
    "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight": Whole("model.layers.*.post_feedforward_layernorm.weight"),
}


_EXPERTS: dict[str, Rule] = {
    "decoder.layers.*.mlp.router.weight": Whole("model.layers.*.mlp.gate.weight"),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight": GatedMLP(
        "model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"
    ),
    "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight": Columns(
        "model.layers.*.mlp.experts.*.down_proj.weight"
    ),
}


_FUSED: dict[str, Rule] = {
    "decoder.layers.*.self_attention.linear_qkv.weight": PackedQKV("model.layers.*.self_attn.qkv_proj.weight"),
    "decoder.layers.*.mlp.linear_fc1.weight": PackedMLP("model.layers.*.mlp.gate_up_proj.weight"),
}


_TRANSFORMER_ENGINE = {
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.*.input_layernorm.weight",
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "decoder.layers.*.pre_mlp_layernorm.weight",
    "decoder.layers.*.mlp.experts.linear_fc1.weight*": "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",
    "decoder.layers.*.mlp.experts.linear_fc2.weight*": "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight",
}
"""Names of parameters in megatron-core's TransformerEngine layers, where they are not those of its local layers."""


def weights(architecture: Architecture) -> dict[str, Rule]:
    """The rule of each parameter that the architecture has, by its name; layers and experts have the number *.

    A parameter has two names where TransformerEngine's layers have another than megatron-core's local ones.
    """
    left_out = set() if architecture.qkv_bias else {"decoder.layers.*.self_attention.linear_qkv.bias"}
    if architecture.num_experts:
        left_out |= {name for name in (*_WEIGHTS, *_TRANSFORMER_ENGINE) if ".mlp.linear" in name}
    rules = dict(_WEIGHTS)
    for has_them, others in (
        (architecture.qk_norm, _QK_NORM),
        (architecture.post_norms, _POST_NORMS),
        (architecture.fused_projections, _FUSED),
        (bool(architecture.num_experts), _EXPERTS),
    ):
        rules |= others if has_them else {}
    rules |= {name: rules[local] for name, local in _TRANSFORMER_ENGINE.items() if local in rules}
    return {name: rule for name, rule in rules.items() if name not in left_out}


def tensor_names(architecture: Architecture) -> re.Pattern[str]:
    """Matches every tensor that has a place in the model, or that older exports hold although nothing reads it."""
    names = {
        name
        for rule in weights(architecture).values()
        for name in (getattr(rule, field.name) for field in dataclasses.fields(rule))
    } | {"model.layers.*.self_attn.rotary_emb.inv_freq"}
    layers, experts = (
        "(?:" + "|".join(map(str, range(count))) + ")" for count in (architecture.num_layers, architecture.num_experts)
    )
    patterns = (re.escape(name).replace(r"\*", layers, 1).replace(r"\*", experts) for name in sorted(names))
    return re.compile("|".join(patterns))


_EXPERT_NUMBER = re.compile(r"(?<=^mlp\.experts\.local_experts\.)\d+|(?<=^mlp\.experts\.linear_fc[12]\.weight)\d+$")


def parameters_of(
    model: HiddenStateModel | InterleavedModel, architecture: Architecture, *, tp_rank: int, tp_size: int
) -> Iterator[tuple[Rule, Place, torch.Tensor]]:
    """Every parameter of this rank's part of the model, with its rule and its place."""
    rules = weights(architecture)
    outside = Place(architecture=architecture, layer=None, tp_rank=tp_rank, tp_size=tp_size)
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                yield rules[name], outside, parameter.data
        for layer in chunk.decoder.layers:
            place = replace(outside, layer=layer.layer_number - 1)
            for name, parameter in layer.named_parameters():
                of_expert = place
                if local := _EXPERT_NUMBER.search(name):
                    of_expert = replace(place, expert=layer.mlp.local_expert_indices[int(local[0])])
                    name = _EXPERT_NUMBER.sub("*", name)
                yield rules["decoder.layers.*." + name], of_expert, parameter.data
