"""Checks before a run is started or queued whether it can work: the pair of models, the layouts, the memory.

    python tools/check_pair.py run.yaml
    python tools/check_pair.py run.yaml student.micro_batch_size=2 --device-memory 80 --json

The file is that of `python -m megatron_simct.launch`. No model runs; the checks take seconds on any
CPU, with large vocabularies up to a minute. The exit code is 1 if a check fails, and each failure names
the flag to change.

One check measures the bias of the pair: the loss of a student that is already right, under the run's
interface. Both models are exact models of the words in the prompts, each with its own tokenizer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_simct.config.command_line import Parser, command
from megatron_simct.config.run_file import read_run_file


@command("check_pair")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    if options.device_memory is not None and not options.device_memory > 0:
        raise ValueError(f"--device-memory {options.device_memory}: must be above 0")
    run = read_run_file(options.run_file, options.overrides)
    from megatron_simct.preflight.check import check_run
    from megatron_simct.preflight.table import console, show

    with console(stderr=True).status(
        "checking; the loss of a student that is already right is measured last"
    ):
        report = check_run(run, device_memory_gib=options.device_memory, bias=True)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show(report, console())
    return int(report.failed)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="check_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", metavar="RUN.yaml", help="run file, as for megatron_simct.launch")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="values that replace those of the file",
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="memory of one GPU, with which the memory plan is compared (default: cluster.device_memory_gib)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser
