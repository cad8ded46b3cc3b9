"""Quick start: train a teacher, warm up a student with another tokenizer, distil on policy, report.

Three ordinary runs of megatron_simct.train, one after another, each of which a person could type:

    1. teacher    sft on the task's answers until it solves held-out problems
    2. warm-up    sft of the student, stopped early, while most of its answers are still wrong
    3. distil     the student samples, the teacher scores, the chosen interface compares

With --warm-up teacher the student is warmed up on the teacher's answers. Then two stages come before the
warm-up, and one at the end (tools/evaluate.py, tools/select_responses.py):

    2a. sample    the teacher answers the training problems, and its answers are checked
    2b. select    the shortest of the right answers to each problem
    4. evaluate   the distilled student on held-out problems, with intervals

A stage is not run again if its command and inputs have not changed since it finished, so a second interface
starts from the same teacher and student. An interrupted stage continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.quickstart.task import write_task
from examples.quickstart.tokenizer_files import Side, sides
from examples.stages import Stage, console
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

ROOT = Path(__file__).resolve().parents[2]

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
# Larger random weights learn sooner; smaller ones generalise better in the end. If numbers are tokens, a
# model with larger weights does not find sums of unseen numbers at all, even by supervised training.
INITIALIZER_RANGE = {"teacher": 0.02, "student": 0.05}
INITIALIZER_RANGE_OF_GROUPED_DIGITS = 0.02
TEACHER_ACCURACY = 0.95
WARM_ACCURACY = 0.25


class Recipe:
    """The stages of one pair of tokenizers, with every flag that differs from the defaults."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        *,
        architecture: Mapping[str, object] = ARCHITECTURE,
        problems: tuple[Path, Path] | None = None,
        teacher_iters: int = 800,
    ) -> None:
        """`problems`: the files of training and of held-out problems, if not the task's. `teacher_iters`:
        most steps of a teacher's training.
        """
        self._teacher_iters = teacher_iters
        self._options = options
        self._folder = folder
        teacher, student = sides(options.pair, options.direction, folder / "tokenizers")
        self._sides = {"teacher": teacher, "student": student}
        if problems is None:
            write_task(folder)
            problems = folder / "train.jsonl", folder / "held_out.jsonl"
        self._data, self._held_out = problems
        for name, side in self._sides.items():
            self._write_architecture(name, side, INITIALIZER_RANGE[name], architecture)
        self.teacher = self._teacher("teacher")
        self.sample = self._sample()
        self.select = self._select()
        from_teacher = options.warm_up == "teacher"
        self.student = self._sft(
            *("warm-up of the student", "student", self.select.output if from_teacher else self._data),
            *("--train-iters", "800", "--lr-decay-style", "constant"),
            *("--eval-interval", "20", "--exit-eval-accuracy", str(WARM_ACCURACY)),
            needs=(self.select,) if from_teacher else (),
        )

    @property
    def warm_start(self) -> list[Stage]:
        """All stages before distillation, in order."""
        stages = [*self.teacher.needs, self.teacher]
        if self._options.warm_up == "teacher":
            stages += [self.sample, self.select]
        return [*stages, *(stage for stage in self.student.needs if stage not in stages), self.student]

    def _write_architecture(
        self, name: str, side: Side, spread: float, architecture: Mapping[str, object]
    ) -> None:
        """The config.json of one model."""
        path = self._folder / f"{name}-architecture"
        path.mkdir(exist_ok=True)
        spread = INITIALIZER_RANGE_OF_GROUPED_DIGITS if side.groups_digits else spread
        fields = dict(architecture) | {"vocab_size": side.vocab_size, "initializer_range": spread}
        (path / "config.json").write_text(json.dumps(fields, indent=1))

    def _teacher(self, name: str) -> Stage:
        """Supervised training until held-out problems are solved."""
        return self._sft(
            *(name, name, self._data),
            *("--train-iters", str(self._teacher_iters), "--lr-decay-style", "linear"),
            *("--eval-interval", "50", "--exit-eval-accuracy", str(TEACHER_ACCURACY)),
        )

    def distil(self, interface: str, name: str, *flags: str) -> Stage:
        """On-policy distillation from the warm start, into the folder `name`."""
        return self._distil(interface, name, self.teacher, *flags)

    def _distil(self, interface: str, name: str, teacher: Stage, *flags: str) -> Stage:
        """The same with one of the recipe's teachers."""
        models = [
            *(*self._model("student"), "--pretrained-checkpoint", self._checkpoint("student")),
            *(
                *self._model(teacher.output.name, "teacher-"),
                "--teacher-pretrained-checkpoint",
                self._checkpoint(teacher.output.name),
            ),
        ]
        flags = (
            "--simct-interface",
            interface,
            "--lr-decay-style",
            "constant",
            "--rollout-temperature",
            "1.0",
            *flags,
        )
        return self._stage(
            *(f"distil with {interface}", name, self._data, 64, [*models, *flags]),
            needs=(teacher, self.student),
        )

    def evaluate(self, distil: Stage) -> Stage:
        """Greedy answers of a distilled student to the held-out problems."""
        output = self._folder / f"{distil.output.name}-evaluation"
        model = [*self._model("student"), "--pretrained-checkpoint", str(distil.output / "checkpoint")]
        return self._answers("evaluate", output, self._held_out, model, needs=(distil,))

    def _sample(self) -> Stage:
        """The teacher's answers to the training problems, checked."""
        model = [*self._model("teacher"), "--pretrained-checkpoint", self._checkpoint("teacher")]
        sampling = ("--samples", "4", "--temperature", "0.6", "--top-p", "0.95", "--limit", "1024")
        return self._answers(
            "sample", self._folder / "responses", self._data, [*model, *sampling], needs=(self.teacher,)
        )

    def _select(self) -> Stage:
        program, output = str(ROOT / "tools" / "select_responses.py"), self._folder / "warm_up.jsonl"
        command = [sys.executable, program, "--responses", str(self.sample.output), "--data", str(self._data)]
        return Stage(
            name="select",
            command=(*command, "--min-characters", "1", "--output", str(output)),
            output=output,
            needs=(self.sample,),
        )

    def _answers(
        self, name: str, output: Path, data: Path, flags: list[str], *, needs: tuple[Stage, ...]
    ) -> Stage:
        program = [str(ROOT / "tools" / "evaluate.py"), "--benchmark", "exact_match", "--data", str(data)]
        command = [*self._python, *program, "--output-dir", str(output), "--max-response-len", "16", *flags]
        return Stage(
            name=name, command=tuple(command), output=output, needs=needs, inputs=(data,), resumes=True
        )

    def _start(self, name: str) -> tuple[Stage, ...]:
        """Initial weights for the side that groups digits; the other side starts from random ones."""
        if not self._sides[name].groups_digits:
            return ()
        output = self._folder / f"{name}-start"
        program = str(ROOT / "examples" / "quickstart" / "number_embeddings.py")
        command = (sys.executable, program, *self._model(name), "--seed", str(self._options.seed))
        return (Stage(name=f"start of the {name}", command=(*command, "--save", str(output)), output=output),)

    def _sft(self, title: str, name: str, data: Path, *flags: str, needs: tuple[Stage, ...] = ()) -> Stage:
        """Supervised training on answers, until --exit-eval-accuracy."""
        start = self._start(name)
        flags = ("--simct-interface", "sft", "--lr", "2e-3", "--lr-warmup-fraction", "0.03", *flags)
        for stage in start:
            flags += ("--pretrained-checkpoint", str(stage.output))
        return self._stage(
            *(title, name, data, 32, [*self._model(name), "--eval-samples", "0", *flags]),
            needs=(*start, *needs),
        )

    def _stage(
        self,
        title: str,
        name: str,
        data: Path,
        batch_size: int,
        flags: list[str],
        *,
        needs: tuple[Stage, ...],
    ) -> Stage:
        """A run of megatron_simct.train in the folder `name`."""
        folder = self._folder / name
        checkpoint = str(folder / "checkpoint")
        command = [
            *(*self._python, "-m", "megatron_simct.train", "--run-dir", str(folder)),
            *("--save", checkpoint, "--load", checkpoint, "--save-interval", "50", "--save-retain", "1"),
            *("--prompt-data", str(data), "--eval-prompt-data", str(self._held_out)),
            *("--rollout-max-response-len", "16", "--rollout-batch-size", str(batch_size)),
            *("--micro-batch-size", str(batch_size // self._options.processes)),
            *("--seed", str(self._options.seed), "--min-lr", "0", "--log-interval", "20"),
            *flags,
            *(("--train-iters", "2") if self._options.smoke else ()),
        ]
        inputs = tuple(
            path for path in (data, self._held_out) if path not in [stage.output for stage in needs]
        )
        return Stage(
            name=title, command=tuple(command), output=folder, needs=needs, inputs=inputs, resumes=True
        )

    @property
    def _python(self) -> tuple[str, ...]:
        """The command that runs a program, or -m and a module, on all ranks."""
        torchrun = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self._options.processes),
        )
        return (sys.executable, *(torchrun if self._options.processes > 1 else ()))

    def _checkpoint(self, name: str) -> str:
        return str(self._folder / name / "checkpoint")

    def _model(self, name: str, prefix: str = "") -> list[str]:
        architecture = str(self._folder / f"{name}-architecture")
        return [
            f"--{prefix}hf-checkpoint",
            architecture,
            f"--{prefix}tokenizer-model",
            self._sides[name].tokenizer,
        ]


def accuracy(stage: Stage, which: str, *, first: bool = False) -> float:
    """The first or last evaluation of a training run."""
    rows = [json.loads(line) for line in (stage.output / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return evaluations[0 if first else -1][f"{which}_accuracy"]


def measured(stage: Stage) -> float:
    """The share of right answers that tools/evaluate.py has found."""
    results = json.loads((stage.output / "results.json").read_text())
    return results["metrics"]["exact_match"]["pass@1"]["mean"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/quickstart/run.sh",
        description="Distil a teacher into a student with another tokenizer, from nothing, on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--interface",
        choices=("paper", "sum", "exact", "strict", "strict_topk", "uld", "alm", "bytes"),
        default="paper",
        help="how the distributions of the two models are compared",
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
    parser.add_argument(
        "--warm-up",
        choices=("answers", "teacher"),
        default="answers",
        help="data of the student's warm-up: the task's answers, or checked answers of the teacher",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights, order of the problems and sampling"
    )
    parser.add_argument("--train-iters", type=int, default=100, help="on-policy steps")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="two steps of each stage, as a test that it runs; nothing is learned",
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the on-policy steps")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4), help="data-parallel ranks")
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "quickstart", help="folder for all output"
    )
    options = parser.parse_args(argv)
    for flag, lowest in (("--train-iters", 1), ("--seed", 0)):  # the trainer would report it after minutes
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        if value < lowest:
            parser.error(f"{flag} {value}: must be at least {lowest}")
    if not options.lr > 0:
        parser.error(f"--lr {options.lr}: must be above 0")
    return options


@command("examples/quickstart/run.sh", also=(subprocess.CalledProcessError,))
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    begin = time.time()
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier run
    recipe = Recipe(options, folder)
    distil = recipe.distil(
        *(options.interface, f"distil-{options.interface}"),
        *("--train-iters", str(options.train_iters), "--lr", str(options.lr), "--eval-interval", "20"),
    )
    stages = [*recipe.warm_start, distil]
    if options.warm_up == "teacher":
        stages.append(recipe.evaluate(distil))
    seconds = {stage.name: stage.run(ROOT) for stage in stages}
    summary: dict[str, Any] = {
        "teacher_accuracy": accuracy(recipe.teacher, "greedy"),
        "student_accuracy_before": accuracy(distil, "greedy", first=True),
        "student_accuracy_after": accuracy(distil, "greedy"),
        "student_sampled_before": accuracy(distil, "sampled", first=True),
        "student_sampled_after": accuracy(distil, "sampled"),
        "interface": options.interface,
        "pair": options.pair if options.pair == "digits-agree" else f"{options.pair}, {options.direction}",
        "warm_up": options.warm_up,
        "seed": options.seed,
        "seconds": round(time.time() - begin, 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    pictures = ["--output", str(folder / "report.html"), "--png", str(folder / "curves.png")]
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plot_run.py"), str(distil.output), *pictures], check=True
    )
    report(summary, folder)


def report(summary: dict, folder: Path) -> None:
    table = Table(
        title=f"Held-out accuracy, exact match ({summary['pair']}, interface {summary['interface']})"
    )
    for column in ("", "greedy", "sampled"):
        table.add_column(column)
    table.add_row("teacher", f"{summary['teacher_accuracy']:.3f}", "")
    table.add_row(
        "student before",
        f"{summary['student_accuracy_before']:.3f}",
        f"{summary['student_sampled_before']:.3f}",
    )
    table.add_row(
        "student after", f"{summary['student_accuracy_after']:.3f}", f"{summary['student_sampled_after']:.3f}"
    )
    console.print(table)
    console.print(
        f"{summary['seconds']:.0f} seconds; written to {folder / 'summary.json'}",
        soft_wrap=True,
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
