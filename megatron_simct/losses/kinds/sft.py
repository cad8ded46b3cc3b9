"""`sft`: cross entropy on given responses; no teacher, no segments."""

from __future__ import annotations

from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.records import TeacherNeeds


def value(rows: Rows) -> RowValues:
    """[N]: -log p of every label, times its weight."""
    weights = rows.labels.label_weights
    return RowValues(value=-rows.log_probs if weights is None else -rows.log_probs * weights)


SFT = Interface(
    needs=lambda config: TeacherNeeds(teacher=False, hidden_rows="none"),
    reads=frozenset(),
    rows=lambda config: RowNeeds(segments=False, units=False, first_rows=False, shared=False, dense="labels"),
    value=value,
)
