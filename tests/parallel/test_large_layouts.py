"""Layouts of large models, rank by rank on the meta device in a world of fake ranks: shapes without memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_simct.config import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import Architecture, Rope
from megatron_simct.models.hf_mapping import Place, Rule, parameters_of
from megatron_simct.parallel.initialize import parallel_state, process_groups
from tests.distributed import run_ranks

LLAMA_70B = Architecture(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    ropes=(Rope(theta=5e5, dim=128),),
    rope_of_layer=(0,) * 80,
    windows=(None,) * 80,
    softmax_scale=128**-0.5,
    tied_embeddings=False,
    init_std=0.02,
)
QWEN3_235B_A22B = Architecture(
    num_layers=94,
    hidden_size=4096,
    ffn_hidden_size=1536,
    num_attention_heads=64,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    norm_epsilon=1e-6,
    ropes=(Rope(theta=1e6, dim=128),),
    rope_of_layer=(0,) * 94,
    windows=(None,) * 94,
    softmax_scale=128**-0.5,
    qk_norm=True,
    num_experts=128,
    experts_per_token=8,
    tied_embeddings=False,
    init_std=0.02,
)
TP, PP, EP = 8, 4, 8

Found = tuple[str, tuple[int, ...], int, int, int, int]
"""Name, shape, axis, begin, end and numbers of a piece."""


class Covered:
    """What the ranks of a job have of the tensors of a folder."""

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
def _model(architecture: Architecture, *, rank: int, ep: int) -> Iterator[tuple[Any, Any]]:
    """The part of one rank of a TP8 x PP4 (x EP) job, and its groups."""
    world_size = TP * PP * ep
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel = ParallelConfig(
        tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP, expert_model_parallel_size=ep
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
    """Of all ranks of the 70B model."""
    dist.destroy_process_group()
    covered = Covered()
    for fake_rank in range(TP * PP):
        with _model(LLAMA_70B, rank=fake_rank, ep=1) as (model, groups):
            parameters = parameters_of(model, LLAMA_70B, tp_rank=groups.tp_rank, tp_size=TP)
            covered.add(_pieces_of(parameters, groups.tp_rank))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # for run_ranks to leave
    return covered


def _environment(rank: int, world_size: int) -> contextlib.ExitStack:
    """torchrun's variables, and no gloo groups beside the fake ones."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.dict("os.environ", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0"))
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    stack.enter_context(mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo))
    return stack


def test_the_ranks_of_a_70b_model_share_every_tensor_of_its_folder():
    (covered,) = run_ranks(1, _cover_llama)
    assert len(covered.sizes) == TP * PP and max(covered.sizes) < 70.6e9 / (TP * PP) * 1.1
    shapes = covered.shapes_of_whole_tensors()
    assert sum(math.prod(shape) for shape in shapes.values()) == 70_553_706_496  # of Llama-3-70B, as published
    assert len(shapes) == 3 + 80 * 9


def _cover_qwen(rank: int, world_size: int) -> tuple[Covered, list[tuple[int, list[int]]]]:
    """Of all ranks of the 235B model; first layer and experts of the ranks that were built.

    All ranks of a stage have parameters of the same shapes, so one of them is built for each stage; the others' pieces
    are those of the same parameters in another place.
    """
    dist.destroy_process_group()
    covered, built = Covered(), []
    per_rank = QWEN3_235B_A22B.num_experts // EP
    for stage in range(PP):
        tp_rank, ep_rank = stage + 1, 2 * stage + 1
        fake_rank = (stage * EP + ep_rank) * TP + tp_rank
        with _model(QWEN3_235B_A22B, rank=fake_rank, ep=EP) as (model, groups):
            assert (groups.tp_rank, groups.ep.rank(), groups.pp.rank()) == (tp_rank, ep_rank, stage)
            layers = model.decoder.layers
            built.append((layers[0].layer_number - 1, layers[0].mlp.local_expert_indices))
        for other in range(EP):
            for layer in layers:
                layer.mlp.local_expert_indices = range(other * per_rank, (other + 1) * per_rank)
            parameters = list(parameters_of(model, QWEN3_235B_A22B, tp_rank=0, tp_size=TP))
            for other_tp_rank in range(TP):
                covered.add(_pieces_of(parameters, other_tp_rank))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return covered, built


def test_the_ranks_of_a_235b_mixture_of_experts_share_every_tensor_of_its_folder():
    """Its 94 layers are 23, 24, 24 and 23 on four stages, and its 4 query groups lie on 8 tensor-parallel ranks."""
    ((covered, built),) = run_ranks(1, _cover_qwen, timeout_s=240)
    assert built == [(first, [16 * ep + i for i in range(16)]) for first, ep in ((0, 1), (23, 3), (47, 5), (71, 7))]
    assert len(covered.sizes) == TP * PP * EP and max(covered.sizes) < 235.1e9 / (TP * PP * EP) * 1.3
    shapes = covered.shapes_of_whole_tensors()
    assert sum(math.prod(shape) for shape in shapes.values()) == 235_093_634_560  # of Qwen3-235B-A22B, as published
    assert len(shapes) == 3 + 94 * (9 + 128 * 3)
