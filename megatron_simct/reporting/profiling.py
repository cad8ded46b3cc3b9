"""--profile: traces of a few steps, one file a rank, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_simct.config.options import OutputConfig


class Profiler:
    """Told of every step before it begins, and of the end of the run."""

    def __init__(self, options: OutputConfig) -> None:
        self._options = options
        self._active = options.profile and dist.get_rank() in options.profile_ranks
        self._trace: profile | None = None

    def step(self, iteration: int) -> None:
        """`iteration`, counted from 1, is about to begin."""
        if not self._active:
            return
        if iteration >= self._options.profile_step_end:
            self.close()
        elif iteration >= self._options.profile_step_start and self._trace is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            if torch.cuda.is_available():
                torch.cuda.cudart().cudaProfilerStart()  # for one around this process, such as nsys
            self._trace = profile(activities=activities)
            self._trace.start()

    def close(self) -> None:
        """Write what has been traced, if anything."""
        if self._trace is None:
            return
        self._trace.stop()
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaProfilerStop()
        assert self._options.run_dir is not None, "check() refuses --profile without it"
        folder = Path(self._options.run_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(folder / f"rank_{dist.get_rank()}.json.gz"))
        self._active, self._trace = False, None
