"""Where teachers are found, and who may talk to them: small files that both jobs can see.

    RUN/teacher/NAME.json          a replica's address; written whole, replaced at a restart, removed at a clean end
    RUN/teacher/NAME.status        what it is doing, in numbers, every second or so
    RUN/teacher/server_key.json    CURVE keys of tcp:// sockets, made once a run, for its owner only (mode 0600):
    RUN/teacher/client_key.json    all a student needs of them

On one host a socket is a file in a folder that only its owner can enter, and needs no keys. A replica removes both at
its end, and at its start those of replicas that were killed. Between hosts everything is encrypted, and a client
without the key of the run is refused by ZeroMQ before a byte of it is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from megatron_simct.teacher.wire import MAX_FRAME_BYTES

FOLDER = "teacher"
SOCKET_FOLDER = "megatron_simct."
"""How the folder of an ipc:// socket is named, in the system's folder for temporary files."""
SERVER_KEY, CLIENT_KEY = "server_key.json", "client_key.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One running replica."""

    replica: str
    address: str
    life: str
    """Another one after every start."""
    host: str = ""
    pid: int = 0


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
    """Make a replica known, and forget those of this host that were killed."""
    for other in read_endpoints(folder).values():
        if other.host == endpoint.host and other.pid and not _alive(other.pid):
            withdraw(folder, other)
    write_private(folder / f"{endpoint.replica}.json", json.dumps(asdict(endpoint)), mode=0o644)


def withdraw(folder: Path, endpoint: Endpoint) -> None:
    """Remove the files of a replica of this host: its socket, and the others unless a later life has replaced them."""
    socket_file = Path(endpoint.address.removeprefix("ipc://"))
    if endpoint.address.startswith("ipc://") and socket_file.parent.name.startswith(SOCKET_FOLDER):
        with contextlib.suppress(OSError):
            socket_file.unlink(missing_ok=True)
            socket_file.parent.rmdir()
    current = read_endpoints(folder).get(endpoint.replica)
    if current is None or current.life == endpoint.life:
        for suffix in (".json", ".status"):
            (folder / f"{endpoint.replica}{suffix}").unlink(missing_ok=True)


def read_endpoints(folder: Path) -> dict[str, Endpoint]:
    """Every replica that is known now, by name; files that are none are passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name in (SERVER_KEY, CLIENT_KEY):
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):
            endpoint = Endpoint(**json.loads(path.read_text()))
            found[endpoint.replica] = endpoint
    return found


def make_keys(folder: Path) -> Keys:
    """The keys of this run; made by whichever replica comes first."""
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
    """ValueError, naming the file, where it is missing, readable by others, or holds no keys."""
    try:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"{path}: others can read it; chmod 600 {path}")
        return Keys(**json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the teacher writes it when it binds to tcp://") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: holds no keys ({error})") from None


def write_private(path: Path, text: str, *, mode: int = 0o600, replace: bool = True) -> None:
    """Write a file whole, or not at all. Without `replace`, a file that is there already stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


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
    """A ROUTER socket and its address. wanted: "ipc", or tcp://HOST[:PORT]; replica `number` takes PORT + number.

    Raises ValueError, naming --bind, for an address that cannot be had.
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
            raise ValueError(f"--bind {wanted}: write ipc, or tcp://HOST or tcp://HOST:PORT as students reach it")
        if port and int(port) + number > 65535:  # ZeroMQ would take what is left of it in 16 bits
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
    """ValueError, as from `bind`, for an address that cannot be had now. Nothing is left behind, not for a moment."""
    if wanted == "ipc":
        _check_length(f"{tempfile.gettempdir()}/{SOCKET_FOLDER}{'x' * 8}/teacher")  # as mkdtemp names folders
        return
    context = zmq.Context()
    try:
        router, _ = bind(context, wanted, _new_keys(), number=number)  # which nobody has
        router.close(0)
    finally:
        context.term()


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(
            f"--bind ipc: ipc://{path}: {os.strerror(errno.ENAMETOOLONG)}; let TMPDIR name a shorter folder"
        )


def _bind_in_new_folder(router: zmq.Socket) -> str:
    """The ipc:// address, in a folder that only its owner can enter. ValueError where its name is too long."""
    folder = tempfile.mkdtemp(prefix=SOCKET_FOLDER)  # mode 0700
    address = f"ipc://{folder}/teacher"
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        os.rmdir(folder)
        raise ValueError(f"--bind ipc: {address}: {error.strerror}; let TMPDIR name a shorter folder") from None
    return address


def connect(context: zmq.Context, address: str, keys: Keys | None, identity: bytes) -> zmq.Socket:
    """A DEALER socket. It connects in the background, again and again. ValueError for what is no address."""
    dealer = context.socket(zmq.DEALER)
    _harden(dealer)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for a connection that may never be
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


def only(context: zmq.Context, keys: Keys) -> ThreadAuthenticator:
    """Refuse every CURVE client of this context but the one of these keys. Stop it at the end."""

    class OneKey:
        def callback(self, domain: str, key: bytes) -> bool:
            return key == keys.client_public.encode()

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=OneKey())
    return authenticator


def _harden(sock: zmq.Socket) -> None:
    """Nothing larger than a frame may be, no waiting at the end, and a lost peer is noticed."""
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
    """Lets another thread end the wait of the thread that polls `receiver`."""

    def __init__(self, context: zmq.Context) -> None:
        address = f"inproc://wake-{id(self)}"
        self.receiver, self._sender = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.receiver.bind(address)
        self._sender.connect(address)

    def wake(self) -> None:
        """From one other thread only. Nothing where that thread is awake already, or has ended."""
        with contextlib.suppress(zmq.ZMQError):
            self._sender.send(b"", zmq.NOBLOCK)

    def clear(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.receiver.recv(zmq.NOBLOCK)

    def close(self) -> None:
        self.receiver.close(0)
        self._sender.close(0)
