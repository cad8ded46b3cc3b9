"""Measurements of a first run on a GPU: the loss, attention and generation. On a CPU the
same code runs small.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_simct.config.options import InterfaceConfig, ParallelConfig
from megatron_simct.losses import Head, Response, SharedVocabulary, cross_tokenizer_loss, place_shared_head
from megatron_simct.models.attention import capped_attention
from megatron_simct.models.build import build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.layout import visible_keys
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.graphs import Stepping
from megatron_simct.rollout.megatron_engine import MegatronEngine
from tests.gpu.checks import Line

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "pyzmq", "transformers")


def versions(device: torch.device) -> list[Line]:
    """Packages, Python, and the device."""
    lines = [Line(check="python", note=platform.python_version())]
    for name in PACKAGES:
        try:
            lines.append(Line(check=name, note=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(check=name, note="not installed"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lines.append(Line(check="device", note=f"{torch.cuda.device_count()} x {properties.name}"))
        lines.append(Line(check="device memory", value=properties.total_memory / 2**30, unit="GiB"))
        lines.append(Line(check="CUDA", note=str(torch.version.cuda)))
    else:
        lines.append(Line(check="device", note="CPU, small"))
    return lines


def timed(function: Callable[[], object], device: torch.device, *, repeats: int) -> tuple[float, float]:
    """Least milliseconds of a call, after one call that is not counted, and the most MiB that a call adds."""
    function()
    on_gpu = device.type == "cuda"
    best, peak = float("inf"), 0.0
    for _ in range(repeats):
        before = 0
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        begin = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
            peak = max(peak, (torch.cuda.max_memory_allocated(device) - before) / 2**20)
        best = min(best, 1e3 * (time.perf_counter() - begin))
    return best, peak


def loss(device: torch.device) -> list[Line]:
    """`paper` and `strict` in bf16, beside the bare matrix products of the same shapes."""
    on_gpu = device.type == "cuda"
    shapes = (
        [(2048, 152064, 3584, 256000, 2304), (8192, 152064, 3584, 256000, 2304)]
        if on_gpu
        else [(32, 320, 16, 256, 24)]
    )
    lines = []
    for labels, student_vocab, hidden, teacher_vocab, teacher_hidden in shapes:
        what = f"{labels} labels, V {student_vocab} and {teacher_vocab}, hidden {hidden}"
        case = _loss_case(device, labels, student_vocab, hidden, teacher_vocab, teacher_hidden)
        products, _ = timed(lambda c=case: _products(c), device, repeats=3)
        lines.append(Line(check=f"bare products, {what}", value=products, unit="ms"))
        for interface in ("paper", "strict"):
            milliseconds, peak = timed(lambda c=case, i=interface: _fused(c, i), device, repeats=3)
            name = f"{interface}, {what}"
            lines.append(Line(check=name, value=milliseconds, unit="ms"))
            lines.append(Line(check=f"{name}: over the products", value=milliseconds / products))
            if on_gpu:
                lines.append(Line(check=f"{name}: memory", value=peak, unit="MiB"))
        del case
        gc.collect()
    return lines


def _loss_case(
    device: torch.device, labels: int, vocab: int, hidden: int, t_vocab: int, t_hidden: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    shared = torch.arange(int(0.7 * min(vocab, t_vocab)), device=device)
    pair = SharedVocabulary(student_ids=shared, teacher_ids=shared)
    index = torch.arange(labels, device=device)
    return {
        "hidden": draw(labels, hidden).requires_grad_(),
        "weight": (draw(vocab, hidden) / hidden**0.5).requires_grad_(),
        "teacher_hidden": draw(labels, t_hidden),
        "teacher_rows": draw(len(shared), t_hidden),
        "teacher": place_shared_head(
            Head(draw(labels, t_hidden), draw(t_vocab, t_hidden) / t_hidden**0.5), pair, student_width=vocab
        ),
        "pair": pair,
        "response": Response(
            segments=torch.stack([index, index + 1, index, index + 1], 1),
            student_labels=index % len(shared),
            teacher_labels=index % len(shared),
        ),
    }


def _fused(case: dict[str, Any], interface: Any) -> None:
    case["hidden"].grad = case["weight"].grad = None
    student = Head(case["hidden"], case["weight"])
    options = InterfaceConfig(interface=interface)
    cross_tokenizer_loss(student, case["teacher"], case["pair"], case["response"], options).loss.backward()


def _products(case: dict[str, Any]) -> None:
    """The teacher's shared logits, the student's twice, and the student's two
    gradients, in chunks of rows.
    """
    hidden, weight = case["hidden"].detach(), case["weight"].detach()
    for rows, teacher in zip(hidden.split(1024), case["teacher_hidden"].split(1024), strict=True):
        teacher @ case["teacher_rows"].t()
        logits = rows @ weight.t()
        logits @ weight
        logits.t() @ rows
        rows @ weight.t()


def attention(device: torch.device) -> list[Line]:
    """One layer's attention, forward and backward: causal, with a window, with a soft-cap."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    lines = []
    for length in (1024, 4096) if on_gpu else (64,):
        for family, heads, groups, dim in (("qwen2-7B", 28, 4, 128), ("gemma2-2B", 8, 4, 256)):
            shape = (heads, groups, dim) if on_gpu else (4, 2, 16)
            query, key, value = (
                torch.randn(1, n, length, shape[2], device=device, dtype=dtype, requires_grad=True)
                for n in (shape[0], shape[1], shape[1])
            )
            visible = visible_keys(length, length, length // 2, device=device)
            kinds: dict[str, Callable[[], torch.Tensor]] = {
                "causal": lambda q=query, k=key, v=value: scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                "window": lambda q=query, k=key, v=value, m=visible: scaled_dot_product_attention(
                    q, k, v, attn_mask=m, enable_gqa=True
                ),
                "soft-cap": lambda q=query, k=key, v=value, m=visible: capped_attention(
                    q, k, v, m, scale=0.1, cap=50.0
                ),
            }
            for kind, forward in kinds.items():
                milliseconds, peak = timed(lambda f=forward: f().sum().backward(), device, repeats=3)
                name = f"{family}, {length} positions, {kind}"
                lines.append(Line(check=name, value=milliseconds, unit="ms"))
                if on_gpu:
                    lines.append(Line(check=f"{name}: memory", value=peak, unit="MiB"))
    return lines


QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
GEMMA2_2B: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 256000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def shapes_of(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The layers' shapes; on a CPU, small ones of the same family."""
    return (
        config
        if device.type == "cuda"
        else config | SMALL | ({"head_dim": 16} if "head_dim" in config else {})
    )


def generation(device: torch.device) -> list[Line]:
    """Milliseconds a token with random weights, with separate kernel launches and as the engine does it."""
    on_gpu = device.type == "cuda"
    usual = Stepping.on(device)
    ways = {
        "one by one": Stepping(rows=usual.rows, keys=usual.keys, late=0, compiled=False, graphs=False),
        "usual": usual,
    }
    prompt_tokens, new = (512, 64) if on_gpu else (16, 8)
    lines = []
    for name, config in (("gemma2-2B", GEMMA2_2B), ("qwen2-7B", QWEN2_7B)):
        parallel = ParallelConfig()
        with tempfile.TemporaryDirectory() as folder, process_groups(parallel, seed=1) as groups:
            (Path(folder) / "config.json").write_text(json.dumps(shapes_of(config, device)))
            architecture = read_architecture(folder, flag="smoke")
            model = build_model(
                architecture,
                parallel,
                groups,
                vocab_size=architecture.vocab_size,
                divisible_by=1,
                bf16=on_gpu,
                flag="smoke",
            )
            for rows in (1, 32, 128) if on_gpu else (1, 3):
                for way, stepping in ways.items():
                    engine = MegatronEngine(
                        model,
                        groups,
                        vocab_size=architecture.vocab_size,
                        stop_ids=(),
                        batch_size=rows,
                        stepping=stepping,
                    )
                    few, many = (
                        _seconds(engine, device, rows, prompt_tokens, count) for count in (new // 4, new)
                    )
                    value = 1e3 * (many - few) / (new - new // 4)
                    lines.append(Line(check=f"{name}, {rows} rows, {way}", value=value, unit="ms a token"))
            del model
            gc.collect()
    return lines


def _seconds(engine: MegatronEngine, device: torch.device, rows: int, prompt_tokens: int, new: int) -> float:
    empty = np.zeros(0, np.int32)
    prompts = [
        Prompt(sample_id=i, student_ids=np.full(prompt_tokens, 7 + i, np.int32), teacher_ids=empty)
        for i in range(rows)
    ]
    sampling = Sampling(temperature=1.0, max_response_len=new, seed=1)
    return timed(lambda: engine.generate(prompts, sampling), device, repeats=1)[0] / 1e3
