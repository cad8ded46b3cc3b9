"""All checks of tests/gpu, one Markdown table: tools/gpu_smoke.sh. Ends with 1 where a check fails or raises."""

from __future__ import annotations

import sys
import traceback

import torch

from tests.gpu.checks import CHECKS, needed_gpus, smoke_device


def main() -> int:
    device = smoke_device()
    if device is None:
        print("no CUDA device; SIMCT_GPU_SMOKE_DEVICE=cpu runs the same code small on CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, small"
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    print(f"torch {torch.__version__}, {name}\n\n| check | measured | at most | |\n|---|---|---|---|")
    failed = False
    for check in CHECKS:
        if count < needed_gpus(check):
            print(f"| {check.__name__} | - | - | skipped: needs {needed_gpus(check)} devices, found {count} |")
            continue
        try:
            lines = check(device)
        except Exception:  # the other checks still say something
            traceback.print_exc()
            print(f"| {check.__name__} | - | - | **raised** (see stderr) |", flush=True)
            failed = True
            continue
        for line in lines:
            limit = "" if line.limit is None else f"{line.limit:.2g}"
            verdict = "" if line.limit is None else "ok" if line.passed else "**failed**"
            print(f"| {line.check} | {line.value:.4g} {line.unit} | {limit} | {verdict} |", flush=True)
            failed |= not line.passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
