"""Tokenizers read from files: real ones of the package mistral-common, and small ones made here."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_simct.alignment import Tokenizer, align, load_tokenizer
from megatron_simct.alignment.tokenizer import utf8_prefix_bytes

REAL = {
    "sentencepiece v1": "tokenizer.model.v1",
    "sentencepiece v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
}
TEXTS = [
    "",
    "The cat sat on the mat.",
    " leading blank",
    "  two  blanks   three\tand a tab ",
    "\n\nlines\r\n\n  indented\n",
    "1234567 + 89 = 1,234,656",
    "naïve café, décomposé: e\u0301",
    "Привет, мир. Γειά σου. שלום عالم",
    "你好,世界。日本語のテキスト 한국어",
    "नमस्ते दुनिया สวัสดี",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ∑∂√ 𝔘𝔫𝔦",
    "ﬁ ｆｕｌｌ Å ½ \u200b\ufeff\xa0",
    "def f(x):\n    return x ** 2  # <s>[INST] not special </s>",
    "nul \0 and \x7f",
]


@pytest.fixture(scope="module")
def real() -> dict[str, Tokenizer]:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("the package mistral-common, whose tokenizer files these tests read, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: load_tokenizer(str(folder / file)) for name, file in REAL.items()}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizers_spell_text_exactly(real, name, text) -> None:
    tokenizer = real[name]
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text.encode()
    assert not tokenizer.table.special[ids].any()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_real_tokenizers_spell_any_text_and_align(real, text) -> None:
    ids = {}
    for name, tokenizer in real.items():
        ids[name] = tokenizer.encode(text.encode())
        assert tokenizer.decode(ids[name]) == text.encode()
    teacher, student = real["tekken"].table, real["sentencepiece v3"].table
    alignment = align(teacher, ids["tekken"], student, ids["sentencepiece v3"])
    assert alignment.dropped == {} and alignment.student_bytes == len(text.encode())


def test_real_vocabularies(real) -> None:
    assert {name: tokenizer.table.num_ids for name, tokenizer in real.items()} == {
        "sentencepiece v1": 32000,
        "sentencepiece v3": 32768,
        "tekken": 131072,
    }
    for tokenizer in real.values():
        assert (tokenizer.bos_id, tokenizer.table.stop_ids) == (1, (2,))
        assert tokenizer.table.special[:3].all()
    assert real["tekken"].table.special.sum() == 1000 and real["tekken"].table.special[:1000].all()
    assert real["sentencepiece v1"].table.special.sum() == 3


def test_real_encoding_is_the_library_s_own_without_the_leading_blank(real) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=real["sentencepiece v3"].name)
    for text in TEXTS[1:]:
        # With its dummy space the original encodes "\nx" as the tokens of a space and then the text's own.
        own = original.encode("\n" + text)
        assert real["sentencepiece v3"].encode(("\n" + text).encode()).tolist() == own[1:]
    assert real["sentencepiece v3"].decode(real["sentencepiece v3"].encode(b"cat")) == b"cat"
    assert original.id_to_piece(original.encode("cat")[0]) == "▁cat"


def test_a_sentencepiece_model_cannot_spell_its_own_blank_mark(real) -> None:
    assert real["sentencepiece v3"].decode(real["sentencepiece v3"].encode("a▁b".encode())) == b"a b"
    assert real["tekken"].decode(real["tekken"].encode("a▁b".encode())) == "a▁b".encode()


@pytest.mark.parametrize("name", REAL)
def test_only_the_valid_prefix_is_encoded(real, name) -> None:
    tokenizer = real[name]
    for data, prefix in [
        (b"ok \xff no", b"ok "),
        (b"ok \xf0\x9f\x98", b"ok "),
        (b"\x80", b""),
        ("é".encode() + b"\xc3", "é".encode()),
        (b"\xed\xa0\x80", b""),
    ]:
        assert utf8_prefix_bytes(data) == len(prefix)
        assert tokenizer.decode(tokenizer.encode(data)) == prefix


@pytest.mark.parametrize("name", REAL)
def test_tokenizers_travel_to_workers(real, name) -> None:
    copy = pickle.loads(pickle.dumps(real[name]))
    text = "two  blanks, 😀\n".encode()
    assert copy.encode(text).tolist() == real[name].encode(text).tolist()
    assert copy.table.fingerprint == real[name].table.fingerprint


def test_given_stop_tokens_replace_the_file_s_own(real) -> None:
    tokenizer = load_tokenizer(real["sentencepiece v3"].name, stop_token_ids=[781, 2])
    assert tokenizer.table.stop_ids == (781, 2)
    assert tokenizer.table.special[781] and not real["sentencepiece v3"].table.special[781]
    assert load_tokenizer(real["tekken"].name, stop_token_ids=[4, 2]).table.stop_ids == (4, 2)
    with pytest.raises(ValueError, match=r"model\.v3.*\[32768\] lie outside the vocabulary of 32768 ids"):
        load_tokenizer(real["sentencepiece v3"].name, stop_token_ids=[32768])


# Small tiktoken files.

MERGES = [b"th", b"the", b" the", b"ca", b"cat", b"12"]


def write_tiktoken(folder: Path, **changes: object) -> str:
    pieces = [bytes([byte]) for byte in range(256)] + MERGES
    # Rank 260 is unused, and the special tokens leave a gap after the ranks.
    ranks = {piece: rank + (rank >= 260) for rank, piece in enumerate(pieces)}
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    sidecar = {
        "pattern": r" ?\w+|\s+|[^\s\w]+",
        "special_tokens": {"<|end|>": 270, "<|start|>": 271},
        "stop_tokens": ["<|end|>"],
    } | changes
    path.with_name("small.tiktoken.json").write_text(json.dumps(sidecar))
    return str(path)


def test_tiktoken_file(tmp_path) -> None:
    tokenizer = load_tokenizer(write_tiktoken(tmp_path))
    table = tokenizer.table
    assert (table.num_ids, table.stop_ids, tokenizer.bos_id) == (272, (270,), None)
    assert np.flatnonzero(table.special).tolist() == [260, *range(263, 272)]
    assert tokenizer.encode(b"the cat").tolist() == [257, ord(" "), 261]
    assert table.bytes_of(261) == b"cat"
    for data in [b"the <|end|> 12", " cat é 😀".encode()]:
        ids = tokenizer.encode(data)
        assert tokenizer.decode(ids) == data and not table.special[ids].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_tokens": []}, "names no stop token; give stop_token_ids"),
        ({"stop_tokens": ["<|im_end|>"]}, "im_end"),
        ({"special_tokens": {"<|end|>": 257}}, r"ids \[257\] are both ranks and special"),
        ({"pattern": "("}, "small.tiktoken"),
    ],
)
def test_bad_tiktoken_sidecars(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_tiktoken(tmp_path, **changes))


def test_tiktoken_ranks_need_every_byte(tmp_path) -> None:
    path = Path(write_tiktoken(tmp_path))
    path.write_bytes(b"\n".join(line for line in path.read_bytes().splitlines() if not line.endswith(b" 97")))
    with pytest.raises(ValueError, match="1 single bytes have no rank, 0x61 first"):
        load_tokenizer(str(path))


# Small SentencePiece models.


def write_sentencepiece(folder: Path, normalizer: str = "identity", **options: object) -> str:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "hello world of cats"] * 10),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name=normalizer,
        user_defined_symbols=["<turn>"],
        minloglevel=2,
        **{"vocab_size": 290, "byte_fallback": True} | options,
    )
    path = folder / "small.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_sentencepiece_keeps_blanks_even_where_the_model_strips_them(tmp_path) -> None:
    # Training leaves add_dummy_prefix and remove_extra_whitespaces on.
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    for data in [b"  the  cat ", b"cat", "ﬁ é\t\n".encode()]:
        assert tokenizer.decode(tokenizer.encode(data)) == data


def test_sentencepiece_that_rewrites_text_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"small\.model.*normalizer rewrites text.*only identity"):
        load_tokenizer(write_sentencepiece(tmp_path, "nmt_nfkc"))


def test_sentencepiece_without_tokens_for_every_text_is_refused(tmp_path) -> None:
    path = write_sentencepiece(tmp_path, vocab_size=30, byte_fallback=False)
    with pytest.raises(ValueError, match="single bytes have no token, 0x00 first"):
        load_tokenizer(path)
    lossy = load_tokenizer(path, allow_lossy=True)
    assert "single bytes have no token" in lossy.lossy
    assert lossy.decode(lossy.encode("the cät".encode())) == b"the ct"


def test_sentencepiece_without_stop_token(tmp_path) -> None:
    path = write_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(ValueError, match="names no stop token"):
        load_tokenizer(path)
    assert load_tokenizer(path, stop_token_ids=[0]).table.stop_ids == (0,)


def test_spelling_of_a_user_defined_stop_token_is_ordinary_text(tmp_path) -> None:
    path, data = write_sentencepiece(tmp_path), b"the <turn> cat<turn>"
    plain = load_tokenizer(path)
    turn_id = plain.table.pieces().index(b"<turn>")
    assert (plain.encode(data) == turn_id).sum() == 2
    stopping = pickle.loads(pickle.dumps(load_tokenizer(path, stop_token_ids=[turn_id])))
    ids = stopping.encode(data)
    assert turn_id not in ids and stopping.decode(ids) == data
    assert stopping.encode(b"the cat").tolist() == plain.encode(b"the cat").tolist()


def test_unknown_and_unreadable_files_are_named(tmp_path) -> None:
    (tmp_path / "tokenizer.bin").touch()
    (tmp_path / "folder").mkdir()
    for name, reason in [
        ("tokenizer.bin", "of an unknown kind"),
        ("tokenizer.json", "does not exist"),
        ("missing.model", "does not exist"),
        ("missing.tiktoken", "does not exist"),
        ("missing/tekken.json", "does not exist"),
        ("folder", "FileNotFoundError"),
    ]:
        spec = str(tmp_path / name)
        with pytest.raises(ValueError, match=reason) as caught:
            load_tokenizer(spec)
        assert spec in str(caught.value) and "accepted are" in str(caught.value)
    for name, content in [("bad.model", b"not a model"), ("tekken.json", b"{}"), ("bad.tiktoken", b"x")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* cannot be used"):
            load_tokenizer(str(tmp_path / name))


def test_an_encoding_that_tiktoken_knows(monkeypatch) -> None:
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding(
        "small", pat_str=r"\s*\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["small", "remote"])

    def get(name) -> Any:
        if name == "remote":
            raise ConnectionError("no network")
        return encoding

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    found = load_tokenizer("tiktoken:small")
    assert found.encode(b"ab<|endoftext|>").tolist()[0] == 256 and 257 not in found.encode(b"ab<|endoftext|>")
    assert found.table.stop_ids == (257,) and found.table.num_ids == 258
    assert load_tokenizer("tiktoken:small", [257]).table.stop_ids == (257,)
    with pytest.raises(ValueError, match="tiktoken:other.*tiktoken knows small, remote"):
        load_tokenizer("tiktoken:other")
    with pytest.raises(
        ValueError, match=r"cannot download its ranks; .*NAME\.tiktoken.*\(ConnectionError: no network\)"
    ):
        load_tokenizer("tiktoken:remote")
