"""docs/reference.md: options and metrics from the code. `python tools/reference.py` writes it."""

from __future__ import annotations

import typing
from pathlib import Path

from megatron_simct.config.flags import SERVE_TEACHER, TRAIN, Command, Option, options
from megatron_simct.files import write_whole
from megatron_simct.reporting.monitor import METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
_TOP = """# Reference

Every option of the two jobs, and every name in `metrics.jsonl`.

<!-- Written by `python tools/reference.py`. -->
"""


def reference() -> str:
    """The whole page."""
    parts = [_TOP, *_section("Options of `megatron_simct.train`", _options(TRAIN))]
    parts += _section("Options of `megatron_simct.serve_teacher`", _options(SERVE_TEACHER))
    rows = [f"| `{name}` | {unit} | {_escaped(meaning)} |" for name, (unit, meaning) in METRICS.items()]
    parts += _section("Metrics", ["| name | unit | meaning |", "|---|---|---|", *rows])
    return "\n".join(parts)


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _options(command: Command) -> list[str]:
    lines: list[str] = []
    groups = typing.get_type_hints(command.config)
    group = ""
    for option in options(command.config):
        if option.group != group:
            group = option.group
            doc = " ".join((groups[group].__doc__ or "").split())
            lines += [
                "",
                f"**{group}**: {_escaped(doc)}",
                "",
                "| flag | value | default | |",
                "|---|---|---|---|",
            ]
        default = "" if option.default in (None, ()) else f"`{option.default}`"
        lines.append(f"| `{option.flag}` | {_value(option)} | {default} | {_escaped(option.help)} |")
    return lines[1:]


def _value(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    value = "flag" if option.kind is bool else option.metavar or option.kind.__name__
    return f"{value} ..." if option.many else value


def _escaped(text: str) -> str:
    for mark, code in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", "; ")):
        text = text.replace(mark, code)
    return text


if __name__ == "__main__":
    write_whole(PAGE, reference())
