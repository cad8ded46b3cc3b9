"""Rotary position embeddings of an architecture: one set of angles for each kind of layer it has.

A pair (x_i, x_{i + d/2}) of the first d entries of a query or a key is turned by position * f_i, where
f_i = theta^(-2i/d), scaled as the architecture says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_simct.models.families import Rope


class Rotary(torch.nn.Module):
    """In the place of Megatron's RotaryEmbedding, which knows one base and one scaling with fixed constants."""

    def __init__(self, ropes: Sequence[Rope], *, longest: int | None) -> None:
        """longest: positions of the longest sequence of all that the model will see. longrope has two sets of factors,
        for short and for long sequences. Knowing the longest, it takes one set for all, so that a token has the same
        log-probability when it is sampled, when it is trained on, and in whatever batch. Without, each forward pass
        decides by its own length, as transformers does."""
        super().__init__()
        self._ropes = tuple(ropes)
        self._longest = longest

    def forward(self, length: int, **_: Any) -> torch.Tensor:
        """Angles of positions 0 .. length - 1, float32 [kinds, length, 1, 1, d]."""
        device = torch.cuda.current_device()
        positions = torch.arange(length, dtype=torch.float32, device=device)
        kinds = [torch.outer(positions, frequencies(rope, self._longest or length).to(device)) for rope in self._ropes]
        return torch.cat([torch.stack(kinds)] * 2, dim=-1)[:, :, None, None, :]

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> int:
        """Positions of this forward pass, those in the KV cache included. Called by GPTModel."""
        if packed_seq_params is not None:
            return max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv)
        received = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = received.shape[0]
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length + (inference_context.sequence_len_offset if inference_context is not None else 0)


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
    raise AssertionError(rope.kind)


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Waves that turn less than low_freq_factor times in the original length are stretched by `factor`, those that
    turn more than high_freq_factor times are not, and those between by a mixture of the two."""
    turns = rope.original_length * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rope.factor
