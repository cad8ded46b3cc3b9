"""The files beside a tokenizer in a Hugging Face folder: what transformers reads in them, and
what it does not read.
"""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_simct.alignment import load_tokenizer, report_notes
from megatron_simct.alignment.hf_folder import read_folder
from megatron_simct.data.rendering import ChatTemplate
from tests.huggingface import CHAT_TEMPLATE, save_byte_fallback, save_byte_level
from tests.unit.test_refusals import write_tekken
from tools.benchmark import real_inputs

TOOL, NEXT = 319, 320
"""<tool> is the last id of `save_byte_level`; NEXT is the first unused one."""

TEXT = "the cat<|im_start|> a  <tool> b<tool>c <new>x <|turn|>\n<|im_end|> Ġcat <|im_end|>12<|endoftext|>"


def added(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    defaults = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special} | defaults | flags


def write(folder: Path, **files: Any) -> Path:
    """Writes NAME.json of a folder for each argument. tokenizer_config.json keeps its other fields."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / f"{name}.json"
        if name == "tokenizer_config" and path.exists():
            content = json.loads(path.read_text()) | content
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(content))
    return folder


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


# Against transformers.

LISTED = {"316": added("<|endoftext|>"), "317": added("<|im_start|>"), "318": added("<|im_end|>")}
DECODERS: dict[str, Mapping[str, Any]] = {
    "no decoder": {},
    "empty decoder": {"added_tokens_decoder": {}},
    "a token more": {
        "added_tokens_decoder": LISTED | {"320": added("<|turn|>"), "321": added("<new>", special=False)}
    },
    "other flags": {
        "added_tokens_decoder": {
            "317": added("<|im_start|>", rstrip=True),
            "318": added("<|im_end|>", lstrip=True, rstrip=True),
            "319": added("<tool>", special=False, single_word=True, normalized=True),
        }
    },
    "other kind": {
        "added_tokens_decoder": {"319": added("<tool>"), "318": added("<|im_end|>", special=False)}
    },
}
MAPS: dict[str, Any] = {
    "no map": None,
    "another EOS": {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>", "lstrip": False}},
    "no EOS": {"eos_token": None},
    "lists": {"additional_special_tokens": ["<tool>", "Ġcat"], "extra_special_tokens": ["<|im_start|>"]},
}
ADDED: dict[str, Any] = {
    "no ids": None,
    "two ids": {"<|turn|>": 320, "<new>": 321},
    "a listed one": {"<|turn|>": 320, "<tool>": 319},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all roles": {
        "bos_token": "<|endoftext|>",
        "unk_token": "Ġcat",
        "cls_token": {"__type": "AddedToken", "content": "<tool>"},
    },
    "EOS of the vocabulary": {"eos_token": "Ġcat", "add_bos_token": True},
    "own roles": {"tool_token": "<tool>", "extra_special_tokens": {"start_token": "<|im_start|>"}},
    "older list": {"additional_special_tokens": ["Ġcat", {"__type": "AddedToken", "content": "<tool>"}]},
}


@pytest.mark.parametrize("save", [save_byte_level, save_byte_fallback])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, decoder, save) -> None:
    if save is save_byte_fallback and decoder != "no decoder":
        pytest.skip("the ids of these are those of the byte-level tokenizer")
    differences, seen = [], set()
    for number, (token_map, ids, settings) in enumerate(product(MAPS, ADDED, SETTINGS)):
        if save is save_byte_fallback and (ids != "no ids" or token_map != "no map"):
            continue
        folder = tmp_path / str(number)
        save(folder)
        if save is save_byte_level:
            files = {"special_tokens_map": MAPS[token_map], "added_tokens": ADDED[ids]}
            write(folder, tokenizer_config=SETTINGS[settings] | DECODERS[decoder], **files)
        difference = differs(folder)
        if difference:
            differences.append((token_map, ids, settings, difference))
        seen.add(tuple(sorted(read_folder(folder).variables.items())))
    assert differences == []
    assert len(seen) > 3 or save is save_byte_fallback, "the folders differ in what they name"


def differs(folder: Path) -> str:
    """Differences from transformers; empty if there are none."""
    own, expected = load_tokenizer(str(folder), [0]), reference(folder)
    variables = dict(expected.special_tokens_map)
    if read_folder(folder).variables != variables:
        return f"variables {read_folder(folder).variables}, in transformers {variables}"
    for role, text in variables.items():
        if list(own.encode_chat(text)) != [expected.convert_tokens_to_ids(text)]:
            return f"{role} {text} is {own.encode_chat(text)}"
    wanted = expected(TEXT, add_special_tokens=False).input_ids
    if list(own.encode_chat(TEXT)) != wanted:
        return f"text is {own.encode_chat(TEXT)}, in transformers {wanted}"
    bos = [] if own.bos_id is None else [own.bos_id]
    if expected(TEXT).input_ids != bos + wanted:
        return f"BOS {bos}"
    size = own.table.num_ids
    special = {i for i, token in expected.added_tokens_decoder.items() if token.special} | {0}
    found = set(np.flatnonzero(own.table.special).tolist()) | {0}
    if size != len(expected) or found != special:
        return f"special ids {found} of {size}, in transformers {special} of {len(expected)}"
    if own.decode(own.encode(TEXT.encode())) != TEXT.encode():
        return "a response is spelled in other bytes"
    return ""


NAMES = ["gemma2", "llama3-hf", "qwen2.5", "gpt2", "deepseek"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_tokenizer_is_read_as_transformers_reads_it(name) -> None:
    try:
        folder = real_inputs.tokenizer_path(name).parent
    except real_inputs.Unavailable as reason:
        pytest.skip(str(reason))
    own, expected = load_tokenizer(str(folder)), reference(folder)
    variables = read_folder(folder).variables
    assert {role: variables.get(role) for role in ("bos_token", "eos_token")} == {
        "bos_token": expected.bos_token,
        "eos_token": expected.eos_token,
    }
    assert expected.eos_token_id in own.table.stop_ids
    assert expected("a").input_ids == [*([] if own.bos_id is None else [own.bos_id]), *own.encode_chat("a")]
    tokens = expected.added_tokens_decoder
    text = " ".join(f"a{token.content}b" for token in list(tokens.values())[::7])
    assert list(own.encode_chat(text)) == expected(text, add_special_tokens=False).input_ids
    # A class of transformers may name a padding token and a mask of its own.
    defaults = {expected.pad_token, expected.mask_token}
    for token_id, token in tokens.items():
        special = token.special and token.content not in defaults - set(variables.values())
        assert own.table.special[token_id] == (special or token_id in own.table.stop_ids), token.content
        assert list(own.encode_chat(token.content)) == [token_id]


# tokenizer.model, with the files beside it.


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory) -> Path:
    """A model of 300 ids that puts no space before a text, so that transformers and this
    package write the same.
    """
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "hello world of cats"] * 10),
            model_writer=file,
            model_type="bpe",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            user_defined_symbols=["<turn>"],
            vocab_size=300,
            minloglevel=2,
        )
    return path


SENTENCEPIECE_FILES: dict[str, dict[str, Any]] = {
    "an EOS with an id": {
        "added_tokens": {"<|end|>": 300, "<x>": 301},
        "tokenizer_config": {"eos_token": "<|end|>"},
    },
    "no names": {"added_tokens": {"<x>": 301, "<|end|>": 300}},
    "a decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "2": added("</s>"),
                "300": added("<|end|>"),
                "301": added("<x>", special=False, single_word=True),
            },
            "eos_token": "<|end|>",
            "bos_token": "<s>",
            "add_bos_token": True,
        }
    },
    "a map": {
        "added_tokens": {"<|end|>": 300, "<x>": 301, "<x><x>": 302},
        "special_tokens_map": {"eos_token": {"content": "<|end|>"}},
        "tokenizer_config": {"eos_token": "</s>", "add_bos_token": False},
    },
}


@pytest.mark.parametrize("files", SENTENCEPIECE_FILES)
def test_a_sentencepiece_folder_is_read_as_transformers_reads_it(sentencepiece_file, tmp_path, files) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    folder = write(tmp_path, **SENTENCEPIECE_FILES[files])
    own, expected = load_tokenizer(str(folder)), reference(folder)
    copy = pickle.loads(pickle.dumps(own))
    text = "the cat<x> sat a<x> <x><x>b  mat <turn> 12\n"
    wanted = expected(text, add_special_tokens=False).input_ids
    assert own.encode(text.encode()).tolist() == copy.encode(text.encode()).tolist() == wanted
    assert own.decode(own.encode(text.encode())) == text.encode()
    assert own.table.stop_ids == (expected.eos_token_id,)
    assert own.table.num_ids == len(expected)
    special = {i for i, token in expected.added_tokens_decoder.items() if token.special}
    # A piece of text for transformers may be a control token for SentencePiece.
    assert special <= set(np.flatnonzero(own.table.special).tolist()) <= special | {0, 1, 2}
    settings = SENTENCEPIECE_FILES[files].get("tokenizer_config", {})
    if "add_bos_token" in settings:
        bos = [] if own.bos_id is None else [own.bos_id]
        assert expected(text).input_ids == bos + wanted and bos == [1] * settings["add_bos_token"]
    else:
        # transformers 5 adds no BOS here, older versions add one: the model's own is kept, and reported.
        assert own.bos_id == 1
        assert any("has no add_bos_token" in note for note in own.notes) == bool(settings)
    # An added special token is ordinary text in a response.
    response = b"the <|end|> cat"
    assert own.decode(own.encode(response)) == response or files == "no names"
    assert own.table.stop_ids[0] not in own.encode(response)


def test_a_user_defined_piece_that_a_file_makes_special_is_never_content(
    sentencepiece_file, tmp_path
) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    plain, data = load_tokenizer(str(tmp_path)), b"the <turn> cat"
    turn = plain.table.pieces().index(b"<turn>")
    assert turn in plain.encode(data)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {str(turn): added("<turn>")}})
    special = load_tokenizer(str(tmp_path))
    assert turn not in special.encode(data) and special.decode(special.encode(data)) == data


# tekken.json, and tiktoken ranks called tokenizer.model.


def test_a_folder_with_tekken_json(tmp_path) -> None:
    write_tekken(tmp_path, special=("<unk>", "<s>", "</s>", "[INST]"))
    plain = load_tokenizer(str(tmp_path))
    assert (plain.bos_id, plain.table.stop_ids, plain.table.num_ids) == (1, (2,), 269)
    # Ids are ranks after the ten special ids.
    assert plain.encode(b" the a").tolist() == [10 + 258, 10 + ord(" "), 10 + ord("a")]
    assert np.flatnonzero(plain.table.special).tolist() == list(range(10))
    write(tmp_path, generation_config={"eos_token_id": [3, 2]}, tokenizer_config={"eos_token": "</s>"})
    assert load_tokenizer(str(tmp_path)).table.stop_ids == (2, 3)
    assert load_tokenizer(str(tmp_path), [5]).table.stop_ids == (5,)


def test_special_ids_of_tekken_json_are_those_of_its_list(tmp_path) -> None:
    write_tekken(tmp_path, special=("</s>", "<unk>", "<s>"))
    assert (load_tokenizer(str(tmp_path)).bos_id, load_tokenizer(str(tmp_path)).table.stop_ids) == (2, (0,))


def test_tokenizer_json_goes_before_the_other_files(tmp_path, sentencepiece_file) -> None:
    write_tekken(tmp_path)
    shutil.copy(sentencepiece_file, tmp_path)
    assert load_tokenizer(str(tmp_path)).name.endswith("tekken.json")
    save_byte_level(tmp_path)
    assert load_tokenizer(str(tmp_path)).name.endswith("tokenizer.json")


def test_tiktoken_ranks_called_tokenizer_model(tmp_path) -> None:
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(ranks)
    sidecar = {"pattern": r"\w+|\W", "special_tokens": {"<|end|>": 256}, "stop_tokens": ["<|end|>"]}
    (tmp_path / "tokenizer.model.json").write_text(json.dumps(sidecar))
    found = load_tokenizer(str(tmp_path))
    assert found.table.stop_ids == (256,) and found.encode(b"ab").tolist() == [97, 98]


# Stop tokens, BOS, variables of the template, notes.


@pytest.fixture
def folder(tmp_path) -> Path:
    save_byte_level(tmp_path / "model")
    return tmp_path / "model"


def stop_ids(folder: Path, **files: Any) -> dict[int, str]:
    return load_tokenizer(str(write(folder, **files))).stop_sources


def test_stop_ids_by_the_order_of_the_files(folder) -> None:
    config = {"eos_token_id": [317, 316]}
    assert list(stop_ids(folder, config=config)) == [318, 316], "generation_config.json decides alone"
    # Without it: the end of a turn, EOS, then config.json.
    sources = stop_ids(folder, generation_config={}, special_tokens_map={"eos_token": "<|endoftext|>"})
    assert sources == {318: "chat template", 316: "eos_token", 317: "config.json"}
    nested = {"text_config": {"eos_token_id": 317}}
    plain = {"chat_template": None, "eos_token": None}
    assert stop_ids(folder, config=nested, special_tokens_map=None, tokenizer_config=plain) == {
        317: "config.json"
    }


def test_a_token_of_the_vocabulary_that_a_file_names_is_one_token(folder) -> None:
    """It is not an added token of tokenizer.json, but in a template's text it is that one id."""
    write(folder, tokenizer_config={"eos_token": "Ġcat", "chat_template": "{{ messages[0].content }}Ġcat"})
    found = load_tokenizer(str(folder), [295])
    assert list(found.encode_chat("xĠcat")) == [ord("x") - 33, 295]
    assert found.decode(found.encode("a cat Ġcat".encode())) == "a cat Ġcat".encode()


def test_the_variables_of_a_template_are_those_of_the_same_reading(folder) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    token_map = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": None}
    write(folder, tokenizer_config={"chat_template": source}, special_tokens_map=token_map)
    template, tokenizer = ChatTemplate.load(str(folder), flag="--hf-checkpoint"), load_tokenizer(str(folder))
    ids = template.render([{"role": "user", "content": "a"}], tokenizer)
    expected = reference(folder).apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert ids.tolist() == expected == [316, ord("a") - 33]


def test_an_id_that_only_the_decoder_has_is_one_token_of_a_chat(folder) -> None:
    decoder = {"320": added("<|turn|>", rstrip=True)}
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|turn|>")
    write(folder, tokenizer_config={"chat_template": template, "added_tokens_decoder": decoder})
    found = load_tokenizer(str(folder))
    messages = [{"role": "user", "content": "the cat"}]
    ids = ChatTemplate.load(str(folder), flag="").render(messages, found).tolist()
    assert ids == reference(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids.count(NEXT) == 1
    # rstrip removes the line end in a prompt; a response keeps it.
    response = b"a <|turn|>\n\nb"
    assert found.decode(found.encode(response)) == response


def test_what_is_not_used_is_noted(folder) -> None:
    settings = {"pad_token": "[PAD]", "additional_special_tokens": ["<extra>"], "added_tokens_decoder": {}}
    token_map = {"eos_token": "<|endoftext|>"}
    found = load_tokenizer(str(write(folder, tokenizer_config=settings, special_tokens_map=token_map)))
    assert found.notes == (
        "tokenizer_config.json: '[PAD]' (pad_token) is not a token of the vocabulary, and is not used",
        "tokenizer_config.json: '<extra>' (extra_special_tokens) is not a token of the vocabulary, and is "
        "not used",
        "special_tokens_map.json: eos_token '<|endoftext|>' is not read; it is '<|im_end|>', as "
        "tokenizer_config.json has it",
    )
    assert found.table.num_ids == TOOL + 1
    template = CHAT_TEMPLATE.replace("<|im_start|>", "<|user|>")
    plain = dict.fromkeys(settings) | {"added_tokens_decoder": {}, "chat_template": template}
    (note,) = load_tokenizer(str(write(folder, tokenizer_config=plain, special_tokens_map=None))).notes
    assert (
        note
        == "the chat template writes '<|user|>', which is not a token of the vocabulary: it is spelled in "
        "several"
    )


def test_notes_are_lines(folder, capsys) -> None:
    report_notes(load_tokenizer(str(write(folder, tokenizer_config={"mask_token": "[MASK]"}))), None)
    assert capsys.readouterr().err == (
        f" {folder / 'tokenizer.json'}: tokenizer_config.json: '[MASK]' (mask_token) is not a token of the "
        "vocabulary, and is not used\n"
    )


def test_a_clean_folder_has_no_notes(folder) -> None:
    assert load_tokenizer(str(folder)).notes == ()


def test_a_file_given_by_its_path_is_read_with_its_folder(folder, sentencepiece_file, tmp_path) -> None:
    settings = {"added_tokens_decoder": {"320": added("<|turn|>")}, "eos_token": "<|turn|>"}
    write(folder, tokenizer_config=settings, generation_config={})
    assert NEXT in load_tokenizer(str(folder / "tokenizer.json")).table.stop_ids
    shutil.copy(sentencepiece_file, tmp_path)
    write(tmp_path, added_tokens={"<|end|>": 300}, tokenizer_config={"eos_token": "<|end|>"})
    found = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert found.table.stop_ids == (300,)
