"""Weights of a Hugging Face folder of safetensors -> this rank's shard of the Megatron model.

`WEIGHTS` is the whole mapping: the name of a Megatron parameter and the rule that makes it from tensors of the folder.
Rules read slices, so a rank never holds more of a matrix than its own shard.

    Whole, Columns          one tensor, not split over the tensor-parallel ranks or split by its columns
    Vocabulary              one tensor whose rows are ids, then rows of zeros that pad the vocabulary
    FusedQKV                per query group: the group's query heads, its key head, its value head
    GatedMLP                this rank's rows of the gate, then its rows of the up projection

A layer is asked for its own number, so a pipeline stage reads its layers only.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.models.families import Architecture

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def find_weights(folder: str, *, flag: str) -> Path | None:
    """The folder's safetensors index or its one safetensors file; None where the folder has no weights.

    Raises ValueError where it has weights that cannot be read: another format, or shards without an index.
    """
    for name in (_INDEX, _SINGLE):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(Path(folder).glob(pattern)):
            raise ValueError(
                f"{flag} {folder}: has {path.name}, but neither {_INDEX} nor {_SINGLE}; weights are read from these"
            )
    return None


def load_hf_weights(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    folder: str,
    *,
    tp_rank: int,
    tp_size: int,
    flag: str,
) -> None:
    """Fill every parameter of this rank's part of the model from the folder, in the parameter's own precision.

    Raises ValueError, naming the flag, the file and the tensor, for one that is missing, has another shape or has no
    place in the model, and for a file that is missing or damaged.
    """
    with contextlib.ExitStack() as files:
        source = _Folder(folder, files, flag=flag)
        source.check_names(_names(architecture))
        for parameter_name, layer, parameter in _parameters(model):
            shard = Shard(source, architecture, layer, tp_rank, tp_size)
            WEIGHTS[parameter_name].fill(parameter.data, shard)


def _parameters(
    model: HiddenStateModel | InterleavedModel,
) -> Iterator[tuple[str, int | None, torch.nn.Parameter]]:
    """Name in WEIGHTS, number of the layer in the whole model counted from 0, and the parameter."""
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                yield name, None, parameter
        for layer in chunk.decoder.layers:
            for name, parameter in layer.named_parameters():
                yield "decoder.layers.*." + name, layer.layer_number - 1, parameter


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a rule reads from, and which part of it."""

    source: _Folder
    architecture: Architecture
    layer: int | None
    tp_rank: int
    tp_size: int

    def read(self, name: str, shape: tuple[int, ...], begin: int, end: int, *, axis: int = 0) -> torch.Tensor:
        """Entries [begin, end) along `axis` of the tensor `name`, whose shape must be `shape`."""
        return self.source.read(name.replace("*", str(self.layer)), shape, begin, end, axis)


@dataclass(frozen=True, slots=True)
class Whole:
    name: str

    def fill(self, target: torch.Tensor, shard: Shard) -> None:
        target.copy_(shard.read(self.name, tuple(target.shape), 0, len(target)))


@dataclass(frozen=True, slots=True)
class Columns:
    """Named by what is split: Megatron calls the layer row-parallel."""

    name: str

    def fill(self, target: torch.Tensor, shard: Shard) -> None:
        rows, width = target.shape
        begin = shard.tp_rank * width
        target.copy_(shard.read(self.name, (rows, width * shard.tp_size), begin, begin + width, axis=1))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    name: str

    def fill(self, target: torch.Tensor, shard: Shard) -> None:
        architecture = shard.architecture
        name = "model.embed_tokens.weight" if architecture.tied_embeddings else self.name
        width, hidden = target.shape
        begin = min(shard.tp_rank * width, architecture.vocab_size)
        end = min(shard.tp_rank * width + width, architecture.vocab_size)
        target[end - begin :].zero_()
        if end > begin:
            target[: end - begin].copy_(shard.read(name, (architecture.vocab_size, hidden), begin, end))


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """Weights [., H] and biases [.] alike."""

    query: str
    key: str
    value: str

    def fill(self, target: torch.Tensor, shard: Shard) -> None:
        architecture = shard.architecture
        groups, rest = architecture.num_query_groups, tuple(target.shape[1:])
        width = groups // shard.tp_size
        heads = architecture.num_attention_heads // groups
        fused = target.view(width, heads + 2, architecture.head_dim, *rest)
        for name, first, last in ((self.query, 0, heads), (self.key, heads, heads + 1), (self.value, heads + 1, None)):
            part = fused[:, first:last]
            rows = part.shape[1] * architecture.head_dim
            begin = shard.tp_rank * width * rows
            piece = shard.read(name, (groups * rows, *rest), begin, begin + width * rows)
            part.copy_(piece.view(part.shape))


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate: str
    up: str

    def fill(self, target: torch.Tensor, shard: Shard) -> None:
        for name, half in zip((self.gate, self.up), target.chunk(2), strict=True):
            rows, hidden = half.shape
            begin = shard.tp_rank * rows
            half.copy_(shard.read(name, (rows * shard.tp_size, hidden), begin, begin + rows))


WEIGHTS: dict[str, Whole | Columns | Vocabulary | FusedQKV | GatedMLP] = {
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


def _names(architecture: Architecture) -> re.Pattern[str]:
    """Matches every tensor that has a place in the model, or that older exports hold although nothing reads it."""
    names = {
        name
        for parameter, rule in WEIGHTS.items()
        if architecture.qkv_bias or not parameter.endswith(".bias")
        for name in (getattr(rule, field) for field in rule.__dataclass_fields__)
    } | {"model.layers.*.self_attn.rotary_emb.inv_freq"}
    layers = "(?:" + "|".join(str(i) for i in range(architecture.num_layers)) + ")"
    return re.compile("|".join(re.escape(name).replace(r"\*", layers) for name in sorted(names)))


class _Folder:
    """The tensors of a folder by name. Files are opened when a tensor of theirs is first read."""

    def __init__(self, folder: str, files: contextlib.ExitStack, *, flag: str) -> None:
        self._where = f"{flag} {folder}"
        self._files = files
        self._opened: dict[Path, Any] = {}
        path = find_weights(folder, flag=flag)
        if path is None:
            raise ValueError(f"{self._where}: no {_SINGLE} there")
        if path.name == _SINGLE:
            self._list, self._file_of = path, dict.fromkeys(self._open(path).keys(), path)
        else:
            self._list, self._file_of = path, self._read_index(path)

    def check_names(self, known: re.Pattern[str]) -> None:
        """ValueError for a tensor whose name does not match: the model would compute something else without it."""
        for name, path in self._file_of.items():
            if not known.fullmatch(name):
                raise ValueError(f"{self._where}: {path.name} holds {name}, which this model has no place for")

    def read(self, name: str, shape: tuple[int, ...], begin: int, end: int, axis: int) -> torch.Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self._where}: tensor {name} is missing in {self._list.name}")
        path = self._file_of[name]
        file = self._open(path)
        try:
            part = file.get_slice(name)
            found = tuple(part.get_shape())
        except _safetensors_error() as error:
            raise ValueError(f"{self._where}: cannot read tensor {name} of {path.name} ({error})") from None
        if found != shape:
            raise ValueError(
                f"{self._where}: tensor {name} of {path.name} has the shape {list(found)}; config.json asks for "
                f"{list(shape)}"
            )
        return part[begin:end] if axis == 0 else part[:, begin:end]

    def _read_index(self, path: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            file_of = {str(name): path.with_name(file) for name, file in weight_map.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._where}: cannot read {path.name} ({type(error).__name__}: {error})") from None
        for name, file in file_of.items():
            if not file.is_file():
                raise ValueError(f"{self._where}: {path.name} places {name} in {file.name}, which is missing")
        return file_of

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            from safetensors import safe_open

            try:
                self._opened[path] = self._files.enter_context(safe_open(str(path), framework="pt"))
            except (OSError, _safetensors_error()) as error:
                raise ValueError(f"{self._where}: {path.name} is damaged or unreadable ({error})") from None
        return self._opened[path]


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
