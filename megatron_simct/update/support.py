"""Options of the update (UpdateConfig): their fields in megatron-core, and unsupported combinations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_simct.config.options import ParallelConfig, UpdateConfig
from megatron_simct.models.build import layers_of_stages
from megatron_simct.models.families import Architecture, check_student


def model_fields(update: UpdateConfig) -> dict[str, Any]:
    """The fields of TransformerConfig that these options set."""
    fields: dict[str, Any] = {"deterministic_mode": True} if update.deterministic_mode else {}
    if update.recompute_granularity is None:
        return fields
    fields["recompute_granularity"] = update.recompute_granularity
    if update.recompute_granularity == "full":
        return fields | {
            "recompute_method": update.recompute_method,
            "recompute_num_layers": update.recompute_num_layers,
        }
    return fields | {"recompute_modules": list(update.recompute_modules or ("core_attn",))}


def check_support(
    update: UpdateConfig,
    parallel: ParallelConfig,
    architecture: Architecture,
    *,
    transformer_engine: bool,
    flag: str,
) -> None:
    """Raises ValueError, naming the flag, for a model that cannot be a student, and for an option that it or
    its layout does not support.

    transformer_engine: the layers are TransformerEngine's. flag: names the model.
    """
    check_student(architecture, flag=flag)
    for option, reason in _refusals(update, parallel, architecture, transformer_engine, flag):
        raise ValueError(f"{option}: {reason}")


def _refusals(
    update: UpdateConfig,
    parallel: ParallelConfig,
    architecture: Architecture,
    transformer_engine: bool,
    flag: str,
) -> Iterator[tuple[str, str]]:
    """Unsupported options, with the reasons."""
    has_experts = bool(architecture.num_experts)
    modules, flag_of_modules = set(update.recompute_modules), "--recompute-modules"
    if "layernorm" in modules and not transformer_engine:
        yield (
            f"{flag_of_modules} layernorm",
            "megatron-core implements it with TransformerEngine's layers only, which this model does not "
            "have here; use --recompute-granularity full",
        )
    if "moe" in modules and not has_experts:
        yield f"{flag_of_modules} moe", f"no experts in {flag}; use mlp"
    if "mlp" in modules and has_experts:
        yield f"{flag_of_modules} mlp", f"the layers of {flag} have experts instead; use moe"
    unit = update.recompute_num_layers
    if update.recompute_method == "uniform" and unit is not None:
        uneven = next((layers for layers in layers_of_stages(architecture, parallel) if layers % unit), None)
        if uneven is not None:
            yield (
                f"--recompute-num-layers {unit}",
                "with --recompute-method uniform it must divide the layers of each pipeline stage of "
                f"{flag}; one has {uneven}",
            )
