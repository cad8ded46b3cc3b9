"""While a wave is sampled, the one before it is aligned and sent by another thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_simct.monitoring import Stopwatch
from megatron_simct.records import Prompt
from megatron_simct.train import begin

PATIENCE_S = 30


class Parts:
    """A job of three waves of two prompts, whose parts wait for each other."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.sampling = [threading.Event() for _ in range(4)]
        self.sampling[3].set()
        self.sent = [threading.Event() for _ in range(6)]
        self.threads: set[threading.Thread] = set()
        ids = np.zeros(0, np.int32)
        prompts = [Prompt(sample_id=i, student_ids=ids, teacher_ids=ids) for i in range(6)]
        self.job = SimpleNamespace(
            config=SimpleNamespace(rollout=SimpleNamespace(rollout_wave_size=2)),
            prompts=SimpleNamespace(batch=lambda iteration: prompts),
            engine=SimpleNamespace(generate=self.generate),
            sampling=None,
            align=self.align,
            teacher=SimpleNamespace(score=self.score),
            background=ThreadPoolExecutor(max_workers=1),
        )

    def generate(self, wave, sampling):
        number = wave[0].sample_id // 2
        self.sampling[number].set()
        if self.fails == "generate" and number == 1:
            raise ValueError("no memory")
        if number and not self.fails:
            assert self.sent[2 * number - 1].wait(PATIENCE_S), "the last wave was not sent while this one is sampled"
        return [prompt.sample_id for prompt in wave]

    def align(self, prompt, rollout):
        self.threads.add(threading.current_thread())
        number = prompt.sample_id // 2
        if self.fails == "align" and number == 1:
            raise ValueError("no map")
        if not self.fails:
            assert self.sampling[number + 1].wait(PATIENCE_S), "the next wave waits for this one to be aligned"
        assert rollout == prompt.sample_id
        return rollout

    def score(self, pairs):
        taken = []
        for pair in pairs:
            taken.append(pair)
            self.sent[pair].set()
        return iter(taken)


def test_waves_are_aligned_and_sent_while_the_next_are_sampled():
    parts, clock = Parts(), Stopwatch()
    batch = begin(parts.job, 0, clock)
    assert batch.rollouts == batch.pairs == list(batch.scores) == list(range(6))
    assert len(parts.threads) == 1 and threading.main_thread() not in parts.threads
    assert clock.seconds.keys() == {"rollout", "alignment"}


@pytest.mark.parametrize("part, words", [("align", "no map"), ("generate", "no memory")])
def test_what_goes_wrong_in_either_thread_ends_the_step(part, words):
    parts = Parts(fails=part)
    with pytest.raises(ValueError, match=words):
        begin(parts.job, 0, Stopwatch())
    parts.job.background.shutdown()  # nothing of it waits for ever


def test_an_interrupt_while_work_is_handed_over_leaves_no_thread_that_waits():
    """A Ctrl-C may come when the other thread has its work and this one has not yet gone on."""
    parts = Parts()
    handed_over = []

    def submit(*work):
        handed_over.append(pool.submit(*work))
        raise KeyboardInterrupt

    pool, parts.job.background = parts.job.background, SimpleNamespace(submit=submit)
    with pytest.raises(KeyboardInterrupt):
        begin(parts.job, 0, Stopwatch())
    try:
        assert list(handed_over[0].result(timeout=PATIENCE_S)) == []
    finally:
        pool.shutdown(wait=False)
