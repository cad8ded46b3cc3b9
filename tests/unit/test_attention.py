"""Core attention against a float64 oracle: values and gradients, windows, soft-caps, caches, padding, packing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_simct.models.attention import CoreAttention
from tests.oracles.attention import attend

D = 4


def build(window: int | None, cap: float | None) -> CoreAttention:
    architecture = SimpleNamespace(windows=(None, window), softmax_scale=0.7, attention_softcap=cap)
    return CoreAttention(architecture=architecture, layer_number=2)


def draw(num_queries: int, num_keys: int, heads: int, groups: int, sequences: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_queries + 10 * num_keys + 100 * heads)
    shapes = ((num_queries, heads), (num_keys, groups), (num_keys, groups))
    return [
        (1.5 * torch.randn(length, sequences, n, D, generator=generator, dtype=torch.float64)).requires_grad_()
        for length, n in shapes
    ]


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (None, 1.0), (3, 1.0)])
@pytest.mark.parametrize("num_queries, num_keys", [(7, 7), (1, 7), (3, 7)])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients(heads, groups, window, cap, num_queries, num_keys, padded):
    inputs = draw(num_queries, num_keys, heads, groups)
    is_padding = torch.zeros(2, num_keys, dtype=torch.bool)
    is_padding[0, :3] = padded
    expected = attend_real(inputs, is_padding, cap=cap, window=window)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = build(window, cap)(*single, is_padding[:, None, None, :] if padded else None)
    assert found.dtype == torch.float32 and found.isfinite().all()
    real = ~is_padding.T[num_keys - num_queries :]
    torch.testing.assert_close(found[real].double(), expected[real], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found[real], single), gradients(expected[real], inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def attend_real(inputs: list[torch.Tensor], is_padding: torch.Tensor, **options) -> torch.Tensor:
    """The oracle without its rows of padding, which see nothing there."""
    query, key, value = inputs
    first = key.shape[0] - query.shape[0]
    sequences = []
    for b in range(query.shape[1]):
        skipped = max(0, int(is_padding[b].sum()) - first)
        rows = attend(
            query[skipped:, b : b + 1],
            key[:, b : b + 1],
            value[:, b : b + 1],
            scale=0.7,
            is_padding=is_padding[b : b + 1],
            **options,
        )
        sequences.append(torch.cat([rows.new_zeros(skipped, *rows.shape[1:]), rows]))
    return torch.cat(sequences, dim=1)


@pytest.mark.parametrize("window, cap", [(None, None), (3, None), (2, 1.0)])
def test_packed_sequences_do_not_see_each_other(window, cap):
    query, key, value = (t.detach()[:, 0].float().requires_grad_() for t in draw(9, 9, 4, 2, sequences=1))
    ends = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    packed = SimpleNamespace(cu_seqlens_q=ends)
    found = build(window, cap)(query, key, value, None, packed_seq_params=packed)
    parts = [
        attend(
            *(t[a:b, None].double() for t in (query, key, value)), scale=0.7, cap=cap, window=window, is_padding=None
        )
        for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)
    ]
    expected = torch.cat(parts)[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found, [query, key, value]), gradients(expected, [query, key, value]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close():
    inputs = draw(7, 7, 4, 2)
    expected = attend(*inputs, scale=0.7, cap=1.0, window=3, is_padding=None)
    found = build(3, 1.0)(*(t.detach().bfloat16() for t in inputs), None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0, atol=0.05)
