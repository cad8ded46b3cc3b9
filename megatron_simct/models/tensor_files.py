"""The tensors of a Hugging Face folder of safetensors: names, shapes and pieces.

This module knows no model: `families` asks whether a folder has a head of its own, `hf_load` reads pieces.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_simct.models.formats import DTYPES, STORED, folder_format

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_weights(folder: str, *, flag: str) -> Path | None:
    """The folder's safetensors index or its one safetensors file; None if the folder has no weights.

    Raises ValueError if it has weights that cannot be read: another format, or shards without an index.
    """
    for name in (INDEX, _SINGLE):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(Path(folder).glob(pattern)):
            raise ValueError(
                f"{flag} {folder}: has {path.name}, but neither {INDEX} nor {_SINGLE}; weights are read from "
                "these"
            )
    return None


def weight_files(folder: str, *, flag: str) -> list[Path]:
    """The folder's safetensors files, in the order of their names. Raises ValueError as TensorFolder does."""
    with contextlib.ExitStack() as files:
        return TensorFolder(folder, files, flag=flag, plain=True).paths()


def text_names(folder: str, *, flag: str) -> tuple[str, str]:
    """In a folder that also has tensors for images: the prefix of the language model's tensors, and the name
    of its LM head. Raises ValueError as TensorFolder does."""
    found = set()
    if any((Path(folder) / name).exists() for name in (INDEX, _SINGLE)):
        with contextlib.ExitStack() as files:
            found = set(TensorFolder(folder, files, flag=flag).names())
    older = "language_model.model."
    if any(name.startswith(older) for name in found):
        return older, next((name for name in ("language_model.lm_head.weight",) if name in found), HEAD)
    return "model.language_model.", HEAD


def has_own_head(folder: str, *, embedding: str = EMBEDDING, head: str = HEAD, flag: str) -> bool:
    """Whether the folder has an LM head whose numbers are not those of the embedding.

    transformers does not tie the two then, whatever config.json has. Raises ValueError as TensorFolder.
    """
    if not any((Path(folder) / name).exists() for name in (INDEX, _SINGLE)):
        return False
    with contextlib.ExitStack() as files:
        return TensorFolder(folder, files, flag=flag).differ(embedding, head)


def is_for_bf16(folder: str, *, flag: str) -> bool:
    """Whether bfloat16 holds the folder's tensors: all are bfloat16, or the matrices are
    quantised to fewer bits.

    Raises ValueError as TensorFolder does.
    """
    with contextlib.ExitStack() as files:
        source = TensorFolder(folder, files, flag=flag)
        return source.format is not None or source.dtypes() == {torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries [begin, end) along `axis` of one tensor of the folder, and where they lie in a parameter."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    view: torch.Tensor
    """A view of the parameter that has these entries in the same order. Its first dimension runs over blocks
    of rows of the tensor."""
    begin: int
    end: int
    axis: int = 0
    expert: int | None = None
    """Whose entries they are, of a tensor that holds something of each expert. A matrix lies on its side
    there, [E, c, r]: `view`, `begin`, `end` and `axis` are those of the matrix [r, c]. Of vectors [E, r] the
    view has one dimension."""
    step: int = 1
    """Every step-th of an expert's entries is meant, from `begin` on."""


_BLOCK = 4 << 20
"""Bytes of one read."""
_NUMBERS = 1 << 20
"""Numbers of a quantised matrix that are dequantised at a time."""


class TensorFolder:
    """The tensors of a folder by name. Files are opened when a tensor of theirs is first read."""

    def __init__(self, folder: str, files: contextlib.ExitStack, *, flag: str, plain: bool = False) -> None:
        """plain: only tensors that are not quantised are asked for, so the folder may
        have any quantisation.
        """
        self._where = f"{flag} {folder}"
        self.format = None if plain else folder_format(folder, flag=flag)
        """The format of quantised matrices; None if config.json has no quantization_config."""
        self._files = files
        self._opened: dict[Path, _File] = {}
        self._stands_for: dict[str, str] = {}
        path = find_weights(folder, flag=flag)
        if path is None:
            raise ValueError(f"{self._where}: no {_SINGLE} there")
        if path.name == _SINGLE:
            self._list, self._file_of = path, dict.fromkeys(self._open(path).tensors, path)
        else:
            self._list, self._file_of = path, self._read_index(path)

    def check_names(self, known: re.Pattern[str]) -> None:
        """Raises ValueError for a tensor with an unknown name: without it the results would be wrong."""
        for name, path in self._file_of.items():
            if not known.fullmatch(name if self.format is None else self.format.matrix_of(name)):
                raise ValueError(
                    f"{self._where}: {path.name} holds {name}, which this model has no place for"
                )

    def stand_in(self, *, tied: bool, embedding: str = EMBEDDING, head: str = HEAD) -> None:
        """Read the LM head as the embedding if the two are one and the folder has it under that name only."""
        if tied and not self._has(embedding) and self._has(head):
            self._stands_for[embedding] = head

    def differ(self, first: str, second: str) -> bool:
        """Whether the folder has both tensors, and with different numbers, which quantised ones count as."""
        if not (self._has(first) and self._has(second)):
            return False
        if self._is_quantised(first) or self._is_quantised(second):
            return True
        one, other = self._find(first), self._find(second)
        (_, (_, shape, _)), (_, (_, other_shape, _)) = one, other
        if shape != other_shape:
            return True
        count, step = math.prod(shape), _BLOCK // 4
        for begin in range(0, count, step):
            numbers = [
                file.read(offset + begin * dtype.itemsize, min(step, count - begin), dtype).float()
                for file, (dtype, _, offset) in (one, other)
            ]
            if not torch.equal(*numbers):
                return True
        return False

    def paths(self) -> list[Path]:
        """Paths of all files."""
        return sorted(set(self._file_of.values()))

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._find(name)[1][1]

    def dtypes(self) -> set[torch.dtype]:
        """Types of all tensors."""
        return {self._find(name)[1][0] for name in self._file_of}

    def read(self, piece: Piece) -> None:
        """Fill the piece's view, in the view's own precision."""
        if self._is_quantised(piece.name):
            self._read_quantised(piece)
            return
        file, (dtype, shape, offset) = self._find(piece.name)
        self._check_shape(piece, shape, file.path.name)
        if piece.expert is not None:
            offset += piece.expert * math.prod(shape[1:]) * dtype.itemsize
            _read_on_its_side(piece, file, dtype, offset)
            return
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

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of one tensor of the files, which may be a part of a quantised matrix."""
        _, (dtype, shape, _) = self._find(name, STORED)
        return next(name for name, known in STORED.items() if known is dtype), shape

    def raw(self, name: str, rows: range, width: int) -> torch.Tensor:
        """[len(rows), width]: rows of one tensor of the files, if it is cut into rows of `width` numbers."""
        file, (dtype, _, offset) = self._find(name, STORED)
        skipped, count = rows.start * width * dtype.itemsize, rows[-1] + 1 - rows.start
        return file.read(offset + skipped, count * width, dtype).view(count, width)[:: rows.step]

    def _read_quantised(self, piece: Piece) -> None:
        """Dequantise these entries alone, a few rows at a time."""
        assert self.format is not None, "nothing is quantised without it"
        name = self._stands_for.get(piece.name, piece.name)
        try:
            shape = self.format.shape(self, name)
        except ValueError as error:
            message = str(error)
            raise ValueError(
                message if message.startswith(self._where) else f"{self._where}: {message}"
            ) from None
        self._check_shape(piece, shape, self._file_of[self.format.parts(name)[0]].name)
        height, width = shape if piece.expert is None else reversed(shape[1:])
        entries = range(piece.begin, piece.end, piece.step)
        rows, columns = (entries, range(width)) if piece.axis == 0 else (range(height), entries)
        per_unit = len(rows) // len(piece.view)
        step = max(1, _NUMBERS // (per_unit * len(columns)))
        for begin in range(0, len(piece.view), step):
            target = piece.view[begin : begin + step]
            some = rows[begin * per_unit : (begin + len(target)) * per_unit]
            target.copy_(self.format.numbers(self, name, some, columns, piece.expert).view(target.shape))

    def _has(self, name: str) -> bool:
        return name in self._file_of or self._is_quantised(name)

    def _is_quantised(self, name: str) -> bool:
        """Whether the folder has scales of the matrix."""
        name = self._stands_for.get(name, name)
        return self.format is not None and self.format.parts(name)[1] in self._file_of

    def _check_shape(self, piece: Piece, shape: tuple[int, ...], file: str) -> None:
        if shape != piece.shape:
            raise ValueError(
                f"{self._where}: tensor {piece.name} of {file} has the shape {list(shape)}; config.json asks "
                f"for {list(piece.shape)}"
            )

    def _find(
        self, name: str, known: Mapping[str, torch.dtype] = DTYPES
    ) -> tuple[_File, tuple[torch.dtype, tuple[int, ...], int]]:
        """The file of a tensor, and its type, shape and offset there."""
        name = self._stands_for.get(name, name)
        if name not in self._file_of:
            raise ValueError(f"{self._where}: tensor {name} is missing in {self._list.name}")
        file = self._open(self._file_of[name])
        if name not in file.tensors:
            raise ValueError(
                f"{self._where}: cannot read tensor {name} of {file.path.name}, where {self._list.name} "
                "places it"
            )
        dtype, shape, begin, end = file.tensors[name]
        if dtype not in known:
            how = (
                "config.json has no quantization_config that describes"
                if self.format is None
                else "has no scales that describe"
            )
            raise ValueError(
                f"{self._where}: tensor {name} of {file.path.name} has the type {dtype}, and {how} how it is "
                f"read; without it only {', '.join(DTYPES)} are"
            )
        if end > file.size:
            raise ValueError(
                f"{self._where}: {file.path.name} is damaged or unreadable (truncated: tensor {name} ends at "
                f"byte {end}, the file at {file.size})"
            )
        if end - begin != math.prod(shape) * known[dtype].itemsize:
            raise ValueError(
                f"{self._where}: {file.path.name} is damaged or unreadable (the length of {name})"
            )
        return file, (known[dtype], shape, begin)

    def _read_index(self, path: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            file_of = {str(name): path.with_name(file) for name, file in weight_map.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._where}: cannot read {path.name} ({type(error).__name__}: {error})"
            ) from None
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


def _read_on_its_side(piece: Piece, file: _File, dtype: torch.dtype, offset: int) -> None:
    """Fill the view from the transposed matrix of one expert at the byte `offset`, a few rows at a time."""
    entries = slice(piece.begin, piece.end, piece.step)
    if len(piece.shape) == 2:  # a vector
        piece.view.copy_(file.read(offset, piece.shape[1], dtype)[entries])
        return
    _, height, width = piece.shape
    lying = piece.view.T
    # Columns of the matrix are rows of the file.
    rows, columns = (range(height), entries) if piece.axis == 0 else (range(height)[entries], slice(None))
    step = max(1, _BLOCK // (width * dtype.itemsize))
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step]
        count = some[-1] + 1 - some.start
        block = file.read(offset + some.start * width * dtype.itemsize, count * width, dtype).view(
            count, width
        )
        lying[begin : begin + step].copy_(block[:: some.step, columns])


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
