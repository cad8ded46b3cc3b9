"""The loss for a user's own training loop: against the oracle, from logits and fused, on one and
two ranks; its errors.
"""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import Head, Logits, Response, SharedVocabulary, cross_tokenizer_loss, public
from tests import golden
from tests.distributed import run_ranks
from tests.oracles.byte_bounds import loss as oracle_of_bounds
from tests.oracles.byte_cases import continuations_of, oracle_of, random_cases, table_of
from tests.oracles.bytes import Side
from tests.oracles.loss_cases import LossCase, padded_shard, random_case
from tests.oracles.modes import Model, capped, row_losses
from tests.public_loss import from_logits, fused
from tests.unit.test_byte_bounds import limited

INTERFACES = (
    "paper",
    "sum",
    "code",
    "code_gh",
    "exact",
    "strict",
    "strict_topk",
    "uld",
    "alm",
    "scalar",
    "sft",
)
DIVERGENCES = dict.fromkeys(("uld", "alm", "scalar", "sft"), ("reverse_kl",) * 3)
"""Interfaces without a divergence. The others use all three."""
TOPK = {"strict_topk": {"topk": 3}, "uld": {"uld_topk": 5}}


def arguments(case: LossCase) -> dict:
    """The sample of a case; its first shared token is the stop token."""
    stop, *others = case.shared
    return {
        "segments": torch.tensor(case.segments).reshape(-1, 4),
        "student_labels": torch.tensor(case.student_labels),
        "teacher_labels": torch.tensor(case.teacher_labels),
        "shared_student_ids": torch.tensor(others),
        "shared_teacher_ids": torch.tensor([case.shared[i][0] for i in others]),
        "stop_student_id": stop,
        "stop_teacher_ids": case.shared[stop],
        "replaced_columns": torch.tensor(case.replaced),
        "student_logit_softcap": case.student_softcap,
        "teacher_logit_softcap": case.teacher_softcap,
        "student_vocab_size": len(case.student_weight),
        "teacher_vocab_size": len(case.teacher_weight),
    }


def expected(
    case: LossCase, interface: str, **options
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over n, and its gradients with respect to logits, hidden states and weight."""
    hidden, weight = (
        case.student_hidden.clone().requires_grad_(),
        case.student_weight.clone().requires_grad_(),
    )
    logits = hidden @ weight.T
    logits.retain_grad()
    teacher = case.teacher_hidden @ case.teacher_weight.T
    rows = row_losses(
        Model(capped(logits, case.student_softcap), case.student_labels),
        Model(capped(teacher, case.teacher_softcap), case.teacher_labels),
        segments=case.segments,
        kinds=case.kinds,
        replaced=case.replaced,
        shared=case.shared,
        interface=interface,
        **options,
    )
    loss = sum(rows, 0 * logits.sum()) / len(case.student_labels)
    loss.backward()
    return float(loss.detach()), logits.grad, hidden.grad, weight.grad


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
def test_both_entries_equal_the_oracle(interface, softcap) -> None:
    for seed, divergence in enumerate(DIVERGENCES.get(interface, ("reverse_kl", "forward_kl", "js"))):
        case = random_case(seed, softcap=softcap, spelled=interface == "exact", weighted=seed == 1)
        weights = {} if interface == "sft" else {"weights": case.weights}
        topk = TOPK.get(interface, {})
        value, of_logits, of_hidden, of_weight = expected(
            case, interface, divergence_name=divergence, **weights, **topk
        )
        logits = (case.student_hidden @ case.student_weight.T).requires_grad_()
        teacher = case.teacher_hidden @ case.teacher_weight.T
        options = arguments(case) | {"interface": interface, "divergence": divergence} | topk
        if case.weights is not None and interface != "sft":
            options["segment_weights"] = torch.tensor(case.weights)
        output = from_logits(logits, teacher, **options)
        output.loss.backward()
        assert float(output.loss.detach()) == pytest.approx(value, rel=1e-10)
        assert int(output.count) == len(case.student_labels)
        torch.testing.assert_close(logits.grad, of_logits, rtol=1e-10, atol=1e-10)

        hidden, weight = (
            case.student_hidden.clone().requires_grad_(),
            case.student_weight.clone().requires_grad_(),
        )
        output = fused(hidden, weight, case.teacher_hidden, case.teacher_weight, **options)
        output.loss.backward()
        assert float(output.loss.detach()) == pytest.approx(value, rel=1e-10)
        torch.testing.assert_close(hidden.grad, of_hidden, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weight.grad, of_weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("interface", INTERFACES)
def test_logits_are_read_some_rows_at_a_time(monkeypatch, interface, rows) -> None:
    """Chunks of rows that begin or end among sparse, first dense and other dense rows."""
    monkeypatch.setattr("megatron_simct.losses.two_pass.CACHED_ELEMENTS", 30)
    for seed, divergence in enumerate(DIVERGENCES.get(interface, ("reverse_kl", "forward_kl", "js"))):
        case = random_case(seed, softcap=seed == 1, spelled=interface == "exact")
        monkeypatch.setattr(
            "megatron_simct.losses.two_pass.ROWS_FIRST_ELEMENTS", rows * len(case.student_weight)
        )
        topk = TOPK.get(interface, {})
        value, of_logits, _, _ = expected(case, interface, divergence_name=divergence, **topk)
        logits = (case.student_hidden @ case.student_weight.T).requires_grad_()
        options = arguments(case) | {"interface": interface, "divergence": divergence} | topk
        output = from_logits(logits, case.teacher_hidden @ case.teacher_weight.T, **options)
        output.loss.backward()
        assert float(output.loss.detach()) == pytest.approx(value, rel=1e-10)
        torch.testing.assert_close(logits.grad, of_logits, rtol=1e-10, atol=1e-10)


def without_gathering(rank: int, world_size: int, case: LossCase, interface: str) -> list[float]:
    """Both entry points, if no row of the teacher's head may be moved or copied."""
    public.gather_shared_head = None
    group = dist.group.WORLD if world_size > 1 else None
    weight, teacher_weight = (
        padded_shard(w, rank, world_size)[0] for w in (case.student_weight, case.teacher_weight)
    )
    options = arguments(case) | {"group": group, "interface": interface}
    logits = (case.student_hidden @ weight.T, case.teacher_hidden @ teacher_weight.T)
    of_states = fused(case.student_hidden, weight, case.teacher_hidden, teacher_weight, **options)
    return [float(from_logits(*logits, **options).loss), float(of_states.loss)]


@pytest.mark.parametrize("interface", ["alm", "uld"])
def test_no_teacher_row_moves_where_shared_tokens_are_not_compared(interface) -> None:
    case = random_case(4)
    value, *_ = expected(case, interface)
    for world_size in (1, 2):
        for found in run_ranks(world_size, without_gathering, case, interface):
            assert found == pytest.approx([value, value], rel=1e-10)


def bytes_arguments(case: tuple[Side, Side]) -> dict:
    student, teacher = case
    nothing = torch.zeros(0, dtype=torch.int64)
    return {
        "segments": nothing.reshape(0, 4),
        "student_labels": torch.tensor(student.labels),
        "teacher_labels": torch.tensor(teacher.labels),
        "shared_student_ids": nothing,
        "shared_teacher_ids": nothing,
        "tables": (table_of(student), table_of(teacher)),
        "interface": "bytes",
    }


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
def test_bytes_from_logits_and_fused_equals_the_oracle(divergence) -> None:
    for seed in range(6):
        (case,) = random_cases(seed, num_cases=1)
        student, teacher = case
        wanted, gradient = oracle_of([case], divergence=divergence)
        n = len(student.labels)
        logits = student.logits.clone().requires_grad_()
        options = bytes_arguments(case) | {"divergence": divergence}
        output = from_logits(logits, teacher.logits, **options)
        output.loss.backward()
        assert float(output.loss.detach()) == pytest.approx(wanted / n, rel=1e-10, abs=1e-12)
        torch.testing.assert_close(logits.grad, gradient / n, rtol=1e-10, atol=1e-10)
        hidden = torch.eye(n, dtype=torch.float64).requires_grad_()  # the output weight is the logits
        weight = student.logits.T.clone().requires_grad_()
        teacher_hidden = torch.eye(len(teacher.labels), dtype=torch.float64)
        output = fused(hidden, weight, teacher_hidden, teacher.logits.T.contiguous(), **options)
        output.loss.backward()
        assert float(output.loss.detach()) == pytest.approx(wanted / n, rel=1e-10, abs=1e-12)
        torch.testing.assert_close(weight.grad.T, gradient / n, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("known", [True, False])
def test_bytes_with_bounds_for_any_tokenizer_equals_its_oracle(known) -> None:
    differences = 0
    for seed in range(1, 6):
        (case,) = limited(random_cases(seed, num_cases=1), seed)
        if not known:
            case = tuple(replace(side, follows=None) for side in case)
        student, teacher = case
        wanted = oracle_of_bounds(student, [teacher])
        options = bytes_arguments(case) | {"byte_bounds": "any", "normalizer": 1}
        options |= {"continuations": tuple(map(continuations_of, case))}
        logits = student.logits.clone().requires_grad_()
        assert float(from_logits(logits, teacher.logits, **options).sum) == pytest.approx(
            wanted, rel=1e-9, abs=1e-10
        )
        other = float(from_logits(logits, teacher.logits, **options | {"byte_bounds": "longest-match"}).sum)
        differences += abs(other - wanted) > 1e-3
    assert differences > 2, "the option is read"


def test_bytes_needs_the_tables() -> None:
    (case,) = random_cases(0, num_cases=1)
    options = bytes_arguments(case)
    with pytest.raises(ValueError, match="needs the pair's tables"):
        from_logits(case[0].logits, case[1].logits, **options | {"tables": None})
    with pytest.raises(ValueError, match="the teacher's table has"):
        from_logits(case[0].logits, case[1].logits[:, :-1], **options)


def on_two_ranks(rank: int, world_size: int, case: LossCase) -> list:
    """(loss, logits' gradient of this rank, fused loss, hidden gradient, weight gradient of this rank)."""
    group = dist.group.WORLD
    weight, _ = padded_shard(case.student_weight, rank, world_size)
    teacher_weight, _ = padded_shard(case.teacher_weight, rank, world_size)
    options = arguments(case) | {"group": group}
    logits = (case.student_hidden @ weight.T).requires_grad_()
    output = from_logits(logits, case.teacher_hidden @ teacher_weight.T, **options)
    output.loss.backward()
    hidden = case.student_hidden.clone().requires_grad_()
    weight.requires_grad_()
    of_states = fused(hidden, weight, case.teacher_hidden, teacher_weight, placed=True, **options)
    of_states.loss.backward()
    return [
        float(output.loss.detach()),
        logits.grad,
        float(of_states.loss.detach()),
        hidden.grad,
        weight.grad,
    ]


@pytest.mark.parametrize("softcap", [True, False])  # without one, the teacher's logits are read in place
def test_two_ranks_equal_the_oracle(softcap) -> None:
    case = random_case(3, softcap=softcap)
    value, of_logits, of_hidden, of_weight = expected(case, "paper")
    found = run_ranks(2, on_two_ranks, case)
    real = len(case.student_weight)
    for loss, _, fused_loss, hidden_gradient, _ in found:
        assert loss == pytest.approx(value, rel=1e-10) and fused_loss == pytest.approx(value, rel=1e-10)
        torch.testing.assert_close(hidden_gradient, of_hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.cat([f[1] for f in found], 1)[:, :real], of_logits, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(torch.cat([f[4] for f in found])[:real], of_weight, rtol=1e-10, atol=1e-10)


def golden_arguments() -> dict:
    pairs = [pair for pair in golden.SHARED_PAIRS if pair != (5, 5)]
    return {
        "segments": torch.tensor(golden.SEGMENTS),
        "student_labels": torch.tensor(golden.STUDENT_LABELS),
        "teacher_labels": torch.tensor(golden.TEACHER_LABELS),
        "shared_student_ids": torch.tensor([s for s, _ in pairs]),
        "shared_teacher_ids": torch.tensor([t for _, t in pairs]),
        "stop_student_id": 5,
        "stop_teacher_ids": [5],
    }


STUDENT, TEACHER = torch.tensor(golden.STUDENT_LOGITS), torch.tensor(golden.TEACHER_LOGITS)


def test_golden_numbers_and_normalizer() -> None:
    output = from_logits(STUDENT, TEACHER, **golden_arguments())
    assert float(output.loss) == pytest.approx(golden.LOSS["paper", "reverse_kl", 1.0], abs=5e-7)
    assert [float(output.metrics[f"rows_{kind}"]) for kind in ("unit", "shared", "stop")] == [1, 1, 1]
    half = from_logits(STUDENT, TEACHER, **golden_arguments(), normalizer=8)
    assert float(half.loss) == pytest.approx(float(output.loss) / 2) and float(half.sum) == float(output.sum)


def test_nothing_to_compare_is_a_counted_zero() -> None:
    logits = STUDENT.clone().requires_grad_()
    none = golden_arguments() | {"segments": torch.zeros(0, 4, dtype=torch.int64)}
    output = from_logits(logits, TEACHER, **none)
    output.loss.backward()
    assert (float(output.loss.detach()), int(output.count)) == (0, 4) and not logits.grad.any()
    empty = none | {name: torch.zeros(0, dtype=torch.int64) for name in ("student_labels", "teacher_labels")}
    output = from_logits(STUDENT[:0], TEACHER[:0], **empty)
    assert (float(output.loss), int(output.count)) == (0, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shared_student_ids": torch.tensor([2, 3, 4, 6, 2])}, "student ids are given more than once.* 2"),
        ({"shared_teacher_ids": torch.tensor([2, 3, 4, 6, 5])}, "teacher ids are given more than once.* 5"),
        ({"shared_teacher_ids": torch.tensor([2, 3, 4, 6, 9])}, r"\[0, 9\); got 2 to 9"),
        ({"shared_teacher_ids": torch.tensor([2, 3])}, "pairs"),
        ({"student_labels": torch.tensor([0, 1, 2, 8])}, r"student_labels must lie in \[0, 8\)"),
        ({"teacher_labels": torch.tensor([0, 1, 2, -1])}, r"teacher_labels must lie in \[0, 9\)"),
        ({"student_labels": torch.tensor([0, 1, 2])}, "one row a label"),
        ({"segments": torch.tensor([[0, 2, 0, 2], [2, 3, 2, 5]])}, r"segment 1 is \[2, 3, 2, 5\]"),
        ({"segments": torch.tensor([[0, 2, 0, 2], [1, 3, 2, 3]])}, "start at or after"),
        ({"segments": torch.tensor([0, 2, 0, 2])}, r"\[A, 4\]"),
        ({"stop_teacher_ids": []}, "go together"),
        ({"replaced_columns": torch.tensor([7, 0, -1])}, "replaced_columns"),
        ({"normalizer": 0}, "normalizer"),
        ({"interface": "papr"}, "papr"),
        ({"interface": "bytes"}, "needs the pair's tables"),
        ({"interface": "alm", "alm_temperature": 0.0}, "alm-temperature"),
        ({"temperature": 0.0}, "temperature"),
        ({"student_vocab_size": 9}, "student vocab_size 9"),
        ({"drop_units": 0.5}, "drop_units: read where a run"),
        ({"interface": "random_unit"}, "random_units: read where a run"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_wrong_input_is_refused_with_its_numbers(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_logits(STUDENT, TEACHER, **(golden_arguments() | change))


def test_a_match_of_the_walk_that_is_no_pair_has_no_unit_under_code() -> None:
    """By hand: the student's token is id 2, a second "a", the teacher's is 0; the row has the shared
    tokens and the stop.
    """
    pair = SharedVocabulary(
        student_ids=torch.tensor([0, 1]),
        teacher_ids=torch.tensor([0, 1]),
        stop_student_id=3,
        stop_teacher_ids=(2,),
    )
    response = Response(
        segments=torch.tensor([[0, 1, 0, 1]]),
        student_labels=torch.tensor([2]),
        teacher_labels=torch.tensor([0]),
    )
    student, teacher = (
        torch.tensor([[0.3, -1.0, 2.0, 0.5]]).double(),
        torch.tensor([[1.0, 0.2, -0.7]]).double(),
    )
    p, q = student[0, [0, 1, 3]].softmax(0), teacher[0].softmax(0)
    found = cross_tokenizer_loss(
        Logits(student), Logits(teacher), pair, response, InterfaceConfig(interface="code"), normalizer=1
    )
    assert float(found.sum) == pytest.approx(float((p * (p / q).log()).sum()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad) -> None:
    for side in range(2):
        logits = [STUDENT.clone(), TEACHER.clone()]
        logits[side][1, 0] = bad
        with pytest.raises(ValueError, match="nan or inf"):
            from_logits(*logits, **golden_arguments())


def test_a_teacher_is_needed_and_of_the_students_kind() -> None:
    pair = SharedVocabulary(student_ids=torch.tensor([2]), teacher_ids=torch.tensor([2]))
    labels = torch.tensor([2])
    response = Response(segments=torch.tensor([[0, 1, 0, 1]]), student_labels=labels, teacher_labels=labels)
    with pytest.raises(ValueError, match="it needs one"):
        cross_tokenizer_loss(Logits(STUDENT[:1]), None, pair, response)
    with pytest.raises(ValueError, match="both be Logits or both be Head"):
        cross_tokenizer_loss(Logits(STUDENT[:1]), Head(TEACHER[:1], TEACHER.T), pair, response)


def test_the_training_loop_of_the_page_learns() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "only_the_loss.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
    torch.manual_seed(0)
    seen = []

    def loss(*args, **options) -> Any:
        found = cross_tokenizer_loss(*args, **options)
        seen.append(float(found.loss.detach()))
        return found

    names = {"seen": seen, "recorded": loss}
    exec(code.replace("cross_tokenizer_loss(*sides", "recorded(*sides"), names)
    assert len(seen) == 80 and sum(seen[-4:]) < 0.5 * sum(seen[:4])


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(public).attempted > 5
    assert doctest.testmod(public).failed == 0
