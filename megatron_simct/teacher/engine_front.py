"""The engine teacher: our wire on one side, an inference engine on the other, and the LM head between them.

An engine such as vLLM computes hidden states, with every architecture and quantisation that it serves. This
process holds only the LM head of the model. It keeps the rows that predict labels, and computes the same
statistics of them as a teacher that runs on Megatron (`LabelScorer`). For students both are the same.

Before any student is answered, `Probe` requests the hidden states of a fixed text: they must be outputs of
the final norm of this folder, and the text must be far more likely under its head than under a shuffled one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import TeacherConfig
from megatron_simct.engine_client import EngineClient, EngineFault, Served
from megatron_simct.losses import ByteOrder
from megatron_simct.losses.vocab_parallel import label_statistics
from megatron_simct.models.head import Head, load_head_rows, load_norm, read_head
from megatron_simct.records import ScoredPair
from megatron_simct.teacher.engine_pool import IN_FLIGHT, Asked, EnginePool
from megatron_simct.teacher.forward import HiddenDtype, LabelScorer, TeacherRequest
from megatron_simct.teacher.payload import scored_message
from megatron_simct.teacher.service import ReplicaServer

PROBE_TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius at sea "
    "level. There are seven days in a week and twelve months in a year. One, two, three, four, five, six, "
    "seven, eight, nine, ten. Paris is the capital of France, and London is the capital of England."
)
_MAX_PROBE_IDS = 256
_NORM_TOLERANCE = 0.05
"""The root mean square of a normed row is 1; rounding to 8 bits and an epsilon in the norm move it by less.
"""
MARGIN_NATS = 1.0
"""Nats a token by which the text must be more likely under the head than by chance: under a shuffled head, or
if all tokens were equally likely."""
SAME_NATS = 0.05
"""Largest difference between two runs of one model in reduced precision, of the mean
log-probability of the text.
"""


def open_head(
    config: TeacherConfig, tokenizer: Tokenizer, device: torch.device
) -> tuple[Head, LabelScorer, torch.Tensor | None]:
    """The head of --teacher-hf-checkpoint, a scorer of hidden states with it, and the norm's
    weight if it is known.

    Raises ValueError, naming the flag, for a folder of an unknown kind.
    """
    options, serving, flag = config.teacher, config.serving, "--teacher-hf-checkpoint"
    head = read_head(options.folder, flag=flag)
    count = tokenizer.table.num_ids
    dtype = torch.bfloat16 if serving.bf16 else torch.float32
    weight = load_head_rows(head, options.folder, np.arange(count), dtype=dtype, flag=flag)
    scorer = LabelScorer(
        weight=weight.to(device),
        shard_start=0,
        group=None,
        vocab_size=count,
        logit_softcap=head.final_logit_softcap,
        byte_order=ByteOrder.of(tokenizer.table, shard_start=0, shard_end=count, device=device),
        hidden_dtype=serving.teacher_hidden_dtype,
        hidden_scale=head.scale,
    )
    return head, scorer, load_norm(head, options.folder, flag=flag)


def probe_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [n]: BOS, if there is one, and the text's first tokens. Raises ValueError for too few."""
    ids = tokenizer.encode(text.encode())[:_MAX_PROBE_IDS]
    if len(ids) < 8:
        raise ValueError(f"--engine-probe-text: {len(ids)} tokens; at least 8 are needed")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(bos, np.int32), ids.astype(np.int32)])


class Probe:
    """Checks that an engine serves the model of the head. Called by several threads."""

    def __init__(
        self,
        head: Head,
        scorer: LabelScorer,
        tokenizer: Tokenizer,
        *,
        norm: torch.Tensor | None,
        text: str = PROBE_TEXT,
        where: str,
    ) -> None:
        """norm: weight of the norm before the head, if it is known. where: flag and folder, for errors."""
        self.ids = probe_ids(tokenizer, text)
        self._head, self._scorer, self._norm, self._where = head, scorer, norm, where
        self.served: Served | None = None
        """The description of the first engine that passed."""
        self.mean_nats = 0.0
        """The text's mean log-probability on that engine."""

    def __call__(self, client: EngineClient) -> None:
        """EngineFault if the engine does not answer, ValueError if it serves something else."""
        served = client.served()
        hidden = client.hidden_states(self.ids)
        self._check_norm(client, hidden)
        nats = self.log_probs(hidden)
        shuffled = self.log_probs(hidden, shuffled=True)
        found, other = float(nats.mean()), float(shuffled.mean())
        by_chance = max(other, -math.log(self._scorer.vocab_size))
        if not found > by_chance + MARGIN_NATS:
            raise ValueError(
                f"{client.address} serves {served.root}: a text of {len(nats)} tokens has {found:.2f} nats a "
                f"token under the head of {self._where}, and {other:.2f} under a shuffled one; the head is "
                "not this model's, or the text is nothing that it knows (--engine-probe-text gives another)"
            )
        if self.served is None:
            self.served, self.mean_nats = served, found
        elif abs(found - self.mean_nats) > SAME_NATS:
            raise ValueError(
                f"{client.address} serves {served.root}: the probe's text has {found:.3f} nats a token, and "
                f"had {self.mean_nats:.3f} with {self.served.root}; every engine must serve the same model"
            )

    def compare(self, client: EngineClient, checker: EngineClient) -> float:
        """The largest difference to the log-probabilities that a generating server of the model
        gives for the text.

        ValueError if it is more than reduced precision explains.
        """
        ours = self.log_probs(client.hidden_states(self.ids)).double().cpu().numpy()
        theirs = checker.token_log_probs(self.ids)[:, 0]
        difference = np.abs(ours - theirs)
        if not difference.mean() <= SAME_NATS:
            raise ValueError(
                f"--engine-check-endpoint {checker.address}: the probe's text has {theirs.mean():.3f} nats a "
                f"token there, and {ours.mean():.3f} by the hidden states of {client.address} under the head "
                f"of {self._where} (mean difference {difference.mean():.3f}); head, norm or model are not "
                "the same"
            )
        return float(difference.max())

    def log_probs(self, hidden: torch.Tensor, *, shuffled: bool = False) -> torch.Tensor:
        """[n - 1]: log-probabilities of the text's ids, without the first."""
        scorer = self._scorer
        labels = torch.from_numpy(self.ids[1:].astype(np.int64)).to(scorer.weight.device)
        if shuffled:
            order = torch.randperm(scorer.vocab_size, generator=torch.Generator().manual_seed(0))
            labels = order.to(labels.device)[labels]
        own, lse = label_statistics(
            hidden[:-1].to(scorer.weight) * scorer.hidden_scale,
            scorer.weight,
            labels,
            shard_start=0,
            vocab_size=scorer.vocab_size,
            group=None,
            logit_softcap=scorer.logit_softcap,
        )
        return own - lse

    def _check_norm(self, client: EngineClient, hidden: torch.Tensor) -> None:
        """Raises ValueError unless the rows are outputs of the final norm: divided by its weight they have a
        mean square of 1.
        """
        if self._norm is None:
            return
        for weight in (self._norm, 1 + self._norm):  # some norms multiply by 1 + weight
            used = weight.abs() > 1e-3 * weight.abs().max()
            normed = hidden[:, used] / weight[used]
            centred = normed - normed.mean(dim=1, keepdim=True)  # a LayerNorm subtracts the mean
            for rows in (normed, centred):
                sizes = rows.square().mean(dim=1).sqrt()
                if float((sizes.median() - 1).abs()) < _NORM_TOLERANCE:
                    return
        raise ValueError(
            f"{client.address}: its hidden states do not come out of the norm {self._head.norm} of "
            f"{self._where}; another model, another revision, or pooling that normalises (use_activation)"
        )


def wait_for_engine(
    clients: Sequence[EngineClient],
    probe: Callable[[EngineClient], None],
    *,
    minutes: float,
    stop: Callable[[], bool],
) -> EngineClient | None:
    """The first engine that passes the probe; None if `stop()` is true before. Raises ValueError if one
    serves another model, or none answers in time."""
    deadline, reported = time.monotonic() + 60 * minutes, False
    while not stop():
        for client in clients:
            try:
                probe(client)
            except EngineFault as fault:
                reason = str(fault)
            else:
                return client
        if time.monotonic() > deadline:
            raise ValueError(f"--engine-endpoint: no engine answered within {minutes:g} minutes; {reason}")
        if not reported:
            print(f" waiting for an engine: {reason}", flush=True)
            reported = True
        time.sleep(0.5)
    return None


def read_probe_text(path: str | None) -> str:
    """The text of --engine-probe-text, or the built-in one."""
    if path is None:
        return PROBE_TEXT
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--engine-probe-text {path}: cannot be read ({type(error).__name__})") from None


Score = Callable[[Sequence[TeacherRequest], Sequence[torch.Tensor]], list[ScoredPair]]
"""One answer for each request, from the engine's rows of its labels."""

Refused = Callable[[TeacherRequest], str | None]
"""The reason why a request cannot be answered; None if it can."""


def nothing(request: TeacherRequest) -> None:
    """Nothing is refused."""


def by_head(scorer: LabelScorer) -> Score:
    """Scores hidden states with the LM head of this process."""
    return lambda requests, rows: scorer.score(requests, torch.cat(list(rows)).to(scorer.weight))


def serve_engine(
    server: ReplicaServer,
    pool: EnginePool,
    score: Score,
    *,
    refused: Refused,
    replicas: int,
    max_tokens: int,
    hidden_dtype: HiddenDtype,
    stop: Callable[[], bool],
) -> None:
    """Answer requests until `stop()` is true. Then requests at engines are finished, the others handed back.

    An engine gets up to IN_FLIGHT requests, and as many wait in this process. Together they have at most
    max_tokens tokens for each of these places, but there is always at least one request.
    """
    places = 2 * IN_FLIGHT * replicas
    try:
        while not stop():
            room = places - pool.pending
            if room > 0:
                idle = room == places
                for work in server.take(max_tokens, wait_s=0.2 if idle else 0.0):
                    request = work.request
                    reason = refused(request)
                    if reason is not None:
                        server.refuse(work, reason)
                        continue
                    ids = np.concatenate([request.prompt_ids, request.label_ids])
                    pool.submit(Asked(ids=ids, begin=len(request.prompt_ids) - 1, work=work))
            _answer(server, pool.finished(wait_s=0.02 if room > 0 else 0.2), score, max_tokens, hidden_dtype)
        for asked in pool.stop():
            server.hand_back(asked.work)
        while pool.pending:
            _answer(server, pool.finished(wait_s=0.2), score, max_tokens, hidden_dtype)
    finally:
        server.drain()
        server.close()


def _answer(
    server: ReplicaServer, finished: Sequence[Asked], score: Score, max_tokens: int, hidden_dtype: HiddenDtype
) -> None:
    """Send the answers that engines have given, in batches of one kind; refuse or hand back the others."""
    batches: dict[bool, list[Asked]] = {False: [], True: []}
    for asked in finished:
        if asked.rows is not None:
            batches[asked.work.request.byte_side is not None].append(asked)
        elif asked.refused is not None:
            server.refuse(asked.work, asked.refused)
        else:
            server.hand_back(asked.work)
    for batch in batches.values():
        while batch:
            size, tokens = 0, 0
            while size < len(batch) and (not size or tokens + len(batch[size].ids) <= max_tokens):
                tokens += len(batch[size].ids)
                size += 1
            micro_batch, batch = batch[:size], batch[size:]
            requests = [asked.work.request for asked in micro_batch]
            rows = [
                asked.rows[: len(asked.work.request.label_ids)]
                for asked in micro_batch
                if asked.rows is not None
            ]
            answers = score(requests, rows)
            for asked, scored in zip(micro_batch, answers, strict=True):
                server.answer(asked.work, scored_message(asked.work.number, scored, hidden_dtype))
