"""Weights in Megatron's torch_dist format: written and read by shards, loadable under another tensor-parallel size.

DIR/latest_checkpointed_iteration.txt      the number of the newest complete checkpoint
DIR/iter_0000100/                          one checkpoint
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core import dist_checkpointing

TRACKER = "latest_checkpointed_iteration.txt"


def save_weights(model: HiddenStateModel | InterleavedModel, directory: str, iteration: int) -> None:
    """Write DIR/iter_<iteration> and then point the tracker at it. Collective over the whole job.

    The tracker is replaced in one step after the checkpoint is complete, so a kill leaves the previous one in use.
    """
    path = Path(directory) / f"iter_{iteration:07d}"
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(model.sharded_state_dict(), str(path), ("torch_dist", 1))
    dist.barrier()
    if dist.get_rank() == 0:
        temporary = Path(directory) / (TRACKER + ".tmp")
        temporary.write_text(str(iteration))
        os.replace(temporary, Path(directory) / TRACKER)
    dist.barrier()


def load_weights(model: HiddenStateModel | InterleavedModel, directory: str, *, flag: str) -> int:
    """Load the newest checkpoint of DIR into the model; returns its iteration. Collective over the whole job.

    Raises ValueError, naming the flag and the directory, where there is none or it belongs to another model.
    """
    tracker = Path(directory) / TRACKER
    try:
        iteration = int(tracker.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{flag} {directory}: no checkpoint there ({TRACKER} is missing or not a number)") from None
    path = Path(directory) / f"iter_{iteration:07d}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Strict in both directions: a checkpoint with an LM head of its own is not that of a tied model.
            state = dist_checkpointing.load(
                model.sharded_state_dict(), str(path), strict=dist_checkpointing.validation.StrictHandling.RAISE_ALL
            )
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{flag} {path}: does not fit this model ({_reason(error)})") from error
    model.load_state_dict(state)
    return iteration


def _reason(error: BaseException) -> str:
    """An error in one line; torch's CheckpointException, no Exception, wraps those of the ranks."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split())[:300] or type(error).__name__
