"""Endpoint records and keys: small files by which students find teachers and authenticate.

    RUN/teacher/NAME.json          a replica's address; written whole, replaced at a restart, removed at a
                                   clean end
    RUN/teacher/NAME.status        its status in numbers, about once a second
    RUN/teacher/.NAME.1.lock       owner of these two (`ownership`)
    RUN/teacher/server_key.json    CURVE keys of tcp:// sockets, made once a run, for its owner only (mode
                                   0600):
    RUN/teacher/client_key.json    the part of them that a student needs

On one host a socket is a file in a folder that only its owner can enter, and needs no keys. A replica removes
both at its end, and at its start those of replicas that were killed. Between hosts everything is encrypted,
and ZeroMQ refuses a client without the key of the run before it reads a byte of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from megatron_simct.files import write_private
from megatron_simct.ownership import Owner, forget, is_gone, owner_of, take
from megatron_simct.teacher.wire import MAX_FRAME_BYTES

FOLDER = "teacher"
SOCKET_FOLDER = "megatron_simct."
"""Prefix of the folder of an ipc:// socket, in the system's folder for temporary files."""
SOCKET = "teacher"
"""Name of the socket in that folder."""
SERVER_KEY, CLIENT_KEY = "server_key.json", "client_key.json"
MAX_FILE_BYTES = 1 << 14
"""Size limit of one of these files: a longer one is not read."""
_REPLICA = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A replica's name is part of the names of its files."""
_Z85_KEY = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One running replica."""

    replica: str
    address: str
    life: str
    """Identifies the process: new at every start."""
    host: str = ""
    pid: int = 0


def is_encrypted(endpoint: Endpoint) -> bool:
    """Whether messages to this endpoint are encrypted and authenticated (CURVE)."""
    return endpoint.address.startswith("tcp://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """CURVE keys in Z85. A student does not get `server_secret`."""

    server_public: str
    client_public: str
    client_secret: str
    server_secret: str = ""


def endpoint_folder(directory: str) -> Path:
    """DIR/teacher of a run directory; or that folder itself."""
    return Path(directory) if Path(directory).name == FOLDER else Path(directory) / FOLDER


def publish(folder: Path, endpoint: Endpoint) -> None:
    """Write a replica's endpoint record, and remove those of killed replicas.

    Raises ValueError for a folder that others can write to, and if the name is that of another replica.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(folder)
    for other in read_endpoints(folder).values():
        if _is_gone(folder, other, endpoint.host):
            withdraw(folder, other)
    take(folder, name=endpoint.replica, what=f"{folder}: teacher replica {endpoint.replica}")
    write_private(folder / f"{endpoint.replica}.json", json.dumps(asdict(endpoint)), mode=0o644)


def withdraw(folder: Path, endpoint: Endpoint) -> None:
    """Remove the files of a replica of this host: its socket, and its records unless a later process has
    replaced them.
    """
    socket_file = Path(endpoint.address.removeprefix("ipc://"))
    is_ours = socket_file.name == SOCKET and socket_file.parent.name.startswith(SOCKET_FOLDER)
    if endpoint.address.startswith("ipc://") and is_ours:
        with contextlib.suppress(OSError):
            socket_file.unlink(missing_ok=True)
            socket_file.parent.rmdir()
    current = read_endpoints(folder).get(endpoint.replica)
    if current is None or current.life == endpoint.life:
        for suffix in (".json", ".status"):
            (folder / f"{endpoint.replica}{suffix}").unlink(missing_ok=True)
        forget(folder, name=endpoint.replica)


def _is_gone(folder: Path, replica: Endpoint, this_host: str) -> bool:
    """Whether a replica has provably ended. Replicas of earlier versions have no lock."""
    owner = owner_of(folder, name=replica.replica)
    if owner is not None:
        return is_gone(owner, Owner.this_process())
    return replica.host == this_host and bool(replica.pid) and not _alive(replica.pid)


def check_folder(folder: Path) -> None:
    """Raises ValueError, naming the folder and the remedy, if other users can write to it.

    Whoever can write there can send students to a teacher of their own. Root may use anybody's folder: a
    container's root often sees a shared file system's owners under other numbers.
    """
    with contextlib.suppress(FileNotFoundError):
        status = folder.stat()
        if status.st_mode & 0o022:
            raise ValueError(f"{folder}: others can write to it; chmod go-w {folder}")
        if os.geteuid() not in (0, status.st_uid):
            raise ValueError(
                f"{folder}: belongs to user {status.st_uid}, not to you; use a --run-dir of your own"
            )


def read_endpoints(folder: Path) -> dict[str, Endpoint]:
    """Every replica that is known now, by name. Files that are not endpoint records are skipped."""
    records = (record for _, record in _records(folder))
    return {record.replica: record for record in records if isinstance(record, Endpoint)}


def ignored_files(folder: Path) -> list[str]:
    """One line for each file in the place of an endpoint record that is not a valid one."""
    return [f"{path}: {record}" for path, record in _records(folder) if isinstance(record, str)]


def _records(folder: Path) -> Iterator[tuple[Path, Endpoint | str]]:
    """Each file with its record, or with the reason why it is not one."""
    for path in sorted(folder.glob("*.json")):
        if path.name in (SERVER_KEY, CLIENT_KEY):
            continue
        try:
            yield path, _endpoint(path)
        except FileNotFoundError:
            continue  # removed after it was listed
        except OSError as error:
            yield path, str(error.strerror)
        except ValueError as error:
            yield path, str(error)


def _endpoint(path: Path) -> Endpoint:
    """Raises ValueError with what is wrong with the file."""
    record = Endpoint(**_values(path, Endpoint))
    if not _REPLICA.fullmatch(record.replica) or path.name != f"{record.replica}.json":
        raise ValueError("replica is not the name of this file")
    if not record.address.startswith(("ipc://", "tcp://")) or not record.address.isprintable():
        raise ValueError("address is neither ipc:// nor tcp://")
    return record


def _values(path: Path, kind: type[Endpoint] | type[Keys]) -> dict[str, Any]:
    """The fields of a record as a file has them, each of its type. Raises ValueError with what is wrong."""
    with path.open("rb") as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"longer than {MAX_FILE_BYTES} bytes")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    types = {"str": str, "int": int}
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:40]!r}")
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise ValueError(f"{name} is missing")
        if name in values and type(values[name]) is not types[str(field.type)]:
            raise ValueError(f"{name} is not of type {field.type}")
    return values


def make_keys(folder: Path) -> Keys:
    """The keys of this run; made by whichever replica comes first. ValueError for a folder of others."""
    check_folder(folder)
    path = folder / SERVER_KEY
    if not path.exists():
        write_private(path, json.dumps(asdict(_new_keys())), replace=False)
    keys = read_keys(path)
    public = {name: value for name, value in asdict(keys).items() if name != "server_secret"}
    write_private(folder / CLIENT_KEY, json.dumps(public))
    return keys


def _new_keys() -> Keys:
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    return Keys(
        server_public=server_public.decode(),
        server_secret=server_secret.decode(),
        client_public=client_public.decode(),
        client_secret=client_secret.decode(),
    )


def read_keys(path: Path) -> Keys:
    """Raises ValueError, naming the file, if it is missing, readable by others, or not a file of keys."""
    try:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"{path}: others can read it; chmod 600 {path}")
        values = _values(path, Keys)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the teacher writes it when it binds to tcp://") from None
    except ValueError as error:
        reason = str(error)
        raise ValueError(
            reason if reason.startswith(f"{path}") else f"{path}: holds no keys: {reason}"
        ) from None
    for name, value in values.items():
        if not _Z85_KEY.fullmatch(value):
            raise ValueError(f"{path}: holds no keys: {name} is not 40 characters of Z85")
    return Keys(**values)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# Sockets


def bind(context: zmq.Context, wanted: str, keys: Keys | None, *, number: int) -> tuple[zmq.Socket, str]:
    """A ROUTER socket and its address. wanted: "ipc", or tcp://HOST[:PORT]; replica `number`
    takes PORT + number.

    Raises ValueError, naming --bind, if the address cannot be bound.
    """
    router = context.socket(zmq.ROUTER)
    _harden(router)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        if wanted == "ipc":
            return router, _bind_in_new_folder(router)
        host, _, port = wanted.removeprefix("tcp://").partition(":")
        if not wanted.startswith("tcp://") or host in ("", "*", "0.0.0.0") or (port and not port.isdigit()):
            raise ValueError(
                f"--bind {wanted}: write ipc, or tcp://HOST or tcp://HOST:PORT as students reach it"
            )
        if port and int(port) + number > 65535:  # ZeroMQ would use the number modulo 65536
            raise ValueError(
                f"--bind {wanted}: replica {number} would have port {int(port) + number}, of at most 65535"
            )
        assert keys is not None, "tcp needs keys"
        router.curve_server = True
        router.curve_secretkey = keys.server_secret.encode()
        router.curve_publickey = keys.server_public.encode()
        if port:
            router.bind(f"tcp://{host}:{int(port) + number}")
        else:
            router.bind_to_random_port(f"tcp://{host}")
        return router, router.getsockopt_string(zmq.LAST_ENDPOINT)
    except (zmq.ZMQError, OverflowError) as error:
        router.close(0)
        raise ValueError(f"--bind {wanted}: {error}") from None
    except ValueError:
        router.close(0)
        raise


def check_bind(wanted: str, *, number: int) -> None:
    """Raises ValueError, as `bind` does, if the address cannot be bound now. Creates no files."""
    if wanted == "ipc":
        # as mkdtemp names folders
        _check_length(f"{tempfile.gettempdir()}/{SOCKET_FOLDER}{'x' * 8}/{SOCKET}")
        return
    context = zmq.Context()
    try:
        router, _ = bind(context, wanted, _new_keys(), number=number)  # a name that nobody uses
        router.close(0)
    finally:
        context.term()


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(
            f"--bind ipc: ipc://{path}: {os.strerror(errno.ENAMETOOLONG)}; let TMPDIR name a shorter folder"
        )


def _bind_in_new_folder(router: zmq.Socket) -> str:
    """The ipc:// address, in a folder that only its owner can enter.

    ValueError if its name is too long.
    """
    folder = tempfile.mkdtemp(prefix=SOCKET_FOLDER)  # mode 0700
    address = f"ipc://{folder}/{SOCKET}"
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        os.rmdir(folder)
        raise ValueError(
            f"--bind ipc: {address}: {error.strerror}; let TMPDIR name a shorter folder"
        ) from None
    return address


def connect(context: zmq.Context, address: str, keys: Keys | None, identity: bytes) -> zmq.Socket:
    """A DEALER socket.

    It connects in the background, again and again. Raises ValueError for an invalid address.
    """
    dealer = context.socket(zmq.DEALER)
    _harden(dealer)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # messages are not queued for a connection that may never exist
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if keys is not None and address.startswith("tcp://"):
        dealer.curve_serverkey = keys.server_public.encode()
        dealer.curve_publickey = keys.client_public.encode()
        dealer.curve_secretkey = keys.client_secret.encode()
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        dealer.close(0)
        raise ValueError(f"{address}: {error.strerror}; write tcp://HOST:PORT") from None
    return dealer


def accept_only(context: zmq.Context, keys: Keys) -> ThreadAuthenticator:
    """Accept only the client with this public key. The caller must stop the authenticator."""

    class OneKey:
        def callback(self, domain: str, key: bytes) -> bool:
            return key == keys.client_public.encode()

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=OneKey())
    return authenticator


def _harden(sock: zmq.Socket) -> None:
    """Limit the message size, do not linger on close, and detect lost peers."""
    options: Sequence[tuple[int, Any]] = (
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.LINGER, 0),
        (zmq.HEARTBEAT_IVL, 2_000),
        (zmq.HEARTBEAT_TIMEOUT, 10_000),
        (zmq.HANDSHAKE_IVL, 10_000),
        (zmq.TCP_KEEPALIVE, 1),
    )
    for option, value in options:
        sock.setsockopt(option, value)


def this_host() -> str:
    return socket.gethostname()


class Waker:
    """Lets another thread wake the thread that polls `receiver`."""

    def __init__(self, context: zmq.Context) -> None:
        address = f"inproc://wake-{id(self)}"
        self.receiver, self._sender = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.receiver.bind(address)
        self._sender.connect(address)

    def wake(self) -> None:
        """Called by one other thread only. Has no effect if the poller is awake already, or has ended."""
        with contextlib.suppress(zmq.ZMQError):
            self._sender.send(b"", zmq.NOBLOCK)

    def clear(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.receiver.recv(zmq.NOBLOCK)

    def close(self) -> None:
        self.receiver.close(0)
        self._sender.close(0)
