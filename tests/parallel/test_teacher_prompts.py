"""A teacher that reads another prompt than the student: the loss and its gradient by
hand, and other layouts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.job import build_job
from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import GivenResponses
from tests.distributed import run_ranks
from tests.steps import scores_of
from tests.tiny import config

ROWS = [
    {
        "prompt": "Tom has 12 apples and gets 3 more.",
        "response": "Tom has 15 apples.",
        "teacher_suffix": " It is 15.",
    },
    {"prompt": "Nora has 40 shells and gets 2 more.", "response": "Nora has 42 shells."},
    {
        "prompt": "How many has Anna?",
        "response": "Anna has 13 pencils.",
        "teacher_prompt": "Say that Anna has 13 pencils.",
    },
    {
        "prompt": "Tom has 30 marbles and gets 9 more.",
        "response": "Tom has 39.",
        "teacher_suffix": " It is 39.",
    },
]
"""With given responses: a sampled response need not have the tokens of its text."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def _taught_by_itself(
    rank: int, world_size: int, folder: Path, weights: tuple[str, ...], prompts: Path, *flags: str
) -> tuple[Any, ...]:
    """The step's report; in one process the loss and gradient norm by hand too, in float64."""
    start = dict(zip(weights[::2], weights[1::2], strict=True))["--pretrained-checkpoint"]
    resolved = config(
        *(folder, *weights, "--teacher-hf-checkpoint", str(folder / "student"), "--simct-interface", "kd"),
        *(
            "--teacher-tokenizer-model",
            str(folder / "student.model"),
            "--teacher-pretrained-checkpoint",
            start,
        ),
        *("--teacher-make-vocab-size-divisible-by", "8", "--simct-divergence", "forward_kl"),
        *("--prompt-data", str(prompts), "--rollout-batch-size", "4", "--micro-batch-size", "1", *flags),
    )
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        asked = job.prompts.batch(0)
        rollouts = GivenResponses(open_tokenizer(resolved.model, prefix="")).generate(asked, job.sampling)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
        by_hand = None
        if world_size == 1:
            tokenizer = open_tokenizer(resolved.model, prefix="")
            model = load_model(resolved, resolved.model, groups, tokenizer, prefix="")
            by_hand = _by_hand(model.double(), asked, rollouts, vocab_size=tokenizer.table.num_ids)
        report = job.updater.step(job.pack(asked, rollouts, pairs, scores_of(job.teacher, pairs)))
        return report.sums["loss"], report.sums["num_labels"], report.grad_norm, by_hand


def _by_hand(
    model: HiddenStateModel, asked: Sequence[Prompt], rollouts: Sequence[Rollout], *, vocab_size: int
) -> tuple[float, int, float]:
    """sum over labels of KL(teacher || student), one sequence at a time; the two read different prompts."""

    def log_probs(prompt_ids: np.ndarray, response_ids: np.ndarray) -> torch.Tensor:
        ids = torch.tensor([*prompt_ids, *response_ids])[None]
        hidden = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0]
        return torch.log_softmax(
            (hidden[len(prompt_ids) - 1 : -1] @ model.output_weight.T)[:, :vocab_size], dim=1
        )

    total, num_labels = torch.zeros((), dtype=torch.float64), 0
    for prompt, rollout in zip(asked, rollouts, strict=True):
        student = log_probs(prompt.student_ids, rollout.student_ids)
        teacher = log_probs(prompt.teacher_ids, rollout.student_ids).detach()
        total = total + (teacher.exp() * (teacher - student)).sum()
        num_labels += len(rollout.student_ids)
    model.zero_grad()
    (total / num_labels).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    return float(total.detach()), num_labels, float(norm)


@pytest.fixture(scope="module")
def one_process(tiny, weights, prompts) -> tuple[Any, ...]:
    return run_ranks(1, _taught_by_itself, tiny, weights, prompts)[0]


def test_the_loss_is_that_of_the_teacher_behind_its_own_prompt(one_process) -> None:
    loss, num_labels, grad_norm, (expected, expected_labels, expected_norm) = one_process
    assert num_labels == expected_labels
    assert loss == pytest.approx(expected, rel=1e-5) and loss > 1
    assert grad_norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ("--tensor-model-parallel-size", "2")),
        (2, ("--pipeline-model-parallel-size", "2")),
        (2, ()),
    ],
    ids=["TP2", "PP2", "DP2"],
)
def test_every_layout_finds_the_same(tiny, weights, prompts, one_process, ranks, flags) -> None:
    loss, num_labels, grad_norm, _ = one_process
    for of_rank in run_ranks(ranks, _taught_by_itself, tiny, weights, prompts, *flags):
        assert of_rank[0] == pytest.approx(loss, rel=1e-5)
        assert of_rank[1] == num_labels
        assert of_rank[2] == pytest.approx(grad_norm, rel=1e-5)
