"""The student's options for teachers that are jobs of their own, and for several teachers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_simct.config.interfaces import METHODS
from megatron_simct.config.options.declare import option
from megatron_simct.config.options.loss import InterfaceConfig
from megatron_simct.config.options.model import ModelConfig
from megatron_simct.json_fields import object_of_pairs


@dataclass(frozen=True, kw_only=True)
class TeacherJobConfig:
    """A teacher in a separate job (megatron_simct/serve_teacher.py). Flags: --teacher-*"""

    endpoint: tuple[str, ...] = option(
        (),
        "--run-dir of the teacher's job, where its replicas register; or the addresses of the replicas, "
        "tcp://HOST:PORT ...; default: the teacher runs on the student's ranks",
        metavar="DIR",
    )
    client_key: str | None = option(
        None,
        "client_key.json of the teacher's job; needed if --teacher-endpoint has tcp:// addresses",
        metavar="FILE",
    )
    timeout_minutes: float = option(
        5.0,
        "save a checkpoint and stop if a pending teacher request gets no answer for this many minutes",
        at_least=0,
    )
    window_tokens: int = option(65536, "maximum tokens in flight per teacher replica", at_least=1)
    cache: str | None = option(
        None,
        "store the answers of --teacher-endpoint in this directory, and ask only for answers that it does "
        "not have",
        metavar="DIR",
    )
    ema: float | None = option(
        None,
        "after each update, the teacher's weights become DECAY x teacher + (1 - DECAY) x student: an "
        "exponential average, for a model that teaches itself; the teacher must be on the student's ranks",
        above=0,
        below=1,
        metavar="DECAY",
    )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A second teacher in a separate job; its distribution over the next byte is mixed with the first's.

    Flags: --second-teacher-*
    """

    endpoint: tuple[str, ...] = option(
        (), "like --teacher-endpoint, for the job of the second teacher", metavar="DIR"
    )
    client_key: str | None = option(None, "like --teacher-client-key, for the second teacher", metavar="FILE")
    weight: float = option(
        0.5,
        "weight of the second teacher's distribution over the next byte; the first teacher's weight is 1 "
        "minus this",
        above=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Several teachers, of which each scores the rows of --prompt-data that name it."""

    teachers: str | None = option(
        None,
        'teachers by name, in place of --teacher-hf-checkpoint: {"NAME": {"hf_checkpoint": DIR, ...}, ...}; '
        "each row of --prompt-data has the name of its teacher under 'teacher', or with interface bytes the "
        "weights of several under 'teachers'. An entry has the options of "
        "a model (hf_checkpoint, tokenizer_model, ...), and endpoint, client_key and simct_alignment_map; "
        "simct_interface and its options in an entry replace those of the run for the rows of this teacher",
        metavar="JSON",
    )
    missing_teacher: Literal["stop", "drop"] = option(
        "stop",
        "what to do if no answer of one of --teachers comes for --teacher-timeout-minutes: save a checkpoint "
        "and stop; or drop its rows from each step, and count them, until one of its replicas is back",
    )


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """The options of one teacher, whichever flags have given them."""

    name: str
    """Its name in --teachers, or of one of two teachers; empty for the only teacher of other flags."""
    prefix: str
    """Prefix of its flags, for errors: "teacher-", "second-teacher-" or "teachers NAME."."""
    model: ModelConfig
    job: TeacherJobConfig | MixtureConfig
    """Where the teacher's job is; without an endpoint the teacher is on the student's ranks."""
    alignment_map: str | None = None
    """Folder of its alignment map; None: built at the start."""
    comparison: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of InterfaceConfig that its entry of --teachers has in place of the run's."""

    @property
    def map_flag(self) -> str:
        """The flag of its alignment map."""
        routed = self.prefix.startswith("teachers ")
        return f"--{self.prefix}simct-alignment-map" if routed else "--simct-alignment-map"


_NAME = re.compile(r"[\w.-]+")
_OF_JOB = ("endpoint", "client_key")
_MAP = "simct_alignment_map"
_OF_RANKS = "loss_memory_mib"
"""The field of InterfaceConfig that is no property of a comparison."""


def read_teachers(text: str) -> tuple[TeacherOptions, ...]:
    """The teachers of --teachers, in its order. Raises ValueError, naming the teacher and the key."""
    try:
        entries = json.loads(text, object_pairs_hook=object_of_pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--teachers: not JSON ({error})") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError('--teachers: expected teachers by name: {"NAME": {"hf_checkpoint": DIR}, ...}')
    return tuple(_read_teacher(name, values) for name, values in entries.items())


def _read_teacher(name: str, values: Any) -> TeacherOptions:
    where = f"--teachers {name}"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has only letters, digits, and the characters _ . -")
    if name == "student":
        raise ValueError(f"{where}: this name is the student's in reports; choose another one")
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected its options by key, such as hf_checkpoint")
    kinds = get_type_hints(ModelConfig) | {key: get_type_hints(TeacherJobConfig)[key] for key in _OF_JOB}
    kinds[_MAP] = str | None
    compared = {f"simct_{key}": kind for key, kind in get_type_hints(InterfaceConfig).items()}
    del compared[f"simct_{_OF_RANKS}"]
    read, comparison = {}, {}
    for key, value in values.items():
        if key in compared:
            comparison[key.removeprefix("simct_")] = _read_value(value, compared[key], where=f"{where}.{key}")
        elif key in kinds:
            read[key] = _read_value(value, kinds[key], where=f"{where}.{key}")
        else:
            known = f"{', '.join(kinds)}, and simct_interface with its options"
            raise ValueError(f"{where}: unknown key {key!r}; it has {known}")
    model = ModelConfig(**{key: value for key, value in read.items() if key not in (*_OF_JOB, _MAP)})
    interface = InterfaceConfig(**comparison)
    for group, prefix in ((model, ""), (interface, "simct_")):
        for one in fields(group):
            value = getattr(group, one.name)
            if one.metadata["range"] is not None and value is not None:
                one.metadata["range"].check(f"{where}.{prefix}{one.name}", value)
    if not METHODS[interface.method().interface].teacher:
        raise ValueError(
            f"{where}.simct_interface {interface.interface}: uses no teacher; choose an interface that "
            "compares with one"
        )
    if not model.hf_checkpoint:
        raise ValueError(f"{where}: hf_checkpoint is missing, the teacher's Hugging Face folder")
    return TeacherOptions(
        name=name,
        prefix=f"teachers {name}.",
        model=model,
        job=TeacherJobConfig(**{key: read[key] for key in _OF_JOB if key in read}),
        alignment_map=read.get(_MAP),
        comparison=comparison,
    )


def _read_value(value: Any, kind: Any, *, where: str) -> Any:
    """A value of JSON as one of this type: `str | None`, `int`, a Literal, or a tuple."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(str, get_args(kind)))}")
        return value
    inner = [a for a in get_args(kind) if a not in (type(None), Ellipsis)] or [kind]
    many = getattr(kind, "__origin__", None) is tuple
    if many and not isinstance(value, list):
        raise ValueError(f"{where}: {value!r} is not a list; write [{json.dumps(value)}]")
    if isinstance(value, dict):  # arguments of a chat template
        value = json.dumps(value, ensure_ascii=False)
    if inner[0] is float and type(value) is int:
        value = float(value)
    for item in value if many else [value]:
        if type(item) is not inner[0] and not (item is None and type(None) in get_args(kind)):
            raise ValueError(f"{where}: {item!r} is not a value of type {inner[0].__name__}")
    return tuple(value) if many else value
