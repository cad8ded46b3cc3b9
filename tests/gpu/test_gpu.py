"""The steps of a first run on a GPU as tests. They are skipped, with the reason, if there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import smoke_device
from tests.gpu.smoke import STEPS, in_time


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_on_gpu(step, tmp_path) -> None:
    device = smoke_device()
    if device is None:
        pytest.skip("no CUDA device; SIMCT_GPU_SMOKE_DEVICE=cpu runs the same code small on CPU")
    if device.type == "cuda" and torch.cuda.device_count() < step.gpus:
        pytest.skip(f"needs {step.gpus} GPUs, found {torch.cuda.device_count()}")
    result = in_time(step, device, tmp_path)
    assert "problem" not in result, (
        f"{result['problem']}: {(tmp_path / step.name).with_suffix('.log').read_text()}"
    )
    for line in result["lines"]:
        assert line["passed"], f"{line['check']}: {line['value']}, at most {line['limit']}"
