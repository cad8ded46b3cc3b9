"""Checkpoints in Megatron's torch_dist format: written and read by shards, loadable under another layout.

DIR/latest_checkpointed_iteration.txt      the number of the newest complete checkpoint
DIR/iter_0000100/                          one checkpoint, with run.json: the run it belongs to, as readable
                                           form, and the hashes of all files (`integrity`)
DIR/iter_0000120.HOST.PID.tmp/             one that was being written when its run was killed
DIR/iter_0000080.old.tmp/                  one that was being removed, or replaced
DIR/.owner.1.lock                          the run that writes here (`ownership`)

A checkpoint gets its name when it is complete, and the tracker is replaced after that: a kill at any moment
leaves the previous one in use. Weights lie under the names of the model's parameters, whether or not a run's
other state lies beside them, so that --pretrained-checkpoint reads both kinds.

A run resumes from weights, optimizer, schedule, iteration and the random state of every rank. Prompts and
sampling have no state: they are functions of the iteration (`data.prompts`, `rollout.sampling`). With
--rollout-oversample a checkpoint also has carried_over.json: the prompts and responses that were begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import megatron_simct
from megatron_simct.config.options import LoraConfig
from megatron_simct.files import FileHash, hash_file, owner_tag, write_whole
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, padded_vocab_size
from megatron_simct.models.families import Architecture
from megatron_simct.models.lora import MARK
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.disk import check_all_wrote, on_first_rank
from megatron_simct.parallel.initialize import Groups
from megatron_simct.update.distributed_state import is_distributed, load_state, parts_of, sharded_state
from megatron_simct.update.integrity import RUN_FILE, Damaged, read_run_file, sealed, verify
from megatron_simct.update.torch_dist import (
    OWN_WRITER,
    BackgroundWrite,
    HashingStrategy,
    Unreadable,
    load,
    read_metadata,
    without_crc32,
)

with megatron_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

TRACKER = "latest_checkpointed_iteration.txt"

_REFUSED_WRITES = ("basic_ios", "iostream", "PytorchStreamWriter")
"""Parts of the RuntimeError of torch.save on a full disk."""
_IDENTITY_FLAGS = {
    "model": "--hf-checkpoint",
    "tokenizer": "--tokenizer-model and --stop-token-ids",
    "teacher_tokenizer": "--teacher-tokenizer-model and --teacher-stop-token-ids, or --teachers",
    "alignment_map": "--tokenizer-model and --teacher-tokenizer-model, or --teachers",
    "interface": "--teachers and --simct-interface",
    "adapters": "--lora-rank, --lora-alpha, --lora-target-modules and the weights of --hf-checkpoint",
    "start": "--reference-kl-weight and the weights of --hf-checkpoint or --pretrained-checkpoint",
}
"""The parts of a run's identity, and the flags of each."""

_RNG = "rng_state"
_CARRIED_OVER = "carried_over.json"
_AVERAGE = "teacher_average"
_OTHER_STATE = (_RNG, _AVERAGE, "rerun_state_machine_state")
"""Prefixes of keys that are neither weights nor optimizer, in Megatron-LM's checkpoints too."""
_EXTRA_STATE = "_extra_state"
"""Suffix of the keys of TransformerEngine's FP8 state, which layers of torch's operations do not have."""
_RELEASE = "release"
"""Megatron's converters write this instead of an iteration: the folder of weights that no run has trained."""


class Average(Protocol):
    """Weights beside the model's that a run needs to go on (teacher/average.py)."""

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class CarriedOver(Protocol):
    """Responses that were begun and are not trained on yet (rollout/oversampling.py)."""

    def begin_at(self, step: int) -> None: ...

    def state(self) -> bytes: ...

    def load(self, data: bytes) -> None: ...


class Checkpoints:
    """Saves and restores the whole state of a run. Every method is collective over the whole job."""

    def __init__(
        self,
        model: HiddenStateModel | InterleavedModel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        dp: dist.ProcessGroup,
        writes_in_parallel: bool,
        reads_in_parallel: bool,
        in_background: bool,
        before_reading_weights: Callable[[], None],
        save_dir: str | None,
        retain: int | None,
        identity: dict[str, Any],
        config: dict[str, Any],
        average: Average | None = None,
        carried_over: CarriedOver | None = None,
    ) -> None:
        """dp: ranks with the same weights, each of which writes or reads a share of them, if
        that is configured.

        in_background: `save` returns once it has a copy of all that is written; `finish` waits for the
        rest. before_reading_weights: brings them up to date. retain: checkpoints to keep, None for all.
        identity: a JSON value for each of _IDENTITY_FLAGS; a checkpoint with another one is refused. config:
        every option by its key. average: of the teacher's weights, if they follow the student's.
        carried_over: responses that steps carry over. ValueError where save_dir cannot be written.
        """
        self._model = model
        self._average, self._carried_over = average, carried_over
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._validated: set[bool] = set()
        """Whether states with and without an optimizer were found to be whole, over all ranks."""
        self._writers = dp if writes_in_parallel else None
        self._readers = dp if reads_in_parallel else None
        self._in_background = in_background
        self._before_reading_weights = before_reading_weights
        self._pending: Write | None = None
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
        self.finish()
        run = {"world_size": dist.get_world_size(), "identity": self._identity, "config": self._config}
        self._before_reading_weights()
        self._pending = Write(
            self._state(iteration, is_loading=False),
            self._save_dir,
            iteration,
            run=run,
            beside={} if self._carried_over is None else {_CARRIED_OVER: self._carried_over.state()},
            among=self._writers,
            in_background=self._in_background,
            validated=(iteration > 0) in self._validated,
        )
        self._validated.add(iteration > 0)
        self._saved = iteration
        if not self._in_background:
            self.finish()

    def finish(self, *, wait: bool = True) -> None:
        """Rename the checkpoint that is being written to its name. Without `wait`, only if all ranks have
        written their files.
        """
        if self._pending is None or not (wait or self._pending.has_ended()):
            return
        pending, self._pending = self._pending, None
        pending.finish()
        folder, retain = pending.directory, self._retain
        if retain is not None:
            on_first_rank(lambda: _remove_older(Path(folder), pending.iteration, retain), folder)

    def resume(
        self, directory: str, *, step: int | None = None, verified: bool = True
    ) -> tuple[int, dict[str, tuple[Any, Any]]]:
        """Restore the newest checkpoint of the directory; its iteration, and the options that
        differ (its, ours).

        step: that iteration instead. verified: see `check`. Raises ValueError, naming the flag and the
        directory, if there is none, or if it holds weights only, is damaged, or belongs to another model,
        tokenizer or alignment map.
        """
        iteration, path = (
            newest_checkpoint(directory, flag="--load") if step is None else _of_step(directory, step)
        )
        found = Found(directory=directory, path=path, flag="--load")
        if verified:
            check(found)
        try:
            run, _ = read_run_file(path)
        except OSError:
            run = {}
        except Damaged as damage:
            raise ValueError(f"--load {path}: damaged: {damage}") from None
        if not run.keys() >= {"identity", "config", "world_size"}:
            raise ValueError(
                f"--load {path}: {RUN_FILE} is missing or holds weights alone, so it cannot be "
                f"resumed from; --pretrained-checkpoint {directory} starts a new run from its weights"
            )
        self._check_identity(run["identity"], path, directory)
        self._restore_carried_over(path, iteration)
        same_layout = run["world_size"] == dist.get_world_size() and all(
            run["config"].get(key) == value
            for key, value in self._config.items()
            if key.endswith("_parallel_size")
        )
        rng = None
        if same_layout:
            rng = "tensors" if _has_rng_tensors(path) else "object"
        state = _read(self._state(iteration, is_loading=True, rng=rng), found, among=self._readers)
        self._restore(state, iteration)
        is_own = self._save_dir is not None and Path(directory).resolve() == Path(self._save_dir).resolve()
        if is_own and iteration == newest_checkpoint(directory, flag="--load")[0]:
            self._saved = iteration
        ours = json.loads(json.dumps(self._config))
        return iteration, {
            key: (run["config"].get(key), value)
            for key, value in ours.items()
            if run["config"].get(key) != value
        }

    def _state(self, iteration: int, *, is_loading: bool, rng: str | None = "tensors") -> dict[str, Any]:
        """What is saved, or requested. Before its first step an optimizer has no state.

        rng: the form of the random state there: "tensors", "object" (of earlier versions),
        or None to skip it.
        """
        model = self._model.sharded_state_dict()
        state: dict[str, Any] = {"model": _trained(model)}
        if iteration > 0:
            if is_distributed(self._optimizer):
                state["optimizer"] = sharded_state(self._optimizer, model, is_loading=is_loading)
            else:
                for optimizer in parts_of(self._optimizer):
                    optimizer.init_state_fn = optimizer.init_state_fn or _init_momentum
                state["optimizer"] = self._optimizer.sharded_state_dict(model, is_loading=is_loading)
            state["scheduler"] = self._scheduler.state_dict()
        if self._average is not None:
            state[_AVERAGE] = self._average.sharded_state_dict(f"{_AVERAGE}.")
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if rng == "tensors":
            state[_RNG] = {
                name: ShardedTensor.from_rank_offsets(f"{_RNG}.{name}", value, (0, rank, world_size))
                for name, value in _rng_state().items()
            }
        elif rng == "object":
            state[_RNG] = ShardedObject(_RNG, None, (world_size,), (rank,), replica_id=0)
        return state

    def _restore(self, state: dict[str, Any], iteration: int) -> None:
        _load(self._model, state["model"])
        if self._average is not None:
            self._average.load(state[_AVERAGE])
        if iteration > 0:
            # Options come from the command line, state from the checkpoint.
            wanted = [
                {k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups
            ]
            if is_distributed(self._optimizer):
                load_state(self._optimizer, state["optimizer"])
            else:
                _keep_schedule(state["optimizer"], wanted)
                self._optimizer.load_state_dict(state["optimizer"])
            for group, ours in zip(self._optimizer.param_groups, wanted, strict=True):
                group.update(ours)
            self._scheduler.load_state_dict(state["scheduler"])
        if _RNG in state:
            _set_rng_state(state[_RNG])

    def _restore_carried_over(self, path: Path, iteration: int) -> None:
        file = path / _CARRIED_OVER
        if self._carried_over is None:
            if file.exists():
                raise ValueError(
                    f"--load {path}: the checkpoint carries unfinished responses over; resume it with "
                    "--rollout-oversample"
                )
        elif not file.exists():
            self._carried_over.begin_at(iteration)
        else:
            try:
                self._carried_over.load(file.read_bytes())
            except (OSError, LookupError, TypeError) as error:
                raise ValueError(f"--load {file}: cannot be read ({_reason(error)})") from None

    def _check_identity(self, theirs: dict[str, Any], path: Path, directory: str) -> None:
        for part, flag in _IDENTITY_FLAGS.items():
            its, ours = theirs.get(part), self._identity.get(part)
            if its == ours or (part == "start" and ours is None):  # only --reference-kl-weight reads it again
                continue
            if isinstance(its, dict) and isinstance(ours, dict):
                details = ", ".join(
                    f"{k} {its.get(k)} there, {v} here" for k, v in ours.items() if its.get(k) != v
                )
            else:
                details = f"{str(its)[:12]} there, {str(ours)[:12]} here"
            raise ValueError(
                f"--load {path}: its {part.replace('_', ' ')} is not that of {flag} ({details}); "
                f"--pretrained-checkpoint {directory} starts a new run from its weights"
            )


def has_checkpoint(directory: str) -> bool:
    """Whether the directory has or had a complete checkpoint."""
    return (Path(directory) / TRACKER).exists()


def saved_options(directory: str) -> dict[str, Any]:
    """Every option of the run that wrote DIR's newest checkpoint, by its key; empty if
    there is none to resume.
    """
    try:
        _, path = newest_checkpoint(directory, flag="--load")
        options: dict[str, Any] = json.loads((path / RUN_FILE).read_text())["config"]
    except (OSError, ValueError, LookupError, TypeError):  # `resume` reports the error
        return {}
    return options if isinstance(options, dict) else {}


def save_weights(model: HiddenStateModel | InterleavedModel, directory: str, iteration: int) -> None:
    """A checkpoint of weights alone, for --pretrained-checkpoint. Collective over the whole job."""
    on_first_rank(lambda: _prepare(Path(directory)), directory)
    Write(model.sharded_state_dict(), directory, iteration, run={}).finish()


def load_weights(
    model: HiddenStateModel | InterleavedModel,
    directory: str,
    *,
    flag: str,
    verified: bool = True,
    among: dist.ProcessGroup | None = None,
) -> int:
    """Load the weights of DIR's newest checkpoint; returns its iteration. Collective over the whole job.

    verified: see `check`. among: ranks with the same weights, which read a share each. Raises ValueError,
    naming the flag and the directory, if there is none, or if it is damaged or belongs to another model.
    """
    iteration, path = newest_checkpoint(directory, flag=flag)
    found = Found(directory=directory, path=path, flag=flag)
    if verified:
        check(found)
    wanted = _trained(model.sharded_state_dict())
    if saved_lora(path) is not None and not any(MARK in name for name in wanted):
        raise ValueError(
            f"{flag} {directory}: holds the adapters of a run with --lora-rank and no weights; merge them "
            "first (convert_checkpoint.py megatron-to-hf)"
        )
    _load(model, _read({"model": wanted}, found, among=among, weights_only=True)["model"])
    return iteration


def _trained(model: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's state that a checkpoint holds: only its adapters, if it has any."""
    adapters = {name: value for name, value in model.items() if MARK in name}
    return adapters or model


def _load(model: HiddenStateModel | InterleavedModel, state: dict[str, Any]) -> None:
    # Missing weights were detected when the state was read. The extra state of TransformerEngine's modules
    # may be missing: it is for FP8.
    result = model.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith(_EXTRA_STATE)]
    assert not missing or any(MARK in name for name in state), missing


def saved_lora(path: Path) -> SavedLora | None:
    """The adapters that a checkpoint holds; None if it holds a model's weights."""
    try:
        run, _ = read_run_file(path)
        options, adapters = run.get("config", {}), run["identity"]["adapters"]
        lora = LoraConfig(
            rank=options["lora_rank"],
            alpha=options["lora_alpha"],
            target_modules=tuple(options["lora_target_modules"]),
        )
        return SavedLora(lora=lora, base=adapters["base"])
    except (OSError, Damaged, LookupError, TypeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLora:
    """The adapters of a checkpoint."""

    lora: LoraConfig
    base: str | None
    """Fingerprint of the base weights; None: random ones."""


def load_output_shard(
    architecture: Architecture,
    directory: str,
    *,
    groups: Groups,
    divisible_by: int,
    dtype: torch.dtype,
    flag: str,
    verified: bool = True,
) -> torch.Tensor:
    """This rank's rows [W, H] of the LM head in DIR's newest checkpoint, and nothing else of it.

    Collective over the whole job. ValueError as load_weights.
    """
    _, path = newest_checkpoint(directory, flag=flag)
    if verified:
        check(Found(directory=directory, path=path, flag=flag))
    width = padded_vocab_size(architecture.vocab_size, divisible_by=divisible_by, tp_size=groups.tp_size)
    key = "embedding.word_embeddings.weight" if architecture.tied_embeddings else "output_layer.weight"
    rows = torch.zeros(width // groups.tp_size, architecture.hidden_size, dtype=dtype)
    wanted = ShardedTensor.from_rank_offsets(
        key,
        rows,
        (0, groups.tp_rank, groups.tp_size),
        replica_id=(int(not groups.is_last_stage), 0, groups.dp_cp.rank()),
        allow_shape_mismatch=True,  # the padding depends on the layout that wrote it
    )
    try:
        return load({key: wanted}, path, weights_only=True)[key]
    except Unreadable as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{flag} {path}: does not fit this model ({_reason(error)})") from error


def stored_dtype(directory: str, *, flag: str) -> torch.dtype:
    """Type of the weights in DIR's newest checkpoint; float32 if they are mixed.

    Raises ValueError as load_weights.
    """
    _, path = newest_checkpoint(directory, flag=flag)
    try:
        metadata = read_metadata(path).state_dict_metadata
    except Unreadable as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    found = {
        entry.properties.dtype
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and name.endswith(("weight", "bias"))
        and "optimizer." not in name
        and not name.startswith(_OTHER_STATE)
    }
    return found.pop() if len(found) == 1 else torch.float32


# Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint and the flag that names it."""

    directory: str
    path: Path
    flag: str


def check(found: Found) -> None:
    """Verify each file of a checkpoint once a job, and print the time. Collective over the whole job.

    Raises ValueError on every rank if a file has changed; the error names it, and the newest older checkpoint
    that is intact. Checkpoints of earlier versions have no hashes: a line reports that.
    """
    if not _agreed(found.path.is_dir()) or found.path in _CHECKED:
        return  # a missing one is an error of the reader
    verdict = verify(found.path)
    if verdict is None:
        _say(
            f" {found.flag} {found.path}: has no hashes, which earlier versions did not write: it is not "
            "verified"
        )
    elif verdict.damage is None:
        _say(f" {found.flag} {found.path}: {verdict}")
    else:
        raise ValueError(
            f"{found.flag} {found.path}: damaged: {verdict.damage}; {_way_out(found, verdict.damage)}"
        )
    _CHECKED.add(found.path)


_CHECKED: set[Path] = set()
"""Checkpoints that this process has verified, and not written since."""


def numbered(directory: str) -> dict[int, Path]:
    """The checkpoints of a directory by iteration."""
    paths = Path(directory).glob("iter_*")
    return dict(sorted((int(path.name[5:]), path) for path in paths if path.name[5:].isdecimal()))


def _way_out(found: Found, damage: str) -> str:
    """The remedy for a damaged checkpoint, as text. Collective over the whole job."""
    damaged = 0 if found.path.name == _RELEASE else int(found.path.name[5:])
    for iteration, path in reversed(_agreed(numbered(found.directory)).items()):
        verdict = verify(path) if iteration < damaged else None
        if verdict is not None and verdict.damage is None:
            remedy = f"add --ckpt-step {iteration}"
            if found.flag != "--load":
                remedy = f"echo {iteration} > {Path(found.directory) / TRACKER}"
            return f"the newest whole one is that of iteration {iteration}: {remedy}"
    if damage.startswith(RUN_FILE) and found.flag == "--load":
        remedy = (
            f"--pretrained-checkpoint {found.directory} --no-verify-checkpoint starts a new run from its "
            "weights"
        )
    else:
        remedy = "--no-verify-checkpoint loads it nevertheless"
    return f"no older one is known to be whole; {remedy}"


def _agreed(value: Any) -> Any:
    """The first rank's value on every rank. Collective over the whole job."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _of_step(directory: str, step: int) -> tuple[int, Path]:
    known = numbered(directory)
    if step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise ValueError(f"--ckpt-step {step}: no such checkpoint in --load {directory}; there are: {there}")
    return step, known[step]


def newest_checkpoint(directory: str, *, flag: str) -> tuple[int, Path]:
    """The iteration and the folder of the newest checkpoint. Raises ValueError, naming the
    flag, if there is none.
    """
    try:
        named = (Path(directory) / TRACKER).read_text().strip()
        if named == _RELEASE:
            return 0, Path(directory) / _RELEASE
        iteration = int(named)
    except (OSError, ValueError):
        raise ValueError(
            f"{flag} {directory}: no checkpoint there ({TRACKER} is missing or not a number)"
        ) from None
    return iteration, Path(directory) / f"iter_{iteration:07d}"


class Write:
    """A checkpoint that is being written, under a temporary name. `finish` renames it and then
    updates the tracker.
    """

    def __init__(
        self,
        state: dict[str, Any],
        directory: str,
        iteration: int,
        *,
        run: dict[str, Any],
        beside: Mapping[str, bytes] = MappingProxyType({}),
        among: dist.ProcessGroup | None = None,
        in_background: bool = False,
        validated: bool = False,
    ) -> None:
        """Write, or begin to. All methods are collective over the whole job.

        beside: files that the first rank writes, by name. among: ranks with equal state, each of which writes
        a share; None: the first of them writes all. validated: a state of the same shards was written before;
        without, every rank gets a list of all ranks' shards to check that each is written once.
        """
        self.directory, self.iteration = directory, iteration
        self._run, self._beside = run, beside
        self._path = Path(directory) / f"iter_{iteration:07d}"
        self._temporary = self._path.with_name(f"{self._path.name}.{_agreed(owner_tag())}.tmp")
        self._strategy = HashingStrategy(in_background=in_background)
        self._background: BackgroundWrite | None = None
        shares = among is not None and among.size() > 1
        strategy = FullyParallelSaveStrategyWrapper(self._strategy, among) if shares else self._strategy
        on_first_rank(self._make_room, directory)
        # Shards are written by threads or forked children that report to this process; the queue that
        # megatron-core would make for results lives in a process of its own, which takes seconds to start and
        # outlives a kill -9 of this one.
        filesystem_async._results_queue = queue.Queue()
        with self._refused(), warnings.catch_warnings(), without_crc32():
            warnings.simplefilter("ignore")
            request = dist_checkpointing.save(
                state,
                str(self._temporary),
                strategy,
                validate_access_integrity=not validated,
                async_sharded_save=in_background,
                **OWN_WRITER,
            )
            if in_background:
                self._background = BackgroundWrite(request)

    def has_ended(self) -> bool:
        """Whether every rank has written its files."""
        ended = torch.tensor(
            int(self._background is None or self._background.has_ended), device=self._device()
        )
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        return bool(ended)

    def finish(self) -> None:
        """Wait for the files, then rename the checkpoint and update the tracker."""
        if self._background is not None:
            with self._refused():
                self._background.finish()
        check_all_wrote(self._strategy.refused, self.directory)
        parts: list[dict[str, FileHash]] = [{}] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(self._strategy.hashes, parts or None, dst=0)
        on_first_rank(lambda: self._publish(parts), self.directory)

    def _make_room(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _publish(self, parts: Sequence[dict[str, FileHash]]) -> None:
        for name, data in self._beside.items():
            (self._temporary / name).write_bytes(data)
        hashes = {name: value for part in parts for name, value in part.items()}
        others = {file.name: hash_file(file) for file in self._temporary.iterdir() if file.name not in hashes}
        content = {"iteration": self.iteration, "versions": _versions(), **self._run}
        (self._temporary / RUN_FILE).write_bytes(sealed(content, hashes | others))
        # of a run that was killed before the tracker, or of one that is done again
        replaced = _set_aside(self._path)
        os.rename(self._temporary, self._path)
        _CHECKED.discard(self._path)
        write_whole(Path(self.directory) / TRACKER, str(self.iteration))
        shutil.rmtree(replaced, ignore_errors=True)

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        """Turns errors of the disk into a ValueError of one line."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _REFUSED_WRITES):
                raise
            raise ValueError(f"--save {self._temporary}: cannot be written ({_reason(error)})") from error

    @staticmethod
    def _device() -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )


def _versions() -> dict[str, str]:
    return {
        "megatron_simct": megatron_simct.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "numpy")},
    }


def _read(
    state: dict[str, Any], found: Found, *, among: dist.ProcessGroup | None = None, weights_only: bool = False
) -> dict[str, Any]:
    """The requested state. Raises ValueError if the checkpoint lacks some of it, or holds additional weights.

    among: ranks that read a share each. weights_only: values that are not tensors are not read.
    """
    where = f"{found.flag} {found.path}"
    handling = dist_checkpointing.validation.StrictHandling.RETURN_ALL
    begin = time.perf_counter()
    try:
        state, beside, lacking = load(
            state, found.path, among=among, weights_only=weights_only, strict=handling
        )
    except Unreadable as error:
        raise ValueError(f"{where}: {error}") from None
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{where}: does not fit this model ({_reason(error)})") from error
    # A checkpoint with an LM head of its own is not one of a tied model. Other state of a run may be left
    # unread.
    beside = {key for key in beside if not key.startswith(_OTHER_STATE) and "optimizer." not in key}
    beside, lacking = ({key for key in keys if not key.endswith(_EXTRA_STATE)} for keys in (beside, lacking))
    for what, keys in (("it lacks", lacking), ("it also holds", beside)):
        if keys:
            raise ValueError(f"{where}: does not fit this model ({what} {', '.join(sorted(keys))[:300]})")
    _say(f" {where}: read in {time.perf_counter() - begin:.2f} s")
    return state


def _prepare(directory: Path) -> None:
    """Make the directory, check that it is writable, and remove the remains of a killed run.

    If the run was killed while it replaced the checkpoint that the tracker names, the old one is restored.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".writable.{owner_tag()}"
    probe.touch()
    probe.unlink()
    with contextlib.suppress(ValueError):  # there is no checkpoint yet
        _, newest = newest_checkpoint(str(directory), flag="--save")
        if not newest.exists() and _aside(newest).exists():
            os.rename(_aside(newest), newest)
    for remains in directory.glob("iter_*.tmp"):
        shutil.rmtree(remains, ignore_errors=True)
    for remains in directory.glob(f"{TRACKER}.*.tmp"):
        remains.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before it is removed, so that a kill leaves no incomplete one under its name."""
    aside = _aside(path)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return aside


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old.tmp")


def _remove_older(directory: Path, iteration: int, retain: int) -> None:
    """Keep `retain` checkpoints up to this iteration."""
    complete = numbered(str(directory))
    for number in sorted(number for number in complete if number <= iteration)[:-retain]:
        shutil.rmtree(_set_aside(complete[number]), ignore_errors=True)


_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What makes a parameter group of megatron-core another group than the next one."""
_SCHEDULE_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")
"""Options of a group. megatron-core 0.19 finds a loaded group by these too: another --lr would find none."""


def _keep_schedule(state: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Write the command line's schedule into the loaded parameter groups, in place.

    state: as an optimizer loads it; that of a chained optimizer holds several. groups: the optimizer's own.
    """
    ours = {tuple(group.get(key) for key in _GROUP_KEYS): group for group in groups}
    parts = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    for name, part in parts:
        if name == "param_groups":
            for group in part:
                own = ours.get(tuple(group.get(key) for key in _GROUP_KEYS), {})
                group.update({key: own[key] for key in _SCHEDULE_KEYS if key in group and key in own})
        elif name != "state" and isinstance(part, (dict, list)):
            _keep_schedule(part, groups)


def _init_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Create the state that SGD has after its first step, so that a checkpoint can be read into it;
    megatron-core does this for Adam only.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _rng_state() -> dict[str, torch.Tensor]:
    """Every generator that dropout or an initialisation could draw from, as bytes on the host."""
    states = {f"tracker.{name}": value for name, value in get_cuda_rng_tracker().get_states().items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: value.cpu() for name, value in states.items()}


def _set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of `_rng_state`, or that of an earlier version, with a
    dictionary of tracker states.
    """
    tracker = {
        name.removeprefix("tracker."): value for name, value in state.items() if name.startswith("tracker.")
    }
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(tracker or state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _has_rng_tensors(path: Path) -> bool:
    try:
        return f"{_RNG}.torch" in read_metadata(path).state_dict_metadata
    except Unreadable as error:
        raise ValueError(f"--load {path}: {error}") from None


def _reason(error: BaseException) -> str:
    """An error in one line. torch's CheckpointException, a BaseException, wraps those of the ranks."""
    if isinstance(error, CheckpointException):
        if not error.failures:  # only the first rank has the list
            return "see the error of another rank"
        error, _ = next(iter(error.failures.values()))
    if "Weights only load failed" in str(error):
        return "it holds a pickle of more than numbers, which is not read"
    return " ".join(str(error).split())[:300] or type(error).__name__
