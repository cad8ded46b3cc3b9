"""The number of layers of each pipeline stage: the last one also has the LM head and the loss.

The costs are matrix products for a sequence of full length, forward and backward. A layer multiplies each
token three times with its weights, and four times if it is recomputed. In the head, every label costs four
products with the student's rows (logits in two passes, and two gradients) and two with the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_simct.models.experts import Experts
from megatron_simct.models.layers import Layer, Share


def layer_operations(layer: Layer, *, hidden_size: int, tokens: int, computed_again: bool) -> float:
    """Operations of one layer, in all tensor-parallel ranks together."""
    weights = layer.parameters(Share(hidden_size=hidden_size))
    if isinstance(layer.mlp, Experts):  # each token uses only some of them
        weights -= 3 * hidden_size * layer.mlp.width * (layer.mlp.count - layer.mlp.chosen)
    return (4 if computed_again else 3) * 2.0 * weights * tokens


def loss_operations(
    *, hidden_size: int, vocab_size: int, teacher_rows: int, teacher_hidden_size: int, labels: int
) -> float:
    """Operations of the LM head and the loss. teacher_rows: rows of the teacher's head; 0 if it
    sends no hidden states.
    """
    return 2.0 * labels * (4 * vocab_size * hidden_size + 2 * teacher_rows * teacher_hidden_size)


def even_stages(costs: Sequence[float], *, last: float, stages: int) -> list[int]:
    """The number of consecutive layers of each stage that makes the largest cost of a stage
    as small as possible.

    costs: of each layer. last: what the last stage does beside its layers. A stage between the ends has
    at least one layer.
    """
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """The largest cost among the stages from this one on, the sum of squares, and
        their numbers of layers.
        """
        if stage == stages - 1:
            does = ends[-1] - ends[start] + last
            return does, does**2, (len(costs) - start,)
        found = []
        for end in range(start + (0 < stage), len(costs) + 1):
            does = ends[end] - ends[start]
            most, squares, layers = best(stage + 1, end)
            found.append((max(most, does), squares + does**2, (end - start, *layers)))
        return min(found) if found else (float("inf"), float("inf"), ())

    return list(best(0, 0)[2])


def unevenness(layers: Sequence[int], costs: Sequence[float], *, last: float) -> float:
    """The largest cost of a stage, divided by the mean."""
    start, done = 0, []
    for count in layers:
        done.append(sum(costs[start : start + count]))
        start += count
    done[-1] += last
    return max(done) * len(done) / sum(done)


def layout_text(layers: Sequence[int]) -> str:
    """The value of --pipeline-model-parallel-layout."""
    stages = ["" if count == 0 else "t" if count == 1 else f"t*{count}" for count in layers]
    return f"E{'|'.join(stages)}L"
