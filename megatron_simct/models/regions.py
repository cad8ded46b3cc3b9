"""The parts of a decoding step between its matrix products: small functions, each of which is
compiled to one kernel.

`EAGER` runs them in torch's own operations, `compiled` by torch.compile: Triton on a GPU, C++ on a CPU.

Shape letters: B sequences, H hidden size, g key heads of this tensor-parallel rank, m query heads that share
one of them, K cached positions, L positions that the cache has room for, d entries of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch.nn.functional import rms_norm


@dataclass(frozen=True, slots=True)
class Scale:
    """The factor of an RMSNorm."""

    weight: torch.Tensor
    epsilon: float
    zero_centered: bool


def normed(hidden: torch.Tensor, scale: Scale) -> torch.Tensor:
    """See RMSNorm."""
    if not scale.zero_centered:
        return rms_norm(hidden, scale.weight.shape, scale.weight, scale.epsilon)
    weight = 1.0 + scale.weight.float()
    return rms_norm(hidden.float(), weight.shape, weight, scale.epsilon).to(hidden.dtype)


def added(hidden: torch.Tensor, output: torch.Tensor, after: Scale | None, factor: float) -> torch.Tensor:
    """[B, H]: the residual plus the output of a part of a layer. after: scale of the norm of that output;
    None without one.
    """
    output = output if after is None else normed(output, after)
    return hidden + (output if factor == 1.0 else factor * output)


def add_normed(
    hidden: torch.Tensor, output: torch.Tensor, after: Scale | None, before: Scale, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `added`, and its norm, which the next part of the layer reads. before:
    scale of that norm.
    """
    hidden = added(hidden, output, after, factor)
    return hidden, normed(hidden, before)


def apply_rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> None:
    """Rotate the first entries of x [..., d] in place by their angles; see Angles."""
    x = x[..., : cos.shape[-1]]
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat([second, first], dim=-1)
    x.mul_(cos).addcmul_(swapped, sin)


def rotate_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kept: torch.Tensor,
    rows: torch.Tensor,
    where: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotates queries and keys by their positions' angles, and writes keys and values to the cache.

    qkv [B, g, m + 2, d], which is written to; cos, sin [B, 1, 1, rotated entries], None: nothing is rotated;
    kept [R, g, 2, L, d]; rows int64 [B]: 0 .. B - 1; where int64 [B]: the positions. Returns the queries, [B,
    g, m, d].
    """
    if cos is not None and sin is not None:
        apply_rotary_(qkv[..., :-1, :], cos, sin, interleaved=interleaved)
    kept[rows, :, :, where] = qkv[:, :, -2:]
    return qkv[:, :, :-2]


def gated(halves: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """activation(gate) * up of [B, 2f] -> [B, f]."""
    gate, up = halves.chunk(2, dim=-1)
    return activation(gate).mul_(up)


def capped_weights(
    products: torch.Tensor, visible: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """Weights of the values from products of queries and keys, in float32. visible: added to the scores."""
    scores = torch.tanh(products * (scale / cap)) * cap
    return (scores if visible is None else scores + visible).softmax(dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class Regions:
    """The functions above, as they are or compiled."""

    add_normed: Callable[..., tuple[torch.Tensor, torch.Tensor]] = add_normed
    rotate_and_cache: Callable[..., torch.Tensor] = rotate_and_cache
    gated: Callable[..., torch.Tensor] = gated
    capped_weights: Callable[..., torch.Tensor] = capped_weights


EAGER = Regions()


@lru_cache(maxsize=2)
def compiled(backend: str = "inductor") -> Regions:
    """Compiled once for all numbers of sequences and positions, and for all layers."""
    compile_ = partial(torch.compile, fullgraph=True, backend=backend)
    return Regions(
        add_normed=compile_(add_normed),
        rotate_and_cache=compile_(rotate_and_cache),
        gated=compile_(gated),
        capped_weights=compile_(capped_weights),
    )
