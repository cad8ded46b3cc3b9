"""Inputs that are refused, with parts of the reason: a table, so that none is silently accepted later.

Each case makes an input and gives it to the function that reads it. The message is one line,
which names the file.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_simct.alignment import load_tokenizer
from tests.huggingface import save_byte_fallback, save_byte_level


@dataclass(frozen=True)
class Case:
    """One input that is refused."""

    what: str
    make: Callable[[Path], object]
    """Writes the input into an empty folder and reads it."""
    message: Sequence[str]
    """Parts of the message."""


def token(content: str, **fields: Any) -> dict[str, Any]:
    """An added token. The flags are false unless `fields` sets them."""
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content} | flags | fields


def folder_of(
    path: Path, *, more: Sequence[dict[str, Any]] = (), stop: Sequence[int] = (), **files: Any
) -> object:
    """A byte-level tokenizer, `more` added tokens in tokenizer.json, and files beside
    it, each by its name.
    """
    spec = save_byte_level(path)
    spec["added_tokens"] += more
    (path / "tokenizer.json").write_text(json.dumps(spec))
    for name, content in files.items():
        file = path / f"{name}.json"
        settings = json.loads(file.read_text()) if file.exists() and isinstance(content, dict) else None
        file.write_text(json.dumps(content if settings is None else settings | content))
    return load_tokenizer(str(path), stop)


def spec_of(path: Path, **changes: Any) -> object:
    """A byte-level tokenizer.json with other parts."""
    save_byte_level(path, **changes)
    return load_tokenizer(str(path))


def file_of(path: Path, name: str, text: str) -> object:
    """A byte-level tokenizer with another text in one of its files."""
    save_byte_level(path)
    (path / name).write_text(text)
    return load_tokenizer(str(path))


def ending_with(mark: str) -> str:
    """A chat template that ends a turn with the mark."""
    return "{% for m in messages %}<|im_start|>{{ m.content }}" + mark + "\n{% endfor %}"


def sentencepiece_folder(tiny: Path, path: Path, **files: Any) -> object:
    shutil.copy(tiny / "student.model", path / "tokenizer.model")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(str(path))


def tekken_folder(path: Path, *, special: Sequence[str] = ("<unk>", "<s>", "</s>"), **files: Any) -> object:
    """Mistral's format with single bytes, ten special ids and files beside it."""
    write_tekken(path, special=special)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(str(path))


def write_tekken(path: Path, *, special: Sequence[str] = ("<unk>", "<s>", "</s>")) -> None:
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    content = {
        "config": {
            "pattern": r" ?[a-z]+|\s+|.",
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(pieces) + 10,
            "default_num_special_tokens": 10,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)
        ],
    }
    (path / "tekken.json").write_text(json.dumps(content))


def ranks_folder(path: Path) -> object:
    """A tokenizer.model with tiktoken ranks."""
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (path / "tokenizer.model").write_bytes(ranks)
    return load_tokenizer(str(path))


def empty_folder(path: Path, *names: str) -> object:
    for name in names:
        (path / name).touch()
    return load_tokenizer(str(path))


NFD = "cafe\u0301"
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}

FOLDERS = [
    Case(
        "an added id behind a gap",
        partial(folder_of, more=[token("<|done|>", id=330, special=True)]),
        ["tokenizer.json: added token '<|done|>' has the id 330", "gives it 320", "list every id in between"],
    ),
    Case(
        "added ids in another order than the list",
        partial(folder_of, more=[token("<b>", id=321), token("<a>", id=320)]),
        ["added token '<b>' has the id 321", "gives it 320"],
    ),
    Case(
        "an id in added_tokens_decoder behind a gap",
        partial(folder_of, tokenizer_config={"added_tokens_decoder": {"325": token("<a>")}}),
        ["tokenizer_config.json: added token '<a>' has the id 325", "gives it 320"],
    ),
    Case(
        "an id in added_tokens.json behind a gap",
        partial(folder_of, added_tokens={"<a>": 325}),
        ["added_tokens.json: added token '<a>' has the id 325", "gives it 320"],
    ),
    Case(
        "one id for two added tokens",
        partial(folder_of, more=[token("<a>", id=318)]),
        ["added token '<a>' has the id 318", "gives it 320"],
    ),
    Case(
        "two ids for one added token",
        partial(folder_of, more=[token("<a>", id=320), token("<a>", id=321)]),
        ["lists the added token '<a>' twice, with two ids"],
    ),
    Case(
        "two files with two ids for a token",
        partial(folder_of, added_tokens={"<tool>": 320}),
        ["added_tokens.json: added token '<tool>' has the id 320", "tokenizer.json gives it 319"],
    ),
    Case(
        "a file that is not read with another id",
        partial(
            folder_of,
            tokenizer_config={"added_tokens_decoder": {"319": token("<tool>")}},
            added_tokens={"<|im_end|>": 316},
        ),
        ["added_tokens.json: added token '<|im_end|>' has the id 316", "tokenizer.json gives it 318"],
    ),
    Case(
        "EOS that is no token",
        partial(folder_of, tokenizer_config={"eos_token": "<|eot|>"}),
        ["tokenizer_config.json: '<|eot|>' (eos_token) is not a token of the vocabulary"],
    ),
    Case(
        "BOS that is no token",
        partial(folder_of, special_tokens_map={"bos_token": {"content": "<s>"}}),
        ["special_tokens_map.json: '<s>' (bos_token) is not a token of the vocabulary"],
    ),
    Case(
        "a special token that the template writes and that has no id",
        partial(
            folder_of,
            tokenizer_config={
                "chat_template": ending_with("<turn>"),
                "additional_special_tokens": ["<turn>"],
            },
        ),
        [
            "tokenizer_config.json: '<turn>' (extra_special_tokens) is not a token",
            "the chat template writes it",
        ],
    ),
    Case(
        "a role that the template reads and that has no id",
        partial(folder_of, tokenizer_config={"chat_template": "{{ sep_token }}", "sep_token": "<sep>"}),
        ["tokenizer_config.json: '<sep>' (sep_token) is not a token of the vocabulary"],
    ),
    Case(
        "a turn that ends with a mark of no file",
        partial(folder_of, tokenizer_config={"chat_template": ending_with("<|turn_end|>")}),
        [
            "the chat template ends a turn with '<|turn_end|>', which is not a token",
            "or give the stop token ids",
        ],
    ),
    Case(
        "a token of added_tokens.json that is not read and that the template writes",
        partial(
            folder_of,
            tokenizer_config={"chat_template": ending_with("<turn>"), "added_tokens_decoder": {}},
            added_tokens={"<turn>": 320},
        ),
        [
            "added_tokens.json: '<turn>' (id 320) is not a token of the vocabulary, though the chat template "
            "writes it"
        ],
    ),
    Case(
        "a stop id of generation_config.json that no token has",
        partial(folder_of, generation_config={"eos_token_id": [318, 320]}),
        [
            "generation_config.json: eos_token_id 320 is the id of no token",
            "320 tokens, the last with the id 319",
        ],
    ),
    Case(
        "a stop id of config.json that no token has",
        partial(folder_of, generation_config={"eos_token_id": None}, config={"eos_token_id": 999}),
        ["config.json: eos_token_id 999 is the id of no token"],
    ),
    Case(
        "a given stop id outside the vocabulary",
        partial(folder_of, stop=[320]),
        ["special or stop ids [320] lie outside the vocabulary of 320 ids"],
    ),
    Case(
        "no stop token",
        partial(
            folder_of,
            tokenizer_config={"eos_token": None, "chat_template": None},
            generation_config={"eos_token_id": []},
        ),
        ["it names no stop token; give stop_token_ids"],
    ),
    *[
        Case(
            f"an added token of content with {flag}",
            partial(folder_of, more=[token("<x>", id=320, **{flag: True})]),
            [f"added token '<x>' ({flag}) rewrites text: 'a <x> b' comes back as"],
        )
        for flag in ("lstrip", "rstrip")
    ],
    Case(
        "an added token that the normal form changes",
        partial(folder_of, more=[token(NFD, id=320, normalized=True)]),
        ["(normalized) rewrites text: 'a café b' comes back as"],
    ),
    Case(
        "an added token that added_tokens_decoder makes strip blanks",
        partial(folder_of, tokenizer_config={"added_tokens_decoder": {"319": token("<tool>", rstrip=True)}}),
        ["added token '<tool>' (rstrip) rewrites text"],
    ),
    Case(
        "an added token that is a piece of the vocabulary with other bytes",
        partial(folder_of, more=[token("Ġcat", id=295)]),
        ["added token 'Ġcat' (a piece of the vocabulary) rewrites text: 'a cat' comes back as 'aĠcat'"],
    ),
    Case(
        "special tokens of a chat as ordinary text",
        partial(folder_of, tokenizer_config={"split_special_tokens": True}),
        ["tokenizer_config.json: split_special_tokens = true", "is not supported; delete it"],
    ),
    Case(
        "an id that is no number",
        partial(folder_of, added_tokens={"<a>": "320"}),
        ["added_tokens.json: <a> = '320'; expected a whole number, at least 0"],
    ),
    Case(
        "a decoder without contents",
        partial(folder_of, tokenizer_config={"added_tokens_decoder": {"320": "<a>"}}),
        ["tokenizer_config.json: added_tokens_decoder", "expected an object of ids"],
    ),
    Case(
        "a list of special tokens with something else in it",
        partial(folder_of, special_tokens_map={"additional_special_tokens": [5]}),
        ["special_tokens_map.json: additional_special_tokens = [5]; expected a list"],
    ),
    Case(
        "a file that is not JSON", partial(file_of, name="special_tokens_map.json", text="{"), ["is not JSON"]
    ),
    Case(
        "a file without an object",
        partial(file_of, name="added_tokens.json", text="[]"),
        ["holds no JSON object"],
    ),
    Case(
        "a folder without a tokenizer",
        empty_folder,
        ["holds no tokenizer.json, tekken.json or tokenizer.model"],
    ),
    Case(
        "a folder with the parts of an older tokenizer",
        lambda path: empty_folder(path, "vocab.json", "merges.txt"),
        [
            "holds no tokenizer.json",
            "of merges.txt, vocab.json give the file itself, or a tokenizer.json made from it",
        ],
    ),
    Case(
        "tiktoken ranks called tokenizer.model",
        ranks_folder,
        ["it holds tiktoken ranks", "write tokenizer.model.json", "or give the model's tokenizer.json"],
    ),
    Case(
        "an EOS that tekken.json lacks",
        partial(tekken_folder, tokenizer_config={"eos_token": "<|im_end|>"}),
        ["tokenizer_config.json: '<|im_end|>' (eos_token) is not a token of the vocabulary"],
    ),
    Case(
        "an added token that tekken.json lacks",
        partial(tekken_folder, added_tokens={"<|im_end|>": 269}),
        [
            "added_tokens.json: added token '<|im_end|>' (id 269) is not among the special tokens of "
            "tekken.json"
        ],
    ),
    Case(
        "another text for an id of tekken.json",
        partial(
            tekken_folder, tokenizer_config={"added_tokens_decoder": {"1": token("<bos>", special=True)}}
        ),
        ["tokenizer_config.json: added token '<bos>' has the id 1, which is that of '<s>' in"],
    ),
    Case(
        "more special tokens in tekken.json than ids for them",
        partial(tekken_folder, special=[f"<{i}>" for i in range(11)]),
        ["special token '<10>' has the id 10 of 10 special ids"],
    ),
]
"""A Hugging Face folder: added tokens, BOS, stop ids, and its tokenizer."""

SENTENCEPIECE = [
    Case(
        "an id behind a gap",
        partial(sentencepiece_folder, added_tokens={"<a>": 365}),
        ["added_tokens.json: the added tokens have the ids [365]", "list every id in between"],
    ),
    Case(
        "an EOS without an id",
        partial(sentencepiece_folder, tokenizer_config={"eos_token": "<|im_end|>"}),
        ["tokenizer_config.json: '<|im_end|>' (eos_token) is not a token of the vocabulary"],
    ),
    Case(
        "the id of a piece",
        partial(sentencepiece_folder, added_tokens={"<a>": 2}),
        ["added_tokens.json: added token '<a>' has the id 2, which is that of '</s>' in"],
    ),
    Case(
        "a token that takes away blanks",
        partial(
            sentencepiece_folder,
            tokenizer_config={"added_tokens_decoder": {"360": token("<a>", lstrip=True)}},
        ),
        ["tokenizer_config.json: added token '<a>' takes the blanks beside it away"],
    ),
    Case(
        "a stop id that no token has",
        partial(sentencepiece_folder, generation_config={"eos_token_id": 360}),
        ["generation_config.json: eos_token_id 360 is the id of no token"],
    ),
]
"""A folder with tokenizer.model; `make` takes the folder of the tiny models first."""

TOKENIZERS = [
    Case(
        "lower case",
        partial(spec_of, normalizer={"type": "Lowercase"}),
        ["normalizer Lowercase rewrites text"],
    ),
    Case(
        "compatibility characters",
        partial(spec_of, normalizer={"type": "NFKC"}),
        ["normalizer NFKC rewrites text"],
    ),
    Case(
        "a normalizer that replaces a letter",
        partial(spec_of, normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        ["normalizer Replace rewrites text"],
    ),
    Case(
        "blanks that are dropped",
        partial(spec_of, pre_tokenizer={"type": "Whitespace"}),
        ["Whitespace drops"],
    ),
    Case(
        "no kind of bytes",
        partial(spec_of, pre_tokenizer=None),
        ["neither byte-level nor has it byte_fallback"],
    ),
    Case(
        "single bytes without a token",
        partial(spec_of, model={"type": "BPE", "vocab": {"a": 0}, "merges": []}),
        ["single bytes have no token, 0x09 first"],
    ),
    Case("no model", partial(spec_of, model=None), ["no object with a model"]),
    Case(
        "two tokens before a text",
        partial(
            spec_of,
            post_processor={
                "type": "TemplateProcessing",
                "single": [*[{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}] * 2, SEQUENCE],
                "pair": [SEQUENCE, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {
                    "<|im_start|>": {"id": "<|im_start|>", "ids": [317], "tokens": ["<|im_start|>"]}
                },
            },
        ),
        ["it puts 2 tokens [317, 317] before a text; only one is supported"],
    ),
]
"""A tokenizer.json whose tokens would not spell the response."""


def check(case: Case, make: Callable[[Path], object], folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        make(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    for part in case.message:
        assert part in message


@pytest.mark.parametrize("case", [*FOLDERS, *TOKENIZERS], ids=lambda case: case.what)
def test_refused(tmp_path: Path, case: Case) -> None:
    check(case, case.make, tmp_path)


@pytest.mark.parametrize("case", SENTENCEPIECE, ids=lambda case: case.what)
def test_refused_beside_a_sentencepiece_model(tiny: Path, tmp_path: Path, case: Case) -> None:
    check(case, partial(case.make, tiny), tmp_path)


def test_what_the_cases_are_made_of_is_accepted(tiny: Path, tmp_path: Path) -> None:
    """Therefore each case is refused for what it adds."""
    made: dict[str, Callable[[Path], object]] = {
        "folder": folder_of,
        "spec": spec_of,
        "tekken": tekken_folder,
        "sentencepiece": partial(sentencepiece_folder, tiny),
    }
    for name, make in made.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    save_byte_fallback(tmp_path / "fallback")
    load_tokenizer(str(tmp_path / "fallback"))
