"""Weights of a Hugging Face folder of safetensors -> this rank's shard of the Megatron model.

Only the pieces that `hf_mapping` names for this rank are read, so it never holds more of a matrix than its
own shard.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch.distributed as dist

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.families import Architecture
from megatron_simct.models.hf_mapping import parameters_of, tensor_names, unread_names
from megatron_simct.models.tensor_files import TensorFolder


def load_hf_weights(
    model: HiddenStateModel | InterleavedModel,
    architecture: Architecture,
    folder: str,
    *,
    tp_rank: int,
    tp_size: int,
    flag: str,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Fill every parameter of this rank's part of the model from the folder, in the
    parameter's own precision.

    progress: called with the bytes of each parameter when it is filled.

    Raises ValueError, naming the flag, the file and the tensor, for one that is missing, has another shape or
    has no place in the model, and for a file that is missing or damaged.
    """
    with contextlib.ExitStack() as files:
        source = TensorFolder(folder, files, flag=flag)
        unread = unread_names(architecture)
        ignored = [name for name in source.names() if unread.fullmatch(name)]
        if ignored and not (dist.is_initialized() and dist.get_rank()):
            print(f"{flag} {folder}: {len(ignored)} tensors are not read ({ignored[0]}, ...)", flush=True)
        source.check_names(re.compile(f"{tensor_names(architecture).pattern}|{unread.pattern}"))
        embedding = f"{architecture.body}embed_tokens.weight"
        source.stand_in(tied=architecture.tied_embeddings, embedding=embedding, head=architecture.head)
        for rule, place, parameter in parameters_of(model, architecture, tp_rank=tp_rank, tp_size=tp_size):
            pieces = list(rule.pieces(parameter, place))
            if sum(piece.view.numel() for piece in pieces) < parameter.numel():
                parameter.zero_()
            for piece in pieces:
                source.read(piece)
            progress(parameter.nbytes)
