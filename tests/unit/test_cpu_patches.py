"""The CPU patches name attributes that exist, do not act on CUDA machines, and compute the same
as what they replace.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

from megatron_simct.parallel import cpu
from megatron_simct.parallel.cpu import PATCHES


@pytest.fixture(scope="module")
def upstream() -> dict[tuple[str, str], bool]:
    """The attributes that a process has that imports the same modules without any patch, and
    torch's own compile.
    """
    code = """
import json, logging, pkgutil, sys, warnings
warnings.simplefilter("ignore")
logging.disable()
names = json.loads(sys.argv[1])
print(json.dumps([hasattr(pkgutil.resolve_name(module), name) for module, name in names]))
assert "megatron_simct" not in sys.modules
"""
    names = [(module, name) for module, name, _ in PATCHES]
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(zip(names, json.loads(result.stdout.splitlines()[-1]), strict=True))


def test_every_patched_attribute_exists_upstream(upstream) -> None:
    assert len(upstream) == len(PATCHES), "an attribute is patched twice"
    assert [name for name, exists in upstream.items() if not exists] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched here")
def test_the_patches_are_in_place() -> None:
    assert cpu.patch_megatron() is True
    for module, name, replacement in PATCHES:
        assert getattr(pkgutil.resolve_name(module), name) is replacement, f"{module}.{name}"


def test_nothing_is_patched_where_cuda_is_available(monkeypatch) -> None:
    """The test starts from a state without patches, so that a patch would be seen."""
    monkeypatch.setattr(cpu, "_patched", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    markers = {}
    for module, name, _ in PATCHES:
        markers[module, name] = object()
        monkeypatch.setattr(pkgutil.resolve_name(module), name, markers[module, name])
    assert cpu.patch_megatron() is False
    assert cpu._patched is False
    for (module, name), marker in markers.items():
        assert getattr(pkgutil.resolve_name(module), name) is marker, f"{module}.{name}"


def test_a_patch_of_nothing_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_patched", False)
    monkeypatch.setattr(cpu, "PATCHES", (("megatron.core.utils", "no_such_thing", None),))
    with pytest.raises(AttributeError, match=r"megatron\.core\.utils\.no_such_thing does not exist"):
        cpu.patch_megatron()
    assert cpu._patched is False


def test_torch_keeps_its_compiler_and_megatron_does_not_use_it() -> None:
    from megatron.core import jit

    assert torch.compile.__module__ == "torch", "torch.compile was not put back"

    def function(x) -> torch.Tensor:
        return x + 1

    assert jit.jit_fuser(function) is function


def test_the_compiler_is_put_back_after_an_error() -> None:
    before = torch.compile
    with pytest.raises(KeyError), cpu._without_compilation():
        assert torch.compile is not before
        assert torch.compile(abs) is abs and torch.compile(dynamic=True)(abs) is abs
        raise KeyError
    assert torch.compile is before


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_equals_torch_s(max_norm) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n)) for n in (3, 7, 1)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the last has no gradient
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    before = ours[0].grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    cpu._clip_grad_by_total_norm(ours, max_norm, float(norm))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert ours[2].grad is None
    assert torch.equal(ours[0].grad, before) == (max_norm > norm)


def test_clipping_takes_one_tensor() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    cpu._clip_grad_by_total_norm(parameter, 1.0, 5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_tensor_factories_read_cuda_as_cpu() -> None:
    stand_in = importlib.import_module("megatron.core.optimizer.clip_grads").torch
    for name, argument in (
        ("zeros", 2),
        ("ones", 2),
        ("empty", 2),
        ("full", ((2,), 1.0)),
        ("tensor", [1.0]),
        ("arange", 3),
    ):
        arguments = argument if isinstance(argument, tuple) else (argument,)
        made = getattr(stand_in, name)(*arguments, device="cuda")
        assert made.device.type == "cpu"
        if name != "empty":
            assert torch.equal(made, getattr(torch, name)(*arguments))
    assert stand_in.zeros(1, dtype=torch.int32, device="cuda").dtype == torch.int32
    assert stand_in.zeros(1, device="meta").device.type == "meta"
    assert stand_in.nn is torch.nn and stand_in.float32 is torch.float32


def test_random_state_is_that_of_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import random

    torch.manual_seed(3)
    state = random._get_cuda_rng_state()
    first = torch.rand(4)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4), first)
