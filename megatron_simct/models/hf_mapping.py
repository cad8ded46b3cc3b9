"""Tensors of a Hugging Face folder <-> parameters of the Megatron model, for reading and for writing.

`weights` is the whole mapping: the name of a Megatron parameter and the rule that relates it to tensors of the folder.
A rule names the pieces of those tensors that a rank's shard of the parameter consists of. `hf_load` copies the pieces
into the parameter, `hf_export` copies them back.

    Whole, Columns          one tensor, not split over the tensor-parallel ranks or split by its columns
    Vocabulary              one tensor whose rows are ids, then rows of zeros that pad the vocabulary
    FusedQKV                per query group: the group's query heads, its key head, its value head
    GatedMLP                this rank's rows of the gate, then its rows of the up projection

A layer is asked for its own number, so a pipeline stage reads and writes its layers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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
    tp_rank: int
    tp_size: int

    def named(self, name: str) -> str:
        """The tensor's name with the number of this layer."""
        return name.replace("*", str(self.layer))


class Rule(Protocol):
    """How a parameter is made of tensors of the folder. Its fields are their names."""

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
        architecture = place.architecture
        groups, rest = architecture.num_query_groups, tuple(parameter.shape[1:])
        width = groups // place.tp_size
        heads = architecture.num_attention_heads // groups
        fused = parameter.view(width, heads + 2, architecture.head_dim, *rest)
        for name, first, last in ((self.query, 0, heads), (self.key, heads, heads + 1), (self.value, heads + 1, None)):
            part = fused[:, first:last]
            rows = part.shape[1] * architecture.head_dim
            begin = place.tp_rank * width * rows
            yield Piece(place.named(name), (groups * rows, *rest), part, begin, begin + width * rows)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate: str
    up: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        for name, half in zip((self.gate, self.up), parameter.chunk(2), strict=True):
            rows, hidden = half.shape
            begin = place.tp_rank * rows
            yield Piece(place.named(name), (rows * place.tp_size, hidden), half, begin, begin + rows)


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


def weights(architecture: Architecture) -> dict[str, Rule]:
    """The rule of each parameter that the architecture has, by its name; layers have the number *."""
    left_out = set() if architecture.qkv_bias else {"decoder.layers.*.self_attention.linear_qkv.bias"}
    rules = _WEIGHTS | (_QK_NORM if architecture.qk_norm else {}) | (_POST_NORMS if architecture.post_norms else {})
    return {name: rule for name, rule in rules.items() if name not in left_out}


def tensor_names(architecture: Architecture) -> re.Pattern[str]:
    """Matches every tensor that has a place in the model, or that older exports hold although nothing reads it."""
    names = {
        name
        for rule in weights(architecture).values()
        for name in (getattr(rule, field) for field in rule.__dataclass_fields__)
    } | {"model.layers.*.self_attn.rotary_emb.inv_freq"}
    layers = "(?:" + "|".join(str(i) for i in range(architecture.num_layers)) + ")"
    return re.compile("|".join(re.escape(name).replace(r"\*", layers) for name in sorted(names)))


def parameters_of(
    model: HiddenStateModel | InterleavedModel, architecture: Architecture, *, tp_rank: int, tp_size: int
) -> Iterator[tuple[Rule, Place, torch.Tensor]]:
    """Every parameter of this rank's part of the model, with its rule and its place."""
    rules = weights(architecture)
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                place = Place(architecture=architecture, layer=None, tp_rank=tp_rank, tp_size=tp_size)
                yield rules[name], place, parameter.data
        for layer in chunk.decoder.layers:
            place = Place(architecture=architecture, layer=layer.layer_number - 1, tp_rank=tp_rank, tp_size=tp_size)
            for name, parameter in layer.named_parameters():
                yield rules["decoder.layers.*." + name], place, parameter.data
