"""Folders of quantised weights: their numbers are those of the equation, and a slice is the
slice of the whole.

The tests write the published layouts themselves. The equations, in float64, element by element:

    fp8      w[i, j] = q[i, j] * s[i // b, j // b']
    int4     w[i, j] = (((word[i, j // 8] >> 4 (j % 8)) & 15) - 8) * s[i, j // g]
    mxfp4    w[i, j] = e2m1(nibble j of row i) * 2^(s[i, j // 32] - 127)

transformers' functions and, where it is installed, those of the package compressed-tensors give the same
numbers in bfloat16.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_simct.commands import convert_checkpoint
from megatron_simct.config.options import ParallelConfig
from megatron_simct.models import tensor_files
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.formats import find_format
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.hf_mapping import tensor_names
from megatron_simct.models.tensor_files import Piece, TensorFolder, has_own_head, is_for_bf16
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model

pytest.importorskip("transformers")

ROWS, COLUMNS = 20, 100
INT4 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "actorder": None,
    "dynamic": False,
    "block_structure": None,
    "observer": "minmax",
}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}


def fp8(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | fields


def compressed(layout: str, weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return settings | {"quantization_status": "compressed", "ignore": ["lm_head"]} | fields


def float8_parts(shape: tuple[int, int], block: tuple[int, int], scale: torch.dtype, seed: int) -> tuple:
    """Numbers, scales, and the resulting matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
    grid = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    scales = (torch.rand(grid, generator=generator) * 0.01 + 0.001).to(scale)
    spread = (
        scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    )
    return numbers, scales, numbers.double() * spread


def int4_parts(shape: tuple[int, int], group: int, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    codes = torch.randint(0, 16, (rows, -(-columns // 8) * 8), generator=generator)
    words = (codes.view(rows, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    scales = (torch.rand(rows, -(-columns // group), generator=generator) * 0.1 + 0.01).bfloat16()
    spread = scales.double().repeat_interleave(group, 1)[:, :columns]
    return words, scales, torch.tensor(shape), (codes[:, :columns] - 8).double() * spread


def mxfp4_parts(experts: int, rows: int, columns: int) -> tuple:
    """Blocks, scales, and [E, rows, columns] in float64: sign, two bits of exponent with bias
    1, one of fraction.
    """
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(3).long()
    sign, exponent, fraction = nibbles >> 3, nibbles >> 1 & 3, nibbles & 1
    value = torch.where(exponent == 0, fraction * 0.5, (1 + fraction * 0.5) * 2.0 ** (exponent - 1)).double()
    value = torch.where(sign == 1, -value, value) * (2.0 ** (scales.double() - 127)).unsqueeze(-1)
    return blocks, scales, value.flatten(2)


def write(folder: Path, settings: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


FORMATS = [
    "blocks",
    "blocks, bf16 scales",
    "ue8m0",
    "ue8m0 as bytes",
    "one scale",
    "rows",
    "int4",
    "int4, odd",
]


def quantised(folder: Path, kind: str) -> torch.Tensor:
    """A folder with the matrix a.weight, and that matrix in float64."""
    shape, block = (ROWS, COLUMNS), (8, 32)
    if kind.startswith("int4"):
        shape, group = ((ROWS, 96), 32) if kind == "int4" else ((7, 90), 16)
        words, scales, sizes, meant = int4_parts(shape, group, 1)
        parts = {"a.weight_packed": words, "a.weight_scale": scales, "a.weight_shape": sizes}
        write(folder, compressed("pack-quantized", INT4 | {"group_size": group}), parts)
        return meant
    settings, suffix, scale_type = fp8(weight_block_size=list(block)), "_scale_inv", torch.float32
    match kind:
        case "blocks, bf16 scales":
            scale_type = torch.bfloat16
        case "ue8m0" | "ue8m0 as bytes":
            scale_type, settings = torch.float8_e8m0fnu, settings | {"scale_fmt": "ue8m0"}
        case "one scale":
            block, settings = shape, fp8(weight_block_size=None, activation_scheme="static")
        case "rows":
            block, suffix, settings = (1, COLUMNS), "_scale", compressed("float-quantized", FLOAT8)
    numbers, scales, meant = float8_parts(shape, block, scale_type, 1)
    if kind == "one scale":
        scales = scales[0, 0]
    if kind == "ue8m0 as bytes":
        scales = scales.view(torch.uint8)
    parts = {"a.weight": numbers, "a.weight" + suffix: scales}
    write(folder, settings, parts | ({"a.activation_scale": torch.ones(())} if kind == "one scale" else {}))
    return meant


def read(folder: Path, piece: Piece) -> torch.Tensor:
    with contextlib.ExitStack() as files:
        TensorFolder(str(folder), files, flag="--hf-checkpoint").read(piece)
    return piece.view


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_are_those_of_the_equation_and_slices_those_of_the_whole(tmp_path, kind, monkeypatch) -> None:
    meant = quantised(tmp_path, kind)
    monkeypatch.setattr(tensor_files, "_NUMBERS", 3 * meant.shape[1])  # several runs of rows
    whole = read(tmp_path, Piece("a.weight", tuple(meant.shape), torch.empty(meant.shape), 0, len(meant)))
    # A product of float32 is rounded once.
    assert torch.equal(whole, meant.float())
    rounded = read(
        tmp_path, Piece("a.weight", tuple(meant.shape), torch.empty(meant.shape).bfloat16(), 0, len(meant))
    )
    assert torch.equal(rounded, meant.float().bfloat16())
    rows, columns = meant.shape
    for begin, end in ((0, rows), (1, 4), (rows - 3, rows), (5, 6)):
        found = read(
            tmp_path, Piece("a.weight", tuple(meant.shape), torch.empty(end - begin, columns), begin, end)
        )
        assert torch.equal(found, whole[begin:end])
    for begin, end in ((0, columns // 2), (columns // 2, columns), (33, 34), (7, 70)):
        view = torch.empty(rows, end - begin)
        found = read(tmp_path, Piece("a.weight", tuple(meant.shape), view, begin, end, axis=1))
        assert torch.equal(found, whole[:, begin:end])


EXPERTS, INPUTS, OUTPUTS = 3, 64, 12


def expert_pieces(meant: torch.Tensor, name: str) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Pieces of the matrices [r, c] of the experts, with their expected values; some of every second row,
    as gpt-oss has them.
    """
    experts, rows, columns = meant.shape
    shape = (experts, columns, rows)
    for expert in range(experts):
        matrix = meant[expert]
        yield Piece(name, shape, torch.empty(rows, columns), 0, rows, expert=expert), matrix
        yield Piece(name, shape, torch.empty(3, columns), 4, 10, expert=expert, step=2), matrix[4:10:2]
        yield Piece(name, shape, torch.empty(4, columns), 5, 12, expert=expert, step=2), matrix[5:12:2]
        yield (
            Piece(name, shape, torch.empty(rows, 9), 47, 64, axis=1, expert=expert, step=2),
            matrix[:, 47::2],
        )
        yield Piece(name, shape, torch.empty(rows, 17), 30, 47, axis=1, expert=expert), matrix[:, 30:47]


@pytest.mark.parametrize("plain", [False, True])
def test_matrices_of_experts_in_one_tensor(tmp_path, plain, monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "_BLOCK", 200)
    monkeypatch.setattr(tensor_files, "_NUMBERS", 200)
    blocks, scales, meant = mxfp4_parts(EXPERTS, OUTPUTS, INPUTS)
    bias = torch.randn(EXPERTS, OUTPUTS)
    parts = {"down_blocks": blocks, "down_scales": scales}
    if plain:
        parts = {"down": meant.float().transpose(1, 2).contiguous()}
    write(tmp_path, None if plain else {"quant_method": "mxfp4"}, parts | {"down_bias": bias})
    for piece, expected in expert_pieces(meant, "down"):
        assert torch.equal(read(tmp_path, piece), expected.float())
    piece = Piece("down_bias", (EXPERTS, OUTPUTS), torch.empty(5), 1, 11, expert=2, step=2)
    assert torch.equal(read(tmp_path, piece), bias[2, 1:11:2])


def test_numbers_are_those_of_transformers(tmp_path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales, meant = mxfp4_parts(EXPERTS, OUTPUTS, INPUTS)
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(theirs, meant.transpose(1, 2).bfloat16())
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        numbers, scales, _ = float8_parts((16, 64), (8, 32), dtype, 2)
        write(tmp_path, fp8(weight_block_size=[8, 32]), {"a.weight": numbers, "a.weight_scale_inv": scales})
        theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, output_dtype=torch.bfloat16)
        ours = read(tmp_path, Piece("a.weight", (16, 64), torch.empty(16, 64).bfloat16(), 0, 16))
        assert torch.equal(ours, theirs)


def test_numbers_are_those_of_compressed_tensors(tmp_path) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(
        **{key: INT4[key] for key in ("num_bits", "type", "symmetric", "strategy", "group_size")}
    )
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (6, 96), generator=generator, dtype=torch.int8)
    scales = (torch.rand(6, 3, generator=generator) * 0.1).bfloat16()
    theirs = dequantize(codes, scales, args=args)
    parts = {
        "a.weight_packed": pack_to_int32(codes, 4),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([6, 96]),
    }
    write(tmp_path, compressed("pack-quantized", INT4), parts)
    ours = read(tmp_path, Piece("a.weight", (6, 96), torch.empty(6, 96).bfloat16(), 0, 6))
    assert theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)


# Whole models.

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
MODEL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
BLOCK = (24, 40)  # the ranks' slices end within blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A folder with quantised projections, and the same numbers in a plain one."""
    return {
        kind: write_pair(kind, tmp_path_factory.mktemp("quantised"), tmp_path_factory.mktemp("plain"))
        for kind in ("fp8", "int4")
    }


def write_pair(kind: str, folder: Path, plain: Path) -> tuple[Path, Path]:
    save_model(plain, "qwen3", **MODEL)
    tensors, stored, meant = load_file(str(plain / "model.safetensors")), {}, {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        stored[name] = meant[name] = tensor.bfloat16()
        if "proj" not in name:
            continue
        if kind == "fp8":
            stored[name], stored[name + "_scale_inv"], meant[name] = float8_parts(
                tensor.shape, BLOCK, torch.float32, i
            )
        else:
            words, scales, sizes, meant[name] = int4_parts(tensor.shape, 32, i)
            del stored[name]
            stored |= {name + "_packed": words, name + "_scale": scales, name + "_shape": sizes}
    save_file(
        {name: tensor.to(torch.float32) for name, tensor in meant.items()}, str(plain / "model.safetensors")
    )
    settings = fp8(weight_block_size=list(BLOCK)) if kind == "fp8" else compressed("pack-quantized", INT4)
    fields = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    save_file(stored, str(folder / "model.safetensors"))
    return folder, plain


def load(
    folder: str, groups, parallel: ParallelConfig, *, bf16: bool = False
) -> tuple[HiddenStateModel | InterleavedModel, Architecture]:
    architecture = read_architecture(folder, flag="--hf-checkpoint")
    model = build_model(
        architecture, parallel, groups, vocab_size=90, divisible_by=16, bf16=bf16, flag="", initialize=False
    )
    load_hf_weights(model, architecture, folder, groups, flag="--hf-checkpoint")
    return model, architecture


def _compare(rank: int, world_size: int, quantised_folder: str, plain: str, save: str) -> None:
    tp = min(world_size, 2)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=world_size // tp)
    with process_groups(parallel, seed=3) as groups:
        for bf16 in (False, True):
            found, architecture = load(quantised_folder, groups, parallel, bf16=bf16)
            expected, _ = load(plain, groups, parallel, bf16=bf16)
            others = dict(expected.named_parameters())
            for name, parameter in found.named_parameters():
                assert torch.equal(parameter, others[name]), name
        save_hf_weights(
            found,
            architecture,
            groups,
            template=quantised_folder,
            save=save,
            dtype=torch.bfloat16,
            max_file_bytes=20000,
        )


@pytest.mark.parametrize("kind, world_size", [("fp8", 1), ("fp8", 4), ("int4", 4)])
def test_shards_of_a_model_are_those_of_plain_weights_and_an_export_is_plain(
    folders, tmp_path, kind, world_size
) -> None:
    folder, plain = folders[kind]
    save = tmp_path / "export"
    run_ranks(world_size, _compare, str(folder), str(plain), str(save))
    assert "quantization_config" not in json.loads((save / "config.json").read_text())
    exported: dict[str, torch.Tensor] = {}
    for path in save.glob("*.safetensors"):
        exported |= load_file(str(path))
    meant = load_file(str(plain / "model.safetensors"))
    assert exported.keys() == meant.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, meant[name].bfloat16())
    assert is_for_bf16(str(folder), flag="") and not is_for_bf16(str(plain), flag="")


def fail(folder: Path) -> str:
    architecture = read_architecture(str(folder), flag="--hf-checkpoint")
    with pytest.raises(ValueError) as caught, contextlib.ExitStack() as files:
        source = TensorFolder(str(folder), files, flag="--hf-checkpoint")
        source.check_names(tensor_names(architecture))
        source.read(Piece(O_PROJ, (64, 64), torch.empty(64, 64), 0, 64))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"--hf-checkpoint {folder}: ")
    return message


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.pop(O_PROJ + "_scale_inv"),
            "has the type F8_E4M3, and has no scales that describe how it is read",
        ),
        (
            lambda t: t.update({O_PROJ + "_scale_inv": torch.ones(3, 3)}),
            "[3, 3]; blocks of 24 x 40 of [64, 64] have [3, 2]",
        ),
        (
            lambda t: t.update({O_PROJ + "_scale_inv": torch.ones(3, 2).byte()}),
            "is U8, which is not the type of a scale",
        ),
        (
            lambda t: t.update({O_PROJ: torch.ones(64, 64)}),
            f"{O_PROJ} is F32 [64, 64]; with {O_PROJ}_scale_inv beside it",
        ),
        (lambda t: t.pop(O_PROJ), f"tensor {O_PROJ} is missing"),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.weight_scale_inv": torch.ones(1)}),
            "which this model has no",
        ),
        (
            lambda t: t.update({"model.norm.weight_packed": torch.ones(1)}),
            "which this model has no place for",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_named(folders, tmp_path, change, words) -> None:
    folder, _ = folders["fp8"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(str(copy / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(copy / "model.safetensors"))
    assert words in fail(copy)


def test_a_head_that_is_quantised_is_not_the_embedding(tmp_path) -> None:
    numbers, scales, _ = float8_parts((16, 8), (8, 8), torch.float32, 1)
    head = {"lm_head.weight": numbers, "lm_head.weight_scale_inv": scales}
    write(tmp_path, fp8(weight_block_size=[8, 8]), head | {"model.embed_tokens.weight": torch.ones(16, 8)})
    assert has_own_head(str(tmp_path), flag="")


@pytest.mark.parametrize(
    "settings, words",
    [
        (fp8(fmt="e5m2"), "fmt = 'e5m2' is not implemented"),
        (fp8(weight_block_size=[128]), "weight_block_size = [128]; two whole numbers"),
        (fp8(expert_dtype="fp4"), "expert_dtype = 'fp4' is not implemented"),
        (compressed("nvfp4-pack-quantized", INT4), "format nvfp4-pack-quantized with 1 config_groups"),
        (compressed("pack-quantized", INT4 | {"num_bits": 8}), "num_bits = 8 is not implemented"),
        (compressed("pack-quantized", INT4 | {"symmetric": False}), "symmetric = False is not implemented"),
        (compressed("pack-quantized", INT4 | {"actorder": "group"}), "actorder = 'group' is not implemented"),
        (
            compressed("pack-quantized", INT4 | {"strategy": "channel"}),
            "strategy = 'channel' is not implemented",
        ),
        (
            compressed("pack-quantized", INT4, transform_config={"config_groups": {"R1": {}}}),
            "transform_config = ",
        ),
        (
            compressed("pack-quantized", INT4, sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config = ",
        ),
        (
            {"quant_method": "awq", "bits": 4},
            "it is quantised (awq); of quantised weights fp8, mxfp4, compressed-tens",
        ),
        ({"quant_method": "gptq", "bits": 4}, "(gptq)"),
        ({"quant_method": "bitsandbytes"}, "(bitsandbytes)"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(settings, words) -> None:
    for fields in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        with pytest.raises(ValueError) as caught:
            find_format(fields, where="--hf-checkpoint DIR: config.json")
        assert str(caught.value).startswith("--hf-checkpoint DIR: config.json") and words in str(caught.value)


def test_published_settings_are_known() -> None:
    published = {
        "fp8 in blocks of 128 x 128": [
            fp8(weight_block_size=[128, 128]),
            fp8(weight_block_size=[128, 128], scale_fmt="ue8m0"),
            fp8(weight_block_size=[128, 128], modules_to_not_convert=["lm_head"]) | {"fmt": "float8_e4m3fn"},
        ],
        "mxfp4": [{"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}],
        "int4 in groups of 32": [compressed("pack-quantized", INT4, kv_cache_scheme=None, version="0.12.3")],
        "fp8, one scale a channel": [compressed("float-quantized", FLOAT8)],
        "fp8, one scale a matrix": [fp8(weight_block_size=None, activation_scheme="static")],
    }
    for label, every in published.items():
        for settings in every:
            found = find_format({"quantization_config": settings}, where="")
            assert found is not None and found.label == label


def test_transformers_is_not_compared_with_on_a_quantised_folder(folders, tmp_path, capfd) -> None:
    options = ["--hf-checkpoint", str(folders["int4"][0]), "--save", str(tmp_path / "m"), "--verify"]
    convert_checkpoint.main(["hf-to-megatron", *options])
    assert "is quantised (int4 in groups of 32)" in capfd.readouterr().err
    assert not (tmp_path / "m").exists()


def _same_shards(rank: int, world_size: int, folder: str, plain: str) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=world_size)
    with process_groups(parallel, seed=3) as groups:
        (found, _), (expected, _) = load(folder, groups, parallel), load(plain, groups, parallel)
        others = dict(expected.named_parameters())
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, others[name]), name


def test_shards_of_gpt_oss_in_mxfp4_are_those_of_plain_weights(tmp_path) -> None:
    plain, folder = tmp_path / "plain", tmp_path / "mxfp4"
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    save_model(plain, "gpt_oss", num_local_experts=3, num_experts_per_tok=2, **shape)
    meant, stored = load_file(str(plain / "model.safetensors")), {}
    for name, tensor in list(meant.items()):
        if name.endswith("_proj") and tensor.dim() == 3:
            experts, columns, rows = tensor.shape
            stored[name + "_blocks"], stored[name + "_scales"], numbers = mxfp4_parts(experts, rows, columns)
            meant[name] = numbers.transpose(1, 2).float().contiguous()
        else:
            stored[name] = tensor
    assert sum(name.endswith("_blocks") for name in stored) == 2
    save_file(meant, str(plain / "model.safetensors"))
    folder.mkdir()
    fields = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    save_file(stored, str(folder / "model.safetensors"))
    for world_size in (1, 2):
        run_ranks(world_size, _same_shards, str(folder), str(plain))
