"""How an option is declared: a field of a dataclass with its help and the range of its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Range:
    """The allowed values of a number. nan is never allowed; inf is only if `infinite` is set."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False
    """Whether inf has a meaning."""
    other: float | None = None
    """One more allowed value, with a special meaning."""
    note: str = ""
    """The end of the message."""

    def check(self, flag: str, value: float) -> None:
        """Raises ValueError, with the flag and the bounds, if the value is outside."""
        if value == self.other:
            return
        within = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if not within:
            raise ValueError(f"{flag} {value}: must {self}{self.note}")
        if value == math.inf and not self.infinite:
            raise ValueError(f"{flag} {value}: must be finite")

    def __str__(self) -> str:
        if self.above is not None and self.below is not None:
            return f"lie strictly between {self.above} and {self.below}"
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        names = (f"{name} {_spelled(bound)}" for name, bound in bounds.items() if bound is not None)
        return "be " + " and ".join(names)


def _spelled(bound: float) -> str:
    """A bound as text: 2**63 instead of its 19 digits."""
    power = int(bound).bit_length() - 1
    return f"2**{power}" if power > 32 and bound == 2**power else str(bound)


def option(default: Any, text: str, *, metavar: str | None = None, **bounds: Any) -> Any:
    """A dataclass field with its help text, and the bounds of its Range."""
    return field(
        default=default,
        metadata={"help": text, "metavar": metavar, "range": Range(**bounds) if bounds else None},
    )


def key_of(prefix: str | None, name: str) -> str:
    """The key in a --config-file of a field in a group with this prefix."""
    return f"{prefix}_{name}" if prefix else name


def flag_of(key: str) -> str:
    """The flag of a key."""
    return "--" + key.replace("_", "-")


def check_ranges(group: Any, *, prefix: str | None = None) -> None:
    """Raises ValueError, with the flag, if a number of the group is outside its range; None is allowed."""
    for one in fields(group):
        value, bounds = getattr(group, one.name), one.metadata["range"]
        if bounds is not None and value is not None:
            bounds.check(flag_of(key_of(prefix, one.name)), value)


def check_all_ranges(config: Any) -> None:
    """Raises ValueError, with the flag, if a number in any group of the job is outside its range."""
    for group in fields(config):
        check_ranges(getattr(config, group.name), prefix=group.metadata.get("prefix"))
