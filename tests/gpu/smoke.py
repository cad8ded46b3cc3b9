"""The steps of a first run on a GPU, each in a separate process with its own time limit: tools/gpu_smoke.sh.

`STEPS` is the list, the most useful steps first. The limits add up to less than ten minutes. Each step
writes DIR/NAME.json when it ends, so that measurements before an abort are kept. Exits with 1 if a
step failed or raised.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.gpu import checks, runs, tables
from tests.gpu.checks import Line, smoke_device

TOTAL_S = 570


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of the run."""

    name: str
    limit_s: int
    about: str
    function: Callable[[torch.device], list[Line]]
    gpus: int = 1


STEPS: Sequence[Step] = (
    Step(name="versions", limit_s=20, about="what is installed, and on what", function=tables.versions),
    Step(
        name="loss", limit_s=100, about="the loss beside its bare products: ms, memory", function=tables.loss
    ),
    Step(name="training", limit_s=80, about="three steps, saved, resumed to five", function=runs.training),
    Step(
        name="generation",
        limit_s=90,
        about="ms a token, launched one by one and as graphs",
        function=tables.generation,
    ),
    Step(
        name="full_size", limit_s=70, about="three steps with a teacher of 7B shapes", function=runs.full_size
    ),
    Step(
        name="teacher_job",
        limit_s=60,
        about="a teacher's job and a student's on one device",
        function=runs.teacher_job,
    ),
    Step(
        name="bfloat16",
        limit_s=25,
        about="error of the loss in bf16 against float64",
        function=checks.bfloat16_loss,
    ),
    Step(name="attention", limit_s=20, about="ms of each kind of mask", function=tables.attention),
    Step(
        name="layers",
        limit_s=25,
        about="TransformerEngine's or Megatron's layers against ours",
        function=checks.stock_layers,
    ),
    Step(
        name="two_ranks",
        limit_s=40,
        about="the loss on two ranks against one",
        function=checks.loss_on_two_ranks,
    ),
    Step(
        name="two_gpus",
        limit_s=40,
        about="training on two GPUs against one",
        function=checks.training_on_two_ranks,
        gpus=2,
    ),
)
assert sum(step.limit_s for step in STEPS) <= TOTAL_S


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_smoke.sh", description=__doc__)
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"default: all of {' '.join(s.name for s in STEPS)}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_smoke"), metavar="DIR", help="default: gpu_smoke"
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = set(options.steps) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no step {min(unknown)!r}; there are {' '.join(step.name for step in STEPS)}")
    device = smoke_device()
    if device is None:
        print("no CUDA device; SIMCT_GPU_SMOKE_DEVICE=cpu runs the same code small on CPU", file=sys.stderr)
        return 2
    steps = [step for step in STEPS if not options.steps or step.name in options.steps]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.in_this_process:
        (step,) = steps
        write(options.out, step, run(step, device))
        return 0
    print("| step | s | what | measured | at most | |\n|---|---|---|---|---|---|", flush=True)
    failed = [step.name for step in steps if not shown(in_time(step, device, options.out))]
    print(f"\nfailed: {', '.join(failed) or 'none'}; a JSON a step in {options.out}", flush=True)
    return int(bool(failed))


def run(step: Step, device: torch.device) -> dict:
    """The step's result: its lines, or the reason why there are none."""
    begin = time.monotonic()
    try:
        return {
            "lines": [asdict(line) | {"passed": line.passed} for line in step.function(device)],
            **took(begin),
        }
    except Exception as error:
        traceback.print_exc()
        return {"problem": f"raised {type(error).__name__}: {error}"[:300], **took(begin)}


def took(begin: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - begin, 1)}


def in_time(step: Step, device: torch.device, out: Path) -> dict:
    """The result of the step in a separate process, which is killed at the step's limit."""
    found = torch.cuda.device_count() if device.type == "cuda" else step.gpus
    if found < step.gpus:
        return write(out, step, {"skipped": f"needs {step.gpus} GPUs, found {found}"})
    path = out / f"{step.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.smoke", step.name, "--out", str(out), "--in-this-process"]
    limit_s = step.limit_s if device.type == "cuda" else 10 * step.limit_s  # compilers, and a busy machine
    with open(out / f"{step.name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that it has started
        except ProcessLookupError:
            pass
        process.wait()
    if path.exists():
        return json.loads(path.read_text())
    problem = f"not done in {limit_s} s" if code is None else f"ended with code {code}"
    return write(out, step, {"problem": f"{problem}; see {step.name}.log"})


def write(out: Path, step: Step, result: dict) -> dict:
    result = {"step": step.name, "about": step.about, "limit_s": step.limit_s} | result
    (out / f"{step.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def shown(result: dict) -> bool:
    """Print the step's rows; returns whether nothing failed."""
    head = f"| {result['step']} | {result.get('seconds', '')} |"
    if "skipped" in result:
        print(f"{head} {result['about']} | - | - | skipped: {result['skipped']} |", flush=True)
        return True
    if "problem" in result:
        print(f"{head} {result['about']} | - | - | **{result['problem']}** |", flush=True)
        return False
    for line in result["lines"]:
        value = line["note"] or f"{line['value']:.4g} {line['unit']}".strip()
        limit = "" if line["limit"] is None else f"{line['limit']:.2g}"
        verdict = "" if line["limit"] is None else "ok" if line["passed"] else "**failed**"
        print(f"{head} {line['check']} | {value} | {limit} | {verdict} |", flush=True)
        head = "| | |"
    return all(line["passed"] for line in result["lines"])


if __name__ == "__main__":
    sys.exit(main())
