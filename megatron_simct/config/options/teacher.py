"""The student's options for teachers that are jobs of their own."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.config.options.declare import option


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
