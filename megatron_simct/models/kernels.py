"""Which kernel computes the softmax attention of a layer: by --attention-backend, the device and what the
layer asks for.

    torch   scaled_dot_product_attention, sequence by sequence; where there is a soft-cap or sinks, torch's
            operations, which hold all scores
    flash   the same, and an error where that is not its flash kernel
    flex    flex_attention: windows, soft-caps, sinks, shared heads and packed sequences in one kernel, which
            holds no scores
    either  flash for one sequence without a window, and flex for others

What torch's own function takes on a GPU is known by rule here, so that a pre-flight without one can say it;
a run asks torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_simct.config.options import AttentionBackend

Kernel = Literal["torch", "flash", "flex", "either"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a kernel must know of a layer's attention."""

    key_dim: int
    value_dim: int
    shares_keys: bool
    """Several heads of queries have one of keys."""
    bounded: bool
    """The softmax has more than products of queries and keys: a soft-cap, or sinks."""
    window: int | None = None

    @property
    def fits_flash(self) -> bool:
        """As far as heads go."""
        return not self.bounded and self.key_dim == self.value_dim <= 256

    def is_cut(self, longest: int | None) -> bool:
        """Whether its window is shorter than a sequence may be."""
        return self.window is not None and (longest is None or self.window < longest)


def kernel_of(scores: Scores, backend: AttentionBackend, *, on_gpu: bool, bf16: bool) -> Kernel:
    """What the layer is computed with in the update and by a teacher. Sampling has one query a sequence, and
    torch's operations."""
    if backend == "flash":
        return "flash"
    if backend == "local" or not on_gpu:
        return "torch"
    return "either" if bf16 and scores.fits_flash else "flex"


def check_backend(
    backend: AttentionBackend,
    layers: Sequence[Scores],
    *,
    on_gpu: bool,
    bf16: bool,
    longest: int | None,
    context_parallel_size: int,
    flag: str,
) -> None:
    """ValueError, with the layer's reason, where a layer cannot have the kernel that is asked for."""
    if backend == "flash":
        for reason in _no_flash(layers, on_gpu, bf16, longest, context_parallel_size):
            raise ValueError(f"--attention-backend flash: {reason}; use auto ({flag})")


def _no_flash(
    layers: Sequence[Scores], on_gpu: bool, bf16: bool, longest: int | None, context_parallel_size: int
) -> Iterator[str]:
    if not on_gpu:
        yield "there is no GPU"
    if not bf16:
        yield "the flash kernel has no float32, which a model is without --bf16"
    if context_parallel_size > 1:
        yield "torch's flash kernel does not have the masks of --context-parallel-size"
    for scores in layers:
        if scores.is_cut(longest):
            yield f"torch's flash kernel has no window, and layers have one of {scores.window}"
        if scores.bounded:
            yield "the flash kernel has no soft-cap and no sinks, which layers have"
        if not scores.fits_flash:
            yield (
                f"the flash kernel wants heads of one size up to 256, and layers have {scores.key_dim} for "
                f"keys and {scores.value_dim} for values"
            )


def torch_kernel(
    scores: Scores, *, bf16: bool, longest: int | None, context_parallel_size: int = 1
) -> Literal["flash", "cuDNN", "memory-efficient", "math", "operations"]:
    """What torch takes on a GPU of compute capability 8.0 or more for kernel "torch", as its source says
    (sdp_utils.cpp of 2.13): flash has no mask and no float32; cuDNN has masks, heads of up to 128 and no
    float32; the memory-efficient one has no heads that share keys. What is left is `math`, which holds all
    scores in float32."""
    if scores.bounded:
        return "operations"
    masked = scores.is_cut(longest) or context_parallel_size > 1
    if bf16 and not masked and scores.fits_flash:
        return "flash"
    if bf16 and max(scores.key_dim, scores.value_dim) <= 128:
        return "cuDNN"
    return "math" if scores.shares_keys else "memory-efficient"


def uses_math(
    layers: Sequence[Scores],
    backend: AttentionBackend,
    *,
    bf16: bool,
    longest: int | None,
    context_parallel_size: int = 1,
) -> bool:
    """Whether on a GPU a layer would have torch's `math`."""
    return any(
        kernel_of(scores, backend, on_gpu=True, bf16=bf16) == "torch"
        and torch_kernel(scores, bf16=bf16, longest=longest, context_parallel_size=context_parallel_size)
        == "math"
        for scores in layers
    )


def chosen_by_torch(
    scores: Scores, *, device: torch.device, dtype: torch.dtype, masked: bool, length: int = 256
) -> str:
    """The kernel that this torch takes on this device, by its name for it, in lower case."""
    heads = 2 if scores.shares_keys else 1
    query = torch.empty(1, heads, length, scores.key_dim, device=device, dtype=dtype, requires_grad=True)
    key = torch.empty(1, 1, length, scores.key_dim, device=device, dtype=dtype)
    value = torch.empty(1, 1, length, scores.value_dim, device=device, dtype=dtype)
    mask = torch.ones(length, length, dtype=torch.bool, device=device) if masked else None
    number = torch._fused_sdp_choice(
        query, key, value, mask, 0.0, not masked, scale=None, enable_gqa=scores.shares_keys
    )
    name = torch.nn.attention.SDPBackend(number).name.lower()
    return name.removesuffix("_attention").replace("cudnn", "cuDNN").replace("efficient", "memory-efficient")


def describe(
    layers: Sequence[Scores],
    backend: AttentionBackend,
    *,
    bf16: bool,
    longest: int | None,
    context_parallel_size: int = 1,
    device: torch.device | None = None,
) -> str:
    """What computes the layers on a GPU, kind by kind, in a line. device: torch is asked what it takes there;
    None: it is known by rule."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    kinds: dict[str, int] = {}
    for scores in layers:
        kernel = kernel_of(scores, backend, on_gpu=True, bf16=bf16)
        masked = scores.is_cut(longest) or context_parallel_size > 1
        if kernel == "flex" or (kernel == "either" and masked):
            said = "flex_attention"
        elif scores.bounded:
            said = "torch's operations, all scores held"
        else:
            if device is None:
                taken: str = torch_kernel(
                    scores, bf16=bf16, longest=longest, context_parallel_size=context_parallel_size
                )
            else:
                taken = chosen_by_torch(scores, device=device, dtype=dtype, masked=masked)
            said = f"torch's {taken} kernel"
            if taken == "math":
                said += ", all scores held in float32"
            if kernel == "either":
                said += ", flex_attention where sequences are packed"
        if scores.is_cut(longest):
            said = f"window {scores.window}: {said}"
        kinds[said] = kinds.get(said, 0) + 1
    return "; ".join(f"{count} layer{'s' if count > 1 else ''}: {said}" for said, count in kinds.items())
