"""torch's RMSNorm as Megatron's layer specs want it. megatron-core's own wrapper refuses
sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.models.regions import Scale, normed
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight, or x / rms(x) * (1 + weight) where the configuration centres weights at zero.

    Under sequence parallelism each tensor-parallel rank normalizes its own positions, so its gradient of the
    weight is a part of the whole. The mark on the weight makes Megatron sum the parts when it finalizes
    the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # What Megatron reads on a parameter.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centered = config.layernorm_zero_centered_gamma
        if self._zero_centered:
            torch.nn.init.zeros_(self.weight)

    @property
    def scale(self) -> Scale:
        """What the norm multiplies by, for functions outside of autograd."""
        assert self.eps is not None
        return Scale(self.weight, self.eps, self._zero_centered)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In float32 if it is centred: 1 + weight would lose most of a small weight's bits in bfloat16.
        return normed(x, self.scale)


class UnweightedNorm(RMSNorm):
    """x / rms(x) of queries or keys whose norm comes after the rotary embedding, which rotates x and leaves
    rms(x) as it is. Attention multiplies by the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, None, self.eps)


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


class WholeNorm(torch.nn.Module):
    """The norm of all heads of queries, or of keys, together.

    Each tensor-parallel rank has those of its heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        """hidden_size: of one head."""
        super().__init__()
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._eps, self._size = eps, heads * hidden_size
        self.weight = torch.nn.Parameter(
            torch.ones(self._size // self._group.size(), dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, d]"""
        squares = x.float().square().sum(dim=(-2, -1), keepdim=True)
        # Every rank uses the sum for its own heads, so the gradient is a sum over ranks too.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self._group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self._group)
        normed = (x.float() * torch.rsqrt(squares / self._size + self._eps)).to(x.dtype)
        return normed * self.weight.view(x.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For a checkpoint: the weight is split as the heads are."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets
        )


def row_parallel(projection: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A row-parallel layer's output without autograd, and without the norm that comes after
    it in some families.
    """
    if type(projection) not in (RowParallelLinear, NormedRowParallelLinear):
        return projection(hidden)[0]  # TransformerEngine's, or one with an adapter
    assert isinstance(projection, RowParallelLinear)
    output = torch.nn.functional.linear(hidden, projection.weight)
    if projection.tp_group.size() > 1:
        dist.all_reduce(output, group=projection.tp_group)
    return output


def scale_after(projection: torch.nn.Module) -> Scale | None:
    """What the norm after a layer multiplies by, in families that have one; `row_parallel` leaves it out."""
    if type(projection) is not NormedRowParallelLinear:
        return None
    assert isinstance(projection, NormedRowParallelLinear)
    return projection.post_layernorm.scale
