"""The choice of experts and their weights against a float64 oracle: values and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_simct.models.experts import Experts
from tests.oracles.router import route

CASES = {
    "softmax": {"score": "softmax"},
    "not normalized": {"score": "softmax", "normalized": False},
    "a least sum": {"score": "softmax", "least_sum": 0.7},
    "correction": {"score": "softmax", "correction": True},
    "sigmoid": {"score": "sigmoid", "factor": 2.5},
    "sigmoid, correction": {"score": "sigmoid", "correction": True},
    "groups": {"score": "sigmoid", "groups": 4, "chosen_groups": 2, "correction": True, "factor": 2.5},
    "groups, not normalized": {"score": "sigmoid", "groups": 2, "chosen_groups": 1, "normalized": False},
}


def weights_of(options: dict, correction: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    experts = Experts(count=12, width=4, chosen=3, **{k: v for k, v in options.items() if k != "correction"})
    weights, chosen = experts.route(logits, correction)
    assert (chosen.sum(dim=-1) == 3).all() and not weights[~chosen].any()
    return weights


@pytest.mark.parametrize("name", CASES)
def test_weights_and_their_gradient(name) -> None:
    options, generator = CASES[name], torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(40, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    correction = (
        0.5 * torch.randn(12, generator=generator, dtype=torch.float64) if "correction" in options else None
    )
    listed = None if correction is None else correction.tolist()
    expected = route(logits, chosen=3, **(options | {"correction": listed}))
    found = weights_of(options, correction, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    theirs, ours = (
        torch.autograd.grad((weights * upstream).sum(), logits)[0] for weights in (expected, found)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name, without", [("correction", "correction"), ("groups", "groups"), ("groups", "factor")]
)
def test_each_part_changes_the_weights(name, without) -> None:
    logits = 2 * torch.randn(40, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    correction = torch.linspace(-0.2, 0.2, 12, dtype=torch.float64)
    less = {
        k: v
        for k, v in CASES[name].items()
        if k != without and not (without == "groups" and k == "chosen_groups")
    }
    with_it = weights_of(CASES[name], correction, logits)
    assert not torch.equal(with_it, weights_of(less, None if without == "correction" else correction, logits))
