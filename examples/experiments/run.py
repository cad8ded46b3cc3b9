"""The study: which interface is better on which pair, how certain that is, and where one harms.

    ./examples/experiments/run.sh                  all missing runs, then the report
    ./examples/experiments/run.sh --parts a,b      the quick start's pairs only
    ./examples/experiments/run.sh --parts e        three learning rates for each arm, then the best ones
    ./examples/experiments/run.sh --report-only

Every finished run has a file in results/. A run whose file has the same configuration is not run again. If
the command is stopped or killed, only the unfinished runs are run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from examples.experiments.plan import RESULTS, Run, planned_runs
from examples.experiments.processes import Workplace
from examples.experiments.real import RealWeights
from examples.experiments.report import write_report
from examples.experiments.toy import Toy
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

ROOT = Path(__file__).resolve().parents[2]

console = Console(highlight=False)


@command("examples/experiments/run.sh")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a run failed or nothing could be started. After a stop, the
    same command continues.
    """
    options = parse(argv)
    failed = 0 if options.report_only else run_missing(chosen(options), options)
    console.print(f"written to {write_report(planned_runs())}", soft_wrap=True, markup=False)
    return 1 if failed else 0


def chosen(options: argparse.Namespace) -> list[Run]:
    """The missing runs of the requested parts and names, in order.

    Raises ValueError if no run matches.
    """
    runs = [run for run in planned_runs() if run.setting.part in options.parts and options.only in run.name]
    if not runs:
        raise ValueError(
            f"--only {options.only}: no run of parts {','.join(options.parts)} has this in its name"
        )
    missing = [run for run in runs if run.result is None]
    console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are there")
    return missing


def run_missing(runs: list[Run], options: argparse.Namespace) -> int:
    """Run them, --jobs at a time. Returns the number of failures."""
    if not runs:
        return 0
    workplace = Workplace(options.run_dir.resolve())
    benches: dict[str, RealWeights | Toy] = {}
    begin, done, failed = time.monotonic(), 0, 0
    waiting = iter(runs)
    with ThreadPoolExecutor(options.jobs) as pool:
        at_work: dict[Future[dict[str, Any]], Run] = {}

        def start() -> None:
            run = next((run for run in waiting if _can_start(run)), None)
            if run is None:
                return
            folder = run.setting.warm_start
            if folder not in benches:  # makes its warm start, when its first run needs it
                benches[folder] = (RealWeights if run.setting.part == "c" else Toy)(run.setting, workplace)
            at_work[pool.submit(benches[folder].run, run)] = run

        for _ in range(options.jobs):
            start()
        while at_work:
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                run = at_work.pop(future)
                done += 1
                left = (time.monotonic() - begin) / done * (len(runs) - done)
                progress = f"{done}/{len(runs)} {run.name}"
                try:
                    found = future.result()
                except RuntimeError as error:
                    failed += 1
                    console.print(f"[bold]{progress}[/bold] failed: {escape(str(error))}", soft_wrap=True)
                else:
                    keep(run, found)
                    console.print(
                        f"{progress}: {shown(found['figures'])}, {found['seconds']:.0f} s, {left / 60:.0f} "
                        "min left"
                    )
                start()
    return failed


def _can_start(run: Run) -> bool:
    """False, and told, while runs that choose its learning rate are missing."""
    if not run.ready:
        console.print(f"{run.name} waits: runs of part e that choose its learning rate are missing")
    return run.ready


def shown(figures: dict[str, float]) -> str:
    """The change, in a few words."""
    if "greedy" in figures:
        return f"greedy {figures['greedy_before']:.3f} -> {figures['greedy']:.3f}"
    return f"nats a byte {figures['nats_before']:.4f} -> {figures['nats']:.4f}"


def keep(run: Run, found: dict[str, Any]) -> None:
    """Write the result. The file gets its name when it is complete and on disk."""
    content = {
        "fingerprint": run.fingerprint,
        "configuration": run.configuration,
        **found,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    write_whole(RESULTS / f"{run.name}.json", json.dumps(content, indent=1) + "\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/experiments/run.sh",
        description="Compare the interfaces. Results accumulate in examples/experiments/results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parts = sorted({run.setting.part for run in planned_runs()})
    parser.add_argument("--parts", default=",".join(parts), help="parts to run, separated by commas")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run only those whose name contains this, for example bytes-1",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of runs at a time, one core each"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report, from existing results"
    )
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "experiments", help="working folder of the runs"
    )
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    if not set(options.parts) <= set(parts):
        parser.error(f"--parts {','.join(options.parts)}: expected some of {','.join(parts)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
