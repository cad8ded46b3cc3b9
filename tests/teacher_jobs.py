"""Teachers for tests: one in separate processes, one without a model in a thread, and a
connection with faults.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zmq

from megatron_simct.records import ByteSide, ScoredPair
from megatron_simct.serve_teacher import main as serve_main
from megatron_simct.teacher.client import Patience, TeacherClient
from megatron_simct.teacher.endpoints import (
    Endpoint,
    Keys,
    endpoint_folder,
    publish,
    read_endpoints,
    withdraw,
)
from megatron_simct.teacher.forward import TeacherForward, TeacherRequest
from megatron_simct.teacher.lookout import Lookout
from megatron_simct.teacher.payload import read_scored, scored_message
from megatron_simct.teacher.service import ReplicaServer
from megatron_simct.teacher.wire import Message
from tests.distributed import run_ranks

VOCAB, HIDDEN = 300, 16
FINGERPRINTS = {"hidden_size": HIDDEN, "teacher_vocabulary": VOCAB, "teacher_tokenizer": "a" * 64}


class TeacherJob:
    """A teacher's job in forked processes. It is entered when its endpoint is open, and ended by
    SIGTERM with exit code 0.
    """

    def __init__(
        self,
        tiny: Path,
        weights: tuple[str, ...],
        run_dir: Path,
        *flags: str,
        world_size: int = 1,
        replicas: int = 1,
        die_at: int | None = None,
        again: bool = False,
    ) -> None:
        """die_at: its first rank is killed (-9) while this number of requests is unanswered; then it
        is started `again`.
        """
        self._replicas, self._die_at, self._again = replicas, die_at, again
        self._argv = [
            *("--teacher-hf-checkpoint", str(tiny / "teacher"), *weights[2:]),
            *("--teacher-tokenizer-model", str(tiny / "teacher.tiktoken")),
            *("--teacher-make-vocab-size-divisible-by", "4", "--run-dir", str(run_dir), *flags),
        ]
        self._world_size = world_size
        self.folder = endpoint_folder(str(run_dir))

    def start(self) -> None:
        known = set(read_endpoints(self.folder))
        self._process = multiprocessing.get_context("fork").Process(
            target=_job, args=(self._world_size, self._argv, self._die_at, self._again)
        )
        self._process.start()
        deadline = time.monotonic() + 90
        while len(names := set(read_endpoints(self.folder)) - known) < self._replicas:
            assert self._process.is_alive() and time.monotonic() < deadline, "the teacher did not start"
            time.sleep(0.05)
        self.endpoint = read_endpoints(self.folder)[min(names)]

    def statuses(self) -> list[dict[str, Any]]:
        """The replicas' latest status files."""
        return [json.loads(path.read_text()) for path in self.folder.glob("*.status")]

    def __enter__(self) -> TeacherJob:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for endpoint in read_endpoints(self.folder).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(endpoint.pid, signal.SIGTERM)
        self._process.join(60)
        assert self._process.exitcode == 0
        for endpoint in read_endpoints(self.folder).values():
            if not psutil.pid_exists(endpoint.pid):  # it was killed, and no other replica was started
                withdraw(self.folder, endpoint)


def _job(world_size: int, argv: list[str], die_at: int | None, again: bool) -> None:
    if die_at is not None:
        try:
            run_ranks(world_size, _serve, argv, die_at, timeout_s=300)
        except AssertionError as error:
            assert "died without an answer" in str(error), error
        else:
            raise AssertionError("nothing was killed")
        if not again:
            return
    assert run_ranks(world_size, _serve, argv, None, timeout_s=300) == [0] * world_size


def _serve(rank: int, world_size: int, argv: list[str], die_at: int | None) -> int:
    run, requests = TeacherForward.run, 0

    def run_and_die(self, micro_batches) -> list[ScoredPair]:
        nonlocal requests
        answers = run(self, micro_batches)
        requests += sum(map(len, micro_batches))
        if requests >= die_at and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers

    if die_at is not None:
        TeacherForward.run = run_and_die
    return serve_main(argv)


def make_request(rng: np.random.Generator, sample_id: int) -> TeacherRequest:
    """Some tokens, with a few rows or with sums of bytes."""
    labels = int(rng.integers(0, 9))
    wants_bytes = bool(rng.integers(0, 2))

    def ints(high: int, size: int) -> np.ndarray:
        return rng.integers(0, max(1, high), size if high > 0 else 0).astype(np.int32)

    segments, slots = 3 * labels, 2 * labels
    side = ByteSide(
        segment_row=np.repeat(np.arange(labels, dtype=np.int32), 3),
        segment_start=np.tile(np.array([0, 7, 200], np.int32), labels),
        entry_slot=ints(slots, 10),
        entry_segment=ints(segments, 10),
        last_row=ints(labels, slots),
    )
    return TeacherRequest(
        sample_id=sample_id,
        prompt_ids=ints(VOCAB, int(rng.integers(1, 9))),
        label_ids=ints(VOCAB, labels),
        rows=np.flatnonzero(rng.integers(0, 2, labels)).astype(np.int32),
        hidden=not wants_bytes,
        topk=0,
        token_ids=False,
        byte_side=side if wants_bytes else None,
    )


def answer_of(request: TeacherRequest) -> ScoredPair:
    """The answer of the teacher without a model: numbers that depend on every token."""
    ids = np.concatenate([request.prompt_ids, request.label_ids]).astype(np.float32)
    own = torch.from_numpy(np.cumsum(ids)[len(request.prompt_ids) :].astype(np.float32))
    hidden = torch.outer(own[request.rows.tolist()], torch.arange(HIDDEN, dtype=torch.float32))
    side = request.byte_side
    return ScoredPair(
        sample_id=request.sample_id,
        own_logit=own,
        lse=own + 1,
        hidden=hidden if request.hidden else None,
        byte_logprobs=None if side is None else -torch.from_numpy(side.last_row.astype(np.float32)),
    )


def same_answer(found: ScoredPair, request: TeacherRequest) -> bool:
    wanted = answer_of(request)
    pairs = [
        (getattr(found, name), getattr(wanted, name))
        for name in ("own_logit", "lse", "hidden", "byte_logprobs")
    ]
    return found.sample_id == wanted.sample_id and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )


class ModelFreeTeacher:
    """A server, and a thread instead of the model, which takes delay_s for an answer unless
    it is told to stop.
    """

    def __init__(
        self,
        folder: Path,
        *,
        delay_s: float = 0.0,
        address: str = "ipc",
        keys: Keys | None = None,
        **more: Any,
    ) -> None:
        works = more.pop("works", True)  # otherwise another thread takes from the server
        self.server = ReplicaServer(
            folder,
            name=more.pop("name", uuid.uuid4().hex[:8]),
            address=address,
            number=0,
            keys=keys,
            fingerprints=more.pop("fingerprints", FINGERPRINTS),
            vocab_size=VOCAB,
            max_tokens=1000,
            life=uuid.uuid4().hex,
            **more,
        )
        self.delay_s = delay_s
        self._awake, self._asleep = threading.Event(), threading.Event()
        self._awake.set()
        self._at_work = threading.Event()
        self._at_work.set()
        self.answered: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self.server.start()
        if works:
            self._thread.start()

    def _answer(self) -> None:
        while not self._stop.is_set():
            if not self._awake.is_set():
                self._asleep.set()
                self._awake.wait(0.05)
                continue
            for work in self.server.take(40, 0.02):
                self._stop.wait(self.delay_s)
                while not (self._at_work.wait(0.05) or self._stop.is_set()):
                    pass
                self.answered.append(work.request.sample_id)
                self.server.answer(work, scored_message(work.number, answer_of(work.request), "fp32"))

    def stall(self) -> None:
        """Answer nothing; the server still answers greetings."""
        self._asleep.clear()
        self._awake.clear()
        self._asleep.wait()

    def wake(self) -> None:
        self._awake.set()

    def pause(self) -> None:
        """Take requests but do not answer them until `resume`."""
        self._at_work.clear()

    def resume(self) -> None:
        self._at_work.set()

    def stop(self) -> None:
        """Stop as after SIGTERM."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.server.drain()
        self.server.close()

    def __enter__(self) -> ModelFreeTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server.is_alive():
            self.stop()


FAST = Patience(timeout_s=30, hello_s=0.1, silence_s=1.0, look_s=0.05, look_again_s=0.05)


def hello(beat: int = 1, **fingerprints: Any) -> Message:
    return Message(kind="hello", fields={"fingerprints": FINGERPRINTS | fingerprints, "beat": beat})


def welcome(
    status: dict[Any, Any], *, beat: int = 1, life: str = "l", holds: Sequence[int] = (), **more: Any
) -> Message:
    fields = {"fingerprints": FINGERPRINTS, "life": life, "status": status, "beat": beat} | more
    return Message(kind="welcome", fields=fields, frames={"holds": ("int32", np.array(holds, np.int32))})


def open_client(
    folder: Path | None,
    *,
    addresses: Sequence[str] = (),
    patience: Patience = FAST,
    window_tokens: int = 200,
    **more: Any,
) -> TeacherClient:
    client = TeacherClient(
        lookout=Lookout(folder, addresses),
        fingerprints=more.pop("fingerprints", FINGERPRINTS),
        patience=patience,
        window_tokens=window_tokens,
        where="--teacher-endpoint here",
        **more,
    )
    client.start()
    return client


def collect(client: TeacherClient, requests: list[TeacherRequest]) -> list[ScoredPair]:
    """Collect one answer for each request."""
    for request in requests:
        client.submit(request)
    return [read_scored(client.next()[1]) for _ in requests]


class BadLine(threading.Thread):
    """Stands between one replica and its clients. It loses, delays, doubles, swaps and damages
    messages by a seed.
    """

    def __init__(self, folder: Path, behind: Endpoint, *, seed: int, shares: dict[str, float]) -> None:
        """folder: where clients find this connection instead of the replica. shares: of
        messages, by fault.
        """
        super().__init__(daemon=True)
        self._random, self._shares = random.Random(seed), shares
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._address = f"ipc://{folder}/line"
        self._behind = behind.address
        self._backs: dict[bytes, zmq.Socket] = {}
        self._later: list[tuple[float, zmq.Socket, list[bytes]]] = []
        self._closing = False
        self.done = dict.fromkeys(shares, 0)
        folder.mkdir(parents=True, exist_ok=True)
        self._front.bind(self._address)
        publish(folder, Endpoint(replica=behind.replica, address=self._address, life=behind.life))

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._closing:
            for sock, _ in poller.poll(5):
                parts = sock.recv_multipart()
                if sock is self._front:
                    client, parts = parts[0], parts[1:]
                    if client not in self._backs:
                        back = self._context.socket(zmq.DEALER)
                        back.setsockopt(zmq.IDENTITY, client)
                        back.connect(self._behind)
                        poller.register(back, zmq.POLLIN)
                        self._backs[client] = back
                    self._pass_on(self._backs[client], parts)
                else:
                    client = next(c for c, back in self._backs.items() if back is sock)
                    self._pass_on(self._front, [client, *parts])
            for entry in [entry for entry in self._later if entry[0] <= time.monotonic()]:
                self._later.remove(entry)
                entry[1].send_multipart(entry[2])
        self._context.destroy(0)

    def _pass_on(self, sock: zmq.Socket, parts: list[bytes]) -> None:
        kinds = [kind for kind, share in self._shares.items() if self._random.random() < share]
        for kind in kinds:
            self.done[kind] += 1
        if "drop" in kinds:
            return
        if "garble" in kinds:
            at = self._random.randrange(1 if sock is self._front else 0, len(parts))
            parts[at] = bytes(b ^ 1 << self._random.randrange(8) for b in parts[at]) or b"?"
        wait_s = 0.0
        if "delay" in kinds:
            wait_s += self._random.uniform(0.05, 0.8)  # longer than the client waits for one request
        if "reorder" in kinds:
            wait_s += self._random.uniform(0.0, 0.05)
        for _ in range(2 if "duplicate" in kinds else 1):
            self._later.append((time.monotonic() + wait_s, sock, parts))

    def close(self) -> None:
        self._closing = True
        self.join()
