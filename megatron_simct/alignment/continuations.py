"""The bytes that may follow a token in a tokenizer's own cut of a text.

Of a text that a model has written up to here as "... c", with the token c ending here, not every next byte is
possible: behind "8" no digit, where "81" would have been cut as one token. The interface `bytes` bounds by it
the unresolved probability of a model (byte_bounds.py), so every *no* of this table must
hold for every text; a *yes* need not be true. What the answers rest on:

    byte-pair merges      Two tokens can be neighbours inside one pretoken if and only if no merge across
                          their border comes before the merges that make them. Let r_0 = c, r_1 = its right
                          half, ... and x_0 = w, x_1 = its left half, ...: a merge of r_s and x_t across the
                          border comes first if it comes before r_s is taken into r_(s-1), and not after x_t
                          is taken into x_(t-1). Byte e may follow c if some token w that begins with e can be
                          its neighbour.
    pretokens             Where a border of pretokens may fall between c and e in any context, e may follow.
    groups of digits      Where runs of digits are cut into groups from the left, each for itself, all groups
                          are tried.
    UTF-8                 Inside a character only a continuation byte can follow, behind one none.
    longest match         c e is no token.

`check` holds the table against the neighbours of real texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_simct.alignment.token_table import TokenTable

NUM_SYMBOLS = 257
"""The bytes, and the end of the text or an id without content."""
END = 256
_NEVER = np.iinfo(np.int64).max
_MAX_NODES = 2000
"""Tokens that begin with a byte and are tried, at most, before the byte is taken to be possible."""


@dataclass(frozen=True, eq=False)
class Merges:
    """A byte-pair vocabulary's merges: left[i] and right[i] join to joined[i], those of lower rank first."""

    left: np.ndarray
    """int64 [m], ids"""
    right: np.ndarray
    joined: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[bytes], pairs: Sequence[tuple[bytes, bytes]] | None = None) -> Merges:
        """pairs: in the order of merging; default, all pairs of pieces whose join is a piece, by the id of
        the join.
        """
        ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece}
        if pairs is None:
            rows = [
                (ids[piece[:at]], ids[piece[at:]], i, i)
                for piece, i in ids.items()
                for at in range(1, len(piece))
                if piece[:at] in ids and piece[at:] in ids
            ]
        else:
            rows = [(ids[a], ids[b], ids[a + b], rank) for rank, (a, b) in enumerate(pairs)]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


@dataclass(frozen=True, eq=False)
class CutRules:
    """The rules of a byte-pair tokenizer."""

    merges: Merges
    pretokens: Callable[[str], Sequence[str]]
    """Splits a text into pretokens, each of which is merged separately."""
    added: frozenset[int] = frozenset()
    """Added tokens, which are matched in the text first."""


@dataclass(frozen=True, eq=False)
class Continuations:
    """The table. Tokens with equal rows share one."""

    rows: np.ndarray
    """bool [R, 257]: whether the byte, or the end, may follow."""
    row_of: np.ndarray
    """int32 [V]"""

    @classmethod
    def of(cls, allowed: np.ndarray) -> Continuations:
        """allowed: bool [V, 257]."""
        packed = np.packbits(allowed, axis=1)
        width, data = packed.shape[1], packed.tobytes()
        seen: dict[bytes, int] = {}
        row_of = [seen.setdefault(data[at : at + width], len(seen)) for at in range(0, len(data), width)]
        rows = np.frombuffer(b"".join(seen), dtype=np.uint8).reshape(-1, width)
        return cls(
            np.unpackbits(rows, axis=1, count=NUM_SYMBOLS).astype(bool), np.array(row_of, dtype=np.int32)
        )

    @classmethod
    def everything(cls, num_ids: int) -> Continuations:
        """The table of an unknown tokenizer: everything may follow."""
        return cls(np.ones((1, NUM_SYMBOLS), dtype=bool), np.zeros(num_ids, dtype=np.int32))

    def __and__(self, other: Continuations) -> Continuations:
        pair = self.row_of.astype(np.int64) * len(other.rows) + other.row_of
        pairs, row_of = np.unique(pair, return_inverse=True)
        rows = self.rows[pairs // len(other.rows)] & other.rows[pairs % len(other.rows)]
        return Continuations(rows, row_of.reshape(-1).astype(np.int32))

    def may_follow(self, tokens: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """bool, of the shape that both broadcast to."""
        return self.rows[self.row_of[tokens], symbols]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the whole table."""
        digest = hashlib.sha256(np.packbits(self.rows, axis=1).tobytes())
        digest.update(self.row_of.astype("<i4").tobytes())
        return digest.hexdigest()

    def contradictions(self, ids: np.ndarray, table: TokenTable) -> np.ndarray:
        """int64 [n]: positions in a tokenizer's own cut at which the table forbids the
        actual continuation.
        """
        ids = np.asarray(ids, dtype=np.int64)
        ids = ids[table.lengths[ids] > 0]
        first = table.flat[table.offsets[ids[1:]]]
        return np.flatnonzero(~self.may_follow(ids[:-1], first))


def within_characters(table: TokenTable) -> Continuations:
    """The table of UTF-8; a token of continuation bytes only may end anywhere."""
    continuing = np.array([0x80 <= b < 0xC0 for b in range(256)] + [False])
    kinds = np.stack([np.ones(NUM_SYMBOLS, dtype=bool), continuing, ~continuing])
    kind = []
    for piece in table.pieces():
        lead = next((k for k in range(1, len(piece) + 1) if not 0x80 <= piece[-k] < 0xC0), None)
        if not piece or lead is None:
            kind.append(0)
            continue
        first = piece[-lead]
        # lead: bytes from the last leading byte on. size: bytes of the character that it begins.
        size = 1 + sum(first >= least for least in (0xC0, 0xE0, 0xF0))
        if lead < size:
            kind.append(1)  # the character is cut: only continuation bytes may follow
        elif lead == size and first < 0xF8:
            kind.append(2)  # the character is complete: no continuation byte may follow
        else:
            kind.append(2 if first < 0x80 else 0)  # not UTF-8
    return Continuations(kinds, np.array(kind, dtype=np.int32))


def longest_match(table: TokenTable) -> Continuations:
    """The table of a tokenizer that always takes the longest token, from left to right."""
    allowed = np.ones((table.num_ids, NUM_SYMBOLS), dtype=bool)
    pieces = table.pieces()
    ids: dict[bytes, list[int]] = {}
    for i, piece in enumerate(pieces):
        ids.setdefault(piece, []).append(i)
    for piece in pieces:
        if len(piece) > 1:
            allowed[ids.get(piece[:-1], []), piece[-1]] = False
    return Continuations.of(allowed)


def inside_pretokens(
    merges: Merges,
    table: TokenTable,
    *,
    symbols: Sequence[int],
    inside: np.ndarray,
    exempt: Iterable[int] = (),
) -> Continuations:
    """What the merges permit.

    symbols: the bytes that are looked at. inside: bool [256, 256], between which last byte of a token and
    which next one no border of pretokens ever falls. exempt: ids that may be followed by anything.
    """
    tree = _Derivations.of(merges, table.num_ids)
    lengths = table.lengths
    last = np.zeros(table.num_ids, dtype=np.int64)
    last[lengths > 0] = table.flat[table.offsets[1:][lengths > 0] - 1]
    allowed = np.ones((table.num_ids, NUM_SYMBOLS), dtype=bool)
    asked = np.flatnonzero(tree.is_derived & (lengths > 0))
    asked = np.setdiff1d(asked, np.fromiter(exempt, dtype=np.int64))
    single = np.flatnonzero((lengths == 1) & tree.is_used).tolist()
    root = {int(table.flat[table.offsets[i]]): i for i in single}
    for byte in symbols:
        if byte not in root:
            continue
        tokens = asked[inside[last[asked], byte]]
        first = tree.first_merge_of_all(root[byte])[tokens]
        blocked = first < _NEVER
        tokens, first = tokens[blocked], first[blocked]
        allowed[tokens[~tree.find_neighbour(tokens, root[byte], first, [_MAX_NODES])], byte] = False
    return Continuations.of(allowed)


@dataclass(frozen=True, eq=False)
class _Derivations:
    """The derivation of each token, and the merges."""

    left_of: np.ndarray
    """int64 [V]: the left half, -1 for a symbol or a token that no merge makes."""
    right_of: np.ndarray
    rank: np.ndarray
    """int64 [V]: when it is made; -1 for a symbol."""
    is_derived: np.ndarray
    """bool [V]: made by merges, or a symbol that they use."""
    is_used: np.ndarray
    keys: np.ndarray
    """int64 [m], ascending: left * V + right"""
    ranks: np.ndarray
    """int64 [m]: when they can merge: no earlier than both are made."""
    children: np.ndarray
    """int64 [c]: tokens with a left half, by that half."""
    first_child: np.ndarray
    """int64 [V + 1]"""
    times_taken: np.ndarray
    """int64 [V]: merges whose right half it is."""
    by_depth: list[np.ndarray]
    """Tokens with a right half: first those whose right half is a symbol, then those whose
    right half is of these.
    """

    @classmethod
    def of(cls, merges: Merges, num_ids: int) -> _Derivations:
        key = merges.left * num_ids + merges.right
        order = np.lexsort((merges.rank, key))
        order = order[np.append(True, np.diff(key[order]) > 0)[: order.size]]
        keys, rank = key[order], merges.rank[order]
        left, right, joined = merges.left[order], merges.right[order], merges.joined[order]
        made = np.zeros(num_ids, dtype=bool)
        made[joined] = True
        used = made.copy()
        used[left], used[right] = True, True
        left_of, right_of, made_at = _derive(left, right, joined, rank, made, keys, num_ids)
        can_merge = np.maximum(rank, np.maximum(made_at[left], made_at[right]))
        parents = np.flatnonzero(left_of >= 0)
        # Children that few merges take up from the left come first: they settle most questions.
        times_taken = np.bincount(right, minlength=num_ids)
        children = parents[np.lexsort((made_at[parents], times_taken[parents], left_of[parents]))]
        return cls(
            left_of=left_of,
            right_of=right_of,
            rank=made_at,
            is_derived=(left_of >= 0) | (used & ~made),
            is_used=used,
            keys=keys,
            ranks=can_merge,
            times_taken=times_taken,
            children=children,
            first_child=left_of[children].searchsorted(np.arange(num_ids + 1)),
            by_depth=_by_depth(right_of),
        )

    def first_merge(self, tokens: np.ndarray, begins: int) -> np.ndarray:
        """int64 [n]: when a merge first joins what ends a token with the token `begins` behind
        it, _NEVER if none.
        """
        num_ids = self.left_of.size
        found = np.full(tokens.size, _NEVER)
        if not self.times_taken[begins]:
            return found
        places, ending, dies = np.arange(tokens.size), tokens, np.full(tokens.size, _NEVER)
        while places.size:
            key = ending * num_ids + begins
            at = np.minimum(self.keys.searchsorted(key), self.keys.size - 1)
            rank = np.where((self.keys[at] == key) & (self.ranks[at] < dies), self.ranks[at], _NEVER)
            found[places] = np.minimum(found[places], rank)
            half = self.right_of[ending]
            goes_on = half >= 0
            dies = self.rank[ending[goes_on]]
            places, ending = places[goes_on], half[goes_on]
        return found

    def first_merge_of_all(self, begins: int) -> np.ndarray:
        """int64 [V]: `first_merge` of every token."""
        num_ids = self.left_of.size
        own = self.keys % num_ids == begins
        found = np.full(num_ids, _NEVER)
        found[self.keys[own] // num_ids] = self.ranks[own]
        for tokens in self.by_depth:
            of_half = found[self.right_of[tokens]]
            found[tokens] = np.minimum(found[tokens], np.where(of_half < self.rank[tokens], of_half, _NEVER))
        return found

    def find_neighbour(
        self, tokens: np.ndarray, node: int, first: np.ndarray, budget: list[int]
    ) -> np.ndarray:
        """bool [n]: whether a longer token that begins with `node` can stand behind each token.

        first: when a merge would join the token with `node`, if that has not become part of a
        longer one by then.
        """
        found = np.zeros(tokens.size, dtype=bool)
        open_ = np.arange(tokens.size)
        for child in self.children[self.first_child[node] : self.first_child[node + 1]].tolist():
            asked = self.rank[child] < first[open_]
            if not asked.any():
                continue
            budget[0] -= 1
            if budget[0] < 0:
                found[open_] = True
                break
            these = open_[asked]
            joins = self.first_merge(tokens[these], child)
            blocked = joins < _NEVER
            found[these] = ~blocked
            if blocked.any():
                found[these[blocked]] = self.find_neighbour(
                    tokens[these[blocked]], child, joins[blocked], budget
                )
            open_ = open_[~found[open_]]
            if not open_.size:
                break
        return found


def _by_depth(right_of: np.ndarray) -> list[np.ndarray]:
    depth, half = np.zeros(right_of.size, dtype=np.int64), right_of.copy()
    while (half >= 0).any():
        depth += half >= 0
        half = np.where(half >= 0, right_of[half], -1)
    return [np.flatnonzero(depth == d) for d in range(1, int(depth.max(initial=0)) + 1)]


def _derive(
    left: np.ndarray,
    right: np.ndarray,
    joined: np.ndarray,
    rank: np.ndarray,
    made: np.ndarray,
    keys: np.ndarray,
    num_ids: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two halves that the merges make each token of, and when; in the order of the merges."""
    left_of, right_of = np.full(num_ids, -1), np.full(num_ids, -1)
    made_at = np.full(num_ids, -1)
    rank_of = dict(zip(keys.tolist(), rank.tolist(), strict=True))
    lefts, rights, at = left_of.tolist(), right_of.tolist(), made_at.tolist()
    is_made = made.tolist()
    rows = sorted(zip(rank.tolist(), joined.tolist(), left.tolist(), right.tolist(), strict=True))
    waiting = rows
    while waiting:
        later = []
        for when, token, a, b in waiting:
            if lefts[token] >= 0:
                continue
            if (is_made[a] and lefts[a] < 0) or (is_made[b] and lefts[b] < 0):
                later.append((when, token, a, b))
                continue
            when = max(when, at[a], at[b])
            if _are_neighbours(a, b, when, lefts, rights, at, rank_of, num_ids):
                lefts[token], rights[token], at[token] = a, b, when
        if len(later) == len(waiting):
            break
        waiting = later
    return np.array(lefts), np.array(rights), np.array(at)


def _are_neighbours(
    a: int,
    b: int,
    limit: int,
    lefts: list[int],
    rights: list[int],
    at: list[int],
    rank_of: dict[int, int],
    num_ids: int,
) -> bool:
    """Whether a and b are still apart when all merges before `limit` are done."""
    dies_a, ending = limit, a
    while ending >= 0:
        dies_b, beginning = limit, b
        while beginning >= 0:
            if not (ending == a and beginning == b):
                when = rank_of.get(ending * num_ids + beginning)
                if when is not None:
                    when = max(when, at[ending], at[beginning])
                    if when < dies_a and (when <= dies_b if beginning != b else when < dies_b):
                        return False
            dies_b, beginning = at[beginning], lefts[beginning]
        dies_a, ending = at[ending], rights[ending]
    return True
