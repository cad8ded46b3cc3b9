"""What a Hugging Face folder says beside its tokenizer: stop ids, chat template, the token that ends a turn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from megatron_simct.json_fields import BOOL, NULL, STRING, Kind, check_fields, list_of, whole

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,  # with what recurses too deep
    SyntaxError,
    TypeError,
    ValueError,
)
"""What reading or rendering a template raises: it is a program of somebody else."""


def _object_of_strings(*names: str) -> Kind:
    return Kind(
        f"an object with the string{'s' * (len(names) > 1)} {' and '.join(names)}",
        lambda value: isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names),
    )


_TOKEN = STRING | _object_of_strings("content") | NULL
_KINDS = {
    "generation_config.json": {"eos_token_id": whole(0) | list_of(whole(0)) | NULL},
    "tokenizer_config.json": {"eos_token": _TOKEN, "bos_token": _TOKEN, "add_bos_token": BOOL | NULL},
    "special_tokens_map.json": {"eos_token": _TOKEN},
}
"""Of the fields that are read wherever the files are."""

_ANSWER = "The answer is 42."


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else SentencePiece's tokenizer.model."""
    return next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()), None)


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of the folder; empty where there is none. ValueError, naming the file, for what it cannot be."""
    path = folder / name
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object")
    check_fields(settings, _KINDS.get(name, {}), where=str(path))
    return settings


def special_token(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def generation_stop_ids(folder: Path) -> tuple[int, ...]:
    """eos_token_id of the folder's generation_config.json, a number or a list of them."""
    ids = read_settings(folder, "generation_config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(ids))


def template_source(folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """File and text of the folder's template; of several named ones, the one named default."""
    if (folder / "chat_template.jinja").exists():
        try:
            return "chat_template.jinja", (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template.jinja is not UTF-8 at byte {error.start}") from None
    check_fields(
        settings,
        {"chat_template": STRING | list_of(_object_of_strings("name", "template")) | NULL},
        where="tokenizer_config.json",
    )
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if not isinstance(template, str):
        raise ValueError(
            "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), which "
            "--apply-chat-template needs"
        )
    return "tokenizer_config.json", template


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates are written for, but for the clock (strftime_now): a template that dates its prompts then writes
    its own default date, and a run that is continued tomorrow continues with the same prompts."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.filters["tojson"] = to_json
    return sandbox


def turn_end(folder: Path, special_tokens: Iterable[str]) -> str | None:
    """The special token that the folder's chat template writes behind an answer: what an instructed model stops with.

    None where there is no template, where it does not render a plain conversation, or writes no such token.
    """
    settings = read_settings(folder, "tokenizer_config.json")
    tokens = {key: special_token(value) for key, value in settings.items() if key.endswith("_token")}
    messages = [{"role": "user", "content": "What is six times seven?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, source = template_source(folder, settings)
        text = environment().from_string(source).render(messages=messages, **tokens)
    except (OSError, *TEMPLATE_ERRORS):
        return None
    behind = text.partition(_ANSWER)[2].lstrip()
    found = [token for token in special_tokens if token and behind.startswith(token)]
    return max(found, key=len, default=None)
