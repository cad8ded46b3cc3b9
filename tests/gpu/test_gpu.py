"""The checks of a first run on GPUs as tests; skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import CHECKS, needed_gpus, smoke_device


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_gpu(check):
    device = smoke_device()
    if device is None:
        pytest.skip("no CUDA device; SIMCT_GPU_SMOKE_DEVICE=cpu runs the same code small on CPU")
    if device.type == "cuda" and torch.cuda.device_count() < needed_gpus(check):
        pytest.skip(f"needs {needed_gpus(check)} GPUs, found {torch.cuda.device_count()}")
    for line in check(device):
        assert line.passed, f"{line.check}: {line.value}, at most {line.limit}"
