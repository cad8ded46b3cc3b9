"""Megatron's DistributedDataParallel, optimizer and learning-rate schedule for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_simct.config.options import ParallelConfig, TrainingConfig, UpdateConfig
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def wrap_data_parallel(
    model: HiddenStateModel | InterleavedModel, parallel: ParallelConfig, update: UpdateConfig
) -> list[DistributedDataParallel]:
    """Each chunk with fp32 gradient buffers that are summed, not averaged, over data-parallel ranks.

    Gradients of experts are summed over the ranks that have the same ones. ValueError in a layout in which
    megatron-core does not train a mixture of experts.
    """
    overlap, tp_size = parallel.overlap_grad_reduce, model.config.tensor_model_parallel_size
    if model.config.num_moe_experts and tp_size > 1 and not model.config.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size}: training a mixture of experts needs "
            "--sequence-parallel with it"
        )
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        bucket_size=parallel.ddp_bucket_size,
        use_distributed_optimizer=update.use_distributed_optimizer,
        overlap_param_gather=update.overlap_param_gather,
    )
    chunks = []
    for index, chunk in enumerate(chunks_of(model)):
        # As in Megatron-LM: later chunks of an interleaved stage are reduced whole, behind other chunks'
        # work.
        ddp = DistributedDataParallel(
            model.config, options, chunk, disable_bucketing=not overlap or index > 0
        )
        ddp.broadcast_params()
        chunks.append(ddp)
    return chunks


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Bring the weights up to date on every rank, if --overlap-param-gather leaves that to
    the next forward pass.

    For code that reads them without a forward pass. Collective over the data-parallel groups; a second call
    has no effect.
    """
    for ddp in chunks:
        if ddp.ddp_config.overlap_param_gather:
            for bucket_group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                if bucket_group.param_gather_handle is not None or not bucket_group.param_gather_dispatched:
                    bucket_group.start_param_sync(force_sync=True)


def gather_weight(ddp: DistributedDataParallel, weight: torch.nn.Parameter) -> None:
    """The same for a weight that is read in a training step, but not by the forward pass of a module."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.param_to_bucket_group[weight].finish_param_sync()


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], training: TrainingConfig, update: UpdateConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer and its schedule, wired into the model's config as Megatron's schedules expect."""
    min_lr = min(training.min_lr, training.lr)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=training.optimizer,
            lr=training.lr,
            min_lr=min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad,
            bf16=training.bf16,
            params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
            use_distributed_optimizer=update.use_distributed_optimizer,
            overlap_param_gather=update.overlap_param_gather,
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=min_lr,
        lr_warmup_steps=int(training.lr_warmup_fraction * training.train_iters),
        lr_decay_steps=training.train_iters,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    config: Any = chunks[0].module.config
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = [ddp.no_sync for ddp in chunks] if len(chunks) > 1 else chunks[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return optimizer, scheduler
