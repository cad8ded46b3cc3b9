"""`scalar`: the teacher judges a chunk by one number, spread over the student's tokens as advantages.

A chunk is a segment of k student tokens. With L_T = sum log q over the teacher's own tokens of it,
l_i = log p_old of the student's, and L_S = sum l_i:

    dpca     A_i = (L_T / L_S - 1) l_i, at most ADVANTAGE_CLIP in size: the chunk's budget shared out in
             proportion (arXiv:2606.09456). Chunks of more than CHUNK_TOKENS student tokens, or that end
             inside a character, are left out.
    spread   A_i = L_T / k - l_i: the budget shared out evenly (MOPD-x of NeMo-RL)

and the loss is the policy-gradient term of each token (policy_gradient.py), with p_old of the sampling
policy. Nothing but the labels' own log-probabilities is read: no hidden states, no shared tokens.
"""

from __future__ import annotations

import torch

from megatron_simct.losses.policy_gradient import policy_gradient
from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.records import TeacherNeeds

ADVANTAGE_CLIP = 10.0
CHUNK_TOKENS = 6
LEAST = 1e-6
"""Nats: the least surprise of a chunk, which dpca divides by."""


def value(rows: Rows) -> RowValues:
    """[A]: the terms of each segment's tokens, added up."""
    old = rows.old_log_probs
    teacher, own = rows.total(rows.teacher_log_probs, "teacher"), rows.total(old, "student")
    dpca = rows.config.scalar == "dpca"
    # For each token of a chunk: a factor of its own log-probability, and a constant.
    factor = teacher / own.clamp(max=-LEAST) - 1 if dpca else -torch.ones_like(own)
    constant = torch.zeros_like(own) if dpca else teacher / rows.length("student")
    factor, constant = (rows.at_labels(torch.where(rows.used, side, 0)) for side in (factor, constant))
    advantages = factor * old + constant
    if dpca:
        advantages = advantages.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
        fits_chunk = rows.at_labels((rows.length("student") <= CHUNK_TOKENS).to(advantages.dtype))
        advantages = advantages * fits_chunk
    return RowValues(value=rows.total(policy_gradient(rows.log_probs, old, advantages), "student"))


SCALAR = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="none"),
    reads=frozenset({"scalar", "mask_whitespace", "stop_bridge"}),
    rows=lambda config: RowNeeds(first_rows=False, shared=False, dense="segments"),
    value=value,
)
