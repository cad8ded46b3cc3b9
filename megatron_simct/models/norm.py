"""torch's RMSNorm as Megatron's layer specs want it. megatron-core's own wrapper refuses sequence parallelism."""

from __future__ import annotations

import torch

from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight.

    Under sequence parallelism each tensor-parallel rank normalizes its own positions, so its gradient of the weight is
    a part of the whole. The mark on the weight tells Megatron to sum the parts when it finalizes the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
