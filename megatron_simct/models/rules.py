"""Rules: how a parameter of the Megatron model is made of tensors of a Hugging Face folder.

A rule names the pieces of those tensors that a rank's shard of the parameter consists of. `hf_load` copies
the pieces into the parameter, `hf_export` copies them back.

    Exact                   a buffer as it is
    Whole, Rows, Columns    one tensor, not split over the tensor-parallel ranks or split by its rows or
                            columns
    Vocabulary              one tensor whose rows are ids, then rows of zeros that pad the vocabulary
    FusedQKV                per query group: the group's query heads, its key head, its value head
    PackedQKV               the same from one tensor: all query heads, then all key heads, then all value
                            heads
    GatedMLP                this rank's rows of the gate, then its rows of the up projection
    PackedMLP               the same from one tensor: all of the gate, then all of the up projection
    PerGroup                per group of heads: runs of rows of one tensor or several
    Stacked...              one expert's part of a tensor that holds all of them, read only
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from megatron_simct.models.tensor_files import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The layer, expert and rank of a parameter in the model."""

    body: str = "model."
    """Prefix of the folder's names, in place of "model."."""
    layer: int | None
    """Number in the whole model, counted from 0; None outside the layers."""
    expert: int | None = None
    """Number in the whole layer, counted from 0; None outside the experts."""
    tp_rank: int
    tp_size: int

    def named(self, name: str) -> str:
        """The tensor's name with the number of this layer, and of this expert where it has a second *."""
        name = self.body + name.removeprefix("model.") if name.startswith("model.") else name
        return name.replace("*", str(self.layer), 1).replace("*", str(self.expert))


class Rule(Protocol):
    """Converts between a parameter and tensors of the folder.

    Fields that are strings are names of tensors.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        """The pieces of a shard of the parameter.

        Entries that no piece covers pad the vocabulary and are zero.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        yield Piece(place.named(self.name), tuple(parameter.shape), parameter, 0, len(parameter))


@dataclass(frozen=True, slots=True)
class Exact:
    """A buffer, which keeps its type whatever the type of the written parameters is."""

    name: str
    row: bool = False
    """The tensor has one row with the numbers."""

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        view = parameter[None] if self.row else parameter
        yield Piece(place.named(self.name), tuple(view.shape), view, 0, len(view))


@dataclass(frozen=True, slots=True)
class Rows:
    """Named by what is split: Megatron calls the layer column-parallel. Weights and biases alike."""

    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        rows = len(parameter)
        begin = place.tp_rank * rows
        shape = (rows * place.tp_size, *parameter.shape[1:])
        yield Piece(place.named(self.name), shape, parameter, begin, begin + rows)


@dataclass(frozen=True, slots=True)
class Columns:
    """Named by what is split: Megatron calls the layer row-parallel."""

    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        rows, width = parameter.shape
        begin = place.tp_rank * width
        yield Piece(
            place.named(self.name), (rows, width * place.tp_size), parameter, begin, begin + width, axis=1
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    name: str
    vocab_size: int
    """Rows of the tensor; the parameter may have more."""

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        width, hidden = parameter.shape
        begin = min(place.tp_rank * width, self.vocab_size)
        end = min(place.tp_rank * width + width, self.vocab_size)
        if end > begin:
            yield Piece(
                place.named(self.name), (self.vocab_size, hidden), parameter[: end - begin], begin, end
            )


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of grouped-query attention."""

    query: int
    groups: int
    """Heads of keys, and of values."""
    dim: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of all query heads, of all key heads and of all value heads."""
        return self.query * self.dim, self.groups * self.dim, self.groups * self.dim

    def runs(self, parameter: torch.Tensor, place: Place) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The runs of rows of a fused parameter: 0, 1 or 2 for query, key or value, first row among those,
        the rows.

        With more tensor-parallel ranks than groups, a rank has a part of a group: megatron-core cuts the
        fused rows evenly.
        """
        first = place.tp_rank * len(parameter)
        row = 0
        for group in range(self.groups):
            for part, size in enumerate(rows // self.groups for rows in self.rows):
                begin, end = max(row, first), min(row + size, first + len(parameter))
                if begin < end:
                    yield part, group * size + begin - row, parameter[begin - first : end - first]
                row += size


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """Weights [., H] and biases [.] alike."""

    query: str
    key: str
    value: str
    heads: Heads

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        names, sizes = (self.query, self.key, self.value), self.heads.rows
        for part, begin, rows in self.heads.runs(parameter, place):
            shape = (sizes[part], *parameter.shape[1:])
            yield Piece(place.named(names[part]), shape, rows, begin, begin + len(rows))


@dataclass(frozen=True, slots=True)
class PackedQKV:
    name: str
    heads: Heads

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        sizes = self.heads.rows
        shape = (sum(sizes), *parameter.shape[1:])
        for part, begin, rows in self.heads.runs(parameter, place):
            begin += sum(sizes[:part])
            yield Piece(place.named(self.name), shape, rows, begin, begin + len(rows))


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate: str
    up: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        for name, half in zip((self.gate, self.up), parameter.chunk(2), strict=True):
            rows = len(half)
            begin = place.tp_rank * rows
            shape = (rows * place.tp_size, *half.shape[1:])
            yield Piece(place.named(name), shape, half, begin, begin + rows)


@dataclass(frozen=True, slots=True)
class PackedMLP:
    name: str

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        shape = (len(parameter) * place.tp_size, *parameter.shape[1:])
        for i, half in enumerate(parameter.chunk(2)):
            begin = (i * place.tp_size + place.tp_rank) * len(half)
            yield Piece(place.named(self.name), shape, half, begin, begin + len(half))


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a tensor, the same number for each group."""

    name: str
    total: int
    """Rows of the tensor."""
    begin: int
    """First row of the first group."""
    rows: int
    """Rows of each group."""
    step: int | None = None
    """Distance from one group to the next; None: groups are consecutive."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """Runs of rows by groups; a rank has complete groups."""

    runs: tuple[Run, ...]
    groups: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        own, row = self.groups // place.tp_size, 0
        for group in range(own * place.tp_rank, own * (place.tp_rank + 1)):
            for run in self.runs:
                begin = run.begin + group * (run.rows if run.step is None else run.step)
                view = parameter[row : row + run.rows]
                yield Piece(
                    place.named(run.name), (run.total, *parameter.shape[1:]), view, begin, begin + run.rows
                )
                row += run.rows
        assert row == len(parameter), "the groups fill the parameter"


@dataclass(frozen=True, slots=True)
class StackedGatedMLP:
    """Weights [E, H, 2 f] or biases [E, 2 f] of all experts in one tensor, gate and up
    projection in turns.
    """

    name: str
    experts: int

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        shape = (self.experts, *parameter.shape[1:], len(parameter) * place.tp_size)
        for i, half in enumerate(parameter.chunk(2)):
            begin = 2 * place.tp_rank * len(half)
            end = begin + 2 * len(half)
            yield Piece(place.named(self.name), shape, half, begin + i, end, expert=place.expert, step=2)


@dataclass(frozen=True, slots=True)
class StackedColumns:
    """The same of one matrix [E, f, H], split by its rows in the tensor."""

    name: str
    experts: int

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        rows, width = parameter.shape
        begin = place.tp_rank * width
        shape = (self.experts, width * place.tp_size, rows)
        yield Piece(
            place.named(self.name), shape, parameter, begin, begin + width, axis=1, expert=place.expert
        )


@dataclass(frozen=True, slots=True)
class StackedWhole:
    """The same of a bias [E, H] that is not split."""

    name: str
    experts: int

    def pieces(self, parameter: torch.Tensor, place: Place) -> Iterator[Piece]:
        shape = (self.experts, len(parameter))
        yield Piece(place.named(self.name), shape, parameter, 0, len(parameter), expert=place.expert)


Stacked = StackedGatedMLP | StackedColumns | StackedWhole
"""Rules of parameters that share a tensor of the folder with those of the layer's other experts."""
