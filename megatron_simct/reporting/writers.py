"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases. Only the first rank has writers.

A library is imported when its flag is given. A resumed run leaves what an undisturbed one would have left:
rows after the loaded iteration are dropped, and written again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from megatron_simct.config.options import OutputConfig
from megatron_simct.files import write_rows


class Writer(Protocol):
    """One destination of metrics."""

    def write(self, kind: str, iteration: int, values: dict[str, float | list[int]]) -> None:
        """Metrics of a step or an evaluation; a value that is not finite has no place in the output. Lists
        are counts of each held-out prompt: JSON lines have them, curves do not."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """RUN_DIR/metrics.jsonl, or another `name`, one object a line."""

    def __init__(self, run_dir: str, *, start: int, name: str = "metrics.jsonl") -> None:
        """start: the iteration that the run goes on from.

        An evaluation at `start` is measured anew on resuming.
        """
        path = Path(run_dir) / name
        self.kept = [
            row
            for row in _rows(path)
            if row["iteration"] < start or (row["iteration"] == start and row["kind"] != "evaluation")
        ]
        """Rows of the run before it was interrupted."""
        write_rows(path, self.kept)
        self._file = open(path, "a", buffering=1)

    def write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        kept = {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._file.write(json.dumps({"kind": kind, "iteration": iteration, **kept}) + "\n")

    def close(self) -> None:
        self._file.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file up to its end, or to a line that a kill cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoard:
    """Scalars step/NAME and evaluation/NAME."""

    def __init__(self, directory: str, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=start + 1 if start else None)

    def write(self, kind: str, iteration: int, values: dict[str, float | list[int]]) -> None:
        for name, value in _finite(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, iteration)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of a project with the same names as in TensorBoard."""

    def __init__(self, project: str, directory: str | None, config: dict[str, Any]) -> None:
        import wandb

        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=project,
            dir=directory,
            config=config,
            mode=mode,  # type: ignore[arg-type]  # a word of the user, which wandb checks
        )

    def write(self, kind: str, iteration: int, values: dict[str, float | list[int]]) -> None:
        named = {f"{kind}/{name}": value for name, value in _finite(values).items()}
        self._run.log(named | {"iteration": iteration})

    def close(self) -> None:
        self._run.finish()


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """The metrics that are one number, and have it this time."""
    return {name: v for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def check_writers(output: OutputConfig) -> None:
    """ValueError, on every rank alike, where a library is not installed."""
    for flag, value, module in (
        ("--tensorboard-dir", output.tensorboard_dir, "tensorboard"),
        ("--wandb-project", output.wandb_project, "wandb"),
    ):
        if value is not None and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{flag} needs the package {module}: pip install {module}, or leave the flag out"
            )


def open_writers(output: OutputConfig, config: dict[str, Any], *, start: int) -> list[Writer]:
    """The writers of the first rank beside metrics.jsonl."""
    writers: list[Writer] = []
    if output.tensorboard_dir is not None:
        writers.append(TensorBoard(output.tensorboard_dir, start=start))
    if output.wandb_project is not None:
        writers.append(WandB(output.wandb_project, output.wandb_save_dir, config))
    return writers
