"""The colocated teacher's scores of a text are those of its full forward pass, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.job import build_job
from megatron_simct.loading import load_model
from megatron_simct.packing import by_number, by_tokens
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import AlignedPair, ScoredPair, SegmentKind, TeacherNeeds
from megatron_simct.rollout.engine import GivenResponses, Sampling
from megatron_simct.teacher.colocated import ColocatedScorer
from megatron_simct.teacher.scorer import NoTeacher
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks
from tests.steps import scores_of
from tests.tiny import config


def make_pairs(needs: TeacherNeeds = TeacherNeeds()) -> list[AlignedPair]:  # noqa: B008  (frozen)
    """Texts of different lengths. The requested rows are those that `alignment` would
    request, or a part of them.
    """
    rng = np.random.default_rng(1)
    pairs = []
    for sample_id, (prompt, labels) in enumerate([(3, 6), (9, 2), (1, 11), (4, 4), (2, 1)]):
        first = np.sort(rng.choice(labels, size=(labels + 1) // 2, replace=False)).astype(np.int32)
        rows = {
            "none": first[:0],
            "one_to_one": first[1:],
            "first": first,
            "all": np.arange(labels, dtype=np.int32),
        }
        segments = np.stack([first, first + 1, first, first + 1], axis=1)
        pairs.append(
            AlignedPair(
                sample_id=sample_id,
                teacher_prompt_ids=rng.integers(0, 250, prompt).astype(np.int32),
                teacher_ids=rng.integers(0, 250, labels).astype(np.int32),
                segments=segments,
                kinds=np.full(len(first), SegmentKind.UNIT, np.int8),
                replaced_columns=np.full(len(first), -1, np.int32),
                teacher_first_columns=np.full(len(first), -1, np.int32),
                weights=np.ones(len(first), np.float32),
                teacher_rows=rows[needs.hidden_rows],
                needs=needs,
            )
        )
    return pairs


def _score(
    rank, world_size, folder, weights, tp, pairs, cut, packed
) -> tuple[list[ScoredPair], dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Scored pairs in the order in which they arrived, and the same numbers from one full pass for
    each text, in float64.
    """
    resolved = config(folder, *weights, "--tensor-model-parallel-size", str(tp))
    with process_groups(resolved.parallel, seed=1) as groups:
        tokenizer = load_tokenizer(resolved.teacher.tokenizer_model)
        vocab_size = tokenizer.table.num_ids
        model = load_model(resolved, resolved.teacher, groups, tokenizer, prefix="teacher-")
        scorer = ColocatedScorer(model, groups, vocab_size=vocab_size, cut=cut, packed=packed)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        expected = {}
        if tp == 1:
            with torch.no_grad():
                for pair in pairs:
                    expected[pair.sample_id] = _full_pass(model, pair, vocab_size)
            # Padded columns must not count: from here on they would be the largest in every row.
            assert model.output_weight.shape[0] > vocab_size
            model.output_weight[vocab_size:] = 1e3
        scored = scores_of(scorer, pairs)
        assert not any(s.own_logit.requires_grad for s in scored)
        return scored, expected


def _full_pass(model, pair, vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and real logits that predict the labels, in the order of the labels."""
    ids = torch.tensor([[*pair.teacher_prompt_ids.tolist(), *pair.teacher_ids.tolist()]])
    hidden = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0]
    hidden = hidden[len(pair.teacher_prompt_ids) - 1 : -1]
    logits = (hidden.double() @ model.output_weight.double().T)[:, :vocab_size]
    return hidden, logits


@pytest.fixture(scope="module")
def score(tiny, weights) -> Callable[..., list[Any]]:
    def score(pairs, *, tp=1, cut=None, packed=False) -> list[Any]:
        cut = cut or partial(by_number, size=2)
        return run_ranks(tp, _score, tiny, weights, tp, pairs, cut, packed)

    return score


PADDED = [(partial(by_number, size=size), False) for size in (1, 2, 5)]
PACKED = [(partial(by_tokens, max_tokens=tokens), True) for tokens in (1, 20, 1000)]


@pytest.mark.parametrize("cut, packed", PADDED + PACKED)
def test_scores_are_those_of_a_full_pass(score, cut, packed) -> None:
    pairs = make_pairs()
    ((scored, expected),) = score(pairs, cut=cut, packed=packed)
    by_id = {s.sample_id: s for s in scored}
    for pair in pairs:
        found = by_id[pair.sample_id]
        hidden, logits = expected[pair.sample_id]
        labels = torch.from_numpy(pair.teacher_ids.astype(np.int64))
        own = logits.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(found.own_logit.double(), own, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.lse.double(), torch.logsumexp(logits, dim=1), rtol=0, atol=1e-4)
        assert found.own_logit.dtype == found.lse.dtype == torch.float32
        assert found.hidden.shape == (len(pair.teacher_rows), 48)
        torch.testing.assert_close(
            found.hidden, hidden[torch.from_numpy(pair.teacher_rows).long()], rtol=0, atol=1e-4
        )
    assert expected[0][1].std() > 0.5, "the model says nothing"


@pytest.mark.parametrize("cut, packed", PADDED[1:] + PACKED[1:])
def test_every_pair_once_in_any_order(score, cut, packed) -> None:
    ((scored, _),) = score(make_pairs(), cut=cut, packed=packed)
    assert sorted(s.sample_id for s in scored) == [0, 1, 2, 3, 4]
    assert [s.sample_id for s in scored] != [0, 1, 2, 3, 4], "texts of similar length share a micro-batch"


@pytest.mark.parametrize("hidden_rows", ["none", "one_to_one", "first", "all"])
def test_only_the_rows_that_were_asked_for_come(score, hidden_rows) -> None:
    pairs = make_pairs(TeacherNeeds(hidden_rows=hidden_rows))
    ((scored, expected),) = score(pairs)
    for found in scored:
        pair = pairs[found.sample_id]
        assert len(found.own_logit) == len(found.lse) == len(pair.teacher_ids)
        if hidden_rows == "none":
            assert found.hidden is None
        else:
            hidden, _ = expected[pair.sample_id]
            wanted = hidden[torch.from_numpy(pair.teacher_rows).long()]
            torch.testing.assert_close(found.hidden, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [7, 1 << 30], ids=["some", "all"])
def test_the_likeliest_tokens_come_in_place_of_hidden_states(score, k) -> None:
    pairs = make_pairs(TeacherNeeds(hidden_rows="one_to_one", topk=k, token_ids=True))
    ((alone, expected),) = score(pairs)
    for scored in (alone, *(of_rank for tp in (2, 4) for of_rank, _ in score(pairs, tp=tp))):
        for found in scored:
            pair = pairs[found.sample_id]
            _, logits = expected[pair.sample_id]
            log_q = torch.log_softmax(logits[torch.from_numpy(pair.teacher_rows).long()], dim=1)
            wanted = log_q.sort(dim=1, descending=True).values[:, :k]
            assert found.hidden is None
            torch.testing.assert_close(found.topk.double(), wanted, rtol=0, atol=1e-4)
            assert all(len(set(ids)) == len(ids) for ids in found.topk_ids.tolist())
            torch.testing.assert_close(
                log_q.gather(1, found.topk_ids.long()), found.topk.double(), rtol=0, atol=1e-4
            )


def test_layouts_agree(score) -> None:
    pairs = make_pairs()
    ((alone, _),) = score(pairs)
    for scored, _ in score(pairs, tp=2):
        for found, expected in zip(scored, alone, strict=True):
            assert found.sample_id == expected.sample_id
            for name in ("own_logit", "lse", "hidden"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-4)


def test_no_pairs_no_scores(score) -> None:
    assert score([])[0][0] == []


def test_without_a_teacher_the_scores_are_empty() -> None:
    needs = TeacherNeeds(teacher=False, hidden_rows="none")
    pairs = [replace(pair, needs=needs) for pair in make_pairs()]
    scored = scores_of(NoTeacher(), pairs)
    assert [s.sample_id for s in scored] == [0, 1, 2, 3, 4]
    assert all(s.own_logit.numel() == s.lse.numel() == 0 and s.hidden is None for s in scored)
    with pytest.raises(AssertionError, match="sample 0 needs a teacher"):
        scores_of(NoTeacher(), make_pairs())


# The student as its own teacher


def _write_canonical_rollouts(folder, student, prompts, max_response_len) -> None:
    """The data's own texts as rollouts, in the tokenizer's own tokens, so that both
    sides have equal tokens.
    """
    sampling = Sampling(temperature=1.0, top_p=1.0, max_response_len=max_response_len, seed=0)
    rollouts = GivenResponses(student).generate(prompts, sampling)
    rows = [
        {
            "sample_id": r.sample_id,
            "weight_version": 0,
            "student_ids": r.student_ids.tolist(),
            "logprobs": r.logprobs.tolist(),
            "finish": r.finish,
        }
        for r in rollouts
    ]
    (folder / "rollout_0.0.json").write_text(json.dumps(rows))


def _step_as_own_teacher(
    rank, world_size, folder, weights, tp, rollouts, interface
) -> tuple[StepReport, list[list[int]]]:
    resolved = config(
        folder,
        *weights[:2],
        *("--teacher-hf-checkpoint", str(folder / "student"), "--teacher-pretrained-checkpoint", weights[1]),
        *(
            "--teacher-tokenizer-model",
            str(folder / "student.model"),
            "--teacher-make-vocab-size-divisible-by",
            "8",
        ),
        *("--tensor-model-parallel-size", str(tp), "--rollout-max-response-len", "64"),
        *("--load-debug-rollout-data", str(rollouts), "--simct-interface", interface),
    )
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        prompts = job.prompts.batch(0)
        if rank == 0 and not list(rollouts.iterdir()):
            student = load_tokenizer(resolved.model.tokenizer_model)
            _write_canonical_rollouts(rollouts, student, prompts, 64)
        torch.distributed.barrier()
        answers = job.engine.generate(prompts, job.sampling)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, answers, strict=True)]
        scored = scores_of(job.teacher, pairs)
        report = job.updater.step(job.pack(prompts, answers, pairs, scored))
        return report, [pair.kinds.tolist() for pair in pairs]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("interface", ["paper", "strict", "bytes"])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    tiny, weights, tmp_path, tp, interface
) -> None:
    for report, kinds in run_ranks(tp, _step_as_own_teacher, tiny, weights, tp, tmp_path, interface):
        assert {kind for pair in kinds for kind in pair} == {SegmentKind.SHARED, SegmentKind.STOP}
        sums = report.sums
        if interface == "bytes":
            assert sums["byte_positions"] > sums["num_labels"] > 50
        else:
            assert (
                sums["num_labels"] == sums["rows_shared"] + sums["rows_stop"] > 50 and sums["rows_stop"] == 8
            )
        assert abs(sums["loss"] / sums["num_labels"]) < 1e-6
        assert report.grad_norm < 1e-5
        assert sums["student_nll_sum"] == pytest.approx(sums["teacher_nll_sum"], rel=1e-6)
        assert sums["student_nll_sum"] > sums["num_labels"], "the models say nothing"
