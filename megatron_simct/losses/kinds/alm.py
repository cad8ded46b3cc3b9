"""`alm`: one event for each segment, "the model writes these bytes" (arXiv:2503.20083).

With a and b the teacher's and the student's surprise at a segment, -sum log p over its own tokens (nats, at
least FLOOR): tau times the KL of that event in both models, of probability e^(-a / tau) and e^(-b / tau). At
tau = inf that is (b - a) - a log(b / a).

It reads the labels' log-probabilities alone, so it does not compare texts that were not sampled.
"""

from __future__ import annotations

import math

import torch

from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.records import TeacherNeeds

FLOOR = 1e-6
"""Nats: the least surprise of a segment, which the loss divides by."""


def value(rows: Rows) -> RowValues:
    """[A]"""
    a = -rows.total(rows.teacher_log_probs, "teacher").clamp(max=-FLOOR)
    b = -rows.total(rows.log_probs, "student").clamp(max=-FLOOR)
    a, b = (torch.where(rows.used, side, 1) for side in (a, b))
    tau = rows.config.alm_temperature
    if math.isinf(tau):
        return RowValues(value=(b - a) - a * (b / a).log())
    # At a large tau the events are nearly certain: 1 - e^(-x / tau) and differences of such would be rounded
    # away.
    not_t, not_s = -torch.expm1(-a / tau), -torch.expm1(-b / tau)
    return RowValues(value=(-a / tau).exp() * (b - a) + tau * not_t * (not_t / not_s).log())


ALM = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="none"),
    reads=frozenset({"alm_temperature", "unit_weight", "mask_whitespace", "stop_bridge"}),
    rows=lambda config: RowNeeds(first_rows=False, shared=False, dense="segments"),
    value=value,
)
