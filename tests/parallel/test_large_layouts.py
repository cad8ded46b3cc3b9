"""Layouts of large models, rank by rank on the meta device in a world of fake ranks:
shapes without memory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.build import build_model, padded_vocab_size
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_mapping import parameters_of
from megatron_simct.models.layers import Layer
from megatron_simct.models.rotary import Rope
from megatron_simct.models.rules import Place, Rule
from megatron_simct.parallel.initialize import parallel_state, process_groups
from megatron_simct.preflight.memory import Sizes, stage_parameters, total_parameters
from tests.distributed import run_ranks

LLAMA_70B = Architecture(
    layers=(
        Layer(
            attention=GroupedQuery(heads=64, groups=8, head_dim=128, scale=128**-0.5),
            mlp=Dense(width=28672),
            rope=Rope(theta=5e5, dim=128),
        ),
    )
    * 80,
    hidden_size=8192,
    vocab_size=128256,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    tied_embeddings=False,
    init_std=0.02,
)
QWEN3_235B_A22B = Architecture(
    layers=(
        Layer(
            attention=GroupedQuery(heads=64, groups=4, head_dim=128, scale=128**-0.5, qk_norm=True),
            mlp=Experts(count=128, width=1536, chosen=8),
            rope=Rope(theta=1e6, dim=128),
        ),
    )
    * 94,
    hidden_size=4096,
    vocab_size=151936,
    max_position_embeddings=40960,
    norm_epsilon=1e-6,
    tied_embeddings=False,
    init_std=0.02,
)
TP, PP, EP = 8, 4, 8

Found = tuple[str, tuple[int, ...], int, int, int, int]
"""Name, shape, axis, begin, end and numbers of a piece."""


class Covered:
    """The parts of a folder's tensors that the ranks of a job have."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Numbers that each rank has."""
        self._tensors: dict[str, tuple[tuple[int, ...], int]] = {}
        self._parts: dict[str, set[tuple[int, int]]] = {}

    def add(self, pieces: Iterable[Found]) -> None:
        """One more rank."""
        self.sizes.append(0)
        for name, shape, axis, begin, end, numbers in pieces:
            assert self._tensors.setdefault(name, (shape, axis)) == (shape, axis)
            self._parts.setdefault(name, set()).add((begin, end))
            self.sizes[-1] += numbers

    def shapes_of_whole_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every number of every tensor belongs to one piece, which several ranks may have."""
        for name, parts in self._parts.items():
            shape, axis = self._tensors[name]
            ends = [0]
            for begin, end in sorted(parts):
                assert begin == ends[-1], (name, begin, end)
                ends.append(end)
            assert ends[-1] == shape[axis], name
        return {name: shape for name, (shape, _) in self._tensors.items()}


@contextlib.contextmanager
def _model(architecture: Architecture, *, rank: int, ep: int, pp: int = PP) -> Iterator[tuple[Any, Any]]:
    """The part of one rank of a TP8 x PP4 (x EP) job, or of one with another number of
    stages, and its groups.
    """
    world_size = TP * pp * ep
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel = ParallelConfig(
        tensor_model_parallel_size=TP, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    with _environment(rank, world_size), process_groups(parallel, seed=1) as groups, torch.device("meta"):
        yield (
            build_model(
                architecture,
                parallel,
                replace(groups, device=torch.device("meta")),
                vocab_size=architecture.vocab_size,
                divisible_by=128,
                bf16=True,
                flag="",
                initialize=False,
            ),
            groups,
        )
    dist.destroy_process_group()


def _pieces_of(parameters: Iterable[tuple[Rule, Place, torch.Tensor]], tp_rank: int) -> Iterator[Found]:
    for rule, place, parameter in parameters:
        for piece in rule.pieces(parameter, replace(place, tp_rank=tp_rank)):
            yield piece.name, piece.shape, piece.axis, piece.begin, piece.end, piece.view.numel()


def _cover_llama(rank: int, world_size: int) -> Covered:
    """The parts of the 70B model's tensors on all ranks."""
    dist.destroy_process_group()
    covered = Covered()
    for fake_rank in range(TP * PP):
        with _model(LLAMA_70B, rank=fake_rank, ep=1) as (model, groups):
            parameters = parameters_of(model, LLAMA_70B, tp_rank=groups.tp_rank, tp_size=TP)
            covered.add(_pieces_of(parameters, groups.tp_rank))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # run_ranks leaves this group
    return covered


def _environment(rank: int, world_size: int) -> contextlib.ExitStack:
    """torchrun's variables, and no gloo groups beside the fake ones."""
    stack = contextlib.ExitStack()
    stack.enter_context(
        mock.patch.dict("os.environ", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    )
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    stack.enter_context(mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo))
    return stack


def test_the_ranks_of_a_70b_model_share_every_tensor_of_its_folder() -> None:
    (covered,) = run_ranks(1, _cover_llama)
    assert len(covered.sizes) == TP * PP and max(covered.sizes) < 70.6e9 / (TP * PP) * 1.1
    shapes = covered.shapes_of_whole_tensors()
    # of Llama-3-70B, as published
    assert sum(math.prod(shape) for shape in shapes.values()) == 70_553_706_496
    assert len(shapes) == 3 + 80 * 9


def _cover_experts(
    rank: int, world_size: int, architecture: Architecture, pp: int
) -> tuple[Covered, list[tuple[int, list[int]]]]:
    """The parts of a large mixture of experts on all ranks; the first layer and the experts
    of the built ranks.

    All ranks of a stage have parameters of the same shapes. Therefore one of them is built for each
    stage, and its size is compared with the plan; the pieces of the others are those of the same
    parameters in another place.
    """
    dist.destroy_process_group()
    covered, built = Covered(), []
    parallel = ParallelConfig(tensor_model_parallel_size=TP, pipeline_model_parallel_size=pp)
    parallel = replace(parallel, expert_model_parallel_size=EP)
    rows = padded_vocab_size(architecture.vocab_size, divisible_by=128, tp_size=TP)
    sizes = Sizes(architecture=architecture, parallel=parallel, vocab_size=rows, bf16=True)
    per_rank = architecture.num_experts // EP
    for stage in range(pp):
        tp_rank, ep_rank = (stage + 1) % TP, (2 * stage + 1) % EP
        fake_rank = (stage * EP + ep_rank) * TP + tp_rank
        with _model(architecture, rank=fake_rank, ep=EP, pp=pp) as (model, groups):
            assert (groups.tp_rank, groups.ep.rank(), groups.pp.rank()) == (tp_rank, ep_rank, stage)
            assert sum(parameter.numel() for parameter in model.parameters()) == stage_parameters(
                sizes, stage=stage
            )
            layers = model.decoder.layers
            built.append((layers[0].layer_number - 1, getattr(layers[-1].mlp, "local_expert_indices", [])))
        for other in range(EP):
            for layer in layers:
                if hasattr(layer.mlp, "experts"):
                    layer.mlp.local_expert_indices = range(other * per_rank, (other + 1) * per_rank)
            parameters = list(parameters_of(model, architecture, tp_rank=0, tp_size=TP))
            for other_tp_rank in range(TP):
                covered.add(_pieces_of(parameters, other_tp_rank))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return covered, built


def test_the_ranks_of_a_235b_mixture_of_experts_share_every_tensor_of_its_folder() -> None:
    """Its 94 layers are 23, 24, 24 and 23 on four stages, and its 4 query groups lie on 8
    tensor-parallel ranks.
    """
    ((covered, built),) = run_ranks(1, _cover_experts, QWEN3_235B_A22B, PP, timeout_s=240)
    assert built == [
        (first, [16 * ep + i for i in range(16)]) for first, ep in ((0, 1), (23, 3), (47, 5), (71, 7))
    ]
    assert len(covered.sizes) == TP * PP * EP and max(covered.sizes) < 235.1e9 / (TP * PP * EP) * 1.3
    shapes = covered.shapes_of_whole_tensors()
    # of Qwen3-235B-A22B, as published
    assert sum(math.prod(shape) for shape in shapes.values()) == 235_093_634_560
    assert len(shapes) == 3 + 94 * (9 + 128 * 3)


ROUTED = {
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
DEEPSEEK_V3 = ROUTED | {
    **{"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432},
    **{
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
    },
    **{"num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6},
}
GLM_4_6 = ROUTED | {
    **{"model_type": "glm4_moe", "num_hidden_layers": 92, "hidden_size": 5120, "intermediate_size": 12288},
    **{"moe_intermediate_size": 1536, "n_routed_experts": 160, "vocab_size": 151552, "head_dim": 128},
    **{"num_attention_heads": 96, "num_key_value_heads": 8, "attention_bias": True, "use_qk_norm": True},
    **{"max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "rope_theta": 1000000},
}
LARGE = {
    # The attention of a layer; the MLP of a dense one and of one with experts.
    "DeepSeek-V3": (
        DEEPSEEK_V3,
        7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168,
        3 * 7168 * 18432,
        257 * 3 * 7168 * 2048 + 256 * 7168 + 256,
    ),
    "GLM-4.6": (
        GLM_4_6,
        2 * 5120 * 96 * 128 + 2 * 5120 * 8 * 128 + (96 + 16) * 128 + 2 * 128,
        3 * 5120 * 12288,
        161 * 3 * 5120 * 1536 + 160 * 5120 + 160,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_teachers_on_512_ranks(tmp_path, name) -> None:
    """TP8 x PP8 x EP8: every number of the published sizes belongs to its ranks once, also the corrections of
    the routers, and the plan counts what is built.
    """
    fields, attention, dense, experts = LARGE[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    architecture = read_architecture(str(tmp_path), flag="")
    ((covered, built),) = run_ranks(1, _cover_experts, architecture, 8, timeout_s=600)
    assert len(covered.sizes) == 512 and len(built) == 8
    layers, hidden, rows = fields["num_hidden_layers"], fields["hidden_size"], fields["vocab_size"]
    expected = (
        layers * (attention + 2 * hidden) + 3 * dense + (layers - 3) * experts + 2 * rows * hidden + hidden
    )
    shapes = covered.shapes_of_whole_tensors()
    assert sum(math.prod(shape) for shape in shapes.values()) == expected
    corrections = (layers - 3) * fields["n_routed_experts"]  # buffers
    assert total_parameters(architecture, vocab_size=rows) == expected - corrections
