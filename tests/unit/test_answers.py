"""The answer in a response: outside its thinking, in its code blocks, as a plain number."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_simct.alignment import Tokenizer, load_tokenizer
from megatron_simct.commands import evaluate, select_responses
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.evaluation.answers import (
    MARKS,
    Thinking,
    answer_of,
    called_functions,
    find_thinking,
    plain_math,
    program_of,
)
from megatron_simct.evaluation.benchmarks import Problem, read_problems
from megatron_simct.evaluation.grading import Grader, asked_functions
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits
from megatron_simct.loading import open_thinking
from megatron_simct.records import Rollout
from megatron_simct.rollout.held_out import response_text, special_marks
from tests.huggingface import save_byte_level

# Thinking


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A response, and its answer."""

    name: str
    response: str
    answer: str | None
    thinking: Thinking = field(default_factory=Thinking)


IN_PROMPT = Thinking(in_prompt=True)
THOUGHTS = [
    Thought(name="no thinking", response="It is 4.", answer="It is 4."),
    Thought(name="a closed block", response="<think>Perhaps 7.</think>It is 4.", answer="It is 4."),
    Thought(name="an open block", response="<think>Perhaps 4. But", answer=None),
    Thought(name="an opening mark alone", response="<think>", answer=None),
    Thought(name="nothing behind the block", response="<think>It is 4.</think>", answer=""),
    Thought(name="an empty block", response="<think>\n\n</think>\n\nIt is 4.", answer="\n\nIt is 4."),
    Thought(
        name="words before the block", response="Well. <think>7?</think>It is 4.", answer="Well. It is 4."
    ),
    Thought(name="two blocks", response="<think>7?</think>It is <think>5?</think>4.", answer="It is 4."),
    Thought(
        name="an answer between two blocks",
        response="<think>7?</think>It is 4.<think>5?</think>",
        answer="It is 4.",
    ),
    Thought(name="the second block is open", response="<think>7?</think>It is 4.<think>Or 5", answer=None),
    Thought(
        name="a block within a block", response="<think>a<think>b</think>7</think>It is 4.", answer="It is 4."
    ),
    Thought(name="the prompt opened it", response="Perhaps 7.</think>It is 4.", answer="It is 4."),
    Thought(
        name="the prompt opened it, and one follows",
        response="7?</think>It is <think>5</think>4.",
        answer="It is 4.",
    ),
    Thought(
        name="the prompt opened it, and it stays open",
        response="Perhaps 4. But",
        answer=None,
        thinking=IN_PROMPT,
    ),
    Thought(name="opened twice", response="<think>7?</think>It is 4.", answer="It is 4.", thinking=IN_PROMPT),
    Thought(name="closed at once", response="</think>It is 4.", answer="It is 4.", thinking=IN_PROMPT),
    Thought(
        name="other marks",
        response="[THINK]7?[/THINK]It is 4, not <think>.",
        answer="It is 4, not <think>.",
        thinking=Thinking(start="[THINK]", end="[/THINK]"),
    ),
    Thought(
        name="other marks, open",
        response="[THINK]4",
        answer=None,
        thinking=Thinking(start="[THINK]", end="[/THINK]"),
    ),
    Thought(
        name="no opening mark, as responses of other programs have them",
        response="Perhaps 4. But",
        answer=None,
        thinking=Thinking(start="", in_prompt=True),
    ),
]


@pytest.mark.parametrize("case", THOUGHTS, ids=lambda case: case.name)
def test_an_answer_stands_outside_of_the_thinking(case: Thought) -> None:
    assert answer_of(case.response, case.thinking) == case.answer


def test_marks_are_those_of_the_template() -> None:
    assert find_thinking("{{ messages }}", "a") == Thinking()
    for start, end in MARKS:
        template = "{{ message.content.split('" + end + "')[-1] }}"
        assert find_thinking(template, "a") == Thinking(start=start, end=end)
        assert find_thinking(template, f"a{start}\n").in_prompt
        assert not find_thinking(template, f"a{start}\n\n{end}\n\n").in_prompt
    assert find_thinking("", "", ("<a>", "</a>")) == Thinking(start="<a>", end="</a>")
    assert find_thinking("x [/THINK]", "a <a>", ("<a>", "</a>")) == Thinking(
        start="<a>", end="</a>", in_prompt=True
    )
    assert find_thinking("", "", ("", "</a>")).in_prompt


def chat_folder(folder: Path, generation: str) -> ChatTemplate:
    """A folder whose template begins answers with this text."""
    save_byte_level(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    loop = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": loop + generation}))
    return ChatTemplate.load(str(folder), flag="--hf-checkpoint")


@pytest.mark.parametrize(
    "generation, thinking",
    [
        ("assistant\n", Thinking()),
        ("assistant\n<think>\n", Thinking(in_prompt=True)),
        ("assistant\n<think>\n\n</think>\n\n", Thinking()),
        ("assistant\n<seed:think>", Thinking(start="<seed:think>", end="</seed:think>", in_prompt=True)),
        ("{{ raise_exception('no') }}</think>", Thinking()),
    ],
)
def test_a_template_says_how_its_model_thinks(tmp_path: Path, generation: str, thinking: Thinking) -> None:
    assert open_thinking(chat_folder(tmp_path, generation)) == thinking
    assert open_thinking(None) == Thinking()


def rollout(ids: list[int], finish: Literal["stop", "length"]) -> Rollout:
    logprobs = np.zeros(len(ids), np.float32)
    return Rollout(
        sample_id=0, weight_version=0, student_ids=np.array(ids, np.int32), logprobs=logprobs, finish=finish
    )


def test_marks_that_are_special_tokens_are_written(tmp_path: Path) -> None:
    """A special token has no bytes: without its text a thinking block would be part of the answer."""
    save_byte_level(tmp_path)
    tokenizer: Tokenizer = load_tokenizer(str(tmp_path))
    start, end = "<|im_start|>", "<tool>"  # one special token, and one ordinary text
    marks = special_marks(tokenizer, (start, end, ""))
    (start_id,) = marks
    assert marks == {start_id: start} and tokenizer.table.special[start_id]
    ids = [start_id, *tokenizer.encode(b"7?"), *tokenizer.encode_chat(end), *tokenizer.encode(b"It is 4.")]
    stop = tokenizer.table.stop_ids[0]
    assert response_text(rollout([*ids, stop], "stop"), tokenizer, marks) == "<|im_start|>7?<tool>It is 4."
    assert response_text(rollout(ids, "length"), tokenizer, {}) == "7?<tool>It is 4."


# Programs

GOOD = "def f(x):\n    return x * x"
DRAFT = "def f(x):\n    return x + x"


def indented(code: str, by: str) -> str:
    return textwrap.indent(code, by, lambda line: True)


def fence(code: str, *, mark: str = "```", info: str = "python") -> str:
    return f"{mark}{info}\n{code}\n{mark}"


STYLES: dict[str, Callable[[str], str]] = {
    "backticks": fence,
    "words around": lambda code: f"Here it is:\n\n{fence(code)}\n\nIt squares.",
    "no language": lambda code: fence(code, info=""),
    "py": lambda code: fence(code, info="py"),
    "Python3 and more": lambda code: fence(code, info="Python3 title=a.py"),
    "braces": lambda code: fence(code, info="{.python}"),
    "a blank before the language": lambda code: fence(code, info=" python"),
    "tildes": lambda code: fence(code, mark="~~~"),
    "four backticks": lambda code: fence(code, mark="````"),
    "backticks within tildes": lambda code: fence(f"# ```\n{code}", mark="~~~~"),
    "in a list": lambda code: f"1. Square it:\n\n{indented(fence(code), '   ')}\n\n2. Done.",
    "right below a list's item": lambda code: f"- Square it:\n{indented(fence(code), '  ')}",
    "in a list, indented by four": lambda code: f"1. Square it:\n\n{indented(fence(code), '    ')}",
    "in a list, indented too far": lambda code: f"- Square it:\n\n{indented(fence(code), '      ')}",
    "in a list within a list": lambda code: f"- a\n  - b\n\n{indented(fence(code), '    ')}\n",
    "in a quotation": lambda code: indented(f"Square it:\n{fence(code)}", "> "),
    "below a tag": lambda code: f"<answer>\n{fence(code)}\n</answer>",
    "never closed": lambda code: f"Here:\n```python\n{code}",
    "closed behind the last line": lambda code: f"```python\n{code}```\nIt squares.",
    "opened behind words": lambda code: f"Here: {fence(code)}\nIt squares.",
    "behind thinking": lambda code: f"<think>\n{fence(DRAFT)}\nNo.\n</think>\n\n{fence(code)}",
    "behind a draft": lambda code: f"{fence(DRAFT)}\n\nBetter:\n\n{fence(code)}",
    "before a call": lambda code: f"{fence(code)}\n\nUse it:\n\n{fence('assert True')}",
    "before its output": lambda code: f"{fence(code)}\n\nIt prints:\n\n{fence('9', info='')}",
    "behind a shell's command": lambda code: f"{fence('pip install numpy', info='bash')}\n\n{fence(code)}",
    "before a shell's command": lambda code: f"{fence(code)}\n\n{fence('python a.py', info='sh')}",
    "no fence": lambda code: code,
}


@pytest.mark.parametrize("style", STYLES)
def test_a_program_is_found_in_every_style(style: str) -> None:
    text = answer_of(STYLES[style](GOOD), Thinking())
    assert text is not None
    scope: dict[str, Any] = {}
    exec(program_of(text, {"f"}), scope)
    assert scope["f"](3) == 9


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A response with several blocks, and the block that is its program."""

    name: str
    text: str
    program: str
    names: frozenset[str] = frozenset({"f"})


NONE = frozenset[str]()
BLOCKS = [
    Blocks(
        name="the last that defines it", text=f"{fence(GOOD)}\n{fence(DRAFT)}\n{fence('f(3)')}", program=DRAFT
    ),
    Blocks(name="a class", text=f"{fence('class f: pass')}\n{fence('f()')}", program="class f: pass"),
    Blocks(
        name="a method",
        text=f"{fence('class S:' + chr(10) + '  def f(self): 1')}\n{fence('S()')}",
        program="class S:\n  def f(self): 1",
    ),
    Blocks(name="an assignment", text=f"{fence('f = len')}\n{fence('f(x)')}", program="f = len"),
    Blocks(
        name="not a name that begins like it",
        text=f"{fence('def fg(): 1')}\n{fence('g = 2')}",
        program="g = 2",
    ),
    Blocks(
        name="not a comparison", text=f"{fence('def g(): 1')}\n{fence('f == 2')}\n{fence('3')}", program="3"
    ),
    Blocks(name="no function is asked for", text=f"{fence('1')}\n{fence('2')}", program="2", names=NONE),
    Blocks(
        name="Python before no language", text=f"{fence('1')}\n{fence('2', info='')}", program="1", names=NONE
    ),
    Blocks(
        name="no language before another",
        text=f"{fence('1', info='')}\n{fence('2', info='text')}",
        program="1",
    ),
    Blocks(name="another language alone", text=fence("1", info="java"), program="1"),
    Blocks(
        name="another language that defines it", text=f"{fence('f = 1', info='r')}\n{fence('2')}", program="2"
    ),
    Blocks(name="an empty block", text=f"{fence('1')}\n{fence('')}", program="1", names=NONE),
]


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_of_several_blocks_the_program_is(case: Blocks) -> None:
    assert program_of(case.text, case.names).rstrip("\n") == case.program


def test_the_functions_that_tests_call() -> None:
    tests = [
        "assert set(similar(1, (2,))) == set((4,))",
        "assert abs(area(2) - 1) < .1",
        "assert (",
        "x = math.pi()",
    ]
    assert called_functions(tests) == {"similar", "area"}
    assert called_functions(["assert sum(10, 15) == 6"]) == {"sum"}, (
        "a task may ask for a function of this name"
    )


def test_the_function_that_a_benchmark_asks_for() -> None:
    assert asked_functions("humaneval", {"entry_point": "f"}) == {"f"}
    assert asked_functions("mbpp", {"test_list": ["assert f(3) == 9"]}) == {"f"}
    assert asked_functions("livecodebench", {"metadata": '{"func_name": "f"}'}) == {"f"}
    assert asked_functions("livecodebench", {"metadata": "{}"}) == set()


SQUARES = [
    {"task_id": 1, "prompt": "Square a number.", "test_list": ["assert f(3) == 9"]},
    {"task_id": 2, "prompt": "Find a root.", "test_list": ["assert root(9) == 3", "assert root(10) == 3"]},
    {"task_id": 3, "prompt": "Count words.", "test_list": ["assert Counted().words('a b') == 2"]},
]
SOLUTIONS = [
    (GOOD, DRAFT),
    ("import math\n\n\ndef root(x):\n  return math.isqrt(x)", "def root(x):\n  return 4"),
    ("class Counted:\n\n    def words(self, text):\n        return len(text.split())", "class Counted: pass"),
]


@pytest.mark.parametrize("style", STYLES)
def test_a_solution_keeps_its_verdict_in_every_style(tmp_path: Path, style: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps(SQUARES))
    grader = Grader("mbpp", never_asked, chat=True, limits=Limits(cpu_s=2))
    problems = read_problems("mbpp", str(tmp_path / "data.json"))
    for problem, (good, bad) in zip(problems, SOLUTIONS, strict=True):
        assert grader.grade(problem, STYLES[style](good)) == {"pass": True}
        assert grader.grade(problem, STYLES[style](bad)) == {"pass": False}


def never_asked(gold: str, response: str) -> bool:
    raise AssertionError("no numbers to compare")


# Numbers


@dataclass(frozen=True, kw_only=True)
class Number:
    """A label, a response, and whether the response is right."""

    label: str
    response: str
    right: bool = True


NUMBERS = [
    Number(label="73", response="905 and 234 are too much.\n\n---\n\n✅ Final Answer: **73**"),
    Number(label="73", response="✅ Final Answer: **74**", right=False),
    Number(label="73", response="The answer is **73**, not 905."),
    Number(label="905", response="The answer is **73**, not 905.", right=False),
    Number(label="73", response="It is ***73***"),
    Number(label="73", response="It is *73*."),
    Number(label="73", response="It is __73__."),
    Number(label="73", response="It is `73`."),
    Number(label="73", response="**$73$**"),
    Number(label="73", response="**\\boxed{73}**"),
    Number(label="\\frac{1}{2}", response="**1/2**"),
    Number(label="-3", response="It is \u22123."),
    Number(label="3", response="It is \u22123.", right=False),
    Number(label="-3", response="It is **\u22123**."),
    Number(label="-3", response="It is \uff0d3."),
    Number(label="-3", response="It is \u20133."),
    Number(label="-3", response="It is $\\boxed{\u20133}$."),
    Number(label="\u22123", response="It is -3."),
    Number(label="-1/2", response="**\u22121/2**"),
    Number(label="4", response="<think>\nProbably 7.\n</think>\n\nThe answer is $4$."),
    Number(
        label="4", response="<think>\nThe final answer is 4. But let me count again, because", right=False
    ),
    Number(label="7", response="<think>\nProbably 7.\n</think>\n\nThe answer is $4$.", right=False),
    Number(label="4", response="Probably 7.\n</think>\n\n4"),
]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    """One process for all tests: it takes seconds to start."""
    verifier = MathVerifier()
    yield verifier
    verifier.close()


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: f"{case.label} {case.response[-24:]}")
def test_the_final_number_of_a_response(verifier: MathVerifier, case: Number) -> None:
    fields = {"label": case.label}
    problem = Problem(problem_id="a", chat="?", completion="?", fields=fields)
    grader = Grader("math_label", verifier, chat=True)
    assert grader.grade(problem, case.response) == {"math_verify": case.right}


@pytest.mark.parametrize(
    "text",
    [
        "2**3 and 4**5",
        "(x)**2 + (y)**2",
        "2 ** 3 ** 4",
        "$a_1 *b* c_2$",
        "\\(x *y* z\\)",
        "\\[f(*a*)\\]",
        "snake_case_name",
        "pages 3\u20135",
        "* one\n* two",
        "x\u2013y",
    ],
)
def test_what_is_no_emphasis_and_no_sign_stays(text: str) -> None:
    assert plain_math(text) == text


def test_the_expressions_of_gsm8k_read_the_answer_as_it_is(verifier: MathVerifier) -> None:
    """They are lm-evaluation-harness's own expressions: no emphasis is removed and no sign
    is changed for them.
    """
    problem = Problem(problem_id="a", chat="?", completion="?", fields={"answer": "x\n#### -3"})
    grader = Grader("gsm8k", verifier, chat=True)
    names = ("math_verify", "strict_match", "flexible_extract")
    for response, right in (
        ("#### -3", (True, True, True)),
        ("#### \u22123", (True, False, False)),
        ("#### **-3**", (True, False, True)),
        ("<think>#### 5</think>#### -3", (True, True, True)),
        ("<think>#### -3", (False, False, False)),
    ):
        assert grader.grade(problem, response) == dict(zip(names, right, strict=True))


def test_the_label_of_exact_match_is_the_whole_response() -> None:
    problem = Problem(problem_id="a", chat="?", completion="?", fields={"label": "<think>7?</think>4"})
    grader = Grader("exact_match", never_asked, chat=True)
    assert grader.grade(problem, "<think>7?</think>4") == {"exact_match": True}
    assert grader.grade(problem, "4") == {"exact_match": False}


# tools/evaluate.py, and the selection from its output


def graded(folder: Path, responses: list[str], *flags: str) -> list[bool]:
    """Whether tools/evaluate.py finds each response right; every label is 4."""
    rows = [{"id": i, "prompt": f"2 + 2? ({i})", "label": 4} for i in range(len(responses))]
    given = [{"problem_id": i, "response": response} for i, response in enumerate(responses)]
    for name, content in (("data.json", rows), ("given.json", given)):
        (folder / name).write_text(json.dumps(content))
    argv = [
        "--benchmark",
        "math_label",
        "--data",
        str(folder / "data.json"),
        "--chat-responses",
        "--workers",
        "1",
    ]
    argv += ["--responses", str(folder / "given.json"), "--output-dir", str(folder / "out"), *flags]
    assert evaluate.main(argv) == 0
    lines = (folder / "out" / "grades" / "000000.jsonl").read_text().splitlines()
    return [json.loads(line)["right"]["math_verify"] for line in lines]


RESPONSES = ["<think>7?</think>It is 4.", "<think>It is 4.", "It is 4.", "<r>7?</r>It is 4.", "<r>It is 4."]


@pytest.mark.parametrize(
    "flags, right",
    [
        ((), [True, False, True, True, True]),
        (("--think-marks", "<think>", "</think>"), [True, False, True, True, True]),
        (("--think-marks", "<r>", "</r>"), [True, True, True, True, False]),
        (("--think-marks", "", "</think>"), [True, False, False, False, False]),
    ],
)
def test_marks_of_given_responses(tmp_path: Path, flags: tuple[str, ...], right: list[bool]) -> None:
    assert graded(tmp_path, RESPONSES, *flags) == right


def test_a_response_whose_thinking_is_not_closed_is_not_selected(tmp_path: Path) -> None:
    assert graded(tmp_path, RESPONSES) == [True, False, True, True, True]
    output = tmp_path / "warm_up.jsonl"
    argv = [
        "--responses",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "data.json"),
        "--output",
        str(output),
    ]
    assert select_responses.main([*argv, "--min-characters", "1"]) == 0
    selected = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["response"] for row in selected] == [RESPONSES[0], *RESPONSES[2:]]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--think-marks", "<a>", "<a>"), "the closing mark must differ from the opening one"),
        (("--think-marks", "<a>", ""), "the closing mark must differ"),
        (
            ("--think-marks", "<a>", "</a>", "--benchmark", "exact_match"),
            "exact_match compares whole responses",
        ),
        (("--think-marks", "", "</a>", "--hf-checkpoint", "x"), "--think-marks '': is for --responses only"),
    ],
)
def test_marks_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    argv = ["--benchmark", "gsm8k", "--data", "x", "--output-dir", str(tmp_path), *flags]
    argv += [] if "--hf-checkpoint" in flags else ["--responses", "x"]
    assert evaluate.main(argv) == 1
    assert message in capsys.readouterr().err
