"""The process that calls a user's function: JSON lines, arguments on its input, answers on its output.

    python -m megatron_simct.evaluation.function_worker MODULE:FUNCTION PARENT_PID

The function's output goes to the log. The process ends with its parent, also in the middle of a call.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_simct.evaluation.confined import die_with


def main(place: str, parent: int) -> None:
    die_with(parent)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # no output of the function comes between the answers
    try:
        function = find(place)
    except Exception as error:
        _answer(answers, problem=_said(error))
        return
    _answer(answers, value=None)
    for line in sys.stdin:
        try:
            _answer(answers, value=function(*json.loads(line)))
        except Exception as error:  # also of a value that is neither JSON nor a number
            _answer(answers, problem=_said(error))


def find(place: str) -> Callable[..., Any]:
    """The function at MODULE:FUNCTION. `python -m` also finds modules of the working directory."""
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def _answer(answers: Any, **fields: Any) -> None:
    answers.write(json.dumps(fields, default=float) + "\n")
    answers.flush()


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
