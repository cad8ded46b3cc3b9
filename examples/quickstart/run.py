"""Quick start: teach a teacher, warm up a student with another tokenizer, distil on policy, report.

Three ordinary runs of megatron_simct.train, one after another, each of which a person could type:

    1. teacher    sft on the task's answers until it solves held-out problems
    2. warm-up    sft of the student, stopped early, while most of its answers are still wrong
    3. distil     the student samples, the teacher scores, the chosen interface compares

A stage whose command and inputs have not changed since it finished is not run again, so a second interface starts from the very
same teacher and student.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from task import write_task
from tokenizer_files import Side, sides

ROOT = Path(__file__).resolve().parents[2]
console = Console(highlight=False)

# Small enough for two CPU cores, large enough to add.
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
# Larger random weights learn sooner, smaller ones generalise better in the end.
INITIALIZER_RANGE = {"teacher": 0.02, "student": 0.05}
FINISHED = "finished.json"
TEACHER_ACCURACY = 0.95
WARM_ACCURACY = 0.25


@dataclass(frozen=True)
class Stage:
    """One run of megatron_simct.train."""

    name: str
    folder: Path
    flags: list[str]
    processes: int

    @property
    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)),
            *("-m", "megatron_simct.train", "--run-dir", str(self.folder), *self.flags),
        ]

    def fingerprint(self) -> str:
        """Of the command, the files that it reads, and the stages whose checkpoints it starts from."""
        digest = hashlib.sha256(json.dumps(self.command).encode())
        for path in map(Path, self.flags):
            for file in (path, path / "config.json", path.parent / FINISHED):
                if file.is_file() and path != self.folder / "checkpoint":
                    digest.update(file.read_bytes())
        return digest.hexdigest()

    def run(self) -> float:
        """Seconds it took, 0 where its result is already there."""
        record = self.folder / FINISHED
        fingerprint = self.fingerprint()
        if record.exists() and json.loads(record.read_text())["fingerprint"] == fingerprint:
            console.print(f"[bold]{self.name}[/bold]: already there in {self.folder}")
            return 0.0
        record.unlink(missing_ok=True)
        console.print(f"[bold]{self.name}[/bold]: {shlex.join(self.command)}", soft_wrap=True)
        begin = time.time()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        status = subprocess.run(self.command, env=environment).returncode
        if status != 0:
            raise SystemExit(f"{self.name} failed with exit code {status}; its output is above")
        seconds = time.time() - begin
        record.write_text(json.dumps({"fingerprint": fingerprint, "seconds": seconds}))
        return seconds

    def accuracy(self, which: str, *, first: bool = False) -> float:
        """The first or last evaluation of the run."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        return evaluations[0 if first else -1][f"{which}_accuracy"]


def stages(options: argparse.Namespace, folder: Path) -> tuple[Stage, Stage, Stage]:
    """The three runs, with every flag that differs from the defaults."""
    teacher, student = sides(options.pair, options.direction, folder / "tokenizers")
    write_task(folder)
    for side, name in ((teacher, "teacher"), (student, "student")):
        path = folder / f"{name}-architecture"
        path.mkdir(exist_ok=True)
        fields = ARCHITECTURE | {"vocab_size": side.vocab_size, "initializer_range": INITIALIZER_RANGE[name]}
        (path / "config.json").write_text(json.dumps(fields, indent=1))
    processes = options.processes
    common = [
        *("--prompt-data", str(folder / "train.jsonl"), "--eval-prompt-data", str(folder / "held_out.jsonl")),
        *("--rollout-max-response-len", "16", "--seed", str(options.seed), "--log-interval", "20", "--min-lr", "0"),
    ]
    sft = ["--simct-interface", "sft", "--rollout-batch-size", "32", "--micro-batch-size", str(32 // processes)]
    student_flags = _model("", student, folder / "student-architecture")
    teach = Stage(
        name="1/3 teacher",
        folder=folder / "teacher",
        flags=[
            *_model("", teacher, folder / "teacher-architecture"),
            *common,
            *sft,
            *(
                "--train-iters",
                "2" if options.smoke else "800",
                "--lr",
                "2e-3",
                "--lr-decay-style",
                "linear",
                "--lr-warmup-fraction",
                "0.03",
            ),
            *("--eval-interval", "50", "--eval-samples", "0", "--exit-eval-accuracy", str(TEACHER_ACCURACY)),
            *("--save", str(folder / "teacher" / "checkpoint")),
        ],
        processes=processes,
    )
    warm = Stage(
        name="2/3 warm-up",
        folder=folder / "warm-up",
        flags=[
            *student_flags,
            *common,
            *sft,
            *(
                "--train-iters",
                "2" if options.smoke else "400",
                "--lr",
                "2e-3",
                "--lr-decay-style",
                "constant",
                "--lr-warmup-fraction",
                "0.03",
            ),
            *("--eval-interval", "20", "--eval-samples", "0", "--exit-eval-accuracy", str(WARM_ACCURACY)),
            *("--save", str(folder / "warm-up" / "checkpoint")),
        ],
        processes=processes,
    )
    distil = Stage(
        name=f"3/3 distil with {options.interface}",
        folder=folder / f"distil-{options.interface}",
        flags=[
            *student_flags,
            *("--pretrained-checkpoint", str(folder / "warm-up" / "checkpoint")),
            *_model("teacher-", teacher, folder / "teacher-architecture"),
            *("--teacher-pretrained-checkpoint", str(folder / "teacher" / "checkpoint")),
            *common,
            *("--simct-interface", options.interface, "--rollout-batch-size", "64"),
            *("--micro-batch-size", str(64 // processes), "--rollout-temperature", "1.0"),
            *(
                "--train-iters",
                "2" if options.smoke else str(options.train_iters),
                "--lr",
                "3e-4",
                "--lr-decay-style",
                "constant",
            ),
            *("--eval-interval", "20", "--save", str(folder / f"distil-{options.interface}" / "checkpoint")),
        ],
        processes=processes,
    )
    return teach, warm, distil


def _model(prefix: str, side: Side, architecture: Path) -> list[str]:
    return [f"--{prefix}hf-checkpoint", str(architecture), f"--{prefix}tokenizer-model", side.tokenizer]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/quickstart/run.sh",
        description="Distil a teacher into a student with another tokenizer, from nothing, on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--interface", choices=("paper", "strict"), default="paper", help="how distributions compare")
    parser.add_argument(
        "--pair",
        choices=("digits-agree", "digits-disagree"),
        default="digits-agree",
        help="digits-agree: both tokenizers spell numbers digit by digit; digits-disagree: one groups digits",
    )
    parser.add_argument(
        "--direction",
        choices=("teacher-groups", "student-groups"),
        default="teacher-groups",
        help="which side groups digits under --pair digits-disagree",
    )
    parser.add_argument("--seed", type=int, default=1, help="weights, order of the problems, sampling")
    parser.add_argument("--train-iters", type=int, default=100, help="on-policy steps")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of each stage: that it runs, not that it learns"
    )
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4), help="data-parallel ranks")
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "quickstart", help="where everything is written"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    begin = time.time()
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    teach, warm, distil = stages(options, folder)
    seconds = {stage.name: stage.run() for stage in (teach, warm, distil)}
    summary = {
        "teacher_accuracy": teach.accuracy("greedy"),
        "student_accuracy_before": distil.accuracy("greedy", first=True),
        "student_accuracy_after": distil.accuracy("greedy"),
        "student_sampled_before": distil.accuracy("sampled", first=True),
        "student_sampled_after": distil.accuracy("sampled"),
        "interface": options.interface,
        "pair": options.pair if options.pair == "digits-agree" else f"{options.pair}, {options.direction}",
        "seed": options.seed,
        "seconds": round(time.time() - begin, 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report(summary, folder)


def report(summary: dict, folder: Path) -> None:
    table = Table(title=f"Held-out accuracy, exact match ({summary['pair']}, interface {summary['interface']})")
    for column in ("", "greedy", "sampled"):
        table.add_column(column)
    table.add_row("teacher", f"{summary['teacher_accuracy']:.3f}", "")
    table.add_row(
        "student before", f"{summary['student_accuracy_before']:.3f}", f"{summary['student_sampled_before']:.3f}"
    )
    table.add_row(
        "student after", f"{summary['student_accuracy_after']:.3f}", f"{summary['student_sampled_after']:.3f}"
    )
    console.print(table)
    console.print(f"{summary['seconds']:.0f} seconds; written to {folder / 'summary.json'}", soft_wrap=True)


if __name__ == "__main__":
    main()
