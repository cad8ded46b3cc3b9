"""What is refused: options without a meaning, and labels that the loss would misread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.interfaces import METHODS, VARIANTS
from megatron_simct.config.options import Config, InterfaceConfig, check_ranges, flag_of
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.rows import is_row
from megatron_simct.records import LabelBatch, SegmentKind, TeacherNeeds


def teacher_needs(config: InterfaceConfig) -> TeacherNeeds:
    """What an interface asks of the teacher."""
    return interface_of(config).needs(config.method())


def compares_shared_tokens(config: InterfaceConfig) -> bool:
    """Whether the loss reads both models' scores of the shared tokens, and so the teacher's head."""
    needs = interface_of(config).rows(config.method())
    return needs is not None and needs.shared


def known_failure(config: InterfaceConfig) -> str | None:
    """For the log: when the interface is known to harm, if it is."""
    return METHODS[config.method().interface].failure or None


def check_labels(labels: LabelBatch, *, placement: VocabPlacement, config: InterfaceConfig) -> None:
    """Refuse labels that the loss would misread or fault on. For tensors still on the CPU: the loss itself
    never looks.

    Raises ValueError with the numbers for: ids outside the real vocabulary; segments that are empty, leave
    their labels, or do not ascend without overlap; kinds that do not fit; teacher statistics or hidden states
    that are missing.
    """
    check_config(config)
    student_end = placement.student_vocab_size
    _check_range("student label", labels.student_labels, 0, student_end)
    if not METHODS[config.method().interface].teacher:
        return
    needs = interface_of(config).rows(config.method())
    if needs is None:
        if labels.byte_batch is None:
            raise ValueError("interface bytes needs the teacher's log-probabilities of byte events")
        return
    num_segments = len(labels.segments)
    for name in ("kinds", "replaced_columns", "teacher_first_columns", "weights", "teacher_hidden_index"):
        if len(getattr(labels, name)) != num_segments:
            raise ValueError(f"{num_segments} segments need as many {name}, got {len(getattr(labels, name))}")
    num_teacher_labels = len(labels.teacher_own_logit)
    if len(labels.teacher_lse) != num_teacher_labels:
        raise ValueError(f"{num_teacher_labels} teacher logits but {len(labels.teacher_lse)} log-sum-exps")
    if num_segments == 0:
        return
    _check_side("teacher", labels.segments[:, 0], labels.segments[:, 1], num_teacher_labels)
    _check_side("student", labels.segments[:, 2], labels.segments[:, 3], len(labels.student_labels))
    _check_range("segment kind", labels.kinds, 0, len(SegmentKind))
    _check_range("replaced column", labels.replaced_columns, -1, student_end)
    _check_range("teacher first column", labels.teacher_first_columns, -1, student_end)
    if not bool(((labels.weights >= 0) & torch.isfinite(labels.weights)).all()):
        raise ValueError("the weights of segments must be finite and not negative")
    lengths = labels.segments[:, 1::2] - labels.segments[:, 0::2]
    wrong = ((labels.kinds != SegmentKind.UNIT) & (lengths != 1).any(1)).nonzero()
    if len(wrong):
        a = int(wrong[0])
        kind, (teacher, student) = SegmentKind(int(labels.kinds[a])).name, lengths[a].tolist()
        raise ValueError(f"segment {a} is {kind} but has {teacher} teacher and {student} student labels")
    if needs.entries and labels.entries is None:
        raise ValueError(
            f"interface {config.interface} needs the teacher's likeliest tokens by id, as entries"
        )
    if not needs.first_rows:
        return
    needed = labels.teacher_hidden_index[is_row(labels.kinds, needs)]
    what = "hidden state" if needs.shared else "list of its likeliest tokens"
    of_teacher = labels.teacher_hidden if needs.shared else labels.teacher_topk
    num_rows = 0 if of_teacher is None else len(of_teacher)
    if len(needed) and not 0 <= int(needed.min()) <= int(needed.max()) < num_rows:
        raise ValueError(
            f"interface {config.interface} needs a teacher {what} for {len(needed)} of {num_segments} "
            f"segments, with indices in [0, {num_rows}); got {int(needed.min())} to {int(needed.max())}"
        )


def check_config(config: InterfaceConfig, *, context_parallel_size: int = 1) -> None:
    """Refuse option values for which the loss is not defined."""
    interface = interface_of(config)
    needs = interface.rows(config.method())
    if context_parallel_size > 1 and needs is not None and needs.entries:
        raise ValueError(
            f"--context-parallel-size {context_parallel_size}: --simct-interface {config.interface} compares "
            "tokens behind several rows of a response, which must lie on one rank; leave it out"
        )
    if config.divergence not in ("reverse_kl", "forward_kl", "js"):
        raise ValueError(
            f"unknown divergence {config.divergence!r}: --simct-divergence is reverse_kl, forward_kl or js"
        )
    check_ranges(config, prefix="simct")
    if config.interface in ("bytes", "exact", "uld") and config.temperature != 1:
        raise ValueError(
            f"--simct-temperature {config.temperature}: interface {config.interface} compares probabilities "
            "of events, which are those of the models at 1 only"
        )
    if config.interface == "bpm" and config.divergence == "reverse_kl":
        raise ValueError(
            "--simct-divergence reverse_kl: the targets of interface bpm are 0 for most tokens, where it is "
            "infinite; take forward_kl, as published, or js"
        )
    method, read = config.method(), options_read(config)
    for field in fields(config):
        if getattr(config, field.name) != field.default and field.name not in read:
            flag = f"--{'no-' if field.default is True else ''}{flag_of('simct_' + field.name)[2:]}"
            divergence = f" and --simct-divergence {config.divergence}" if field.name == "js_beta" else ""
            raise ValueError(
                f"{flag} has no meaning with --simct-interface {config.interface}{divergence}; leave it out"
            )
    if method.drop_units and method.random_units is not None:
        raise ValueError("--simct-drop-units and --simct-random-units: one ablation at a time")


def options_read(config: InterfaceConfig) -> frozenset[str]:
    """The fields of the configuration that have a meaning with its interface."""
    _, set_by_name = VARIANTS.get(config.interface, ("", {}))
    read = (interface_of(config).reads | {"interface", "loss_memory_mib"}) - set_by_name.keys()
    if "rho" in set_by_name.values():
        read |= {"rho", "interface_seed"}
    method = config.method()
    if method.drop_units or method.random_units is not None:
        read |= {"interface_seed"}
    return read if config.divergence == "js" else read - {"js_beta"}


def _comparison_with(run: InterfaceConfig, own: Mapping[str, Any]) -> InterfaceConfig:
    """The configuration of a run with the fields that one of its teachers has in their place.

    Fields of the run that the interface does not read are at their defaults.
    """
    wanted = replace(run, **own)
    read = options_read(wanted) | own.keys()
    return InterfaceConfig(**{one.name: getattr(wanted, one.name) for one in fields(run) if one.name in read})


def comparisons(config: Config) -> dict[str, InterfaceConfig]:
    """How rows are compared, by the name of their teacher; an empty name if it has none."""
    if not config.routes_rows:
        return {one.name: config.interface for one in config.teachers}
    return {one.name: _comparison_with(config.interface, one.comparison) for one in config.teachers}


def check_comparisons(config: Config) -> None:
    """Raises ValueError for options of a comparison that have no meaning, or that the layout refuses."""
    of_teachers = comparisons(config)
    for name, interface in of_teachers.items():
        try:
            check_config(interface, context_parallel_size=config.parallel.context_parallel_size)
            if config.output.gradient_parts_interval:
                check_has_units(interface, flag="--gradient-parts-interval")
        except ValueError as error:
            raise ValueError(f"--teachers {name}: {error}" if config.routes_rows else str(error)) from None
    for one in fields(InterfaceConfig):
        value = getattr(config.interface, one.name)
        if value != one.default and all(getattr(of, one.name) != value for of in of_teachers.values()):
            raise ValueError(
                f"{flag_of(f'simct_{one.name}')} {value}: no teacher of --teachers is compared so; leave it "
                "out"
            )


def mixable(config: Config) -> dict[str, InterfaceConfig]:
    """The teachers that a row of --teachers may mix, with what must be the same of all that it mixes."""
    return {name: one for name, one in comparisons(config).items() if name and one.interface == "bytes"}


def check_has_units(config: InterfaceConfig, *, flag: str) -> None:
    """ValueError, naming the flag, for an interface in whose loss no multi-token unit
    has a part of its own.
    """
    method = config.method()
    needs = interface_of(config).rows(method)
    if needs is None or not needs.segments or not (needs.units or method.span_mse):
        raise ValueError(
            f"{flag}: --simct-interface {config.interface} has no loss of multi-token units to compare with "
            "that of 1:1 positions; leave it out"
        )


def _check_range(name: str, values: torch.Tensor, start: int, end: int) -> None:
    if len(values) and not start <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(
            f"{name}s must lie in [{start}, {end}); got {int(values.min())} to {int(values.max())}"
        )


def _check_side(side: str, starts: torch.Tensor, ends: torch.Tensor, num_labels: int) -> None:
    """Segments of one side: not empty, ascending without overlap, inside the labels."""
    previous_ends = torch.cat([ends.new_zeros(1), ends[:-1]])
    wrong = ((starts < previous_ends) | (ends <= starts) | (ends > num_labels)).nonzero()
    if len(wrong):
        a = int(wrong[0])
        raise ValueError(
            f"{side} side of segment {a} is [{int(starts[a])}, {int(ends[a])}): segments must be non-empty, "
            f"start at or after the end of the one before ({int(previous_ends[a])}), and end within the "
            f"{num_labels} {side} labels"
        )
