"""Bytes that one step sends between the two jobs, or between the two models where they share ranks."""

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
"""A response token of the interface bytes, in half precision; measured, it depends on the pair a little."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one step with responses of full length."""

    requests: int
    """Token ids, student -> teacher."""
    answers: int
    """What the interface needs of the teacher."""
    logits: int
    """What the teacher's whole logits in float16 would be instead."""


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
    """teacher_labels, rows: labels of a response in the teacher's tokens, and those whose hidden state is
    wanted, or their likeliest tokens. value_bytes: of an entry of a hidden state."""
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
