"""The result of a check: it passes, warns, or fails; a failure names the flag to change."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

_FLAG = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]|(?:cluster|env|run_dir|jobs)[.\w]*")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    level: Literal["pass", "warn", "fail"]
    side: str
    """student, teacher, pair or cluster."""
    check: str
    message: str
    flag: str | None = None
    """The option to change: a flag of the side's command, or a key of the run file."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def passed(side: str, check: str, message: str) -> Finding:
    """A check that passes."""
    return Finding(level="pass", side=side, check=check, message=message)


def warned(side: str, check: str, message: str, *, flag: str) -> Finding:
    """A warning: the run can start, but may not do what the user wants."""
    return Finding(level="warn", side=side, check=check, message=message, flag=flag)


def failed(side: str, check: str, message: str, *, flag: str | None = None) -> Finding:
    """A failure: the run cannot start. Default for `flag`: the first flag in the message."""
    if flag is None:
        found = _FLAG.search(message)
        assert found is not None, f"no flag in {message!r}"
        flag = found[0]
    return Finding(level="fail", side=side, check=check, message=message, flag=flag)
