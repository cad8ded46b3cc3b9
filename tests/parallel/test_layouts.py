"""The whole step, with real megatron-core on gloo, agrees between parallel layouts from the same rollouts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.steps import train_and_record
from tests.tiny import config

INTERFACES = ("paper", "code", "exact", "strict", "uld", "alm", "bytes", "sft")
LAYOUTS = {"tp2": (2, 2), "dp2": (2, 1), "tp2 x dp2": (4, 2)}


def _run(rank, world_size, folder, *flags):
    """Loss sum, label count and gradient norm of each step, and the rollout gap, as this rank saw them."""
    return _run_each(rank, world_size, folder, [flags])[0]


def _run_each(rank, world_size, folder, runs):
    """`_run` for several sets of flags of one layout, in the same processes."""
    configs = [config(folder, *flags) for flags in runs]
    results = []
    with process_groups(configs[0].parallel, seed=configs[0].training.seed) as groups:
        for resolved in configs:
            job = build_job(resolved, groups)
            reports = train_and_record(job)
            parameters = job.updater._ddp.module.state_dict_for_save_checkpoint()
            norm_weight = parameters["decoder.final_layernorm.weight"].clone()
            results.append(([(r.sums, r.grad_norm, r.learning_rate) for r in reports], norm_weight))
    return results


@pytest.fixture(scope="module")
def recorded(tiny, weights, tmp_path_factory):
    """One process samples, trains, and leaves its rollouts."""
    rollouts = tmp_path_factory.mktemp("rollouts")
    save = [
        (*weights, "--simct-interface", interface, "--save-debug-rollout-data", str(rollouts / interface))
        for interface in INTERFACES
    ]
    (results,) = run_ranks(1, _run_each, tiny, save)
    return rollouts, dict(zip(INTERFACES, results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(tiny, weights, recorded, layout):
    folder, expected = recorded
    world_size, tp = LAYOUTS[layout]
    runs = [
        (
            *(*weights, "--simct-interface", interface, "--tensor-model-parallel-size", str(tp)),
            *("--load-debug-rollout-data", str(folder / interface)),
        )
        for interface in INTERFACES
    ]
    for results in run_ranks(world_size, _run_each, tiny, runs):
        for interface, (steps, weight) in zip(INTERFACES, results, strict=True):
            reference_steps, reference_weight = expected[interface]
            assert len(reference_steps) == 2
            for (sums, grad_norm, lr), (wanted, wanted_norm, wanted_lr) in zip(steps, reference_steps, strict=True):
                assert sums.keys() == wanted.keys()
                assert wanted["loss"] > 0.1 and wanted_norm > 0.01
                for name, value in wanted.items():
                    assert math.isclose(sums[name], value, rel_tol=1e-5, abs_tol=1e-4), (interface, name)
                assert math.isclose(grad_norm, wanted_norm, rel_tol=1e-5), interface
                assert lr == wanted_lr
            torch.testing.assert_close(weight, reference_weight, rtol=1e-5, atol=1e-6, msg=interface)


@pytest.mark.parametrize("micro_batch_size", ["1", "8"])
def test_micro_batch_size_changes_nothing(tiny, weights, recorded, micro_batch_size):
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


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_sampling_does_not_depend_on_the_layout(tiny, weights, recorded, tmp_path, layout):
    """The rollouts of step 0 are the same tokens: draws depend on seed and sample id, weights on the seed."""
    from megatron_simct.rollout.engine import ReplayEngine

    world_size, tp = LAYOUTS[layout]
    run_ranks(
        world_size,
        _run,
        tiny,
        *weights,
        *("--tensor-model-parallel-size", str(tp), "--train-iters", "1", "--save-debug-rollout-data", str(tmp_path)),
    )
    ours, theirs = ({r.sample_id: r for r in _read(ReplayEngine, p)} for p in (tmp_path, recorded[0] / "paper"))
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for sample_id, rollout in theirs.items():
        assert ours[sample_id].student_ids.tolist() == rollout.student_ids.tolist()
        torch.testing.assert_close(
            torch.from_numpy(ours[sample_id].logprobs), torch.from_numpy(rollout.logprobs), rtol=0, atol=1e-4
        )


def _read(engine_class, folder):
    from megatron_simct.records import Prompt

    engine = engine_class(None, save_dir=None, load_dir=str(folder), dp_rank=0, writes=False)
    empty = torch.zeros(0).numpy()
    return engine.generate([Prompt(sample_id=i, student_ids=empty, teacher_ids=empty) for i in range(8)], None)


def test_sampled_log_probs_are_the_trainer_s(recorded):
    """Every sampled label scores the same in training: the sum of both sides agrees to 1e-4 a label."""
    import json

    folder, expected = recorded
    for step, (sums, _, _) in enumerate(expected["paper"][0]):
        rows = [
            row for file in (folder / "paper").glob(f"rollout_{step}.*.json") for row in json.loads(file.read_text())
        ]
        sampled = -sum(sum(row["logprobs"]) for row in rows)
        assert sums["num_labels"] == sum(len(row["student_ids"]) for row in rows) > 40
        assert abs(sums["student_nll_sum"] - sampled) < 1e-4 * sums["num_labels"]
