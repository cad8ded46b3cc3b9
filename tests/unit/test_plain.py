"""Values and calls between two peers, here in one process."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import itertools
import json
import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pytest

from megatron_simct.evaluation.plain import Peer, Remote

Point = collections.namedtuple("Point", "x y")
Color = enum.IntEnum("Color", "RED BLUE")
Berlin = datetime.timezone(datetime.timedelta(hours=2))


class Word(str):
    pass


class Sly(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -(10**30),
        1.0,
        -0.0,
        1e308,
        math.inf,
        "",
        "a",
        "\ud800",
        "\0",
        b"",
        b"\xff",
        2 - 3j,
    ),
    *(
        [],
        [1, 1.0, True, None, "a"],
        [[1], (1,)],
        (),
        (1,),
        ((1, [2]),),
        set(),
        {1, "a"},
        frozenset({(1, 2)}),
    ),
    *({}, {1: "a", "1": 2, (1, 2): [3], None: {}}, {True: 1.0}, range(3), range(9, 1, -2), bytearray(b"a")),
    *(collections.Counter("aab"), collections.OrderedDict([(2, 1), (1, 2)]), collections.deque([1, 2], 3)),
    *(
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
        datetime.date(2024, 2, 29),
        datetime.time(1, 2, 3, 4),
    ),
    *(
        datetime.datetime(2024, 2, 29, 1, 2),
        datetime.datetime(2024, 2, 29, tzinfo=Berlin),
        datetime.timedelta(-1, 2, 3),
    ),
    *(int, str, list, dict, 2**40_000, [2**40_000, 1], [1] * 1000),
]


@dataclass
class Two:
    """checks has a Peer that is connected to program's, which serves in a thread."""

    checks: Peer
    program: Peer


@pytest.fixture
def two() -> Iterator[Two]:
    there: queue.Queue[bytes | None] = queue.Queue()
    back: queue.Queue[bytes | None] = queue.Queue()

    def receive(messages: queue.Queue[bytes | None]) -> bytes:
        message = messages.get(timeout=60)
        if message is None:
            raise SystemExit
        return message

    def broken(reason: str) -> NoReturn:
        back.put(None)
        raise SystemExit(reason)

    checks = Peer(lambda: receive(back), there.put, broken, shares=False)
    program = Peer(lambda: receive(there), back.put, broken, shares=True)

    def serve() -> None:
        with contextlib.suppress(SystemExit):
            program.serve()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Two(checks, program)
    there.put(None)
    thread.join(timeout=60)


def given(two: Two, function: Any) -> Remote:
    """The program's function, for the checks."""
    two.program.give_first(function)
    return two.checks.first


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_there_and_back_is_the_same_of_the_same_type(two: Two, value: Any) -> None:
    def same(a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            return same(list(a.items()), list(b.items()))
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return repr(a) == repr(b) if isinstance(a, float) else a == b

    seen = []
    found = given(two, lambda value: seen.append(value) or value)(value)
    assert same(found, value) and same(seen[0], value)


@pytest.mark.parametrize(
    "value, expected",
    [
        (Point(1, 2), (1, 2)),
        (Color.BLUE, 2),
        (Word("a"), "a"),
        (np.float64(1.5), 1.5),
        (np.int32(3), 3),
        (np.bool_(False), False),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
    ],
    ids=repr,
)
def test_a_value_that_equals_a_plain_one_is_sent_as_it(two: Two, value: Any, expected: Any) -> None:
    found = given(two, lambda: value)()
    assert found == expected and type(found).__name__ in (type(expected).__name__, "defaultdict")


def test_views_and_iterators_can_be_read(two: Two) -> None:
    found = given(
        two, lambda: ({1: 2}.keys(), {1: 2}.values(), {1: 2}.items(), (x for x in "ab"), map(str, [1]))
    )()
    assert [list(part) for part in found] == [[1], [2], [(1, 2)], ["a", "b"], ["1"]]


@pytest.mark.parametrize(
    "value", [Sly(3), np.ones(2), object(), [Sly(3)], {1: object()}], ids=lambda v: type(v).__name__
)
def test_what_is_not_plain_equals_only_itself(two: Two, value: Any) -> None:
    function = given(two, lambda: value)
    found = function()
    if isinstance(found, list | dict):
        (found,) = found if isinstance(found, list) else found.values()
    assert type(found) is Remote and found != 3 and found == found and not found != found


def test_objects_of_the_program(two: Two) -> None:
    class Node:
        def __init__(self, value: int) -> None:
            self.value, self.next = value, None

        def total(self) -> int:
            return self.value + (self.next.total() if self.next else 0)

    make = given(two, lambda: Node)()
    first = make(1)
    first.next = make(2)
    assert first.total() == 3 and first.next.value == 2 and first.next is first.next
    with pytest.raises(AttributeError):
        _ = first.absent


def test_functions_of_the_checks(two: Two) -> None:
    apply = given(two, lambda function, *values: function(*values))
    assert apply(lambda x: x + 1, 2) == 3 and apply(len, [1, 2]) == 2 and apply(str.upper, "a") == "A"
    assert apply(lambda function: function(2), lambda x: x * 2) == 4
    with pytest.raises(TypeError, match="is not plain data"):
        apply(object())


@pytest.mark.parametrize(
    "raised, expected",
    [
        (ValueError("no"), ValueError),
        (type("Own", (KeyError,), {})("no"), KeyError),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "no"), UnicodeError),
        (StopIteration(), RuntimeError),
        (type("Own", (StopIteration,), {})(), RuntimeError),
    ],
    ids=repr,
)
def test_exceptions_are_the_nearest_of_python(two: Two, raised: Exception, expected: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(expected) as error:
        given(two, fail)()
    assert type(error.value) is expected


def test_what_cannot_be_written_is_an_error_of_the_call(two: Two) -> None:
    own: list[Any] = []
    own.append(own)
    function = given(two, lambda value: own if value else "next")
    with pytest.raises(RecursionError):
        function(True)
    assert function(False) == "next"


BAD = [
    *("1", "{}", "[]", '["list"]', '["list", 1]', "[1, []]", '["object", []]', '["list", [["tuple", 1]]]'),
    *(
        '["complex", ["a", "b"]]',
        '["dict", [1]]',
        '["set", [["list", []]]]',
        '["bytes", ["zz"]]',
        '["range", []]',
    ),
    *(
        '["type", ["object"]]',
        '["type", ["eval"]]',
        '["int", ["zz"]]',
        '["Fraction", [1, 0]]',
        '["date", [1]]',
    ),
    *('["yours", [0]]', '["mine", ["a"]]', '["mine", [1, 2]]', "[" * 100_000, "NaN", '["value", 1]', "\xff"),
]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30])
def test_a_message_of_another_form_ends_the_connection(text: str) -> None:
    class Broken(BaseException):
        pass

    def broken(reason: str) -> NoReturn:
        raise Broken(reason)

    message = text if text.startswith(("1", "{", "[]", "NaN", "\xff")) else f'["list", ["value", {text}]]'
    peer = Peer(lambda: message.encode("latin1"), lambda _: None, broken, shares=False)
    with pytest.raises(Broken):
        peer.first()


@pytest.mark.parametrize(
    "asks",
    [
        ["get", ["yours", [0]], "__globals__"],
        ["set", ["yours", [0]], "x", 1],
        ["call", ["type", ["list"]], ["tuple", []], ["dict", []]],
        ["call", "a", ["tuple", []], ["dict", []]],
        ["call", ["yours", [0]], ["list", []], ["dict", []]],
        ["open", "a"],
    ],
    ids=lambda asks: f"{asks[0]} {asks[1]}",
)
def test_the_program_may_only_call_what_it_was_given(asks: list[Any]) -> None:
    class Broken(BaseException):
        pass

    def broken(reason: str) -> NoReturn:
        raise Broken(reason)

    answers = itertools.chain(
        [json.dumps(["list", asks]).encode()], itertools.repeat(b'["list", ["value", 1]]')
    )
    peer = Peer(lambda: next(answers), lambda _: None, broken, shares=False)
    with pytest.raises(Broken):
        peer.first(lambda: 1)
