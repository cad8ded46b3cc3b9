"""Statistics and the placement of the teacher's rows, in one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_simct.losses import SharedColumns, gather_shared_head, label_statistics, logit_statistics
from tests.oracles.loss_cases import placement_of, random_case


def sample(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    hidden, weight = torch.tensor(rng.normal(size=(13, 7))), torch.tensor(rng.normal(size=(29, 7)) * 4)
    weight[25:] = 1e3  # padding that would be every maximum
    return hidden.to(dtype), weight.to(dtype), torch.tensor(rng.integers(0, 25, 13))


@pytest.mark.parametrize("chunks", [(4096, 4096), (5, 4), (1, 1), (13, 25)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_label_statistics_equal_the_dense_ones_for_any_tiling(chunks, cap) -> None:
    hidden, weight, labels = sample()
    own, lse = label_statistics(
        hidden,
        weight,
        labels,
        shard_start=0,
        vocab_size=25,
        group=None,
        logit_softcap=cap,
        row_chunk=chunks[0],
        column_chunk=chunks[1],
    )
    logits = hidden @ weight[:25].T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(own, logits[torch.arange(13), labels], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, torch.logsumexp(logits, 1), rtol=1e-13, atol=1e-13)


def test_label_statistics_of_bfloat16_are_float32_and_carry_no_gradient() -> None:
    hidden, weight, labels = sample(torch.bfloat16)
    own, lse = label_statistics(
        hidden.requires_grad_(), weight, labels, shard_start=0, vocab_size=25, group=None
    )
    assert own.dtype == lse.dtype == torch.float32 and not own.requires_grad
    logits = (hidden @ weight[:25].T).float()
    torch.testing.assert_close(own, logits[torch.arange(13), labels])
    torch.testing.assert_close(lse, torch.logsumexp(logits, 1))


def test_label_statistics_keep_no_more_than_one_tile(monkeypatch) -> None:
    hidden, weight, labels = sample()
    largest = 0
    linear = torch.nn.functional.linear

    def recorded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        tile = linear(a, b)
        largest = max(largest, tile.numel())
        return tile

    monkeypatch.setattr("megatron_simct.losses.vocab_parallel.linear", recorded)
    options = {"shard_start": 0, "vocab_size": 25, "group": None}
    label_statistics(hidden, weight, labels, row_chunk=4, column_chunk=6, **options)
    assert largest == 24


def test_label_statistics_of_nothing_and_of_nan() -> None:
    hidden, weight, labels = sample()
    options = {"shard_start": 0, "vocab_size": 25, "group": None}
    own, lse = label_statistics(hidden[:0], weight, labels[:0], **options)
    assert own.shape == lse.shape == (0,)
    weight[3, 2] = float("nan")
    assert label_statistics(hidden, weight, labels, column_chunk=2, **options)[1].isnan().all()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_statistics_of_logits_are_those_of_hidden_states_and_score_no_padding(cap) -> None:
    hidden, weight, labels = sample()
    options = {"shard_start": 0, "vocab_size": 25, "group": None, "logit_softcap": cap}
    own, lse = logit_statistics(hidden @ weight.T, labels, **options)
    expected = label_statistics(hidden, weight, labels, **options)
    torch.testing.assert_close((own, lse), expected, rtol=1e-13, atol=1e-13)
    assert lse.dtype == torch.float64


def test_statistics_of_logits_of_padding_alone() -> None:
    hidden, weight, labels = sample()
    own, lse = logit_statistics(hidden @ weight.T, labels, shard_start=25, vocab_size=25, group=None)
    assert (own == 0).all() and (lse == -float("inf")).all()


def test_teacher_columns_sum_the_mass_of_a_stop_set() -> None:
    for num_stops in (1, 2, 4):
        case = random_case(3, num_stops=num_stops)
        # A second many-to-one column, of another size than the stop set.
        ids = list(case.shared)
        merged = {ids[1]: case.shared[ids[1]] + case.shared[ids[2]]}
        case = replace(case, shared={i: rows for i, rows in case.shared.items() if i != ids[2]} | merged)
        placement = placement_of(case, 0, len(case.student_weight))
        log_q = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(1)
        columns = SharedColumns.from_placement(placement)
        rows = log_q[:, torch.from_numpy(placement.teacher_rows)]
        found = columns.join(rows, 0, len(placement.columns))
        offsets = placement.row_offsets
        for first, last in ((0, 1), (1, 4), (2, len(placement.columns))):
            part = columns.join(rows[:, offsets[first] : offsets[last]], first, last)
            torch.testing.assert_close(part, found[:, first:last])
        mass = [sum(log_q[:, t].exp() for t in case.shared[int(student)]) for student in placement.columns]
        torch.testing.assert_close(found.exp(), torch.stack(mass, dim=1))
        assert (columns.position[columns.student] == torch.arange(len(case.shared))).all()
        assert (columns.position >= 0).sum() == len(case.shared)


def test_one_process_takes_its_rows() -> None:
    case = random_case(3)
    placement = placement_of(case, 0, len(case.student_weight))
    head = gather_shared_head(case.teacher_weight, 0, placement)
    torch.testing.assert_close(head.weight, case.teacher_weight[torch.from_numpy(placement.teacher_rows)])


def test_invalid_placements_are_refused_with_their_numbers() -> None:
    case = random_case(3)
    placement = placement_of(case, 0, len(case.student_weight))
    offsets, rows = placement.row_offsets, placement.teacher_rows
    gap = offsets.copy()
    gap[1] = 0
    for changes, message in (
        ({"row_offsets": gap}, "smallest step 0"),
        ({"row_offsets": offsets[:-1]}, f"got {len(offsets) - 1} offsets"),
        ({"row_offsets": offsets + 1}, "from 1 to"),
        ({"columns": placement.columns[::-1]}, "must ascend, each student token once"),
        (
            {"columns": placement.columns.repeat(2)[: len(placement.columns)]},
            "must ascend, each student token once",
        ),
        ({"columns": placement.columns + len(case.student_weight)}, "real tokens of this shard"),
        ({"student_vocab_size": int(placement.columns[-1])}, "real tokens of this shard"),
        ({"teacher_rows": rows + len(case.teacher_weight)}, r"ids in \[0, 27\)"),
        ({"teacher_vocab_size": int(rows.max())}, rf"ids in \[0, {rows.max()}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_shared_head(case.teacher_weight, 0, replace(placement, **changes))
    with pytest.raises(ValueError, match="must start at id 0, not 4"):
        gather_shared_head(case.teacher_weight, 4, placement)
