"""The next-byte events on which two models are compared along a response, and the sums of token probabilities
that each model needs for them.

The interface `bytes` compares distributions over the next byte at every byte position i = 0 .. |y| of a
response y. The structure is known before a model runs, so this module plans it, with integers only; the
probabilities come later.

One model. Its row k (the distribution after k of its own tokens) stands at byte offset beta_k. With c =
y[beta_k : i], tokens that begin with c and go on with b give byte b its probability at i. In the order of
their bytes these tokens are a range of the vocabulary, and the ranges of one row are nested: those of a
longer c lie inside one of a shorter c. So the row's vocabulary is cut into consecutive *segments*, fine
enough that every range is a run of them; the model only has to sum each segment once. Behind all content
stand two segments more: ids without content, and the stop ids.

    boundary of the model (beta_k = i)   every first byte, "stop", and other ids without content
    inside a token (beta_k < i)          the bytes that some token has behind c; a token that spells c has
                                         "ended" here

Rows before the last boundary count too, where a token of theirs reaches past i: the realized path is one of
several ways to have spelled y[:i].

What is compared at i. Events are the bytes that both models can have next, "stop" where both are at a
boundary, and "rest", all that is left on each side: bytes that only one can have, ids without content, tokens
that have ended. Where a model is inside a token and c is no token, it cannot end, so what could be in its
rest is unknown. Then there is no rest, and the models are compared given that the next byte is one of the
common ones.

Loose bytes. A model inside a token may be wrong about byte b: of the texts that go on with b, some have left
its token earlier, at a shorter token, and their probability is in rows that nobody has computed. If a
tokenizer takes the longest match, that can only be the longest token that is a prefix of c, and only if c b
is no token. Such a b is *loose*, and the model's probability of it is only known to lie between the sum and
the sum plus that token's (the *slack*). The loss compares a loose byte only where the difference between the
models is larger than the slack explains.

Mixtures. Several teachers, each in its own tokens, are one: the probability of a byte is the weighted sum of
what each of them gives it behind the same bytes. A position counts where every teacher can end (at a
boundary, or c is a token); elsewhere a teacher's whole probability, and so its share of the sum, is not
known. Events are then the bytes that the student and all teachers can have next, "stop" where all are at a
boundary, and "rest", all that is left of each of them, where the student can end too. Where it cannot, what a
teacher has *outside* of the events comes along, since its events are shares of its whole. A byte that is
loose for one teacher is loose for the mixture; the slack is the weighted sum of those of the teachers that
have a loose byte. The text ends for all where it ends for one of them, and the position behind it counts
where the student and all teachers stop there.

Limits: byte-pair merging does not take the longest match at every token end; where it does
not, a byte taken for tight may be loose. And where a sampled response is not in the tokenizer's own
segmentation, other ways to spell the text up to a boundary are taken to go on like the sampled one.

Shape letters: P byte positions that are compared, E slots, G segments, X entries, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.records import OUTSIDE, REST, SLACK, STOP, ByteEvents, ByteSide

NUM_BYTES = 256


@dataclass(frozen=True, eq=False)
class ByteTrie:
    """A vocabulary in the order of its bytes, as a trie. Node 0 is the root; a node is a
    prefix of some token.

    Nodes are numbered by depth, and within one depth in byte order, so the children of a
    node are consecutive.
    """

    order: np.ndarray
    """int64 [V]: ids in byte order; behind the content come other ids without content, then the stop ids."""
    num_content: int
    num_other: int
    first: np.ndarray
    """int64 [nodes]: tokens that begin with the node's bytes are order[first:end]; those that
    spell just them lead.
    """
    end: np.ndarray
    """int64 [nodes]"""
    tokens: np.ndarray
    """int64 [nodes]: how many ids spell just the node's bytes."""
    byte: np.ndarray
    """int64 [nodes]: the last byte of the node."""
    children: np.ndarray
    """int64 [nodes + 1]: the children of node j are children[j] .. children[j + 1] - 1."""
    keys: np.ndarray
    """int64 [nodes - 1], ascending: parent * 256 + byte of node j + 1."""

    def child(self, node: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """int64 [n]: the child of each node by a byte, 0 if there is none."""
        key = node * NUM_BYTES + byte
        # keys[j] belongs to node j + 1; node 0, the root, is nobody's child, so 0 can mean "none".
        at = np.minimum(self.keys.searchsorted(key), self.keys.size - 1)
        return np.where(self.keys[at] == key, at + 1, 0)


@lru_cache(maxsize=8)
def byte_trie(table: TokenTable) -> ByteTrie:
    """The trie of a token table; built once, in well under a second for 10^5 ids.

    Raises ValueError for a table without content.
    """
    content = np.flatnonzero(table.lengths)
    if not content.size:
        raise ValueError("the vocabulary has no id with content")
    pieces = table.pieces()
    content = np.array(sorted(content.tolist(), key=pieces.__getitem__), dtype=np.int64)
    stops = np.array(table.stop_ids, dtype=np.int64)
    others = np.setdiff1d(np.flatnonzero(table.lengths == 0), stops)
    offsets, lengths = table.offsets[content], table.lengths[content]

    # One pass for each depth. `inside`: the tokens (places in byte order) that are longer than the depth.
    # node_of: the node of each token's first `depth` bytes.
    node_of = np.zeros(content.size, dtype=np.int64)
    first, end = [np.array([0])], [np.array([content.size])]
    tokens, byte = [np.array([0])], [np.array([0])]
    keys: list[np.ndarray] = []
    inside, num_nodes = np.arange(content.size), 1
    for depth in range(int(lengths.max())):
        inside = inside[lengths[inside] > depth]
        next_byte = table.flat[offsets[inside] + depth].astype(np.int64)
        key = node_of[inside] * NUM_BYTES + next_byte
        # Tokens are in byte order, so those of one node are a run of equal keys: a run begins a node.
        begins = np.flatnonzero(np.diff(key, prepend=-1))
        node = np.diff(key, prepend=-1).astype(bool).cumsum() - 1
        node_of[inside] = node + num_nodes
        first.append(inside[begins])
        # Tokens that end at the parent sort before all of the parent's children, so a node's tokens are
        # consecutive in byte order, and [first, end) describes them.
        end.append(inside[np.append(begins[1:], inside.size) - 1] + 1)
        tokens.append(np.bincount(node[lengths[inside] == depth + 1], minlength=begins.size))
        byte.append(next_byte[begins])
        keys.append(key[begins])
        num_nodes += begins.size
    # Ascending, because the nodes of a depth are numbered in the order of their parents, and then of bytes.
    child_keys = np.concatenate(keys)
    return ByteTrie(
        order=np.concatenate([content, others, stops]),
        num_content=content.size,
        num_other=others.size,
        first=np.concatenate(first),
        end=np.concatenate(end),
        tokens=np.concatenate(tokens),
        byte=np.concatenate(byte),
        children=1 + child_keys.searchsorted(np.arange(num_nodes + 1) * NUM_BYTES),
        keys=child_keys,
    )


def plan_byte_events(
    text: np.ndarray,
    *,
    stop: bool,
    student: TokenTable,
    student_ids: np.ndarray,
    teacher: TokenTable,
    teacher_ids: np.ndarray,
) -> ByteEvents:
    """The events of one response, and both models' sums.

    text uint8 [L]: the bytes that both sequences of ids (int32 [N], [M]) begin with, up to the first
    special token of either; stop: both spell just `text` and then stop, so that the position behind
    it is compared too.
    """
    num_positions = text.size + stop
    walks = [
        _walk(byte_trie(t), t, ids, text, num_positions)
        for t, ids in ((student, student_ids), (teacher, teacher_ids))
    ]
    (events,) = _events(walks[0], walks[1:], can_end=np.ones(num_positions, dtype=bool), outside=False)
    return events


def plan_mixture_events(
    text: np.ndarray,
    *,
    stop: bool,
    student: TokenTable,
    student_ids: np.ndarray,
    teachers: Sequence[tuple[TokenTable, np.ndarray]],
) -> list[ByteEvents]:
    """As `plan_byte_events`, for a mixture of teachers (each a table and its ids): one
    result for each teacher.

    They differ in the teacher's sums only: the slots and the student's sums are the same.
    """
    num_positions = text.size + stop
    of_student, *of_teachers = (
        _walk(byte_trie(table), table, ids, text, num_positions)
        for table, ids in ((student, student_ids), *teachers)
    )
    can_end = np.logical_and.reduce([walk.can_end for walk in of_teachers])
    return _events(of_student, of_teachers, can_end=can_end, outside=True)


def _events(
    student: _Walk, teachers: Sequence[_Walk], *, can_end: np.ndarray, outside: bool
) -> list[ByteEvents]:
    """can_end: bool [positions], where all teachers can end. outside: whether there are slots for the mass
    outside of the events.
    """
    walks = [student, *teachers]
    num_positions = student.boundary.size
    # bool [positions, 256] and [positions]: what all models can have next.
    common = np.logical_and.reduce([walk.reachable for walk in walks])
    all_end = np.logical_and.reduce([walk.can_end for walk in walks])
    all_stop = np.logical_and.reduce([walk.boundary for walk in walks])
    loose = [walk.loose & common for walk in walks]
    num_bytes = common.sum(1)
    kept = can_end & (num_bytes + all_stop + all_end >= 2)  # else there is nothing to compare
    has_loose = [of_side.any(1) & kept for of_side in loose]

    # Slots, position by position: common bytes, stop, rest, slack, outside.
    common &= kept[:, None]
    slots = np.zeros((num_positions, NUM_BYTES + 4), dtype=bool)
    slots[:, :NUM_BYTES] = common
    slots[:, STOP] = kept & all_stop
    slots[:, REST] = kept & all_end
    slots[:, SLACK] = np.logical_or.reduce(has_loose)
    slots[:, OUTSIDE] = kept & ~all_end & outside
    position, event = slots.nonzero()
    # slot_of[position, event]: the number of the slot, -1 if there is none. Slots are numbered row by row.
    slot_of = np.full(slots.shape, -1, dtype=np.int64)
    slot_of[position, event] = np.arange(position.size)
    is_byte = event < NUM_BYTES
    # Row 0 is the student's, row 1 that of all teachers: a byte is loose if it is for any of them.
    loose_slots = np.zeros((2, position.size), dtype=bool)
    either = (loose[0], np.logical_or.reduce(loose[1:]))
    loose_slots[:, is_byte] = [of_side[position[is_byte], event[is_byte]] for of_side in either]

    # Positions that are compared get new numbers, without gaps.
    number = kept.cumsum() - 1
    of_student, *of_teachers = (
        _side(walk, slot_of, position, has_loose=of_side)
        for walk, of_side in zip(walks, has_loose, strict=True)
    )
    return [
        ByteEvents(
            num_positions=int(kept.sum()),
            slot_position=number[position].astype(np.int32),
            slot_event=event.astype(np.int16),
            student_loose=loose_slots[0],
            teacher_loose=loose_slots[1],
            student=of_student,
            teacher=of_teacher,
        )
        for of_teacher in of_teachers
    ]


@dataclass(frozen=True, eq=False)
class _Walk:
    """The rows of one side along the text: one visit for each row and each position up to which a token of
    the row agrees with the text.
    """

    trie: ByteTrie
    num_rows: int
    """Rows at or before the last position that is compared."""
    num_labels: int
    row: np.ndarray
    """int64 [visits]"""
    position: np.ndarray
    node: np.ndarray
    is_last: np.ndarray
    """bool [visits]: the row is the last boundary of the position."""
    longest: np.ndarray
    """int64 [visits]: the node of the longest token that is a prefix of the node's bytes, 0 for none."""
    last_row: np.ndarray
    """int64 [P]"""
    boundary: np.ndarray
    """bool [P]"""
    can_end: np.ndarray
    """bool [P]"""
    reachable: np.ndarray
    """bool [P, 256]"""
    loose: np.ndarray
    """bool [P, 256]; true also for bytes that are not reachable."""
    next_visit: np.ndarray
    """int64 [Y]: visit of each pair (visit, child of its node)."""
    next_node: np.ndarray
    """int64 [Y]: that child."""


def _walk(trie: ByteTrie, table: TokenTable, ids: np.ndarray, text: np.ndarray, num_positions: int) -> _Walk:
    # begins[k]: the byte offset at which label k begins, that is, where row k stands.
    begins = np.append(0, table.lengths[ids].cumsum())[:-1]
    begins = begins[: begins.searchsorted(num_positions)]
    last_row = begins.searchsorted(np.arange(num_positions), side="right") - 1
    # Every row starts at the root at its own offset. Each step moves all rows by one byte of the text and
    # drops those of which no token agrees with it any more.
    row, position = np.arange(begins.size), begins
    node = longest = np.zeros(begins.size, dtype=np.int64)
    rows: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    nodes: list[np.ndarray] = []
    longests: list[np.ndarray] = []
    while row.size or not rows:
        rows.append(row)
        positions.append(position)
        nodes.append(node)
        longests.append(longest)
        goes_on = position + 1 < num_positions
        row, position, node, longest = row[goes_on], position[goes_on], node[goes_on], longest[goes_on]
        node = trie.child(node, text[position].astype(np.int64))
        longest = np.where(trie.tokens[node] > 0, node, longest)
        found = node > 0
        row, position, node, longest = row[found], position[found] + 1, node[found], longest[found]
    row, position, node = np.concatenate(rows), np.concatenate(positions), np.concatenate(nodes)
    longest = np.concatenate(longests)
    # Only the row of the last boundary has the events that the text stops or that a token ends here.
    is_last = last_row[position] == row

    boundary, can_end = np.zeros(num_positions, dtype=bool), np.zeros(num_positions, dtype=bool)
    boundary[position[is_last & (node == 0)]] = True
    can_end[position[is_last & (trie.tokens[node] > 0)]] = True
    # Every visit beside every child of its node: the bytes that some token has next there.
    num_children = trie.children[node + 1] - trie.children[node]
    next_visit = np.arange(node.size).repeat(num_children)
    next_node = ranges(trie.children[node], num_children)
    reachable = np.zeros((num_positions, NUM_BYTES), dtype=bool)
    reachable[position[next_visit], trie.byte[next_node]] = True
    # Inside a token with a shorter token as its prefix every byte is loose, unless the realized bytes and
    # that byte spell a token themselves.
    may_leave = np.zeros(num_positions, dtype=bool)
    may_leave[position[is_last & (node > 0) & (longest > 0)]] = True
    loose = np.repeat(may_leave[:, None], NUM_BYTES, axis=1)
    tight = is_last[next_visit] & (trie.tokens[next_node] > 0)
    loose[position[next_visit[tight]], trie.byte[next_node[tight]]] = False
    return _Walk(
        trie=trie,
        num_rows=begins.size,
        num_labels=len(ids),
        row=row,
        position=position,
        node=node,
        is_last=is_last,
        longest=longest,
        last_row=last_row,
        boundary=boundary,
        can_end=boundary | can_end,
        reachable=reachable,
        loose=loose,
        next_visit=next_visit,
        next_node=next_node,
    )


def _side(walk: _Walk, slot_of: np.ndarray, slot_position: np.ndarray, *, has_loose: np.ndarray) -> ByteSide:
    """Segments of the side's rows, and which segments each slot adds up.

    has_loose: bool [positions], where a byte is loose for this side.
    """
    trie, num_ids = walk.trie, walk.trie.order.size
    # Where a row's vocabulary is cut: at every child of a visited node. A first child without tokens that
    # spell the node itself begins where the node does, which its parent's cut is.
    visit, node = walk.next_visit, walk.next_node
    parent = walk.node[visit]
    new = (parent == 0) | (trie.first[node] > trie.first[parent])
    # Where ids without content (if there are any) and the stop ids begin, behind all content.
    behind = [trie.num_content] if trie.num_other else []
    behind.append(trie.num_content + trie.num_other)
    # A place in the vocabulary of a row is the number row * key + index in byte order; index num_ids is the
    # end of the row, so `key` is one more than the number of ids.
    key = num_ids + 1
    place = walk.row[visit] * key + trie.first[node]
    cuts = np.concatenate(
        [
            place[new],
            (np.arange(walk.num_rows)[:, None] * key + np.array(behind)).ravel(),
            np.arange(walk.num_rows, walk.num_labels) * key,  # rows that no slot needs are one segment
        ]
    )
    order = cuts.argsort(kind="stable")  # of a few ascending runs
    cuts = cuts[order]

    # The segments of every pair (visit, child): from its own cut to that of the next child of the same visit.
    # rank[i]: where the i-th of the unsorted cuts is among the sorted ones. The first of them are those of
    # `new` children; other children share their parent's cut.
    start = np.empty(visit.size, dtype=np.int64)
    rank = np.empty(order.size, dtype=np.int64)
    rank[order] = np.arange(order.size)
    start[new] = rank[: np.count_nonzero(new)]
    start[~new] = cuts.searchsorted(place[~new])
    end = np.append(start[1:], 0)
    # A last child has no next one: it ends where its parent's tokens do.
    is_last_child = np.append(visit[1:] != visit[:-1], True)[: visit.size]
    of_last = visit[is_last_child]
    end[is_last_child] = cuts.searchsorted(walk.row[of_last] * key + trie.end[walk.node[of_last]])
    # A position has a REST slot or an OUTSIDE slot or neither; -1 if neither.
    rest = np.maximum(slot_of[:, REST], slot_of[:, OUTSIDE])
    position = walk.position[visit]
    slot = slot_of[position, trie.byte[node]]
    slot = np.where(slot >= 0, slot, rest[position])
    used = slot >= 0
    targets, starts, ends = [slot[used]], [start[used]], [end[used]]

    def add(target: np.ndarray, row: np.ndarray, first: np.ndarray | int, end: np.ndarray | int) -> None:
        """Tokens [first, end) of each row, in byte order, to the slot `target`, unless that is -1."""
        used = target >= 0
        targets.append(target[used])
        starts.append(cuts.searchsorted((row * key + first)[used]))
        ends.append(cuts.searchsorted((row * key + end)[used]))

    # At a boundary ids without content belong to the rest; stop ids have a slot of their own where all models
    # stop.
    at_boundary = walk.is_last & (walk.node == 0)
    row, position = walk.row[at_boundary], walk.position[at_boundary]
    if trie.num_other:
        add(rest[position], row, behind[0], behind[1])
    stop = slot_of[position, STOP]
    add(np.where(stop >= 0, stop, rest[position]), row, behind[-1], num_ids)

    # Inside a token: tokens that spell just c lead the node's range, and have ended here.
    inside = walk.is_last & (walk.node > 0)
    row, position, node, longest = (x[inside] for x in (walk.row, walk.position, walk.node, walk.longest))
    ends_here = trie.tokens[node] > 0
    add(np.where(ends_here, rest[position], -1), row, trie.first[node], trie.first[node] + trie.tokens[node])
    # The slack of a loose byte is the mass of the longest token that is a prefix of c.
    longest_end = trie.first[longest] + trie.tokens[longest]
    add(
        np.where((longest > 0) & has_loose[position], slot_of[position, SLACK], -1),
        row,
        trie.first[longest],
        longest_end,
    )

    # One entry for each segment of each run [start, end).
    target, start = np.concatenate(targets), np.concatenate(starts)
    num_segments = np.concatenate(ends) - start
    segment_row = cuts // key
    return ByteSide(
        segment_row=segment_row.astype(np.int32),
        segment_start=(cuts - segment_row * key).astype(np.int32),
        entry_slot=target.repeat(num_segments).astype(np.int32),
        entry_segment=ranges(start, num_segments).astype(np.int32),
        last_row=walk.last_row[slot_position].astype(np.int32),
    )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), starts[1], ...; int64."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if ends.size else 0) + (starts - ends + lengths).repeat(lengths)
