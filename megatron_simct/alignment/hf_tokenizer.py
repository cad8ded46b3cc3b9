"""A Hugging Face `tokenizer.json`, with the added tokens, stop ids and BOS that the files beside it name.

Two kinds of vocabulary spell every text, and are loaded:
    byte-level      every byte is written as one of 256 printable characters (GPT-2, Llama-3, Qwen)
    byte fallback   '▁' is a blank, '<0xNN>' the byte of a character that has no token (Llama-2, Gemma)
Some (SmolLM2) lack tokens for control characters and for bytes that begin no assigned character. The library
leaves such bytes out, so who aligns sees other bytes from there on.
The file's pipeline is kept, but for what would add or drop bytes of the content: a leading blank, truncation,
padding, dropout. A pipeline that rewrites text is refused, for its tokens would not spell the response. The
one exception is the normal form NFC: nearly all text is in it, and who aligns compares the bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_simct.alignment.continuations import CutRules, Merges
from megatron_simct.alignment.folder_tokens import check_ids, check_named, stop_ids
from megatron_simct.alignment.hf_folder import UNNAMED, AddedToken, HfFolder
from megatron_simct.alignment.tokenizer import Tokenizer, build_table, encode_cut

# Every tokenizer must reproduce its bytes, except for characters without a token.
_PROBE = (
    "  two  blanks,\ta tab\r\n\nI'm café, Ünïcödé. Привет 你好, ｆｕｌｌ ﬁ नमस्ते 😀 1234567 [x]{y} \x00\x7f \n"
)

_DISPENSABLE = (
    frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)}) - frozenset(b"\t\n\r") - {0xF3}
)
"""Control characters, and bytes that UTF-8 has not or that begin only unassigned and private characters."""

_SPLITS = frozenset("ByteLevel Metaspace Split Digits Punctuation UnicodeScripts".split())


def load_hf_tokenizer(
    path: Path, folder: HfFolder, stop_token_ids: tuple[int, ...], *, allow_lossy: bool = False
) -> Tokenizer:
    """Loads a tokenizer.json with the files beside it; see `load_tokenizer`."""
    losses: list[str] = []

    def lossy(reason: str) -> None:
        if not allow_lossy:
            raise ValueError(reason)
        losses.append(reason)

    spec = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(spec, dict) and isinstance(spec.get("model"), dict)):
        raise ValueError("it holds no object with a model")
    model = spec["model"]
    if model.get("type") not in ("BPE", "Unigram"):
        lossy(f"its model {model.get('type')} has no tokens for every text; only BPE and Unigram can have")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        lossy("its pieces carry a prefix or suffix for their place in a word, so they do not spell text")
    spec |= {"truncation": None, "padding": None}
    if "dropout" in model:
        model["dropout"] = None
    sources = _merge_added_tokens(spec, folder)
    raw = Encoder(json.dumps(spec), special_tokens=True)

    byte_level, blank_mark = _keep_text(spec, lossy)
    pieces, special_ids, missing = _pieces(spec, lossy, byte_level=byte_level, blank_mark=blank_mark)
    _check_added_tokens(spec["added_tokens"], raw.library, sources)
    added_ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids = _vocabulary(model) | added_ids
    check_ids(folder, ids, vocabulary=str(path))
    notes = check_named(folder, ids)
    stop_sources = dict.fromkeys(stop_token_ids, "given") or stop_ids(folder, ids, added_ids)
    rewriting = [step for step in _steps(spec["normalizer"], "normalizers") if not _marks_blanks(step)]
    normalizer = json.dumps(rewriting, sort_keys=True) if rewriting else ""
    table = build_table(pieces, special_ids, tuple(stop_sources), normalizer=normalizer)
    for token in spec["added_tokens"]:
        token["special"] = bool(table.special[token["id"]])
    # What the model's own vocabulary makes an added token's id of; of a byte-level one, "Ġcat" is found in "
    # cat".
    spell = _speller(model, byte_level=byte_level, blank_mark=blank_mark)
    own = {token_id: spell(text) or b"" for text, token_id in added_ids.items() if text in _vocabulary(model)}
    own_texts = {token_id: data.decode(errors="ignore") for token_id, data in own.items()}
    ordinary = Encoder(json.dumps(spec), special_tokens=False)
    encode = _ordinary(ordinary, added_ids, table.stop_ids, pieces, own_texts)
    bos_id, bos_notes = _bos_id(folder, raw)

    tokenizer = Tokenizer(
        name=str(path),
        table=table,
        encode_text=encode,
        cut_rules=partial(_cut_rules, ordinary, byte_level, blank_mark) if model["type"] == "BPE" else None,
        strings=partial(_strings, ordinary),
        bos_id=bos_id,
        encode_chat=raw,
        stop_sources=stop_sources,
        notes=notes + bos_notes,
    )
    for token in spec["added_tokens"]:
        if not table.special[token["id"]] and missing.isdisjoint(token["content"].encode()):
            _check_spelling(tokenizer, token, own_texts.get(token["id"], ""), lossy, blank_mark=blank_mark)
    probe = "".join(character for character in _PROBE if missing.isdisjoint(character.encode()))
    found = tokenizer.decode(tokenizer.encode(probe.encode()))
    if found != probe.encode() and not losses:
        lossy(f"it rewrites text: {probe!r} comes back as {found.decode(errors='replace')!r}")
    return replace(tokenizer, lossy="; ".join(losses) or None)


def _merge_added_tokens(spec: dict[str, Any], folder: HfFolder) -> dict[str, str]:
    """Put the tokens of the folder's other files into the file's added tokens; the file
    that each one is from.

    added_tokens_decoder replaces the flags of a token that tokenizer.json lists, added_tokens.json does not.
    A token with a role is special, but for one that added_tokens_decoder leaves out. A named token that only
    the model's vocabulary has becomes an added one.
    """
    tokens: dict[str, dict[str, Any]] = {token["content"]: token for token in spec["added_tokens"]}
    for token in spec["added_tokens"]:
        if tokens[token["content"]]["id"] != token["id"]:
            raise ValueError(f"it lists the added token {token['content']!r} twice, with two ids")
    sources = dict.fromkeys(tokens, "tokenizer.json")
    for added in folder.added:
        listed = tokens.get(added.content)
        if listed is not None and (added.source == "added_tokens.json" or listed["id"] != added.token_id):
            continue  # check_ids refuses another id
        tokens[added.content] = _spec_of(added)
        sources.setdefault(added.content, added.source)
    vocabulary = _vocabulary(spec["model"]) if isinstance(spec["model"].get("vocab"), dict | list) else {}
    has_decoder = "added_tokens_decoder" in folder.settings
    set_again = {added.content for added in folder.added} if has_decoder else tokens.keys()
    for named in folder.named:
        if named.content in tokens:
            tokens[named.content]["special"] |= named.role != UNNAMED and named.content in set_again
        elif named.content in vocabulary:
            token_id = vocabulary[named.content]
            tokens[named.content] = _spec_of(
                AddedToken(
                    content=named.content,
                    token_id=token_id,
                    source=named.source,
                    special=True,
                    normalized=False,
                )
            )
            sources[named.content] = named.source
    spec["added_tokens"] = list(tokens.values())
    return sources


def _spec_of(token: AddedToken) -> dict[str, Any]:
    """The token as an entry of tokenizer.json."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token.token_id, "content": token.content} | {flag: getattr(token, flag) for flag in flags}


def _check_added_tokens(tokens: Sequence[dict[str, Any]], library: Any, sources: dict[str, str]) -> None:
    """Raises ValueError for an added token that the library gives another id, or reads in another way, than
    the file does.
    """
    read = library.get_added_tokens_decoder()
    for token in tokens:
        content, found = token["content"], library.token_to_id(token["content"])
        where = f"{sources[content]}: added token {content!r}"
        if found != token["id"]:
            raise ValueError(
                f"{where} has the id {token['id']}, but the tokenizers library gives it {found}, for it "
                "counts added tokens on from the vocabulary; list every id in between as an added token, in "
                "order"
            )
        for flag in ("lstrip", "rstrip", "normalized", "single_word", "special"):
            if getattr(read[found], flag) != token[flag]:
                raise ValueError(
                    f"{where} has {flag} = {token[flag]}, but the tokenizers library reads "
                    f"{getattr(read[found], flag)}"
                )


def _check_spelling(
    tokenizer: Tokenizer,
    token: dict[str, Any],
    own_text: str,
    lossy: Callable[[str], None],
    *,
    blank_mark: bool,
) -> None:
    """`lossy` is called for an added token of content whose id stands for other bytes than the text had.

    own_text: what the model's vocabulary spells with this id; empty if it has no such piece.
    """
    flagged = token["lstrip"] or token["rstrip"] or token["normalized"]
    if not flagged and own_text in ("", token["content"]):
        return  # the library finds it as it is written
    content = unicodedata.normalize("NFC", token["content"])
    content = content.replace("▁", " ") if blank_mark else content
    for text in (f"a {content} b", f"a{content}b", f"a{own_text}"):
        found = tokenizer.decode(tokenizer.encode(text.encode()))
        if found != text.encode():
            flags = ", ".join(flag for flag in ("lstrip", "rstrip", "normalized") if token[flag])
            lossy(
                f"its added token {token['content']!r} ({flags or 'a piece of the vocabulary'}) rewrites "
                f"text: {text!r} comes back as {found.decode(errors='replace')!r}"
            )
            return


def _cut_rules(encoder: Encoder, byte_level: bool, blank_mark: bool) -> CutRules:
    """Merges and pretokens of a byte-pair tokenizer's file."""
    spec = json.loads(encoder.spec)
    model = spec["model"]
    ids = model["vocab"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    rows = [(ids[a], ids[b], ids[a + b], rank) for rank, (a, b) in enumerate(pairs)]
    left, right, joined, rank = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    normalizer, splitter = encoder.library.normalizer, encoder.library.pre_tokenizer

    def pretokens(text: str) -> list[str]:
        text = normalizer.normalize_str(text) if normalizer is not None else text
        if splitter is None:
            return [text]
        return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]

    added = frozenset(token["id"] for token in spec["added_tokens"] if not token["special"])
    return CutRules(Merges(left, right, joined, rank), pretokens, added)


def _strings(encoder: Encoder) -> dict[str, int]:
    spec = json.loads(encoder.spec)
    return _vocabulary(spec["model"]) | {token["content"]: token["id"] for token in spec["added_tokens"]}


class Encoder:
    """text -> ids, without BOS. Can be pickled: the library's own pickles forget how
    special tokens are read.
    """

    def __init__(self, spec: str, *, special_tokens: bool) -> None:
        """special_tokens: whether the spelling of a special token is that token, or ordinary text."""
        import tokenizers

        self.spec = spec
        self._special_tokens = special_tokens
        try:
            self.library = tokenizers.Tokenizer.from_str(spec)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        self.library.encode_special_tokens = not special_tokens

    def __call__(self, text: str) -> Sequence[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Encoder, special_tokens=self._special_tokens), (self.spec,)


def _keep_text(spec: dict[str, Any], lossy: Callable[[str], None]) -> tuple[bool, bool]:
    """Take the leading blank out of the pipeline; whether it is byte-level, and whether '▁'
    stands for a blank.

    `lossy` is called for a step that would rewrite or drop text.
    """
    splits = list(_steps(spec.get("pre_tokenizer"), "pretokenizers"))
    byte_level = any(step["type"] == "ByteLevel" for step in splits)
    blank_mark = False
    kept = []
    for step in _steps(spec.get("normalizer"), "normalizers"):
        blanks = _marks_blanks(step)
        leading = step["type"] == "Prepend" and step["prepend"] == "▁"
        if not (step["type"] == "NFC" or ((blanks or leading) and not byte_level)):
            lossy(f"its normalizer {step['type']} rewrites text, so its tokens would not spell the response")
        blank_mark |= blanks
        kept += [] if leading else [step]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in splits:
        # Inverted, what matches the pattern is kept. Patterns of this kind match every text (o200k's).
        drops = step.get("behavior") == "Removed" and not step.get("invert")
        if step["type"] not in _SPLITS or drops or step.get("replacement", "▁") != "▁":
            lossy(f"its pre-tokenizer {step['type']} drops or rewrites text")
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)  # the older spelling
            step["prepend_scheme"] = "never"
            blank_mark = True
    return byte_level, blank_mark


def _marks_blanks(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁")


def _steps(component: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as its steps; they are the parts of `component` itself, not copies."""
    if component is not None and component["type"] == "Sequence":
        for part in component[key]:
            yield from _steps(part, key)
    elif component is not None:
        yield component


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Pieces of the model, as they are written in the file, and their ids."""
    if isinstance(model["vocab"], dict):
        return model["vocab"]
    return {piece: token_id for token_id, (piece, _) in enumerate(model["vocab"])}


def _pieces(
    spec: dict[str, Any], lossy: Callable[[str], None], *, byte_level: bool, blank_mark: bool
) -> tuple[list[bytes], set[int], set[int]]:
    """The bytes of every id, the ids without bytes, and the bytes without a token."""
    model = spec["model"]
    vocabulary = _vocabulary(model)
    if not byte_level and not model.get("byte_fallback"):
        lossy("it is neither byte-level nor has it byte_fallback, so not every text has tokens")
    spell = _speller(model, byte_level=byte_level, blank_mark=blank_mark)
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in spec["added_tokens"])], default=-1)
    pieces: list[bytes | None] = [None] * size
    for piece, token_id in vocabulary.items():
        pieces[token_id] = spell(piece)
    unknown = model.get("unk_token")
    unknown_id = model.get("unk_id") if model["type"] == "Unigram" else vocabulary.get(unknown)
    if unknown_id is not None:
        pieces[unknown_id] = None
    for token in spec["added_tokens"]:
        # A run of '▁' that is also a piece of the vocabulary (Gemma) is what blanks become; others are
        # literal text.
        is_piece = not byte_level and vocabulary.get(token["content"]) == token["id"]
        content = spell(token["content"]) if is_piece else token["content"].encode()
        pieces[token["id"]] = None if token["special"] else content
    missing = set(range(256)) - {piece[0] for piece in pieces if piece is not None and len(piece) == 1}
    needed = missing - _DISPENSABLE if byte_level else missing
    if needed:
        lossy(
            f"{len(needed)} single bytes have no token, {min(needed):#04x} first, so not every text has "
            "tokens"
        )
    return [piece or b"" for piece in pieces], {i for i, piece in enumerate(pieces) if piece is None}, missing


def _speller(model: dict[str, Any], *, byte_level: bool, blank_mark: bool) -> Callable[[str], bytes | None]:
    """The function from a piece of the model's vocabulary to its bytes; None for a piece of no text."""
    if byte_level:
        return partial(_byte_level_bytes, _byte_of_character())
    if model.get("byte_fallback"):
        return partial(_fallback_bytes, blank_mark)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return partial(_word_piece_bytes, blank_mark, prefix, suffix)


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as it is, and the other 68 bytes as
    U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(byte_of: dict[str, int], piece: str) -> bytes | None:
    """None for a piece with other characters: no text has it."""
    return bytes(byte_of[character] for character in piece) if byte_of.keys() >= set(piece) else None


def _fallback_bytes(blank_mark: bool, piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return (piece.replace("▁", " ") if blank_mark else piece).encode()


def _word_piece_bytes(blank_mark: bool, prefix: str, suffix: str, piece: str) -> bytes:
    return (
        (piece.replace("▁", " ") if blank_mark else piece).removeprefix(prefix).removesuffix(suffix).encode()
    )


def _ordinary(
    encode: Encoder,
    added_ids: dict[str, int],
    stop_ids: tuple[int, ...],
    pieces: Sequence[bytes],
    own_texts: dict[int, str],
) -> Callable[[str], Sequence[int]]:
    """The encoder, with a cut in the spelling of each special token that a text would still be given.

    The library leaves added special tokens alone, but a model may find the same piece in its own vocabulary.
    own_texts: what that vocabulary spells with the ids of added tokens.
    """
    special = set(stop_ids) | {token_id for text, token_id in added_ids.items() if not pieces[token_id]}
    texts = dict.fromkeys(text for text, token_id in added_ids.items() if token_id in special)
    texts |= dict.fromkeys(pieces[i].decode(errors="ignore") for i in stop_ids if i < len(pieces))
    texts |= dict.fromkeys(text for token_id, text in own_texts.items() if token_id in special)
    found = [text for text in texts if len(text) > 1 and special & set(encode(text))]
    if not found:
        return encode
    cuts = re.compile("|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in found))
    return partial(encode_cut, encode, cuts)


def _bos_id(folder: HfFolder, raw: Encoder) -> tuple[int | None, tuple[str, ...]]:
    """The id that the file's post-processor puts before a text, and a note if tokenizer_config.json differs.

    For a tokenizer.json transformers ignores add_bos_token.
    """
    content, encoded = list(raw("a")), raw.library.encode("a").ids
    before = next(i for i in range(len(encoded) + 1) if encoded[i : i + len(content)] == content)
    if before > 1:
        raise ValueError(f"it puts {before} tokens {encoded[:before]} before a text; only one is supported")
    bos_id = encoded[0] if before else None
    if folder.adds_bos is None or folder.adds_bos == (bos_id is not None):
        return bos_id, ()
    instead = "no BOS" if bos_id is None else f"BOS {bos_id}"
    return bos_id, (
        f"tokenizer_config.json: add_bos_token = {str(folder.adds_bos).lower()} is not read; a prompt begins "
        f"with {instead}, as the post_processor of tokenizer.json has it",
    )
