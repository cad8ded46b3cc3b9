"""Problems of part e: sums of two numbers, each pair of numbers once among the problems that judge a student.

Of the 810 pairs of a number from 10 to 99 and one from 1 to 9, 200 are the held-out problems, 200 are for
validation, and the other 410 are trained on, in many words.

The words are the quick start's, or such that its two tokenizers which agree on digits merge across each other
in all of them: "penguins" is p|engu|ins for one and peng|u|ins for the other.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from examples.experiments.plan import JUDGED
from examples.quickstart.task import NAMES, THINGS, problem

WORDS = {
    "plain": (NAMES, THINGS),
    "crossing": (
        ("Beatrice", "Ignatius", "Mirabel", "Ezekiel", "Humphrey", "Laurence", "Percival", "Raphael"),
        (
            "penguins",
            "protons",
            "sandwiches",
            "telescopes",
            "umbrellas",
            "cartridges",
            "icebergs",
            "solenoids",
        ),
    ),
}
"""Names and things of the problems."""
LEFT, RIGHT = range(10, 100), range(1, 10)
SEED = 11


def split_pairs() -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """The pairs of numbers of training, validation and held-out problems; no pair is in two of them."""
    pairs = [(a, b) for a in LEFT for b in RIGHT]
    random.Random(SEED).shuffle(pairs)
    return pairs[2 * JUDGED :], pairs[:JUDGED], pairs[JUDGED : 2 * JUDGED]


def clusters() -> np.ndarray:
    """[JUDGED], the first number of each held-out problem. A model that reads it as one token knows that
    number or does not, so intervals draw such problems together.
    """
    return np.array([a for a, _ in split_pairs()[2]])


def write_problems(folder: Path, words: str, *, train_size: int = 6000) -> tuple[Path, Path, Path]:
    """Files with keys prompt, response, label: train.jsonl; validation.jsonl; and judged.jsonl, which has the
    validation problems, then the held-out ones. Returns their paths.
    """
    training, validation, held_out = split_pairs()
    names, things = WORDS[words]
    drawn = random.Random(SEED + 1)
    judged = [problem(pair, drawn, names, things) for pair in (*validation, *held_out)]
    rows = [problem(training[i % len(training)], drawn, names, things) for i in range(train_size)]
    paths = folder / "train.jsonl", folder / "validation.jsonl", folder / "judged.jsonl"
    for path, content in zip(paths, (rows, judged[:JUDGED], judged), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return paths
