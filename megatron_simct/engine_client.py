"""HTTP client of one inference engine: a vLLM server in pooling mode, or one that generates.

    vllm serve MODEL --runner pooling --convert embed --pooler-config '{"task": "token_embed",
    "use_activation": false}'

`POST /pooling` takes token ids and answers the hidden state after the final norm of every one of them. An
answer counts only if it names the request, has a row for each token and holds finite numbers; anything else
is an EngineFault, and the request is asked again. `POST /v1/completions` of a server that generates says how
likely the ids of a prompt are.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import urllib3

EngineDtype = Literal["float32", "float16"]
LogprobField = Literal["prompt_logprobs", "echo"]
"""How to request a prompt's log-probabilities: by a field of vLLM, or by OpenAI's echo."""
_NUMPY: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_CONNECT_S = 5.0
_MAX_JSON_BYTES = 1 << 26
_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable with the engine's key, as vLLM itself reads it; it is sent if it is set."""


class EngineFault(RuntimeError):
    """The engine did not answer, or its answer is not valid. The request may be sent again."""


class EngineRefusal(ValueError):
    """The engine refuses the request, or its answer cannot be used; sending it again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What an engine reports about itself."""

    model: str
    root: str
    """The folder or repository that it was started with."""
    max_model_len: int | None
    version: str


class EngineClient:
    """One engine. Threads may share it."""

    def __init__(
        self, address: str, *, hidden_size: int = 0, dtype: EngineDtype = "float32", timeout_s: float = 120.0
    ) -> None:
        """timeout_s: for one answer, from the request to its last byte.

        ValueError for what is no HTTP address.
        """
        self.address = address.rstrip("/")
        url = urllib3.util.parse_url(self.address)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{address}: expected http://HOST:PORT")
        self._hidden_size, self._dtype, self._timeout_s = hidden_size, dtype, timeout_s
        self._http = urllib3.PoolManager(maxsize=16, retries=False)
        self._model = ""
        """The server's name of its model, cached."""
        key = os.environ.get(_KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def served(self) -> Served:
        """The model that the server serves, requested again."""
        answer = self.get("/v1/models")
        try:
            card = answer["data"][0]
            model, root, length = card["id"], card.get("root") or card["id"], card.get("max_model_len")
            if not (isinstance(model, str) and isinstance(root, str) and isinstance(length, int | None)):
                raise TypeError
        except (LookupError, TypeError, AttributeError):
            raise EngineFault(f"{self.address}/v1/models does not name a model") from None
        self._model = model
        try:
            version = self.get("/version").get("version")
        except EngineRefusal:
            raise
        except (EngineFault, AttributeError):
            version = None  # a server of another kind
        return Served(model=model, root=root, max_model_len=length, version=str(version)[:40])

    def hidden_states(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [n, H]: the hidden state after the final norm of each of the ids [n]."""
        name = uuid.uuid4().hex
        body = {
            "input": ids.tolist(),
            "task": "token_embed",
            "encoding_format": "bytes",
            "embed_dtype": self._dtype,
            "endianness": "little",
            "use_activation": False,
            "request_id": name,
        }
        numbers = _NUMPY[self._dtype]
        expected = len(ids) * self._hidden_size * numbers.itemsize
        data, headers = self._call("POST", "/pooling", body, limit=expected, headers={"X-Request-Id": name})
        self._check_metadata(headers.get("metadata"), name, len(ids))
        if len(data) != expected:
            raise EngineFault(f"{self.address} returned {len(data)} of {expected} bytes")
        hidden = torch.from_numpy(
            np.frombuffer(data, numbers).reshape(len(ids), self._hidden_size).astype(np.float32)
        )
        if not torch.isfinite(hidden).all():
            if self._dtype == "float16" and torch.isinf(hidden).any():
                raise EngineRefusal(
                    "--engine-hidden-dtype float16: a hidden state is beyond 65504, the largest number of "
                    "that type; use float32"
                )
            raise EngineFault(f"{self.address} returned numbers that are not finite")
        return hidden

    def token_log_probs(
        self, ids: np.ndarray, *, field: LogprobField = "prompt_logprobs", k: int = 0
    ) -> np.ndarray:
        """float64 [n - 1, 1 + 2k]: the log-probability of each id but the first, by a server that
        generates; then those of the k likeliest in its place, descending, and which these are. k needs the
        field prompt_logprobs.
        """
        assert not k or field == "prompt_logprobs", "an echo does not return ids"
        body = {
            "model": self._model or self.served().model,
            "prompt": ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
        }
        if field == "prompt_logprobs":
            body |= {"prompt_logprobs": k}
        else:
            body |= {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        answer = self.post("/v1/completions", body)
        try:
            choice = answer["choices"][0]
            rows = (
                _of_prompt(choice, ids.tolist(), k)
                if field == "prompt_logprobs"
                else _of_echo(choice, ids.tolist())
            )
            found = np.array(rows, dtype=np.float64).reshape(len(ids) - 1, 1 + 2 * k)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise EngineFault(
                f"{self.address}/v1/completions did not return {field} for the prompt's ids"
            ) from None
        if not (np.isfinite(found).all() and (found[:, : 1 + k] <= 1e-3).all()):
            raise EngineFault(
                f"{self.address}/v1/completions returned numbers that are not log-probabilities"
            )
        return found

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        return self._json("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST of JSON."""
        return self._json("POST", path, body)

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        data, _ = self._call(method, path, body, limit=_MAX_JSON_BYTES)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise EngineFault(f"{self.address}{path} did not answer JSON") from None

    def _check_metadata(self, text: str | None, name: str, count: int) -> None:
        """Raises EngineFault unless the answer belongs to this request."""
        try:
            metadata = json.loads(text or "")
            about, (item,) = str(metadata["id"]), metadata["data"]
            shape, dtype = item["shape"], item["embed_dtype"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise EngineFault(f"{self.address} returned hidden states without vLLM's metadata") from None
        if not about.endswith(name):
            raise EngineFault(f"{self.address} answered another request")
        if dtype != self._dtype or shape[:1] != [count]:
            raise EngineFault(f"{self.address} answered {dtype} {shape}, not {self._dtype} of {count} tokens")
        if shape[1:] != [self._hidden_size]:
            raise EngineRefusal(
                f"{self.address} returned hidden states of {shape[1:]} numbers, but config.json says "
                f"{self._hidden_size}"
            )

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        limit: int,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        """The body of a good answer and its headers, within the time and of at most `limit` bytes."""
        deadline = time.monotonic() + self._timeout_s
        try:
            response = self._http.request(
                method,
                self.address + path,
                json=body,
                headers=self._headers | dict(headers or {}),
                timeout=urllib3.Timeout(connect=min(_CONNECT_S, self._timeout_s), read=self._timeout_s),
                redirect=False,
                preload_content=False,
            )
            try:
                good = response.status == 200
                data = _read(response, deadline, limit if good else 1 << 14)
            finally:
                response.release_conn() if response.length_remaining == 0 else response.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EngineFault(f"{self.address}: {type(error).__name__}: {str(error)[:200]}") from None
        if not good:
            said = " ".join(data[:300].decode(errors="replace").split())
            kind = EngineRefusal if response.status in (400, 413, 422) else EngineFault
            raise kind(f"{self.address}{path} answered {response.status}: {said}")
        return data, response.headers


def _of_prompt(choice: Any, ids: list[int], k: int) -> list[list[float]]:
    """A row a token, of the field prompt_logprobs: it has a token's own id and the likeliest ones."""
    rows = []
    for row, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True):
        likeliest = sorted(((entry["logprob"], -int(name)) for name, entry in row.items()), reverse=True)[:k]
        rows.append(
            [row[str(token)]["logprob"], *(x for x, _ in likeliest), *(-name for _, name in likeliest)]
        )
    return rows


def _of_echo(choice: Any, ids: list[int]) -> list[float]:
    """A number a token, of the prompt's part of an echo; where tokens are named by id, they
    must be the prompt's.
    """
    found, tokens = choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]
    for token, expected in zip(tokens, ids, strict=False):
        named = token.removeprefix("token_id:")
        if named != token and int(named) != expected:
            raise ValueError("another prompt")
    if not len(ids) <= len(found) <= len(ids) + 1 or found[0] is not None:
        raise ValueError("another number of tokens")
    return found[1 : len(ids)]


def _read(response: urllib3.BaseHTTPResponse, deadline: float, limit: int) -> bytes:
    """The whole body. EngineFault where it is longer than `limit`, or comes too slowly."""
    parts: list[bytes] = []
    size = 0
    while part := response.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise EngineFault(f"{response.url}: an answer of more than {limit} bytes")
        if time.monotonic() > deadline:
            raise EngineFault(f"{response.url}: the answer was not complete in time")
    return b"".join(parts)
