"""The student of a training job: its weights, the checkpoint that it resumes, and its copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import Config
from megatron_simct.files import sampled_fingerprint
from megatron_simct.job_parts.labels import build_cut
from megatron_simct.loading import Pair, load_model
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, uses_transformer_engine
from megatron_simct.models.families import read_architecture
from megatron_simct.models.layout import token_multiple
from megatron_simct.models.lora import adapter_parameters, add_adapters
from megatron_simct.models.tensor_files import find_weights, weight_files
from megatron_simct.parallel.initialize import Groups
from megatron_simct.teacher.average import Average
from megatron_simct.teacher.fingerprints import weights_fingerprint
from megatron_simct.teacher.reference import Reference
from megatron_simct.update.checkpoint import TRACKER, Checkpoints, has_checkpoint, numbered
from megatron_simct.update.support import check_support


def load_student(config: Config, groups: Groups, tokenizer: Tokenizer) -> HiddenStateModel | InterleavedModel:
    """The model to train: all its weights, or adapters. Raises ValueError, naming the flag."""
    if not config.lora.rank:
        return load_model(config, config.model, groups, tokenizer, prefix="")
    folder = f"--hf-checkpoint {config.model.folder}"
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    if find_weights(config.model.folder, flag="--hf-checkpoint") is None:
        raise ValueError(
            f"--lora-rank {config.lora.rank}: {folder} has no weights to which adapters could be added"
        )
    counts = adapter_parameters(architecture, config.lora, tp_size=groups.tp_size, flag=folder)
    model = load_model(config, config.model, groups, tokenizer, prefix="")
    add_adapters(
        model, architecture, config.lora, tp_size=groups.tp_size, seed=config.training.seed, flag=folder
    )
    if groups.is_first_rank:
        count = sum(counts[layer] for layer in architecture.layers)
        trained = f"{count:,} adapter parameters are trained on each tensor-parallel rank"
        print(f" --lora-rank {config.lora.rank}: {trained}; the weights are frozen", flush=True)
    return model


def check_experts(config: Config) -> None:
    """Raises ValueError for options of experts if neither model has experts."""
    sides = [(config.model.folder, "--hf-checkpoint")]
    if config.needs_teacher:
        sides += [(one.model.folder, f"--{one.prefix}hf-checkpoint") for one in config.teachers]
    parallel = config.parallel
    ep = parallel.expert_model_parallel_size
    given = {
        "--expert-model-parallel-size": ep if ep > 1 else None,
        "--expert-tensor-parallel-size": parallel.expert_tensor_parallel_size,
    }
    for flag, value in given.items():
        if value is not None and not any(
            read_architecture(folder, flag=side).num_experts for folder, side in sides
        ):
            folders = " and ".join(f"{side} {folder}" for folder, side in sides)
            raise ValueError(f"{flag} {value}: no experts in {folders}; leave it out")


def check_update(config: Config, groups: Groups) -> None:
    """Raises ValueError for an option of the update that the student or its layout does not support."""
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    check_support(
        config.update,
        config.parallel,
        architecture,
        transformer_engine=not config.lora.rank and uses_transformer_engine(architecture, groups.device),
        flag=f"--hf-checkpoint {config.model.folder}",
    )


def resume(config: Config, groups: Groups, checkpoints: Checkpoints) -> int:
    """The iteration of the checkpoint in --load, or 0. Logs it, and the options that have changed since."""
    output = config.output
    if output.load is None:
        return 0
    same = output.save is not None and Path(output.load).resolve() == Path(output.save).resolve()
    if same and output.ckpt_step is None and not has_checkpoint(output.load):
        start, line = 0, f" --load {output.load}: no checkpoint there yet, starting from the beginning"
    else:
        start, changed = checkpoints.resume(
            output.load, step=output.ckpt_step, verified=output.verify_checkpoint
        )
        line = f" resuming {output.load} after iteration {start}"
        newer = [iteration for iteration in numbered(output.load) if iteration > start]
        if newer and output.ckpt_step is None:
            line += f", the one in {TRACKER}; there are newer ones: {', '.join(map(str, newer))}"
        if changed:
            line += "; changed: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    if groups.is_first_rank:
        print(line, flush=True)
    return start


def identity(config: Config, pair: Pair) -> dict[str, object]:
    """Properties that a checkpoint and this run must share, so that the run can resume it."""
    return {
        "model": json.loads(
            json.dumps(asdict(read_architecture(config.model.folder, flag="--hf-checkpoint")))
        ),
        "tokenizer": pair.student.table.fingerprint,
        "teacher_tokenizer": _by_teacher(
            {name: one.tokenizer.table.fingerprint for name, one in pair.by_name.items()}
        ),
        "alignment_map": _by_teacher(
            {
                name: None if one.alignment_map is None else one.alignment_map.fingerprint
                for name, one in pair.by_name.items()
            }
        ),
        "interface": (
            {name: one.interface.method().interface for name, one in pair.by_name.items()}
            if config.routes_rows
            else None
        ),
        "adapters": adapter_identity(config),
        "start": start_fingerprint(config),
    }


def _by_teacher(values: dict[str, str | None]) -> object:
    """A value for each name of --teachers; of a single teacher, its value alone."""
    return values if "" not in values and values else values.get("")


def adapter_identity(config: Config) -> dict[str, object] | None:
    """Properties that adapters of a checkpoint must share with those of this run; None without adapters."""
    if not config.lora.rank:
        return None
    files = weight_files(config.model.folder, flag="--hf-checkpoint")
    return json.loads(json.dumps(asdict(config.lora))) | {"base": sampled_fingerprint(files)}


def start_fingerprint(config: Config) -> str | None:
    """The weights from which the run starts, for --reference-kl-weight; None without weights."""
    return weights_fingerprint(config.model, prefix="") if config.terms.reference_kl_weight else None


def build_reference(config: Config, groups: Groups, student: Tokenizer) -> Reference | None:
    """The student at its start, for --reference-kl-weight. Raises ValueError if it has no weights."""
    weight = config.terms.reference_kl_weight
    if not weight:
        return None
    if start_fingerprint(config) is None:
        raise ValueError(
            f"--reference-kl-weight {weight}: --hf-checkpoint {config.model.folder} has no weights to stay "
            "near"
        )
    return Reference(
        load_model(config, config.model, groups, student, prefix=""),
        groups,
        student=student,
        weight=weight,
        cut=build_cut(config, groups, context_parallel_size=groups.cp_size),
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(config.parallel, groups.device, context_parallel_size=groups.cp_size),
    )


def build_following(
    average: Average | None, *, before_reading_weights: Callable[[], None]
) -> Callable[[], None]:
    """The function that averages the student's weights into the teacher's; without --teacher-ema it does
    nothing."""

    def follow() -> None:
        if average is not None:
            before_reading_weights()
            average.follow()

    return follow
