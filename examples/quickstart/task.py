"""The quick start's task: word problems in a laboratory, answered by a sentence of words and a number.

The words are chosen so that the pair of tokenizers disagrees on most of them ("molecules" is one token for
one and two for the other), while both spell numbers digit by digit. The words become multi-token units, the
digits 1:1 positions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

NAMES = ("Tom", "Anna", "Pablo", "Nicolas", "Ferdinand", "Santos", "Nora", "Omar")
THINGS = ("books", "tubes", "molecules", "electrodes", "fibers", "enzymes", "circuits", "neurons")
LEFT = range(10, 40)
RIGHT = range(1, 10)


def write_task(folder: Path, *, train_size: int = 6000, held_out_size: int = 200, seed: int = 7) -> None:
    """train.jsonl and held_out.jsonl with keys prompt, response, label. No pair of numbers is in both."""
    pairs = [(a, b) for a in LEFT for b in RIGHT]
    random.Random(seed).shuffle(pairs)
    num_held_out = len(pairs) // 5
    _write(folder / "held_out.jsonl", pairs[:num_held_out], held_out_size, seed=seed + 1)
    _write(folder / "train.jsonl", pairs[num_held_out:], train_size, seed=seed + 2)


def _write(path: Path, pairs: list[tuple[int, int]], size: int, *, seed: int) -> None:
    rng = random.Random(seed)
    rows = [problem(pairs[i % len(pairs)], rng) for i in range(size)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem(
    pair: tuple[int, int], rng: random.Random, names: Sequence[str] = NAMES, things: Sequence[str] = THINGS
) -> dict[str, str]:
    """A sum in words, with its answer as response and label."""
    a, b = pair
    name, thing = rng.choice(names), rng.choice(things)
    answer = f" {name} has {a + b} {thing}."
    return {
        "prompt": f"{name} has {a} {thing} and gets {b} more. How many?",
        "response": answer,
        "label": answer,
    }
