"""Weights of a Hugging Face folder of safetensors -> this rank's shard of the Megatron model.

Only the pieces that `hf_mapping` names for this rank are read, so it never holds more of a matrix than its
own shard. Ranks with the same weights each read some of the parameters and get the others from each other, so
the folder is read once, however many data-parallel replicas there are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import Architecture
from megatron_simct.models.hf_mapping import parameters_of, tensor_names, unread_names
from megatron_simct.models.rules import Place, Rule
from megatron_simct.models.tensor_files import TensorFolder
from megatron_simct.parallel.disk import raise_together
from megatron_simct.parallel.initialize import Groups


def load_hf_weights(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    folder: str,
    groups: Groups,
    *,
    flag: str,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Fill every parameter of this rank's part of the model from the folder, in the parameter's own
    precision. Collective over the whole job.

    progress: called with the bytes of each parameter when a rank has read it.

    Raises ValueError on every rank, naming the flag, the file and the tensor, for one that is missing, has
    another shape or has no place in the model, and for a file that is missing or damaged.
    """
    shared = _divide(model, architecture, groups)
    problem = None
    with contextlib.ExitStack() as files:
        try:
            source = _open(architecture, folder, files, flag=flag)
            for rule, place, parameter, group, reader in shared:
                if reader == group.rank():
                    _read(source, rule, place, parameter)
                progress(parameter.nbytes)
        except ValueError as error:
            problem = str(error)
    raise_together(problem)
    for _, _, parameter, group, reader in shared:
        if group.size() > 1:
            dist.broadcast(parameter, group=group, group_src=reader)


def _divide(
    model: HiddenStateModel | InterleavedModel, architecture: Architecture, groups: Groups
) -> list[tuple[Rule, Place, torch.Tensor, dist.ProcessGroup, int]]:
    """Every parameter of this rank, the ranks that have the same one, and which of these reads it: the one
    that has the fewest bytes to read so far."""
    bytes_of = {group: [0] * group.size() for group in (groups.dp_cp, groups.expert_dp)}
    shared = []
    for rule, place, parameter in parameters_of(
        model, architecture, tp_rank=groups.tp_rank, tp_size=groups.tp_size
    ):
        group = groups.dp_cp if place.expert is None else groups.expert_dp
        loads = bytes_of[group]
        reader = loads.index(min(loads))
        loads[reader] += parameter.nbytes
        shared.append((rule, place, parameter, group, reader))
    return shared


def _open(architecture: Architecture, folder: str, files: contextlib.ExitStack, *, flag: str) -> TensorFolder:
    """The folder's tensors, all of which have a place in the model. ValueError as load_hf_weights."""
    source = TensorFolder(folder, files, flag=flag)
    unread = unread_names(architecture)
    ignored = [name for name in source.names() if unread.fullmatch(name)]
    if ignored and dist.get_rank() == 0:
        print(f"{flag} {folder}: {len(ignored)} tensors are not read ({ignored[0]}, ...)", flush=True)
    source.check_names(re.compile(f"{tensor_names(architecture).pattern}|{unread.pattern}"))
    embedding = f"{architecture.body}embed_tokens.weight"
    source.stand_in(tied=architecture.tied_embeddings, embedding=embedding, head=architecture.head)
    return source


def _read(source: TensorFolder, rule: Rule, place: Place, parameter: torch.Tensor) -> None:
    """Fill one parameter from its pieces."""
    pieces = list(rule.pieces(parameter, place))
    if sum(piece.view.numel() for piece in pieces) < parameter.numel():
        parameter.zero_()
    for piece in pieces:
        source.read(piece)
