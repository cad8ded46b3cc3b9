"""The update: forward and backward through Megatron's schedule, one division, one finite check,
one optimizer step.

The loss function returns sums. Megatron adds up the label counts of all micro-batches and data-parallel ranks
and divides every gradient once by that number (finalize_model_grads): the result does not depend on how a
batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import ByteOrder, LabelRows, LossOutput, SharedHead, interface_loss
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.models.layout import Layout
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import from_last_stage
from megatron_simct.parallel.reductions import sum_over_ranks
from megatron_simct.records import MicroBatch
from megatron_simct.update.gradient_parts import compare, gradients, without_units
from megatron_simct.update.optimizer import gather_weight

with megatron_imports():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not finite. Raised on every rank before any weight changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Results of one update, the same on every rank."""

    sums: dict[str, float]
    """Sums over the global batch: `loss` (not divided), `num_labels`, and the interface's metrics."""
    grad_norm: float
    """Global norm of the divided gradient, before clipping."""
    learning_rate: float
    gradient_parts: dict[str, float] = field(default_factory=dict)
    """The metrics of gradient_parts.py, in steps in which they are measured."""
    label_losses: dict[int, torch.Tensor] = field(default_factory=dict)
    """By sample id, for this rank's samples on the last pipeline stage: LossOutput.label_losses of the
    response [n].
    """


class Start(Protocol):
    """The student at its start, whose KL is part of the loss (teacher/reference.py)."""

    @property
    def weight(self) -> float: ...
    @property
    def head(self) -> SharedHead | None: ...
    @property
    def placement(self) -> VocabPlacement: ...
    @property
    def logit_softcap(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """What the loss reads of a teacher beside its scores."""

    placement: VocabPlacement
    """The tokens that it shares with the student, on this rank's slice of the student's vocabulary."""
    interface: InterfaceConfig
    """How its rows are compared."""
    shared_head: SharedHead | None = None
    """On the last stage, the rows of its head that this rank's columns need, if any."""
    logit_softcap: float | None = None
    """The soft-cap of its logits, which the loss computes from its hidden states."""


class Updater:
    """Owns the trained model's optimizer; the weights are changed here and nowhere else."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        groups: Groups,
        *,
        teachers: Mapping[str, TeacherHead],
        byte_order: ByteOrder | None = None,
        gradient_parts_interval: int = 0,
        importance_cap: float | None = None,
        check_sampling: Callable[[float, float], None] | None = None,
        reference: Start | None = None,
        may_miss: bool = False,
    ) -> None:
        """teachers: by MicroBatch.teacher; without a teacher, its placement and interface alone.

        gradient_parts_interval: number of steps between comparisons of the gradient's parts; 0: never.

        importance_cap: see interface_loss. check_sampling: called in each step, before the weights change,
        with the mean and the largest difference of the labels' log-probabilities in sampling and in training;
        it may raise. reference: for micro-batches that have one. may_miss: whether a rank may have only
        micro-batches without a teacher.
        """
        self._gradient_parts_interval = gradient_parts_interval
        self._names_differ = may_miss or len({one.interface for one in teachers.values()}) > 1
        self._check_sampling = check_sampling
        self._chunks = list(chunks)
        self._ddp = self._chunks[-1]  # on the last stage the one with the head
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._groups = groups
        self._losses = {
            name: partial(
                interface_loss,
                shared_head=teacher.shared_head,
                placement=teacher.placement,
                config=teacher.interface,
                group=groups.tp,
                byte_order=byte_order,
                teacher_logit_softcap=teacher.logit_softcap,
                importance_cap=importance_cap,
            )
            for name, teacher in teachers.items()
        }
        first = next(iter(teachers.values()))  # the student's vocabulary and the memory are the same in all
        memory = first.interface.loss_memory_mib
        self._given_loss = partial(
            interface_loss,
            shared_head=None,
            placement=first.placement,
            config=InterfaceConfig(interface="sft", loss_memory_mib=memory),
            group=groups.tp,
        )
        self._reference = reference
        self._reference_loss: Callable[..., LossOutput] | None = None
        if reference is not None:
            self._reference_loss = partial(
                interface_loss,
                shared_head=reference.head,
                placement=reference.placement,
                config=InterfaceConfig(interface="kd", divergence="reverse_kl", loss_memory_mib=memory),
                group=groups.tp,
                teacher_logit_softcap=reference.logit_softcap,
            )

    @property
    def model(self) -> HiddenStateModel:
        """The last chunk of the model on this rank; on the last pipeline stage it has the head."""
        module: HiddenStateModel = self._ddp.module
        return module

    def step(self, batches: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step on all micro-batches of all ranks. Collective over the whole job.

        Raises NonFiniteError, on every rank and before any weight changes, for a loss or gradient
        that is not finite.
        """
        interval, of_one_to_one = self._gradient_parts_interval, None
        if interval and (self._scheduler.num_steps + 1) % interval == 0:
            self._backward([without_units(batch) for batch in batches])
            self._optimizer.prepare_grads()
            of_one_to_one = gradients(self._optimizer)
        outputs = self._backward(batches)
        # Outputs come in the order of the batches, on ranks that have the loss.
        label_losses: dict[int, torch.Tensor] = {}
        for batch, output in zip(batches, outputs, strict=False):
            if self._groups.cp_size > 1:
                dist.all_reduce(output["label_losses"], group=self._groups.cp)
            of_samples = output.pop("label_losses").split(batch.num_labels)
            label_losses |= dict(zip(batch.sample_ids, of_samples, strict=True))
        gaps = [output.pop("rollout_gap_largest") for output in outputs]
        # The loss is that of the last stage; all stages report it, and stop together if it is not finite.
        sums = {}
        if self._groups.is_last_stage:
            widest = torch.stack(gaps).max()
            dist.all_reduce(widest, op=dist.ReduceOp.MAX, group=self._groups.dp_cp)
            own = _add(outputs)
            if self._names_differ:
                own = _with_names_of_all_ranks(own, self._groups.dp_cp)
            sums = sum_over_ranks(own, self._groups.dp_cp) | {"rollout_gap_largest": float(widest)}
        sums = from_last_stage(sums, self._groups.pp)
        learning_rate = self._optimizer.param_groups[0]["lr"]
        bad_ids = [
            sample_id
            for batch, output in zip(batches, outputs, strict=False)
            if not math.isfinite(output["loss"])
            for sample_id in batch.sample_ids
        ]
        grad_norm = self._check_gradient(sums, bad_ids)
        parts = {} if of_one_to_one is None else compare(self._optimizer, of_one_to_one)
        self._change_weights()
        return StepReport(
            sums=sums,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            gradient_parts=parts,
            label_losses=label_losses,
        )

    def _backward(self, batches: Sequence[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        """Compute the gradients of the micro-batches, in place of earlier ones; returns the loss function's
        output for each.
        """
        for ddp in self._chunks:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.sequences.tokens.shape[1] for batch in batches),
            micro_batch_size=len(batches[0].sequences.tokens),
            forward_only=False,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Any, Any]:
        batch = next(batches).to(self._groups.device)
        sequences = batch.sequences
        layout = Layout(sequences.position_ids[0], sequences.lengths, self._groups.cp)
        output = model(sequences.tokens, sequences.position_ids, None, packed_seq_params=layout)
        return output, partial(self._loss_func, batch)

    def _loss_func(self, batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        model = self.model
        rows = hidden.flatten(0, 1)[batch.sequences.label_rows]
        index = batch.sequences.label_index
        gather_weight(self._ddp, model.output_weight)
        named: dict[str, Any] = {
            "student_logit_softcap": model.logit_softcap,
            "label_rows": None if index is None else LabelRows(index=index, group=self._groups.cp),
        }
        if batch.is_given:
            output = self._given_loss(rows, model.output_weight, batch.labels, **named)
            return output.sum, torch.zeros_like(output.num_labels).int(), _given_sums(output)
        if batch.teacher is None:
            no_weights = torch.zeros(len(batch.labels.student_labels), device=rows.device)
            nothing = replace(batch.labels, advantages=None, label_weights=no_weights)
            output = self._given_loss(rows, model.output_weight, nothing, **named)
            return output.sum, torch.zeros_like(output.num_labels).int(), _unscored_sums(output)
        output = self._losses[batch.teacher](rows, model.output_weight, batch.labels, **named)
        value, label_losses = output.sum, output.label_losses
        sums = {"num_labels": output.num_labels, **output.metrics}
        sums |= _sums_by_teacher(output, batch.teacher, list(self._losses))
        if batch.reference is not None:
            assert self._reference_loss is not None and self._reference is not None
            kept = self._reference_loss(rows, model.output_weight, batch.reference, **named)
            value, label_losses = value + kept.sum, label_losses + kept.label_losses
            sums["reference_kl_sum"] = kept.sum.detach().double() / self._reference.weight
        sums |= {"loss": value.detach().clone(), "label_losses": label_losses}
        gap = torch.zeros_like(output.log_probs)
        sampled = batch.labels.sampling_log_probs
        if sampled is not None:
            gap = (output.log_probs - (sampled if index is None else sampled[index])).abs()
        sums["rollout_gap_sum"] = gap.sum(dtype=torch.float64)
        sums["rollout_gap_largest"] = torch.cat([gap, gap.new_zeros(1)]).max()
        return value, output.num_labels.int(), sums

    def _check_gradient(self, sums: dict[str, float], bad_ids: Sequence[int]) -> float:
        """The gradient's norm; between gradient and weights the global numbers are checked.

        bad_ids: this rank's samples in micro-batches whose own loss is not finite.
        """
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        # Tensor-parallel ranks hold copies of the same numbers; should they differ, all ranks stop, or some
        # would wait.
        finite = torch.tensor(
            int(math.isfinite(sums["loss"]) and math.isfinite(grad_norm)),
            dtype=torch.int32,
            device=self._groups.device,
        )
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not int(finite):
            raise NonFiniteError(
                f"not finite: {_culprits(bad_ids, grad_norm)}; here: loss sum {sums['loss']} over "
                f"{sums['num_labels']:.0f} labels, gradient norm {grad_norm}: stopped before the optimizer "
                "step; lower --lr or --clip-grad"
            )
        if self._check_sampling is not None:
            self._check_sampling(sums["rollout_gap_sum"] / sums["num_labels"], sums["rollout_gap_largest"])
        return grad_norm

    def _change_weights(self) -> None:
        """Apply the prepared and checked gradient, and advance the schedule."""
        self._optimizer.step()
        self._scheduler.step(increment=1)


def _culprits(bad_ids: Sequence[int], grad_norm: float) -> str:
    """The places of non-finite numbers, the same text on every rank. Collective over the whole job."""
    by_rank: list[tuple[list[int], bool]] = [([], True)] * dist.get_world_size()
    dist.all_gather_object(by_rank, (sorted(bad_ids), math.isfinite(grad_norm)))
    losses = [
        f"rank {rank} (samples {', '.join(map(str, ids))})" for rank, (ids, _) in enumerate(by_rank) if ids
    ]
    norms = [str(rank) for rank, (_, finite) in enumerate(by_rank) if not finite]
    parts = []
    if losses:
        parts.append(f"loss on {', '.join(losses)}")
    if norms:
        parts.append(f"gradient norm on rank {', '.join(norms)}")
    return " and ".join(parts)


def _add(outputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sums of all micro-batches; those of given rows have other names beside the common ones."""
    names = list(dict.fromkeys(name for output in outputs for name in output))
    return {
        name: torch.stack([output[name].double() for output in outputs if name in output]).sum()
        for name in names
    }


def _sums_by_teacher(
    output: LossOutput, teacher: str | None, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The sums of a micro-batch for its own teacher, and zeros for the others; nothing without names."""
    zero = torch.zeros_like(output.num_labels).double()
    return {
        f"{key}/{name}": value.detach().double() if name == teacher else zero
        for name in filter(None, names)
        for key, value in {
            "loss": output.sum,
            "num_labels": output.num_labels,
            "teacher_nll_sum": output.metrics["teacher_nll_sum"],
        }.items()
    }


def _with_names_of_all_ranks(
    sums: dict[str, torch.Tensor], group: dist.ProcessGroup
) -> dict[str, torch.Tensor]:
    """The sums, and zeros for those that only other ranks of the group have. Collective over the group."""
    of_ranks: list[list[str]] = [[]] * group.size()
    dist.all_gather_object(of_ranks, sorted(sums), group=group)
    zero = torch.zeros_like(sums["loss"])
    return {name: sums.get(name, zero) for names in of_ranks for name in names}


def _unscored_sums(output: LossOutput) -> dict[str, torch.Tensor]:
    """What a micro-batch that nobody has scored reports: nothing."""
    return {
        "loss": output.sum.detach().clone(),
        "num_labels": torch.zeros_like(output.num_labels),
        "label_losses": output.label_losses,
        "rollout_gap_largest": output.log_probs.new_zeros(()),
    }


def _given_sums(output: LossOutput) -> dict[str, torch.Tensor]:
    """What a micro-batch of given rows reports: nothing of it counts among the sampled labels."""
    return {
        "loss": output.sum.detach().clone(),
        "num_labels": torch.zeros_like(output.num_labels),
        "given_nll_sum": output.metrics["student_nll_sum"],
        "num_given_labels": output.metrics["num_student_labels"],
        "label_losses": output.label_losses,
        "rollout_gap_largest": output.log_probs.new_zeros(()),
    }
