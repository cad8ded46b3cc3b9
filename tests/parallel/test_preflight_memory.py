"""The memory plan against models as they are built: parameters of every rank, and what autograd keeps of a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_simct.config import ParallelConfig
from megatron_simct.models.build import build_model, padded_vocab_size
from megatron_simct.models.families import Architecture, Rope
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import build_groups
from megatron_simct.preflight.memory import (
    Sizes,
    forward_bytes,
    layer_activation_bytes,
    optimizer_bytes,
    stage_parameters,
    total_parameters,
)
from tests.distributed import run_ranks

with megatron_imports():
    from megatron.core import parallel_state

BASE = Architecture(
    num_layers=6,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    ropes=(Rope(theta=1e4, dim=16),),
    rope_of_layer=(0,) * 6,
    windows=(None,) * 6,
    softmax_scale=0.25,
    tied_embeddings=False,
    init_std=0.02,
)
ARCHITECTURES = {
    "llama": BASE,
    "tied": replace(BASE, tied_embeddings=True),
    "qwen2": replace(BASE, qkv_bias=True),
    "gemma3": replace(BASE, qk_norm=True, post_norms=True, tied_embeddings=True, activation="gelu_pytorch_tanh"),
    "experts": replace(BASE, num_experts=4, experts_per_token=2, qk_norm=True),
}
LAYOUTS = {
    "1": (1, {}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp4, more than query groups": (4, {"tensor_model_parallel_size": 4}),
    "pp4, uneven": (4, {"pipeline_model_parallel_size": 4}),
}


def sizes_of(architecture: Architecture, parallel: ParallelConfig) -> Sizes:
    rows = padded_vocab_size(architecture.vocab_size, divisible_by=8, tp_size=parallel.tensor_model_parallel_size)
    return Sizes(architecture=architecture, parallel=parallel, vocab_size=rows, bf16=False)


def build(architecture: Architecture, parallel: ParallelConfig):
    groups = build_groups(parallel, seed=1, device=torch.device("cpu"))
    model = build_model(
        architecture, parallel, groups, vocab_size=100, divisible_by=8, bf16=False, flag="--hf-checkpoint"
    )
    return model, groups


def _counts(rank, world_size, parallel):
    """Parameters of this rank's part of every architecture, and its stage."""
    counts = {}
    for name, architecture in ARCHITECTURES.items():
        model, groups = build(architecture, parallel)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
        parallel_state.destroy_model_parallel()
    return groups.pp.rank(), counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_models(layout):
    world_size, options = LAYOUTS[layout]
    parallel = ParallelConfig(**options)
    for stage, counts in run_ranks(world_size, _counts, parallel):
        for name, architecture in ARCHITECTURES.items():
            assert counts[name] == stage_parameters(sizes_of(architecture, parallel), stage=stage), (name, stage)
            if world_size == 1:
                rows = sizes_of(architecture, parallel).vocab_size
                assert counts[name] == total_parameters(architecture, vocab_size=rows)


def _experts_over_ranks(rank, world_size, parallel):
    model, _ = build(ARCHITECTURES["experts"], parallel)
    return sum(parameter.numel() for parameter in model.parameters())


def test_experts_are_shared_out():
    parallel = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    sizes = sizes_of(ARCHITECTURES["experts"], parallel)
    assert run_ranks(4, _experts_over_ranks, parallel) == [stage_parameters(sizes, stage=0)] * 4


def kept_by_autograd(model: torch.nn.Module, *, batch: int, length: int) -> int:
    """Bytes of different storages that a forward pass saves, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    tokens = torch.zeros(batch, length, dtype=torch.int64)
    positions = torch.arange(length).expand(batch, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, positions, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _layer_bytes(rank, world_size, architecture, parallel, batch, length):
    """What one more layer keeps."""
    kept = []
    for num_layers in (2, 3):
        cut = replace(
            architecture, num_layers=num_layers, rope_of_layer=(0,) * num_layers, windows=(None,) * num_layers
        )
        model, _ = build(cut, parallel)
        kept.append(kept_by_autograd(model, batch=batch, length=length))
        parallel_state.destroy_model_parallel()
    return kept[1] - kept[0]


WIDE = replace(BASE, hidden_size=64, ffn_hidden_size=160, head_dim=16)
ACTIVATIONS = {
    "llama": (WIDE, {}),
    "deep mlp": (replace(WIDE, ffn_hidden_size=640), {}),
    "many heads": (replace(WIDE, num_attention_heads=16, num_query_groups=8), {}),
    "gemma2": (replace(WIDE, post_norms=True, attention_softcap=50.0), {}),
    "qwen3": (replace(WIDE, qk_norm=True), {}),
    "tp2": (WIDE, {"tensor_model_parallel_size": 2}),
    "tp2, sequence parallel": (WIDE, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_autograd_keeps(name):
    """Within 12 %: row statistics and the like are left out."""
    architecture, options = ACTIVATIONS[name]
    parallel = ParallelConfig(**options)
    batch, length = 2, 64
    planned = layer_activation_bytes(sizes_of(architecture, parallel), batch=batch, length=length)
    world_size = parallel.tensor_model_parallel_size
    for measured in run_ranks(world_size, _layer_bytes, architecture, parallel, batch, length):
        assert measured == pytest.approx(planned, rel=0.12)


def test_a_forward_pass_without_gradients_is_far_smaller():
    sizes = sizes_of(WIDE, ParallelConfig())
    one, two = (forward_bytes(sizes, batch=batch, length=64) for batch in (1, 2))
    assert two == 2 * one < 2 * layer_activation_bytes(sizes, batch=2, length=64)


def test_optimizer_state():
    assert optimizer_bytes("adam", bf16=True) == 12 and optimizer_bytes("adam", bf16=False) == 8
    assert optimizer_bytes("sgd", bf16=True) == 8
