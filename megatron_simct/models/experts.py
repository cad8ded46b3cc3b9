"""The router of a mixture of experts: what megatron-core computes with TransformerEngine, in torch's own operations."""

from __future__ import annotations

import torch

from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Megatron's, whose own product wants TransformerEngine."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Scores in float32 [S, B, experts] of hidden states [S, B, H]."""
        return torch.nn.functional.linear(input.float(), self.weight.float())
