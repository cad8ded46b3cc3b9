"""A resumed run ends bit by bit as an undisturbed one, and reports it if it cannot."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.job import build_job
from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import MicroBatch, Rollout
from megatron_simct.train import main, train
from megatron_simct.update import checkpoint
from megatron_simct.update.checkpoint import RUN_FILE, TRACKER, load_weights
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import assert_same_run, metrics, run, tensors
from tests.tiny import command_line, config


def trained(files: Path, folder: Path, iterations: int, *flags: str, world_size: int = 1) -> str:
    """Run to this iteration in the folder, and resume from its checkpoint; returns the
    first rank's output.
    """
    results = run_ranks(world_size, run, arguments(files, folder, iterations, *flags))
    assert all(code == 0 for code, _, _ in results), results
    return results[0][1]


def arguments(files: Path, folder: Path, iterations: int, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--eval-prompt-data", str(files / "held_out.jsonl"), "--eval-interval", "2"),
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--run-dir", str(folder / "run")),
        *("--save", str(folder / "save"), "--load", str(folder / "save"), *flags),
    )


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """Four steps in one go on one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = trained(tiny, folder, 4)
    assert "no checkpoint there yet, starting from the beginning" in text
    return folder


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, undisturbed, tmp_path, optimizer) -> None:
    if optimizer == "sgd":
        undisturbed = tmp_path / "undisturbed"
        trained(tiny, undisturbed, 4, "--optimizer", "sgd")
    folder = tmp_path / "resumed"
    trained(tiny, folder, 1, "--optimizer", optimizer, "--eval-interval", "9")
    text = trained(tiny, folder, 4, "--optimizer", optimizer)
    assert "after iteration 1" in text and "train_iters 1 -> 4" in text
    assert_same_run(folder, undisturbed)


@pytest.fixture(scope="module")
def two_ranks(tiny, weights, tmp_path_factory) -> Path:
    """Four steps on two tensor-parallel ranks; every step's checkpoint is kept."""
    folder = tmp_path_factory.mktemp("two_ranks")
    flags = ("--save-interval", "1", "--tensor-model-parallel-size", "2")
    trained(tiny, folder, 4, *weights, *flags, world_size=2)
    return folder


@pytest.mark.parametrize("world_size, pp", [(1, 1), (2, 1), (2, 2)], ids=["one", "dp2", "pp2"])
def test_a_run_on_two_ranks_goes_on_in_another_layout(
    tiny, weights, two_ranks, tmp_path, world_size, pp
) -> None:
    (tmp_path / TRACKER).write_text("2")
    (tmp_path / "iter_0000002").symlink_to(two_ranks / "save" / "iter_0000002")
    layout = ("--load", str(tmp_path), "--pipeline-model-parallel-size", str(pp))
    argv = arguments(tiny, tmp_path / "out", 4, *weights[2:], *layout)
    code, text, _ = run_ranks(world_size, run, argv)[0]
    assert code == 0 and "tensor_model_parallel_size 2 -> 1" in text
    assert_same_steps(tmp_path / "out", two_ranks)


def assert_same_steps(found: Path, expected: Path) -> None:
    """Steps 3 and 4 of two runs agree to 1e-5."""
    ours, theirs = (
        [row for row in metrics(folder) if row["kind"] == "step" and row["iteration"] > 2]
        for folder in (found, expected)
    )
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs] == [3, 4]
    for row, expected in zip(ours, theirs, strict=True):
        assert expected["loss"] > 0.1
        for name in ("loss", "grad_norm", "learning_rate", "response_length"):
            assert math.isclose(row[name], expected[name], rel_tol=1e-5), (name, row[name], expected[name])


def test_rollouts_are_recorded_under_the_step_that_the_run_goes_on_from(tiny, undisturbed, tmp_path) -> None:
    load = ("--load", str(undisturbed / "save"))
    trained(tiny, tmp_path, 5, *load, "--save-debug-rollout-data", str(tmp_path / "rollouts"))
    (file,) = (tmp_path / "rollouts").iterdir()
    assert file.name == "rollout_4.0.json"
    assert {row["weight_version"] for row in json.loads(file.read_text())} == {4}


def test_two_data_parallel_ranks_resume_bit_by_bit(tiny, tmp_path) -> None:
    """With micro-batches that are divided by tokens."""
    for folder, stops in ((tmp_path / "undisturbed", [3]), (tmp_path / "resumed", [2, 3])):
        for iterations in stops:
            trained(tiny, folder, iterations, "--max-tokens-per-gpu", "130", world_size=2)
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def test_two_pipeline_stages_resume_bit_by_bit(tiny, tmp_path) -> None:
    flags = ("--pipeline-model-parallel-size", "2")
    trained(tiny, tmp_path / "through", 3, *flags, world_size=2)
    trained(tiny, tmp_path / "resumed", 2, *flags, world_size=2)
    trained(tiny, tmp_path / "resumed", 3, *flags, world_size=2)
    assert_same_run(tmp_path / "resumed", tmp_path / "through")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a student with experts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    save_model(folder, "qwen3_moe", vocab_size=360, head_dim=8, **shape)
    return "--hf-checkpoint", str(folder), "--adam-eps", "1e-4"


@pytest.fixture(scope="module")
def shared_experts(tiny, weights, experts, tmp_path_factory) -> Path:
    """Four steps on two ranks that share experts, in one go."""
    folder = tmp_path_factory.mktemp("shared_experts")
    flags = ("--save-interval", "1", "--expert-model-parallel-size", "2")
    trained(tiny, folder, 4, *weights[2:], *experts, *flags, world_size=2)
    return folder


def test_two_ranks_that_share_experts_resume_bit_by_bit(
    tiny, weights, experts, shared_experts, tmp_path
) -> None:
    flags = ("--save-interval", "1", "--expert-model-parallel-size", "2")
    for iterations in (2, 4):
        trained(tiny, tmp_path, iterations, *weights[2:], *experts, *flags, world_size=2)
    assert_same_run(tmp_path, shared_experts)


def test_a_run_on_ranks_that_share_experts_goes_on_alone(
    tiny, weights, experts, shared_experts, tmp_path
) -> None:
    (tmp_path / TRACKER).write_text("2")
    (tmp_path / "iter_0000002").symlink_to(shared_experts / "save" / "iter_0000002")
    argv = arguments(tiny, tmp_path / "out", 4, *weights[2:], *experts, "--load", str(tmp_path))
    ((code, text, _),) = run_ranks(1, run, argv)
    assert code == 0 and "expert_model_parallel_size 2 -> 1" in text
    assert_same_steps(tmp_path / "out", shared_experts)


def test_weights_of_a_run_with_experts_start_another(
    tiny, weights, experts, shared_experts, tmp_path
) -> None:
    flags = ("--pretrained-checkpoint", str(shared_experts / "save"))
    assert "resuming" not in trained(tiny, tmp_path, 1, *weights[2:], *experts, *flags)


def test_a_finished_run_that_is_started_again_changes_nothing(tiny, undisturbed) -> None:
    before = metrics(undisturbed), tensors(undisturbed)
    run_file = undisturbed / "save" / "iter_0000004" / RUN_FILE
    written_ns = run_file.stat().st_mtime_ns
    text = trained(tiny, undisturbed, 4)
    assert "after iteration 4" in text and "changed" not in text
    assert run_file.stat().st_mtime_ns == written_ns, "nothing is saved twice"
    after = metrics(undisturbed), tensors(undisturbed)
    assert after[0] == before[0] and after[1][0] == before[1][0] == 4
    assert all(torch.equal(value, before[1][1][name]) for name, value in after[1][1].items())


def test_beside_a_checkpoint_lie_its_configuration_and_versions(undisturbed) -> None:
    written = json.loads((undisturbed / "save" / "iter_0000004" / RUN_FILE).read_text())
    assert written["iteration"] == 4 and written["world_size"] == 1
    assert written["config"]["lr"] == 1e-3 and written["config"]["train_iters"] == 4
    assert {"torch", "megatron-core", "python", "megatron_simct"} <= written["versions"].keys()
    assert written["identity"]["model"]["hidden_size"] == 32


def _validations(rank: int, world_size: int, argv: list[str]) -> list[str]:
    """The iterations whose shards are compared over all ranks."""
    found: list[str] = []
    save = checkpoint.dist_checkpointing.save

    def counting(state, folder, *args, **options):
        found.extend([Path(folder).name[:12]] * options["validate_access_integrity"])
        return save(state, folder, *args, **options)

    checkpoint.dist_checkpointing.save = counting
    assert run(rank, world_size, argv)[0] == 0
    return found


def test_shards_are_compared_over_all_ranks_once_a_run(tiny, tmp_path) -> None:
    for last, first in (("3", "iter_0000001"), ("5", "iter_0000004")):
        argv = arguments(tiny, tmp_path, int(last), "--save-interval", "1")
        assert run_ranks(2, _validations, argv) == [[first]] * 2
        assert (tmp_path / "save" / TRACKER).read_text() == last


def test_a_lower_rate_on_the_command_line_wins_over_the_checkpoint(tiny, undisturbed, tmp_path) -> None:
    flags = ("--load", str(undisturbed / "save"), "--lr", "1e-5")
    trained(tiny, tmp_path, 5, *flags)
    assert [row["learning_rate"] for row in metrics(tmp_path) if row["kind"] == "step"] == [1e-5]


# Random state


def _random_state_after(rank, world_size, files, folder, save) -> list[float]:
    """Numbers drawn after saving, or after loading."""
    argv = arguments(files, folder, 1, *(() if save else ("--seed", "77")))
    resolved = config(files, *argv[len(command_line(files)) :])
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        torch.rand(rank + 1)
        job = build_job(resolved, groups)
        if save:
            job.save(0)
            assert not multiprocessing.active_children(), "a save leaves no process behind"
        job.monitor.close()
        return torch.rand(3).tolist()


def test_every_rank_has_its_own_random_state_again(tiny, tmp_path) -> None:
    saved = run_ranks(2, _random_state_after, tiny, tmp_path, True)
    assert saved[0] != saved[1]
    assert run_ranks(2, _random_state_after, tiny, tmp_path, False) == saved


# Refusals


def refused(argv: list[str], *words: str, world_size: int = 1) -> None:
    for code, out, err in run_ranks(world_size, run, argv):
        assert code == 1 and err.count("\n") == 1, (out, err)
        for word in words:
            assert word in err, err


def test_a_checkpoint_of_another_model_or_map_is_refused(tiny, undisturbed, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    fields = json.loads((tiny / "student" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-5}))
    load = ("--load", str(undisturbed / "save"), "--save", str(tmp_path / "save"))
    refused(
        arguments(tiny, tmp_path, 4, *load, "--hf-checkpoint", str(other)),
        "--hf-checkpoint",
        "norm_epsilon 1e-06",
    )
    refused(arguments(tiny, tmp_path, 4, *load, "--stop-token-ids", "5"), "--load", "--tokenizer-model")
    refused(arguments(tiny, tmp_path, 4, *load, "--teacher-stop-token-ids", "5"), "--teacher-tokenizer-model")
    refused(
        arguments(tiny, tmp_path, 4, *load, "--simct-interface", "sft"),
        "--teacher-tokenizer-model",
        "None here",
    )
    refused(
        arguments(tiny, tmp_path, 4, "--load", str(tmp_path / "nowhere")),
        "--load",
        "no checkpoint there",
        TRACKER,
    )


def test_weights_alone_are_no_run(tiny, weights, tmp_path) -> None:
    refused(arguments(tiny, tmp_path, 4, "--load", weights[1]), "--load", RUN_FILE, "--pretrained-checkpoint")


def test_a_directory_that_cannot_be_written_is_named_on_every_rank(tiny, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    argv = arguments(
        tiny, tmp_path, 4, "--save", str(tmp_path / "file" / "save"), "--load", str(tmp_path / "x")
    )
    refused(argv, "--save", "Not a directory", world_size=2)


def _student_weights(rank, world_size, files, source) -> tuple[int, list[float]]:
    resolved = config(files)
    with process_groups(resolved.parallel, seed=9) as groups:
        model = load_model(
            resolved, resolved.model, groups, open_tokenizer(resolved.model, prefix=""), prefix=""
        )
        iteration = load_weights(model, str(source), flag="--pretrained-checkpoint")
        return iteration, model.decoder.final_layernorm.weight.tolist()


def test_weights_are_read_from_a_whole_checkpoint(tiny, undisturbed) -> None:
    iteration, norm = run_ranks(1, _student_weights, tiny, undisturbed / "save")[0]
    assert iteration == 4 and norm == tensors(undisturbed)[1]["decoder.final_layernorm.weight"].tolist()
    assert norm != [1.0] * 32


# Kills and stops


def test_only_the_newest_checkpoints_are_kept_and_remains_are_removed(tiny, tmp_path) -> None:
    remains = tmp_path / "save" / "iter_0000009.tmp"
    remains.mkdir(parents=True)
    (remains / "half").write_text("")
    (
        tmp_path / "save" / "iter_0000007"
    ).mkdir()  # of an earlier run that went further; it is not among this run's newest
    trained(tiny, tmp_path, 4, "--save-interval", "1", "--save-retain", "2")
    kept = ["iter_0000003", "iter_0000004", "iter_0000007", TRACKER]
    assert sorted(p.name for p in (tmp_path / "save").iterdir()) == kept


SAVE_MOMENTS = ("while shards are written", "before the name", "before the tracker", "before older ones go")


def _killed_in_save(rank, world_size, argv, moment) -> None:
    """kill -9 during the save of iteration 2."""
    save, rename, replace = checkpoint.dist_checkpointing.save, os.rename, os.replace
    here = iter(range(9))

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_save(state, path, *more, **options) -> Any:
        request = save(state, path, *more, **options)
        if moment == SAVE_MOMENTS[0] and "0000002" in path:
            for file in list(Path(path).iterdir())[1:]:
                file.unlink()
            kill()
        return request

    def killed_rename(source, target) -> None:
        if moment == SAVE_MOMENTS[1] and str(target).endswith("iter_0000002"):
            kill()
        if moment == SAVE_MOMENTS[3] and str(source).endswith("iter_0000001"):
            kill()
        rename(source, target)

    def killed_replace(source, target) -> None:
        if moment == SAVE_MOMENTS[2] and str(target).endswith(TRACKER) and next(here) == 1:
            kill()
        replace(source, target)

    checkpoint.dist_checkpointing.save = killed_save
    checkpoint.os.rename, checkpoint.os.replace = killed_rename, killed_replace
    main(argv)


@pytest.mark.parametrize("moment", SAVE_MOMENTS)
def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_to_resume_from(
    tiny, undisturbed, tmp_path, moment
) -> None:
    flags = ("--save-interval", "1", "--save-retain", "1")
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(1, _killed_in_save, arguments(tiny, tmp_path, 4, *flags), moment)
    text = trained(tiny, tmp_path, 4, *flags)
    assert f"after iteration {2 if moment == SAVE_MOMENTS[3] else 1}" in text
    assert sorted(p.name for p in (tmp_path / "save").iterdir()) == ["iter_0000004", TRACKER]
    assert_same_run(tmp_path, undisturbed)


def test_a_kill_while_a_checkpoint_takes_the_place_of_another_leaves_one_of_them(tiny, tmp_path) -> None:
    """A run that starts again in the folder of an old one saves an iteration that the
    tracker already names.
    """
    argv = arguments(tiny, tmp_path, 2)
    trained(tiny, tmp_path, 2)
    load = argv.index("--load")
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(1, _killed_in_save, argv[:load] + argv[load + 2 :], SAVE_MOMENTS[1])
    assert "after iteration 2" in trained(tiny, tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "save").iterdir()) == ["iter_0000002", TRACKER]


def _signalled(rank, world_size, argv) -> str:
    """SIGTERM to one rank alone, in the rollout of its second step."""
    resolved = config(Path(), *argv)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        generate = job.engine.generate

        def generate_and_signal(prompts, sampling) -> list[Rollout]:
            if rank == world_size - 1 and prompts[0].sample_id >= 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return generate(prompts, sampling)

        job.engine.generate = generate_and_signal
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train(job)
            job.monitor.close()
        return out.getvalue()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_one_rank_stops_all_after_a_save(tiny, undisturbed, tmp_path, world_size) -> None:
    argv = arguments(tiny, tmp_path, 4, "--exit-signal-handler")
    texts = run_ranks(world_size, _signalled, argv)
    assert " SIGTERM: saving and exiting after iteration 2\n" in texts[0]
    assert (tmp_path / "save" / TRACKER).read_text() == "2"
    if world_size == 1:
        trained(tiny, tmp_path, 4)
        assert_same_run(tmp_path, undisturbed)


def test_time_that_is_over_stops_after_a_save(tiny, tmp_path) -> None:
    results = run_ranks(2, run, arguments(tiny, tmp_path, 4, "--exit-duration-in-mins", "1e-6"))
    assert [code for code, _, _ in results] == [0, 0]
    assert (
        " --exit-duration-in-mins 1e-06 has passed: saving and exiting after iteration 1\n" in results[0][1]
    )
    assert (tmp_path / "save" / TRACKER).read_text() == "1"


# Numbers that are not finite


def _poisoned(rank, world_size, argv) -> tuple[str, list[int]]:
    """The error of each rank if the teacher's score of a sample of rank 1 is nan in step
    1; and that sample.
    """
    resolved = config(Path(), *argv)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        pack, poisoned_ids = job.pack, []

        def poisoned(prompts, rollouts, pairs, scored, **more) -> list[MicroBatch]:
            score = next(s for s in scored if s.hidden is not None and len(s.hidden))
            if rank == 1 and prompts[0].sample_id >= 8:
                score.hidden[:] = math.nan
                poisoned_ids.append(score.sample_id)
            return pack(prompts, rollouts, pairs, scored, **more)

        object.__setattr__(job, "pack", poisoned)
        with pytest.raises(RuntimeError) as error:
            train(job)
        return str(error.value), poisoned_ids


def test_the_error_names_rank_and_samples_and_keeps_the_batch(tiny, tmp_path) -> None:
    argv = arguments(tiny, tmp_path, 2)
    (first, _), (second, (poisoned_id,)) = run_ranks(2, _poisoned, argv)
    folder = tmp_path / "run" / "not_finite"
    for message in (first, second):
        assert "loss on rank 1 (samples " in message and "rank 0 (" not in message
        named = message.split("(samples ")[1].split(")")[0].split(", ")
        assert str(poisoned_id) in named and len(named) == 2, "those of one micro-batch"
        assert f"--load-debug-rollout-data {folder}" in message
    assert sorted(p.name for p in folder.iterdir()) == ["rollout_1.0.json", "rollout_1.1.json"]
    rows = [row for p in folder.iterdir() for row in json.loads(p.read_text())]
    assert sorted(row["sample_id"] for row in rows) == list(range(8, 16))
