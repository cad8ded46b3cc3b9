"""The README's reference, options and metrics as the code has them. `python -m tests.reference` puts it there."""

from __future__ import annotations

import typing
from pathlib import Path

from megatron_simct.arguments import SERVE_TEACHER, TRAIN, Command, Option, options
from megatron_simct.files import write_whole
from megatron_simct.monitoring import METRICS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- reference: written by `python -m tests.reference` -->\n"
END = "<!-- end of the reference -->\n"


def reference() -> str:
    """What stands between BEGIN and END."""
    parts = [BEGIN, *_section("Options of `megatron_simct.train`", _options(TRAIN))]
    parts += _section("Options of `megatron_simct.serve_teacher`", _options(SERVE_TEACHER))
    rows = [f"| `{name}` | {unit} | {_escaped(meaning)} |" for name, (unit, meaning) in METRICS.items()]
    parts += _section("Metrics", ["| name | unit | meaning |", "|---|---|---|", *rows])
    return "\n".join(parts) + END


def with_reference(text: str) -> str:
    """The README with the reference in its place."""
    before, rest = text.split(BEGIN)
    return before + reference() + rest.split(END)[1]


def _section(title: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{title.replace('`', '')}</summary>", "", *lines, "", "</details>", ""]


def _options(command: Command) -> list[str]:
    lines: list[str] = []
    groups = typing.get_type_hints(command.config)
    group = ""
    for option in options(command.config):
        if option.group != group:
            group = option.group
            doc = " ".join((groups[group].__doc__ or "").split())
            lines += ["", f"**{group}**: {_escaped(doc)}", "", "| flag | value | default | |", "|---|---|---|---|"]
        default = "" if option.default in (None, ()) else f"`{option.default}`"
        lines.append(f"| `{option.flag}` | {_value(option)} | {default} | {_escaped(option.help)} |")
    return lines[1:]


def _value(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    value = "flag" if option.kind is bool else option.metavar or option.kind.__name__
    return f"{value} ..." if option.many else value


def _escaped(text: str) -> str:
    for mark, code in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*")):
        text = text.replace(mark, code)
    return text


if __name__ == "__main__":
    write_whole(README, with_reference(README.read_text(encoding="utf-8")))
