"""Grades of responses: Math-Verify compares numbers, tests run programs.

The answer is the part of a response outside its thinking (answers.py). If a thinking block is not closed,
there is no answer, and the response is wrong. Only `exact_match` compares the whole response.

GSM8K has two more metrics, with the regular expressions by which lm-evaluation-harness defines them:
`strict_match` (the number after "####") and `flexible_extract` (the last number).
"""

from __future__ import annotations

import ast
import json
import queue
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_simct.config.options import Benchmark
from megatron_simct.evaluation.answers import Thinking, answer_of, called_functions, plain_math, program_of
from megatron_simct.evaluation.benchmarks import (
    METRICS,
    Problem,
    cut,
    livecodebench_function,
    livecodebench_tests,
)
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits, passes, run_program
from megatron_simct.prompt_files import label_of

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IMPORTS = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""
"""Imports that solutions of LiveCodeBench may omit. builtins comes last: otherwise math's pow would
replace Python's own.
"""
_FUNCTION = """
def simct_asked(*arguments):
    return (Solution().{name} if "Solution" in globals() else {name})(*arguments)
"""
_CALLS = """
import json
for test in json.loads({tests!r}):
    arguments = [json.loads(line) for line in test["input"].split("\\n")]
    found = json.loads(json.dumps(simct_asked(*arguments)))
    assert found == json.loads(test["output"])
"""


@dataclass(frozen=True)
class Grader:
    """Grades responses, one at a time."""

    benchmark: Benchmark
    same_answer: Callable[[str, str], bool]
    """Whether a gold text and a response have the same final answer: a MathVerifier."""
    _: KW_ONLY
    chat: bool
    """Whether responses answer a message. Otherwise they complete a text."""
    limits: Limits = field(default_factory=Limits)
    thinking: Thinking = field(default_factory=Thinking)

    def grade(self, problem: Problem, response: str) -> dict[str, bool]:
        """Whether the response is right, by each of the benchmark's metrics."""
        if self.benchmark == "exact_match":
            return {"exact_match": response == label_of(problem.fields, "label")}
        answer = answer_of(response, self.thinking)
        if answer is None:
            return dict.fromkeys(METRICS[self.benchmark], False)
        text = answer if self.chat else cut(self.benchmark, answer)
        match self.benchmark:
            case "gsm8k":
                gold = problem.fields["answer"].rsplit("#### ", 1)[1]
                return {
                    "math_verify": self.same_answer(gold.replace(",", ""), plain_math(text)),
                    "strict_match": _same_number(_strict(text), gold),
                    "flexible_extract": _same_number(_flexible(text), gold),
                }
            case "math500":
                gold = problem.fields.get("solution") or f"$\\boxed{{{label_of(problem.fields, 'answer')}}}$"
                return {"math_verify": self.same_answer(gold, plain_math(text))}
            case "mbpp":
                return {"pass": _passes_mbpp(problem.fields, self._code(problem, text), self.limits)}
            case "humaneval":
                code = self._code(problem, text)
                prompt, whole = problem.fields["prompt"], rf"\bdef {problem.fields['entry_point']}\b"
                start = re.split(whole, prompt)[0] if self.chat and re.search(whole, code) else prompt
                return {"pass": _passes_humaneval(problem.fields, start + code, self.limits)}
            case "livecodebench":
                code = (
                    self._code(problem, text)
                    if self.chat
                    else (problem.fields.get("starter_code") or "") + text
                )
                return {"pass": _passes_livecodebench(problem.fields, code, self.limits)}
            case "math_label":
                label = plain_math(label_of(problem.fields, "label"))
                gold = label if "$" in label or "\\boxed" in label else f"$\\boxed{{{label}}}$"
                return {"math_verify": self.same_answer(gold, plain_math(text))}

    def _code(self, problem: Problem, text: str) -> str:
        return program_of(text, asked_functions(self.benchmark, problem.fields)) if self.chat else text


def asked_functions(benchmark: Benchmark, row: dict[str, Any]) -> set[str]:
    """Names of which a program must define one: the requested function, or the functions
    that the tests call.
    """
    match benchmark:
        case "humaneval":
            return {row["entry_point"]}
        case "livecodebench":
            function = livecodebench_function(row)
            return set() if function is None else {function}
        case _:
            return called_functions(row["test_list"])


class Graders:
    """Grades responses in `workers` processes, each with its own Math-Verify. The caller must close it."""

    def __init__(
        self, benchmark: Benchmark, *, chat: bool, workers: int, limits: Limits, thinking: Thinking
    ) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._verifiers = [MathVerifier() for _ in range(workers)]
        self._idle: queue.SimpleQueue[Grader] = queue.SimpleQueue()
        for verifier in self._verifiers:
            self._idle.put(Grader(benchmark, verifier, chat=chat, limits=limits, thinking=thinking))

    def grade(self, responses: Iterable[tuple[Problem, str]]) -> Iterator[dict[str, bool]]:
        """The results of Grader.grade for the responses, in order."""
        return self._pool.map(self._one, responses)

    def _one(self, response: tuple[Problem, str]) -> dict[str, bool]:
        grader = self._idle.get()
        try:
            return grader.grade(*response)
        finally:
            self._idle.put(grader)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for verifier in self._verifiers:
            verifier.close()


def _passes_humaneval(row: dict[str, Any], code: str, limits: Limits) -> bool:
    """The test uses the prompt's own definitions of functions that precede the requested one."""
    asked = row["entry_point"]
    helpers = re.split(rf"\bdef {asked}\b", row["prompt"])[0]
    return passes(code, f"{row['test']}\ncheck({asked})", limits, helpers=helpers, asked=[asked])


def _passes_mbpp(row: dict[str, Any], code: str, limits: Limits) -> bool:
    """The requested names are those that the row's own solution defines. The tests may use its imports."""
    before = row.get("test_imports") or [row.get("test_setup_code") or ""]
    try:
        solution = ast.parse(row.get("code") or "").body
    except SyntaxError:
        solution = []
    asked = [step.name for step in solution if isinstance(step, ast.FunctionDef | ast.ClassDef)]
    imports = "\n".join(
        ast.unparse(step) for step in solution if isinstance(step, ast.Import | ast.ImportFrom)
    )
    return passes(code, "\n".join([*before, *row["test_list"]]), limits, helpers=imports, asked=asked)


def _passes_livecodebench(row: dict[str, Any], code: str, limits: Limits) -> bool:
    tests, function = livecodebench_tests(row)
    if function is not None:
        source = _IMPORTS + code + _FUNCTION.format(name=function)
        return passes(source, _CALLS.format(tests=json.dumps(tests)), limits)
    for test in tests:
        outcome = run_program(_IMPORTS + code, limits, stdin=test["input"], as_script=True)
        if outcome.status != "ok" or not same_output(outcome.output, test["output"]):
            return False
    return True


def same_output(found: str, expected: str) -> bool:
    """Compares line by line, without the spaces around lines; numbers by value."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(lines) == len(wanted) and all(
        a == b or _same_words(a, b) for a, b in zip(lines, wanted, strict=True)
    )


def _same_words(a: str, b: str) -> bool:
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:
        return False


def _strict(text: str) -> str | None:
    found = _STRICT.search(text)
    return found[1] if found else None


def _flexible(text: str) -> str | None:
    found = _FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group) if found else None


def _same_number(found: str | None, gold: str) -> bool:
    def plain(number: str) -> str:
        return number.strip().replace(",", "").replace("$", "").removesuffix(".")

    return found is not None and plain(found) == plain(gold)
