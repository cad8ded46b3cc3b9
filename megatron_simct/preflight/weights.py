"""The files of a model's weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_simct.config.options import ModelConfig
from megatron_simct.models.families import Architecture
from megatron_simct.models.formats import folder_format
from megatron_simct.models.head import Head
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.preflight.findings import failed, passed, warned
from megatron_simct.preflight.memory import size_text, total_parameters
from megatron_simct.preflight.state import State
from megatron_simct.update.checkpoint import has_checkpoint


def check_weights(
    state: State,
    name: str,
    folder: str,
    model: ModelConfig,
    flag: str,
    architecture: Architecture | Head | None,
) -> None:
    if model.pretrained_checkpoint is not None:
        if not has_checkpoint(model.pretrained_checkpoint):
            message = f"--{flag}pretrained-checkpoint {model.pretrained_checkpoint}: no checkpoint there"
            state.findings.append(failed(name, "weights", message))
        return
    try:
        found = find_weights(folder, flag=f"--{flag}hf-checkpoint")
    except ValueError as error:
        state.findings.append(failed(name, "weights", str(error)))
        return
    if found is not None and found.name.endswith(".index.json"):
        state.attempt(name, "weights", lambda: _check_shards(found, flag=f"--{flag}hf-checkpoint"))
    if found is not None and isinstance(architecture, Architecture) and not state.has_engine(name):
        _describe_quantised(state, name, found, flag, architecture)
    if found is None and name in state.jobs:
        message = (
            f"--{flag}hf-checkpoint {folder} has no safetensors files, but a teacher needs weights; give "
            "a folder with weights, or"
        )
        state.findings.append(failed(name, "weights", f"{message} --{flag}pretrained-checkpoint"))
    elif found is None and name == "student" and state.config.terms.reference_kl_weight:
        message = f"{folder} has no safetensors, and --reference-kl-weight keeps the student near weights"
        state.findings.append(failed(name, "weights", message, flag="--reference-kl-weight"))
    elif found is None:
        message = f"{folder} has no safetensors files: the student would start from random weights"
        state.findings.append(warned(name, "weights", message, flag=f"--{flag}hf-checkpoint"))


def _describe_quantised(
    state: State, name: str, weights: Path, flag: str, architecture: Architecture
) -> None:
    """Report quantised weights: their size in files, and in memory after dequantisation,
    which the plan counts.
    """
    label = folder_format(str(weights.parent), flag=f"--{flag}hf-checkpoint")
    if label is None:
        return
    files = weights.parent.glob("*.safetensors") if weights.suffix == ".json" else [weights]
    in_files = sum(path.stat().st_size for path in files)
    job = state.jobs[name][1] if name in state.jobs else None
    bf16 = state.config.training.bf16 if job is None else job.serving.bf16
    parameters = total_parameters(architecture, vocab_size=architecture.vocab_size)
    said = (
        f"{label.label}, {size_text(in_files)} in files; {size_text(parameters * (2 if bf16 else 4))} of "
        f"{'bfloat16' if bf16 else 'float32'} in memory, over the ranks of one replica"
    )
    if name == "student":
        said += "; the student is trained and saved without quantisation"
        state.findings.append(warned(name, "weights", said, flag="--hf-checkpoint"))
    else:
        state.findings.append(passed(name, "weights", said))


def _check_shards(index: Path, *, flag: str) -> None:
    """Raises ValueError if a file of the index is missing, for example after an interrupted download."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{flag} {index.parent}: {index.name} is damaged; download the folder again"
        ) from None
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise ValueError(
            f"{flag} {index.parent}: {len(missing)} of {len(names)} weight files are missing, such as "
            f"{missing[0]}; download the folder again"
        )
