"""Says before a run is started, or queued, whether it can work: the pair of models, the layouts, the memory.

    python tools/check_pair.py run.yaml
    python tools/check_pair.py run.yaml student.micro_batch_size=2 --device-memory 80 --json

The file is that of `python -m megatron_simct.launch`. Nothing runs a model; it takes seconds, for large
vocabularies up to a minute, on any CPU. Exit code 1 where a check fails, and each failure names the flag to
change.

Among the findings is the bias of the pair: the loss that a student has who is already right. It is measured
under the run's interface on exact models of the prompts' words, in both tokenizers' own cuts.
"""

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
        "checking; what the interface says to a student that is already right comes last"
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
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run, as for megatron_simct.launch")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="override values of the file"
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="memory of one GPU, against which the plan is held (cluster.device_memory_gib)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser
