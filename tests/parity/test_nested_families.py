"""Models that also read images: their language model is read, computed, sampled from and written; the weights
for images stay unchanged.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.models.families import read_architecture
from tests.distributed import run_ranks
from tests.parity.test_families import LAYOUTS, TOKENS, WINDOW, YARN, _run, check_rollouts, relative

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT
        | {"model_type": "gemma3_text", "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": TEXT
        | {
            "model_type": "ministral3",
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4},
        },
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e3,
                "partial_rotary_factor": 1.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            **{
                "model_type": "qwen3_5_vision",
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
            },
            **{"out_hidden_size": 32, "num_position_embeddings": 16},
        },
    },
}


def save(folder: Path, model_type: str) -> torch.nn.Module:
    """The model with random weights, images included, written to the folder."""
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type], attn_implementation="eager")
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1) * 0.5
            )
    model.save_pretrained(str(folder))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[tuple[Path, torch.nn.Module]]:
    folders = {model_type: tmp_path_factory.mktemp(model_type) for model_type in MODELS}
    return [(folder, save(folder, model_type)) for model_type, folder in folders.items()]


@pytest.mark.parametrize("layout", ["one", "TP2xPP2"])
def test_a_layout_computes_what_transformers_computes_and_gives_every_tensor_back(
    models, tmp_path, layout
) -> None:
    from safetensors.torch import load_file

    with torch.no_grad():
        expected = [model(input_ids=TOKENS).logits for _, model in models]
    paths = [str(folder) for folder, _ in models]
    for answers in run_ranks(math.prod(LAYOUTS[layout]), _run, paths, layout, str(tmp_path)):
        for (_, model), (logits, rollouts), theirs in zip(models, answers, expected, strict=True):
            assert relative(logits, theirs) < 1e-4
            check_rollouts(rollouts, model)
    for i, (folder, _) in enumerate(models):
        tensors = load_file(str(folder / "model.safetensors"))
        again = {
            name: t
            for path in (tmp_path / str(i)).glob("*.safetensors")
            for name, t in load_file(path).items()
        }
        assert again.keys() == tensors.keys() and any("vis" in name for name in tensors)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(
            str(tmp_path / str(i)), dtype=torch.float32
        )
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.eval()(input_ids=TOKENS).logits, expected[i], rtol=1e-4, atol=1e-4
            )


def test_controls(models, tmp_path) -> None:
    """The query's growth, the window, and the beginning of the language model's names."""
    changes = [
        (0, {"sliding_window": WINDOW + 1}),
        (1, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}}),
        (2, {"rope_parameters": MODELS["qwen3_5"]["text_config"]["rope_parameters"] | {"rope_theta": 1e4}}),
    ]
    copies = []
    for number, (i, change) in enumerate(changes):
        copy = tmp_path / str(number)
        copy.mkdir()
        fields = json.loads((models[i][0] / "config.json").read_text())
        fields["text_config"] |= change
        (copy / "config.json").write_text(json.dumps(fields))
        (copy / "model.safetensors").symlink_to(models[i][0] / "model.safetensors")
        copies.append(str(copy))
    (answers,) = run_ranks(1, _run, copies, "one", None)
    for (i, change), (logits, _) in zip(changes, answers, strict=True):
        with torch.no_grad():
            assert relative(logits, models[i][1](input_ids=TOKENS).logits) > 1e-3, change


def test_published_fields(tmp_path) -> None:
    """Gemma-3 4B as published, except sizes: most fields of the language model are left out."""
    fields = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = read_architecture(str(tmp_path), flag="--hf-checkpoint")
    assert (found.num_layers, found.vocab_size, found.tied_embeddings) == (34, 262208, True)
    assert (
        found.layers[0].window == 1024
        and found.layers[5].window is None
        and found.layers[5].rope.factor == 8.0
    )
    for change, words in (
        ({"use_depth": True}, "field 'use_depth' is not known for gemma3"),
        ({"text_config": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported"),
        ({"text_config": None}, "text_config = None; expected an object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=words):
            read_architecture(str(tmp_path), flag="--hf-checkpoint")
