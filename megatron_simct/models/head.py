"""The LM head of a Hugging Face folder of any family, for teachers whose layers run in another process.

The family need not be supported. The computation from a final hidden state to logits is read from config.json
(nested under `text_config` too) and from the names of the folder's tensors. An unknown field that would
change the logits is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_simct.models.tensor_files import Piece, TensorFolder

_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_SOFTCAP = "final_logit_softcapping"
_SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
"""Fields that scale the logits, and the exponent of each in the factor."""
_GEMMA, _COHERE = {_SOFTCAP: 30.0}, {"logit_scale": 0.0625}
_DEFAULTS: dict[str, dict[str, float]] = {
    **dict.fromkeys(("gemma2", "gemma3n", "gemma3n_text", "vaultgemma"), _GEMMA),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _COHERE),
    "nanochat": {_SOFTCAP: 15.0},
    "recurrent_gemma": {"logits_soft_cap": 30.0},
    "xlstm": {"output_logit_soft_cap": 30.0},
    "minicpm3": {"dim_model_base": 256},
}
"""transformers' defaults of such fields, which config.json may leave out, by model_type."""
_ABOUT_LOGITS = re.compile(r"logit|lm_head|head_multiplier|output_multiplier|dim_model_base|scale_width")
_NOT_ABOUT_THEM = re.compile(
    r"attn|attention|router|output_router_logits|num_logits_to_keep|dtype|num_lm_heads"
)
_HEADS = re.compile(r"(?:.+\.)?(?:lm_head|embed_out|output)\.weight")
_EMBEDDINGS = re.compile(
    r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight"
)
_NORMS = re.compile(r"(?:.+\.)?(?:norm|final_layernorm|ln_f|norm_f|final_layer_norm)\.weight")
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.|vis(ion|ual)|audio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Logits of a final hidden state: scale * weight @ hidden, with a soft-cap if there is one."""

    hidden_size: int
    vocab_size: int
    """Rows of the weight; the tokenizer may use fewer."""
    tensor: str
    """The weight's name in the folder; that of the embedding if the two are tied."""
    norm: str | None
    """Name of the weight of the norm before it; None if it was not recognized, or has a bias too."""
    scale: float = 1.0
    final_logit_softcap: float | None = None
    max_position_embeddings: int | None = None


def read_head(folder: str, *, flag: str) -> Head:
    """The head of a folder. Raises ValueError, naming the flag and the file, for one of an unknown kind."""
    where = f"{flag} {folder}"
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: cannot read {path} ({type(error).__name__}: {str(error)[:100]})"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {path} holds no JSON object")
    nested = fields.get("text_config")
    if isinstance(nested, dict):
        fields = fields | nested
    model_type = fields.get("model_type")
    fields = _DEFAULTS.get(model_type if isinstance(model_type, str) else "", {}) | fields
    hidden_size = _positive_integer(fields, _HIDDEN, where=f"{where}: {path}")
    vocab_size = _positive_integer(fields, ("vocab_size",), where=f"{where}: {path}")
    assert hidden_size is not None and vocab_size is not None, "both are needed"
    with contextlib.ExitStack() as files:
        source = TensorFolder(folder, files, flag=flag, plain=True)
        names = [name for name in source.names() if not _LAYER.search(name)]
        tensor = _head_name(source, names, fields, hidden_size, where=where)
        norms = [name for name in names if _NORMS.fullmatch(name) and source.shape(name) == (hidden_size,)]
        norms = [name for name in norms if name.removesuffix("weight") + "bias" not in names]
        bias = tensor.removesuffix("weight") + "bias"
        if bias in names:
            raise ValueError(f"{where}: {bias}: a head with a bias is not implemented")
        rows = source.shape(tensor)[0]
    scale, softcap = _scale_and_softcap(fields, where=f"{where}: {path}")
    return Head(
        hidden_size=hidden_size,
        vocab_size=max(vocab_size, rows),
        tensor=tensor,
        norm=norms[0] if len(norms) == 1 else None,
        scale=scale,
        final_logit_softcap=softcap,
        max_position_embeddings=_positive_integer(fields, _LENGTHS, where=f"{where}: {path}", optional=True),
    )


def load_head_rows(
    head: Head, folder: str, ids: np.ndarray, *, dtype: torch.dtype, flag: str
) -> torch.Tensor:
    """Rows `ids` of the head, [len(ids), H], and nothing else of the folder. The scale of the logits
    is applied to the hidden states."""
    order = np.argsort(ids, kind="stable")
    ascending = torch.empty(len(ids), head.hidden_size, dtype=dtype)
    # Consecutive ids are read at once.
    breaks = np.flatnonzero(np.diff(ids[order]) != 1) + 1
    with contextlib.ExitStack() as files:
        source = TensorFolder(folder, files, flag=flag, plain=True)
        shape = source.shape(head.tensor)
        for places in np.split(np.arange(len(ids)), breaks) if len(ids) else ():
            begin = int(ids[order[places[0]]])
            if begin + len(places) > shape[0]:
                raise ValueError(
                    f"{flag} {folder}: {head.tensor} has {shape[0]} rows, and the tokenizer has an id "
                    f"{begin + len(places) - 1}; it is another model's"
                )
            view = ascending[places[0] : places[-1] + 1]
            source.read(Piece(head.tensor, shape, view, begin, begin + len(places)))
    rows = torch.empty_like(ascending)
    rows[torch.from_numpy(order)] = ascending
    return rows


def load_norm(head: Head, folder: str, *, flag: str) -> torch.Tensor | None:
    """float32 [H]: the weight of the norm before the head; None if it was not recognized."""
    if head.norm is None:
        return None
    weight = torch.empty(head.hidden_size)
    with contextlib.ExitStack() as files:
        source = TensorFolder(folder, files, flag=flag, plain=True)
        source.read(Piece(head.norm, (head.hidden_size,), weight, 0, head.hidden_size))
    return weight


def _positive_integer(
    fields: Mapping[str, Any], keys: Sequence[str], *, where: str, optional: bool = False
) -> int | None:
    for key in keys:
        value = fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
        if value is not None:
            raise ValueError(f"{where}: {key}: expected a whole number, at least 1, not {value!r}")
    if optional:
        return None
    raise ValueError(f"{where}: has none of the fields {', '.join(keys)}")


def _head_name(
    source: TensorFolder, names: Sequence[str], fields: Mapping[str, Any], hidden_size: int, *, where: str
) -> str:
    """The tensor that is the head: one of its own, or the embedding."""

    def fitting(pattern: re.Pattern[str]) -> list[str]:
        matching = [name for name in names if pattern.fullmatch(name)]
        return [name for name in matching if source.shape(name)[1:] == (hidden_size,)]

    found = fitting(_HEADS)
    if not found and fields.get("tie_word_embeddings") is not False:
        found = fitting(_EMBEDDINGS)
    if len(found) != 1:
        raise ValueError(
            f"{where}: {len(found)} tensors of {hidden_size} columns may be the LM head "
            f"({', '.join(found) or 'none'}); it must be one"
        )
    return found[0]


def _scale_and_softcap(fields: Mapping[str, Any], *, where: str) -> tuple[float, float | None]:
    scale, softcap = 1.0, None
    for key, value in fields.items():
        if value is None or not _ABOUT_LOGITS.search(key) or _NOT_ABOUT_THEM.search(key):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in (_SOFTCAP, *_SCALES) and not (is_number and 0 < value < float("inf")):
            raise ValueError(f"{where}: {key}: expected a number above 0, not {value!r}")
        if key == _SOFTCAP:
            softcap = float(value)
        elif key in _SCALES:
            scale *= float(value) ** _SCALES[key]
        elif value is not False:
            raise ValueError(
                f"{where}: {key} {value!r} may change the logits, and is not implemented for this head"
            )
    return scale, softcap
