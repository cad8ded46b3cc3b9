"""Given rows and the start beside an interface: the step by hand in float64, every layout, what is refused.

L = mean over sampled labels of KL(teacher || student)
    + w mean over given labels of -log p + v mean over sampled labels of KL(student || start)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.config.options import Config
from megatron_simct.config.run_file import read_run_file
from megatron_simct.job import build_job
from megatron_simct.launch.commands import command_of
from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.preflight.check import check_run
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import GivenResponses
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import assert_same_run, metrics, run
from tests.steps import scores_of
from tests.tiny import command_line, config

GIVEN, KEPT = 0.7, 1.3
"""w and v"""
MOVED = 1.2
"""The factor by which the student's weights were multiplied since the start."""
SUMS = ("loss", "num_labels", "given_nll_sum", "num_given_labels", "reference_kl_sum")


@pytest.fixture(scope="module")
def prompts(tiny, tmp_path_factory) -> Path:
    """Responses of many lengths; one row has none; the teacher reads the answer."""
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"response": row["response"] + " Tom" * (number % 4), "teacher_suffix": f" {row['label']}"}
    del rows[5]["response"]
    path = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def taught_by_itself(files: Path, weights: tuple[str, ...], prompts: Path, *flags: str) -> Config:
    """A student of 8 rows a step, 4 of them given, whose teacher is its own start."""
    start = dict(zip(weights[::2], weights[1::2], strict=True))["--pretrained-checkpoint"]
    return config(
        *(files, *weights, "--teacher-hf-checkpoint", str(files / "student"), "--simct-interface", "kd"),
        *("--teacher-tokenizer-model", str(files / "student.model")),
        *("--teacher-pretrained-checkpoint", start, "--teacher-make-vocab-size-divisible-by", "8"),
        *("--simct-divergence", "forward_kl", "--prompt-data", str(prompts), "--micro-batch-size", "1"),
        *("--rollout-max-response-len", "24", "--given-share", "0.5", "--sft-weight", str(GIVEN)),
        *("--reference-kl-weight", str(KEPT), "--optimizer", "sgd", "--lr", "1", "--clip-grad", "0"),
        *("--lr-decay-style", "constant", *flags),
    )


def _step(
    rank: int, world_size: int, files: Path, weights: tuple[str, ...], prompts: Path, *flags: str
) -> tuple[Any, ...]:
    """The sums, the gradient norm, and in one process the gradient of each tensor, and that by hand."""
    resolved = taught_by_itself(files, weights, prompts, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        assert job.given is not None and job.reference is not None
        student = job.updater.model
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(MOVED)
        before = {name: value.detach().double() for name, value in student.named_parameters()}
        tokenizer = open_tokenizer(resolved.model, prefix="")
        asked = [replace(one, response=one.label) for one in job.prompts.batch(0)]
        rollouts = GivenResponses(tokenizer).generate(asked, job.sampling)  # as if they had been sampled
        given = job.given.batch(0)
        by_hand = None
        if world_size == 1:
            start = load_model(resolved, resolved.model, groups, tokenizer, prefix="").double()
            moved = load_model(resolved, resolved.model, groups, tokenizer, prefix="").double()
            by_hand = _by_hand(start, moved, before, (asked, rollouts), given, tokenizer.table.num_ids)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
        batches = job.pack(
            *(asked, rollouts, pairs, scores_of(job.teacher, pairs)),
            reference=job.reference.score(asked, rollouts),
        )
        batches += job.given.micro_batches(*given, sampled=rollouts)
        report = job.updater.step(batches)
        after = {name: value.detach().double() for name, value in student.named_parameters()}
        gradient = {name: before[name] - after[name] for name in before} if world_size == 1 else None
        return {name: report.sums[name] for name in SUMS}, report.grad_norm, gradient, by_hand


def _by_hand(
    start: HiddenStateModel,
    student: HiddenStateModel,
    weights: dict[str, torch.Tensor],
    sampled: tuple[Sequence[Prompt], Sequence[Rollout]],
    given: tuple[Sequence[Prompt], Sequence[Rollout]],
    vocab_size: int,
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """L, the means of its terms, and its gradient, one sequence at a time."""
    student.load_state_dict(weights, strict=False)

    def log_probs(model: HiddenStateModel, prompt_ids: np.ndarray, response_ids: np.ndarray) -> torch.Tensor:
        ids = torch.tensor([*prompt_ids, *response_ids])[None]
        hidden = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0]
        logits = (hidden[len(prompt_ids) - 1 : -1] @ model.output_weight.T)[:, :vocab_size]
        return torch.log_softmax(logits, dim=1)

    compared, kept, cross_entropy = [], [], []
    for prompt, rollout in zip(*sampled, strict=True):
        own = log_probs(student, prompt.student_ids, rollout.student_ids)
        first = log_probs(start, prompt.student_ids, rollout.student_ids).detach()
        teacher = log_probs(start, prompt.teacher_ids, rollout.student_ids).detach()
        compared.append((teacher.exp() * (teacher - own)).sum(1))
        kept.append((own.exp() * (own - first)).sum(1))
    for prompt, rollout in zip(*given, strict=True):
        own = log_probs(student, prompt.student_ids, rollout.student_ids)
        cross_entropy.append(-own.gather(1, torch.tensor(rollout.student_ids).long()[:, None])[:, 0])
    terms = [torch.cat(values).mean() for values in (compared, cross_entropy, kept)]
    loss = terms[0] + GIVEN * terms[1] + KEPT * terms[2]
    student.zero_grad()
    loss.backward()
    gradient = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    names = ("compared", "cross entropy", "kept")
    return float(loss), dict(zip(names, map(float, terms), strict=True)), gradient


@pytest.fixture(scope="module")
def one_process(tiny, weights, prompts) -> tuple[Any, ...]:
    return run_ranks(1, _step, tiny, weights, prompts)[0]


def test_the_step_is_that_of_the_formula(one_process) -> None:
    sums, grad_norm, gradient, (loss, terms, expected) = one_process
    assert sums["num_labels"] != sums["num_given_labels"]  # each mean is over its own labels
    assert sums["loss"] / sums["num_labels"] == pytest.approx(loss, rel=1e-5)
    assert sums["given_nll_sum"] / sums["num_given_labels"] == pytest.approx(terms["cross entropy"], rel=1e-5)
    assert sums["reference_kl_sum"] / sums["num_labels"] == pytest.approx(terms["kept"], rel=1e-5)
    assert all(value > 0.1 for value in terms.values())
    norm = float(torch.sqrt(sum(value.square().sum() for value in expected.values())))
    assert grad_norm == pytest.approx(norm, rel=1e-5)
    for name, value in expected.items():
        # Weights of at most 2 are rounded by 1.2e-7 in the update.
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=3e-6 * max(1, norm), msg=name)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ("--micro-batch-size", "4")),
        (1, ("--max-tokens-per-gpu", "100")),
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ("--micro-batch-size", "2")),
        (2, ("--use-distributed-optimizer", "--optimizer", "adam", "--overlap-grad-reduce")),
        (2, ("--context-parallel-size", "2")),
        (4, ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--max-tokens-per-gpu", "90")),
    ],
    ids=["larger micro-batches", "packed", "TP2", "PP2", "DP2", "DP2 overlapped", "CP2", "TP2 DP2 SP packed"],
)
def test_every_layout_takes_the_same_step(tiny, weights, prompts, one_process, ranks, flags) -> None:
    sums, grad_norm, _, _ = one_process
    for found, norm, _, _ in run_ranks(ranks, _step, tiny, weights, prompts, *flags):
        assert found == pytest.approx(sums, rel=1e-5)
        assert norm == pytest.approx(grad_norm, rel=1e-5)


TERMS = ("--given-share", "0.25", "--sft-weight", "0.5", "--reference-kl-weight", "0.3")


def _train(folder: Path, files: Path, weights: tuple[str, ...], iterations: int, *flags: str) -> str:
    saved = ("--save", str(folder / "save"), "--load", str(folder / "save"), "--run-dir", str(folder / "run"))
    steps = ("--train-iters", str(iterations), "--lr-decay-style", "constant", "--lr", "1e-2")
    ((code, out, error),) = run_ranks(1, run, command_line(files, *weights, *saved, *steps, *TERMS, *flags))
    return error if code else out


@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_a_resumed_run_equals_an_undisturbed_one(tiny, weights, tmp_path, interface) -> None:
    flags = ("--simct-interface", interface)
    said = _train(tmp_path / "once", tiny, weights, 4, *flags)
    assert "--given-share 0.25: 2 of 8 sequences of a step come with their response" in said
    _train(tmp_path / "twice", tiny, weights, 2, *flags)
    _train(tmp_path / "twice", tiny, weights, 4, *flags)
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    steps = [row for row in metrics(tmp_path / "once") if row["kind"] == "step"]
    assert len(steps) == 4 and all(row["given_cross_entropy"] > 0 for row in steps)
    # At first the start itself has sampled; logged values of sampled responses exclude the given ones.
    assert steps[0]["reference_kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["reference_kl"] > 0.01
    assert all(row["rollout_logprob_difference_largest"] < 1e-4 for row in steps)
    other = ("--pretrained-checkpoint", str(tmp_path / "once" / "save"))
    refused = _train(tmp_path / "twice", tiny, weights, 5, *flags, *other)
    assert "its start is not that of --reference-kl-weight and the weights" in refused


def test_a_reward_and_all_terms_beside_each_other(tiny, weights, tmp_path) -> None:
    """The groups of samples are those of sampled prompts alone."""
    more = ("--simct-interface", "reward", "--reward", "exact_match", "--n-samples-per-prompt", "2")
    said = _train(tmp_path, tiny, weights, 2, *more)
    assert "4 of 16 sequences" in said and "reward silent" in said and "given cross entropy" in said


def _build(rank: int, world_size: int, files: Path, flags: tuple[str, ...]) -> str:
    resolved = config(files, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        try:
            build_job(resolved, groups)
        except ValueError as error:
            return str(error)
    return ""


def test_what_the_files_lack_is_refused(tiny, weights, tmp_path) -> None:
    (found,) = run_ranks(1, _build, tiny, ("--reference-kl-weight", "0.1"))
    assert found.startswith("--reference-kl-weight 0.1: --hf-checkpoint ") and "no weights" in found
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (found,) = run_ranks(1, _build, tiny, (*weights, "--prompt-data", str(path), "--given-share", "0.5"))
    assert found.startswith("--given-share 0.5: no row of --prompt-data") and "'response'" in found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sft-weight", "1"), "--sft-weight needs --given-share"),
        (("--given-share", "0"), "--given-share 0.0: must lie strictly between 0 and 1"),
        (("--reference-kl-weight", "-1"), "--reference-kl-weight -1.0: must be at least 0"),
        (("--given-share", "0.5", "--simct-interface", "sft"), "sft samples nothing"),
        (("--reference-kl-weight", "1", "--simct-interface", "sft"), "sft samples nothing"),
        (("--given-share", "0.5", "--gradient-parts-interval", "1"), "--gradient-parts-interval compares"),
        (("--given-share", "0.3"), "is 2.4 prompts of 1 sequences each; .* multiple of 2, .*; use 0.25, 0.5"),
        (("--given-share", "0.125"), "is 1 prompts .* multiple of 2, .*; use 0.25, 0.5, 0.75"),
        (
            ("--given-share", "0.5", "--micro-batch-size", "8"),
            "multiple of 8, .*; raise --rollout-batch-size",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(tiny, flags, words) -> None:
    with pytest.raises(ValueError, match=words):
        config(tiny, *flags).check(data_parallel_size=1)


def test_adapters_stay_near_the_weights_without_them(tiny, weights, tmp_path) -> None:
    save_model(tmp_path / "base", "llama", vocab_size=360, scale=0.2)
    flags = ("--hf-checkpoint", str(tmp_path / "base"), "--lora-rank", "2")
    _train(tmp_path, tiny, weights[2:], 3, *flags)
    steps = [row["reference_kl"] for row in metrics(tmp_path) if row["kind"] == "step"]
    assert steps[0] == pytest.approx(0, abs=1e-6) and 0.001 < steps[1] < steps[2]


def test_the_run_file_of_the_example_runs(tiny, weights, tmp_path) -> None:
    """On the tiny models, two steps."""
    paths = {
        "hf_checkpoint": tiny / "student",
        "tokenizer_model": tiny / "student.model",
        "pretrained_checkpoint": weights[1],
        "teacher_hf_checkpoint": tiny / "teacher",
        "teacher_tokenizer_model": tiny / "teacher.tiktoken",
        "teacher_pretrained_checkpoint": weights[3],
        "prompt_data": tiny / "train.jsonl",
        "eval_prompt_data": tiny / "held_out.jsonl",
        "make_vocab_size_divisible_by": 8,
        "teacher_make_vocab_size_divisible_by": 4,
        "train_iters": 2,
    }
    example = Path(__file__).parents[2] / "examples" / "quickstart" / "mixed_terms.yaml"
    overrides = [f"student.{key}={value}" for key, value in paths.items()]
    run_file = read_run_file(str(example), [*overrides, f"run_dir={tmp_path}"])
    report = check_run(run_file)
    assert not report.failed, [f.message for f in report.findings if f.level == "fail"]
    assert "start's weights" in report.plans["student"].held
    assert any("48 of 48 rows of --prompt-data have a response" in f.message for f in report.findings)
    module, *argv = command_of(run_file.student)[1:]
    assert module == "megatron_simct.train"
    ((code, out, error),) = run_ranks(1, run, argv)
    assert code == 0, out + error
    assert "16 of 64 sequences of a step" in out and "reference kl" in out
