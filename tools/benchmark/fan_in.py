"""Many students' ranks at many teacher replicas: repeated work, seconds a step, load of sockets and files.

    python tools/benchmark/fan_in.py    # 256 ranks, 32 replicas: some minutes
    python tools/benchmark/fan_in.py --clients 16 --replicas 4 --scale 0.5 --json
    python tools/benchmark/fan_in.py --rule timer --steps even    # the control

Clients and servers are those of a run (`TeacherClient`, `ReplicaServer`) with all their sockets, on loopback,
encrypted (CURVE) unless --bind ipc. The clients of a process take turns in one thread. A model is replaced by
a rate: --tokens-per-second, in batches as `serve` takes them. A simulated second lasts --scale seconds, and
every time-out is scaled in the same way, so that this machine can serve all of it. In a step every client
sends all its requests at once and waits for all answers.

steps     even: all replicas are as fast as they report. straggler: one in sixteen computes at 0.4 of its
          rate. death: one in sixteen is killed (-9) after a quarter of the step, and started again after half
          of it.
rule      holds: the package's rule. timer: the control, the rule of earlier versions: a request goes to the
          replica that has the fewest of this client's own tokens, and again to another one after 30 s without
          an answer; every client reads the endpoint folder twice a second.
computed  answers that models computed, over the distinct requests; 1 means that none was computed twice
seconds   simulated; `over_ideal` is over all tokens divided by what the replicas compute meanwhile
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import zmq

from megatron_simct.records import ScoredPair
from megatron_simct.teacher import client as client_module
from megatron_simct.teacher import lookout as lookout_module
from megatron_simct.teacher import service as service_module
from megatron_simct.teacher.client import Patience, TeacherClient
from megatron_simct.teacher.endpoints import CLIENT_KEY, Endpoint, make_keys
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.lookout import Lookout
from megatron_simct.teacher.payload import scored_message
from megatron_simct.teacher.service import ReplicaServer

VOCAB_SIZE = 10
FINGERPRINTS = {"hidden_size": 1, "teacher_vocabulary": VOCAB_SIZE}
STEPS = ("even", "straggler", "death")
AGAIN_S = 30.0
TURNS = 8
"""Number of turns of each client in a simulated second."""
SLOW = 0.4
fork = multiprocessing.get_context("fork")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=256, help="data-parallel ranks (default: 256)")
    parser.add_argument("--replicas", type=int, default=32, help="replicas of the teacher (default: 32)")
    parser.add_argument(
        "--samples", type=int, default=48, help="requests of a client in a step (default: 48)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2000, help="tokens of a request, on average (default: 2000)"
    )
    parser.add_argument(
        "--tokens-per-second", type=float, default=20000, help="speed of a replica (default: 20000)"
    )
    parser.add_argument(
        "--max-tokens-per-batch",
        type=int,
        default=8192,
        help="tokens in a batch of the teacher (default: 8192)",
    )
    parser.add_argument(
        "--window-tokens",
        type=int,
        default=65536,
        help="tokens of a client in flight at a replica (default: 65536)",
    )
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=list(STEPS), help="kinds of steps (default: all three)"
    )
    parser.add_argument(
        "--rule",
        choices=("holds", "timer"),
        default="holds",
        help="rule by which requests are distributed (default: holds)",
    )
    parser.add_argument(
        "--scale", type=float, default=4.0, help="seconds for each simulated second (default: 4)"
    )
    parser.add_argument(
        "--bind", default="tcp://127.0.0.1", help="ipc or tcp://HOST (default: tcp://127.0.0.1)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes for clients, and as many for servers (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    report = simulate(options)
    print(json.dumps(report) if options.json else table(report))
    return 0


@dataclass
class Worker:
    """A process and the pipe to it."""

    process: Any
    pipe: Connection

    @classmethod
    def start(cls, target: Callable[..., None], *args: Any) -> Worker:
        ours, theirs = fork.Pipe()
        process = fork.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Run all steps, one after the other, with the same clients and replicas."""
    with tempfile.TemporaryDirectory(prefix="fan") as run:
        folder = Path(run) / "teacher"
        folder.mkdir(mode=0o700)
        if options.bind != "ipc":
            make_keys(folder)
        # Each replica that will be killed is a process of its own.
        mortal = range(max(1, options.replicas // 16)) if "death" in options.steps else range(0)
        others = np.array_split(np.arange(len(mortal), options.replicas), options.processes)
        servers = [Worker.start(run_servers, options, folder, [n]) for n in mortal]
        servers += [Worker.start(run_servers, options, folder, part.tolist()) for part in others if part.size]
        shares = [
            part.tolist()
            for part in np.array_split(np.arange(options.clients), options.processes)
            if part.size
        ]
        clients = [Worker.start(run_clients, options, folder, share) for share in shares]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for worker in clients:
                worker.pipe.send(store.port)
            met = min(worker.pipe.recv() for worker in clients)
            if met < options.replicas:
                raise SystemExit(
                    f"fan_in: a client has met {met} of {options.replicas} replicas in 5 minutes"
                )
            steps = [
                measure(options, folder, servers, clients, kind, n) for n, kind in enumerate(options.steps)
            ]
        finally:
            for worker in (*clients, *servers):
                worker.process.kill()
                worker.process.join()
        kept = ("clients", "replicas", "samples", "tokens", "tokens_per_second", "rule", "scale")
        return {
            **{name: getattr(options, name) for name in kept},
            "connections": options.clients * options.replicas,
            "encrypted": options.bind != "ipc",
            "processes": len(servers) + len(clients),
            "steps": steps,
        }


def measure(
    options: argparse.Namespace,
    folder: Path,
    servers: list[Worker],
    clients: Sequence[Worker],
    kind: str,
    number: int,
) -> dict[str, Any]:
    """One step."""
    mortal = max(1, options.replicas // 16)
    slow = (
        {n: SLOW for n in range(options.replicas - mortal, options.replicas)} if kind == "straggler" else {}
    )
    for worker in servers:
        worker.ask("begin", slow)
    sizes = sample_sizes(options, number)
    speed = options.tokens_per_second * (options.replicas - sum(1 - share for share in slow.values()))
    ideal = sizes.sum() / speed
    for worker in clients:
        worker.pipe.send(("step", number))
    begin = time.monotonic()
    killed: list[dict[str, int]] = []
    if kind == "death":
        wait_until(begin + ideal / 4 * options.scale)
        for worker in servers[:mortal]:
            killed.append(worker.ask("counts"))
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        wait_until(begin + ideal / 2 * options.scale)
        for n in range(mortal):
            servers[n] = Worker.start(run_servers, options, folder, [n])
        ideal = (sizes.sum() + mortal * options.tokens_per_second * ideal / 4) / speed
    finished = [worker.pipe.recv() for worker in clients]
    wall = time.monotonic() - begin
    served = killed + [worker.ask("counts") for worker in servers]
    totals = sum((Counter(one) for one in (*finished, *served)), Counter())
    seconds = wall / options.scale
    return {
        "step": kind,
        "requests": int(sizes.size),
        "computed": totals["computed"] / sizes.size,
        "asked_again": totals["again"],
        "recalled": totals["recalled"],
        "late": totals["late"],
        "seconds": round(seconds, 2),
        "over_ideal": round(seconds / ideal, 3),
        "opens_per_second": round(totals["opens"] / seconds, 2),
        "messages_per_second": round(totals["messages"] / seconds, 1),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(totals["cpu"], 1),
    }


def sample_sizes(options: argparse.Namespace, step: int) -> np.ndarray:
    """int64 [clients, samples]: tokens of each request, from a half to three halves of the mean."""
    rng = np.random.default_rng(step)
    return rng.integers(options.tokens // 2, options.tokens * 3 // 2 + 1, (options.clients, options.samples))


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class Messages:
    """Counts messages when they are encoded, which is when they are sent."""

    def __init__(self, *modules: Any) -> None:
        self.count = 0
        for module in modules:
            module.encode = self._counted(module.encode)

    def _counted(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return encode(*args, **kwargs)

        return counted

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


class Cpu:
    """CPU seconds of this process since the last call."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def take(self) -> float:
        last, self._last = self._last, time.process_time()
        return self._last - last


# The teacher's side


def run_servers(pipe: Connection, options: argparse.Namespace, folder: Path, numbers: Sequence[int]) -> None:
    """Run some replicas in one process, until it is killed."""
    messages, cpu = Messages(service_module), Cpu()
    replicas = [Replica(options, folder, number) for number in numbers]
    while True:
        what, *details = pipe.recv()
        if what == "begin":
            for replica in replicas:
                replica.begin(details[0].get(replica.number, 1.0))
            messages.take()
            cpu.take()
            pipe.send(None)
        else:
            computed = sum(replica.computed for replica in replicas)
            pipe.send({"computed": computed, "messages": messages.take(), "cpu": cpu.take()})


class Replica(threading.Thread):
    """A server with a rate instead of a model."""

    def __init__(self, options: argparse.Namespace, folder: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.number, self.computed = number, 0
        self._rate, self._share = options.tokens_per_second / options.scale, 1.0
        self._most = 2 * options.max_tokens_per_batch
        self._server = ReplicaServer(
            folder,
            name=f"r{number}-{os.getpid()}",
            address=options.bind,
            number=number,
            keys=None if options.bind == "ipc" else make_keys(folder),
            fingerprints=FINGERPRINTS,
            vocab_size=VOCAB_SIZE,
            max_tokens=options.max_tokens_per_batch,
            life=uuid.uuid4().hex,
            forget_s=60 * options.scale,
            stall_s=120 * options.scale,
        )
        self._server.start()
        self.start()

    def begin(self, share: float) -> None:
        self._share, self.computed = share, 0

    def run(self) -> None:
        ready = time.monotonic()
        while True:
            works = self._server.take(self._most, wait_s=0.2)
            tokens = sum(work.request.num_tokens for work in works)
            # a busy machine is late
            ready = max(ready, time.monotonic() - 0.05) + tokens / (self._rate * self._share)
            wait_until(ready)
            for work in works:
                zeros = torch.zeros(len(work.request.label_ids))
                scored = ScoredPair(sample_id=work.request.sample_id, own_logit=zeros, lse=zeros, hidden=None)
                self._server.answer(work, scored_message(work.number, scored, "bf16"))
            self.computed += len(works)


# The student's side


class TimerClient(TeacherClient):
    """The control: a request that has no answer after a while is sent again, whether or not
    its replica has it.
    """

    again_s = AGAIN_S

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._sent: dict[int, float] = {}

    def _dispatch(self) -> None:
        now = time.monotonic()
        for number, entry in self._open.items():
            if entry.sent_to is not None and now - self._sent[number] > self.again_s:
                self.counts["again"] += 1
                other = self._least(self._ready(entry.sent_to)) or entry.sent_to
                self._assign(number, other)
        while self._waiting:
            name = self._least(self._ready())
            if name is None or not self._has_room(name, self._open[self._waiting[0]].request.num_tokens):
                return
            self._assign(self._waiting.popleft(), name)

    def _least(self, names: Sequence[str]) -> str | None:
        return min(names, key=lambda name: self._replicas[name].tokens, default=None)

    def _assign(self, number: int, name: str) -> None:
        self._sent[number] = time.monotonic()
        super()._assign(number, name)

    def _even_out(self, now: float) -> None:
        pass

    def _compare(self, name: str, replica: Any, beat: int, holds: Sequence[int]) -> None:
        pass


def run_clients(pipe: Connection, options: argparse.Namespace, folder: Path, ranks: Sequence[int]) -> None:
    """Run some ranks in one process: each has a client, and in every step sends its requests
    and reads all answers.
    """
    opens = Counter[str]()
    read = lookout_module.read_endpoints

    def read_and_count(folder: Path) -> dict[str, Endpoint]:
        found = read(folder)
        opens["opens"] += 1 + len(found)
        return found

    lookout_module.read_endpoints = read_and_count
    messages, cpu = Messages(client_module), Cpu()
    store = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False, wait_for_workers=False)
    context = zmq.Context(client_module.IO_THREADS)
    context.set(zmq.MAX_SOCKETS, 1 << 16)
    clients = {rank: open_client(options, folder, store, context, reads=rank == 0) for rank in ranks}

    def turns(goes_on: Callable[[], bool]) -> None:
        """Give every client its turns in a simulated second, as long as an answer is missing."""
        while goes_on():
            end = time.monotonic() + options.scale / TURNS
            for client in clients.values():
                client.turn(0)
            wait_until(end)

    deadline = time.monotonic() + 300
    turns(
        lambda: (
            time.monotonic() < deadline and any(len(c.status()) < options.replicas for c in clients.values())
        )
    )
    pipe.send(min(len(client.status()) for client in clients.values()))
    while True:
        _, step = pipe.recv()
        messages.take()
        cpu.take()
        opens.clear()
        before = sum((Counter(client.counts) for client in clients.values()), Counter[str]())
        sizes = sample_sizes(options, step)
        for rank, client in clients.items():
            for sample, size in enumerate(sizes[rank].tolist()):
                client.submit(request_of(rank * options.samples + sample, size))
        due = (step + 1) * options.samples
        turns(lambda: any(client.counts["answers"] < due for client in clients.values()))  # noqa: B023  (at once)
        for client in clients.values():
            while client.arrived():
                client.next()
        counts = sum((Counter(client.counts) for client in clients.values()), Counter[str]())
        counts.subtract(before)
        pipe.send(
            {
                **{k: counts[k] for k in ("again", "recalled", "late")},
                **opens,
                "messages": messages.take(),
                "cpu": cpu.take(),
            }
        )


def open_client(
    options: argparse.Namespace, folder: Path, store: dist.Store, context: zmq.Context, *, reads: bool
) -> TeacherClient:
    scale = options.scale
    control = options.rule == "timer"
    patience = Patience(
        timeout_s=3600 * scale,
        hello_s=scale,
        silence_s=10 * scale,
        look_s=0.5 * scale,
        look_again_s=(0.5 if control else 10) * scale,
    )
    kind = TimerClient if control else TeacherClient
    client = kind(
        lookout=Lookout(folder, store=None if control else store, reads=control or reads),
        key_file=None if options.bind == "ipc" else folder / CLIENT_KEY,
        fingerprints=FINGERPRINTS,
        patience=patience,
        window_tokens=options.window_tokens,
        where=str(folder),
        context=context,
    )
    if isinstance(client, TimerClient):
        client.again_s = AGAIN_S * scale
    return client


def request_of(sample_id: int, tokens: int) -> TeacherRequest:
    return TeacherRequest(
        sample_id=sample_id,
        prompt_ids=np.zeros(tokens // 2, np.int32),
        label_ids=np.zeros(tokens - tokens // 2, np.int32),
        rows=np.zeros(0, np.int32),
        hidden=False,
        topk=0,
        token_ids=False,
        byte_side=None,
    )


def table(report: dict[str, Any]) -> str:
    steps = report["steps"]
    head = {name: value for name, value in report.items() if name != "steps"}
    lines = [
        ", ".join(f"{name} {value}" for name, value in head.items()),
        "",
        row(list(steps[0])),
        row(["---"] * len(steps[0])),
    ]
    return "\n".join([*lines, *(row(list(step.values())) for step in steps)])


def row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(f'{cell:g}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
