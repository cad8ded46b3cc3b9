"""torchrun (or Slurm) environment -> torch.distributed -> Megatron's process groups, in one context manager.

Everything else gets the groups handed in (`Groups`) and never asks a global for them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_simct.config import ParallelConfig
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.environment import Environment

with megatron_imports():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one rank, its place in them, and its device."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    """Data-parallel ranks that share the experts among them."""
    expert_dp: dist.ProcessGroup
    """Data-parallel ranks that have the same experts."""
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head, and so the loss."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def is_first_rank(self) -> bool:
        """The one rank that writes logs and metrics."""
        return dist.get_rank() == 0

    @property
    def meets_teacher(self) -> bool:
        """One rank of each model replica, where the loss is: it speaks for the replica with what scores its samples."""
        return self.tp_rank == 0 and self.is_last_stage

    @property
    def writes_samples(self) -> bool:
        """One rank of each model replica: it writes what belongs to that replica's samples."""
        return self.tp_rank == 0 and self.is_first_stage


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """ValueError, naming the flag, where the layout is impossible or not supported by this version."""
    if parallel.context_parallel_size != 1:
        raise ValueError(f"--context-parallel-size {parallel.context_parallel_size}: this version supports 1")
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep = parallel.expert_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    sizes = {
        "--tensor-model-parallel-size": tp,
        "--pipeline-model-parallel-size": pp,
        "--num-virtual-stages-per-pipeline-rank": virtual,
        "--expert-model-parallel-size": ep,
    }
    for flag, size in sizes.items():
        if size < 1:
            raise ValueError(f"{flag} {size}: must be at least 1")
    if world_size % (tp * pp):
        raise ValueError(
            f"world size ({world_size}) must be a multiple of --tensor-model-parallel-size ({tp}) x "
            f"--pipeline-model-parallel-size ({pp}) = {tp * pp}; start {tp * pp * max(1, world_size // (tp * pp))} "
            "processes or change the flags"
        )
    if world_size // (tp * pp) % ep:
        raise ValueError(
            f"--expert-model-parallel-size {ep} must divide the data-parallel size ({world_size // (tp * pp)}: world "
            f"size ({world_size}) / (--tensor-model-parallel-size x --pipeline-model-parallel-size) ({tp * pp})); "
            "data-parallel ranks share the experts"
        )
    if virtual > 1 and pp == 1:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} interleaves pipeline stages, and "
            "--pipeline-model-parallel-size is 1; leave it out or raise the size"
        )
    if parallel.sequence_parallel and tp == 1:
        raise ValueError(
            "--sequence-parallel splits sequences over the tensor-parallel ranks, and --tensor-model-parallel-size is "
            "1; leave it out or raise the size"
        )


def check_restarts(world_size: int) -> None:
    """ValueError where processes that torchrun starts again would look for each other where those before them were."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if world_size > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts}: processes that are started again would wait for those that have "
            "ended; use --rdzv-backend c10d and export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, *, seed: int) -> Iterator[Groups]:
    """Join the job, build Megatron's groups, seed every generator; leave all of it on exit.

    NCCL where CUDA is available, else gloo with the CPU patches of `parallel.cpu`.
    """
    environment = Environment.read()
    check_layout(parallel, environment.world_size)
    check_restarts(environment.world_size)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    joined_here = not dist.is_initialized()
    if joined_here:
        alone = environment.world_size == 1 and "MASTER_ADDR" not in os.environ
        dist.init_process_group(
            backend="gloo" if on_cpu else "nccl",
            rank=environment.rank,
            world_size=environment.world_size,
            store=dist.HashStore() if alone else None,
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
        )
    try:
        yield build_groups(parallel, seed=seed, device=device)
    finally:
        parallel_state.destroy_model_parallel()
        if joined_here:
            dist.destroy_process_group()


def build_groups(parallel: ParallelConfig, *, seed: int, device: torch.device) -> Groups:
    """Megatron's groups for this layout and its seeds, on an initialised torch.distributed."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )
    pp = parallel_state.get_pipeline_model_parallel_group()
    seed += 100 * pp.rank()  # stages draw different weights
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_parallel_cuda_manual_seed(seed)
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=pp,
        dp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        device=device,
    )
