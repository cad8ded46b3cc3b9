"""Angles of rotary embeddings, in float64 from their definition, and the choice of longrope's factors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_simct.models.rotary import Rope, Rotary, apply_rotary, frequencies
from tests.oracles import rotary as oracle
from tests.oracles.rotary import yarn_frequencies

LLAMA3 = Rope(
    theta=500.0,
    dim=16,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_length=64,
)
LONGROPE = Rope(
    theta=100.0, dim=4, kind="longrope", original_length=10, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0)
)


def test_llama3_stretches_long_waves_and_leaves_short_ones() -> None:
    found = frequencies(LLAMA3, 1).double()
    kinds = set()
    for i, f in enumerate(found.tolist()):
        plain = 500.0 ** (-2 * i / 16)
        wave = 2 * math.pi / plain
        if wave < 64 / 4:
            expected, kind = plain, "kept"
        elif wave > 64 / 1:
            expected, kind = plain / 8, "stretched"
        else:
            share = (64 / wave - 1) / (4 - 1)
            expected, kind = (1 - share) * plain / 8 + share * plain, "between"
        assert f == pytest.approx(expected, rel=1e-6)
        kinds.add(kind)
    assert len(kinds) == 3


YARN = Rope(theta=1e4, dim=32, kind="yarn", factor=8.0, original_length=4096, beta_fast=32.0, beta_slow=1.0)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        replace(YARN, truncate=False),
        replace(YARN, theta=1.5e5, dim=64, factor=32.0, truncate=False),
        replace(YARN, theta=10.0, dim=4, factor=4.0, original_length=32, beta_fast=4.0),
        replace(YARN, beta_fast=2.0, beta_slow=2.0),
        replace(YARN, original_length=4),
    ],
)
def test_yarn_stretches_long_waves(rope) -> None:
    expected = yarn_frequencies(
        rope.dim,
        theta=rope.theta,
        factor=rope.factor,
        length=rope.original_length,
        fast=rope.beta_fast,
        slow=rope.beta_slow,
        truncate=rope.truncate,
    )
    torch.testing.assert_close(
        frequencies(rope, 1).double(), torch.tensor(expected).double(), rtol=2e-6, atol=0
    )
    plain = torch.tensor([rope.theta ** (-2 * i / rope.dim) for i in range(rope.dim // 2)])
    if rope.original_length > 4:
        assert expected[0] == 1.0, "the fastest wave is kept"
    assert expected[-1] < 0.9 * float(plain[-1]), "the slowest is stretched"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 6])
def test_pairs_are_rotated_as_complex_numbers(interleaved, dim) -> None:
    rope = replace(YARN, theta=50.0, dim=dim, original_length=16, beta_fast=3.0, interleaved=interleaved)
    x = torch.randn(9, 2, 3, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = apply_rotary(x, Rotary([rope], longest=None)(9)[0], rope)
    options = {"theta": 50.0, "factor": 8.0, "length": 16, "fast": 3.0, "slow": 1.0, "truncate": True}
    f = yarn_frequencies(dim, **options)
    for position, b, head in itertools.product(range(9), range(2), range(3)):
        row = oracle.apply_rotary(
            x[position, b, head].double().tolist(), position, f, interleaved=interleaved
        )
        torch.testing.assert_close(
            found[position, b, head].double(), torch.tensor(row).double(), rtol=1e-5, atol=1e-5
        )
    # The backward pass rotates in the other direction.
    (gradient,) = torch.autograd.grad(found, x, grad_outputs=found)
    torch.testing.assert_close(gradient, x.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope, expected",
    [
        (Rope(theta=100.0, dim=4), (1.0, 0.1)),
        (Rope(theta=100.0, dim=4, kind="linear", factor=5.0), (0.2, 0.02)),
    ],
)
def test_plain_and_linear(rope, expected) -> None:
    torch.testing.assert_close(frequencies(rope, 1), torch.tensor(expected))


def test_every_kind_of_layer_has_its_angles() -> None:
    angles = Rotary([Rope(theta=100.0, dim=4), Rope(theta=1e4, dim=4)], longest=None)(3)
    assert angles.shape == (2, 3, 1, 1, 4)
    torch.testing.assert_close(
        angles[:, 2, 0, 0], torch.tensor([[2.0, 0.2, 2.0, 0.2], [2.0, 0.02, 2.0, 0.02]])
    )


@pytest.mark.parametrize(
    "longest, length, expected", [(None, 10, 1.0), (None, 11, 3.0), (10, 4, 1.0), (11, 4, 3.0), (11, 30, 3.0)]
)
def test_longrope_takes_one_set_of_factors(longest, length, expected) -> None:
    angles = Rotary([LONGROPE], longest=longest)(length)
    assert float(angles[0, 1, 0, 0, 0]) == pytest.approx(1 / expected)
