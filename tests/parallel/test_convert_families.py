"""Every family from a Hugging Face folder into a checkpoint of one layout, and from there into another
layout: bit by bit equal to what that layout reads from the folder, and exported as the folder has it
(tests/parity/test_families.py). One world uses every layout in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.update.checkpoint import load_weights, save_weights
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.parity.test_families import MODELS, VOCAB

pytest.importorskip("transformers")

LAYOUTS = {  # TP, PP, EP; the other ranks have copies
    "DP": (1, 1, 1),
    "TP2": (2, 1, 1),
    "PP2": (1, 2, 1),
    "TP2xEP2": (2, 1, 2),
    "PP2xEP2": (1, 2, 2),
}

PAIRS = [("DP", "TP2"), ("TP2", "PP2"), ("PP2", "DP")]
OF_EVERY_KIND = ("deepseek_v3", "qwen3_next", "olmo3")
"""Latent attention, gated delta nets and grouped queries; dense MLPs, and experts with shared ones and a gate
of these; norms before and after a layer."""


def _layout(name: str) -> ParallelConfig:
    tp, pp, ep = LAYOUTS[name]
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )


class _Models(torch.nn.ModuleList):
    """Models of several folders that share a checkpoint: this takes as long as one model does."""

    def sharded_state_dict(self) -> dict[str, Any]:
        parts = [model.sharded_state_dict(prefix=f"{i}.") for i, model in enumerate(self)]
        return {name: value for part in parts for name, value in part.items()}


def _convert(
    rank: int, world_size: int, pairs: list[tuple[str, str]], folders: list[str], save: str
) -> list[str]:
    """Names of the tensors that a checkpoint of a pair's first layout does not restore in the second."""
    architectures = [read_architecture(folder, flag="") for folder in folders]
    options = {"vocab_size": VOCAB, "divisible_by": 8, "bf16": False, "flag": "", "initialize": False}
    for there in dict.fromkeys(pair[0] for pair in pairs):
        with process_groups(_layout(there), seed=1) as groups:
            models = _Models(build_model(each, _layout(there), groups, **options) for each in architectures)
            _read(models, architectures, folders, groups)
            save_weights(models, f"{save}/{there}", 1)
    wrong = []
    for back in dict.fromkeys(pair[1] for pair in pairs):
        with process_groups(_layout(back), seed=2) as groups:
            models = _Models(build_model(each, _layout(back), groups, **options) for each in architectures)
            _read(models, architectures, folders, groups)
            expected = {name: tensor.clone() for name, tensor in _tensors(models)}
            for there in (pair[0] for pair in pairs if pair[1] == back):
                for _, tensor in _tensors(models):
                    tensor.fill_(float("nan"))
                load_weights(models, f"{save}/{there}", flag="--load")
                found = dict(_tensors(models))
                names = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
                wrong += [
                    f"{there} {back} {architectures[int(name.split('.')[0])].model_type} {name}"
                    for name in names
                ]
    return wrong


def _read(models: _Models, architectures: list[Architecture], folders: list[str], groups: Groups) -> None:
    for model, architecture, folder in zip(models, architectures, folders, strict=True):
        load_hf_weights(model, architecture, folder, groups, flag="")


def _tensors(models: _Models) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the routers' corrections."""
    yield from ((name, parameter.data) for name, parameter in models.named_parameters())
    yield from ((name, buffer) for name, buffer in models.named_buffers() if name.endswith("correction"))


def _check(pairs: list[tuple[str, str]], families: Iterable[str], world_size: int, tmp_path: Path) -> None:
    folders = []
    for family in families:
        folders.append(str(tmp_path / family))
        save_model(tmp_path / family, family, **deepcopy({"num_hidden_layers": 4} | MODELS[family][0]))
    for wrong in run_ranks(world_size, _convert, pairs, folders, str(tmp_path), timeout_s=500):
        assert wrong == []


def test_every_family_by_three_pairs_of_layouts(tmp_path) -> None:
    _check(PAIRS, MODELS, 2, tmp_path)


def test_every_kind_of_layer_by_every_pair_of_layouts(tmp_path) -> None:
    _check(list(itertools.product(LAYOUTS, LAYOUTS)), OF_EVERY_KIND, 4, tmp_path)
