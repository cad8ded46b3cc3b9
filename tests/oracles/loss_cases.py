"""Samples for the loss: packed labels with segments, both models' hidden states and heads, and their shards.

A case is dense and whole. `shard` selects the part of one tensor-parallel rank, and `evaluate`
calls the package on it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import SharedHead, gather_shared_head, interface_loss
from megatron_simct.losses.loss import LossOutput
from megatron_simct.records import LabelBatch
from tests import golden
from tests.oracles import losses as oracle

ONE_TO_ONE = ("strict", "strict_topk", "kd", "uld")
WITHOUT_HEAD = ("sft", "reward", "alm", "uld", "scalar")

PADDING_SCORE = 50.0
"""Padded rows of both heads give huge logits, so a loss that scores them is far off."""


@dataclass(frozen=True)
class LossCase:
    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    """[V_S, H_S], real rows only."""
    teacher_hidden: torch.Tensor
    """[M, H_T], all rows."""
    teacher_weight: torch.Tensor
    """[V_T, H_T]"""
    student_labels: list[int]
    teacher_labels: list[int]
    segments: list[tuple[int, int, int, int]]
    kinds: list[int]
    replaced: list[int]
    shared: dict[int, list[int]]
    weights: list[float] | None = None
    """One for each segment; None: all 1."""
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    old_log_probs: list[float] | None = None
    """Log-probabilities of the student labels when they were sampled; None: the current ones."""
    advantages: list[float] | None = None
    """One for each student label; None: there is no reward."""

    def to(self, dtype: torch.dtype) -> LossCase:
        names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def golden_case() -> LossCase:
    """G0, whose logits pass through identity heads."""
    return LossCase(
        student_hidden=torch.tensor(golden.STUDENT_LOGITS),
        student_weight=torch.eye(8, dtype=torch.float64),
        teacher_hidden=torch.tensor(golden.TEACHER_LOGITS),
        teacher_weight=torch.eye(9, dtype=torch.float64),
        student_labels=list(golden.STUDENT_LABELS),
        teacher_labels=list(golden.TEACHER_LABELS),
        segments=list(golden.SEGMENTS),
        kinds=list(golden.KINDS),
        replaced=[-1, -1, -1],
        shared={student: [teacher] for student, teacher in golden.SHARED_PAIRS},
    )


def random_case(
    seed: int,
    *,
    num_segments: int = 9,
    vocab_size: int = 23,
    num_stops: int = 3,
    softcap: bool = False,
    scale: float = 1.5,
    spelled: bool = False,
    weighted: bool = False,
) -> LossCase:
    """Shared tokens, units of 1-4 tokens a side, some of which spell a shared token, stops, and
    labels in no segment.

    spelled: units as texts make them: if a side is one shared token, it is the unit's whole text, and stop
    tokens are in no unit. weighted: segments of weights 0, .5 and 2.
    """
    rng = np.random.default_rng(seed)
    v_s, v_t = vocab_size, vocab_size + 4
    students = rng.permutation(v_s)[: int(rng.integers(4, v_s - 3))].tolist()
    teachers = rng.permutation(v_t).tolist()
    stop = students[0]
    shared = {stop: [teachers.pop() for _ in range(num_stops)]}
    shared |= {student: [teachers.pop()] for student in students[1:]}
    labels_s: list[int] = []
    labels_t: list[int] = []
    segments, kinds, replaced = [], [], []
    for a in range(num_segments):
        if rng.random() < 0.3:  # labels after a byte mismatch belong to no segment
            labels_s += rng.integers(0, v_s, rng.integers(1, 3)).tolist()
            labels_t += rng.integers(0, v_t, rng.integers(0, 3)).tolist()
        kind = (oracle.UNIT, oracle.SHARED, oracle.STOP)[a % 3]
        replaced_id = -1
        if kind == oracle.SHARED:
            student = students[int(rng.integers(1, len(students)))]
            new_s, new_t = [student], list(shared[student])
        elif kind == oracle.STOP:
            new_s, new_t = [stop], [shared[stop][int(rng.integers(num_stops))]]
        else:
            new_s = rng.integers(0, v_s, rng.integers(1, 5)).tolist()
            new_t = rng.integers(0, v_t, rng.integers(1, 5)).tolist()
            if spelled:
                new_s, new_t, replaced_id = _spelled_unit(rng, students[1:], shared, stop, v_s, v_t)
            elif rng.random() < 0.5:
                replaced_id = students[int(rng.integers(1, len(students)))]
        segments.append(
            (len(labels_t), len(labels_t) + len(new_t), len(labels_s), len(labels_s) + len(new_s))
        )
        kinds.append(kind)
        replaced.append(replaced_id)
        labels_s += new_s
        labels_t += new_t
    h_s, h_t = 6, 5

    def normal(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.normal(size=shape) * scale)

    return LossCase(
        student_hidden=normal(len(labels_s), h_s),
        student_weight=normal(v_s, h_s),
        teacher_hidden=normal(len(labels_t), h_t),
        teacher_weight=normal(v_t, h_t),
        student_labels=labels_s,
        teacher_labels=labels_t,
        segments=segments,
        kinds=kinds,
        replaced=replaced,
        shared=shared,
        weights=rng.choice([0.0, 0.5, 2.0], num_segments).tolist() if weighted else None,
        student_softcap=4.0 if softcap else None,
        teacher_softcap=3.0 if softcap else None,
    )


def _spelled_unit(
    rng: np.random.Generator, students: list[int], shared: dict[int, list[int]], stop: int, v_s: int, v_t: int
) -> tuple[list[int], list[int], int]:
    """Labels of both sides, and the shared token of the same bytes, if any. At most one side is that token
    alone. Any other path may begin with it, or with the beginning of the other side.
    """
    stops_t = shared[stop]
    new_s = [i for i in rng.integers(0, v_s, 8).tolist() if i != stop][: int(rng.integers(2, 4))]
    new_t = [i for i in rng.integers(0, v_t, 9).tolist() if i not in stops_t][: int(rng.integers(2, 4))]
    first = students[int(rng.integers(len(students)))]
    match int(rng.integers(7)):
        case 0:
            return [first], new_t, first
        case 1:
            return new_s, list(shared[first]), first
        case 2:
            return new_s, new_t, first
        case 3:
            return [first, *new_s], [shared[first][0], *new_t], -1
        case 4:
            return [first, *new_s], [shared[first][0], *new_t], first
        case 5:
            other = students[int(rng.integers(len(students)))]
            return [first, *new_s], [shared[other][0], *new_t], other
    return new_s, new_t, -1


def padded_shard(
    weight: torch.Tensor, rank: int, world_size: int, *, extra: int = 1
) -> tuple[torch.Tensor, int]:
    """This rank's rows of a head that is padded to world_size equal shards, with at least
    `extra` rows of padding.
    """
    width = -(-(len(weight) + extra) // world_size)
    padded = weight.new_full((width * world_size, weight.shape[1]), PADDING_SCORE)
    padded[: len(weight)] = weight
    return padded[rank * width : (rank + 1) * width].clone(), rank * width


def placement_of(case: LossCase, start: int, end: int) -> VocabPlacement:
    """The shared tokens with student ids in [start, end)."""
    ids = sorted(student for student in case.shared if start <= student < end)
    rows = [case.shared[student] for student in ids]
    return VocabPlacement(
        student_vocab_size=len(case.student_weight),
        teacher_vocab_size=len(case.teacher_weight),
        shard_start=start,
        shard_end=end,
        columns=np.array([student - start for student in ids], dtype=np.int64),
        row_offsets=np.cumsum([0] + [len(of_one) for of_one in rows], dtype=np.int64),
        teacher_rows=np.array([teacher for of_one in rows for teacher in of_one], dtype=np.int64),
    )


def label_batch(case: LossCase, interface: str = "paper", *, uld_topk: int = 0) -> LabelBatch:
    """The teacher's answer: statistics of every label, and hidden states of the requested rows, shuffled."""
    dtype = case.student_hidden.dtype
    logits = case.teacher_hidden.double() @ case.teacher_weight.double().T
    if case.teacher_softcap is not None:
        logits = case.teacher_softcap * torch.tanh(logits / case.teacher_softcap)
    wanted = [a for a, kind in enumerate(case.kinds) if interface not in ONE_TO_ONE or kind != oracle.UNIT]
    wanted = (
        np.random.default_rng(0).permutation(wanted).astype(int).tolist()
        if interface not in ("sft", "reward", "alm", "scalar")
        else []
    )
    topk = None
    if interface == "uld":
        k = min(uld_topk or logits.shape[1], logits.shape[1])
        rows = logits[[case.segments[a][0] for a in wanted]]
        topk = torch.log_softmax(rows, dim=1).sort(dim=1, descending=True).values[:, :k]
    student_of = {teacher: student for student, teachers in case.shared.items() for teacher in teachers}
    index = [wanted.index(a) if a in wanted else -1 for a in range(len(case.segments))]
    label_index = torch.tensor(case.teacher_labels, dtype=torch.int64)
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return LabelBatch(
        student_labels=torch.tensor(case.student_labels, dtype=torch.int64),
        segments=torch.tensor(case.segments, dtype=torch.int64).reshape(-1, 4),
        kinds=torch.tensor(case.kinds, dtype=torch.int64),
        replaced_columns=torch.tensor(case.replaced, dtype=torch.int64),
        teacher_first_columns=torch.tensor(
            [
                student_of.get(case.teacher_labels[ts], -1) if kind == oracle.UNIT else -1
                for (ts, _, _, _), kind in zip(case.segments, case.kinds, strict=True)
            ],
            dtype=torch.int64,
        ),
        weights=torch.tensor(case.weights or [1.0] * len(case.segments)),
        teacher_own_logit=logits.gather(1, label_index[:, None]).squeeze(1).to(statistics_dtype),
        teacher_lse=logits.logsumexp(1).to(statistics_dtype),
        teacher_hidden=case.teacher_hidden[[case.segments[a][0] for a in wanted]] if wanted else None,
        teacher_hidden_index=torch.tensor(index, dtype=torch.int64),
        teacher_topk=topk,
        advantages=None if case.advantages is None else torch.tensor(case.advantages, dtype=torch.float64),
        sampling_log_probs=None
        if case.old_log_probs is None
        else torch.tensor(case.old_log_probs, dtype=torch.float64),
    )


def shared_head_of(case: LossCase, placement: VocabPlacement, group: dist.ProcessGroup | None) -> SharedHead:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    shard, start = padded_shard(case.teacher_weight, rank, world_size)
    return gather_shared_head(shard, start, placement, group)


@dataclass
class Evaluation:
    """The package's result for a case on one rank. Gradients are of the sum."""

    output: LossOutput
    hidden_gradient: torch.Tensor
    weight_gradient: torch.Tensor
    """[W, H_S]"""

    def metric(self, name: str) -> float:
        return float(self.output.metrics[name])


def evaluate(
    case: LossCase,
    config: InterfaceConfig,
    *,
    group: dist.ProcessGroup | None = None,
    placement: VocabPlacement | None = None,
) -> Evaluation:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    weight, start = padded_shard(case.student_weight, rank, world_size)
    placement = placement or placement_of(case, start, start + len(weight))
    hidden = case.student_hidden.clone().requires_grad_()
    weight.requires_grad_()
    output = interface_loss(
        hidden,
        weight,
        label_batch(case, config.interface, uld_topk=config.uld_topk),
        shared_head=None if config.interface in WITHOUT_HEAD else shared_head_of(case, placement, group),
        placement=placement,
        config=config,
        group=group,
        teacher_logit_softcap=case.teacher_softcap,
        student_logit_softcap=case.student_softcap,
    )
    output.sum.backward()
    return Evaluation(replace(output, sum=output.sum.detach()), hidden.grad, weight.grad)


def evaluate_oracle(
    case: LossCase, config: InterfaceConfig
) -> tuple[oracle.OracleLoss, torch.Tensor, torch.Tensor]:
    """(loss, gradient of student_hidden, gradient of the whole student_weight), in float64."""
    hidden = case.student_hidden.double().clone().requires_grad_()
    weight = case.student_weight.double().clone().requires_grad_()
    result = oracle.loss(
        hidden @ weight.T,
        case.teacher_hidden.double() @ case.teacher_weight.double().T,
        student_labels=case.student_labels,
        teacher_labels=case.teacher_labels,
        segments=case.segments,
        kinds=case.kinds,
        replaced=case.replaced,
        shared=case.shared,
        interface=config.interface,
        divergence_name=config.divergence,
        temperature=config.temperature,
        beta=config.js_beta,
        alm_temperature=config.alm_temperature,
        topk=config.topk,
        uld_topk=config.uld_topk,
        min_teacher_mass=config.min_teacher_mass,
        weights=case.weights,
        unit_score=config.unit_score,
        span_mse=config.span_mse,
        scalar=config.scalar,
        old_log_probs=case.old_log_probs,
        student_softcap=case.student_softcap,
        teacher_softcap=case.teacher_softcap,
    )
    result.sum.backward()
    return result, hidden.grad, weight.grad


def name_of(config: object) -> str:
    """The options that differ from the defaults, for the name of a test."""
    if not isinstance(config, InterfaceConfig):
        return str(config)
    changed = [getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default]
    return " ".join(map(str, changed)) or "paper"


CONFIGS = [
    InterfaceConfig(interface="paper"),
    InterfaceConfig(interface="paper", divergence="forward_kl"),
    InterfaceConfig(interface="paper", divergence="js"),
    InterfaceConfig(interface="paper", divergence="js", js_beta=0.2, temperature=0.7),
    InterfaceConfig(interface="paper", temperature=2.0),
    InterfaceConfig(interface="strict"),
    InterfaceConfig(interface="strict", divergence="forward_kl", temperature=1.5),
    InterfaceConfig(interface="strict", divergence="js", js_beta=0.9),
    InterfaceConfig(interface="sft"),
]

OTHERS = [
    InterfaceConfig(interface="sum"),
    InterfaceConfig(unit_score="sum", divergence="js", js_beta=0.3, temperature=1.5),
    InterfaceConfig(interface="code"),
    InterfaceConfig(interface="code", divergence="forward_kl", temperature=2.0),
    InterfaceConfig(interface="code", divergence="js"),
    InterfaceConfig(interface="code_gh"),
    InterfaceConfig(interface="alm"),
    InterfaceConfig(interface="alm", alm_temperature=3.0),
    InterfaceConfig(interface="strict_topk", topk=3),
    InterfaceConfig(interface="strict_topk", topk=2, divergence="forward_kl", temperature=1.5),
    InterfaceConfig(interface="strict_topk", topk=40, divergence="js"),
    InterfaceConfig(interface="uld", uld_topk=0),
    InterfaceConfig(interface="uld", uld_topk=5),
    InterfaceConfig(interface="paper", min_teacher_mass=0.7),
    InterfaceConfig(interface="strict", min_teacher_mass=0.6),
    InterfaceConfig(interface="strict", span_mse=0.25),
    InterfaceConfig(interface="scalar"),
    InterfaceConfig(interface="scalar", scalar="spread"),
]
"""Interfaces beside those of CONFIGS: other unit scores, events without shared tokens, and
fewer columns or rows.
"""

EXACT = [
    InterfaceConfig(interface="exact"),
    InterfaceConfig(interface="exact", divergence="forward_kl"),
    InterfaceConfig(interface="exact", divergence="js"),
    InterfaceConfig(interface="exact", divergence="js", js_beta=0.2),
    InterfaceConfig(interface="exact", min_teacher_mass=0.7),
]
"""For units as texts make them: `random_case(spelled=True)`."""
