"""A teacher in another job scores as the colocated one does, for all layouts of the two jobs."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_simct.teacher.build
from megatron_simct.config.options import ParallelConfig
from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import ScoredPair
from megatron_simct.teacher.client import Patience, TeacherClient
from megatron_simct.teacher.service import serve
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import metrics, run
from tests.steps import train_and_record
from tests.teacher_jobs import (
    ModelFreeTeacher,
    TeacherJob,
    answer_of,
    collect,
    make_request,
    open_client,
    same_answer,
)
from tests.tiny import command_line, config

INTERFACES = ("paper", "code", "strict", "uld", "alm", "bytes")
TEACHERS = {"one": (1, 1, 1), "tp2 x cp2": (2, 1, 2), "pp2": (1, 2, 1), "tp2 x pp2": (2, 2, 1)}
ADAM = ("--adam-eps", "1e-4")
"""Adam's first step is the sign of the gradient, also of a gradient that is rounding noise,
unless eps is larger.
"""
STUDENTS = {"one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "cp2": (1, 1, 2)}


def layout(tp: int, pp: int, cp: int = 1) -> tuple[str, ...]:
    return (
        *("--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)),
        *("--context-parallel-size", str(cp)),
    )


def _run(rank, world_size, folder, *flags) -> tuple[list[Any], dict[str, int]]:
    """Loss sums and gradient norm of each step on this rank, and the counts of its client."""
    megatron_simct.teacher.build.Patience = partial(
        Patience, hello_s=0.2, silence_s=2.0, look_s=0.1, look_again_s=0.1
    )
    resolved = config(folder, *ADAM, *flags)
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        reports = train_and_record(job)
        teacher = job.teacher
        while hasattr(teacher, "_scorer"):  # inside the scorers that save
            teacher = teacher._scorer
        counts = dict(teacher._client.counts) if getattr(teacher, "_client", None) else {}
    return [(r.sums, r.grad_norm) for r in reports], counts


@pytest.fixture(scope="module")
def colocated(tiny, weights, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One process, both models: its rollouts, and its training results by interface."""
    rollouts = tmp_path_factory.mktemp("rollouts")
    return rollouts, {
        interface: run_ranks(
            1,
            _run,
            tiny,
            *(
                *weights,
                "--simct-interface",
                interface,
                "--save-debug-rollout-data",
                str(rollouts / interface),
            ),
        )[0]
        for interface in (*INTERFACES, "topk_kl")
    }


def assert_same(results, colocated, *, tolerance: float) -> None:
    reference, _ = colocated
    assert len(reference) >= 2
    for steps, _ in results:
        for (sums, grad_norm), (wanted, wanted_norm) in zip(steps, reference, strict=True):
            assert sums.keys() == wanted.keys()
            assert wanted["loss"] > 0.1 and wanted_norm > 0.01
            for name, value in wanted.items():
                assert math.isclose(sums[name], value, rel_tol=tolerance, abs_tol=10 * tolerance), name
            assert math.isclose(grad_norm, wanted_norm, rel_tol=tolerance)


@pytest.fixture(scope="module")
def served(tiny, weights, tmp_path_factory) -> Iterator[Path]:
    """The run directory of a teacher's job of one process that answers in fp32."""
    run_dir = tmp_path_factory.mktemp("served")
    with TeacherJob(
        tiny, weights, run_dir, "--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "128"
    ):
        yield run_dir


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_layout_of_both_jobs_and_every_interface(
    tiny, weights, colocated, served, tmp_path, teacher
) -> None:
    """Each pair of values of the teacher's layout, the student's layout and the interface
    occurs at least once.
    """
    sizes = TEACHERS[teacher]
    flags = (*layout(*sizes), "--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "128")
    with contextlib.ExitStack() as stack:
        run_dir = served
        if teacher != "one":
            run_dir = tmp_path
            stack.enter_context(TeacherJob(tiny, weights, tmp_path, *flags, world_size=math.prod(sizes)))
        first = list(TEACHERS).index(teacher)
        for number, interface in enumerate(INTERFACES):
            student = list(STUDENTS.values())[(first + number) % len(STUDENTS)]
            remote = _remote(weights, colocated[0], interface, run_dir, *layout(*student))
            results = run_ranks(math.prod(student), _run, tiny, *remote)
            assert_same(results, colocated[1][interface], tolerance=1e-5)
        if teacher == "tp2 x cp2":  # ids of tokens from ranks that share a response
            remote = _remote(weights, colocated[0], "topk_kl", run_dir, *layout(2, 1))
            assert_same(run_ranks(2, _run, tiny, *remote), colocated[1]["topk_kl"], tolerance=1e-5)


EXPERTS = {
    "ep2": (2, ("--expert-model-parallel-size", "2")),
    "tp2 x ep2": (4, (*layout(2, 1), "--expert-model-parallel-size", "2", "--sequence-parallel")),
}


@pytest.fixture(scope="module")
def experts(tiny, weights, tmp_path_factory) -> tuple[tuple[str, ...], Path, dict[str, Any]]:
    """Flags of a teacher with experts, its rollouts, and the results of training with it colocated."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    of_experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    }
    save_model(folder / "teacher", "qwen3_moe", vocab_size=320, head_dim=8, **of_experts)
    flags = ("--teacher-hf-checkpoint", str(folder / "teacher"))
    expected = {}
    for interface in ("paper", "bytes"):
        saved = ("--simct-interface", interface, "--save-debug-rollout-data", str(folder / interface))
        (expected[interface],) = run_ranks(1, _run, tiny, *weights[:2], *flags, *saved)
    return flags, folder, expected


@pytest.mark.parametrize("layout_of_teacher", EXPERTS)
def test_a_teacher_whose_replicas_share_experts(tiny, weights, experts, tmp_path, layout_of_teacher) -> None:
    of_teacher, rollouts, expected = experts
    world_size, flags = EXPERTS[layout_of_teacher]
    flags = (*of_teacher, *flags, "--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "64")
    with TeacherJob(tiny, (), tmp_path, *flags, world_size=world_size, replicas=2) as teacher:
        for interface, (tp, pp) in {"paper": (1, 1), "bytes": (2, 1)}.items():
            remote = _remote(weights[:2], rollouts, interface, tmp_path, *of_teacher, *layout(tp, pp))
            results = run_ranks(
                tp * pp, _run_when_two_are_known, tiny, *remote, "--teacher-window-tokens", "64"
            )
            assert_same(results, expected[interface], tolerance=1e-5)
        deadline = time.monotonic() + 30
        while sum(answered := [status["requests"] for status in teacher.statuses()]) < 2 * 16:
            assert time.monotonic() < deadline, f"of two runs of 16 requests: {answered}"
            time.sleep(0.2)
        assert len(answered) == 2 and min(answered) > 0


@pytest.mark.parametrize(
    "dtype, interfaces, tolerance", [("bf16", ("paper", "bytes"), 5e-3), ("int8", ("paper",), 1e-2)]
)
def test_rounded_hidden_states(tiny, weights, colocated, tmp_path, dtype, interfaces, tolerance) -> None:
    rollouts, expected = colocated
    with TeacherJob(tiny, weights, tmp_path, "--teacher-hidden-dtype", dtype):
        for interface in interfaces:
            ((steps, counts),) = run_ranks(1, _run, tiny, *_remote(weights, rollouts, interface, tmp_path))
            assert_same([(steps, counts)], expected[interface], tolerance=tolerance)
            exact = expected[interface][0][0][0]["teacher_nll_sum"]
            assert 0 < abs(steps[0][0]["teacher_nll_sum"] - exact) < 1e-2 * exact, "nothing was rounded"


def _remote(weights, rollouts, interface, run_dir, *flags) -> tuple[str, ...]:
    return (
        *(*weights, "--simct-interface", interface, "--load-debug-rollout-data", str(rollouts / interface)),
        *("--teacher-endpoint", str(run_dir), *flags),
    )


def test_between_hosts_with_keys_in_waves_and_by_two_students(tiny, weights, colocated, tmp_path) -> None:
    rollouts, expected = colocated
    flags = ("--bind", "tcp://127.0.0.1", "--teacher-hidden-dtype", "fp32")
    with TeacherJob(tiny, weights, tmp_path, *flags) as teacher:
        waves = _remote(weights, rollouts, "paper", tmp_path, "--rollout-wave-size", "3")
        assert_same(run_ranks(2, _run, tiny, *waves), expected["paper"], tolerance=1e-5)
        key = str(teacher.folder / "client_key.json")
        by_hand = _remote(weights, rollouts, "paper", teacher.endpoint.address, "--teacher-client-key", key)
        assert_same(run_ranks(1, _run, tiny, *by_hand), expected["paper"], tolerance=1e-5)


@pytest.mark.parametrize("interface", ["paper", "bytes", "topk_kl"])
def test_answers_on_disk_take_the_place_of_a_teacher(
    tiny, weights, colocated, served, tmp_path, interface
) -> None:
    """Saved by the colocated teacher in one layout, read in another. A cache asks only for
    answers that it lacks.
    """
    rollouts, expected = colocated
    replay = (
        *weights,
        "--simct-interface",
        interface,
        "--load-debug-rollout-data",
        str(rollouts / interface),
    )
    disk = str(tmp_path / "disk")
    run_ranks(2, _run, tiny, *replay, *layout(1, 2), "--save-debug-scored-data", disk)
    results = run_ranks(2, _run, tiny, *replay, *layout(2, 1), "--load-debug-scored-data", disk)
    assert_same(results, expected[interface], tolerance=1e-5)
    next(path for path in (tmp_path / "disk").rglob("*.bin")).unlink()
    with pytest.raises(
        AssertionError, match="TeacherError: --load-debug-scored-data .*: no answer for sample"
    ):
        run_ranks(1, _run, tiny, *replay, "--load-debug-scored-data", disk)
    copies = tmp_path / "copies"
    asked = []
    for _ in range(2):
        remote = (
            "--teacher-endpoint",
            str(served),
            "--teacher-cache",
            disk,
            "--save-debug-scored-data",
            str(copies),
        )
        ((steps, counts),) = run_ranks(1, _run, tiny, *replay, *remote)
        assert_same([(steps, counts)], expected[interface], tolerance=1e-5)
        asked.append(counts["answers"])
    assert asked == [1, 0]
    assert len(list(copies.rglob("*.bin"))) == 16
    about = tmp_path / "disk" / "teacher.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"teacher_weights": "others"}))
    argv = [*command_line(tiny, *replay), *layout(2, 1), "--load-debug-scored-data", disk]
    for code, _, err in run_ranks(2, run, argv):
        assert code == 1 and "teacher weights: others at the teacher" in err and err.count("\n") == 1


def test_one_step_off_trains_on_rollouts_that_are_one_step_old(tiny, weights, served, tmp_path) -> None:
    """Every step's loss and gradient are those of the same rollouts in the serial order, from the
    same weights. The importance weights, which this makes necessary, are 1 in the first step and
    change the later ones.
    """
    ratios = ("--rollout-importance-weights", "2")
    flags = (*weights, *layout(2, 1), "--train-iters", "4", "--rollout-wave-size", "4", *ratios)
    saved, serial = tmp_path / "saved", tmp_path / "serial"
    remote = ("--schedule", "one_step_off", "--teacher-endpoint", str(served))
    overlapped = run_ranks(2, _run, tiny, *flags, *remote, "--save-debug-rollout-data", str(saved))
    rows = {row["sample_id"]: row for file in saved.iterdir() for row in json.loads(file.read_text())}
    assert [rows[i]["weight_version"] for i in range(32)] == [0] * 16 + [1] * 8 + [2] * 8
    serial.mkdir()
    for step in range(4):
        (serial / f"rollout_{step}.0.json").write_text(json.dumps(list(rows.values())))
    replay = (*weights, "--train-iters", "4", "--load-debug-rollout-data", str(serial))
    (expected,) = run_ranks(1, _run, tiny, *replay, *ratios)
    assert len(expected[0]) == 4
    assert_same(overlapped, expected, tolerance=1e-4)  # after several steps of Adam
    ((plain, _),) = run_ranks(1, _run, tiny, *replay)
    means = [sums["importance_weight_sum"] / sums["num_labels"] for sums, _ in expected[0]]
    assert means[0] == pytest.approx(1, abs=1e-5) and all(abs(mean - 1) > 1e-3 for mean in means[1:]), means
    losses = [
        (sums["loss"], wanted["loss"]) for (sums, _), (wanted, _) in zip(expected[0], plain, strict=True)
    ]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    assert abs(losses[1][0] - losses[1][1]) > 1e-4 * losses[1][1], (
        "the second step is of the first step's weights"
    )


class _SharedExperts:
    """Stands in for a TeacherForward: a collective over both replicas in every micro-batch."""

    def __init__(self, group) -> None:
        self._group, self.batches = group, 0

    def run(self, micro_batches) -> list[ScoredPair]:
        for _ in micro_batches:
            ranks = torch.ones(1)
            torch.distributed.all_reduce(ranks, group=self._group)
            assert int(ranks) == 2
            self.batches += 1
        return [answer_of(request) for batch in micro_batches for request in batch]


def _replicas_that_share_experts(rank, world_size, folder) -> tuple[int, int]:
    """The number of micro-batches of each replica; only the first one has a client."""
    with process_groups(ParallelConfig(), seed=0) as groups:
        groups = replace(groups, ep=groups.dp, exchange=groups.dp)
        forward = _SharedExperts(groups.ep)
        teacher = ModelFreeTeacher(folder / str(rank), works=False)
        done = threading.Event()
        if rank == 0:
            rng = np.random.default_rng(0)
            requests = [make_request(rng, sample_id) for sample_id in range(30)]
            client = open_client(folder / "0")

            def ask() -> None:
                assert all(same_answer(s, requests[s.sample_id]) for s in collect(client, requests))
                client.close()
                done.set()

            threading.Thread(target=ask, daemon=True).start()
        serve(teacher.server, forward, groups, max_tokens=20, hidden_dtype="fp32", stop=done.is_set)
        return forward.batches, teacher.server.status()["requests"]


def test_replicas_that_share_experts_run_as_many_micro_batches(tmp_path) -> None:
    (one, answered), (other, none) = run_ranks(2, _replicas_that_share_experts, tmp_path)
    assert one == other > 3 and (answered, none) == (30, 0)


# Faults; those without a model are in tests/unit/test_teacher_faults.py


def test_a_teacher_that_is_killed_in_a_request_and_started_again(tiny, weights, colocated, tmp_path) -> None:
    rollouts, expected = colocated
    flags = (*layout(2, 1), "--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "64")
    with TeacherJob(tiny, weights, tmp_path, *flags, world_size=2, die_at=4, again=True):
        ((steps, counts),) = run_ranks(1, _run, tiny, *_remote(weights, rollouts, "paper", tmp_path))
    assert_same([(steps, counts)], expected["paper"], tolerance=1e-5)
    assert counts["answers"] == 16 and counts["again"] > 0


def _run_when_two_are_known(rank, world_size, folder, *flags) -> tuple[list[Any], dict[str, int]]:
    """As `_run`, but the client waits for two replicas. Otherwise it uses the first one that it meets, which
    may do all the work.
    """
    meet = TeacherClient.meet

    def meet_two(client) -> None:
        meet(client)
        deadline = time.monotonic() + 30
        while len(client.status()) < 2:
            assert time.monotonic() < deadline, "the second replica was not found"
            time.sleep(0.02)

    TeacherClient.meet = meet_two
    return _run(rank, world_size, folder, *flags)


def test_one_of_two_replicas_is_killed(tiny, weights, colocated, tmp_path) -> None:
    rollouts, expected = colocated
    flags = ("--teacher-hidden-dtype", "fp32", "--max-tokens-per-batch", "64")
    with TeacherJob(tiny, weights, tmp_path, *flags, die_at=1), TeacherJob(tiny, weights, tmp_path, *flags):
        remote = _remote(weights, rollouts, "paper", tmp_path, "--teacher-window-tokens", "64")
        ((steps, counts),) = run_ranks(1, _run_when_two_are_known, tiny, *remote)
    assert_same([(steps, counts)], expected["paper"], tolerance=1e-5)
    assert counts["answers"] == 16 and counts["again"] > 0


def test_a_teacher_that_never_returns_leaves_a_checkpoint_to_go_on_from(
    tiny, weights, served, tmp_path
) -> None:
    """One clear line and exit code 1 on every rank. With a teacher again, the run ends as
    an undisturbed one.
    """
    argv = [*command_line(tiny, *weights), "--simct-interface", "bytes", "--tensor-model-parallel-size", "2"]
    folders = {}
    for name in ("whole", "broken"):
        folders[name] = tmp_path / name
        save = str(folders[name] / "save")
        argv_of = [*argv, "--run-dir", str(folders[name] / "run"), "--save", save, "--load", save]
        if name == "broken":
            there = ["--teacher-endpoint", str(tmp_path), "--teacher-timeout-minutes", "0.1"]
            with TeacherJob(tiny, weights, tmp_path, "--teacher-hidden-dtype", "fp32", die_at=9):
                results = run_ranks(2, run, [*argv_of, *there])
            for rank, (code, _, err) in enumerate(results):
                assert code == 1 and err.count("\n") == 1, err
                assert err.startswith(
                    f"megatron_simct.train: error on rank {rank}: --teacher-endpoint {tmp_path}: 8 "
                )
                assert "no answer has come for 0.1 minutes (--teacher-timeout-minutes)" in err
                assert f"saved after iteration 1: --load {save}" in err
        for code, _, err in run_ranks(2, run, [*argv_of, "--teacher-endpoint", str(served)]):
            assert code == 0, err
    # The batches of the teacher depend on when samples arrive, so the last bits do too.
    for found, wanted in zip(*(metrics(folder) for folder in folders.values()), strict=True):
        assert found.pop("kind") == wanted.pop("kind")
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_what_cannot_work_is_one_line_that_names_the_flag(tiny, weights, served, tmp_path) -> None:
    for more, words in (
        (
            ["--teacher-timeout-minutes", "10"],
            ["--teacher-timeout-minutes (10)", "--distributed-timeout-minutes (10)"],
        ),
        (["--teacher-endpoint", "a", "b"], ["--teacher-endpoint a b", "one directory, or addresses only"]),
        (["--teacher-timeout-minutes", "0.02"], ["no teacher for 0.02 minutes", "none was found"]),
    ):
        argv = [*command_line(tiny, *weights), "--teacher-endpoint", str(tmp_path), *more]
        ((code, _, err),) = run_ranks(1, run, argv)
        assert code == 1 and err.count("\n") == 1 and err.startswith("megatron_simct.train: error: ")
        for word in words:
            assert word in err
    argv = [*command_line(tiny, *weights, "--teacher-stop-token-ids", "1"), "--teacher-endpoint", str(served)]
    for rank, (code, _, err) in enumerate(run_ranks(2, run, argv)):
        assert code == 1 and err.count("\n") == 1, err
        assert f"error on rank {rank}: --teacher-endpoint {served}: replica" in err
        assert "refuses: teacher tokenizer: " in err
