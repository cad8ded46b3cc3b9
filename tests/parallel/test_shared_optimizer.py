"""Checkpoints of the distributed optimizer: resumed bit by bit, in other layouts, by and from
the plain optimizer.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_simct.update.checkpoint import TRACKER
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import assert_same_run, metrics, run, tensors
from tests.tiny import command_line

SHARED = ("--use-distributed-optimizer",)


def trained(
    files: Path, folder: Path, iterations: int, *flags: str, world_size: int = 1, load: Path | None = None
) -> str:
    """Run to this iteration in the folder, from `load` or the folder's checkpoint; returns the
    first rank's output.
    """
    argv = command_line(
        files,
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--run-dir", str(folder / "run")),
        *("--save", str(folder / "save"), "--load", str(load or folder / "save"), *flags),
    )
    results = run_ranks(world_size, run, argv)
    assert all(code == 0 for code, _, _ in results), results
    return results[0][1]


@pytest.fixture(scope="module")
def through(tiny, weights, tmp_path_factory) -> Path:
    """Three steps in one go at TP2 x DP2 with the distributed optimizer, each step's checkpoint kept."""
    folder = tmp_path_factory.mktemp("through")
    layout = ("--tensor-model-parallel-size", "2", "--save-interval", "1")
    trained(tiny, folder, 3, *weights, *SHARED, *layout, world_size=4)
    return folder


def cut(source: Path, folder: Path, iteration: int) -> Path:
    """A directory of checkpoints that ends at this iteration."""
    folder.mkdir()
    (folder / TRACKER).write_text(str(iteration))
    name = f"iter_{iteration:07d}"
    (folder / name).symlink_to(source / "save" / name)
    return folder


def test_it_resumes_bit_by_bit(tiny, weights, through, tmp_path) -> None:
    flags = (*weights, *SHARED, "--tensor-model-parallel-size", "2", "--save-interval", "1")
    for iterations in (1, 3):
        trained(tiny, tmp_path, iterations, *flags, world_size=4)
    assert_same_run(tmp_path, through)


OTHERS = {
    "pp2": (2, ("--pipeline-model-parallel-size", "2", *SHARED)),
    "dp4": (4, SHARED),
    "dp2, without it": (2, ()),
    "one process, without it": (1, ()),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_a_run_goes_on_in_another_layout_and_without_it(tiny, weights, through, tmp_path, layout) -> None:
    world_size, flags = OTHERS[layout]
    load = cut(through, tmp_path / "load", 1)
    trained(
        tiny,
        tmp_path / "out",
        3,
        *weights[2:],
        *flags,
        "--micro-batch-size",
        "1",
        world_size=world_size,
        load=load,
    )
    ours, theirs = (
        [r for r in metrics(f) if r["kind"] == "step" and r["iteration"] > 1]
        for f in (tmp_path / "out", through)
    )
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs] == [2, 3]
    for row, wanted in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "response_length"):
            assert math.isclose(row[name], wanted[name], rel_tol=1e-5), (name, row[name], wanted[name])


def test_what_is_saved_does_not_show_which_optimizer_it_was(tiny, weights, tmp_path) -> None:
    """Two steps on two ranks with either optimizer: the same tensors under the same names. Each continues
    from the first step of the other.
    """
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    for folder, flags in ((plain, ()), (shared, SHARED)):
        trained(tiny, folder, 2, *weights, *flags, "--save-interval", "1", world_size=2)
    (_, ours), (_, theirs) = tensors(shared), tensors(plain)
    assert ours.keys() == theirs.keys() and sum("optimizer.state.exp_avg_sq" in name for name in ours) > 5
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for source, flags in ((plain, SHARED), (shared, ())):
        target = tmp_path / f"from {source.name}"
        trained(
            tiny,
            target,
            2,
            *weights[2:],
            *flags,
            world_size=2,
            load=cut(source, tmp_path / f"1 {source.name}", 1),
        )
        (_, found), (_, wanted) = tensors(target), tensors(source)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_weights_that_are_gathered_late_are_fresh_where_they_are_sampled_from_and_saved(
    tiny, weights, tmp_path
) -> None:
    late = (*SHARED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000")
    for folder, flags in ((tmp_path / "plain", ()), (tmp_path / "late", late)):
        trained(tiny, folder, 3, *weights, *flags, world_size=2)
    for ours, theirs in zip(metrics(tmp_path / "late"), metrics(tmp_path / "plain"), strict=True):
        assert ours["rollout_logprob_gap"] < 1e-5 and ours["response_length"] == theirs["response_length"]
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
    (_, found), (_, wanted) = tensors(tmp_path / "late"), tensors(tmp_path / "plain")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a student with experts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    save_model(folder, "qwen3_moe", vocab_size=360, head_dim=8, **shape)
    return "--hf-checkpoint", str(folder), "--adam-eps", "1e-4"


def test_experts_resume_bit_by_bit_and_go_on_alone(tiny, weights, experts, tmp_path) -> None:
    flags = (*weights[2:], *experts, *SHARED, "--expert-model-parallel-size", "2", "--save-interval", "1")
    trained(tiny, tmp_path / "through", 2, *flags, world_size=4)
    for iterations in (1, 2):
        trained(tiny, tmp_path / "resumed", iterations, *flags, world_size=4)
    assert_same_run(tmp_path / "resumed", tmp_path / "through")
    load = cut(tmp_path / "through", tmp_path / "load", 1)
    trained(tiny, tmp_path / "alone", 2, *weights[2:], *experts, load=load)
    (_, found), (_, wanted) = tensors(tmp_path / "alone"), tensors(tmp_path / "through")
    for name, value in wanted.items():
        if not name.startswith("rng_state"):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_resume_bit_by_bit(tiny, weights, tmp_path) -> None:
    """--lora-rank with the distributed optimizer: most parameters have neither gradient nor state."""
    pytest.importorskip("transformers")
    save_model(tmp_path / "student", "llama", vocab_size=360)
    student = (*weights[2:], "--hf-checkpoint", str(tmp_path / "student"), "--lora-rank", "4")
    flags = (*student, *SHARED, "--save-interval", "1")
    trained(tiny, tmp_path / "through", 2, *flags, world_size=2)
    for iterations in (1, 2):
        trained(tiny, tmp_path / "resumed", iterations, *flags, world_size=2)
    assert_same_run(tmp_path / "resumed", tmp_path / "through")
    trained(tiny, tmp_path / "plain", 2, *student, world_size=2)
    for ours, theirs in zip(metrics(tmp_path / "through"), metrics(tmp_path / "plain"), strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
        assert math.isclose(ours["grad_norm"], theirs["grad_norm"], rel_tol=1e-5)
