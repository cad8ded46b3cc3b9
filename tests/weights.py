"""Checkpoints of both tiny models: random weights differ between layouts, loaded ones do not."""

from __future__ import annotations

from pathlib import Path

from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.update.checkpoint import save_weights
from tests.distributed import run_ranks
from tests.tiny import config


def random_weights(files: Path, folder: Path) -> tuple[str, ...]:
    """Save weights for the models of `files` under `folder`. Returns flags that start both models from
    them in every layout.
    """
    run_ranks(1, _save, files, folder)
    return (
        *("--pretrained-checkpoint", str(folder / "student")),
        *("--teacher-pretrained-checkpoint", str(folder / "teacher")),
    )


def _save(rank: int, world_size: int, files: Path, folder: Path) -> None:
    resolved = config(files)
    with process_groups(resolved.parallel, seed=5) as groups:
        for side, options, prefix in (
            ("student", resolved.model, ""),
            ("teacher", resolved.teacher, "teacher-"),
        ):
            tokenizer = open_tokenizer(options, prefix=prefix)
            save_weights(
                load_model(resolved, options, groups, tokenizer, prefix=prefix), str(folder / side), 1
            )
