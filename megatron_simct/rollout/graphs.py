"""A decoding step as one CUDA graph for each of a few shapes, so that launching its kernels costs little.

A graph replays the same kernels on the same memory. So a step reads and writes tensors at fixed addresses,
its shapes are rounded up to buckets, and nothing in it waits for the host. On a CPU the same step runs
without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepping:
    """Shapes of decoding steps, and when the host reads their tokens."""

    rows: int
    """The number of sequences is rounded up to a multiple of this ..."""
    keys: int
    """... and the number of cached positions to one of this."""
    late: int
    """How many further steps are launched before the host reads the tokens of one. Tokens behind a stop token
    are dropped."""

    compiled: bool
    """Whether the operations between matrix products are compiled; see `models.regions`."""
    graphs: bool
    """Whether a step is captured, on a GPU, if nothing in it waits for the host."""

    @classmethod
    def on(cls, device: torch.device) -> Stepping:
        """The defaults of the device.

        On a CPU a step has ended when it returns, and rounding up costs time.
        """
        if device.type == "cuda":
            return cls(rows=8, keys=256, late=1, compiled=True, graphs=True)
        return cls(rows=1, keys=16, late=0, compiled=False, graphs=False)


class StepGraphs:
    """function(rows, keys), captured when it is first called with these numbers and replayed from then on."""

    def __init__(self, function: Callable[[int, int], torch.Tensor], *, capture: bool) -> None:
        """Without `capture` the function is called each time. The next call overwrites the result."""
        self._function, self._capture = function, capture
        self._graphs: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self._pool: Any = None

    def __call__(self, rows: int, keys: int) -> torch.Tensor:
        if not self._capture:
            return self._function(rows, keys)
        if (rows, keys) not in self._graphs:
            self._graphs[rows, keys] = self._captured(rows, keys)
        graph, output = self._graphs[rows, keys]
        graph.replay()
        return output

    def _captured(self, rows: int, keys: int) -> tuple[Any, torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # a first run compiles and initialises libraries; it writes the same tensors as the step
        with torch.cuda.stream(side):
            self._function(rows, keys)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._function(rows, keys)
        self._pool = self._pool or graph.pool()
        return graph, output
