"""Selects data for the warm-up (interface sft): the shortest correct response of the teacher to each problem.

    torchrun --nproc-per-node 2 tools/evaluate.py --benchmark math_label --data prompts.jsonl --output-dir
    responses \\
        --hf-checkpoint TEACHER_DIR --apply-chat-template --samples 8 --temperature 0.6 --top-p 0.95
    python tools/select_responses.py --responses responses --data prompts.jsonl --output warm_up.jsonl
    torchrun ... -m megatron_simct.train --simct-interface sft --prompt-data warm_up.jsonl
    --apply-chat-template ...

The first command samples responses of the teacher and grades them; this one reads its output. A response is
dropped if it is wrong, was cut off, is too short or too long, repeats itself, or is not UTF-8. The defaults
are SimCT's (arXiv:2605.07711): 20 to 4000 characters and a repetition of at most .30. Repetition is the share
of the response's sequences of four words that have occurred in it before. """

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_simct.config.command_line import Parser, command
from megatron_simct.evaluation.benchmarks import CODE, Problem, cut, digest_of, read_problems
from megatron_simct.evaluation.sandbox import SANDBOXES
from megatron_simct.files import read_rows, write_rows

WORDS = 4


@command("select_responses")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.data is not None and options.output.resolve() == Path(options.data).resolve():
        raise ValueError(f"--output {options.output}: is also the file of --data; name another file")
    run = finished_run(options.responses)
    if options.sandbox == "strict" and run["benchmark"] in CODE and not run.get("landlock"):
        raise ValueError(
            f"--sandbox strict: programs in {options.responses} were graded on a kernel without Landlock; "
            "grade them again by tools/evaluate.py --sandbox strict, or accept them by --sandbox auto"
        )
    problems = read_problems(run["benchmark"], options.data)[: run["problems"]]
    if digest_of(problems) != run["problems_sha256"]:
        raise ValueError(f"--data {options.data}: has other problems than {options.responses}")
    rows, counts = select(problems, run, graded(options.responses), options)
    if not rows:
        raise ValueError(f"--responses {options.responses}: no response is left ({shown(counts)})")
    write_rows(options.output, rows)
    print(
        f"{len(rows)} of {len(problems)} problems have a response; {shown(counts)}; written to "
        f"{options.output}"
    )


def finished_run(folder: Path) -> dict[str, Any]:
    """results.json of tools/evaluate.py. ValueError where the folder is not that of a finished run."""
    try:
        run = json.loads((folder / "results.json").read_text())
        missing = {"benchmark", "chat", "problems", "problems_sha256"} - run.keys()
    except (OSError, ValueError, AttributeError) as error:
        missing = {str(error)}
    if missing:
        raise ValueError(
            f"--responses {folder}: not a finished run of tools/evaluate.py (results.json: "
            f"{', '.join(sorted(missing))}); run that command to its end"
        )
    return run


def graded(folder: Path) -> Iterable[tuple[dict[str, Any], dict[str, bool]]]:
    """Every response with what is right of it, in order."""
    for path in sorted((folder / "responses").glob("*.jsonl")):
        grades = read_rows(folder / "grades" / path.name)
        for row, grade in zip(read_rows(path), grades, strict=True):
            yield row, grade["right"]


def select(
    problems: Sequence[Problem],
    run: dict[str, Any],
    responses: Iterable[tuple[dict[str, Any], dict[str, bool]]],
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows to train on, in the order of the problems, and how many responses were kept
    or dropped for what.
    """
    counts: Counter[str] = Counter()
    shortest: dict[str, str] = {}
    for row, right in responses:
        text = row["response"] if run["chat"] else cut(run["benchmark"], row["response"])
        if options.metric is not None and options.metric not in right:
            raise ValueError(f"--metric {options.metric}: the responses were graded by {', '.join(right)}")
        reason = why_not(text, row.get("finish", "stop"), right[options.metric or next(iter(right))], options)
        counts[reason or "right"] += 1
        kept = shortest.get(row["problem_id"])
        if reason is None and (kept is None or len(text) < len(kept)):
            shortest[row["problem_id"]] = text
    rows = []
    for problem in problems:
        if problem.problem_id in shortest:
            asked = problem.chat if run["chat"] else problem.completion
            key = "prompt" if isinstance(asked, str) else "messages"
            rows.append({"id": problem.problem_id, key: asked, "response": shortest[problem.problem_id]})
    return rows, counts


def why_not(text: str, finish: str, right: bool, options: argparse.Namespace) -> str | None:
    """The first reason to drop a response, if there is one."""
    reasons = {
        "wrong": not right,
        "cut off": finish != "stop",
        "not UTF-8": "\ufffd" in text,
        "too short": len(text) < options.min_characters,
        "too long": len(text) > options.max_characters,
        "repetitive": repetition(text) > options.max_repetition,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def repetition(text: str) -> float:
    """The share of its sequences of WORDS words that are not their first occurrence."""
    words = text.split()
    sequences = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def shown(counts: Counter[str]) -> str:
    return "responses: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="select_responses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--responses", type=Path, required=True, metavar="DIR", help="the --output-dir of tools/evaluate.py"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="the file of problems that tools/evaluate.py was given"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines to write; an existing file is replaced",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="grade by which a response is correct; default: the benchmark's first",
    )
    parser.add_argument(
        "--min-characters", type=int, default=20, metavar="N", help="shortest response (default: %(default)s)"
    )
    parser.add_argument(
        "--max-characters",
        type=int,
        default=4000,
        metavar="N",
        help="longest response (default: %(default)s)",
    )
    parser.add_argument(
        "--max-repetition",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="maximum share of repeated sequences of four words (default: %(default)s)",
    )
    parser.add_argument(
        "--sandbox",
        choices=SANDBOXES,
        default="auto",
        help="strict: accept grades of programs only if the kernel kept them from the user's files (default: "
        "%(default)s)",
    )
    return parser
