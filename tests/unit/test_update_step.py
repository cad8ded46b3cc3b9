"""What an update reports of single samples."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_simct.parallel.packing import label_rows
from megatron_simct.update.step import _by_sample


def test_losses_of_labels_come_back_by_sample_whatever_the_lengths():
    rows = torch.from_numpy(label_rows([3, 2, 5], [1, 4, 0]))
    losses = torch.arange(5.0)
    found = _by_sample(SimpleNamespace(sample_ids=(7, 9, 2), label_rows=rows), losses)
    assert {sample_id: part.tolist() for sample_id, part in found.items()} == {7: [0], 9: [1, 2, 3, 4], 2: []}
