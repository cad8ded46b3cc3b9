"""A student learns to use a calculator, on the quick start's task, from a teacher with another tokenizer.

Three commands, on two CPU cores:

    1. teacher    sft on given transcripts: the call of the calculator, its reply, the answer
    2. warm-up    sft of the student on the same, stopped while most of its answers are still wrong
    3. distil     the student samples the call, the calculator replies, the student samples the answer; both
                  of its responses are compared with the teacher

Both tokenizers are trained here, on the transcripts: byte-pair vocabularies of different sizes, which cut
words differently and spell numbers. A stage is not run again if its command and inputs have not changed
since it finished.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.quickstart.run import ARCHITECTURE, ROOT
from examples.quickstart.task import write_task
from examples.stages import Stage, console
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

VOCAB_SIZES = {"teacher": 420, "student": 300}
"""At most; a vocabulary is smaller if the transcripts have no further pair to merge."""
STOP = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}"
    f"{STOP}\n"
    "{% else %}[{{ message.role }}] {{ message.content }}\n{% endif %}{% endfor %}"
)
# Words with the blank before them; digits one by one.
PATTERN = r"\d|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
WARM_UP_ITERS = 55


def write_rows(folder: Path) -> None:
    """transcripts.jsonl and problems.jsonl from the task's training rows, held_out_problems.jsonl from its
    held-out ones."""
    write_task(folder)
    train, held_out = (_read(folder / name) for name in ("train.jsonl", "held_out.jsonl"))
    _write(folder / "transcripts.jsonl", [transcript(row) for row in train])
    _write(folder / "problems.jsonl", [problem(row) for row in train])
    _write(folder / "held_out_problems.jsonl", [problem(row) for row in held_out])


def problem(row: dict[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": row["prompt"]}], "label": row["label"].strip()}


def transcript(row: dict[str, str]) -> dict[str, Any]:
    """The problem, the call, the calculator's reply and the answer."""
    a, b = (int(word) for word in re.findall(r"\d+", row["prompt"]))
    return {
        "messages": [
            *problem(row)["messages"],
            {"role": "assistant", "content": f"calculator({a} + {b})"},
            {"role": "user", "content": str(a + b)},
            {"role": "assistant", "content": row["response"].strip()},
        ]
    }


def write_model(folder: Path, vocab_size: int, texts: Sequence[str]) -> None:
    """A Hugging Face folder without weights: configuration, tokenizer, chat template."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([STOP])
    fields = ARCHITECTURE | {
        "vocab_size": tokenizer.get_vocab_size(),
        "initializer_range": 0.05,
        "eos_token_id": tokenizer.token_to_id(STOP),
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "eos_token": STOP}
    write_whole(folder / "tokenizer.json", tokenizer.to_str())
    write_whole(folder / "tokenizer_config.json", json.dumps(about, indent=1))
    write_whole(folder / "config.json", json.dumps(fields, indent=1))
    write_whole(folder / "chat_template.jinja", TEMPLATE)


def stages(options: argparse.Namespace, folder: Path) -> tuple[Stage, Stage, Stage]:
    """Teacher, warm-up and distillation, with every flag that differs from the defaults."""
    write_rows(folder)
    texts = [m["content"] for row in _read(folder / "transcripts.jsonl") for m in row["messages"]]
    for side, vocab_size in VOCAB_SIZES.items():
        write_model(folder / f"{side}-model", vocab_size, [*texts, "[user] "])

    def stage(
        name: str, data: str, flags: Sequence[str], *, inputs: Sequence[str] = (), needs: Sequence[Stage] = ()
    ) -> Stage:
        """A run of megatron_simct.train on two data-parallel ranks."""
        output = folder / name
        checkpoint = str(output / "checkpoint")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_simct.train", "--run-dir", str(output)),
            *("--save", checkpoint, "--load", checkpoint, "--save-interval", "50", "--save-retain", "1"),
            *("--prompt-data", str(folder / data), "--apply-chat-template", "--rollout-max-prompt-len", "96"),
            *("--rollout-max-response-len", "64", "--rollout-batch-size", "32", "--micro-batch-size", "16"),
            *("--seed", str(options.seed), "--min-lr", "0", "--log-interval", "20", *flags),
            *(("--train-iters", "2") if options.smoke else ()),
        ]
        read = tuple(folder / one for one in (data, *inputs))
        return Stage(
            name=name, command=tuple(command), output=output, needs=tuple(needs), inputs=read, resumes=True
        )

    def sft(name: str, side: str, *flags: str) -> Stage:
        given = ("--simct-on", "given", "--simct-interface", "sft", "--lr", "2e-3")
        model = ("--hf-checkpoint", str(folder / f"{side}-model"), "--lr-warmup-fraction", "0.03")
        own = (f"{side}-model/tokenizer.json", f"{side}-model/chat_template.jinja")
        return stage(name, "transcripts.jsonl", [*model, *given, *flags], inputs=own)

    teacher = sft("teacher", "teacher", "--train-iters", "400", "--lr-decay-style", "linear")
    warm_up = sft(
        *("warm-up", "student", "--train-iters", str(WARM_UP_ITERS), "--lr-decay-style", "constant")
    )
    distil = stage(
        *("distil", "problems.jsonl"),
        [
            *("--hf-checkpoint", str(folder / "student-model")),
            *("--pretrained-checkpoint", str(warm_up.output / "checkpoint")),
            *("--teacher-hf-checkpoint", str(folder / "teacher-model")),
            *("--teacher-pretrained-checkpoint", str(teacher.output / "checkpoint")),
            *("--environment", "examples.transcripts.calculator:reply"),
            *("--simct-interface", options.interface, "--lr", str(options.lr)),
            *("--lr-decay-style", "constant", "--train-iters", str(options.train_iters)),
            *("--eval-prompt-data", str(folder / "held_out_problems.jsonl"), "--eval-interval", "20"),
        ],
        inputs=("held_out_problems.jsonl",),
        needs=(teacher, warm_up),
    )
    return teacher, warm_up, distil


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="examples/transcripts/run.sh",
        description="A student learns to use a calculator, on policy, on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--interface",
        choices=("bytes", "paper", "strict"),
        default="bytes",
        help="how the distributions of the two models are compared",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights, order of the problems and sampling"
    )
    parser.add_argument("--train-iters", type=int, default=80, help="on-policy steps")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the on-policy steps")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="two steps of each run, as a test that it runs; nothing is learned",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "calculator", help="folder for all output"
    )
    return parser.parse_args(argv)


@command("examples/transcripts/run.sh", also=(subprocess.CalledProcessError,))
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    *before, distil = stages(options, folder)
    for stage in (*before, distil):
        stage.run(ROOT)
    evaluations = [row for row in _read(distil.output / "metrics.jsonl") if row["kind"] == "evaluation"]
    summary = {
        "greedy": {str(row["iteration"]): row["greedy_accuracy"] for row in evaluations},
        "sampled": {str(row["iteration"]): row["sampled_accuracy"] for row in evaluations},
        "interface": options.interface,
        "seed": options.seed,
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    title = f"Held-out problems, with the calculator (interface {options.interface})"
    table = Table("steps", "greedy", "sampled", title=title)
    for row in evaluations:
        figures = (row[f"{name}_accuracy"] for name in ("greedy", "sampled"))
        table.add_row(str(row["iteration"]), *(f"{figure:.3f}" for figure in figures))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
