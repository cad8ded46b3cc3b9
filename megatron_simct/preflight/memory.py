"""Bytes of one rank of a job: what it always holds, and what each phase of a step adds.

Parameters are counted exactly. Activations are what autograd keeps of a layer of this package's models, measured
through saved-tensor hooks; what an allocator loses to fragmentation is a share on top (`RESERVE`).

Letters: L layers of a stage, h hidden size, f width of the MLP, n query heads, g key heads, d entries of a head, t
tensor-parallel size, b sequences of a micro-batch, s positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_simct.config import ParallelConfig
from megatron_simct.losses.vocab_parallel import LABEL_STATISTICS_COLUMNS, LABEL_STATISTICS_ROWS
from megatron_simct.models.build import uneven_stages
from megatron_simct.models.families import Architecture

GIB = 1 << 30

RESERVE = 0.08
"""Share of what is planned that the allocator's fragmentation and temporary buffers take on top."""
GPU_CONTEXT = 2 * GIB
"""What CUDA, cuBLAS and NCCL hold on a GPU before the first tensor."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of the rank that needs most."""

    held: dict[str, int]
    """Part -> bytes, during the whole run."""
    phases: dict[str, dict[str, int]]
    """Phase of a step -> part -> bytes: phases follow one another, so the largest counts."""
    num_parameters: int
    """Of the whole model."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
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
    """Rows of the embedding with its padding."""
    bf16: bool

    @property
    def value_bytes(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.bf16 else 4

    @property
    def tp(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.parallel.pipeline_model_parallel_size


def total_parameters(architecture: Architecture, *, vocab_size: int) -> int:
    """Parameters of the whole model with vocab_size rows of the embedding."""
    embedding = vocab_size * architecture.hidden_size
    heads = 1 if architecture.tied_embeddings else 2
    layers = architecture.num_layers * _layer_parameters(architecture, tp=1, ep=1)
    return heads * embedding + layers + architecture.hidden_size


def stage_parameters(sizes: Sizes, *, stage: int) -> int:
    """Parameters of one rank of the pipeline stage. Tied embeddings lie on the first and on the last stage."""
    architecture = sizes.architecture
    layer = _layer_parameters(architecture, tp=sizes.tp, ep=sizes.parallel.expert_model_parallel_size)
    count = stage_layers(sizes, stage) * layer
    embedding = math.ceil(sizes.vocab_size / sizes.tp) * architecture.hidden_size
    first, last = stage == 0, stage == sizes.pp - 1
    if first:
        count += embedding
    if last:
        count += architecture.hidden_size
        if not (first and architecture.tied_embeddings):
            count += embedding
    return count


def stage_layers(sizes: Sizes, stage: int) -> int:
    """Layers of a pipeline stage."""
    layers, ends = sizes.architecture.num_layers, uneven_stages(sizes.architecture, sizes.parallel)
    if not ends:
        return layers // sizes.pp
    first, last = ends["num_layers_in_first_pipeline_stage"], ends["num_layers_in_last_pipeline_stage"]
    if stage == 0:
        return first
    return last if stage == sizes.pp - 1 else (layers - first - last) // (sizes.pp - 2)


def _stages(sizes: Sizes) -> list[int]:
    """One stage of each kind: the first, the first of those in the middle, the last."""
    return sorted({0, min(1, sizes.pp - 1), sizes.pp - 1})


def _layer_parameters(architecture: Architecture, *, tp: int, ep: int) -> int:
    """Parameters of one layer on one rank."""
    h, d = architecture.hidden_size, architecture.head_dim
    # Ranks that outnumber the query groups hold a part of a group each.
    qkv = (architecture.num_attention_heads + 2 * architecture.num_query_groups) * d // tp
    attention = h * qkv + architecture.num_attention_heads * d // tp * h
    if architecture.qkv_bias:
        attention += qkv
    if architecture.qk_norm:
        attention += 2 * d
    mlp = 3 * h * math.ceil(architecture.ffn_hidden_size / tp)
    experts = architecture.num_experts
    if experts:
        mlp = math.ceil(experts / ep) * mlp + experts * h  # and the router
    return attention + mlp + (4 if architecture.post_norms else 2) * h


def layer_activation_bytes(sizes: Sizes, *, batch: int, length: int) -> int:
    """What autograd keeps of one layer on one rank, for `batch` sequences of `length` positions.

    b s (6 h / t' + 5 f / t + 3 (n + g) d / t) values, t' = t under sequence parallelism and else 1: inputs of both
    norms, of the projections and of the residuals; the MLP's two halves, their activation, its product and the copy of
    a half; queries, keys and values before and after the rotation. In bfloat16 each norm keeps its input in float32
    too, which counts as 4 h more. A soft-cap keeps tanh and softmax of all scores: 8 b n s^2 / t bytes.
    """
    architecture, t = sizes.architecture, sizes.tp
    h, d = architecture.hidden_size, architecture.head_dim
    n, g = math.ceil(architecture.num_attention_heads / t), math.ceil(architecture.num_query_groups / t)
    wide = 6 + (4 if sizes.bf16 else 0) + (4 if architecture.post_norms else 0) + 2 * architecture.experts_per_token
    values = wide * h / (t if sizes.parallel.sequence_parallel else 1)
    values += 5 * max(1, architecture.experts_per_token) * architecture.ffn_hidden_size / t
    values += (5 if architecture.qk_norm else 3) * (n + g) * d
    kept = batch * length * values * sizes.value_bytes
    if architecture.attention_softcap is not None:
        kept += 8 * batch * n * length**2
    return math.ceil(kept)


def forward_bytes(sizes: Sizes, *, batch: float, length: int) -> int:
    """The most that a forward pass without gradients holds at one time: two hidden states and one layer's MLP or
    attention."""
    architecture, t = sizes.architecture, sizes.tp
    n, g = math.ceil(architecture.num_attention_heads / t), math.ceil(architecture.num_query_groups / t)
    width = max(1, architecture.experts_per_token) * architecture.ffn_hidden_size / t
    # Of a mixture of experts every chosen expert gets a copy of the hidden state, and gives one back.
    copies = 2 * architecture.experts_per_token * architecture.hidden_size
    mlp = (4 * width + copies) * sizes.value_bytes * batch * length
    attention = 3 * (n + g) * architecture.head_dim * sizes.value_bytes * batch * length
    if architecture.attention_softcap is not None:
        attention += 12 * batch * n * length**2
    hidden = 3 * architecture.hidden_size * sizes.value_bytes * batch * length
    return math.ceil(hidden + max(mlp, attention))


def kv_cache_bytes(sizes: Sizes, *, stage: int, batch: int, length: int) -> int:
    """Keys and values of every layer of the stage."""
    architecture = sizes.architecture
    groups = math.ceil(architecture.num_query_groups / sizes.tp)
    return 2 * batch * length * stage_layers(sizes, stage) * groups * architecture.head_dim * sizes.value_bytes


def optimizer_bytes(optimizer: str, *, bf16: bool) -> int:
    """Bytes of optimizer state a parameter: float32 moments, and with bfloat16 parameters their float32 masters."""
    return {"adam": 8, "sgd": 4}[optimizer] + (4 if bf16 else 0)


def student_plan(
    sizes: Sizes,
    *,
    optimizer: str,
    micro_batch_size: int,
    num_micro_batches: int,
    engine_batch_size: int,
    prompt_len: int,
    response_len: int,
    loss_memory: int,
    trains_on_given: bool,
    on_gpu: bool,
    teacher: Sizes | None = None,
    shared_rows: int = 0,
    teacher_hidden_size: int = 0,
) -> MemoryPlan:
    """The rank of the student that needs most.

    engine_batch_size: sequences decoded together. loss_memory: bytes of --simct-loss-memory-mib. trains_on_given: no
    rollouts. teacher: the model that shares the ranks, if any. shared_rows: rows of the teacher's head on the fullest
    rank of the last stage, each teacher_hidden_size wide.
    """
    plans = []
    length = prompt_len + response_len
    for stage in _stages(sizes):
        parameters = stage_parameters(sizes, stage=stage)
        last = stage == sizes.pp - 1
        held = {
            "weights": parameters * sizes.value_bytes,
            "gradients": 4 * parameters,
            "optimizer": optimizer_bytes(optimizer, bf16=sizes.bf16) * parameters,
        }
        phases: dict[str, dict[str, int]] = {}
        if not trains_on_given:
            logits = 4 * 4 * engine_batch_size * math.ceil(sizes.vocab_size / sizes.tp) if last else 0
            prefill = forward_bytes(sizes, batch=engine_batch_size, length=prompt_len)
            phases["rollout"] = {
                "KV cache": kv_cache_bytes(sizes, stage=stage, batch=engine_batch_size, length=length),
                "forward pass": max(prefill, logits),
            }
        if teacher is not None:
            held["teacher weights"] = teacher.value_bytes * stage_parameters(teacher, stage=stage)
            phases["teacher"] = {"forward pass": forward_bytes(teacher, batch=micro_batch_size, length=length)}
        in_flight = min(num_micro_batches, sizes.pp - stage)
        layers = stage_layers(sizes, stage) * layer_activation_bytes(sizes, batch=micro_batch_size, length=length)
        phases["update"] = {"activations": in_flight * layers}
        if last:
            if shared_rows:
                held["teacher head"] = shared_rows * teacher_hidden_size * sizes.value_bytes
            labels = micro_batch_size * response_len
            # The hidden states and their gradient, in float32 too; the teacher's rows.
            rows = labels * (2 * sizes.architecture.hidden_size + teacher_hidden_size) * (sizes.value_bytes + 4)
            phases["update"]["loss"] = loss_memory + rows
        held = held | ({"GPU context": GPU_CONTEXT} if on_gpu else {})
        total = total_parameters(sizes.architecture, vocab_size=sizes.vocab_size)
        plans.append(MemoryPlan(held=held, phases=phases, num_parameters=total))
    return max(plans, key=lambda plan: plan.peak)


def teacher_plan(sizes: Sizes, *, tokens: int, length: int, on_gpu: bool) -> MemoryPlan:
    """The rank of a teacher job that needs most: weights, and the forward pass of `tokens` in all, `length` a sequence.

    Shorter sequences fill a micro-batch to its last token where those of `length` leave some of it empty.
    """
    plans = []
    for stage in _stages(sizes):
        held = {"weights": stage_parameters(sizes, stage=stage) * sizes.value_bytes}
        parts = {"forward pass": forward_bytes(sizes, batch=tokens / length, length=length)}
        if stage == sizes.pp - 1:
            columns = math.ceil(sizes.vocab_size / sizes.tp)
            parts["hidden states"] = tokens * sizes.architecture.hidden_size * (sizes.value_bytes + 4)
            # losses.label_statistics: a tile in the type of the weights, in float32, and less the rows' maxima.
            tile = min(LABEL_STATISTICS_ROWS, tokens) * min(LABEL_STATISTICS_COLUMNS, columns)
            parts["logits"] = (sizes.value_bytes + 8) * tile
        held = held | ({"GPU context": GPU_CONTEXT} if on_gpu else {})
        total = total_parameters(sizes.architecture, vocab_size=sizes.vocab_size)
        plans.append(MemoryPlan(held=held, phases={"scoring": parts}, num_parameters=total))
    return max(plans, key=lambda plan: plan.peak)


def as_gib(parts: Mapping[str, int]) -> dict[str, float]:
    """The same in GiB, to two digits behind the point."""
    return {name: round(size / GIB, 2) for name, size in parts.items()}


def size_text(size: float) -> str:
    """A number of bytes for people."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"
