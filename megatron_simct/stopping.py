"""When to stop before --train-iters: a signal from the scheduler of the cluster, or the time that was allowed.

Ranks see a signal or a clock at different moments, so after each step they agree: one that has seen it stops all.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
import torch.distributed as dist


class ExitWatch:
    """Answers after each step whether the run is to save and exit."""

    def __init__(self, *, on_signal: bool, after_minutes: float | None, device: torch.device) -> None:
        """on_signal: SIGTERM no longer ends the process, it is remembered. Time counts from here."""
        self._signalled = False
        self._after_minutes = after_minutes
        self._begin_s = time.monotonic()
        self._active = on_signal or after_minutes is not None
        self._device = device
        if on_signal:
            signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, *_: Any) -> None:
        self._signalled = True

    def reason(self) -> str | None:
        """Why to exit now, the same on every rank; None to go on. Collective over the whole job."""
        if not self._active:
            return None
        minutes = (time.monotonic() - self._begin_s) / 60
        late = self._after_minutes is not None and minutes > self._after_minutes
        seen = torch.tensor([int(self._signalled), int(late)], dtype=torch.int32, device=self._device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        signalled, late = seen.tolist()
        if signalled:
            return "SIGTERM"
        return f"--exit-duration-in-mins {self._after_minutes:g} is over" if late else None
