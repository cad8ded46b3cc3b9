"""The properties in which families of models differ: fields of config.json, and parts of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_simct.models.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One entry of the tables of families."""

    fixed: dict[str, tuple[Any, ...]]
    """Fields that are implemented at these values only."""
    read: frozenset[str] = frozenset()
    """Fields that are read below."""
    neutral: frozenset[str] = frozenset()
    """Fields without effect in this family, beside INERT."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """transformers' defaults of fields that config.json may leave out."""
    ropes: tuple[str, ...] = ("default", "yarn")
    """Kinds of scaling that are implemented."""
    interleaved_rope: bool = False
    windows: Literal["none", "all", "upper", "pattern", "no_rope"] = "none"
    """Layers with the sliding window, if there is no layer_types: none, all, from max_window_layers on,
    all but every sliding_window_pattern-th, or those without a rotary embedding."""
    rope_layers: Literal["all", "listed", "windows"] = "all"
    """Layers with a rotary embedding: all, those of no_rope_layers, or those with the sliding window."""
    qkv_bias: bool | str = False
    """Whether there is a bias, or the name of the field that decides."""
    output_bias: bool = False
    sinks: bool = False
    qk_norm: bool | str = False
    whole_norm: bool = False
    """The norms of queries and keys are over all heads together."""
    norm_after_rope: bool = False
    """They come after the rotary embedding."""
    zero_centered_norm: bool = False
    norms: Literal["before", "around", "after"] = "before"
    scaled_embedding: bool = False
    """The embedding of a token is multiplied by the root of hidden_size."""
    packed: bool = False
    """One tensor of queries, keys and values, and one of gate and up projection."""
    local_rope: bool = False
    """Layers with the sliding window have a rotary embedding of their own."""
    output_gate: bool = False
    """Each head's output is multiplied by a gate."""
    delta_net: Literal["none", "split", "packed"] = "none"
    """Layers that layer_types calls linear_attention have a gated delta net: its projections are tensors of
    their own, or two."""
    growing_queries: bool = False
    """Queries grow with the logarithm of their position."""
    latent: bool = False
    """Keys and values of a token come from one vector (multi-head latent attention)."""
    experts: Callable[[dict[str, Any], str], Experts] | None = None
    """Makes the experts from the fields and a prefix for errors."""
    is_dense: Callable[[dict[str, Any]], Sequence[bool]] | None = None
    """Which layers have no experts; None: all have, if any."""
    teacher_only: bool = False
    """Generation and training are not implemented for it."""


SCALED = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings of families that are spelled as llama is."""
