"""A decoding step as one CUDA graph for each of a few shapes, so that launching its kernels costs nothing.

A graph replays the same kernels on the same memory. So a step reads and writes tensors that stay where they
are, its shapes are rounded up to buckets, and nothing in it waits for the host. On a CPU the same step runs
as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepping:
    """How decoding steps are shaped, and when their tokens are read."""

    rows: int
    """The number of sequences is rounded up to a multiple of this ..."""
    keys: int
    """... and the number of cached positions to one of this."""
    late: int
    """How many steps run on before the host reads the tokens of one. What a sequence computes behind its stop
    token is dropped."""

    compiled: bool
    """Whether what stands between matrix products is compiled; see `models.regions`."""
    graphs: bool
    """Whether a step is captured, on a GPU and where nothing in it waits for the host."""

    @classmethod
    def on(cls, device: torch.device) -> Stepping:
        """On a CPU a step is done when it returns, and rounding up costs more than it saves."""
        if device.type == "cuda":
            return cls(rows=8, keys=256, late=1, compiled=True, graphs=True)
        return cls(rows=1, keys=16, late=0, compiled=False, graphs=False)


class StepGraphs:
    """function(rows, keys), captured when it is first called with these numbers and replayed from then on."""

    def __init__(self, function: Callable[[int, int], torch.Tensor], *, capture: bool) -> None:
        """Without `capture` it is called each time. What it returns is overwritten by the next call."""
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
        # compiles, and lets libraries set themselves up; it writes what the step writes
        with torch.cuda.stream(side):
            self._function(rows, keys)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._function(rows, keys)
        self._pool = self._pool or graph.pool()
        return graph, output
