"""Weights of a Hugging Face folder of safetensors -> this rank's shard of the Megatron model.

Only the pieces that `hf_mapping` names for this rank are read, so it never holds more of a matrix than its own shard.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import Architecture
from megatron_simct.models.hf_mapping import Piece, parameters_of, tensor_names

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
        source.check_names(tensor_names(architecture))
        for rule, place, parameter in parameters_of(model, architecture, tp_rank=tp_rank, tp_size=tp_size):
            pieces = list(rule.pieces(parameter, place))
            if sum(piece.view.numel() for piece in pieces) < parameter.numel():
                parameter.zero_()
            for piece in pieces:
                piece.view.copy_(source.read(piece).view(piece.view.shape))


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

    def read(self, piece: Piece) -> torch.Tensor:
        name = piece.name
        if name not in self._file_of:
            raise ValueError(f"{self._where}: tensor {name} is missing in {self._list.name}")
        path = self._file_of[name]
        file = self._open(path)
        try:
            part = file.get_slice(name)
            found = tuple(part.get_shape())
        except _safetensors_error() as error:
            raise ValueError(f"{self._where}: cannot read tensor {name} of {path.name} ({error})") from None
        if found != piece.shape:
            raise ValueError(
                f"{self._where}: tensor {name} of {path.name} has the shape {list(found)}; config.json asks for "
                f"{list(piece.shape)}"
            )
        return part[piece.begin : piece.end] if piece.axis == 0 else part[:, piece.begin : piece.end]

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
