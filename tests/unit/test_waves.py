"""While a wave is sampled, another thread aligns and sends the one before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_simct import train
from megatron_simct.records import Prompt
from megatron_simct.reporting.monitor import Stopwatch
from megatron_simct.train import Batch, begin, check_lag, tail_s
from megatron_simct.update.step import NonFiniteError

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
            rewarding=None,
            oversampling=None,
            given=None,
            config=SimpleNamespace(rollout=SimpleNamespace(rollout_wave_size=2, rollout_engine="megatron")),
            prompts=SimpleNamespace(batch=lambda iteration: prompts),
            engine=SimpleNamespace(generate=self.generate),
            sampling=None,
            align=self.align,
            teacher=SimpleNamespace(submit=self.submit),
            background=ThreadPoolExecutor(max_workers=1),
        )

    def generate(self, wave, sampling) -> list[SimpleNamespace]:
        number = wave[0].sample_id // 2
        self.sampling[number].set()
        if self.fails == "generate" and number == 1:
            raise ValueError("no memory")
        if number and not self.fails:
            assert self.sent[2 * number - 1].wait(PATIENCE_S), (
                "the last wave was not sent while this one is sampled"
            )
        return [SimpleNamespace(sample_id=prompt.sample_id) for prompt in wave]

    def align(self, prompt, rollout) -> SimpleNamespace:
        self.threads.add(threading.current_thread())
        number = prompt.sample_id // 2
        if self.fails == "align" and number == 1:
            raise ValueError("no map")
        if not self.fails:
            assert self.sampling[number + 1].wait(PATIENCE_S), (
                "the next wave waits for this one to be aligned"
            )
        assert rollout.sample_id == prompt.sample_id
        return rollout

    def submit(self, pairs) -> None:
        for pair in pairs:
            self.sent[pair.sample_id].set()


def ids_of(records) -> list[int]:
    return [record.sample_id for record in records]


def test_waves_are_aligned_and_sent_while_the_next_are_sampled() -> None:
    parts, clock = Parts(), Stopwatch()
    batch = begin(parts.job, 0, clock)
    assert ids_of(batch.rollouts) == ids_of(batch.pairs) == list(range(6))
    assert all(event.is_set() for event in parts.sent) and not batch.more
    assert len(parts.threads) == 1 and threading.main_thread() not in parts.threads
    assert clock.seconds.keys() == {"rollout", "alignment"}


@pytest.mark.parametrize("part, words", [("align", "no map"), ("generate", "no memory")])
def test_what_goes_wrong_in_either_thread_ends_the_step(part, words) -> None:
    parts = Parts(fails=part)
    with pytest.raises(ValueError, match=words):
        begin(parts.job, 0, Stopwatch())
    parts.job.background.shutdown()  # no thread of it waits forever


def test_the_kept_rollouts_of_a_failed_step_are_those_of_all_its_rows(monkeypatch) -> None:
    def step(micro_batches) -> None:
        raise NonFiniteError("not finite")

    rollouts = [SimpleNamespace(sample_id=number, weight_version=0) for number in range(3)]
    batch = Batch(
        prompts=[],
        rollouts=rollouts[:2],
        pairs=[],
        more={},
        rewards={},
        given=([], []),
        unscored=[(None, rollouts[2], None)],  # type: ignore[list-item]
    )
    monkeypatch.setattr(train, "begin", lambda job, iteration, clock: batch)
    monkeypatch.setattr(train, "collect", lambda job, batch, clock: (batch, None))
    monkeypatch.setattr(train, "pack", lambda job, batch, scores: [])
    kept: list[int] = []
    job = SimpleNamespace(
        config=SimpleNamespace(
            training=SimpleNamespace(train_iters=1, lag=0),
            output=SimpleNamespace(save=None),
            evaluation=SimpleNamespace(eval_interval=None),
            max_lag=None,
        ),
        exit_watch=SimpleNamespace(loaded=lambda: None),
        start=0,
        evaluator=None,
        oversampling=None,
        before_step=lambda iteration: None,
        updater=SimpleNamespace(step=step),
        finish_save=lambda: None,
        keep_batch=lambda rollouts, iteration: kept.extend(ids_of(rollouts)) or "folder",
    )
    with pytest.raises(NonFiniteError, match="--load-debug-rollout-data folder"):
        train.train(job)  # type: ignore[arg-type]
    assert kept == [0, 1, 2]  # a replay asks for all of them


def test_a_pair_is_sent_as_soon_as_it_is_aligned() -> None:
    parts, order = Parts(fails="nothing"), []
    parts.job.align = lambda prompt, rollout: order.append(("aligned", rollout.sample_id)) or rollout
    parts.job.teacher.submit = lambda pairs: order.extend(("sent", pair.sample_id) for pair in pairs)
    begin(parts.job, 0, Stopwatch())
    assert order == [(what, number) for number in range(6) for what in ("aligned", "sent")]


def test_an_interrupt_while_work_is_handed_over_leaves_no_thread_that_waits() -> None:
    """A Ctrl-C may come when the other thread has its work and this one has not continued yet."""
    parts = Parts(fails="nothing")
    handed_over = []

    def submit(*work) -> None:
        handed_over.append(pool.submit(*work))
        raise KeyboardInterrupt

    pool, parts.job.background = parts.job.background, SimpleNamespace(submit=submit)
    with pytest.raises(KeyboardInterrupt):
        begin(parts.job, 0, Stopwatch())
    try:
        assert ids_of(handed_over[0].result(timeout=PATIENCE_S)) == [0, 1]
    finally:
        pool.shutdown(wait=False)


class Streaming(Parts):
    """Responses of one wave come one by one, the last prompt's first. Each is sent before
    the next one exists.
    """

    def __init__(self) -> None:
        super().__init__(fails="nothing")
        self.job.config = SimpleNamespace(
            rollout=SimpleNamespace(rollout_wave_size=None, rollout_engine="vllm")
        )
        self.job.engine = SimpleNamespace(generate=self.generate, publish=None, stream=self.stream)

    def stream(self, prompts, sampling) -> Iterator[list[SimpleNamespace]]:
        for prompt in reversed(prompts):
            yield [SimpleNamespace(sample_id=prompt.sample_id)]
            assert self.sent[prompt.sample_id].wait(PATIENCE_S), (
                "the teacher was not asked for what has finished"
            )


def test_responses_are_aligned_and_sent_as_they_finish() -> None:
    parts = Streaming()
    batch = begin(parts.job, 0, Stopwatch())
    assert ids_of(batch.prompts) == ids_of(batch.rollouts) == ids_of(batch.pairs) == list(range(6))
    assert batch.more["seconds_rollout_tail"] >= 0


def test_the_tail_is_the_time_without_a_tenth_of_the_responses() -> None:
    assert tail_s([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0]) == 21.0
    assert tail_s([1.0, 4.0]) == tail_s([3.0]) == 0.0


def test_responses_of_weights_that_are_too_old_are_refused() -> None:
    rollouts = [SimpleNamespace(sample_id=i, weight_version=version) for i, version in enumerate((4, 3, 4))]
    check_lag(rollouts, 4, 1)
    check_lag(rollouts, 40, None)
    with pytest.raises(
        ValueError,
        match="--rollout-max-lag 0: sample 1 was sampled by weights after 3 steps, but the student has done",
    ):
        check_lag(rollouts, 4, 0)
    check_lag([SimpleNamespace(sample_id=0, weight_version=-1)], 4, 0)  # a given response
