"""Core attention against a float64 oracle: values and gradients, windows, soft-caps, caches, packing."""

from __future__ import annotations

import pytest
import torch

from megatron_simct.models.attention import CoreAttention
from megatron_simct.models.layout import Layout
from megatron_simct.models.rotary import Rope
from tests.oracles.attention import attend

D = 4


def build(window: int | None, cap: float | None) -> CoreAttention:
    return CoreAttention(window=window, scale=0.7, cap=cap, layer_number=2)


def draw(num_queries: int, num_keys: int, heads: int, groups: int, sequences: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_queries + 10 * num_keys + 100 * heads)
    shapes = ((num_queries, heads), (num_keys, groups), (num_keys, groups))
    return [
        (
            1.5 * torch.randn(length, sequences, n, D, generator=generator, dtype=torch.float64)
        ).requires_grad_()
        for length, n in shapes
    ]


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (None, 1.0), (3, 1.0)])
@pytest.mark.parametrize("num_queries, num_keys", [(7, 7), (1, 7), (3, 7)])
def test_values_and_gradients(heads, groups, window, cap, num_queries, num_keys) -> None:
    inputs = draw(num_queries, num_keys, heads, groups)
    expected = attend(*inputs, scale=0.7, cap=cap, window=window)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = build(window, cap)(*single, None)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found, single), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (2, 1.0)])
def test_packed_sequences_do_not_see_each_other(window, cap) -> None:
    inputs = [t.detach().requires_grad_() for t in draw(9, 9, 4, 2, sequences=1)]
    lengths = (4, 1, 4)
    layout = Layout(torch.cat([torch.arange(n) for n in lengths]), lengths)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = build(window, cap)(*single, None, packed_seq_params=layout)
    parts = zip(*(tensor.split(lengths) for tensor in inputs), strict=True)
    expected = torch.cat([attend(*part, scale=0.7, cap=cap, window=window) for part in parts])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found, single), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_queries, num_keys", [(7, 7), (3, 7)])
def test_sinks_and_their_gradient(window, num_queries, num_keys) -> None:
    inputs = draw(num_queries, num_keys, 6, 2)
    sinks = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64).requires_grad_()
    expected = attend(*inputs, scale=0.7, cap=None, window=window, sinks=sinks)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    attention = build(window, None)
    attention.sinks = torch.nn.Parameter(sinks.detach().float())
    found = attention(*single, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert float((found - build(window, None)(*single, None)).detach().abs().max()) > 0.1
    pairs = zip(
        gradients(found, [*single, attention.sinks]), gradients(expected, [*inputs, sinks]), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_queries, num_keys", [(7, 7), (3, 7)])
def test_queries_that_grow_with_their_position(num_queries, num_keys) -> None:
    inputs = draw(num_queries, num_keys, 4, 2)
    expected = attend(*inputs, scale=0.7, cap=None, window=None, growth=(0.3, 2))
    rope = Rope(theta=1e4, dim=D, query_growth=0.3, original_length=2)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = CoreAttention(window=None, scale=0.7, cap=None, rope=rope)(*single, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found, single), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_layers_of_one_kind_share_a_mask() -> None:
    layout = Layout(torch.arange(5))
    assert layout.visible_keys(5, 5, 3) is layout.visible_keys(5, 5, 3)
    assert layout.visible_keys(5, 5, 3) is not layout.visible_keys(5, 5, 2)


def test_bfloat16_stays_close() -> None:
    inputs = draw(7, 7, 4, 2)
    expected = attend(*inputs, scale=0.7, cap=1.0, window=3)
    found = build(3, 1.0)(*(t.detach().bfloat16() for t in inputs), None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0, atol=0.05)
