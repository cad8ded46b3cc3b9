"""Responses by a vLLM server: token ids in, ids and log-probabilities out; weights through a shared folder.

    vllm serve STUDENT_DIR --enable-scale-out --generation-config vllm      with VLLM_SERVER_DEV_MODE=1

After each optimizer step the weights are written as a Hugging Face folder, the server reads it
(`reload_weights`), drops its cache of prefixes, and gets the label of the version. Every answer names the
version that has sampled each of its tokens. An answer with another version, for example of a restarted
server, is discarded.

Responses are passed on as they finish. A caller that needs no more of them stops the server, and can continue
the unfinished responses in a later call (rollout/oversampling.py).

The training weights score the first ones of every call before any is passed on: if the two models'
log-probabilities differ by more than a bound, the weights are sent again; if that does not help, the run
stops with an error that names the tensors that differ on the server.

A draw depends on the server, not on seed and sample id alone, as with MegatronEngine.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_simct.engine_client import EngineClient, EngineFault, EngineRefusal
from megatron_simct.parallel.disk import raise_together
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import Sampling

IN_FLIGHT = 64
"""Concurrent requests of one model replica of the student; the server batches them."""
CHECKED = 4
"""Responses of each call that the training weights score too, before any of the call is passed on."""
_DRAWS = 20
"""Most draws of a response with an id that the tokenizer does not have: a head may have more rows."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_CUT_AGAIN_S = 0.2
_PREFIX = "generate-tokens-"
"""vLLM puts this before the name of a request."""
_NAMED = 5
"""Most tensors that an error names."""

_NO_PROMPT = Prompt(sample_id=0, student_ids=np.zeros(1, np.int32), teacher_ids=np.zeros(0, np.int32))
_NO_RESPONSE = Rollout(
    sample_id=0,
    weight_version=0,
    student_ids=np.zeros(1, np.int32),
    logprobs=np.zeros(1, np.float32),
    finish="length",
)
"""Dummy sample of a replica without prompts, while others that share experts with it score theirs."""

LogProbs = Callable[[Sequence[Prompt], Sequence[Rollout]], list[np.ndarray]]
"""The training weights' log-probabilities of responses.

Collective over one model replica; on the last stage only.
"""


class VllmEngine:
    """See RolloutEngine. Each data-parallel replica uses one of the servers."""

    def __init__(
        self,
        clients: Sequence[EngineClient],
        groups: Groups,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        write_weights: Callable[[int], str],
        log_probs: LogProbs,
        bound_nats: float,
        timeout_s: float,
    ) -> None:
        """write_weights: writes the weights of a version as a folder and returns it; collective over the
        whole job.

        bound_nats: largest mean difference between a response's log-probabilities and those of the training
        weights. timeout_s: how long to wait for a server that has gone.
        """
        self._clients, self._groups = clients, groups
        self._client = clients[groups.dp_rank % len(clients)]
        self._vocab_size, self._stop_ids = vocab_size, tuple(stop_ids)
        self._write_weights, self._log_probs = write_weights, log_probs
        self._bound_nats, self._timeout_s = bound_nats, timeout_s
        self._version, self._folder = 0, ""
        run = [uuid.uuid4().hex[:12]]  # part of the label of versions: servers may have served another run
        dist.broadcast_object_list(run, src=0)
        self._run = run[0]
        self._comparable: set[str] | None = None
        """Names of the tensors that the server held exactly as sent, the first time."""
        self._lock = threading.Lock()
        self._outages = 0

    @property
    def _label(self) -> str:
        """The label of the weights that the server should have."""
        return f"{self._run}-{self._version}"

    def publish(self, weight_version: int) -> None:
        """Send the weights to the server.

        Collective over the whole job. ValueError if a server does not take them.
        """
        self._folder = self._write_weights(weight_version)
        self._version = weight_version
        problem = None
        if self._groups.is_first_rank:
            try:
                for client in self._clients:
                    self._until_it_answers(client)
            except (EngineFault, EngineRefusal) as error:
                problem = f"--rollout-engine-endpoint: {error}"
        raise_together(problem)
        if self._comparable is None:
            # Tensors that differ now have another memory layout: a CPU's kernels pack matrices.
            self._comparable = self._on_the_rank_that_asks(self._as_sent) or set()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One Rollout a prompt, in their order. Collective over one model replica."""
        found = {rollout.sample_id: rollout for some in self.stream(prompts, sampling) for rollout in some}
        return [found[prompt.sample_id] for prompt in prompts]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[Rollout]]:
        """See StreamingEngine."""
        return self.race(prompts, sampling, begun={}, least=len(prompts), is_enough=lambda: False)

    def race(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        begun: Mapping[int, Rollout],
        least: int,
        is_enough: Callable[[], bool],
    ) -> Iterator[list[Rollout]]:
        """See RacingEngine."""
        of = {prompt.sample_id: prompt for prompt in prompts}
        enough = min(CHECKED, len(prompts), least)
        for attempt in range(2):
            held: list[Rollout] = []
            checked = False
            with self._asked(prompts if enough else [], sampling, begun) as requests:
                for some in requests.answers() if enough else [[]]:
                    held += some
                    if not checked and len(held) >= enough:
                        first = held[:enough]
                        gap = self._gap([of[rollout.sample_id] for rollout in first], first, begun)
                        if not gap <= self._bound_nats:
                            requests.cut()  # no need to wait for the rest, which is sampled again
                            break
                        checked = True
                    if checked:
                        yield held
                        held = []
                        if is_enough():
                            yield requests.cut()
                            return
                else:
                    return
            if attempt == 0:  # the server may not have the weights whose label it reports
                self._on_the_rank_that_asks(lambda: self._load(self._client))
        self._refuse(
            f"log-probabilities of its responses differ from the training weights' by {gap:.3f} nats"
        )

    def check_step(self, mean: float, largest: float) -> None:
        """ValueError if a step's responses were not sampled by the weights that are trained. On all ranks.

        mean, largest: of the differences between the log-probabilities in sampling and in training.
        """
        if not mean <= self._bound_nats:
            self._refuse(
                f"the log-probabilities of a step's responses differ from those in training by {mean:.3f} "
                f"nats (at most {largest:.3f})"
            )

    def _refuse(self, what: str) -> None:
        differences = self._on_the_rank_that_asks(self._what_differs) or ""
        raise ValueError(
            f"--rollout-engine-endpoint {self._client.address}: {what} in the mean, --rollout-logprob-bound "
            f"is {self._bound_nats:g}; {differences}"
        )

    def _what_differs(self) -> str:
        """The tensors that differ on the server from those that were sent, as far as it reports them."""
        precision = "it computes in another precision, or another model than the training"
        found = self._as_sent()
        if found is None or not self._comparable:
            return (
                f"it does not report its tensors: other weights than those of {self._folder}, or {precision}"
            )
        same, count = found & self._comparable, len(self._comparable)
        differ = sorted(self._comparable - same)
        if not differ:
            return f"the {count} comparable tensors are as they were sent, so others differ, or {precision}"
        names = ", ".join(differ[:_NAMED]) + (", ..." if len(differ) > _NAMED else "")
        return (
            f"{len(differ)} of {count} comparable tensors differ on the server from {self._folder}: {names}"
        )

    def _as_sent(self) -> set[str] | None:
        """Names of the tensors that the server holds exactly as sent; None if it does not report them."""
        try:
            checksums = self._client.post("/weight_checker", {"action": "checksum"})["checksums"]
            return equal_digests(checksums, digests_of(self._folder))
        except (EngineFault, EngineRefusal, LookupError, TypeError, AttributeError, OSError):
            return None

    @contextmanager
    def _asked(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[int, Rollout]
    ) -> Generator[_Requests]:
        """Requests for responses, or for the rest of begun responses; unread answers are dropped."""
        pool = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="vllm")
        requests = _Requests(self._client, self._on_the_rank_that_asks, len(prompts))
        if self._groups.writes_samples:
            for prompt in prompts:
                prefix = begun.get(prompt.sample_id)
                requests.waiting.add(pool.submit(self._ask, prompt, sampling, prefix, requests))
        try:
            yield requests
        finally:
            pool.shutdown(cancel_futures=True)

    def _on_the_rank_that_asks(self, action: Callable[[], Any]) -> Any:
        """Run action() on one rank of the replica; all ranks return its result or raise its error."""
        outcome: list[Any] = [None, None]
        if self._groups.writes_samples:
            try:
                outcome = [None, action()]
            except (EngineFault, EngineRefusal, ValueError) as error:
                outcome = [f"--rollout-engine-endpoint: {error}", None]
        for group in (self._groups.tp, self._groups.pp):
            if group.size() > 1:
                dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
        if outcome[0] is not None:
            raise ValueError(outcome[0])
        return outcome[1]

    def _gap(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], begun: Mapping[int, Rollout]
    ) -> float:
        """The largest mean difference of a response's log-probabilities, on every rank of the replica and of
        all replicas that share experts with it: these compute together, so all must repeat it, or none.

        begun: the parts of responses that other weights sampled; they are not compared.
        """
        if not rollouts:
            prompts, rollouts = [_NO_PROMPT], [_NO_RESPONSE]
        ours = self._log_probs(prompts, rollouts)  # nothing but on the last stage
        gaps = []
        for own, rollout in zip(ours, rollouts, strict=False):
            prefix = begun.get(rollout.sample_id)
            gaps.append(float(np.abs(own - rollout.logprobs)[_length(prefix) :].mean()))
        gap = torch.tensor(
            0.0 if rollouts[0] is _NO_RESPONSE else max(gaps, default=0.0), device=self._groups.device
        )
        if self._groups.passes_together:
            dist.all_reduce(gap, op=dist.ReduceOp.MAX, group=self._groups.exchange)
        shared = [float(gap)]
        for group in (self._groups.tp, self._groups.pp):
            if group.size() > 1:
                source = dist.get_global_rank(group, group.size() - 1)
                dist.broadcast_object_list(shared, src=source, group=group)
        return shared[0]

    def _ask(
        self, prompt: Prompt, sampling: Sampling, prefix: Rollout | None, requests: _Requests
    ) -> Rollout | None:
        """One response; an unfinished one, or None, once the requests are cut. A server that dies or sends
        invalid answers costs only time, up to timeout_s.

        prefix: the part of the response that was sampled before.
        """
        deadline = time.monotonic() + self._timeout_s
        draw = 0
        while not requests.are_cut:
            outages = self._outages
            try:
                with requests.named() as name:
                    rollout = self._answer(prompt, sampling, draw, prefix, name)
                if rollout.finish == "open" and not requests.are_cut:
                    raise EngineFault(f"{self._client.address} aborted a response that is still needed")
                if rollout.student_ids.max(initial=0) < self._vocab_size:
                    return rollout if len(rollout.student_ids) else None
                draw += 1
                if draw == _DRAWS:
                    raise EngineRefusal(
                        f"{self._client.address} sampled ids past the tokenizer's {self._vocab_size} in "
                        f"{draw} draws of sample {prompt.sample_id}: rows of the head that belong to no "
                        "token are likely"
                    )
            except EngineFault as fault:
                if time.monotonic() > deadline:
                    raise EngineFault(f"sample {prompt.sample_id} has no answer: {fault}") from None
                with self._lock:
                    if self._outages == outages:  # only the first thread of this outage
                        self._until_it_answers(self._client)
                        self._outages += 1
        return prefix

    def _until_it_answers(self, client: EngineClient) -> None:
        """Wait for the server and send it the weights. Raises EngineFault after timeout_s."""
        deadline, wait_s = time.monotonic() + self._timeout_s, _FIRST_WAIT_S
        while True:
            try:
                self._load(client)
                return
            except EngineFault:
                if time.monotonic() > deadline:
                    raise
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _load(self, client: EngineClient) -> None:
        client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": self._folder}})
        if client.post("/reset_prefix_cache", {}) != {"success": True}:
            raise EngineFault(f"{client.address} still holds its cache of prefixes")
        client.post("/update_weight_version", {"new_version": self._label})

    def _answer(
        self, prompt: Prompt, sampling: Sampling, draw: int, prefix: Rollout | None, name: str
    ) -> Rollout:
        length = _length(prefix)
        limit = sampling.max_response_len - length
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(0, sampling.top_k),
            "max_tokens": limit,
            "stop_token_ids": list(self._stop_ids),
            "ignore_eos": True,  # of generation_config.json; ours are those above
            "logprobs": 0,
            "detokenize": False,
            "seed": (sampling.seed * 1_000_003 + prompt.sample_id + 7_919 * draw + 104_729 * length)
            % (1 << 31),
        }
        tokens = prompt.student_ids.tolist() + ([] if prefix is None else prefix.student_ids.tolist())
        body = {"request_id": name, "token_ids": tokens, "sampling_params": parameters}
        answer = self._client.post("/inference/v1/generate", body)
        try:
            (choice,) = answer["choices"]
            ids = np.array(choice["token_ids"], np.int64)
            content = choice["logprobs"]["content"]
            logprobs = np.array([entry["logprob"] for entry in content], np.float32)
            same = [entry["token_id"] for entry in content] == ids.tolist()
            finish = choice["finish_reason"]
            versions = {span["version"] for span in choice["weight_versions"] or [{"version": None}]}
        except (LookupError, TypeError, ValueError):
            raise EngineFault(
                f"{self._client.address} answered no token ids with log-probabilities"
            ) from None
        if finish == "abort" and not len(ids):  # the server had not begun it
            return replace(prefix or _empty_rollout(prompt.sample_id), finish="open")
        if versions != {self._label}:
            raise EngineFault(
                f"{self._client.address} sampled with other weights than those that it was handed"
            )
        stops = np.isin(ids, self._stop_ids)
        is_valid = (
            same
            and 0 < len(ids) <= limit
            and ids.min() >= 0
            and np.isfinite(logprobs).all()
            and not stops[:-1].any()
            and {
                "stop": bool(stops[-1]),
                "length": not stops[-1] and len(ids) == limit,
                "abort": True,
            }.get(finish, False)
        )
        if not is_valid:
            raise EngineFault(
                f"{self._client.address} answered a response that is cut, or ends as it may not"
            )
        if finish == "abort":  # perhaps after its last token
            if stops[-1]:
                finish = "stop"
            else:
                finish = "length" if len(ids) == limit else "open"
        before = prefix or _empty_rollout(prompt.sample_id)
        return Rollout(
            sample_id=prompt.sample_id,
            weight_version=self._version if prefix is None else prefix.weight_version,
            student_ids=np.concatenate([before.student_ids, ids.astype(np.int32)]),
            logprobs=np.concatenate([before.logprobs, logprobs]),
            finish=finish,
        )


class _Requests:
    """The requests of one call. One rank of a replica sends them, and all ranks get the answers."""

    def __init__(self, client: EngineClient, share: Callable[[Callable[[], Any]], Any], count: int) -> None:
        """share: see VllmEngine._on_the_rank_that_asks. count: responses in all."""
        self._client, self._share, self._left = client, share, count
        self.waiting: set[Future[Rollout | None]] = set()
        """On the rank that sends them."""
        self.are_cut = False
        self._names: set[str] = set()
        """Names of the requests that were sent and not answered."""

    @contextmanager
    def named(self) -> Generator[str]:
        """A name for one request, as long as it lasts."""
        name = uuid.uuid4().hex
        self._names.add(name)
        try:
            yield name
        finally:
            self._names.discard(name)

    def answers(self) -> Iterator[list[Rollout]]:
        """All responses, as they come."""
        while self._left:
            found = self._share(self._wait_for_some)
            assert found is not None, "every rank has the answers"
            self._left -= len(found)
            yield found

    def cut(self) -> list[Rollout]:
        """Abort the other requests. Returns responses that have just finished, and the unfinished ones."""
        found = self._share(self._abort_rest)
        assert found is not None, "every rank has the answers"
        return found

    def _wait_for_some(self) -> list[Rollout]:
        done, rest = wait(self.waiting, return_when=FIRST_COMPLETED)
        self.waiting.intersection_update(rest)
        rollouts = [future.result() for future in done]
        return [rollout for rollout in rollouts if rollout is not None]

    def _abort_rest(self) -> list[Rollout]:
        self.are_cut = True
        asked = [future for future in self.waiting if not future.cancel()]
        rest: Collection[Future[Rollout | None]] = asked
        while rest:  # a request may reach the server after the first abort
            with suppress(EngineFault, EngineRefusal):
                names = [f"{_PREFIX}{name}" for name in list(self._names)]
                if names:
                    self._client.post("/abort_requests", {"request_ids": names})
            rest = wait(rest, timeout=_CUT_AGAIN_S).not_done
        rollouts = [future.result() for future in asked]
        return [rollout for rollout in rollouts if rollout is not None]


def _length(prefix: Rollout | None) -> int:
    return 0 if prefix is None else len(prefix.student_ids)


def _empty_rollout(sample_id: int) -> Rollout:
    return Rollout(
        sample_id=sample_id,
        weight_version=-1,
        student_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish="open",
    )


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that vLLM concatenates by rows."""


def held_whole(checksums: Mapping[str, str]) -> dict[str, set[str]]:
    """Name -> SHA-256 of the bytes of each tensor that no rank has a part of: one, or several
    if replicas differ.

    checksums: "dpD:ppP:pcpC:tpT:NAME" -> SHA-256. A tensor that ranks of one replica hold otherwise is one
    that they share.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for key, digest in checksums.items():
        place, _, name = key.rpartition(":")
        found.setdefault(name, {}).setdefault(place.partition(":")[0], set()).add(digest)
    return {
        name: set.union(*replicas.values())
        for name, replicas in found.items()
        if all(len(digests) == 1 for digests in replicas.values())
    }


def equal_digests(checksums: Mapping[str, str], sent: Mapping[str, str]) -> set[str]:
    """Names of the tensors that a server holds exactly as sent; others may have another memory layout."""
    held = held_whole(checksums)
    return {name for name, digest in sent.items() if held.get(name) == {digest}}


def digests_of(folder: str) -> dict[str, str]:
    """SHA-256 of the tensors of a folder, by the names that the server has for them."""
    return dict(_digests(_tensors(folder)))


def _tensors(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                yield name, file.get_tensor(name)


def _digests(sent: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
    """SHA-256 of each tensor, and of those that are held as one, by the names that the
    server has for them.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sent:
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        fused = next((one for one, parts_of in _FUSED.items() if last in parts_of), None)
        if fused is None:
            yield name, _sha256([tensor])
            continue
        target = f"{parent}.{fused}.{kind}"
        there = parts.setdefault(target, {})
        there[last] = tensor
        if len(there) == len(_FUSED[fused]):
            yield target, _sha256([there[one] for one in _FUSED[fused]])
            del parts[target]


def _sha256(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
