"""Importance weights: their value, their correction, and losses with them against the losses
of weighted segments.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import interface_loss
from megatron_simct.losses.policy_gradient import importance_weights
from tests.oracles.byte_cases import evaluate as evaluate_bytes
from tests.oracles.byte_cases import random_cases
from tests.oracles.loss_cases import (
    WITHOUT_HEAD,
    evaluate_oracle,
    label_batch,
    padded_shard,
    placement_of,
    random_case,
    shared_head_of,
)


def by_hand(new: list[float], old: list[float], starts: list[int], cap: float) -> list[float]:
    """The product of the ratios of the tokens before each one, in its own response, at most cap."""
    weights = []
    for i in range(len(new)):
        start = max(s for s in starts if s <= i)
        weights.append(min(math.prod(math.exp(new[j] - old[j]) for j in range(start, i)), cap))
    return weights


@pytest.mark.parametrize("cap", [1.0, 2.0, 1e6])
def test_they_are_products_of_the_ratios_before_a_token(cap) -> None:
    generator = torch.Generator().manual_seed(1)
    new, old = (-torch.rand(2, 9, generator=generator, dtype=torch.float64) * 4).unbind()
    starts = [0, 4, 5]
    found = importance_weights(new, old, torch.tensor(starts), cap=cap)
    assert found.tolist() == pytest.approx(by_hand(new.tolist(), old.tolist(), starts, cap), rel=1e-12)
    assert [found[i] for i in starts] == [1, 1, 1]


def test_without_a_cap_the_weighted_mean_over_old_responses_is_the_mean_over_new_ones() -> None:
    """All responses of three tokens out of three, with two policies; f is any function
    of the tokens before.
    """
    generator = torch.Generator().manual_seed(2)
    tables = [
        torch.randn(3, 40, 3, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)
    ]
    f = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    new_mean = weighted = plain = 0.0
    for tokens in itertools.product(range(3), repeat=3):
        prefixes = [sum((t + 1) * 3**k for k, t in enumerate(tokens[:i])) for i in range(3)]
        new, old = (torch.stack([table[i, prefixes[i], tokens[i]] for i in range(3)]) for table in tables)
        values = torch.stack([f[i, prefixes[i]] for i in range(3)])
        weights = importance_weights(new, old, torch.tensor([0]), cap=1e9)
        new_mean += float(new.sum().exp() * values.sum())
        weighted += float(old.sum().exp() * (weights * values).sum())
        plain += float(old.sum().exp() * values.sum())
    assert weighted == pytest.approx(new_mean, rel=1e-12)
    assert abs(plain - new_mean) > 1e-2


@pytest.mark.parametrize("interface", ["paper", "exact", "strict", "alm", "uld"])
def test_a_loss_under_weights_is_the_loss_of_weighted_segments(interface) -> None:
    """Value and gradient are the oracle's for the case whose segments have these weights as constants."""
    case, config = random_case(3, num_segments=8), InterfaceConfig(interface=interface)
    logits = case.student_hidden @ case.student_weight.T
    labels = torch.tensor(case.student_labels)
    new = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    old = new + 0.5 * torch.randn(len(new), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    starts = [0, 7]
    factors = by_hand(new.tolist(), old.tolist(), starts, 1.5)
    expected = evaluate_oracle(
        replace(case, weights=[factors[segment[2]] for segment in case.segments]), config
    )
    plain, _, _ = evaluate_oracle(case, config)
    assert abs(float(plain.sum.detach() - expected[0].sum.detach())) > 1e-3

    weight, start = padded_shard(case.student_weight, 0, 1)
    placement = placement_of(case, start, len(weight))
    hidden = case.student_hidden.clone().requires_grad_()
    batch = replace(
        label_batch(case, interface), sampling_log_probs=old, response_starts=torch.tensor(starts)
    )
    output = interface_loss(
        hidden,
        weight.requires_grad_(),
        batch,
        shared_head=None if interface in WITHOUT_HEAD else shared_head_of(case, placement, None),
        placement=placement,
        config=config,
        importance_cap=1.5,
    )
    output.sum.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert torch.allclose(output.log_probs, new, rtol=0, atol=1e-12)
    # The weights of segments are float32.
    assert float(output.sum.detach()) == pytest.approx(float(expected[0].sum.detach()), rel=1e-6)
    assert torch.allclose(hidden.grad, expected[1], rtol=1e-6, atol=1e-6)
    assert torch.allclose(weight.grad[: len(expected[2])], expected[2], rtol=1e-6, atol=1e-6)
    assert float(output.metrics["importance_weight_sum"]) == pytest.approx(sum(factors))


@pytest.mark.parametrize("bounds", ["longest-match", "any"])
def test_byte_positions_are_weighted_by_the_label_that_they_are_in(bounds) -> None:
    """The sum is that of the labels' losses times fixed factors, and so is its gradient."""
    cases = random_cases(5)
    plain = evaluate_bytes(cases, bounds=bounds)
    count = len(plain.label_losses)
    factors = torch.rand(count, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.5
    weighted = evaluate_bytes(cases, bounds=bounds, weigh=lambda log_probs: factors)
    assert float(weighted.sum) == pytest.approx(float((factors * plain.label_losses).sum()), rel=1e-12)
    assert torch.allclose(weighted.label_losses, factors * plain.label_losses)
    gradient = torch.zeros_like(plain.gradient)
    for i in range(count):  # one label's part at a time
        one = torch.zeros(count, dtype=torch.float64).index_fill(0, torch.tensor([i]), 1)
        gradient += (
            factors[i]
            * evaluate_bytes(cases, bounds=bounds, weigh=partial(lambda log_probs, o: o, o=one)).gradient
        )
    assert torch.allclose(weighted.gradient, gradient, rtol=1e-9, atol=1e-12)
    assert float((weighted.gradient - plain.gradient).abs().max()) > 1e-3
    same = evaluate_bytes(cases, bounds=bounds, weigh=torch.ones_like)
    assert torch.equal(same.gradient, plain.gradient)
