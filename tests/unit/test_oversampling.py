"""Steps that carry responses over train on each prompt once and in time, in whatever
order responses finish.
"""

from __future__ import annotations

import json
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_simct.config.flags import parse_config
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.oversampling import Oversampling

SAMPLING = Sampling(temperature=1.0, max_response_len=9, seed=0)


class Prompts:
    """Each group has its own prompt."""

    def __init__(self, samples_per_prompt: int, first: int = 100) -> None:
        self._samples_per_prompt, self._first = samples_per_prompt, first

    def samples(self, sample_ids: Iterable[int]) -> list[Prompt]:
        return [
            Prompt(
                sample_id=sample_id,
                student_ids=np.array([self._first + sample_id // self._samples_per_prompt], np.int32),
                teacher_ids=np.zeros(0, np.int32),
            )
            for sample_id in sample_ids
        ]


class Engine:
    """Finishes responses in a random order. A token is made of sample id and position."""

    def __init__(self, seed: int, version: int) -> None:
        self.random, self.version = random.Random(seed), version
        self.left_open = 0

    def race(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        begun: Mapping[int, Rollout],
        least: int,
        is_enough: Callable[[], bool],
    ) -> Iterator[list[Rollout]]:
        waiting = list(prompts)
        self.random.shuffle(waiting)
        finished = 0
        while waiting and not is_enough():
            count = self.random.randint(0, 2)
            finished += len(waiting[:count])
            yield [self._more(prompt, begun, "stop") for prompt in waiting[:count]]
            waiting = waiting[count:]
        assert finished >= least and is_enough()
        rest = [self._more(prompt, begun, "open") for prompt in waiting]
        self.left_open += len(rest)
        yield [rollout for rollout in rest if len(rollout.student_ids)]

    def _more(self, prompt: Prompt, begun: Mapping[int, Rollout], finish: Any) -> Rollout:
        has = begun.get(prompt.sample_id)
        before = [] if has is None else has.student_ids.tolist()
        count = self.random.randint(0 if finish == "open" else 1, 3)
        ids = before + [1000 * prompt.sample_id + 10 * (len(before) + i) for i in range(count)]
        logprobs = ([] if has is None else has.logprobs.tolist()) + [float(self.version)] * count
        return Rollout(
            sample_id=prompt.sample_id,
            weight_version=self.version if has is None else has.weight_version,
            student_ids=np.array(ids, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish=finish,
        )


class Ranks:
    """Data-parallel ranks as threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier, self._said = threading.Barrier(size, timeout=60), [None] * size

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self._said[rank] = mine
        self._barrier.wait()
        found = list(self._said)
        self._barrier.wait()
        return found

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Run function(rank) on each; the results."""
        found: list[Any] = [None] * self.size
        threads = [
            threading.Thread(target=lambda rank=rank: found.__setitem__(rank, function(rank)), daemon=True)
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert None not in found, "a rank has failed"
        return found


def run_steps(
    size: int,
    steps: range,
    state: bytes | None,
    *,
    seed: int,
    share: int,
    more: int,
    n: int,
    max_lag: int,
    ahead: int = 0,
) -> tuple[list[list[Rollout]], list[bytes], list[float]]:
    """The samples of each step, the state after each step, and the number of carried responses in each.

    ahead: steps that are sampled before the update of this one, as by --schedule one_step_off.
    """
    ranks = Ranks(size)

    def rank_of(rank: int) -> list[Any]:
        source = Oversampling(
            Prompts(n),
            share=share // size,
            more=-(-more // size),
            samples_per_prompt=n,
            max_lag=max_lag + ahead,
            dp_rank=rank,
            gather=lambda mine: ranks.gather(rank, mine),
        )
        source.begin_at(steps[0]) if state is None else source.load(state)
        found = []
        coming: deque[tuple[list[Rollout], float]] = deque()
        for step in steps:
            for sampled in range(step + len(coming), step + ahead + 1):
                engine = Engine(1000 * seed + 10 * sampled + rank, version=step)
                pairs = [pair for some in source.step(engine, sampled, SAMPLING) for pair in some]
                assert all(p.sample_id == r.sample_id for p, r in pairs)
                coming.append(([r for _, r in pairs], source.metrics["rollout_carried"]))
            rollouts, carried = coming.popleft()
            before = source.state()  # a save before the update: its responses are not trained on
            source.trained(step)
            found.append((rollouts, before, source.state(), carried))
        return found

    found = ranks.run(rank_of)
    rollouts = [[r for part in parts for r in part[0]] for parts in zip(*found, strict=True)]
    for parts, trained in zip(zip(*found, strict=True), rollouts, strict=True):
        again = {row["number"] for row in json.loads(parts[0][1])["groups"]}
        left = {row["number"] for row in json.loads(parts[0][2])["groups"]}
        assert again - left == {r.sample_id // n for r in trained}
    if len(steps) > 2:  # samples that a state of another shape had in addition are trained on by then
        assert len(left) == size * -(-more // size) + ahead * share
    return rollouts, [part[2] for part in found[0]], [part[3] for part in found[0]]


@pytest.mark.parametrize("seed", range(40))
def test_every_prompt_is_trained_on_once_whatever_finishes_first(seed) -> None:
    """With kills and other numbers of ranks in between: no response is lost, mixed up, or too old."""
    choose = random.Random(seed)
    n, max_lag = choose.randint(1, 3), choose.randint(1, 3)
    ahead = choose.randint(0, 1)
    shape = {"share": 6, "n": n, "max_lag": max_lag, "ahead": ahead}
    done, state, trained, carried = 0, None, [], []
    while done < 9:
        steps = range(done, done + choose.randint(2, 4))
        size = choose.choice([1, 2, 3])
        more = choose.randint(1, 3)
        rollouts, states, counts = run_steps(size, steps, state, seed=seed, more=more, **shape)
        kept = choose.randint(1, len(steps))  # the last steps were not saved when the run was killed
        trained += rollouts[:kept]
        carried += counts[:kept]
        done, state = done + kept, states[kept - 1]
    ids = [rollout.sample_id for step in trained for rollout in step]
    left = json.loads(state)
    open_ids = [row["number"] * n + i for row in left["groups"] for i in range(n)]
    assert sorted(ids + open_ids) == list(range(n * left["next"]))
    for step, rollouts in enumerate(trained):
        assert len(rollouts) == 6 * n
        assert len({r.sample_id // n for r in rollouts}) == 6, "whole groups"
        for rollout in rollouts:
            first = 1000 * rollout.sample_id
            assert rollout.finish == "stop" and step - rollout.weight_version <= max_lag + ahead
            assert rollout.student_ids.tolist() == [first + 10 * i for i in range(len(rollout.student_ids))]
            versions = rollout.logprobs.tolist()
            assert versions == sorted(versions) and versions[0] == rollout.weight_version <= step
    assert sum(carried) > 0
    mixed = [r for step in trained for r in step if len(set(r.logprobs.tolist())) > 1]
    assert mixed, "some response is of several weights"


def test_steps_that_carry_nothing_over_are_those_of_the_stream_of_prompts() -> None:
    rollouts, states, carried = run_steps(2, range(3, 6), None, seed=1, share=4, more=0, n=2, max_lag=1)
    for step, found in zip(range(3, 6), rollouts, strict=True):
        assert sorted(r.sample_id for r in found) == list(range(8 * step, 8 * step + 8))
    assert json.loads(states[-1])["groups"] == [] and carried == [0, 0, 0]


def test_other_prompts_than_those_of_the_checkpoint_are_refused() -> None:
    _, states, _ = run_steps(1, range(2), None, seed=3, share=4, more=2, n=2, max_lag=1)

    def another(n: int, first: int) -> Oversampling:
        return Oversampling(
            Prompts(n, first),
            share=4,
            more=2,
            samples_per_prompt=n,
            max_lag=1,
            dp_rank=0,
            gather=lambda mine: [mine],
        )

    with pytest.raises(ValueError, match="--n-samples-per-prompt 3: the checkpoint carries over groups of 2"):
        another(3, 100).load(states[-1])
    with pytest.raises(ValueError, match="--prompt-data: prompt .* is not the one"):
        another(2, 101).load(states[-1])
    another(2, 100).load(states[-1])


VLLM = ("--rollout-engine", "vllm", "--rollout-engine-endpoint", "http://h:1", "--run-dir", "r")


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "--rollout-oversample 0.5: needs --rollout-engine vllm; the default engine decodes a wave"),
        ((*VLLM, "--load-debug-rollout-data", "d"), "not with --load-debug-rollout-data: stored responses"),
        ((*VLLM, "--rollout-wave-size", "2"), "not with --rollout-wave-size: all responses are requested"),
        ((*VLLM, "--rollout-max-lag", "0"), "is at least 1 steps old, and --rollout-max-lag is 0"),
        (
            (*VLLM, "--rollout-batch-size", "63", "--n-samples-per-prompt", "16"),
            "63\\) must be a multiple of the data-parallel",
        ),
        (("--rollout-oversample", "1.5"), "--rollout-oversample 1.5: must be"),
    ],
)
def test_refused_where_nothing_can_be_carried_over(flags, words) -> None:
    base = ["--hf-checkpoint", "x", "--tokenizer-model", "t", "--prompt-data", "y"]
    base += ["--teacher-hf-checkpoint", "z", "--teacher-tokenizer-model", "t"]
    with pytest.raises(ValueError, match=words):
        parse_config([*base, "--rollout-oversample", "0.5", *flags]).check(data_parallel_size=2)


def test_the_default_lag_is_one_step_more() -> None:
    base = ["--hf-checkpoint", "x", "--prompt-data", "y", *VLLM, "--rollout-oversample", "0.5"]
    assert parse_config(base).max_lag == 1
    assert parse_config([*base, "--schedule", "one_step_off"]).max_lag == 2
    assert parse_config([*base, "--rollout-max-lag", "5"]).max_lag == 5
