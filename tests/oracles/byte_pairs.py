"""Models of exact small languages (alignment/languages.py) as sides for the oracle of `bytes`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_simct.alignment.languages import (
    Cut,
    ExactModel,
    Language,
    byte_pairs,
    longest_match,
    mixture,
    random_byte_pairs,
    random_language,
    unigram,
)
from tests.oracles.bytes import Side

__all__ = [
    "byte_pairs",
    "longest_match",
    "mixture",
    "random_byte_pairs",
    "random_language",
    "unigram",
    "write_out",
]


def write_out(language: Language, text: bytes, pieces: Sequence[bytes], stop_id: int, cut: Cut) -> Side:
    """The output of the model of `language` in this tokenization along `text`."""
    model = ExactModel.of(language, cut, stop_id)
    return Side(
        list(pieces), [stop_id], torch.from_numpy(model.logits(text, len(pieces))), model.labels(text)
    )
