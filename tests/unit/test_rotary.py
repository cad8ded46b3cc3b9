"""Angles of rotary embeddings, in float64 from their definition, and which factors of longrope are taken."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_simct.models.families import Rope
from megatron_simct.models.rotary import Rotary, frequencies

LLAMA3 = Rope(
    theta=500.0, dim=16, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64
)
LONGROPE = Rope(
    theta=100.0, dim=4, kind="longrope", original_length=10, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0)
)


def test_llama3_stretches_long_waves_and_leaves_short_ones():
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


@pytest.mark.parametrize(
    "rope, expected",
    [(Rope(theta=100.0, dim=4), (1.0, 0.1)), (Rope(theta=100.0, dim=4, kind="linear", factor=5.0), (0.2, 0.02))],
)
def test_plain_and_linear(rope, expected):
    torch.testing.assert_close(frequencies(rope, 1), torch.tensor(expected))


def test_every_kind_of_layer_has_its_angles():
    angles = Rotary([Rope(theta=100.0, dim=4), Rope(theta=1e4, dim=4)], longest=None)(3)
    assert angles.shape == (2, 3, 1, 1, 4)
    torch.testing.assert_close(angles[:, 2, 0, 0], torch.tensor([[2.0, 0.2, 2.0, 0.2], [2.0, 0.02, 2.0, 0.02]]))


@pytest.mark.parametrize(
    "longest, length, expected", [(None, 10, 1.0), (None, 11, 3.0), (10, 4, 1.0), (11, 4, 3.0), (11, 30, 3.0)]
)
def test_longrope_takes_one_set_of_factors(longest, length, expected):
    angles = Rotary([LONGROPE], longest=longest)(length)
    assert float(angles[0, 1, 0, 0, 0]) == pytest.approx(1 / expected)
