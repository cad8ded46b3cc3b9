"""Two teachers, each for its own rows: one knows additions only, the other subtractions only.

On the quick start's names and things:

    1. teachers   sft of a teacher on additions, and of another one on subtractions
    2. evaluate   each teacher on the problems of the other one
    3. warm-up    sft of the student on both, stopped while most of its answers are still wrong
    4. distil     the student samples, and each row's teacher scores: `teacher` in the row, --teachers; with
                  --own-weight below 1 the other teacher is mixed in: `teachers`

Both teachers have another tokenizer than the student; with --kd one of them has the student's, and its rows
are compared by an interface of its own: `simct_interface` in its entry. A stage whose command and inputs have
not changed since it finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.quickstart.run import (
    ARCHITECTURE,
    INITIALIZER_RANGE,
    ROOT,
    TEACHER_ACCURACY,
    WARM_ACCURACY,
    measured,
)
from examples.quickstart.task import LEFT, NAMES, RIGHT, THINGS
from examples.quickstart.tokenizer_files import Side, sides
from examples.stages import Stage, console
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

KINDS = {"additions": "gets", "subtractions": "loses"}
"""What a teacher knows, and the verb of its problems."""
TRAIN_SIZE, HELD_OUT_SIZE, DATA_SEED = 3000, 100, 7


def write_prompts(folder: Path, *, own_weight: float = 1.0) -> None:
    """For each kind KIND.jsonl and KIND-held_out.jsonl; train.jsonl and held_out.jsonl of both, in which each
    row names its teacher; and with an own_weight below 1 mixed-WEIGHT.jsonl, the training rows with the
    weights of both. No pair of numbers is in both files of a kind.
    """
    pairs = [(a, b) for a in LEFT for b in RIGHT]
    random.Random(DATA_SEED).shuffle(pairs)
    cut = len(pairs) // 5
    together: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for kind, verb in KINDS.items():
        for name, own, size in (
            ("held_out", pairs[:cut], HELD_OUT_SIZE),
            ("train", pairs[cut:], TRAIN_SIZE),
        ):
            rng = random.Random(f"{DATA_SEED} {kind} {name}")
            rows = [row(own[i % len(own)], kind, verb, rng) for i in range(size)]
            write(folder / f"{kind}{'' if name == 'train' else '-held_out'}.jsonl", rows)
            together[name] += rows
    for name, rows in together.items():
        write(folder / f"{name}.jsonl", rows)
    if own_weight < 1:
        mixed: list[dict[str, Any]] = []
        for one in together["train"]:
            weights = {kind: own_weight if kind == one["teacher"] else 1 - own_weight for kind in KINDS}
            mixed.append({key: one[key] for key in ("prompt", "label")} | {"teachers": weights})
        write(folder / f"mixed-{own_weight}.jsonl", mixed)


def row(pair: tuple[int, int], kind: str, verb: str, rng: random.Random) -> dict[str, str]:
    """One problem with its answer, and the name of the teacher that knows it."""
    a, b = pair
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    answer = f" {name} has {a + b if kind == 'additions' else a - b} {thing}."
    more = " more" if kind == "additions" else ""
    prompt = f"{name} has {a} {thing} and {verb} {b}{more}. How many?"
    return {"prompt": prompt, "response": answer, "label": answer, "teacher": kind}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


class Recipe:
    """The stages, with every flag that differs from the defaults."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        write_prompts(folder, own_weight=options.own_weight)
        mixed = "" if options.own_weight == 1 else f"-{options.own_weight}"
        other, own = sides("digits-agree", "teacher-groups", folder / "tokenizers")
        self._names = {kind: f"{kind}-kd" if kind == options.kd else kind for kind in KINDS}
        self._models = {
            name: self._architecture(name, own if kind == options.kd else other, "teacher")
            for kind, name in self._names.items()
        }
        self._models["student"] = self._architecture("student", own, "student")
        until = ("--eval-samples", "0", "--exit-eval-accuracy")
        self.teachers = {
            kind: self._train(
                *(f"teacher of {kind}", self._names[kind], kind, f"{kind}-held_out"),
                *("--simct-interface", "sft", "--lr", "2e-3", "--lr-warmup-fraction", "0.03"),
                *("--train-iters", "800", "--lr-decay-style", "linear", "--rollout-batch-size", "32"),
                *("--eval-interval", "50", *until, str(TEACHER_ACCURACY)),
            )
            for kind in KINDS
        }
        self.others = {kind: self._evaluate(kind) for kind in KINDS}
        self.warm_up = self._train(
            *("warm-up of the student", "student", "train", "held_out"),
            *("--simct-interface", "sft", "--lr", "2e-3", "--lr-warmup-fraction", "0.03"),
            *("--train-iters", "800", "--lr-decay-style", "constant", "--rollout-batch-size", "32"),
            *("--eval-interval", "20", *until, str(WARM_ACCURACY)),
        )
        self.distil = self._train(
            *("distil", "student", f"mixed{mixed}" if mixed else "train", "held_out"),
            *("--pretrained-checkpoint", str(self.warm_up.output / "checkpoint")),
            *("--teachers", json.dumps({kind: self._entry(kind) for kind in KINDS})),
            *("--simct-interface", options.interface, "--lr", str(options.lr)),
            *("--lr-decay-style", "constant", "--train-iters", str(options.train_iters)),
            *("--rollout-batch-size", "64", "--eval-interval", "20"),
            needs=(*self.teachers.values(), self.warm_up),
            output=f"distil{mixed}{'-kd-of-' + options.kd if options.kd else ''}",
        )

    @property
    def stages(self) -> list[Stage]:
        """All of them in order."""
        return [*self.teachers.values(), *self.others.values(), self.warm_up, self.distil]

    def _architecture(self, name: str, side: Side, kind: str) -> dict[str, str]:
        """The folder and the tokenizer of a model."""
        folder = self._folder / f"{name}-architecture"
        folder.mkdir(exist_ok=True)
        fields = ARCHITECTURE | {"vocab_size": side.vocab_size, "initializer_range": INITIALIZER_RANGE[kind]}
        (folder / "config.json").write_text(json.dumps(fields, indent=1))
        return {"hf_checkpoint": str(folder), "tokenizer_model": side.tokenizer}

    def _entry(self, kind: str) -> dict[str, str]:
        """A teacher in --teachers."""
        checkpoint = {"pretrained_checkpoint": str(self.teachers[kind].output / "checkpoint")}
        own = {"simct_interface": "kd"} if kind == self._options.kd else {}
        return self._models[self._names[kind]] | checkpoint | own

    def _flags(self, name: str) -> list[str]:
        model = self._models[name]
        return ["--hf-checkpoint", model["hf_checkpoint"], "--tokenizer-model", model["tokenizer_model"]]

    def _train(
        self,
        title: str,
        name: str,
        data: str,
        held_out: str,
        *flags: str,
        needs: tuple[Stage, ...] = (),
        output: str | None = None,
    ) -> Stage:
        """A run of megatron_simct.train in one process."""
        folder = self._folder / (output or name)
        checkpoint = str(folder / "checkpoint")
        inputs = (self._folder / f"{data}.jsonl", self._folder / f"{held_out}.jsonl")
        command = [
            *(sys.executable, "-m", "megatron_simct.train", "--run-dir", str(folder), *self._flags(name)),
            *("--save", checkpoint, "--load", checkpoint, "--save-interval", "50", "--save-retain", "1"),
            *("--prompt-data", str(inputs[0]), "--eval-prompt-data", str(inputs[1])),
            *("--rollout-max-prompt-len", "64", "--rollout-max-response-len", "16"),
            *("--micro-batch-size", "32", "--log-interval", "20", "--seed", str(self._options.seed)),
            *("--min-lr", "0", *flags, *(("--train-iters", "2") if self._options.smoke else ())),
        ]
        return Stage(
            name=title, command=tuple(command), output=folder, needs=needs, inputs=inputs, resumes=True
        )

    def _evaluate(self, kind: str) -> Stage:
        """A teacher's answers to the problems of the other one."""
        (other,) = KINDS.keys() - {kind}
        name = self._names[kind]
        data, output = self._folder / f"{other}-held_out.jsonl", self._folder / f"{name}-on-{other}"
        start = str(self.teachers[kind].output / "checkpoint")
        command = [
            *(sys.executable, str(ROOT / "tools" / "evaluate.py"), "--benchmark", "exact_match"),
            *("--data", str(data), "--output-dir", str(output), "--max-response-len", "16"),
            *(*self._flags(name), "--pretrained-checkpoint", start),
        ]
        return Stage(
            name=f"teacher of {kind} on {other}",
            command=tuple(command),
            output=output,
            needs=(self.teachers[kind],),
            inputs=(data,),
            resumes=True,
        )


def by_kind(stage: Stage, *, first: bool = False) -> dict[str, float]:
    """The first or last greedy accuracy of a training run on the problems of both kinds."""
    rows = [json.loads(line) for line in (stage.output / "metrics.jsonl").read_text().splitlines()]
    right = [row["greedy_right"] for row in rows if row["kind"] == "evaluation"][0 if first else -1]
    return {
        kind: sum(right[i * HELD_OUT_SIZE : (i + 1) * HELD_OUT_SIZE]) / HELD_OUT_SIZE
        for i, kind in enumerate(KINDS)
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/two_teachers/run.sh",
        description="A student learns additions from one teacher and subtractions from another, on one CPU "
        "core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--interface", choices=("bytes", "paper"), default="bytes", help="how distributions compare"
    )
    parser.add_argument(
        "--own-weight",
        type=float,
        default=1.0,
        help="weight of the row's own teacher; the other one, which does not know, has the rest",
    )
    parser.add_argument(
        "--kd",
        choices=tuple(KINDS),
        default=None,
        help="this teacher has the student's tokenizer, and its rows are compared by kd",
    )
    parser.add_argument("--seed", type=int, default=1, help="weights, order of the problems, sampling")
    parser.add_argument("--train-iters", type=int, default=100, help="on-policy steps")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the on-policy steps")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of each run: that it runs, not that it learns"
    )
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "two_teachers", help="where everything is written"
    )
    options = parser.parse_args(argv)
    if not 0 < options.own_weight <= 1:
        parser.error(f"--own-weight {options.own_weight}: must be above 0 and at most 1")
    if options.own_weight < 1 and options.kd:
        parser.error("--own-weight below 1: not with --kd, which no mixture can be of")
    if options.own_weight < 1 and options.interface != "bytes":
        parser.error("--own-weight below 1: only --interface bytes mixes teachers")
    return options


@command("examples/two_teachers/run.sh", also=(subprocess.CalledProcessError,))
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(options, folder)
    for stage in recipe.stages:
        stage.run(ROOT)
    summary: dict[str, dict[str, float]] = {}
    for kind, stage in recipe.others.items():
        (other,) = KINDS.keys() - {kind}
        own = [json.loads(x) for x in (recipe.teachers[kind].output / "metrics.jsonl").open()]
        summary[f"teacher of {kind}"] = {
            kind: [x["greedy_accuracy"] for x in own if x["kind"] == "evaluation"][-1],
            other: measured(stage),
        }
    summary["student before"] = by_kind(recipe.distil, first=True)
    summary["student after"] = by_kind(recipe.distil)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = Table("", *KINDS, title=f"Held-out accuracy, greedy (interface {options.interface})")
    for name, values in summary.items():
        table.add_row(name, *(f"{values[kind]:.2f}" for kind in KINDS))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
