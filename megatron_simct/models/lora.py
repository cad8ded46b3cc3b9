"""LoRA: a model's weights are frozen, and a product of two small matrices is trained
beside each projection W.

    y = x W^T + (alpha / r) x A^T B^T,    A [r, in], B [out, r]    (Hu et al., arXiv:2106.09685; no dropout)

Each projection of the Hugging Face folder has its own A and B, also where Megatron has several of them as one
matrix. So they are what the package peft calls the adapter of that module. A is drawn from the seed and the
module's name, the same in every layout; B is zero at the start.

Tensor parallelism splits what it splits of W: the rows of B beside a column-parallel layer, the
columns of A beside a row-parallel one. The other matrix is whole on every rank, and what crosses ranks
is r numbers a token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from megatron_simct.config.options import LoraConfig
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of
from megatron_simct.models.dense import Dense
from megatron_simct.models.families import Architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_mapping import names_of
from megatron_simct.models.layers import Layer
from megatron_simct.models.norm import NormedRowParallelLinear
from megatron_simct.models.rules import Columns, FusedQKV, GatedMLP, PackedMLP, PackedQKV, Rule
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.disk import on_first_rank
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

MARK = ".adapter."
"""Part of the names of an adapter's parameters, and of no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The folder's tensors of the rows of one of Megatron's matrices."""

    names: tuple[str, ...]
    """Names of tensors: one for each run of rows, or one for all of them."""
    rows: tuple[int, ...]
    """Rows of each run, of the whole model."""
    groups: int = 0
    """Number of groups within each of which the runs follow each other; 0: they are not interleaved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A matrix of a layer that can have an adapter."""

    path: str
    """Its module within Megatron's layer."""
    parts: Parts
    width: int
    """Columns, of the whole model."""
    splits_columns: bool

    def parameters(self, targets: frozenset[str], rank: int, tp_size: int) -> int:
        """Number of its adapter's parameters on one rank."""
        names = self.parts.names * (len(self.parts.rows) if len(self.parts.names) == 1 else 1)
        rows = sum(
            count for name, count in zip(names, self.parts.rows, strict=True) if module_name(name) in targets
        )
        downs = sum(module_name(name) in targets for name in self.parts.names)
        if self.splits_columns:
            return rank * (self.width // tp_size + rows) if downs else 0
        return rank * (downs * self.width + rows // tp_size)


def projections(layer: Layer, hidden_size: int) -> Iterator[Projection]:
    """Those of grouped-query attention and of a dense MLP; other kinds of parts, and projections whose
    queries have a gate with them, get no adapters."""
    rules = layer.rules()
    inputs = {}
    if isinstance(layer.attention, GroupedQuery):
        if not layer.attention.output_gate:
            inputs["self_attention.linear_qkv"] = hidden_size
        inputs["self_attention.linear_proj"] = layer.attention.heads * layer.attention.head_dim
    if isinstance(layer.mlp, Dense):
        inputs["mlp.linear_fc1"], inputs["mlp.linear_fc2"] = hidden_size, layer.mlp.width
    for path, width in inputs.items():
        rule = rules[f"{path}.weight"]
        parts = _parts(rule, layer, hidden_size)
        yield Projection(path=path, parts=parts, width=width, splits_columns=isinstance(rule, Columns))


def _parts(rule: Rule, layer: Layer, hidden_size: int) -> Parts:
    width = layer.mlp.width if isinstance(layer.mlp, Dense) else 0
    match rule:
        case FusedQKV(query, key, value, heads):
            return Parts(names=(query, key, value), rows=heads.rows, groups=heads.groups)
        case PackedQKV(name, heads):
            return Parts(names=(name,), rows=heads.rows, groups=heads.groups)
        case GatedMLP(gate, up):
            return Parts(names=(gate, up), rows=(width, width))
        case PackedMLP(name):
            return Parts(names=(name,), rows=(width, width))
        case Columns(name):
            return Parts(names=(name,), rows=(hidden_size,))
    raise AssertionError(f"no adapter beside {rule}")


def module_name(tensor: str) -> str:
    """The last part of a module's name, for --lora-target-modules: q_proj."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


class Adapter(torch.nn.Module):
    """A and B of the projections that one of Megatron's matrices consists of."""

    def __init__(
        self,
        projection: ColumnParallelLinear | RowParallelLinear,
        parts: Parts,
        lora: LoraConfig,
        *,
        layer: int,
        targets: frozenset[str],
        seed: int,
    ) -> None:
        """layer: number in the whole model, counted from 0. targets: names of modules."""
        super().__init__()
        self.parts = parts
        self.layer = layer
        self.scale = lora.scale
        self.splits_columns = isinstance(projection, RowParallelLinear)
        self.tp_group = projection.tp_group
        size, rank = self.tp_group.size(), self.tp_group.rank()
        weight = projection.weight
        common = {"dtype": weight.dtype, "device": weight.device}
        width = projection.input_size
        self.down = torch.nn.ParameterDict()
        """A [r, in] by the name of the module; beside a row-parallel layer this rank's columns."""
        for name in parts.names:
            if module_name(name) in targets:
                drawn = _drawn(name.replace("*", str(layer)), lora.rank, width, seed)
                if self.splits_columns:
                    drawn = drawn.chunk(size, dim=1)[rank].contiguous()
                self.down[module_name(name)] = torch.nn.Parameter(drawn.to(**common))
        self.up = torch.nn.ParameterDict()
        """B [out, r] by the name of the module and the number of the run of rows; beside a column-parallel
        layer this rank's rows."""
        for i, rows in enumerate(parts.rows):
            if self._name(i) in self.down:
                own = rows if self.splits_columns else rows // size
                self.up[f"{self._name(i)}_{i}"] = torch.nn.Parameter(torch.zeros(own, lora.rank, **common))
        replicated, split = (self.up, self.down) if self.splits_columns else (self.down, self.up)
        for parameter in replicated.values():
            # each rank's gradient is a part
            parameter.sequence_parallel = projection.config.sequence_parallel
        for parameter in split.values():
            set_tensor_model_parallel_attributes(parameter, True, 1 if self.splits_columns else 0, 1)

    def _name(self, run: int) -> str:
        return module_name(self.parts.names[run if len(self.parts.names) > 1 else 0])

    def forward(self, x: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
        """The term to add to the output of the layer, of the same shape."""
        if self.splits_columns:
            (down,), (up,) = self.down.values(), self.up.values()
            inner = linear(x, down)
            if sequence_parallel:
                inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
            else:
                inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
            return linear(inner, up) * self.scale
        inner = linear(x, torch.cat(list(self.down.values())))
        if sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        inners = dict(zip(self.down, (inner * self.scale).chunk(len(self.down), dim=-1), strict=True))
        runs = []
        for i, rows in enumerate(self.parts.rows):
            name, size = self._name(i), rows // self.tp_group.size()
            if name in self.down:
                runs.append(linear(inners[name], self.up[f"{name}_{i}"]))
            else:
                runs.append(inner.new_zeros(*inner.shape[:-1], size))
        return self._in_order(runs, dim=-1)

    def product(self) -> torch.Tensor:
        """float32: the matrix to add to the weight of this rank."""
        if self.splits_columns:
            (down,), (up,) = self.down.values(), self.up.values()
            return up.float() @ down.float() * self.scale
        size = self.tp_group.size()
        runs = []
        for i, rows in enumerate(self.parts.rows):
            name = self._name(i)
            if name in self.down:
                runs.append(self.up[f"{name}_{i}"].float() @ self.down[name].float() * self.scale)
            else:
                some = next(iter(self.down.values()))
                runs.append(torch.zeros(rows // size, some.shape[1], device=some.device))
        return self._in_order(runs, dim=0)

    def _in_order(self, runs: list[torch.Tensor], *, dim: int) -> torch.Tensor:
        """Runs of rows as Megatron's matrix has them: within each group of this rank, one after the other."""
        if len(runs) == 1:
            return runs[0]
        groups = self.parts.groups // self.tp_group.size()
        if not groups:
            return torch.cat(runs, dim=dim)
        dim %= runs[0].dim()
        return torch.cat([run.unflatten(dim, (groups, -1)) for run in runs], dim=dim + 1).flatten(
            dim, dim + 1
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See megatron-core's layers."""
        state = self.state_dict(prefix="", keep_vars=True)
        split, axis = ("down.", 1) if self.splits_columns else ("up.", 0)
        axes = {name: axis for name in state if name.startswith(split)}
        assert metadata is not None, "the model gives it to its layers"
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )


class LoraColumnLinear(ColumnParallelLinear):
    """Megatron's layer with an adapter."""

    adapter: Adapter

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.adapter(input_, sequence_parallel=self.sequence_parallel), bias

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _with_adapter(
            self.adapter, super().sharded_state_dict(prefix, *args, **kwargs), prefix, args, kwargs
        )


class LoraRowLinear(RowParallelLinear):
    """Megatron's row-parallel layer with an adapter."""

    adapter: Adapter

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return output + self.adapter(input_, sequence_parallel=self.sequence_parallel), bias

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _with_adapter(
            self.adapter, super().sharded_state_dict(prefix, *args, **kwargs), prefix, args, kwargs
        )


class LoraNormedRowLinear(NormedRowParallelLinear, LoraRowLinear):
    """With the norm after the adapter: its forward pass calls that of LoraRowLinear."""


_WITH_ADAPTER: dict[type, type] = {
    ColumnParallelLinear: LoraColumnLinear,
    RowParallelLinear: LoraRowLinear,
    NormedRowParallelLinear: LoraNormedRowLinear,
}


def _with_adapter(
    adapter: Adapter, state: dict[str, Any], prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    own = {name: value for name, value in state.items() if not name.startswith(f"{prefix}adapter.")}
    return own | adapter.sharded_state_dict(f"{prefix}adapter.", *args, **kwargs)


def add_adapters(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    lora: LoraConfig,
    *,
    tp_size: int,
    seed: int,
    flag: str,
) -> None:
    """Freeze the model's weights and put an adapter beside each projection that --lora-target-modules names.

    flag: names the folder in errors. ValueError, naming the flag, for a module that the model does not have.
    """
    targets = target_modules(architecture, lora, tp_size=tp_size, flag=flag)
    model.requires_grad_(False)
    for chunk in chunks_of(model):
        if chunk.pre_process:
            # Else no activation before the first adapter needs a gradient, and recomputed layers would have
            # none at all.
            chunk.embedding.register_forward_hook(_needs_gradient)
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            for found in projections(architecture.layers[number], architecture.hidden_size):
                if not targets & {module_name(name) for name in found.parts.names}:
                    continue
                projection = layer.get_submodule(found.path)
                assert type(projection) in _WITH_ADAPTER, (
                    "megatron-core's local layers are built for adapters"
                )
                projection.adapter = Adapter(
                    projection, found.parts, lora, layer=number, targets=targets, seed=seed
                )
                projection.__class__ = _WITH_ADAPTER[type(projection)]


def target_modules(
    architecture: Architecture, lora: LoraConfig, *, tp_size: int, flag: str
) -> frozenset[str]:
    """Names of the modules that get an adapter: those of --lora-target-modules, or all that can.

    ValueError, naming the flag, for one that cannot.
    """
    found = [one for layer in architecture.kinds for one in projections(layer, architecture.hidden_size)]
    known = {module_name(name) for one in found for name in one.parts.names}
    mlps = [layer.mlp for layer in architecture.kinds if layer.mlp.num_experts]
    of_experts = {
        module_name(name) for mlp in mlps for rule in mlp.rules().values() for name in names_of(rule)
    }
    for name in lora.target_modules:
        if name not in known:
            raise ValueError(
                f"--lora-target-modules {name}: no projection of grouped-query attention or of a dense MLP "
                f"in {flag} is called so; there are {', '.join(sorted(known)) or 'none'}"
            )
        if name in of_experts:
            raise ValueError(
                f"--lora-target-modules {name}: experts of {flag} have projections of that name too, and "
                f"these get no adapters; name others: {', '.join(sorted(known - of_experts))}"
            )
    targets = frozenset(lora.target_modules or known)
    if not targets:
        raise ValueError(f"--lora-rank {lora.rank}: {flag} has no projection that can have an adapter")
    for one in found:
        wanted = targets & {module_name(name) for name in one.parts.names}
        if wanted and one.parts.groups and one.parts.groups % tp_size:
            raise ValueError(
                f"--lora-rank {lora.rank}: --tensor-model-parallel-size {tp_size} does not divide the "
                f"{one.parts.groups} heads of keys of {flag}, so no rank has whole ones; lower it, or leave "
                f"{', '.join(sorted(wanted))} out of --lora-target-modules"
            )
    return targets


def adapter_parameters(
    architecture: Architecture, lora: LoraConfig, *, tp_size: int, flag: str
) -> dict[Layer, int]:
    """Numbers of the adapters of a layer of each kind on one rank. ValueError as target_modules."""
    targets = target_modules(architecture, lora, tp_size=tp_size, flag=flag)
    return {
        layer: sum(
            one.parameters(targets, lora.rank, tp_size)
            for one in projections(layer, architecture.hidden_size)
        )
        for layer in architecture.kinds
    }


def _needs_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _drawn(name: str, rank: int, width: int, seed: int) -> torch.Tensor:
    """float32 [r, in], uniform within 1 / sqrt(in), as peft draws it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)


def adapters_of(model: HiddenStateModel | InterleavedModel) -> Iterator[tuple[torch.nn.Module, Adapter]]:
    """Every layer of this rank that has an adapter, with it."""
    for module in model.modules():
        adapter = getattr(module, "adapter", None)
        if isinstance(adapter, Adapter):
            yield module, adapter


def merge_adapters(model: HiddenStateModel | InterleavedModel) -> None:
    """Replace W by W + (alpha / r) B A, without adapters. The sum is rounded once, to the type of W."""
    plain = {kind: own for own, kind in _WITH_ADAPTER.items()}
    for module, adapter in list(adapters_of(model)):
        weight = module.get_parameter("weight").data
        weight.copy_(weight.float() + adapter.product())
        del module.adapter
        module.__class__ = plain[type(module)]


def save_peft(
    model: HiddenStateModel | InterleavedModel, groups: Groups, lora: LoraConfig, *, base: str, save: str
) -> None:
    """Write the adapters as a folder that peft loads: adapter_config.json, adapter_model.safetensors.

    base: the folder of the model. Collective over the whole job; the first rank writes, and holds all
    adapters. ValueError if the folder exists.
    """
    own: dict[str, torch.Tensor] = {}
    for _, adapter in adapters_of(model):
        own |= _peft_tensors(adapter, groups)
    writes = groups.tp_rank == 0 and groups.dp_rank == 0
    stages: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.gather_object(own if writes else {}, stages if groups.is_first_rank else None, dst=0)

    def write() -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor for stage in stages for name, tensor in stage.items()}
        folder = Path(save)
        if folder.exists():
            raise FileExistsError(17, "exists already; nothing is overwritten", save)
        temporary = folder.with_name(folder.name + ".tmp")
        temporary.mkdir(parents=True)
        save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata={"format": "pt"})
        modules = sorted({name.split(".")[-3] for name in tensors})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (temporary / "adapter_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        temporary.rename(folder)

    on_first_rank(write, save)


def _peft_tensors(adapter: Adapter, groups: Groups) -> dict[str, torch.Tensor]:
    """A and B of each module, whole, on the first tensor-parallel rank. Collective over these ranks."""
    found = {}
    axis = 1 if adapter.splits_columns else 0
    for tensor in adapter.parts.names:
        name = module_name(tensor)
        if name not in adapter.down:
            continue
        down = adapter.down[name].detach()
        ups = [up.detach() for key, up in adapter.up.items() if key.rpartition("_")[0] == name]
        if adapter.splits_columns:
            down = _gathered(down, groups, axis)
        else:
            ups = [_gathered(up, groups, axis) for up in ups]
        module = "base_model.model." + tensor.replace("*", str(adapter.layer)).removesuffix(".weight")
        found[f"{module}.lora_A.weight"] = down.cpu().contiguous()
        found[f"{module}.lora_B.weight"] = torch.cat(ups).cpu().contiguous()
    return found


def _gathered(shard: torch.Tensor, groups: Groups, axis: int) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=groups.tp)
    return torch.cat(shards, dim=axis)
