"""Samples of one rank -> padded micro-batches, with the labels of each packed side by side.

Sequences are padded on the right to the longest of their micro-batch. A label's row is its predecessor's position, so
padding never carries a label and needs no mask in a causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from megatron_simct.records import (
    AlignedPair,
    ByteBatch,
    ByteEvents,
    ByteSide,
    ByteSideBatch,
    LabelBatch,
    MicroBatch,
    Prompt,
    Rollout,
    ScoredPair,
)


def pack_micro_batches(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    pairs: Sequence[AlignedPair],
    scored: Iterable[ScoredPair],
    *,
    micro_batch_size: int,
    check: Callable[[LabelBatch], None],
    multiple_of: int = 1,
) -> list[MicroBatch]:
    """len(prompts) / micro_batch_size micro-batches, the longest sequences first: the peak of memory comes early.

    prompts, rollouts and pairs are in one order; scored pairs come in any order and are matched by sample id. Tensors
    are on the CPU, but for what the teacher left on a device. `check` raises ValueError for labels that the loss could
    not read; it runs here, before anything is moved. Sequences are padded to `multiple_of` tokens.
    """
    scored = list(scored)
    scores = {score.sample_id: score for score in scored}
    ids, scored_ids = sorted(p.sample_id for p in pairs), sorted(s.sample_id for s in scored)
    assert ids == scored_ids, f"every pair is scored once: samples {ids}, scores of {scored_ids}"
    assert len(scores) == len(ids), f"sample ids are unique: {ids}"
    samples = [(p, r, a, scores[a.sample_id]) for p, r, a in zip(prompts, rollouts, pairs, strict=True)]
    assert all(p.sample_id == r.sample_id == a.sample_id for p, r, a, _ in samples), "records are in one order"
    samples.sort(key=lambda s: len(s[0].student_ids) + len(s[1].student_ids), reverse=True)
    assert len(samples) % micro_batch_size == 0, f"{len(samples)} samples in micro-batches of {micro_batch_size}"
    batches = [
        _pack(samples[begin : begin + micro_batch_size], multiple_of)
        for begin in range(0, len(samples), micro_batch_size)
    ]
    for batch in batches:
        check(batch.labels)
    return batches


def pad_right(sequences: Sequence[np.ndarray], *, multiple_of: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and position ids, int64 [B, S], with S the least multiple that holds the longest sequence."""
    width = -(-max(len(s) for s in sequences) // multiple_of) * multiple_of
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return tokens, torch.arange(width).expand(len(sequences), width)


def label_rows(prompt_lens: Sequence[int], label_lens: Sequence[int]) -> np.ndarray:
    """int64 [N]: row s * B + b of the output flattened as [S * B, H] that predicts each label, sample by sample."""
    batch = len(prompt_lens)
    return np.concatenate(
        [(p - 1 + np.arange(n)) * batch + b for b, (p, n) in enumerate(zip(prompt_lens, label_lens, strict=True))]
    ).astype(np.int64)


def _pack(samples: Sequence[tuple[Prompt, Rollout, AlignedPair, ScoredPair]], multiple_of: int) -> MicroBatch:
    sequences = [np.concatenate([p.student_ids, r.student_ids]) for p, r, _, _ in samples]
    tokens, positions = pad_right(sequences, multiple_of=multiple_of)
    rows = label_rows([len(p.student_ids) for p, _, _, _ in samples], [len(r.student_ids) for _, r, _, _ in samples])
    return MicroBatch(
        sample_ids=tuple(p.sample_id for p, _, _, _ in samples),
        tokens=tokens,
        position_ids=positions,
        label_rows=torch.from_numpy(rows),
        labels=_pack_labels([s[1:] for s in samples]),
    )


def _pack_labels(samples: Sequence[tuple[Rollout, AlignedPair, ScoredPair]]) -> LabelBatch:
    """Shift each sample's segments by the labels before it, and find the hidden row of each segment's first label."""
    segments, hidden_index = [], []
    teacher_offset = student_offset = hidden_offset = 0
    for rollout, pair, _ in samples:
        shift = np.array([teacher_offset, teacher_offset, student_offset, student_offset])
        segments.append(pair.segments + shift)
        first = _row_of_first_label(pair)
        hidden_index.append(np.where(first >= 0, first + hidden_offset, -1))
        teacher_offset += len(pair.teacher_ids)
        student_offset += len(rollout.student_ids)
        hidden_offset += len(pair.teacher_rows)
    events = [pair.byte_events for _, pair, score in samples if score.byte_logprobs is not None and pair.byte_events]
    hidden = [score.hidden for _, _, score in samples if score.hidden is not None]
    topk = [score.topk for _, _, score in samples if score.topk is not None]

    def ints(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))

    return LabelBatch(
        student_labels=ints([rollout.student_ids for rollout, _, _ in samples]),
        segments=ints(segments),
        kinds=ints([pair.kinds for _, pair, _ in samples]),
        replaced_columns=ints([pair.replaced_columns for _, pair, _ in samples]),
        teacher_first_columns=ints([pair.teacher_first_columns for _, pair, _ in samples]),
        weights=torch.from_numpy(np.concatenate([pair.weights for _, pair, _ in samples])),
        teacher_own_logit=torch.cat([score.own_logit for _, _, score in samples]),
        teacher_lse=torch.cat([score.lse for _, _, score in samples]),
        teacher_hidden=torch.cat(hidden) if hidden else None,
        teacher_hidden_index=ints(hidden_index),
        teacher_topk=torch.cat(topk) if topk else None,
        byte_batch=(
            pack_byte_events(
                events,
                [len(rollout.student_ids) for rollout, _, _ in samples],
                [score.byte_logprobs for _, _, score in samples if score.byte_logprobs is not None],
            )
            if events
            else None
        ),
    )


def pack_byte_events(
    events: Sequence[ByteEvents], num_labels: Sequence[int], teacher_logprobs: Sequence[torch.Tensor]
) -> ByteBatch:
    """The events of several responses as one; num_labels are those of the student."""
    return ByteBatch(
        num_positions=sum(e.num_positions for e in events),
        slot_position=_joined([e.slot_position for e in events], [e.num_positions for e in events]),
        slot_event=_joined([e.slot_event for e in events]),
        student_loose=torch.from_numpy(np.concatenate([e.student_loose for e in events])),
        teacher_loose=torch.from_numpy(np.concatenate([e.teacher_loose for e in events])),
        student=pack_byte_sides([e.student for e in events], num_labels),
        teacher_logprobs=torch.cat(list(teacher_logprobs)),
    )


def pack_byte_sides(sides: Sequence[ByteSide], num_labels: Sequence[int]) -> ByteSideBatch:
    """One model's sums for several responses, whose labels and slots follow one another."""
    return ByteSideBatch(
        segment_row=_joined([side.segment_row for side in sides], num_labels),
        segment_start=_joined([side.segment_start for side in sides]),
        entry_slot=_joined([side.entry_slot for side in sides], [side.last_row.size for side in sides]),
        entry_segment=_joined([side.entry_segment for side in sides], [side.segment_row.size for side in sides]),
        last_row=_joined([side.last_row for side in sides], num_labels),
    )


def _joined(arrays: Sequence[np.ndarray], sizes: Sequence[int] | None = None) -> torch.Tensor:
    """int64: the arrays one after another, each shifted by the sizes of those before it."""
    offsets = np.cumsum([0, *(sizes or [0] * len(arrays))])[:-1]
    return torch.from_numpy(np.concatenate([a.astype(np.int64) + by for a, by in zip(arrays, offsets, strict=True)]))


def _row_of_first_label(pair: AlignedPair) -> np.ndarray:
    """int64 [A]: index into teacher_rows of each segment's first teacher label, -1 where it was not asked for."""
    first = pair.segments[:, 0]
    where = np.searchsorted(pair.teacher_rows, first)
    found = where < len(pair.teacher_rows)
    found[found] = pair.teacher_rows[where[found]] == first[found]
    return np.where(found, where, -1)
