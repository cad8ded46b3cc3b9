"""Says before a run is started, or queued, whether it can work: the pair of models, the layouts, the memory.

    python tools/check_pair.py run.yaml
    python tools/check_pair.py run.yaml student.micro_batch_size=2 --device-memory 80 --json

The file is that of `python -m megatron_simct.launch`. Nothing runs a model; it takes seconds, on any CPU. Exit code 1
where a check fails, and each failure names the flag to change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_simct.command_line import Parser, command  # isort: skip  (before what takes seconds to load)
from megatron_simct.launch.run_file import read_run_file


@command("check_pair")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    if options.device_memory is not None and not options.device_memory > 0:
        raise ValueError(f"--device-memory {options.device_memory}: must be above 0")
    run = read_run_file(options.run_file, options.overrides)
    from megatron_simct.preflight.check import check_run
    from megatron_simct.preflight.table import console, show

    report = check_run(run, device_memory_gib=options.device_memory)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show(report, console())
    return int(report.failed)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="check_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run, as for megatron_simct.launch")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="go before what the file says"
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="memory of one GPU, against which the plan is held (cluster.device_memory_gib)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
