"""Faults between the two jobs cost only time: every sample is answered once, with its own answer.

The teacher here has no model. tests/parallel/test_teacher_job.py kills real ones.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from megatron_simct.teacher import service
from megatron_simct.teacher.client import TeacherClient
from megatron_simct.teacher.endpoints import Endpoint, bind, check_bind, make_keys, publish, withdraw
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import read_score, read_scored, score_message, scored_message
from megatron_simct.teacher.scorer import TeacherError, TeacherMissing
from megatron_simct.teacher.wire import Message, decode, encode, num_bytes
from tests.teacher_jobs import (
    FAST,
    BadLine,
    ModelFreeTeacher,
    answer_of,
    collect,
    make_request,
    open_client,
    same_answer,
    welcome,
)

SEEDS = range(int(os.environ.get("TEACHER_FAULT_SEEDS", "10")))
FAULTS = {
    "drop": {"drop": 0.2},
    "delay": {"delay": 0.3},
    "duplicate": {"duplicate": 0.5},
    "reorder": {"reorder": 0.5},
    "garble": {"garble": 0.2},
    "all": {"drop": 0.1, "delay": 0.1, "duplicate": 0.2, "reorder": 0.3, "garble": 0.1},
}


def requests_of(seed: int, count: int = 24) -> list[TeacherRequest]:
    rng = np.random.default_rng(seed)
    return [make_request(rng, sample_id) for sample_id in range(count)]


def assert_each_once(scored, requests) -> None:
    assert sorted(s.sample_id for s in scored) == [r.sample_id for r in requests]
    by_id = {r.sample_id: r for r in requests}
    assert all(same_answer(s, by_id[s.sample_id]) for s in scored)


def nothing_left(client: TeacherClient) -> bool:
    """Asserts that no sample got a second answer."""
    time.sleep(0.05)
    return client._results.empty() and not client._open


def with_every_seed(check: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Run check(seed, a folder of its own), several at a time: they mostly wait."""
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(lambda seed: check(seed, folder / str(seed)), SEEDS))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line(tmp_path, fault) -> None:
    def check(seed: int, folder: Path) -> Counter:
        with ModelFreeTeacher(folder / "behind") as teacher:
            line = BadLine(folder / "front", teacher.server.endpoint, seed=seed, shares=FAULTS[fault])
            line.start()
            client = open_client(folder / "front")
            requests = requests_of(seed)
            assert_each_once(collect(client, requests), requests)
            assert nothing_left(client)
            client.close()
            line.close()
            at_the_teacher = {
                "malformed": teacher.server.status()["malformed"],
                "done": sum(line.done.values()),
            }
            return Counter(client.counts) + Counter(at_the_teacher)

    counts = sum(with_every_seed(check, tmp_path), Counter())
    assert counts["done"] > 5 * len(SEEDS), "the line did not misbehave"
    if fault in ("drop", "delay", "all"):
        assert counts["again"] > 0
    if fault in ("delay", "duplicate", "all"):
        assert counts["late"] > 0
    if fault in ("garble", "all"):
        assert counts["malformed"] > 0


def test_a_replica_whose_model_hangs_and_goes_on(tmp_path) -> None:
    """It reports that its model has not moved for long. The other replica does its work too, and the requests
    that it still holds are recalled.
    """

    def check(seed: int, folder: Path) -> None:
        with ModelFreeTeacher(folder, stall_s=0.3) as one, ModelFreeTeacher(folder, delay_s=0.005) as other:
            client = open_client(folder, patience=replace(FAST, silence_s=60.0))
            _until(lambda: len(client.status()) == 2)
            one.stall()
            requests = requests_of(seed)
            assert_each_once(collect(client, requests), requests)
            assert client.counts["again"] > 0 and one.answered == []
            _until(lambda: one.server.status()["recalled"] > 0 and one.server.status()["queue"] == 0)
            assert nothing_left(client) and client.counts["late"] == 0
            one.wake()
            again = requests_of(seed + 100)
            assert_each_once(collect(client, again), again)
            _until(lambda: len(one.answered) + len(other.answered) == 2 * len(requests))
            client.close()

    with_every_seed(check, tmp_path)


def test_requests_that_are_given_up_do_not_come_back_with_the_teacher(tmp_path) -> None:
    """Nobody is there, so the client says that; what is asked after that is answered as usual."""

    def check(seed: int, folder: Path) -> None:
        client = open_client(folder, patience=replace(FAST, timeout_s=0.3))
        client.submit(requests_of(seed)[0])
        with pytest.raises(TeacherMissing, match="1 samples are unanswered"):
            client.next()
        client.forget()
        client._patience = FAST
        with ModelFreeTeacher(folder) as teacher:
            _until(lambda: len(client.status()) == 1)
            again = requests_of(seed + 100)
            assert_each_once(collect(client, again), again)
            assert len(teacher.answered) == len(again) and not client.arrived()
        client.close()

    with_every_seed(check, tmp_path)


def test_a_slow_replica_is_asked_once_and_hands_back_what_another_can_do_sooner(tmp_path) -> None:
    """It lives and works: of its requests, only those that it has not begun with go to the other."""

    def check(seed: int, folder: Path) -> None:
        with ModelFreeTeacher(folder) as slow, ModelFreeTeacher(folder) as other:
            client = open_client(folder, patience=replace(FAST, silence_s=60.0), window_tokens=100_000)
            _until(lambda: len(client.status()) == 2)
            for teacher in (slow, other):
                teacher.pause()
                _set_speed(teacher, tokens_per_s=200)
            _until(lambda: all(status["speed"] == 200 for status in client.status().values()))
            requests = requests_of(seed, count=60)
            for request in requests:
                client.submit(request)
            held = (slow.server.status, other.server.status)
            _until(lambda: sum(s()["queue"] + s()["in_work"] for s in held) == len(requests))
            _until(lambda: slow.server.status()["in_work"] > 0)
            other.resume()
            begun = slow.server.status()["in_work"]
            _until(lambda: len(other.answered) + begun == len(requests))
            assert not slow.answered and client.counts["recalled"] > 0
            slow.resume()
            assert_each_once([read_scored(client.next()[1]) for _ in requests], requests)
            assert nothing_left(client)
            assert len(slow.answered) == begun, "what it had begun with is its own"
            assert client.counts["again"] == client.counts["late"] == 0
            recalled = slow.server.status()["recalled"] + other.server.status()["recalled"]
            assert client.counts["recalled"] == recalled > 0
            client.close()

    with_every_seed(check, tmp_path)


def test_a_replica_that_stops_hands_back_what_it_has_not_begun(tmp_path) -> None:
    """Both are long about their first requests, until the first stops: nobody knows yet how fast they are."""

    def check(seed: int, folder: Path) -> None:
        with ModelFreeTeacher(folder) as one, ModelFreeTeacher(folder) as other:
            patience = replace(FAST, silence_s=60.0)
            client = open_client(folder, patience=patience, window_tokens=100_000)
            _until(lambda: len(client.status()) == 2)
            one.pause()
            other.pause()
            requests = requests_of(seed)
            for request in requests:
                client.submit(request)
            held = (one.server.status, other.server.status)
            _until(lambda: sum(s()["queue"] + s()["in_work"] for s in held) == len(requests))
            assert one.server.status()["queue"], "the first has nothing to hand back"
            one.stop()
            other.resume()
            scored = [read_scored(client.next()[1]) for _ in requests]
            assert_each_once(scored, requests)
            # Requests that it hands back at the end may arrive after the news that it is gone; these are sent
            # again. Or they were recalled, because its first answer showed its speed.
            handed_back = one.server.status()["handed_back"]
            counts = client.counts
            assert 0 < handed_back <= counts["handed_back"] + counts["again"] + counts["recalled"]
            assert not (folder / f"{one.server.endpoint.replica}.json").exists()
            assert nothing_left(client) and one.answered and other.answered
            client.close()

    with_every_seed(check, tmp_path)


def test_a_restart_at_another_address(tmp_path) -> None:
    """The first replica vanishes with its work. Its next life opens at another address,
    under the same name.
    """

    def check(seed: int, folder: Path) -> None:
        one = ModelFreeTeacher(folder, name="replica")
        client = open_client(folder)
        client.meet()
        one.stall()
        requests = requests_of(seed)
        for request in requests:
            client.submit(request)
        _until(lambda: one.server.status()["queue"] > 0)
        with ModelFreeTeacher(folder, name="replica"):
            scored = [read_scored(client.next()[1]) for _ in requests]
            assert_each_once(scored, requests)
            assert client.counts["again"] > 0 and one.answered == []
            client.close()
        one.stop()

    with_every_seed(check, tmp_path)


def test_another_life_at_the_same_address(tmp_path) -> None:
    """The requests of the first life are sent again at once, without a wait for its silence."""
    with ModelFreeTeacher(tmp_path) as teacher:
        patience = replace(FAST, silence_s=60.0)
        client = open_client(tmp_path, patience=patience)
        client.meet()
        teacher.stall()
        requests = requests_of(0)
        for request in requests:
            client.submit(request)
        _until(lambda: teacher.server.status()["queue"] > 0)
        with teacher.server._condition:  # it forgets everything, as a process that is started again
            teacher.server._queue.clear()
            teacher.server._welcome.clear()
            teacher.server.endpoint = replace(teacher.server.endpoint, life="another")
        teacher.wake()
        scored = [read_scored(client.next()[1]) for _ in requests]
        assert_each_once(scored, requests)
        client.close()


def test_replicas_that_join_are_found_and_share_the_work(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path, delay_s=0.01) as one:
        client = open_client(tmp_path, window_tokens=60, patience=replace(FAST, silence_s=60.0))
        requests = requests_of(3, count=120)
        for request in requests:
            client.submit(request)
        _until(lambda: len(one.answered) > 5)
        one.pause()
        before = len(one.answered)
        with ModelFreeTeacher(tmp_path, delay_s=0.01) as other:
            _until(lambda: len(other.answered) > 20)
            one.resume()
            scored = [read_scored(client.next()[1]) for _ in requests]
            assert_each_once(scored, requests)
            assert len(one.answered) > before
        client.close()


def test_a_replica_gets_no_more_than_the_window(tmp_path) -> None:
    requests = requests_of(1, count=40)
    longest = max(request.num_tokens for request in requests)
    with ModelFreeTeacher(tmp_path, name="only") as teacher:

        def held() -> int:
            with teacher.server._condition:
                return sum(work.request.num_tokens for work in teacher.server._queue.values())

        teacher.stall()
        client = open_client(tmp_path, window_tokens=50, patience=replace(FAST, silence_s=60))
        client.meet()
        for request in requests:
            client.submit(request)
        # The client has looked at every request, and the teacher has all that was sent.
        _until(lambda: len(client._open) == len(requests) and client._replicas["only"].tokens > 50 - longest)
        _until(lambda: held() >= client._replicas["only"].tokens)
        assert 50 - longest < held() <= 50
        teacher.wake()
        assert_each_once([read_scored(client.next()[1]) for _ in requests], requests)
        client.close()


def test_an_answer_to_what_waits_to_be_asked_again_counts(tmp_path) -> None:
    """A replica that counts as dead answers after all, before it has greeted again. Then
    it works as before.
    """
    context = zmq.Context()
    router, address = bind(context, "ipc", None, number=0)
    publish(tmp_path, Endpoint(replica="slow", address=address, life="one"))
    client = open_client(tmp_path, patience=replace(FAST, silence_s=3.0))

    def heard(kind: str) -> tuple[bytes, Message]:
        while True:
            assert router.poll(20_000), f"no {kind}"
            who, *parts = router.recv_multipart()
            if decode(parts).kind == kind:
                return who, decode(parts)

    def answer(who: bytes, score: Message) -> None:
        request = read_score(score)
        parts = encode(scored_message(score.fields["request"], answer_of(request), "fp32"))
        router.send_multipart([who, *parts])

    who, _ = heard("hello")
    status = {"tokens_per_s": 1.0, "queue": 0}
    message = encode(welcome(status, life="one"))
    router.send_multipart([who, *message])
    first, second = requests_of(0, count=2)
    client.submit(first)
    _, score = heard("score")
    _until(lambda: client.counts["again"] == 1)
    answer(who, score)
    assert same_answer(read_scored(client.next()[1]), first)
    router.send_multipart([who, *message])
    client.submit(second)
    answer(who, heard("score")[1])
    assert same_answer(read_scored(client.next()[1]), second)
    client.close()
    router.close(0)
    context.term()
    withdraw(tmp_path, Endpoint(replica="slow", address=address, life="one"))


def test_a_full_queue_hands_back_until_the_model_has_taken_from_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "MAX_QUEUED_BYTES", 2000)
    requests = requests_of(0, count=40)
    sizes = [num_bytes(encode(score_message(0, request))) + request.num_bytes for request in requests]
    assert sum(sizes) > 5 * 2000
    with ModelFreeTeacher(tmp_path) as teacher:
        teacher.stall()
        client = open_client(tmp_path, window_tokens=100_000, patience=replace(FAST, timeout_s=20))
        for request in requests:
            client.submit(request)
        _until(lambda: client.counts["handed_back"] > 0)
        with teacher.server._condition:
            held = sum(work.num_bytes for work in teacher.server._queue.values())
            assert held == teacher.server._queued_bytes and 2000 < held <= 2000 + max(sizes)
        teacher.wake()
        assert_each_once([read_scored(client.next()[1]) for _ in requests], requests)
        assert teacher.server._queued_bytes == 0 and teacher.server.status()["handed_back"] > 0
        client.close()


def test_a_request_that_the_model_has_is_not_queued_again(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path, works=False) as teacher:
        client = open_client(tmp_path, patience=replace(FAST, silence_s=60.0))
        (request,) = requests_of(0, count=1)
        client.submit(request)
        works: list[Any] = []
        _until(lambda: bool(works.extend(teacher.server.take(100, 0.05)) or works))
        for _ in range(2):  # as after an answer that was lost
            client._send(client._replicas[teacher.server.endpoint.replica], client._open[1].parts)
        _until(lambda: teacher.server.status()["again"] == 2)
        assert len(works) == 1 and teacher.server.status()["queue"] == 0
        teacher.server.answer(works[0], scored_message(works[0].number, answer_of(request), "fp32"))
        assert same_answer(read_scored(client.next()[1]), request)
        client.close()


def test_a_client_that_is_killed_leaves_nothing_behind(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path, forget_s=0.5) as teacher:
        teacher.stall()
        gone = open_client(tmp_path, window_tokens=100_000)
        gone.meet()
        for request in requests_of(0):
            gone.submit(request)
        _until(lambda: teacher.server.status()["queue"] == 24)
        gone._send = lambda *_: None  # from here on it is silent
        _until(lambda: teacher.server.status()["clients"] == 0)
        status = teacher.server.status()
        assert status["queue"] == 0 and teacher.server._queued_bytes == 0
        gone.close()
        teacher.wake()
        client = open_client(tmp_path)
        requests = requests_of(1)
        assert_each_once(collect(client, requests), requests)
        client.close()


def test_a_teacher_that_never_answers_is_one_error_after_the_time_out(tmp_path) -> None:
    client = open_client(tmp_path, patience=replace(FAST, timeout_s=0.6))
    with pytest.raises(
        TeacherError, match="no teacher for 0.01 minutes .*none was found; start the teacher and resume"
    ):
        client.meet()
    client.close()
    with ModelFreeTeacher(tmp_path) as teacher:
        client = open_client(tmp_path)
        client.meet()
        teacher.stall()
        client._patience = replace(FAST, timeout_s=1.2)
        client.submit(requests_of(0)[0])
        with pytest.raises(
            TeacherError, match=r"1 samples are unanswered .*0.02 minutes .*ipc://.*last heard \d+ s ago"
        ):
            client.next()
        client.close()


def test_addresses_may_be_given_by_hand(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        client = open_client(None, addresses=[teacher.server.endpoint.address])
        requests = requests_of(5)
        assert_each_once(collect(client, requests), requests)
        client.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "http://127.0.0.1:1", "nowhere://"])
def test_an_address_that_is_none_is_one_error_and_the_thread_ends(address) -> None:
    client = open_client(None, addresses=[address])
    with pytest.raises(TeacherError, match=f"--teacher-endpoint here: {address}: .*; write tcp://HOST:PORT"):
        client.meet()
    client.close()
    assert not client.is_alive()


def socket_folder(teacher: ModelFreeTeacher) -> Path:
    folder = Path(teacher.server.endpoint.address.removeprefix("ipc://")).parent
    assert folder.name.startswith("megatron_simct.")
    return folder


def test_a_killed_replica_of_this_host_is_forgotten_by_the_next(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        sock, address = bind(context, "ipc", None, number=0)
        left = Path(address.removeprefix("ipc://"))
        dead = replace(teacher.server.endpoint, replica="dead", pid=2**22 + 1, address=address)
        elsewhere = replace(dead, replica="elsewhere", host="another")
        for endpoint in (dead, elsewhere):
            # Without a lock, as from an earlier version: a lock of this process would show that they run.
            (tmp_path / f"{endpoint.replica}.json").write_text(json.dumps(asdict(endpoint)))
        publish(tmp_path, teacher.server.endpoint)
        assert not (tmp_path / "dead.json").exists() and not left.parent.exists()
        sock.close(0)
        context.term()
        assert (tmp_path / "elsewhere.json").exists()
        withdraw(tmp_path, replace(elsewhere, life="an earlier one"))
        assert socket_folder(teacher).exists(), "it is not that of another"
        assert (tmp_path / "elsewhere.json").exists()


def test_a_replica_that_cannot_make_itself_known_says_so_and_leaves_nothing(
    tmp_path, short_tmp, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    with pytest.raises(OSError, match="file"):
        ModelFreeTeacher(tmp_path / "file")
    assert not list(short_tmp.iterdir())


def test_a_socket_whose_name_is_too_long_leaves_no_folder(tmp_path, monkeypatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    context = zmq.Context()
    with pytest.raises(ValueError, match="--bind ipc: ipc://.*; let TMPDIR name a shorter folder"):
        bind(context, "ipc", None, number=0)
    context.term()
    with pytest.raises(ValueError, match="--bind ipc: ipc://.*; let TMPDIR name a shorter folder"):
        check_bind("ipc", number=0)
    assert not list(long.iterdir())


def test_an_address_that_was_checked_is_free_and_nothing_is_left(tmp_path, short_tmp, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    check_bind("ipc", number=0)
    assert not list(short_tmp.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--bind tcp://127.0.0.1:{port - 3}: .*in use"):
            check_bind(f"tcp://127.0.0.1:{port - 3}", number=3)
    check_bind(f"tcp://127.0.0.1:{port}", number=0)
    with ModelFreeTeacher(
        tmp_path / "run", address=f"tcp://127.0.0.1:{port}", keys=make_keys(tmp_path / "run")
    ) as one:
        assert one.server.endpoint.address == f"tcp://127.0.0.1:{port}"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_does_not_outlive_its_server(tmp_path, monkeypatch) -> None:
    """Its model would wait forever for requests that cannot arrive."""
    teacher = ModelFreeTeacher(tmp_path, works=False)
    monkeypatch.setattr(teacher.server, "_send", lambda: 1 / 0)
    _until(lambda: not teacher.server.is_alive())
    with pytest.raises(
        RuntimeError, match=f"teacher replica {teacher.server.endpoint.replica}: its server thread has ended"
    ):
        teacher.server.take(100, 0.01)
    folder = socket_folder(teacher)
    teacher.stop()
    assert not folder.exists() and not list(tmp_path.glob("*.json"))


def test_a_replica_takes_its_socket_along(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        folder = socket_folder(teacher)
        assert folder.stat().st_mode & 0o777 == 0o700
        client = open_client(tmp_path)
        client.meet()
        client.close()
    assert not folder.exists() and not list(tmp_path.glob("*.json"))


def _set_speed(teacher: ModelFreeTeacher, *, tokens_per_s: int) -> None:
    """As if it had worked for a second: speeds that are measured here depend on the machine."""
    pace = service._Pace()
    pace.begin(0.0)
    pace.end(1.0, tokens_per_s)
    with teacher.server._condition:
        teacher.server._pace = pace


def _until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
