"""Known and unresolved probability mass of the next byte of a response, for two models.

The interface `bytes` compares distributions over the next byte at every byte position i = 0 .. |y| of a
response y. The structure is known before a model runs, so this module plans it, with integers only; the
probabilities come later.

One model. Its tokens v_1 .. v_n of the response end at offsets beta_1 .. beta_n. Row k is the
distribution after k of them. Relative to the probability A_K of the path up to K, the last boundary at or
before i, it gives:

    known        tokens that spell y[beta_k : i] and go on with byte b, or end the text where i is a boundary:
                 the mass m(b), m(end). They stand for texts that go on with b.
    unresolved   tokens other than v_(k+1) that spell y[beta_k : j), with j <= i: the mass u. These texts have
                 left the realized path at j, and no row has their continuations. An *atom* is such a mass, of
                 one row and one j.

Of all texts that begin with y[:i], a share between m(b) and m(b) + (its part of u) goes on with b: the loss
is the smallest divergence that these bounds permit (losses/kinds/bytes.py). How large the part can be:

    an atom that ended at i      only the bytes that may follow its token (continuations.py)
    an atom that ended before    out, if y[j] cannot follow its token; else every byte: where such a text has
                                 its next border is not known

How far a model looks back. No token crosses a border at B, if none that begins before B, with the bytes that
the text has there, is longer than that, whatever comes behind y[:i]. Then every text that begins with y[:i]
has been cut like the realized one up to B, and what left the path before B is no part of u at i.

Events. Bytes that both models reach, the end, and ids without content are compared one by one. Bytes that
only one of them reaches, or none, are one event for each set of atoms that may go on with them: their ratios
are equal.

Slots of a position: its events, then FREE (atoms that ended before, u less ENDED), ENDED (atoms that ended
here) and, where some of these can go on with some events only, CAP: the atoms that can, for each such group
of events.

Mixtures. Several teachers, each in its own tokens, are one: known mass, u and caps are weighted sums of the
teachers' shares of their own total.

The bounds hold for a model whose probability lies on its tokenizer's own cut of each text. Where a sampled
response is not cut so, the sampled path is taken for the tokenizer's.

Shape letters: P byte positions, E slots, G segments, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_simct.alignment.byte_events import NUM_BYTES, ByteTrie, byte_trie, ranges
from megatron_simct.alignment.continuations import Continuations
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.records import CAP, ENDED, FREE, OTHERS, STOP, ByteEvents, ByteSide

_NUM_EVENTS = NUM_BYTES + 2
"""The bytes, the end, ids without content."""
_WITHOUT_CONTENT = NUM_BYTES + 1


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's tokens of the response."""

    table: TokenTable
    ids: np.ndarray
    """int32 [n]"""
    continuations: Continuations | None = None
    """The table of its tokenizer; None if there is none."""


def plan_byte_bounds(
    text: np.ndarray, *, stop: bool, student: Side, teachers: Sequence[Side]
) -> list[ByteEvents]:
    """The events of one response, one result for each teacher; results differ in the teacher's sums only.

    text uint8 [L]: the bytes that all sequences of ids begin with, up to the first special token of any;
    stop: all spell just `text` and then stop, so that the position behind it is compared too.
    """
    num_positions = text.size + stop
    # reached[0] is the student's, reached[1] that of any teacher; bool [positions, 258].
    walks = [_walk(side, text, num_positions) for side in (student, *teachers)]
    reached = [walks[0].reached, np.logical_or.reduce([walk.reached for walk in walks[1:]])]
    num_classes, class_of, possible = _classes(walks, num_positions)

    # Columns of the table of slots: events of their own, groups of the others by class, FREE, ENDED, CAPs by
    # class.
    # code: the column of an event that is compared alone, or of its group: three groups for each class, those
    # of the student alone (kind 1), of the teachers alone (2) and of nobody (0).
    both = reached[0] & reached[1]
    kind = reached[0] + 2 * reached[1]
    code = np.where(both, np.arange(_NUM_EVENTS), _NUM_EVENTS + 3 * class_of + kind % 3)
    has_free = np.logical_or.reduce([walk.has_free for walk in walks])
    has_ended = np.logical_or.reduce([walk.has_ended for walk in walks])
    used = reached[0] | reached[1] | possible | has_free[:, None]
    free = _NUM_EVENTS + 3 * num_classes
    ended, cap = free + 1, free + 2
    present = np.zeros((num_positions, cap + num_classes), dtype=bool)
    rows = np.arange(num_positions)[:, None].repeat(_NUM_EVENTS, 1)
    present[rows[used], code[used]] = True
    kept = present[:, :free].sum(1) >= 2  # else there is nothing to compare
    present[:, free], present[:, ended] = has_free, has_ended
    # Where everything that ended may go on with an event, its cap is ENDED; where nothing may, there is none.
    event_cap = np.where(has_ended[:, None], ended, -1).repeat(_NUM_EVENTS, 1)
    limited = (class_of > 0) & has_ended[:, None]
    event_cap[limited] = np.where(possible[limited], cap + class_of[limited], -1)
    shown = limited & possible & used
    present[rows[shown], cap + class_of[shown]] = True
    present &= kept[:, None]

    # Slots are numbered row by row; slot_of[position, column] is the number, -1 if there is none.
    position, column = present.nonzero()
    slot_of = np.full(present.shape, -1, dtype=np.int64)
    slot_of[position, column] = np.arange(position.size)
    slot_event = column.copy()
    slot_event[(column > NUM_BYTES) & (column < free)] = OTHERS
    slot_event[column == free] = FREE
    slot_event[column == ended] = ENDED
    slot_event[column >= cap] = CAP
    slot_cap = np.full(position.size, -1, dtype=np.int64)
    used &= kept[:, None]
    # Events that share a slot have one class, and so the same cap: the last write wins.
    of_event = slot_of[rows[used], code[used]]
    cap_column = event_cap[used]
    slot_cap[of_event] = np.where(cap_column >= 0, slot_of[rows[used], cap_column], -1)
    # An event that stands for each CAP.
    cap_event = np.zeros(position.size, dtype=np.int64)
    shown &= kept[:, None]
    cap_event[slot_of[rows[shown], cap + class_of[shown]]] = shown.nonzero()[1]

    # Positions that are compared get new numbers, without gaps.
    number = kept.cumsum() - 1
    slots = _Slots(
        of_event=np.where(used, slot_of[rows, np.where(used, code, 0)], -1),
        free=slot_of[:, free],
        ended=slot_of[:, ended],
        # The slots of earlier positions, and those of the same position in columns before `cap`.
        first_cap=present.cumsum(1)[:, cap - 1] + np.append(0, present.sum(1).cumsum())[:-1],
        num_caps=present[:, cap:].sum(1),
        cap_event=cap_event,
        position=position,
    )
    of_student, *of_teachers = (_side(walk, slots) for walk in walks)
    return [
        ByteEvents(
            num_positions=int(kept.sum()),
            slot_position=number[position].astype(np.int32),
            slot_event=slot_event.astype(np.int16),
            slot_cap=slot_cap.astype(np.int32),
            student=of_student,
            teacher=of_teacher,
        )
        for of_teacher in of_teachers
    ]


@dataclass(frozen=True, eq=False)
class _Slots:
    """Numbers of the slots of each position; -1: no such slot."""

    of_event: np.ndarray
    """int64 [P, 258]"""
    free: np.ndarray
    """int64 [P]"""
    ended: np.ndarray
    first_cap: np.ndarray
    num_caps: np.ndarray
    cap_event: np.ndarray
    """int64 [E]: an event that the atoms of a CAP can go on with."""
    position: np.ndarray
    """int64 [E], before positions without a comparison are left out."""


@dataclass(frozen=True, eq=False)
class _Walk:
    """The rows of one side along the text. Visits are pairs of a row and a position up to which a token
    of the row agrees with the text; atoms are the tokens that ended there and are not the realized ones."""

    trie: ByteTrie
    num_rows: int
    num_labels: int
    last_row: np.ndarray
    """int64 [P]"""
    row: np.ndarray
    """int64 [visits]"""
    position: np.ndarray
    node: np.ndarray
    at_boundary: np.ndarray
    """bool [visits]"""
    reached: np.ndarray
    """bool [P, 258]"""
    next_visit: np.ndarray
    """int64 [Y]: visit of each pair (visit, child of its node)."""
    next_node: np.ndarray
    atoms: np.ndarray
    """int64 [atoms]: visits, ascending by position."""
    atom_rows: np.ndarray
    """int64 [atoms]: row of `may_follow`."""
    may_follow: np.ndarray
    """bool [rows, 258]; the last row is all true."""
    free_atom: np.ndarray
    """int64 [F]: of each pair of an atom and a later position, the atom ..."""
    free_position: np.ndarray
    """int64 [F]: ... and the position."""
    has_free: np.ndarray
    """bool [P]"""
    has_ended: np.ndarray


def _walk(side: Side, text: np.ndarray, num_positions: int) -> _Walk:
    table, trie = side.table, byte_trie(side.table)
    # begins[k]: the byte offset at which label k begins, that is, where row k stands. first_row[i]: the first
    # row at or behind the last border before i; earlier rows give no mass at position i.
    begins = np.append(0, table.lengths[side.ids].cumsum())[:-1]
    begins = begins[: begins.searchsorted(num_positions)]
    last_row = begins.searchsorted(np.arange(num_positions), side="right") - 1
    first_row = begins.searchsorted(_last_border(trie, text)[:num_positions])

    # Every row starts at the root at its own offset. Each step moves all rows by one byte of the text and
    # drops those of which no token agrees with it, or that a border has cut off.
    row, position = np.arange(begins.size), begins
    node = np.zeros(begins.size, dtype=np.int64)
    found = [(row, position, node)]
    while row.size:
        goes_on = position + 1 < num_positions
        row, position, node = row[goes_on], position[goes_on], node[goes_on]
        node = trie.child(node, text[position].astype(np.int64))
        goes_on = (node > 0) & (first_row[position + 1] <= row)
        row, position, node = row[goes_on], position[goes_on] + 1, node[goes_on]
        found.append((row, position, node))
    row, position, node = (np.concatenate(parts) for parts in zip(*found, strict=True))
    at_boundary = (last_row[position] == row) & (node == 0)

    num_children = trie.children[node + 1] - trie.children[node]
    next_visit = np.arange(node.size).repeat(num_children)
    next_node = ranges(trie.children[node], num_children)
    reached = np.zeros((num_positions, _NUM_EVENTS), dtype=bool)
    reached[position[next_visit], trie.byte[next_node]] = True
    reached[position[at_boundary], STOP] = True
    reached[position[at_boundary], _WITHOUT_CONTENT] = trie.num_other > 0

    # Of ids with the bytes of the realized token the tokenizer's own cut uses only that one.
    realized_end = begins + table.lengths[side.ids[: begins.size]]
    atoms = np.flatnonzero((node > 0) & (trie.tokens[node] > 0) & (position != realized_end[row]))
    atoms = atoms[position[atoms].argsort(kind="stable")]
    may_follow = np.ones((1, _NUM_EVENTS), dtype=bool)
    atom_rows = np.zeros(atoms.size, dtype=np.int64)
    if side.continuations is not None:
        # Columns of `rows`: the bytes and the end. Ids without content may follow where the end may.
        known = side.continuations.rows[:, [*range(NUM_BYTES + 1), NUM_BYTES]]
        may_follow = np.concatenate([known, may_follow])
        # A node that several ids spell has no row of its own: anything may follow, which is the last row.
        of_token = side.continuations.row_of[trie.order[trie.first[node[atoms]]]]
        atom_rows = np.where(trie.tokens[node[atoms]] == 1, of_token, len(known)).astype(np.int64)

    # An atom that ended at j is free at the positions j + 1, j + 2, ... until a border is behind its row:
    # first_row passes it. It is never free if the next byte of the text cannot follow its token.
    ends = position[atoms]
    inside = ends < text.size
    goes_on = np.zeros(atoms.size, dtype=bool)
    goes_on[inside] = may_follow[atom_rows[inside], text[ends[inside]]]
    until = np.minimum(first_row.searchsorted(row[atoms], side="right"), num_positions)
    lasting = np.where(goes_on, np.maximum(until - ends - 1, 0), 0)
    free_atom = np.arange(atoms.size).repeat(lasting)
    free_position = ranges(ends + 1, lasting)
    has_free, has_ended = np.zeros(num_positions, dtype=bool), np.zeros(num_positions, dtype=bool)
    has_free[free_position] = True
    has_ended[ends] = True
    return _Walk(
        trie=trie,
        num_rows=begins.size,
        num_labels=len(side.ids),
        last_row=last_row,
        row=row,
        position=position,
        node=node,
        at_boundary=at_boundary,
        reached=reached,
        next_visit=next_visit,
        next_node=next_node,
        atoms=atoms,
        atom_rows=atom_rows,
        may_follow=may_follow,
        free_atom=free_atom,
        free_position=free_position,
        has_free=has_free,
        has_ended=has_ended,
    )


def _last_border(trie: ByteTrie, text: np.ndarray) -> np.ndarray:
    """int64 [L + 1]: for every i the last offset B <= i that no token can cross in a text
    that begins with y[:i].
    """
    size = text.size
    crossed = np.zeros(size + 2, dtype=np.int64)
    # going_on[i]: the first offset at which a token begins that may still continue at i.
    going_on = np.full(size + 1, size, dtype=np.int64)
    start, node = np.arange(size), np.zeros(size, dtype=np.int64)
    at = start
    while start.size:
        node = trie.child(node, text[at].astype(np.int64))
        found = node > 0
        start, at, node = start[found], at[found] + 1, node[found]
        has_tokens = trie.tokens[node] > 0
        # A token over [start, at) crosses the offsets start + 1 .. at - 1: differences, summed up below.
        np.add.at(crossed, start[has_tokens] + 1, 1)
        np.add.at(crossed, at[has_tokens], -1)
        # A node with children is the beginning of a longer token, which may reach past `at`.
        longer = trie.children[node + 1] > trie.children[node]
        np.minimum.at(going_on, at[longer], start[longer])
        inside = at < size
        start, at, node = start[inside], at[inside], node[inside]
    is_border = crossed[: size + 1].cumsum() == 0
    last = np.maximum.accumulate(np.where(is_border, np.arange(size + 1), 0))
    return last[np.minimum(going_on, np.arange(size + 1))]


@lru_cache(maxsize=8)
def _marks(count: int) -> np.ndarray:
    """uint64 [count]: odd numbers whose sums identify sets of them."""
    return np.random.default_rng(0).integers(0, 1 << 63, size=count, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)


def _classes(walks: Sequence[_Walk], num_positions: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Events by the set of atoms that may go on with them: (number of classes, class [P, 258], whether there
    is such an atom [P, 258]). Class 0 is that of all atoms that ended at the position."""
    num_atoms = sum(walk.atoms.size for walk in walks)
    all_marks = _marks(1 << max(4, int(num_atoms).bit_length()))
    sets = np.zeros((num_positions, _NUM_EVENTS), dtype=np.uint64)
    all_events = np.zeros(num_positions, dtype=np.uint64)
    start = 0
    for walk in walks:
        marks = all_marks[start : start + walk.atoms.size]
        start += walk.atoms.size
        if not marks.size:
            continue
        position = walk.position[walk.atoms]
        first = np.flatnonzero(np.diff(position, prepend=-1))
        where = position[first]
        sets[where] += np.add.reduceat(
            np.where(walk.may_follow[walk.atom_rows], marks[:, None], 0), first, axis=0
        )
        all_events[where] += np.add.reduceat(marks, first)
    # sets[i, e]: the sum of the marks of the atoms at i that event e may follow. Equal sums are taken for
    # equal sets.
    class_of = np.zeros(sets.shape, dtype=np.int64)
    limited = np.flatnonzero((sets != all_events[:, None]).any(1))
    if limited.size:
        # The set of all atoms first, the others in any order.
        order = (sets[limited] - all_events[limited, None]).argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(sets[limited], order, axis=1)
        # Numbers of the different sets of a position, in the sorted order; the set of all atoms is 0.
        ranks = (np.diff(ordered, axis=1, prepend=ordered[:, :1]) != 0).cumsum(1)
        ranks += (ordered[:, :1] != all_events[limited, None]).astype(np.int64)
        of_limited = np.empty_like(ranks)
        np.put_along_axis(of_limited, order, ranks, axis=1)
        class_of[limited] = of_limited
    return int(class_of.max(initial=0)) + 1, class_of, sets != 0


def _side(walk: _Walk, slots: _Slots) -> ByteSide:
    """Segments of the side's rows, and which segments each slot adds up."""
    trie, num_ids = walk.trie, walk.trie.order.size
    # A row's vocabulary is cut at every child of a visited node. A first child without tokens that spell the
    # node itself begins where the node does, which its parent's cut is.
    visit, node = walk.next_visit, walk.next_node
    parent = walk.node[visit]
    new = (parent == 0) | (trie.first[node] > trie.first[parent])
    # Where ids without content (if there are any) and the stop ids begin, behind all content.
    behind = [trie.num_content] if trie.num_other else []
    behind.append(trie.num_content + trie.num_other)
    # A place in the vocabulary of a row is the number row * key + index in byte order; index num_ids is the
    # end of the row, so `key` is one more than the number of ids.
    key = num_ids + 1
    cuts = np.concatenate(
        [
            (walk.row[visit] * key + trie.first[node])[new],
            (np.arange(walk.num_rows)[:, None] * key + np.array(behind)).ravel(),
            np.arange(walk.num_rows, walk.num_labels) * key,  # rows that no slot needs are one segment
        ]
    )
    cuts.sort(kind="stable")
    targets: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []

    def add(target: np.ndarray, row: np.ndarray, first: np.ndarray | int, end: np.ndarray | int) -> None:
        """Tokens [first, end) of each row, in byte order, to the slot `target`, unless that is -1."""
        used = target >= 0
        targets.append(target[used])
        starts.append(cuts.searchsorted((row * key + first)[used]))
        ends.append(cuts.searchsorted((row * key + end)[used]))

    add(
        slots.of_event[walk.position[visit], trie.byte[node]],
        walk.row[visit],
        trie.first[node],
        trie.end[node],
    )
    row, position = walk.row[walk.at_boundary], walk.position[walk.at_boundary]
    if trie.num_other:
        add(slots.of_event[position, _WITHOUT_CONTENT], row, behind[0], behind[1])
    add(slots.of_event[position, STOP], row, behind[-1], num_ids)

    atom_row, atom_node, atom_end = walk.row[walk.atoms], walk.node[walk.atoms], walk.position[walk.atoms]
    # Tokens that spell just the node's bytes lead its range: these are the atom.
    first, end = trie.first[atom_node], trie.first[atom_node] + trie.tokens[atom_node]
    add(slots.ended[atom_end], atom_row, first, end)
    of = walk.free_atom
    add(slots.free[walk.free_position], atom_row[of], first[of], end[of])
    # Every atom beside every CAP of the position where it ended, and added to those that may follow it.
    num_caps = slots.num_caps[atom_end]
    of = np.arange(walk.atoms.size).repeat(num_caps)
    cap = ranges(slots.first_cap[atom_end], num_caps)
    can = walk.may_follow[walk.atom_rows[of], slots.cap_event[cap]]
    add(np.where(can, cap, -1), atom_row[of], first[of], end[of])

    target, start = np.concatenate(targets), np.concatenate(starts)
    num_segments = np.concatenate(ends) - start
    segment_row = cuts // key
    return ByteSide(
        segment_row=segment_row.astype(np.int32),
        segment_start=(cuts - segment_row * key).astype(np.int32),
        entry_slot=target.repeat(num_segments).astype(np.int32),
        entry_segment=ranges(start, num_segments).astype(np.int32),
        last_row=walk.last_row[slots.position].astype(np.int32),
    )
