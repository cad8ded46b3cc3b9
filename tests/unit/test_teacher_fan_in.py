"""Many ranks and replicas: who reads the folder, who gets requests, and how answers are collected."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_simct.teacher import client as client_module
from megatron_simct.teacher import lookout as lookout_module
from megatron_simct.teacher import remote
from megatron_simct.teacher.client import TeacherClient
from megatron_simct.teacher.endpoints import Endpoint, publish, read_endpoints
from megatron_simct.teacher.lookout import Lookout
from megatron_simct.teacher.payload import scored_message
from megatron_simct.teacher.service import _Pace
from megatron_simct.teacher.wire import encode
from tests.teacher_jobs import FAST, FINGERPRINTS, answer_of, make_request


def endpoint(name: str) -> Endpoint:
    return Endpoint(replica=name, address=f"tcp://10.0.0.1:{5000 + int(name[1:])}", life=name)


def test_one_rank_reads_the_folder_for_all(tmp_path, monkeypatch) -> None:
    store, opens = dist.HashStore(), []
    monkeypatch.setattr(
        lookout_module, "read_endpoints", lambda folder: (opens.append(folder), read_endpoints(folder))[1]
    )
    ranks = [Lookout(tmp_path, store=store, reads=rank == 0) for rank in range(8)]
    assert [rank.look() for rank in ranks] == [{}] * 8
    publish(tmp_path, endpoint("r1"))
    for _ in range(3):
        assert [rank.look() for rank in ranks] == [{"r1": endpoint("r1")}] * 8
    assert len(opens) == 4, "once a look, not once a rank"
    tmp_path.chmod(0o777)
    for rank in ranks:
        with pytest.raises(ValueError, match="others can write to it"):
            rank.look()


def client_of(
    replicas: dict[str, dict[str, Any]], *, seed: int = 0
) -> tuple[TeacherClient, list[tuple[str, Any]]]:
    """A client that is not started, its replicas with these fields, and its messages."""
    client = TeacherClient(
        lookout=Lookout(addresses=()),
        fingerprints=FINGERPRINTS,
        patience=FAST,
        window_tokens=1 << 30,
        where="here",
    )
    client._random.seed(seed)
    sent: list[tuple[str, Any]] = []
    client._send = lambda replica, parts: sent.append((replica.endpoint.replica, parts))
    for name, fields in replicas.items():
        client._replicas[name] = client_module._Replica(
            endpoint=endpoint(name), sock=None, ready=True, **fields
        )
    return client, sent


def ask(client: TeacherClient, count: int) -> Counter:
    """Submit this number of requests of 100 tokens; returns the replicas that got them."""
    template = make_request(np.random.default_rng(0), 0)
    for sample_id in range(count):
        ids = np.zeros(100 - len(template.label_ids), np.int32)
        client.submit(replace(template, sample_id=sample_id, prompt_ids=ids))
    client._take_in()
    client._dispatch()
    return Counter(entry.sent_to for entry in client._open.values())


@pytest.mark.parametrize("seed", range(5))
def test_work_is_spread_by_what_replicas_hold_and_how_fast_they_are(seed) -> None:
    client, _ = client_of(
        {
            "r1": {"status": {"speed": 100.0}},
            "r2": {"status": {"speed": 300.0}},
            "r3": {"status": {"speed": 100.0}, "others": 1000},
            "r4": {"status": {}},  # has not computed anything yet
        },
        seed=seed,
    )
    asked = ask(client, 100)
    ends = [
        asked["r1"] * 100 / 100,
        asked["r2"] * 100 / 300,
        (asked["r3"] * 100 + 1000) / 100,
        asked["r4"] * 0.6,
    ]
    assert max(ends) - min(ends) < 4, "they end together, to within a few requests"


def test_many_clients_do_not_run_to_the_same_replica() -> None:
    """Each knows the replicas' reports, but not what the other clients do at the same moment."""
    asked = Counter()
    for seed in range(64):
        client, _ = client_of({f"r{i}": {"status": {"speed": 1.0}} for i in range(16)}, seed=seed)
        asked += ask(client, 4)
    assert min(asked.values()) > 4 and max(asked.values()) < 32, asked


def test_a_students_share_of_what_is_uneven_is_recalled() -> None:
    shares = []
    for seed in range(200):
        status = {"speed": 10.0}
        client, _ = client_of({"r1": {"status": status}}, seed=seed)
        ask(client, 10)
        client._replicas["r1"].others = 3000
        client._replicas["r2"] = client_module._Replica(
            endpoint=endpoint("r2"), sock=None, ready=True, status=status, others=1000
        )
        client._even_out(now=1e9)
        recalled = [number for number, entry in client._open.items() if entry.recalled is not None]
        shares.append(len(recalled))
        assert recalled == list(range(11 - len(recalled), 11)), "from the end of its queue"
    # 4,000 tokens beside 1,000: 1,500 are too many, and a quarter of the 4,000 is this student's.
    assert set(shares) == {3, 4} and abs(np.mean(shares) - 3.75) < 0.15


def test_a_replica_that_is_a_little_behind_keeps_its_work() -> None:
    client, sent = client_of({"r1": {"status": {"speed": 10.0}}, "r2": {"status": {"speed": 10.0}}})
    ask(client, 20)
    del sent[:]
    client._even_out(now=1e9)
    assert not sent


def test_pace() -> None:
    pace = _Pace()
    assert pace.speed(0.0, 0) == 0.0
    pace.begin(10.0)
    pace.end(12.0, 200)
    assert pace.speed(50.0, 0) == 100.0, "what it idles does not count"
    pace.begin(60.0)
    assert pace.speed(60.5, 100) == 100.0 and pace.speed(62.0, 100) == pytest.approx(200 / 3), (
        "it is late by 1 s"
    )
    assert not pace.is_stalled(79.0, 5.0) and pace.is_stalled(81.0, 5.0), "ten times as long as ever"


class Answers:
    """A client that gets these answers."""

    def __init__(self, answers: list[Any], at_once: int) -> None:
        self._answers, self._at_once, self.counts = answers, at_once, {"again": 0}
        self._left = at_once

    def start(self) -> None:
        pass

    def meet(self) -> None:
        pass

    def arrived(self) -> bool:
        return bool(self._answers) and self._left > 0

    def next(self) -> Any:
        if not self._left:
            self._left = self._at_once  # it has waited
        self._left -= 1
        message = self._answers.pop(0)
        return encode(message), message


def test_answers_that_have_arrived_are_shared_together(monkeypatch) -> None:
    requests = [make_request(np.random.default_rng(seed), seed) for seed in range(12)]
    answers = [scored_message(n, answer_of(request), "fp32") for n, request in enumerate(requests)]
    shared: list[int] = []
    monkeypatch.setattr(
        remote, "share", lambda messages, *_, **__: (shared.append(len(messages)), messages)[1]
    )
    monkeypatch.setattr(remote, "_agree", lambda problem: None)
    groups = SimpleNamespace(owns_teacher_socket=True, is_last_stage=True, tp_cp=None, device=None)
    scorer = remote.RemoteScorer(Answers(answers, at_once=4), groups)
    pairs = [SimpleNamespace(sample_id=n) for n in range(12)]
    first = [scored.sample_id for scored in scorer.collect(pairs[1:7])]
    rest = [scored.sample_id for scored in scorer.collect([pairs[0], *pairs[7:]])]
    assert sorted(first) == list(range(1, 7)) and sorted(rest) == [0, *range(7, 12)]
    assert shared == [3, 3, 2, 4], "what came for the other call is kept"
