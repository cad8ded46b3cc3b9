"""kill -9 at N random moments of a tiny run, restarted until it is done, against an undisturbed run.

The seed chooses each moment: a hop (in turn, so that all are used), one of its calls in the three steps that
follow a restart, a rank, and a delay after the start of the call, up to the time that such a call takes. Each
attempt forks fresh processes from this one, which has trained nothing. If one rank is killed, the others are
killed after it, as torchrun does. At the end metrics (except times), weights, optimizer and random state must
be equal bit by bit.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.teacher.colocated import ColocatedScorer
from megatron_simct.update.checkpoint import Checkpoints, Write
from megatron_simct.update.step import Updater
from tests.distributed import run_ranks
from tests.runs import assert_same_run, run
from tests.tiny import build_files, command_line

HOPS: dict[str, tuple[Any, str]] = {
    "save": (Checkpoints, "save"),
    "backward": (torch.autograd, "backward"),
    "rollout": (MegatronEngine, "generate"),
    "optimizer": (Updater, "_change_weights"),
    "scoring": (ColocatedScorer, "collect"),
    "publish": (Write, "finish"),
}
"""The methods that are wrapped to know which hop a process is in."""

SAVE_INTERVAL = 2


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: `delay_s` after the call number `call` of the hop began on this rank."""

    hop: str
    call: int
    rank: int
    delay_s: float


class Watch:
    """Knows which hop a process is in, and kills it at its moment."""

    def __init__(self, rank: int, moment: Moment | None, log: Path) -> None:
        self._rank = rank
        self._moment = moment
        self._log = log
        self._inside = ["between hops"]
        self._calls: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {hop: [] for hop in HOPS}

    def wrap(self, hop: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            moment = self._moment
            if moment is not None and (moment.hop, moment.call, moment.rank) == (
                hop,
                self._calls[hop],
                self._rank,
            ):
                threading.Timer(moment.delay_s, self._kill).start()
            self._calls[hop] += 1
            self._inside.append(hop)
            begin = time.perf_counter()
            answer = function(*args, **kwargs)
            if hop == "scoring":  # a generator
                answer = list(answer)
            self.seconds[hop].append(time.perf_counter() - begin)
            self._inside.pop()
            return answer

        return watched

    def _kill(self) -> None:
        with open(self._log, "a") as file:
            file.write(self._inside[-1] + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def attempt(
    rank: int, world_size: int, argv: list[str], moment: Moment | None, log: Path
) -> dict[str, list[float]]:
    """The command under a watch; the seconds of every call by hop."""
    watch = Watch(rank, moment, log)
    sys.setswitchinterval(1e-4)
    for hop, (owner, name) in HOPS.items():
        setattr(owner, name, watch.wrap(hop, getattr(owner, name)))
    code, _, err = run(rank, world_size, argv)
    assert code == 0, err
    return watch.seconds


def verify(folder: Path, *, kills: int, seed: int, processes: int, flags: Sequence[str] | None = None) -> str:
    """Run, kill, restart, compare. Returns one line that says what was verified. Raises
    AssertionError on a difference.

    flags: of the run. Without them, all processes are tensor-parallel.
    """
    flags = ("--tensor-model-parallel-size", str(processes)) if flags is None else flags
    files = folder / "files"
    files.mkdir()
    build_files(files)
    # An attempt is killed within three steps, so the run advances by at most one checkpoint.
    steps = SAVE_INTERVAL * (kills + 1)
    argv = {
        name: command_line(
            files,
            *("--train-iters", str(steps), "--save-interval", str(SAVE_INTERVAL), "--save-retain", "2"),
            *("--run-dir", str(folder / name / "run"), *flags),
            *("--save", str(folder / name / "save"), "--load", str(folder / name / "save")),
        )
        for name in ("undisturbed", "killed")
    }
    log = folder / "killed_in.txt"
    log.write_text("")
    seconds = run_ranks(processes, attempt, argv["undisturbed"], None, log)[0]
    moments = _moments(kills, random.Random(seed), seconds, steps, processes)
    for number, moment in enumerate(moments, start=1):
        try:
            run_ranks(processes, attempt, argv["killed"], moment, log)
        except AssertionError:
            if len(log.read_text().splitlines()) != number:
                raise
        else:
            raise AssertionError(f"the run was done before {moment}")
    run_ranks(processes, attempt, argv["killed"], None, log)
    num_tensors = assert_same_run(folder / "killed", folder / "undisturbed")
    hit = Counter(log.read_text().splitlines())
    return (
        f"kill -9 at {kills} moments ({', '.join(f'{hop} {n}' for hop, n in sorted(hit.items()))}) of "
        f"{steps} steps on {processes} process(es), restarted each time: metrics and {num_tensors} tensors "
        "of weights, optimizer and random state are bit-identical to an undisturbed run "
        f"({torch.get_num_threads()} thread a process)"
    )


def _moments(
    kills: int, dice: random.Random, seconds: dict[str, list[float]], steps: int, processes: int
) -> list[Moment]:
    moments = []
    for number in range(kills):
        hop = list(HOPS)[number % len(HOPS)]
        calls = 1 if hop in ("save", "publish") else (SAVE_INTERVAL + 1) * len(seconds[hop]) // steps
        # At the last kill the run may have only SAVE_INTERVAL steps left.
        calls = min(calls, SAVE_INTERVAL * len(seconds[hop]) // steps) if number == kills - 1 else calls
        typical = sorted(seconds[hop])[len(seconds[hop]) // 2]
        moments.append(
            Moment(
                hop=hop,
                call=dice.randrange(calls),
                rank=dice.randrange(processes),
                delay_s=dice.random() * typical,
            )
        )
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2), help="tensor-parallel ranks")
    # the other arguments are flags of the run, instead of its layout
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        text = verify(
            Path(folder),
            kills=options.kills,
            seed=options.seed,
            processes=options.processes,
            flags=flags or None,
        )
    print(text)


if __name__ == "__main__":
    main()
