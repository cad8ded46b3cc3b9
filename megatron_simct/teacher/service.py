"""One teacher replica's door to the students, and the loop that answers what comes in.

The door is a thread on one rank of the replica, the first of the last pipeline stage, where answers are made: it owns
the socket, greets students, checks requests and keeps them until the model takes them. So it answers while the model
computes, and a student can tell a busy replica from a dead one. `serve` takes requests, tells all ranks of the replica,
and hands answers back.
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

from megatron_simct.parallel.initialize import Groups
from megatron_simct.teacher.endpoints import (
    Endpoint,
    Keys,
    Waker,
    bind,
    only,
    publish,
    this_host,
    withdraw,
    write_private,
)
from megatron_simct.teacher.exchange import Parts, share
from megatron_simct.teacher.fingerprints import mismatch
from megatron_simct.teacher.forward import HiddenDtype, TeacherForward, TeacherRequest, by_length
from megatron_simct.teacher.payload import check_request, read_score, scored_message
from megatron_simct.teacher.wire import Message, WireError, decode, encode, num_bytes

MAX_QUEUED_BYTES = 1 << 30
"""Of requests that wait; beyond it they are handed back."""

_REFUSED_CONNECTION = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request that waits for the model, or is with it."""

    client: bytes
    number: int
    request: TeacherRequest
    parts: Parts
    """As it came, for the other ranks."""

    @property
    def key(self) -> tuple[bytes, int]:
        return self.client, self.number


class Door(Thread):
    """Owns the socket of one replica. Other methods than `run` are called by the thread that runs the model."""

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
    ) -> None:
        """address: see `bind`. fingerprints: a student that has another value for one of them is refused; None: any.

        forget_s: a student that has said nothing for so long is gone, and its requests with it.
        """
        super().__init__(name="teacher-door", daemon=True)
        self._folder = folder
        self._fingerprints = dict(fingerprints)
        self._vocab_size, self._max_tokens, self._forget_s = vocab_size, max_tokens, forget_s
        self._context = zmq.Context()
        self._authenticator = only(self._context, keys) if keys is not None else None
        self._router, bound = bind(self._context, address, keys, number=number)
        self._monitor = self._router.get_monitor_socket(_REFUSED_CONNECTION)
        self._waker = Waker(self._context)
        self.endpoint = Endpoint(replica=name, address=bound, life=life, host=this_host(), pid=psutil.Process().pid)
        self._condition = Condition()
        self._queue: OrderedDict[tuple[bytes, int], Work] = OrderedDict()
        self._queued_bytes = 0
        self._taken: set[tuple[bytes, int]] = set()
        self._outbox: deque[tuple[bytes, Sequence[bytes | memoryview]]] = deque()
        self._heard: dict[bytes, float] = {}
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
                "malformed",
                "refused",
                "strangers",
                "undeliverable",
            ),
            0,
        )
        self._begin = time.monotonic()
        self._rate = deque([(self._begin, 0)], maxlen=16)

    # What the model's thread calls

    def start(self) -> None:
        """Make the replica known, and open. OSError where the folder refuses; then nothing is left behind."""
        try:
            publish(self._folder, self.endpoint)
        except OSError:
            self._let_go()
            with contextlib.suppress(OSError):
                withdraw(self._folder, self.endpoint)
            raise
        super().start()

    def take(self, max_tokens: int, wait_s: float) -> list[Work]:
        """The requests that came first, up to so many tokens but at least one; after wait_s seconds maybe none.

        RuntimeError where the thread has died: no request would ever come.
        """
        with self._condition:
            if not self._queue:
                self._condition.wait(wait_s)
            if not self.is_alive():
                raise RuntimeError(f"teacher replica {self.endpoint.replica}: its door has ended; the reason is above")
            taken: list[Work] = []
            tokens = 0
            while self._queue:
                work = next(iter(self._queue.values()))
                tokens += work.request.num_tokens
                if taken and tokens > max_tokens:
                    break
                del self._queue[work.key]
                self._queued_bytes -= num_bytes(work.parts)
                self._taken.add(work.key)
                taken.append(work)
        return taken

    def answer(self, work: Work, message: Message) -> None:
        """Send what the model made of a request that was taken."""
        parts = encode(message)
        with self._condition:
            self._taken.discard(work.key)
            self._counts["requests"] += 1
            self._counts["tokens"] += work.request.num_tokens
            self._counts["labels"] += len(work.request.label_ids)
            self._counts["answer_bytes"] += num_bytes(parts)
            self._outbox.append((work.client, parts))
        self._waker.wake()

    def hand_back(self, work: Work) -> None:
        """A request that was taken, unanswered."""
        with self._condition:
            self._taken.discard(work.key)
            self._counts["handed_back"] += 1
            self._send_later(work.client, _returned(work.number, "the teacher stops"))

    def drain(self) -> None:
        """Take no more requests and hand back those that wait."""
        with self._condition:
            self._draining = True
            for client, number in self._queue:
                self._send_later(client, _returned(number, "the teacher stops"))
                self._counts["handed_back"] += 1
            self._queue.clear()
            self._queued_bytes = 0
        self._waker.wake()

    def close(self, timeout_s: float = 10.0) -> None:
        """Send what is left and end the thread; then the replica's files are removed."""
        with self._condition:
            self._closing = True
        self.join(timeout_s)
        withdraw(self._folder, self.endpoint)

    def vanish(self) -> None:
        """Remove the replica's files, from any thread: the process ends at once."""
        withdraw(self._folder, self.endpoint)

    def status(self) -> dict[str, Any]:
        """What the replica has done since its start, and what it is doing."""
        with self._condition:
            now, tokens = time.monotonic(), self._counts["tokens"]
            then, before = self._rate[0]
            return {
                **self._counts,
                "tokens_per_s": round((tokens - before) / max(now - then, 1e-3), 1),
                "queue": len(self._queue),
                "in_work": len(self._taken),
                "clients": len(self._welcome),
                "memory_mib": psutil.Process().memory_info().rss >> 20,
                "up_s": round(now - self._begin),
                "draining": self._draining,
            }

    # The thread

    def run(self) -> None:
        try:
            self._attend()
        finally:
            self._let_go()

    def _attend(self) -> None:
        """Talk to students until `close`."""
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

    def _let_go(self) -> None:
        self._router.disable_monitor()
        self._router.close(2_000)  # what was sent may still be on its way
        self._monitor.close(0)
        self._waker.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def _every_second(self) -> None:
        with self._condition:
            self._rate.append((time.monotonic(), self._counts["tokens"]))
            for client in [c for c, heard in self._heard.items() if time.monotonic() - heard > self._forget_s]:
                del self._heard[client]
                self._welcome.discard(client)
                for key in [key for key in self._queue if key[0] == client]:
                    self._queued_bytes -= num_bytes(self._queue.pop(key).parts)
        text = json.dumps({"replica": self.endpoint.replica, "address": self.endpoint.address, **self.status()})
        with contextlib.suppress(OSError):  # a full disk is no reason to stop answering
            write_private(self._folder / f"{self.endpoint.replica}.status", text + "\n", mode=0o644)

    def _receive(self) -> None:
        for _ in range(256):  # and then look after the rest
            try:
                client, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode(parts)
            except WireError as error:
                self._counts["malformed"] += 1
                if "protocol version" in str(error):
                    self._refuse(client, -1, str(error))
                continue
            with self._condition:
                self._heard[client] = time.monotonic()
                match message.kind:
                    case "hello":
                        self._greet(client, message)
                    case "score" if client in self._welcome:
                        self._accept(client, message, parts)
                    case "score":
                        pass  # it has greeted an earlier life; what it says next is a hello
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
        self._send_later(client, encode(Message(kind="welcome", fields=fields)))

    def _accept(self, client: bytes, message: Message, parts: Sequence[bytes]) -> None:
        work = Work(client=client, number=message.fields["request"], request=read_score(message), parts=parts)
        if work.key in self._queue or work.key in self._taken:
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
        self._queue[work.key] = work
        self._queued_bytes += num_bytes(parts)
        self._condition.notify()

    def _refuse(self, client: bytes, number: int, reason: str) -> None:
        self._send_later(client, encode(Message(kind="refused", fields={"request": number, "reason": reason})))

    def _send_later(self, client: bytes, parts: Sequence[bytes | memoryview]) -> None:
        self._outbox.append((client, parts))

    def _send(self) -> None:
        while True:
            with self._condition:
                if not self._outbox:
                    return
                client, parts = self._outbox.popleft()
            try:
                self._router.send_multipart([client, *parts], zmq.NOBLOCK)
            except zmq.ZMQError:  # it is gone, or does not read: it will ask again
                self._counts["undeliverable"] += 1

    def _count_refused_connections(self) -> None:
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._counts["strangers"] += 1


def _returned(number: int, reason: str) -> list[bytes | memoryview]:
    return encode(Message(kind="returned", fields={"request": number, "reason": reason}))


_NOTHING = TeacherRequest(
    sample_id=-1,
    prompt_ids=np.zeros(1, np.int32),
    label_ids=np.zeros(0, np.int32),
    rows=np.zeros(0, np.int32),
    hidden=False,
    topk=0,
    byte_side=None,
)
"""What a replica runs for the sake of those that share its experts."""


def _most(value: int, groups: Groups) -> int:
    """The largest value among the replicas that share experts."""
    values = torch.tensor(value, dtype=torch.int64, device=groups.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=groups.ep)
    return int(values)


def serve(
    door: Door | None,
    forward: TeacherForward,
    groups: Groups,
    *,
    max_tokens: int,
    hidden_dtype: HiddenDtype,
    stop: Callable[[], bool],
) -> None:
    """Answer requests until `stop()` says so on the rank of the door; what was taken is finished, the rest handed back.

    Collective over one model replica, and over the replicas that share experts: these run as many micro-batches as the
    one with most work, and end together. The pipeline is given several micro-batches of max_tokens at a time.
    """
    in_flight = max(2, 2 * groups.pp.size())
    stopping = False
    try:
        while True:
            works: list[Work] = []
            if door is not None:
                stopping = stop()
                works = [] if stopping else door.take(in_flight * max_tokens, wait_s=0.2)
            messages: list[Parts] | None = None if stopping else [work.parts for work in works]
            if groups.is_last_stage:
                messages = share(messages, groups.tp, source=0, device=groups.device)
            messages = share(messages, groups.pp, source=groups.pp.size() - 1, device=groups.device)
            if groups.ep.size() > 1:
                stopping_everywhere = _most(int(messages is None), groups)
                messages = None if stopping_everywhere else messages
            if messages is None:
                if door is not None:
                    for work in works:
                        door.hand_back(work)
                break
            requests = (
                [work.request for work in works] if door is not None else [read_score(decode(m)) for m in messages]
            )
            micro_batches = by_length(requests, max_tokens=max_tokens)
            if groups.ep.size() > 1:
                idle = _most(len(micro_batches), groups) - len(micro_batches)
                micro_batches += [[_NOTHING]] * idle
            answers = forward.run(micro_batches)
            if door is not None:
                work_of = {id(work.request): work for work in works}
                requests = [request for batch in micro_batches for request in batch]
                for request, scored in zip(requests, answers, strict=True):
                    if request is _NOTHING:
                        continue
                    work = work_of[id(request)]
                    door.answer(work, scored_message(work.number, scored, hidden_dtype))
    finally:
        if door is not None:
            door.drain()
            door.close()
