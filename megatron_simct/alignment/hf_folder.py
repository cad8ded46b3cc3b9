"""The files beside a tokenizer in a Hugging Face folder: added tokens, BOS, stop ids, variables
of the chat template.

`read_folder` reads them once, in the order of precedence of transformers:
    tokenizer_config.json     named tokens, and added_tokens_decoder: tokens with their ids. If it has that
                              field, the next two files are not read.
    special_tokens_map.json   named tokens, which go before those of tokenizer_config.json; null takes one
                              away
    added_tokens.json         ids of added tokens, below those that tokenizer.json lists itself
    generation_config.json    eos_token_id
    config.json               eos_token_id, if generation_config.json has none
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_simct.alignment import templates
from megatron_simct.config.options import ModelConfig
from megatron_simct.json_fields import BOOL, NULL, OBJECT, STRING, Kind, check_fields, integer, list_of


def _object_of_strings(*names: str) -> Kind:
    noun = "string" if len(names) == 1 else "strings"
    return Kind(
        f"an object with the {noun} {' and '.join(names)}",
        lambda value: isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names),
    )


_STRINGS = Kind(
    "an object of strings",
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
)
_TOKEN = STRING | _object_of_strings("content") | NULL
_TOKENS = list_of(STRING | _object_of_strings("content")) | OBJECT | NULL
_IDS = integer(0) | list_of(integer(0)) | NULL
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_DECODER = Kind(
    "an object of ids, each with an object with the string content",
    lambda value: (
        isinstance(value, dict)
        and all(re.fullmatch(r"[0-9]{1,18}", key) for key in value)
        and all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in value.values())
        and all(isinstance(token.get(flag, False), bool) for token in value.values() for flag in _FLAGS)
    ),
)
_KINDS = {
    "generation_config.json": {"eos_token_id": _IDS},
    "config.json": {"eos_token_id": _IDS},
    "tokenizer_config.json": {
        "eos_token": _TOKEN,
        "bos_token": _TOKEN,
        "add_bos_token": BOOL | NULL,
        "split_special_tokens": BOOL | NULL,
        "added_tokens_decoder": _DECODER,
        "additional_special_tokens": _TOKENS,
        "extra_special_tokens": _TOKENS,
    },
    "special_tokens_map.json": {
        "eos_token": _TOKEN,
        "bos_token": _TOKEN,
        "additional_special_tokens": _TOKENS,
        "extra_special_tokens": _TOKENS,
    },
}
"""Allowed values of the fields that are read from each file."""

UNNAMED = "extra_special_tokens"

_ANSWER = "The answer is 42."
ANY_DAY = "2025-01-01"
"""Any date: the end of a turn does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that a file adds to the vocabulary; the flags are those of the tokenizers library."""

    content: str
    token_id: int
    source: str
    """The file that gives it this id."""
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True)
class NamedToken:
    """A token that a file mentions by its text, without an id."""

    content: str
    role: str
    """bos_token, eos_token, ..., or UNNAMED for one of extra_special_tokens."""
    source: str


@dataclass(frozen=True, kw_only=True)
class HfFolder:
    """The settings of the files beside the tokenizer, in order of precedence. `read_folder` makes it."""

    path: Path
    settings: Mapping[str, Any]
    """tokenizer_config.json"""
    added: tuple[AddedToken, ...]
    """Tokens to be added to those that tokenizer.json lists itself, by id."""
    named: tuple[NamedToken, ...]
    """Special tokens without an id: bos_token, eos_token and the like, then those without a role."""
    unread: tuple[AddedToken | NamedToken, ...]
    """Entries that other files override."""
    stops: Mapping[int, str]
    """eos_token_id, and the file that has it."""
    stops_are_final: bool
    """Whether generation_config.json names them."""

    @property
    def variables(self) -> dict[str, str]:
        """bos_token, eos_token and the like, as a chat template reads them."""
        return {token.role: token.content for token in self.named if token.role != UNNAMED}

    def token(self, role: str) -> NamedToken | None:
        """The token with this role."""
        return next((token for token in self.named if token.role == role), None)

    @property
    def adds_bos(self) -> bool | None:
        """add_bos_token of tokenizer_config.json; None if it is missing."""
        return self.settings.get("add_bos_token")


def read_folder(path: Path) -> HfFolder:
    """Reads the files of a folder; all of them may be absent.

    Raises ValueError, naming the file, for invalid content.
    """
    settings = read_settings(path, "tokenizer_config.json")
    token_map = read_settings(path, "special_tokens_map.json")
    ids = read_settings(path, "added_tokens.json")
    check_fields(ids, dict.fromkeys(ids, integer(0)), where=str(path / "added_tokens.json"))
    if settings.get("split_special_tokens"):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: split_special_tokens = true, with which the special tokens "
            "of a chat are ordinary text, is not supported; delete it"
        )
    of_map = _named(token_map, "special_tokens_map.json")
    of_settings = _named(settings, "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        added = _decoder_tokens(settings["added_tokens_decoder"])
        unread: list[AddedToken | NamedToken] = [*_added_by_text(ids, of_settings), *of_map]
        named = of_settings
    else:
        # A role that the map has, if only as null, is the map's; the lists of both files hold.
        named = [t for t in of_settings if t.role == UNNAMED or t.role not in token_map] + of_map
        unread = [t for t in of_settings if t not in named]
        added = _added_by_text(ids, named)
    stops, final = _eos_token_ids(path)
    return HfFolder(
        path=path,
        settings=settings,
        added=tuple(sorted(added, key=lambda token: token.token_id)),
        named=tuple(dict.fromkeys(named)),
        unread=tuple(unread),
        stops=stops,
        stops_are_final=final,
    )


def _named(settings: Mapping[str, Any], source: str) -> list[NamedToken]:
    """The special tokens that one file mentions."""
    fields = dict(settings)
    if not fields.get(UNNAMED):
        fields[UNNAMED] = fields.get("additional_special_tokens")  # the older name
    extra = fields.pop(UNNAMED) or []
    roles = {role: special_token(value) for role, value in fields.items() if role.endswith("_token")}
    if isinstance(extra, dict):
        roles |= {role: special_token(value) for role, value in extra.items()}
        extra = []
    found = [
        NamedToken(content=text, role=role, source=source)
        for role, text in roles.items()
        if isinstance(text, str)
    ]
    for value in extra:
        text = special_token(value)
        assert text is not None, "check_fields lets only texts into these lists"
        found.append(NamedToken(content=text, role=UNNAMED, source=source))
    return [token for token in found if token.content]


def _decoder_tokens(decoder: Mapping[str, Mapping[str, Any]]) -> list[AddedToken]:
    """The tokens of added_tokens_decoder, with the defaults of the library."""
    tokens = []
    for key, fields in decoder.items():
        flags = {"special": False} | {flag: fields[flag] for flag in _FLAGS if flag in fields}
        flags.setdefault("normalized", not flags["special"])
        tokens.append(
            AddedToken(content=fields["content"], token_id=int(key), source="tokenizer_config.json", **flags)
        )
    return [token for token in tokens if token.content]


def _added_by_text(ids: Mapping[str, int], named: Iterable[NamedToken]) -> list[AddedToken]:
    """The tokens of added_tokens.json; those that have a name are special."""
    special = {token.content for token in named}
    return [
        AddedToken(
            content=text,
            token_id=token_id,
            source="added_tokens.json",
            special=text in special,
            normalized=text not in special,
        )
        for text, token_id in ids.items()
    ]


def _eos_token_ids(folder: Path) -> tuple[dict[int, str], bool]:
    """eos_token_id and its file, and whether that is generation_config.json."""
    for name in ("generation_config.json", "config.json"):
        settings = read_settings(folder, name)
        ids = settings.get("eos_token_id")
        if ids is None and name == "config.json" and isinstance(settings.get("text_config"), dict):
            check_fields(settings["text_config"], _KINDS[name], where=f"{folder / name}: text_config")
            ids = settings["text_config"].get("eos_token_id")
        if ids is not None and ids != []:
            return dict.fromkeys(
                ids if isinstance(ids, list) else [ids], name
            ), name == "generation_config.json"
    return {}, False


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else Mistral's tekken.json,
    else tokenizer.model.
    """
    names = ("tokenizer.json", "tekken.json", "tokenizer.model")
    return next((folder / name for name in names if (folder / name).exists()), None)


def locate_tokenizer(options: ModelConfig, *, prefix: str) -> str:
    """--[teacher-]tokenizer-model, else the folder of --[teacher-]hf-checkpoint.

    ValueError if that has none.
    """
    if options.tokenizer_model is not None:
        return options.tokenizer_model
    if tokenizer_file(Path(options.folder)) is None:
        folder = f"--{prefix}hf-checkpoint {options.folder}"
        raise ValueError(f"missing --{prefix}tokenizer-model: {folder} has no tokenizer")
    return options.folder


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of the folder; empty if there is none.

    Raises ValueError, naming the file, for invalid values.
    """
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


def template_source(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """File and text of the folder's template; of several named ones, the one named default.

    Any template in a file overrides all of tokenizer_config.json, as in transformers.
    """
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files.setdefault("default", folder / "chat_template.jinja")
    if "default" in files:
        name = str(files["default"].relative_to(folder))
        try:
            return name, files["default"].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None
    if files:
        raise ValueError(
            "has no chat template named default: beside files in additional_chat_templates transformers "
            f"reads none of tokenizer_config.json; additional_chat_templates has {', '.join(files)}"
        )
    kinds = {"chat_template": STRING | list_of(_object_of_strings("name", "template")) | _STRINGS | NULL}
    check_fields(settings, kinds, where="tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(
                "has no chat template named default; tokenizer_config.json has "
                f"{', '.join(template) or 'none'}"
            )
        template = template["default"]
    if not template:
        raise ValueError(
            "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), which "
            "--apply-chat-template needs"
        )
    return "tokenizer_config.json", template


def turn_end(folder: HfFolder, special_tokens: Iterable[str]) -> str | None:
    """The special token that the folder's chat template writes behind an answer: what an instructed model
    stops with.

    None if there is no template, if it does not render a plain conversation, or writes no such token.
    """
    behind = behind_answer(folder)
    found = [token for token in special_tokens if token and behind.startswith(token)]
    return max(found, key=len, default=None)


def behind_answer(folder: HfFolder) -> str:
    """What the chat template writes behind an answer; empty if it does not render a plain conversation."""
    messages = [
        {"role": "user", "content": "What is six times seven?"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        _, source = template_source(folder.path, folder.settings)
        text = templates.render(
            source, messages, variables=folder.variables, date=ANY_DAY, add_generation_prompt=False
        )
    except (OSError, ValueError):
        return ""
    return text.partition(_ANSWER)[2].lstrip()
