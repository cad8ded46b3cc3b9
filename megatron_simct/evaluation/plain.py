"""Calls between a program that nobody has read and the checks of its results, in plain data only.

Each side has a Peer. A message is one list as JSON: a call, or the value or error that answers it.
Values keep their exact type: None, bool, int, float and str are as in JSON, and every other value is
[name of its type, parts]:

    (1, {"a"})   is   ["tuple", [1, ["set", ["a"]]]]

The reader makes values of these types and no others, so nothing that it receives can run code of the sender:
no class arrives whose `==` is always true. A value that is not plain stays with its owner, and the other side
gets a Remote, which equals only itself. A value whose class inherits its `==` from a plain type (a
namedtuple, an IntEnum) is sent as that type.

Standard library only.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType
from typing import Any, NoReturn

_SCALARS = frozenset({type(None), bool, int, float, str})
_LONG_INT_BITS = 10_000
"""A larger int is written in hexadecimal: Python refuses to read or write decimals of
more than 4300 digits.
"""


@dataclass(frozen=True, slots=True)
class _Form:
    """How values of one type are written."""

    name: str
    parts: Callable[[Any], Iterable[Any]]
    """The parts of a value, which are plain values again."""
    make: Callable[[list[Any]], Any]
    """The value, from its parts."""


def _flat(mapping: Mapping[Any, Any]) -> list[Any]:
    return [part for item in mapping.items() for part in item]


def _pairs(parts: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


def _datetime(parts: list[Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(parts[0])


_FORMS: dict[type, _Form] = {
    list: _Form("list", list, list),
    tuple: _Form("tuple", list, tuple),
    dict: _Form("dict", _flat, lambda parts: dict(_pairs(parts))),
    set: _Form("set", list, set),
    frozenset: _Form("frozenset", list, frozenset),
    complex: _Form("complex", lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    bytes: _Form("bytes", lambda value: [value.hex()], lambda parts: bytes.fromhex(parts[0])),
    bytearray: _Form("bytearray", lambda value: [value.hex()], lambda parts: bytearray.fromhex(parts[0])),
    range: _Form("range", lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    collections.Counter: _Form("Counter", _flat, lambda parts: collections.Counter(dict(_pairs(parts)))),
    collections.OrderedDict: _Form(
        "OrderedDict", _flat, lambda parts: collections.OrderedDict(_pairs(parts))
    ),
    # Without its factory, which may be a function: it equals the same mappings without it.
    collections.defaultdict: _Form(
        "defaultdict", _flat, lambda parts: collections.defaultdict(None, _pairs(parts))
    ),
    collections.deque: _Form(
        "deque", lambda value: [value.maxlen, *value], lambda parts: collections.deque(parts[1:], parts[0])
    ),
    type({}.keys()): _Form("dict_keys", list, lambda parts: dict.fromkeys(parts).keys()),
    type({}.values()): _Form("dict_values", list, lambda parts: dict(enumerate(parts)).values()),
    type({}.items()): _Form(
        "dict_items", lambda value: _flat(dict(value)), lambda parts: dict(_pairs(parts)).items()
    ),
    decimal.Decimal: _Form("Decimal", lambda value: [str(value)], lambda parts: decimal.Decimal(parts[0])),
    fractions.Fraction: _Form(
        "Fraction",
        lambda value: [value.numerator, value.denominator],
        lambda parts: fractions.Fraction(*parts),
    ),
    datetime.datetime: _Form("datetime", lambda value: [value.isoformat()], _datetime),
    datetime.date: _Form(
        "date", lambda value: [value.isoformat()], lambda parts: datetime.date.fromisoformat(parts[0])
    ),
    datetime.time: _Form(
        "time", lambda value: [value.isoformat()], lambda parts: datetime.time.fromisoformat(parts[0])
    ),
    datetime.timedelta: _Form(
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
}
_TYPES: dict[str, type] = {kind.__name__: kind for kind in (*_SCALARS, *_FORMS)}
"""Types that may themselves be a value."""
_ITERATOR = _Form("iterator", list, iter)
_TYPE = _Form("type", lambda value: [value.__name__], lambda parts: _TYPES[parts[0]])
_LONG_INT = _Form("int", lambda value: [hex(value)], lambda parts: int(parts[0], 16))
_READ = {form.name: form.make for form in (*_FORMS.values(), _ITERATOR, _TYPE, _LONG_INT)}
_BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    **{
        base: base
        for base in (complex, bytes, bytearray, tuple, list, dict, set, frozenset, collections.deque)
    },
}
"""Types whose subclasses are sent as these types, and the functions that convert a value."""

_MINE, _YOURS = "mine", "yours"
"""Names of objects that stay with their owner, from the sender's view. Their one part is a number."""
_FUNCTIONS = (type, FunctionType, MethodType, BuiltinFunctionType, MethodDescriptorType)
_ENDS_LOOPS = (StopIteration, StopAsyncIteration)


class Remote:
    """An object of the other side. It can be called, and its attributes can be read and set."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.request("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        # Attributes that Python itself reads, for example in a copy, are not passed to the program.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("set", self, name, value)


class Peer:
    """One side of the connection.

    receive() and send() carry whole messages. broken(reason) ends this process: a message that no
    well-behaved peer sends must not become an exception, which the checks could catch. shares: whether the
    other side may read and set attributes of the objects that it gets. If not, it gets only functions and
    classes, and may call them.
    """

    def __init__(
        self,
        receive: Callable[[], bytes],
        send: Callable[[bytes], None],
        broken: Callable[[str], NoReturn],
        *,
        shares: bool,
    ) -> None:
        self._receive, self._send, self._broken, self._shares = receive, send, broken, shares
        self._given: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}  # given objects by id(); they are kept alive
        self._remotes: dict[int, Remote] = {}

    # Values

    def write(self, value: Any) -> Any:
        """A value as JSON. Raises TypeError if the other side cannot get it."""
        kind = type(value)
        if kind in _SCALARS:
            is_long = kind is int and value.bit_length() > _LONG_INT_BITS
            return self._form(_LONG_INT, value) if is_long else value
        if kind in _FORMS:
            return self._form(_FORMS[kind], value)
        if kind is Remote:
            if value._peer is not self:
                raise TypeError("an object of another connection")
            return [_YOURS, [value._number]]
        if kind is type and _TYPES.get(value.__name__) is value:
            return self._form(_TYPE, value)
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            return self._form(_ITERATOR, value)
        for base, plain in _BASES.items():
            if isinstance(value, base) and kind.__eq__ is base.__eq__:
                return self.write(plain(value))
        numpy = sys.modules.get("numpy")
        if (
            numpy is not None
            and isinstance(value, numpy.generic)
            and type(value.item()) in (*_SCALARS, *_FORMS)
        ):
            return self.write(value.item())
        return [_MINE, [self._number_of(value)]]

    def _form(self, form: _Form, value: Any) -> list[Any]:
        parts = list(form.parts(value))
        kinds = set(map(type, parts))
        # Long lists of numbers, at the speed of C.
        if not kinds <= _SCALARS or (int in kinds and any(map(_is_long, parts))):
            parts = [self.write(part) for part in parts]
        return [form.name, parts]

    def read(self, value: Any) -> Any:
        """A value from JSON. Raises an Exception if it does not have the form."""
        if type(value) in _SCALARS:
            return value
        if (
            type(value) is not list
            or len(value) != 2
            or type(value[0]) is not str
            or type(value[1]) is not list
        ):
            raise ValueError("a value that is not [type, parts]")
        name, parts = value
        if not set(map(type, parts)) <= _SCALARS:
            parts = [self.read(part) for part in parts]
        if name in (_MINE, _YOURS):
            (number,) = parts
            if type(number) is not int:
                raise ValueError("the number of an object is not an int")
            if name == _YOURS:
                return self._given[number]
            return self._remotes.setdefault(number, Remote(self, number))
        return _READ[name](parts)

    def _number_of(self, value: Any) -> int:
        if not (self._shares or isinstance(value, _FUNCTIONS)):
            raise TypeError(
                f"a value of type {type(value).__name__} is not plain data, and cannot be given to a program"
            )
        number = self._numbers.setdefault(id(value), len(self._numbers))
        self._given[number] = value
        return number

    # Messages

    def give_first(self, function: Callable[..., Any]) -> None:
        """Call this before any other object is given: it answers the other side's `first`."""
        assert not self._given, "it is the first"
        self._number_of(function)

    @property
    def first(self) -> Remote:
        return Remote(self, 0)

    def request(self, *message: Any) -> Any:
        """Ask the other side, and answer its questions meanwhile. Raises the error that it answers."""
        self._put(list(message))
        while True:
            match self._get():
                case ["value", value]:
                    return value
                case ["error", str(name), str(text)]:
                    raise _exception(name, text)
                case question:
                    self._answer(question)

    def serve(self) -> NoReturn:
        """Answer the other side's questions, forever."""
        while True:
            self._answer(self._get())

    def _answer(self, question: list[Any]) -> None:
        try:
            match question:
                case ["call", function, tuple(arguments), dict(named)] if self._may_call(function):
                    answer = function(*arguments, **named)
                case ["get", target, str(name)] if self._shares:
                    answer = getattr(target, name)
                case ["set", target, str(name), value] if self._shares:
                    answer = setattr(target, name, value)  # type: ignore[func-returns-value]
                case _:
                    self._broken("it asks for what it may not have")
            message = self._text(["value", answer])
        except Exception as error:
            message = self._text(["error", _builtin_name(error), str(error)])
        self._send(message)

    def _may_call(self, function: Any) -> bool:
        return self._shares or any(function is given for given in self._given.values())

    def _put(self, message: list[Any]) -> None:
        self._send(self._text(message))

    def _text(self, message: list[Any]) -> bytes:
        return json.dumps(self.write(message)).encode()

    def _get(self) -> list[Any]:
        data = self._receive()
        try:
            message = self.read(json.loads(data))
        except Exception as error:
            self._broken(f"{type(error).__name__}: {error}")
        if type(message) is not list:
            self._broken("a message that is not a list")
        return message


def _is_long(value: Any) -> bool:
    return type(value) is int and value.bit_length() > _LONG_INT_BITS


def _builtin_name(error: Exception) -> str:
    """Name of the nearest built-in exception class."""
    return next(
        kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind
    )


def _exception(name: str, text: str) -> Exception:
    """Python's own exception of that name.

    Exceptions that end loops are replaced, because they would end loops of the checks: all(map(f, x)).
    """
    found = getattr(builtins, name, None)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, _ENDS_LOOPS):
        for kind in found.__mro__:
            with contextlib.suppress(TypeError):  # some need more arguments than a text
                return kind(text)
    return RuntimeError(text)
