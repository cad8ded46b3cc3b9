"""Builds the alignment map of two tokenizers (the tokens that both have, compared by their bytes), and
measures how much of a text they cover.

    python tools/build_alignment_map.py --teacher-tokenizer TEACHER_DIR --student-tokenizer STUDENT_DIR \\
        --output maps/teacher_to_student --corpus README.md

A training run reads the folder with --simct-alignment-map; if none is given, it builds the same map itself.
Look at the coverage first: text in multi-token units (1:n, n:1, n:m) is lost to an interface of shared tokens
only.

Then look at the bias: the loss of a student that is already right, under each interface. Teacher and student
are exact models of the most frequent words of the corpus, each with its own tokenizer, so there is nothing to
learn, and the right loss is 0. The next column is the loss of a less sure student, whose true distance is
known. With large vocabularies this takes about a minute. """

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_simct.alignment import (
    AlignmentMap,
    Tokenizer,
    build_alignment_map,
    load_tokenizer,
    report_notes,
)
from megatron_simct.alignment.coverage import KINDS, Coverage, measure_coverage
from megatron_simct.alignment.cut_rules import check, with_continuations
from megatron_simct.alignment.map_files import is_map, placement_balance, save_map, stop_pair
from megatron_simct.config.command_line import Parser, command
from megatron_simct.prompt_files import read_rows

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_simct.preflight.bias import Bias

_PIECE = 1 << 12
"""Characters of a corpus that are tokenized at a time, about those of a response: what two tokenizers spell
differently masks the rest of its piece."""


@command("build_alignment_map")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    report = build(options)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="build_alignment_map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    spec = (
        "Hugging Face folder or tokenizer.json, SentencePiece NAME.model, tiktoken ranks NAME.tiktoken "
        "beside NAME.tiktoken.json, tiktoken:NAME, or Mistral's tekken.json"
    )
    parser.add_argument("--teacher-tokenizer", required=True, metavar="SPEC", help=spec)
    parser.add_argument(
        "--student-tokenizer",
        required=True,
        metavar="SPEC",
        help="the student's tokenizer, in the same forms",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; an earlier map in it is replaced"
    )
    parser.add_argument(
        "--corpus",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files on which coverage is measured: UTF-8 text, or .jsonl with the text under --corpus-key",
    )
    parser.add_argument(
        "--corpus-key", default="text", metavar="KEY", help="key of the text in .jsonl rows (text)"
    )
    for side in ("teacher", "student"):
        parser.add_argument(
            f"--{side}-stop-token-ids",
            type=int,
            nargs="+",
            default=[],
            metavar="ID",
            help=f"token ids that end a response of the {side}, the usual one first; default: those in its "
            "files",
        )
    parser.add_argument(
        "--allow-lossy",
        action="store_true",
        help="accept tokenizers that rewrite or drop text (NFKC, WordPiece), to measure how much of --corpus "
        "they lose; training refuses such tokenizers",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser


def build(options: argparse.Namespace) -> dict[str, object]:
    """Build, measure, write and show; the report. ValueError names the flag."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    output = Path(options.output)
    if output.exists() and not is_map(output) and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: exists and is not an alignment map; give another folder")
    if options.allow_lossy and not options.corpus:
        raise ValueError("--allow-lossy needs --corpus, the text on which the loss is measured")
    student = _load(options.student_tokenizer, options.student_stop_token_ids, "student", options.allow_lossy)
    teacher = _load(options.teacher_tokenizer, options.teacher_stop_token_ids, "teacher", options.allow_lossy)
    with console.status("pairing the two vocabularies"):
        alignment_map = build_alignment_map(student, teacher)
    coverages: dict[str, Coverage] = {}
    texts: list[str] = []
    for name in options.corpus:
        pieces = list(read_corpus(name, options.corpus_key))
        shown = track(
            pieces, description=name, console=console, transient=True, disable=not console.is_terminal
        )
        coverages[name] = measure_coverage(
            shown, student=student, teacher=teacher, alignment_map=alignment_map
        )
        texts += pieces
    biases = _biases(texts, student, teacher, console) if texts else {}
    report = {
        "teacher_tokenizer": teacher.name,
        "student_tokenizer": student.name,
        "num_shared": alignment_map.num_shared,
        "teacher_vocab_size": alignment_map.teacher_vocab_size,
        "student_vocab_size": alignment_map.student_vocab_size,
        "lossy": {side: t.lossy for side, t in (("teacher", teacher), ("student", student)) if t.lossy},
        "stop_pair": stop_pair(alignment_map),
        "placement_balance": {str(size): share for size, share in placement_balance(alignment_map).items()},
        "corpora": [{"file": name, **coverage.as_json()} for name, coverage in coverages.items()],
        "bias_nats_a_word": {name: bias.as_json() for name, bias in biases.items()},
    }
    names = ("teacher_tokenizer", "student_tokenizer", "lossy", "corpora", "bias_nats_a_word")
    description = {name: report[name] for name in names}
    save_map(output, alignment_map, student=student.table, teacher=teacher.table, description=description)
    if not options.json:
        show(alignment_map, student, teacher, coverages, biases, output)
    return report


def _biases(
    texts: Sequence[str], student: Tokenizer, teacher: Tokenizer, console: Console
) -> dict[str, Bias]:
    """By interface; empty where the texts have too few words. ValueError where a text contradicts a
    tokenizer's table of what may follow a token."""
    from rich.progress import Progress

    from megatron_simct.preflight.bias import COMPARED, measure_bias, num_steps, spelled_by, words_of

    language = spelled_by(words_of(texts), student, teacher)
    if len(language) < 2:
        return {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        sides = []
        for side, tokenizer in (("student", student), ("teacher", teacher)):
            task = progress.add_task(
                f"finding the tokens that may follow each token of the {side}", total=None
            )
            sides.append(with_continuations(tokenizer))
            if not tokenizer.lossy:
                check(sides[-1], texts)
            progress.remove_task(task)
        task = progress.add_task("measuring the loss of a student that is already right", total=num_steps())
        found = measure_bias(
            language,
            list(COMPARED.values()),
            student=sides[0],
            teacher=sides[1],
            advance=lambda: progress.advance(task),
        )
    return dict(zip(COMPARED, found, strict=True))


def _load(spec: str, stop_token_ids: list[int], side: str, allow_lossy: bool) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(spec, stop_token_ids, allow_lossy=allow_lossy)
    except ValueError as error:
        raise ValueError(f"--{side}-tokenizer: {error}") from None
    report_notes(tokenizer)
    return tokenizer


def read_corpus(name: str, key: str) -> Iterator[str]:
    """The texts of a file, in pieces that end with a line.

    ValueError naming file and line for what is not a text.
    """
    if not name.endswith(".jsonl"):
        try:
            yield from _pieces(Path(name).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--corpus {name}: not UTF-8 at byte {error.start}") from None
        return
    for where, row in read_rows(name, name=f"--corpus {name}"):
        if key not in row:
            raise ValueError(
                f"{where}: not a JSON object with {key!r}; give the key of the text by --corpus-key"
            )
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: {key!r} must be a string")
        yield from _pieces(row[key])


def _pieces(text: str) -> Iterator[str]:
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def show(
    alignment_map: AlignmentMap,
    student: Tokenizer,
    teacher: Tokenizer,
    coverages: dict[str, Coverage],
    biases: dict[str, Bias],
    output: Path,
) -> None:
    """The same for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    shared = alignment_map.num_shared
    table = Table(box=None, pad_edge=False)
    for title in ("", "tokenizer", "ids", "shared", "stop ids"):
        table.add_column(title, justify="right" if title in ("ids", "shared") else "left", overflow="fold")
    for side, tokenizer in (("teacher", teacher), ("student", student)):
        size = tokenizer.table.num_ids
        sources = tokenizer.stop_sources
        stop_ids = ", ".join(
            f"{i} ({sources[i]})" if i in sources else f"{i}" for i in tokenizer.table.stop_ids
        )
        table.add_row(side, escape(tokenizer.name), f"{size:,}", f"{shared / size:.1%}", stop_ids)
    console.print(f"[bold]{shared:,}[/bold] shared tokens by bytes, in {escape(str(output))}")
    console.print(table)
    balance = ", ".join(f"TP{size} {share:.2f}" for size, share in placement_balance(alignment_map).items())
    console.print(
        f"shared teacher rows on the fullest rank, relative to an even split of the vocabulary: {balance}"
    )
    for side, tokenizer in (("teacher", teacher), ("student", student)):
        if tokenizer.lossy:
            console.print(f"[red]the {side}'s tokenizer is lossy[/red]: {escape(tokenizer.lossy)}")
    if not coverages:
        console.print("no --corpus: coverage of a text and bias of the pair were not measured")
        return
    table = Table(
        box=None, pad_edge=False, title="student tokens by unit, teacher:student", title_justify="left"
    )
    table.add_column("corpus", overflow="fold")
    for title in ("student", "teacher", "units", *(kind.replace("_", ":") for kind in KINDS), "bytes lost"):
        table.add_column(title, justify="right")
    for name, coverage in coverages.items():
        table.add_row(
            escape(name),
            f"{coverage.student_tokens:,}",
            f"{coverage.teacher_tokens:,}",
            f"{coverage.units:,}",
            *(f"{coverage.student_token_shares[kind]:.1%}" for kind in KINDS),
            f"{coverage.as_json()['share_lost']:.1%}",
        )
    console.print(table)
    for name, coverage in coverages.items():
        units = ", ".join(
            f"{unit['text']!r} {unit['teacher_tokens']}:{unit['student_tokens']}"
            for unit in coverage.longest_units
        )
        console.print(f"longest units of {escape(name)}: {escape(units)}")
    if not biases:
        return
    some = next(iter(biases.values()))
    title = f"loss in nats a word, on the corpus's {some.words:,} most frequent words"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("interface")
    for heading in ("student already right", f"less sure, distance {some.true:.3f} away"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, bias in biases.items():
        colour = "yellow" if bias.is_large else "green"
        note = "the less sure student is preferred" if bias.is_large and bias.prefers_the_flattened else ""
        table.add_row(name, f"[{colour}]{bias.perfect:.5f}[/{colour}]", f"{bias.flattened:.4f}", note)
    console.print(table)
