"""Rewards of responses for training: --reward, a user's function or one of our graders.

    def reward(prompt, response, row) -> float

prompt: the row's prompt, a text or messages. response: a text. row: the row of --prompt-data as it was read.
A function runs in separate processes; it may block, crash or print there. A function that raises, takes too
long or returns no finite number gives no reward.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import selectors
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_simct.config.options import GRADED_REWARDS, RewardConfig
from megatron_simct.evaluation.answers import Thinking
from megatron_simct.evaluation.benchmarks import Problem
from megatron_simct.evaluation.grading import Grader
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits

START_TIMEOUT_S = 300.0
"""Importing a user's module may import a large library."""


ENDED = {"problem": "its process ended"}
"""The last message of a process."""


class NoReward(Exception):
    """The reason why a response gets no reward."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """The arguments of a reward."""

    prompt: str | Sequence[Mapping[str, Any]]
    text: str
    row: Mapping[str, Any]


class Rewarder(Protocol):
    """Gives one reward at a time."""

    def __call__(self, response: Response) -> float:
        """Raises NoReward if the response gets no reward."""
        ...

    def close(self) -> None: ...


class Rewards:
    """Rewards of many responses, --reward-workers at a time. The caller must close it."""

    def __init__(self, options: RewardConfig, *, chat: bool, thinking: Thinking) -> None:
        """chat, thinking: properties of the responses, as graders read them.

        Raises ValueError if the function cannot be imported.
        """
        assert options.reward is not None, "there is a reward"
        self._rewarders: list[Rewarder] = []
        for _ in range(options.reward_workers):
            if options.reward in GRADED_REWARDS:
                self._rewarders.append(Graded(options.reward, chat=chat, thinking=thinking))
            else:
                self._rewarders.append(Called(options.reward, timeout_s=options.reward_timeout_seconds))
        if isinstance(self._rewarders[0], Called):
            self._rewarders[0].start()
        self._pool = ThreadPoolExecutor(options.reward_workers, thread_name_prefix="reward")
        self._idle: queue.SimpleQueue[Rewarder] = queue.SimpleQueue()
        for rewarder in self._rewarders:
            self._idle.put(rewarder)

    def submit(self, responses: Iterable[Response]) -> list[Future[float]]:
        """Futures in the order of the responses. A future raises NoReward if its response gets no reward."""
        return [self._pool.submit(self._one, response) for response in responses]

    def _one(self, response: Response) -> float:
        rewarder = self._idle.get()
        try:
            reward = rewarder(response)
        finally:
            self._idle.put(rewarder)
        if not math.isfinite(reward):
            raise NoReward(f"the reward is {reward}")
        return reward

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for rewarder in self._rewarders:
            rewarder.close()


class Graded:
    """1 if one of our graders calls a response right, else 0."""

    def __init__(self, reward: str, *, chat: bool, thinking: Thinking) -> None:
        self._verifier = MathVerifier()
        if reward == "math":
            # report a missing package now, not as a missing reward of every response
            self._verifier("1", "1")
        self._grader = Grader(
            GRADED_REWARDS[reward], self._verifier, chat=chat, limits=Limits(), thinking=thinking
        )

    def __call__(self, response: Response) -> float:
        problem = Problem(problem_id="", chat="", completion=None, fields=dict(response.row))
        try:
            metrics = self._grader.grade(problem, response.text)
        except (LookupError, ValueError) as error:  # the row lacks a field that the grader reads
            raise NoReward(f"{type(error).__name__}: {error}") from None
        return float(next(iter(metrics.values())))

    def close(self) -> None:
        self._verifier.close()


class Called:
    """A function in a separate process, which is killed if it does not answer in time."""

    def __init__(self, place: str, *, timeout_s: float) -> None:
        """place: MODULE:FUNCTION."""
        self._place = place
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ValueError, naming the flag, if the function cannot be imported.

        The calling thread must live as long as the process: the kernel ends the process with that thread.
        """
        worker = "megatron_simct.evaluation.reward_worker"
        self._process = subprocess.Popen(
            [sys.executable, "-m", worker, self._place, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        answer = self._answer(START_TIMEOUT_S)
        if answer is None or "problem" in answer:
            self.close()
            why = f"not imported in {START_TIMEOUT_S:g} s" if answer is None else answer["problem"]
            raise ValueError(f"--reward {self._place}: {why}")

    def __call__(self, response: Response) -> float:
        if self._process is None:
            try:
                self.start()
            except ValueError as error:
                raise NoReward(str(error)) from None
        process = self._process
        assert process is not None and process.stdin is not None, "it was started"
        asked = json.dumps(
            {"prompt": response.prompt, "response": response.text, "row": response.row}, default=str
        )
        with contextlib.suppress(BrokenPipeError):  # the process has ended meanwhile, so there is no answer
            process.stdin.write(asked.encode() + b"\n")
            process.stdin.flush()
        answer = self._answer(self._timeout_s)
        if answer is None:
            self.close()
            raise NoReward(f"no answer in {self._timeout_s:g} s")
        if answer == ENDED:
            self.close()
        if "problem" in answer:
            raise NoReward(answer["problem"])
        return float(answer["reward"])

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line of the process, or ENDED; None if no line arrives in time."""
        assert self._process is not None and self._process.stdout is not None, "it was started"
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else ENDED

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "both are pipes"
            with contextlib.suppress(BrokenPipeError):  # it still holds input that the process did not read
                pipe.close()
        self._process = None
