"""The bodies of tiles as a GPU has them: over whole tiles, and compiled. The numbers are the oracle's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import bodies, interface_loss
from megatron_simct.records import SequenceBatch
from tests.oracles import loss_cases
from tests.oracles.loss_cases import CONFIGS, OTHERS, evaluate, evaluate_oracle, name_of, random_case
from tools.benchmark.counting import Launches, Waits
from tools.benchmark.loss_counts import counts

COMPILED = [
    InterfaceConfig(divergence="forward_kl", temperature=2.0),
    InterfaceConfig(interface="exact"),
]


@pytest.fixture
def whole_tiles(monkeypatch) -> Iterator[Callable[[Any], None]]:
    """As on a GPU; the answer takes what compiles the bodies."""
    monkeypatch.setattr(bodies, "by_blocks", lambda device: False)
    monkeypatch.setattr("megatron_simct.losses.two_pass.MIN_TILE_COLUMNS", 1)
    torch.compiler.reset()

    def compile_by(how: Callable[[Any], Any]) -> None:
        made: dict[Any, Any] = {}
        monkeypatch.setattr(
            bodies, "compiled", lambda function, backend: made.setdefault(function, how(function))
        )

    yield compile_by
    torch.compiler.reset()


def check(config: InterfaceConfig, seeds: tuple[int, ...], *, tolerance: float) -> None:
    for seed in seeds:
        case = random_case(seed, softcap=seed == 1)
        result = evaluate(case, config)
        expected, hidden_gradient, weight_gradient = evaluate_oracle(case, config)
        assert float(result.output.sum) == pytest.approx(float(expected.sum.detach()), rel=tolerance)
        real = result.weight_gradient[: len(weight_gradient)]
        for found, of_oracle in ((result.hidden_gradient, hidden_gradient), (real, weight_gradient)):
            torch.testing.assert_close(found, of_oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [3, 1000])
@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=name_of)
def test_whole_tiles_give_the_same_numbers(whole_tiles, monkeypatch, config, width) -> None:
    monkeypatch.setattr("megatron_simct.losses.two_pass._columns_of_memory", lambda *_: width)
    whole_tiles(lambda function: function)
    check(config, (0, 1, 2), tolerance=1e-10)


@pytest.mark.parametrize("config", COMPILED, ids=name_of)
def test_traced_bodies_give_the_same_numbers(whole_tiles, monkeypatch, config) -> None:
    """One graph each, without a look at a tensor's values."""
    monkeypatch.setattr("megatron_simct.losses.two_pass._columns_of_memory", lambda *_: 9)
    whole_tiles(lambda function: torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True))
    check(config, (1,), tolerance=1e-10)


def test_kernels_give_the_same_numbers(whole_tiles, monkeypatch) -> None:
    """Code of the compiler's C++ backend."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler: c++ is not in PATH")
    monkeypatch.setattr("megatron_simct.losses.two_pass._columns_of_memory", lambda *_: 12)
    whole_tiles(lambda function: torch.compile(function, dynamic=True, fullgraph=True))
    check(InterfaceConfig(interface="strict"), (1,), tolerance=1e-10)


def test_a_compiler_that_fails_is_warned_of_once_and_done_without() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler")

    def double_(block: torch.Tensor) -> None:
        block.mul_(2)

    numbers = torch.ones(3)
    body = bodies.compiled(double_, fails)
    with pytest.warns(UserWarning, match="double_ of the loss runs uncompiled: .*no compiler"):
        body(numbers)
    body(numbers)
    assert numbers.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("config", [*CONFIGS, *OTHERS], ids=name_of)
def test_the_host_waits_once_a_call(whole_tiles, monkeypatch, config) -> None:
    """For how many rows are of which kind, and where no segment has a row for how many there are."""
    found = []

    def counted(*given: Any, **named: Any) -> Any:
        with Launches() as launches, Waits() as waits:
            output = interface_loss(*given, **named)
        found.append(launches.waits + waits.count)
        return output

    whole_tiles(lambda function: function)
    monkeypatch.setattr(loss_cases, "interface_loss", counted)
    evaluate(random_case(0), config)
    has_rows = config.interface not in loss_cases.WITHOUT_HEAD or config.interface == "uld"
    assert found == [1 if has_rows else 2]


def test_a_batch_is_pinned_before_it_moves_to_a_gpu(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: calls.append((device.type, non_blocking))
    )
    numbers = torch.zeros(2)
    batch = SequenceBatch(tokens=numbers, position_ids=numbers, lengths=None, label_rows=numbers)
    batch.to(torch.device("cuda"))
    assert calls == ["pinned", ("cuda", True)] * 3
    calls.clear()
    batch.to(torch.device("cpu"))
    assert calls == [("cpu", True)] * 3


def test_launches_bytes_and_waits_are_counted() -> None:
    """Views are no launches, products have no bytes, and of a gather only its places count."""
    table, places = torch.zeros(100, 4), torch.tensor([[0], [1]])
    with Launches() as launches, Waits() as waits:
        product = table[:2] @ table.T
        (product + 1).gather(1, places)
        product.nonzero()
        float(product[0, 0])
    assert launches.names == {"mm.default": 1, "add.Tensor": 1, "gather.default": 1, "nonzero.default": 1} | {
        "_local_scalar_dense.default": 1
    }
    assert launches.bytes["add.Tensor"] == 2 * 200 * 4
    assert launches.bytes["gather.default"] == 2 * 4 + 2 * 8 + 2 * 4
    assert launches.bytes["mm.default"] == 0
    assert (launches.waits, waits.count) == (1, 1)


def test_a_tile_of_a_gpu_is_counted() -> None:
    row = next(counts(("strict",)))
    assert row["launches a tile"] > 100 and row["bytes a row and column"] > 100
    assert (row["waits a call"], row["waits a tile"]) == (1, 0)
