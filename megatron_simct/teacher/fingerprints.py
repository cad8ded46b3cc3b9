"""Fingerprints that student and teacher compare in the handshake. None means unknown to this side."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import ModelConfig
from megatron_simct.files import sampled_fingerprint
from megatron_simct.models.families import Architecture
from megatron_simct.models.head import Head
from megatron_simct.models.tensor_files import find_weights, weight_files
from megatron_simct.update.checkpoint import newest_checkpoint


def fingerprints(
    options: ModelConfig,
    architecture: Architecture | Head,
    tokenizer: Tokenizer,
    *,
    longest: int,
    student: Tokenizer | None = None,
    alignment_map: str | None = None,
    prefix: str = "teacher-",
) -> dict[str, Any]:
    """Fingerprints of a teacher, as far as this job knows them. longest: only used for LongRoPE, see Rotary.

    architecture: only its Head if this package does not know the family, which only an engine teacher may
    have. prefix: of its flags, for errors.
    """
    ropes = architecture.ropes if isinstance(architecture, Architecture) else ()
    has_two_ropes = any(rope.kind == "longrope" for rope in ropes)
    return {
        "hidden_size": architecture.hidden_size,
        "teacher_vocabulary": tokenizer.table.num_ids,
        "teacher_tokenizer": tokenizer.table.fingerprint,
        "teacher_config": hashlib.sha256(json.dumps(asdict(architecture), default=str).encode()).hexdigest(),
        "teacher_weights": weights_fingerprint(options, prefix=prefix),
        "longest_sequence": longest if has_two_ropes else None,
        "student_tokenizer": student.table.fingerprint if student is not None else None,
        "alignment_map": alignment_map,
    }


def mismatch(name: str, *, teacher: Any, student: Any) -> str:
    """One line about a fingerprint that differs between the two ends."""
    short = [value[:12] if isinstance(value, str) else value for value in (teacher, student)]
    return (
        f"{name.replace('_', ' ')}: {short[0]} at the teacher, {short[1]} at the student; both jobs must use "
        "the same"
    )


def weights_fingerprint(options: ModelConfig, *, prefix: str) -> str | None:
    """Names and sizes of the files with the weights, and three samples of each; None without weights.

    This distinguishes checkpoints and revisions without reading hundreds of gigabytes; it does not prove that
    two files are equal in every byte.
    """
    flag = f"--{prefix}hf-checkpoint"
    if options.pretrained_checkpoint is not None:
        _, path = newest_checkpoint(options.pretrained_checkpoint, flag=f"--{prefix}pretrained-checkpoint")
        files = sorted(p for p in path.rglob("*") if p.suffix == ".distcp" or p.name == ".metadata")
    elif find_weights(options.folder, flag=flag) is not None:
        files = weight_files(options.folder, flag=flag)
    else:
        return None
    return sampled_fingerprint(files)
