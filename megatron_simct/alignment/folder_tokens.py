"""A Hugging Face folder compared with the vocabulary beside it: one id for each token, and the ids
that end a response.

A token that a run uses and the vocabulary lacks is an error: BOS, EOS, a stop id, a token that the chat
template writes. transformers adds an id for such a token, behind those of the model. Any other one
(padding, a mask) is only a note.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_simct.alignment import templates
from megatron_simct.alignment.hf_folder import (
    ANY_DAY,
    UNNAMED,
    AddedToken,
    HfFolder,
    NamedToken,
    behind_answer,
    template_source,
    turn_end,
)

_MARK = re.compile(r"<([|｜])[^<>|｜\s]+\1>")
"""A text that is usually one token, such as <|im_end|>."""


def check_ids(folder: HfFolder, ids: Mapping[str, int], *, vocabulary: str) -> None:
    """Raises ValueError for a token of the folder's files that has another id in the vocabulary.

    ids: text and id of every token. vocabulary: the file that has them, for the message.
    """
    for token in (*folder.added, *folder.unread):
        if not isinstance(token, AddedToken):
            continue
        found = ids.get(token.content)
        if found is not None and found != token.token_id:
            raise ValueError(
                f"{folder.path / token.source}: added token {token.content!r} has the id {token.token_id}, "
                f"but {vocabulary} gives it {found}; correct the file that does not fit the model"
            )


def check_named(folder: HfFolder, ids: Mapping[str, int]) -> tuple[str, ...]:
    """Notes on tokens that the files mention and the vocabulary lacks, and on entries that are not read.

    Raises ValueError for a missing token that the run uses.
    """
    notes = []
    written, read = _template_texts(folder)
    for token in (*folder.named, *folder.unread):
        if token.content in ids:
            notes += _unread_role(folder, token)
            continue
        role = token.role if isinstance(token, NamedToken) else f"id {token.token_id}"
        used = token in folder.named and (role in ("bos_token", "eos_token") or role in read)
        if used or any(token.content in text for text in written):
            raise ValueError(
                f"{folder.path / token.source}: {token.content!r} ({role}) is not a token of the vocabulary"
                f"{'' if used else ', though the chat template writes it'}; list it among the added tokens "
                "with the id that the model has for it, or take it out"
            )
        notes.append(
            f"{token.source}: {token.content!r} ({role}) is not a token of the vocabulary, and is not used"
        )
    mentioned = {token.content for token in (*folder.named, *folder.added, *folder.unread)}
    marks = {mark.group() for text in written for mark in _MARK.finditer(text)}
    notes += [
        f"the chat template writes {mark!r}, which is not a token of the vocabulary: it is spelled in several"
        for mark in sorted(marks - mentioned - ids.keys())
    ]
    return tuple(dict.fromkeys(notes))


def _unread_role(folder: HfFolder, token: AddedToken | NamedToken) -> list[str]:
    """A note if another file names another token for this one's role."""
    if token not in folder.unread or not isinstance(token, NamedToken) or token.role == UNNAMED:
        return []
    instead = folder.token(token.role)
    if instead is not None and instead.content == token.content:
        return []
    other = "none" if instead is None else f"{instead.content!r}, as {instead.source} has it"
    return [f"{token.source}: {token.role} {token.content!r} is not read; it is {other}"]


def _template_texts(folder: HfFolder) -> tuple[list[str], frozenset[str]]:
    """The texts that the folder's chat template holds, and the variables that it reads; none
    if it cannot be read.
    """
    try:
        _, source = template_source(folder.path, folder.settings)
        return templates.texts_of(source), templates.variables_of(source, date=ANY_DAY)
    except (OSError, ValueError):
        return [], frozenset()


def stop_ids(folder: HfFolder, ids: Mapping[str, int], special_tokens: Collection[str]) -> dict[int, str]:
    """Ids that end a response, and the source of each.

    generation_config.json decides alone. Without it a response ends with what ends a turn of the chat
    template, with EOS, and with eos_token_id of config.json. The first id is the one that ends a turn, which
    is what an instructed model emits, else EOS.

    ids: text and id of every token. special_tokens: those that a template may end a turn with. Raises
    ValueError, naming the file, for an id without a token, and for a mark behind a turn that is not a token.
    """
    known = set(ids.values())
    for token_id, name in folder.stops.items():
        if token_id not in known:
            raise ValueError(
                f"{folder.path / name}: eos_token_id {token_id} is the id of no token, so no response would "
                f"end with it; the vocabulary has {len(known)} tokens, the last with the id "
                f"{max(known, default=-1)}"
            )
    likely: dict[int, str] = {}
    end = turn_end(folder, special_tokens)
    mark = _MARK.match(behind_answer(folder))
    if end is not None:
        likely[ids[end]] = "chat template"
    elif mark is not None and mark.group() not in ids:
        raise ValueError(
            f"{folder.path}: the chat template ends a turn with {mark.group()!r}, which is not a token of "
            "the vocabulary, so no response would end with it; list it among the added tokens with the id "
            "that the model has for it, correct the template, or give the stop token ids"
        )
    eos = folder.token("eos_token")
    if eos is not None and eos.content in ids:
        likely.setdefault(ids[eos.content], "eos_token")
    if not folder.stops_are_final:
        return likely | {i: name for i, name in folder.stops.items() if i not in likely}
    ordered = [*(i for i in likely if i in folder.stops), *(i for i in folder.stops if i not in likely)]
    return {i: folder.stops[i] for i in ordered}


@dataclass(frozen=True, kw_only=True)
class BesideVocabulary:
    """The additions of a folder's files to a vocabulary other than a tokenizer.json."""

    added: tuple[AddedToken, ...] = ()
    """Tokens whose ids follow those of the vocabulary."""
    special_ids: frozenset[int] = frozenset()
    """Ids that a file makes special."""
    stop_sources: dict[int, str] = field(default_factory=dict)
    bos_id: int | None = None
    """The id of bos_token."""
    notes: tuple[str, ...] = ()


def beside_vocabulary(
    path: Path, folder: HfFolder, ids: Mapping[str, int], special_ids: Collection[int], *, size: int
) -> BesideVocabulary:
    """Reads the folder against a vocabulary of `size` ids in the file `path`.

    ids: text and id of the tokens that have a text. special_ids: those that the vocabulary itself makes
    special. Raises ValueError, naming the file, for a token with another id or text than the vocabulary has,
    for ids that leave a gap, and for a token that would take blanks out of a text.
    """
    texts = {token_id: text for text, token_id in ids.items()}
    added = tuple(token for token in folder.added if token.token_id >= size)
    for token in folder.added:
        where = f"{folder.path / token.source}: added token {token.content!r}"
        if texts.get(token.token_id, token.content) != token.content:
            raise ValueError(
                f"{where} has the id {token.token_id}, which is that of {texts[token.token_id]!r} in {path}"
            )
        if token in added and not token.special and (token.lstrip or token.rstrip):
            raise ValueError(
                f"{where} takes the blanks beside it away (lstrip, rstrip): its id would not spell the text"
            )
    known = {token.content: token.token_id for token in added} | dict(ids)
    check_ids(folder, known, vocabulary=str(path))
    if [token.token_id for token in added] != list(range(size, size + len(added))):
        raise ValueError(
            f"{folder.path / added[0].source}: the added tokens have the ids "
            f"{[t.token_id for t in added][:9]}, but behind the {size} ids of {path.name} transformers "
            f"counts on from {size}; list every id in between"
        )
    notes = check_named(folder, known)
    special = {token.token_id for token in folder.added if token.special}
    special |= {known[token.content] for token in folder.named if token.content in known}
    marks = [text for text, i in known.items() if i >= size or i in special or i in special_ids]
    bos = folder.token("bos_token")
    return BesideVocabulary(
        added=added,
        special_ids=frozenset(special),
        stop_sources=stop_ids(folder, known, marks),
        bos_id=None if bos is None else known[bos.content],
        notes=notes,
    )
