"""Quick start: teach a teacher, warm up a student with another tokenizer, distil on policy, report.

Three ordinary runs of megatron_simct.train, one after another, each of which a person could type:

    1. teacher    sft on the task's answers until it solves held-out problems
    2. warm-up    sft of the student, stopped early, while most of its answers are still wrong
    3. distil     the student samples, the teacher scores, the chosen interface compares

A stage whose command and inputs have not changed since it finished is not run again, so a second interface starts from
the very same teacher and student.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation

from examples.quickstart.task import write_task  # noqa: E402
from examples.quickstart.tokenizer_files import Side, sides  # noqa: E402

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
# Larger random weights learn sooner, smaller ones generalise better in the end. Where numbers are tokens of their own,
# sums of unseen numbers are not found from larger ones at all, not even by supervised training.
INITIALIZER_RANGE = {"teacher": 0.02, "student": 0.05}
INITIALIZER_RANGE_OF_GROUPED_DIGITS = 0.02
FINISHED = "finished.json"
TEACHER_ACCURACY = 0.95
WARM_ACCURACY = 0.25


@dataclass(frozen=True)
class Stage:
    """One command, and the folder that it fills."""

    name: str
    folder: Path
    command: list[str]

    def run(self) -> float:
        """Seconds it took, 0 where its result is already there."""
        record = self.folder / FINISHED
        fingerprint = self._fingerprint()
        if record.exists() and json.loads(record.read_text())["fingerprint"] == fingerprint:
            console.print(f"[bold]{self.name}[/bold]: already there in {self.folder}", soft_wrap=True)
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
        """The first or last evaluation of a training run."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        return evaluations[0 if first else -1][f"{which}_accuracy"]

    def _fingerprint(self) -> str:
        """Of the command, the files that it reads, and the stages whose checkpoints it starts from."""
        digest = hashlib.sha256(json.dumps(self.command).encode())
        for path in map(Path, self.command):
            for file in (path, path / "config.json", path.parent / FINISHED):
                if file.is_file() and file.parent != self.folder and path != Path(sys.executable):
                    digest.update(file.read_bytes())
        return digest.hexdigest()


class Recipe:
    """The commands of one pair of tokenizers, with every flag that differs from the defaults."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self.teacher, self.student = sides(options.pair, options.direction, folder / "tokenizers")
        write_task(folder)
        for side, name in ((self.teacher, "teacher"), (self.student, "student")):
            path = folder / f"{name}-architecture"
            path.mkdir(exist_ok=True)
            spread = INITIALIZER_RANGE_OF_GROUPED_DIGITS if side.groups_digits else INITIALIZER_RANGE[name]
            fields = ARCHITECTURE | {"vocab_size": side.vocab_size, "initializer_range": spread}
            (path / "config.json").write_text(json.dumps(fields, indent=1))

    @property
    def warm_start(self) -> list[Stage]:
        """What comes before distillation, in order; the last two are the teacher and the student's warm-up."""
        teacher = self._sft(
            *("teacher", "teacher", self.teacher),
            *("--train-iters", "800", "--lr-decay-style", "linear"),
            *("--eval-interval", "50", "--exit-eval-accuracy", str(TEACHER_ACCURACY)),
        )
        student = self._sft(
            *("warm-up of the student", "student", self.student),
            *("--train-iters", "800", "--lr-decay-style", "constant"),
            *("--eval-interval", "20", "--exit-eval-accuracy", str(WARM_ACCURACY)),
        )
        return [*self._start("teacher", self.teacher), *self._start("student", self.student), teacher, student]

    def distil(self, interface: str, folder_name: str, *flags: str) -> Stage:
        """On-policy distillation from the warm start."""
        models = [
            *self._model("", "student", self.student),
            *("--pretrained-checkpoint", str(self._folder / "student" / "checkpoint")),
            *self._model("teacher-", "teacher", self.teacher),
            *("--teacher-pretrained-checkpoint", str(self._folder / "teacher" / "checkpoint")),
        ]
        flags = ("--simct-interface", interface, "--lr-decay-style", "constant", "--rollout-temperature", "1.0", *flags)
        return self._train(f"distil with {interface}", folder_name, "64", [*models, *flags])

    def _start(self, name: str, side: Side) -> list[Stage]:
        """Weights to start from, for the side that groups digits; the other side starts from random ones."""
        if not side.groups_digits:
            return []
        folder = self._folder / f"{name}-start"
        folder.mkdir(exist_ok=True)
        program = str(ROOT / "examples" / "quickstart" / "number_embeddings.py")
        command = [sys.executable, program, *self._model("", name, side), "--seed", str(self._options.seed)]
        return [Stage(f"start of the {name}", folder, [*command, "--save", str(folder / "checkpoint")])]

    def _sft(self, name: str, folder_name: str, side: Side, *flags: str) -> Stage:
        """Supervised training on the task's answers, until --exit-eval-accuracy."""
        flags = ("--simct-interface", "sft", "--lr", "2e-3", "--lr-warmup-fraction", "0.03", *flags)
        if side.groups_digits:
            flags += ("--pretrained-checkpoint", str(self._folder / f"{folder_name}-start" / "checkpoint"))
        return self._train(
            name, folder_name, "32", [*self._model("", folder_name, side), "--eval-samples", "0", *flags]
        )

    def _train(self, name: str, folder_name: str, batch_size: str, flags: list[str]) -> Stage:
        folder, processes = self._folder / folder_name, self._options.processes
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        command = [
            *(sys.executable, *(torchrun if processes > 1 else ())),
            *("-m", "megatron_simct.train", "--run-dir", str(folder), "--save", str(folder / "checkpoint")),
            *("--prompt-data", str(self._folder / "train.jsonl")),
            *("--eval-prompt-data", str(self._folder / "held_out.jsonl"), "--rollout-max-response-len", "16"),
            *("--rollout-batch-size", batch_size, "--micro-batch-size", str(int(batch_size) // processes)),
            *("--seed", str(self._options.seed), "--min-lr", "0", "--log-interval", "20"),
            *flags,
        ]
        return Stage(name, folder, command + ["--train-iters", "2"] * self._options.smoke)

    def _model(self, prefix: str, name: str, side: Side) -> list[str]:
        architecture = str(self._folder / f"{name}-architecture")
        return [f"--{prefix}hf-checkpoint", architecture, f"--{prefix}tokenizer-model", side.tokenizer]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/quickstart/run.sh",
        description="Distil a teacher into a student with another tokenizer, from nothing, on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--interface",
        choices=("paper", "sum", "exact", "strict", "strict_topk", "uld", "alm", "bytes"),
        default="paper",
        help="how distributions compare",
    )
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
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the on-policy steps")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4), help="data-parallel ranks")
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "quickstart", help="where everything is written"
    )
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    begin = time.time()
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier run
    recipe = Recipe(options, folder)
    warm_start = recipe.warm_start
    teach = warm_start[-2]
    distil = recipe.distil(
        *(options.interface, f"distil-{options.interface}"),
        *("--train-iters", str(options.train_iters), "--lr", str(options.lr), "--eval-interval", "20"),
    )
    seconds = {stage.name: stage.run() for stage in (*warm_start, distil)}
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
