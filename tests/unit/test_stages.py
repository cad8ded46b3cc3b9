"""Layers that the pre-flight proposes for pipeline stages, against every way of dividing the layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest

from megatron_simct.models.experts import Experts
from megatron_simct.preflight.stages import (
    even_stages,
    layer_operations,
    layout_text,
    loss_operations,
    unevenness,
)
from tests.unit.test_update_support import DENSE, LAYER, layers_of_stages, stages


@pytest.mark.parametrize("last", [0.0, 1.5, 4.0, 30.0])
@pytest.mark.parametrize("costs", [(1.0,) * 9, (1.0, 1.0, 5.0, 5.0, 1.0, 2.0, 2.0)])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_no_other_cut_has_less_in_its_fullest_stage(costs, last, number) -> None:
    found = even_stages(costs, last=last, stages=number)
    fullest = []
    for cuts in combinations_with_replacement(range(len(costs) + 1), number - 1):
        counts = [end - start for start, end in pairwise((0, *cuts, len(costs)))]
        if 0 not in counts[1:-1]:
            fullest.append(unevenness(counts, costs, last=last))
    assert sum(found) == len(costs) and len(found) == number and 0 not in found[1:-1]
    assert unevenness(found, costs, last=last) == pytest.approx(min(fullest))


def test_it_is_written_as_the_option_reads_it() -> None:
    for counts in ([2, 3, 1], [0, 5, 1], [3, 3, 0], [4, 1, 1]):
        text = layout_text(counts)
        assert layers_of_stages(DENSE, stages(pipeline_model_parallel_layout=text)) == counts, text


def test_operations_are_those_of_the_matrices() -> None:
    """By hand: attention 32 x (4 + 2 x 2) x 16 and 64 x 32, MLP 3 x 32 x 48, two norms."""
    weights = 32 * 128 + 64 * 32 + 3 * 32 * 48 + 64
    plain, again = (
        layer_operations(LAYER, hidden_size=32, tokens=10, computed_again=flag) for flag in (False, True)
    )
    assert (plain, again) == (6 * weights * 10, 8 * weights * 10)
    experts = replace(LAYER, mlp=Experts(count=8, width=48, chosen=2))
    routed = layer_operations(experts, hidden_size=32, tokens=10, computed_again=False)
    assert routed == plain + 6 * 10 * (3 * 32 * 48 + 8 * 32)  # one more MLP, and the router
    loss = loss_operations(hidden_size=32, vocab_size=100, teacher_rows=50, teacher_hidden_size=16, labels=7)
    assert loss == 7 * (8 * 100 * 32 + 4 * 50 * 16)
