"""One text, as the prompt of both models.

Each model reads the response behind its own prompt; prompts may differ between the models, the bytes of the response do
not. Prompt and response are tokenized apart, so that their border is a token boundary on both sides.
"""

from __future__ import annotations

import numpy as np

from megatron_simct.alignment.tokenizer import Tokenizer


def render_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The prompt's ids, int32 [p]: the tokenizer's beginning-of-sequence token where it has one, then the text."""
    ids = tokenizer.encode(text.encode())
    if tokenizer.bos_id is not None:
        ids = np.concatenate([[tokenizer.bos_id], ids])
    return ids.astype(np.int32)
