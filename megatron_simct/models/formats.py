"""Formats of quantised matrices in a folder, and their numbers in float32.

`quantization_config` of config.json names the format. A matrix W [r, c] is stored as

    fp8
        W            F8_E4M3 [r, c]
        W_scale_inv  [ceil(r / b), ceil(c / b')], or one number
    compressed-tensors, float-quantized: the same; the scale is W_scale, of a block, of a row or of all
    compressed-tensors, pack-quantized
        W_packed     I32 [r, ceil(c / 8)]: eight numbers of 4 bits a word, the lowest bits first, each greater
                     by 8 than it means
        W_scale      [r, ceil(c / g)]
        W_shape      r and c
    mxfp4
        X_blocks     U8 [E, r, c / 32, 16]: two numbers of 4 bits a byte, the lower bits first; a sign, two
                     bits of exponent, one of fraction
        X_scales     U8 [E, r, c / 32]: a power of two, greater by 127 than it means

A number is what is stored times its scale. The product is formed in float32, and rounded where it is put.
Scales of fp8 may be float8_e8m0fnu (ue8m0). A matrix of such a folder that has no scale is stored as its type
says. Scales of activations are not read: activations are not quantised here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of plain numbers, by their names in a file."""
STORED = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that parts of a quantised matrix may have."""


class Parts(Protocol):
    """The tensors of a folder as they are stored."""

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape."""

    def raw(self, name: str, rows: range, width: int) -> torch.Tensor:
        """[len(rows), width]: rows of the tensor, if it is cut into rows of `width` numbers."""


class Format(Protocol):
    """How a matrix is stored in several tensors."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that hold the matrix `name`, its numbers first and its scales second."""

    def matrix_of(self, part: str) -> str:
        """The name of the matrix of which the tensor is a part; else its own name."""

    def shape(self, source: Parts, name: str) -> tuple[int, ...]:
        """The shape of the matrix without quantisation.

        Raises ValueError if its parts do not fit together.
        """

    def numbers(
        self, source: Parts, name: str, rows: range, columns: range, expert: int | None
    ) -> torch.Tensor:
        """float32 [len(rows), len(columns)] of the matrix, or of the matrix of one expert."""


@dataclass(frozen=True, slots=True)
class Float8:
    """8 bits a number, with a scale for each block."""

    label: str
    scale: str
    """Suffix of its name, behind that of the matrix."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale. None: all, or one row, depending on the number of scales."""
    exponents: bool = False
    """Scales of type U8 are powers of two."""

    def parts(self, name: str) -> tuple[str, ...]:
        return name, name + self.scale

    def matrix_of(self, part: str) -> str:
        for ending in (".weight" + self.scale, ".activation_scale", ".input_scale"):
            if part.endswith(ending):
                return part.removesuffix(ending) + ".weight"
        return part

    def shape(self, source: Parts, name: str) -> tuple[int, ...]:
        dtype, shape = source.stored(name)
        if dtype != "F8_E4M3" or len(shape) != 2:
            raise ValueError(
                f"{name} is {dtype} {list(shape)}; with {name + self.scale} beside it F8_E4M3 [r, c] is read"
            )
        scale_dtype, found = source.stored(name + self.scale)
        if scale_dtype not in (*DTYPES, "F8_E8M0", *(("U8",) if self.exponents else ())):
            raise ValueError(f"{name + self.scale} is {scale_dtype}, which is not the type of a scale")
        self._block(shape, found, name)
        return shape

    def numbers(
        self, source: Parts, name: str, rows: range, columns: range, expert: int | None
    ) -> torch.Tensor:
        assert expert is None, "experts have matrices of their own"
        (_, shape), (_, found) = source.stored(name), source.stored(name + self.scale)
        height, width = self._block(shape, found, name)
        first, last = rows[0] // height, rows[-1] // height
        scales = source.raw(name + self.scale, range(first, last + 1), -(-shape[1] // width))
        if scales.dtype == torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        blocks = scales.float()[:, _indices(columns) // width]
        values = source.raw(name, rows, shape[1])[:, columns.start : columns.stop : columns.step].float()
        return values.mul_(blocks[_indices(rows) // height - first])

    def _block(self, shape: tuple[int, ...], found: tuple[int, ...], name: str) -> tuple[int, int]:
        """Rows and columns that share a scale.

        ValueError if there are not as many scales as that takes.
        """
        rows, columns = shape
        if self.block is not None:
            grid = tuple(-(-size // step) for size, step in zip(shape, self.block, strict=True))
            if found != grid:
                raise ValueError(
                    f"{name + self.scale} has the shape {list(found)}; blocks of {self.block[0]} x "
                    f"{self.block[1]} of {list(shape)} have {list(grid)}"
                )
            return self.block
        if found in ((), (1,), (1, 1)):
            return rows, columns
        if found in ((rows,), (rows, 1)):
            return 1, columns
        raise ValueError(
            f"{name + self.scale} has the shape {list(found)}; one scale is expected, or one a row"
        )


@dataclass(frozen=True, slots=True)
class Int4:
    """4 bits a number, with a scale for each group of a row."""

    label: str
    group: int
    """Columns that share a scale."""

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(name + part for part in ("_packed", "_scale", "_shape"))

    def matrix_of(self, part: str) -> str:
        for ending in ("_packed", "_scale", "_shape"):
            if part.endswith(".weight" + ending):
                return part.removesuffix(ending)
        return part

    def shape(self, source: Parts, name: str) -> tuple[int, ...]:
        packed, scale, shape = self.parts(name)
        if source.stored(shape)[1] != (2,):
            raise ValueError(
                f"{shape} has the shape {list(source.stored(shape)[1])}; the two sizes of a matrix are read"
            )
        rows, columns = source.raw(shape, range(1), 2)[0].tolist()
        expected = {packed: (rows, -(-columns // 8)), scale: (rows, -(-columns // self.group))}
        for part, wanted in expected.items():
            dtype, found = source.stored(part)
            if found != wanted or (dtype == "I32") != (part == packed):
                raise ValueError(
                    f"{part} is {dtype} {list(found)}; a matrix {rows} x {columns} in groups of {self.group} "
                    f"has {list(wanted)}"
                )
        return rows, columns

    def numbers(
        self, source: Parts, name: str, rows: range, columns: range, expert: int | None
    ) -> torch.Tensor:
        assert expert is None, "experts have matrices of their own"
        packed, scale, _ = self.parts(name)
        (_, (_, words)), (_, (_, groups)) = source.stored(packed), source.stored(scale)
        codes = source.raw(packed, rows, words).view(torch.uint8)
        scales = source.raw(scale, rows, groups).float()
        return _of_nibbles(codes, _INTEGERS, columns).mul_(scales[:, _indices(columns) // self.group])


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """4 bits a number, with a power of two for each 32 of a row. Matrices of all experts are one tensor.

    In a plain folder the matrices lie on their side, so that its shape is [E, c, r].
    """

    label: str = "mxfp4"

    def parts(self, name: str) -> tuple[str, ...]:
        return name + "_blocks", name + "_scales"

    def matrix_of(self, part: str) -> str:
        return part.removesuffix("_blocks").removesuffix("_scales")

    def shape(self, source: Parts, name: str) -> tuple[int, ...]:
        blocks, scales = self.parts(name)
        (dtype, shape), (scale_dtype, found) = source.stored(blocks), source.stored(scales)
        if (dtype, scale_dtype) != ("U8", "U8") or shape != (*found, 16) or len(found) != 3:
            raise ValueError(
                f"{blocks} is {dtype} {list(shape)} and {scales} {scale_dtype} {list(found)}; U8 [E, r, c / "
                "32, 16] and U8 [E, r, c / 32] are read"
            )
        experts, rows, groups = found
        return experts, 32 * groups, rows

    def numbers(
        self, source: Parts, name: str, rows: range, columns: range, expert: int | None
    ) -> torch.Tensor:
        assert expert is not None, "one expert at a time"
        blocks, scales = self.parts(name)
        _, (_, height, groups) = source.stored(scales)
        rows = range(expert * height + rows.start, expert * height + rows.stop, rows.step)
        codes = source.raw(blocks, rows, groups * 16)
        exponents = source.raw(scales, rows, groups).int() - 127
        values = _of_nibbles(codes, _E2M1, columns)
        return torch.ldexp(values, exponents[:, _indices(columns) // 32])


def find_format(fields: dict[str, Any], *, where: str) -> Format | None:
    """The format that `quantization_config` of config.json names; None if there is none.

    ValueError, beginning with `where`, for one that is not implemented.
    """
    settings = fields.get("quantization_config")
    text = fields.get("text_config")
    if settings is None and isinstance(text, dict):
        settings = text.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    readers = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed_tensors}
    if not isinstance(method, str) or method not in readers:
        kind = method if isinstance(method, str) else "of an unnamed kind"
        raise ValueError(
            f"{where} says it is quantised ({kind}); of quantised weights {', '.join(readers)} are read; "
            "give the folder of the model's 16-bit weights"
        )
    return readers[method](settings, f"{where}: quantization_config ({method})")


def folder_format(folder: str, *, flag: str) -> Format | None:
    """The format of a folder; None also if its config.json is missing or unreadable."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return find_format(fields, where=f"{flag} {folder}: {path}") if isinstance(fields, dict) else None


def _fp8(settings: dict[str, Any], where: str) -> Format:
    _check(settings, "fmt", ("e4m3", "float8_e4m3fn", None), where)
    _check(settings, "activation_scheme", ("dynamic", "static", None), where)
    _check(settings, "scale_fmt", ("ue8m0", "float", None), where)
    _check(settings, "expert_dtype", ("fp8", None), where)
    # Without the field the blocks are those of DeepSeek-V3; null means no blocks.
    block = _block_size(settings.get("weight_block_size", [128, 128]), "weight_block_size", where)
    label = "fp8, one scale a matrix" if block is None else f"fp8 in blocks of {block[0]} x {block[1]}"
    return Float8(
        label=label, scale="_scale_inv", block=block, exponents=settings.get("scale_fmt") == "ue8m0"
    )


def _mxfp4(settings: dict[str, Any], where: str) -> Format:
    return Mxfp4()


def _compressed_tensors(settings: dict[str, Any], where: str) -> Format:
    _check(settings, "quantization_status", ("compressed", "frozen", None), where)
    for rotated in ("transform_config", "sparsity_config"):
        if settings.get(rotated) not in (None, {}) and settings[rotated].get("format") != "dense":
            raise ValueError(f"{where}: {rotated} = {json.dumps(settings[rotated])[:80]} is not implemented")
    layout, groups = settings.get("format"), settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups]
    formats = {group.get("format") or layout for group in groups if isinstance(group, dict)} or {layout}
    common = [{key: value for key, value in (one or {}).items() if value is not None} for one in weights]
    if (
        not common
        or any(one != common[0] for one in common)
        or formats not in ({"pack-quantized"}, {"float-quantized"})
    ):
        found = ", ".join(sorted(str(name) for name in formats))
        raise ValueError(
            f"{where}: format {found} with {len(groups)} config_groups is not implemented; pack-quantized "
            "and float-quantized are, with the same weights in all groups"
        )
    where, scheme = f"{where}: weights of config_groups", common[0]
    _check(scheme, "symmetric", (True, None), where)
    _check(scheme, "dynamic", (False, None), where)
    strategy = scheme.get("strategy")
    if formats == {"pack-quantized"}:
        _check(scheme, "type", ("int",), where)
        _check(scheme, "num_bits", (4,), where)
        _check(scheme, "strategy", ("group",), where)
        _check(scheme, "actorder", ("weight", "static", None), where)
        group = scheme.get("group_size")
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise ValueError(f"{where}: group_size = {group!r}; a whole number above 0 is expected")
        return Int4(label=f"int4 in groups of {group}", group=group)
    _check(scheme, "type", ("float",), where)
    _check(scheme, "num_bits", (8,), where)
    _check(scheme, "strategy", ("tensor", "channel", "block"), where)
    block = (
        _block_size(scheme.get("block_structure"), "block_structure", where) if strategy == "block" else None
    )
    if strategy == "block" and block is None:
        raise ValueError(f"{where}: strategy block needs a block_structure")
    label = f"fp8 in blocks of {block[0]} x {block[1]}" if block else f"fp8, one scale a {strategy}"
    return Float8(label=label, scale="_scale", block=block)


def _block_size(value: Any, name: str, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size < 1 for size in value)
    ):
        raise ValueError(f"{where}: {name} = {value!r}; two whole numbers above 0 are expected")
    return value[0], value[1]


def _check(settings: dict[str, Any], name: str, known: tuple[Any, ...], where: str) -> None:
    value = settings.get(name)
    if not any(value == one and type(value) is type(one) for one in known):
        implemented = ", ".join(str(one) for one in known if one is not None)
        raise ValueError(f"{where}: {name} = {value!r} is not implemented; {implemented} is")


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_INTEGERS = torch.arange(16.0) - 8


def _of_nibbles(codes: torch.Tensor, meanings: torch.Tensor, columns: range) -> torch.Tensor:
    """float32 [rows, len(columns)], from bytes [rows, .] with two numbers each, the lower four bits first."""
    begin, end = columns.start // 2, -(-columns.stop // 2)
    pairs = torch.stack([meanings.repeat(16), meanings.repeat_interleave(16)], dim=1)  # [256, 2]
    codes = codes[:, begin:end]
    values = pairs.index_select(0, codes.flatten().int()).view(len(codes), -1)
    return values[:, columns.start - 2 * begin : columns.stop - 2 * begin : columns.step].contiguous()


def _indices(entries: range) -> torch.Tensor:
    return torch.arange(entries.start, entries.stop, entries.step)
