"""tools/convert_checkpoint.py: Hugging Face -> Megatron -> Hugging Face gives every tensor back, bit by bit."""

from __future__ import annotations

import json
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import run_ranks
from tests.huggingface import save_model
from tools import convert_checkpoint
from tools.convert_checkpoint import _transformers_logits as transformers_logits
from tools.convert_checkpoint import main

pytest.importorskip("transformers")

LAYOUTS = {  # TP, PP, virtual stages, EP
    "one": (1, 1, 1, 1),
    "TP2": (2, 1, 1, 1),
    "PP2": (1, 2, 1, 1),
    "TP2xPP2": (2, 2, 1, 1),
    "PP2 interleaved": (1, 2, 2, 1),
    "EP2": (1, 1, 1, 2),
    "TP2xEP2": (2, 1, 1, 2),
    "PP2xEP2": (1, 2, 1, 2),
    "EP2xDP2": (1, 1, 1, 2),
    "TP4": (4, 1, 1, 1),
    "PP3": (1, 3, 1, 1),
}


def _main(rank: int, world_size: int, arguments: list[str]) -> int:
    return main(arguments)


def convert(command: str, layout: str = "one", **options: object) -> list[int]:
    tp, pp, virtual, ep = LAYOUTS[layout]
    arguments = [command, "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    arguments += ["--num-virtual-stages-per-pipeline-rank", str(virtual), "--make-vocab-size-divisible-by", "16"]
    arguments += ["--expert-model-parallel-size", str(ep)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, str(value)]
    return run_ranks(tp * pp * ep * (2 if layout.endswith("DP2") else 1), _main, arguments)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(path)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """[family, tied, type] -> a folder, made when first asked for."""
    made = {}

    def make(family: str, tied: bool, dtype: torch.dtype):
        key = family, tied, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf")
            experts = {"num_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2, "head_dim": 8}
            shape = {"tie_word_embeddings": tied, "num_hidden_layers": 4} | (experts if family == "qwen3_moe" else {})
            model = save_model(made[key], family, shard_size="9KB", **shape)
            model.to(dtype).save_pretrained(str(made[key]), max_shard_size="9KB")
        return made[key]

    return make


PAIRS = [
    ("one", "TP2", "llama", False, torch.bfloat16),
    ("TP2", "PP2", "qwen2", True, torch.float32),
    ("PP2", "TP2xPP2", "llama", True, torch.float32),
    ("TP2xPP2", "one", "qwen2", False, torch.bfloat16),
    ("TP2xPP2", "PP2 interleaved", "llama", False, torch.float32),
    ("PP2 interleaved", "TP2xPP2", "qwen2", True, torch.float32),
    ("TP2xPP2", "PP2 interleaved", "gemma2", True, torch.bfloat16),
    ("TP2", "PP2", "gemma3_text", True, torch.float32),
    ("PP2", "TP2", "phi3", False, torch.float32),
    ("PP2", "TP4", "phi3", False, torch.bfloat16),
    ("TP4", "PP3", "qwen2", True, torch.bfloat16),
    ("PP3", "TP2", "gemma2", True, torch.float32),
    ("one", "EP2", "qwen3_moe", False, torch.bfloat16),
    ("EP2", "TP2", "qwen3_moe", False, torch.float32),
    ("TP2", "TP2xEP2", "qwen3_moe", False, torch.float32),
    ("TP2xEP2", "PP2xEP2", "qwen3_moe", False, torch.bfloat16),
    ("PP2xEP2", "EP2xDP2", "qwen3_moe", False, torch.float32),
    ("EP2xDP2", "PP2 interleaved", "qwen3_moe", False, torch.float32),
]


@pytest.mark.parametrize("there, back, family, tied, dtype", PAIRS)
def test_every_tensor_comes_back(folder, tmp_path, there, back, family, tied, dtype):
    source = folder(family, tied, dtype)
    (source / "tokenizer.json").write_text("{}")
    assert set(convert("hf-to-megatron", there, hf_checkpoint=source, save=tmp_path / "megatron")) == {0}
    assert set(
        convert("megatron-to-hf", back, load=tmp_path / "megatron", hf_checkpoint=source, save=tmp_path / "hf")
    ) == {0}
    expected, found = tensors_of(source), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {path.name for path in (tmp_path / "hf").glob("*.safetensors")} == set(index["weight_map"].values())
    assert (tmp_path / "hf" / "tokenizer.json").exists() and not (tmp_path / "hf.tmp").exists()


@pytest.mark.parametrize(
    "layout, family",
    [("one", "qwen2"), ("TP2xPP2", "qwen2"), ("PP2 interleaved", "qwen2"), ("TP2xEP2", "qwen3_moe")],
)
def test_verify_compares_with_transformers(folder, tmp_path, layout, family, capfd):
    source = folder(family, True, torch.float32)
    assert set(convert("hf-to-megatron", layout, hf_checkpoint=source, save=tmp_path / "m", verify=True)) == {0}
    assert "verified: logits at 48 positions agree" in capfd.readouterr().out


def test_nothing_is_overwritten(folder, tmp_path, capfd):
    source = folder("llama", True, torch.float32)
    (tmp_path / "there").mkdir()
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "there") == [1]
    assert f"--save {tmp_path / 'there'}: exists already; nothing is overwritten" in capfd.readouterr().err
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "m") == [0]
    assert convert("megatron-to-hf", load=tmp_path / "m", hf_checkpoint=source, save=tmp_path / "there") == [1]
    assert f"--save {tmp_path / 'there'}: exists already; nothing is overwritten" in capfd.readouterr().err


def test_verify_fails_for_another_models_weights(folder, tmp_path, capfd):
    source = folder("llama", False, torch.float32)
    copy = shutil.copytree(source, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    path = copy / index["model.layers.2.mlp.up_proj.weight"]
    tensors = load_file(str(path))
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(tensors, str(path), {"format": "pt"})
    with patch.object(convert_checkpoint, "_transformers_logits", partial(_of_another_folder, str(source))):
        assert convert("hf-to-megatron", hf_checkpoint=copy, save=tmp_path / "m", verify=True) == [1]
    assert "--verify: logits of" in capfd.readouterr().err


def _of_another_folder(other: str, folder: str, tokens: torch.Tensor) -> torch.Tensor:
    return transformers_logits(other, tokens)
