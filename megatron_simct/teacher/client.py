"""The student's end: samples go out to the replicas of a teacher in another job, and come back in any order.

`TeacherClient` is a thread that owns the sockets: it greets replicas, and gives each as much work as its
window holds. `RemoteScorer` (remote.py) is the TeacherScorer on top of it.

Which replica. Every replica reports how many tokens it holds for all students, and how many it computes a
second. A request goes to a replica that would finish before the mean (`_choose`). Many clients choose at the
same moment and from reports that are a second old, so each draws at random. If the load is uneven, or
becomes so because a replica slows down, requests that the model has not begun are recalled and sent
elsewhere (`_even_out`).

What is sent again. A request has a number. A socket keeps the order of its messages, so the reply to a
greeting settles the state of every request sent before the greeting: the replica has answered it, lists it as
held, or has lost it. Only lost requests are sent again, so a slow replica does not get a request twice. A
replica is considered dead after `silence_s` without a message, or if it reports that its model hangs; both
may come back. The first answer to a request counts; later ones are dropped and counted. After `timeout_s`
without any answer the client gives up.
"""

from __future__ import annotations

import math
import random
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import zmq

from megatron_simct.teacher.endpoints import Endpoint, Keys, Waker, connect, is_encrypted, read_keys
from megatron_simct.teacher.fingerprints import mismatch
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.lookout import Lookout
from megatron_simct.teacher.payload import misfit, score_message
from megatron_simct.teacher.scorer import TeacherError, TeacherMissing
from megatron_simct.teacher.wire import Message, WireError, decode, encode, num_bytes, quoted, with_checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Timeouts of the client, in seconds."""

    timeout_s: float
    """Give up if pending requests get no answer for this long."""
    hello_s: float = 1.0
    """Interval of greetings, which serve as heartbeats.

    A replica with many students is greeted more rarely.
    """
    silence_s: float = 10.0
    """After this silence a replica is considered dead and its requests are reassigned."""
    look_s: float = 0.5
    """Interval of looking for replicas while none is ready."""
    look_again_s: float = 10.0
    """The same while some replica is ready."""


@dataclass(slots=True, kw_only=True)
class _Replica:
    endpoint: Endpoint
    sock: zmq.Socket
    life: str = ""
    ready: bool = False
    last_seen: float = 0.0
    greeted: float = 0.0
    beat: int = 0
    """Number of the last greeting."""
    tokens: int = 0
    """Tokens of this student's requests that it has not answered."""
    others: int = 0
    """Tokens that it held for other students when it last reported."""
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backlog(self) -> int:
        return self.others + self.tokens

    @property
    def speed(self) -> float:
        """Tokens a second while it works; 0 if it has not worked yet."""
        speed = self.status.get("speed", 0.0)
        return speed if math.isfinite(speed) and speed > 0 else 0.0

    @property
    def rarer(self) -> float:
        """Factor of its interval of greetings: with many students each greets more rarely."""
        return max(1.0, self.status.get("clients", 0) / MAX_HELLOS)


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request without an answer."""

    request: TeacherRequest
    parts: Sequence[bytes | memoryview]
    """Encoded, without a checksum."""
    sent_to: str | None = None
    beat: int = 0
    """Number of the last greeting that was sent to its replica before it."""
    recalled: int | None = None
    """Number of the last greeting before its recall; None: it has not been recalled."""
    misfits: int = 0
    """Answers to it that did not fit the request."""


MAX_HELLOS = 200
"""Greetings that a replica gets in an interval; with more students, each greets more rarely."""
UNEVEN = 1.1
"""Work is recalled from a replica that would take this many times as long as the mean of all."""
IO_THREADS = 2
"""Threads that decrypt. A connection belongs to one of them."""
MAX_MISFITS = 3
"""This many misfitting answers to one request end the run: the teacher computes something else."""


class TeacherClient(Thread):
    """Owns the sockets. `submit` and `next` are called by the thread that trains."""

    def __init__(
        self,
        *,
        lookout: Lookout,
        key_file: Path | None = None,
        fingerprints: Mapping[str, Any],
        patience: Patience,
        window_tokens: int,
        where: str,
        context: zmq.Context | None = None,
    ) -> None:
        """key_file: for replicas at tcp:// addresses.

        fingerprints: values that both ends must share, as far as this end knows them; hidden_size at least.

        window_tokens: limit of a replica's unanswered tokens. where: names the flag in errors.

        context: None: the client makes its own, which ends with the thread.
        """
        super().__init__(name="teacher-client", daemon=True)
        self._lookout, self._key_file, self._fingerprints = lookout, key_file, dict(fingerprints)
        self._keys: Keys | None = None
        self._patience, self._window, self._where = patience, window_tokens, where
        self._context = context or zmq.Context(IO_THREADS)
        self._waker = Waker(self._context)
        self._poller = zmq.Poller()
        self._poller.register(self._waker.receiver, zmq.POLLIN)
        self._identity = b"s" + uuid.uuid4().bytes
        self._random = random.Random(self._identity)
        self._inbox: SimpleQueue[tuple[int, _Open] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Sequence[Any], Message] | TeacherError] = SimpleQueue()
        self._replicas: dict[str, _Replica] = {}
        self._open: dict[int, _Open] = {}
        self._waiting: deque[int] = deque()
        self._number = 0
        self._looked = self._evened = -math.inf
        self._progress = time.monotonic()
        self._closing = False
        self._failed = False
        self._met = SimpleQueue[bool]()
        self.counts = dict.fromkeys(
            (
                "answers",
                "again",
                "late",
                "malformed",
                "handed_back",
                "recalled",
                "request_bytes",
                "answer_bytes",
            ),
            0,
        )

    # What the training thread calls

    def submit(self, request: TeacherRequest) -> None:
        """Send it when a replica's window has room."""
        self._number += 1
        entry = _Open(request=request, parts=encode(score_message(self._number, request), checked=False))
        self._inbox.put((self._number, entry))
        self._waker.wake()

    def forget(self) -> None:
        """Give up all requests that were submitted before; later ones are sent as usual."""
        self._inbox.put(None)
        self._waker.wake()

    def arrived(self) -> bool:
        """Whether `next` would return at once."""
        return not self._results.empty()

    def next(self) -> tuple[Sequence[Any], Message]:
        """The next answer, encoded and decoded. Raises TeacherError if none will come."""
        try:
            result = self._results.get(timeout=self._patience.timeout_s + 60)
        except Empty:  # the thread itself has died
            result = TeacherError(f"{self._where}: the thread that waits for the teacher has ended")
        if isinstance(result, TeacherError):
            raise result
        return result

    def meet(self) -> None:
        """Wait until a replica has sent a welcome. Raises TeacherError if none does, or if one refuses."""
        try:
            self._met.get(timeout=self._patience.timeout_s)
        except Empty:
            raise TeacherMissing(self._nobody("no teacher")) from None
        if self._failed:
            self.next()

    def status(self) -> dict[str, dict[str, Any]]:
        """The last status that each replica has reported."""
        return {name: dict(replica.status) for name, replica in list(self._replicas.items()) if replica.ready}

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self.join(5)

    # The thread

    def run(self) -> None:
        try:
            while not self._closing:
                self.turn(100 if self._open else 300)
        except Exception as error:
            self._fail(f"{self._where}: {type(error).__name__}: {error}")
            raise
        finally:
            for replica in self._replicas.values():
                replica.sock.close(0)
            self._waker.close()
            self._context.term()

    def turn(self, wait_ms: int) -> None:
        """Do what is due, wait for messages, and take in all that have come."""
        now = time.monotonic()
        self._look(now)
        self._greet(now)
        self._even_out(now)
        self._dispatch()
        self._give_up(now)
        events = dict(self._poller.poll(wait_ms))
        self._waker.clear()
        self._take_in()
        for name, replica in list(self._replicas.items()):
            if replica.sock in events:
                self._receive(name, replica)

    def _take_in(self) -> None:
        while True:
            try:
                submitted = self._inbox.get_nowait()
            except Empty:
                return
            if submitted is None:
                for entry in self._open.values():
                    self._release(entry)
                self._open.clear()
                self._waiting.clear()
                self._failed = False
                continue
            number, entry = submitted
            if not self._open:
                self._progress = time.monotonic()
            self._open[number] = entry
            self._waiting.append(number)

    def _look(self, now: float) -> None:
        """Connect to replicas that are new or live at another address, and leave those that are gone."""
        met = any(replica.ready for replica in self._replicas.values())
        if now - self._looked < (self._patience.look_again_s if met else self._patience.look_s):
            return
        self._looked = now
        try:
            found = self._lookout.look()
        except ValueError as error:
            self._fail(f"{self._where}: {error}")
            return
        for name in [n for n, r in self._replicas.items() if n not in found or found[n] != r.endpoint]:
            self._receive(name, self._replicas[name])  # requests that it may have handed back before it ended
            self._lose(name)
            sock = self._replicas.pop(name).sock
            self._poller.unregister(sock)
            sock.close(0)
        for name, endpoint in found.items():
            if name not in self._replicas:
                try:
                    keys = self._keys_for(endpoint)
                except ValueError as error:
                    self._fail(f"--teacher-client-key {error}")
                    return
                try:
                    sock = connect(self._context, endpoint.address, keys, self._identity)
                except ValueError as error:
                    self._fail(f"{self._where}: {error}")
                    return
                self._poller.register(sock, zmq.POLLIN)
                self._replicas[name] = _Replica(endpoint=endpoint, sock=sock)

    def _keys_for(self, endpoint: Endpoint) -> Keys | None:
        """Read once: they are those of the run. ValueError if the file has none."""
        if not is_encrypted(endpoint) or self._key_file is None:
            return None
        if self._keys is None:
            self._keys = read_keys(self._key_file)
        return self._keys

    def _greet(self, now: float) -> None:
        for name, replica in self._replicas.items():
            if now - replica.greeted >= self._patience.hello_s * replica.rarer:
                replica.greeted = now
                replica.beat += 1
                fields = {"fingerprints": self._fingerprints, "beat": replica.beat}
                self._send(replica, encode(Message(kind="hello", fields=fields), checked=False))
            silence_s = max(self._patience.silence_s, 3 * self._patience.hello_s * replica.rarer)
            if replica.ready and now - replica.last_seen > silence_s:
                self._lose(name)

    def _lose(self, name: str) -> None:
        """Put the replica's unanswered requests back into the queue."""
        self._replicas[name].ready = False
        self._wait_again([number for number, entry in self._open.items() if entry.sent_to == name])

    def _wait_again(self, lost: Sequence[int]) -> None:
        """Put lost requests back into the queue."""
        for number in reversed(lost):
            self._take_back(self._open[number])
            self._waiting.appendleft(number)
        self.counts["again"] += len(lost)

    def _even_out(self, now: float) -> None:
        """Recall this student's share of what a replica holds beyond the mean, from the end of its queue."""
        if now - self._evened < self._patience.hello_s:
            return
        self._evened = now
        ready = self._ready()
        if len(ready) < 2 or not any(self._replicas[name].speed for name in ready):
            return
        speeds = self._speeds(ready)
        mean_s = sum(self._replicas[name].backlog for name in ready) / sum(speeds.values())
        for name in ready:
            replica = self._replicas[name]
            seconds = replica.backlog / speeds[name]
            if seconds > UNEVEN * mean_s and seconds - mean_s > self._patience.hello_s / 2:
                self._recall(name, replica.tokens * (1 - mean_s / seconds))

    def _recall(self, name: str, tokens: float) -> None:
        """Ask a replica to hand back requests of this student with about this many tokens."""
        numbers = []
        for number, entry in reversed(self._open.items()):
            if tokens <= 0:
                break
            if entry.sent_to != name:
                continue
            size = entry.request.num_tokens
            if entry.recalled is None and self._random.random() < tokens / size:
                entry.recalled = self._replicas[name].beat
                numbers.append(number)
            tokens -= size
        if numbers:
            self._send_recall(self._replicas[name], numbers)

    def _send_recall(self, replica: _Replica, numbers: Sequence[int]) -> None:
        frames = {"requests": ("int32", np.array(numbers, np.int32))}
        self._send(replica, encode(Message(kind="recall", frames=frames), checked=False))

    def _dispatch(self) -> None:
        while self._waiting:
            number = self._waiting[0]
            name = self._choose(self._open[number].request.num_tokens)
            if name is None:
                return
            self._waiting.popleft()
            self._assign(number, name)

    def _ready(self, other_than: str | None = None) -> list[str]:
        return [name for name, replica in self._replicas.items() if replica.ready and name != other_than]

    def _choose(self, tokens: int, other_than: str | None = None) -> str | None:
        """A replica whose window has room, drawn by how much it can take before it ends
        as late as the mean.
        """
        ready = self._ready(other_than)
        free = [name for name in ready if self._has_room(name, tokens)]
        if not free:
            return None
        speeds = self._speeds(ready)
        backlogs = {name: self._replicas[name].backlog for name in ready}
        level_s = (sum(backlogs.values()) + tokens) / sum(speeds.values())
        room = [max(0.0, level_s * speeds[name] - backlogs[name]) for name in free]
        if not any(room):
            return min(free, key=lambda name: backlogs[name] / speeds[name])
        return self._random.choices(free, room)[0]

    def _has_room(self, name: str, tokens: int) -> bool:
        outstanding = self._replicas[name].tokens
        return not outstanding or outstanding + tokens <= self._window

    def _speeds(self, names: Sequence[str]) -> dict[str, float]:
        """Tokens a second; of a replica that has not worked yet, the mean of the others."""
        speeds = {name: self._replicas[name].speed for name in names}
        known = [speed for speed in speeds.values() if speed]
        mean = sum(known) / len(known) if known else 1.0
        return {name: speed or mean for name, speed in speeds.items()}

    def _assign(self, number: int, name: str) -> None:
        entry, replica = self._open[number], self._replicas[name]
        self._take_back(entry)
        entry.sent_to, entry.beat, entry.recalled = name, replica.beat, None
        replica.tokens += entry.request.num_tokens
        self.counts["request_bytes"] += num_bytes(entry.parts)
        self._send(replica, entry.parts)

    def _take_back(self, entry: _Open) -> None:
        """Mark the request as not sent to any replica."""
        self._release(entry)
        entry.sent_to = None

    def _release(self, entry: _Open) -> None:
        """Free the request's tokens in the window of its replica."""
        if entry.sent_to is not None and entry.sent_to in self._replicas:
            self._replicas[entry.sent_to].tokens -= entry.request.num_tokens

    def _send(self, replica: _Replica, parts: Sequence[bytes | memoryview]) -> None:
        """parts: without a checksum."""
        if not is_encrypted(replica.endpoint):
            parts = with_checksum(parts)
        try:
            replica.sock.send_multipart(parts, zmq.NOBLOCK, copy=True)
        except zmq.ZMQError:
            pass  # not connected, or its queue is full: it is sent again

    def _receive(self, name: str, replica: _Replica) -> None:
        while True:
            try:
                parts = [frame.buffer for frame in replica.sock.recv_multipart(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                return
            try:
                message = decode(parts, checked=not is_encrypted(replica.endpoint))
            except WireError as error:
                self.counts["malformed"] += 1
                if "protocol version" in str(error):
                    self._fail(
                        f"{self._where}: replica {name} ({replica.endpoint.address}): {quoted(str(error))}"
                    )
                continue
            replica.last_seen = time.monotonic()
            match message.kind:
                case "welcome":
                    self._welcomed(name, replica, message)
                case "scored":
                    self._answered(name, replica, parts, message)
                case "returned":
                    self._handed_back(name, message)
                case "refused" if message.fields["request"] < 0 or message.fields["request"] in self._open:
                    number = message.fields["request"]
                    what = f" sample {self._open[number].request.sample_id}" if number >= 0 else ""
                    who = f"{self._where}: replica {name} ({replica.endpoint.address})"
                    self._fail(f"{who} refuses{what}: {quoted(message.fields['reason'])}")
                case _:
                    self.counts["malformed"] += 1

    def _welcomed(self, name: str, replica: _Replica, message: Message) -> None:
        theirs = message.fields["fingerprints"]
        if not _are_fingerprints(theirs) or not _is_status(message.fields["status"]):
            self.counts["malformed"] += 1
            return
        for key, value in theirs.items():
            ours = self._fingerprints.get(key)
            if value is not None and ours is not None and value != ours:
                reason = quoted(mismatch(key, teacher=value, student=ours))
                self._fail(f"{self._where}: replica {name}: {reason}")
                return
        # Values that only the teacher knew: every later replica and process must share them.
        for key, value in theirs.items():
            if value is not None and self._fingerprints.get(key) is None:
                self._fingerprints[key] = value
        if replica.life and replica.life != message.fields["life"]:
            # a new process at the same address, which has lost the requests of the old one
            self._lose(name)
        if not replica.ready:
            self._met.put(True)
        replica.life, replica.status = message.fields["life"], message.fields["status"]
        replica.ready = not replica.status.get("draining", False)
        self._compare(name, replica, message.fields["beat"], message.frames["holds"][1].tolist())
        if replica.status.get("stalled", False):
            self._lose(name)

    def _compare(self, name: str, replica: _Replica, beat: int, holds: Sequence[int]) -> None:
        """Compare the requests that a replica holds with those that it should hold."""
        held = set(holds)
        own = sum(self._open[number].request.num_tokens for number in held & self._open.keys())
        replica.others = max(0, int(replica.status.get("held_tokens", 0)) - own)
        expected = {number for number, entry in self._open.items() if entry.sent_to == name}
        for entry in map(self._open.__getitem__, expected & held):
            if entry.recalled is not None and entry.recalled < beat:
                entry.recalled = None  # the model had begun it
        self._wait_again(sorted(n for n in expected - held if self._open[n].beat < beat))
        if held - expected:  # meanwhile sent to another replica
            self._send_recall(replica, sorted(held - expected))

    def _answered(self, name: str, replica: _Replica, parts: Sequence[Any], message: Message) -> None:
        entry = self._open.get(message.fields["request"])
        if entry is None:
            self.counts["late"] += 1
            return
        marks = self._fingerprints
        reason = misfit(
            message, entry.request, hidden_size=marks["hidden_size"], vocab_size=marks["teacher_vocabulary"]
        )
        if reason is not None:
            self.counts["malformed"] += 1
            entry.misfits += 1
            if entry.misfits >= MAX_MISFITS:
                self._fail(
                    f"{self._where}: replica {name} ({replica.endpoint.address}): {entry.misfits} answers to "
                    f"sample {entry.request.sample_id} do not fit, the last one because {quoted(reason)}"
                )
            elif entry.sent_to == name:
                self.counts["again"] += 1
                other = self._choose(entry.request.num_tokens, name) or next(iter(self._ready(name)), name)
                self._assign(message.fields["request"], other)
            return
        del self._open[message.fields["request"]]
        if entry.sent_to is None:
            self._waiting.remove(message.fields["request"])
        self._release(entry)
        self._progress = time.monotonic()
        self.counts["answers"] += 1
        self.counts["answer_bytes"] += num_bytes(parts)
        self._results.put((parts, message))

    def _handed_back(self, name: str, message: Message) -> None:
        number = message.fields["request"]
        entry = self._open.get(number)
        if entry is None or entry.sent_to != name:
            return  # it was sent to another replica meanwhile
        if entry.recalled is None:
            self._replicas[name].ready = False  # until its next welcome
        self.counts["handed_back" if entry.recalled is None else "recalled"] += 1
        self._take_back(entry)
        self._waiting.append(number)

    def _give_up(self, now: float) -> None:
        if self._open and not self._failed and now - self._progress > self._patience.timeout_s:
            what = f"{len(self._open)} samples are unanswered and no answer has come"
            self._fail(self._nobody(what), TeacherMissing)

    def _nobody(self, what: str) -> str:
        now = time.monotonic()
        known = []
        for name, replica in self._replicas.items():
            last = f"{now - replica.last_seen:.0f} s ago" if replica.last_seen else "never"
            known.append(f"{name} ({replica.endpoint.address}, last heard {last})")
        text = (
            f"{self._where}: {what} for {self._patience.timeout_s / 60:g} minutes "
            f"(--teacher-timeout-minutes); replicas: {', '.join(known) or 'none was found'}; start the "
            "teacher and resume"
        )
        ignored = self._lookout.ignored()[:3]
        if ignored:
            text += f"; files that are not a replica's: {'; '.join(ignored)}"
        return text

    def _fail(self, reason: str, kind: type[TeacherError] = TeacherError) -> None:
        self._failed = True
        self._results.put(kind(reason))
        self._met.put(False)


def _are_fingerprints(values: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, str | int | None) for k, v in values.items())


def _is_status(status: Mapping[Any, Any]) -> bool:
    """Whether it has the numbers that `RemoteScorer.status_text` adds up, and valid flags of the replica."""
    always = ("tokens_per_s", "queue")
    numbers = {name: status.get(name, 0) for name in ("speed", "held_tokens", "clients")}
    numbers |= {name: status.get(name) for name in always}
    are_numbers = all(type(value) in (int, float) and 0 <= value < 1e15 for value in numbers.values())
    return are_numbers and all(type(status.get(name, False)) is bool for name in ("draining", "stalled"))
