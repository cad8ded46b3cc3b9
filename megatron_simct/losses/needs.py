"""What each interface needs of the teacher, of the student's rows, of its options and of the labels; what is refused.

What the interfaces are is said in interfaces.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config import InterfaceConfig
from megatron_simct.records import LabelBatch, SegmentKind, TeacherNeeds

ALL_TOKENS = 1 << 30
"""TeacherNeeds.topk for a whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNeeds:
    """What an interface reads of the student's rows."""

    segments: bool = True
    """Compares segments; else every label by itself."""
    units: bool = True
    """Segments of several tokens too."""
    first_rows: bool = True
    """Looks at the vocabulary in the first row of every used segment; else at the labels alone."""
    shared: bool = True
    """What it looks at there are the shared tokens of both models."""
    dense: Literal["none", "units", "firsts", "segments", "labels"] = "none"
    """The labels whose rows need the whole softmax in the gradient: of units, the first ones or all of every used
    segment, or simply all."""
    special: Literal["none", "replaced", "first"] = "none"
    """Columns that are told apart in a unit's row: the shared token of the same bytes, or FirstTokens.special."""


ROW_NEEDS = {
    "paper": RowNeeds(dense="units", special="replaced"),
    "sum": RowNeeds(dense="units", special="replaced"),
    "no_unit_loss": RowNeeds(dense="units", special="replaced"),
    "random_unit": RowNeeds(dense="units", special="replaced"),
    "code": RowNeeds(),
    "code_gh": RowNeeds(),
    "exact": RowNeeds(dense="segments", special="first"),
    "strict": RowNeeds(units=False),
    "strict_topk": RowNeeds(units=False),
    "kd": RowNeeds(units=False),
    "uld": RowNeeds(units=False, shared=False, dense="firsts"),
    "alm": RowNeeds(first_rows=False, shared=False, dense="segments"),
    "sft": RowNeeds(segments=False, units=False, first_rows=False, shared=False, dense="labels"),
}
"""Of every interface but `bytes`, which has no rows of tokens."""


def teacher_needs(config: InterfaceConfig) -> TeacherNeeds:
    """What an interface asks of the teacher."""
    match config.interface:
        case "paper" | "sum" | "exact" | "no_unit_loss" | "random_unit":
            return TeacherNeeds(hidden_rows="first")
        case "code" | "code_gh":
            return TeacherNeeds(hidden_rows="first", segmentation="authors")
        case "alm":
            return TeacherNeeds(hidden_rows="none")
        case "strict" | "strict_topk" | "kd":
            return TeacherNeeds(hidden_rows="one_to_one")
        case "uld":
            return TeacherNeeds(hidden_rows="one_to_one", topk=config.uld_topk or ALL_TOKENS)
        case "bytes":
            return TeacherNeeds(hidden_rows="none", byte_events=True)
        case "sft":
            return TeacherNeeds(teacher=False, hidden_rows="none")
    raise ValueError(
        f"unknown interface {config.interface!r}: --simct-interface is one of {', '.join(ROW_NEEDS)}, bytes"
    )


def compares_shared_tokens(config: InterfaceConfig) -> bool:
    """Whether the loss reads both models' scores of the shared tokens, and so the teacher's head."""
    return config.interface != "bytes" and ROW_NEEDS[config.interface].shared


def known_failure(config: InterfaceConfig) -> str | None:
    """One sentence for the log: when the interface is known to harm, if it is."""
    renormalized = "student mass that leaves the compared tokens costs nothing (watch student_mass_outside_u)"
    match config.interface:
        case "paper" | "sum" | "no_unit_loss" | "random_unit" | "code" | "code_gh":
            return (
                "where the student spells in several tokens what the teacher says in one, its correct first token is "
                f"pushed down, and {renormalized}"
            )
        case "strict" | "strict_topk":
            return f"units of several tokens teach nothing, and {renormalized}"
        case "exact":
            return "where the student spells in several tokens what the teacher says in one, only its whole path counts"
        case "alm":
            return "only what was sampled is judged: nothing says what else could have been said"
        case "uld":
            return "which token has a probability is not compared, only how large the largest ones are"
        case "bytes":
            return "tokens beside the sampled tokenization are not summed: merges that are not longest match blur it"
    return None


def check_labels(labels: LabelBatch, *, placement: VocabPlacement, config: InterfaceConfig) -> None:
    """Refuse labels that the loss would misread or fault on. For tensors still on the CPU: the loss itself never looks.

    Raises ValueError with the numbers for: ids outside the real vocabulary; segments that are empty, leave their
    labels, or do not ascend without overlap; kinds that do not fit; teacher statistics or hidden states that are
    missing.
    """
    check_config(config)
    student_end = placement.student_vocab_size
    _check_range("student label", labels.student_labels, 0, student_end)
    if config.interface == "sft":
        return
    if config.interface == "bytes":
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
    if not ROW_NEEDS[config.interface].first_rows:
        return
    needed = labels.teacher_hidden_index[is_row(labels.kinds, config)]
    what = "hidden state" if ROW_NEEDS[config.interface].shared else "list of its likeliest tokens"
    of_teacher = labels.teacher_hidden if ROW_NEEDS[config.interface].shared else labels.teacher_topk
    num_rows = 0 if of_teacher is None else len(of_teacher)
    if len(needed) and not 0 <= int(needed.min()) <= int(needed.max()) < num_rows:
        raise ValueError(
            f"interface {config.interface} needs a teacher {what} for {len(needed)} of {num_segments} segments, "
            f"with indices in [0, {num_rows}); got {int(needed.min())} to {int(needed.max())}"
        )


def check_config(config: InterfaceConfig) -> None:
    """Refuse option values for which the loss is not defined."""
    teacher_needs(config)
    if config.divergence not in ("reverse_kl", "forward_kl", "js"):
        raise ValueError(
            f"unknown divergence {config.divergence!r}: --simct-divergence is reverse_kl, forward_kl or js"
        )
    if not config.temperature > 0:
        raise ValueError(f"--simct-temperature must be positive, got {config.temperature}")
    if config.interface in ("bytes", "exact", "uld") and config.temperature != 1:
        raise ValueError(
            f"--simct-temperature {config.temperature}: interface {config.interface} compares probabilities of events, "
            "which are those of the models at 1 only"
        )
    if not (config.topk >= 1 and config.uld_topk >= 0):
        raise ValueError(
            f"--simct-topk ({config.topk}) must be at least 1, --simct-uld-topk ({config.uld_topk}) at least 0"
        )
    for flag, share in {"--simct-rho": config.rho, "--simct-min-teacher-mass": config.min_teacher_mass}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{flag} {share}: must lie in [0, 1]")
    _check_unread(config)
    if not config.alm_temperature > 0:
        raise ValueError(f"--simct-alm-temperature must be positive, got {config.alm_temperature}")
    if not 0 < config.js_beta < 1:
        raise ValueError(
            f"--simct-js-beta must lie strictly between 0 and 1, got {config.js_beta}: at 0 and 1 the divergence "
            "vanishes; use --simct-divergence reverse_kl or forward_kl for the limits"
        )


def _check_unread(config: InterfaceConfig) -> None:
    """Refuse an option that the interface would not read."""
    with_units = {name for name, needs in ROW_NEEDS.items() if needs.units}
    with_segments = {name for name, needs in ROW_NEEDS.items() if needs.segments}
    everywhere = ROW_NEEDS.keys() | {"bytes"}
    readers = {
        "divergence": everywhere - {"alm", "uld", "sft"},
        "js_beta": everywhere - {"alm", "uld", "sft"} if config.divergence == "js" else set(),
        "temperature": with_segments - {"alm"},
        "unit_weight": with_units,
        "mask_whitespace": with_segments,
        "stop_bridge": with_segments - {"kd"},
        "min_teacher_mass": with_segments - {"alm", "uld", "code_gh"},
        "topk": {"strict_topk"},
        "uld_topk": {"uld"},
        "alm_temperature": {"alm"},
        "rho": {"no_unit_loss", "random_unit"},
        "interface_seed": {"no_unit_loss", "random_unit"},
    }
    for field in fields(config):
        changed = getattr(config, field.name) != field.default
        if changed and config.interface not in readers.get(field.name, {config.interface}):
            flag = f"--{'no-' * (field.default is True)}simct-{field.name.replace('_', '-')}"
            divergence = f" and --simct-divergence {config.divergence}" * (field.name == "js_beta")
            raise ValueError(
                f"{flag} has no meaning with --simct-interface {config.interface}{divergence}; leave it out"
            )


def is_row(kinds: torch.Tensor, config: InterfaceConfig) -> torch.Tensor:
    """[A] -> bool [A]: which segments the interface uses."""
    needs = ROW_NEEDS[config.interface]
    return (kinds != SegmentKind.UNIT) | needs.units if needs.segments else torch.zeros_like(kinds, dtype=torch.bool)


def _check_range(name: str, values: torch.Tensor, start: int, end: int) -> None:
    if len(values) and not start <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(f"{name}s must lie in [{start}, {end}); got {int(values.min())} to {int(values.max())}")


def _check_side(side: str, starts: torch.Tensor, ends: torch.Tensor, num_labels: int) -> None:
    """Segments of one side: not empty, ascending without overlap, inside the labels."""
    previous_ends = torch.cat([ends.new_zeros(1), ends[:-1]])
    wrong = ((starts < previous_ends) | (ends <= starts) | (ends > num_labels)).nonzero()
    if len(wrong):
        a = int(wrong[0])
        raise ValueError(
            f"{side} side of segment {a} is [{int(starts[a])}, {int(ends[a])}): segments must be non-empty, start at "
            f"or after the end of the one before ({int(previous_ends[a])}), and end within the {num_labels} {side} "
            "labels"
        )
