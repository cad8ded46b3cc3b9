"""Stand-ins for an inference engine's server, in threads: one with transformers' hidden states, and
one without a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

FAULTS = ("drop", "refuse", "error", "short", "long", "other", "nan", "garble", "hang")
"""Faults of an answer: the connection ends before or within it, a status, fewer or more rows, another
request's answer, invalid numbers, invalid metadata, and silence.
"""


class EngineServer:
    """The endpoints of a vLLM server that our client uses: /v1/models, /version, /pooling, and
    prompt_logprobs of /v1/completions.
    """

    def __init__(
        self,
        hidden_states: Callable[[np.ndarray], np.ndarray],
        *,
        logits: Callable[[np.ndarray], np.ndarray] | None = None,
        root: str = "stand-in",
        max_model_len: int = 4096,
        seed: int = 0,
        share: float = 0.0,
        hang_s: float = 0.6,
    ) -> None:
        """hidden_states: ids [n] -> float32 [n, H]. share: of answers to /pooling that get one of
        FAULTS, by the seed.
        """
        self.hidden_states, self.logits = hidden_states, logits
        self.root, self.max_model_len = root, max_model_len
        self.share, self.hang_s = share, hang_s
        self.faults = dict.fromkeys(FAULTS, 0)
        self.answered = 0
        self.lock = threading.Lock()
        self.random = random.Random(seed)
        self.routes: dict[str, Callable[[dict[str, Any]], Any]] = {}
        """Further endpoints."""
        self.is_down = False
        handler = type("Handler", (_Handler,), {"engine": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def go_down(self) -> None:
        """Stop as if killed: open connections end, and new ones are closed at once.

        Forked processes share the socket that listens.
        """
        self.is_down = True
        self._server.end_connections()

    def come_back(self) -> None:
        self.is_down = False

    def stop(self) -> None:
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()

    def __enter__(self) -> EngineServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def draw(self) -> str | None:
        with self.lock:
            self.answered += 1
            if self.random.random() >= self.share:
                return None
            # each fault once first
            fault = self.random.choice([kind for kind in FAULTS if not self.faults[kind]] or FAULTS)
            self.faults[fault] += 1
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    RequestHandlerClass: type[_Handler]

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.RequestHandlerClass.engine.is_down:
            self.shutdown_request(request)
            return
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for request in list(self._open):
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: EngineServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.engine
        if self.path == "/v1/models":
            card = {"id": engine.root, "root": engine.root, "max_model_len": engine.max_model_len}
            self._json({"object": "list", "data": [card]})
        elif self.path == "/version":
            self._json({"version": "0.stand-in"})
        else:
            self._json({"error": "nothing there"}, status=404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/pooling":
            self._pool(body)
        elif self.path in self.engine.routes:
            self._json(self.engine.routes[self.path](body))
        elif self.path == "/v1/completions" and self.engine.logits is not None:
            self._complete(body)
        else:
            self._json({"error": "nothing there"}, status=404)

    def _pool(self, body: dict[str, Any]) -> None:
        engine, ids = self.engine, np.array(body["input"], np.int64)
        assert body["task"] == "token_embed" and body["use_activation"] is False
        if len(ids) > engine.max_model_len:
            self._json({"error": f"{len(ids)} tokens are more than {engine.max_model_len}"}, status=400)
            return
        fault, name = engine.draw(), body["request_id"]
        match fault:
            case "refuse":
                self.close_connection = True
                return
            case "error":
                self._json({"error": "the engine is ill"}, status=500)
                return
            case "hang":
                time.sleep(engine.hang_s)
            case "other":
                name = "0" * 32
        with np.errstate(over="ignore"):  # values too large for float16 become infinite, as in an engine
            hidden = np.array(engine.hidden_states(ids), np.float32).astype(
                {"float32": "<f4", "float16": "<f2"}[body["embed_dtype"]]
            )
        match fault:
            case "short":
                hidden = hidden[:-1]
            case "long":
                hidden = np.concatenate([hidden, hidden[:1]])
            case "nan":
                hidden[len(hidden) // 2] = np.nan
        data = hidden.tobytes()
        item = {"index": 0, "embed_dtype": body["embed_dtype"], "shape": list(hidden.shape)}
        metadata = {"id": f"pooling-{name}", "model": engine.root, "data": [item]}
        headers = {"metadata": "{" if fault == "garble" else json.dumps(metadata)}
        self._send(200, data, headers, cut=len(data) // 2 if fault == "drop" else None)

    def _complete(self, body: dict[str, Any]) -> None:
        assert self.engine.logits is not None and body["model"] == self.engine.root
        fault = self.engine.draw()
        ids = body["prompt"]
        if fault in ("refuse", "drop"):
            self.close_connection = True
            return
        if fault == "error":
            self._json({"error": "the engine is ill"}, status=500)
            return
        if fault == "hang":
            time.sleep(self.engine.hang_s)
        logits = torch.from_numpy(np.array(self.engine.logits(np.array(ids)), np.float64))
        log_probs = logits.log_softmax(dim=-1)
        found = [float(log_probs[i, token]) for i, token in enumerate(ids[1:])]
        if fault == "nan":
            found[-1] = math.nan
        if body.get("echo"):
            tokens = [f"token_id:{token}" for token in ids]
            tokens[len(tokens) // 2] += "0" * (fault == "other")
            choice: dict[str, Any] = {"tokens": tokens, "token_logprobs": [None, *found[fault == "short" :]]}
            if fault == "long":
                choice["token_logprobs"] += [-1.0, -1.0]
            choice = {"logprobs": {} if fault == "garble" else choice}
        else:
            likeliest = log_probs.topk(body["prompt_logprobs"], dim=1)
            rows = [
                {str(int(i)): {"logprob": float(y)} for i, y in zip(names, values, strict=True)}
                | {str(token + (fault == "other")): {"logprob": x}}
                for token, x, values, names in zip(
                    ids[1:], found, *(part[:-1] for part in likeliest), strict=True
                )
            ]
            rows = rows[fault == "short" :] + rows[:1] * (fault == "long")
            choice = {"prompt_logprobs": "{" if fault == "garble" else [None, *rows]}
        self._json({"choices": [choice]})

    def _json(self, value: Any, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True


def serve_folder(folder: Path, **more: Any) -> EngineServer:
    """A server of a folder's model, by transformers on one thread, without the folder's head."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    lock = threading.Lock()

    def run(ids: np.ndarray, *, whole: bool) -> np.ndarray:
        with lock, torch.no_grad():
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            if whole:
                return model(tokens).logits[0].numpy()
            return model.get_decoder()(tokens).last_hidden_state[0].numpy()

    def hidden_states(ids: np.ndarray) -> np.ndarray:
        return run(ids, whole=False)

    def logits(ids: np.ndarray) -> np.ndarray:
        return run(ids, whole=True)

    return EngineServer(hidden_states, logits=logits, root=str(folder), **more)


class GeneratingServer:
    """A server that samples from a folder's model by transformers, and loads other weights on request."""

    def __init__(self, folder: Path, *, takes_weights: bool = True) -> None:
        import transformers

        self._read = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        self._folder, self._takes_weights = folder, takes_weights
        self._lock = threading.Lock()
        self._model = self._read(str(folder)).eval()
        self.loaded: list[str] = []
        self.version = "default"
        self.waits_at: Callable[[dict[str, Any]], int | None] = lambda body: None
        """For a request, the number of tokens after which the server waits until the request is
        ended; None: never.
        """
        self.answers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """Requests and their answers."""
        self._ended: dict[str, threading.Event] = {}
        self.server = EngineServer(lambda ids: ids, root=str(folder))
        self.server.routes = {
            "/collective_rpc": self._load,
            "/reset_prefix_cache": lambda body: {"success": True},
            "/update_weight_version": self._label,
            "/weight_checker": self._digests,
            "/inference/v1/generate": self._generate,
            "/abort_requests": self._end,
        }

    def __enter__(self) -> GeneratingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def start_again(self) -> None:
        """Act as a new process: with the weights of its folder."""
        with self._lock:
            self._model = self._read(str(self._folder)).eval()
            self.version = "default"

    def _label(self, body: dict[str, Any]) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def _digests(self, body: dict[str, Any]) -> Any:
        """Checksums in vLLM's form: queries, keys and values in one tensor, gate and up too."""
        assert body == {"action": "checksum"}
        tensors: dict[str, list[torch.Tensor]] = {}
        for name, tensor in self._model.named_parameters():
            name = re.sub(r"\b[qkv]_proj", "qkv_proj", name)
            name = re.sub(r"\b(gate|up)_proj", "gate_up_proj", name)
            tensors.setdefault(f"dp0:pp0:pcp0:tp0:{name}", []).append(tensor.detach())
        digest = {name: hashlib.sha256(torch.cat(parts).numpy().tobytes()) for name, parts in tensors.items()}
        return {"checksums": {name: value.hexdigest() for name, value in digest.items()}}

    def _load(self, body: dict[str, Any]) -> Any:
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        with self._lock:
            self.loaded.append(Path(path).name)
            if self._takes_weights:
                self._model = self._read(path).eval()
        return {"results": [None]}

    def _end(self, body: dict[str, Any]) -> Any:
        """Ends the current requests. It does not remember other names."""
        found = [self._ended[name] for name in body["request_ids"] if name in self._ended]
        for event in found:
            event.set()
        return {"status": "aborted", "aborted": len(found)}

    def _generate(self, body: dict[str, Any]) -> Any:
        ended = self._ended.setdefault(f"generate-tokens-{body['request_id']}", threading.Event())
        ids, parameters = list(body["token_ids"]), body["sampling_params"]
        generator = torch.Generator().manual_seed(parameters["seed"])
        assert parameters["top_p"] == 1 and parameters["top_k"] == 0 and parameters["ignore_eos"]
        content: list[dict[str, Any]] = []
        finish = "length"
        while len(content) < parameters["max_tokens"]:
            if len(content) == self.waits_at(body):
                assert ended.wait(60), "it is told to end a request that it waits with"
            if ended.is_set():
                finish = "abort"
                break
            with self._lock, torch.no_grad():
                log_probs = self._model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
            if parameters["temperature"]:
                scores = (log_probs / parameters["temperature"]).softmax(dim=-1)
                token = int(torch.multinomial(scores, 1, generator=generator))
            else:
                token = int(log_probs.argmax())
            ids.append(token)
            content.append({"token_id": token, "logprob": float(log_probs[token])})
            if token in parameters["stop_token_ids"]:
                finish = "stop"
                break
        tokens = [entry["token_id"] for entry in content]
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        answer = {"token_ids": tokens, "finish_reason": finish, "logprobs": {"content": content}}
        answer |= {"weight_versions": spans if tokens else []}
        self.answers.append((body, answer))
        return {"choices": [answer]}


def teach(folder: Path, ids: np.ndarray, *, steps: int = 60) -> None:
    """Train the folder's model until it knows a text by heart, and save it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
    model.save_pretrained(str(folder))
