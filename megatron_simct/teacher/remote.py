"""The TeacherScorer on top of a TeacherClient.

One rank of each model replica has the socket, the first one of the last pipeline stage; it broadcasts answers
to its tensor-parallel group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

from megatron_simct.parallel.disk import first_of
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.pipeline import from_last_stage
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.exchange import MAX_SHARED_BYTES, share
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import read_scored
from megatron_simct.teacher.scorer import TeacherError, TeacherMissing, without_content
from megatron_simct.teacher.wire import decode, num_bytes


class RemoteScorer:
    """Scores pairs by a teacher in another job. See TeacherScorer."""

    def __init__(self, client: Any, groups: Groups, *, drops: bool = False) -> None:
        """client: a TeacherClient or StoredClient on the rank with the socket; else None. drops: a teacher
        that does not answer in time is no error; `collect` then leaves out its pairs.

        Collective over the job: waits until a teacher has answered.
        """
        assert (client is not None) == groups.owns_teacher_socket
        self._client, self._groups, self._drops = client, groups, drops
        self._early: dict[int, Sequence[Any]] = {}
        self._lock = Lock()
        self._is_missing = False
        self._asked: set[int] = set()
        """Samples that the client was asked for, and has not answered."""
        self._lost: set[int] = set()
        """Samples that will have no answer."""
        problem = None
        if client is not None:
            try:
                client.start()
                client.meet()
            except TeacherMissing as error:
                problem = self._give_up(error)
            except TeacherError as error:
                problem = str(error)
        _agree(problem)

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """See TeacherScorer. Does nothing on ranks without a socket. A teacher that was missing is asked
        again once one of its replicas is there."""
        if self._client is None:
            return
        for pair in pairs:
            with self._lock:
                self._is_missing = self._is_missing and not self._client.status()
                if self._is_missing:
                    self._lost.add(pair.sample_id)
                    continue
                self._asked.add(pair.sample_id)
                self._client.submit(TeacherRequest.of(pair))

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. Collective over the job. Answers to pairs of other
        calls are kept for them.

        TeacherError, on every rank, if answers do not come.
        """
        problem = None
        due = {pair.sample_id for pair in pairs}
        if self._groups.is_last_stage:
            missing = set(due)
            while missing:
                messages = None
                if self._client is not None:
                    try:
                        messages = self._arrived(due)
                    except TeacherMissing as error:
                        problem = self._give_up(error)
                    except TeacherError as error:
                        problem = str(error)
                messages = share(messages, self._groups.tp_cp, source=0, device=self._groups.device)
                if messages is None:
                    problem = problem or ""
                    break
                for parts in messages:
                    # The client has compared the checksum.
                    scored = read_scored(decode(parts, checked=False))
                    missing.remove(scored.sample_id)
                    yield scored
            with self._lock:
                self._lost -= missing
        else:
            missing = set()
        if self._drops:
            missing = from_last_stage(missing, self._groups.pp)
        if not self._groups.is_last_stage:
            yield from (without_content(p.sample_id) for p in pairs if p.sample_id not in missing)
        _agree(problem)

    def _give_up(self, error: TeacherMissing) -> str | None:
        """All samples that were asked for are lost; the problem, unless missing teachers are none."""
        if not self._drops:
            return str(error)
        with self._lock:
            self._client.forget()
            self._is_missing = True
            self._lost |= self._asked
            self._asked.clear()
        said = f" WARNING: {error}; its rows are left out (--missing-teacher drop)"
        print(said, file=sys.stderr, flush=True)
        return None

    def _arrived(self, due: set[int]) -> list[Sequence[Any]] | None:
        """Answers to these samples, at least one and all that have come; they are removed from `due`. None if
        none will come. Other answers are kept.
        """
        with self._lock:
            due -= self._lost
        if not due:
            return None
        messages = [self._next_of(due)]
        size = num_bytes(messages[0])
        while self._client.arrived() and size < MAX_SHARED_BYTES:
            try:
                _, parts = self._receive()
            except TeacherMissing as error:
                if not self._drops:
                    raise
                self._give_up(error)
                break
            size += num_bytes(parts)
        for sample_id in sorted(due & self._early.keys()):
            due.remove(sample_id)
            messages.append(self._early.pop(sample_id))
        return messages

    def _next_of(self, due: set[int]) -> Sequence[Any]:
        """The next answer to one of these samples, which is removed from `due`.

        Other answers are kept.
        """
        early = due & self._early.keys()
        while not early:
            sample_id, _ = self._receive()
            early = due & {sample_id}
        sample_id = min(early)
        due.remove(sample_id)
        return self._early.pop(sample_id)

    def _receive(self) -> tuple[int, Sequence[Any]]:
        """Wait for an answer, and keep it: its sample id, and its parts."""
        parts, message = self._client.next()
        sample_id = message.fields["sample_id"]
        self._early[sample_id] = parts
        with self._lock:
            self._asked.discard(sample_id)
        return sample_id, parts

    def status_text(self) -> str:
        """Number, speed and queue of the replicas that are alive; empty on ranks without a socket."""
        if self._client is None:
            return ""
        states = list(self._client.status().values())
        speed, queue = (sum(state[key] for state in states) for key in ("tokens_per_s", "queue"))
        again = self._client.counts["again"]
        return f"teacher: {len(states)} replicas {speed:.0f} tokens/s queue {queue}" + (
            f" asked again {again}" if again else ""
        )


def _agree(problem: str | None) -> None:
    """Raises TeacherError on all ranks of the job if one of them has a problem. Collective over the job."""
    found = first_of(problem or None)
    if found is not None:
        raise TeacherError(found)
