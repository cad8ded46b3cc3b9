"""How a device goes through a tile. The arithmetic of a tile is in functions of tensors, its bodies.

On a CPU they run in torch's operations, in place and over blocks of rows that stay in the cache. On a GPU,
where every operation is a launch and reads the tile from memory again, they run over whole tiles and are
compiled by torch.compile: a few kernels each.

A body writes results into views of what it is given, and has no branch on a tensor's values where `by_blocks`
is false. What it overwrites of its inputs without meaning to return it goes through `scratch` first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

Body = TypeVar("Body", bound=Callable[..., Any])
BACKEND = "inductor"


def by_blocks(device: torch.device) -> bool:
    """Whether elementwise work goes over blocks of rows, in torch's operations."""
    return device.type == "cpu"


def body(function: Body, device: torch.device) -> Body:
    """`function` as it is, or compiled, for all shapes at once."""
    return function if by_blocks(device) else compiled(function, BACKEND)


@lru_cache(maxsize=64)
def compiled(function: Body, backend: str) -> Body:
    """Compiled at its first call. What torch cannot trace runs as it is; so does a function that meets more
    kinds of arguments than torch keeps (sizes 0 and 1 are kinds of their own).

    If the compiler fails (no C compiler, no Triton for this GPU), a warning says why, and the function runs
    as it is from then on, with the same numbers. TORCH_COMPILE_DISABLE=1 asks for that from the start.
    """
    run: Callable[..., Any] = torch.compile(function, backend=backend, dynamic=True)

    def compiled_or_not(*given: Any) -> Any:
        nonlocal run
        try:
            return run(*given)
        except TorchDynamoException as error:  # it comes before anything has been computed
            if run is function:
                raise
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"{function.__name__} of the loss runs uncompiled: {reason}", stacklevel=2)
            run = function
            return function(*given)

    return compiled_or_not  # type: ignore[return-value]


def scratch(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which may be overwritten. In compiled code a copy that is never made, where else the
    caller's tensor would have to be written."""
    return tensor.clone() if torch.compiler.is_compiling() else tensor


def is_column(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[n, w]: which entry of each row is its column int64 [n]; none if that is outside of the block. For
    compiled code, where the comparison is part of the kernel around it, and a scatter is one of its own."""
    return torch.arange(block.shape[1], device=block.device) == columns.unsqueeze(1)
