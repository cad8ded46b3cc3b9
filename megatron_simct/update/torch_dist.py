"""Writes and reads checkpoints of the format torch_dist: hashed while they are written, read
without unpickling.

Three parts of the format are pickles. `.metadata` is unpickled by megatron-core through torch, which would
call whatever the file names: here it is read by `MetadataReader`, which knows the dozen classes that such a
file consists of, and megatron-core gets its readers from here. common.pt and objects within shards are read
under torch's weights_only, which the environment variable TORCH_FORCE_WEIGHTS_ONLY_LOAD imposes on every
torch.load beneath.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import io
import os
import pickle
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_simct.files import FileHash
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.update.integrity import Following

with megatron_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

_ALLOWED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
        planner.SavePlan,
        planner.WriteItem,
        planner.WriteItemType,
        planner.TensorWriteData,
        torch.Size,
        collections.OrderedDict,
    )
} | {("torch.serialization", "_get_layout"): torch.serialization._get_layout}
"""Names that a `.metadata` may hold, beside torch's dtypes. All of them are plain containers of values."""


OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""For dist_checkpointing.save: megatron-core's own writer, where later versions would take that
of another package.
"""


class Unreadable(ValueError):
    """`.metadata` is damaged, or holds objects that are not allowed."""


class MetadataUnpickler(pickle.Unpickler):
    """Loads objects of _ALLOWED only. Raises UnpicklingError for any other name."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there and is not called")


class MetadataReader(CachedMetadataFileSystemReader):
    """A reader of torch's whose `.metadata` goes through MetadataUnpickler, once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path))
        self._plain: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises Unreadable."""
        if self._plain is None:
            self._plain = read_metadata(Path(self.path))
            assert self._plain.storage_meta is not None, "read_metadata sets it"
            self._plain.storage_meta.load_id = self.load_id
        return self._plain


def read_metadata(folder: Path) -> Metadata:
    """See MetadataReader.read_metadata."""
    try:
        found = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise ValueError("no metadata of a checkpoint")
    except OSError as error:
        raise Unreadable(f".metadata: {error.strerror}") from None
    except Exception as error:  # a damaged pickle may raise any exception
        raise Unreadable(f".metadata is damaged or none ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found.storage_meta, StorageMeta):
        found.storage_meta = StorageMeta()
    return found


def _reader(checkpoint_dir: str | Path, *_: Any, **__: Any) -> MetadataReader:
    """The function from which megatron-core gets its readers."""
    return MetadataReader(str(checkpoint_dir))


assert hasattr(torch_strategies, "_get_filesystem_reader"), "megatron-core gets its readers elsewhere"
torch_strategies._get_filesystem_reader = _reader


@contextlib.contextmanager
def _nothing_else() -> Iterator[None]:
    """Skip everything but tensors: Megatron-LM's common.pt holds its arguments as pickled objects."""
    if hasattr(serialization, "verify_checkpoint_and_load_strategy"):
        owner: Any = importlib.import_module(
            "megatron.core.dist_checkpointing.strategies.common"
        ).TorchCommonLoadStrategy
        name = "load_common"
    else:  # since megatron-core 0.17
        owner, name = serialization, "load_common_state_dict"
    before = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: {})
    try:
        yield
    finally:
        setattr(owner, name, before)


def load(
    state: dict[str, Any],
    folder: Path,
    *,
    among: dist.ProcessGroup | None = None,
    weights_only: bool = False,
    **options: Any,
) -> Any:
    """dist_checkpointing.load without unpickling: see the module. Collective over the whole job.

    among: ranks with equal requests, each of which reads a share; None: each reads all. weights_only:
    common.pt is not read.
    """
    with (
        _nothing_else() if weights_only else contextlib.nullcontext(),
        _weights_only(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if among is not None and among.size() > 1:
            strategy = torch_strategies.TorchDistLoadShardedStrategy()
            options["sharded_strategy"] = FullyParallelLoadStrategyWrapper(strategy, among)
        loaded = dist_checkpointing.load(state, str(folder), **options)
    _refuse_pickled_state(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Force weights_only in every torch.load of this process."""
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _refuse_pickled_state(state: dict[str, Any]) -> None:
    """Raises ValueError for state that TransformerEngine would unpickle: the FP8 state of a layer.

    Without FP8 it is empty.
    """
    for part in state.values():
        for name, value in part.items() if isinstance(part, dict) else ():
            is_empty = value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)
            if str(name).endswith("_extra_state") and not is_empty:
                raise ValueError(
                    f"{name} holds a pickle, the FP8 state of TransformerEngine, which is not read"
                )


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """torch.save without checksums, which torch.load never reads: they take as long as the hashes."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class HashingStrategy(torch_strategies.TorchDistSaveShardedStrategy):
    """megatron-core's writer of torch_dist, which also hashes this rank's files."""

    def __init__(self, *, in_background: bool = False) -> None:
        """in_background: writing forks no processes, so that a thread may do it."""
        super().__init__("torch_dist", 1)
        self._in_background = in_background
        self.hashes: dict[str, FileHash] = {}
        """Hashes of this rank's files by name, once the save has ended."""
        self.refused: OSError | None = None
        """The error if one of them could not be read again."""

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *strategy: Any
    ) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *strategy)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        paths = [Path(path) for path, _, _ in writer.write_buckets]
        write = partial(_write_here, writer) if self._in_background else request.async_fn
        return request._replace(async_fn=self._hashing(write, paths))

    def _hashing(self, write: Callable[..., None], paths: list[Path]) -> Callable[..., None]:
        def write_and_hash(*args: Any, **kwargs: Any) -> None:
            following = Following(paths)
            try:
                write(*args, **kwargs)
            finally:
                following.finish()
                self.hashes, self.refused = following.hashes, following.refused

        return write_and_hash


def _write_here(writer: Any, rank: int, write_buckets: Any, results: Any) -> None:
    """megatron-core's writing of files, one by one in this thread, instead of in a
    forked process for each.
    """
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    written: Any = {}
    ended: queue.Queue[Any] = queue.Queue()
    for index, bucket in enumerate(write_buckets):
        begun: queue.Queue[Any] = queue.Queue()
        begun.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, ended, begun, True)
        _, found = ended.get()
        if isinstance(found, Exception):
            written = found
            break
        written[index] = found
    results.put(written)


class BackgroundWrite:
    """Runs the request of dist_checkpointing.save(async_sharded_save=True) in a thread of this process.

    The thread ends with the process, so that nothing is written after a kill.
    """

    def __init__(self, request: AsyncRequest) -> None:
        """Copies the state first, because training continues to change it."""
        self._request = request
        self._error: BaseException | None = None
        arguments = list(request.async_fn_args)
        if request.async_fn is not None:
            rank, buckets, results = arguments
            arguments = [rank, [_copied(bucket) for bucket in buckets], results]
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the files of this rank, then write the metadata of all. Collective over the whole job.

        Raises the error of any rank's disk on every rank.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        for function in self._request.finalize_fns:
            function()

    def _write(self, *arguments: Any) -> None:
        try:
            if self._request.async_fn is not None:
                with without_crc32():
                    self._request.async_fn(*arguments)
        except BaseException as error:
            self._error = error


def _copied(bucket: Any) -> Any:
    path, key, (objects, tensors) = bucket
    return path, key, (objects, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])
