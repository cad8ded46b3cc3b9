"""Layouts of large models, rank by rank on the meta device in a world of fake ranks: shapes without memory."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_simct.config import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import Architecture, Rope
from megatron_simct.models.hf_mapping import parameters_of
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
TP, PP = 8, 4


def _pieces(rank: int, world_size: int, fake_ranks: list[int]) -> list[list[tuple[str, tuple, int, int, int, int]]]:
    """Name, shape, axis, begin, end and numbers of each piece of some ranks of a TP8 x PP4 job."""
    dist.destroy_process_group()
    found = []
    for fake_rank in fake_ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=fake_rank, world_size=TP * PP)
        parallel = ParallelConfig(tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP)
        with _environment(fake_rank), process_groups(parallel, seed=1) as groups, torch.device("meta"):
            model = build_model(
                LLAMA_70B,
                parallel,
                replace(groups, device=torch.device("meta")),
                vocab_size=LLAMA_70B.vocab_size,
                divisible_by=128,
                bf16=True,
                flag="",
                initialize=False,
            )
            found.append(
                [
                    (piece.name, piece.shape, piece.axis, piece.begin, piece.end, piece.view.numel())
                    for rule, place, parameter in parameters_of(
                        model, LLAMA_70B, tp_rank=groups.tp_rank, tp_size=groups.tp_size
                    )
                    for piece in rule.pieces(parameter, place)
                ]
            )
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # for run_ranks to leave
    return found


def _environment(rank: int) -> contextlib.ExitStack:
    """torchrun's variables, and no gloo groups beside the fake ones."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.dict("os.environ", RANK=str(rank), WORLD_SIZE=str(TP * PP), LOCAL_RANK="0"))
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    stack.enter_context(mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo))
    return stack


def test_the_ranks_of_a_70b_model_share_every_tensor_of_its_folder():
    (by_rank,) = run_ranks(1, _pieces, list(range(TP * PP)))
    covered: dict[str, set[tuple[int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for pieces in by_rank:
        assert sum(numbers for *_, numbers in pieces) < 70.6e9 / (TP * PP) * 1.1
        for name, shape, axis, begin, end, _ in pieces:
            assert shapes.setdefault(name, shape) == shape
            covered.setdefault(name, set()).add((axis, begin, end))
    assert sum(math.prod(shape) for shape in shapes.values()) == 70_553_706_496  # of Llama-3-70B, as published
    assert len(shapes) == 3 + 80 * 9
    for name, parts in covered.items():
        ((axis),) = {axis for axis, *_ in parts}
        assert sum(end - begin for _, begin, end in parts) == shapes[name][axis], name
