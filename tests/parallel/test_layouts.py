"""The whole step, with real megatron-core on gloo, agrees between parallel layouts from the same rollouts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import MicroBatch, Rollout
from tests.distributed import run_ranks
from tests.steps import train_and_record
from tests.tiny import config

INTERFACES = ("paper", "code", "exact", "strict", "uld", "alm", "scalar", "bytes", "bytes, any", "sft")
OF_WHOLE_RESPONSES = ("partition", "topk_kl", "bpm")
OF_THEM = ("tp2", "dp2, packed", "pp2, packed")
"""Interfaces without context parallelism, and the layouts in which they are tried."""
OPTIONS = {
    "bytes, any": ("--simct-byte-bounds", "any"),
    "bpm": ("--simct-divergence", "forward_kl"),
    "strict": ("--simct-span-mse", "0.1"),
}
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
ADAM = ("--adam-eps", "1e-4")
"""Adam's first step is the sign of the gradient, also of a gradient that is rounding noise,
unless eps is larger.
"""
CP2 = ("--context-parallel-size", "2")
PACKED = ("--max-tokens-per-gpu", "114")  # data-parallel ranks need one micro-batch, or two
LAYOUTS = {
    "tp2": (2, TP2),
    "dp2": (2, ()),
    "tp2 x dp2": (4, TP2),
    "packed": (1, PACKED),
    "tp2, packed": (2, (*TP2, "--sequence-parallel", *PACKED)),
    "dp2, packed": (2, PACKED),
    "pp2, packed": (2, PP2 + PACKED),
    "cp2": (2, CP2),
    "cp2, packed": (2, CP2 + PACKED),
    "cp2 x tp2, packed": (4, (*CP2, *TP2, "--sequence-parallel", *PACKED)),
    "cp2, teacher cp1": (2, (*CP2, "--teacher-context-parallel-size", "1")),
}


def _run(rank, world_size, folder, *flags) -> tuple[list[Any], torch.Tensor]:
    """Loss sum, label count and gradient norm of each step, and the rollout gap, as this rank saw them."""
    return _run_each(rank, world_size, folder, [flags])[0]


def _run_each(rank, world_size, folder, runs) -> list[tuple[list[Any], torch.Tensor]]:
    """`_run` for several sets of flags of one layout, in the same processes."""
    configs = [config(folder, *ADAM, *flags) for flags in runs]
    results = []
    with process_groups(configs[0].parallel, seed=configs[0].training.seed) as groups:
        for resolved in configs:
            job = build_job(resolved, groups)
            reports = train_and_record(job)
            parameters = job.updater.model.state_dict_for_save_checkpoint()
            norm_weight = parameters.get("decoder.final_layernorm.weight", torch.empty(0)).clone()
            results.append(([(r.sums, r.grad_norm, r.learning_rate) for r in reports], norm_weight))
    return results


@pytest.fixture(scope="module")
def recorded(tiny, weights, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One process samples, trains, and leaves its rollouts."""
    rollouts = tmp_path_factory.mktemp("rollouts")
    names = INTERFACES + OF_WHOLE_RESPONSES
    save = [(*flags_of(weights, name), "--save-debug-rollout-data", str(rollouts / name)) for name in names]
    (results,) = run_ranks(1, _run_each, tiny, save)
    return rollouts, dict(zip(names, results, strict=True))


def flags_of(weights, interface: str) -> tuple[str, ...]:
    return (*weights, "--simct-interface", interface.split(",")[0], *OPTIONS.get(interface, ()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(tiny, weights, recorded, layout) -> None:
    folder, expected = recorded
    world_size, flags = LAYOUTS[layout]
    names = INTERFACES + OF_WHOLE_RESPONSES * (layout in OF_THEM)
    runs = [
        (*flags_of(weights, name), *flags, "--load-debug-rollout-data", str(folder / name)) for name in names
    ]
    for results in run_ranks(world_size, _run_each, tiny, runs):
        for interface, (steps, weight) in zip(names, results, strict=True):
            reference_steps, reference_weight = expected[interface]
            assert len(reference_steps) == 2
            for (sums, grad_norm, lr), (wanted, wanted_norm, wanted_lr) in zip(
                steps, reference_steps, strict=True
            ):
                assert sums.keys() == wanted.keys()
                assert wanted["loss"] > 0.1 and wanted_norm > 0.01
                for name, value in wanted.items():
                    # Sampling and training differ by rounding: some 1e-5 at each of a hundred labels.
                    least = 1e-3 if name.startswith("rollout_gap") else 1e-4
                    assert math.isclose(sums[name], value, rel_tol=1e-5, abs_tol=least), (interface, name)
                assert math.isclose(grad_norm, wanted_norm, rel_tol=1e-5), interface
                assert lr == wanted_lr
            if len(weight):  # on the last stage
                torch.testing.assert_close(weight, reference_weight, rtol=1e-5, atol=1e-6, msg=interface)


@pytest.mark.parametrize("micro_batch_size", ["1", "8"])
def test_micro_batch_size_changes_nothing(tiny, weights, recorded, micro_batch_size) -> None:
    folder, expected = recorded
    ((steps, weight),) = run_ranks(
        1,
        _run,
        tiny,
        *weights,
        "--micro-batch-size",
        micro_batch_size,
        "--load-debug-rollout-data",
        str(folder / "paper"),
    )
    for (sums, grad_norm, _), (wanted, wanted_norm, _) in zip(steps, expected["paper"][0], strict=True):
        assert math.isclose(sums["loss"], wanted["loss"], rel_tol=1e-5)
        assert math.isclose(grad_norm, wanted_norm, rel_tol=1e-5)
    torch.testing.assert_close(weight, expected["paper"][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["tp2", "dp2", "cp2"])
def test_sampling_does_not_depend_on_the_layout(tiny, weights, recorded, tmp_path, layout) -> None:
    """The rollouts of step 0 have the same tokens: draws depend on seed and sample id,
    weights on the seed.
    """
    from megatron_simct.rollout.engine import ReplayEngine

    world_size, flags = LAYOUTS[layout]
    save = ("--train-iters", "1", "--save-debug-rollout-data", str(tmp_path))
    run_ranks(world_size, _run, tiny, *weights, *flags, *save)
    ours, theirs = (
        {r.sample_id: r for r in _read(ReplayEngine, p)} for p in (tmp_path, recorded[0] / "paper")
    )
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for sample_id, rollout in theirs.items():
        assert ours[sample_id].student_ids.tolist() == rollout.student_ids.tolist()
        torch.testing.assert_close(
            torch.from_numpy(ours[sample_id].logprobs), torch.from_numpy(rollout.logprobs), rtol=0, atol=1e-4
        )


def _read(engine_class, folder) -> list[Rollout]:
    from megatron_simct.records import Prompt

    engine = engine_class(None, save_dir=None, load_dir=str(folder), dp_rank=0, writes=False)
    empty = torch.zeros(0).numpy()
    return engine.generate(
        [Prompt(sample_id=i, student_ids=empty, teacher_ids=empty) for i in range(8)], None
    )


def test_sampled_log_probs_are_the_trainer_s(recorded) -> None:
    """Every sampled label has the same log-prob in training: the sums of both sides agree to 1e-4 a label."""
    import json

    folder, expected = recorded
    for step, (sums, _, _) in enumerate(expected["paper"][0]):
        rows = [
            row
            for file in (folder / "paper").glob(f"rollout_{step}.*.json")
            for row in json.loads(file.read_text())
        ]
        sampled = -sum(sum(row["logprobs"]) for row in rows)
        assert sums["num_labels"] == sum(len(row["student_ids"]) for row in rows) > 40
        assert abs(sums["student_nll_sum"] - sampled) < 1e-4 * sums["num_labels"]


def _parts(rank, world_size, folder, *flags) -> list[Any]:
    """Each step's metrics of its gradient's parts, and its norm."""
    resolved = config(folder, *ADAM, *flags)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        return [
            (report.gradient_parts, report.grad_norm)
            for report in train_and_record(build_job(resolved, groups))
        ]


def _norms_of_parts(rank, world_size, folder, *flags) -> list[float]:
    """The gradient norm of the first step with all weights, with those of 1:1 positions, and
    with those of units.
    """
    found = []
    for kept in ([0, 1, 2], [0, 2], [1]):
        resolved = config(folder, *ADAM, *flags)
        with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
            job = build_job(resolved, groups)
            pack = job.pack

            def packed(*records, kept=kept, pack=pack, **more) -> list[MicroBatch]:
                batches = pack(*records, **more)
                for batch in batches:
                    batch.labels.weights[~torch.isin(batch.labels.kinds, torch.tensor(kept))] = 0
                return batches

            found.append(train_and_record(replace(job, pack=packed))[0].grad_norm)
    return found


def test_the_parts_of_the_gradient(tiny, weights, recorded) -> None:
    """Cosine and ratio follow from the norms of the whole gradient and of each part, in every layout."""
    replay = (*weights, "--load-debug-rollout-data", str(recorded[0] / "paper"))
    (norms,) = run_ranks(1, _norms_of_parts, tiny, *replay)
    whole, of_ones, of_units = norms
    cosine = (whole**2 - of_ones**2 - of_units**2) / (2 * of_ones * of_units)
    assert of_ones > 0.1 and of_units > 0.1 and abs(cosine) > 0.01
    layouts = [(1, ()), *(LAYOUTS[name] for name in ("tp2 x dp2", "pp2, packed"))]
    layouts.append((2, ("--use-distributed-optimizer", "--overlap-grad-reduce")))
    for world_size, flags in layouts:
        for reports in run_ranks(world_size, _parts, tiny, *replay, *flags, "--gradient-parts-interval", "1"):
            parts, grad_norm = reports[0]
            assert math.isclose(grad_norm, whole, rel_tol=1e-5), flags
            assert math.isclose(parts["gradient_ratio_units"], of_units / of_ones, rel_tol=1e-4), flags
            assert math.isclose(parts["gradient_cosine_units"], cosine, rel_tol=1e-3, abs_tol=1e-4), flags
    ((first, second),) = run_ranks(1, _parts, tiny, *replay, "--gradient-parts-interval", "2")
    assert first[0] == {} and second[0].keys() == parts.keys(), "every second step"
    assert math.isclose(second[1], recorded[1]["paper"][0][1][1], rel_tol=1e-5), "looking changes nothing"
