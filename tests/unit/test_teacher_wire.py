"""Messages, and refusals: invalid bytes, requests that would fault, clients without access."""

from __future__ import annotations

import os
import random
import stat
import time
import uuid
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import torch
import zmq

from megatron_simct.records import ScoredPair
from megatron_simct.teacher import endpoints, wire
from megatron_simct.teacher.endpoints import CLIENT_KEY, SERVER_KEY, connect, make_keys, read_keys
from megatron_simct.teacher.forward import TeacherRequest, by_length, quantized, rounded
from megatron_simct.teacher.payload import (
    check_request,
    misfit,
    read_score,
    read_scored,
    score_message,
    scored_message,
)
from megatron_simct.teacher.scorer import TeacherError
from megatron_simct.teacher.wire import Message, WireError, decode, encode, with_checksum
from tests.teacher_jobs import (
    FINGERPRINTS,
    HIDDEN,
    VOCAB,
    ModelFreeTeacher,
    answer_of,
    collect,
    hello,
    make_request,
    open_client,
    same_answer,
)

SCORE_FIELDS = {"request": 1, "sample_id": 1, "hidden": True, "topk": 0, "token_ids": False}
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB}


def some_requests(count: int = 40) -> list[TeacherRequest]:
    rng = np.random.default_rng(0)
    return [make_request(rng, sample_id) for sample_id in range(count)]


def journey(message: Message) -> Message:
    """The message as the other end decodes it."""
    return decode([bytes(part) for part in encode(message)])


# Messages


def test_requests_arrive_as_they_were() -> None:
    for number, request in enumerate(some_requests()):
        message = journey(score_message(number, request))
        found = read_score(message)
        scalars = {name: getattr(request, name) for name in ("sample_id", "hidden", "topk", "token_ids")}
        assert message.fields == {"request": number, **scalars}
        for name in ("prompt_ids", "label_ids", "rows"):
            np.testing.assert_array_equal(getattr(found, name), getattr(request, name))
        assert (found.byte_side is None) == (request.byte_side is None)
        if request.byte_side is not None:
            for name in request.byte_side.__slots__:
                np.testing.assert_array_equal(
                    getattr(found.byte_side, name), getattr(request.byte_side, name)
                )


def test_the_likeliest_tokens_arrive_in_place_of_hidden_states() -> None:
    request = replace(some_requests()[0], hidden=False, topk=3, byte_side=None)
    topk = torch.arange(3.0 * len(request.rows)).reshape(len(request.rows), 3)
    scored = replace(answer_of(request), hidden=None, byte_logprobs=None, topk=topk)
    message = journey(scored_message(3, scored, "fp32"))
    assert torch.equal(read_scored(message).topk, topk)
    assert misfit(message, request, **SIZES) is None
    assert misfit(message, replace(request, topk=2), **SIZES) is not None, "more than was asked for"
    assert misfit(message, replace(request, topk=0), **SIZES) is not None
    with_ids = replace(request, token_ids=True)
    assert read_score(journey(score_message(0, with_ids))).token_ids
    assert misfit(message, with_ids, **SIZES) is not None, "less than was asked for"
    ids = torch.arange(3 * len(request.rows), dtype=torch.int32).reshape(-1, 3)
    message = journey(scored_message(3, replace(scored, topk_ids=ids), "fp32"))
    assert (
        torch.equal(read_scored(message).topk_ids, ids) and read_scored(message).topk_ids.dtype == torch.int32
    )
    assert misfit(message, with_ids, **SIZES) is None and misfit(message, request, **SIZES) is not None
    for wrong in (-1, VOCAB):
        ids[-1, -1] = wrong
        message = journey(scored_message(3, replace(scored, topk_ids=ids), "fp32"))
        assert "topk_ids" in str(misfit(message, with_ids, **SIZES)), "an id that is none of the teacher's"
    with pytest.raises(ValueError, match="token_ids without topk"):
        check_request(replace(with_ids, topk=0), vocab_size=VOCAB, max_tokens=100)


def test_answers_arrive_as_they_were() -> None:
    for request in some_requests():
        message = journey(scored_message(3, answer_of(request), "fp32"))
        assert same_answer(read_scored(message), request)
        assert misfit(message, request, **SIZES) is None
        assert misfit(message, replace(request, sample_id=99), **SIZES) is not None
        assert misfit(message, replace(request, label_ids=np.zeros(77, np.int32)), **SIZES) is not None
        if request.hidden:
            assert misfit(message, request, **SIZES | {"hidden_size": HIDDEN + 1}) is not None


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_rounded_hidden_states_lose_nothing_more_on_the_way(dtype, size) -> None:
    torch.manual_seed(0)
    hidden = rounded(torch.randn(7, 64) * torch.logspace(-3, 3, 7)[:, None], dtype)
    nothing = torch.zeros(0)
    scored = ScoredPair(
        sample_id=0, own_logit=nothing, lse=nothing, hidden=hidden, byte_logprobs=torch.randn(5)
    )
    message = scored_message(0, scored, dtype)
    found = read_scored(journey(message)).hidden.float()
    assert ((found - hidden).abs().amax(1) <= (1e-6 if dtype == "int8" else 0) * hidden.abs().amax(1)).all()
    assert message.frames["hidden"][1].nbytes == 7 * 64 * size
    assert encode(message)[4 if dtype != "int8" else 5].nbytes == (20 if dtype == "fp32" else 10)
    original = torch.randn(50, 96)
    original[:, 5] *= 30  # as hidden states are
    error = (rounded(original, dtype) - original).square().mean(1).sqrt() / original.square().mean(1).sqrt()
    assert (error <= {"fp32": 0, "bf16": 2**-8, "int8": 0.01}[dtype]).all()
    assert (error > 0).all() or dtype == "fp32"


def test_a_row_that_is_not_finite_stays_so() -> None:
    hidden = torch.ones(3, 4)
    hidden[1, 2] = float("nan")
    hidden[2] = 0
    codes, scale = quantized(hidden)
    assert codes[0].tolist() == [127, 0, 0, 0] and codes[2].tolist() == [0] * 4
    assert rounded(hidden, "int8")[1].isnan().all() and rounded(hidden, "int8")[2].tolist() == [0] * 4


def test_micro_batches_keep_their_budget_and_one_kind() -> None:
    requests = some_requests(200)
    batches = by_length(requests, max_tokens=40)
    assert sorted(r.sample_id for batch in batches for r in batch) == list(range(200))
    for batch in batches:
        assert sum(r.num_tokens for r in batch) <= 40
        assert len({r.byte_side is None for r in batch}) == 1
    assert len(batches) < 100
    assert [len(batch) for batch in by_length(requests[:5], max_tokens=1)] == [1] * 5


def _header(parts, **changes) -> list[bytes]:
    values = msgpack.unpackb(parts[0])
    head = [msgpack.packb(values | changes), *parts[1:-1]]
    return [*head, wire._checksum(head)]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: [], "0 parts"),
        (lambda p: p[:1], "1 parts"),
        (lambda p: [b"\xc1", *p[1:]], "not msgpack"),
        (lambda p: [b"\x91" * 60000, *p[1:]], "not msgpack"),
        (lambda p: [b"a" * (1 << 17), *p[1:]], "header of 131072 bytes"),
        (lambda p: [msgpack.packb([1]), *p[1:]], "names no version"),
        (lambda p: _header(p, version=2), "protocol version 2; this end speaks 3"),
        (lambda p: [*p[:-1], b"0000"], "checksum"),
        (lambda p: [p[0], b"", *p[2:]], "checksum"),
        (lambda p: p[:-2] + p[-1:], "checksum"),
        (lambda p: _header(p, kind="other"), "no known kind"),
        (lambda p: _header(p, kind=[]), "no known kind"),
        (lambda p: _header(p, more=1), "no known kind"),
        (lambda p: _header(p, fields={}), "expected the fields"),
        (lambda p: _header(p, fields=SCORE_FIELDS | {"request": "a"}), "request must be of type int"),
        (lambda p: _header(p, fields=SCORE_FIELDS | {"request": True}), "request must be of type int"),
        (lambda p: _header(p, frames=[]), "does not describe its 3 frames"),
        (lambda p: _header(p, frames=[1, 2, 3]), "name, type and shape"),
        (lambda p: _header(p, frames=_frames(p, 0, name="label_ids")), "twice"),
        (lambda p: _header(p, frames=_frames(p, 0, name="other")), "no frame 'other'"),
        (lambda p: _header(p, frames=_frames(p, 0, dtype="float32")), "is not int32"),
        (lambda p: _header(p, frames=_frames(p, 0, shape=[2, 2])), "1 dimensions"),
        (lambda p: _header(p, frames=_frames(p, 0, shape=[-1])), "shape of prompt_ids"),
        (lambda p: _header(p, frames=_frames(p, 0, shape=[1 << 40])), "others"),
    ],
)
def test_what_is_no_message(change, words) -> None:
    request = replace(some_requests()[0], byte_side=None)
    with pytest.raises(WireError, match=words) as error:
        decode(change([bytes(part) for part in encode(score_message(1, request))]))
    assert "\n" not in str(error.value)


def _frames(parts, at, **changes) -> list[Any]:
    specs = msgpack.unpackb(parts[0])["frames"]
    old = dict(zip(("name", "dtype", "shape"), specs[at], strict=True))
    specs[at] = list((old | changes).values())
    return specs


def _mutated(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    """Bits flipped, bytes cut or added, parts lost, doubled or swapped; half the time
    with a right checksum.
    """
    parts = list(parts)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        part = bytearray(parts[at])
        match rng.randrange(6):
            case 0 if part:
                part[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
            case 1:
                del part[rng.randrange(len(part) + 1) :]
            case 2:
                part += rng.randbytes(rng.randint(1, 20))
            case 3 if len(parts) > 1:
                del parts[at]
                continue
            case 4:
                parts.insert(at, rng.randbytes(rng.randrange(40)))
                continue
            case 5:
                other = rng.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
                continue
        parts[at] = bytes(part)
    if rng.random() < 0.5 and parts:
        parts[-1] = wire._checksum(parts[:-1])
    return parts


def test_garbled_messages_are_wire_errors_and_nothing_else() -> None:
    rng = random.Random(0)
    originals = [[bytes(p) for p in encode(score_message(i, r))] for i, r in enumerate(some_requests())]
    originals += [
        [bytes(p) for p in encode(scored_message(i, answer_of(r), "int8"))]
        for i, r in enumerate(some_requests())
    ]
    refused = 0
    for _ in range(10_000):
        parts = _mutated(rng, rng.choice(originals))
        try:
            decode(parts)
        except WireError:
            refused += 1
    assert refused > 9_000


def test_a_server_outlives_garbled_frames(tmp_path) -> None:
    """10,000 of them, from an accepted client: they are refused and counted, memory stays,
    and others are served.
    """
    rng = random.Random(1)
    originals = [[bytes(p) for p in encode(score_message(i, r))] for i, r in enumerate(some_requests())]
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        bad = connect(context, teacher.server.endpoint.address, None, b"bad")
        bad.send_multipart(encode(hello()))
        assert bad.poll(10_000) and decode(bad.recv_multipart()).kind == "welcome"
        before = 0
        for i in range(10_000):
            parts = _mutated(rng, rng.choice(originals))
            bad.send_multipart(parts or [b""])
            if i == 1_000:
                _until(lambda: teacher.server.status()["malformed"] > 500)
                before = psutil.Process().memory_info().rss
            while bad.poll(0):
                bad.recv_multipart()
        _until(lambda: teacher.server.status()["malformed"] > 8_500)
        client = open_client(tmp_path)
        requests = some_requests()
        assert all(same_answer(s, requests[s.sample_id]) for s in collect(client, requests))
        assert psutil.Process().memory_info().rss - before < 16 << 20
        client.close()
        context.destroy(0)


# Access


@pytest.mark.parametrize("name, value", [("teacher_tokenizer", "b" * 64), ("hidden_size", 17)])
def test_another_teacher_than_expected_is_one_clear_line(tmp_path, name, value) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        client = open_client(tmp_path, fingerprints=FINGERPRINTS | {name: value})
        wanted = str(FINGERPRINTS[name])[:12]
        with pytest.raises(
            TeacherError, match=f"refuses: {name.replace('_', ' ')}: {wanted} at the teacher, "
        ) as error:
            client.meet()
        assert "--teacher-endpoint here" in str(error.value) and "\n" not in str(error.value)
        client.close()
        assert teacher.server.status()["refused"] > 0 and teacher.server.status()["clients"] == 0
        _served(tmp_path)


def test_what_only_one_end_knows_is_not_compared_but_later_lives_must_share_it(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path, fingerprints=FINGERPRINTS | {"teacher_weights": "one"}) as teacher:
        client = open_client(tmp_path, fingerprints=FINGERPRINTS | {"alignment_map": "x"})
        client.meet()
        teacher.stop()
        with ModelFreeTeacher(tmp_path, fingerprints=FINGERPRINTS | {"teacher_weights": "two"}):
            client.submit(some_requests()[0])
            with pytest.raises(TeacherError, match="teacher weights: two at the teacher, one at the student"):
                client.next()
            client.close()


def test_another_version_is_refused_by_name(tmp_path, monkeypatch) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        old = connect(context, teacher.server.endpoint.address, None, b"old")
        parts = [bytes(p) for p in encode(hello())]
        old.send_multipart(_header(parts, version=7))
        assert old.poll(10_000)
        answer = decode(old.recv_multipart())
        assert answer.fields["reason"] == "protocol version 7; this end speaks 3"
        assert teacher.server.status()["malformed"] == 1
        context.destroy(0)
        _served(tmp_path)


def test_requests_that_would_fault_are_refused_with_a_reason(tmp_path) -> None:
    good = next(r for r in some_requests() if r.byte_side is not None and len(r.label_ids) > 2)
    side = good.byte_side
    wrong = {
        "token ids from .* must lie in .0, 300": replace(good, label_ids=np.full_like(good.label_ids, 300)),
        "token ids from -1": replace(good, prompt_ids=np.array([-1], np.int32)),
        "rows from": replace(good, rows=np.array([len(good.label_ids)], np.int32)),
        "rows must ascend": replace(good, rows=np.array([1, 1], np.int32)),
        "no token of prompt": replace(good, prompt_ids=np.zeros(0, np.int32)),
        "the teacher takes 1000 .--max-tokens-per-batch, or": replace(
            good, prompt_ids=np.zeros(1001, np.int32)
        ),
        "segment_row from": replace(good, byte_side=replace(side, segment_row=side.segment_row + 100)),
        "segment_start from": replace(good, byte_side=replace(side, segment_start=side.segment_start + 200)),
        "entry_slot from": replace(good, byte_side=replace(side, entry_slot=side.entry_slot + 100)),
        "entry_segment from": replace(good, byte_side=replace(side, entry_segment=side.entry_segment - 100)),
        "last_row from": replace(good, byte_side=replace(side, last_row=side.last_row + 100)),
        "must ascend": replace(good, byte_side=replace(side, segment_start=side.segment_start[::-1])),
    }
    with ModelFreeTeacher(tmp_path) as teacher:
        for words, request in wrong.items():
            client = open_client(tmp_path)
            client.submit(request)
            with pytest.raises(TeacherError, match=f"refuses sample {good.sample_id}: .*{words}"):
                client.next()
            client.close()
        assert teacher.server.status()["refused"] == len(wrong) and teacher.answered == []
        _served(tmp_path)


def test_a_frame_beyond_the_limit_ends_the_connection_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_FRAME_BYTES", 1 << 20)
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        big = connect(context, teacher.server.endpoint.address, None, b"big")
        monitor = big.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        big.send_multipart([b"", bytes((1 << 20) + 1)])
        assert monitor.poll(10_000), "the connection stays"
        _served(tmp_path)
        big.disable_monitor()
        monitor.close(0)
        context.destroy(0)


def test_what_is_larger_than_it_may_be_is_refused_before_it_is_inflated(tmp_path, monkeypatch) -> None:
    def inflated(frame, size) -> None:
        raise AssertionError(f"{size} bytes were inflated")

    small = next(r for r in some_requests() if r.byte_side is not None)
    many = np.zeros(wire.MAX_STEPS + wire.MAX_STEPS_PER_LABEL * len(small.label_ids) + 1, np.int32)
    side = replace(small.byte_side, segment_row=many, segment_start=many)
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        sock = connect(context, teacher.server.endpoint.address, None, b"me")
        sock.send_multipart(encode(hello()))
        assert sock.poll(10_000) and decode(sock.recv_multipart()).kind == "welcome"
        monkeypatch.setattr(wire, "_inflated", inflated)
        long = replace(small, prompt_ids=np.zeros(1001, np.int32))
        sock.send_multipart(encode(score_message(1, replace(small, byte_side=side))))
        sock.send_multipart(encode(score_message(2, long)))
        assert sock.poll(10_000)
        refused = decode(sock.recv_multipart())
        assert (
            refused.fields["request"] == 2
            and "the teacher takes 1000 (--max-tokens-per-batch" in refused.fields["reason"]
        )
        status = teacher.server.status()
        assert (status["malformed"], status["refused"], status["queue"]) == (1, 1, 0)
        context.destroy(0)


def test_only_an_encrypted_connection_needs_no_checksum() -> None:
    parts = encode(hello(), checked=False)
    assert decode(parts, checked=False) == hello()
    with pytest.raises(WireError, match="checksum"):
        decode(parts)
    assert with_checksum(parts) == encode(hello())


def test_before_a_hello_nothing_is_accepted(tmp_path) -> None:
    with ModelFreeTeacher(tmp_path) as teacher:
        context = zmq.Context()
        hasty = connect(context, teacher.server.endpoint.address, None, b"hasty")
        hasty.send_multipart(encode(score_message(1, some_requests()[0])))
        assert not hasty.poll(300) and teacher.answered == []
        context.destroy(0)
        _served(tmp_path)


def test_keys_are_private_and_made_once(tmp_path) -> None:
    keys = make_keys(tmp_path)
    assert make_keys(tmp_path) == keys
    for name in (SERVER_KEY, CLIENT_KEY):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert read_keys(tmp_path / CLIENT_KEY) == replace(keys, server_secret="")
    assert keys.server_secret not in (tmp_path / CLIENT_KEY).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [CLIENT_KEY, SERVER_KEY]
    os.chmod(tmp_path / CLIENT_KEY, 0o644)
    with pytest.raises(ValueError, match=f"{CLIENT_KEY}: others can read it; chmod 600"):
        read_keys(tmp_path / CLIENT_KEY)
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_keys(tmp_path / "nowhere")


def test_between_hosts_only_the_key_of_the_run_opens(tmp_path) -> None:
    keys, others = make_keys(tmp_path / "run"), make_keys(tmp_path / "other")
    wrong = {
        "no key": None,
        "another run's": others,
        "another client's": replace(others, server_public=keys.server_public),
        "another server's": replace(keys, server_public=others.server_public),
    }
    with ModelFreeTeacher(tmp_path / "run", address="tcp://127.0.0.1", keys=keys) as teacher:
        for count, (name, theirs) in enumerate(wrong.items(), 1):
            context = zmq.Context()
            sock = connect(context, teacher.server.endpoint.address, theirs, uuid.uuid4().bytes)
            _until(lambda: teacher.server.status()["failed_handshakes"] >= count)  # noqa: B023  (used at once)
            with pytest.raises(zmq.Again):
                sock.send_multipart(encode(hello()), zmq.NOBLOCK)
            assert not sock.poll(50), name
            context.destroy(0)
        assert teacher.server.status()["clients"] == 0
        _served(tmp_path / "run", key_file=tmp_path / "run" / CLIENT_KEY)


def _served(folder, **more) -> None:
    """Asserts that another client gets its answer."""
    client = open_client(folder, **more)
    requests = some_requests(8)
    assert all(same_answer(s, requests[s.sample_id]) for s in collect(client, requests))
    client.close()


def _until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
