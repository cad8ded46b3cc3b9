"""Samples of one rank -> micro-batches, with the labels of each packed side by side.

Either a fixed number of sequences each, padded on the right to the longest of their micro-batch, or as many
as --max-tokens-per-gpu allows, packed one after another in one row. A label's row is its predecessor's
position, so padding never carries a label and needs no mask in a causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_simct.records import (
    AlignedPair,
    ByteBatch,
    ByteEvents,
    ByteSide,
    ByteSideBatch,
    ByteSidePart,
    EntryBatch,
    LabelBatch,
    MicroBatch,
    Prompt,
    Rollout,
    ScoredPair,
    SequenceBatch,
)

Entries = Callable[[Rollout, AlignedPair, ScoredPair], EntryBatch]
"""LabelBatch.entries of one response, for interfaces that compare single tokens."""
Cut = Callable[[Sequence[int]], list[list[int]]]
"""Lengths of a rank's sequences -> which of them each micro-batch has.

Collective where ranks must cut alike.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Which tokens of a row each context-parallel rank holds."""

    rank: int
    size: int
    pieces: Callable[[int, int], list[slice]]
    """(tokens of a row, rank) -> its pieces, in the order in which it holds them."""


def pack_micro_batches(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    pairs: Sequence[AlignedPair],
    scored: Iterable[ScoredPair],
    *,
    cut: Cut,
    check: Callable[[MicroBatch], None],
    packed: bool = False,
    multiple_of: int = 1,
    context: Context | None = None,
    entries: Entries | None = None,
    advantages: Mapping[int, float] | None = None,
    reference: Mapping[int, tuple[AlignedPair, ScoredPair]] | None = None,
) -> list[MicroBatch]:
    """The micro-batches of a step, chosen by `cut`; sequences are packed or padded to `multiple_of` tokens.

    prompts, rollouts and pairs are in one order; scored pairs come in any order and are matched by sample id.
    Tensors are on the CPU, but for what the teacher left on a device. `check` raises ValueError for labels
    that the loss could not read; it runs here, before anything is moved, for those that have scores. context:
    see sequence_batch. advantages: of the samples, by id, times the weight of their term. reference: by id,
    MicroBatch.reference of each sample.
    """
    scored = list(scored)
    # The teacher answers in any order, so scores are matched by sample id.
    scores = {score.sample_id: score for score in scored}
    ids, scored_ids = sorted(p.sample_id for p in pairs), sorted(s.sample_id for s in scored)
    assert ids == scored_ids, f"every pair is scored once: samples {ids}, scores of {scored_ids}"
    assert len(scores) == len(ids), f"sample ids are unique: {ids}"
    samples = [(p, r, a, scores[a.sample_id]) for p, r, a in zip(prompts, rollouts, pairs, strict=True)]
    assert all(p.sample_id == r.sample_id == a.sample_id for p, r, a, _ in samples), (
        "records are in one order"
    )
    lengths = [len(prompt.student_ids) + len(rollout.student_ids) for prompt, rollout, _, _ in samples]
    batches = [
        _pack(
            [samples[i] for i in chosen],
            packed=packed,
            multiple_of=multiple_of,
            context=context,
            entries=entries,
        )
        for chosen in cut(lengths)
    ]
    if advantages is not None:
        batches = [_with_advantages(batch, advantages) for batch in batches]
    if reference is not None:
        of = {rollout.sample_id: (rollout, *reference[rollout.sample_id]) for rollout in rollouts}
        batches = [replace(b, reference=_pack_labels([of[i] for i in b.sample_ids])) for b in batches]
    for batch in batches:
        if batch.teacher is not None:
            check(batch)
    return batches


def _with_advantages(batch: MicroBatch, advantages: Mapping[int, float]) -> MicroBatch:
    of_samples = torch.tensor([advantages[sample_id] for sample_id in batch.sample_ids], dtype=torch.float32)
    of_labels = of_samples.repeat_interleave(torch.tensor(batch.num_labels))
    return replace(batch, labels=replace(batch.labels, advantages=of_labels))


def by_number(lengths: Sequence[int], *, size: int) -> list[list[int]]:
    """`size` sequences in each micro-batch, the longest first: the peak of memory comes early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def by_tokens(
    lengths: Sequence[int], *, max_tokens: int, agree: Callable[[int], int] = lambda count: count
) -> list[list[int]]:
    """As few micro-batches of at most max_tokens as first-fit decreasing finds, that with most tokens first.

    A sequence that is longer than max_tokens is a micro-batch of its own. agree: from the number that this
    rank needs to the one that all ranks have, which is at most the number of sequences; the largest
    micro-batches are halved until that number is reached.
    """
    bins: list[list[int]] = []
    totals: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # First fit: the first bin with room. Lengths descend, so shorter sequences fill the gaps.
        fits = next((b for b, total in enumerate(totals) if total + lengths[i] <= max_tokens), None)
        if fits is None:
            bins.append([i])
            totals.append(lengths[i])
        else:
            bins[fits].append(i)
            totals[fits] += lengths[i]

    # Every rank needs the same number of micro-batches: that of the rank that needs most.
    return _split(bins, lengths, number=agree(len(bins)))


def by_teacher(
    lengths: Sequence[int], *, teachers: Sequence[str | None], cut: Cut, agree: Callable[[int], int]
) -> list[list[int]]:
    """Micro-batches whose sequences have one teacher each.

    teachers: of each sequence. cut: of the sequences of one teacher; it must not be collective, since a rank
    may have no sequence of a teacher. agree: as of by_tokens, for the micro-batches of all teachers together.
    """
    bins: list[list[int]] = []
    for name in dict.fromkeys(teachers):
        own = [i for i, teacher in enumerate(teachers) if teacher == name]
        bins += [[own[i] for i in chosen] for chosen in cut([lengths[i] for i in own])]
    return _split(bins, lengths, number=agree(len(bins)))


def _split(bins: list[list[int]], lengths: Sequence[int], *, number: int) -> list[list[int]]:
    """So many micro-batches, that with most tokens first: the largest ones are halved."""

    def tokens(chosen: Sequence[int]) -> int:
        return sum(lengths[i] for i in chosen)

    assert len(bins) <= number <= len(lengths), f"{number} micro-batches of {len(lengths)} samples"
    bins = list(bins)
    while len(bins) < number:
        largest = max((chosen for chosen in bins if len(chosen) > 1), key=tokens)
        bins.remove(largest)
        halves: tuple[list[int], list[int]] = ([], [])
        for i in largest:  # longest first, each to the half that has less
            min(halves, key=tokens).append(i)
        bins += halves
    return sorted(bins, key=tokens, reverse=True)


def sequence_batch(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    *,
    packed: bool,
    multiple_of: int = 1,
    context: Context | None = None,
    labels: Sequence[np.ndarray | None] | None = None,
) -> SequenceBatch:
    """Prompts with their responses, whose tokens are the labels, packed in one row or padded beside each
    other.

    context: the tokens of the rows that this rank holds; None: all. labels: which tokens of each response are
    its labels; None: all.
    """
    sequences = [np.concatenate(both) for both in zip(prompts, responses, strict=True)]
    of_responses = [
        np.arange(len(response)) if chosen is None else chosen
        for response, chosen in zip(responses, labels or [None] * len(responses), strict=True)
    ]
    label_lens = [len(chosen) for chosen in of_responses]
    first_labels = np.array([len(prompt) for prompt in prompts])
    if packed:
        sizes = [len(sequence) for sequence in sequences]
        lengths: tuple[int, ...] | None = tuple(sizes)
        # The filling is a sequence of its own: attention never mixes it with a real one.
        filling = -sum(sizes) % multiple_of
        if filling:
            sequences.append(np.zeros(filling, np.int32))
            lengths = (*sizes, filling)
        tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
        # All sequences lie in row 0: a label's column is offset by the sequences before its own.
        first_labels += np.cumsum([0, *sizes[:-1]])
        row_of_sample = np.zeros(len(sizes), np.int64)
    else:
        tokens, positions = pad_right(sequences, multiple_of=multiple_of)
        lengths = None
        row_of_sample = np.arange(len(sequences))
    # The output at a token predicts the next one, so a label's row is one column before the label.
    starts = zip(first_labels, of_responses, strict=True)
    places = torch.from_numpy(
        np.concatenate([first - 1 + chosen for first, chosen in starts]).astype(np.int64)
    )
    row_of_label = torch.from_numpy(row_of_sample.repeat(label_lens))
    index = owner = None
    if context is not None:
        num_tokens = tokens.shape[1]
        # owners[t]: the rank that holds token t of a row. local[t]: its column on that rank.
        owners, local = torch.empty(num_tokens, dtype=torch.int64), torch.empty(num_tokens, dtype=torch.int64)
        for rank in range(context.size):
            kept = torch.cat(
                [torch.arange(piece.start, piece.stop) for piece in context.pieces(num_tokens, rank)]
            )
            owners[kept], local[kept] = rank, torch.arange(len(kept))
        # Sorted by `local`, because a rank holds its pieces in the order of `context.pieces`, which need not
        # be ascending.
        local_tokens = (owners == context.rank).nonzero()[:, 0]
        local_tokens = local_tokens[local[local_tokens].argsort()]
        tokens, positions = tokens[:, local_tokens], positions[:, local_tokens]
        # `owner` covers all N labels, `index` those of them that this rank keeps; `places` become columns on
        # this rank.
        owner = owners[places]
        index = (owner == context.rank).nonzero()[:, 0]
        places, row_of_label = local[places[index]], row_of_label[index]
    return SequenceBatch(
        tokens=tokens,
        position_ids=positions,
        lengths=lengths,
        # tokens are [B, S] but hidden states [S, B, H]: flattened, column s of row b is at s * B + b.
        label_rows=places * len(tokens) + row_of_label,
        label_index=index,
        label_owner=owner,
    )


def pad_right(sequences: Sequence[np.ndarray], *, multiple_of: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and position ids, int64 [B, S], with S the least multiple that holds the longest sequence."""
    width = -(-max(len(s) for s in sequences) // multiple_of) * multiple_of
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return tokens, torch.arange(width).expand(len(sequences), width)


def _pack(
    samples: Sequence[tuple[Prompt, Rollout, AlignedPair, ScoredPair]],
    *,
    packed: bool,
    multiple_of: int,
    context: Context | None,
    entries: Entries | None,
) -> MicroBatch:
    rollouts = [rollout for _, rollout, _, _ in samples]
    sequences = sequence_batch(
        [prompt.student_ids for prompt, _, _, _ in samples],
        [rollout.student_ids for rollout in rollouts],
        packed=packed,
        multiple_of=multiple_of,
        context=context,
        labels=[None if r.transcript is None else r.transcript.student.labels for r in rollouts],
    )
    labels = _pack_labels([s[1:] for s in samples])
    teacher = samples[0][2].teacher
    assert all(pair.teacher == teacher for _, _, pair, _ in samples), "a micro-batch has one teacher"
    if entries is not None and all(score.topk_ids is not None for *_, score in samples):
        of_samples = [(entries(rollout, pair, score), rollout, pair) for _, rollout, pair, score in samples]
        labels = replace(labels, entries=pack_entries(of_samples))
    if context is not None and labels.byte_batch is not None:
        assert sequences.label_owner is not None, "ranks that share sequences know who has which label"
        labels = replace(
            labels, byte_batch=part_of_events(labels.byte_batch, sequences.label_owner, context.rank)
        )
    return MicroBatch(
        sample_ids=tuple(prompt.sample_id for prompt, _, _, _ in samples),
        num_labels=tuple(len(rollout.label_ids) for rollout in rollouts),
        sequences=sequences,
        labels=labels,
        teacher=teacher,
    )


def _pack_labels(samples: Sequence[tuple[Rollout, AlignedPair, ScoredPair]]) -> LabelBatch:
    """Shift each sample's segments by the labels before it, and find the hidden row of each segment's first
    label.
    """
    segments, hidden_index, of_teacher = [], [], []
    teacher_offset = student_offset = hidden_offset = 0
    for rollout, pair, score in samples:
        own_segments, num_teacher_labels, *scores = _without_what_lies_between(pair, score)
        of_teacher.append(scores)
        # A segment is (ts, te, ss, se): two teacher labels, two student labels.
        shift = np.array([teacher_offset, teacher_offset, student_offset, student_offset])
        segments.append(own_segments + shift)
        first = _row_of_first_label(pair)
        # Indexes the concatenated rows of `teacher_hidden`; -1 marks a row that was not requested.
        hidden_index.append(np.where(first >= 0, first + hidden_offset, -1))
        teacher_offset += num_teacher_labels
        student_offset += len(rollout.label_ids)
        hidden_offset += len(pair.teacher_rows)
    events = [
        pair.byte_events for _, pair, score in samples if score.byte_logprobs is not None and pair.byte_events
    ]
    hidden = [score.hidden for _, _, score in samples if score.hidden is not None]
    topk = [score.topk for _, _, score in samples if score.topk is not None]

    def ints(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))

    return LabelBatch(
        student_labels=ints([rollout.label_ids for rollout, _, _ in samples]),
        segments=ints(segments),
        kinds=ints([pair.kinds for _, pair, _ in samples]),
        replaced_columns=ints([pair.replaced_columns for _, pair, _ in samples]),
        teacher_first_columns=ints([pair.teacher_first_columns for _, pair, _ in samples]),
        weights=torch.from_numpy(np.concatenate([pair.weights for _, pair, _ in samples])),
        teacher_own_logit=torch.cat([own_logit for own_logit, _ in of_teacher]),
        teacher_lse=torch.cat([lse for _, lse in of_teacher]),
        teacher_hidden=torch.cat(hidden) if hidden else None,
        teacher_hidden_index=ints(hidden_index),
        teacher_topk=torch.cat(topk) if topk else None,
        sampling_log_probs=torch.from_numpy(np.concatenate([rollout.logprobs for rollout, _, _ in samples])),
        response_starts=torch.from_numpy(
            np.cumsum([0, *(len(rollout.label_ids) for rollout, _, _ in samples[:-1])])
        ),
        byte_batch=(
            pack_byte_events(
                events,
                [len(rollout.label_ids) for rollout, _, _ in samples],
                [score.byte_logprobs for _, _, score in samples if score.byte_logprobs is not None],
            )
            if events
            else None
        ),
    )


def _without_what_lies_between(
    pair: AlignedPair, score: ScoredPair
) -> tuple[np.ndarray, int, torch.Tensor, torch.Tensor]:
    """The segments [A, 4] with labels of responses only, M, and the teacher's own logit and log-sum-exp [M].

    Without scores, on the first pipeline stages, these two stay empty.
    """
    labels = pair.teacher_labels
    if labels is None:
        return pair.segments, len(pair.teacher_ids), score.own_logit, score.lse
    segments = pair.segments.copy()
    # From tokens to labels: the number of labels before a token.
    segments[:, :2] = np.searchsorted(labels, segments[:, :2])
    kept = torch.from_numpy(labels).to(score.lse.device) if len(score.lse) else slice(None)
    return segments, len(labels), score.own_logit[kept], score.lse[kept]


def pack_entries(samples: Sequence[tuple[EntryBatch, Rollout, AlignedPair]]) -> EntryBatch:
    """The events of several responses as one."""
    # Entry i is the number of segments, or student labels, of the responses before i.
    segments = np.cumsum([0, *(len(pair.segments) for _, _, pair in samples)])
    labels = np.cumsum([0, *(len(rollout.label_ids) for _, rollout, _ in samples)])
    found = [entries for entries, _, _ in samples]

    def joined(name: str, offsets: np.ndarray) -> torch.Tensor:
        return torch.cat([getattr(e, name) + by for e, by in zip(found, offsets.tolist(), strict=False)])

    return EntryBatch(
        segment=joined("segment", segments),
        start=joined("start", labels),
        label=joined("label", labels),
        column=torch.cat([e.column for e in found]),
        teacher_log_probs=torch.cat([e.teacher_log_probs for e in found]),
        group=_groups_behind([e.group for e in found if e.group is not None]),
    )


def _groups_behind(groups: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """int64: the groups of all, each response's behind those before; -1 stays."""
    if not groups:
        return None
    # Groups of a response count from 0, so the next response's begin at the largest number plus 1.
    counts = [int(group.amax().clamp(min=-1)) + 1 if len(group) else 0 for group in groups]
    offsets = np.cumsum([0, *counts]).tolist()
    return torch.cat([torch.where(g >= 0, g + by, -1) for g, by in zip(groups, offsets, strict=False)])


def pack_byte_events(
    events: Sequence[ByteEvents], num_labels: Sequence[int], teacher_logprobs: Sequence[torch.Tensor]
) -> ByteBatch:
    """The events of several responses as one; num_labels are those of the student."""
    return ByteBatch(
        num_positions=sum(e.num_positions for e in events),
        slot_position=_joined([e.slot_position for e in events], [e.num_positions for e in events]),
        slot_event=_joined([e.slot_event for e in events]),
        student=pack_byte_sides([e.student for e in events], num_labels),
        teacher_logprobs=torch.cat(list(teacher_logprobs)),
        slot_cap=_slots_behind(events),
        student_loose=_flags([e.student_loose for e in events]),
        teacher_loose=_flags([e.teacher_loose for e in events]),
    )


def _slots_behind(events: Sequence[ByteEvents]) -> torch.Tensor | None:
    """int64: slot_cap of all, shifted like the slots; -1 stays."""
    caps = [e.slot_cap for e in events if e.slot_cap is not None]
    if len(caps) < len(events):
        return None
    # A cap is the number of a slot of the same response; the slots of earlier responses precede it.
    shifted = _joined(caps, [cap.size for cap in caps])
    return torch.where(torch.from_numpy(np.concatenate(caps)) >= 0, shifted, -1)


def _flags(arrays: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    given = [array for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(given)) if len(given) == len(arrays) else None


def pack_byte_sides(sides: Sequence[ByteSide], num_labels: Sequence[int]) -> ByteSideBatch:
    """One model's sums for several responses, whose labels and slots follow one another."""
    return ByteSideBatch(
        segment_row=_joined([side.segment_row for side in sides], num_labels),
        segment_start=_joined([side.segment_start for side in sides]),
        entry_slot=_joined([side.entry_slot for side in sides], [side.last_row.size for side in sides]),
        entry_segment=_joined(
            [side.entry_segment for side in sides], [side.segment_row.size for side in sides]
        ),
        last_row=_joined([side.last_row for side in sides], num_labels),
    )


def part_of_bytes(side: ByteSideBatch, owner: torch.Tensor, rank: int) -> ByteSidePart:
    """This context-parallel rank's part of one model's slots. owner int64 [N]: the rank that holds each
    label's row.

    Exchanged segments have the same numbers on every rank, because every rank knows the whole batch.
    """
    last = side.last_row.clamp(max=max(len(owner) - 1, 0))
    # A rank adds up the slots whose last row it holds, and sums the segments of the rows that it holds. A
    # slot near a cut between ranks needs segments of another rank: these sums are exchanged.
    slot_owner, segment_owner = owner[last], owner[side.segment_row]
    of_slot, of_segment = slot_owner[side.entry_slot], segment_owner[side.entry_segment]
    exchanged = side.entry_segment[of_slot != of_segment].unique()

    slots = (slot_owner == rank).nonzero()[:, 0]
    segments = (segment_owner == rank).nonzero()[:, 0]
    entries = (of_slot == rank).nonzero()[:, 0]
    # New numbers on this rank: its own segments first, then those that it receives.
    foreign = side.entry_segment[entries][of_segment[entries] != rank].unique()
    number = _numbers(torch.cat([segments, foreign]), len(side.segment_row))
    place_of_row = _numbers((owner == rank).nonzero()[:, 0], len(owner))
    none = torch.empty(0, dtype=torch.int64)
    sent = (segment_owner[exchanged] == rank).nonzero()[:, 0]
    return ByteSidePart(
        # `rows` sums this rank's segments; `sums` adds them, and the received ones, into slots.
        rows=ByteSideBatch(
            segment_row=place_of_row[side.segment_row[segments]],
            segment_start=side.segment_start[segments],
            entry_slot=none,
            entry_segment=none,
            last_row=none,
        ),
        sums=ByteSideBatch(
            segment_row=side.segment_row[torch.cat([segments, foreign])],
            segment_start=none,
            entry_slot=_numbers(slots, len(last))[side.entry_slot[entries]],
            entry_segment=number[side.entry_segment[entries]],
            last_row=side.last_row[slots],
        ),
        slots=slots,
        num_exchanged=len(exchanged),
        sent=sent,
        sent_segment=number[exchanged[sent]],
        received=_numbers(exchanged, len(side.segment_row))[foreign],
    )


def part_of_events(batch: ByteBatch, owner: torch.Tensor, rank: int) -> ByteBatch:
    """The positions of a batch whose last row this context-parallel rank has, of the student."""
    part = part_of_bytes(batch.student, owner, rank)
    positions, slot_position = batch.slot_position[part.slots].unique(return_inverse=True)
    return replace(
        batch,
        num_positions=len(positions),
        slot_position=slot_position,
        slot_event=batch.slot_event[part.slots],
        slot_cap=None if batch.slot_cap is None else _chosen_caps(batch.slot_cap, part.slots),
        student_loose=None if batch.student_loose is None else batch.student_loose[part.slots],
        teacher_loose=None if batch.teacher_loose is None else batch.teacher_loose[part.slots],
        student=part.sums,
        teacher_logprobs=batch.teacher_logprobs[part.slots.to(batch.teacher_logprobs.device)],
        part=part,
    )


def _chosen_caps(slot_cap: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """slot_cap of these slots, in their numbers; a slot and its cap are of one position, so both are among
    them.
    """
    caps = slot_cap[slots]
    return torch.where(caps >= 0, _numbers(slots, len(slot_cap))[caps.clamp(min=0)], -1)


def _numbers(chosen: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [size]: the place of each of the chosen numbers, -1 of others."""
    return torch.full((size,), -1).index_copy(0, chosen, torch.arange(len(chosen)))


def _joined(arrays: Sequence[np.ndarray], sizes: Sequence[int] | None = None) -> torch.Tensor:
    """int64: the arrays one after another, each shifted by the sizes of those before it."""
    offsets = np.cumsum([0, *(sizes or [0] * len(arrays))])[:-1]
    return torch.from_numpy(
        np.concatenate([a.astype(np.int64) + by for a, by in zip(arrays, offsets, strict=True)])
    )


def _row_of_first_label(pair: AlignedPair) -> np.ndarray:
    """int64 [A]: index into teacher_rows of each segment's first teacher label, -1 if it was not asked
    for.
    """
    first = pair.segments[:, 0]
    # teacher_rows ascend, so a binary search finds the label or the place where it is missing.
    where = np.searchsorted(pair.teacher_rows, first)
    found = where < len(pair.teacher_rows)
    found[found] = pair.teacher_rows[where[found]] == first[found]
    return np.where(found, where, -1)
