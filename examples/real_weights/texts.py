"""Real problems: prompts for training, and solutions that neither model reads before it is measured.

HumanEval (Python) and CHAMP (mathematics) come from packages that contain them; GSM8K
comes from a given file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tools.benchmark.real_inputs import champ_problems, humaneval_problems

Problem = tuple[str, str]
"""A prompt and its solution."""
HELD_OUT_EVERY = 5
MAX_PROMPT, MAX_SOLUTION = 600, 400
"""Characters: this is an example for two cores."""


def as_task(problems: Sequence[Problem]) -> list[Problem]:
    """A question as a prompt for models that continue texts."""
    return [(f"Problem: {question.strip()}\nSolution:\n", solution) for question, solution in problems]


def gsm8k_problems(path: Path) -> list[Problem]:
    """Problems in a JSONL file with question and answer. Raises ValueError, naming the file and the line."""
    problems = []
    # JSON may contain other line ends, such as U+2028
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            problems.append((row["question"] + "", row["answer"] + ""))
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"--gsm8k {path}, line {number}: no JSON object with a question and an answer"
            ) from None
    return problems


def split(problems: Sequence[Problem], num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training problems, and held-out ones: of every five problems the last, and of these the first
    `num_held_out` that are short enough.
    """
    train = [p for i, p in enumerate(problems, start=1) if i % HELD_OUT_EVERY and len(p[0]) <= MAX_PROMPT]
    others = problems[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    held_out = [p for p in others if len(p[0]) <= MAX_PROMPT and 0 < len(p[1]) <= MAX_SOLUTION]
    return train, held_out[:num_held_out]


def write_texts(folder: Path, gsm8k: Path | None, *, num_held_out: int) -> None:
    """prompts.jsonl with the key prompt; held_out.jsonl with prompt and response,
    `num_held_out` from each source.
    """
    sources = [humaneval_problems(), as_task(champ_problems())]
    if gsm8k is not None:
        sources.append(as_task(gsm8k_problems(gsm8k)))
    parts = [split(problems, num_held_out) for problems in sources]
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": prompt} for train, _ in parts for prompt, _ in train]
    held_out = [{"prompt": prompt, "response": solution} for _, part in parts for prompt, solution in part]
    for name, rows in (("prompts.jsonl", prompts), ("held_out.jsonl", held_out)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
