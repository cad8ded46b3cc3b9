"""Adapters against the model with weights W + (alpha / r) B A: its outputs, gradients and samples.

    dL / dB = (alpha / r) dL/dW A^T        dL / dA = (alpha / r) B^T dL/dW

with dL/dW from one process that trains all weights of the merged folder, on the same rollouts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_simct.commands.convert_checkpoint import main as convert
from megatron_simct.config.options import LoraConfig
from megatron_simct.job import build_job
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_mapping import parameters_of
from megatron_simct.models.layers import Layer
from megatron_simct.models.lora import MARK, adapter_parameters, adapters_of, module_name, target_modules
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import run, tensors
from tests.steps import train_and_record
from tests.tiny import command_line, config

pytest.importorskip("transformers")

RANK, ALPHA = 3, 5.0
EXPERTS = {"count": 4, "width": 8, "chosen": 2, "shared_width": 8}
SCALE = ALPHA / RANK
LAYOUTS = {
    "one": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "tp2 sp, all recomputed": (
        2,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ),
    ),
    "pp2 interleaved": (
        2,
        ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    ),
    "tp2 pp2": (
        4,
        ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"),
    ),
}
FAMILIES: dict[str, dict] = {
    "llama": {"num_hidden_layers": 4},  # fused projections of several heads each
    "phi3": {"num_hidden_layers": 4, "tie_word_embeddings": True},  # one tensor of queries, keys and values
    "gemma2": {"num_hidden_layers": 4, "head_dim": 8},  # norms after the projections
}


def drawn(name: str, *shape: int) -> torch.Tensor:
    """float64 numbers that depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.2


def pair_of(name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] for the tensor of the folder: float64 with float32's precision."""
    a, b = drawn(f"{name} A", RANK, shape[1]), drawn(f"{name} B", shape[0], RANK)
    return a.float().double(), b.float().double()


def merged(folder: Path, save: Path, targets: set[str]) -> dict[str, torch.Tensor]:
    """Write W + (alpha / r) B A as a folder; its tensors in float64."""
    save.mkdir()
    tensors = load_file(str(folder / "model.safetensors"))
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.double()
        if module_name(name) in targets and tensor.dim() == 2:
            a, b = pair_of(name, tensor.shape)
            found[name] += SCALE * b @ a
    save_file({name: tensor.float() for name, tensor in found.items()}, str(save / "model.safetensors"))
    (save / "config.json").write_text((folder / "config.json").read_text())
    return found


def fill(model, tp_rank: int, tp_size: int) -> dict[str, tuple[str, str, int]]:
    """Put A and B of `pair_of` into the adapters. For each parameter: the folder's tensor, which of the two,
    and its first row or column.
    """
    places = {}
    for _, adapter in adapters_of(model):
        for index, rows in enumerate(adapter.parts.rows):
            single = len(adapter.parts.names) == 1
            name = adapter.parts.names[0 if single else index]
            key = module_name(name)
            if key not in adapter.down:
                continue
            name, total = name.replace("*", str(adapter.layer)), sum(adapter.parts.rows) if single else rows
            begin = sum(adapter.parts.rows[:index]) if single else 0
            down, up = adapter.down[key], adapter.up[f"{key}_{index}"]
            width = down.shape[1] * (tp_size if adapter.splits_columns else 1)
            a, b = pair_of(name, (total, width))
            column = tp_rank * down.shape[1] if adapter.splits_columns else 0
            row = begin + (0 if adapter.splits_columns else tp_rank * len(up))
            down.data.copy_(a[:, column : column + down.shape[1]])
            up.data.copy_(b[row : row + len(up)])
            places[down], places[up] = (name, "A", column), (name, "B", row)
    return places


@dataclass
class Found:
    """Results of one rank."""

    loss: float
    gradients: list[tuple[str, str, int, torch.Tensor]]
    sampled: dict[int, list[int]]
    trained: int


def _lora_step(rank, world_size, files, runs) -> list[Found]:
    found = []
    for flags in runs:
        resolved = config(files, *flags)
        with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
            job = build_job(resolved, groups)
            chunks = [ddp.module for ddp in job.updater._chunks]
            places: dict = {}
            for chunk in chunks:
                places |= fill(chunk, groups.tp_rank, groups.tp_size)
            trained = {p for chunk in chunks for p in chunk.parameters() if p.requires_grad}
            assert trained == places.keys(), "adapters are trained, and nothing else"
            assert all(
                MARK in name for chunk in chunks for name, p in chunk.named_parameters() if p in trained
            )
            job.updater._optimizer.reload_model_params()
            sampled = job.evaluator._engine.generate(job.prompts.batch(0), job.sampling)
            (report,) = train_and_record(job)
            gradients = [(*place, parameter.main_grad.clone()) for parameter, place in places.items()]
            found.append(
                Found(
                    loss=report.sums["loss"],
                    gradients=gradients,
                    sampled={rollout.sample_id: rollout.student_ids.tolist() for rollout in sampled},
                    trained=sum(p.numel() for p in trained),
                )
            )
    return found


def _full_step(rank, world_size, files, flags) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every tensor of the folder in float64."""
    resolved = config(files, *flags)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        (report,) = train_and_record(job)
        (ddp,) = job.updater._chunks
        for parameter in ddp.module.parameters():
            parameter.data = parameter.main_grad.clone()
        architecture = read_architecture(resolved.model.folder, flag="")
        gradients: dict[str, torch.Tensor] = {}
        for rule, place, shard in parameters_of(ddp.module, architecture, tp_rank=0, tp_size=1):
            for piece in rule.pieces(shard, place):
                target = gradients.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.float64))
                target = target.narrow(piece.axis, piece.begin, piece.end - piece.begin)
                target.copy_(piece.view.reshape(target.shape))
        return report.sums["loss"], gradients


@dataclass
class Case:
    base: Path
    merged: dict[str, torch.Tensor]
    flags: tuple[str, ...]
    loss: float
    gradients: dict[str, torch.Tensor]
    sampled: dict[int, list[int]]
    teacher: str


@pytest.fixture(scope="module")
def cases(tiny, weights, tmp_path_factory) -> dict[str, Case]:
    """Each family's folder, and the results of one process with the merged weights."""
    found = {}
    for family, fields in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        save_model(folder / "base", family, vocab_size=360, scale=0.2, **fields)
        names = load_file(str(folder / "base/model.safetensors"))
        whole = merged(
            folder / "base", folder / "merged", {module_name(name) for name in names if "_proj" in name}
        )
        common = (
            *(*weights[2:], "--train-iters", "1", "--clip-grad", "0", "--simct-interface", "strict"),
            *("--eval-prompt-data", str(tiny / "held_out.jsonl"), "--eval-interval", "9"),
        )
        record = (
            *("--save-debug-rollout-data", str(folder / "rollouts")),
            *("--save-debug-scored-data", str(folder / "scored")),
        )
        ((loss, gradients),) = run_ranks(
            1, _full_step, tiny, (*common, *record, "--hf-checkpoint", str(folder / "merged"))
        )
        rows = [path for path in sorted((folder / "rollouts").rglob("*")) if path.is_file()]
        replay = (
            *("--load-debug-rollout-data", str(folder / "rollouts")),
            *("--load-debug-scored-data", str(folder / "scored")),
            *("--hf-checkpoint", str(folder / "base"), "--lora-rank", str(RANK), "--lora-alpha", str(ALPHA)),
        )
        found[family] = Case(
            folder / "base", whole, (*common, *replay), loss, gradients, _tokens(rows), weights[3]
        )
    return found


def _tokens(paths: list[Path]) -> dict[int, list[int]]:
    return {row["sample_id"]: row["student_ids"] for path in paths for row in json.loads(path.read_text())}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_samples_are_those_of_the_merged_weights(tiny, cases, layout) -> None:
    world_size, flags = LAYOUTS[layout]
    if layout not in ("one", "tp2 pp2"):
        cases = {"llama": cases["llama"]}
    results = run_ranks(world_size, _lora_step, tiny, [(*case.flags, *flags) for case in cases.values()])
    tp_size = 2 if "tp2" in layout else 1
    for found in results:
        for (family, case), one in zip(cases.items(), found, strict=True):
            assert one.loss == pytest.approx(case.loss, rel=1e-5), family
            assert one.gradients
            # The engine samples with them.
            assert one.sampled and one.sampled.items() <= case.sampled.items(), family
            for name, which, begin, gradient in one.gradients:
                of_weight = case.gradients[name]
                a, b = pair_of(name, of_weight.shape)
                wanted = SCALE * (b.T @ of_weight if which == "A" else of_weight @ a.T)
                axis = 1 if which == "A" else 0
                wanted = wanted.narrow(axis, begin, gradient.shape[axis])
                largest = float(wanted.abs().max())
                assert largest > 1e-7
                assert float((gradient - wanted).abs().max()) < 2e-5 * largest + 1e-9, (family, name, which)
            lora = config(tiny, *case.flags).lora
            architecture = read_architecture(str(case.base), flag="")
            counts = adapter_parameters(architecture, lora, tp_size=tp_size, flag="")
            share = 2 if "pp2" in layout else 1
            assert one.trained * share == sum(counts[layer] for layer in architecture.layers)


def arguments(files: Path, folder: Path, iterations: int, case: Case, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--teacher-pretrained-checkpoint", case.teacher, "--adam-eps", "1e-4"),
        *("--hf-checkpoint", str(case.base), "--simct-interface", "strict", "--lora-rank", str(RANK)),
        *("--train-iters", str(iterations), "--lr-decay-style", "constant", "--lr", "0.05", "--seed", "7"),
        *("--save", str(folder / "save"), "--load", str(folder / "save"), *flags),
    )


def trained(files: Path, folder: Path, iterations: int, case: Case, *flags: str, world_size: int = 1) -> str:
    results = run_ranks(world_size, run, arguments(files, folder, iterations, case, *flags))
    assert all(code == 0 for code, _, _ in results), results
    return results[0][1]


@pytest.fixture(scope="module")
def undisturbed(tiny, cases, tmp_path_factory) -> Path:
    """Two steps in one go on one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trained(tiny, folder, 2, cases["llama"])
    return folder


def test_a_checkpoint_holds_adapters_and_resumes_bit_by_bit_and_in_another_layout(
    tiny, cases, undisturbed, tmp_path
) -> None:
    trained(tiny, tmp_path / "a", 1, cases["llama"])
    assert "resuming" in trained(tiny, tmp_path / "a", 2, cases["llama"])
    (_, expected), (_, found) = tensors(undisturbed), tensors(tmp_path / "a")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    weights = {name for name in found if not name.startswith("rng_state")}
    assert len(weights) > 40 and all(MARK in name for name in weights), "nothing of the weights themselves"
    tp2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    trained(tiny, tmp_path / "b", 1, cases["llama"], *tp2, world_size=2)
    pp2_dp2 = ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer")
    trained(tiny, tmp_path / "b", 2, cases["llama"], *pp2_dp2, world_size=4)
    (_, found) = tensors(tmp_path / "b")
    moved = 0.0
    for name, value in expected.items():
        if name in weights and not name.startswith("optimizer"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)
            moved = max(moved, float(value.abs().max()))
    assert moved > 0.02


def _convert(rank: int, world_size: int, argv: list[str]) -> int | None:
    return convert(argv)


def export(save: Path, undisturbed: Path, case: Case, *flags: str, world_size: int = 1) -> None:
    places = ("--load", str(undisturbed / "save"), "--hf-checkpoint", str(case.base), "--save", str(save))
    results = run_ranks(
        world_size, _convert, ["megatron-to-hf", *places, "--make-vocab-size-divisible-by", "8", *flags]
    )
    assert set(results) == {0}


def test_exports_merged_and_as_a_folder_of_peft(tiny, cases, undisturbed, tmp_path) -> None:
    case = cases["llama"]
    export(tmp_path / "merged", undisturbed, case, "--verify")
    export(tmp_path / "peft", undisturbed, case, "--peft")
    tp2_pp2 = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--peft")
    export(tmp_path / "again", undisturbed, case, *tp2_pp2, world_size=4)
    pairs, again = (
        load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("peft", "again")
    )
    assert pairs.keys() == again.keys() and all(torch.equal(pairs[name], again[name]) for name in pairs)
    base = load_file(str(case.base / "model.safetensors"))
    whole = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        whole |= load_file(str(path))
    assert whole.keys() == base.keys()
    changed = 0
    for name, tensor in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        wanted = tensor.double()
        if f"{module}.lora_A.weight" in pairs:
            a, b = (pairs.pop(f"{module}.lora_{which}.weight").double() for which in "AB")
            wanted = wanted + 32.0 / RANK * b @ a
            changed += 1
        torch.testing.assert_close(whole[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert changed == 28 and not pairs


def test_peft_computes_the_same_with_the_exported_folder(tiny, cases, undisturbed, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    from transformers import AutoModelForCausalLM

    export(tmp_path / "merged", undisturbed, cases["llama"])
    export(tmp_path / "peft", undisturbed, cases["llama"], "--peft")
    tokens = torch.arange(40).view(2, 20) * 7 % 360
    base, whole = (
        AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        for folder in (cases["llama"].base, tmp_path / "merged")
    )
    with torch.no_grad():
        before, wanted = base(tokens).logits, whole(tokens).logits
        found = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((found - before).abs().max()) > 0.01


def refused(files: Path, *argv: str) -> str:
    ((code, _, err),) = run_ranks(1, run, list(argv))
    assert code == 1
    return err


def test_experts_get_no_adapters_and_it_is_said() -> None:
    """Dense layers beside layers with experts have projections of the same names."""
    attention = GroupedQuery(heads=4, groups=2, head_dim=8, scale=0.3)
    layers = [Layer(attention=attention, mlp=mlp, rope=None) for mlp in (Dense(width=8), Experts(**EXPERTS))]
    options = {"hidden_size": 32, "vocab_size": 90, "max_position_embeddings": 64, "norm_epsilon": 1e-6}
    both, alone = (
        Architecture(layers=tuple(each), tied_embeddings=False, init_std=0.02, **options)
        for each in (layers, layers[1:])
    )

    def targets(architecture: Architecture, *names: str) -> frozenset[str]:
        return target_modules(architecture, LoraConfig(rank=2, target_modules=names), tp_size=1, flag="--x")

    attends = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert targets(both) == attends | {"gate_proj", "up_proj", "down_proj"} and targets(alone) == attends
    assert targets(both, "q_proj") == {"q_proj"}
    with pytest.raises(
        ValueError, match="up_proj: experts of --x have projections of that name .* k_proj, o_proj, q"
    ):
        targets(both, "q_proj", "up_proj")
    with pytest.raises(
        ValueError, match="up_proj: no projection of grouped-query attention or of a dense MLP in --x"
    ):
        targets(alone, "up_proj")


def test_what_cannot_be_adapted_or_resumed_is_refused_by_name(tiny, cases, undisturbed, tmp_path) -> None:
    case = cases["llama"]
    command = arguments(tiny, tmp_path, 2, case)
    assert "--lora-target-modules q_prj: no projection" in refused(
        tiny, *command, "--lora-target-modules", "q_prj"
    )
    assert "has no weights to which adapters" in refused(
        tiny, *command, "--hf-checkpoint", str(tiny / "student")
    )
    save_model(tmp_path / "one head", "llama", vocab_size=360, num_key_value_heads=1)
    plain = command_line(tiny, "--hf-checkpoint", str(tmp_path / "one head"), "--lora-rank", "2")
    tp2 = run_ranks(2, run, [*plain, "--tensor-model-parallel-size", "2", "--simct-interface", "strict"])
    assert "does not divide the 1 heads of keys" in tp2[0][2]
    other = tmp_path / "other"
    save_model(other, "llama", vocab_size=360, num_hidden_layers=4, scale=0.21)
    at = ("--load", str(undisturbed / "save"), "--save", str(tmp_path / "s"))
    assert "its adapters is not that of --lora-rank" in refused(
        tiny, *command, *at, "--hf-checkpoint", str(other)
    )
    assert "its adapters is not that of --lora-rank" in refused(tiny, *command, *at, "--lora-alpha", "3")
    from_adapters = command_line(
        tiny, "--hf-checkpoint", str(case.base), "--pretrained-checkpoint", str(undisturbed / "save")
    )
    assert "holds the adapters of a run with --lora-rank" in refused(tiny, *from_adapters)
    assert "--lora-alpha needs --lora-rank" in refused(tiny, *command_line(tiny, "--lora-alpha", "3"))
    assert "--lora-rank needs the weights of --hf-checkpoint" in refused(
        tiny, *from_adapters, "--lora-rank", "2"
    )
