"""Destinations of metrics, and which of them remain when a run is resumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_simct.config.options import OutputConfig
from megatron_simct.reporting import writers
from megatron_simct.reporting.writers import JsonLines, check_writers, open_writers

ROOT = Path(__file__).parents[2]


def row(kind: str, iteration: int, **values: float) -> str:
    return json.dumps({"kind": kind, "iteration": iteration, **values}) + "\n"


OLD = [
    row("evaluation", 0, greedy_accuracy=0.0),
    row("step", 1, loss=3.0),
    row("step", 2, loss=2.0),
    row("evaluation", 2, greedy_accuracy=0.5),
    row("step", 3, loss=1.0),
]


@pytest.mark.parametrize("start, kept", [(0, 0), (1, 2), (2, 3), (3, 5), (9, 5)])
def test_rows_after_the_loaded_iteration_are_dropped(tmp_path, start, kept) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(OLD))
    file = JsonLines(str(tmp_path), start=start)
    file.write("step", start + 1, {"loss": 0.5, "loss_unit": math.nan})
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(OLD[:kept]) + row("step", start + 1, loss=0.5)
    assert [json.dumps(r) + "\n" for r in file.kept] == OLD[:kept]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(OLD) + OLD[-1][:20])
    JsonLines(str(tmp_path), start=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(OLD)


def test_a_kill_while_rows_are_dropped_loses_none(tmp_path, monkeypatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(OLD))

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writers.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(str(tmp_path), start=1)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(OLD)


def test_tensorboard_shows_the_metrics_of_a_resumed_run_once(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = OutputConfig(tensorboard_dir=str(tmp_path))
    for start, iterations in ((0, (1, 2, 3)), (1, (2,))):
        (writer,) = open_writers(output, {}, start=start)
        for iteration in iterations:
            writer.write("step", iteration, {"loss": 10.0 * start + iteration, "loss_unit": math.nan})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["step/loss"]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(1, 1.0), (2, 12.0)]


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = OutputConfig(wandb_project="tiny", wandb_save_dir=str(tmp_path / "files"))
    (writer,) = open_writers(output, {"lr": 1e-3}, start=0)
    writer.write("step", 1, {"loss": 0.5, "loss_unit": math.nan})
    writer.close()
    (folder,) = (tmp_path / "files" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


@pytest.mark.parametrize(
    "output, module",
    [(OutputConfig(tensorboard_dir="x"), "tensorboard"), (OutputConfig(wandb_project="x"), "wandb")],
)
def test_a_missing_library_is_named_with_its_flag(monkeypatch, output, module) -> None:
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--{module}-\w+ needs the package {module}: pip install {module}"):
        check_writers(output)
    check_writers(OutputConfig())


def test_neither_library_is_imported_without_its_flag() -> None:
    """By our code: megatron-core itself imports those that are installed."""
    code = (
        "import sys, megatron_simct.reporting.writers as w; from megatron_simct.config.options import "
        "OutputConfig; w.check_writers(OutputConfig()); assert w.open_writers(OutputConfig(), {}, start=0) "
        "== []; print([m for m in ('tensorboard', 'wandb', 'torch.utils.tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
