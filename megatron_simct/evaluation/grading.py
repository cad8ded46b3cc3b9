"""What is right: numbers by Math-Verify, programs by their tests.

GSM8K is graded in two more ways, by the regular expressions with which lm-evaluation-harness defines them:
`strict_match` (the number after "####") and `flexible_extract` (the last number).
"""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_simct.evaluation.benchmarks import Name, Problem, cut, livecodebench_tests
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits, passes, run_program

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_BLOCK = re.compile(r"```(?:[^\n`]*\n)?(.*?)(?:\n?```|\Z)", re.DOTALL)
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
"""What solutions of LiveCodeBench need not import; builtins last, or math's pow would stand in the place of theirs."""
_CALLS = """
import json as _json
for _test in _json.loads({tests!r}):
    _arguments = [_json.loads(_line) for _line in _test["input"].split("\\n")]
    _found = (Solution().{name} if "Solution" in globals() else {name})(*_arguments)
    _found = _json.loads(_json.dumps(_found))
    assert _found == _json.loads(_test["output"])
"""


@dataclass(frozen=True)
class Grader:
    """Grades responses, one at a time."""

    benchmark: Name
    same_answer: Callable[[str, str], bool]
    """Whether a gold text and a response have the same final answer: a MathVerifier."""
    _: KW_ONLY
    chat: bool
    """Whether responses answer a message; else they go on with a text."""
    limits: Limits = field(default_factory=Limits)

    def grade(self, problem: Problem, response: str) -> dict[str, bool]:
        """Whether the response is right, under each of the benchmark's metrics."""
        text = response if self.chat else cut(self.benchmark, response)
        match self.benchmark:
            case "gsm8k":
                gold = problem.fields["answer"].rsplit("#### ", 1)[1]
                return {
                    "math_verify": self.same_answer(gold.replace(",", ""), text),
                    "strict_match": _same_number(_strict(text), gold),
                    "flexible_extract": _same_number(_flexible(text), gold),
                }
            case "math500":
                gold = problem.fields.get("solution") or f"$\\boxed{{{problem.fields['answer']}}}$"
                return {"math_verify": self.same_answer(gold, text)}
            case "mbpp":
                return {"pass": passes(mbpp_program(problem.fields, self._code(text)), self.limits)}
            case "humaneval":
                code = self._code(text)
                prompt, whole = problem.fields["prompt"], rf"\bdef {problem.fields['entry_point']}\b"
                start = re.split(whole, prompt)[0] if self.chat and re.search(whole, code) else prompt
                return {"pass": passes(humaneval_program(problem.fields, start + code), self.limits)}
            case "livecodebench":
                code = self._code(text, last=True) if self.chat else (problem.fields.get("starter_code") or "") + text
                return {"pass": _passes_livecodebench(problem.fields, code, self.limits)}
            case "exact_match":
                return {"exact_match": text == problem.fields["label"]}
            case "math_label":
                label = problem.fields["label"]
                gold = label if "$" in label or "\\boxed" in label else f"$\\boxed{{{label}}}$"
                return {"math_verify": self.same_answer(gold, text)}

    def _code(self, text: str, *, last: bool = False) -> str:
        if not self.chat:
            return text
        blocks = _BLOCK.findall(text)
        return blocks[-1 if last else 0] if blocks else text


class Graders:
    """Grades responses, `workers` at a time, each with a Math-Verify of its own. To be closed."""

    def __init__(self, benchmark: Name, *, chat: bool, workers: int, limits: Limits) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._verifiers = [MathVerifier() for _ in range(workers)]
        self._idle: queue.SimpleQueue[Grader] = queue.SimpleQueue()
        for verifier in self._verifiers:
            self._idle.put(Grader(benchmark, verifier, chat=chat, limits=limits))

    def grade(self, responses: Iterable[tuple[Problem, str]]) -> Iterator[dict[str, bool]]:
        """As Grader.grade, of each, in order."""
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


def humaneval_program(row: dict[str, Any], code: str) -> str:
    """The code and its tests."""
    return f"{code}\n{row['test']}\ncheck({row['entry_point']})"


def mbpp_program(row: dict[str, Any], code: str) -> str:
    """The code and its tests."""
    before = row.get("test_imports") or [row.get("test_setup_code") or ""]
    return "\n".join([code, *before, *row["test_list"]])


def _passes_livecodebench(row: dict[str, Any], code: str, limits: Limits) -> bool:
    tests, function = livecodebench_tests(row)
    if function is not None:
        return passes(_IMPORTS + code + "\n" + _CALLS.format(tests=json.dumps(tests), name=function), limits)
    for test in tests:
        outcome = run_program(_IMPORTS + code, limits, stdin=test["input"], as_script=True)
        if outcome.status != "ok" or not same_output(outcome.output, test["output"]):
            return False
    return True


def same_output(found: str, expected: str) -> bool:
    """Line by line, without blanks around them; numbers by value."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(lines) == len(wanted) and all(a == b or _same_words(a, b) for a, b in zip(lines, wanted, strict=True))


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
