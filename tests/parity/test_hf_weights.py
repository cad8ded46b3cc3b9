"""Weights of Hugging Face folders: Megatron's logits equal those of transformers, and the errors
for damaged folders.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models import tensor_files
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.tensor_files import Piece, find_weights
from megatron_simct.parallel.initialize import Groups, process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model

pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama, one head a group, tied": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "vocab_size": 101,
    },
    "llama, wide heads, four heads a group": {
        "model_type": "llama",
        "num_attention_heads": 8,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "llama, scaled rotary": {
        "model_type": "llama",
        "max_position_embeddings": 16384,
        "rope_parameters": LLAMA3,
    },
    "llama, scaled rotary, every factor its own": {
        "model_type": "llama",
        "rope_parameters": LLAMA3
        | {
            "factor": 3.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 2.5,
            "original_max_position_embeddings": 32,
        },
    },
    "llama, linear rotary": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "hidden_size": 48, "vocab_size": 97},
    "qwen2, tied, many files": {"model_type": "qwen2", "tie_word_embeddings": True, "shard_size": "9KB"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    },
}
TOKENS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def load(
    folder: str, tp_size: int, ep_size: int = 1
) -> Iterator[tuple[HiddenStateModel | InterleavedModel, Groups]]:
    """This rank's model, from the folder."""
    architecture = read_architecture(folder, flag="--hf-checkpoint")
    parallel = ParallelConfig(tensor_model_parallel_size=tp_size, expert_model_parallel_size=ep_size)
    with process_groups(parallel, seed=3) as groups:
        model = build_model(
            architecture, parallel, groups, vocab_size=90, divisible_by=16, bf16=False, flag="--hf-checkpoint"
        )
        load_hf_weights(
            model,
            architecture,
            folder,
            groups,
            flag="--hf-checkpoint",
        )
        yield model.eval(), groups


def _logits(rank: int, world_size: int, folder: str) -> tuple[torch.Tensor, float]:
    """[B, S, published vocabulary] from all ranks' shards, and the largest absolute value
    in the padded rows.
    """
    with load(folder, world_size) as (model, groups):
        positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        with torch.no_grad():
            hidden = model(TOKENS, positions, None)
            shard = (hidden @ model.output_weight.T).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(world_size)]
        dist.all_gather(shards, shard, group=groups.tp)
        published = read_architecture(folder, flag="").vocab_size
        start = model.vocab_shard[0]
        padding = model.output_weight[max(0, published - start) :]
        return torch.cat(shards, dim=-1)[..., :published], float(padding.abs().sum())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Folder and transformers' logits of each of MODELS, made at the first request."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            folder = tmp_path_factory.mktemp("hf")
            model = save_model(folder, **MODELS[name])
            with torch.no_grad():
                made[name] = folder, model(TOKENS).logits
        return made[name]

    return make


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(folders, name, tp_size) -> None:
    folder, expected = folders(name)
    for logits, padding in run_ranks(tp_size, _logits, str(folder)):
        assert logits.shape == expected.shape
        assert relative(logits, expected) < 1e-4
        assert padding == 0


def test_the_many_files_are_many(folders) -> None:
    folder, _ = folders("qwen2, tied, many files")
    assert len(list(folder.glob("*.safetensors"))) > 5


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_one_changed_number_of_the_folder_shows_in_the_logits(folders, tmp_path, tensor) -> None:
    folder, expected = folders("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        index = -1 if tensor != "model.embed_tokens.weight" else (int(TOKENS[0, 0]), 0)
        tensors[tensor][index] += 1.0

    rewrite(copy, change)
    ((logits, _),) = run_ranks(1, _logits, str(copy))
    assert relative(logits, expected) > 1e-3


def test_the_scaling_of_rotary_frequencies_shows_in_the_logits(folders, tmp_path) -> None:
    folder, expected = folders("llama, scaled rotary")
    copy = shutil.copytree(folder, tmp_path / "copy")
    fields = json.loads((copy / "config.json").read_text())
    # The older spelling of the same.
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (copy / "config.json").write_text(json.dumps(fields))
    ((logits, _),) = run_ranks(1, _logits, str(copy))
    assert relative(logits, expected) < 1e-4
    (copy / "config.json").write_text(json.dumps(fields | {"rope_scaling": None}))
    ((logits, _),) = run_ranks(1, _logits, str(copy))
    assert relative(logits, expected) > 1e-3


def _numbers(rank: int, world_size: int, folder: str, tp_size: int, ep_size: int) -> tuple[int, int]:
    """The number of numbers that this rank read, and of its parameters that are not padding."""
    read, original = [], tensor_files.TensorFolder.read

    def counted(folder: object, piece: Piece) -> None:
        original(folder, piece)
        read.append(piece.view.numel())

    tensor_files.TensorFolder.read = counted
    with load(folder, tp_size, ep_size) as (model, _):
        published = read_architecture(folder, flag="").vocab_size
        padding = sum(max(0, end - max(start, published)) for start, end in [model.vocab_shard])
        held = sum(parameter.numel() for parameter in model.parameters())
        return sum(read), held - padding * 32 * (1 if model.share_embeddings_and_output_weights else 2)


@pytest.mark.parametrize("name", ["llama", "qwen2, tied, many files"])
def test_a_rank_reads_its_own_shard_and_no_more(folders, name) -> None:
    for read, held in run_ranks(2, _numbers, str(folders(name)[0]), 2, 1):
        assert read == held


@pytest.mark.parametrize(
    "name, world_size, tp_size, ep_size",
    [("llama", 2, 1, 1), ("llama", 4, 2, 1), ("qwen3_moe", 2, 1, 2), ("qwen3_moe", 4, 1, 2)],
)
def test_ranks_with_the_same_weights_read_the_folder_once(
    folders, name, world_size, tp_size, ep_size
) -> None:
    folder = str(folders(name)[0])
    numbers = run_ranks(world_size, _numbers, folder, tp_size, ep_size)
    alone = run_ranks(tp_size, _numbers, folder, tp_size, 1)
    assert sum(read for read, _ in numbers) == sum(held for _, held in alone)
    largest = 112 * 32  # the embedding with its padding
    shares = [read for read, _ in numbers]
    assert max(shares) - min(shares) <= largest, "each reads about as much as the others"


def _parameters(
    rank: int, world_size: int, folder: str, tp_size: int, ep_size: int
) -> dict[str, torch.Tensor]:
    with load(folder, tp_size, ep_size) as (model, _):
        return {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor is not None
        }


@pytest.mark.parametrize("name, ep_size", [("llama", 1), ("qwen3_moe", 1), ("qwen3_moe", 2)])
def test_every_replica_has_the_weights_that_one_reads_alone(folders, name, ep_size) -> None:
    folder = str(folders(name)[0])
    alone = run_ranks(ep_size, _parameters, folder, 1, ep_size)
    for rank, found in enumerate(run_ranks(2 * ep_size, _parameters, folder, 1, ep_size)):
        expected = alone[rank % ep_size]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def _refused(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(ValueError) as raised, load(folder, 1):
        pass
    return str(raised.value)


def test_what_one_replica_cannot_read_is_an_error_on_all(folders, tmp_path) -> None:
    copy = shutil.copytree(folders("llama")[0], tmp_path / "copy")
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    first, *others = run_ranks(3, _refused, str(copy))
    assert "tensor model.norm.weight of model.safetensors has the shape [7]" in first
    assert others == [first, first]


def _second_stage(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    """Parameters of a model of one layer that has the number of the folder's second layer."""
    architecture = read_architecture(folder, flag="")
    with process_groups(ParallelConfig(), seed=3) as groups:
        model = build_model(
            replace(architecture, layers=architecture.layers[1:2]),
            ParallelConfig(),
            groups,
            vocab_size=90,
            divisible_by=1,
            bf16=False,
            flag="",
        )
        model.decoder.layers[0].layer_number = 2
        load_hf_weights(model, architecture, folder, groups, flag="")
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_layer_is_filled_by_its_number_in_the_whole_model(folders) -> None:
    from safetensors.torch import load_file

    folder, _ = folders("llama")
    (parameters,) = run_ranks(1, _second_stage, str(folder))
    expected = load_file(str(folder / "model.safetensors"))["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(parameters["decoder.layers.0.self_attention.linear_proj.weight"], expected)


# Damaged folders.


def rewrite(folder: Path, change, file: str = "model.safetensors") -> None:
    """Write the file again after `change` has changed its tensors, a dictionary by name."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(folder / file))
    change(tensors)
    save_file(tensors, str(folder / file))


def fail(folder: Path) -> str:
    """The error of loading a folder, which is one line."""
    (message,) = run_ranks(1, _fail, str(folder))
    assert "\n" not in message and message.startswith(f"--hf-checkpoint {folder}: ")
    return message


def _fail(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(ValueError) as caught, load(folder, world_size):
        pass
    return str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.fixture
def single(folders, tmp_path) -> Path:
    return shutil.copytree(folders("llama")[0], tmp_path / "copy")


@pytest.fixture
def sharded(folders, tmp_path) -> Path:
    return shutil.copytree(folders("qwen2, tied, many files")[0], tmp_path / "sharded")


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(O_PROJ), [f"tensor {O_PROJ} is missing in model.safetensors"]),
        (lambda t: t.pop("lm_head.weight"), ["tensor lm_head.weight is missing in model.safetensors"]),
        (
            lambda t: t.update({O_PROJ: torch.zeros(32, 30)}),
            [O_PROJ, "[32, 30]", "config.json asks for [32, 32]"],
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(98, 32)}),
            ["lm_head.weight", "[98, 32]", "[99, 32]"],
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            ["model.safetensors holds model.layers.0.self_attn.q_proj.bias", "no place for"],
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.zeros(32)}),
            ["model.layers.2.input_layernorm.weight", "no place for"],
        ),
    ],
)
def test_wrong_tensors_are_named(single, change, words) -> None:
    rewrite(single, change)
    message = fail(single)
    for word in words:
        assert word in message


def test_experts_that_are_missing_or_too_many_are_named(folders, tmp_path) -> None:
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    for change, words in (
        (lambda t: t.pop(name.format(3)), f"tensor {name.format(3)} is missing in model.safetensors"),
        (
            lambda t: t.update({name.format(4): torch.zeros(32, 20)}),
            f"holds {name.format(4)}, which this model has no",
        ),
    ):
        copy = shutil.copytree(folders("qwen3_moe")[0], tmp_path / words.split()[0])
        rewrite(copy, change)
        assert words in fail(copy)


@pytest.mark.parametrize("damage", [truncate, garble])
def test_a_damaged_file_is_named(single, sharded, damage) -> None:
    damage(single / "model.safetensors")
    assert "model.safetensors is damaged or unreadable" in fail(single)
    file = "model-00003-of-"
    (path,) = sharded.glob(file + "*")
    damage(path)
    assert f"{path.name} is damaged or unreadable" in fail(sharded)


def test_quantised_weights_that_nothing_describes_are_refused_by_name(single) -> None:
    rewrite(single, lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e4m3fn)}))
    said = (
        f"tensor {O_PROJ} of model.safetensors has the type F8_E4M3, and config.json has no "
        "quantization_config"
    )
    assert said in fail(single)
    path = single / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}})
    )
    assert "config.json says it is quantised (awq); of quantised weights fp8, mxfp4, compressed-t" in fail(
        single
    )


def test_a_truncated_shard_is_named_with_the_tensor(sharded) -> None:
    (path,) = sharded.glob("model-00003-of-*")
    truncate(path)
    assert re.search(
        rf"{path.name} is damaged or unreadable \(truncated: tensor model\.\S+ ends at byte", fail(sharded)
    )


def test_an_index_that_names_a_missing_file(sharded) -> None:
    (path,) = sharded.glob("model-00002-of-*")
    path.unlink()
    message = fail(sharded)
    assert re.search(
        rf"model.safetensors.index.json places model\.\S+ in {path.name}, which is missing", message
    )


def test_an_index_that_lacks_a_tensor_or_names_the_wrong_file(sharded) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = content["weight_map"]
    right = files[O_PROJ]
    files[O_PROJ] = next(file for file in files.values() if file != right)
    index.write_text(json.dumps(content))
    assert f"cannot read tensor {O_PROJ} of {files[O_PROJ]}" in fail(sharded)
    del files[O_PROJ]
    index.write_text(json.dumps(content))
    assert f"tensor {O_PROJ} is missing in model.safetensors.index.json" in fail(sharded)
    index.write_text("{}")
    assert "cannot read model.safetensors.index.json (KeyError" in fail(sharded)


def test_folders_without_weights_and_with_weights_that_are_not_read(tmp_path) -> None:
    assert find_weights(str(tmp_path), flag="--hf-checkpoint") is None
    for name in ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"^--hf-checkpoint \S+: has {re.escape(name)}, but neither"):
            find_weights(str(tmp_path), flag="--hf-checkpoint")
    (tmp_path / "model.safetensors").touch()
    assert find_weights(str(tmp_path), flag="--hf-checkpoint") == tmp_path / "model.safetensors"
