"""Several replicas of an inference engine behind one queue, with fault handling.

Each replica has a few threads, each with one request. They take from one queue, so a fast replica does more.
After a fault the request goes back to the front of the queue, and the replica is probed until it answers
again and still serves the same model. So a replica that dies, hangs, restarts or sends short answers costs
only time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_simct.engine_client import EngineClient, EngineFault, EngineRefusal

IN_FLIGHT = 8
"""Concurrent requests to one replica. The engine batches them itself."""
ATTEMPTS = 12
"""A request is refused after this many faults, each of a replica that was healthy before and after."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """One request in the pool."""

    ids: np.ndarray
    """int32 [n]"""
    begin: int
    """Rows before this one are dropped when the answer comes."""
    work: Any
    """Any object of the caller."""
    rows: torch.Tensor | None = None
    """float32 [n - begin, ...]: the engine's rows of the tokens from `begin` on, once it is answered."""
    refused: str | None = None
    """The reason if it will not be answered."""
    attempts: int = 0


Ask = Callable[[EngineClient, Asked], torch.Tensor]
"""An engine's rows for the ids [n] of a request. May raise EngineFault or EngineRefusal."""


def hidden_states(client: EngineClient, asked: Asked) -> torch.Tensor:
    """float32 [n, H]"""
    return client.hidden_states(asked.ids)


@dataclass(slots=True, kw_only=True, eq=False)
class _Replica:
    client: EngineClient
    healthy: bool
    generation: int = 0
    """Counts its outages, so that threads with faults of one outage mark it once."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class EnginePool:
    """Threads that ask engines. `submit`, `finished` and `stop` are called by one thread."""

    def __init__(
        self,
        clients: Sequence[EngineClient],
        *,
        probe: Callable[[EngineClient], object],
        ask: Ask,
    ) -> None:
        """probe: raises EngineFault or ValueError if a replica must not be asked. All
        replicas begin unprobed.

        ask: requests an engine's rows for the ids [n].
        """
        self._probe, self._ask = probe, ask
        self._condition = threading.Condition()
        self._queue: deque[Asked] = deque()
        self._finished: deque[Asked] = deque()
        self._in_flight = 0
        self._stopping = threading.Event()
        self.counts = dict.fromkeys(("answers", "faults", "outages"), 0)
        self._replicas = [_Replica(client=client, healthy=False) for client in clients]
        self._threads = [
            threading.Thread(target=self._work, args=(replica,), name="engine", daemon=True)
            for replica in self._replicas
            for _ in range(IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that no replica has yet."""
        with self._condition:
            return len(self._queue)

    @property
    def pending(self) -> int:
        """Number of requests that `finished` has not returned."""
        with self._condition:
            return len(self._queue) + self._in_flight + len(self._finished)

    def submit(self, asked: Asked) -> None:
        """Queue a request."""
        with self._condition:
            self._queue.append(asked)
            self._condition.notify_all()

    def finished(self, wait_s: float) -> list[Asked]:
        """Requests answered or refused since the last call; empty if there were none within wait_s."""
        with self._condition:
            if not self._finished:
                self._condition.wait_for(lambda: bool(self._finished), wait_s)
            done = list(self._finished)
            self._finished.clear()
        return done

    def stop(self) -> list[Asked]:
        """Stop taking work; returns the requests that no replica has yet.

        The others still come by `finished`.
        """
        self._stopping.set()
        with self._condition:
            left = list(self._queue)
            self._queue.clear()
            self._condition.notify_all()
        return left

    def _work(self, replica: _Replica) -> None:
        while not self._stopping.is_set():
            generation = replica.generation
            if not replica.healthy and not self._recover(replica, generation):
                continue
            asked = self._take()
            if asked is None:
                continue
            try:
                rows = self._ask(replica.client, asked)[asked.begin :].clone()
            except EngineRefusal as refusal:
                self._done(asked, refused=str(refusal))
            except EngineFault as fault:
                self._fault(replica, generation, asked, str(fault))
            except Exception as error:  # if the thread ended, its request would be lost
                self._fault(replica, generation, asked, f"{type(error).__name__}: {error}")
            else:
                self._done(asked, rows=rows)

    def _take(self) -> Asked | None:
        with self._condition:
            if not self._queue:
                self._condition.wait(0.5)
            if not self._queue:
                return None
            self._in_flight += 1
            return self._queue.popleft()

    def _done(self, asked: Asked, *, rows: torch.Tensor | None = None, refused: str | None = None) -> None:
        asked.rows, asked.refused = rows, refused
        with self._condition:
            self.counts["answers"] += rows is not None
            self._in_flight -= 1
            self._finished.append(asked)
            self._condition.notify_all()

    def _fault(self, replica: _Replica, generation: int, asked: Asked, reason: str) -> None:
        asked.attempts += 1
        with self._condition:
            self.counts["faults"] += 1
        if self._stopping.is_set():
            self._done(asked, refused=None)
        elif asked.attempts >= ATTEMPTS:
            self._done(
                asked, refused=f"the engine failed {asked.attempts} times on this sample, at last: {reason}"
            )
        else:
            with self._condition:
                self._in_flight -= 1
                self._queue.appendleft(asked)
                self._condition.notify_all()
        with replica.lock:
            if replica.generation == generation and replica.healthy:
                replica.healthy = False
                replica.generation += 1

    def _recover(self, replica: _Replica, generation: int) -> bool:
        """Probe until the replica is healthy; returns whether it is."""
        with replica.lock:
            wait_s, reported, began = _FIRST_WAIT_S, False, time.monotonic()
            while not replica.healthy and replica.generation == generation and not self._stopping.is_set():
                try:
                    self._probe(replica.client)
                except (EngineFault, ValueError) as error:
                    if not reported and time.monotonic() - began > 2 * _FIRST_WAIT_S:
                        reported = True
                        with self._condition:
                            self.counts["outages"] += 1
                        _say(f"engine {replica.client.address} is not asked until it passes a probe: {error}")
                    self._stopping.wait(wait_s)
                    wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                else:
                    replica.healthy = True
                    if reported:
                        _say(f"engine {replica.client.address} answers again")
            return replica.healthy


def _say(line: str) -> None:
    print(f" {line}", file=sys.stderr, flush=True)
