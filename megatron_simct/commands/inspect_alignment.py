"""Shows how two tokenizers split one text, and the units that they have in common.

    python tools/inspect_alignment.py --teacher-tokenizer SPEC --student-tokenizer SPEC \
        (--text T | --text-file F) [--format terminal|html|json] [--output F]

The student's tokenizer encodes the text; the teacher's tokenizer encodes the bytes of the student's tokens,
as in training. Without --output the result goes to standard output. The page of --format html needs no other
file and no network. """

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_simct.alignment import Tokenizer, align, load_tokenizer
from megatron_simct.alignment.tokenizer import readable
from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

KINDS = ("1:1", "1:n", "n:1", "n:m")
"""Teacher tokens : student tokens."""


def inspect(teacher: Tokenizer, student: Tokenizer, data: bytes) -> dict[str, Any]:
    """The alignment of `data`: segments, ids, dropped bytes by reason, and for display units
    with kinds and bytes.
    """
    student_ids = student.encode(data)
    spelled = student.decode(student_ids)
    teacher_ids = teacher.encode(spelled)
    found = align(teacher.table, teacher_ids, student.table, student_ids)

    def tokens(tokenizer: Tokenizer, ids: np.ndarray) -> list[dict[str, Any]]:
        return [{"id": int(i), "text": readable(tokenizer.table.bytes_of(int(i)))} for i in ids]

    units = []
    for ts, te, ss, se in found.segments.tolist():
        content = student.decode(student_ids[ss:se])
        units.append(
            {
                "kind": KINDS[2 * (te - ts > 1) + (se - ss > 1)],
                "text": readable(content),
                "bytes": content.hex(" "),
                "teacher": tokens(teacher, teacher_ids[ts:te]),
                "student": tokens(student, student_ids[ss:se]),
            }
        )
    covered = int(found.byte_ends[-1]) if found.byte_ends.size else 0
    return {
        "segments": found.segments.tolist(),
        "teacher_ids": teacher_ids.tolist(),
        "student_ids": student_ids.tolist(),
        "dropped": found.dropped,
        "bytes_not_encoded": len(data) - len(spelled),
        "units": units,
        "rest": readable(data[covered:]),
        "counts": {kind: sum(unit["kind"] == kind for unit in units) for kind in KINDS},
    }


def as_terminal(result: dict[str, Any], *, colours: bool) -> str:
    """Units between bars, in the colour of their kind; without colours those that are not
    1:1 stand in brackets.
    """
    from rich.console import Console
    from rich.text import Text

    styles = dict(zip(KINDS, ("green", "black on yellow", "black on cyan", "white on magenta"), strict=True))
    console = Console(highlight=False, force_terminal=colours, no_color=not colours)
    text = Text()
    for unit in result["units"]:
        plain = unit["kind"] == "1:1" or colours
        text.append(unit["text"] if plain else f"[{unit['text']}]", styles[unit["kind"]])
        text.append("│", "dim")
    text.append(result["rest"], "strike red")
    legend = Text("\n\n")
    for kind in KINDS:
        legend.append(f" {kind} ", styles[kind]).append(f" {result['counts'][kind]}   ")
    dropped = ", ".join(f"{count} ({reason})" for reason, count in result["dropped"].items()) or "0"
    legend.append(f"bytes outside all units: {dropped}")
    legend.append("\nteacher tokens : student tokens of a unit", "dim")
    with console.capture() as capture:
        console.print(text + legend)
    return capture.get()


def as_html(result: dict[str, Any], teacher: str, student: str) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        Path(__file__).with_name("inspect_alignment.html").read_text(encoding="utf-8")
    )
    return template.render(result=result, kinds=KINDS, teacher=teacher, student=student)


@command("inspect_alignment")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.output is not None and options.text_file is not None:
        if Path(options.output).resolve() == Path(options.text_file).resolve():
            raise ValueError(
                f"--output {options.output}: is also the file of --text-file; choose another path"
            )
    data = os.fsencode(options.text) if options.text is not None else Path(options.text_file).read_bytes()
    teacher = _load(options.teacher_tokenizer, "teacher")
    student = _load(options.student_tokenizer, "student")
    result = inspect(teacher, student, data)
    match options.format:
        case "html":
            output = as_html(result, teacher.name, student.name)
        case "json":
            output = json.dumps(result, ensure_ascii=False) + "\n"
        case _:
            colours = options.output is None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            output = as_terminal(result, colours=colours)
    if options.output is not None:
        write_whole(Path(options.output), output)
        print(f"written: {options.output}")
    else:
        sys.stdout.write(output)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="inspect_alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    spec = (
        "Hugging Face folder or tokenizer.json, SentencePiece NAME.model, tiktoken ranks, tiktoken:NAME, "
        "tekken.json"
    )
    parser.add_argument("--teacher-tokenizer", required=True, metavar="SPEC", help=spec)
    parser.add_argument(
        "--student-tokenizer",
        required=True,
        metavar="SPEC",
        help="the student's tokenizer, in the same forms",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="T", help="text to align")
    source.add_argument(
        "--text-file", metavar="F", help="file with the text; the comparison ends at bytes that are not UTF-8"
    )
    parser.add_argument(
        "--format",
        choices=("terminal", "html", "json"),
        default="terminal",
        help="terminal: a colour for each kind of unit; html: a page with details and filters; json: "
        "segments and ids",
    )
    parser.add_argument("--output", metavar="F", help="file to write; standard output if not given")
    return parser


def _load(spec: str, side: str) -> Tokenizer:
    try:
        return load_tokenizer(spec)
    except ValueError as error:
        raise ValueError(f"--{side}-tokenizer: {error}") from None
