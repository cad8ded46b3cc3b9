"""The update: forward and backward through Megatron's schedule, one division, one finite check, one optimizer step.

The loss function returns sums. Megatron adds up the label counts of all micro-batches and data-parallel ranks and
divides every gradient once by that number (finalize_model_grads): the result does not depend on how a batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config import InterfaceConfig
from megatron_simct.losses import ByteOrder, SharedHead, interface_loss
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import from_last_stage
from megatron_simct.parallel.reductions import sum_over_ranks
from megatron_simct.records import MicroBatch

with megatron_imports():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not finite. Every rank raises it, and no weight has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one update did, the same on every rank."""

    sums: dict[str, float]
    """Sums over the global batch: `loss` (not divided), `num_labels`, and the interface's metrics."""
    grad_norm: float
    """Global norm of the divided gradient, before clipping."""
    learning_rate: float
    label_losses: dict[int, torch.Tensor] = field(default_factory=dict)
    """By sample id, for this rank's samples on the last pipeline stage: LossOutput.label_losses of the response [n]."""


class Updater:
    """Owns the trained model's optimizer; the weights are changed here and nowhere else."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        groups: Groups,
        *,
        shared_head: SharedHead | None,
        placement: VocabPlacement,
        interface: InterfaceConfig,
        byte_order: ByteOrder | None = None,
        teacher_logit_softcap: float | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._ddp = self._chunks[-1]  # on the last stage the one with the head
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._groups = groups
        self._loss = partial(
            interface_loss,
            shared_head=shared_head,
            placement=placement,
            config=interface,
            group=groups.tp,
            byte_order=byte_order,
            teacher_logit_softcap=teacher_logit_softcap,
        )

    def step(self, batches: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step on all micro-batches of all ranks. Collective over the whole job.

        Raises NonFiniteError, on every rank and before any weight changes, for a loss or gradient that is not finite.
        """
        for ddp in self._chunks:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        schedule = get_forward_backward_func()
        outputs = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.shape[1] for batch in batches),
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=False,
        )
        # Outputs come in the order of the batches, on ranks that have the loss.
        label_losses: dict[int, torch.Tensor] = {}
        for batch, output in zip(batches, outputs, strict=False):
            label_losses |= _by_sample(batch, output.pop("label_losses"))
        # The loss is that of the last stage; all stages report it, and stop together if it is not finite.
        sums = sum_over_ranks(_add(outputs), self._groups.dp) if self._groups.is_last_stage else {}
        sums = from_last_stage(sums, self._groups.pp)
        learning_rate = self._optimizer.param_groups[0]["lr"]
        bad_ids = [
            sample_id
            for batch, output in zip(batches, outputs, strict=False)
            if not math.isfinite(output["loss"])
            for sample_id in batch.sample_ids
        ]
        grad_norm = self._take_optimizer_step(sums, bad_ids)
        return StepReport(sums=sums, grad_norm=grad_norm, learning_rate=learning_rate, label_losses=label_losses)

    def _forward_step(self, batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Any, Any]:
        batch = next(batches).to(self._groups.device)
        return model(batch.tokens, batch.position_ids, None), partial(self._loss_func, batch)

    def _loss_func(self, batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        model: HiddenStateModel = self._ddp.module
        rows = hidden.flatten(0, 1)[batch.label_rows]
        output = self._loss(rows, model.output_weight, batch.labels, student_logit_softcap=model.logit_softcap)
        sums = {"loss": output.sum.detach().clone(), "num_labels": output.num_labels, **output.metrics}
        sums["label_losses"] = output.label_losses
        return output.sum, output.num_labels.int(), sums

    def _take_optimizer_step(self, sums: dict[str, float], bad_ids: Sequence[int]) -> float:
        """Megatron's optimizer.step(), with a check of the global numbers between gradient and weights.

        bad_ids: this rank's samples in micro-batches whose own loss is not finite.
        """
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        # Tensor-parallel ranks hold copies of the same numbers; should they differ, all ranks stop, or some would wait.
        finite = torch.tensor(
            int(math.isfinite(sums["loss"]) and math.isfinite(grad_norm)), dtype=torch.int32, device=self._groups.device
        )
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not int(finite):
            raise NonFiniteError(
                f"not finite: {_culprits(bad_ids, grad_norm)}; here: loss sum {sums['loss']} over "
                f"{sums['num_labels']:.0f} labels, gradient norm {grad_norm}: stopped before the optimizer step; "
                "lower --lr or --clip-grad"
            )
        self._optimizer.step()
        self._scheduler.step(increment=1)
        return grad_norm


def _by_sample(batch: MicroBatch, label_losses: torch.Tensor) -> dict[int, torch.Tensor]:
    """Labels are packed sample by sample; which sequence each is of, its row of the model's output says."""
    sizes = torch.bincount(batch.label_rows % len(batch.sample_ids), minlength=len(batch.sample_ids))
    return dict(zip(batch.sample_ids, label_losses.split(sizes.tolist()), strict=True))


def _culprits(bad_ids: Sequence[int], grad_norm: float) -> str:
    """Where the bad numbers are, in the same words on every rank. Collective over the whole job."""
    by_rank: list[tuple[list[int], bool]] = [([], True)] * dist.get_world_size()
    dist.all_gather_object(by_rank, (sorted(bad_ids), math.isfinite(grad_norm)))
    losses = [f"rank {rank} (samples {', '.join(map(str, ids))})" for rank, (ids, _) in enumerate(by_rank) if ids]
    norms = [str(rank) for rank, (_, finite) in enumerate(by_rank) if not finite]
    parts = ["loss on " + ", ".join(losses)] * bool(losses) + ["gradient norm on rank " + ", ".join(norms)] * bool(
        norms
    )
    return " and ".join(parts)


def _add(outputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([output[name].double() for output in outputs]).sum() for name in outputs[0]}
