"""What each id of a tokenizer means in bytes.

Two tokenizers are comparable only as bytes: one writes a blank as 'Ġ', another as '▁', a third splits one
character over three tokens, none of which is text. So each tokenizer is reduced once to a table id -> bytes,
and everything after that (segments, shared vocabulary) compares bytes and never text.

Shape letters: V ids of the tokenizer, Z bytes of all pieces together, N ids of a sequence,
L bytes they spell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The bytes of every id, back to back in one array, so that a whole response is spelled by one gather.

    A special token is flagged and has no bytes: its spelling ("</s>") is a name, not content, and a response
    that contains those characters as text must not be taken for it.
    """

    flat: np.ndarray
    """uint8 [Z]: id i spells flat[offsets[i]:offsets[i + 1]]."""
    offsets: np.ndarray
    """int64 [V + 1], ascending from 0 to Z."""
    special: np.ndarray
    """bool [V]: ids that are not content (control tokens, stop tokens, ids that the tokenizer leaves unused).
    """
    stop_ids: tuple[int, ...]
    """The ids that end a response; the first is the one that a retokenized response ends with."""
    normalizer: str = ""
    """What the tokenizer does to text before it cuts it; "" for nothing. Part of the fingerprint only."""
    lengths: np.ndarray = field(init=False, repr=False)
    """int64 [V]: bytes of each id; 0 for special ids."""

    def __post_init__(self) -> None:
        lengths = np.diff(self.offsets)
        assert self.offsets[0] == 0 and self.offsets[-1] == len(self.flat), "offsets must span the flat bytes"
        assert lengths.size == self.special.size, (
            f"{lengths.size} pieces but {self.special.size} special flags"
        )
        assert not lengths[self.special].any(), "special ids have no bytes"
        assert self.special[list(self.stop_ids)].all(), "stop ids are special"
        object.__setattr__(self, "lengths", lengths)
        for array in (self.flat, self.offsets, self.special, self.lengths):
            array.setflags(write=False)

    @classmethod
    def from_bytes(
        cls,
        pieces: Sequence[bytes],
        special_ids: Iterable[int] = (),
        stop_ids: Iterable[int] = (),
        *,
        normalizer: str = "",
    ) -> TokenTable:
        """The table of `pieces` [V]. Stop ids are special too; what `pieces` holds for a
        special id is ignored.

        Raises ValueError for a special or stop id outside [0, V) and for a stop id given twice.
        """
        stop_ids = tuple(int(i) for i in stop_ids)
        flagged = {int(i) for i in special_ids} | set(stop_ids)
        outside = sorted(i for i in flagged if not 0 <= i < len(pieces))
        if outside:
            raise ValueError(f"special or stop ids {outside} lie outside the vocabulary of {len(pieces)} ids")
        if len(set(stop_ids)) != len(stop_ids):
            raise ValueError(f"stop ids {list(stop_ids)} name an id twice")
        special = np.zeros(len(pieces), dtype=bool)
        special[list(flagged)] = True
        content = [b"" if is_special else piece for piece, is_special in zip(pieces, special, strict=True)]
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in content], out=offsets[1:])
        flat = np.frombuffer(b"".join(content), dtype=np.uint8)
        return cls(flat=flat, offsets=offsets, special=special, stop_ids=stop_ids, normalizer=normalizer)

    @property
    def num_ids(self) -> int:
        """V, the real size of the vocabulary: a model's padded ids from here on are
        never sampled or scored.
        """
        return self.special.size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of bytes, special flags, stop ids and normalizer: equal means
        that ids mean the same.
        """
        digest = hashlib.sha256(self.normalizer.encode())
        for array in (self.offsets, self.flat, self.special, np.asarray(self.stop_ids, dtype=np.int64)):
            digest.update(np.int64(array.nbytes).tobytes())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one id; b"" for a special id. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token_id < self.num_ids:
            raise ValueError(f"id {token_id} lies outside the vocabulary of {self.num_ids} ids")
        return self.flat[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    def pieces(self) -> list[bytes]:
        """The bytes of all ids, [V]."""
        data, bounds = self.flat.tobytes(), self.offsets.tolist()
        return [data[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]

    def spell(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of a sequence of ids [N] and where each id ends in them.

        Returns uint8 [L] and int64 [N]. Raises ValueError for an id outside the vocabulary,
        such as a padded one.
        """
        try:
            # As unsigned numbers negative ids are out of range too, instead of counting from the end.
            rows = np.asarray(ids, dtype=np.int32).view(np.uint32)
            lengths = self.lengths.take(rows)
            starts = self.offsets.take(rows)
        except IndexError:
            outside = [int(i) for i in ids if not 0 <= i < self.num_ids]
            raise ValueError(f"ids {outside[:5]} lie outside the vocabulary of {self.num_ids} ids") from None
        ends = lengths.cumsum()
        if not ends.size:
            return self.flat[:0], ends
        # Byte j of the result, in token i, is flat[starts[i] + j - (ends[i] - lengths[i])].
        starts -= ends
        starts += lengths
        index = starts.repeat(lengths)
        index += np.arange(index.size)
        return self.flat.take(index), ends
