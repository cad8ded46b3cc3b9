"""Speed and correctness of the alignment of two tokenizations: ours, SimCT's released walk, TRL's GOLD.

    python tools/benchmark/alignment.py    # real pairs and texts, fetched (some 160 MB)
    python tools/benchmark/alignment.py --pair TEACHER STUDENT --corpus FILE ...    # your own
    python tools/benchmark/alignment.py --overlap    # shared vocabularies beside published figures

Speed is student plus teacher tokens a second on one core, from ids to segments. Retokenization is measured
separately. Every figure is the best of several repeats. The methods take turns, so ratios within one run are
comparable. The right units of a text are the gaps between all common token ends, up to the first byte at
which the two spellings differ.

TRL's GOLD is measured if the package `trl` is installed (extra `benchmark`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_simct.alignment import Tokenizer, align, align_batch, build_alignment_map, load_tokenizer
from megatron_simct.alignment.alignment_map import released_map
from tools.benchmark import real_inputs

OVERLAPS = {
    ("llama3-hf", "qwen2.5"): 0.8481,
    ("qwen2.5", "gemma3"): 0.6320,
    ("llama3-hf", "gemma3"): 0.6739,
    ("qwen2.5", "gpt4o"): 0.6462,
    ("llama3-hf", "gpt4o"): 0.7977,
    ("gpt4o", "gemma3"): 0.6545,
}
"""Shared tokens over the smaller vocabulary, as NVIDIA published it for Llama-3, Qwen, Gemma-3 and
Phi-4-mini. Phi-4-mini's vocabulary is taken as gpt4o's (o200k) here. NVIDIA's may be of other revisions.
"""
DEFAULT_PAIRS = [
    ("llama3", "qwen2.5"),
    ("qwen2.5", "gemma2"),
    ("gemma3", "qwen2.5"),
    ("mistral-v3", "tekken"),
]
Method = Callable[[np.ndarray, np.ndarray], object]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One method on one shape of input."""

    pair: str
    method: str
    shape: str
    tokens: int
    """Tokens of both sides."""
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Correctness:
    """One method on all texts of one kind."""

    pair: str
    method: str
    text: str
    coverage: float
    """Share of the bytes in right units, among the bytes up to the place where the two spellings differ."""
    wrong_units: int
    """Units whose two sides are not the same piece of the text."""
    units_over_ideal: float
    """Number of right units over the number of gaps between common token ends."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.overlap:
        return show_overlaps()
    try:
        pairs = [(_load(t), _load(s)) for t, s in options.pair or DEFAULT_PAIRS]
        texts = _texts(options.corpus)
    except (ValueError, OSError, real_inputs.Unavailable) as error:
        print(f"alignment benchmark: error: {error}", file=sys.stderr)
        return 1
    speeds, checks, retokenization = [], [], {}
    for teacher, student in pairs:
        name = f"{_short(teacher)} -> {_short(student)}"
        print(f"measuring {name}", file=sys.stderr, flush=True)
        speeds += measure_speed(name, teacher, student, texts, options.repeats)
        checks += check(name, teacher, student, texts)
        retokenization[name] = measure_retokenization(teacher, texts)
    report = {
        "speed": [asdict(speed) for speed in speeds],
        "ratios": ratios(speeds),
        "retokenization_tokens_per_second": retokenization,
        "correctness": [asdict(row) for row in checks],
        "gold": _gold_status(),
    }
    print(json.dumps(report) if options.json else "", end="")
    if not options.json:
        show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignment benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(real_inputs.TOKENIZERS)
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("TEACHER", "STUDENT"),
        help=f"tokenizers: a file or folder, or one of {names}; may be given several times",
    )
    parser.add_argument(
        "--corpus", nargs="+", default=[], metavar="FILE", help="UTF-8 texts instead of the fetched ones"
    )
    parser.add_argument("--repeats", type=int, default=7, help="repeats of each measurement; the best counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="only the shared vocabularies of six pairs, by bytes and by strings, beside NVIDIA's published "
        "figures",
    )
    return parser


def overlap(one: Tokenizer, other: Tokenizer) -> tuple[int, float]:
    """Number of tokens of equal bytes, and their share of the smaller vocabulary, with special ids."""
    shared = build_alignment_map(one, other).num_shared
    return shared, shared / min(one.table.num_ids, other.table.num_ids)


def show_overlaps() -> int:
    """Exit code; 1 if no tokenizer is available."""
    found = 0
    for (one, other), published in OVERLAPS.items():
        try:
            sides = [real_inputs.tokenizer(name) for name in (one, other)]
        except real_inputs.Unavailable as error:
            print(f"{one} and {other}: {error}", file=sys.stderr)
            continue
        shared, share = overlap(*sides)
        by_strings = released_map(*sides).num_shared / min(side.table.num_ids for side in sides)
        print(
            f"{one:9} {other:8} {shared:7,} by bytes {share:.4f}, by strings {by_strings:.4f}, "
            f"published {published:.4f}"
        )
        found += 1
    return int(found == 0)


def _load(spec: str) -> Tokenizer:
    return real_inputs.tokenizer(spec) if spec in real_inputs.TOKENIZERS else load_tokenizer(spec)


def _short(tokenizer: Tokenizer) -> str:
    path = Path(tokenizer.name)
    known = (
        [n for n in real_inputs.TOKENIZERS if real_inputs.tokenizer_path(n) == path] if path.is_file() else []
    )
    return known[0] if known else f"{path.parent.name}/{path.name}"


def _texts(files: Sequence[str]) -> dict[str, list[bytes]]:
    if files:
        return {name: [Path(name).read_text(encoding="utf-8").encode()] for name in files}
    found = {}
    for name, read in real_inputs.TEXTS.items():
        try:
            found[name] = [text.encode() for text in read()]
        except real_inputs.Unavailable as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def methods(teacher: Tokenizer, student: Tokenizer) -> dict[str, Method]:
    """Name -> (teacher ids, student ids) -> segments [A, 4], or the method's own kind of result."""

    def ours(t: np.ndarray, s: np.ndarray) -> np.ndarray:
        return align(teacher.table, t, student.table, s).segments

    def walk(t: np.ndarray, s: np.ndarray) -> np.ndarray:
        return align(teacher.table, t, student.table, s, segmentation="authors").segments

    found: dict[str, Method] = {"ours": ours, "released walk": walk}
    gold = _gold()
    if gold is not None:
        lengths = [side.table.lengths.tolist() for side in (teacher, student)]

        def trl(t: np.ndarray, s: np.ndarray) -> np.ndarray:
            groups_s, groups_t = gold(_offsets(s.tolist(), lengths[1]), _offsets(t.tolist(), lengths[0]))
            return np.array(
                [
                    (t[0], t[-1] + 1, s[0], s[-1] + 1)
                    for s, t in zip(groups_s, groups_t, strict=True)
                    if s and t
                ]
            )

        found["TRL GOLD"] = trl
    return found


def _offsets(ids: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(lengths[i] for i in ids))
    return list(zip([0, *ends], ends, strict=False))


def _gold() -> Callable[..., tuple[list[list[int]], list[list[int]]]] | None:
    """TRL's grouping of two lists of byte offsets.

    It gets the bytes of each token, which it derives by itself in TRL.
    """
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError:
        return None
    return getattr(ULDLoss, "_align_by_byte_offsets", None)


def _gold_status() -> str:
    try:
        import trl
    except ImportError:
        return "not measured: the package trl is not installed"
    return (
        f"trl {trl.__version__}"
        if _gold() is not None
        else f"not measured: trl {trl.__version__} has no such helper"
    )


def measure_speed(
    name: str, teacher: Tokenizer, student: Tokenizer, texts: dict[str, list[bytes]], repeats: int
) -> list[Speed]:
    """Speed for one call of 200 and of 2,000 student tokens, a batch of 64 x 200, and
    one response of 128k.
    """
    text = b"\n".join(piece for pieces in texts.values() for piece in pieces)
    text *= 1 + 600_000 // len(text)
    rows = []
    for shape, size, batch in (
        ("1 x 200", 200, 1),
        ("1 x 2,000", 2000, 1),
        ("64 x 200", 200, 64),
        ("1 x 128k", 131_072, 1),
    ):
        samples = [cut(text[i * 997 :], size, teacher, student) for i in range(batch)]
        tokens = sum(len(t) + len(s) for t, s in samples)
        calls = methods(teacher, student)
        if size > 10_000:
            calls = {"ours": calls["ours"]}
        runs = {method: _calls(call, samples) for method, call in calls.items()}
        if batch > 1:
            teacher_ids, student_ids = [t for t, _ in samples], [s for _, s in samples]
            runs["ours"] = partial(align_batch, teacher.table, teacher_ids, student.table, student_ids)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(repeats):
            for method, run in runs.items():
                # some milliseconds, like the others
                inner = max(1, 200_000 // tokens) if method == "ours" else 1
                start = time.perf_counter()
                for _ in range(inner):
                    run()
                best[method] = min(best[method], (time.perf_counter() - start) / inner)
        rows += [
            Speed(pair=name, method=method, shape=shape, tokens=tokens, tokens_per_second=tokens / seconds)
            for method, seconds in best.items()
        ]
    return rows


def _calls(call: Method, samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Callable[[], object]:
    def run() -> None:
        for t, s in samples:
            call(t, s)

    return run


def cut(text: bytes, size: int, teacher: Tokenizer, student: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Teacher and student ids of the first `size` student tokens, up to a whole character."""
    data = student.decode(student.encode(text[: 12 * size])[:size])
    data = data.decode(errors="ignore").encode()
    return teacher.encode(data), student.encode(data)


def measure_retokenization(teacher: Tokenizer, texts: dict[str, list[bytes]]) -> float:
    """Teacher tokens a second of the teacher's own library, for the responses of all texts."""
    pieces = [piece for group in texts.values() for piece in group]
    start = time.perf_counter()
    tokens = sum(len(teacher.encode(piece)) for piece in pieces)
    return tokens / (time.perf_counter() - start)


def check(
    name: str, teacher: Tokenizer, student: Tokenizer, texts: dict[str, list[bytes]]
) -> list[Correctness]:
    """Compare each method's units with those that plain Python finds."""
    rows = []
    pieces = [side.table.pieces() for side in (teacher, student)]
    for text, group in texts.items():
        for method, call in methods(teacher, student).items():
            right = wrong = ideal = covered = shared = 0
            for data in group:
                t, s = teacher.encode(data), student.encode(data)
                sides = [[p[i] for i in ids] for p, ids in zip(pieces, (t, s), strict=True)]
                bytes_t, bytes_s = (b"".join(side) for side in sides)
                starts_t, starts_s = ([0, *accumulate(map(len, side))] for side in sides)
                size = min(len(bytes_t), len(bytes_s))
                common = next((i for i in range(size) if bytes_t[i] != bytes_s[i]), size)
                bounds = sorted(b for b in set(starts_t) & set(starts_s) if b <= common)
                gaps = set(zip(bounds[:-1], bounds[1:], strict=True))
                for ts, te, ss, se in np.asarray(call(t, s)).reshape(-1, 4).tolist():
                    span, other = (starts_s[ss], starts_s[se]), (starts_t[ts], starts_t[te])
                    same = span == other and bytes_s[slice(*span)] == bytes_t[slice(*other)]
                    wrong += not same
                    right += same and span in gaps
                    covered += (span[1] - span[0]) * same
                ideal += len(gaps)
                shared += bounds[-1]
            rows.append(
                Correctness(
                    pair=name,
                    method=method,
                    text=text,
                    coverage=covered / max(shared, 1),
                    wrong_units=wrong,
                    units_over_ideal=right / max(ideal, 1),
                )
            )
    return rows


def ratios(speeds: Sequence[Speed]) -> dict[str, float]:
    """How many times faster ours is than each other method, for each shape; the smallest ratio over pairs."""
    found: dict[str, float] = {}
    ours = {(s.pair, s.shape): s.tokens_per_second for s in speeds if s.method == "ours"}
    for speed in speeds:
        if speed.method != "ours":
            key = f"ours / {speed.method}, {speed.shape}"
            ratio = ours[speed.pair, speed.shape] / speed.tokens_per_second
            found[key] = min(found.get(key, ratio), ratio)
    return found


def show(report: dict) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="million tokens a second, both sides", title_justify="left", box=None)
    shapes = list(dict.fromkeys(row["shape"] for row in report["speed"]))
    for title in ("pair", "method", *shapes):
        table.add_column(title, justify="right" if title in shapes else "left")
    for pair, method in dict.fromkeys((row["pair"], row["method"]) for row in report["speed"]):
        values = {
            r["shape"]: r["tokens_per_second"]
            for r in report["speed"]
            if (r["pair"], r["method"]) == (pair, method)
        }
        table.add_row(pair, method, *(f"{values[s] / 1e6:.2f}" if s in values else "" for s in shapes))
    console.print(table)
    for name, ratio in report["ratios"].items():
        console.print(f"{name}: at least {ratio:.1f}x")
    for name, speed in report["retokenization_tokens_per_second"].items():
        console.print(f"retokenization {name}: {speed / 1e6:.2f} M teacher tokens a second")
    table = Table(title="right units", title_justify="left", box=None)
    for title in ("pair", "text", "method", "coverage", "wrong units", "units / ideal"):
        table.add_column(title, justify="left" if title in ("pair", "text", "method") else "right")
    for row in report["correctness"]:
        numbers = f"{row['coverage']:.3f}", f"{row['wrong_units']:,}", f"{row['units_over_ideal']:.3f}"
        table.add_row(row["pair"], row["text"], row["method"], *numbers)
    console.print(table)
    console.print(f"TRL GOLD: {report['gold']}")


if __name__ == "__main__":
    sys.exit(main())
