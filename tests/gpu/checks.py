"""The checks of a first run on GPUs. Each is a function of the device and returns lines of one table.

SIMCT_GPU_SMOKE_DEVICE=cpu runs the same functions small, on a CPU with gloo, so that on a GPU only the parts
that are special to it can fail: NCCL, TransformerEngine, the memory allocator. Ranks are spawned: CUDA does
not survive a fork.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_simct.config.options import ParallelConfig
from megatron_simct.losses import Head, Response, SharedVocabulary, cross_tokenizer_loss, place_shared_head
from megatron_simct.models import build
from megatron_simct.models.build import HiddenStateModel, build_model
from megatron_simct.models.dense import Dense
from megatron_simct.models.families import Architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.layers import Layer
from megatron_simct.models.rotary import Rope
from megatron_simct.parallel.initialize import process_groups
from tests import public_loss, weights
from tests.oracles.dense import dense_sum
from tests.oracles.loss_cases import LossCase, padded_shard
from tests.parallel import test_layouts
from tests.tiny import build_files
from tests.unit.test_losses_precision import FAR, NO_WORSE, case_of, relative_errors
from tests.unit.test_losses_public import arguments

RANKS_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measured number; without a limit it is only reported."""

    check: str
    value: float = 0.0
    unit: str = ""
    limit: float | None = None
    note: str = ""
    """A text instead of a number."""

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; nan is not."""
        return self.limit is None or self.value <= self.limit


def smoke_device() -> torch.device | None:
    """A GPU, or else the device that SIMCT_GPU_SMOKE_DEVICE names, or else None."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("cpu") if os.environ.get("SIMCT_GPU_SMOKE_DEVICE") == "cpu" else None


def on_ranks(world_size: int, function: Callable[..., dict[str, torch.Tensor]], *args: Any) -> list[dict]:
    """Run function(device, *args) on every rank of a new world, with NCCL if CUDA is available; the
    results of the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.spawn(
            _rank, (world_size, folder, function, args), nprocs=world_size, join=False
        )
        deadline = time.monotonic() + RANKS_TIMEOUT_S
        try:
            while not ranks.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{function.__name__}: no answer of {world_size} ranks in {RANKS_TIMEOUT_S} s"
                    )
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, folder: str, function: Callable[..., dict], args: tuple[Any, ...]
) -> None:
    on_gpu = torch.cuda.is_available()
    # NCCL needs one device for each rank; gloo accepts tensors of one device on all ranks.
    alone = on_gpu and torch.cuda.device_count() < world_size
    local_rank = 0 if alone else rank
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    dist.init_process_group(
        "nccl" if on_gpu and not alone else "gloo",
        store=dist.FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=RANKS_TIMEOUT_S),
    )
    found = function(device, *args)
    torch.save({name: tensor.cpu() for name, tensor in found.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# NCCL: two ranks against one


def loss_on_two_ranks(device: torch.device) -> list[Line]:
    """Loss and gradients of `paper` on vocabulary shards, fp32, against one process on the same device."""
    alone = {name: tensor.cpu() for name, tensor in _loss_on_shards(device).items()}
    ranks = on_ranks(2, _loss_on_shards)
    rows = len(alone["weight"])
    whole = {
        "loss": ranks[0]["loss"],
        "hidden": ranks[1]["hidden"],
        "weight": torch.cat([rank["weight"] for rank in ranks])[:rows],
    }
    errors = relative_errors(list(whole.values()), [alone[name].double() for name in whole])
    return [
        Line(check=f"TP2 against one process: {name} of the loss", value=error, limit=1e-5)
        for name, error in zip(("value", "hidden gradient", "weight gradient"), errors, strict=True)
    ]


def _loss_on_shards(device: torch.device) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    case = case_of(0, FAR, torch.float32)
    shards = [padded_shard(w, rank, size, extra=0) for w in (case.student_weight, case.teacher_weight)]
    weight, teacher_weight = (shard.to(device) for shard, _ in shards)
    case = case.to(device)
    hidden = case.student_hidden.requires_grad_()
    weight.requires_grad_()
    options = _arguments(case, device) | {"group": group}
    output = public_loss.fused(hidden, weight, case.teacher_hidden, teacher_weight, placed=True, **options)
    output.loss.backward()
    return {"loss": output.loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def training_on_two_ranks(device: torch.device) -> list[Line]:
    """Two steps of `train.py` from one process's rollouts; the largest difference of
    loss and gradient norm.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        build_files(files)
        (alone,) = on_ranks(1, _train_alone, files)
        split = on_ranks(2, _train, files, "--load-debug-rollout-data", 2)[0]
    return [
        Line(
            check=f"TP2 against one process: {name} of two training steps",
            value=float(((split[name] - alone[name]) / alone[name]).abs().max()),
            limit=1e-4,
        )
        for name in ("loss", "gradient norm")
    ]


def _train_alone(device: torch.device, files: Path) -> dict[str, torch.Tensor]:
    weights._save(0, 1, files, files / "weights")
    return _train(device, files, "--save-debug-rollout-data", 1)


def _train(device: torch.device, files: Path, rollouts_flag: str, tp: int) -> dict[str, torch.Tensor]:
    flags = [
        *("--pretrained-checkpoint", str(files / "weights" / "student")),
        *("--teacher-pretrained-checkpoint", str(files / "weights" / "teacher")),
        *(rollouts_flag, str(files / "rollouts"), "--tensor-model-parallel-size", str(tp)),
    ]
    steps, _ = test_layouts._run(dist.get_rank(), dist.get_world_size(), files, *flags)
    values = {"loss": [sums["loss"] for sums, _, _ in steps], "gradient norm": [norm for _, norm, _ in steps]}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


# bf16 against float64


def bfloat16_loss(device: torch.device) -> list[Line]:
    """Error of the fused loss in bf16 beside that of dense torch in bf16, both against dense float64."""
    lines = []
    for interface in ("paper", "strict"):
        case = case_of(0, FAR, torch.bfloat16, vocab_size=8000 if device.type == "cuda" else 300).to(device)
        exact, dense = (_dense(moved, interface) for moved in (case.to(torch.float64), case))
        fused = _gradients(case, lambda h, w, c=case, i=interface: _fused(h, w, c, i))
        of_dense, of_fused = relative_errors(dense, exact), relative_errors(fused, exact)
        for name, ours, theirs in zip(
            ("value", "hidden gradient", "weight gradient"), of_fused, of_dense, strict=True
        ):
            # With one sample, a lucky value of dense torch would be a wrong reference.
            limit = NO_WORSE * theirs if name != "value" else max(2 * theirs, 1e-3)
            lines.append(Line(check=f"bf16 against float64, {interface}: {name}", value=ours, limit=limit))
    return lines


def _dense(case: LossCase, interface: str) -> list[torch.Tensor]:
    teacher = case.teacher_hidden, case.teacher_weight
    return _gradients(
        case, lambda hidden, weight: dense_sum(hidden, weight, *teacher, case, interface=interface)
    )


def _fused(hidden: torch.Tensor, weight: torch.Tensor, case: LossCase, interface: str) -> torch.Tensor:
    options = _arguments(case, hidden.device) | {"interface": interface, "normalizer": 1}
    return public_loss.fused(hidden, weight, case.teacher_hidden, case.teacher_weight, **options).loss


def _gradients(case: LossCase, loss: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    hidden, weight = (
        case.student_hidden.clone().requires_grad_(),
        case.student_weight.clone().requires_grad_(),
    )
    value = loss(hidden, weight)
    value.backward()
    return [value.detach(), hidden.grad, weight.grad]


def _arguments(case: LossCase, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments(case).items()}


# Megatron's own layers against ours; the speed of a step


def architecture(*, hidden_size: int, num_layers: int, vocab_size: int) -> Architecture:
    """An architecture of llama's kind."""
    head_dim = 64
    heads = hidden_size // head_dim
    layer = Layer(
        attention=GroupedQuery(heads=heads, groups=heads, head_dim=head_dim, scale=head_dim**-0.5),
        mlp=Dense(width=2 * hidden_size),
        rope=Rope(theta=10000.0, dim=head_dim),
    )
    return Architecture(
        layers=(layer,) * num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        norm_epsilon=1e-6,
        tied_embeddings=False,
        max_position_embeddings=4096,
        init_std=0.05,
    )


def stock_layers(device: torch.device) -> list[Line]:
    """Hidden states and embedding gradient of megatron-core's layers, of TransformerEngine's if it imports,
    and of our own local ones.
    """
    on_gpu = device.type == "cuda"
    has_engine = on_gpu and build.gpt_layer_specs.HAVE_TE
    with process_groups(ParallelConfig(), seed=1) as groups:
        small = architecture(hidden_size=256, num_layers=2, vocab_size=512)
        with mock.patch.object(build.gpt_layer_specs, "HAVE_TE", False):
            ours = build_model(
                small, ParallelConfig(), groups, vocab_size=512, divisible_by=1, bf16=on_gpu, flag="smoke"
            )
        theirs = _stock_model(ours, transformer_engine=has_engine).to(device)
        missing = theirs.load_state_dict(
            _stock_names(ours.state_dict(), fused_norms=has_engine), strict=False
        )
        assert not [name for name in missing.missing_keys if "_extra_state" not in name], missing
        tokens, positions = _tokens(2, 64, 512, device)
        mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device).triu(1)
        states, gradients = [], []
        for model, own_mask in ((ours, None), (theirs, mask)):  # our attention applies the causal mask itself
            hidden = model(tokens, positions, own_mask)
            (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=device)).sum().backward()
            states.append(hidden.detach())
            gradients.append(model.embedding.word_embeddings.weight.grad)
    kind, limit = (
        "TransformerEngine" if has_engine else "megatron-core's local layers",
        2e-2 if on_gpu else 1e-5,
    )
    (of_states,), (of_gradients,) = (
        relative_errors(pair[1:], [pair[0].double()]) for pair in (states, gradients)
    )
    return [
        Line(check=f"{kind} against ours: hidden states", value=of_states, limit=limit),
        Line(check=f"{kind} against ours: embedding gradient", value=of_gradients, limit=2 * limit),
    ]


def _stock_model(ours: HiddenStateModel, *, transformer_engine: bool) -> torch.nn.Module:
    """megatron-core's GPTModel that returns the output of the last norm."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if transformer_engine:
        spec = specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = specs.get_gpt_layer_local_spec(normalization="RMSNorm")

    class Stock(GPTModel):
        def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    return Stock(
        config=ours.config,
        transformer_layer_spec=spec,
        vocab_size=ours.vocab_size,
        max_sequence_length=4096,
        position_embedding_type="rope",
        rotary_base=10000,
    )


def _stock_names(state: dict[str, Any], *, fused_norms: bool) -> dict[str, Any]:
    """Names in TransformerEngine, which keeps a norm's weight in the linear layer that follows it."""
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in fused.items() if fused_norms else ():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if "_extra_state" not in name}


def _tokens(
    batch: int, length: int, vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch, length), generator=generator).to(device)
    return tokens, torch.arange(length, device=device).expand(batch, -1)


def step_speed(device: torch.device) -> list[Line]:
    """Forward pass of a small student, fused loss (`paper`, given states of the teacher) and
    backward pass, in bf16.
    """
    on_gpu = device.type == "cuda"
    vocab_size, batch, length = (131072, 8, 512) if on_gpu else (512, 1, 32)
    shape = {"hidden_size": 1024, "num_layers": 8} if on_gpu else {"hidden_size": 64, "num_layers": 1}
    with process_groups(ParallelConfig(), seed=1) as groups:
        large = architecture(**shape, vocab_size=vocab_size)
        model = build_model(
            large, ParallelConfig(), groups, vocab_size=vocab_size, divisible_by=1, bf16=True, flag="smoke"
        )
        tokens, positions = _tokens(batch, length, vocab_size, device)
        labels = tokens.t().flatten()  # rows are in the order of [S, B, H]
        index = torch.arange(len(labels), device=device)
        shared = torch.arange(vocab_size, device=device)
        teacher_hidden = torch.randn(len(labels), large.hidden_size, device=device, dtype=torch.bfloat16)
        teacher_weight = torch.randn(vocab_size, large.hidden_size, device=device, dtype=torch.bfloat16) / 32
        pair = SharedVocabulary(student_ids=shared, teacher_ids=shared)
        head = place_shared_head(Head(teacher_hidden, teacher_weight), pair, student_width=vocab_size)
        segments = torch.stack([index, index + 1, index, index + 1], 1)
        response = Response(segments=segments, student_labels=labels, teacher_labels=labels)

        def step() -> float:
            model.zero_grad(set_to_none=True)
            hidden = model(tokens, positions, None).flatten(0, 1)
            output = cross_tokenizer_loss(Head(hidden, model.output_weight), head, pair, response)
            output.loss.backward()
            return float(output.loss.detach())

        assert math.isfinite(step())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = math.inf
        for _ in range(5 if on_gpu else 1):
            start = time.perf_counter()
            step()  # the last operation is a number on the host
            if on_gpu:
                torch.cuda.synchronize(device)
            seconds = min(seconds, time.perf_counter() - start)
        name = (
            f"step of {large.num_layers} layers, hidden {large.hidden_size}, V {vocab_size}, {len(labels)} "
            "labels"
        )
        lines = [Line(check=name, value=len(labels) / seconds, unit="tokens/s")]
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) / 2**20
            logits = len(labels) * vocab_size * 2 / 2**20
            lines.append(
                Line(
                    check=f"{name}: peak memory (bf16 logits of it: {logits:.0f} MiB)", value=peak, unit="MiB"
                )
            )
        return lines
