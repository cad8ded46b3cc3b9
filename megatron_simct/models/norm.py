"""torch's RMSNorm as Megatron's layer specs want it. megatron-core's own wrapper refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch

from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight, or x / rms(x) * (1 + weight) where the configuration centres weights at zero.

    Under sequence parallelism each tensor-parallel rank normalizes its own positions, so its gradient of the weight is
    a part of the whole. The mark on the weight tells Megatron to sum the parts when it finalizes the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # What Megatron reads on a parameter.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centered = config.layernorm_zero_centered_gamma
        if self._zero_centered:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._zero_centered:
            return super().forward(x)
        # In float32: 1 + weight would lose most of a small weight's bits in bfloat16.
        weight = 1.0 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """A layer whose output is normalized before the residual is added."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **kwargs: Any
    ) -> None:
        assert not bias, "a bias would be added after the norm"
        super().__init__(input_size, output_size, config=config, bias=bias, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        output, _ = super().forward(input_)
        return self.post_layernorm(output), None
