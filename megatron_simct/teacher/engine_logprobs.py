"""A teacher behind a server that returns log-probabilities of a prompt's tokens, and no hidden states.

Such a server is one that generates, of vLLM, SGLang or anybody: OpenAI's /v1/completions with the prompt's
log-probabilities. That is enough where the loss reads the labels' own log-probabilities alone (`alm`,
`scalar`), and where the server also names the likeliest tokens of each place, for what compares these
(`topk_kl`, `partition`, `bpm`, `uld`). No head is read, and the folder of the teacher needs a configuration
and a tokenizer only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_simct.alignment import Tokenizer
from megatron_simct.engine_client import EngineClient, LogprobField, Served
from megatron_simct.records import ScoredPair
from megatron_simct.teacher.engine_front import MARGIN_NATS, SAME_NATS, probe_ids
from megatron_simct.teacher.engine_pool import Asked
from megatron_simct.teacher.forward import TeacherRequest


def rows_of(client: EngineClient, asked: Asked, *, field: LogprobField) -> torch.Tensor:
    """float64 [n, 1 + 2k]: in the row of each id the log-probability of the next one, those of the k
    likeliest that might come there, and which these are. The last row is 0."""
    found = client.token_log_probs(asked.ids, field=field, k=asked.work.request.topk)
    return torch.from_numpy(np.append(found, np.zeros((1, found.shape[1])), axis=0))


def score(requests: Sequence[TeacherRequest], rows: Sequence[torch.Tensor]) -> list[ScoredPair]:
    """One answer for each request. rows: those of its labels, as in rows_of.

    Log-probabilities are returned as logits with log-sum-exp 0, because only their difference is read.
    """
    scored = []
    for request, of_one in zip(requests, rows, strict=True):
        own, at = of_one[:, 0].float(), torch.from_numpy(request.rows.astype(np.int64))
        topk, ids = of_one[at, 1:].chunk(2, dim=1) if request.topk else (None, None)
        scored.append(
            ScoredPair(
                sample_id=request.sample_id,
                own_logit=own,
                lse=torch.zeros_like(own),
                hidden=None,
                topk=None if topk is None else topk.float(),
                topk_ids=None if ids is None or not request.token_ids else ids.int(),
            )
        )
    return scored


def serves(field: LogprobField, *, hidden: bool, topk: bool, byte_events: bool) -> bool:
    """Whether such a server can give the requested statistics."""
    return not (hidden or byte_events or (topk and field == "echo"))


def refusal(request: TeacherRequest, *, field: LogprobField) -> str | None:
    """The reason why a request cannot be answered; None if it can."""
    if serves(
        field, hidden=request.hidden, topk=bool(request.topk), byte_events=request.byte_side is not None
    ):
        return None
    return (
        f"--engine-answers {field}: the server gives log-probabilities of tokens, and this --simct-interface "
        "needs more; check_pair prints which it serves, and --engine-answers hidden_states serves all"
    )


class LogprobProbe:
    """Checks that a server knows the teacher's tokens, and that all servers serve the same model.

    Called by several threads.
    """

    def __init__(self, tokenizer: Tokenizer, *, field: LogprobField, text: str, where: str) -> None:
        """where: flag and folder, for errors."""
        self.ids = probe_ids(tokenizer, text)
        self._field, self._where, self._vocab_size = field, where, tokenizer.table.num_ids
        self.served: Served | None = None
        """The description of the first server that passed."""
        self.mean_nats = 0.0
        """The text's mean log-probability on that server."""

    def __call__(self, client: EngineClient) -> None:
        """EngineFault if the server does not answer, ValueError if it serves something else."""
        served = client.served()
        found = float(client.token_log_probs(self.ids, field=self._field)[:, 0].mean())
        if not found > MARGIN_NATS - math.log(self._vocab_size):
            raise ValueError(
                f"{client.address} serves {served.root}: a text of {len(self.ids)} tokens of {self._where} "
                f"has {found:.2f} nats a token there, which is chance; it has another tokenizer, or the text "
                "is nothing that it knows (--engine-probe-text gives another)"
            )
        if self.served is None:
            self.served, self.mean_nats = served, found
        elif abs(found - self.mean_nats) > SAME_NATS:
            raise ValueError(
                f"{client.address} serves {served.root}: the probe's text has {found:.3f} nats a token, and "
                f"had {self.mean_nats:.3f} with {self.served.root}; every server must serve the same model"
            )
