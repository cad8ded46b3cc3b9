"""Rotary position embeddings of an architecture: one set of angles for each kind of layer it has.

A pair (x_i, x_{i + d/2}), or (x_2i, x_{2i + 1}), of the first d entries of a query or a key is rotated by
position * f_i, where f_i = theta^(-2i/d), with the architecture's scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_simct.models.layout import Layout

RopeKind = Literal["default", "linear", "llama3", "longrope", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding of one kind of layer."""

    theta: float
    dim: int
    """Entries of a head that are rotated, from the first on."""
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0
    """Positions that the model was trained for before it was scaled."""
    short_factors: tuple[float, ...] = ()
    """longrope, one for each of the dim / 2 frequencies: for sequences of up to original_length positions."""
    long_factors: tuple[float, ...] = ()
    """The same for longer sequences."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: waves that rotate more often in the original length are kept, those that rotate less
    often are stretched.
    """
    truncate: bool = True
    """yarn: the bounds of the entries between the two are whole numbers."""
    interleaved: bool = False
    """A pair that is rotated is (x_2i, x_{2i + 1}), and else (x_i, x_{i + d/2})."""
    query_growth: float = 0.0
    """Queries are multiplied by 1 + query_growth * log(1 + floor(position / original_length))."""
    attention_factor: float = 1.0
    """Multiplies the rotated entries, of queries and keys alike."""


class Rotary(torch.nn.Module):
    """In the place of Megatron's RotaryEmbedding, which knows one base and one scaling
    with fixed constants.
    """

    def __init__(self, ropes: Sequence[Rope], *, longest: int | None) -> None:
        """longest: positions of the longest sequence of all that the model will see. longrope has two sets of
        factors, for short and for long sequences. Knowing the longest, it takes one set for all, so that a
        token has the same log-probability when it is sampled, when it is trained on, and in whatever batch.
        Without, each forward pass decides by its own length, as transformers does."""
        super().__init__()
        self._ropes = tuple(ropes)
        self._longest = longest

    def forward(self, where: int | Layout, **_: Any) -> torch.Tensor:
        """Angles float32 [kinds, S, 1, 1, d] of the positions of a Layout, or of 0 .. S - 1."""
        device = torch.cuda.current_device()
        if isinstance(where, Layout):
            positions, longest = where.positions.float(), where.longest
        else:
            positions, longest = torch.arange(where, dtype=torch.float32, device=device), where
        kinds = [
            torch.outer(positions, frequencies(rope, self._longest or longest).to(device))
            for rope in self._ropes
        ]
        angles = torch.stack(kinds)
        if self._ropes[0].interleaved:
            return angles.repeat_interleave(2, dim=-1)[:, :, None, None, :]
        return torch.cat([angles] * 2, dim=-1)[:, :, None, None, :]

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Layout | None = None,
    ) -> int | Layout:
        """Positions of this forward pass, those in the KV cache included. GPTModel asks for them, and hands
        the answer to `forward`."""
        if packed_seq_params is not None:
            return packed_seq_params
        received = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = received.shape[0]
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length + (inference_context.sequence_len_offset if inference_context is not None else 0)


def apply_rotary(x: torch.Tensor, angles: torch.Tensor, rope: Rope) -> torch.Tensor:
    """x [S, B, heads, d] rotated by angles [S, 1, 1, d] of Rotary."""
    angles = angles[: x.shape[0]]
    if rope.interleaved:
        swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
    return x * angles.cos().to(x.dtype) + swapped * angles.sin().to(x.dtype)


def frequencies(rope: Rope, length: int) -> torch.Tensor:
    """f_i, float32 [d/2], for sequences of `length` positions; only longrope looks at it."""
    plain = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.kind:
        case "default":
            return 1.0 / plain
        case "linear":
            return 1.0 / plain / rope.factor
        case "llama3":
            return _llama3(1.0 / plain, rope)
        case "longrope":
            factors = rope.long_factors if length > rope.original_length else rope.short_factors
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * plain)
        case "yarn":
            return _yarn(1.0 / plain, rope)
    raise AssertionError(rope.kind)


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Waves that rotate less than low_freq_factor times in the original length are stretched by `factor`,
    those that rotate more than high_freq_factor times are not, and those between by a mixture of the two."""
    turns = rope.original_length * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rope.factor


def _yarn(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """As llama3, with a mixture that changes evenly in i rather than in the wave (YaRN, arXiv:2309.00071)."""

    def entry(turns: float) -> float:
        """i of the wave that rotates so often in the original length."""
        return rope.dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = entry(rope.beta_fast), entry(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0.0
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return stretched * plain / rope.factor + (1 - stretched) * plain
