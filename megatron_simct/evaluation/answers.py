"""The answer in a response: the text outside its thinking, its program, and its final
number as plain text.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""Opening and closing marks of a thinking block in published chat templates. The first
pair is the default.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """The marks that a model puts around its thinking."""

    start: str = MARKS[0][0]
    end: str = MARKS[0][1]
    in_prompt: bool = False
    """Whether the prompt ends with `start`, so that a response begins inside the block."""


def find_thinking(template: str, prompt: str, marks: Sequence[str] | None = None) -> Thinking:
    """The given marks; else those in the chat template; else the default ones.

    `prompt` is a prompt that the template has rendered. Without a template, an empty opening mark means that
    prompts end with one.
    """
    start, end = marks or next(
        (pair for pair in MARKS if pair[0] in template or pair[1] in template), MARKS[0]
    )
    return Thinking(
        start=start, end=end, in_prompt=prompt.rstrip().endswith(start) if template else not start
    )


def answer_of(response: str, thinking: Thinking) -> str | None:
    """The response without its thinking blocks. None if one of them is not closed: the answer
    would come after it.

    A response may begin inside a block that the prompt opened. Then its first closing mark has no
    opening mark before it.
    """
    first_end = response.find(thinking.end)
    first_start = response.find(thinking.start) if thinking.start else -1
    began_inside = thinking.in_prompt or (first_end >= 0 and not 0 <= first_start < first_end)
    if began_inside and first_end < 0:
        return None
    at = first_end + len(thinking.end) if began_inside else 0
    outside = []
    while thinking.start and (start := response.find(thinking.start, at)) >= 0:
        outside.append(response[at:start])
        end = response.find(thinking.end, start + len(thinking.start))
        if end < 0:
            return None
        at = end + len(thinking.end)
    # If a block is closed twice, it ends at the second mark.
    return "".join([*outside, response[at:]]).rpartition(thinking.end)[2]


# Programs

_PYTHON = ("python", "python3", "py", "py3", "ipython")
_LANGUAGE = re.compile(r"[{.\s]*([\w+#-]*)")
_LOOSE_FENCE = re.compile(r"```(?:([^\n`]*)\n)?(.*?)(?:\n?```|\Z)", re.DOTALL)
"""Fences at any place in a line. CommonMark does not allow them, but models write them."""

Block = tuple[str, str]
"""The language of a fence, in lower case or empty, and the code in it."""


def program_of(text: str, names: Collection[str]) -> str:
    """The program in an answer: the last of its code blocks that defines one of these names, or else the
    last one in Python.

    Blocks without a language count as Python if no block names it. A text without blocks is a
    program as a whole.
    """
    choices: tuple[Callable[[Block], bool], ...] = (
        lambda block: block[0] in ("", *_PYTHON) and _defines(block[1], names),
        lambda block: block[0] in _PYTHON,
        lambda block: not block[0],
        lambda block: True,
    )
    fenced, loose = _fenced_blocks(text), _loose_blocks(text)
    for chosen in choices:
        for blocks in (fenced, loose):
            found = [code for language, code in blocks if chosen((language, code))]
            if found:
                return found[-1]
    return text


def _defines(code: str, names: Collection[str]) -> bool:
    any_of = "|".join(map(re.escape, names))
    defined = rf"^[ \t]*(async[ \t]+def|def|class)[ \t]+({any_of})\b|^({any_of})[ \t]*(:[^=\n]*)?=(?!=)"
    return bool(names) and re.search(defined, code, re.MULTILINE) is not None


def _fenced_blocks(text: str) -> list[Block]:
    """The fences of CommonMark, also in lists and quotations."""
    blocks = []
    for token in _markdown().parse(text):
        if token.type == "fence" and token.content.strip():
            code = token.content
            assert token.map is not None, "a block has lines"
            lines = code.count("\n") + (not code.endswith("\n"))
            if token.map[1] - token.map[0] == lines + 1:
                # Nothing closes it. The closing fence may follow the last line of the code.
                code = re.split(rf"{re.escape(token.markup)}[ \t]*$", code, maxsplit=1, flags=re.MULTILINE)[0]
            blocks.append((_language(token.info), code))
    return blocks


@cache
def _markdown() -> Any:
    """The block rules of Markdown that can contain a fence, and no others.

    HTML is off, because a fence below a line `<answer>` would not be a fence. Code by indentation alone is
    off, because a fence with too much indentation would not be one.
    """
    from markdown_it import MarkdownIt

    return MarkdownIt("zero").enable(["fence", "list", "blockquote"])


def _loose_blocks(text: str) -> list[Block]:
    return [(_language(info), code) for info, code in _LOOSE_FENCE.findall(text) if code.strip()]


def _language(info: str) -> str:
    found = _LANGUAGE.match(info)
    return found[1].lower() if found else ""


def called_functions(tests: Collection[str]) -> set[str]:
    """The names of functions that some lines of Python call. Python's own are left out
    if others are called.
    """
    found: set[str] = set()
    for test in tests:
        try:
            nodes = list(ast.walk(ast.parse(test)))
        except (SyntaxError, ValueError, RecursionError):
            continue
        found |= {
            node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
    return found - set(dir(builtins)) or found


# Numbers

_MINUS = re.compile("[\u2212\ufe63\uff0d]|(?<![\\w)\\]}])[\u2010-\u2013](?=[\\d.\\\\$])")
"""Minus signs, and hyphens and dashes before a number that are its sign."""
_MATH_OR_EMPHASIS = re.compile(
    r"(?<![\w*_\\`)\]}])(?P<mark>\*{1,3}|__|`)(?![\s*_`])(?P<inside>[^\n]{1,300}?)(?<![\s*_`\\])(?P=mark)(?![\w*_`])"
    r"|\$(?! )(?:\\.|[^$\n\\]){1,1000}(?<! )\$(?!\d)|\\\(.{0,1000}?\\\)|\\\[.{0,1000}?\\\]",
    re.DOTALL,
)
"""Emphasis, or mathematics, which is kept.

The lengths are bounded: otherwise a text of marks alone takes minutes.
"""


def plain_math(text: str) -> str:
    """The text with ASCII minus signs and without Markdown emphasis, in which
    Math-Verify finds no numbers.
    """
    text = _MINUS.sub("-", text)
    return _MATH_OR_EMPHASIS.sub(lambda found: found["inside"] if found["mark"] else found[0], text)
