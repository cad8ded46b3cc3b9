"""ZeroMQ server of one teacher replica, and its serving loop.

The server is a thread on one rank of the replica: the first rank of the last pipeline stage, where answers
are made. It owns the socket, greets students, checks requests and queues them until the model takes them. So
it answers while the model computes, and a student can tell a busy replica from a dead one. Its replies to
greetings list the requests that it holds. Answers and replies leave in the order in which they became true;
ZeroMQ's I/O threads encrypt them. `serve` takes requests, shares them with all ranks of the replica, and
returns the answers.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import zmq
from zmq.utils.monitor import recv_monitor_message

from megatron_simct.files import write_private
from megatron_simct.parallel.initialize import Groups
from megatron_simct.teacher.endpoints import (
    Endpoint,
    Keys,
    Waker,
    accept_only,
    bind,
    is_encrypted,
    publish,
    this_host,
    withdraw,
)
from megatron_simct.teacher.exchange import Parts, share
from megatron_simct.teacher.fingerprints import mismatch
from megatron_simct.teacher.forward import HiddenDtype, TeacherForward, TeacherRequest, by_length
from megatron_simct.teacher.payload import check_request, read_score, scored_message, too_many_tokens
from megatron_simct.teacher.wire import Message, TooManyTokens, WireError, decode, encode, num_bytes

MAX_QUEUED_BYTES = 1 << 30
"""Limit of the bytes of waiting requests, encoded and decoded; beyond it requests are handed back."""
IO_THREADS = 4
"""Threads that encrypt and send. A connection belongs to one of them; one encrypts some 150 MB a second."""

_REFUSED_CONNECTION = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request that is queued or in progress."""

    client: bytes
    number: int
    request: TeacherRequest
    parts: Parts
    """The encoded request, for the other ranks."""

    @property
    def key(self) -> tuple[bytes, int]:
        return self.client, self.number

    @property
    def num_bytes(self) -> int:
        """Memory of the request, encoded and decoded."""
        return num_bytes(self.parts) + self.request.num_bytes


class _Pace:
    """Speed of the model, from the times at which it takes and answers requests."""

    def __init__(self) -> None:
        self._since: float | None = None
        """When it took the batch in progress, or got a request that it has not taken; None: it is idle."""
        self._busy_s, self._tokens, self._longest_s = 0.0, 0, 0.0
        self._last = deque([(0.0, 0)], maxlen=16)

    def begin(self, now: float) -> None:
        """A batch begins, or a request waits."""
        self._since = now

    def end(self, now: float, tokens: int) -> None:
        """The batch in progress is answered."""
        seconds = now - (self._since if self._since is not None else now)
        self._busy_s, self._tokens = self._busy_s + seconds, self._tokens + tokens
        self._longest_s = max(self._longest_s, seconds)
        self._last.append((self._busy_s, self._tokens))
        self._since = None

    def speed(self, now: float, in_work: int) -> float:
        """Tokens a second of the last batches, less if the present one is late; 0 before the first answer."""
        then_s, then = self._last[0]
        busy_s, tokens = self._busy_s - then_s, self._tokens - then
        if not tokens or busy_s <= 0:
            return 0.0
        if self._since is not None and in_work:
            busy_s += max(0.0, now - self._since - in_work * busy_s / tokens)
        return tokens / busy_s

    def is_stalled(self, now: float, stall_s: float) -> bool:
        """Whether work has waited for much longer than the longest batch took."""
        return self._since is not None and now - self._since > max(stall_s, 10 * self._longest_s)


class ReplicaServer(Thread):
    """Owns the socket of one replica.

    All methods but `run` are called by the thread that runs the model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        address: str,
        number: int,
        keys: Keys | None,
        fingerprints: Mapping[str, Any],
        vocab_size: int,
        max_tokens: int,
        life: str,
        forget_s: float = 60.0,
        stall_s: float = 120.0,
    ) -> None:
        """address: see `bind`. fingerprints: a student with another value for one of them is refused; None
        matches any value.

        forget_s: a student without a message for this long is dropped with its requests. stall_s: the status
        reports `stalled` if the model has made no progress for this long and for ten times its longest batch.
        """
        super().__init__(name="teacher-server", daemon=True)
        self._folder = folder
        self._fingerprints = dict(fingerprints)
        self._vocab_size, self._max_tokens = vocab_size, max_tokens
        self._forget_s, self._stall_s = forget_s, stall_s
        self._context = zmq.Context(IO_THREADS)
        self._authenticator = accept_only(self._context, keys) if keys is not None else None
        self._router, bound = bind(self._context, address, keys, number=number)
        self._monitor = self._router.get_monitor_socket(_REFUSED_CONNECTION)
        self._waker = Waker(self._context)
        self.endpoint = Endpoint(
            replica=name, address=bound, life=life, host=this_host(), pid=psutil.Process().pid
        )
        self._condition = Condition()
        self._queue: OrderedDict[tuple[bytes, int], Work] = OrderedDict()
        self._queued_bytes = self._held_tokens = 0
        self._in_progress: dict[tuple[bytes, int], Work] = {}
        self._held: dict[bytes, set[int]] = {}
        """By student: numbers of its requests that are queued or in progress."""
        self._outbox: deque[tuple[bytes, Message]] = deque()
        self._pace = _Pace()
        self._done = 0
        """Tokens of the batch in progress that are answered."""
        self._last_seen: dict[bytes, float] = {}
        self._welcome: set[bytes] = set()
        self._draining = self._closing = False
        self._counts = dict.fromkeys(
            (
                "requests",
                "tokens",
                "labels",
                "answer_bytes",
                "again",
                "handed_back",
                "recalled",
                "malformed",
                "refused",
                "failed_handshakes",
                "undeliverable",
            ),
            0,
        )
        self._begin, self._memory_mib = time.monotonic(), _memory_mib()
        self._rate = deque([(self._begin, 0)], maxlen=16)

    # Called by the model's thread

    def start(self) -> None:
        """Publish the endpoint and start the thread.

        Raises OSError if the folder cannot be written, and ValueError if another replica has the name; no
        file is left then.
        """
        try:
            publish(self._folder, self.endpoint)
        except (OSError, ValueError):
            self._release()
            with contextlib.suppress(OSError):
                withdraw(self._folder, self.endpoint)
            raise
        super().start()

    def take(self, max_tokens: int, wait_s: float) -> list[Work]:
        """The oldest requests, at least one and at most max_tokens tokens; empty if none came within wait_s.

        Raises RuntimeError if the thread has died: no request would ever come.
        """
        with self._condition:
            if not self._queue:
                self._condition.wait(wait_s)
            if not self.is_alive():
                raise RuntimeError(
                    f"teacher replica {self.endpoint.replica}: its server thread has ended; see above"
                )
            batch: list[Work] = []
            tokens = 0
            while self._queue:
                work = next(iter(self._queue.values()))
                tokens += work.request.num_tokens
                if batch and tokens > max_tokens:
                    break
                self._unqueue(work)
                self._in_progress[work.key] = work
                batch.append(work)
            if batch:
                self._pace.begin(time.monotonic())
        return batch

    def answer(self, work: Work, message: Message) -> None:
        """Send the answer to a request in progress."""
        with self._condition:
            self._counts["requests"] += 1
            self._counts["tokens"] += work.request.num_tokens
            self._counts["labels"] += len(work.request.label_ids)
            self._send_later(work.client, message)
            self._finish(work, tokens=work.request.num_tokens)
        self._waker.wake()

    def hand_back(self, work: Work) -> None:
        """Return a request in progress unanswered."""
        with self._condition:
            self._counts["handed_back"] += 1
            self._send_later(work.client, _returned(work.number, "the teacher stops"))
            self._finish(work, tokens=0)

    def refuse(self, work: Work, reason: str) -> None:
        """Refuse a request in progress: it will never be answered."""
        with self._condition:
            self._counts["refused"] += 1
            self._refuse(work.client, work.number, reason)
            self._finish(work, tokens=0)
        self._waker.wake()

    def drain(self) -> None:
        """Accept no more requests and hand back the queued ones."""
        with self._condition:
            self._draining = True
            for work in list(self._queue.values()):
                self._unqueue(work)
                self._forget(work)
                self._send_later(work.client, _returned(work.number, "the teacher stops"))
                self._counts["handed_back"] += 1
        self._waker.wake()

    def _unqueue(self, work: Work) -> None:
        del self._queue[work.key]
        self._queued_bytes -= work.num_bytes

    def _finish(self, work: Work, *, tokens: int) -> None:
        if self._in_progress.pop(work.key, None) is None:
            return
        self._forget(work)
        self._done += tokens
        if not self._in_progress:
            now = time.monotonic()
            self._pace.end(now, self._done)
            self._done = 0
            if self._queue:
                self._pace.begin(now)

    def _forget(self, work: Work) -> None:
        """Remove the request from what this replica reports as held."""
        self._held_tokens -= work.request.num_tokens
        held = self._held[work.client]
        held.discard(work.number)
        if not held:
            del self._held[work.client]

    def close(self, timeout_s: float = 10.0) -> None:
        """Send what is left, end the thread, and remove the replica's files."""
        with self._condition:
            self._closing = True
        self.join(timeout_s)
        withdraw(self._folder, self.endpoint)

    def withdraw(self) -> None:
        """Remove the replica's files. May be called by any thread when the process ends at once."""
        withdraw(self._folder, self.endpoint)

    def status(self) -> dict[str, Any]:
        """Counters since the start, and the present state."""
        with self._condition:
            now, tokens = time.monotonic(), self._counts["tokens"]
            then, before = self._rate[0]
            in_work = sum(work.request.num_tokens for work in self._in_progress.values())
            return {
                **self._counts,
                "tokens_per_s": round((tokens - before) / max(now - then, 1e-3), 1),
                "speed": round(self._pace.speed(now, in_work), 1),
                "queue": len(self._queue),
                "in_work": len(self._in_progress),
                "held_tokens": self._held_tokens,
                "clients": len(self._welcome),
                "memory_mib": self._memory_mib,
                "up_s": round(now - self._begin),
                "draining": self._draining,
                "stalled": bool(self._queue or in_work) and self._pace.is_stalled(now, self._stall_s),
            }

    # The thread

    def run(self) -> None:
        try:
            self._serve_students()
        finally:
            self._release()

    def _serve_students(self) -> None:
        """Receive and send until `close`."""
        poller = zmq.Poller()
        for sock in (self._router, self._monitor, self._waker.receiver):
            poller.register(sock, zmq.POLLIN)
        next_status = 0.0
        while True:
            events = dict(poller.poll(200))
            with self._condition:
                closing = self._closing
            self._waker.clear()
            if self._monitor in events:
                self._count_refused_connections()
            if self._router in events:
                self._receive()
            self._send()
            if closing:
                return
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + 1.0
                self._every_second()

    def _release(self) -> None:
        self._router.disable_monitor()
        self._router.close(2_000)  # linger: the last messages may still be in transit
        self._monitor.close(0)
        self._waker.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def _every_second(self) -> None:
        self._memory_mib = _memory_mib()
        with self._condition:
            self._rate.append((time.monotonic(), self._counts["tokens"]))
            for client in [
                c for c, last_seen in self._last_seen.items() if time.monotonic() - last_seen > self._forget_s
            ]:
                del self._last_seen[client]
                self._welcome.discard(client)
                for work in [work for work in self._queue.values() if work.client == client]:
                    self._unqueue(work)
                    self._forget(work)
        text = json.dumps(
            {"replica": self.endpoint.replica, "address": self.endpoint.address, **self.status()}
        )
        with contextlib.suppress(OSError):  # a full disk must not stop the server
            write_private(
                self._folder / f"{self.endpoint.replica}.status", text + "\n", mode=0o644, on_disk=False
            )

    def _receive(self) -> None:
        for _ in range(256):  # then the outbox and the status get their turn
            try:
                client, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode(parts, checked=not is_encrypted(self.endpoint), max_tokens=self._max_tokens)
            except TooManyTokens as error:
                if client in self._welcome:
                    self._counts["refused"] += 1
                    self._refuse(client, error.request, too_many_tokens(error.num_tokens, self._max_tokens))
                continue
            except WireError as error:
                self._counts["malformed"] += 1
                if "protocol version" in str(error):
                    self._refuse(client, -1, str(error))
                continue
            with self._condition:
                self._last_seen[client] = time.monotonic()
                match message.kind:
                    case "hello":
                        self._greet(client, message)
                    case "score" if client in self._welcome:
                        self._accept(client, message, parts)
                    case "recall":
                        self._give_back(client, message.frames["requests"][1].tolist())
                    case "score":
                        pass  # it greeted an earlier process at this address; its next message is a hello
                    case _:
                        self._counts["malformed"] += 1

    def _greet(self, client: bytes, message: Message) -> None:
        theirs = message.fields["fingerprints"]
        for name, ours in self._fingerprints.items():
            if ours is not None and theirs.get(name) is not None and theirs[name] != ours:
                self._welcome.discard(client)
                self._counts["refused"] += 1
                self._refuse(client, -1, mismatch(name, teacher=ours, student=theirs[name]))
                return
        self._welcome.add(client)
        fields = {"fingerprints": self._fingerprints, "life": self.endpoint.life, "status": self.status()}
        fields["beat"] = message.fields["beat"]
        holds = np.array(sorted(self._held.get(client, ())), np.int32)
        self._send_later(client, Message(kind="welcome", fields=fields, frames={"holds": ("int32", holds)}))

    def _accept(self, client: bytes, message: Message, parts: Sequence[bytes]) -> None:
        work = Work(client=client, number=message.fields["request"], request=read_score(message), parts=parts)
        if work.key in self._queue or work.key in self._in_progress:
            self._counts["again"] += 1
            return
        try:
            check_request(work.request, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        except ValueError as error:
            self._counts["refused"] += 1
            self._refuse(client, work.number, str(error))
            return
        if self._draining or self._queued_bytes > MAX_QUEUED_BYTES:
            self._counts["handed_back"] += 1
            reason = "the teacher stops" if self._draining else "the queue is full"
            self._send_later(client, _returned(work.number, reason))
            return
        if not self._queue and not self._in_progress:
            self._pace.begin(time.monotonic())
        self._queue[work.key] = work
        self._queued_bytes += work.num_bytes
        self._held_tokens += work.request.num_tokens
        self._held.setdefault(client, set()).add(work.number)
        self._condition.notify()

    def _give_back(self, client: bytes, numbers: Sequence[int]) -> None:
        """Hand back requests that are queued; those in progress stay."""
        for number in numbers:
            work = self._queue.get((client, number))
            if work is not None:
                self._unqueue(work)
                self._forget(work)
                self._counts["recalled"] += 1
                self._send_later(client, _returned(number, "recalled"))

    def _refuse(self, client: bytes, number: int, reason: str) -> None:
        self._send_later(client, Message(kind="refused", fields={"request": number, "reason": reason}))

    def _send_later(self, client: bytes, message: Message) -> None:
        self._outbox.append((client, message))

    def _send(self) -> None:
        while True:
            with self._condition:
                if not self._outbox:
                    return
                client, message = self._outbox.popleft()
            parts = encode(message, checked=not is_encrypted(self.endpoint))
            if message.kind == "scored":
                self._counts["answer_bytes"] += num_bytes(parts)
            try:
                self._router.send_multipart([client, *parts], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:  # the student is gone or does not read: it will ask again
                self._counts["undeliverable"] += 1

    def _count_refused_connections(self) -> None:
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._counts["failed_handshakes"] += 1


def _memory_mib() -> int:
    return psutil.Process().memory_info().rss >> 20


def _returned(number: int, reason: str) -> Message:
    return Message(kind="returned", fields={"request": number, "reason": reason})


_NOTHING = TeacherRequest(
    sample_id=-1,
    prompt_ids=np.zeros(1, np.int32),
    label_ids=np.zeros(0, np.int32),
    rows=np.zeros(0, np.int32),
    hidden=False,
    topk=0,
    token_ids=False,
    byte_side=None,
)
"""Dummy request: keeps expert-parallel replicas in step if this one has no work."""


def _most(value: int, groups: Groups) -> int:
    """The largest value among the replicas that share experts."""
    values = torch.tensor(value, dtype=torch.int64, device=groups.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=groups.exchange)
    return int(values)


def serve(
    server: ReplicaServer | None,
    forward: TeacherForward,
    groups: Groups,
    *,
    max_tokens: int,
    hidden_dtype: HiddenDtype,
    stop: Callable[[], bool],
) -> None:
    """Answer requests until `stop()` is true on the rank of the server. Requests in progress are finished,
    queued ones are handed back.

    Collective over one model replica, and over the replicas that share experts: these run as many
    micro-batches as the one with most work, and end together. The pipeline is given several micro-batches of
    max_tokens at a time.
    """
    in_flight = max(2, 2 * groups.pp.size())
    stopping = False
    try:
        while True:
            works: list[Work] = []
            if server is not None:
                stopping = stop()
                works = [] if stopping else server.take(in_flight * max_tokens, wait_s=0.2)
            messages: list[Parts] | None = None if stopping else [work.parts for work in works]
            if groups.is_last_stage:
                messages = share(messages, groups.tp_cp, source=0, device=groups.device)
            messages = share(messages, groups.pp, source=groups.pp.size() - 1, device=groups.device)
            if groups.passes_together:
                stopping_everywhere = _most(int(messages is None), groups)
                messages = None if stopping_everywhere else messages
            if messages is None:
                if server is not None:
                    for work in works:
                        server.hand_back(work)
                break
            requests = (
                [work.request for work in works]
                if server is not None
                else [read_score(decode(parts, checked=False)) for parts in messages]
            )
            micro_batches = by_length(requests, max_tokens=max_tokens)
            if groups.passes_together:
                idle = _most(len(micro_batches), groups) - len(micro_batches)
                micro_batches += [[_NOTHING]] * idle
            answers = forward.run(micro_batches)
            if server is not None:
                work_of = {id(work.request): work for work in works}
                requests = [request for batch in micro_batches for request in batch]
                for request, scored in zip(requests, answers, strict=True):
                    if request is _NOTHING:
                        continue
                    work = work_of[id(request)]
                    server.answer(work, scored_message(work.number, scored, hidden_dtype))
    finally:
        if server is not None:
            server.drain()
            server.close()
