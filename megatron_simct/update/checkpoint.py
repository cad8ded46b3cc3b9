"""Checkpoints in Megatron's torch_dist format: written and read by shards, loadable under another layout.

DIR/latest_checkpointed_iteration.txt      the number of the newest complete checkpoint
DIR/iter_0000100/                          one checkpoint, with run.json: what it belongs to, in readable form
DIR/iter_0000120.tmp/                      one that was being written, or removed, when its run was killed

A checkpoint gets its name when it is complete, and the tracker is replaced after that: a kill at any moment leaves the
previous one in use. Weights lie under the names of the model's parameters, whether or not a run's other state lies
beside them, so that --pretrained-checkpoint reads both kinds.

What a run needs to go on is weights, optimizer, schedule, iteration and the random state of every rank. Prompts and
sampling need nothing: they are arithmetic on the iteration (`data.prompts`, `rollout.sampling`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import megatron_simct
from megatron_simct.files import write_whole
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, padded_vocab_size
from megatron_simct.models.families import Architecture
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.disk import on_first_rank
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

TRACKER = "latest_checkpointed_iteration.txt"
RUN_FILE = "run.json"

_REFUSED_WRITES = ("basic_ios", "iostream", "PytorchStreamWriter")
"""In the RuntimeError of torch.save on a full disk."""
_IDENTITY_FLAGS = {
    "model": "--hf-checkpoint",
    "tokenizer": "--tokenizer-model and --stop-token-ids",
    "teacher_tokenizer": "--teacher-tokenizer-model and --teacher-stop-token-ids",
    "alignment_map": "--tokenizer-model and --teacher-tokenizer-model",
}
"""The parts of a run's identity, and the flags that each comes from."""

_RNG = "rng_state"


class Checkpoints:
    """Saves and restores the whole state of a run. Every method is collective over the whole job."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        save_dir: str | None,
        retain: int | None,
        identity: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """retain: checkpoints to keep, None for all. identity: a JSON value for each of _IDENTITY_FLAGS; a checkpoint
        with another one is refused. config: every option by its key. ValueError where save_dir cannot be written."""
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._save_dir = save_dir
        self._retain = retain
        self._identity = identity
        self._config = config
        self._saved: int | None = None
        if save_dir is not None:
            on_first_rank(lambda: _prepare(Path(save_dir)), save_dir)

    def save(self, iteration: int) -> None:
        """Write the checkpoint of this iteration, unless it is the one that was saved or loaded last."""
        assert self._save_dir is not None, "there is no directory to save in"
        if iteration == self._saved:
            return
        run = {
            "iteration": iteration,
            "world_size": dist.get_world_size(),
            "versions": {
                "megatron_simct": megatron_simct.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "megatron-core", "numpy")},
            },
            "identity": self._identity,
            "config": self._config,
        }
        _write(self._state(iteration, is_loading=False), self._save_dir, iteration, run=run)
        folder, retain = self._save_dir, self._retain
        if retain is not None:
            on_first_rank(lambda: _remove_older(Path(folder), iteration, retain), folder)
        self._saved = iteration

    def resume(self, directory: str) -> tuple[int, dict[str, tuple[Any, Any]]]:
        """Restore the newest checkpoint of the directory; its iteration, and the options that differ (its, ours).

        Raises ValueError, naming the flag and the directory, where there is none, where it holds weights only, or
        where it belongs to another model, tokenizer or alignment map.
        """
        iteration, path = newest_checkpoint(directory, flag="--load")
        try:
            run = json.loads((path / RUN_FILE).read_text())
        except OSError:
            raise ValueError(
                f"--load {path}: {RUN_FILE} is missing, so it is no checkpoint to resume from; "
                f"--pretrained-checkpoint {directory} starts a new run from its weights"
            ) from None
        self._check_identity(run["identity"], path, directory)
        same_layout = run["world_size"] == dist.get_world_size() and all(
            run["config"].get(key) == value for key, value in self._config.items() if key.endswith("_parallel_size")
        )
        state = _read(self._state(iteration, is_loading=True, with_rng=same_layout), path, flag="--load")
        self._restore(state, iteration)
        if self._save_dir is not None and Path(directory).resolve() == Path(self._save_dir).resolve():
            self._saved = iteration
        ours = json.loads(json.dumps(self._config))
        return iteration, {
            key: (run["config"].get(key), value) for key, value in ours.items() if run["config"].get(key) != value
        }

    def _state(self, iteration: int, *, is_loading: bool, with_rng: bool = True) -> dict[str, Any]:
        """What is saved, or requested. Before its first step an optimizer has no state."""
        model = self._model.sharded_state_dict()
        state: dict[str, Any] = {"model": model}
        if iteration > 0:
            for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
                optimizer.init_state_fn = optimizer.init_state_fn or _init_momentum
            state["optimizer"] = self._optimizer.sharded_state_dict(model, is_loading=is_loading)
            state["scheduler"] = self._scheduler.state_dict()
        if with_rng:
            world_size, rank = dist.get_world_size(), dist.get_rank()
            state[_RNG] = ShardedObject(_RNG, _rng_state(), (world_size,), (rank,), replica_id=0)
        return state

    def _restore(self, state: dict[str, Any], iteration: int) -> None:
        self._model.load_state_dict(state["model"])
        if iteration > 0:
            # The command line says how to go on; the checkpoint says from where.
            wanted = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
            self._optimizer.load_state_dict(state["optimizer"])
            for group, ours in zip(self._optimizer.param_groups, wanted, strict=True):
                group.update(ours)
            self._scheduler.load_state_dict(state["scheduler"])
        if _RNG in state:
            _set_rng_state(state[_RNG])

    def _check_identity(self, theirs: dict[str, Any], path: Path, directory: str) -> None:
        for part, flag in _IDENTITY_FLAGS.items():
            its, ours = theirs.get(part), self._identity[part]
            if its == ours:
                continue
            if isinstance(its, dict) and isinstance(ours, dict):
                details = ", ".join(f"{k} {its.get(k)} there, {v} here" for k, v in ours.items() if its.get(k) != v)
            else:
                details = f"{str(its)[:12]} there, {str(ours)[:12]} here"
            raise ValueError(
                f"--load {path}: its {part.replace('_', ' ')} is not that of {flag} ({details}); "
                f"--pretrained-checkpoint {directory} starts a new run from its weights"
            )


def has_checkpoint(directory: str) -> bool:
    """Whether the directory has ever got a complete checkpoint."""
    return (Path(directory) / TRACKER).exists()


def save_weights(model: HiddenStateModel | InterleavedModel, directory: str, iteration: int) -> None:
    """A checkpoint of weights alone, for --pretrained-checkpoint. Collective over the whole job."""
    on_first_rank(lambda: _prepare(Path(directory)), directory)
    _write(model.sharded_state_dict(), directory, iteration, run=None)


def load_weights(model: HiddenStateModel | InterleavedModel, directory: str, *, flag: str) -> int:
    """Load the weights of DIR's newest checkpoint; returns its iteration. Collective over the whole job.

    Raises ValueError, naming the flag and the directory, where there is none or it belongs to another model.
    """
    iteration, path = newest_checkpoint(directory, flag=flag)
    model.load_state_dict(_read({"model": model.sharded_state_dict()}, path, flag=flag)["model"])
    return iteration


def load_output_shard(
    architecture: Architecture, directory: str, *, groups: Groups, divisible_by: int, dtype: torch.dtype, flag: str
) -> torch.Tensor:
    """This rank's rows [W, H] of the LM head in DIR's newest checkpoint, and nothing else of it.

    Collective over the whole job. ValueError as load_weights.
    """
    _, path = newest_checkpoint(directory, flag=flag)
    width = padded_vocab_size(architecture.vocab_size, divisible_by=divisible_by, tp_size=groups.tp_size)
    key = "embedding.word_embeddings.weight" if architecture.tied_embeddings else "output_layer.weight"
    rows = torch.zeros(width // groups.tp_size, architecture.hidden_size, dtype=dtype)
    wanted = ShardedTensor.from_rank_offsets(
        key,
        rows,
        (0, groups.tp_rank, groups.tp_size),
        replica_id=(int(not groups.is_last_stage), 0, groups.dp_rank),
        allow_shape_mismatch=True,  # the padding depends on the layout that wrote it
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dist_checkpointing.load({key: wanted}, str(path))[key]
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{flag} {path}: does not fit this model ({_reason(error)})") from error


def stored_dtype(directory: str, *, flag: str) -> torch.dtype:
    """Of the weights of DIR's newest checkpoint; float32 where they are mixed. ValueError as load_weights."""
    _, path = newest_checkpoint(directory, flag=flag)
    try:
        metadata = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, CheckpointException) as error:
        raise ValueError(f"{flag} {path}: cannot be read ({_reason(error)})") from error
    found = {
        entry.properties.dtype
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.endswith(("weight", "bias")) and "optimizer." not in name
    }
    return found.pop() if len(found) == 1 else torch.float32


def newest_checkpoint(directory: str, *, flag: str) -> tuple[int, Path]:
    """Its iteration and its folder. ValueError, naming the flag, where there is none."""
    try:
        iteration = int((Path(directory) / TRACKER).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{flag} {directory}: no checkpoint there ({TRACKER} is missing or not a number)") from None
    return iteration, Path(directory) / f"iter_{iteration:07d}"


def _write(state: dict[str, Any], directory: str, iteration: int, *, run: dict[str, Any] | None) -> None:
    """Write under a temporary name, then take the real one, then point the tracker at it."""
    path = Path(directory) / f"iter_{iteration:07d}"
    temporary = path.with_name(path.name + ".tmp")

    def make_room() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        if run is not None:
            (temporary / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
        replaced = _set_aside(path)  # of a run that was killed before the tracker, or of one that is done again
        os.rename(temporary, path)
        write_whole(Path(directory) / TRACKER, str(iteration))
        shutil.rmtree(replaced, ignore_errors=True)

    on_first_rank(make_room, directory)
    # Shards are written by forked children that report to this process; the queue that megatron-core would make for
    # results lives in a process of its own, which takes seconds to start and outlives a kill -9 of this one.
    filesystem_async._results_queue = queue.Queue()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist_checkpointing.save(state, str(temporary), ("torch_dist", 1))
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _REFUSED_WRITES):
            raise
        raise ValueError(f"--save {temporary}: cannot be written ({_reason(error)})") from error
    dist.barrier()
    on_first_rank(publish, directory)


def _read(state: dict[str, Any], path: Path, *, flag: str) -> dict[str, Any]:
    """The requested state. ValueError where the checkpoint lacks some of it, or holds other weights beside it."""
    handling = dist_checkpointing.validation.StrictHandling.RETURN_ALL
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, beside, lacking = dist_checkpointing.load(state, str(path), strict=handling)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{flag} {path}: does not fit this model ({_reason(error)})") from error
    # A checkpoint with an LM head of its own is not that of a tied model. A run's other state may stay where it is.
    beside = {key for key in beside if key != _RNG and "optimizer." not in key}
    for what, keys in (("it lacks", lacking), ("it also holds", beside)):
        if keys:
            raise ValueError(f"{flag} {path}: does not fit this model ({what} {', '.join(sorted(keys))[:300]})")
    return state


def _prepare(directory: Path) -> None:
    """The directory, writable and without the remains of a run that was killed.

    Where it was killed while its checkpoint took the place of one that the tracker names, that one comes back.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()
    with contextlib.suppress(ValueError):  # there is none yet
        _, newest = newest_checkpoint(str(directory), flag="--save")
        if not newest.exists() and _aside(newest).exists():
            os.rename(_aside(newest), newest)
    for remains in directory.glob("iter_*.tmp"):
        shutil.rmtree(remains, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to go, if it exists: a kill halfway leaves no half of one under its name."""
    aside = _aside(path)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return aside


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old.tmp")


def _remove_older(directory: Path, iteration: int, retain: int) -> None:
    """Keep `retain` checkpoints up to this iteration."""
    complete = {int(path.name[5:]): path for path in directory.glob("iter_*") if path.name[5:].isdigit()}
    for number in sorted(number for number in complete if number <= iteration)[:-retain]:
        shutil.rmtree(_set_aside(complete[number]), ignore_errors=True)


def _init_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """What SGD has after its first step, for a checkpoint to be read into; megatron-core does this for Adam only."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _rng_state() -> dict[str, Any]:
    """Every generator that dropout or an initialisation could draw from."""
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _reason(error: BaseException) -> str:
    """An error in one line; torch's CheckpointException, no Exception, wraps those of the ranks."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split())[:300] or type(error).__name__
