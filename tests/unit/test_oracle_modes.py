"""The oracle of every token-level interface against the golden numbers and identities, before
other tests rely on it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden
from tests.oracles.modes import (
    SHARED,
    STOP,
    UNIT,
    Model,
    captured_teacher_mass,
    divergence,
    exact_row,
    row_losses,
)

STUDENT = Model(torch.tensor(golden.STUDENT_LOGITS), golden.STUDENT_LABELS)
TEACHER = Model(torch.tensor(golden.TEACHER_LOGITS), golden.TEACHER_LABELS)
PAIRS = {student: [teacher] for student, teacher in golden.SHARED_PAIRS}
WALK = golden.WALK
"""The segments of the authors' own walk on G0: the unit includes the shared token after it."""

MINIMAL = {"segments": golden.SEGMENTS, "kinds": golden.KINDS, "replaced": (-1, -1, -1), "shared": PAIRS}
AUTHORS = {"segments": WALK, "kinds": (UNIT, STOP), "replaced": (-1, -1), "shared": PAIRS}

ROWS = [
    ({"interface": "code"}, AUTHORS, (0.734309, 0.551692), 0.321500),
    ({"interface": "code", "temperature": 2.0}, AUTHORS, None, 0.094687),
    ({"interface": "code", "divergence_name": "forward_kl"}, AUTHORS, None, 0.420118),
    ({"interface": "code_gh"}, AUTHORS, (0.734309, 0.551692), 0.321500),
    ({"interface": "paper"}, MINIMAL, (0.741519, 0.293230, 0.551692), 0.396610),
    ({"interface": "paper", "divergence_name": "forward_kl"}, MINIMAL, None, 0.468304),
    ({"interface": "paper", "divergence_name": "js"}, MINIMAL, None, 0.095336),
    ({"interface": "paper", "temperature": 2.0}, MINIMAL, None, 0.114886),
    ({"interface": "sum"}, MINIMAL, (0.803095, 0.293230, 0.551692), 0.412004),
    ({"interface": "exact"}, MINIMAL, (0.755486, 0.564049, 0.434885), 0.438605),
    ({"interface": "strict"}, MINIMAL, (0.293230, 0.551692), 0.211230),
    ({"interface": "strict_topk", "topk": 2}, MINIMAL, None, 0.110072),
    ({"interface": "uld"}, MINIMAL, None, 0.110216),
    ({"interface": "alm"}, MINIMAL, (0.080320, 1.242687, 0.111813), 0.358705),
    ({"interface": "alm"}, AUTHORS, (0.696243, 0.111813), 0.202014),
]


@pytest.mark.parametrize("options, segmentation, rows, loss", ROWS, ids=str)
def test_golden_numbers(options, segmentation, rows, loss) -> None:
    found = [float(row) for row in row_losses(STUDENT, TEACHER, **segmentation, **options)]
    if rows is not None:
        assert found == pytest.approx(rows, abs=5e-7)
    assert sum(found) / len(golden.STUDENT_LABELS) == pytest.approx(loss, abs=5e-7)


def test_golden_captured_mass() -> None:
    masses = [
        captured_teacher_mass(TEACHER, segment, kind, PAIRS)
        for segment, kind in zip(WALK, (UNIT, STOP), strict=True)
    ]
    assert masses == pytest.approx((0.926461, 0.820340), abs=5e-7)


TOKEN_LEVEL = ("paper", "code", "sum", "exact", "strict", "kd")


def random_models(seed: int, *, num_labels: int = 4, vocab_size: int = 6) -> tuple[Model, Model]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(num_labels, vocab_size, dtype=torch.float64, generator=generator)

    labels = [n % vocab_size for n in range(num_labels)]
    return Model(draw(), labels), Model(draw(), labels)


def one_to_one(num_labels: int, vocab_size: int) -> dict:
    return {
        "segments": [(n, n + 1, n, n + 1) for n in range(num_labels)],
        "kinds": [SHARED] * num_labels,
        "replaced": [-1] * num_labels,
        "shared": {i: [i] for i in range(vocab_size)},
    }


@pytest.mark.parametrize("interface", TOKEN_LEVEL)
def test_same_tokenizer_gives_full_vocabulary_kl(interface) -> None:
    student, teacher = random_models(0)
    expected = (student.log_p.exp() * (student.log_p - teacher.log_p)).sum()
    # The whole vocabulary is shared: the rest of `exact` has no mass on either side.
    found = sum(row_losses(student, teacher, **one_to_one(4, 6), interface=interface))
    assert float(found) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("interface", [*TOKEN_LEVEL, "strict_topk", "uld", "alm"])
def test_equal_models_give_zero_loss_and_gradient(interface) -> None:
    student, _ = random_models(1)
    logits = student.logits.clone().requires_grad_()
    segmentation = one_to_one(4, 6) | {"shared": {i: [i] for i in range(4)}}
    options = {"topk": 2, "alm_temperature": 3.0}
    loss = sum(
        row_losses(Model(logits, student.labels), student, **segmentation, **options, interface=interface)
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(logits.grad.abs().max()) < 1e-12


def test_alm_tends_to_its_limit() -> None:
    limit, near = (
        sum(row_losses(STUDENT, TEACHER, **MINIMAL, interface="alm", alm_temperature=t))
        for t in (math.inf, 1e5)
    )
    assert float(near) == pytest.approx(float(limit), rel=1e-4)
    one = sum(row_losses(STUDENT, TEACHER, **MINIMAL, interface="alm", alm_temperature=1.0))
    assert abs(float(one) - float(limit)) > 1e-3


def test_uld_top_k_with_a_bin_for_the_rest() -> None:
    """k as large as the vocabulary is the full sort; a smaller one cannot see more distance."""
    full, all_bins, few = (
        float(sum(row_losses(STUDENT, TEACHER, **MINIMAL, interface="uld", uld_topk=k))) for k in (0, 9, 3)
    )
    assert all_bins == pytest.approx(full, abs=1e-12)
    assert 0 < few <= full + 1e-12


def test_code_sees_a_constant_that_the_others_do_not() -> None:
    shifted = STUDENT.logits.clone()
    shifted[1] += 2.5  # an inner position of the unit
    for interface in ("paper", "sum", "exact", "code"):
        segmentation = AUTHORS if interface == "code" else MINIMAL
        before, after = (
            float(sum(row_losses(model, TEACHER, **segmentation, interface=interface)))
            for model in (STUDENT, Model(shifted, STUDENT.labels))
        )
        assert (abs(before - after) > 1e-3) == (interface == "code"), interface


def test_exact_is_a_partition() -> None:
    """Every event of a unit row is a probability, and they add up to one, whether or not the
    unit's bytes are shared.
    """
    student, teacher = random_models(2, vocab_size=8)
    shared = {i: [7 - i] for i in range(5)}
    for replaced in (-1, *shared):
        for segment in ((0, 2, 0, 3), (1, 2, 0, 2), (0, 3, 2, 3), (2, 4, 2, 4)):
            row = exact_row(student, teacher, segment, UNIT, replaced, shared)
            for side in (row.student, row.teacher):
                assert float(sum(side)) == pytest.approx(1, abs=1e-12)
                assert all(float(event) > -1e-12 for event in side)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(
        st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 3)), min_size=2, max_size=10
    ),
    name=st.sampled_from(["reverse_kl", "forward_kl", "js"]),
)
def test_merging_candidates_never_raises_the_divergence(weights, name) -> None:
    """Adding up the probabilities of candidates, for both models in the same way (the
    paper's Proposition 1).
    """

    def distribution(side: int) -> list[torch.Tensor]:
        total = sum(w[side] for w in weights)
        return [torch.tensor(w[side] / total, dtype=torch.float64) for w in weights]

    p, q = distribution(0), distribution(1)
    bins = sorted({w[2] for w in weights})

    def merged(side: list[torch.Tensor]) -> list[torch.Tensor]:
        return [sum(x for x, w in zip(side, weights, strict=True) if w[2] == b) for b in bins]

    before, after = divergence(p, q, name), divergence(merged(p), merged(q), name)
    assert float(after) <= float(before) + 1e-12
