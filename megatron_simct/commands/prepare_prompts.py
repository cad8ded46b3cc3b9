"""Mixes prompts for --prompt-data from files of several formats, and reports which rows were dropped and why.

    python tools/prepare_prompts.py --mixture examples/prompts/paper_10k.yaml --data-root DATA --output-dir
    prompts \\
        --hf-checkpoint STUDENT_DIR --teacher-hf-checkpoint TEACHER_DIR --apply-chat-template

Files are JSON lines or a JSON list, also packed by gzip, Parquet (.parquet) or Arrow (.arrow). The mixture is
a YAML file: `seed`, `size`, `exclude` and a list of `sources`, each with

    name, path              the path under --data-root; a list of paths is read as one file
    count or weight         rows to take, or the share of `size`; neither: all rows
    prompt_key              a column of texts (default: prompt)
    messages_key            a column of conversations, for a source without prompt_key; a closing answer of
                            the assistant becomes the row's response
    label_key               a column with the expected answer, for evaluation; label_pattern: its part, a
                            group of a regular expression
    response_key            a column with a given response, for sft
    suffix                  a text appended to each prompt
    teacher_messages_key    a column with the conversation or text that the teacher reads instead of the
                            prompt
    teacher_system          a system message for the teacher only
    teacher_suffix          a text appended to the prompt for the teacher only, such as a hint; in both
                            texts {NAME} is replaced by the row's column NAME
    teacher                 the name of the teacher that scores the rows, with --teachers; default: the
                            row's column teacher or teachers, if it has one
    min_chars, max_chars    length of the prompt

`exclude` is a list of {path, prompt_key}: prompts of these files, such as test sets, are left out. The same
mixture, seed and files give the same rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from megatron_simct.alignment import Tokenizer, load_tokenizer, report_notes
from megatron_simct.alignment.hf_folder import locate_tokenizer
from megatron_simct.alignment.templates import TemplateLimit
from megatron_simct.config.command_line import Parser, command
from megatron_simct.config.options import ModelConfig
from megatron_simct.data.rendering import ChatTemplate, read_date, render_prompt
from megatron_simct.files import write_whole
from megatron_simct.prompt_files import (
    CONVERSATION_KEYS,
    TEACHER_KEYS,
    Message,
    RowError,
    label_of,
    prompt_of,
    read_rows,
    response_of,
    teacher_prompt_of,
)

OUTPUT, REPORT = "prompts.jsonl", "report.json"
_COLUMN = re.compile(r"\{(\w+)\}")
MAX_REASONS, MAX_SHOWN, MAX_REASON = 20, 3, 300
"""How many reasons of templates the report keeps of a source, how many of them are printed,
characters of each.
"""


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
    teacher_messages_key: str | None = None
    teacher_system: str | None = None
    teacher_suffix: str | None = None
    teacher: str | None = None
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
    """Why a row is not taken, and what the template that refuses it says."""

    def __init__(self, reason: str, said: str | None = None) -> None:
        super().__init__(reason)
        self.said = said


@command("prepare_prompts")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    folder = Path(options.output_dir)
    if (folder / OUTPUT).exists():
        raise ValueError(f"--output-dir {folder}: has a {OUTPUT} already; nothing is overwritten")
    if options.max_prompt_len < 1:
        raise ValueError(f"--max-prompt-len {options.max_prompt_len}: must be at least 1")
    mixture = read_mixture(options.mixture)
    _check_templates(options)
    rows, report = mix(mixture, Path(options.data_root), renderers(options), options.max_prompt_len)
    report["mixture"] = dataclasses.asdict(mixture)
    if options.apply_chat_template:
        names = ("chat_template_date", "chat_template_kwargs", "teacher_chat_template_kwargs")
        report["chat_template"] = {name: getattr(options, name) for name in names}
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
    except (yaml.YAMLError, ValueError) as error:  # an invalid date raises ValueError, not YAMLError
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if isinstance(content, dict):
        for key, kind, name in (("sources", Source, "source"), ("exclude", Excluded, "exclude")):
            if isinstance(content.get(key), list):
                content[key] = [
                    _filled(kind, x, f"{where}: {name} {i}") for i, x in enumerate(content[key], start=1)
                ]
    mixture = _filled(Mixture, content, where)
    if not mixture.sources:
        raise ValueError(f"{where}: sources must be a list of sources")
    if mixture.seed < 0:
        raise ValueError(f"{where}: seed {mixture.seed}: must be at least 0")
    for source in mixture.sources:
        name = f"{where}: source {source.name}"
        if source.count is not None and source.weight is not None:
            raise ValueError(f"{name} has both count and weight; give one of them")
        if source.weight is not None and mixture.size is None:
            raise ValueError(f"{name} has a weight, but the mixture has no size; give size, or a count")
        if source.weight is None and source.count is None and mixture.size is not None:
            raise ValueError(
                f"{name} has neither count nor weight, but the mixture has a size; give one of them"
            )
        if source.prompt_key is not None and source.messages_key is not None:
            raise ValueError(f"{name} has both prompt_key and messages_key; give one of them")
        if (
            source.teacher_messages_key is not None
            and (source.teacher_system or source.teacher_suffix) is not None
        ):
            raise ValueError(
                f"{name} has teacher_messages_key together with teacher_system or teacher_suffix; leave one "
                "out"
            )
        if not all(value is None or value > 0 for value in (source.count, source.weight)):
            raise ValueError(f"{name}: count and weight must be above 0")
        if not source.path:
            raise ValueError(f"{name}: path is empty")
        try:
            groups = re.compile(source.label_pattern or "()").groups
        except re.error as error:
            raise ValueError(f"{name}: label_pattern is not a regular expression ({error})") from None
        if not groups:
            raise ValueError(
                f"{name}: label_pattern {source.label_pattern!r} has no group; put parentheses around the "
                "label"
            )
        if source.label_pattern is not None and source.label_key is None:
            raise ValueError(f"{name} has a label_pattern but no label_key")
    if len({source.name for source in mixture.sources}) < len(mixture.sources):
        raise ValueError(f"{where}: two sources have the same name")
    counted, weighted = sum(s.count or 0 for s in mixture.sources), any(s.weight for s in mixture.sources)
    if mixture.size is not None and (counted > mixture.size or (counted < mixture.size and not weighted)):
        raise ValueError(f"{where}: the counts add up to {counted}, but size is {mixture.size}")
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
        raise ValueError(
            f"{where}: {str(error).split(') ', 1)[-1].replace('keyword-only argument', 'key')}"
        ) from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of a field's type: a whole number is a float too, true and
    false are no numbers.
    """
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
    """The rows in their final order, and the report.

    A source is looked at in a random order until it has enough.
    """
    excluded: set[bytes] = set()
    for entry in mixture.exclude:
        source = Source(name="exclude", path=entry.path, prompt_key=entry.prompt_key)
        found = set()
        for row in read_files(source, root):
            with contextlib.suppress(Dropped):  # a row without a prompt excludes none
                found.add(fingerprint(_prompt_of(row, source)[0]))
        if not found:
            raise ValueError(
                f"--mixture: exclude {entry.path}: no row has the key {entry.prompt_key or 'prompt'}, so it "
                "excludes nothing; give the column by prompt_key"
            )
        excluded |= found
    seen: set[bytes] = set()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"sources": {}}
    wanted = wanted_counts(mixture)
    for source in mixture.sources:
        source_rows = list(read_files(source, root))
        order = np.random.default_rng([mixture.seed, zlib.crc32(source.name.encode())]).permutation(
            len(source_rows)
        )
        kept: list[dict[str, Any]] = []
        dropped = Counter[str]()
        refused: dict[str, list[int]] = {}
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
                prompt = row["prompt"] if "prompt" in row else row["messages"]
                for side, length in render.items():
                    row[f"{side}_tokens"] = length(_to_teacher(row, prompt) if side == "teacher" else prompt)
                    if row[f"{side}_tokens"] > max_prompt_len:
                        raise Dropped(f"too long for the {side}")
            except Dropped as reason:
                dropped[str(reason)] += 1
                if reason.said is not None and (reason.said in refused or len(refused) < MAX_REASONS):
                    refused.setdefault(reason.said, []).append(number)
                continue
            seen.add(key)
            kept.append({"id": f"{source.name}/{number}", "source": source.name} | row)
        report["sources"][source.name] = {
            "rows": len(source_rows),
            "looked_at": len(kept) + sum(dropped.values()),
            "wanted": wanted[source.name],
            "kept": len(kept),
            "dropped": dict(dropped.most_common()),
            "refused": {
                said: {"count": len(numbers), "first": numbers[0]} for said, numbers in refused.items()
            },
        }
        rows += kept
    if not rows:
        reasons = Counter[str]()
        said: list[str] = []
        for counts in report["sources"].values():
            reasons.update(counts["dropped"])
            said += counts["refused"]
        why = (
            ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "the files are empty"
        )
        number = sum(counts["rows"] for counts in report["sources"].values())
        raise ValueError(f"--mixture: all {number} rows were dropped: {why}{f' ({said[0]})' if said else ''}")
    order = np.random.default_rng(mixture.seed).permutation(len(rows))
    report["rows"] = len(rows)
    return [rows[i] for i in order], report


def _counted(items: Sequence[int], name: str) -> Iterable[int]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(
        items, description=name, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )


# Rows


def clean(fields: dict[str, Any], source: Source) -> dict[str, Any]:
    """prompt or messages, and label and response where the source has them. Dropped, with the reason."""
    prompt, answer = _prompt_of(fields, source)
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
    row |= _for_teacher(fields, source)
    _to_teacher(row, prompt)  # drops a row whose prompt for the teacher has no meaning
    for key, kind in (("teacher", str), ("teachers", dict)):
        if source.teacher is None and isinstance(fields.get(key), kind):
            row[key] = fields[key]
    if source.teacher is not None:
        row["teacher"] = source.teacher
    response = _response(fields, source, answer)
    if response is not None:
        row["response"] = response
    if source.label_key is not None:
        row["label"] = _label(fields, source.label_key, source.label_pattern)
    return row


def _for_teacher(fields: dict[str, Any], source: Source) -> dict[str, Any]:
    """What the row says to the teacher alone: as the mixture says, else the columns that training reads."""
    found = {key: fields[key] for key in TEACHER_KEYS if fields.get(key) is not None}
    key = source.teacher_messages_key
    if key is not None:
        if fields.get(key) is None:
            raise Dropped(f"no {key}")
        found = {"teacher_prompt" if isinstance(fields[key], str) else "teacher_messages": fields[key]}
    texts = {"teacher_system": source.teacher_system, "teacher_suffix": source.teacher_suffix}
    return found | {name: _filled_in(text, fields) for name, text in texts.items() if text is not None}


def _filled_in(text: str, fields: dict[str, Any]) -> str:
    """The text with each {NAME} as the row's column NAME has it."""

    def column(found: re.Match[str]) -> str:
        with _dropped_rows():
            return label_of(fields, found[1])

    return _COLUMN.sub(column, text)


def _to_teacher(row: dict[str, Any], prompt: str | list[Message]) -> str | list[Message]:
    """What the teacher reads of a row."""
    with _dropped_rows():
        own = teacher_prompt_of(row, prompt)
    return prompt if own is None else own


def _prompt_of(fields: dict[str, Any], source: Source) -> tuple[str | list[Message], Message | None]:
    """The prompt, a text or messages, and the assistant's message that closes it if there is one."""
    key = source.messages_key or source.prompt_key
    with _dropped_rows():
        prompt, answer = prompt_of(fields, ("prompt", *CONVERSATION_KEYS) if key is None else (key,))
    if source.messages_key is not None and isinstance(prompt, str):
        raise Dropped(f"no {source.messages_key}")
    return prompt, answer


def _response(fields: dict[str, Any], source: Source, answer: Message | None) -> str | None:
    """The column that the mixture names, else the answer that closes the messages."""
    key = source.response_key
    with _dropped_rows():
        response = response_of({} if key is None else fields, key or "", answer, needed=False)
    if key is not None and (not response or fields.get(key) is None):
        raise Dropped(f"no {key}")
    return response


def _label(fields: dict[str, Any], key: str, pattern: str | None) -> str:
    with _dropped_rows():
        label = label_of(fields, key)
    found = None if pattern is None else re.search(pattern, label)
    label = label if pattern is None else found[1] if found else ""
    if not label:
        raise Dropped(f"no {key}")
    return label


@contextlib.contextmanager
def _dropped_rows() -> Iterator[None]:
    try:
        yield
    except RowError as error:
        raise Dropped(error.reason) from None


def fingerprint(prompt: str | list[Message]) -> bytes:
    """Digest of a prompt.

    Case, blanks, and whether it is a text or the user's one message make no difference.
    """
    text = prompt if isinstance(prompt, str) else "\0".join(message["content"] for message in prompt)
    return hashlib.blake2b(
        " ".join(text.casefold().split()).encode(errors="replace"), digest_size=16
    ).digest()


# Files


def read_files(source: Source, root: Path) -> Iterator[dict[str, Any]]:
    """All rows of a source. ValueError, naming it and the file, for one that cannot be read."""
    for name in [source.path] if isinstance(source.path, str) else source.path:
        for _, row in read_rows(root / name, name=f"--data-root: source {source.name}: {root / name}"):
            yield row


# Tokens


def _check_templates(options: argparse.Namespace) -> None:
    """ValueError for flags of templates without --apply-chat-template; sets the date where it is applied."""
    for name in ("chat_template_kwargs", "teacher_chat_template_kwargs", "chat_template_date"):
        if getattr(options, name) is not None and not options.apply_chat_template:
            raise ValueError(f"--{name.replace('_', '-')}: needs --apply-chat-template")
    if options.apply_chat_template:
        options.chat_template_date = read_date(options.chat_template_date)


def renderers(options: argparse.Namespace) -> dict[str, Callable[[Any], int]]:
    """For each model that is named, how many tokens a prompt has as it reads it.

    Dropped where its template refuses.
    """
    sides = {
        "student": (
            ModelConfig(
                hf_checkpoint=options.hf_checkpoint,
                tokenizer_model=options.tokenizer_model,
                chat_template_kwargs=options.chat_template_kwargs,
            ),
            "",
        ),
        "teacher": (
            ModelConfig(
                hf_checkpoint=options.teacher_hf_checkpoint,
                tokenizer_model=options.teacher_tokenizer_model,
                chat_template_kwargs=options.teacher_chat_template_kwargs,
            ),
            "teacher-",
        ),
    }
    if options.apply_chat_template and all(model.hf_checkpoint is None for model, _ in sides.values()):
        raise ValueError(
            "--apply-chat-template: needs --hf-checkpoint or --teacher-hf-checkpoint, the folder with the "
            "template"
        )
    found: dict[str, Callable[[Any], int]] = {}
    for side, (model, prefix) in sides.items():
        if model.hf_checkpoint is None and model.tokenizer_model is None:
            if model.chat_template_kwargs is not None:
                raise ValueError(
                    f"--{prefix}chat-template-kwargs: needs --{prefix}hf-checkpoint, the folder with the "
                    "template"
                )
            continue
        place = locate_tokenizer(model, prefix=prefix)
        try:
            tokenizer = load_tokenizer(place, ())
        except ValueError as error:
            raise ValueError(f"--{prefix}tokenizer-model: {error}") from None
        report_notes(tokenizer)
        template = None
        if options.apply_chat_template:
            if model.hf_checkpoint is None or tokenizer.encode_chat is None:
                raise ValueError(
                    f"--apply-chat-template: needs --{prefix}hf-checkpoint with a tokenizer.json"
                )
            template = ChatTemplate.load(
                model.hf_checkpoint,
                flag=f"--{prefix}hf-checkpoint",
                kwargs=model.chat_template_kwargs,
                date=options.chat_template_date,
            )
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
        except TemplateLimit:
            raise
        except ValueError as error:
            reason = str(error).removeprefix(f"{template.name} ")
            said = f"{side}'s template {reason}"
            raise Dropped(f"refused by the {side}'s template", said[:MAX_REASON]) from None

    return length


# The command line


def show(report: dict[str, Any], folder: Path) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "source", "rows", "looked at", "wanted", "kept", "dropped", title=f"{report['rows']} prompts"
    )
    for name, source in report["sources"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items())
        short = source["wanted"] is not None and source["kept"] < source["wanted"]
        kept = f"[red]{source['kept']}[/red]" if short else str(source["kept"])
        wanted = "all" if source["wanted"] is None else str(source["wanted"])
        table.add_row(
            escape(name), str(source["rows"]), str(source["looked_at"]), wanted, kept, escape(reasons)
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, source in report["sources"].items():
        for said, rows in list(source["refused"].items())[:MAX_SHOWN]:
            line = f"{name}: the {said} ({rows['count']} rows, the first is {name}/{rows['first']})"
            console.print(line, soft_wrap=True, markup=False)
    console.print(f"written to {folder / OUTPUT} and {folder / REPORT}", soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prepare_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mixture", required=True, metavar="FILE", help="YAML file of sources")
    parser.add_argument(
        "--data-root",
        default=".",
        metavar="DIR",
        help="folder to which paths in the mixture are relative (default: the current folder)",
    )
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", help=f"folder for {OUTPUT} and {REPORT}"
    )
    parser.add_argument(
        "--hf-checkpoint",
        metavar="DIR",
        help="the student's Hugging Face folder, for its tokenizer and chat template",
    )
    parser.add_argument("--teacher-hf-checkpoint", metavar="DIR", help="the teacher's Hugging Face folder")
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="the student's tokenizer; default: that of --hf-checkpoint"
    )
    parser.add_argument("--teacher-tokenizer-model", metavar="FILE", help="the teacher's tokenizer")
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="count the tokens of prompts that are rendered with both chat templates",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="arguments of the student's chat template, as in training",
    )
    parser.add_argument(
        "--teacher-chat-template-kwargs", metavar="JSON", help="arguments of the teacher's template"
    )
    parser.add_argument(
        "--chat-template-date",
        metavar="YYYY-MM-DD",
        help="date that strftime_now returns in chat templates (default: today)",
    )
    parser.add_argument(
        "--max-prompt-len",
        type=int,
        default=2048,
        metavar="N",
        help="drop a prompt with more tokens of either model (default: %(default)s)",
    )
    return parser
