"""Real weights: distil Gemma-3-270M into SmolLM2-135M-Instruct, which has another tokenizer; or
the other way round.

Every stage is an ordinary command that a person could type, and is printed before it runs:

    1. folders    both GGUF files, fetched and checked, become Hugging Face folders
    2. map        the tokens that both vocabularies have (tools/build_alignment_map.py)
    3. distil     on policy, on problems of HumanEval and CHAMP (megatron_simct.train)
    4. export     the student as a Hugging Face folder (tools/convert_checkpoint.py)
    5. measure    transformers on held-out solutions: teacher, student before and after; the trainer on the
                  same texts

A finished stage is not run again. An interrupted distillation continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.real_weights.models import MODELS, gguf_file
from examples.real_weights.texts import write_texts
from examples.stages import Stage, console
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole
from tools.benchmark.real_inputs import Unavailable

ROOT = Path(__file__).resolve().parents[2]

AGREE = 1e-4
"""Relative difference between the exported student's loss in transformers and in the trainer."""
VERIFY_TEXT = "def area(radius):\n    return 3.14159 * radius ** 2\n"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages of one direction, in order."""

    teacher: Stage
    student: Stage
    map: Stage
    distil: Stage
    export: Stage
    trainer: Stage
    """The trainer's loss of the distilled student on the held-out texts."""
    measured: dict[str, Stage]
    """teacher, before, after"""

    @property
    def stages(self) -> list[Stage]:
        return [
            self.teacher,
            self.student,
            self.map,
            self.distil,
            self.export,
            *self.measured.values(),
            self.trainer,
        ]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of the distillation's steps."""
        return _steps(self.distil.output / "metrics.jsonl")


def recipe(options: argparse.Namespace, *, work: Path | None = None) -> Recipe:
    """The commands, with every flag that differs from the defaults. The texts exist already.

    work: the folder of the distillation and of the later stages; default: that of the alignment map.
    """
    teacher_name, student_name = ("smollm2", "gemma3") if options.reverse else ("gemma3", "smollm2")
    folder = options.run_dir / f"{teacher_name}-to-{student_name}"
    work = work or folder
    texts = options.run_dir / "texts"
    prompts, held_out = texts / "prompts.jsonl", texts / "held_out.jsonl"
    python, torchrun = (sys.executable,), (sys.executable, "-m", "torch.distributed.run", "--standalone")
    train = (*torchrun, "--nproc-per-node", str(options.processes), "-m", "megatron_simct.train")
    threads = max(1, 2 // options.processes)

    def hf_folder(name: str) -> Stage:
        save = options.run_dir / name
        command = (
            *python,
            "examples/real_weights/hf_folders.py",
            name,
            "--cache",
            str(options.run_dir / "gguf"),
        )
        return Stage(
            name=f"folder of {MODELS[name].name}", command=(*command, "--save", str(save)), output=save
        )

    teacher, student = hf_folder(teacher_name), hf_folder(student_name)
    alignment_map = Stage(
        name="alignment map",
        command=(
            *(*python, "tools/build_alignment_map.py", "--teacher-tokenizer", str(teacher.output)),
            *("--student-tokenizer", str(student.output), "--output", str(folder / "map")),
            *("--corpus", str(held_out), "--corpus-key", "response"),
        ),
        output=folder / "map",
        needs=(teacher, student),
        inputs=(held_out,),
    )
    checkpoint = work / "distil" / "checkpoint"
    distil = Stage(
        name="distil",
        command=(
            *(*train, "--hf-checkpoint", str(student.output), "--teacher-hf-checkpoint", str(teacher.output)),
            *("--simct-alignment-map", str(alignment_map.output), "--prompt-data", str(prompts)),
            *(
                "--rollout-batch-size",
                str(options.batch_size),
                "--micro-batch-size",
                str(_micro(options.batch_size, options)),
            ),
            *("--rollout-max-prompt-len", "160", "--rollout-max-response-len", str(options.response_len)),
            *("--simct-interface", options.interface),
            *(() if options.interface in ("alm", "uld") else ("--simct-divergence", options.divergence)),
            *("--train-iters", str(options.train_iters), "--lr", str(options.lr), "--min-lr", "0"),
            *("--seed", str(options.seed)),
            *(
                "--save",
                str(checkpoint),
                "--load",
                str(checkpoint),
                "--save-interval",
                "5",
                "--save-retain",
                "1",
            ),
            *("--run-dir", str(work / "distil")),
        ),
        output=work / "distil",
        needs=(teacher, student, alignment_map),
        inputs=(prompts,),
        resumes=True,
        threads=threads,
    )
    export = Stage(
        name="export",
        command=(
            *(*python, "tools/convert_checkpoint.py", "megatron-to-hf", "--load", str(checkpoint)),
            *("--hf-checkpoint", str(student.output), "--save", str(work / "export")),
            *("--verify", "--verify-text", VERIFY_TEXT),
        ),
        output=work / "export",
        needs=(distil,),
    )
    num_rows = len(held_out.read_text().splitlines())
    trainer = Stage(
        name="the trainer's loss on held-out text",
        command=(
            *(*train, "--simct-interface", "sft", "--hf-checkpoint", str(student.output)),
            *("--pretrained-checkpoint", str(checkpoint), "--prompt-data", str(held_out)),
            *("--rollout-batch-size", str(num_rows), "--micro-batch-size", str(_micro(num_rows, options))),
            *("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--run-dir", str(work / "trainer")),
        ),
        output=work / "trainer",
        needs=(distil,),
        inputs=(held_out,),
        threads=threads,
    )

    def measure(what: str, of: Stage, output: Path, num_continued: int) -> Stage:
        command = (*python, "examples/real_weights/measure.py", str(of.output), "--held-out", str(held_out))
        return Stage(
            name=f"transformers on the {what}",
            command=(*command, "--output", str(output), "--continue", str(num_continued)),
            output=output,
            needs=(of,),
            inputs=(held_out,),
        )

    # Measurements of a model as published serve both directions.
    measured = {
        "teacher": measure(MODELS[teacher_name].name, teacher, options.run_dir / f"{teacher_name}.json", 0),
        "before": measure(MODELS[student_name].name, student, options.run_dir / f"{student_name}.json", 0),
        "after": measure("exported student", export, work / "export.json", 2),
    }
    return Recipe(
        teacher=teacher,
        student=student,
        map=alignment_map,
        distil=distil,
        export=export,
        trainer=trainer,
        measured=measured,
    )


def _micro(batch_size: int, options: argparse.Namespace) -> int:
    """At most 4 sequences at a time: memory."""
    return math.gcd(batch_size // options.processes, 4)


def _steps(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def summarize(plan: Recipe, seconds: dict[str, float]) -> dict[str, Any]:
    """The figures of the run.

    Raises SystemExit if transformers and the trainer disagree about the exported student.
    """
    measured = {name: json.loads(stage.output.read_text()) for name, stage in plan.measured.items()}
    teacher, before, after = (measured[name]["nats_per_byte"] for name in ("teacher", "before", "after"))
    in_training = _steps(plan.trainer.output / "metrics.jsonl")[-1]["loss"]
    exported = measured["after"]["loss"]
    if not abs(exported - in_training) <= AGREE * in_training:
        raise SystemExit(
            f"the exported student's loss on held-out text is {exported:.6f} in transformers and "
            f"{in_training:.6f} in the trainer (allowed: {AGREE:.0e} relative); {plan.export.output} is not "
            "what was trained"
        )
    steps = plan.metrics
    return {
        "num_shared": json.loads((plan.map.output / "map.json").read_text())["num_shared"],
        "teacher_nats_per_byte": teacher,
        "student_nats_per_byte_before": before,
        "student_nats_per_byte_after": after,
        "gap_before": abs(before - teacher),
        "gap_after": abs(after - teacher),
        "exported_loss": exported,
        "in_training_loss": in_training,
        "train_iters": len(steps),
        "distillation_loss_first": steps[0]["loss"],
        "distillation_loss_last": steps[-1]["loss"],
        "continuations": measured["after"]["texts"],
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
    }


def report(summary: dict[str, Any], path: Path) -> None:
    table = Table(title=f"Held-out solutions, nats a byte; {summary['num_shared']:,} shared tokens")
    for column in ("", "nats a byte", "from the teacher's"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("teacher", f"{summary['teacher_nats_per_byte']:.4f}", "")
    for when in ("before", "after"):
        nats, gap = summary[f"student_nats_per_byte_{when}"], summary[f"gap_{when}"]
        table.add_row(f"student {when}", f"{nats:.4f}", f"{gap:.4f}")
    console.print(table)
    console.print(
        f"loss of the student on them: {summary['in_training_loss']:.6f} in the trainer, "
        f"{summary['exported_loss']:.6f} exported, in transformers"
    )
    for text in summary["continuations"]:
        console.rule("the exported student goes on")
        console.print(text["prompt"].rstrip(), style="dim", markup=False)
        console.print(text["continuation"].strip("\n"), markup=False)
    console.rule()
    console.print(f"written to {path}", soft_wrap=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/real_weights/run.sh",
        description="Distil one small pretrained model into another with another tokenizer, on two CPU "
        "cores: from GGUF files to a Hugging Face folder that transformers continues texts with. Gemma is "
        "under Google's terms of use, https://ai.google.dev/gemma/terms.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--reverse", action="store_true", help="SmolLM2-135M teaches Gemma-3-270M")
    parser.add_argument(
        "--gsm8k", type=Path, metavar="FILE", help="JSONL file with question and answer: more problems"
    )
    parser.add_argument("--train-iters", type=int, default=12, help="on-policy steps")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a step; even")
    parser.add_argument("--response-len", type=int, default=64, help="tokens a response")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument(
        "--interface",
        choices=("paper", "sum", "exact", "strict", "strict_topk", "uld", "alm", "bytes"),
        default="paper",
        help="how the distributions of the two models are compared",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the order of the problems and of sampling"
    )
    parser.add_argument(
        "--divergence",
        choices=("forward_kl", "reverse_kl", "js"),
        default="forward_kl",
        help="reverse_kl makes samples likelier under the teacher, forward_kl also other texts under the "
        "student",
    )
    parser.add_argument("--held-out", type=int, default=10, help="held-out problems of each source; even")
    parser.add_argument(
        "--processes", type=int, default=2, choices=(1, 2), help="data-parallel ranks; 1 needs less memory"
    )
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "real_weights", help="folder for all output"
    )
    options = parser.parse_args(argv)
    for flag, value in (("--batch-size", options.batch_size), ("--held-out", options.held_out)):
        if value < 2 or value % 2:
            parser.error(f"{flag} {value}: must be even, and at least 2")
    for flag, value in (("--train-iters", options.train_iters), ("--response-len", options.response_len)):
        if value < 1:  # the trainer would report it after the downloads
            parser.error(f"{flag} {value}: must be at least 1")
    if not options.lr > 0:
        parser.error(f"--lr {options.lr}: must be above 0")
    options.run_dir = options.run_dir.resolve()
    return options


@command("examples/real_weights/run.sh", also=(Unavailable,))
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    begin = time.time()
    for model in MODELS.values():
        console.print(f"[bold]{model.name}[/bold] ({model.license})", soft_wrap=True)
        console.print(f" {gguf_file(model, options.run_dir / 'gguf')}", soft_wrap=True)
    write_texts(options.run_dir / "texts", options.gsm8k, num_held_out=options.held_out)
    fetched = time.time()
    plan = recipe(options)
    seconds = {stage.name: stage.run(ROOT) for stage in plan.stages}
    summary = summarize(plan, seconds) | {"seconds_after_downloads": round(time.time() - fetched, 1)}
    path = plan.distil.output.parent / "summary.json"
    write_whole(path, json.dumps(summary, indent=1) + "\n")
    report(summary, path)
    console.print(
        f"{time.time() - begin:.0f} seconds, {fetched - begin:.0f} of them for downloads and checks"
    )


if __name__ == "__main__":
    sys.exit(main())
