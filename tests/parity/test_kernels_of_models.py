"""Whole models with the kernels and fused functions of a GPU, on a CPU: the same hidden states and
gradients as without.

Neither flex_attention nor Megatron's fused functions are compiled here. Their uncompiled forms are tested.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models import build
from megatron_simct.models.attention import CoreAttention
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.layout import Layout
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.parallel.test_preflight_memory import BASE, LAYER, model_of

LENGTHS = (9, 4, 11)

CAPPED = replace(LAYER, norms="around", mlp=Dense(width=48, activation="gelu_pytorch_tanh"))
MODELS = {
    "dense": BASE,
    "windows and soft-caps": model_of(replace(CAPPED, window=5), softcap=1.0),
    "experts": model_of(replace(LAYER, mlp=Experts(count=4, width=48, chosen=2, shared_width=16))),
}


def _compare(rank: int, world_size: int) -> list[tuple[str, float, float]]:
    """For each model the largest differences of hidden states and of gradients, relative to
    the largest number.
    """
    found = []
    with (
        process_groups(ParallelConfig(), seed=1) as groups,
        mock.patch.object(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None),
    ):
        for name, architecture in MODELS.items():
            results = []
            for more in ({}, build.fusions(architecture, on_gpu=True, trains=False)):
                torch.manual_seed(1)
                model = build.build_model(
                    architecture,
                    ParallelConfig(),
                    groups,
                    vocab_size=90,
                    divisible_by=8,
                    bf16=False,
                    flag="",
                    more=more,
                )
                for module in model.modules():
                    if isinstance(module, CoreAttention):
                        assert module.kernel == "torch"  # of a CPU
                        if more:
                            module.choose("auto", on_gpu=True, bf16=False)
                            assert module.kernel == "flex"
                results.append(_run(model))
            hidden, gradient = (
                float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)
            )
            found.append((name, hidden, gradient))
    return found


def _run(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    tokens = torch.randint(0, 90, (1, total), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden = model(tokens, positions[None], None, packed_seq_params=Layout(positions, LENGTHS))
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), torch.cat(gradients)


def test_what_a_gpu_computes_with_is_what_a_cpu_computes_with() -> None:
    (found,) = run_ranks(1, _compare, timeout_s=600.0)
    for name, hidden, gradient in found:
        assert hidden < 1e-5 and gradient < 1e-5, (name, hidden, gradient)
    assert [name for name, *_ in found] == list(MODELS)


@pytest.mark.parametrize(
    "architecture, changes",
    [
        (BASE, {}),
        (MODELS["windows and soft-caps"], {"bias_activation_fusion": False}),  # its activation is not silu
        (
            model_of(replace(LAYER, mlp=Experts(count=4, width=48, chosen=2, clamp=7.0))),
            {"bias_activation_fusion": False},
        ),
        (
            replace(BASE, layers=(replace(LAYER, rope=replace(LAYER.rope, interleaved=True)),) * 2),
            {"apply_rope_fusion": False},
        ),
    ],
    ids=["dense", "gelu", "clamped experts", "interleaved"],
)
def test_fusions_are_on_wherever_there_is_cuda(monkeypatch, architecture, changes) -> None:
    monkeypatch.setattr(build.rope_utils, "fused_apply_rotary_pos_emb", lambda *_: None)
    monkeypatch.setattr(build.linear_layers, "_grad_accum_fusion_available", True)
    on = {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    assert build.fusions(architecture, on_gpu=True, trains=True) == on | changes
    assert not any(build.fusions(architecture, on_gpu=False, trains=True).values())
    frozen = build.fusions(architecture, on_gpu=True, trains=False)
    assert frozen == on | changes | {"gradient_accumulation_fusion": False}
    monkeypatch.setattr(build.rope_utils, "fused_apply_rotary_pos_emb", None)
    monkeypatch.setattr(build.linear_layers, "_grad_accum_fusion_available", False)
    bare = build.fusions(architecture, on_gpu=True, trains=True)
    assert not bare["apply_rope_fusion"] and not bare["gradient_accumulation_fusion"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_megatrons_configuration_has_them(on_cpu) -> None:
    config = build._transformer_config(
        BASE, ParallelConfig(), bf16=False, on_cpu=on_cpu, initialize=False, trains=True, more={}
    )
    expected = build.fusions(BASE, on_gpu=not on_cpu, trains=True)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.bias_dropout_fusion is not on_cpu


def test_the_embedding_of_a_tied_head_does_not_write_to_the_zeros_that_stand_for_its_gradient() -> None:
    """The loss gives autograd zeros instead of a gradient that is already in main_grad."""
    from megatron_simct.losses import tiles

    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.main_grad = torch.zeros(3, 2)
    weight.grad_added_to_main_grad = False
    hidden = torch.ones(1, 2, requires_grad=True)
    for _ in range(2):
        attached = tiles._KnownGradientInMainGrad.apply(torch.zeros(()), torch.zeros(1, 2), hidden, weight)
        embedded = torch.nn.functional.embedding(torch.tensor([1]), weight)
        (attached + embedded.sum()).backward()
        assert torch.equal(weight.grad, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        weight.grad = None  # as DDP's hook does
    first, second = tiles._zeros(weight), tiles._zeros(weight)
    assert first.data_ptr() == second.data_ptr() and not first.any()
