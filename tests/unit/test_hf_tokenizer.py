"""tokenizer.json of both kinds: exact bytes, special tokens, stop tokens and BOS, and refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_simct.alignment import Tokenizer, align, build_alignment_map, hf_tokenizer, load_tokenizer
from megatron_simct.alignment.hf_tokenizer import Encoder
from tests.huggingface import (
    save_byte_fallback,
    save_byte_level,
    save_real_byte_fallback,
    save_real_byte_level,
)

TEXTS = [
    "",
    "The cat sat on the mat.",
    " leading blank",
    "  two  blanks   three\tand a tab ",
    "\n\nlines\r\n\n  indented\n",
    "1234567 + 89 = 1,234,656",
    "naïve café",
    "Привет, мир. Γειά σου. שלום عالم",
    "你好,世界。日本語のテキスト 한국어",
    "नमस्ते दुनिया สวัสดี",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ∑∂√ 𝔘𝔫𝔦",
    "ﬁ ｆｕｌｌ ½ \u200b\ufeff\xa0",
    "def f(x):\n    return x ** 2  # <s>[INST]<|im_end|> <|im_start|>user\n</s><unk>",
    "nul \0 and \x7f",
    "<tool>a<tool>",
]
KINDS = ["byte-level", "byte fallback", "metaspace"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {kind: root / kind for kind in KINDS}
    save_byte_level(made["byte-level"])
    save_byte_fallback(made["byte fallback"])
    save_byte_fallback(made["metaspace"], metaspace=True)
    return made


@pytest.fixture(scope="module")
def loaded(folders) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_spelled_exactly(loaded, kind, text) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text.encode()
    assert not tokenizer.table.special[ids].any()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_any_text_aligns_unless_the_normal_form_changes_it(loaded, text) -> None:
    fallback, byte_level = loaded["byte fallback"], loaded["byte-level"]
    ids = fallback.encode(text.encode())
    assert fallback.decode(ids) == text.encode()
    # The byte-level one writes NFC; the aligner counts the changed bytes.
    alignment = align(byte_level.table, byte_level.encode(text.encode()), fallback.table, ids)
    if byte_level.decode(byte_level.encode(text.encode())) == text.encode():
        assert alignment.dropped == {} and alignment.student_bytes == len(text.encode())


def test_a_decomposed_letter_is_written_in_nfc(loaded) -> None:
    ids = loaded["byte-level"].encode("e\u0301".encode())
    assert loaded["byte-level"].decode(ids) == "é".encode()


@pytest.mark.parametrize("kind", KINDS)
def test_tables(loaded, kind) -> None:
    tokenizer = loaded[kind]
    table = tokenizer.table
    assert {bytes([byte]) for byte in range(256)} <= set(table.pieces())
    if kind == "byte-level":
        assert table.num_ids == 320 and np.flatnonzero(table.special).tolist() == [316, 317, 318]
        # <|im_end|> is the tokenizer's EOS and is second in generation_config.json.
        assert (table.stop_ids, tokenizer.bos_id) == ((318, 316), None)
        assert table.bytes_of(319) == b"<tool>"
        assert 319 in tokenizer.encode(b"a<tool>")
    else:
        assert np.flatnonzero(table.special).tolist() == [0, 1, 2]
        assert (table.stop_ids, tokenizer.bos_id) == ((2,), 1)
        assert table.bytes_of(3 + 0x0A) == b"\n"


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_the_library_s_own_but_for_the_leading_blank(loaded, folders, kind) -> None:
    import tokenizers

    own = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    for text in ["the cat", "Tom has 12 apples.", "Привет  мир", "x"]:
        expected = own.encode(text, add_special_tokens=False).ids
        if kind != "byte-level":
            assert loaded[kind].encode((" " + text).encode()).tolist() == expected
            continue
        assert loaded[kind].encode(text.encode()).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_spelling_of_special_tokens_is_that_token_in_a_chat_only(loaded, kind) -> None:
    tokenizer = loaded[kind]
    stop = tokenizer.table.stop_ids[0]
    text = {"byte-level": "<|im_end|>"}.get(kind, "</s>")
    assert stop not in tokenizer.encode(f"a{text}b".encode())
    assert list(tokenizer.encode_chat(f"a{text}b")).count(stop) == 1
    assert isinstance(tokenizer.encode_text, Encoder), (
        "no cut is needed where the library leaves special tokens alone"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_travel_to_workers(loaded, kind) -> None:
    copy = pickle.loads(pickle.dumps(loaded[kind]))
    for text in TEXTS:
        assert copy.encode(text.encode()).tolist() == loaded[kind].encode(text.encode()).tolist()
        assert list(copy.encode_chat(text)) == list(loaded[kind].encode_chat(text))
    assert copy.table.fingerprint == loaded[kind].table.fingerprint


def test_two_tokenizers_of_one_folder_are_one_vocabulary(loaded, folders) -> None:
    again = load_tokenizer(str(folders["byte-level"] / "tokenizer.json"))
    assert again.table.fingerprint == loaded["byte-level"].table.fingerprint
    mapped = build_alignment_map(again, loaded["byte fallback"])
    assert mapped is not None


@pytest.mark.parametrize("save", [save_real_byte_fallback, save_real_byte_level])
def test_a_real_vocabulary_reads_like_its_own_file(tmp_path, save) -> None:
    own = load_tokenizer(str(save(tmp_path)))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.table.num_ids > 20000
    assert tokenizer.table.fingerprint == own.table.fingerprint
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text.encode()).tolist() == own.encode(text.encode()).tolist()


# Stop tokens and BOS.


@pytest.fixture
def byte_level(tmp_path) -> Path:
    save_byte_level(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_stop_tokens_in_the_order_of_the_files(byte_level) -> None:
    def stop_ids(*given: int) -> tuple[int, ...]:
        return load_tokenizer(str(byte_level), given).table.stop_ids

    assert stop_ids(317, 5) == (317, 5)
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": 317}))
    assert stop_ids() == (317,)
    (byte_level / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert stop_ids() == (318,)
    (byte_level / "tokenizer_config.json").write_text("{}")
    (byte_level / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}})
    )
    assert stop_ids() == (316,)
    (byte_level / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match="it names no stop token"):
        stop_ids()
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": [9999]}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id 9999 is the id of no token"):
        stop_ids()
    with pytest.raises(ValueError, match=r"\[9999\] lie outside the vocabulary of 320 ids"):
        stop_ids(9999)


@pytest.mark.parametrize("stop", [b"<tool>", b" cat"])
def test_a_stop_token_of_any_kind_is_never_content(byte_level, stop) -> None:
    plain = load_tokenizer(str(byte_level))
    stop_id = plain.table.pieces().index(stop)
    data = b"the cat" + stop + b" sat"
    assert stop_id in plain.encode(data)
    tokenizer = load_tokenizer(str(byte_level), [stop_id])
    assert stop_id not in tokenizer.encode(data) and tokenizer.decode(tokenizer.encode(data)) == data


def test_bos_is_what_the_file_puts_whatever_the_settings_say(tmp_path) -> None:
    """As transformers 5 does for a tokenizer.json."""
    save_byte_fallback(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def loaded(**changes) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        return load_tokenizer(str(tmp_path))

    for changes in ({}, {"add_bos_token": True}, {"bos_token": None}):
        assert (loaded(**changes).bos_id, loaded(**changes).notes) == (1, ())
    without = loaded(add_bos_token=False)
    assert without.bos_id == 1 and without.notes == (
        "tokenizer_config.json: add_bos_token = false is not read; a prompt begins with BOS 1, as the "
        "post_processor of tokenizer.json has it",
    )
    save_byte_fallback(tmp_path, post_processor=None)
    assert loaded().bos_id is None
    (note,) = loaded(add_bos_token=True).notes
    assert "add_bos_token = true is not read; a prompt begins with no BOS" in note


def test_a_folder_with_a_sentencepiece_model_only(tiny, tmp_path) -> None:
    shutil.copy(tiny / "student.model", tmp_path / "tokenizer.model")
    plain = load_tokenizer(str(tmp_path))
    assert plain.table.stop_ids == (2,) and plain.encode_chat is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert load_tokenizer(str(tmp_path)).table.stop_ids == (5, 2)
    assert load_tokenizer(str(tmp_path), [7]).table.stop_ids == (7,)


# Steps that would add or drop bytes are removed; steps that rewrite bytes are refused.


def test_truncation_dropout_and_prefix_blanks_are_taken_out(tmp_path) -> None:
    spec = save_byte_level(tmp_path)
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"truncation": truncation}))
    tokenizer = load_tokenizer(str(tmp_path))
    data = b"the cat sat on the mat, the cat sat on the mat"
    assert tokenizer.decode(tokenizer.encode(data)) == data
    assert len({tuple(tokenizer.encode(data)) for _ in range(5)}) == 1


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(steps)}


LOWERCASE = {"type": "Lowercase"}
NFC, NFKC = {"type": "NFC"}, {"type": "NFKC"}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "a",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": {"a": 0},
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalizer": LOWERCASE}, ["normalizer Lowercase rewrites text"]),
        ({"normalizer": sequence(NFC, NFKC)}, ["normalizer NFKC rewrites text"]),
        ({"normalizer": sequence(NFC, sequence(REPLACE))}, ["normalizer Replace rewrites text"]),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, ["normalizer Prepend"]),
        ({"pre_tokenizer": {"type": "Whitespace"}}, ["pre-tokenizer Whitespace drops"]),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}},
            ["Metaspace"],
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "Removed",
                    "invert": False,
                }
            },
            ["pre-tokenizer Split drops"],
        ),
        ({"pre_tokenizer": None}, ["neither byte-level nor has it byte_fallback"]),
        ({"model": WORDPIECE}, ["model WordPiece"]),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            ["single bytes have no token, 0x09 first"],
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a</w>": 0}, "merges": [], "end_of_word_suffix": "</w>"}},
            ["suffix"],
        ),
        ({"model": {"type": "BPE", "vocab": 5, "merges": []}}, ["the tokenizers library cannot read it"]),
        ({"model": None}, ["no object with a model"]),
    ],
)
def test_what_is_refused(tmp_path, changes, words) -> None:
    save_byte_level(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unreadable_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"FileNotFoundError.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    save_byte_level(tmp_path)
    for name in ("generation_config.json", "tokenizer_config.json"):
        original = (tmp_path / name).read_text()
        for content, reason in (("{", "is not JSON"), ("[]", "holds no JSON object")):
            (tmp_path / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name} {reason}"):
                load_tokenizer(str(tmp_path))
        (tmp_path / name).write_text(original)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "name, field, values, expected",
    [
        (
            "generation_config.json",
            "eos_token_id",
            ["316", -1, 2.5, True, {}, ["316"], [None], [[316]]],
            "a whole number, at least 0, or a list, each entry a whole number, at least 0, or null",
        ),
        (
            "tokenizer_config.json",
            "eos_token",
            [5, ["</s>"], {}, {"content": 5}],
            "a string, or an object with the",
        ),
        (
            "tokenizer_config.json",
            "bos_token",
            [5, ["<s>"]],
            "a string, or an object with the string content, or null",
        ),
        ("tokenizer_config.json", "add_bos_token", ["yes", 1], "true or false, or null"),
    ],
)
def test_a_setting_without_a_meaning_is_named(byte_level, name, field, values, expected) -> None:
    settings = json.loads((byte_level / name).read_text())
    for value in values:
        (byte_level / name).write_text(json.dumps(settings | {field: value}))
        with pytest.raises(ValueError) as error:
            load_tokenizer(str(byte_level))
        assert f"{byte_level / name}: {field} = {value!r}; expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    "template", [5, ["d"], [[1]], "{{ 1 / 0 }}", "{% break %}", "{{ range(1000000) | list }}"]
)
def test_a_template_that_cannot_be_rendered_says_nothing_about_stop_tokens(byte_level, template) -> None:
    settings = json.loads((byte_level / "tokenizer_config.json").read_text())
    (byte_level / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert load_tokenizer(str(byte_level)).table.stop_ids == (318, 316)


def test_a_tokenizer_whose_parts_are_of_other_types_is_named(byte_level) -> None:
    save_byte_level(byte_level, normalizer=["NFC"])
    with pytest.raises(ValueError, match=r"cannot be used: .*accepted are"):
        load_tokenizer(str(byte_level))


def test_without_generation_config_the_end_of_a_turn_comes_before_eos(byte_level) -> None:
    """Gemma's folders: the instructed model does not stop with the tokenizer's EOS."""
    tokenizer = json.loads((byte_level / "tokenizer.json").read_text())
    names = {token["content"]: token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    settings = json.loads((byte_level / "tokenizer_config.json").read_text())
    end, eos = next(name for name in names if name != settings["eos_token"]), settings["eos_token"]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n" + end + "{% endfor %}"
    (byte_level / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (byte_level / "generation_config.json").unlink()
    found = load_tokenizer(str(byte_level))
    assert found.table.stop_ids == (names[end], names[eos])
    assert found.stop_sources == {names[end]: "chat template", names[eos]: "eos_token"}
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": [names[eos], names[end]]}))
    assert load_tokenizer(str(byte_level)).table.stop_ids == (names[end], names[eos])
    (byte_level / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ broken"}))
    assert load_tokenizer(str(byte_level)).table.stop_ids == (names[eos], names[end])


def test_a_run_of_blank_marks_that_is_also_a_piece_is_blanks(tmp_path) -> None:
    """Gemma also lists its runs of spaces among the added tokens."""
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        "▁": 256,
        "▁▁": 257,
        "<unk>": 258,
        "<eos>": 259,
    }
    added = [("▁▁", 257, False), ("<eos>", 259, True), ("▁x", 260, False)]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": special, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for text, i, special in added
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "model": {"type": "BPE", "vocab": pieces, "merges": [["▁", "▁"]], "byte_fallback": True,
                  "unk_token": "<unk>", "fuse_unk": True},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    found = load_tokenizer(str(tmp_path), [259])
    assert [found.table.bytes_of(i) for i in (256, 257, 260)] == [b" ", b"  ", "▁x".encode()]
    assert found.encode(b"a  b").tolist() == [97, 257, 98]


def test_an_inverted_split_keeps_what_matches(byte_level) -> None:
    tokenizer = json.loads((byte_level / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s*\S+|\s+"}, "behavior": "Removed", "invert": True}
    byte_level_step = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level_step]}
    (byte_level / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = b" two  words\n"
    found = load_tokenizer(str(byte_level))
    assert found.decode(found.encode(text)) == text
    split["invert"] = False
    (byte_level / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="Split drops or rewrites text"):
        load_tokenizer(str(byte_level))


def without_bytes(folder: Path, missing: bytes) -> None:
    """Give the ids of single bytes, and of merges of them, to pieces that occur in no text."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    absent = {character for character, byte in hf_tokenizer._byte_of_character().items() if byte in missing}
    model = spec["model"]
    model["vocab"] = {
        piece if absent.isdisjoint(piece) else f"unused{i}": i for piece, i in model["vocab"].items()
    }
    model["merges"] = [pair for pair in model["merges"] if absent.isdisjoint("".join(pair))]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


SMOLLM2_LACKS = bytes.fromhex("04061314161dc0c1f1f2f5f6f7f8f9fafbfcfdfeff")


def test_control_characters_may_have_no_token(byte_level, loaded) -> None:
    without_bytes(byte_level, SMOLLM2_LACKS)
    found = load_tokenizer(str(byte_level))
    assert found.lossy is None and found.table.num_ids == loaded["byte-level"].table.num_ids
    for text in TEXTS:
        assert found.decode(found.encode(text.encode())) == text.encode()
    # A comparison of bytes shows what is left out: nothing after it is aligned.
    text = b"the cat\x04 sat on the mat"
    assert found.decode(found.encode(text)) == text.replace(b"\x04", b"")
    for other in (loaded["byte fallback"], loaded["byte-level"]):
        for teacher, student in ((found, other), (other, found)):
            alignment = align(teacher.table, teacher.encode(text), student.table, student.encode(text))
            assert alignment.common_prefix_bytes == len(b"the cat") and not alignment.stop
            assert list(alignment.dropped) == ["mismatch"]


@pytest.mark.parametrize("needed", [b"\n", b"a", b"\xc3", b"\xf3", b"\x80"])
def test_bytes_of_ordinary_text_need_a_token(byte_level, needed) -> None:
    without_bytes(byte_level, SMOLLM2_LACKS + needed)
    with pytest.raises(ValueError, match=f"1 single bytes have no token, {needed[0]:#04x} first"):
        load_tokenizer(str(byte_level))
