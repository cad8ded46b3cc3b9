"""`reward`: no comparison, no teacher, no segments.

What trains is the policy-gradient term of --reward (policy_gradient.py), which other interfaces may have too.
"""

from __future__ import annotations

from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.records import TeacherNeeds


def value(rows: Rows) -> RowValues:
    """[N]: nothing."""
    return RowValues(value=0 * rows.log_probs)


REWARD = Interface(
    needs=lambda config: TeacherNeeds(teacher=False, hidden_rows="none"),
    reads=frozenset(),
    rows=lambda config: RowNeeds(segments=False, units=False, first_rows=False, shared=False, dense="labels"),
    value=value,
)
