"""The kernel of attention, by option, device and layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_simct.models.kernels import (
    Scores,
    check_backend,
    chosen_by_torch,
    describe,
    kernel_of,
    torch_kernel,
    uses_math,
)

PLAIN = Scores(key_dim=128, value_dim=128, shares_keys=True, bounded=False)
CUT = replace(PLAIN, window=512)
CAPPED = replace(PLAIN, bounded=True)
LATENT = replace(PLAIN, key_dim=192, shares_keys=False)
LONGEST = 1024


@pytest.mark.parametrize(
    "backend, scores, on_gpu, bf16, kernel",
    [
        ("auto", PLAIN, False, False, "torch"),
        ("auto", CAPPED, False, False, "torch"),
        ("auto", PLAIN, True, True, "either"),
        ("auto", CUT, True, True, "either"),
        ("auto", CAPPED, True, True, "flex"),
        ("auto", LATENT, True, True, "flex"),
        ("auto", PLAIN, True, False, "flex"),  # flash does not support float32
        ("auto", replace(PLAIN, key_dim=512, value_dim=512), True, True, "flex"),
        ("local", PLAIN, True, True, "torch"),
        ("local", CAPPED, True, True, "torch"),
        ("flash", PLAIN, True, True, "flash"),
    ],
)
def test_the_kernel(backend, scores, on_gpu, bf16, kernel) -> None:
    assert kernel_of(scores, backend, on_gpu=on_gpu, bf16=bf16) == kernel


@pytest.mark.parametrize(
    "scores, bf16, context, kernel",
    [
        (PLAIN, True, 1, "flash"),
        (PLAIN, False, 1, "math"),
        (replace(PLAIN, shares_keys=False), False, 1, "memory-efficient"),
        (CUT, True, 1, "cuDNN"),
        (replace(CUT, window=LONGEST), True, 1, "flash"),
        (PLAIN, True, 2, "cuDNN"),
        (replace(CUT, key_dim=256, value_dim=256), True, 1, "math"),
        (CAPPED, True, 1, "operations"),
    ],
)
def test_what_torch_takes(scores, bf16, context, kernel) -> None:
    found = torch_kernel(scores, bf16=bf16, longest=LONGEST, context_parallel_size=context)
    assert found == kernel
    options = {"bf16": bf16, "longest": LONGEST, "context_parallel_size": context}
    assert uses_math([CAPPED, scores], "local", **options) is (kernel == "math")
    assert not uses_math([scores], "auto", **options)


@pytest.mark.parametrize(
    "scores, changes, said",
    [
        (PLAIN, {"on_gpu": False}, "there is no GPU"),
        (PLAIN, {"bf16": False}, "no float32"),
        (PLAIN, {"context_parallel_size": 2}, "--context-parallel-size"),
        (CUT, {}, "a window, and layers have one of 512|no window"),
        (CAPPED, {}, "no soft-cap"),
        (LATENT, {}, "192 for keys and 128 for values"),
        (PLAIN, {}, None),
        (replace(CUT, window=LONGEST), {}, None),
    ],
)
def test_flash_is_refused_by_name_where_it_cannot_be(scores, changes, said) -> None:
    options = {"on_gpu": True, "bf16": True, "longest": LONGEST, "context_parallel_size": 1} | changes
    if said is None:
        check_backend("flash", [scores], **options, flag="--hf-checkpoint X")
        return
    with pytest.raises(ValueError, match=f"--attention-backend flash: .*({said}).*--hf-checkpoint X"):
        check_backend("flash", [PLAIN, scores], **options, flag="--hf-checkpoint X")
    check_backend("auto", [PLAIN, scores], **options, flag="--hf-checkpoint X")
    check_backend("local", [PLAIN, scores], **options, flag="--hf-checkpoint X")


def test_the_line_has_each_kind_once() -> None:
    options = {"bf16": True, "longest": LONGEST}
    said = describe([PLAIN, CUT, CUT, PLAIN, CAPPED], "auto", **options)
    assert said == (
        "2 layers: torch's flash kernel, flex_attention where sequences are packed; "
        "2 layers: window 512: flex_attention; 1 layer: flex_attention"
    )
    said = describe([PLAIN, replace(CUT, key_dim=256, value_dim=256), CAPPED], "local", **options)
    assert said == (
        "1 layer: torch's flash kernel; 1 layer: window 512: torch's math kernel, all scores held in "
        "float32; 1 layer: torch's operations, all scores held"
    )


def test_torch_is_asked_where_there_is_a_device() -> None:
    """On a CPU torch's answer is a different one of its names."""
    cpu = torch.device("cpu")
    name = chosen_by_torch(PLAIN, device=cpu, dtype=torch.float32, masked=True)
    assert name in ("math", "flash", "memory-efficient", "cuDNN", "overrideable")
    said = describe([PLAIN], "local", bf16=False, longest=LONGEST, device=cpu)
    assert said.startswith("1 layer: torch's ") and "kernel" in said
