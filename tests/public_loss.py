"""`cross_tokenizer_loss` with arguments from the names of a table, and the record that each belongs to."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import (
    CrossTokenizerLoss,
    Head,
    Logits,
    Response,
    SharedVocabulary,
    cross_tokenizer_loss,
    place_shared_head,
)

OF_PAIR = {
    "shared_student_ids": "student_ids",
    "shared_teacher_ids": "teacher_ids",
    "stop_student_id": "stop_student_id",
    "stop_teacher_ids": "stop_teacher_ids",
    "tables": "tables",
    "continuations": "continuations",
}
OF_RESPONSE = {
    "segments": "segments",
    "student_labels": "student_labels",
    "teacher_labels": "teacher_labels",
    "replaced_columns": "replaced_columns",
    "segment_weights": "weights",
}
OPTIONS = {field.name for field in fields(InterfaceConfig)}


def picked(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    found = {new: options[old] for old, new in names.items() if old in options}
    return found | (
        {"stop_teacher_ids": tuple(found["stop_teacher_ids"])} if "stop_teacher_ids" in found else {}
    )


def of_side(options: dict[str, Any], side: str) -> dict[str, Any]:
    return {"vocab_size": options.get(f"{side}_vocab_size"), "soft_cap": options.get(f"{side}_logit_softcap")}


def _compare(student: Logits | Head, teacher: Logits | Head, options: dict[str, Any]) -> CrossTokenizerLoss:
    others = {name: options[name] for name in ("group", "normalizer") if name in options}
    config = InterfaceConfig(**{name: value for name, value in options.items() if name in OPTIONS})
    pair = SharedVocabulary(**picked(options, OF_PAIR))
    return cross_tokenizer_loss(
        student, teacher, pair, Response(**picked(options, OF_RESPONSE)), config, **others
    )


def from_logits(student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> CrossTokenizerLoss:
    return _compare(
        Logits(student, **of_side(options, "student")),
        Logits(teacher, **of_side(options, "teacher")),
        options,
    )


def fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    **options: Any,
) -> CrossTokenizerLoss:
    """placed: the head is moved beforehand, as `place_shared_head` does it."""
    teacher = Head(teacher_hidden, teacher_weight, **of_side(options, "teacher"))
    if options.get("placed"):
        teacher = place_shared_head(
            teacher,
            SharedVocabulary(**picked(options, OF_PAIR)),
            student_width=len(weight),
            student_vocab_size=options.get("student_vocab_size"),
            group=options.get("group"),
        )
    return _compare(Head(hidden, weight, **of_side(options, "student")), teacher, options)
