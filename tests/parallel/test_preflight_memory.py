"""The memory plan against the built models: parameters of every rank, and activations that
autograd keeps of a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import ParallelConfig, UpdateConfig
from megatron_simct.job import build_job
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model, padded_vocab_size
from megatron_simct.models.delta_net import DeltaNet
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.layers import Layer
from megatron_simct.models.layout import Layout, context_pieces
from megatron_simct.models.rotary import Rope
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups, build_groups, process_groups
from megatron_simct.preflight.memory import (
    NO_OPTIONS,
    Sizes,
    forward_bytes,
    kept_activations,
    layer_activation_bytes,
    optimizer_bytes,
    stage_parameters,
    student_plan,
    total_parameters,
)
from megatron_simct.train import train
from megatron_simct.update.distributed_state import parts_of
from megatron_simct.update.support import model_fields
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.tiny import config

with megatron_imports():
    from megatron.core import parallel_state

ATTENTION = GroupedQuery(heads=4, groups=2, head_dim=16, scale=0.25)
LAYER = Layer(attention=ATTENTION, mlp=Dense(width=48), rope=Rope(theta=1e4, dim=16))
GATED = replace(ATTENTION, output_gate=True, qk_norm=True, groups=4)
DELTA = DeltaNet(key_heads=4, value_heads=8, key_dim=8, value_dim=12, window=4, packed=False)
DELTA_LAYER = Layer(attention=DELTA, mlp=Dense(width=48), rope=None)
BASE = Architecture(
    layers=(LAYER,) * 6,
    hidden_size=32,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    tied_embeddings=False,
    init_std=0.02,
)


def model_of(layer: Layer = LAYER, **attention: Any) -> Architecture:
    """Six such layers, with changes to their attention."""
    return replace(BASE, layers=(replace(layer, attention=replace(layer.attention, **attention)),) * 6)


ARCHITECTURES = {
    "llama": BASE,
    "tied": replace(BASE, tied_embeddings=True),
    "qwen2": model_of(qkv_bias=True),
    "gemma3": replace(
        model_of(
            replace(LAYER, norms="around", mlp=Dense(width=48, activation="gelu_pytorch_tanh")), qk_norm=True
        ),
        tied_embeddings=True,
    ),
    "delta net": replace(BASE, layers=(DELTA_LAYER, replace(LAYER, attention=GATED)) * 3),
    "experts": model_of(replace(LAYER, mlp=Experts(count=4, width=48, chosen=2)), qk_norm=True),
}
LAYOUTS = {
    "1": (1, {}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp4, more than query groups": (4, {"tensor_model_parallel_size": 4}),
    "pp4, uneven": (4, {"pipeline_model_parallel_size": 4}),
}


def sizes_of(architecture: Architecture, parallel: ParallelConfig) -> Sizes:
    rows = padded_vocab_size(
        architecture.vocab_size, divisible_by=8, tp_size=parallel.tensor_model_parallel_size
    )
    return Sizes(architecture=architecture, parallel=parallel, vocab_size=rows, bf16=False)


def build(
    architecture: Architecture, parallel: ParallelConfig, update: UpdateConfig = NO_OPTIONS
) -> tuple[HiddenStateModel | InterleavedModel, Groups]:
    groups = build_groups(parallel, seed=1, device=torch.device("cpu"))
    model = build_model(
        architecture,
        parallel,
        groups,
        vocab_size=100,
        divisible_by=8,
        bf16=False,
        flag="--hf-checkpoint",
        more=model_fields(update),
    )
    return model, groups


def _counts(rank, world_size, parallel) -> tuple[int, dict[str, int]]:
    """Parameters of this rank's part of every architecture, and its stage."""
    counts = {}
    for name, architecture in ARCHITECTURES.items():
        model, groups = build(architecture, parallel)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
        parallel_state.destroy_model_parallel()
    return groups.pp.rank(), counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_models(layout) -> None:
    world_size, options = LAYOUTS[layout]
    parallel = ParallelConfig(**options)
    for stage, counts in run_ranks(world_size, _counts, parallel):
        for name, architecture in ARCHITECTURES.items():
            assert counts[name] == stage_parameters(sizes_of(architecture, parallel), stage=stage), (
                name,
                stage,
            )
            if world_size == 1:
                rows = sizes_of(architecture, parallel).vocab_size
                assert counts[name] == total_parameters(architecture, vocab_size=rows)


def _experts_over_ranks(rank, world_size, parallel) -> int:
    model, _ = build(ARCHITECTURES["experts"], parallel)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tp, etp", [(2, None), (1, 2), (2, 1)])
def test_experts_are_shared_out(tp, etp) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, expert_model_parallel_size=2, expert_tensor_parallel_size=etp
    )
    sizes = sizes_of(ARCHITECTURES["experts"], parallel)
    assert run_ranks(4, _experts_over_ranks, parallel) == [stage_parameters(sizes, stage=0)] * 4


def kept_by_autograd(
    model: torch.nn.Module, *, batch: int, length: int, context: dist.ProcessGroup | None = None
) -> int:
    """Bytes of different storages that a forward pass saves, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    positions = torch.arange(length).expand(batch, length)
    layout = None
    if context is not None and context.size() > 1:
        pieces = context_pieces(length, context.rank(), context.size())
        positions = torch.cat([positions[:, piece] for piece in pieces], dim=1)
        layout = Layout(positions[0], None, context)
    tokens = torch.zeros(positions.shape, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, positions, None, packed_seq_params=layout)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _layer_bytes(rank, world_size, architecture, parallel, batch, length, update=NO_OPTIONS) -> int:
    """Bytes that one more layer keeps."""
    kept = []
    for num_layers in (2, 3):
        cut = replace(architecture, layers=architecture.layers[:num_layers])
        model, groups = build(cut, parallel, update)
        kept.append(kept_by_autograd(model, batch=batch, length=length, context=groups.cp))
        parallel_state.destroy_model_parallel()
    return kept[1] - kept[0]


WIDE_LAYER = replace(LAYER, mlp=Dense(width=160))


def wide(layer: Layer = WIDE_LAYER, **attention: Any) -> Architecture:
    return replace(model_of(layer, **attention), hidden_size=64)


WIDE = wide()
ROUTED = wide(replace(WIDE_LAYER, mlp=Experts(count=4, width=160, chosen=2)))
SHARED = Experts(
    count=4, width=160, chosen=2, score="sigmoid", corrected=True, shared_width=96, shared_gate=True
)
GATED_LAYER = replace(WIDE_LAYER, attention=GATED)
AFTER_GATED = replace(
    BASE, hidden_size=64, layers=(GATED_LAYER,) * 2 + (replace(DELTA_LAYER, mlp=Dense(width=160)),) * 4
)
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ACTIVATIONS = {
    "llama": (WIDE, {}),
    "deep mlp": (wide(replace(LAYER, mlp=Dense(width=640))), {}),
    "many heads": (wide(heads=16, groups=8), {}),
    "gemma2": (wide(replace(WIDE_LAYER, norms="around"), softcap=50.0), {}),
    "qwen3": (wide(qk_norm=True), {}),
    "hunyuan": (wide(qk_norm=True, norm_after_rope=True), {}),
    "olmo3": (wide(replace(WIDE_LAYER, norms="after"), qk_norm=True, whole_norm=True), SEQUENCE),
    "granite": (wide(replace(WIDE_LAYER, residual_scale=0.5)), {}),
    "output gate": (wide(GATED_LAYER), SEQUENCE),
    "delta net": (AFTER_GATED, {}),
    "delta net, sequence parallel": (AFTER_GATED, SEQUENCE),
    "shared experts": (wide(replace(WIDE_LAYER, mlp=SHARED)), SEQUENCE),
    "tp2": (WIDE, {"tensor_model_parallel_size": 2}),
    "tp2, sequence parallel": (WIDE, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "experts": (ROUTED, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (WIDE, {"context_parallel_size": 2}),
    "cp2, many heads": (wide(heads=16, groups=8), {"context_parallel_size": 2}),
    "whole experts": (
        ROUTED,
        {
            **{"tensor_model_parallel_size": 2, "sequence_parallel": True},
            **{"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        },
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_autograd_keeps(name) -> None:
    """Within 12 %: row statistics and similar tensors are left out."""
    architecture, options = ACTIVATIONS[name]
    parallel = ParallelConfig(**options)
    batch, length = 2, 130 if name.startswith("delta") else 64  # its chunks are of 64
    planned = layer_activation_bytes(
        sizes_of(architecture, parallel),
        architecture.layers[2],
        batch=batch / parallel.context_parallel_size,
        length=length,
    )
    world_size = parallel.model_parallel_size
    for measured in run_ranks(world_size, _layer_bytes, architecture, parallel, batch, length):
        assert measured == pytest.approx(planned, rel=0.12)


GEMMA = ACTIVATIONS["gemma2"][0]
RECOMPUTED = {
    "full": (
        WIDE,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {},
    ),
    "full, sequence parallel": (
        WIDE,
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "core_attn": (GEMMA, {"recompute_granularity": "selective"}, {}),
    "mlp": (GEMMA, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, {}),
    "both": (GEMMA, {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}, {}),
    "moe": (
        ROUTED,
        {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
        {},
    ),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_computed_again_is_not_kept(name) -> None:
    """Within 12 %, as above: the bytes that one more layer adds to the plan."""
    architecture, options, layout = RECOMPUTED[name]
    update, parallel = UpdateConfig(**options), ParallelConfig(**layout)
    batch, length = 2, 64
    sizes = sizes_of(architecture, parallel)
    three, two = (
        kept_activations(sizes, update, architecture.layers[:layers], batch=batch, length=length)
        for layers in (3, 2)
    )
    world_size = parallel.tensor_model_parallel_size
    for measured in run_ranks(world_size, _layer_bytes, architecture, parallel, batch, length, update):
        assert measured == pytest.approx(three - two, rel=0.12)


def _state_bytes(rank, world_size, folder, flags) -> tuple[int, int]:
    """Parameters of this rank, and the bytes of its optimizer's state after a step."""
    resolved = config(folder, "--train-iters", "1", "--simct-interface", "sft", *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        train(job)
        states = [
            state for part in parts_of(job.updater._optimizer) for state in part.optimizer.state.values()
        ]
        held = sum(tensor.nbytes for state in states for name, tensor in state.items() if name != "step")
        return sum(p.numel() for p in job.updater.model.parameters()), held


def test_ranks_share_the_optimizers_state(tiny) -> None:
    plain, shared = (
        run_ranks(2, _state_bytes, tiny, flags) for flags in ((), ("--use-distributed-optimizer",))
    )
    for parameters, held in plain:
        assert held == optimizer_bytes("adam", bf16=False) * parameters
    assert all(held == pytest.approx(plain[0][1] / 2, rel=0.12) for _, held in shared)
    assert sum(held for _, held in shared) == plain[0][1]


EXPERT_LAYOUTS = {
    "ep2 etp2": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "tp2, ep2 etp1": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
        },
    ),
    "tp2, etp1": (
        2,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_shares_of_experts_are_planned_by_the_ranks_that_hold_them(tiny, tmp_path, layout) -> None:
    """Within 12 %: a rank's share of the state is rounded to whole buckets."""
    pytest.importorskip("transformers")
    world_size, options = EXPERT_LAYOUTS[layout]
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    save_model(tmp_path / "student", "qwen3_moe", vocab_size=360, head_dim=8, **shape)
    spelled = {"--" + name.replace("_", "-"): size for name, size in options.items()}
    flags = [flag if size is True else f"{flag}={size}" for flag, size in spelled.items()]
    flags += ["--use-distributed-optimizer", "--hf-checkpoint", str(tmp_path / "student")]
    measured = run_ranks(world_size, _state_bytes, tiny, flags)
    architecture = read_architecture(str(tmp_path / "student"), flag="")
    parallel = ParallelConfig(**options)
    sizes = sizes_of(architecture, parallel)
    plan = student_plan(
        sizes,
        optimizer="adam",
        micro_batch_size=1,
        num_micro_batches=1,
        engine_batch_size=1,
        prompt_len=8,
        response_len=8,
        loss_memory=0,
        trains_on_given=True,
        on_gpu=False,
        update=UpdateConfig(use_distributed_optimizer=True),
        data_parallel_size=world_size // parallel.model_parallel_size,
    )
    held = [of_rank for _, of_rank in measured]
    assert sum(held) / world_size == pytest.approx(plan.held["optimizer"], rel=0.12), layout
    parameters = measured[0][0]
    assert plan.held["gradients"] == pytest.approx(4 * parameters, rel=0.12)
    copied = plan.phases.get("reduction", {"copy of the gradients": 0})["copy of the gradients"]
    experts = sum(layer.mlp.expert_parameters(sizes.share) for layer in architecture.layers)
    whole = plan.held["gradients"]
    scattered = {"ep2 etp2": whole - 4 * experts, "tp2, ep2 etp1": 0, "tp2, etp1": 4 * experts, "cp2": whole}
    assert copied == scattered[layout]


def test_a_forward_pass_without_gradients_is_far_smaller() -> None:
    sizes = sizes_of(WIDE, ParallelConfig())
    one, two = (forward_bytes(sizes, batch=batch, length=64) for batch in (1, 2))
    assert two == 2 * one < 2 * layer_activation_bytes(sizes, WIDE_LAYER, batch=2, length=64)


def test_optimizer_state() -> None:
    assert optimizer_bytes("adam", bf16=True) == 12 and optimizer_bytes("adam", bf16=False) == 8
    assert optimizer_bytes("sgd", bf16=True) == 8
