"""Formats of benchmarks, grades, and intervals."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_simct.evaluation.benchmarks import Problem, cut, livecodebench_tests, read_problems
from megatron_simct.evaluation.grading import Grader, same_output
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits
from megatron_simct.evaluation.statistics import bootstrap, estimates

LIMITS = Limits(cpu_s=2)
GSM8K = {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1200.\n#### 1,200"}
MATH = {
    "problem": "Half?",
    "solution": "So $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
    "unique_id": "a/1",
}
MBPP = {
    "task_id": 7,
    "prompt": "Write a root.",
    "code": "def root(x):\n  return math.isqrt(x)",
    "test_imports": ["import math"],
    "test_list": ["assert root(9) == 3", "assert root(10) == 3"],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(x)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
STDIN = [{"input": "1 2\n", "output": "3", "testtype": "stdin"}, {"input": "5 6\n", "output": "11\n"}]
CALLS = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]


def livecodebench(public, private, *, starter="", function=None, packed=True) -> dict[str, Any]:
    text = json.dumps(private)
    if packed:
        text = base64.b64encode(zlib.compress(pickle.dumps(text))).decode()
    return {
        "question_id": "q1",
        "question_content": "Add.",
        "starter_code": starter,
        "public_test_cases": json.dumps(public),
        "private_test_cases": text,
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


ROWS = {
    "gsm8k": GSM8K,
    "math500": MATH,
    "mbpp": MBPP,
    "humaneval": HUMANEVAL,
    "livecodebench": livecodebench(STDIN[:1], STDIN[1:]),
    "exact_match": {"id": "q1", "prompt": "Add.", "label": " 3."},
    "math_label": {"id": "q1", "messages": [{"role": "user", "content": "Add."}], "label": "1/2"},
}


def problem(tmp_path, name, row) -> Problem:
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_problems(name, str(tmp_path / "data.jsonl"))
    return found


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    """One process for all tests: it takes seconds to start."""
    verifier = MathVerifier()
    yield verifier
    verifier.close()


@pytest.fixture
def right(tmp_path, verifier) -> Callable[..., dict[str, bool]]:
    """right(benchmark, row, response, chat) -> grades"""

    def grade(name, row, response, chat=False) -> dict[str, bool]:
        grader = Grader(name, verifier, chat=chat, limits=LIMITS)
        return grader.grade(problem(tmp_path, name, row), response)

    return grade


# Files


@pytest.mark.parametrize("name", ROWS)
def test_a_problem_asks_for_what_its_row_says(tmp_path, name) -> None:
    found = problem(tmp_path, name, ROWS[name])
    asked = {"gsm8k": "How many?", "math500": "Half?", "mbpp": "assert root(9)", "humaneval": "Sum."}.get(
        name, "Add."
    )
    assert asked in found.chat and asked in found.completion
    assert found.problem_id == {"gsm8k": "0", "math500": "a/1", "mbpp": "7", "humaneval": "HumanEval/0"}.get(
        name, "q1"
    )


def test_lists_and_compressed_lines_are_read(tmp_path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([MBPP, MBPP | {"task_id": 8}]))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((json.dumps(MBPP) + "\n").encode()))
    assert [p.problem_id for p in read_problems("mbpp", str(tmp_path / "list.json"))] == ["7", "8"]
    assert [p.problem_id for p in read_problems("mbpp", str(tmp_path / "lines.jsonl.gz"))] == ["7"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gsm8k", json.dumps(GSM8K | {"answer": "3"}), "line 1 is not a row of gsm8k"),
        ("mbpp", json.dumps(GSM8K), "line 1 is not a row of mbpp .KeyError: 'test_list'"),
        ("mbpp", "\n".join([json.dumps(MBPP)] * 2), "two rows have the same id"),
        ("math500", "{", "not JSON"),
        ("mbpp", json.dumps(MBPP) + "\n\n{", ", line 3: not JSON"),
        (
            "exact_match",
            json.dumps({"prompt": "Add.", "label": [3]}),
            "line 1 is not a row of exact_match .RowError",
        ),
        ("exact_match", "[3]", "row 1: expected a JSON object, found int"),
        (
            "gsm8k",
            json.dumps(GSM8K | {"answer": 3}),
            "line 1 is not a row of gsm8k .TypeError: its answer must be a string",
        ),
        ("gsm8k", json.dumps(GSM8K | {"question": None}), "its question must be a string"),
        ("humaneval", json.dumps(HUMANEVAL | {"prompt": None}), "its prompt must be a string"),
        (
            "livecodebench",
            json.dumps(livecodebench(STDIN, []) | {"private_test_cases": "abcd"}),
            "line 1 is not a row of",
        ),
        (
            "math_label",
            json.dumps({"messages": [], "label": "3"}),
            "neither a string nor messages under 'messages'",
        ),
        ("math500", "", "contains no problems"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, name, content, message) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_problems(name, str(tmp_path / "data.jsonl"))
    with pytest.raises(ValueError, match="--data .*absent: No such file"):
        read_problems(name, str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "data",
    [gzip.compress(b"{}" * 99)[:-9], gzip.compress(b"{}" * 99)[:12] + b"no deflate", b"{}"],
    ids=["cut off", "no deflate", "not packed"],
)
def test_a_damaged_archive_is_said_in_a_line(tmp_path, data) -> None:
    (tmp_path / "data.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"--data .*data\.jsonl\.gz: "):
        read_problems("gsm8k", str(tmp_path / "data.jsonl.gz"))


def test_an_id_may_be_a_number(tmp_path) -> None:
    rows = [{"id": number, "prompt": "Add.", "label": "3"} for number in (0, 7)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.problem_id for p in read_problems("exact_match", str(tmp_path / "data.jsonl"))] == ["0", "7"]


def test_private_tests_are_read_without_unpickling() -> None:
    tests, function = livecodebench_tests(livecodebench(STDIN[:1], STDIN[1:]))
    assert tests == STDIN and function is None
    tests, _ = livecodebench_tests(livecodebench(STDIN[:1], STDIN[1:], packed=False))
    assert tests == STDIN

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("unpickled",)

    row = livecodebench([], [])
    for harmful in (Harmful(), [Harmful(), "[]"], ["[]"], 3):
        row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(harmful))).decode()
        with pytest.raises(ValueError, match="does not contain a string"):
            livecodebench_tests(row)


# Right and wrong


@pytest.mark.parametrize(
    "response, expected",
    [
        ("It is 1200.\n#### 1200", (True, True, True)),
        ("#### $1,200", (False, False, True)),
        ("#### 1,200.", (True, True, True)),
        ("so \\boxed{1200}", (True, False, True)),
        ("1200, not 1300", (False, False, False)),
        ("1200\n\nQuestion: 7?\nAnswer: 9", (True, False, True)),
        ("no idea", (False, False, False)),
    ],
)
def test_numbers_of_gsm8k(right, response, expected) -> None:
    grades = right("gsm8k", GSM8K, response)
    assert (grades["strict_match"], grades["flexible_extract"]) == expected[1:]
    if response != "#### $1,200" and "not" not in response:
        assert grades["math_verify"] == expected[0]


def test_equal_answers_of_math(right) -> None:
    assert right("math500", MATH, "It is $\\boxed{0.5}$.", chat=True) == {"math_verify": True}
    assert right("math500", MATH, "It is $\\boxed{\\frac{2}{3}}$.", chat=True) == {"math_verify": False}
    assert right("math500", {"problem": "?", "answer": "x+1"}, "$\\boxed{1+x}$") == {"math_verify": True}


def test_labels_are_the_response_or_its_final_answer(right) -> None:
    row = {"prompt": "Half?", "label": "\\frac{1}{2}"}
    assert right("exact_match", row, "\\frac{1}{2}") == {"exact_match": True}
    assert right("exact_match", row, " \\frac{1}{2}") == {"exact_match": False}
    assert right("math_label", row, "It is $0.5$.") == {"math_verify": True}
    assert right("math_label", row | {"label": "so $\\frac{1}{2}$"}, "It is $\\boxed{1/2}$.") == {
        "math_verify": True
    }
    assert right("math_label", row, "It is $0.6$.") == {"math_verify": False}


def test_a_computation_without_end_is_wrong_and_the_next_answer_is_read(verifier, monkeypatch) -> None:
    assert verifier("$\\boxed{4}$", "$\\boxed{2+2}$")
    os.kill(verifier._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(MathVerifier._ask, "__kwdefaults__", {"timeout_s": 0.1})
    assert not verifier("$\\boxed{4}$", "$\\boxed{4}$")
    monkeypatch.undo()
    assert verifier("$\\boxed{4}$", "$\\boxed{4}$")


def test_a_process_that_was_killed_between_two_answers_is_started_again(verifier) -> None:
    assert verifier("$\\boxed{4}$", "$\\boxed{2+2}$")
    verifier._process.kill()
    verifier._process.wait(timeout=60)
    assert verifier("$\\boxed{4}$", "$\\boxed{4}$")


def test_a_process_that_is_killed_as_it_is_asked_is_a_wrong_answer(verifier, monkeypatch) -> None:
    assert verifier("$\\boxed{4}$", "$\\boxed{2+2}$")
    verifier._process.kill()
    verifier._process.wait(timeout=60)
    monkeypatch.setattr(verifier._process, "poll", lambda: None)
    assert not verifier("$\\boxed{4}$", "$\\boxed{4}$")
    assert verifier("$\\boxed{4}$", "$\\boxed{4}$")


RIGHT_CODE = {
    "mbpp": ("import math\ndef root(x):\n  return math.isqrt(x)", "def root(x):\n  return 4"),
    "humaneval": ("    return sum(x)\n", "    return len(x)\n"),
    "livecodebench": ("print(sum(map(int, input().split())))", "print(3)"),
}


@pytest.mark.parametrize("name", RIGHT_CODE)
def test_code_that_passes_its_tests(right, name) -> None:
    good, bad = RIGHT_CODE[name]
    assert right(name, ROWS[name], good) == {"pass": True}
    assert right(name, ROWS[name], bad) == {"pass": False}
    junk = {"mbpp": "\n[DONE]\n(", "humaneval": "\nprint(1 / 0)", "livecodebench": "\n### Question\n("}[name]
    assert right(name, ROWS[name], good + junk) == {"pass": True}
    assert right(name, ROWS[name], f"Here:\n```python\n{good}\n```\nDone.", chat=True) == {"pass": True}
    assert right(name, ROWS[name], f"Here:\n```python\n{bad}\n```\nDone.", chat=True) == {"pass": False}


def test_a_whole_function_in_a_block_stands_for_the_prompt(right) -> None:
    """It keeps the prompt's imports, and the functions before the requested one."""
    whole = "def total(x: List[int]) -> int:\n    return x[0] + x[1]"
    assert right("humaneval", HUMANEVAL, f"```python\n{whole}\n```", chat=True) == {"pass": True}
    assert right("humaneval", HUMANEVAL, f"```python\n{whole}", chat=True) == {"pass": True}, (
        "cut at the length limit"
    )
    helper = "def twice(x):\n    return 2 * x\n\n\n"
    row = {"prompt": helper + HUMANEVAL["prompt"], "test": HUMANEVAL["test"] + "    assert twice(1) == 2\n"}
    assert right("humaneval", HUMANEVAL | row, f"```python\n{whole}\n```", chat=True) == {"pass": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A row of mbpp, a right program and a wrong one."""

    name: str
    tests: tuple[str, ...]
    right: str
    wrong: str
    solution: str = ""
    """The row's own solution, whose names are requested."""
    setup: str = ""


CHECKED = [
    Checked(
        name="type of a sequence",
        tests=("assert f(1) == (1, [2])",),
        right="def f(x):\n    return (x, [2])",
        wrong="def f(x):\n    return [x, (2,)]",
    ),
    Checked(
        name="tolerance",
        tests=("assert math.isclose(f(1), 0.1 + 0.2, rel_tol=1e-9)",),
        setup="import math",
        right="def f(x):\n    return 0.3",
        wrong="def f(x):\n    return 0.31",
    ),
    Checked(
        name="set of what is returned",
        tests=("assert set(f([3, 1])) == set((1, 3))",),
        right="def f(x):\n    return (y for y in x)",
        wrong="def f(x):\n    return iter(x[1:])",
    ),
    Checked(
        name="exception",
        tests=("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",),
        right="class Below(ValueError):\n    pass\ndef f(x):\n    raise Below",
        wrong="def f(x):\n    raise KeyError",
    ),
    Checked(
        name="function as an argument",
        tests=("assert f(lambda x: x + 1, 2) == 4",),
        right="def f(g, x):\n    return g(g(x))",
        wrong="def f(g, x):\n    return g(x)",
    ),
    Checked(
        name="function that is returned",
        tests=("assert f(2)(3) == 5",),
        right="def f(x):\n    return lambda y: x + y",
        wrong="def f(x):\n    return lambda y: x",
    ),
    Checked(
        name="class of the program",
        tests=("assert longest([Pair(1, 4), Pair(2, 3)]) == 3",),
        solution="class Pair:\n    pass\ndef longest(x):\n    pass",
        right="class Pair:\n    def __init__(s, a, b):\n        s.a, s.b = a, b\n"
        "def longest(x):\n    return max(p.b - p.a for p in x)",
        wrong="class Pair:\n    def __init__(s, a, b):\n        s.a, s.b = a, b\ndef longest(x):\n    return "
        "len(x)",
    ),
    Checked(
        name="objects that the tests link",
        tests=("assert total(root) == 3", "assert root.next.value == 2"),
        setup="root = Node(1)\nroot.next = Node(2)",
        right="class Node:\n    def __init__(s, v):\n        s.value, s.next = v, None\n"
        "def total(n):\n    return n.value + total(n.next) if n else 0",
        wrong="class Node:\n    def __init__(s, v):\n        s.value, s.next = v, None\n"
        "def total(n):\n    return n.value",
    ),
    Checked(
        name="name of Python that is asked for",
        tests=("assert sum(10, 15) == 6",),
        solution="def sum(a, b):\n    return 6",
        right="def sum(a, b):\n    return 6",
        wrong="def sum(a, b):\n    return a + b",
    ),
    Checked(
        name="name of Python that is not",
        tests=("assert sum(f(2)) == 6",),
        solution="def f(x):\n    pass",
        right="def sum(x):\n    return 0\ndef f(x):\n    return [x, 4]",
        wrong="def sum(x):\n    return 6\ndef f(x):\n    return [x]",
    ),
    Checked(
        name="module that the solution imports",
        tests=("assert f(2) == sys.getsizeof(2)",),
        solution="import sys\ndef f(x):\n    return sys.getsizeof(x)",
        right="import sys\ndef f(x):\n    return sys.getsizeof(x)",
        wrong="class sys:\n    getsizeof = lambda x: 1\ndef f(x):\n    return 1",
    ),
    Checked(
        name="argument that is changed is a copy",
        tests=("x = [1]", "f(x)", "assert x == [1]", "assert f(x) == 2"),
        right="def f(x):\n    x.append(2)\n    return len(x)",
        wrong="def f(x):\n    return len(x)",
    ),
    Checked(
        name="number of numpy",
        tests=("assert f(2) == 4",),
        right="import numpy\ndef f(x):\n    return numpy.int64(2 * x)",
        wrong="import numpy\ndef f(x):\n    return numpy.int64(x)",
    ),
    Checked(
        name="array of numpy is no plain data",
        tests=("assert f(2) == 4",),
        right="def f(x):\n    return 2 * x",
        wrong="import numpy\ndef f(x):\n    return numpy.array([2 * x])",
    ),
]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_what_tests_may_ask_of_a_program(right, case: Checked) -> None:
    row = MBPP | {"code": case.solution, "test_imports": [case.setup], "test_list": list(case.tests)}
    assert right("mbpp", row, case.right) == {"pass": True}
    assert right("mbpp", row, case.wrong) == {"pass": False}


def test_helpers_of_a_prompt_are_those_of_the_prompt(right) -> None:
    """A program that defines another function of the same name does not affect the test."""
    prompt = "def twice(x):\n    return 2 * x\n\n\ndef total(x):\n"
    row = HUMANEVAL | {
        "prompt": prompt,
        "test": "def check(candidate):\n    assert candidate(2) == twice(2)\n",
    }
    assert right("humaneval", row, "    return twice(x)") == {"pass": True}
    assert right("humaneval", row, "    return 0\n\n\ntwice = total") == {"pass": False}


def test_functions_of_livecodebench(right) -> None:
    row = livecodebench(
        [], CALLS, starter="class Solution:\n    def join(self, a, b):\n        ", function="join"
    )
    good = "class Solution:\n    def join(self, a: List[int], b):\n        return (*a, b)"
    for code, expected in ((good, True), (good.replace("*a, b", "b, *a"), False)):
        assert right("livecodebench", row, f"```python\n{code}\n```", chat=True) == {"pass": expected}
    assert right("livecodebench", row, "return [*a, b]") == {"pass": True}, (
        "the text goes on with the starter code"
    )


def test_programs_of_livecodebench_need_not_import_what_its_grader_imports(right) -> None:
    code = "print(reduce(lambda a, b: a + pow(b, 1, 100), map(int, sys.stdin.read().split())))"
    assert right(
        "livecodebench",
        livecodebench(STDIN, []),
        f"```python\nfrom functools import reduce\n{code}\n```",
        chat=True,
    ) == {"pass": True}


def test_output_is_compared_by_lines_and_numbers() -> None:
    assert same_output("1 2 \n3\n", "1 2\n3")
    assert same_output("0.50 1", "0.5 1.0")
    assert not same_output("1 2\n3", "1 2 3")
    assert not same_output("0.5001", "0.5")
    assert not same_output("a", "b")


def test_a_completion_is_cut_where_something_new_starts() -> None:
    assert cut("humaneval", "    return 1\n\nclass A:\n\ndef f():") == "    return 1\n"
    assert cut("gsm8k", "18") == "18"


# Intervals


def test_estimates_of_one_and_of_several_samples() -> None:
    rng = np.random.default_rng(0)
    one = rng.random((400, 1)) < 0.3
    (estimate,) = estimates(one).values()
    error = 1.96 * (one.mean() * (1 - one.mean()) / 400) ** 0.5  # the normal approximation
    assert estimate.mean == one.mean()
    assert (estimate.low, estimate.high) == pytest.approx((one.mean() - error, one.mean() + error), abs=0.006)
    several = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool)
    found = estimates(several)
    assert found.keys() == {"avg@2", "pass@2"}
    assert (found["avg@2"].mean, found["pass@2"].mean) == (0.5, 0.75)


def test_an_interval_of_equal_scores_is_a_point() -> None:
    estimate = bootstrap(np.ones(5))
    assert (estimate.mean, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
