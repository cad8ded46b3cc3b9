"""The student's options for teachers that are jobs of their own."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class TeacherJobConfig:
    """A teacher that runs as a job of its own (megatron_simct/serve_teacher.py). Flags: --teacher-*"""

    endpoint: tuple[str, ...] = option(
        (),
        "--run-dir of the teacher's job, where its replicas make themselves known; or their addresses, "
        "tcp://HOST:PORT ...; default: the teacher runs on the student's own ranks",
        metavar="DIR",
    )
    client_key: str | None = option(
        None,
        "client_key.json of the teacher's job, for tcp:// addresses that are given by hand",
        metavar="FILE",
    )
    timeout_minutes: float = option(
        5.0, "save a checkpoint and stop if a pending teacher request gets no answer for so long", at_least=0
    )
    window_tokens: int = option(65536, "maximum tokens in flight per teacher replica", at_least=1)
    cache: str | None = option(
        None,
        "keep the answers of --teacher-endpoint in this directory, and ask only for what is not there",
        metavar="DIR",
    )
    ema: float | None = option(
        None,
        "after each update the teacher's weights become this share of themselves and the rest of the "
        "student's: an exponential average, for a model that teaches itself; the teacher is on the student's "
        "own ranks",
        above=0,
        below=1,
        metavar="DECAY",
    )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A second teacher, in a job of its own, that is mixed with the first byte by byte.

    Flags: --second-teacher-*
    """

    endpoint: tuple[str, ...] = option(
        (), "as --teacher-endpoint, of the second teacher's job", metavar="DIR"
    )
    client_key: str | None = option(None, "as --teacher-client-key", metavar="FILE")
    weight: float = option(
        0.5,
        "its share of the probability of the next byte, the first teacher's being what remains of 1",
        above=0,
        below=1,
    )
