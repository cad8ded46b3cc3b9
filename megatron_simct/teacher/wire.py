"""The wire format of the two jobs: a message is a msgpack header, raw frames of numbers, and a checksum.

    [header, frame, ..., frame, crc32 of all that]
    header = {version, kind, fields, frames: [[name, type, shape], ...]}

Nothing is ever unpickled. Both ends decode with the same `decode`: sizes first, then checksum, version, and
the schema of the kind: which fields, which frames, their types, and lengths that must agree. What does not
fit is a WireError. An encrypted connection authenticates every message, so the checksum is left empty there.

    hello     student -> teacher   fingerprints of what both must share; sent again, with a number, as a
                                   heartbeat
    welcome   teacher -> student   the teacher's fingerprints, an id of the replica's process, its status, the
                                   number of the hello, and which requests of this student it holds
    score     student -> teacher   one sample's tokens, and which statistics of them are requested
    recall    student -> teacher   requests to hand back if the model has not begun with them
    scored    teacher -> student   the statistics
    returned  teacher -> student   a request is handed back unanswered: it was recalled, the teacher stops, or
                                   its queue is full
    refused   teacher -> student   a hello or a request that will never be answered, and why
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

VERSION = 3
"""Protocol version. Ends with different versions refuse each other."""

MAX_HEADER_BYTES = 1 << 16
MAX_FRAME_BYTES = 1 << 30
"""Size limit of one frame. Sockets get it too (ZMQ_MAXMSGSIZE): a longer frame ends the connection unread."""
MAX_STEPS, MAX_STEPS_PER_LABEL = 1 << 16, 1 << 11
"""A frame of steps has at most MAX_STEPS numbers, and MAX_STEPS_PER_LABEL more a label. A byte position has
at most 260 events; real text has some 300 numbers a label."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype("<i4"),
    "steps": np.dtype("<i4"),  # int32 as deflated differences: for indices that mostly rise by a constant
    "int8": np.dtype("i1"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # as its bits: numpy has no bfloat16
}


class WireError(ValueError):
    """Not a valid protocol message."""


class TooManyTokens(WireError):
    """A request for more tokens than the teacher takes. Its frames of steps have not been inflated."""

    def __init__(self, request: int, num_tokens: int) -> None:
        super().__init__(f"request {request} has {num_tokens} tokens")
        self.request, self.num_tokens = request, num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, as it was before it was encoded."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    """Type on the wire, a key of _DTYPES, and numbers, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schema:
    fields: Mapping[str, type]
    frames: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Allowed types, and a letter for each dimension: equal letters mean equal lengths."""
    together: tuple[tuple[str, ...], ...] = ()
    """Groups of frames that are optional: either all of a group or none."""


BYTE_SIDE = ("segment_row", "segment_start", "entry_slot", "entry_segment", "last_row")
"""The arrays of a ByteSide: all of them or none."""
_SCHEMAS = {
    "hello": _Schema(fields={"fingerprints": dict, "beat": int}),
    "welcome": _Schema(
        fields={"fingerprints": dict, "life": str, "status": dict, "beat": int},
        frames={"holds": (("int32",), "q")},
    ),
    "score": _Schema(
        fields={"request": int, "sample_id": int, "hidden": bool, "topk": int, "token_ids": bool},
        frames={
            "prompt_ids": (("int32",), "p"),
            "label_ids": (("int32",), "m"),
            "rows": (("int32",), "r"),
            **dict(zip(BYTE_SIDE, [(("steps",), letter) for letter in "ggxxe"], strict=True)),
        },
        together=(BYTE_SIDE,),
    ),
    "scored": _Schema(
        fields={"request": int, "sample_id": int},
        frames={
            "own_logit": (("float32",), "m"),
            "lse": (("float32",), "m"),
            "hidden": (("float32", "bfloat16", "int8"), "rh"),
            "scale": (("float32",), "r"),
            "topk": (("float32",), "rk"),
            "topk_ids": (("int32",), "rk"),
            "byte_logprobs": (("float32", "float16"), "e"),
        },
        together=(("hidden",), ("scale",), ("topk",), ("topk_ids",), ("byte_logprobs",)),
    ),
    "recall": _Schema(fields={}, frames={"requests": (("int32",), "q")}),
    "returned": _Schema(fields={"request": int, "reason": str}),
    "refused": _Schema(fields={"request": int, "reason": str}),
}


def encode(message: Message, *, checked: bool = True) -> list[bytes | memoryview]:
    """The message as parts that a socket sends. The frames' memory is not copied where it is contiguous.

    checked: with a checksum; without, it is for an encrypted connection.
    """
    arrays = [
        (name, dtype, np.ascontiguousarray(array, dtype=_DTYPES[dtype]))
        for name, (dtype, array) in message.frames.items()
    ]
    header = {
        "version": VERSION,
        "kind": message.kind,
        "fields": dict(message.fields),
        "frames": [[name, dtype, list(array.shape)] for name, dtype, array in arrays],
    }
    parts = [msgpack.packb(header), *(_frame(dtype, array) for _, dtype, array in arrays)]
    return [*parts, _checksum(parts) if checked else b""]


def with_checksum(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts of a message that was encoded without one."""
    return [*parts[:-1], _checksum(parts[:-1])]


def decode(
    parts: Sequence[bytes | memoryview], *, checked: bool = True, max_tokens: int | None = None
) -> Message:
    """The message of these parts; its arrays share their memory. WireError, in one line, for anything else.

    checked: compare the checksum; without, the message came over an encrypted connection, or was decoded
    before. max_tokens: TooManyTokens for a request with more, before anything is inflated.
    """
    if len(parts) < 2:
        raise WireError(f"{len(parts)} parts are not a message")
    header, frames, checksum = parts[0], parts[1:-1], parts[-1]
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        values = msgpack.unpackb(header, strict_map_key=True, raw=False)
    except Exception as error:  # of several unrelated types
        raise WireError(f"the header is not msgpack ({type(error).__name__})") from None
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise WireError("the header names no version")
    if values["version"] != VERSION:
        raise WireError(f"protocol version {values['version']}; this end speaks {VERSION}")
    if checked and bytes(checksum) != _checksum(parts[:-1]):
        raise WireError("the checksum does not fit")
    kind = values.get("kind")
    if (
        values.keys() != {"version", "kind", "fields", "frames"}
        or not isinstance(kind, str)
        or kind not in _SCHEMAS
    ):
        raise WireError("the header is of no known kind")
    schema = _SCHEMAS[kind]
    _check_fields(kind, values["fields"], schema)
    lengths = _check_shapes(kind, values["frames"], frames, schema)
    num_tokens = lengths.get("p", 0) + lengths.get("m", 0)
    if kind == "score" and max_tokens is not None and num_tokens > max_tokens:
        raise TooManyTokens(values["fields"]["request"], num_tokens)
    return Message(
        kind=kind, fields=values["fields"], frames=_arrays(kind, values["frames"], frames, lengths)
    )


def quoted(text: str, limit: int = 300) -> str:
    """A text of the other end, for a terminal or a log: shortened, with control characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def num_bytes(parts: Sequence[bytes | memoryview]) -> int:
    """Bytes of a message on the wire, without what ZeroMQ adds."""
    return sum(len(part) for part in parts)


def _checksum(parts: Sequence[bytes | memoryview]) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")


def _frame(dtype: str, array: np.ndarray) -> bytes | memoryview:
    if dtype == "steps":
        return zlib.compress(np.diff(array.ravel(), prepend=np.int32(0)).astype("<i4").tobytes(), 1)
    return array.data.cast("B") if array.size else b""


def _inflated(frame: bytes | memoryview, size: int) -> bytes | None:
    """The int32 numbers of a frame of steps, `size` bytes of them; None if it holds another number."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(frame, size + 1)
    except zlib.error:
        return None
    return np.cumsum(np.frombuffer(data, "<i4"), dtype="<i4").tobytes() if len(data) == size else None


def _check_fields(kind: str, fields: Any, schema: _Schema) -> None:
    if not isinstance(fields, dict) or fields.keys() != schema.fields.keys():
        raise WireError(f"{kind}: expected the fields {', '.join(schema.fields)}")
    for name, wanted in schema.fields.items():
        if type(fields[name]) is not wanted:
            raise WireError(f"{kind}: {name} must be of type {wanted.__name__}")


def _check_shapes(
    kind: str, specs: Any, frames: Sequence[bytes | memoryview], schema: _Schema
) -> dict[str, int]:
    """The length of each dimension's letter. WireError if the frames are not those of the schema."""
    if not isinstance(specs, list) or len(specs) != len(frames):
        raise WireError(f"{kind}: the header does not describe its {len(frames)} frames")
    names: set[str] = set()
    lengths: dict[str, int] = {}
    for spec in specs:
        if not (
            isinstance(spec, list)
            and len(spec) == 3
            and isinstance(spec[0], str)
            and isinstance(spec[2], list)
        ):
            raise WireError(f"{kind}: a frame is not described by name, type and shape")
        name, dtype, shape = spec
        if name not in schema.frames or name in names:
            raise WireError(f"{kind} has no frame {name[:40]!r}, or has it twice")
        names.add(name)
        allowed, letters = schema.frames[name]
        if dtype not in allowed or len(shape) != len(letters):
            raise WireError(f"{kind}: {name} is not {' or '.join(allowed)} of {len(letters)} dimensions")
        for letter, length in zip(letters, shape, strict=True):
            if type(length) is not int or length < 0 or lengths.setdefault(letter, length) != length:
                raise WireError(f"{kind}: the shape of {name} does not fit")
    optional = {name for group in schema.together for name in group}
    missing = [name for name in schema.frames if name not in names and name not in optional]
    if missing:
        raise WireError(f"{kind} lacks {', '.join(missing)}")
    for group in schema.together:
        if 0 < len(names.intersection(group)) < len(group):
            raise WireError(f"{kind} has only some of {', '.join(group)}")
    return lengths


def _arrays(
    kind: str, specs: list[Any], frames: Sequence[bytes | memoryview], lengths: Mapping[str, int]
) -> dict[str, tuple[str, np.ndarray]]:
    """The numbers of frames whose shapes have been checked."""
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for (name, dtype, shape), frame in zip(specs, frames, strict=True):
        count = math.prod(shape)
        size = count * _DTYPES[dtype].itemsize
        if dtype != "steps":
            data: bytes | memoryview | None = frame
        elif count > MAX_STEPS + MAX_STEPS_PER_LABEL * lengths["m"]:
            raise WireError(f"{kind}: {name} has {count} numbers for {lengths['m']} labels")
        else:
            data = _inflated(frame, size)
        if data is None or len(data) != size or len(frame) > MAX_FRAME_BYTES:
            raise WireError(f"{kind}: {name} has {len(frame)} bytes, its shape {shape} others")
        arrays[name] = dtype, np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)
    return arrays
