"""Checkpoints of both tiny models: random weights differ between layouts, loaded ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_simct.alignment import load_tokenizer
from megatron_simct.job import load_model
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.update.checkpoint import save_weights
from tests.distributed import run_ranks
from tests.tiny import config


def _save(rank: int, world_size: int, files: Path, folder: Path) -> None:
    resolved = config(files)
    with process_groups(resolved.parallel, seed=5) as groups:
        for side, options, prefix in (("student", resolved.model, ""), ("teacher", resolved.teacher, "teacher-")):
            tokenizer = load_tokenizer(options.tokenizer_model)
            save_weights(load_model(resolved, options, groups, tokenizer, prefix=prefix), str(folder / side), 1)


@pytest.fixture(scope="session")
def weights(tiny, tmp_path_factory) -> tuple[str, ...]:
    """Flags that start both models from the same weights in every layout."""
    folder = tmp_path_factory.mktemp("weights")
    run_ranks(1, _save, tiny, folder)
    return (
        *("--pretrained-checkpoint", str(folder / "student")),
        *("--teacher-pretrained-checkpoint", str(folder / "teacher")),
    )
