"""One text or conversation, as the prompt of both models.

Each model reads the response behind its own prompt, a conversation written with its own chat template; prompts may
differ between the models, the bytes of the response do not. Prompt and response are tokenized apart, so that their
border is a token boundary on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.meta
import numpy as np

from megatron_simct.alignment.hf_folder import (
    TEMPLATE_ERRORS,
    environment,
    read_settings,
    special_token,
    template_source,
)
from megatron_simct.alignment.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
"""[{"role": ..., "content": ...}]"""


def render_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The prompt's ids, int32 [p]: the tokenizer's beginning-of-sequence token where it has one, then the text."""
    ids = tokenizer.encode(text.encode())
    if tokenizer.bos_id is not None:
        ids = np.concatenate([[tokenizer.bos_id], ids])
    return ids.astype(np.int32)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one Hugging Face folder, which writes a conversation up to where the model answers."""

    name: str
    """For messages: the flag and the file."""
    template: jinja2.Template
    special_tokens: dict[str, str]
    """bos_token, eos_token and the like: variables of the template."""
    variables: frozenset[str] = frozenset()
    """What the template reads and does not set."""

    @classmethod
    def load(cls, folder: str, *, flag: str) -> ChatTemplate:
        """Raises ValueError, naming the flag and the file, where there is no template or it cannot be read."""
        try:
            settings = read_settings(Path(folder), "tokenizer_config.json")
            name, source = template_source(Path(folder), settings)
        except (OSError, ValueError) as error:
            raise ValueError(f"{flag} {folder}: {error}") from None
        try:
            template = environment().from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment().parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{flag} {folder}: {name}, line {error.lineno} of the template: {error.message}") from None
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{flag} {folder}: {name} holds a template that cannot be read: {reason}") from None
        tokens = {key: special_token(value) for key, value in settings.items() if key.endswith("_token")}
        return cls(
            name=f"{flag} {folder}: {name}",
            template=template,
            special_tokens={key: text for key, text in tokens.items() if isinstance(text, str)},
            variables=frozenset(variables),
        )

    def text(self, messages: Messages) -> str:
        """What the template writes. Raises what jinja2 or the template itself does."""
        return self.template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)

    def render(self, messages: Messages, tokenizer: Tokenizer) -> np.ndarray:
        """The prompt's ids, int32 [p]. The template writes BOS itself where the model wants one, so none is added.

        Raises ValueError, naming the template, where it refuses the messages or writes nothing.
        """
        assert tokenizer.encode_chat is not None, f"{tokenizer.name} cannot read a rendered template"
        try:
            text = self.text(messages)
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"{self.name} does not render it: {' '.join(str(error).split())}") from None
        ids = np.asarray(tokenizer.encode_chat(text), dtype=np.int32)
        if not ids.size:
            raise ValueError(f"{self.name} renders nothing; no token would precede the response")
        return ids
