"""torchrun (or Slurm) environment -> torch.distributed -> Megatron's process groups, in one context manager.

All other code gets the groups as an argument (`Groups`), never from a global.
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

from megatron_simct.config.environment import Environment
from megatron_simct.config.options import ParallelConfig, check_ranges
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.stopping import children_end_with_me

with megatron_imports():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of one rank, its ranks in them, and its device."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Ranks that have other samples."""
    cp: dist.ProcessGroup
    """Ranks that share the sequences of the student's update."""
    dp_cp: dist.ProcessGroup
    """The ranks of dp and cp together: ranks with the same weights."""
    tp_cp: dist.ProcessGroup
    """Ranks of one stage that have the same samples."""
    ep: dist.ProcessGroup
    """Ranks that share the experts among them."""
    expert_tp: dist.ProcessGroup
    """Ranks that share each expert."""
    expert_dp: dist.ProcessGroup
    """Ranks that have the same experts."""
    exchange: dist.ProcessGroup
    """The ranks of ep and expert_tp together: ranks that send each other tokens."""
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
    def cp_rank(self) -> int:
        return self.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.cp.size()

    @property
    def passes_together(self) -> bool:
        """Whether this rank shares experts with ranks that have other samples, so that all must
        run a layer together.
        """
        return self.exchange.size() > self.tp.size()

    @property
    def is_first_rank(self) -> bool:
        """The one rank that writes logs and metrics."""
        return dist.get_rank() == 0

    @property
    def owns_teacher_socket(self) -> bool:
        """Whether this rank connects its model replica to the other job: one rank of the last pipeline stage,
        where loss and answers are computed.
        """
        return self.tp_rank == 0 and self.cp_rank == 0 and self.is_last_stage

    @property
    def writes_samples(self) -> bool:
        """One rank of each model replica: it writes what belongs to that replica's samples."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.is_first_stage


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """ValueError, naming the flag, if the layout is impossible or not supported by this version."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    check_ranges(parallel)
    ranks = parallel.model_parallel_size
    if world_size % ranks:
        context = f" x --context-parallel-size ({cp})" if cp > 1 else ""
        raise ValueError(
            f"world size ({world_size}) must be a multiple of --tensor-model-parallel-size ({tp}) x "
            f"--pipeline-model-parallel-size ({pp}){context} = {ranks}; start "
            f"{ranks * max(1, world_size // ranks)} processes or change the flags"
        )
    if parallel.expert_tensor_parallel_size not in (None, tp):
        _check_expert_ranks(parallel, world_size)
    elif world_size // (tp * pp) % ep:
        raise ValueError(
            f"--expert-model-parallel-size {ep} must divide the data-parallel size "
            f"({world_size // (tp * pp)}: world size ({world_size}) / (--tensor-model-parallel-size x "
            f"--pipeline-model-parallel-size) ({tp * pp})); data-parallel ranks, and those of "
            "--context-parallel-size, share the experts"
        )
    if virtual > 1 and pp == 1:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} interleaves pipeline stages, and "
            "--pipeline-model-parallel-size is 1; leave it out or raise the size"
        )
    _check_stages(parallel)
    if parallel.sequence_parallel and tp == 1:
        raise ValueError(
            "--sequence-parallel splits sequences over the tensor-parallel ranks, and "
            "--tensor-model-parallel-size is 1; leave it out or raise the size"
        )


def _check_stages(parallel: ParallelConfig) -> None:
    """Raises ValueError if layers are given for stages that do not exist, or given twice."""
    given = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
        "--pipeline-model-parallel-layout": parallel.pipeline_model_parallel_layout,
    }
    flags = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    if flags and parallel.pipeline_model_parallel_size == 1:
        raise ValueError(f"{flags[0]}: --pipeline-model-parallel-size is 1; leave it out or raise the size")
    if parallel.pipeline_model_parallel_layout is not None and len(flags) > 1:
        raise ValueError(
            f"{flags[0]}: --pipeline-model-parallel-layout sets it already; leave one of them out"
        )
    if (
        flags
        and parallel.pipeline_model_parallel_layout is None
        and parallel.num_virtual_stages_per_pipeline_rank > 1
    ):
        raise ValueError(
            f"{flags[0]}: with --num-virtual-stages-per-pipeline-rank give it as "
            "--pipeline-model-parallel-layout"
        )


def _check_expert_ranks(parallel: ParallelConfig, world_size: int) -> None:
    """Raises ValueError if the ranks of a stage cannot be divided by the layout of the experts."""
    ranks, tp = parallel.expert_tp * parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    flags = (
        f"--expert-tensor-parallel-size ({parallel.expert_tp}) x --expert-model-parallel-size "
        f"({parallel.expert_model_parallel_size}) = {ranks}"
    )
    of_stage = world_size // parallel.pipeline_model_parallel_size
    if of_stage % ranks:
        raise ValueError(f"{flags} must divide the ranks of a pipeline stage ({of_stage})")
    if ranks % tp and tp % ranks:
        raise ValueError(f"{flags} must divide --tensor-model-parallel-size ({tp}), or be a multiple of it")


def check_restarts(world_size: int) -> None:
    """Raises ValueError if processes that torchrun restarts would meet at the address
    of those before them.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if world_size > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts}: processes that are started again would wait for those that "
            "have ended; use --rdzv-backend c10d and export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before "
            "torchrun"
        )


@contextlib.contextmanager
def process_groups(
    parallel: ParallelConfig, *, seed: int, bf16: bool = False, deterministic: bool = False
) -> Iterator[Groups]:
    """Join the job, build Megatron's groups, seed every generator; leave all of it on exit.

    deterministic: every run of one layout computes the same numbers, or fails if torch has no deterministic
    operation. NCCL where CUDA is available, else gloo with the CPU patches of `parallel.cpu`. Raises
    ValueError if the layout is impossible, or if the device has no `bf16`.
    """
    environment = Environment.read()
    check_layout(parallel, environment.world_size)
    check_restarts(environment.world_size)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and bf16:
        raise ValueError("--bf16 needs a GPU in this version; leave it out on CPU")
    if on_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    if deterministic:
        make_deterministic()
    joined_here = not dist.is_initialized()
    if joined_here:
        alone = environment.world_size == 1 and "MASTER_ADDR" not in os.environ
        dist.init_process_group(
            backend="gloo" if on_cpu else "nccl",
            rank=environment.rank,
            world_size=environment.world_size,
            store=dist.HashStore() if alone else None,
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
            device_id=None if on_cpu else device,  # NCCL connects now, and to this device
        )
    try:
        with children_end_with_me():
            yield build_groups(parallel, seed=seed, device=device)
    finally:
        parallel_state.destroy_model_parallel()
        if joined_here:
            dist.destroy_process_group()


def make_deterministic() -> None:
    """Make torch, NCCL and TransformerEngine deterministic, as far as they have options for it."""
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def shared_store() -> dist.Store | None:
    """The key-value store of the rendezvous; None for a job of one rank."""
    return dist.distributed_c10d._get_default_store() if dist.get_world_size() > 1 else None


def build_groups(parallel: ParallelConfig, *, seed: int, device: torch.device) -> Groups:
    """Megatron's groups for this layout and its seeds, on an initialised torch.distributed."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        # duplicates of the data-parallel groups, which this package does not use
        create_gloo_process_groups=False,
    )
    pp = parallel_state.get_pipeline_model_parallel_group()
    seed += 100 * pp.rank()  # stages must draw different weights
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_parallel_cuda_manual_seed(seed)
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=pp,
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        expert_tp=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        exchange=parallel_state.get_expert_tensor_and_model_parallel_group(),
        device=device,
    )
