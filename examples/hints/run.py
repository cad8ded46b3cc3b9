"""Self-distillation with hints: a model that reads the worked solution teaches itself to answer without it.

Three commands on the quick start's task:

    1. warm-up    sft, stopped while most answers are still wrong; half of the prompts end with the worked
                  solution
    2. evaluate   the warmed-up model on held-out problems whose prompts have the solution: this is the
                  teacher
    3. distil     the student samples without the solution; the teacher is the warmed-up model itself, and
                  scores the same responses after `teacher_prompt`, which has the solution

A stage is not run again if its command and inputs have not changed since it finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from examples.quickstart.run import ARCHITECTURE, INITIALIZER_RANGE, ROOT, WARM_ACCURACY, accuracy, measured
from examples.quickstart.task import write_task
from examples.quickstart.tokenizer_files import sides
from examples.stages import Stage, console
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

HINTED_SHARE = 0.5


def hinted(row: dict[str, str]) -> str:
    """The prompt, followed by the worked solution."""
    a, b = (int(word) for word in row["prompt"].split() if word.isdigit())
    return f"{row['prompt']} Solution: {a} + {b} = {a + b}."


def write_prompts(folder: Path) -> None:
    """warm_up.jsonl, hinted.jsonl (held out) and distil.jsonl, beside the files of the task."""
    write_task(folder)
    rows, held_out = (read(folder / name) for name in ("train.jsonl", "held_out.jsonl"))
    first_without = round(HINTED_SHARE * len(rows))
    with_hints = [row | {"prompt": hinted(row)} for row in rows[:first_without]]
    write(folder / "warm_up.jsonl", with_hints + rows[first_without:])
    write(folder / "hinted.jsonl", [row | {"prompt": hinted(row)} for row in held_out])
    write(folder / "distil.jsonl", [{"prompt": row["prompt"], "teacher_prompt": hinted(row)} for row in rows])


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stages(options: argparse.Namespace, folder: Path) -> tuple[Stage, Stage, Stage]:
    """Warm-up, evaluation and distillation, with every flag that differs from the defaults."""
    write_prompts(folder)
    _, side = sides("digits-agree", "teacher-groups", folder / "tokenizers")
    architecture = folder / "architecture"
    architecture.mkdir(exist_ok=True)
    fields = ARCHITECTURE | {"vocab_size": side.vocab_size, "initializer_range": INITIALIZER_RANGE["student"]}
    (architecture / "config.json").write_text(json.dumps(fields, indent=1))

    def model(prefix: str = "") -> list[str]:
        return [f"--{prefix}hf-checkpoint", str(architecture), f"--{prefix}tokenizer-model", side.tokenizer]

    def stage(name: str, data: str, flags: list[str], needs: tuple[Stage, ...] = ()) -> Stage:
        """A run of megatron_simct.train on two data-parallel ranks."""
        output = folder / name
        checkpoint = str(output / "checkpoint")
        inputs = (folder / data, folder / "held_out.jsonl")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_simct.train", "--run-dir", str(output), *model()),
            *("--save", checkpoint, "--load", checkpoint, "--save-interval", "50", "--save-retain", "1"),
            *("--prompt-data", str(inputs[0]), "--eval-prompt-data", str(inputs[1])),
            *("--rollout-max-prompt-len", "64", "--rollout-max-response-len", "16", "--log-interval", "20"),
            *("--seed", str(options.seed), "--min-lr", "0", "--lr-decay-style", "constant", *flags),
            *(("--train-iters", "2") if options.smoke else ()),
        ]
        return Stage(
            name=name, command=tuple(command), output=output, needs=needs, inputs=inputs, resumes=True
        )

    warm_up = stage(
        *("warm-up", "warm_up.jsonl"),
        [
            *(
                "--simct-interface",
                "sft",
                "--lr",
                "2e-3",
                "--lr-warmup-fraction",
                "0.03",
                "--train-iters",
                "800",
            ),
            *("--rollout-batch-size", "32", "--micro-batch-size", "16"),
            *("--eval-interval", "20", "--eval-samples", "0", "--exit-eval-accuracy", str(WARM_ACCURACY)),
        ],
    )
    start = str(warm_up.output / "checkpoint")
    data, evaluation = folder / "hinted.jsonl", folder / "evaluation"
    evaluate = Stage(
        name="evaluate",
        command=(
            *(
                sys.executable,
                str(ROOT / "tools" / "evaluate.py"),
                "--benchmark",
                "exact_match",
                "--data",
                str(data),
            ),
            *(
                *model(),
                "--pretrained-checkpoint",
                start,
                "--output-dir",
                str(evaluation),
                "--max-response-len",
                "16",
            ),
        ),
        output=evaluation,
        needs=(warm_up,),
        inputs=(data,),
        resumes=True,
    )
    distil = stage(
        *("distil", "distil.jsonl"),
        [
            *("--pretrained-checkpoint", start, *model("teacher-"), "--teacher-pretrained-checkpoint", start),
            *(
                "--simct-interface",
                options.interface,
                "--lr",
                str(options.lr),
                "--train-iters",
                str(options.train_iters),
            ),
            *("--rollout-batch-size", "64", "--micro-batch-size", "32", "--eval-interval", "20"),
        ],
        needs=(warm_up,),
    )
    return warm_up, evaluate, distil


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/hints/run.sh",
        description="A model that reads the worked solution teaches itself to answer without it, on two CPU "
        "cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--interface",
        choices=("kd", "bytes", "paper"),
        default="kd",
        help="how the distributions of the two models are compared",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights, order of the problems and sampling"
    )
    parser.add_argument("--train-iters", type=int, default=100, help="on-policy steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the on-policy steps")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="two steps of each run, as a test that it runs; nothing is learned",
    )
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "hints", help="folder for all output")
    return parser.parse_args(argv)


@command("examples/hints/run.sh", also=(subprocess.CalledProcessError,))
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    warm_up, evaluate, distil = stages(options, folder)
    for stage in (warm_up, evaluate, distil):
        stage.run(ROOT)
    summary = {
        "with_solution": measured(evaluate),
        "before": accuracy(distil, "greedy", first=True),
        "after": accuracy(distil, "greedy"),
        "interface": options.interface,
        "seed": options.seed,
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = Table("", "greedy", title=f"Held-out accuracy, exact match (interface {options.interface})")
    table.add_row("teacher, which reads the solution", f"{summary['with_solution']:.3f}")
    table.add_row("student before", f"{summary['before']:.3f}")
    table.add_row("student after", f"{summary['after']:.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
