"""Rewards of responses for training: --reward, a user's function or one of our graders.

    def reward(prompt, response, row) -> float

prompt: the row's prompt, a text or messages. response: a text. row: the row of --prompt-data as it was read.
A function runs in separate processes; it may block, crash or print there. A function that raises, takes too
long or returns no finite number gives no reward.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_simct.config.options import GRADED_REWARDS, RewardConfig
from megatron_simct.evaluation.answers import Thinking
from megatron_simct.evaluation.benchmarks import Problem
from megatron_simct.evaluation.called import Function, NoAnswer
from megatron_simct.evaluation.grading import Grader
from megatron_simct.evaluation.math_verifier import MathVerifier
from megatron_simct.evaluation.sandbox import Limits


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


class Called(Function):
    """A user's function in a separate process."""

    def __init__(self, place: str, *, timeout_s: float) -> None:
        """place: MODULE:FUNCTION."""
        super().__init__(place, flag="--reward", timeout_s=timeout_s)

    def __call__(self, response: Response) -> float:
        try:
            return float(self.ask(response.prompt, response.text, response.row))
        except NoAnswer as why:
            raise NoReward(str(why)) from None
        except (TypeError, ValueError) as error:
            raise NoReward(f"{type(error).__name__}: {error}") from None
