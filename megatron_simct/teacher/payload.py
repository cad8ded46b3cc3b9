"""Encodes requests and answers as messages of the wire, and decodes them.

Hidden states are sent in --teacher-hidden-dtype; the teacher rounds them to it before it computes anything
from them, so both ends use the same numbers. With fp32 the log-probabilities of `bytes` are
float32 too, else float16.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from megatron_simct.records import ByteSide, ScoredPair
from megatron_simct.teacher.forward import HiddenDtype, TeacherRequest, dequantized, quantized
from megatron_simct.teacher.wire import BYTE_SIDE, Message


def score_message(number: int, request: TeacherRequest) -> Message:
    """number: identifies the request between these two ends."""
    frames = {
        "prompt_ids": ("int32", request.prompt_ids),
        "label_ids": ("int32", request.label_ids),
        "rows": ("int32", request.rows),
    }
    if request.byte_side is not None:
        frames |= {name: ("steps", getattr(request.byte_side, name)) for name in BYTE_SIDE}
    return Message(
        kind="score",
        fields={
            "request": number,
            "sample_id": request.sample_id,
            "hidden": request.hidden,
            "topk": request.topk,
            "token_ids": request.token_ids,
        },
        frames=frames,
    )


def read_score(message: Message) -> TeacherRequest:
    """The inverse of `score_message`. `check_request` checks that a teacher can answer it."""
    arrays = {name: array for name, (_, array) in message.frames.items()}
    return TeacherRequest(
        sample_id=message.fields["sample_id"],
        prompt_ids=arrays["prompt_ids"],
        label_ids=arrays["label_ids"],
        rows=arrays["rows"],
        hidden=message.fields["hidden"],
        topk=message.fields["topk"],
        token_ids=message.fields["token_ids"],
        byte_side=ByteSide(**{name: arrays[name] for name in BYTE_SIDE}) if "last_row" in arrays else None,
    )


def check_request(request: TeacherRequest, *, vocab_size: int, max_tokens: int) -> None:
    """Raises ValueError for indices out of range, and for more tokens than the teacher accepts at once."""
    num_labels = len(request.label_ids)
    if not len(request.prompt_ids):
        raise ValueError("no token of prompt, so nothing predicts the first label")
    if request.num_tokens > max_tokens:
        raise ValueError(too_many_tokens(request.num_tokens, max_tokens))
    _check_range("token ids", np.concatenate([request.prompt_ids, request.label_ids]), 0, vocab_size)
    _check_range("rows", request.rows, 0, num_labels)
    if (np.diff(request.rows) <= 0).any():
        raise ValueError("rows must ascend, each once")
    if request.topk < 0:
        raise ValueError(f"topk {request.topk}; it must not be negative")
    if request.token_ids and not request.topk:
        raise ValueError("token_ids without topk; they are those of the likeliest tokens")
    side = request.byte_side
    if side is None:
        return
    _check_range("segment_row", side.segment_row, 0, num_labels)
    _check_range("segment_start", side.segment_start, 0, vocab_size + 1)
    _check_range("entry_slot", side.entry_slot, 0, len(side.last_row))
    _check_range("entry_segment", side.entry_segment, 0, len(side.segment_row))
    _check_range("last_row", side.last_row, 0, num_labels + 1)
    steps, same_row = np.diff(side.segment_start), np.diff(side.segment_row) == 0
    if (np.diff(side.segment_row) < 0).any() or (steps[same_row] < 0).any():
        raise ValueError("segments of byte events must ascend")


def too_many_tokens(num_tokens: int, max_tokens: int) -> str:
    return (
        f"{num_tokens} tokens; the teacher takes {max_tokens} (--max-tokens-per-batch, or what its model is "
        "made for)"
    )


def _check_range(name: str, values: np.ndarray, low: int, end: int) -> None:
    if values.size and not low <= values.min() <= values.max() < end:
        raise ValueError(f"{name} from {values.min()} to {values.max()}; they must lie in [{low}, {end})")


def scored_message(number: int, scored: ScoredPair, dtype: HiddenDtype) -> Message:
    """An answer, moved to the CPU."""
    frames = {
        "own_logit": ("float32", scored.own_logit.float().cpu().numpy()),
        "lse": ("float32", scored.lse.float().cpu().numpy()),
    }
    if scored.hidden is not None:
        match dtype:
            case "fp32":
                frames["hidden"] = "float32", scored.hidden.float().cpu().numpy()
            case "bf16":
                bits = scored.hidden.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
                frames["hidden"] = "bfloat16", bits.numpy().view(np.uint16)
            case "int8":
                codes, scale = quantized(scored.hidden)
                frames["hidden"] = "int8", codes.cpu().numpy()
                frames["scale"] = "float32", scale.cpu().numpy()
    if scored.topk is not None:
        frames["topk"] = "float32", scored.topk.float().cpu().numpy()
    if scored.topk_ids is not None:
        frames["topk_ids"] = "int32", scored.topk_ids.cpu().numpy()
    if scored.byte_logprobs is not None:
        precision = "float32" if dtype == "fp32" else "float16"
        frames["byte_logprobs"] = precision, scored.byte_logprobs.float().cpu().numpy()
    return Message(kind="scored", fields={"request": number, "sample_id": scored.sample_id}, frames=frames)


def read_scored(message: Message) -> ScoredPair:
    """The inverse of `scored_message`, on the CPU. Hidden states come as bfloat16, or else as float32."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, (_, array) in message.frames.items()}
    hidden = tensors.get("hidden")
    if hidden is not None and message.frames["hidden"][0] == "bfloat16":
        hidden = hidden.view(torch.int16).view(torch.bfloat16)
    elif hidden is not None and message.frames["hidden"][0] == "int8":
        hidden = dequantized(hidden, tensors["scale"])
    byte_logprobs = tensors.get("byte_logprobs")
    return ScoredPair(
        sample_id=message.fields["sample_id"],
        own_logit=tensors["own_logit"],
        lse=tensors["lse"],
        hidden=hidden,
        topk=tensors.get("topk"),
        topk_ids=tensors.get("topk_ids"),
        byte_logprobs=None if byte_logprobs is None else byte_logprobs.float(),
    )


def misfit(message: Message, request: TeacherRequest, *, hidden_size: int, vocab_size: int) -> str | None:
    """Why a message is not an answer to the request; None if it is one.

    An answer has exactly the requested statistics, as finite numbers and ids of the teacher's vocabulary.
    Only the log-probability of a byte may be -inf.
    """
    if message.fields["sample_id"] != request.sample_id:
        return f"it is about sample {message.fields['sample_id']}"
    frames = {name: array.shape for name, (_, array) in message.frames.items()}
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(("own_logit", "lse"), request.label_ids.shape)
    if request.hidden:
        wanted["hidden"] = (len(request.rows), hidden_size)
        if message.frames.get("hidden", ("",))[0] == "int8":
            wanted["scale"] = (len(request.rows),)
    if request.topk and len(frames.get("topk", ())) == 2:
        # at most the size of its vocabulary
        wanted["topk"] = (
            len(request.rows),
            min(request.topk, frames["topk"][1]),
        )
        if request.token_ids:
            wanted["topk_ids"] = wanted["topk"]
    if request.byte_side is not None:
        wanted["byte_logprobs"] = request.byte_side.last_row.shape
    if frames != wanted:
        return f"it has {_shapes(frames)}, not {_shapes(wanted)}"
    for name, (dtype, array) in message.frames.items():
        if not _is_finite(dtype, array, or_minus_infinity=name == "byte_logprobs"):
            return f"{name} has numbers that are not finite"
    if request.token_ids:
        try:
            _check_range("topk_ids", message.frames["topk_ids"][1], 0, vocab_size)
        except ValueError as error:
            return str(error)
    return None


def _shapes(frames: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in frames.items())


def _is_finite(dtype: str, array: np.ndarray, *, or_minus_infinity: bool) -> bool:
    if dtype == "bfloat16":
        exponent = np.uint16(0x7F80)  # all ones: infinite or nan
        return not bool(((array & exponent) == exponent).any())
    if dtype in ("int8", "int32"):
        return True
    fine = np.isfinite(array)
    if or_minus_infinity:
        fine |= np.isneginf(array)
    return bool(fine.all())
