"""The test of soak.sh: a launcher with a student (two ranks) and two teacher replicas, disturbed
until the time is over.

    kill          kill -9 of one process of the student or the teacher; torchrun starts the job again
    crash         kill -9 of the launcher and of everything below it, as when a machine loses its power
    interrupt     SIGINT to the launcher: the student saves, and the launcher is started again
    stop          SIGSTOP of one process, and SIGCONT later
    link          the proxy between student and teacher stops forwarding for a while; half of the time it also
                  closes its connections
    disk          the disk of the run is full for a while
    clock         the clock that all processes see jumps, forwards or backwards

A round is one run of STEPS steps. At its end metrics, weights, optimizer and random state equal those of
an undisturbed run bit by bit. Therefore the teacher computes each sample alone: its batches depend on
when requests arrive.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from tests.runs import assert_same_run
from tests.tiny import build_files
from tests.weights import random_weights

ROOT = Path(__file__).parents[2]
STEPS = 24
SAVE_INTERVAL = 3
TEACHER_TOKENS = 200
"""Token limit of one teacher batch: above one sample (112 of prompt, at most 64 of response), below two."""
PROMPT = "How many marbles has Nora, and how many has Anna? " * 4
STUCK_S = 600.0
"""A run that makes no step for this long is stuck."""


class Proxy(threading.Thread):
    """Forwards TCP connections to a port of this host, unless the link is cut."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []

    def run(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
            except OSError:  # the teacher is not running now
                near.close()
                continue
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._open.wait()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def cut(self, *, close: bool) -> Iterator[None]:
        self._open.clear()
        if close:
            for pair in self._pairs:
                for one in pair:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()
        try:
            yield
        finally:
            self._open.set()


class Round:
    """One run with disturbances, in its own folder."""

    def __init__(
        self, folder: Path, files: Path, weights: tuple[str, ...], logs: Path, dice: random.Random
    ) -> None:
        self.folder, self._dice = folder, dice
        self.log = logs / f"{folder.name}.log"
        self.done: Counter[str] = Counter()
        first = _free_port()
        ports = [first, first + 1]  # the ports at which replicas bind
        self._proxies = [Proxy(port) for port in ports]
        for proxy in self._proxies:
            proxy.start()
        self._clock = logs / f"{folder.name}.clock"
        self._set_clock(0)
        folder.mkdir()
        self._run_file = folder / "run.yaml"
        self._run_file.write_text(yaml.safe_dump(self._values(files, weights, ports), sort_keys=False))
        self._launcher: subprocess.Popen[bytes] | None = None

    def _values(self, files: Path, weights: tuple[str, ...], ports: list[int]) -> dict[str, Any]:
        student = {
            "hf_checkpoint": str(files / "student"),
            "tokenizer_model": str(files / "student.model"),
            "teacher_tokenizer_model": str(files / "teacher.tiktoken"),
            "prompt_data": str(files / "soak.jsonl"),
            "make_vocab_size_divisible_by": 8,
            "rollout_max_prompt_len": 130,
            "rollout_max_response_len": 8,
            "rollout_batch_size": 8,
            "micro_batch_size": 2,
            "train_iters": STEPS,
            "lr": 1e-3,
            "lr_warmup_fraction": 0.0,
            "seed": 5,
            "tensor_model_parallel_size": 2,
            "simct_interface": "bytes",
            "save_interval": SAVE_INTERVAL,
            "save_retain": 2,
            "run_dir": str(self.folder / "run"),
            "save": str(self.folder / "save"),
            "load": str(self.folder / "save"),
            "teacher_endpoint": [f"tcp://127.0.0.1:{proxy.port}" for proxy in self._proxies],
            "teacher_client_key": str(self.folder / "serving" / "teacher" / "client_key.json"),
            "pretrained_checkpoint": weights[1],
        }
        teacher = {
            "teacher_hf_checkpoint": str(files / "teacher"),
            "teacher_pretrained_checkpoint": weights[3],
            "teacher_tokenizer_model": str(files / "teacher.tiktoken"),
            "teacher_make_vocab_size_divisible_by": 4,
            "teacher_hidden_dtype": "fp32",
            "max_tokens_per_batch": TEACHER_TOKENS,
            "run_dir": str(self.folder / "serving"),
            "bind": f"tcp://127.0.0.1:{ports[0]}",
        }
        size = {"processes_per_node": 2, "max_restarts": 1000}
        return {
            "run_dir": str(self.folder),
            "student": student,
            "teacher": teacher,
            "cluster": {"kind": "local", "student": size, "teacher": size, "grace_s": 60},
        }

    def steps(self) -> int:
        with contextlib.suppress(OSError):
            return (self.folder / "run" / "metrics.jsonl").read_text().count('"kind": "step"')
        return 0

    def start(self) -> None:
        preload = {"LD_PRELOAD": str(self._clock.with_name("clock.so")), "SIMCT_SOAK_CLOCK": str(self._clock)}
        with self.log.open("ab") as output:
            self._launcher = subprocess.Popen(
                [sys.executable, "-m", "megatron_simct.launch", str(self._run_file)],
                cwd=ROOT,
                env=os.environ | preload | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, disturbances: dict[str, Callable[[Round], None]]) -> None:
        """Run until the student has made all its steps."""
        self.start()
        last, since = -1, time.monotonic()
        while True:
            assert self._launcher is not None
            code = self._launcher.poll()
            if code == 0 and self.steps() == STEPS:
                return
            if code is not None:
                if not disturbances:
                    fail(self, f"the launcher ended with exit code {code}")
                self._kill_all()
                self.done["launcher started again"] += 1
                self.start()
            if (steps := self.steps()) != last:
                last, since = steps, time.monotonic()
            if time.monotonic() - since > STUCK_S:
                fail(self, f"no step for {STUCK_S:.0f} s; {self.steps()} of {STEPS} are made")
            self._pause()
            if disturbances and self.processes():
                name = self._dice.choice(sorted(disturbances))
                self.done[name] += 1
                disturbances[name](self)

    def _pause(self) -> None:
        """Wait a few seconds. Half of the time, wait until the next step: a run that always starts again
        would never make one.
        """
        time.sleep(self._dice.uniform(1.0, 6.0))
        wants_step, before, deadline = self._dice.random() < 0.5, self.steps(), time.monotonic() + 60
        assert self._launcher is not None
        while (
            wants_step
            and self.steps() == before
            and time.monotonic() < deadline
            and self._launcher.poll() is None
        ):
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """The ranks of the student and of the teacher."""
        assert self._launcher is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._launcher.pid).children(recursive=True)
            return [process for process in below if _is_rank(process)]
        return []

    def one(self) -> psutil.Process | None:
        ranks = self.processes()
        return self._dice.choice(ranks) if ranks else None

    def _kill_all(self) -> None:
        assert self._launcher is not None
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._launcher.pid).children(recursive=True)
        self._launcher.kill()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._launcher.wait()
        psutil.wait_procs(below, timeout=30)

    # Disturbances

    def kill(self) -> None:
        process = self.one()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def crash(self) -> None:
        self._kill_all()

    def interrupt(self) -> None:
        assert self._launcher is not None
        self._launcher.send_signal(signal.SIGINT)

    def stop(self) -> None:
        process = self.one()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                time.sleep(self._dice.uniform(0.5, 15.0))
                process.resume()

    def link(self) -> None:
        with self._dice.choice(self._proxies).cut(close=self._dice.random() < 0.5):
            time.sleep(self._dice.uniform(0.5, 15.0))

    def disk(self) -> None:
        ballast = self.folder.parent / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        time.sleep(self._dice.uniform(0.5, 10.0))
        ballast.unlink(missing_ok=True)

    def clock(self) -> None:
        self._set_clock(self._dice.choice([-86400, -3600, -60, 60, 3600, 86400]))

    def _set_clock(self, offset_s: int) -> None:
        """Write in place: the processes have mapped the file."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(offset_s.to_bytes(8, sys.byteorder, signed=True))


DISTURBANCES: dict[str, Callable[[Round], None]] = {
    "kill": Round.kill,
    "crash": Round.crash,
    "interrupt": Round.interrupt,
    "stop": Round.stop,
    "link": Round.link,
    "disk": Round.disk,
    "clock": Round.clock,
}


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        jobs = ("megatron_simct.train", "megatron_simct.serve_teacher")
        return any(job in command for job in jobs) and "torch.distributed.run" not in command
    return False


def _processes_of(run: Path) -> list[psutil.Process]:
    """All processes whose command line contains the run's folder. A process forked by a rank has the
    rank's command line.
    """
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(run) in argument for argument in process.info["cmdline"] or [])
    ]


def _free_port() -> int:
    """A port whose successor is also free: replica 1 binds to that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def fail(round_: Round, what: str) -> NoReturn:
    print(round_.log.read_text(errors="replace")[-6000:])
    raise SystemExit(f"soak: FAILED in {round_.folder.name}: {what}; disturbances {dict(round_.done)}")


def _write_prompts(path: Path) -> None:
    rows = [{"prompt": f"{PROMPT}Tom has {10 + i} shells."} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hours", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, required=True, help="on a small disk of its own, which is filled"
    )
    parser.add_argument("--logs", type=Path, required=True)
    options = parser.parse_args()
    end = time.monotonic() + 3600 * options.hours
    files = options.logs / "files"
    files.mkdir()
    build_files(files)
    _write_prompts(files / "soak.jsonl")
    weights = random_weights(files, options.logs / "weights")
    undisturbed = Round(options.folder / "undisturbed", files, weights, options.logs, random.Random(0))
    undisturbed.run({})
    print(
        f"soak: {STEPS} undisturbed steps in {time.monotonic() - end + 3600 * options.hours:.0f} s",
        flush=True,
    )
    total: Counter[str] = Counter()
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        rounds += 1
        dice = random.Random(options.seed * 1000 + rounds)
        disturbed = Round(options.folder / f"round{rounds}", files, weights, options.logs, dice)
        disturbed.run(DISTURBANCES)
        try:
            number = assert_same_run(disturbed.folder, undisturbed.folder)
        except AssertionError as error:
            fail(disturbed, f"it is not the undisturbed run: {str(error)[:2000]}")
        _, left = psutil.wait_procs(_processes_of(disturbed.folder), timeout=60)
        if left:
            fail(disturbed, f"processes are left: {left}")
        total += disturbed.done
        shutil.rmtree(disturbed.folder)
        print(f"soak: round {rounds} as undisturbed: {dict(disturbed.done)}", flush=True)
    what = ", ".join(f"{count} x {name}" for name, count in sorted(total.items()))
    print(
        f"soak: verified: {rounds} runs of {STEPS} steps (seed {options.seed}) under {what}: metrics and "
        f"{number} tensors of weights, optimizer and random state are those of an undisturbed run, bit by bit"
    )


if __name__ == "__main__":
    main()
