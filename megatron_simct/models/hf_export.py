"""This job's Megatron model -> a Hugging Face folder of sharded safetensors.

Each pipeline stage writes the files of its own layers, each expert-parallel rank those of its experts. Their
sizes are known before the numbers are, so each parameter is gathered over the tensor-parallel group,
converted to tensors of the folder, written and freed: a rank never holds more than one whole parameter beside
its own shard.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
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
from megatron_simct.models.formats import DTYPES
from megatron_simct.models.hf_mapping import IMAGES, parameters_of
from megatron_simct.models.rules import Exact, Place, Rule, Stacked, Vocabulary, Whole
from megatron_simct.models.tensor_files import INDEX, Piece, TensorFolder
from megatron_simct.parallel.disk import check_all_wrote, on_first_rank, sole_owner
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

    It is renamed to its name when it is complete. Collective over the whole job, whose ranks share the file
    system. progress: called with the bytes of each parameter of this rank. Raises ValueError, on every rank,
    if the folder exists or cannot be written by one of them.
    """
    if architecture.index_length is not None:
        raise ValueError(
            f"--hf-checkpoint {template}: {architecture.model_type} is not exported: its indexer is not "
            "read, and the folder would lack it"
        )
    final = Path(save)
    temporary = final.with_name(final.name + ".tmp")

    def prepare() -> None:
        if final.exists():
            raise FileExistsError(errno.EEXIST, "exists already; nothing is overwritten", str(final))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _copy_other_files(Path(template), temporary, dtype, tied=architecture.tied_embeddings)

    with sole_owner({"--save": save}, beside=True), _removed_on_failure(temporary):
        on_first_rank(prepare, save)
        files = _plan(model, architecture, groups, dtype, max_file_bytes)
        counts: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(counts, len(files))
        before, total = sum(counts[: dist.get_rank()]), sum(counts)
        names = [f"model-{before + i + 1:05d}-of-{total:05d}.safetensors" for i in range(len(files))]
        writer = _Writer([(temporary / name, file) for name, file in zip(names, files, strict=True)])
        # Every replica gathers, and one of them writes.
        for rule, place, parameters in _exported(model, architecture, groups):
            shards = _gather(rule, place, parameters, groups)
            if _writes(rule, place, groups):
                writer.write(_assemble(rule, shards))
            progress(sum(parameter.nbytes for parameter in parameters))
        writer.close()
        check_all_wrote(writer.refused, save)
        entries: list[dict[str, str]] = [{}] * dist.get_world_size() if groups.is_first_rank else []
        own = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
        dist.gather_object(own, entries if groups.is_first_rank else None, dst=0)
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(
            sizes, sum(math.prod(shape) * kind.itemsize for file in files for shape, kind in file.values())
        )

        def publish() -> None:
            weight_map = {name: file for part in entries for name, file in part.items()}
            others = _copy_images(template, temporary) if architecture.is_nested else {}
            weight_map |= dict.fromkeys(others, _IMAGES)
            index = {"metadata": {"total_size": sum(sizes) + sum(others.values())}, "weight_map": weight_map}
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
) -> Iterator[tuple[Rule, Place, list[torch.Tensor]]]:
    """This rank's parameters, without the last stage's copy of a tied embedding. Experts whose parameters are
    one tensor of the folder come together, with the place of the first."""
    stacks: dict[tuple[Rule, int | None], tuple[Place, list[torch.Tensor]]] = {}
    for rule, place, parameter in parameters_of(
        model, architecture, tp_rank=groups.tp_rank, tp_size=groups.tp_size
    ):
        if isinstance(rule, Vocabulary) and architecture.tied_embeddings and not groups.is_first_stage:
            continue
        if isinstance(rule, Stacked):
            stacks.setdefault((rule, place.layer), (place, []))[1].append(parameter)
        else:
            yield rule, place, [parameter]
    for (rule, _), (place, parameters) in stacks.items():
        yield rule, place, parameters


def _writes(rule: Rule, place: Place, groups: Groups) -> bool:
    """Whether this rank writes this parameter."""
    if isinstance(rule, Stacked):
        return groups.exchange.rank() == 0 and groups.expert_dp.rank() == 0
    replica = groups.dp_cp.rank() if place.expert is None else groups.expert_dp.rank()
    return place.tp_rank == 0 and replica == 0


Entry = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor of the folder."""


def _plan(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    groups: Groups,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> list[dict[str, Entry]]:
    """Shapes and types by name of the tensors of each file that this rank writes, in the order of writing."""
    files: list[dict[str, Entry]] = []
    room = 0
    for rule, place, (parameter, *_) in _exported(model, architecture, groups):
        if not _writes(rule, place, groups):
            continue
        kind = parameter.dtype if isinstance(rule, Exact) else dtype
        pieces = (rule.pieces(parameter, replace(place, tp_rank=tp_rank)) for tp_rank in range(place.tp_size))
        for name, shape in {piece.name: piece.shape for part in pieces for piece in part}.items():
            size = math.prod(shape) * kind.itemsize
            if not files or size > room:
                files.append({})
                room = max_file_bytes
            files[-1][name] = shape, kind
            room -= size
    return files


def _gather(
    rule: Rule, place: Place, parameters: list[torch.Tensor], groups: Groups
) -> list[tuple[Place, torch.Tensor]]:
    """The shards of a parameter with their places, on the first of the ranks that share it; its own alone
    where that has everything. Where experts come together, those of all ranks."""
    if isinstance(rule, Stacked):
        stack = torch.stack(parameters)
        own = torch.tensor([place.expert, place.tp_rank], device=stack.device)
        places, stacks = _gathered(own, groups.exchange), _gathered(stack, groups.exchange)
        return [
            (replace(place, expert=int(first) + i, tp_rank=int(tp_rank)), parameter)
            for (first, tp_rank), of_rank in zip(places, stacks, strict=True)
            for i, parameter in enumerate(of_rank)
        ]
    if isinstance(rule, Whole | Exact):
        return [(place, parameters[0])]
    shards = _gathered(parameters[0], groups.tp if place.expert is None else groups.expert_tp)
    return [(replace(place, tp_rank=tp_rank), shard) for tp_rank, shard in enumerate(shards)]


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of all ranks of the group, on its first rank."""
    tensors = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor.contiguous(), tensors, dst=dist.get_global_rank(group, 0), group=group)
    return tensors or []


def _assemble(rule: Rule, shards: list[tuple[Place, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The folder's tensors, from all shards of a parameter."""
    tensors: dict[str, torch.Tensor] = {}
    for place, shard in shards:
        for piece in rule.pieces(shard, place):
            if piece.name not in tensors:
                tensors[piece.name] = shard.new_empty(piece.shape)
            tensor = tensors[piece.name]
            if piece.expert is not None:  # see Piece
                tensor = tensor[piece.expert].T if tensor.dim() == 3 else tensor[piece.expert]
            target = tensor[(slice(None),) * piece.axis + (slice(piece.begin, piece.end, piece.step),)]
            target.copy_(piece.view.reshape(target.shape))
    return tensors


class _Writer:
    """Writes tensors, one after the other, into files whose contents are known in advance.

    After an error of the disk, `refused` holds it and nothing more is written; the rank still takes part in
    each gather.
    """

    def __init__(self, files: list[tuple[Path, dict[str, Entry]]]) -> None:
        self.refused: OSError | None = None
        self._files = files
        self._left: list[tuple[str, torch.dtype]] = []
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
        planned, kind = self._left.pop(0)
        assert planned == name, "tensors come in the order of the plan"
        numbers = tensor.to("cpu", kind).contiguous().flatten().view(torch.uint8)
        assert self._open is not None, "_next_file opened one"
        self._open.write(numbers.numpy().data)

    def _close(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()

    def _next_file(self) -> None:
        self._close()
        path, entries = self._files.pop(0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, kind) in entries.items():
            end = offset + math.prod(shape) * kind.itemsize
            header[name] = {"dtype": _TYPE_NAMES[kind], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._open, self._path = path.open("wb"), path
        self._open.write(len(text).to_bytes(8, "little") + text)
        self._left = [(name, kind) for name, (_, kind) in entries.items()]


_IMAGES = "model-images.safetensors"


def _copy_images(template: str, folder: Path) -> dict[str, int]:
    """Write the template's tensors that read images, as they are, into one file.

    Returns their bytes by name.
    """
    with contextlib.ExitStack() as files:
        source = TensorFolder(template, files, flag="--hf-checkpoint")
        entries = {}
        for name in source.names():
            if re.fullmatch(IMAGES, name):
                kind, shape = source.stored(name)
                entries[name] = shape, DTYPES[kind]
        if not entries:
            return {}
        writer = _Writer([(folder / _IMAGES, entries)])
        for name, (shape, dtype) in entries.items():
            tensor = torch.empty(shape, dtype=dtype)
            source.read(Piece(name, shape, tensor, 0, shape[0]))
            writer.write({name: tensor})
        writer.close()
    if writer.refused is not None:
        raise writer.refused
    return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in entries.items()}


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_other_files(template: Path, folder: Path, dtype: torch.dtype, *, tied: bool) -> None:
    """Copy configuration and tokenizer. config.json gets the type of the weights, loses its quantisation, and
    states whether they have a head of their own."""
    for path in sorted(template.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers"):
        if fields.get(name):
            fields[name] = 0  # no layers of multi-token prediction are written
    for part in (fields, fields.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    if not tied:
        # It may be true beside a head that differs, which only transformers 5 handles.
        fields["tie_word_embeddings"] = False
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
