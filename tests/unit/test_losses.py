"""The interfaces in one process: golden numbers, a dense float64 oracle, identities, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_simct.config.interfaces import METHODS
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import (
    LossOutput,
    SharedColumns,
    check_config,
    check_has_units,
    check_labels,
    interface_loss,
    interface_loss_from_logits,
    teacher_needs,
)
from megatron_simct.records import LabelBatch
from tests import golden
from tests.oracles.loss_cases import (
    CONFIGS,
    EXACT,
    ONE_TO_ONE,
    OTHERS,
    LossCase,
    evaluate,
    evaluate_oracle,
    golden_case,
    label_batch,
    name_of,
    padded_shard,
    placement_of,
    random_case,
    shared_head_of,
)
from tests.oracles.modes import Model, capped, exact_row

PAPER = InterfaceConfig()
WEIGHTED = ("paper", "sum", "code", "exact", "strict", "strict_topk", "uld", "alm", "scalar")
FLOAT32_OTHERS = [
    config for config in OTHERS if config.interface != "code_gh" and config.min_teacher_mass == 0
]
"""If rows are dropped for their low mass, few or none may be left: then there is no norm for comparison."""


def test_needs() -> None:
    assert teacher_needs(PAPER).hidden_rows == "first"
    assert teacher_needs(InterfaceConfig(interface="strict")).hidden_rows == "one_to_one"
    code = teacher_needs(InterfaceConfig(interface="code"))
    assert (code.hidden_rows, code.segmentation) == ("first", "authors")
    alm = teacher_needs(InterfaceConfig(interface="alm"))
    assert (alm.teacher, alm.hidden_rows, alm.segmentation) == (True, "none", "minimal")
    needs = teacher_needs(InterfaceConfig(interface="sft"))
    assert (needs.teacher, needs.hidden_rows) == (False, "none")


@pytest.mark.parametrize("key", list(golden.LOSS), ids=str)
def test_golden_loss(key) -> None:
    interface, divergence, temperature = key
    config = InterfaceConfig(interface=interface, divergence=divergence, temperature=temperature)
    result = evaluate(golden_case(), config)
    assert float(result.output.sum) / 4 == pytest.approx(golden.LOSS[key], abs=5e-7)
    assert int(result.output.num_labels) == 4 and result.output.num_labels.dtype == torch.int64


@pytest.mark.parametrize("key", list(golden.OTHER_LOSSES), ids=str)
def test_golden_loss_of_other_interfaces(key) -> None:
    """On the minimal segments, and on those of the released walk, which includes in a unit the
    shared token after it.
    """
    interface, divergence, temperature, segmentation = key
    case = golden_case()
    if segmentation == "authors":
        case = replace(case, segments=list(golden.WALK), kinds=[1, 2], replaced=[-1, -1])
    config = InterfaceConfig(interface=interface, divergence=divergence, temperature=temperature)
    assert float(evaluate(case, config).output.sum) / 4 == pytest.approx(golden.OTHER_LOSSES[key], abs=5e-7)


@pytest.mark.parametrize(
    "config, expected",
    [
        (InterfaceConfig(interface="exact"), 0.438605),
        (InterfaceConfig(interface="uld", uld_topk=0), 0.110216),
        (InterfaceConfig(interface="strict_topk", topk=2), 0.110072),
    ],
    ids=name_of,
)
def test_golden_loss_of_partitions_and_likeliest_tokens(config, expected) -> None:
    assert float(evaluate(golden_case(), config).output.sum) / 4 == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS, *EXACT], ids=name_of)
def test_losses_of_labels_are_the_parts_of_the_sum(config) -> None:
    for seed in range(3):
        case = random_case(seed, weighted=True)
        output = evaluate(case, config).output
        assert float(output.label_losses.sum()) == pytest.approx(float(output.sum), rel=1e-9, abs=1e-12)
        if config.interface != "sft":
            starts = {segment[2] for segment in case.segments}
            assert set(output.label_losses.nonzero().squeeze(1).tolist()) <= starts


def test_golden_rows_and_statistics() -> None:
    result = evaluate(golden_case(), PAPER)
    rows = [result.metric(f"loss_{kind}_sum") for kind in ("unit", "shared", "stop")]
    assert rows == pytest.approx(golden.PAPER_ROWS, abs=5e-7)
    unit, shared, stop = golden.PAPER_ROWS
    assert result.output.label_losses.tolist() == pytest.approx([unit, 0, shared, stop], abs=5e-7)
    own_s = sum(golden.STUDENT_LOGITS[p, label] for p, label in enumerate(golden.STUDENT_LABELS))
    own_t = sum(golden.TEACHER_LOGITS[p, label] for p, label in enumerate(golden.TEACHER_LABELS))
    assert result.metric("student_nll_sum") == pytest.approx(sum(golden.STUDENT_LSE) - own_s, abs=2e-6)
    assert result.metric("teacher_nll_sum") == pytest.approx(sum(golden.TEACHER_LSE) - own_t, abs=2e-6)


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=name_of)
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
def test_loss_and_gradient_equal_the_oracle(config, softcap) -> None:
    for seed in range(6):
        case = random_case(seed, softcap=softcap)
        result = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-10, abs=1e-10)
        torch.testing.assert_close(result.hidden_gradient, hidden_gradient, rtol=1e-10, atol=1e-10)
        real = result.weight_gradient[: len(weight_gradient)]
        torch.testing.assert_close(real, weight_gradient, rtol=1e-10, atol=1e-10)
        assert not result.weight_gradient[len(weight_gradient) :].any(), "padded rows were scored"


def check_exact(case: LossCase, config: InterfaceConfig) -> None:
    result = evaluate(case, config)
    expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
    least = 1e-10 + rounding_of_the_rest(case, config)
    size = max(float(case.student_weight.abs().max()), float(case.student_hidden.abs().sum(0).max()))
    assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-10, abs=least)
    real = result.weight_gradient[: len(weight_gradient)]
    torch.testing.assert_close(result.hidden_gradient, hidden_gradient, rtol=1e-10, atol=least * size)
    torch.testing.assert_close(real, weight_gradient, rtol=1e-10, atol=least * size)


def rounding_of_the_rest(case: LossCase, config: InterfaceConfig) -> float:
    """Nats a row. The teacher's rest is 1 minus a sum, computed from its log-sum-exp with the rounding of
    numbers as large as its logits. reverse_kl takes its logarithm, which is less exact for a smaller rest,
    times the student's rest.
    """
    if config.divergence != "reverse_kl":
        return 0.0
    student, teacher = (
        Model(capped(hidden @ weight.T, cap), labels)
        for hidden, weight, cap, labels in (
            (case.student_hidden, case.student_weight, case.student_softcap, case.student_labels),
            (case.teacher_hidden, case.teacher_weight, case.teacher_softcap, case.teacher_labels),
        )
    )
    rows = [
        exact_row(student, teacher, segment, kind, replaced, case.shared)
        for segment, kind, replaced in zip(case.segments, case.kinds, case.replaced, strict=True)
    ]
    amplified = max(float(row.student[-1] / row.teacher[-1]) for row in rows)
    return 2 * torch.finfo(torch.float64).eps * float(teacher.logits.abs().max()) * amplified


@pytest.mark.parametrize("config", EXACT, ids=name_of)
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
def test_exact_equals_the_oracle(config, softcap) -> None:
    for seed in range(12):
        check_exact(random_case(seed, softcap=softcap, spelled=True, num_segments=12), config)


@pytest.mark.parametrize("drop", [12.0, 24.0, 36.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
def test_exact_where_the_student_has_next_to_nothing_outside(divergence, drop) -> None:
    """Its rest is multiplied by e^-drop, far below the rounding of 1; the teacher's is not."""
    for seed in range(3):
        case = random_case(seed, spelled=True, num_segments=12)
        logits = case.student_hidden @ case.student_weight.T
        outside = [i for i in range(logits.shape[1]) if i not in case.shared]
        logits[:, outside] -= drop
        identity = torch.eye(logits.shape[1], dtype=torch.float64)
        config = InterfaceConfig(interface="exact", divergence=divergence)
        check_exact(replace(case, student_hidden=logits, student_weight=identity), config)


@pytest.mark.parametrize("config", [InterfaceConfig(interface=name) for name in WEIGHTED], ids=name_of)
def test_weights_of_segments(config) -> None:
    for seed in range(4):
        case = random_case(seed, weighted=True, spelled=True)
        result = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        least = 1e-10 + (rounding_of_the_rest(case, config) if config.interface == "exact" else 0.0)
        size = float(case.student_weight.abs().max())
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-10, abs=least)
        torch.testing.assert_close(result.hidden_gradient, hidden_gradient, rtol=1e-10, atol=least * size)
        assert result.metric("rows_dropped") == sum(
            weight == 0 or (kind == 1 and config.interface in ONE_TO_ONE)
            for weight, kind in zip(case.weights, case.kinds, strict=True)
        )


@pytest.mark.parametrize("scale", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("config", [*CONFIGS, *FLOAT32_OTHERS, *EXACT[:-1]], ids=name_of)
def test_float32_is_close_to_the_oracle(config, scale) -> None:
    """At scale 3 logits reach +-100, so float32 rounds the logits themselves by up to 1e-5, and the models
    hardly overlap: careless differences would lose the whole gradient of js there.
    """
    if config.interface == "exact" and scale > 1:
        scale = 1.0  # if little is left of 1, rounding loses it
    limit = 1e-5 if scale < 3 else 4e-5
    for seed in range(3):
        case = random_case(seed, scale=scale, spelled=config.interface == "exact").to(torch.float32)
        result = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        assert result.output.sum.dtype == torch.float32
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-5)
        for found, wanted in (
            (result.hidden_gradient, hidden_gradient),
            (result.weight_gradient, weight_gradient),
        ):
            error = (found[: len(wanted)].double() - wanted).norm() / wanted.norm()
            assert error < limit


@pytest.mark.parametrize("scalar", ["dpca", "spread"])
def test_scalar_clips_ratios_of_an_older_policy(scalar) -> None:
    """The sampling policy's log-probabilities differ by a nat: some ratios are clipped, and
    some advantages too.
    """
    config = InterfaceConfig(interface="scalar", scalar=scalar)
    clipped = 0
    for seed in range(4):
        case = random_case(seed, weighted=True, num_segments=12)
        noise = np.random.default_rng(seed).normal(size=len(case.student_labels))
        log_probs = (case.student_hidden @ case.student_weight.T).log_softmax(1)
        own = log_probs[torch.arange(len(log_probs)), torch.tensor(case.student_labels)]
        case = replace(case, old_log_probs=(own - torch.tensor(noise).abs()).clamp(max=-0.01).tolist())
        result = evaluate(case, config)
        expected, hidden_gradient, _ = evaluate_oracle(case, config)
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-10)
        torch.testing.assert_close(result.hidden_gradient, hidden_gradient, rtol=1e-10, atol=1e-10)
        clipped += int((hidden_gradient == 0).all(1).sum())
    assert clipped > 5


@pytest.mark.parametrize("temperature", [30.0, 1e4, 1e7])
def test_float32_is_close_to_the_oracle_at_large_temperatures_of_alm(temperature) -> None:
    """Both events are nearly certain: the loss depends on their distance from 1."""
    config = InterfaceConfig(interface="alm", alm_temperature=temperature)
    for seed in range(3):
        case = random_case(seed).to(torch.float32)
        result = evaluate(case, config)
        expected, hidden_gradient, _ = evaluate_oracle(case, config)
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-5)
        assert (result.hidden_gradient.double() - hidden_gradient).norm() < 1e-5 * hidden_gradient.norm()


def test_bfloat16_runs_with_float32_statistics() -> None:
    case = random_case(1).to(torch.bfloat16)
    result = evaluate(case, PAPER)
    assert result.output.sum.dtype == torch.float32
    assert result.hidden_gradient.dtype == result.weight_gradient.dtype == torch.bfloat16
    expected = evaluate_oracle(case, PAPER)[0]
    assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=0.05)


def same_top(case: LossCase, used: set[int], *, cut: bool) -> int:
    """Rows in which both models have the same likeliest shared token. cut: the token that the unit
    replaces is left out.
    """
    student, teacher = (
        case.student_hidden @ case.student_weight.T,
        case.teacher_hidden @ case.teacher_weight.T,
    )
    count = 0
    for (ts, _, ss, _), kind, replaced in zip(case.segments, case.kinds, case.replaced, strict=True):
        ids = [i for i in case.shared if not cut or i != replaced]
        of_student = max(ids, key=lambda i: float(student[ss, i]))
        of_teacher = max(ids, key=lambda i: float(teacher[ts, case.shared[i]].logsumexp(0)))
        count += kind in used and of_student == of_teacher
    return count


def test_metrics_equal_the_oracle() -> None:
    kinds = ("unit", "shared", "stop")
    for seed in range(4):
        case = random_case(seed)
        for interface in ("paper", "strict", "strict_topk", "sum", "exact", "code", "code_gh", "alm", "sft"):
            # topk: all shared tokens, so that strict_topk compares the same as strict
            config = InterfaceConfig(
                interface=interface, **({"topk": 40} if interface == "strict_topk" else {})
            )
            result, (expected, _, _) = evaluate(case, config), evaluate_oracle(case, config)
            used = {"strict": {0, 2}, "strict_topk": {0, 2}, "sft": set()}.get(interface, {0, 1, 2})
            counts = [sum(kind == k and kind in used for kind in case.kinds) for k in (1, 0, 2)]
            found = [result.metric(f"rows_{kind}") for kind in kinds]
            assert found == counts if interface != "code_gh" else sum(found) == len(expected.rows)
            assert result.metric("rows_dropped") == (
                0 if interface == "sft" else len(case.kinds) - sum(found)
            )
            rows = sum(result.metric(f"loss_{kind}_sum") for kind in kinds)
            assert rows == pytest.approx(sum(float(row.detach()) for row in expected.rows))
            assert result.metric("student_mass_outside_u_sum") == pytest.approx(expected.mass_outside[0])
            assert result.metric("teacher_mass_outside_u_sum") == pytest.approx(expected.mass_outside[1])
            if interface in ("paper", "strict", "code", "strict_topk"):
                assert result.metric("rows_same_top") == same_top(case, used, cut=interface == "paper")
            assert result.metric("student_nll_sum") == pytest.approx(expected.nll[0])
            assert result.metric("teacher_nll_sum") == pytest.approx(expected.nll[1])
            assert (
                result.metric("num_student_labels")
                == len(case.student_labels)
                == int(result.output.num_labels)
            )
            assert result.metric("num_teacher_labels") == len(case.teacher_labels)
            assert all(
                v.dtype == torch.float64 and not v.requires_grad for v in result.output.metrics.values()
            )


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS, *EXACT], ids=name_of)
def test_finite_differences(config) -> None:
    case = random_case(3, num_segments=5, softcap=True)
    student = capped(case.student_hidden @ case.student_weight.T, case.student_softcap)
    own = Model(student, case.student_labels).log_p[
        torch.arange(len(student)), torch.tensor(case.student_labels)
    ]
    case = replace(case, old_log_probs=own.tolist())  # the sampled tokens stay as they are
    gradient = evaluate(case, config).hidden_gradient
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = torch.tensor(rng.normal(size=case.student_hidden.shape))
        ahead, behind = (
            float(
                evaluate(
                    replace(case, student_hidden=case.student_hidden + step * direction), config
                ).output.sum
            )
            for step in (1e-5, -1e-5)
        )
        assert (ahead - behind) / 2e-5 == pytest.approx(
            float((gradient * direction).sum()), rel=1e-6, abs=1e-8
        )


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_gradient_rows_of_the_logits_sum_to_zero(config) -> None:
    """With an identity head the gradient of the hidden states is that of the logits."""
    dense = random_case(5)
    logits = dense.student_hidden @ dense.student_weight.T
    case = replace(
        dense, student_hidden=logits, student_weight=torch.eye(logits.shape[1], dtype=torch.float64)
    )
    gradient = evaluate(case, config).hidden_gradient
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(
        gradient.sum(1), torch.zeros(len(gradient), dtype=torch.float64), atol=1e-13, rtol=0
    )


def same_tokenizer_case(seed: int, *, same_model: bool) -> LossCase:
    """Every id is shared with itself and every segment is one token on both sides."""
    base = random_case(seed, vocab_size=17, num_stops=1)
    labels = base.student_labels
    n = len(labels)
    rng = np.random.default_rng(seed)
    return replace(
        base,
        teacher_hidden=base.student_hidden if same_model else torch.tensor(rng.normal(size=(n, 6))),
        teacher_weight=base.student_weight if same_model else torch.tensor(rng.normal(size=(17, 6))),
        teacher_labels=labels,
        segments=[(i, i + 1, i, i + 1) for i in range(n)],
        kinds=[0] * n,
        replaced=[-1] * n,
        shared={i: [i] for i in range(17)},
    )


@pytest.mark.parametrize("config", [*CONFIGS[:-1], *OTHERS], ids=name_of)
def test_teacher_equal_to_student_gives_zero(config) -> None:
    result = evaluate(same_tokenizer_case(2, same_model=True), config)
    assert abs(float(result.output.sum)) < 1e-12
    assert result.hidden_gradient.abs().max() < 1e-12
    assert result.metric("rows_shared") > 0


@pytest.mark.parametrize("interface", ["paper", "strict"])
def test_same_tokenizer_gives_full_vocabulary_kl(interface) -> None:
    case = same_tokenizer_case(4, same_model=False)
    log_p = (case.student_hidden @ case.student_weight.T).log_softmax(1)
    log_q = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(1)
    result = evaluate(case, InterfaceConfig(interface=interface))
    assert float(result.output.sum) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-12)
    assert result.metric("student_mass_outside_u_sum") == pytest.approx(0, abs=1e-12)


def test_order_of_the_shared_vocabulary_does_not_matter() -> None:
    """Another numbering of both vocabularies is the same loss; so is another order of a stop set."""
    case = random_case(7)
    rng = np.random.default_rng(1)
    new_s, new_t = (rng.permutation(len(weight)) for weight in (case.student_weight, case.teacher_weight))
    renamed = replace(
        case,
        student_weight=case.student_weight[torch.from_numpy(np.argsort(new_s))],
        teacher_weight=case.teacher_weight[torch.from_numpy(np.argsort(new_t))],
        student_labels=[int(new_s[label]) for label in case.student_labels],
        teacher_labels=[int(new_t[label]) for label in case.teacher_labels],
        replaced=[int(new_s[label]) if label >= 0 else -1 for label in case.replaced],
        shared={int(new_s[i]): [int(new_t[t]) for t in reversed(ids)] for i, ids in case.shared.items()},
    )
    for config in [*CONFIGS[:-1], *OTHERS]:
        a, b = evaluate(case, config), evaluate(renamed, config)
        assert float(a.output.sum) == pytest.approx(float(b.output.sum), rel=1e-12)
        torch.testing.assert_close(a.hidden_gradient, b.hidden_gradient, rtol=1e-11, atol=1e-12)


def test_a_unit_replaces_the_shared_token_of_the_same_bytes() -> None:
    """The teacher's probability of the replaced token has no effect; that of any other token has."""
    case = random_case(0, num_segments=1)
    token, other = list(case.shared)[1:3]
    eye = torch.eye(len(case.teacher_weight), dtype=torch.float64)
    logits = case.teacher_hidden @ case.teacher_weight.T
    dense = replace(case, teacher_hidden=logits, teacher_weight=eye, replaced=[token])
    placement = placement_of(case, 0, len(case.student_weight))
    labels = label_batch(dense)

    def loss_with(changed: int | None) -> float:
        hidden = labels.teacher_hidden.clone()
        if changed is not None:
            hidden[0, case.shared[changed][0]] += 3
        output = interface_loss(
            case.student_hidden,
            case.student_weight,
            replace(labels, teacher_hidden=hidden),
            shared_head=shared_head_of(dense, placement, None),
            placement=placement,
            config=PAPER,
        )
        return float(output.sum)

    assert loss_with(token) == loss_with(None)
    assert abs(loss_with(other) - loss_with(None)) > 1e-6


@pytest.mark.parametrize("config", CONFIGS[:5], ids=name_of)
def test_a_row_with_the_unit_alone_is_zero(config) -> None:
    """The unit spells the only shared token: one candidate, probability 1 for both models."""
    case = random_case(0, num_segments=1)
    stop = next(iter(case.shared))
    result = evaluate(replace(case, shared={stop: case.shared[stop]}, replaced=[stop]), config)
    assert result.metric("rows_unit") == 1
    assert abs(float(result.output.sum)) < 1e-12
    torch.testing.assert_close(
        result.hidden_gradient, torch.zeros_like(result.hidden_gradient), rtol=0, atol=1e-12
    )


def test_sums_add_over_micro_batches() -> None:
    """Two samples in one micro-batch and in two: same sum, gradients and metrics."""
    a = random_case(1)
    b = replace(
        random_case(2), student_weight=a.student_weight, teacher_weight=a.teacher_weight, shared=a.shared
    )
    n, m = len(a.student_labels), len(a.teacher_labels)
    both = replace(
        a,
        student_hidden=torch.cat([a.student_hidden, b.student_hidden]),
        teacher_hidden=torch.cat([a.teacher_hidden, b.teacher_hidden]),
        student_labels=a.student_labels + b.student_labels,
        teacher_labels=a.teacher_labels + b.teacher_labels,
        segments=a.segments + [(ts + m, te + m, ss + n, se + n) for ts, te, ss, se in b.segments],
        kinds=a.kinds + b.kinds,
        replaced=a.replaced + b.replaced,
    )
    for config in [*CONFIGS, *OTHERS]:
        one, first, second = (evaluate(case, config) for case in (both, a, b))
        assert float(one.output.sum) == pytest.approx(float(first.output.sum + second.output.sum), rel=1e-12)
        torch.testing.assert_close(
            one.hidden_gradient, torch.cat([first.hidden_gradient, second.hidden_gradient])
        )
        torch.testing.assert_close(one.weight_gradient, first.weight_gradient + second.weight_gradient)
        for name in one.output.metrics:
            assert one.metric(name) == pytest.approx(first.metric(name) + second.metric(name)), name


def test_scale_of_the_caller_reaches_the_gradient() -> None:
    case = random_case(0)
    weight, _ = padded_shard(case.student_weight, 0, 1)
    placement = placement_of(case, 0, len(weight))
    hidden = case.student_hidden.clone().requires_grad_()
    head = shared_head_of(case, placement, None)
    output = interface_loss(
        hidden, weight, label_batch(case), shared_head=head, placement=placement, config=PAPER
    )
    (3 * output.sum).backward()
    torch.testing.assert_close(hidden.grad, 3 * evaluate(case, PAPER).hidden_gradient)
    with torch.no_grad():
        silent = interface_loss(
            hidden, weight, label_batch(case), shared_head=head, placement=placement, config=PAPER
        )
    assert not silent.sum.requires_grad and float(silent.sum) == float(output.sum.detach())


def empty_case(*, keep_labels: bool) -> LossCase:
    case = random_case(0)
    if keep_labels:
        return replace(case, segments=[], kinds=[], replaced=[])
    return replace(
        case,
        student_hidden=case.student_hidden[:0],
        teacher_hidden=case.teacher_hidden[:0],
        student_labels=[],
        teacher_labels=[],
        segments=[],
        kinds=[],
        replaced=[],
    )


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=name_of)
def test_empty_micro_batches(config) -> None:
    for keep_labels in (False, True):
        case = empty_case(keep_labels=keep_labels)
        result = evaluate(case, config)
        assert int(result.output.num_labels) == len(case.student_labels)
        assert result.hidden_gradient.shape == case.student_hidden.shape
        if config.interface != "sft" or not keep_labels:
            assert float(result.output.sum) == 0
            assert not result.hidden_gradient.any() and not result.weight_gradient.any()


def test_strict_with_units_only() -> None:
    case = random_case(0, num_segments=1)
    result = evaluate(case, InterfaceConfig(interface="strict"))
    assert label_batch(case, "strict").teacher_hidden is None
    assert float(result.output.sum) == 0 and not result.hidden_gradient.any()
    assert result.metric("rows_dropped") == 1


@pytest.mark.parametrize("interface", ["paper", "strict", "code", "alm", "sft"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_states_make_the_sum_non_finite(interface, bad) -> None:
    """In every row: also in a row that the interface does not use."""
    case = random_case(0)
    for row in range(len(case.student_labels)):
        hidden = case.student_hidden.clone()
        hidden[row, 0] = bad
        result = evaluate(replace(case, student_hidden=hidden), InterfaceConfig(interface=interface))
        assert not torch.isfinite(result.output.sum)
    if interface != "sft":
        for a, segment in enumerate(case.segments):
            hidden = case.teacher_hidden.clone()
            hidden[segment[0], 0] = bad
            result = evaluate(replace(case, teacher_hidden=hidden), InterfaceConfig(interface=interface))
            assert not torch.isfinite(result.output.sum), f"segment {a}"


def test_no_gradient_is_formed_under_no_grad(monkeypatch) -> None:
    case = random_case(0)
    logits = (case.student_hidden @ case.student_weight.T).requires_grad_()
    teacher = case.teacher_hidden @ case.teacher_weight.T
    expected = float(loss_of_logits(case, logits, teacher, PAPER).sum.detach())
    monkeypatch.setattr("megatron_simct.losses.two_pass.TwoPass.add_gradient", None)
    with torch.no_grad():
        assert float(loss_of_logits(case, logits, teacher, PAPER).sum) == expected
    with pytest.raises(TypeError):
        loss_of_logits(case, logits, teacher, PAPER)


IMPOSSIBLE = -float("inf")
FLOOR = -1e4
"""A logit of probability 0 that the oracle can multiply."""


def loss_of_logits(
    case: LossCase, student: torch.Tensor, teacher: torch.Tensor, config: InterfaceConfig
) -> LossOutput:
    """Below the level of the heads: an identity head would turn an infinite logit into nan."""
    finite = replace(
        case,
        teacher_hidden=teacher.clamp(min=FLOOR),
        teacher_weight=torch.eye(teacher.shape[1], dtype=torch.float64),
    )
    labels = label_batch(finite, config.interface)
    placement = placement_of(case, 0, student.shape[1])
    rows = labels.teacher_hidden[:, torch.from_numpy(placement.teacher_rows)]
    return interface_loss_from_logits(
        student,
        rows.masked_fill(rows == FLOOR, IMPOSSIBLE),
        labels,
        columns=SharedColumns.from_placement(placement),
        placement=placement,
        config=config,
    )


@pytest.mark.parametrize("config", CONFIGS[:-1], ids=name_of)
def test_impossible_columns(config) -> None:
    """A shared token that is impossible for both models adds nothing. If it is impossible for one of them, it
    adds the term of the divergence.
    """
    case = random_case(9, vocab_size=40)
    token, teacher_token = next(
        (i, ids[0])
        for i, ids in list(case.shared.items())[1:]
        if i not in case.student_labels and ids[0] not in case.teacher_labels
    )
    student = case.student_hidden @ case.student_weight.T
    teacher = case.teacher_hidden @ case.teacher_weight.T
    student_without, teacher_without = student.clone(), teacher.clone()
    student_without[:, token] = IMPOSSIBLE
    teacher_without[:, teacher_token] = IMPOSSIBLE

    logits = student_without.clone().requires_grad_()
    output = loss_of_logits(case, logits, teacher_without, config)
    output.sum.backward()
    dense = replace(
        case,
        student_hidden=student_without.clamp(min=FLOOR),
        student_weight=torch.eye(student.shape[1], dtype=torch.float64),
        teacher_hidden=teacher_without.clamp(min=FLOOR),
        teacher_weight=torch.eye(teacher.shape[1], dtype=torch.float64),
        shared={i: ids for i, ids in case.shared.items() if i != token},
    )
    expected, gradient, _ = evaluate_oracle(dense, config)
    assert float(output.sum.detach()) == pytest.approx(float(expected.sum.detach()), rel=1e-10)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-10, atol=1e-10)

    student_only = loss_of_logits(case, student_without, teacher, config).sum
    teacher_only = loss_of_logits(case, student, teacher_without, config).sum
    assert bool(torch.isinf(student_only)) == (config.divergence == "forward_kl")
    assert bool(torch.isinf(teacher_only)) == (config.divergence == "reverse_kl")
    assert not student_only.isnan() and not teacher_only.isnan()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
@pytest.mark.parametrize("interface", ["paper", "sum", "code", "exact", "strict", "strict_topk"])
def test_a_segment_of_weight_zero_is_left_out_however_far_the_models_are_apart(interface, divergence) -> None:
    """A token that is impossible for one of them: the row's divergence and derivatives are
    infinite, its part is 0.
    """
    config = InterfaceConfig(interface=interface, divergence=divergence)
    case = random_case(9, vocab_size=40, num_stops=1)
    token = next(i for i in case.shared if i not in case.student_labels)
    student = case.student_hidden @ case.student_weight.T
    teacher = case.teacher_hidden @ case.teacher_weight.T
    for a, (ts, _, ss, _) in enumerate(case.segments):
        weighted = replace(case, weights=[float(i != a) for i in range(len(case.segments))])
        found = []
        for value in (0.0, IMPOSSIBLE):
            changed_s, changed_t = student.clone(), teacher.clone()
            changed_t[ts, case.shared[token][0]] = value
            if divergence == "forward_kl":
                changed_s[ss, token], changed_t = value, teacher
            output = loss_of_logits(weighted, changed_s.requires_grad_(), changed_t, config)
            output.sum.backward()
            found.append((output.sum.detach(), changed_s.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_invalid_labels_are_refused_with_their_numbers() -> None:
    case = random_case(0)
    labels = label_batch(case)
    placement = placement_of(case, 0, len(case.student_weight))
    n, m, r = len(labels.student_labels), len(labels.teacher_lse), len(labels.teacher_hidden)
    for config in CONFIGS:
        check_labels(labels, placement=placement, config=config)
    check_labels(label_batch(case, "strict"), placement=placement, config=InterfaceConfig(interface="strict"))

    def edited(name: str, index: tuple, value: int) -> LabelBatch:
        tensor = getattr(labels, name).clone()
        tensor[index] = value
        return replace(labels, **{name: tensor})

    last = len(case.segments) - 1
    shared = case.kinds.index(0)
    cases = [
        (edited("student_labels", (0,), 23), "23"),
        (edited("student_labels", (0,), -1), "-1"),
        (edited("segments", (last, 3), n + 1), str(n + 1)),
        (edited("segments", (last, 1), m + 2), str(m + 2)),
        (edited("segments", (1, 2), 0), "start at or after"),
        (edited("segments", (0, 1), int(labels.segments[0, 0])), "non-empty"),
        (edited("kinds", (0,), 3), "3"),
        (edited("kinds", (0,), 0), "segment 0 is SHARED but has"),
        (edited("kinds", (0,), 2), "segment 0 is STOP but has"),
        (edited("replaced_columns", (0,), 23), "23"),
        (edited("teacher_hidden_index", (shared,), -1), "-1"),
        (edited("teacher_hidden_index", (shared,), r), rf"\[0, {r}\)"),
        (replace(labels, kinds=labels.kinds[1:]), "kinds"),
        (replace(labels, teacher_lse=labels.teacher_lse[1:]), str(m - 1)),
        (replace(labels, teacher_hidden=None), "needs a teacher hidden state"),
        (label_batch(case, "strict"), "needs a teacher hidden state"),
    ]
    assert case.kinds[0] == 1 and tuple(np.diff(case.segments[0])[[0, 2]]) != (1, 1)
    for invalid, message in cases:
        with pytest.raises(ValueError, match=message):
            check_labels(invalid, placement=placement, config=PAPER)


def test_uld_needs_a_list_for_every_row() -> None:
    case = random_case(0)
    placement, config = placement_of(case, 0, 24), InterfaceConfig(interface="uld")
    labels = label_batch(case, "uld")
    check_labels(labels, placement=placement, config=config)
    for invalid in (
        replace(labels, teacher_topk=None),
        replace(labels, teacher_topk=labels.teacher_topk[1:]),
    ):
        with pytest.raises(ValueError, match="needs a teacher list of its likeliest tokens"):
            check_labels(invalid, placement=placement, config=config)


@pytest.mark.parametrize(
    "interface, option, flag",
    [
        ("bytes", {"unit_weight": "student_length"}, "--simct-unit-weight"),
        ("strict", {"unit_weight": "student_length"}, "--simct-unit-weight"),
        ("sft", {"mask_whitespace": True}, "--simct-mask-whitespace"),
        ("kd", {"stop_bridge": False}, "--no-simct-stop-bridge"),
        ("code_gh", {"min_teacher_mass": 0.5}, "--simct-min-teacher-mass"),
        ("strict", {"topk": 4}, "--simct-topk"),
        ("strict_topk", {"uld_topk": 4}, "--simct-uld-topk"),
        ("paper", {"alm_temperature": 2.0}, "--simct-alm-temperature"),
        ("paper", {"rho": 0.3}, "--simct-rho"),
        ("strict", {"unit_score": "sum"}, "--simct-unit-score"),
        ("sum", {"unit_score": "sum"}, "--simct-unit-score"),
        ("code", {"drop_units": 0.3}, "--simct-drop-units"),
        ("strict", {"random_units": 0.3}, "--simct-random-units"),
        ("no_unit_loss", {"drop_units": 0.3}, "--simct-drop-units"),
        ("strict", {"interface_seed": 3}, "--simct-interface-seed"),
        ("exact", {"temperature": 2.0}, "--simct-temperature"),
        ("alm", {"divergence": "js"}, "--simct-divergence"),
        ("partition", {"topk": 4}, "--simct-topk"),
        ("partition", {"child_weight": 1.0}, "--simct-child-weight"),
        ("exact", {"scalar": "spread"}, "--simct-scalar"),
        ("paper", {"span_mse": 0.1}, "--simct-span-mse"),
        ("paper", {"byte_bounds": "any"}, "--simct-byte-bounds"),
        ("strict_topk", {"teacher_topk": 4}, "--simct-teacher-topk"),
        ("sft", {"temperature": 2.0}, "--simct-temperature"),
        ("paper", {"js_beta": 0.3}, "--simct-js-beta has no meaning with .* --simct-divergence reverse_kl"),
        ("no_unit_loss", {"rho": 1.5}, "--simct-rho"),
    ],
)
def test_options_that_would_not_be_read_are_refused(interface, option, flag) -> None:
    check_config(InterfaceConfig(interface=interface))
    with pytest.raises(ValueError, match=flag):
        check_config(InterfaceConfig(interface=interface, **option))


@pytest.mark.parametrize("interface", METHODS)
def test_interfaces_without_units_have_no_parts_of_the_gradient(interface) -> None:
    """Those that use 1:1 positions only, by the page of interfaces, and those without segments."""
    config = InterfaceConfig(interface=interface)
    if interface in (*ONE_TO_ONE, "topk_kl", "bytes", "sft", "reward"):
        with pytest.raises(ValueError, match=f"--gradient-parts-interval: .* {interface} has no loss of"):
            check_has_units(config, flag="--gradient-parts-interval")
    else:
        check_has_units(config, flag="--gradient-parts-interval")
    check_has_units(InterfaceConfig(interface="strict", span_mse=0.5), flag="--gradient-parts-interval")


@pytest.mark.parametrize(
    "older, spelled",
    [
        (InterfaceConfig(interface="sum"), InterfaceConfig(unit_score="sum")),
        (InterfaceConfig(interface="code_gh"), InterfaceConfig(interface="code", min_teacher_mass=0.5)),
        (InterfaceConfig(interface="no_unit_loss", rho=0.3), InterfaceConfig(drop_units=0.3)),
        (
            InterfaceConfig(interface="random_unit", rho=0.3, interface_seed=2),
            InterfaceConfig(random_units=0.3),
        ),
    ],
    ids=name_of,
)
def test_older_names_are_values_of_fields(older, spelled) -> None:
    assert replace(older.method(), rho=0.5, interface_seed=0) == spelled == spelled.method()
    check_config(older)
    check_config(replace(spelled, interface_seed=older.interface_seed))
    assert teacher_needs(older) == teacher_needs(spelled)
    case = random_case(1)
    assert float(evaluate(case, older).output.sum) == float(evaluate(case, spelled).output.sum)


def test_invalid_options_are_refused() -> None:
    case = random_case(0)
    for config, message in (
        (InterfaceConfig(temperature=0.0), "--simct-temperature 0.0: must be above 0"),
        (
            InterfaceConfig(divergence="js", js_beta=1.0),
            "--simct-js-beta 1.0: must lie strictly between 0 and 1; at 0",
        ),
        (InterfaceConfig(interface="strict_topk", topk=0), "--simct-topk 0: must be at least 1"),
        (InterfaceConfig(temperature=float("inf")), "--simct-temperature inf: must be finite"),
        (InterfaceConfig(interface="papr"), "papr"),
        (
            InterfaceConfig(interface="alm", alm_temperature=0.0),
            "--simct-alm-temperature 0.0: must be above 0",
        ),
        (InterfaceConfig(divergence="kl"), "kl"),
        (InterfaceConfig(interface="bpm"), "--simct-divergence reverse_kl: the targets of interface bpm"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(case, config)
    weight, _ = padded_shard(case.student_weight, 0, 1)
    placement = placement_of(case, 0, len(weight))
    head, labels = shared_head_of(case, placement, None), label_batch(case)
    for given_head, given_labels, message in (
        (None, labels, "shared_head"),
        (head, replace(labels, teacher_hidden=None), "scores 9 segments: it needs teacher_hidden"),
    ):
        options = {"shared_head": given_head, "placement": placement, "config": PAPER}
        with pytest.raises(ValueError, match=message):
            interface_loss(case.student_hidden, weight, given_labels, **options)


class Gathered(TorchDispatchMode):
    """Counts the rows that are gathered from a tensor of this size."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows, self.gathered = num_rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if function is torch.ops.aten.index_select.default and len(args[0]) == self.num_rows:
            self.gathered += len(args[2])
        return function(*args, **(kwargs or {}))


def test_the_weight_rows_of_a_tile_are_gathered_once(monkeypatch) -> None:
    """For its logits and for the gradient of the hidden states: after the products this costs the most."""
    monkeypatch.setattr("megatron_simct.losses.two_pass.MAX_TILE_COLUMNS", 7)
    monkeypatch.setattr("megatron_simct.losses.two_pass.MIN_TILE_COLUMNS", 1)
    case = random_case(0)
    with Gathered(len(case.student_weight) + 1) as mode:
        evaluate(case, InterfaceConfig(interface="strict"))
    assert mode.gathered == len(case.shared)


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=name_of)
def test_tiles_of_any_width_give_the_same_numbers(monkeypatch, config, width) -> None:
    """Maxima that grow from tile to tile, tiles without a shared token, and a label or a
    stop set on a boundary.
    """
    monkeypatch.setattr("megatron_simct.losses.two_pass.MAX_TILE_COLUMNS", width)
    monkeypatch.setattr("megatron_simct.losses.two_pass.MIN_TILE_COLUMNS", 1)
    monkeypatch.setattr("megatron_simct.losses.two_pass.CACHED_ELEMENTS", 5)
    for seed in range(3):
        case = random_case(seed, softcap=seed == 1)
        result = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=1e-10)
        torch.testing.assert_close(result.hidden_gradient, hidden_gradient, rtol=1e-10, atol=1e-10)
        real = result.weight_gradient[: len(weight_gradient)]
        torch.testing.assert_close(real, weight_gradient, rtol=1e-10, atol=1e-10)
