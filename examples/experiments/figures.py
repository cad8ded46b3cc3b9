"""One figure for each setting: every seed of every interface, and the student before distillation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.experiments.scoring import Metric, scores

INK = "#7d8590"
"""Legible on white and on black."""
COLOURS = ("#1f9e89", "#d97706")


def draw(
    name: str, results: dict[str, dict[int, dict[str, Any]]], metrics: Sequence[Metric], path: Path
) -> None:
    """Draw the first two metrics, one panel each, on a transparent background.

    The same results give the same bytes.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
    }
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(8, 0.6 + 0.28 * len(results)), sharey=True, layout="constrained"
    )
    places = range(len(results), 0, -1)
    every = [result for by_seed in results.values() for result in by_seed.values()]
    for axis, metric, colour in zip(axes, metrics[:2], COLOURS, strict=True):
        before = [scores(result, metric.name, before=True).mean() for result in every]
        axis.axvline(sum(before) / len(before), color=INK, linestyle="--", linewidth=1)
        for place, by_seed in zip(places, results.values(), strict=True):
            values = [scores(result, metric.name).mean() for result in by_seed.values()]
            axis.plot(
                values, [place] * len(values), "o", color=colour, alpha=0.75, markersize=6, markeredgewidth=0
            )
        axis.set_title(f"{metric.title} (dashed: before)", color=INK, fontsize=9)
        axis.tick_params(colors=INK)
        axis.grid(axis="x", color=INK, alpha=0.25)
        for side in axis.spines.values():
            side.set_color(INK)
        if metric.higher_is_better:
            axis.set_xlim(-0.02, 1.0)
    axes[0].set_yticks(list(places), list(results))
    axes[0].set_ylim(0.4, len(results) + 0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    os.replace(temporary, path)
