"""megatron-core's TransformerEngine layers, assembled by its own functions from stand-ins for
TransformerEngine's modules: where a Hugging Face folder is read to, and what the layers compute. The modules
themselves need a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models import build
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.norm import RMSNorm
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model

pytest.importorskip("transformers")

MODELS = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        **{
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
        },
        **{"first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True, "attention_bias": True},
    },
    "phi3": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0]},
}
TOKENS = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(0))


class LayerNormLinear(ColumnParallelLinear):
    """A norm and the linear layer after it in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.zeros(input_size))
        self._epsilon = config.layernorm_epsilon

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self._epsilon)
        return super().forward(normed, *args, **kwargs)


class GroupedLinear(torch.nn.Module):
    """One linear layer for each of several groups of rows."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__()
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.zeros(output_size, input_size)))

    def forward(self, x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(x.split(sizes), self.parameters(), strict=True)
        return torch.cat([torch.nn.functional.linear(rows, weight) for rows, weight in parts]), None


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Put them where megatron-core's functions look for TransformerEngine's modules."""
    modules = {
        "TELayerNormColumnParallelLinear": LayerNormLinear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEColumnParallelGroupedLinear": GroupedLinear,
        "TERowParallelGroupedLinear": GroupedLinear,
        "TENorm": RMSNorm,
        "is_te_min_version": lambda *args, **kwargs: True,
    }
    provider = transformer_engine_spec_provider.TESpecProvider
    with (
        mock.patch.multiple(transformer_engine_spec_provider, **modules),
        mock.patch.object(gpt_layer_specs, "TESpecProvider", provider, create=True),
        mock.patch.object(build, "uses_transformer_engine", lambda architecture, device: True),
    ):
        yield mock.patch.object(build, "uses_transformer_engine", lambda architecture, device: False)


def stored(model: torch.nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a checkpoint. TransformerEngine's own modules
    determine those of experts.
    """
    entries = model.sharded_state_dict().values()
    entries = [part for entry in entries for part in (entry.build() if hasattr(entry, "build") else [entry])]
    entries = [entry for entry in entries if hasattr(entry, "global_shape") and ".experts." not in entry.key]
    return {(entry.key, tuple(entry.global_shape)) for entry in entries}


@torch.no_grad()
def _read(rank: int, world_size: int, folder: str, save: str) -> tuple[torch.Tensor, set[str], set, set]:
    """Logits, names of a layer's parameters, the names in a checkpoint, and those in one of local layers.

    The folder is written again to `save`.
    """
    architecture = read_architecture(folder, flag="")
    options = {"vocab_size": 90, "divisible_by": 8, "bf16": False, "flag": "", "initialize": False}
    with process_groups(ParallelConfig(), seed=1) as groups, stand_ins() as use_local:
        model = build.build_model(architecture, ParallelConfig(), groups, **options).eval()
        load_hf_weights(model, architecture, folder, groups, flag="")
        hidden = model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)
        logits = (hidden @ model.output_weight.T).transpose(0, 1)[..., : architecture.vocab_size]
        save_hf_weights(model, architecture, groups, template=folder, save=save, dtype=torch.float32)
        names = {name for name, parameter in model.decoder.layers[1].named_parameters()}
        with use_local:
            local = build.build_model(architecture, ParallelConfig(), groups, **options)
        return logits, names, stored(model), stored(local)


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_is_read_computed_and_written(tmp_path, family) -> None:
    from safetensors.torch import load_file

    model = save_model(tmp_path / "hf", family, **MODELS[family])
    ((logits, names, checkpoint, of_local_layers),) = run_ranks(
        1, _read, str(tmp_path / "hf"), str(tmp_path / "again")
    )
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    assert len(checkpoint) > 8 and checkpoint == of_local_layers, (
        "one kind of layers reads checkpoints of the other"
    )
    assert "self_attention.linear_qkv.layer_norm_weight" in names and "input_layernorm.weight" not in names
    if family.endswith("_moe"):
        assert {"pre_mlp_layernorm.weight", *(f"mlp.experts.linear_fc1.weight{i}" for i in range(4))} <= names
    else:
        assert "mlp.linear_fc1.layer_norm_weight" in names and "pre_mlp_layernorm.weight" not in names
    tensors = load_file(str(tmp_path / "hf" / "model.safetensors"))
    found = {
        name: t for path in (tmp_path / "again").glob("*.safetensors") for name, t in load_file(path).items()
    }
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())
