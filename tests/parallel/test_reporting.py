"""Reports of a run beside its loss: operations, timers, the slowest rank, traces."""

from __future__ import annotations

import gc
import gzip
import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.job import build_job
from megatron_simct.models.operations import Operations, peak_operations
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.reporting.monitor import slowest_ranks
from megatron_simct.train import report_precision
from tests.distributed import run_ranks
from tests.runs import run
from tests.tiny import command_line, config


def test_a_run_tells_what_it_took(tiny, tmp_path) -> None:
    """Two pipeline stages with everything on: the log has Megatron's timers, metrics.jsonl the other values,
    and the trace the hops.
    """
    flags = ("--log-throughput", "--timing-log-level", "2", "--profile", "--profile-step-start", "2")
    flags += ("--profile-step-end", "3", "--profile-ranks", "1", "--manual-gc", "--manual-gc-interval", "2")
    flags += ("--pipeline-model-parallel-size", "2", "--train-iters", "3", "--deterministic-mode")
    (code, text, _), _ = run_ranks(2, run, command_line(tiny, "--run-dir", str(tmp_path), *flags))
    assert code == 0
    for name in ("forward-compute", "backward-compute", "backward-recv", "optimizer-inner-step"):
        assert name in text, name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["update_tflops"] > 0 and row["rollout_tflops"] > 0 and "update_mfu" not in row
        assert row["seconds_update_slowest"] >= row["seconds_update"] > 0
        assert row["seconds_slowest_rank"] in (0, 1) and row["peak_memory_gib_most"] >= row["peak_memory_gib"]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_1.json.gz"]
    events = json.loads(gzip.decompress((tmp_path / "profile" / "rank_1.json.gz").read_bytes()))[
        "traceEvents"
    ]
    names = [event.get("name", "") for event in events]
    assert names.count("hop: update") >= 1 and sum("aten::mm" in name for name in names) > 10


def _slowest(rank, world_size) -> dict[str, float]:
    return slowest_ranks({"rollout": [0.5, 3.0, 1.0][rank], "update": 4.0 - rank}, torch.device("cpu"))


def test_the_slowest_rank_is_named() -> None:
    for found in run_ranks(3, _slowest):
        assert found["seconds_rollout_slowest"] == 3.0 and found["seconds_update_slowest"] == 4.0
        assert found["seconds_slowest_rank"] == 1.0 and found["seconds_teacher_slowest"] == 0.0


def _operations(rank, world_size, folder, flags) -> float:
    resolved = config(folder, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        assert not gc.isenabled() or not resolved.update.manual_gc
        chunks = [chunk.module for chunk in job.updater._chunks]
        return sum(Operations(chunk).forward([5, 7], 4) for chunk in chunks)


LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_are_those_of_the_equation(tiny, layout) -> None:
    """The tiny student: 2 layers, hidden 32, MLP 64 (gated), 4 heads and 2 key heads of 8,
    360 ids, no padding.
    """
    world_size, flags = LAYOUTS[layout]
    weights = 2 * (32 * (4 + 2 + 2) * 8 + 32 * 32 + 3 * 32 * 64)
    pairs = 5 * 6 // 2 + 7 * 8 // 2
    head = 32 * (360 if world_size == 1 or "pp2" in layout else 368)
    expected = 2 * weights * 12 + 2 * head * 4 + 2 * 4 * 32 * pairs
    assert sum(run_ranks(world_size, _operations, tiny, flags)) == expected


def _timeouts(rank, world_size) -> set[timedelta]:
    parallel = ParallelConfig(tensor_model_parallel_size=2, distributed_timeout_minutes=7)
    with process_groups(parallel, seed=1) as groups:
        every = (groups.tp, groups.pp, groups.dp, groups.ep, groups.expert_dp)
        return {group._get_backend(torch.device("cpu")).options._timeout for group in every}


def test_the_time_out_reaches_every_group() -> None:
    assert run_ranks(4, _timeouts) == [{timedelta(minutes=7)}] * 4


def test_peaks_are_known_by_name() -> None:
    assert peak_operations("NVIDIA H100 80GB HBM3") == 989e12 and peak_operations("cpu") is None


@pytest.mark.parametrize(
    "device, flags, said", [("cuda", (), True), ("cuda", ("--bf16",), False), ("cpu", (), False)]
)
def test_float32_on_a_gpu_is_said(tiny, capsys, device, flags, said) -> None:
    report_precision(config(tiny, *flags), SimpleNamespace(is_first_rank=True, device=torch.device(device)))
    assert ("float32 on GPUs" in capsys.readouterr().out) is said
