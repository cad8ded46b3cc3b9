"""tools/convert_checkpoint.py: Hugging Face -> Megatron -> Hugging Face gives every
tensor back, bit by bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from typing import IO
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_simct.alignment import load_tokenizer
from megatron_simct.commands import convert_checkpoint
from megatron_simct.commands.convert_checkpoint import _transformers_logits as transformers_logits
from megatron_simct.commands.convert_checkpoint import main
from megatron_simct.models import hf_export
from megatron_simct.models.families import read_architecture
from megatron_simct.models.head import load_head_rows, read_head
from tests.distributed import run_ranks
from tests.huggingface import save_byte_fallback, save_model

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
    arguments += [
        "--num-virtual-stages-per-pipeline-rank",
        str(virtual),
        "--make-vocab-size-divisible-by",
        "16",
    ]
    arguments += ["--expert-model-parallel-size", str(ep)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, str(value)]
    return run_ranks(tp * pp * ep * (2 if layout.endswith("DP2") else 1), _main, arguments)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {
        name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(path)).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[..., Path]:
    """[family, tied, type] -> a folder, made at the first request."""
    made = {}

    def make(family: str, tied: bool, dtype: torch.dtype) -> Path:
        key = family, tied, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf")
            experts = {"num_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2, "head_dim": 8}
            shape = {"tie_word_embeddings": tied, "num_hidden_layers": 4} | (
                experts if family == "qwen3_moe" else {}
            )
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
    ("PP2", "TP4", "phi3", False, torch.bfloat16),
    ("TP4", "PP3", "qwen2", True, torch.bfloat16),
    ("PP3", "TP2", "gemma2", True, torch.float32),
    ("one", "EP2", "qwen3_moe", False, torch.bfloat16),
    ("TP2xEP2", "PP2xEP2", "qwen3_moe", False, torch.bfloat16),
    ("PP2xEP2", "EP2xDP2", "qwen3_moe", False, torch.float32),
    ("EP2xDP2", "PP2 interleaved", "qwen3_moe", False, torch.float32),
]


@pytest.mark.parametrize("there, back, family, tied, dtype", PAIRS)
def test_every_tensor_comes_back(folder, tmp_path, there, back, family, tied, dtype) -> None:
    source = folder(family, tied, dtype)
    (source / "tokenizer.json").write_text("{}")
    assert set(convert("hf-to-megatron", there, hf_checkpoint=source, save=tmp_path / "megatron")) == {0}
    assert set(
        convert(
            "megatron-to-hf", back, load=tmp_path / "megatron", hf_checkpoint=source, save=tmp_path / "hf"
        )
    ) == {0}
    expected, found = tensors_of(source), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {path.name for path in (tmp_path / "hf").glob("*.safetensors")} == set(
        index["weight_map"].values()
    )
    assert (tmp_path / "hf" / "tokenizer.json").exists() and not (tmp_path / "hf.tmp").exists()


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head in a folder whose config.json has tie_word_embeddings: true, and whether it is then tied."""

    change: Callable[[dict[str, torch.Tensor]], None]
    tied: bool
    many_files: bool = False


def _add_same(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def _add_other(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def _add_almost_same(tensors: dict[str, torch.Tensor]) -> None:
    _add_same(tensors)
    tensors[HEAD][-1, -1] += 1.0


def _add_same_in_another_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


HEADS = {
    "the same": Head(change=_add_same, tied=True),
    "the same in another type": Head(change=_add_same_in_another_type, tied=True),
    "alone": Head(change=_rename, tied=True),
    "alone, many files": Head(change=_rename, tied=True, many_files=True),
    "another": Head(change=_add_other, tied=False),
    "another, many files": Head(change=_add_other, tied=False, many_files=True),
    "one number": Head(change=_add_almost_same, tied=False),
}


@pytest.mark.parametrize(
    "head, there, back, family",
    [
        ("the same", "TP2", "PP2", "llama"),
        ("the same in another type", "one", "one", "qwen2"),
        ("alone", "TP2xPP2", "TP2", "llama"),
        ("alone, many files", "one", "PP2", "gemma2"),
        ("another", "TP2", "PP2", "llama"),
        ("another", "PP2", "TP2xPP2", "gemma2"),
        ("another, many files", "one", "PP2 interleaved", "qwen2"),
        ("one number", "TP2xPP2", "one", "llama"),
    ],
)
def test_a_head_beside_a_tied_embedding_counts_as_in_transformers(
    folder, tmp_path, head, there, back, family
) -> None:
    """Read, converted in any layout, exported: the logits stay, and the export reports which head it has."""
    from transformers import AutoModelForCausalLM

    case, source = HEADS[head], shutil.copytree(folder(family, True, torch.float32), tmp_path / "source")
    tensors = tensors_of(source)
    for path in (*source.glob("*.safetensors"), source / "model.safetensors.index.json"):
        path.unlink()
    case.change(tensors)
    _write(source, tensors, many_files=case.many_files)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))

    theirs = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == case.tied
    architecture = read_architecture(str(source), flag="")
    assert architecture.tied_embeddings == case.tied
    ids = np.array([3, 98, 0], np.int32)
    rows = load_head_rows(read_head(str(source), flag=""), str(source), ids, dtype=torch.float32, flag="")
    assert torch.equal(rows, theirs.lm_head.weight[torch.from_numpy(ids)])

    options = {"hf_checkpoint": source, "verify": True}
    assert set(convert("hf-to-megatron", there, save=tmp_path / "m", **options)) == {0}
    assert set(convert("megatron-to-hf", back, load=tmp_path / "m", save=tmp_path / "hf", **options)) == {0}
    found = tensors_of(tmp_path / "hf")
    assert torch.equal(found[EMBEDDING], theirs.model.embed_tokens.weight)
    assert (HEAD in found) == (not case.tied)
    assert case.tied or torch.equal(found[HEAD], theirs.lm_head.weight)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] == case.tied


def _write(folder: Path, tensors: dict[str, torch.Tensor], *, many_files: bool) -> None:
    """The weights, in one file, or with the head in a separate file."""
    if not many_files:
        save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
        return
    parts = {"1": {name: t for name, t in tensors.items() if name != HEAD}, "2": {HEAD: tensors[HEAD]}}
    for number, part in parts.items():
        save_file(part, str(folder / f"model-{number}.safetensors"), {"format": "pt"})
    weight_map = {name: f"model-{number}.safetensors" for number, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "layout, family",
    [("one", "qwen2"), ("TP2xPP2", "qwen2"), ("PP2 interleaved", "qwen2"), ("TP2xEP2", "qwen3_moe")],
)
def test_verify_compares_with_transformers(folder, tmp_path, layout, family, capfd) -> None:
    source = folder(family, True, torch.float32)
    assert set(convert("hf-to-megatron", layout, hf_checkpoint=source, save=tmp_path / "m", verify=True)) == {
        0
    }
    assert "verified: logits at 48 positions agree" in capfd.readouterr().out


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A folder whose model has an id for each id of its tokenizer."""
    path = tmp_path_factory.mktemp("with_tokenizer")
    save_model(path, "llama", vocab_size=340, num_hidden_layers=4)
    save_byte_fallback(path)
    return path


@pytest.mark.parametrize("layout", ["one", "TP2xPP2"])
def test_verify_compares_on_a_text_there_and_back(with_tokenizer, tmp_path, layout, capfd) -> None:
    text = "Tom has 12 apples, Привет"
    tokenizer = load_tokenizer(str(with_tokenizer))
    expected = [tokenizer.bos_id, *tokenizer.encode(text.encode()).tolist()]
    seen = tmp_path / "seen"
    options = {"hf_checkpoint": with_tokenizer, "verify": True, "verify_text": text}
    with patch.object(convert_checkpoint, "_transformers_logits", partial(_noting, str(seen))):
        assert set(convert("hf-to-megatron", layout, save=tmp_path / "m", **options)) == {0}
        assert json.loads(seen.read_text()) == [expected]
        assert set(
            convert("megatron-to-hf", layout, load=tmp_path / "m", save=tmp_path / "hf", **options)
        ) == {0}
    assert capfd.readouterr().out.count(f"verified: logits at {len(expected)} positions agree") == 2


def _noting(seen: str, folder: str, tokens: torch.Tensor) -> torch.Tensor:
    Path(seen).write_text(json.dumps(tokens.tolist()))
    return transformers_logits(folder, tokens)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"verify_text": ""}, "--verify-text '': is empty"),
        ({"verify_text": "a", "verify": None}, "--verify-text 'a': needs --verify"),
        ({"vocab_size": 200}, "the model of --hf-checkpoint has 200"),
        ({"tokenizer": None}, "--verify-text 'some text': tokenizer "),
    ],
)
def test_a_wrong_verify_text_is_found_before_anything_is_written(
    with_tokenizer, tmp_path, change, words, capfd
) -> None:
    source = shutil.copytree(with_tokenizer, tmp_path / "copy")
    if "vocab_size" in change:
        fields = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(fields | {"vocab_size": change["vocab_size"]}))
    if "tokenizer" in change:
        (source / "tokenizer.json").unlink()
    options = {"verify": True, "verify_text": "some text"} | {
        k: v for k, v in change.items() if k.startswith("verify")
    }
    options = {name: value for name, value in options.items() if value is not None}
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "m", **options) == [1]
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_an_export_is_on_the_disk_before_it_has_its_name(folder, tmp_path) -> None:
    source = folder("llama", True, torch.float32)
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "m") == [0]
    with patch.object(hf_export, "_sync", partial(_sync_noting, str(tmp_path / "log"))):
        assert convert("megatron-to-hf", load=tmp_path / "m", hf_checkpoint=source, save=tmp_path / "hf") == [
            0
        ]
    synced = (tmp_path / "log").read_text().splitlines()
    assert synced[-2:] == [f"{tmp_path / 'hf.tmp'} False", f"{tmp_path} True"]
    files = {str(tmp_path / "hf.tmp" / path.name) + " False" for path in (tmp_path / "hf").iterdir()}
    assert set(synced[:-2]) == files and len(files) > 2


def _sync_noting(log: str, path: Path) -> None:
    """The synced path, and whether the export has its name."""
    with Path(log).open("a") as file:
        file.write(f"{path} {Path(log).with_name('hf').exists()}\n")


def test_nothing_is_overwritten(folder, tmp_path, capfd) -> None:
    source = folder("llama", True, torch.float32)
    (tmp_path / "there").mkdir()
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "there") == [1]
    assert f"--save {tmp_path / 'there'}: exists already; nothing is overwritten" in capfd.readouterr().err
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "m") == [0]
    assert convert("megatron-to-hf", load=tmp_path / "m", hf_checkpoint=source, save=tmp_path / "there") == [
        1
    ]
    assert f"--save {tmp_path / 'there'}: exists already; nothing is overwritten" in capfd.readouterr().err


def test_a_disk_that_is_full_for_one_rank_ends_all_with_one_line(folder, tmp_path, capfd) -> None:
    source = folder("llama", False, torch.float32)
    assert convert("hf-to-megatron", hf_checkpoint=source, save=tmp_path / "m") == [0]
    capfd.readouterr()
    with patch.object(Path, "open", partialmethod(_full_for_rank_2, Path.open)):
        options = {"load": tmp_path / "m", "hf_checkpoint": source, "save": tmp_path / "hf"}
        assert convert("megatron-to-hf", "TP2xPP2", **options) == [1] * 4
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line.partition(" on rank ")[2][0] for line in lines) == list("0123")
    (said,) = {line.partition(": --save ")[2] for line in lines}
    assert said.startswith(f"{tmp_path / 'hf'}: No space left on device ({tmp_path / 'hf.tmp' / 'model-'}")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def _full_for_rank_2(path: Path, original: Callable, mode: str = "r", **options: object) -> IO:
    """This rank is the first of the second stage. A write to /dev/full finds no space."""
    full = mode == "wb" and path.suffix == ".safetensors" and os.environ["RANK"] == "2"
    return original(Path("/dev/full") if full else path, mode, **options)


def test_verify_fails_for_another_models_weights(folder, tmp_path, capfd) -> None:
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
