"""A mixture of prompts for --prompt-data, from files of several formats: what is kept, and what is dropped and why.

    python tools/prepare_prompts.py --mixture examples/prompts/paper_10k.yaml --data-root DATA --output-dir prompts \\
        --hf-checkpoint STUDENT_DIR --teacher-hf-checkpoint TEACHER_DIR --apply-chat-template

Files are JSON lines (.jsonl, also .gz), a JSON list (.json), Parquet (.parquet) or Arrow (.arrow). The mixture is a
YAML file: `seed`, `size`, `exclude` and a list of `sources`, each with

    name, path              the path under --data-root; a list of paths is read as one
    count or weight         rows to take, or the share of `size`; neither: all rows
    prompt_key              a column of texts (default: prompt)
    messages_key            a column of conversations, for a source without prompt_key; a closing answer of the
                            assistant becomes the row's response
    label_key               a column with the expected answer, for evaluation; label_pattern: its part, a group of a
                            regular expression
    response_key            a column with a given response, for sft
    suffix                  a text behind each prompt
    min_chars, max_chars    of the prompt

`exclude` names files, such as test sets, whose prompts must not be taken: a list of {path, prompt_key}. The same
mixture, seed and files give the same rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if __package__ in (None, ""):  # a script of a checkout, which needs no installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_simct.command_line import Parser, command  # noqa: E402  isort: skip  (before what takes seconds to load)
import numpy as np  # noqa: E402
import yaml  # noqa: E402

from megatron_simct.alignment import Tokenizer, load_tokenizer  # noqa: E402
from megatron_simct.config import ModelConfig  # noqa: E402
from megatron_simct.data.rendering import ChatTemplate, render_prompt  # noqa: E402
from megatron_simct.files import write_whole  # noqa: E402

OUTPUT, REPORT = "prompts.jsonl", "report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `sources`; the fields are its keys."""

    name: str
    path: str | list[str]
    count: int | None = None
    weight: float | None = None
    prompt_key: str | None = None
    messages_key: str | None = None
    label_key: str | None = None
    label_pattern: str | None = None
    response_key: str | None = None
    suffix: str = ""
    min_chars: int = 1
    max_chars: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excluded:
    """One entry of `exclude`."""

    path: str
    prompt_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The YAML file."""

    sources: list[Source]
    seed: int = 1234
    size: int | None = None
    exclude: list[Excluded] = dataclasses.field(default_factory=list)


class Dropped(Exception):
    """Why a row is not taken."""


@command("prepare_prompts")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    folder = Path(options.output_dir)
    if (folder / OUTPUT).exists():
        raise ValueError(f"--output-dir {folder}: has a {OUTPUT} already; nothing is overwritten")
    if options.max_prompt_len < 1:
        raise ValueError(f"--max-prompt-len {options.max_prompt_len}: must be at least 1")
    mixture = read_mixture(options.mixture)
    rows, report = mix(mixture, Path(options.data_root), renderers(options), options.max_prompt_len)
    report["mixture"] = dataclasses.asdict(mixture)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    report["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_whole(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / OUTPUT, text)
    show(report, folder)


# The mixture


def read_mixture(path: str) -> Mixture:
    """ValueError, naming the file and the key, for whatever has no meaning."""
    where = f"--mixture {path}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if isinstance(content, dict):
        for key, kind, name in (("sources", Source, "source"), ("exclude", Excluded, "exclude")):
            if isinstance(content.get(key), list):
                content[key] = [_filled(kind, x, f"{where}: {name} {i}") for i, x in enumerate(content[key], start=1)]
    mixture = _filled(Mixture, content, where)
    if not mixture.sources:
        raise ValueError(f"{where}: sources is no list of sources")
    if mixture.seed < 0:
        raise ValueError(f"{where}: seed {mixture.seed}: must be at least 0")
    for source in mixture.sources:
        name = f"{where}: source {source.name}"
        if source.count is not None and source.weight is not None:
            raise ValueError(f"{name} has count and weight; one of them says how much of it is taken")
        if source.weight is not None and mixture.size is None:
            raise ValueError(f"{name} has a weight, and there is no size that it is a share of")
        if source.weight is None and source.count is None and mixture.size is not None:
            raise ValueError(f"{name} has no count and no weight, and the mixture has a size")
        if source.prompt_key is not None and source.messages_key is not None:
            raise ValueError(f"{name} has prompt_key and messages_key; a prompt is one of them")
        if not all(value is None or value > 0 for value in (source.count, source.weight)):
            raise ValueError(f"{name}: count and weight must be above 0")
        if not source.path:
            raise ValueError(f"{name}: path names no file")
        try:
            groups = re.compile(source.label_pattern or "()").groups
        except re.error as error:
            raise ValueError(f"{name}: label_pattern is no regular expression ({error})") from None
        if not groups:
            raise ValueError(f"{name}: label_pattern {source.label_pattern!r} has no group; put the label in ( )")
        if source.label_pattern is not None and source.label_key is None:
            raise ValueError(f"{name} has a label_pattern, and no label_key that it is a part of")
    if len({source.name for source in mixture.sources}) < len(mixture.sources):
        raise ValueError(f"{where}: two sources have one name")
    counted, weighted = sum(s.count or 0 for s in mixture.sources), any(s.weight for s in mixture.sources)
    if mixture.size is not None and (counted > mixture.size or (counted < mixture.size and not weighted)):
        raise ValueError(f"{where}: the counts make {counted}, and the size is {mixture.size}")
    return mixture


def _filled(kind: type, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys and values")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in content and not _is_a(content[field.name], types[field.name]):
            value, expected = content[field.name], str(field.type).removesuffix(" | None")
            raise ValueError(f"{where}: {field.name} {value!r}: expected {expected}")
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).split(') ', 1)[-1].replace('keyword-only argument', 'key')}") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of a field's type: a whole number is a float too, true and false are no numbers."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_a(value, one) for one in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def wanted_counts(mixture: Mixture) -> dict[str, int | None]:
    """Rows of each source; None: all. Weights share, by largest remainders, what counts leave of the size."""
    counts: dict[str, int | None] = {source.name: source.count for source in mixture.sources}
    weights = {source.name: source.weight for source in mixture.sources if source.weight is not None}
    if weights:
        assert mixture.size is not None, "a weight without a size was refused"
        left = mixture.size - sum(count for count in counts.values() if count is not None)
        shares = {name: max(0, left) * weight / sum(weights.values()) for name, weight in weights.items()}
        whole = {name: int(share) for name, share in shares.items()}
        for name in sorted(shares, key=lambda name: int(shares[name]) - shares[name]):
            if sum(whole.values()) < left:
                whole[name] += 1
        counts |= whole
    return counts


def mix(
    mixture: Mixture, root: Path, render: dict[str, Callable[[Any], int]], max_prompt_len: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows in their final order, and the report. A source is looked at in a random order until it has enough."""
    excluded: set[bytes] = set()
    for entry in mixture.exclude:
        source = Source(name="exclude", path=entry.path, prompt_key=entry.prompt_key)
        found = set()
        for row in read_files(source, root):
            with contextlib.suppress(Dropped):  # a row without a prompt excludes none
                found.add(fingerprint(_prompt_of(row, source)[0]))
        if not found:
            raise ValueError(
                f"--mixture: exclude {entry.path}: no row has a {entry.prompt_key or 'prompt'}, so it excludes nothing"
                "; prompt_key names the column"
            )
        excluded |= found
    seen: set[bytes] = set()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"sources": {}}
    wanted = wanted_counts(mixture)
    for source in mixture.sources:
        source_rows = list(read_files(source, root))
        order = np.random.default_rng([mixture.seed, zlib.crc32(source.name.encode())]).permutation(len(source_rows))
        kept: list[dict[str, Any]] = []
        dropped = Counter[str]()
        for number in _counted(order.tolist(), source.name):
            if len(kept) == wanted[source.name]:
                break
            try:
                row = clean(source_rows[number], source)
                key = fingerprint(_prompt_of(source_rows[number], source)[0])
                if key in excluded:
                    raise Dropped("excluded")
                if key in seen:
                    raise Dropped("duplicate")
                for side, length in render.items():
                    row[f"{side}_tokens"] = length(row["prompt"] if "prompt" in row else row["messages"])
                    if row[f"{side}_tokens"] > max_prompt_len:
                        raise Dropped(f"too long for the {side}")
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            seen.add(key)
            kept.append({"id": f"{source.name}/{number}", "source": source.name} | row)
        report["sources"][source.name] = {
            "rows": len(source_rows),
            "looked_at": len(kept) + sum(dropped.values()),
            "wanted": wanted[source.name],
            "kept": len(kept),
            "dropped": dict(dropped.most_common()),
        }
        rows += kept
    if not rows:
        reasons = Counter[str]()
        for counts in report["sources"].values():
            reasons.update(counts["dropped"])
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "its files are empty"
        number = sum(counts["rows"] for counts in report["sources"].values())
        raise ValueError(f"--mixture: nothing is left of {number} rows: {why}")
    order = np.random.default_rng(mixture.seed).permutation(len(rows))
    report["rows"] = len(rows)
    return [rows[i] for i in order], report


def _counted(items: Sequence[int], name: str) -> Iterable[int]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(items, description=name, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


# Rows


def clean(fields: dict[str, Any], source: Source) -> dict[str, Any]:
    """prompt or messages, and label and response where the source has them. Dropped, with the reason."""
    prompt, response = _prompt_of(fields, source)
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    if len(text.strip()) < source.min_chars:
        raise Dropped("too few characters" if text.strip() else "empty")
    if source.max_chars is not None and len(text) > source.max_chars:
        raise Dropped("too many characters")
    if source.suffix:
        if isinstance(prompt, str):
            prompt += source.suffix
        else:
            prompt = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + source.suffix}]
    row: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt}
    if source.response_key is not None:
        response = fields.get(source.response_key)
        if not isinstance(response, str) or not response:
            raise Dropped(f"no {source.response_key}")
    if response is not None:
        row["response"] = response
    if source.label_key is not None:
        row["label"] = _label(fields.get(source.label_key), source)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Dropped("half a surrogate pair") from None
    return row


def _prompt_of(fields: dict[str, Any], source: Source) -> tuple[str | list[dict[str, str]], str | None]:
    """The prompt, a text or messages that end with the user's, and the assistant's answer to them if there is one."""
    key = source.messages_key
    if key is None and source.prompt_key is None and "prompt" not in fields:
        key = "messages"
    if key is None:
        prompt = fields.get(source.prompt_key or "prompt")
        if isinstance(prompt, str):
            return prompt, None
        key = source.prompt_key or "prompt"
    messages = fields.get(key)
    if not isinstance(messages, list) or not messages:
        raise Dropped(f"no {key}")
    if not all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages):
        raise Dropped("messages without role and content")
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise Dropped("messages that do not end with the user's")
    return messages, response


def _label(value: Any, source: Source) -> str:
    label = value if isinstance(value, str) else json.dumps(value) if isinstance(value, int | float) else None
    if label is not None and source.label_pattern is not None:
        found = re.search(source.label_pattern, label)
        label = found[1] if found else None
    if not label:
        raise Dropped(f"no {source.label_key}")
    return label


def fingerprint(prompt: str | list[dict[str, str]]) -> bytes:
    """Of a prompt whatever its case and blanks, and whether it is a text or the user's one message."""
    text = prompt if isinstance(prompt, str) else "\0".join(message["content"] for message in prompt)
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(errors="replace"), digest_size=16).digest()


# Files


def read_files(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    """All rows of a source. ValueError, naming it and the file, for one that cannot be read."""
    for name in [source.path] if isinstance(source.path, str) else source.path:
        path = root / name
        try:
            yield from _read(path)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"--data-root: source {source.name}: {path}: {reason}") from None


def _read(path: Path) -> Iterable[dict[str, Any]]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".parquet", ".arrow"):
        return _read_arrow(path, kind)
    if kind not in (".jsonl", ".json"):
        raise ValueError("the format is told by the name: .jsonl, .json (also .gz), .parquet or .arrow")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows: Any = []
    for above, part in enumerate([text] if kind == ".json" else text.split("\n")):
        try:
            rows += [json.loads(part)] if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {above + error.lineno}: not JSON ({error.msg})") from None
    rows = rows[0] if rows and kind == ".json" else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds something else than objects")
    return rows


def _read_arrow(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("needs the package pyarrow: pip install pyarrow==26.0.1") from None
    with open(path, "rb") as file:
        if kind == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches()
        else:  # a stream, as the library `datasets` writes it, or a file with an index
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in batches:
            yield from batch.to_pylist()


# Tokens


def renderers(options: argparse.Namespace) -> dict[str, Callable[[Any], int]]:
    """For each model that is named, how many tokens a prompt has as it reads it. Dropped where its template refuses."""
    sides = {
        "student": (ModelConfig(hf_checkpoint=options.hf_checkpoint, tokenizer_model=options.tokenizer_model), ""),
        "teacher": (
            ModelConfig(hf_checkpoint=options.teacher_hf_checkpoint, tokenizer_model=options.teacher_tokenizer_model),
            "teacher-",
        ),
    }
    if options.apply_chat_template and all(model.hf_checkpoint is None for model, _ in sides.values()):
        raise ValueError(
            "--apply-chat-template: needs --hf-checkpoint or --teacher-hf-checkpoint, whose template it is"
        )
    found: dict[str, Callable[[Any], int]] = {}
    for side, (model, prefix) in sides.items():
        if model.hf_checkpoint is None and model.tokenizer_model is None:
            continue
        if model.tokenizer is None:
            raise ValueError(f"--{prefix}hf-checkpoint {model.hf_checkpoint}: has no tokenizer")
        try:
            tokenizer = load_tokenizer(model.tokenizer, ())
        except ValueError as error:
            raise ValueError(f"--{prefix}tokenizer-model: {error}") from None
        template = None
        if options.apply_chat_template:
            if model.hf_checkpoint is None or tokenizer.encode_chat is None:
                raise ValueError(f"--apply-chat-template: needs --{prefix}hf-checkpoint with a tokenizer.json")
            template = ChatTemplate.load(model.hf_checkpoint, flag=f"--{prefix}hf-checkpoint")
        found[side] = _renderer(tokenizer, template, side)
    return found


def _renderer(tokenizer: Tokenizer, template: ChatTemplate | None, side: str) -> Callable[[Any], int]:
    def length(prompt: str | list[dict[str, str]]) -> int:
        if template is None:
            if not isinstance(prompt, str):
                raise ValueError("messages need --apply-chat-template, here as in training")
            return len(render_prompt(prompt, tokenizer))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return len(template.render(messages, tokenizer))
        except ValueError:
            raise Dropped(f"refused by the {side}'s template") from None

    return length


# The command line


def show(report: dict[str, Any], folder: Path) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("source", "rows", "looked at", "wanted", "kept", "dropped", title=f"{report['rows']} prompts")
    for name, source in report["sources"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items())
        short = source["wanted"] is not None and source["kept"] < source["wanted"]
        kept = f"[red]{source['kept']}[/red]" if short else str(source["kept"])
        wanted = "all" if source["wanted"] is None else str(source["wanted"])
        table.add_row(escape(name), str(source["rows"]), str(source["looked_at"]), wanted, kept, escape(reasons))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"written to {folder / OUTPUT} and {folder / REPORT}", soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prepare_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mixture", required=True, metavar="FILE", help="YAML file of sources")
    parser.add_argument("--data-root", default=".", metavar="DIR", help="where paths begin (default: here)")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help=f"gets {OUTPUT} and {REPORT}")
    parser.add_argument("--hf-checkpoint", metavar="DIR", help="the student's folder: tokenizer and chat template")
    parser.add_argument("--teacher-hf-checkpoint", metavar="DIR", help="the teacher's")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="the student's tokenizer, if it is another")
    parser.add_argument("--teacher-tokenizer-model", metavar="FILE", help="the teacher's")
    parser.add_argument("--apply-chat-template", action="store_true", help="count tokens as both templates write them")
    parser.add_argument(
        "--max-prompt-len", type=int, default=2048, metavar="N", help="tokens of either model (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
