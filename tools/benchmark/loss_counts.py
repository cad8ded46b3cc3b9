"""Launches, bytes and waits of the loss, for `tools/benchmark/loss.py --count`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import SharedHead, interface_loss, label_statistics
from megatron_simct.losses import bodies as bodies_of_tiles
from megatron_simct.losses.shared_head import SharedColumns
from megatron_simct.records import LabelBatch, SegmentKind
from tools.benchmark.counting import Kernels, Launches, Waits

ROWS, COLUMNS, HIDDEN = 256, 1024, 32
"""Labels, columns of a tile, and hidden size of both models."""
CONFIGS = {
    "paper": InterfaceConfig(),
    "paper, js": InterfaceConfig(divergence="js"),
    "code": InterfaceConfig(interface="code"),
    "strict": InterfaceConfig(interface="strict"),
    "strict_topk": InterfaceConfig(interface="strict_topk"),
    "kd": InterfaceConfig(interface="kd"),
    "exact": InterfaceConfig(interface="exact"),
    "sft": InterfaceConfig(interface="sft"),
}


def counts(names: tuple[str, ...] = (*CONFIGS, "teacher's statistics")) -> Iterator[dict[str, Any]]:
    """A row for each interface, in torch's operations and compiled."""
    for name in names:
        for with_compiler in (False, True):
            yield count(name, with_compiler=with_compiler)


def count(name: str, *, with_compiler: bool) -> dict[str, Any]:
    """What a tile costs is the difference between calls with 4 and 2 tiles of columns."""
    kernels = Kernels()
    found = []
    with as_on_a_gpu(kernels if with_compiler else None):
        for tiles in (2, 4):
            call = make(name, tiles * COLUMNS)
            call()  # compiles
            kernels.take()
            with Launches() as launches, Waits() as waits:
                call()
            made, of_kernels = kernels.take()
            found.append(
                (
                    sum(launches.names.values()) + made,
                    sum(launches.bytes.values()) + of_kernels,
                    launches.waits + waits.count,
                )
            )
    (few, few_bytes, waits_few), (many, many_bytes, waits_many) = found
    a_tile = (many - few) / 2
    return {
        "interface": name,
        "compiled": with_compiler,
        "launches a tile": a_tile,
        "bytes a row and column": round((many_bytes - few_bytes) / (2 * ROWS * COLUMNS), 1),
        "other launches": many - 4 * a_tile,
        "waits a call": waits_many,
        "waits a tile": (waits_many - waits_few) / 2,
    }


@contextlib.contextmanager
def as_on_a_gpu(kernels: Kernels | None) -> Iterator[None]:
    """Whole tiles of COLUMNS columns; bodies in torch's operations or, with `kernels`, compiled."""
    made: dict[Any, Any] = {}

    def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
        if kernels is None:
            return function
        if function not in made:
            compile_ = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
            made[function] = kernels.counted(function.__name__, compile_)
        return made[function]

    torch.compiler.reset()
    with (
        patch.object(bodies_of_tiles, "by_blocks", lambda device: False),
        patch.object(bodies_of_tiles, "compiled", compiled),
        patch("megatron_simct.losses.two_pass.MIN_TILE_COLUMNS", COLUMNS),
        patch("megatron_simct.losses.vocab_parallel.LABEL_STATISTICS_COLUMNS_GPU", COLUMNS),
    ):
        yield


def make(name: str, vocab: int) -> Callable[[], None]:
    """A call of forward and backward. 9 of 10 segments are a shared token, the tenth is a unit of two tokens;
    7 of 10 tokens are shared, in `kd` all."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden, weight = normal(ROWS, HIDDEN).requires_grad_(), normal(vocab, HIDDEN).requires_grad_()
    labels = torch.randint(vocab, (ROWS,), generator=generator)
    if name == "teacher's statistics":
        options: dict[str, Any] = {"shard_start": 0, "vocab_size": vocab, "group": None}
        return lambda: label_statistics(hidden, weight, labels, **options) and None
    config = replace(CONFIGS[name], loss_memory_mib=1)  # tiles of MIN_TILE_COLUMNS, which is COLUMNS here
    shared = np.arange(vocab)
    shared = shared if name == "kd" else shared[shared % 10 < 7]
    placement = VocabPlacement(
        student_vocab_size=vocab,
        teacher_vocab_size=vocab,
        shard_start=0,
        shard_end=vocab,
        columns=shared,
        row_offsets=np.arange(len(shared) + 1),
        teacher_rows=shared,
    )
    head = SharedHead(weight=normal(len(shared), HIDDEN), columns=SharedColumns.from_placement(placement))
    starts = [i for i in range(ROWS) if i % 11 < 10]  # 10 segments are 11 labels, the last one is a unit's
    segments = torch.tensor([[i, i + 1 + (i % 11 == 9), i, i + 1 + (i % 11 == 9)] for i in starts])
    segments = segments[segments[:, 3] <= ROWS]
    is_unit = segments[:, 3] - segments[:, 2] > 1
    batch = LabelBatch(
        student_labels=labels,
        segments=segments,
        kinds=torch.where(is_unit, int(SegmentKind.UNIT), int(SegmentKind.SHARED)),
        replaced_columns=torch.where(is_unit, torch.from_numpy(shared)[segments[:, 0] % len(shared)], -1),
        teacher_first_columns=torch.where(is_unit, 0, -1),
        weights=torch.ones(len(segments)),
        teacher_own_logit=torch.zeros(ROWS),
        teacher_lse=torch.full((ROWS,), 9.0),
        teacher_hidden=normal(len(segments), HIDDEN),
        teacher_hidden_index=torch.arange(len(segments)),
    )

    def call() -> None:
        hidden.grad = weight.grad = None
        output = interface_loss(hidden, weight, batch, shared_head=head, placement=placement, config=config)
        output.sum.backward()

    return call
