"""Shows a run: curves of its metrics, and some of its responses with the loss of every unit.

    python tools/plot_run.py RUN_DIR                      writes RUN_DIR/report.html
    python tools/plot_run.py RUN_DIR --png curves.png     and a picture of the curves

RUN_DIR is the --run-dir of a run, finished or not. The command reads metrics.jsonl, and samples.jsonl and
config.yaml if they exist. The page needs no other file and no network, and follows the browser's light or
dark mode. It needs matplotlib (the extra `report`)."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_simct.config.command_line import Parser, command
from megatron_simct.files import write_whole

INK, LINE = "#26262b", "#dedcd5"
"""Colours of text and grid in a drawing; in the page they become those of the reader's mode."""
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e77", "#b0529c", "#8a8f98", "#c94f4f")
"""Legible on light and on dark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One drawing: metrics of one unit over the iterations."""

    title: str
    unit: str
    series: dict[str, str]
    """Name in metrics.jsonl -> its label."""
    kind: str = "step"
    stacked: bool = False
    whole: bool = False
    """Whether the axis is that of shares, 0 to 1."""


PANELS = (
    Panel(
        title="Loss",
        unit="nats",
        series={
            "loss": "whole, a label",
            "loss_one_to_one": "1:1, a row",
            "loss_unit": "unit, a row",
            "loss_stop": "stop, a row",
            "loss_bytes": "a byte position",
        },
    ),
    Panel(
        title="Surprise at the student's text",
        unit="nats a byte",
        series={"student_nats_per_byte": "student", "teacher_nats_per_byte": "teacher"},
    ),
    Panel(
        title="Held-out accuracy",
        unit="share",
        kind="evaluation",
        whole=True,
        series={"greedy_accuracy": "greedy", "sampled_accuracy": "sampled"},
    ),
    Panel(
        title="Bytes that are compared",
        unit="share",
        stacked=True,
        whole=True,
        series={"coverage_one_to_one": "in 1:1 positions", "coverage_unit": "in units"},
    ),
    Panel(
        title="Probability that is not compared",
        unit="share",
        whole=True,
        series={
            "student_mass_outside_u": "student",
            "teacher_mass_outside_u": "teacher",
            "bytes_student_unresolved": "student's unresolved mass",
            "bytes_teacher_unresolved": "teacher's unresolved mass",
            "bytes_student_rest": "student's rest",
            "bytes_teacher_rest": "teacher's rest",
        },
    ),
    Panel(title="Length of a response", unit="tokens", series={"response_length": "mean"}),
    Panel(
        title="Responses",
        unit="share",
        whole=True,
        series={
            "stop_rate": "stopped",
            "top1_agreement": "same likeliest token",
            "canonical_rollouts": "canonical",
        },
    ),
    Panel(
        title="Time of a step",
        unit="seconds",
        stacked=True,
        series={
            "seconds_rollout": "rollout",
            "seconds_alignment": "alignment",
            "seconds_teacher": "teacher",
            "seconds_update": "update",
        },
    ),
    Panel(title="Gradient norm before clipping", unit="", series={"grad_norm": "norm"}),
    Panel(title="Memory of the first rank, peak", unit="GiB", series={"peak_memory_gib": "so far"}),
)


# What a run left


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file up to its end, or to a line that a kill cut off; ValueError for
    another kind of file.
    """
    rows: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start}: not a file that a run has written"
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if rows:
                break
            raise ValueError(
                f"{path}: line {number} is not JSON: not a file that a run has written"
            ) from None
        if not isinstance(row, dict) or "iteration" not in row or "kind" not in row:
            raise ValueError(
                f"{path}: line {number} has no iteration and kind: not a file that a run has written"
            )
        rows.append(row)
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The same of the file of responses."""
    rows = read_lines(path)
    if not all({"sample_id", "finish", "prompt", "units"} <= row.keys() for row in rows):
        raise ValueError(f"{path}: has rows that are not responses: not a file that a run has written")
    return rows


def values_of(rows: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a metric, where it has one."""
    found = [(row["iteration"], row[name]) for row in rows if row["kind"] == kind and name in row]
    return [iteration for iteration, _ in found], [value for _, value in found]


def headline(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What one wants to know first: a name, the value at the end, and that of the beginning."""
    wanted = (
        ("step", "loss", "loss, nats a label"),
        ("step", "student_nats_per_byte", "student, nats a byte"),
        ("step", "teacher_nats_per_byte", "teacher, nats a byte"),
        ("evaluation", "greedy_accuracy", "greedy accuracy"),
        ("evaluation", "sampled_accuracy", "sampled accuracy"),
        ("step", "stop_rate", "responses that stop"),
    )
    found = []
    for kind, name, label in wanted:
        _, values = values_of(rows, kind, name)
        if values:
            found.append((label, f"{values[-1]:.3f}", f"{values[0]:.3f}"))
    return found


# Drawings


def draw(axes: Any, panel: Panel, rows: Sequence[dict[str, Any]]) -> bool:
    """Fill the axes; whether there was anything to draw."""
    curves = [(label, *values_of(rows, panel.kind, name)) for name, label in panel.series.items()]
    curves = [(label, x, y) for label, x, y in curves if x]
    if not curves:
        return False
    if panel.stacked:
        common = sorted(set.intersection(*(set(x) for _, x, _ in curves)))
        heights = [[dict(zip(x, y, strict=True))[i] for i in common] for _, x, y in curves]
        axes.stackplot(common, heights, labels=[label for label, _, _ in curves], colors=COLOURS, alpha=0.85)
    for colour, (label, x, y) in zip(COLOURS, curves if not panel.stacked else (), strict=False):
        if len(x) > 60:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
        marker = "o" if len(x) <= 30 else None
        axes.plot(x, smoothed(y), color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=label)
    if panel.whole:
        axes.set_ylim(0, 1.02)
    elif panel.stacked or min(min(y) for _, _, y in curves) >= 0:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(panel.unit, color=INK)
    axes.set_xlabel("iteration", color=INK)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_color(LINE)
    if len(curves) > 1:
        below = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.2), "ncols": 2 if len(curves) > 3 else 3}
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.2, columnspacing=1.4, **below)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of a window around each value, where there are many."""
    half = len(values) // 60
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def as_svg(panel: Panel, rows: Sequence[dict[str, Any]]) -> str | None:
    """A drawing for the page, whose text and grid take the colours of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.3))
    # At the same place in every drawing: frames stand in line whatever their labels.
    if not draw(figure.add_axes((0.13, 0.28, 0.85, 0.63)), panel, rows):
        return None
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--line)")


def write_png(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """All drawings in one picture."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(values_of(rows, panel.kind, name)[0] for name in panel.series)]
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.4 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        draw(axes, panel, rows)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format=picture_format(path))
    write_whole(path, picture.getvalue())


def picture_format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"


# The page


def unit_of(unit: dict[str, Any], scale: float) -> dict[str, Any]:
    """A unit of a sample as the page shows it; `share` of the darkest colour."""
    return {
        "text": "".join(unit["student"]),
        "compared": bool(unit["teacher"]) or unit["loss"] != 0,
        "share": round(min(1.0, max(0.0, unit["loss"] / scale)), 3),
        "detail": f"{unit['loss']:.4f} nats\nstudent  {' · '.join(unit['student'])}\nteacher  "
        + (" · ".join(unit["teacher"]) or "in no unit"),
    }


def page(
    run_dir: Path, rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], config: str
) -> str:
    import jinja2
    import yaml

    losses = sorted(unit["loss"] for sample in samples for unit in sample["units"])
    scale = max(losses[int(0.98 * (len(losses) - 1))], 1e-6) if losses else 1.0
    try:
        options = dict(yaml.safe_load(config) or {})
    except (yaml.YAMLError, TypeError, ValueError):
        raise ValueError(
            f"{run_dir / 'config.yaml'}: not a file that a run has written; remove it for a page without "
            "options"
        ) from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("plot_run.html").read_text(encoding="utf-8"))
    return template.render(
        name=str(run_dir),
        interface=options.get("simct_interface", ""),
        iteration=max((row["iteration"] for row in rows), default=0),
        train_iters=options.get("train_iters", ""),
        headline=headline(rows),
        drawings=[svg for panel in PANELS if (svg := as_svg(panel, rows)) is not None],
        samples=[
            sample | {"units": [unit_of(unit, scale) for unit in sample["units"]]} for sample in samples
        ],
        scale=f"{scale:.2g}",
        config=config,
    )


@command("plot_run")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    try:
        import matplotlib
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("drawing needs the package matplotlib: pip install matplotlib") from None
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "megatron_simct"  # the same run gives the same page
    run_dir: Path = options.run_dir
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"RUN_DIR {run_dir}: no metrics.jsonl there; give the --run-dir of a run")
    samples, config = run_dir / "samples.jsonl", run_dir / "config.yaml"
    output = options.output or run_dir / "report.html"
    for flag, path in (("--output", output), ("--png", options.png)):
        if path is not None and path.resolve() in [of_run.resolve() for of_run in (metrics, samples, config)]:
            raise ValueError(f"{flag} {path}: is a file of the run; name another file")
    if (
        options.png is not None
        and picture_format(options.png) not in FigureCanvasBase.get_supported_filetypes()
    ):
        raise ValueError(f"--png {options.png}: unknown picture format; end the name in .png, .svg or .pdf")
    rows = read_lines(metrics)
    if not any(row["kind"] == "step" for row in rows):
        raise ValueError(f"{metrics}: the run has not finished a step yet")
    text = page(
        run_dir,
        rows,
        read_samples(samples) if samples.is_file() else [],
        config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    write_whole(output, text)
    print(f"written: {output}")
    if options.png is not None:
        write_png(options.png, rows, str(run_dir))
        print(f"written: {options.png}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plot_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the --run-dir of a run")
    parser.add_argument(
        "--output", metavar="F", type=Path, help="page to write; default: RUN_DIR/report.html"
    )
    parser.add_argument("--png", metavar="F", type=Path, help="also write the curves as a picture")
    return parser
