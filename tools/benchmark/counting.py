"""What a GPU is asked for, counted on a CPU: launches, bytes, waits of the host, and kernels of compiled
functions.

A launch is a call of one of torch's operations other than views and allocations, or a kernel that the
compiler writes for a compiled function.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "linear")
"""Matrix products: their operands are not counted as bytes."""
AT_INDEX = ("gather", "index", "scatter", "embedding")
"""Beginnings of names of operations that touch as much of their first operand as they are given places."""
WAITING = ("nonzero", "masked_select", "_unique2", "equal")
"""Operations whose result the host needs."""


class Launches(TorchDispatchMode):
    """Counts operations, except views and operations that only allocate, and the bytes that they read and
    write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits = 0
        """Operations among them that a host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if func.is_view or any(word in name for word in ("empty", "alias", "detach", "unsafe_view")):
            return result
        self.names[name] += 1
        self.waits += name.startswith(WAITING) or _selects_by_mask(name, args)
        if not name.startswith(PRODUCTS):
            self.bytes[name] += _bytes(name, args, kwargs or {}, result)
        return result


def _selects_by_mask(name: str, args: Any) -> bool:
    return name.startswith("index") and any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
    )


def _bytes(name: str, args: Any, kwargs: Any, result: Any) -> int:
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    sizes = [_size(tensor) for tensor in read]
    if name.startswith(AT_INDEX) and read:
        in_place = any(tensor is read[0] for tensor in written)
        places = max((tensor.numel() for tensor in (read[1:] if in_place else written)), default=0)
        at_places = min(sizes[0], places * read[0].element_size())
        return at_places + sum(sizes[1:]) + (at_places if in_place else sum(map(_size, written)))
    return sum(sizes) + sum(map(_size, written))


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, those of an expanded dimension once."""
    return tensor.element_size() * math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0
    )


class Waits(TorchFunctionMode):
    """Counts reads of a tensor by the host, and tensors that are made from its numbers."""

    READS = ("tolist", "item", "__bool__", "__int__", "__float__", "numpy", "cpu", "tensor", "from_numpy")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.names.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


KERNELS = ("async_compile.cpp_pybinding(", "async_compile.triton(", "extern_kernels.")
"""Calls by the compiler's generated code."""


class Kernels:
    """Counts kernels of compiled functions: each call counts as many as the compiler generated for it."""

    def __init__(self) -> None:
        self.count, self.bytes = 0, 0.0
        self._made: dict[str, tuple[int, float]] = {}
        """Kernels of each function, and the bytes that they touch for one of its arguments."""

    def counted(self, name: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function, counted under this name. Bytes are those of the shapes for which it was
        compiled, times the size of a call's arguments over theirs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            sizes: list[int] = []
            with disable_modes(), _bytes_of_graphs(sizes):  # the compiler behaves differently under a mode
                result, codes = run_and_get_code(compiled, *args, **kwargs)
            given = sum(_size(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            if codes:  # it has just been compiled
                kernels = max(sum(map(code.count, KERNELS)) for code in codes)
                self._made[name] = (kernels, sum(sizes) / max(1, given))
            self.count += self._made[name][0]
            self.bytes += self._made[name][1] * given
            return result

        return call

    def take(self) -> tuple[int, float]:
        """Kernels and bytes since it was last asked."""
        taken, self.count, self.bytes = (self.count, self.bytes), 0, 0.0
        return taken


@contextlib.contextmanager
def _bytes_of_graphs(sizes: list[int]) -> Iterator[None]:
    """Adds what each graph that is compiled meanwhile reads and writes."""
    from torch._inductor.graph import GraphLowering

    compile_ = GraphLowering.compile_to_module

    def counting(graph: GraphLowering) -> Any:
        module = compile_(graph)
        sizes.append(graph.count_bytes()[0])
        return module

    with patch.object(GraphLowering, "compile_to_module", counting):
        yield


@contextlib.contextmanager
def disable_modes() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
