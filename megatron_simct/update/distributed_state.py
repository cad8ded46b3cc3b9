"""Converts the state of Megatron's distributed optimizer to and from a plain optimizer's
form in a checkpoint.

The distributed optimizer cuts a flat buffer of all parameters into one piece for each data-parallel rank,
wherever the cuts fall. In a checkpoint each parameter's state is a tensor of the parameter's shape, under the
plain optimizer's keys: either optimizer reads what the other wrote, in any layout. To save, the pieces of a
parameter are gathered on the rank that has most of it, which writes them; to load, that rank reads them and
scatters them. So each rank writes and reads its share, and meanwhile holds a second copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_MASTER = "fp32_param"
"""Key of the float32 copy of a parameter in bfloat16; a parameter in float32 has none."""


@dataclass(frozen=True)
class BucketShards:
    """The shards of one bucket's parameters on the data-parallel ranks."""

    parameters: Sequence[torch.nn.Parameter]
    spans: Sequence[Sequence[tuple[int, int]]]
    """By parameter, by rank: begin and end within the flat parameter; equal where the rank has none of it."""

    @cached_property
    def sizes(self) -> list[list[int]]:
        """By parameter, by rank: number of its elements on the rank."""
        return [[end - begin for begin, end in spans] for spans in self.spans]

    @cached_property
    def owned(self) -> list[list[int]]:
        """By rank: indices of the parameters that it writes and reads, because it has most of them."""
        owned: list[list[int]] = [[] for _ in (self.sizes[0] if self.sizes else ())]
        for index, sizes in enumerate(self.sizes):
            owned[sizes.index(max(sizes))].append(index)
        return owned


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that a chain consists of: one for the experts, one for the other parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the state is sharded over the data-parallel ranks."""
    return isinstance(parts_of(optimizer)[0], DistributedOptimizer)


def sharded_state(
    optimizer: MegatronOptimizer, model: Mapping[str, Any], *, is_loading: bool
) -> dict[Any, Any]:
    """The optimizer's sharded state to save or to request; model: that of the model.

    Collective over the job.
    """
    tensors, _ = extract_sharded_tensors_and_factories(dict(model))
    by_parameter = {id(tensor.data): tensor for tensor in nested_values(tensors)}
    parts = parts_of(optimizer)
    prefixes = [f"chained_{index}." for index in range(len(parts))] if len(parts) > 1 else [""]
    states = [
        _sharded_part(part, by_parameter, prefix, is_loading=is_loading)
        for part, prefix in zip(parts, prefixes, strict=True)
    ]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def load_state(optimizer: MegatronOptimizer, loaded: Mapping[Any, Any]) -> None:
    """Scatter the state that `sharded_state` requested and a checkpoint has returned.

    Collective over the job.
    """
    parts = parts_of(optimizer)
    for index, part in enumerate(parts):
        _load_part(part, loaded if len(parts) == 1 else loaded[index])


def _sharded_part(
    optimizer: DistributedOptimizer, by_parameter: Mapping[int, Any], prefix: str, *, is_loading: bool
) -> dict[str, Any]:
    if is_loading:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    rank = optimizer.data_parallel_group.rank()
    tensors: dict[Any, Any] = {}
    for bucket, shards in enumerate(_bucket_shards(optimizer)):
        for key in _keys(optimizer):
            full_states = None if is_loading else _gather(optimizer, shards, key)
            for index in shards.owned[rank]:
                parameter = shards.parameters[index]
                if full_states is None:
                    full_state = torch.empty(parameter.numel())
                else:
                    full_state = full_states[index].cpu()
                sharded = by_parameter[id(parameter)]
                changes: dict[str, Any] = {
                    "key": f"{prefix}optimizer.state.{key}.{sharded.key}",
                    "data": full_state.view(parameter.shape),
                    "replica_id": (*sharded.replica_id[:2], 0),
                }
                if isinstance(sharded, ShardedTensor):
                    changes["dtype"] = full_state.dtype
                tensors.setdefault(f"{bucket}.{index}", {})[key] = replace(sharded, **changes)
    steps = [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
    groups = [group | {"params": LocalNonpersistentObject([])} for group in optimizer.optimizer.param_groups]
    inner = {"state": tensors | ({"common_step": steps[0]} if steps else {}), "param_groups": groups}
    return {"optimizer": inner} if optimizer.config.bf16 else inner


def _load_part(optimizer: DistributedOptimizer, loaded: Mapping[str, Any]) -> None:
    inner = loaded["optimizer"] if optimizer.config.bf16 else loaded
    rank = optimizer.data_parallel_group.rank()
    for bucket, shards in enumerate(_bucket_shards(optimizer)):
        for key in _keys(optimizer):
            _deal(
                optimizer,
                shards,
                key,
                {index: inner["state"][f"{bucket}.{index}"][key].flatten() for index in shards.owned[rank]},
            )
    step = inner["state"].get("common_step")
    if step is not None:  # torch's Adam counts by parameter; each needs a counter of its own
        for state in optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(step, dtype=torch.float32).clone()
    else:  # Apex's and TransformerEngine's count by group
        for group, theirs in zip(optimizer.optimizer.param_groups, inner["param_groups"], strict=True):
            if "step" in theirs:
                group["step"] = theirs["step"]


def _keys(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", _MASTER) if optimizer.config.bf16 else ("exp_avg", "exp_avg_sq")


def _bucket_shards(optimizer: DistributedOptimizer) -> Iterator[BucketShards]:
    """The shards of every bucket, in one order on all ranks."""
    size = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for number, bucket in enumerate(buffer.buckets):
            piece = bucket.grad_data.numel() // size
            begins = [bucket.offset + rank * piece for rank in range(size)]
            places = {
                p: (begin, end) for p, (begin, end, at) in buffer.param_index_map.items() if at == number
            }
            if places:
                yield BucketShards(
                    parameters=list(places),
                    spans=[
                        [
                            (min(max(start, begin), end) - begin, max(min(start + piece, end), begin) - begin)
                            for start in begins
                        ]
                        for begin, end in places.values()
                    ],
                )


def _own(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    """This rank's piece of a state, flat."""
    group, place = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][place]
    return main if key == _MASTER else optimizer.optimizer.state[main][key]


def _gather(optimizer: DistributedOptimizer, shards: BucketShards, key: str) -> dict[int, torch.Tensor]:
    """The full state, flat, of the parameters that this rank owns.

    Collective over the data-parallel group.
    """
    group = optimizer.data_parallel_group
    rank, sizes = group.rank(), shards.sizes
    outgoing = [
        [_own(optimizer, shards.parameters[index], key).flatten() for index in owned if sizes[index][rank]]
        for owned in shards.owned
    ]
    owned = shards.owned[rank]
    # From each rank come its pieces of all parameters that this rank owns, one after another.
    received = _exchange(
        outgoing, [sum(sizes[i][source] for i in owned) for source in range(group.size())], shards, group
    )
    pieces = [
        part.split([sizes[i][source] for i in owned]) if owned else () for source, part in enumerate(received)
    ]
    # Pieces in the order of the ranks are the parameter: shards of a buffer are consecutive.
    return {index: torch.cat([part[place] for part in pieces]) for place, index in enumerate(owned)}


def _deal(
    optimizer: DistributedOptimizer, shards: BucketShards, key: str, full_states: Mapping[int, torch.Tensor]
) -> None:
    """The inverse of `_gather`: each rank gets its pieces of the parameters that other ranks own."""
    group = optimizer.data_parallel_group
    rank, sizes = group.rank(), shards.sizes
    outgoing = [
        [full_states[index][slice(*shards.spans[index][target])] for index in shards.owned[rank]]
        for target in range(group.size())
    ]
    counts = [sum(sizes[index][rank] for index in owned) for owned in shards.owned]
    for owned, part in zip(shards.owned, _exchange(outgoing, counts, shards, group), strict=True):
        theirs = [index for index in owned if sizes[index][rank]]
        for index, piece in zip(
            theirs, part.split([sizes[i][rank] for i in theirs]) if theirs else (), strict=True
        ):
            _own(optimizer, shards.parameters[index], key).detach().copy_(piece)


def _exchange(
    outgoing: Sequence[Sequence[torch.Tensor]],
    counts: Sequence[int],
    shards: BucketShards,
    group: dist.ProcessGroup,
) -> list[torch.Tensor]:
    """One float32 tensor from each rank, of `counts` elements. outgoing: the tensors for each rank."""
    device = shards.parameters[0].device
    parts = [
        torch.cat([torch.empty(0, device=device), *(piece.to(device) for piece in pieces)])
        for pieces in outgoing
    ]
    received = torch.empty(sum(counts), device=device)
    dist.all_to_all_single(
        received, torch.cat(parts), list(counts), [len(part) for part in parts], group=group
    )
    return list(received.split(list(counts)))
