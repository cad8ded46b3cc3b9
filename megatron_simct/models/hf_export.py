"""This job's Megatron model -> a Hugging Face folder of sharded safetensors.

Each pipeline stage writes the files of its own layers, each expert-parallel rank those of its experts. Their sizes are
known before the numbers are, so each parameter is gathered over the tensor-parallel group, turned into tensors of the
folder, written and let go: a rank never holds more than one whole parameter beside its own shard.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import Architecture
from megatron_simct.models.hf_load import DTYPES, INDEX
from megatron_simct.models.hf_mapping import Place, Rule, Vocabulary, Whole, parameters_of
from megatron_simct.parallel.disk import check_all_wrote, on_first_rank
from megatron_simct.parallel.initialize import Groups

_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def save_hf_weights(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    groups: Groups,
    *,
    template: str,
    save: str,
    dtype: torch.dtype,
    max_file_bytes: int = 5 << 30,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the folder `save` with the weights, an index, and the other files of the folder `template`.

    It gets its name when it is complete. Collective over the whole job, whose ranks share the file system. `progress`
    is told the bytes of each parameter of this rank. ValueError, on every rank, where the folder exists or cannot be
    written by one of them.
    """
    final = Path(save)
    temporary = final.with_name(final.name + ".tmp")

    def prepare() -> None:
        if final.exists():
            raise FileExistsError(errno.EEXIST, "exists already; nothing is overwritten", str(final))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _copy_other_files(Path(template), temporary, dtype)

    with _removed_on_failure(temporary):
        on_first_rank(prepare, save)
        files = _plan(model, architecture, groups, dtype, max_file_bytes)
        counts: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(counts, len(files))
        before, total = sum(counts[: dist.get_rank()]), sum(counts)
        names = [f"model-{before + i + 1:05d}-of-{total:05d}.safetensors" for i in range(len(files))]
        writer = _Writer([(temporary / name, file) for name, file in zip(names, files, strict=True)], dtype)
        # Every replica gathers, and one of them writes: who gathers does not depend on who writes.
        for rule, place, parameter in _exported(model, architecture, groups):
            shards = _gather(rule, parameter, groups)
            if _writes(place, groups):
                writer.write(_assemble(rule, shards, place))
            progress(parameter.nbytes)
        writer.close()
        check_all_wrote(writer.refused, save)
        entries: list[dict[str, str]] = [{}] * dist.get_world_size() if groups.is_first_rank else []
        own = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
        dist.gather_object(own, entries if groups.is_first_rank else None, dst=0)
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(
            sizes, sum(math.prod(shape) * dtype.itemsize for file in files for shape in file.values())
        )

        def publish() -> None:
            weight_map = {name: file for part in entries for name, file in part.items()}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for path in (*sorted(temporary.iterdir()), temporary):
                _sync(path)
            os.rename(temporary, final)
            _sync(final.parent)

        on_first_rank(publish, save)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exported(
    model: HiddenStateModel | InterleavedModel, architecture: Architecture, groups: Groups
) -> Iterator[tuple[Rule, Place, torch.Tensor]]:
    """This rank's parameters, without the last stage's copy of a tied embedding."""
    for rule, place, parameter in parameters_of(model, architecture, tp_rank=groups.tp_rank, tp_size=groups.tp_size):
        if isinstance(rule, Vocabulary) and architecture.tied_embeddings and not groups.is_first_stage:
            continue
        yield rule, place, parameter


def _writes(place: Place, groups: Groups) -> bool:
    """Whether this rank is the one that writes a parameter of its own."""
    replica = groups.dp_rank if place.expert is None else groups.expert_dp.rank()
    return groups.tp_rank == 0 and replica == 0


def _plan(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    groups: Groups,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name of the tensors of each file that this rank writes, in the order in which they are written."""
    files: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for rule, place, parameter in _exported(model, architecture, groups):
        if not _writes(place, groups):
            continue
        pieces = (rule.pieces(parameter, replace(place, tp_rank=tp_rank)) for tp_rank in range(groups.tp_size))
        for name, shape in {piece.name: piece.shape for part in pieces for piece in part}.items():
            size = math.prod(shape) * dtype.itemsize
            if not files or size > room:
                files.append({})
                room = max_file_bytes
            files[-1][name] = shape
            room -= size
    return files


def _gather(rule: Rule, parameter: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """The shards of a parameter by tensor-parallel rank, on rank 0; its own alone where that has everything."""
    if isinstance(rule, Whole):
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(groups.tp_size)] if groups.tp_rank == 0 else None
    dist.gather(parameter.contiguous(), shards, dst=dist.get_global_rank(groups.tp, 0), group=groups.tp)
    return shards or []


def _assemble(rule: Rule, shards: list[torch.Tensor], place: Place) -> dict[str, torch.Tensor]:
    """The whole tensors of the folder that a parameter's shards consist of."""
    tensors: dict[str, torch.Tensor] = {}
    for tp_rank, shard in enumerate(shards):
        for piece in rule.pieces(shard, replace(place, tp_rank=tp_rank)):
            if piece.name not in tensors:
                tensors[piece.name] = shard.new_empty(piece.shape)
            target = tensors[piece.name].narrow(piece.axis, piece.begin, piece.end - piece.begin)
            target.copy_(piece.view.reshape(target.shape))
    return tensors


class _Writer:
    """Writes tensors, one after the other, into files whose contents are known in advance.

    Where the disk refuses, `refused` says so and no more is written: other ranks count on this one in each gather.
    """

    def __init__(self, files: list[tuple[Path, dict[str, tuple[int, ...]]]], dtype: torch.dtype) -> None:
        self.refused: OSError | None = None
        self._files = files
        self._dtype = dtype
        self._left: list[str] = []
        self._open: BinaryIO | None = None
        self._path: Path | None = None

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._unless_refused(partial(self._write, name, tensor))

    def close(self) -> None:
        self._unless_refused(self._close)

    def _unless_refused(self, action: Callable[[], None]) -> None:
        if self.refused is not None:
            return
        try:
            action()
        except OSError as error:
            error.filename = error.filename or str(self._path)
            self.refused = error

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if not self._left:
            self._next_file()
        assert self._left.pop(0) == name, "tensors come in the order of the plan"
        numbers = tensor.to("cpu", self._dtype).contiguous().flatten().view(torch.uint8)
        assert self._open is not None, "_next_file opened one"
        self._open.write(numbers.numpy().data)

    def _close(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()

    def _next_file(self) -> None:
        self._close()
        path, shapes = self._files.pop(0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + math.prod(shape) * self._dtype.itemsize
            header[name] = {"dtype": _TYPE_NAMES[self._dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._open, self._path = path.open("wb"), path
        self._open.write(len(text).to_bytes(8, "little") + text)
        self._left = list(shapes)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_other_files(template: Path, folder: Path, dtype: torch.dtype) -> None:
    """Configuration and tokenizer; config.json with the type of the weights."""
    for path in sorted(template.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
