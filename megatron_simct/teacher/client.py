"""The student's end: samples go out to the replicas of a teacher in another job, and come back in any order.

`TeacherClient` is a thread that owns the sockets: it looks for replicas in the endpoint folder, greets them, gives each
as much work as its window holds, and asks again for whatever stays unanswered. `RemoteScorer` is the TeacherScorer on
top of it. Only one rank a model replica talks, the first of the last pipeline stage; it shares answers with its
tensor-parallel group.

A request is idempotent and has a number. It may be sent again to the same replica or to another; the first answer
counts, later ones are dropped and counted. A replica that says nothing is taken for dead after `silence_s`, although it
may still come back; a dead teacher is given up after `timeout_s` without an answer.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import zmq

from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.endpoints import Endpoint, Waker, connect, read_endpoints, read_keys
from megatron_simct.teacher.exchange import share
from megatron_simct.teacher.fingerprints import mismatch
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import answers, read_scored, score_message
from megatron_simct.teacher.scorer import TeacherError, without_content
from megatron_simct.teacher.wire import Message, WireError, decode, encode, num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the client waits for what, in seconds."""

    timeout_s: float
    """Without any answer, although some are due: give up."""
    hello_s: float = 1.0
    """Between greetings, which are signs of life."""
    silence_s: float = 10.0
    """Without a word of a replica: its requests go elsewhere."""
    again_s: float = 30.0
    """Without an answer to a request, although its replica lives: ask again, another one if there is one."""
    look_s: float = 0.5
    """Between looks at the endpoint folder."""


@dataclass(slots=True, kw_only=True)
class _Replica:
    endpoint: Endpoint
    sock: zmq.Socket
    life: str = ""
    ready: bool = False
    heard: float = 0.0
    greeted: float = 0.0
    tokens: int = 0
    """Outstanding."""
    status: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request without an answer."""

    request: TeacherRequest
    parts: Sequence[bytes | memoryview]
    sent_to: str | None = None
    sent: float = 0.0


class TeacherClient(Thread):
    """Owns the sockets. `submit` and `next` are called by the thread that trains."""

    def __init__(
        self,
        *,
        folder: Path | None = None,
        addresses: Sequence[str] = (),
        key_file: Path | None = None,
        fingerprints: Mapping[str, Any],
        patience: Patience,
        window_tokens: int,
        where: str,
    ) -> None:
        """Replicas are those of the folder, or those of the addresses. key_file: for those at tcp:// addresses.

        fingerprints: what this end knows of what both must share; hidden_size at least.

        window_tokens: what one replica is given before it has answered. `where` names the flag in errors.
        """
        super().__init__(name="teacher-client", daemon=True)
        self._folder, self._key_file, self._fingerprints = folder, key_file, dict(fingerprints)
        self._patience, self._window, self._where = patience, window_tokens, where
        self._fixed = {a: Endpoint(replica=a, address=a, life="") for a in addresses}
        self._context = zmq.Context()
        self._waker = Waker(self._context)
        self._identity = b"s" + uuid.uuid4().bytes
        self._inbox: SimpleQueue[tuple[int, _Open]] = SimpleQueue()
        self._results: SimpleQueue[tuple[Sequence[Any], Message] | str] = SimpleQueue()
        self._replicas: dict[str, _Replica] = {}
        self._open: dict[int, _Open] = {}
        self._waiting: deque[int] = deque()
        self._number = 0
        self._looked = 0.0
        self._progress = time.monotonic()
        self._closing = False
        self._failed = False
        self._met = SimpleQueue[bool]()
        self.counts = dict.fromkeys(
            ("answers", "again", "late", "malformed", "handed_back", "request_bytes", "answer_bytes"), 0
        )

    # What the training thread calls

    def submit(self, request: TeacherRequest) -> None:
        """Send it when a replica's window has room."""
        self._number += 1
        entry = _Open(request=request, parts=encode(score_message(self._number, request)))
        self._inbox.put((self._number, entry))
        self._waker.wake()

    def next(self) -> tuple[Sequence[Any], Message]:
        """The next answer, as it came and decoded. TeacherError where none will come."""
        try:
            result = self._results.get(timeout=self._patience.timeout_s + 60)
        except Empty:  # the thread itself has died
            result = f"{self._where}: the thread that waits for the teacher has ended"
        if isinstance(result, str):
            raise TeacherError(result)
        return result

    def meet(self) -> None:
        """Wait until some replica has said welcome. TeacherError where none does, or one refuses."""
        try:
            self._met.get(timeout=self._patience.timeout_s)
        except Empty:
            raise TeacherError(self._nobody("no teacher")) from None
        if self._failed:
            self.next()

    def status(self) -> dict[str, dict[str, Any]]:
        """What each replica last said of itself."""
        return {name: dict(replica.status) for name, replica in list(self._replicas.items()) if replica.ready}

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self.join(5)

    # The thread

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._waker.receiver, zmq.POLLIN)
        try:
            while not self._closing:
                now = time.monotonic()
                self._look(now, poller)
                self._greet(now)
                self._dispatch(now)
                self._give_up(now)
                events = dict(poller.poll(100 if self._open else 300))
                self._waker.clear()
                self._take_in()
                for name, replica in list(self._replicas.items()):
                    if replica.sock in events:
                        self._receive(name, replica)
        except Exception as error:
            self._fail(f"{self._where}: {type(error).__name__}: {error}")
            raise
        finally:
            for replica in self._replicas.values():
                replica.sock.close(0)
            self._waker.close()
            self._context.term()

    def _take_in(self) -> None:
        while True:
            try:
                number, entry = self._inbox.get_nowait()
            except Empty:
                return
            if not self._open:
                self._progress = time.monotonic()
            self._open[number] = entry
            self._waiting.append(number)

    def _look(self, now: float, poller: zmq.Poller) -> None:
        """Connect to replicas that are new or live at another address, and leave those that are gone."""
        if now - self._looked < self._patience.look_s:
            return
        self._looked = now
        found = read_endpoints(self._folder) if self._folder is not None else self._fixed
        for name in [n for n, r in self._replicas.items() if n not in found or found[n] != r.endpoint]:
            self._receive(name, self._replicas[name])  # what it may have handed back at the end
            self._lose(name)
            sock = self._replicas.pop(name).sock
            poller.unregister(sock)
            sock.close(0)
        for name, endpoint in found.items():
            if name not in self._replicas:
                keys = None
                if endpoint.address.startswith("tcp://") and self._key_file is not None:
                    try:
                        keys = read_keys(self._key_file)
                    except ValueError as error:
                        self._fail(f"--teacher-client-key {error}")
                        return
                try:
                    sock = connect(self._context, endpoint.address, keys, self._identity)
                except ValueError as error:
                    self._fail(f"{self._where}: {error}")
                    return
                poller.register(sock, zmq.POLLIN)
                self._replicas[name] = _Replica(endpoint=endpoint, sock=sock)

    def _greet(self, now: float) -> None:
        for name, replica in self._replicas.items():
            if now - replica.greeted >= self._patience.hello_s:
                replica.greeted = now
                self._send(replica, encode(Message(kind="hello", fields={"fingerprints": self._fingerprints})))
            if replica.ready and now - replica.heard > self._patience.silence_s:
                self._lose(name)

    def _lose(self, name: str) -> None:
        """What this replica was to answer waits again."""
        replica = self._replicas[name]
        replica.ready, replica.tokens = False, 0
        lost = [number for number, entry in self._open.items() if entry.sent_to == name]
        for number in reversed(lost):
            self._open[number].sent_to = None
            self._waiting.appendleft(number)
        self.counts["again"] += len(lost)

    def _dispatch(self, now: float) -> None:
        for number, entry in self._open.items():
            if entry.sent_to is not None and now - entry.sent > self._patience.again_s:
                self.counts["again"] += 1
                others = [n for n in self._replicas if n != entry.sent_to and self._replicas[n].ready]
                self._assign(number, min(others, key=self._load, default=entry.sent_to), now)
        ready = [name for name, replica in self._replicas.items() if replica.ready]
        while self._waiting and ready:
            number = self._waiting[0]
            name = min(ready, key=self._load)
            tokens = self._replicas[name].tokens
            if tokens and tokens + self._open[number].request.num_tokens > self._window:
                return
            self._waiting.popleft()
            self._assign(number, name, now)

    def _load(self, name: str) -> int:
        return self._replicas[name].tokens

    def _assign(self, number: int, name: str, now: float) -> None:
        entry = self._open[number]
        self._release(entry)
        entry.sent_to, entry.sent = name, now
        self._replicas[name].tokens += entry.request.num_tokens
        self.counts["request_bytes"] += num_bytes(entry.parts)
        self._send(self._replicas[name], entry.parts)

    def _release(self, entry: _Open) -> None:
        """It no longer counts against the window of the replica it was sent to."""
        if entry.sent_to is not None and entry.sent_to in self._replicas:
            self._replicas[entry.sent_to].tokens -= entry.request.num_tokens

    def _send(self, replica: _Replica, parts: Sequence[bytes | memoryview]) -> None:
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
                message = decode(parts)
            except WireError as error:
                self.counts["malformed"] += 1
                if "protocol version" in str(error):
                    self._fail(f"{self._where}: replica {name} ({replica.endpoint.address}): {error}")
                continue
            replica.heard = time.monotonic()
            match message.kind:
                case "welcome":
                    self._welcomed(name, replica, message)
                case "scored":
                    self._answered(parts, message)
                case "returned":
                    self._handed_back(name, replica, message)
                case "refused" if message.fields["request"] < 0 or message.fields["request"] in self._open:
                    number = message.fields["request"]
                    what = f" sample {self._open[number].request.sample_id}" if number >= 0 else ""
                    who = f"{self._where}: replica {name} ({replica.endpoint.address})"
                    self._fail(f"{who} refuses{what}: {message.fields['reason']}")
                case _:
                    self.counts["malformed"] += 1

    def _welcomed(self, name: str, replica: _Replica, message: Message) -> None:
        theirs = message.fields["fingerprints"]
        for key, value in theirs.items():
            ours = self._fingerprints.get(key)
            if value is not None and ours is not None and value != ours:
                self._fail(f"{self._where}: replica {name}: {mismatch(key, teacher=value, student=ours)}")
                return
        # What only the teacher knew, any other life of it must share.
        self._fingerprints = {k: v for k, v in theirs.items() if v is not None} | {
            k: v for k, v in self._fingerprints.items() if v is not None
        }
        if replica.life and replica.life != message.fields["life"]:
            self._lose(name)  # another process at the same address, which knows nothing of what the last one held
        if not replica.ready:
            self._met.put(True)
        replica.life, replica.status = message.fields["life"], message.fields["status"]
        replica.ready = not replica.status.get("draining", False)

    def _answered(self, parts: Sequence[Any], message: Message) -> None:
        entry = self._open.get(message.fields["request"])
        if entry is None:
            self.counts["late"] += 1
            return
        if not answers(message, entry.request, hidden_size=self._fingerprints["hidden_size"]):
            self.counts["malformed"] += 1
            return
        del self._open[message.fields["request"]]
        if entry.sent_to is None:
            self._waiting.remove(message.fields["request"])
        self._release(entry)
        self._progress = time.monotonic()
        self.counts["answers"] += 1
        self.counts["answer_bytes"] += num_bytes(parts)
        self._results.put((parts, message))

    def _handed_back(self, name: str, replica: _Replica, message: Message) -> None:
        number = message.fields["request"]
        entry = self._open.get(number)
        replica.ready = False  # until its next welcome says that it takes more
        if entry is not None and entry.sent_to == name:
            self.counts["handed_back"] += 1
            self._release(entry)
            entry.sent_to = None
            self._waiting.append(number)

    def _give_up(self, now: float) -> None:
        if self._open and not self._failed and now - self._progress > self._patience.timeout_s:
            self._fail(self._nobody(f"{len(self._open)} samples are unanswered and no answer has come"))

    def _nobody(self, what: str) -> str:
        now = time.monotonic()
        known = ", ".join(
            f"{name} ({r.endpoint.address}, last heard {f'{now - r.heard:.0f} s ago' if r.heard else 'never'})"
            for name, r in self._replicas.items()
        )
        return (
            f"{self._where}: {what} for {self._patience.timeout_s / 60:g} minutes (--teacher-timeout-minutes); "
            f"replicas: {known or 'none was found'}; start the teacher and resume"
        )

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._results.put(reason)
        self._met.put(False)


class RemoteScorer:
    """Scores pairs by a teacher in another job. See TeacherScorer."""

    def __init__(self, client: Any, groups: Groups) -> None:
        """client: a TeacherClient, or what acts as one, on the rank that talks; else None.

        Collective over the job: waits until a teacher has answered.
        """
        assert (client is not None) == groups.meets_teacher
        self._client, self._groups = client, groups
        self._early: dict[int, Sequence[Any]] = {}
        problem = None
        if client is not None:
            try:
                client.start()
                client.meet()
            except TeacherError as error:
                problem = str(error)
        _agree(problem)

    def score(self, pairs: Iterable[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer.score. All pairs are on their way when it returns, each as soon as `pairs` yields it.

        Whoever iterates waits for the answers; several calls may be open. TeacherError on every rank.
        """
        sample_ids = []
        for pair in pairs:
            sample_ids.append(pair.sample_id)
            self.send(pair)
        return self.answers(sample_ids)

    def send(self, pair: AlignedPair) -> None:
        """Ask the teacher; on ranks that do not talk to it, nothing."""
        if self._client is not None:
            self._client.submit(TeacherRequest.of(pair))

    def answers(self, sample_ids: Sequence[int]) -> Iterator[ScoredPair]:
        """What it says of samples that were sent, in any order. Collective over the job; see `score`."""
        problem = None
        due = set(sample_ids)
        if not self._groups.is_last_stage:
            yield from map(without_content, sample_ids)
        else:
            for _ in sample_ids:
                messages = None
                if self._client is not None:
                    try:
                        messages = [self._next_of(due)]
                    except TeacherError as error:
                        problem = str(error)
                messages = share(messages, self._groups.tp, source=0, device=self._groups.device)
                if messages is None:
                    problem = problem or ""
                    break
                yield read_scored(decode(messages[0]))
        _agree(problem)

    def _next_of(self, due: set[int]) -> Sequence[Any]:
        """The next answer to one of these samples, which leaves the set. What comes for others is kept for them."""
        early = due & self._early.keys()
        while not early:
            parts, message = self._client.next()
            self._early[message.fields["sample_id"]] = parts
            early = due & {message.fields["sample_id"]}
        sample_id = min(early)
        due.remove(sample_id)
        return self._early.pop(sample_id)

    def note(self) -> str:
        """Replicas that are alive, and what they last said of themselves; nothing on ranks that do not talk to them."""
        if self._client is None:
            return ""
        states = list(self._client.status().values())
        speed, queue = (sum(state[key] for state in states) for key in ("tokens_per_s", "queue"))
        again = self._client.counts["again"]
        return f"teacher: {len(states)} replicas {speed:.0f} tokens/s queue {queue}" + (
            f" asked again {again}" if again else ""
        )


def _agree(problem: str | None) -> None:
    """TeacherError on all ranks of the job if one of them has a problem. Collective over the job."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    failed = torch.tensor(int(problem is not None), dtype=torch.int32, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if int(failed):
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise TeacherError(next(p for p in problems if p))
