"""The TeacherScorer on top of a TeacherClient.

One rank of each model replica has the socket, the first one of the last pipeline stage; it broadcasts answers
to its tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_simct.parallel.disk import first_of
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.exchange import MAX_SHARED_BYTES, share
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import read_scored
from megatron_simct.teacher.scorer import TeacherError, without_content
from megatron_simct.teacher.wire import decode, num_bytes


class RemoteScorer:
    """Scores pairs by a teacher in another job. See TeacherScorer."""

    def __init__(self, client: Any, groups: Groups) -> None:
        """client: a TeacherClient or StoredClient on the rank with the socket; else None.

        Collective over the job: waits until a teacher has answered.
        """
        assert (client is not None) == groups.owns_teacher_socket
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

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        """See TeacherScorer. Does nothing on ranks without a socket."""
        if self._client is not None:
            for pair in pairs:
                self._client.submit(TeacherRequest.of(pair))

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. Collective over the job. Answers to pairs of other
        calls are kept for them.

        TeacherError, on every rank, if answers do not come.
        """
        problem = None
        sample_ids = [pair.sample_id for pair in pairs]
        due = set(sample_ids)
        if not self._groups.is_last_stage:
            yield from map(without_content, sample_ids)
        else:
            left = len(sample_ids)
            while left:
                messages = None
                if self._client is not None:
                    try:
                        messages = self._arrived(due)
                    except TeacherError as error:
                        problem = str(error)
                messages = share(messages, self._groups.tp_cp, source=0, device=self._groups.device)
                if messages is None:
                    problem = problem or ""
                    break
                left -= len(messages)
                for parts in messages:
                    yield read_scored(decode(parts, checked=False))  # the client has compared the checksum
        _agree(problem)

    def _arrived(self, due: set[int]) -> list[Sequence[Any]]:
        """Answers to these samples, at least one and all that have come; they are removed from `due`.

        Other answers are kept.
        """
        messages = [self._next_of(due)]
        size = num_bytes(messages[0])
        while self._client.arrived() and size < MAX_SHARED_BYTES:
            parts, message = self._client.next()
            self._early[message.fields["sample_id"]] = parts
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
            parts, message = self._client.next()
            self._early[message.fields["sample_id"]] = parts
            early = due & {message.fields["sample_id"]}
        sample_id = min(early)
        due.remove(sample_id)
        return self._early.pop(sample_id)

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
