"""Tiny random models of every family: what transformers computes, Megatron computes in every layout; weights go there
and back bit by bit; and whatever the comparison should notice, it notices."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_simct.config import ParallelConfig
from megatron_simct.losses.vocab_parallel import soft_cap
from megatron_simct.models.build import build_model, chunks_of
from megatron_simct.models.families import FAMILIES, read_architecture
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.parallel.pipeline import tensor_from_last_stage, through_stage
from megatron_simct.records import Prompt
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.megatron_engine import MegatronEngine
from tests.distributed import run_ranks
from tests.huggingface import save_model

pytest.importorskip("transformers")

LENGTH = 40
VOCAB = 90  # of the tokenizer: fewer ids than the models' rows
WINDOW = 6
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e3, "factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 2.5}
GEMMA2 = {"head_dim": 8, "sliding_window": WINDOW, "scale": 0.5}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.2, 3.0, 5.0],
}
PHI3 = {"rope_parameters": LONGROPE}
MODELS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16},
    ],
    "mistral": [
        {"sliding_window": WINDOW},
        {"sliding_window": None, "tie_word_embeddings": True, "num_attention_heads": 8, "vocab_size": 101},
    ],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 48, "vocab_size": 97},
    ],
    "qwen3": [
        {"head_dim": 8},
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "vocab_size": 93,
            "num_attention_heads": 8,
        },
    ],
    "qwen3_moe": [
        MOE | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": WINDOW},
        MOE
        | {
            "norm_topk_prob": False,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "vocab_size": 97,
            "num_attention_heads": 8,
        },
    ],
    "gemma2": [
        GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        GEMMA2 | {"tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16, "num_key_value_heads": 4},
    ],
    "gemma3_text": [
        GEMMA2
        | {
            "num_hidden_layers": 8,  # five with the window, then one without
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
        GEMMA2 | {"tie_word_embeddings": True, "vocab_size": 101, "head_dim": 16, "num_key_value_heads": 4},
    ],
    "phi3": [
        PHI3 | {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
        PHI3 | {"original_max_position_embeddings": 8, "tie_word_embeddings": True, "vocab_size": 101},
        {"num_attention_heads": 8, "num_key_value_heads": 8},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
        {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": True, "vocab_size": 101, "num_attention_heads": 8},
    ],
}
# Changes of config.json that the logits of a family's first model must show.
CONTROLS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32} | change}
        for change in (
            {"rope_theta": 2e3},
            {"factor": 4.0},
            {"low_freq_factor": 0.7},
            {"high_freq_factor": 4.0},
            {"original_max_position_embeddings": 64},
        )
    ],
    "mistral": [{"sliding_window": None}, {"sliding_window": WINDOW + 1}, {"rope_parameters": {"rope_theta": 2e4}}],
    "qwen2": [
        {"use_sliding_window": False, "layer_types": None},
        {"max_window_layers": 1, "layer_types": None},
        {"sliding_window": WINDOW - 1},
    ],
    "qwen3": [{"rope_parameters": {"rope_theta": 2e4}}, {"rms_norm_eps": 1e-2}],
    "qwen3_moe": [
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 3},
        {"use_sliding_window": False},
        {"sliding_window": WINDOW + 1},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "gemma2": [
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 2.1},
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 3.1},
        {"query_pre_attn_scalar": 8},
        {"sliding_window": WINDOW + 1},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
    "gemma3_text": [
        {"query_pre_attn_scalar": 8},
        {"sliding_window": WINDOW + 1},
        {"layer_types": ["sliding_attention"] * 8},
        {"rope_parameters": None, "rope_theta": 1e3, "rope_local_base_freq": 1e2},
        {"rope_parameters": None, "rope_theta": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"layer_types": None, "sliding_window_pattern": 2},
    ],
    "phi3": [
        {"sliding_window": None},
        {"original_max_position_embeddings": LENGTH - 1},
        {"original_max_position_embeddings": 128},
        {"max_position_embeddings": 512},
        {"rope_parameters": LONGROPE | {"attention_factor": 1.0}},
        {"rope_parameters": LONGROPE | {"factor": 2.0}},
        {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.5, 2.5]}},
        {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 1.0}},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 1, 1, 1]},
        {"no_rope_layers": [1, 0, 1, 1]},
        {"no_rope_layers": [0, 0, 1, 0]},
        {"use_sliding_window": False, "layer_types": None},
        {"sliding_window": WINDOW + 1},
        {"rope_parameters": {"rope_theta": 2e4}},
    ],
}
# The same as a family's first model in the spelling of older files.
SPELLED: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": None,
        "rope_theta": 1e3,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
        | {"original_max_position_embeddings": 32},
    },
    "gemma3_text": {
        "layer_types": None,
        "rope_parameters": None,
        "rope_theta": 1e3,
        "rope_local_base_freq": 1e2,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma2": {"layer_types": None},
    "phi3": {
        "rope_parameters": None,
        "rope_theta": 1e3,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope"}
        | {k: v for k, v in LONGROPE.items() if k.endswith("g_factor") or k == "short_factor"},
    },
    "qwen2": {"layer_types": None},
    "qwen3_moe": {"num_experts": 6, "max_window_layers": 48},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None},
}
LAYOUTS = {"one": (1, 1, 1), "TP2": (2, 1, 1), "PP2": (1, 2, 1), "TP2xPP2": (2, 2, 1)}  # TP, PP, EP
MOE_LAYOUTS = {"EP2": (1, 1, 2), "EP3": (1, 1, 3), "TP2xEP2": (2, 1, 2), "PP2xEP2": (1, 2, 2), "TP4": (4, 1, 1)}
RUNS = [(f, layout) for f in MODELS for layout in LAYOUTS] + [("qwen3_moe", layout) for layout in MOE_LAYOUTS]
LAYOUTS |= MOE_LAYOUTS
TOKENS = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
EMPTY = np.zeros(0, np.int32)
PROMPTS = [  # of several lengths, below, at and past the window: padded on the left
    Prompt(sample_id=i, student_ids=TOKENS[i % 3, :n].numpy().astype(np.int32), teacher_ids=EMPTY)
    for i, n in enumerate((2, WINDOW, 3 * WINDOW, 25))
]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_len=12, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders and models of a family, made when first asked for."""
    made: dict[str, list[tuple[Path, torch.nn.Module]]] = {}

    def make(family: str) -> list[tuple[Path, torch.nn.Module]]:
        if family not in made:
            made[family] = []
            for fields in MODELS[family]:
                folder = tmp_path_factory.mktemp(family)
                made[family].append((folder, save_model(folder, family, **deepcopy({"num_hidden_layers": 4} | fields))))
        return made[family]

    return make


def _run(rank: int, world_size: int, folders: list[str], layout: str, save: str | None) -> list[tuple]:
    """Logits [B, S, published vocabulary], rollouts, and largest padding of each folder; writes it again to `save`."""
    tp, pp, ep = LAYOUTS[layout]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    with process_groups(parallel, seed=3) as groups:
        return [_one(folder, parallel, groups, f"{save}/{i}" if save else None) for i, folder in enumerate(folders)]


def _one(folder: str, parallel: ParallelConfig, groups: Any, save: str | None) -> tuple:
    architecture = read_architecture(folder, flag="")
    model = build_model(architecture, parallel, groups, vocab_size=VOCAB, divisible_by=8, bf16=False, flag="")
    load_hf_weights(model, architecture, folder, tp_rank=groups.tp_rank, tp_size=groups.tp_size, flag="")
    logits = _logits(model, groups)[..., : architecture.vocab_size]
    rollouts = None
    if save is not None:
        engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=[VOCAB], batch_size=4)
        rollouts = engine.generate(PROMPTS, SAMPLING)
        save_hf_weights(model, architecture, groups, template=folder, save=save, dtype=torch.float32)
    return logits, rollouts


@torch.no_grad()
def _logits(model: Any, groups: Any) -> torch.Tensor:
    positions = torch.arange(LENGTH).expand_as(TOKENS)

    def stage(chunk: Any, received: torch.Tensor | None) -> torch.Tensor:
        chunk.set_input_tensor(received)
        return chunk(TOKENS, positions, None)

    hidden = torch.empty(LENGTH, len(TOKENS), model.config.hidden_size)
    for chunk in chunks_of(model.eval()):
        hidden = through_stage(
            partial(stage, chunk), hidden, groups.pp, first=chunk.pre_process, last=chunk.post_process
        )
    width = model.vocab_shard[1] - model.vocab_shard[0]
    logits = torch.empty(len(TOKENS), LENGTH, width * groups.tp_size)
    if groups.is_last_stage:
        shard = soft_cap(hidden @ model.output_weight.T, model.logit_softcap).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
        dist.all_gather(shards, shard, group=groups.tp)
        logits = torch.cat(shards, dim=-1)
    return tensor_from_last_stage(logits, groups.pp)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check_rollouts(rollouts: list, model: torch.nn.Module) -> None:
    """The log-probs of tokens sampled with a KV cache are transformers' of the whole sequence."""
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.student_ids, rollout.student_ids]).astype(np.int64))
        rows = model(ids[None]).logits[0, len(prompt.student_ids) - 1 : -1, :VOCAB].double().log_softmax(-1)
        expected = rows.gather(1, ids[len(prompt.student_ids) :, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, layout", RUNS)
def test_a_layout_computes_what_transformers_computes_and_gives_every_tensor_back(folders, tmp_path, family, layout):
    from safetensors.torch import load_file

    models = folders(family)
    for answers in run_ranks(
        math.prod(LAYOUTS[layout]), _run, [str(folder) for folder, _ in models], layout, str(tmp_path)
    ):
        for (_, model), (logits, rollouts) in zip(models, answers, strict=True):
            with torch.no_grad():
                assert relative(logits, model(TOKENS).logits) < 1e-4
            check_rollouts(rollouts, model)
    for i, (folder, _) in enumerate(models):
        expected = load_file(str(folder / "model.safetensors"))
        found = {name: t for path in (tmp_path / str(i)).glob("*.safetensors") for name, t in load_file(path).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "change",
    [{}, {"sliding_window": WINDOW}, {"use_sliding_window": True, "max_window_layers": 1}],
    ids=["nothing", "window", "used"],
)
@pytest.mark.parametrize("family", MODELS)
def test_what_config_json_leaves_out_is_read_as_transformers_reads_it(tmp_path, family, change):
    """Files that were written by hand, or by another library, lack what transformers has a default for."""
    from transformers import AutoConfig

    known = FAMILIES[family].read | FAMILIES[family].neutral
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        **(MOE if family == "qwen3_moe" else {}),
        **{name: value for name, value in change.items() if name in known},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | fields))
    ours, theirs = read_architecture(str(tmp_path), flag=""), AutoConfig.for_model(family, **fields)
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 7
    assert ours.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 8)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range
    ropes = theirs.rope_parameters
    thetas = {ropes["rope_theta"]} if "rope_theta" in ropes else {kind["rope_theta"] for kind in ropes.values()}
    assert {rope.theta for rope in ours.ropes} == thetas


def respelled(folder: Path, copy: Path, change: dict[str, Any]) -> Path:
    """A copy of the folder with changes of its config.json."""
    shutil.copytree(folder, copy)
    fields = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(fields))
    return copy


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_and_every_setting_shows_in_the_logits(folders, tmp_path, family):
    from safetensors.torch import load_file, save_file

    folder, model = folders(family)[0]
    again = folder if family not in SPELLED else respelled(folder, tmp_path / "respelled", SPELLED[family])
    with torch.no_grad():
        expected = model(TOKENS).logits
    tensors = load_file(str(folder / "model.safetensors"))
    copies, names = [], []
    for name, tensor in tensors.items():
        if ".layers." in name and ".layers.1." not in name:
            continue
        row = int(TOKENS[0, 0]) if "embed_tokens" in name else 0
        copy = shutil.copytree(folder, tmp_path / name)
        changed = tensor.clone()
        changed[row] += 1.0
        save_file(tensors | {name: changed}, str(copy / "model.safetensors"), {"format": "pt"})
        copies.append(copy)
        names.append(name)
    for i, change in enumerate(CONTROLS[family]):
        copies.append(respelled(folder, tmp_path / f"control {i}", change))
        names.append(str(change))
    (answers,) = run_ranks(1, _run, [str(again), *map(str, copies)], "one", None)
    assert relative(answers[0][0], expected) < 1e-4
    for name, (logits, _) in zip(names, answers[1:], strict=True):
        assert relative(logits, expected) > 1e-3, name
