"""Bytes that one step sends between the two jobs, or between the two models if they share ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.records import TeacherNeeds

LABEL_BYTES = 8
"""Own logit and log-sum-exp of a label, float32."""
LOGPROB_BYTES = 4
"""One of a row's likeliest tokens, float32."""
ID_BYTES = 4
"""Its id, int32."""
BYTE_EVENT_BYTES = 800
"""A response token of the interface bytes, in half precision. Measured; it depends a little on the pair."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one step with responses of full length."""

    requests: int
    """Token ids, student -> teacher."""
    answers: int
    """The teacher's answers, as the interface needs them."""
    logits: int
    """The teacher's full logits in float16, for comparison."""


def step_traffic(
    needs: TeacherNeeds,
    *,
    sequences: int,
    prompt_len: int,
    teacher_labels: int,
    rows: int,
    hidden_size: int,
    value_bytes: int,
    vocab_size: int,
) -> Traffic:
    """The traffic of one step. teacher_labels: labels of a response in the teacher's tokens. rows:
    those of them whose hidden state or likeliest tokens the interface needs. value_bytes: of one
    value of a hidden state.
    """
    if not needs.teacher:
        return Traffic(requests=0, answers=0, logits=0)
    answer = LABEL_BYTES * teacher_labels
    if needs.topk:
        answer += (LOGPROB_BYTES + ID_BYTES * needs.token_ids) * min(needs.topk, vocab_size) * rows
    elif needs.hidden_rows != "none":
        answer += value_bytes * hidden_size * rows
    if needs.byte_events:
        answer += BYTE_EVENT_BYTES * teacher_labels
    return Traffic(
        requests=4 * sequences * (prompt_len + teacher_labels),
        answers=sequences * answer,
        logits=2 * sequences * teacher_labels * vocab_size,
    )
