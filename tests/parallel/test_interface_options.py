"""Options of the comparison from the command line to the loss: each one changes a
training step as described.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.steps import train_and_record
from tests.tiny import config

GIVEN = ("--train-iters", "1", "--rollout-max-response-len", "64")


def sums_of_a_step(rank, world_size, folder, *flags) -> dict[str, float]:
    resolved = config(folder, *GIVEN, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        return train_and_record(build_job(resolved, groups))[0].sums


@pytest.fixture(scope="module")
def replay(tiny, weights, tmp_path_factory) -> tuple[str, ...]:
    """Flags that replay one step's rollouts, some of which stopped and contain spaces."""
    folder = tmp_path_factory.mktemp("rollouts")
    run_ranks(1, sums_of_a_step, tiny, *weights, "--save-debug-rollout-data", str(folder))
    # a random model's samples are not useful here: these are the task's own answers
    for file in folder.glob("*.json"):
        _write_answers(file, tiny, by_letters=True)
    return (*weights, "--load-debug-rollout-data", str(folder))


def _write_answers(file, tiny, *, by_letters: bool) -> None:

    from megatron_simct.alignment import load_tokenizer

    student = load_tokenizer(str(tiny / "student.model"))
    rows = json.loads(file.read_text())
    for i, row in enumerate(rows):
        answer = f"Tom  has {10 + i} shells and pencils."
        # Every other sample is spelled letter by letter, so that units have several student tokens.
        pieces = list(answer) if by_letters and i % 2 else [answer]
        ids = [token for piece in pieces for token in student.encode(piece.encode()).tolist()]
        row["student_ids"] = [*ids, student.table.stop_ids[0]]
        row["logprobs"] = [-1.0] * len(row["student_ids"])
        row["finish"] = "stop"
    file.write_text(json.dumps(rows))


def sums(tiny, replay, *flags) -> dict[str, float]:
    return run_ranks(1, sums_of_a_step, tiny, *replay, *flags)[0]


def test_every_option_reaches_the_loss(tiny, replay) -> None:
    paper = sums(tiny, replay)
    units, shared, stops = (paper[f"rows_{kind}"] for kind in ("unit", "shared", "stop"))
    assert units >= 8 and shared >= 8 and stops == 8
    without_units = sums(tiny, replay, "--simct-interface", "no_unit_loss", "--simct-rho", "1")
    assert without_units["rows_unit"] == 0 and without_units["rows_dropped"] == units
    assert math.isclose(
        without_units["loss"], paper["loss_shared_sum"] + paper["loss_stop_sum"], rel_tol=1e-6
    )
    joined = sums(tiny, replay, "--simct-interface", "random_unit", "--simct-rho", "1")
    assert joined["rows_unit"] > 0 and joined["rows_shared"] + joined["rows_unit"] < shared
    other = sums(tiny, replay, "--simct-interface", "random_unit", "--simct-interface-seed", "7")
    assert other["loss"] != sums(tiny, replay, "--simct-interface", "random_unit")["loss"]
    unbridged = sums(tiny, replay, "--no-simct-stop-bridge")
    assert unbridged["rows_stop"] == 0
    assert unbridged["loss_shared_sum"] != pytest.approx(paper["loss_shared_sum"], rel=1e-4), (
        "U has a token less"
    )
    masked = sums(tiny, replay, "--simct-mask-whitespace")
    assert paper["rows_dropped"] == 0 < masked["rows_dropped"]
    heavy = sums(tiny, replay, "--simct-unit-weight", "student_length")
    assert (
        heavy["loss_unit_sum"] > paper["loss_unit_sum"]
        and heavy["loss_shared_sum"] == paper["loss_shared_sum"]
    )
    assert sums(tiny, replay, "--simct-min-teacher-mass", "1")["rows_dropped"] > 0


def test_likeliest_tokens_only(tiny, replay) -> None:
    strict = sums(tiny, replay, "--simct-interface", "strict")
    few = sums(tiny, replay, "--simct-interface", "strict_topk", "--simct-topk", "2")
    all_of_them = sums(tiny, replay, "--simct-interface", "strict_topk", "--simct-topk", "300")
    assert few["rows_shared"] == strict["rows_shared"] and few["loss"] != pytest.approx(
        strict["loss"], rel=1e-3
    )
    assert all_of_them["loss"] == pytest.approx(strict["loss"], rel=1e-5)
    assert all_of_them["rows_same_top"] == strict["rows_same_top"]


def test_one_number_a_unit(tiny, replay) -> None:
    """scalar reads the log-probabilities with which the rollouts were sampled; span_mse
    adds units to strict.
    """
    dpca = sums(tiny, replay, "--simct-interface", "scalar")
    spread = sums(tiny, replay, "--simct-interface", "scalar", "--simct-scalar", "spread")
    assert dpca["rows_unit"] == spread["rows_unit"] >= 8 and dpca["loss"] != pytest.approx(
        spread["loss"], rel=1e-3
    )
    strict = sums(tiny, replay, "--simct-interface", "strict")
    spans = sums(tiny, replay, "--simct-interface", "strict", "--simct-span-mse", "0.25")
    assert strict["rows_unit"] == 0 < spans["rows_unit"] == dpca["rows_unit"]
    assert math.isclose(spans["loss"], strict["loss"] + spans["loss_unit_sum"], rel_tol=1e-5)


def test_one_tokenizer(tiny, replay, tmp_path) -> None:
    """kd: a student that is its own teacher has no loss; other tokenizers, and a map, are refused."""
    shutil.copytree(replay[-1], tmp_path / "rollouts")
    for file in (tmp_path / "rollouts").glob("*.json"):
        # otherwise the teacher reads other tokens than the student
        _write_answers(file, tiny, by_letters=False)
    replay = (*replay[:-1], str(tmp_path / "rollouts"))
    own = (
        "--teacher-hf-checkpoint",
        str(tiny / "student"),
        "--teacher-tokenizer-model",
        str(tiny / "student.model"),
    )
    own += ("--teacher-pretrained-checkpoint", replay[replay.index("--pretrained-checkpoint") + 1])
    own += ("--teacher-make-vocab-size-divisible-by", "8")
    found = sums(tiny, replay, *own, "--simct-interface", "kd")
    assert found["rows_shared"] > 30 and found["rows_unit"] == 0 and found["rows_stop"] == 8
    assert abs(found["loss"]) < 1e-3 and found["rows_same_top"] == found["rows_shared"] + found["rows_stop"]
    with pytest.raises(AssertionError, match="not the same"):
        sums(tiny, replay, "--simct-interface", "kd")
    with pytest.raises(AssertionError, match="pairs every id with itself"):
        sums(tiny, replay, *own, "--simct-interface", "kd", "--simct-alignment-map", "anything")
