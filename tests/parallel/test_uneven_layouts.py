"""Experts that are divided over other ranks than the rest of the model, and stages with given layers: in
these layouts a model is read, sampled from, written, saved and loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.update.checkpoint import load_weights, save_weights
from tests.distributed import run_ranks
from tests.huggingface import save_model

VOCAB = 99
LAYOUTS = {
    "ep2 etp2": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "tp2, ep2 etp1": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "tp2, ep4 etp1": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
    ),
    "tp2, etp1": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "pp2, three and one": (2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}),
    "pp3, ends without layers": (
        3,
        {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "E|tttt|L"},
    ),
    "pp2, interleaved": (
        2,
        {
            **{"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "pipeline_model_parallel_layout": "Et|t*2|t|L",
        },
    ),
}
LAYERS = {"num_hidden_layers": 4, "head_dim": 8}
RNG = np.random.default_rng(0)
PROMPTS = [
    Prompt(
        sample_id=i, student_ids=RNG.integers(3, 90, n).astype(np.int32), teacher_ids=np.zeros(0, np.int32)
    )
    for i, n in enumerate([5, 12, 1, 8, 17])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four experts, shared ones beside them, and a first layer without any."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    experts = {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    }
    save_model(folder, "glm4_moe", **experts, n_group=1, topk_group=1, first_k_dense_replace=1, **LAYERS)
    return folder


def _through(
    rank: int, world_size: int, folder: Path, out: Path, options: dict[str, Any], source: Path | None
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Sampled tokens by sample id. The weights, from the folder or from `source`, are written to
    OUT/hf and OUT/megatron.
    """
    parallel = ParallelConfig(**options)
    with process_groups(parallel, seed=3) as groups:
        architecture = read_architecture(str(folder), flag="")
        model = build_model(
            architecture, parallel, groups, vocab_size=VOCAB, divisible_by=8, bf16=False, flag=""
        )
        if source is None:
            load_hf_weights(model, architecture, str(folder), groups, flag="--it")
        else:
            load_weights(model, str(source), flag="--it")
        engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=[VOCAB], batch_size=2)
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_len=6, seed=1)
        rollouts = engine.generate(PROMPTS[groups.dp_rank :: groups.dp_size], sampling)
        save_hf_weights(
            model, architecture, groups, template=str(folder), save=str(out / "hf"), dtype=torch.float32
        )
        save_weights(model, str(out / "megatron"), 1)
        return {rollout.sample_id: (rollout.student_ids, rollout.logprobs) for rollout in rollouts}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> tuple[Path, dict[int, tuple[np.ndarray, np.ndarray]]]:
    out = tmp_path_factory.mktemp("alone")
    return out, run_ranks(1, _through, folder, out, {}, None)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_go_in_and_out_and_sample_as_in_one_process(folder, alone, tmp_path, layout) -> None:
    world_size, options = LAYOUTS[layout]
    there, expected = alone
    # From the folder, and from the checkpoint that one process wrote.
    for name, source in (("folder", None), ("checkpoint", there / "megatron")):
        out = tmp_path / name
        sampled = run_ranks(world_size, _through, folder, out, options, source)
        assert {number for one in sampled for number in one} == expected.keys() == set(range(len(PROMPTS)))
        for one in sampled:
            for number, (ids, logprobs) in one.items():
                assert ids.tolist() == expected[number][0].tolist()
                np.testing.assert_allclose(logprobs, expected[number][1], rtol=0, atol=1e-4)
        found, wanted = _tensors(out / "hf"), _tensors(folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    # What was saved in this layout is read by one process.
    (again,) = run_ranks(1, _through, folder, tmp_path / "again", {}, tmp_path / "folder" / "megatron")
    assert {number: ids.tolist() for number, (ids, _) in again.items()} == {
        number: ids.tolist() for number, (ids, _) in expected.items()
    }
