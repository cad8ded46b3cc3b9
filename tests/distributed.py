"""Run a function on N gloo ranks that are forked from this process.

The parent imports torch and megatron-core once. A fork costs about 0.1 s a rank; a fresh interpreter costs
6-15 s. The workers use one thread each, because a thread pool does not survive a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # noqa: F401  the first optimizer of a process imports it, which costs a rank a second
import torch.distributed as dist

from megatron_simct.parallel.cpu import patch_megatron

patch_megatron()
torch.set_num_threads(1)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run function(rank, world_size, *args) on every rank of a fresh gloo world; the return values by rank.

    Return values are pickled. The first exception of a worker is raised here, with its rank and
    traceback, and the other workers are killed. Raises AssertionError after timeout_s seconds, naming the
    ranks that had not finished.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work,
                args=(rank, world_size, os.path.join(folder, "store"), sender, function, args),
            )
            worker.start()
            sender.close()
            workers.append(worker)
            pipes.append(receiver)
        try:
            return _collect(pipes, deadline=time.monotonic() + timeout_s)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)  # also the processes that it has started
                worker.join()


def _work(
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    try:
        # Code under test that reads torchrun's environment variables finds this world.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        sender.send_bytes(pickle.dumps(("value", function(rank, world_size, *args))))
        dist.barrier()
    except BaseException:
        sender.send_bytes(pickle.dumps(("error", traceback.format_exc())))


def _collect(pipes: list[Connection], *, deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in values]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        waiting = [rank for rank in range(len(pipes)) if rank not in values]
        assert ready, f"ranks {waiting} had not finished in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                # Nothing comes from outside: the sender is a fork of this process.
                outcome, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without an answer") from None
            if outcome == "error":
                raise AssertionError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            values[rank] = value
    return [values[rank] for rank in range(len(pipes))]
