"""Spells the dataclasses of `options/` as command-line flags and as keys of a --config-file.

defaults < --config-file < command line. An unknown flag or key is an error that names the nearest one; a flag
of Megatron-LM that this package does not implement has its own message.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_simct.config.command_line import Parser, nearest
from megatron_simct.config.megatron_flags import ALWAYS, MEGATRON_FLAGS, check_always
from megatron_simct.config.options import Config, TeacherConfig, flag_of, key_of

_NOT_IMPLEMENTED = "that this package does not implement"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a job, and the dataclass that its flags fill."""

    config: type
    module: str
    usage: str
    description: str


TRAIN = Command(
    config=Config,
    module="megatron_simct.train",
    usage="%(prog)s --hf-checkpoint DIR --teacher-hf-checkpoint DIR --prompt-data FILE [flags below]",
    description="Distil a teacher into a student with another tokenizer, on policy, on Megatron-Core. "
    "Start one process a rank with torchrun, or a single process directly.",
)
SERVE_TEACHER = Command(
    config=TeacherConfig,
    module="megatron_simct.serve_teacher",
    usage="%(prog)s --teacher-hf-checkpoint DIR --run-dir DIR [flags below]",
    description="Score students' responses with a teacher, until SIGTERM. Start one process a rank with "
    "torchrun, or a single process directly; the student's job finds it by --teacher-endpoint RUN_DIR.",
)


@dataclass(frozen=True, slots=True)
class Option:
    """One field of one group, as a flag."""

    group: str
    field: str
    key: str
    kind: type
    """bool, int, float or str"""
    many: bool
    optional: bool
    choices: tuple[str, ...] | None
    default: Any
    help: str
    metavar: str | None

    @property
    def flag(self) -> str:
        return flag_of(self.key)


def options(config: type = Config) -> Iterator[Option]:
    """Every option of a job's configuration, in the order of its groups."""
    group_types = typing.get_type_hints(config)
    for group in dataclasses.fields(config):
        prefix = group.metadata.get("prefix")
        field_types = typing.get_type_hints(group_types[group.name])
        for field in dataclasses.fields(group_types[group.name]):
            kind, many, optional, choices = _unfold(field_types[field.name])
            yield Option(
                group=group.name,
                field=field.name,
                key=key_of(prefix, field.name),
                kind=kind,
                many=many,
                optional=optional,
                choices=choices,
                default=field.default,
                help=field.metadata["help"],
                metavar=field.metadata["metavar"],
            )


def _unfold(annotation: Any) -> tuple[type, bool, bool, tuple[str, ...] | None]:
    """The value type of an annotation, and whether it is a tuple, optional, or a choice."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType or origin is typing.Union:
        (inner,) = (a for a in arguments if a is not type(None))
        kind, many, _, choices = _unfold(inner)
        return kind, many, True, choices
    if origin is tuple:
        kind, _, _, choices = _unfold(arguments[0])
        return kind, True, False, choices
    if origin is typing.Literal:
        return str, False, False, arguments
    return annotation, False, False, None


class _Formatter(argparse.HelpFormatter):
    """Keeps the line breaks of a help text."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [
            line for part in text.splitlines() for line in super(_Formatter, self)._split_lines(part, width)
        ]


class _Parser(Parser):
    def unknown_flag(self, flag: str) -> str:
        """A flag of Megatron-LM that this package does not have gets its own message."""
        if flag in MEGATRON_FLAGS:
            return f"{flag} is a flag of Megatron-LM {_NOT_IMPLEMENTED}: {MEGATRON_FLAGS[flag]}"
        return super().unknown_flag(flag)


def build_parser(command: Command = TRAIN) -> argparse.ArgumentParser:
    """Flags in the groups of the job's configuration.

    Values that were not given are absent, so that a file can supply them.
    """
    parser = _Parser(
        prog=f"python -m {command.module}",
        usage=command.usage,
        description=command.description,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=38, width=118),
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="YAML file with the same keys in snake_case; flags win over it"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration as YAML and stop"
    )
    sections: dict[str, Any] = {}
    group_types = typing.get_type_hints(command.config)
    for option in options(command.config):
        if option.group not in sections:
            doc = (group_types[option.group].__doc__ or "").strip()
            sections[option.group] = parser.add_argument_group(option.group, doc)
        text = option.help + ("" if option.default in (None, ()) else f" (default: {option.default})")
        arguments: dict[str, Any] = {"dest": option.key, "help": text.strip()}
        if option.kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = option.kind
            arguments["metavar"] = option.metavar or {int: "N", float: "X"}.get(option.kind)
            if option.choices:
                arguments |= {"choices": option.choices, "metavar": None}
            if option.many:
                arguments["nargs"] = "+"
        sections[option.group].add_argument(option.flag, **arguments)
    for flag, values in ALWAYS.items():
        action = {"action": "store" if values else "store_true"}
        parser.add_argument(flag, dest=flag, help=argparse.SUPPRESS, **action)  # type: ignore[arg-type]
    return parser


def parse_config(argv: Sequence[str] | None = None, command: Command = TRAIN) -> Any:
    """The resolved `command.config` of a command line. Exits with code 2 and one line on a wrong
    flag, key or value.

    With --print-config it prints the configuration, in the form that --config-file reads, and exits with 0.
    """
    parser = build_parser(command)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    debug = given.pop("debug", False)
    try:
        for argument in unknown:
            raise ValueError(f"unexpected argument {argument!r}")
        file = given.pop("config_file", None)
        show = given.pop("print_config", False)
        for flag in ALWAYS.keys() & given.keys():
            check_always(flag, given.pop(flag))
        config = assemble((_read_file(file, command.config) if file else {}) | given, command.config)
    except ValueError as error:
        if debug:
            raise
        parser.error(str(error))
    if show:
        sys.stdout.write(to_yaml(config))
        parser.exit(0)
    return config


def to_dict(config: Config | TeacherConfig) -> dict[str, Any]:
    """The value of every option by its key."""
    return {
        option.key: getattr(getattr(config, option.group), option.field) for option in options(type(config))
    }


def to_yaml(config: Config | TeacherConfig) -> str:
    """The configuration as the text of a --config-file."""
    lines: list[str] = []
    group = None
    for option in options(type(config)):
        if option.group != group:
            lines.append(f"# {option.group}")
            group = option.group
        value = getattr(getattr(config, option.group), option.field)
        value = list(value) if option.many else value
        # In double quotes line breaks are escaped, so that a value is one line.
        style = '"' if isinstance(value, str) and not value.isprintable() else None
        text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=float("inf"))
        lines.append(f"{option.key}: {text.splitlines()[0]}")
    return "\n".join(lines) + "\n"


def assemble(values: dict[str, Any], config: type) -> Any:
    """Builds a job's configuration from values by key, as YAML or argparse give them. Raises ValueError for a
    value of another type.
    """
    groups: dict[str, dict[str, Any]] = {}
    for option in options(config):
        if option.key in values:
            groups.setdefault(option.group, {})[option.field] = _convert(option, values[option.key])
    group_types = typing.get_type_hints(config)
    return config(**{name: group_types[name](**fields) for name, fields in groups.items()})


def _convert(option: Option, value: Any) -> Any:
    """A value of a YAML file or of argparse as the field's type; YAML reads 1e-5 as a string."""
    if value is None:
        if not option.optional:
            raise ValueError(f"{option.key}: needs a value of type {option.kind.__name__}")
        return None
    if option.many:
        if not isinstance(value, list):
            raise ValueError(f"{option.flag} ({option.key}): {value!r} is not a list; write [{value}]")
        return tuple(_convert(dataclasses.replace(option, many=False, optional=False), v) for v in value)
    if option.metavar in ("JSON", "YYYY-MM-DD"):
        value = flag_text(value)
    wrong = ValueError(
        f"{option.flag} ({option.key}): {value!r} is not a value of type {option.kind.__name__}"
    )
    if option.kind is bool or isinstance(value, bool):
        if not (option.kind is bool and isinstance(value, bool)):
            raise wrong
        return value
    if option.kind is int and isinstance(value, float):
        raise wrong
    if option.kind is str and not isinstance(value, str):
        raise wrong
    try:
        value = option.kind(value)
    except (TypeError, ValueError):
        raise wrong from None
    if option.choices and value not in option.choices:
        raise ValueError(f"{option.flag} {value}: choose from {', '.join(option.choices)}")
    return value


def flag_text(value: Any) -> Any:
    """A mapping or a date from YAML as the text that the flag takes; any other value unchanged."""
    if type(value) is datetime.date:
        return value.isoformat()
    if not isinstance(value, dict):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{value!r} cannot be written as JSON ({error}); put it in quotes") from None


def _read_file(path: str, config: type) -> dict[str, Any]:
    values = read_yaml(path, where=f"--config-file {path}", expected="`key: value` lines")
    check_keys(values, config, where=f"--config-file {path}")
    return values


def read_yaml(path: str, *, where: str, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises ValueError, beginning with `where`; expected: what it should hold.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # invalid dates, text that is not UTF-8
        raise ValueError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected {expected}")
    return values


def check_keys(values: dict[str, Any], config: type, *, where: str) -> None:
    """Raises ValueError, beginning with `where`, for a key that is not an option of the job; it names the
    nearest key.

    Keys that ask for the default behaviour (ALWAYS) are accepted; `assemble` ignores them.
    """
    keys = [option.key for option in options(config)]
    for key, value in values.items():
        if flag_of(str(key)) in ALWAYS:
            try:
                check_always(flag_of(str(key)), value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            continue
        if flag_of(str(key)) in MEGATRON_FLAGS:
            reason = MEGATRON_FLAGS[flag_of(str(key))]
            raise ValueError(f"{where}: {key!r} is an option of Megatron-LM {_NOT_IMPLEMENTED}: {reason}")
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), keys)}")
