"""The five records that flow between the six hops of one training step.

    prompts -> rollout -> alignment -> teacher -> losses -> update
       Prompt -> Rollout -> AlignedPair -> ScoredPair -> MicroBatch

Every record is frozen and documents the shape of each field. Records of one sample hold numpy arrays (they
are built on CPU workers and travel between processes); records that a model reads or wrote hold torch
tensors.

Shape letters, used in the whole package:
    B sequences   S padded sequence   N student labels   M teacher labels   A segments
    R requested teacher rows
    V full vocabulary   W this rank's slice of it (W = padded V / tp)   C shared tokens   H hidden size
Names of student and teacher differ by a prefix or by the suffixes _S and _T.

A *label* is a response token; label p of a response is predicted by row (prompt length + p - 1) of the model.
A sequence may hold several responses with other text between them (Transcript). Its labels are the tokens of
the responses, counted from 0 without what lies between; each is predicted by the row of the token before it.
In a *segment* (ts, te, ss, se) teacher labels [ts, te) and student labels [ss, se) spell the same bytes.

Example. The student samples "ha" "ppy" "</s>", the teacher's tokenizer encodes it as "hap" "py" "<|im_end|>":
    segments = [[0, 2, 0, 2],    "happy", a unit of two tokens on both sides
                [2, 3, 2, 3]]    the stop tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch  # alignment reads these records on machines that have no torch


class SegmentKind(IntEnum):
    """What a segment is to the loss (method: a row of U is the shared tokens, plus the unit where there is
    one).
    """

    SHARED = 0
    """One token on each side, and the two are a pair of the shared vocabulary, or a match of the authors'
    walk: the row has no unit column."""
    UNIT = 1
    """Anything else: the row has a unit column scored over the segment's tokens."""
    STOP = 2
    """The stop tokens of both sides; like SHARED for the loss, counted apart in the metrics."""


STOP, REST, SLACK, OUTSIDE = 256, 257, 258, 259
"""Kinds of slots of ByteEvents, beside the bytes 0 .. 255; the last two are not events."""
OTHERS, FREE, ENDED, CAP = 260, 261, 262, 263
"""The same in the events of `plan_byte_bounds`: several bytes, or ids without content; the last three are not
events.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSide:
    """The sums of one model for the interface `bytes` (alignment/byte_events.py).

    Every row's vocabulary, in the order of its bytes, is cut into consecutive segments, and a slot adds up
    segments of one or several rows. G segments, X entries, E slots.
    """

    segment_row: np.ndarray
    """int32 [G], ascending: the row, which is the label that it predicts."""
    segment_start: np.ndarray
    """int32 [G]: where in the byte order the segment starts; it ends at the next one, a row's last at V."""
    entry_slot: np.ndarray
    """int32 [X]: the slot that adds ..."""
    entry_segment: np.ndarray
    """int32 [X]: ... this segment."""
    last_row: np.ndarray
    """int32 [E]: the row of the model's last boundary at or before the slot's position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteEvents:
    """Where and on what two models' next-byte distributions are compared.

    Slots are in the order of the positions.
    """

    num_positions: int
    """P: byte positions that have at least two events."""
    slot_position: np.ndarray
    """int32 [E], ascending."""
    slot_event: np.ndarray
    """int16 [E]: a byte, STOP or OTHERS; FREE: mass that any event may have; ENDED: mass that all events may
    have whose slot_cap it is, CAP: the part of ENDED that these events may have. With bounds of the longest
    match a byte, STOP or REST; SLACK: how much more a loose byte may have; OUTSIDE, in mixtures only: what
    is in no event of a position without REST."""
    student: ByteSide
    teacher: ByteSide
    slot_cap: np.ndarray | None = None
    """int32 [E]: the slot that bounds an event, beside FREE; -1 for none.

    None with bounds of the longest match.
    """
    student_loose: np.ndarray | None = None
    """bool [E], with bounds of the longest match: bytes that the student's rows bound from below only."""
    teacher_loose: np.ndarray | None = None
    """bool [E]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherNeeds:
    """What an interface asks of the teacher, so that nothing else is computed or sent.

    Own logits and log-sum-exp (8 bytes a label) always come; `hidden_rows` selects the hidden states that
    come too: "none", "one_to_one" (segments of kind SHARED and STOP), "first" (the first teacher row of every
    segment), "all".
    """

    teacher: bool = True
    hidden_rows: Literal["none", "one_to_one", "first", "all"] = "first"
    segmentation: Literal["minimal", "authors"] = "minimal"
    topk: int = 0
    """Log-probabilities of the likeliest tokens that come for each row of hidden_rows, in place of hidden
    states.
    """
    token_ids: bool = False
    """Whether the ids of these tokens come too (ScoredPair.topk_ids)."""
    byte_events: bool = False
    """Whether log-probabilities of byte events come (ScoredPair.byte_logprobs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row of --prompt-data, for --reward and --environment."""

    prompt: str | Sequence[Mapping[str, Any]]
    """A text, or messages."""
    row: Mapping[str, Any]
    """All of it, as it was read."""
    teacher_prompt: str | Sequence[Mapping[str, Any]] | None = None
    """What the teachers read instead of the prompt, if that is another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Several responses in one sequence, in one model's tokens."""

    ids: np.ndarray
    """int32 [n]: all tokens behind the prompt, up to the end of the last response."""
    spans: np.ndarray
    """int32 [T, 2], ascending: the tokens [start, end) of each response, with its stop token if it has one.
    """

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], ascending: which of the tokens belong to responses."""
        return np.concatenate([np.arange(start, end) for start, end in self.spans.tolist()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The same T responses in every model's tokens, each model's own chat template between them."""

    student: Turns
    teachers: tuple[Turns, ...]
    """Empty if nothing is compared."""
    counts: dict[str, int] = field(default_factory=dict)
    """turns, bytes_of_turns and bytes_masked_<reason> (data/transcripts.py)."""
    readers: str = ""
    """Fingerprint of the tokenizers and templates of all models; of responses that an environment answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One conversation, rendered for both models. `data` -> `rollout`."""

    sample_id: int
    """Unique in a run: it seeds the sampling, names the sample in logs, and pairs the records of later hops.
    Below 0 for a given row of --given-share."""
    student_ids: np.ndarray
    """int32 [ps]"""
    teacher_ids: np.ndarray
    """int32 [pt]"""
    other_teacher_ids: tuple[np.ndarray, ...] = ()
    """The same of the other teachers of a mixture."""
    teacher: str = ""
    """The name of the row's teacher, of a mixture that with the largest weight; empty without --teachers."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Names and weights of the teachers that are mixed for this row of --teachers, in the order of
    teacher_ids and other_teacher_ids; empty if one scores it alone."""
    response: str | None = None
    """The given response, for interface `sft` and --simct-on given."""
    transcript: Transcript | None = None
    """Several given responses in its place, for --simct-on given."""
    label: str | None = None
    """The expected response, for evaluation."""
    room: int | None = None
    """Tokens that its response may have, if fewer than Sampling.max_response_len."""
    asked: Asked | None = None
    """What a reward is a function of beside the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response of the student. `rollout` -> `alignment`."""

    sample_id: int
    weight_version: int
    """Number of optimizer steps that the sampling weights had seen; of the first token, if several versions
    sampled the response (rollout/oversampling.py); -1 for a given response (`sft`)."""
    student_ids: np.ndarray
    """int32 [n], the stop token included when finish is "stop"."""
    logprobs: np.ndarray
    """float32 [N], of the labels: log-softmax of the untempered, untruncated logits over the real vocabulary.
    """
    finish: Literal["stop", "length", "open"]
    """open: the response is not finished; only `rollout` handles such responses."""
    transcript: Transcript | None = None
    """With several responses: where they lie in student_ids, and the same in the teachers' tokens."""
    turn: int = 0
    """Which of several responses it is, if it is one of them."""

    @property
    def label_ids(self) -> np.ndarray:
        """int32 [N]: the tokens of the responses; all tokens if there is one response."""
        given = self.transcript
        return self.student_ids if given is None else self.student_ids[given.student.labels]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedPair:
    """The response in the teacher's tokens, cut into minimal common units. `alignment` -> `teacher`.

    It needs no model. `teacher_rows` tells the teacher which hidden states to return.
    """

    sample_id: int
    teacher_prompt_ids: np.ndarray
    """int32 [pt]"""
    teacher_ids: np.ndarray
    """int32 [m], the teacher's labels: the retokenized response, with its stop token when the student
    stopped. With several responses all tokens from the first one on; what lies between is in no segment.
    """
    segments: np.ndarray
    """int32 [A, 4] of (ts, te, ss, se)."""
    kinds: np.ndarray
    """int8 [A] of SegmentKind."""
    replaced_columns: np.ndarray
    """int32 [A]: student id of the shared token whose bytes a UNIT spells (its score replaces that column),
    or -1.
    """
    teacher_first_columns: np.ndarray
    """int32 [A]: student id of the shared token that the first teacher label of a UNIT is, or -1."""
    weights: np.ndarray
    """float32 [A]: what the loss of each segment is multiplied by; 0 leaves it out."""
    teacher_rows: np.ndarray
    """int32 [R], sorted label positions p whose predicting hidden state the teacher returns."""
    needs: TeacherNeeds
    byte_events: ByteEvents | None = None
    """What both models sum, where needs.byte_events asks for it."""
    others: tuple[AlignedPair, ...] = ()
    """The same response for the other teachers of a mixture, with the same slots of byte_events."""
    teacher_labels: np.ndarray | None = None
    """int64 [M], ascending: which of teacher_ids belong to responses; None: all."""
    teacher: str | None = ""
    """The name of the teacher that scores it; empty without --teachers; None: nobody has scored it."""
    teacher_weight: float = 1.0
    """The weight of this teacher in the mixture of a row of --teachers."""
    counts: dict[str, int] = field(default_factory=dict)
    """bytes, bytes_one_to_one, bytes_unit, bytes_dropped_<reason>, and other additive counts for the metrics.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """The teacher's scores for one AlignedPair. `teacher` -> `losses`."""

    sample_id: int
    own_logit: torch.Tensor
    """float32 [m]: the raw logit of each teacher label at its own row, after any soft-cap."""
    lse: torch.Tensor
    """float32 [m]: log-sum-exp over the teacher's real vocabulary at the same rows."""
    hidden: torch.Tensor | None
    """[R, H_T]: what enters the LM head at AlignedPair.teacher_rows; None when no row was asked for."""
    topk: torch.Tensor | None = None
    """float32 [R, k]: log-probabilities of the teacher's likeliest tokens at AlignedPair.teacher_rows,
    descending.
    """
    topk_ids: torch.Tensor | None = None
    """int32 [R, k]: which tokens these are."""
    byte_logprobs: torch.Tensor | None = None
    """float32 [E]: the teacher's log-probability of each slot of AlignedPair.byte_events, relative to its
    path.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteBatch:
    """The byte events of a micro-batch and the teacher's log-probabilities of them; fields as in
    ByteEvents.
    """

    num_positions: int
    slot_position: torch.Tensor
    """int64 [E]"""
    slot_event: torch.Tensor
    """int64 [E]"""
    student: ByteSideBatch
    teacher_logprobs: torch.Tensor
    """float32 [E]"""
    part: ByteSidePart | None = None
    """With context parallelism: everything else is of its slots only, and `student` is its `sums`."""
    slot_cap: torch.Tensor | None = None
    """int64 [E]"""
    student_loose: torch.Tensor | None = None
    """bool [E]"""
    teacher_loose: torch.Tensor | None = None
    """bool [E]"""

    def to(self, device: torch.device) -> ByteBatch:
        """The same with every tensor on the device."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSideBatch:
    """ByteSide over the packed labels of a micro-batch; all int64."""

    segment_row: torch.Tensor
    segment_start: torch.Tensor
    entry_slot: torch.Tensor
    entry_segment: torch.Tensor
    last_row: torch.Tensor

    def to(self, device: torch.device) -> ByteSideBatch:
        """The same with every tensor on the device."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSidePart:
    """What a context-parallel rank sums of a ByteSideBatch: the slots whose last row it holds. All int64.

    A slot may need segments of rows before that, which another rank has: their sums are exchanged. Only slots
    near a cut have any. Segments are numbered anew: those of this rank's rows, then those of other ranks that
    this rank's slots need.
    """

    rows: ByteSideBatch
    """The segments of this rank's rows, and no slots; rows are numbered anew too."""
    sums: ByteSideBatch
    """This rank's slots and the segments they add up; segment_row and last_row are labels of the whole
    batch.
    """
    slots: torch.Tensor
    """[e]: which slots of the whole batch they are."""
    num_exchanged: int
    """Number of segments that one rank holds and another one needs."""
    sent: torch.Tensor
    """The exchanged segments that this rank holds, by their number among the exchanged ones."""
    sent_segment: torch.Tensor
    """The numbers of `sent` among this rank's segments."""
    received: torch.Tensor
    """Numbers of the other exchanged segments that this rank's slots need, ascending."""

    def to(self, device: torch.device) -> ByteSidePart:
        """The same with every tensor on the device."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryBatch:
    """Events of an interface that compares single tokens: one student token behind some student labels.

    E events.
    """

    segment: torch.Tensor
    """int64 [E]: the segment that an event belongs to."""
    start: torch.Tensor
    """int64 [E]: the first label of the path; the labels [start, label) come before the token."""
    label: torch.Tensor
    """int64 [E]: the label in whose place the token stands: its row predicts it."""
    column: torch.Tensor
    """int64 [E]: the token, a student id."""
    teacher_log_probs: torch.Tensor
    """[E]: the teacher's log-probability of the event."""
    group: torch.Tensor | None = None
    """int64 [E]: entries that are one event together, side by side, have one number; -1: an event of its own.
    """

    def to(self, device: torch.device) -> EntryBatch:
        """The same with every tensor on the device."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelBatch:
    """The labels of a micro-batch, packed over its sequences: what the loss reads beside hidden states.

    Indices in `segments` point into the packed student labels [N] and the packed teacher labels [M].
    """

    student_labels: torch.Tensor
    """int64 [N], ids in the student's full vocabulary."""
    segments: torch.Tensor
    """int64 [A, 4]; empty for `sft`."""
    kinds: torch.Tensor
    """int64 [A] of SegmentKind."""
    replaced_columns: torch.Tensor
    """int64 [A], a student id or -1."""
    teacher_first_columns: torch.Tensor
    """int64 [A], a student id or -1."""
    weights: torch.Tensor
    """float32 [A]"""
    teacher_own_logit: torch.Tensor
    """float32 [M]"""
    teacher_lse: torch.Tensor
    """float32 [M]"""
    teacher_hidden: torch.Tensor | None
    """[R, H_T], rows of the whole micro-batch."""
    teacher_hidden_index: torch.Tensor
    """int64 [A]: the row of `teacher_hidden` for the segment's first teacher label; -1 if none was asked
    for.
    """
    teacher_topk: torch.Tensor | None = None
    """float32 [R, k], log-probabilities, descending; rows as in `teacher_hidden`."""
    byte_batch: ByteBatch | None = None
    """For the interface `bytes`."""
    sampling_log_probs: torch.Tensor | None = None
    """float32 [N]: the student labels' log-probabilities when they were sampled (Rollout.logprobs)."""
    advantages: torch.Tensor | None = None
    """float32 [N]: --reward-weight times the advantage of each label's response."""
    label_weights: torch.Tensor | None = None
    """float32 [N], for `sft`: what the loss of each label is multiplied by; None: 1."""
    entries: EntryBatch | None = None
    """For the interfaces `partition`, `topk_kl` and `bpm`."""
    response_starts: torch.Tensor | None = None
    """int64 [B], ascending: the first label of each response, for importance weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """What one forward pass reads: B sequences beside each other, or packed one after another in one row."""

    tokens: torch.Tensor
    """int64 [B, S]: prompt and response, padded on the right; packed [1, S]."""
    position_ids: torch.Tensor
    """int64 [B, S], each token's place in its sequence; the same in every row."""
    lengths: tuple[int, ...] | None
    """Tokens of each packed sequence, the last of them being what fills the row up; None: each row is a
    sequence.
    """
    label_rows: torch.Tensor
    """int64 [N]: the row of the model's output, flattened as [S * B, H], that predicts each label (s * B +
    b).
    """
    label_index: torch.Tensor | None = None
    """int64 [n], ascending: with context parallelism, the labels whose rows this rank holds. S is then this
    rank's share of the tokens, and label_rows [n] are of these labels."""
    label_owner: torch.Tensor | None = None
    """int64 [N]: the context-parallel rank that holds the row of each label."""

    def to(self, device: torch.device) -> SequenceBatch:
        """The same with every tensor on the device."""
        return _moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences of the student and their labels.

    `losses` reads it, `update` feeds it to Megatron's schedule.
    """

    sample_ids: tuple[int, ...]
    """In the order of the sequences."""
    num_labels: tuple[int, ...]
    """How many each sample has; N in all."""
    sequences: SequenceBatch
    labels: LabelBatch
    teacher: str | None = ""
    """The name of the teacher that has scored all its samples; empty without --teachers. None: nobody has
    scored them, and they add nothing to the loss (--missing-teacher drop)."""
    reference: LabelBatch | None = None
    """The same labels, each beside what the student at its start says of it, for --reference-kl-weight."""
    is_given: bool = False
    """Whether the responses are given ones of --given-share, whose loss is `sft`; their labels do not count.
    """

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with every tensor on the device."""
        return _moved(self, device)


def _moved(record: Any, device: torch.device) -> Any:
    import torch

    changes: dict[str, Any] = {}
    for name in record.__slots__:
        value = getattr(record, name)
        if isinstance(value, torch.Tensor):
            changes[name] = value.to(device, non_blocking=True)
        elif isinstance(
            value, LabelBatch | ByteBatch | ByteSideBatch | ByteSidePart | EntryBatch | SequenceBatch
        ):
            changes[name] = _moved(value, device)
    return replace(record, **changes)
