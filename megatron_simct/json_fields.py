"""Allowed values of fields in JSON files from elsewhere; any other value raises a ValueError
that names the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_TOO_LARGE = 2**63
"""For a size of torch, and above all that has a meaning here."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Some values of JSON."""

    words: str
    """Description of the values, used after `expected`."""
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.words}, or {other.words}", lambda value: self.holds(value) or other.holds(value))


NULL = Kind("null", lambda value: value is None)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
STRING = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=...), which would take the last of two entries with one key. Raises
    ValueError for such an object.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def integer(least: int) -> Kind:
    """Integers that are at least `least`."""
    return Kind(
        f"a whole number, at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < _TOO_LARGE,
    )


def number(*, above: float | None = None, least: float = 0.0) -> Kind:
    """Finite numbers above a bound, or at least `least`."""
    return Kind(
        f"a number, at least {least:g}" if above is None else f"a number above {above:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (least <= value if above is None else above < value)
            and value < _TOO_LARGE
        ),
    )


def list_of(kind: Kind) -> Kind:
    """Lists whose entries are of this kind."""
    return Kind(
        f"a list, each entry {kind.words}",
        lambda value: isinstance(value, list) and all(kind.holds(entry) for entry in value),
    )


def check_fields(fields: Mapping[str, Any], kinds: Mapping[str, Kind], *, where: str) -> None:
    """Raises ValueError, beginning with `where`, for the first field whose value is not of its kind."""
    for name, kind in kinds.items():
        if name in fields and not kind.holds(fields[name]):
            raise ValueError(f"{where}: {name} = {fields[name]!r}; expected {kind.words}")
