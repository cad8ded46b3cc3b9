"""A Hugging Face `tokenizer.json`, and what the files beside it say about stop tokens and BOS.

Two kinds of vocabulary spell every text, and are loaded:
    byte-level      every byte is written as one of 256 printable characters (GPT-2, Llama-3, Qwen)
    byte fallback   '▁' is a blank, '<0xNN>' the byte of a character that has no token (Llama-2, Gemma)
Some (SmolLM2) lack tokens for control characters and for bytes that begin no assigned character. The library leaves
such bytes out, so who aligns sees other bytes from there on.
The file's pipeline is kept, but for what would add or drop bytes of the content: a leading blank, truncation, padding,
dropout. A pipeline that rewrites text is refused, for its tokens would not spell the response. The one exception is the
normal form NFC: nearly all text is in it, and who aligns compares the bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_simct.alignment.hf_folder import generation_stop_ids, read_settings, special_token, turn_end
from megatron_simct.alignment.tokenizer import Tokenizer, build_table, encode_cut

# Its bytes must come back from every tokenizer that is loaded, but for characters that have no token.
_PROBE = "  two  blanks,\ta tab\r\n\nI'm café, Ünïcödé. Привет 你好, ｆｕｌｌ ﬁ नमस्ते 😀 1234567 [x]{y} \x00\x7f \n"

_DISPENSABLE = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)}) - frozenset(b"\t\n\r") - {0xF3}
"""Control characters, and bytes that UTF-8 has not or that begin only unassigned and private characters."""

_SPLITS = frozenset("ByteLevel Metaspace Split Digits Punctuation UnicodeScripts".split())


def load_hf_tokenizer(path: Path, stop_token_ids: tuple[int, ...], *, allow_lossy: bool = False) -> Tokenizer:
    """Loads a tokenizer.json; see `load_tokenizer`."""
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
    raw = Encoder(json.dumps(spec), special_tokens=True)

    byte_level, blank_mark = _keep_text(spec, lossy)
    pieces, special_ids, missing = _pieces(spec, lossy, byte_level=byte_level, blank_mark=blank_mark)
    added_ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    sources = dict.fromkeys(stop_token_ids, "given") or _stop_ids(
        path.parent, added_ids | _vocabulary(model), added_ids
    )
    stop_ids = tuple(sources)
    rewriting = [step for step in _steps(spec["normalizer"], "normalizers") if not _marks_blanks(step)]
    normalizer = json.dumps(rewriting, sort_keys=True) if rewriting else ""
    table = build_table(pieces, special_ids, stop_ids, normalizer=normalizer)
    for token in spec["added_tokens"]:
        token["special"] = bool(table.special[token["id"]])
    encode = _ordinary(Encoder(json.dumps(spec), special_tokens=False), added_ids, stop_ids, pieces)

    tokenizer = Tokenizer(
        name=str(path),
        table=table,
        encode_text=encode,
        bos_id=_bos_id(path.parent, raw, added_ids),
        encode_chat=raw,
        stop_sources=sources,
    )
    probe = "".join(character for character in _PROBE if missing.isdisjoint(character.encode()))
    found = tokenizer.decode(tokenizer.encode(probe.encode()))
    if found != probe.encode() and not losses:
        lossy(f"it rewrites text: {probe!r} comes back as {found.decode(errors='replace')!r}")
    return replace(tokenizer, lossy="; ".join(losses) or None)


class Encoder:
    """text -> ids, without BOS. Can be pickled: the library's own pickles forget how special tokens are read."""

    def __init__(self, spec: str, *, special_tokens: bool) -> None:
        """special_tokens: whether the spelling of a special token is that token, or ordinary text."""
        import tokenizers

        self._spec = spec
        self._special_tokens = special_tokens
        try:
            self.library = tokenizers.Tokenizer.from_str(spec)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        self.library.encode_special_tokens = not special_tokens

    def __call__(self, text: str) -> Sequence[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Encoder, special_tokens=self._special_tokens), (self._spec,)


def _keep_text(spec: dict[str, Any], lossy: Callable[[str], None]) -> tuple[bool, bool]:
    """Take the leading blank out of the pipeline; whether it is byte-level, and whether '▁' stands for a blank.

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
    """The bytes of every id, the ids that stand for no bytes, and the bytes that have no token."""
    model = spec["model"]
    vocabulary = _vocabulary(model)
    if byte_level:
        spell: Callable[[str], bytes | None] = partial(_byte_level_bytes, _byte_of_character())
    else:
        spell = partial(_fallback_bytes, blank_mark)
        if not model.get("byte_fallback"):
            lossy("it is neither byte-level nor has it byte_fallback, so not every text has tokens")
            prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
            spell = partial(_word_piece_bytes, blank_mark, prefix, suffix)
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in spec["added_tokens"])], default=-1)
    pieces: list[bytes | None] = [None] * size
    for piece, token_id in vocabulary.items():
        pieces[token_id] = spell(piece)
    unknown = model.get("unk_token")
    unknown_id = model.get("unk_id") if model["type"] == "Unigram" else vocabulary.get(unknown)
    if unknown_id is not None:
        pieces[unknown_id] = None
    for token in spec["added_tokens"]:
        # A run of '▁' that is also a piece of the vocabulary (Gemma) is what blanks become; others are literal text.
        is_piece = not byte_level and vocabulary.get(token["content"]) == token["id"]
        content = spell(token["content"]) if is_piece else token["content"].encode()
        pieces[token["id"]] = None if token["special"] else content
    missing = set(range(256)) - {piece[0] for piece in pieces if piece is not None and len(piece) == 1}
    needed = missing - _DISPENSABLE if byte_level else missing
    if needed:
        lossy(f"{len(needed)} single bytes have no token, {min(needed):#04x} first, so not every text has tokens")
    return [piece or b"" for piece in pieces], {i for i, piece in enumerate(pieces) if piece is None}, missing


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as it is, and the other 68 bytes as U+0100 and on, in order."""
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
    return (piece.replace("▁", " ") if blank_mark else piece).removeprefix(prefix).removesuffix(suffix).encode()


def _ordinary(
    encode: Encoder, added_ids: dict[str, int], stop_ids: tuple[int, ...], pieces: Sequence[bytes]
) -> Callable[[str], Sequence[int]]:
    """The encoder, with a cut in the spelling of each special token that a text would still be given.

    The library leaves added special tokens alone, but a model may find the same piece in its own vocabulary.
    """
    special = set(stop_ids) | {token_id for text, token_id in added_ids.items() if not pieces[token_id]}
    texts = dict.fromkeys(text for text, token_id in added_ids.items() if token_id in special)
    texts |= dict.fromkeys(pieces[i].decode(errors="ignore") for i in stop_ids if i < len(pieces))
    found = [text for text in texts if len(text) > 1 and special & set(encode(text))]
    if not found:
        return encode
    cuts = re.compile("|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in found))
    return partial(encode_cut, encode, cuts)


def _stop_ids(folder: Path, ids: dict[str, int], added_ids: dict[str, int]) -> dict[int, str]:
    """Ids that end a response and who says so: generation_config.json, else chat template and EOS.

    A model may stop at several. The first is the one that ends a turn of the chat template, which is what an instructed
    model emits, else the tokenizer's EOS.
    """
    likely: dict[int, str] = {}
    end = turn_end(folder, added_ids)
    if end is not None:
        likely[added_ids[end]] = "chat template"
    eos = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = eos or special_token(read_settings(folder, name).get("eos_token"))
    if eos in ids:
        likely.setdefault(ids[eos], "eos_token")
    stops = generation_stop_ids(folder)
    if not stops:
        return likely
    ordered = [*(i for i in likely if i in stops), *(i for i in stops if i not in likely)]
    return dict.fromkeys(ordered, "generation_config.json")


def _bos_id(folder: Path, raw: Encoder, added_ids: dict[str, int]) -> int | None:
    """What the tokenizer puts before a text: tokenizer_config.json's say, else that of the file's post-processor."""
    settings = read_settings(folder, "tokenizer_config.json")
    if settings.get("add_bos_token") is not None:
        return added_ids.get(special_token(settings.get("bos_token")) or "") if settings["add_bos_token"] else None
    content, whole = list(raw("a")), raw.library.encode("a").ids
    before = next(i for i in range(len(whole) + 1) if whole[i : i + len(content)] == content)
    if before > 1:
        raise ValueError(f"it puts {before} tokens {whole[:before]} before a text; only one is supported")
    return whole[0] if before else None
