"""A hostile teacher, or a person who can write to the endpoint folder: refused in one line,
without other effects.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from megatron_simct.teacher.client import MAX_MISFITS, TeacherClient
from megatron_simct.teacher.endpoints import (
    Endpoint,
    bind,
    check_folder,
    ignored_files,
    make_keys,
    publish,
    read_endpoints,
    read_keys,
    withdraw,
)
from megatron_simct.teacher.payload import misfit, read_score, scored_message
from megatron_simct.teacher.scorer import TeacherError
from megatron_simct.teacher.wire import Message, decode, encode, quoted
from tests.teacher_jobs import (
    FAST,
    FINGERPRINTS,
    ModelFreeTeacher,
    answer_of,
    make_request,
    open_client,
    welcome,
)

SIZES = {"hidden_size": FINGERPRINTS["hidden_size"], "vocab_size": FINGERPRINTS["teacher_vocabulary"]}
STATUS = {"tokens_per_s": 1.0, "queue": 0}
GOOD = {"replica": "bad", "address": "tcp://10.0.0.1:5", "life": "x", "host": socket.gethostname(), "pid": 1}


@dataclass(frozen=True, kw_only=True)
class File:
    """A file bad.json in the endpoint folder, and words of the line about it."""

    what: str
    text: str
    words: str


def _with(**changes: object) -> str:
    return json.dumps(GOOD | changes)


FILES = (
    File(what="empty", text="", words="not JSON"),
    File(what="a list", text="[]", words="not a JSON object"),
    File(what="deep", text="[" * 10_000, words="not JSON"),
    File(what="long", text=" " * 20_000, words="longer than"),
    File(what="text that is not UTF-8", text="\udcff", words="not JSON"),
    File(what="a pid as text", text=_with(pid="1"), words="pid is not of type int"),
    File(what="a pid as a truth value", text=_with(pid=True), words="pid is not of type int"),
    File(what="a number as a name", text=_with(replica=7), words="replica is not of type str"),
    File(what="a missing field", text='{"replica": "bad", "life": "x"}', words="address is missing"),
    File(what="another field", text=_with(rank=1), words="unknown field 'rank'"),
    File(what="a path as a name", text=_with(replica="../../victim"), words="not the name of this file"),
    File(what="another replica's name", text=_with(replica="good"), words="not the name of this file"),
    File(
        what="an address of another kind", text=_with(address="http://x"), words="neither ipc:// nor tcp://"
    ),
    File(what="an address that moves the cursor", text=_with(address="ipc:///x\x1b[2J"), words="neither"),
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.what)
def test_a_file_that_is_not_an_endpoint_record_is_one_line_and_stops_nobody(
    file: File, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "teacher"
    folder.mkdir(parents=True)
    victim = tmp_path / "victim.json"
    victim.write_text("x")
    (folder / "bad.json").write_text(file.text, errors="surrogateescape")
    with ModelFreeTeacher(folder, name="good"):
        (line,) = ignored_files(folder)
        assert line.startswith(f"{folder}/bad.json: ") and file.words in line and line.isprintable()
        assert set(read_endpoints(folder)) == {"good"}
        client = open_client(folder)
        client.meet()
        client.close()
    assert victim.exists() and not read_endpoints(folder)


def test_a_time_out_names_files_that_are_not_a_replicas(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    client = open_client(tmp_path, patience=replace(FAST, timeout_s=0.5))
    with pytest.raises(TeacherError, match=r"none was found.*bad\.json: not a JSON object"):
        client.meet()
    client.close()


def test_only_a_socket_of_ours_is_removed(tmp_path: Path) -> None:
    """An endpoint of a replica that was killed may name any file as its socket."""
    folder = tmp_path / "megatron_simct.x"
    folder.mkdir()
    (folder / "precious").write_text("x")
    withdraw(tmp_path, Endpoint(replica="bad", address=f"ipc://{folder}/precious", life="x"))
    assert (folder / "precious").exists()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_can_write_to_is_refused_on_both_sides(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    folder.chmod(mode)
    mend = f"chmod go-w {folder}"
    with pytest.raises(ValueError, match=mend):
        make_keys(folder)
    with pytest.raises(ValueError, match=mend):
        publish(folder, Endpoint(replica="a", address="ipc:///x", life="l"))
    client = open_client(folder)
    with pytest.raises(TeacherError, match=mend):
        client.meet()
    client.close()
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    check_folder(folder)


def test_a_folder_of_somebody_else_is_refused_but_not_to_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=f"belongs to user {owner}"):
        check_folder(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"server_public": 1, "client_public": 2, "client_secret": 3}', "not of type str"),
        ('{"server_public": "a", "client_public": "b", "client_secret": "c"}', "not 40 characters of Z85"),
    ],
)
def test_a_key_file_without_keys_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "client_key.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError) as raised:
        read_keys(path)
    assert str(raised.value).startswith(f"{path}: holds no keys: ") and words in str(raised.value)


# Messages


@dataclass(kw_only=True)
class Hostile:
    """A replica that answers as it is told to."""

    folder: Path
    fingerprints: dict[Any, Any] = field(default_factory=lambda: dict(FINGERPRINTS))
    status: dict[Any, Any] = field(default_factory=lambda: dict(STATUS))
    name: str = "evil"
    spoil: str = ""
    """The array of an answer whose first number is not finite."""
    refusal: str = ""
    asked: int = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        context = zmq.Context()
        router, address = bind(context, "ipc", None, number=0)
        endpoint = Endpoint(replica=self.name, address=address, life="l")
        publish(self.folder, endpoint)
        stop = threading.Event()
        thread = threading.Thread(target=self._serve, args=(router, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            router.close(0)
            context.term()
            withdraw(self.folder, endpoint)

    def _serve(self, router: zmq.Socket, stop: threading.Event) -> None:
        while not stop.is_set():
            if not router.poll(20):
                continue
            who, *parts = router.recv_multipart()
            message = decode(parts)
            if message.kind == "hello":
                beat = message.fields["beat"]
                greeting = welcome(self.status, beat=beat, fingerprints=self.fingerprints)
                router.send_multipart([who, *encode(greeting)])
            else:
                self.asked += 1
                router.send_multipart([who, *encode(self._reply(message))])

    def _reply(self, message: Message) -> Message:
        number = message.fields["request"]
        if self.refusal:
            return Message(kind="refused", fields={"request": number, "reason": self.refusal})
        answer = scored_message(number, answer_of(read_score(message)), "fp32")
        if not self.spoil:
            return answer
        dtype, array = answer.frames[self.spoil]
        array = np.array(array)
        array.flat[0] = np.nan
        return replace(answer, frames={**answer.frames, self.spoil: (dtype, array)})


def _request(kind: str) -> Any:
    """A request whose answer has that array."""
    rng = np.random.default_rng(1)
    while True:
        request = make_request(rng, 1)
        frames = scored_message(0, answer_of(request), "fp32").frames
        if kind in frames and frames[kind][1].size:
            return request


@pytest.mark.parametrize("array", ["own_logit", "lse", "hidden", "byte_logprobs"])
def test_numbers_that_are_not_finite_end_the_run_and_name_the_replica(array: str, tmp_path: Path) -> None:
    hostile = Hostile(folder=tmp_path, spoil=array)
    with hostile.open():
        client = open_client(tmp_path)
        client.meet()
        client.submit(_request(array))
        with pytest.raises(
            TeacherError, match=rf"replica evil .*sample 1 .*{array} has numbers that are not finite"
        ):
            client.next()
        client.close()
    assert hostile.asked == MAX_MISFITS and client.counts["malformed"] == MAX_MISFITS


def test_another_replica_is_asked_what_one_answers_wrongly(tmp_path: Path) -> None:
    hostile = Hostile(folder=tmp_path, spoil="own_logit", name="a")
    with hostile.open(), ModelFreeTeacher(tmp_path, name="b") as teacher:
        client = open_client(tmp_path, patience=replace(FAST, silence_s=60.0))
        client.meet()
        _meet_all(client, 2)
        client._patience = replace(FAST, silence_s=600.0, hello_s=600.0)  # from here on, nothing is recalled
        requests = {number: replace(_request("own_logit"), sample_id=number) for number in range(20)}
        for request in requests.values():
            client.submit(request)
        for _ in requests:
            _, message = client.next()
            request = requests[message.fields["sample_id"]]
            assert misfit(message, request, **SIZES) is None
        client.close()
    assert hostile.asked == client.counts["malformed"] > 0
    assert sorted(teacher.answered) == list(requests), "the other replica has answered all, each once"


def _meet_all(client: TeacherClient, replicas: int) -> None:
    _until(lambda: len(client.status()) == replicas)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_no_infinity_passes_in_any_type(dtype: str, value: float) -> None:
    request = _request("hidden")
    answer = scored_message(0, answer_of(request), "bf16" if dtype == "bfloat16" else "fp32")
    assert misfit(answer, request, **SIZES) is None
    kind, array = answer.frames["hidden"]
    spoilt = np.array(array)
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    spoilt.flat[-1] = bits.astype(np.uint16)[0] if dtype == "bfloat16" else value
    spoilt = spoilt.astype(np.float16) if dtype == "float16" else spoilt
    changed = replace(
        answer, frames={**answer.frames, "hidden": (kind if dtype != "float16" else dtype, spoilt)}
    )
    assert "not finite" in str(misfit(changed, request, **SIZES))


def test_a_byte_may_have_no_probability() -> None:
    request = _request("byte_logprobs")
    answer = scored_message(0, answer_of(request), "fp32")
    kind, array = answer.frames["byte_logprobs"]
    impossible = np.array(array)
    impossible[0] = -np.inf
    changed = replace(answer, frames={**answer.frames, "byte_logprobs": (kind, impossible)})
    assert misfit(changed, request, **SIZES) is None


@pytest.mark.parametrize(
    "status",
    [{}, {"tokens_per_s": "fast", "queue": []}, {"tokens_per_s": 1, "queue": 1, "draining": "no"}],
    ids=["empty", "texts", "draining"],
)
def test_a_status_without_its_numbers_is_malformed(status: dict[str, Any], tmp_path: Path) -> None:
    with Hostile(folder=tmp_path, status=status).open():
        client = open_client(tmp_path)
        _until(lambda: client.counts["malformed"] > 0)
        client._patience = replace(FAST, timeout_s=0.5)
        with pytest.raises(TeacherError, match="no teacher"):
            client.meet()
        client.close()


@pytest.mark.parametrize("fingerprints", [{"hidden_size": [1]}, {1: "x"}])
def test_fingerprints_of_other_types_are_malformed(fingerprints: dict[Any, Any], tmp_path: Path) -> None:
    with Hostile(folder=tmp_path, fingerprints=fingerprints).open():
        client = open_client(tmp_path)
        _until(lambda: client.counts["malformed"] > 0)
        client._patience = replace(FAST, timeout_s=0.5)
        with pytest.raises(TeacherError, match="no teacher"):
            client.meet()
        client.close()


def test_what_the_other_end_writes_is_cut_and_escaped(tmp_path: Path) -> None:
    with Hostile(folder=tmp_path, refusal="\x1b[2J\x07 buy\nnow " * 4000).open():
        client = open_client(tmp_path)
        client.meet()
        client.submit(_request("own_logit"))
        with pytest.raises(TeacherError) as raised:
            client.next()
        client.close()
    message = str(raised.value)
    assert (
        r"refuses sample 1: \x1b[2J\x07 buy\nnow" in message and message.isprintable() and len(message) < 500
    )


def test_quoted() -> None:
    assert quoted("a reason") == "a reason" and quoted("é\u202e\x00") == "é\\u202e\\x00"
    assert len(quoted("\x00" * 10_000)) == 300 and quoted("x" * 301).endswith("x...")
