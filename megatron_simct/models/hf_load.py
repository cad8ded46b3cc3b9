"""Weights of a Hugging Face folder of safetensors -> this rank's shard of the Megatron model.

Only the pieces that `hf_mapping` names for this rank are read, so it never holds more of a matrix than its own shard.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import Architecture
from megatron_simct.models.hf_mapping import Piece, parameters_of, tensor_names

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that are read and written, by their names in a file."""


def find_weights(folder: str, *, flag: str) -> Path | None:
    """The folder's safetensors index or its one safetensors file; None where the folder has no weights.

    Raises ValueError where it has weights that cannot be read: another format, or shards without an index.
    """
    for name in (INDEX, _SINGLE):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(Path(folder).glob(pattern)):
            raise ValueError(
                f"{flag} {folder}: has {path.name}, but neither {INDEX} nor {_SINGLE}; weights are read from these"
            )
    return None


def weight_files(folder: str, *, flag: str) -> list[Path]:
    """The folder's safetensors files, in the order of their names. Raises ValueError as load_hf_weights does."""
    with contextlib.ExitStack() as files:
        return _Folder(folder, files, flag=flag).paths()


def load_output_rows(
    architecture: Architecture, folder: str, ids: np.ndarray, *, dtype: torch.dtype, flag: str
) -> torch.Tensor:
    """Rows `ids` of the LM head, [len(ids), H], and nothing else of the folder. ValueError as load_hf_weights."""
    name = "model.embed_tokens.weight" if architecture.tied_embeddings else "lm_head.weight"
    shape = (architecture.vocab_size, architecture.hidden_size)
    order = np.argsort(ids, kind="stable")
    ascending = torch.empty(len(ids), shape[1], dtype=dtype)
    # Ids that follow each other are read at once.
    breaks = np.flatnonzero(np.diff(ids[order]) != 1) + 1
    with contextlib.ExitStack() as files:
        source = _Folder(folder, files, flag=flag)
        for places in np.split(np.arange(len(ids)), breaks) if len(ids) else ():
            begin = int(ids[order[places[0]]])
            view = ascending[places[0] : places[-1] + 1]
            source.read(Piece(name, shape, view, begin, begin + len(places)))
    rows = torch.empty_like(ascending)
    rows[torch.from_numpy(order)] = ascending
    return rows


def has_only_bf16(folder: str, *, flag: str) -> bool:
    """Whether every tensor of the folder is bfloat16. Raises ValueError as load_hf_weights does."""
    with contextlib.ExitStack() as files:
        return _Folder(folder, files, flag=flag).dtypes() == {torch.bfloat16}


def load_hf_weights(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    folder: str,
    *,
    tp_rank: int,
    tp_size: int,
    flag: str,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Fill every parameter of this rank's part of the model from the folder, in the parameter's own precision.

    `progress` is told the bytes of each parameter when it is filled.

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
                source.read(piece)
            progress(parameter.nbytes)


_BLOCK = 4 << 20
"""Bytes that are read at a time."""


class _Folder:
    """The tensors of a folder by name. Files are opened when a tensor of theirs is first read."""

    def __init__(self, folder: str, files: contextlib.ExitStack, *, flag: str) -> None:
        self._where = f"{flag} {folder}"
        self._files = files
        self._opened: dict[Path, _File] = {}
        path = find_weights(folder, flag=flag)
        if path is None:
            raise ValueError(f"{self._where}: no {_SINGLE} there")
        if path.name == _SINGLE:
            self._list, self._file_of = path, dict.fromkeys(self._open(path).tensors, path)
        else:
            self._list, self._file_of = path, self._read_index(path)

    def check_names(self, known: re.Pattern[str]) -> None:
        """ValueError for a tensor whose name does not match: the model would compute something else without it."""
        for name, path in self._file_of.items():
            if not known.fullmatch(name):
                raise ValueError(f"{self._where}: {path.name} holds {name}, which this model has no place for")

    def paths(self) -> list[Path]:
        """Of all files."""
        return sorted(set(self._file_of.values()))

    def dtypes(self) -> set[torch.dtype]:
        """Of all tensors."""
        return {self._find(name)[1][0] for name in self._file_of}

    def read(self, piece: Piece) -> None:
        """Fill the piece's view, in the view's own precision."""
        file, (dtype, shape, offset) = self._find(piece.name)
        if shape != piece.shape:
            raise ValueError(
                f"{self._where}: tensor {piece.name} of {file.path.name} has the shape {list(shape)}; config.json asks "
                f"for {list(piece.shape)}"
            )
        row = math.prod(shape[1:])
        skipped = piece.begin * row if piece.axis == 0 else 0
        rows_per_unit = (piece.end - piece.begin if piece.axis == 0 else shape[0]) // len(piece.view)
        unit = rows_per_unit * row
        step = max(1, _BLOCK // (unit * dtype.itemsize))
        for begin in range(0, len(piece.view), step):
            target = piece.view[begin : begin + step]
            block = file.read(offset + (skipped + begin * unit) * dtype.itemsize, len(target) * unit, dtype)
            if piece.axis == 1:
                block = block.view(-1, row)[:, piece.begin : piece.end]
            target.copy_(block.reshape(target.shape))

    def _find(self, name: str) -> tuple[_File, tuple[torch.dtype, tuple[int, ...], int]]:
        """The file of a tensor, and its type, shape and offset there."""
        if name not in self._file_of:
            raise ValueError(f"{self._where}: tensor {name} is missing in {self._list.name}")
        file = self._open(self._file_of[name])
        if name not in file.tensors:
            raise ValueError(
                f"{self._where}: cannot read tensor {name} of {file.path.name}, where {self._list.name} places it"
            )
        dtype, shape, begin, end = file.tensors[name]
        if dtype not in DTYPES:
            raise ValueError(
                f"{self._where}: tensor {name} of {file.path.name} has the type {dtype}; quantised weights are not "
                f"read, only {', '.join(DTYPES)}"
            )
        if end > file.size:
            raise ValueError(
                f"{self._where}: {file.path.name} is damaged or unreadable (truncated: tensor {name} ends at byte "
                f"{end}, the file at {file.size})"
            )
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{self._where}: {file.path.name} is damaged or unreadable (the length of {name})")
        return file, (DTYPES[dtype], shape, begin)

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

    def _open(self, path: Path) -> _File:
        if path not in self._opened:
            try:
                self._opened[path] = _File(path, self._files)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {str(error)[:100]}"
                raise ValueError(f"{self._where}: {path.name} is damaged or unreadable ({reason})") from None
        return self._opened[path]


class _File:
    """One file of safetensors: 8 bytes with the length of a JSON header, the header, the numbers.

    It is read rather than mapped: pages of a mapped file stay in this process's memory beside the parameters.
    """

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._file = files.enter_context(path.open("rb"))
        length = int.from_bytes(self._file.read(8), "little")
        if length > self.size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {self.size}")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        """Type, shape, first byte and end, by name."""
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            self.tensors[name] = entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end

    def read(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count] numbers that begin at the byte `offset`."""
        buffer = bytearray(count * dtype.itemsize)
        self._file.seek(offset)
        if self._file.readinto(buffer) != len(buffer):
            raise ValueError(f"{self.path} has become shorter while it was read")
        return torch.frombuffer(buffer, dtype=dtype)
