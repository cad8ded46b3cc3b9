"""Bytes of one rank of a job: what it always holds, and what each phase of a step adds.

Parameters are counted exactly. Activations are the tensors that autograd saves in a layer of this
package's models, measured with saved-tensor hooks. `RESERVE` adds a share for memory that the allocator
loses to fragmentation.

Each layer counts its own parts (`models.layers`). Letters: h hidden size, t tensor-parallel size, B sequences
of a micro-batch, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from megatron_simct.config.options import AttentionBackend, ParallelConfig, UpdateConfig
from megatron_simct.losses.vocab_parallel import (
    LABEL_STATISTICS_COLUMNS,
    LABEL_STATISTICS_COLUMNS_GPU,
    LABEL_STATISTICS_ROWS,
)
from megatron_simct.models.build import layers_of_stages
from megatron_simct.models.families import Architecture
from megatron_simct.models.layers import Layer, Share

GIB = 1 << 30

RESERVE = 0.08
"""Share that the allocator's fragmentation and temporary buffers add to the planned bytes."""
GPU_CONTEXT = 2 * GIB
"""Bytes that CUDA, cuBLAS and NCCL hold on a GPU before the first tensor."""


NO_OPTIONS = UpdateConfig()


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of the rank that needs the most memory."""

    held: dict[str, int]
    """Part -> bytes; held during the whole run."""
    phases: dict[str, dict[str, int]]
    """Phase of a step -> part -> bytes. Phases follow one another, so the largest one counts."""
    num_parameters: int
    """Number of parameters of the whole model."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, the reserve included."""
        planned = sum(self.held.values()) + sum(self.phases[self.peak_phase].values())
        return math.ceil(planned * (1 + RESERVE))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One model in one layout."""

    architecture: Architecture
    parallel: ParallelConfig
    vocab_size: int
    """Rows of the embedding, with its padding."""
    bf16: bool
    attention_backend: AttentionBackend = "auto"
    on_gpu: bool = False
    """On a GPU, attention kernels hold no scores, and activations are fused."""

    @property
    def value_bytes(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.bf16 else 4

    @property
    def tp(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def share(self) -> Share:
        """One rank's share of each layer."""
        return Share(
            hidden_size=self.architecture.hidden_size,
            tp=self.tp,
            ep=self.parallel.expert_model_parallel_size,
            etp=self.parallel.expert_tp,
            value_bytes=self.value_bytes,
            holds_scores=self.attention_backend == "local" or not self.on_gpu,
            fused=self.on_gpu,
        )

    @property
    def pp(self) -> int:
        return self.parallel.pipeline_model_parallel_size


def total_parameters(architecture: Architecture, *, vocab_size: int) -> int:
    """Parameters of the whole model with an embedding of vocab_size rows."""
    embedding = vocab_size * architecture.hidden_size
    heads = 1 if architecture.tied_embeddings else 2
    layers = sum(
        layer.parameters(Share(hidden_size=architecture.hidden_size)) for layer in architecture.layers
    )
    return heads * embedding + layers + architecture.hidden_size


def stage_parameters(sizes: Sizes, *, stage: int) -> int:
    """Parameters of one rank of the pipeline stage.

    The first and the last stage both hold tied embeddings.
    """
    architecture = sizes.architecture
    count = sum(layer.parameters(sizes.share) for layer in stage_layers(sizes, stage))
    embedding = math.ceil(sizes.vocab_size / sizes.tp) * architecture.hidden_size
    first, last = stage == 0, stage == sizes.pp - 1
    if first:
        count += embedding
    if last:
        count += architecture.hidden_size
        if not (first and architecture.tied_embeddings):
            count += embedding
    return count


def stage_layers(sizes: Sizes, stage: int) -> tuple[Layer, ...]:
    """Layers of a pipeline stage. With interleaved stages, those of all its pieces."""
    bounds = [0, *accumulate(layers_of_stages(sizes.architecture, sizes.parallel))]
    pieces = pairwise(bounds)
    own = (piece for number, piece in enumerate(pieces) if number % sizes.pp == stage)
    return tuple(layer for start, end in own for layer in sizes.architecture.layers[start:end])


def layer_activation_bytes(sizes: Sizes, layer: Layer, *, batch: float, length: int) -> int:
    """Bytes that autograd saves in one layer on one rank, for `batch` sequences of `length` positions.

    Attention and MLP count their own. The layer adds 6 B S h / t' values, with t' = t under sequence
    parallelism and t' = 1 otherwise: inputs of both norms, of the projections and of the residuals. In
    bfloat16 each norm also keeps its input in float32, which counts as 4 h more. Norms of the values that are
    added to the residual keep another 4 h. Each context-parallel rank also keeps the keys and values of all
    these ranks, which are as many as generation would cache.
    """
    hidden = sizes.architecture.hidden_size / (sizes.tp if sizes.parallel.sequence_parallel else 1)
    wide = 6 + (4 if sizes.bf16 else 0) + {"before": 0, "around": 4, "after": 0}[layer.norms]
    kept = wide * hidden * sizes.value_bytes * batch * length
    kept += layer.attention.kept_bytes(sizes.share, batch=batch, length=length)
    kept += layer.mlp.kept_bytes(sizes.share, hidden_size=hidden, batch=batch, length=length)
    context = sizes.parallel.context_parallel_size
    if context > 1:
        kept += layer.attention.cache_bytes(sizes.share, batch=1, length=length) * batch * context
    return math.ceil(kept)


def kept_activations(
    sizes: Sizes,
    update: UpdateConfig,
    layers: Sequence[Layer],
    *,
    batch: float,
    length: int,
    in_flight: int = 1,
) -> int:
    """Bytes that autograd saves in the layers of a stage for `in_flight` micro-batches, and the most that the
    backward pass of one of them recomputes and then holds at a time.
    """
    whole = [layer_activation_bytes(sizes, layer, batch=batch, length=length) for layer in layers]
    unit = update.recompute_num_layers or 1
    hidden = sizes.architecture.hidden_size / (sizes.tp if sizes.parallel.sequence_parallel else 1)
    entered = math.ceil(batch * length * hidden * sizes.value_bytes)
    if update.recompute_method == "uniform":
        return in_flight * math.ceil(len(layers) / unit) * entered + sum(sorted(whole)[-unit:])
    if update.recompute_method == "block":
        again = min(unit * sizes.parallel.num_virtual_stages_per_pipeline_rank, len(layers))
        return in_flight * (again * entered + sum(whole[again:])) + max(whole, default=0)
    if update.recompute_granularity == "selective":
        modules = update.recompute_modules or ("core_attn",)
        less = [_parts_of_layer(sizes, layer, modules, batch=batch, length=length) for layer in layers]
        return in_flight * (sum(whole) - sum(less)) + max(less, default=0)
    return in_flight * sum(whole)


def _parts_of_layer(sizes: Sizes, layer: Layer, modules: Sequence[str], *, batch: float, length: int) -> int:
    """Bytes that autograd saves in these parts of a layer, without their inputs."""
    hidden = sizes.architecture.hidden_size / (sizes.tp if sizes.parallel.sequence_parallel else 1)
    kept = 0.0
    if ("moe" if layer.mlp.num_experts else "mlp") in modules:
        kept += layer.mlp.kept_bytes(sizes.share, hidden_size=hidden, batch=batch, length=length)
        if layer.norms == "around":
            kept += 2 * hidden * sizes.value_bytes * batch * length
    held = sizes.share.holds_scores
    if held and "core_attn" in modules and getattr(layer.attention, "softcap", None) is not None:
        kept += 8 * batch * math.ceil(layer.attention.heads / sizes.tp) * length**2
    return math.ceil(kept)


def forward_bytes(sizes: Sizes, *, batch: float, length: int) -> int:
    """The most that a forward pass without gradients holds at a time: three hidden states, and one
    layer's MLP or attention.
    """
    hidden = 3 * sizes.architecture.hidden_size * sizes.value_bytes * batch * length
    parts = (part for layer in sizes.architecture.kinds for part in (layer.attention, layer.mlp))
    return math.ceil(
        hidden + max(part.forward_bytes(sizes.share, batch=batch, length=length) for part in parts)
    )


def cache_bytes(sizes: Sizes, *, stage: int, batch: int, length: int) -> int:
    """Bytes that generation caches for all layers of the stage: keys and values of attention."""
    layers = stage_layers(sizes, stage)
    return sum(layer.attention.cache_bytes(sizes.share, batch=batch, length=length) for layer in layers)


def optimizer_bytes(optimizer: str, *, bf16: bool) -> int:
    """Bytes of optimizer state for each parameter: float32 moments, and the float32 master of a
    bfloat16 parameter.
    """
    return {"adam": 8, "sgd": 4}[optimizer] + (4 if bf16 else 0)


def student_plan(
    sizes: Sizes,
    *,
    optimizer: str,
    micro_batch_size: float,
    num_micro_batches: int,
    engine_batch_size: int,
    prompt_len: int,
    response_len: int,
    loss_memory: int,
    trains_on_given: bool,
    on_gpu: bool,
    update: UpdateConfig = NO_OPTIONS,
    data_parallel_size: int = 1,
    teachers: Sequence[Sizes] = (),
    shared_rows: int = 0,
    teacher_hidden_size: int = 0,
    adapters: Mapping[Layer, int] | None = None,
    averages_teacher: bool = False,
    keeps_start: bool = False,
) -> MemoryPlan:
    """The memory plan of the student rank that needs the most.

    micro_batch_size: sequences of full length; a fraction if they are packed. engine_batch_size: sequences
    decoded together. loss_memory: bytes of --simct-loss-memory-mib. trains_on_given: no rollouts.
    data_parallel_size: ranks over which --use-distributed-optimizer shares. teachers: models that
    share the ranks. shared_rows: rows of the teachers' heads on the fullest rank of the last stage, each
    teacher_hidden_size wide. adapters: number of each layer's adapter parameters on one rank, if adapters are
    trained instead of the weights. averages_teacher: --teacher-ema, whose float32 average is held beside
    weights of another type. keeps_start: --reference-kl-weight, which holds a second copy of the student, and
    its hidden states for all labels of a step.
    """
    plans = []
    sizes = replace(sizes, on_gpu=on_gpu)
    teachers = [replace(teacher, on_gpu=on_gpu) for teacher in teachers]
    length = prompt_len + response_len
    shares = expert_shares = 1
    if update.use_distributed_optimizer:
        # Context-parallel ranks hold the same weights. Ranks of a stage that hold other experts, or another
        # part of an expert, do not share its optimizer state.
        shares = data_parallel_size * sizes.parallel.context_parallel_size
        apart = sizes.parallel.expert_model_parallel_size * sizes.parallel.expert_tp
        expert_shares = max(1, shares * sizes.tp // apart)
    for stage in range(sizes.pp):
        parameters = stage_parameters(sizes, stage=stage)
        last = stage == sizes.pp - 1
        trained = sum(adapters[layer] for layer in stage_layers(sizes, stage)) if adapters else parameters
        experts = 0
        if not adapters:
            experts = sum(layer.mlp.expert_parameters(sizes.share) for layer in stage_layers(sizes, stage))
        own = (trained - experts) / shares + experts / expert_shares
        held = {
            "weights": (parameters + (trained if adapters else 0)) * sizes.value_bytes,
            "gradients": 4 * trained,
            "optimizer": math.ceil(optimizer_bytes(optimizer, bf16=sizes.bf16) * own),
        }
        phases: dict[str, dict[str, int]] = {}
        if not trains_on_given:
            lane = math.ceil(engine_batch_size / sizes.pp)  # sequences of one pass
            logits = 4 * 4 * lane * math.ceil(sizes.vocab_size / sizes.tp) if last else 0
            # Sampling uses torch's operations on a GPU too.
            prefill = forward_bytes(replace(sizes, on_gpu=False), batch=lane, length=prompt_len)
            rows = max(engine_batch_size, sizes.pp)
            phases["rollout"] = {
                "KV cache": cache_bytes(sizes, stage=stage, batch=rows, length=length),
                "forward pass": max(prefill, logits),
            }
        if teachers:
            held["teacher weights"] = sum(
                (one.value_bytes + (4 if averages_teacher and one.value_bytes != 4 else 0))
                * stage_parameters(one, stage=stage)
                for one in teachers
            )
            phases["teacher"] = {
                "forward pass": max(
                    forward_bytes(one, batch=micro_batch_size, length=length) for one in teachers
                )
            }
        if keeps_start:
            held["start's weights"] = sizes.value_bytes * parameters
            phases["start"] = {"forward pass": forward_bytes(sizes, batch=micro_batch_size, length=length)}
        in_flight = min(num_micro_batches, sizes.pp - stage)
        phases["update"] = {
            "activations": kept_activations(
                sizes,
                update,
                stage_layers(sizes, stage),
                batch=micro_batch_size,
                length=length,
                in_flight=in_flight,
            )
        }
        scattered = (trained - experts if shares > 1 else 0) + (experts if expert_shares > 1 else 0)
        if scattered and not on_gpu:  # gloo sums a copy of it; autograd's tensors are free by then
            phases["reduction"] = {"copy of the gradients": 4 * scattered}
        if last:
            if shared_rows:
                held["teacher head"] = shared_rows * teacher_hidden_size * sizes.value_bytes
            labels = math.ceil(micro_batch_size * response_len)
            # The hidden states and their gradient, also in float32, and the teacher's rows.
            rows = (
                labels * (2 * sizes.architecture.hidden_size + teacher_hidden_size) * (sizes.value_bytes + 4)
            )
            if keeps_start:  # a second loss over the same rows
                hidden = labels * sizes.architecture.hidden_size
                rows += 3 * hidden * (sizes.value_bytes + 4)
                phases["update"]["start's hidden states"] = num_micro_batches * hidden * sizes.value_bytes
            phases["update"]["loss"] = loss_memory + rows
            if not adapters:  # the gradient that is passed to autograd instead of the LM head's own
                head = math.ceil(sizes.vocab_size / sizes.tp) * sizes.architecture.hidden_size
                phases["update"]["loss"] += head * sizes.value_bytes
        held = held | ({"GPU context": GPU_CONTEXT} if on_gpu else {})
        total = total_parameters(sizes.architecture, vocab_size=sizes.vocab_size)
        plans.append(MemoryPlan(held=held, phases=phases, num_parameters=total))
    return max(plans, key=lambda plan: plan.peak)


def teacher_plan(sizes: Sizes, *, tokens: int, length: int, on_gpu: bool) -> MemoryPlan:
    """The memory plan of the teacher-job rank that needs the most: weights, and a forward pass of `tokens` in
    total, `length` in each sequence.

    Shorter sequences can fill a micro-batch to its last token, while sequences of `length`
    leave some of it empty.
    """
    plans = []
    sizes = replace(sizes, on_gpu=on_gpu)
    for stage in range(sizes.pp):
        held = {"weights": stage_parameters(sizes, stage=stage) * sizes.value_bytes}
        parts = {"forward pass": forward_bytes(sizes, batch=tokens / length, length=length)}
        if stage == sizes.pp - 1:
            columns = math.ceil(sizes.vocab_size / sizes.tp)
            parts["hidden states"] = tokens * sizes.architecture.hidden_size * (sizes.value_bytes + 4)
            # losses.label_statistics: a tile in the type of the weights, in float32, and with the maxima of
            # its rows subtracted.
            width = LABEL_STATISTICS_COLUMNS_GPU if on_gpu else LABEL_STATISTICS_COLUMNS
            tile = min(LABEL_STATISTICS_ROWS, tokens) * min(width, columns)
            parts["logits"] = (sizes.value_bytes + 8) * tile
        held = held | ({"GPU context": GPU_CONTEXT} if on_gpu else {})
        total = total_parameters(sizes.architecture, vocab_size=sizes.vocab_size)
        plans.append(MemoryPlan(held=held, phases={"scoring": parts}, num_parameters=total))
    return max(plans, key=lambda plan: plan.peak)


def as_gib(parts: Mapping[str, int]) -> dict[str, float]:
    """The same in GiB, to two decimal places."""
    return {name: round(size / GIB, 2) for name, size in parts.items()}


def size_text(size: float) -> str:
    """A number of bytes as text."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"
