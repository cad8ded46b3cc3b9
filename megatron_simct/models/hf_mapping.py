"""Tensors of a Hugging Face folder <-> parameters of the Megatron model, for reading and for writing.

The rules of the parameters outside of the layers are in this file, those of a layer in the records of its
parts. A layer knows its own number and those of its experts, so a pipeline stage reads and writes only its
layers, and an expert-parallel rank only its experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.models.families import Architecture
from megatron_simct.models.layers import Layer
from megatron_simct.models.rules import PerGroup, Place, Rule, Vocabulary, Whole

_TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.experts.linear_fc1.weight*": "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight*": "mlp.experts.local_experts.*.linear_fc2.weight",
}
"""Names of parameters in megatron-core's TransformerEngine layers, where they are not those
of its local layers.
"""


def outer_rules(architecture: Architecture) -> dict[str, Rule]:
    """The rule of each parameter outside of the layers."""
    embedding, head, rows = "model.embed_tokens.weight", architecture.head, architecture.vocab_size
    return {
        "embedding.word_embeddings.weight": Vocabulary(embedding, rows),
        "decoder.final_layernorm.weight": Whole("model.norm.weight"),
        "output_layer.weight": Vocabulary(embedding if architecture.tied_embeddings else head, rows),
    }


def layer_rules(layer: Layer) -> dict[str, Rule]:
    """The rule of each parameter of a layer, by its name there; experts have the number *.

    A parameter has two names where TransformerEngine's layers have another than megatron-core's local ones.
    """
    rules = layer.rules()
    renamed = {name: local for name, local in _TRANSFORMER_ENGINE.items() if local in rules}
    if layer.mlp.num_experts:
        del renamed["mlp.linear_fc1.layer_norm_weight"]  # the norm before experts is a module of its own
    return rules | {name: rules[local] for name, local in renamed.items()}


def unread_names(architecture: Architecture) -> re.Pattern[str]:
    """Matches tensors that this package does not use: layers of multi-token prediction after the last one,
    image encoders, and indexers of sparse attention."""
    patterns = ["(?!)"]
    if architecture.has_mtp:
        own = "|".join(map(str, range(architecture.num_layers)))
        patterns += [r"(?:model\.)?mtp[._].*", rf"model\.layers\.(?!(?:{own})\.)\d+\..*"]
    if architecture.index_length is not None:
        patterns.append(r"model\.layers\.\d+\.self_attn\.indexer\..*")
    if architecture.is_nested:
        patterns.append(IMAGES)
    return re.compile("|".join(patterns))


IMAGES = r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector|visual)\..*"
"""Names of image encoders and their projections."""


def tensor_names(architecture: Architecture) -> re.Pattern[str]:
    """Matches every tensor of the model, and unused tensors of older exports."""
    names = {re.escape(name) for rule in outer_rules(architecture).values() for name in names_of(rule)}
    names.add(re.escape(architecture.head))
    numbers: dict[Layer, list[str]] = {}
    for number, layer in enumerate(architecture.layers):
        numbers.setdefault(layer, []).append(str(number))
    for layer, own in numbers.items():
        experts = _any_of(map(str, range(layer.mlp.num_experts)))
        found = {name for rule in layer.rules().values() for name in names_of(rule)}
        found.add("model.layers.*.self_attn.rotary_emb.inv_freq")
        names |= {re.escape(n).replace(r"\*", _any_of(own), 1).replace(r"\*", experts) for n in found}
    model = re.escape("model.")
    return re.compile(
        "|".join(
            re.sub(f"^{re.escape(model)}", lambda _: re.escape(architecture.body), n) for n in sorted(names)
        )
    )


def names_of(rule: Rule) -> Iterator[str]:
    """Names of the folder's tensors of a parameter."""
    if isinstance(rule, PerGroup):
        yield from rule.names
    values = (getattr(rule, field.name) for field in dataclasses.fields(rule))
    yield from (value for value in values if isinstance(value, str))


def _any_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(words) + ")"


_EXPERT_NUMBER = re.compile(
    r"(?<=^mlp\.experts\.local_experts\.)\d+|(?<=^mlp\.experts\.linear_fc[12]\.weight)\d+$"
)


def parameters_of(
    model: HiddenStateModel | InterleavedModel, architecture: Architecture, *, tp_rank: int, tp_size: int
) -> Iterator[tuple[Rule, Place, torch.Tensor]]:
    """Every parameter and buffer of this rank's part of the model, with its rule and its place."""
    rules = outer_rules(architecture)
    outside = Place(body=architecture.body, layer=None, tp_rank=tp_rank, tp_size=tp_size)
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                yield rules[name], outside, parameter.data
        for layer in chunk.decoder.layers:
            place = replace(outside, layer=layer.layer_number - 1)
            of_layer = layer_rules(architecture.layers[layer.layer_number - 1])
            buffers = ((name, buffer) for name, buffer in layer.named_buffers() if name in of_layer)
            for name, parameter in itertools.chain(layer.named_parameters(), buffers):
                of_expert = place
                local = _EXPERT_NUMBER.search(name)
                if local is not None:
                    group = chunk.pg_collection.expt_tp
                    number = layer.mlp.local_expert_indices[int(local[0])]
                    of_expert = replace(place, expert=number, tp_rank=group.rank(), tp_size=group.size())
                    name = _EXPERT_NUMBER.sub("*", name)
                yield of_layer[name], of_expert, parameter.data
