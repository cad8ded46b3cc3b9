"""A tokenizer as this package needs one: what its ids mean in bytes, and how it would spell given bytes.

Encoding serves to retokenize a response for the other model. A response stands behind a prompt, so its
encoding is content only: no BOS, no special tokens (their spelling inside a response is ordinary text), and
not the leading blank that SentencePiece models of the Llama-2 kind put before a text. It need not be
lossless: a tokenizer may rewrite text, and who aligns compares the bytes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_simct.alignment.continuations import Continuations, CutRules
from megatron_simct.alignment.token_table import TokenTable


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A token table and the tokenizer's own way to spell text in it. Can be pickled to worker processes."""

    name: str
    """For messages: the file it was loaded from."""
    table: TokenTable
    encode_text: Callable[[str], Sequence[int]]
    """Content ids of a text: no special tokens, no BOS, no dummy leading blank."""
    bos_id: int | None = None
    """The id that a prompt starts with, if the tokenizer has one."""
    encode_chat: Callable[[str], Sequence[int]] | None = None
    """Ids of a rendered chat template, in which the spelling of a special token is that token; None: cannot.
    """
    stop_sources: dict[int, str] = field(default_factory=dict)
    """The source of each stop id, for messages."""
    notes: tuple[str, ...] = ()
    """Messages about settings in the files beside the tokenizer that are ignored, or used
    in an unexpected way.
    """
    cut_rules: Callable[[], CutRules] | None = None
    """Reads the rules of its cut of a text, on demand; None if its files do not contain them."""
    strings: Callable[[], dict[str, int]] | None = None
    """The vocabulary as a tokenizer.json spells it, string -> id, read on demand; None for other files.
    """
    continuations: Continuations | None = None
    """Which byte may follow which token in its own cut of a text (cut_rules.py); None
    if that is not known.
    """
    lossy: str | None = None
    """Why its tokens may not spell the text that they encode; None if they do."""

    def encode(self, data: bytes) -> np.ndarray:
        """int32 [n]: content ids of the longest prefix of `data` that is valid UTF-8."""
        return np.asarray(self.encode_text(data[: utf8_prefix_bytes(data)].decode()), dtype=np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids [n]; special ids have none. Raises ValueError for an id outside the vocabulary."""
        return self.table.spell(ids)[0].tobytes()


def report_notes(*tokenizers: Tokenizer | None) -> None:
    """One line on stderr for each note."""
    for tokenizer in filter(None, tokenizers):
        for note in tokenizer.notes:
            print(f" {tokenizer.name}: {note}", file=sys.stderr, flush=True)


def utf8_prefix_bytes(data: bytes) -> int:
    """Length of the longest prefix that is valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def encode_cut(encode: Callable[[str], Sequence[int]], cuts: re.Pattern[str], text: str) -> list[int]:
    """Content ids of the parts of a text between the places that `cuts` matches."""
    return [token_id for part in cuts.split(text) for token_id in encode(part)]


def build_table(
    pieces: Sequence[bytes], special_ids: Iterable[int], stop_ids: tuple[int, ...], *, normalizer: str = ""
) -> TokenTable:
    """The table of a tokenizer that must have a stop token."""
    if not stop_ids:
        raise ValueError("it names no stop token; give stop_token_ids")
    return TokenTable.from_bytes(pieces, special_ids, stop_ids, normalizer=normalizer)


def readable(data: bytes, *, keep: str = "") -> str:
    """Bytes as text; what is not UTF-8, or not printable and not one of the characters of
    `keep`, as an escape.
    """
    text = data.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
