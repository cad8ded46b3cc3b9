"""One text or conversation, rendered as the prompt of both models.

Each model reads the response after its own prompt, a conversation that its own chat template renders. The
prompts of the models may differ; the bytes of the response do not. Prompt and response are tokenized
separately, so the boundary between them is a token boundary for both models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import Any

import numpy as np

from megatron_simct.alignment import templates
from megatron_simct.alignment.hf_folder import read_folder, template_source
from megatron_simct.alignment.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
"""[{"role": ..., "content": ...}]"""

_SET_BY_US = frozenset(
    "messages tools documents add_generation_prompt continue_final_message "
    "strftime_now raise_exception namespace dict range cycler joiner lipsum".split()
)
"""Names in a template that its arguments must not replace."""


def render_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The prompt's ids, int32 [p]: the tokenizer's beginning-of-sequence token, if it has
    one, then the text.
    """
    ids = tokenizer.encode(text.encode())
    if tokenizer.bos_id is not None:
        ids = np.concatenate([[tokenizer.bos_id], ids])
    return ids.astype(np.int32)


def read_date(text: str | None, *, flag: str = "--chat-template-date") -> str:
    """The date for a template's strftime_now, YYYY-MM-DD; None means today.

    Raises ValueError if it is not a date.
    """
    if text is None:
        return Date.today().isoformat()
    try:
        if Date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise ValueError(f"{flag} {text}: not a date; write YYYY-MM-DD")


def read_arguments(text: str | None, *, flag: str) -> dict[str, Any]:
    """The arguments of a template, from a JSON object. Raises ValueError, naming the flag, if it is not an
    object or sets a reserved name.
    """
    if text is None:
        return {}
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {text}: not JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f'{flag} {text}: expected a JSON object such as {{"enable_thinking": false}}')
    for name in arguments:
        if name == "strftime_now":
            raise ValueError(f"{flag}: strftime_now is a function; --chat-template-date sets its date")
        if name in _SET_BY_US:
            raise ValueError(f"{flag}: {name} is set for every prompt and cannot be replaced; leave it out")
    return arguments


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one Hugging Face folder. It renders a conversation up to the place of
    the model's answer.
    """

    name: str
    """Flag and file, for error messages."""
    source: str
    """The template's own text."""
    date: str
    """YYYY-MM-DD; the date of strftime_now."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token and others: variables of the template."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables, such as enable_thinking. They override special tokens."""
    variables: frozenset[str] = frozenset()
    """Variables that the template reads and does not set."""

    @classmethod
    def load(
        cls, folder: str, *, flag: str, kwargs: str | None = None, date: str | None = None
    ) -> ChatTemplate:
        """kwargs: value of --[teacher-]chat-template-kwargs; date: value of --chat-template-date.

        Raises ValueError, naming the flag and the file, if there is no template, it cannot be read, or it
        does not read one of the arguments.
        """
        kwargs_flag = f"{flag.removesuffix('hf-checkpoint')}chat-template-kwargs"
        arguments, day = read_arguments(kwargs, flag=kwargs_flag), read_date(date)
        try:
            found = read_folder(Path(folder))
            name, source = template_source(found.path, found.settings)
        except (OSError, ValueError) as error:
            raise ValueError(f"{flag} {folder}: {error}") from None
        where = f"{flag} {folder}: {name}"
        try:
            variables = templates.variables_of(source, date=day)
        except ValueError as error:
            raise ValueError(f"{where} has an invalid template: {error}") from None
        for argument in arguments:
            if argument not in variables:
                raise ValueError(
                    f"{kwargs_flag}: {where} does not read {argument}, so it would have no effect; in "
                    "addition to messages and special tokens it reads "
                    f"{', '.join(_switches(variables)) or 'nothing'}"
                )
        return cls(
            name=where,
            source=source,
            date=day,
            special_tokens=found.variables,
            arguments=arguments,
            variables=variables,
        )

    def text(self, messages: Messages, *, answered: bool = False) -> str:
        """The rendered text. answered: the messages hold the answer, so the text does not ask for one.

        Raises ValueError with the reason if the template refuses, templates.TemplateLimit if it exceeds a
        limit.
        """
        return templates.render(
            self.source,
            messages,
            variables={**self.special_tokens, **self.arguments},
            date=self.date,
            add_generation_prompt=not answered,
        )

    def render(self, messages: Messages, tokenizer: Tokenizer) -> np.ndarray:
        """The prompt's ids, int32 [p]. No BOS is added: the template writes it if the model needs one.

        Raises ValueError, naming the template, if it refuses the messages or writes nothing;
        templates.TemplateLimit if it exceeds a limit.
        """
        assert tokenizer.encode_chat is not None, f"{tokenizer.name} cannot encode a rendered chat template"
        try:
            text = self.text(messages)
        except templates.TemplateLimit as error:
            raise templates.TemplateLimit(f"{self.name} {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.name} does not render it: {error}") from None
        ids = np.asarray(tokenizer.encode_chat(text), dtype=np.int32)
        if not ids.size:
            raise ValueError(
                f"{self.name} renders an empty text, but at least one token must precede the response"
            )
        return ids


def _switches(variables: frozenset[str]) -> list[str]:
    """The variables that arguments may set."""
    return sorted(name for name in variables - _SET_BY_US if not name.endswith("_token"))
