"""flex_attention, uncompiled, against our own attention and the float64 oracle: values and gradients.

torch refuses gradients of flex_attention on a CPU, although only the compiled function lacks them. The
check is removed here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_simct.models.attention import CoreAttention
from megatron_simct.models.flex import BLOCK, block_mask
from megatron_simct.models.layout import Layout, context_pieces
from megatron_simct.models.rotary import Rope
from tests.oracles.attention import attend

D = 4
SCALE = 0.7

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()


def draw(
    num_queries: int, num_keys: int, *, heads: int = 4, groups: int = 2, sequences: int = 1
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_keys + 10 * sequences)
    shapes = ((num_queries, heads), (num_keys, groups), (num_keys, groups))
    return [
        1.5 * torch.randn(length, sequences, n, D, generator=generator, dtype=torch.float64)
        for length, n in shapes
    ]


def core(kernel: str, *, window=None, cap=None, scale=SCALE, sinks=False, rope=None) -> CoreAttention:
    found = CoreAttention(window=window, scale=scale, cap=cap, rope=rope)
    if sinks:
        found.sinks = torch.nn.Parameter(torch.linspace(-2.0, 2.0, 4))
    found.kernel = kernel
    return found


def with_gradients(attention, inputs, layout) -> list[torch.Tensor]:
    """Output, and the gradient of inputs and sinks."""
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    output = attention(*leaves, None, packed_seq_params=layout)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator)
    if attention.sinks is not None:
        leaves.append(attention.sinks)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def assert_equal(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


CASES = {
    "plain": {},
    "scale of heads": {"scale": D**-0.5},
    "window": {"window": 3},
    "soft-cap": {"cap": 1.0},
    "window and soft-cap": {"window": 70, "cap": 1.0},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 3, "sinks": True},
    "queries that grow": {"scale": 0.2, "rope": Rope(theta=1e4, dim=D, query_growth=0.3, original_length=2)},
}


@pytest.mark.parametrize("lengths", [(9,), (4, 1, 5), (120, 30, 150)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_packed_sequences_as_one_by_one(case, lengths) -> None:
    inputs = draw(sum(lengths), sum(lengths))
    layout = Layout(torch.cat([torch.arange(n) for n in lengths]), lengths)
    found = with_gradients(core("flex", **case), inputs, layout)
    assert_equal(found, with_gradients(core("torch", **case), inputs, layout))


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1)])
def test_against_the_equation(heads, groups) -> None:
    """Two padded sequences, and heads that share keys."""
    inputs = [t.requires_grad_() for t in draw(7, 7, heads=heads, groups=groups, sequences=2)]
    expected = attend(*inputs, scale=SCALE, cap=1.0, window=3)
    weights = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).double()
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    layout = Layout(torch.arange(7))
    found = with_gradients(core("flex", window=3, cap=1.0), [t.detach() for t in inputs], layout)
    for a, b in zip(found, [expected.detach(), *gradients], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [CASES["plain"], CASES["window and soft-cap"]], ids=["plain", "window"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_context_parallel_rank_has_its_queries(monkeypatch, case, rank) -> None:
    """All keys, and the early and the late piece of the queries of this rank."""
    lengths, size = (100, 180), 2
    whole = draw(280, 280)
    layout = Layout(torch.cat([torch.arange(n) for n in lengths]), lengths)
    own = torch.cat([torch.arange(280)[piece] for piece in context_pieces(280, rank, size)])
    context = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    part = Layout(layout.positions[own], lengths, context)
    monkeypatch.setattr(part, "all_keys", lambda key, value: (key, value))
    inputs = [whole[0][own], *whole[1:]]
    found = with_gradients(core("flex", **case), inputs, part)
    assert_equal(found, with_gradients(core("torch", **case), inputs, part))
    together = core("torch", **case)(*(t.float() for t in whole), None, packed_seq_params=layout)
    torch.testing.assert_close(found[0], together.detach()[own], rtol=1e-5, atol=1e-5)


def test_which_layouts_either_takes_flex_for() -> None:
    """One sequence without a window that limits it uses torch's flash kernel."""
    one, two = Layout(torch.arange(8)), Layout(torch.arange(4).repeat(2), (4, 4))
    assert not core("either")._takes_flex(one) and not core("either", window=8)._takes_flex(one)
    assert core("either", window=7)._takes_flex(one) and core("either")._takes_flex(two)
    assert not core("torch")._takes_flex(two) and not core("flash")._takes_flex(two)
    assert core("flex")._takes_flex(one)


def test_masks_are_made_once_for_all_layers() -> None:
    layout = Layout(torch.arange(8).repeat(2), (8, 8))
    assert layout.blocks(3) is layout.blocks(3) and layout.blocks(3) is not layout.blocks(4)
    assert layout.blocks(None) is layout.blocks(8)  # no sequence is longer than that window


@pytest.mark.parametrize("lengths, window", [((512,), None), ((300, 140, 200), None), ((700,), 300)])
def test_blocks_hold_what_is_seen(lengths, window) -> None:
    """Every key that is seen lies in a computed block, all keys of a full block are seen, and keys that no
    query can see are skipped.
    """
    total = sum(lengths)
    mask = Layout(torch.cat([torch.arange(n) for n in lengths]), lengths).blocks(window)
    back = torch.arange(total)[:, None] - torch.arange(total)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (back >= 0) & (sequence[:, None] == sequence)
    seen &= back < (total if window is None else window)
    size = -(-total // BLOCK)
    padded = torch.zeros(size * BLOCK, size * BLOCK, dtype=torch.bool)
    padded[:total, :total] = seen
    blocks = padded.view(size, BLOCK, size, BLOCK).transpose(1, 2).flatten(2)
    computed, whole = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.bool)
    for row in range(size):
        some = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]]
        all_of_it = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]]
        computed[row, some.long()] = True
        computed[row, all_of_it.long()] = whole[row, all_of_it.long()] = True
    assert bool(computed[blocks.any(-1)].all()) and bool(blocks[whole].all())
    assert int(computed.sum()) == int(blocks.any(-1).sum()) < size * size
    assert bool(whole.any())


def test_a_block_mask_sees_the_keys_from_first_to_last() -> None:
    first, last = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 3])
    visible = block_mask(first, last, 4).mask_mod
    q, k = torch.arange(3)[:, None], torch.arange(4)
    zero = torch.zeros((), dtype=torch.int64)
    assert visible(zero, zero, q, k).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
