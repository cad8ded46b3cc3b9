"""The bias of a pair: the loss of a student that is already right, compared with the oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_simct.alignment import Tokenizer, TokenTable
from megatron_simct.alignment.continuations import Merges, inside_pretokens
from megatron_simct.alignment.languages import (
    ExactModel,
    divergence,
    flattened,
    longest_match,
    random_byte_pairs,
    random_language,
)
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.preflight.bias import COMPARED, FLOOR, Bias, has_bias, measure_bias, spelled_by, words_of
from tests.oracles import bytes as oracle_of_longest_match
from tests.oracles.byte_bounds import loss as oracle_of_bounds
from tests.oracles.losses import SHARED, STOP, UNIT
from tests.oracles.losses import loss as oracle_of_tokens

DIGITS = [b"0", b"1"]


def grouped(size: int) -> tuple[list[bytes], object]:
    """Groups of up to `size` digits, from the left."""
    pieces = [b""] + [b"".join(p) for n in range(1, size + 1) for p in itertools.product(DIGITS, repeat=n)]
    return pieces, longest_match(pieces)


def tokenizer_of(pieces: list[bytes], cut, continuations=None) -> Tokenizer:
    table = TokenTable.from_bytes(pieces, stop_ids=[0])
    return Tokenizer(
        name="small",
        table=table,
        encode_text=lambda text: list(cut(text.encode())),
        continuations=continuations,
    )


def of_byte_pairs(pieces, merges, cut) -> Tokenizer:
    table = TokenTable.from_bytes(pieces, stop_ids=[0])
    symbols = sorted({b for piece in pieces for b in piece})
    inside = np.ones((256, 256), dtype=bool)
    known = inside_pretokens(Merges.of(pieces, merges), table, symbols=symbols, inside=inside)
    return tokenizer_of(pieces, cut, known)


def oracle(
    language, interface: InterfaceConfig, student: Tokenizer, teacher: Tokenizer
) -> tuple[float, float]:
    """The mean losses of both students, word by word, over whole vocabularies."""
    found = []
    for of_words in (language, flattened(language)):
        total = 0.0
        for word, mass in of_words.items():
            sides = []
            for tokenizer, of in ((student, of_words), (teacher, language)):
                model = ExactModel.of(of, tokenizer.encode, 0)
                rows = torch.from_numpy(model.logits(word, tokenizer.table.num_ids))
                if interface.interface != "bytes":
                    rows = rows.clamp(min=np.log(FLOOR))
                sides.append((tokenizer, rows, model.labels(word)))
            total += mass * (of_bytes if interface.interface == "bytes" else of_tokens)(interface, *sides)
        found.append(total)
    return found[0], found[1]


def of_bytes(interface: InterfaceConfig, *sides) -> float:
    made = []
    for tokenizer, rows, labels in sides:
        known = tokenizer.continuations
        follows = None
        if known is not None:
            follows = lambda t, e, known=known: bool(known.may_follow(t, 256 if e is None else e))  # noqa: E731
        made.append(oracle_of_longest_match.Side(tokenizer.table.pieces(), [0], rows, labels, follows))
    if interface.byte_bounds == "any":
        return oracle_of_bounds(made[0], made[1:], divergence_name=interface.divergence)
    return float(oracle_of_longest_match.loss(*made, divergence_name=interface.divergence)[0])


def of_tokens(interface: InterfaceConfig, *sides) -> float:
    (student, rows_s, own), (teacher, rows_t, others) = sides
    pieces = student.table.pieces(), teacher.table.pieces()
    shared = {
        i: [pieces[1].index(piece)] for i, piece in enumerate(pieces[0]) if piece in pieces[1] and piece
    }
    ends = [
        [0, *np.cumsum([len(p[i]) for i in ids[:-1]]).tolist()]
        for p, ids in zip(pieces, (own, others), strict=True)
    ]
    common = sorted(set(ends[0]) & set(ends[1]))
    segments, kinds, replaced = [], [], []
    for begin, end in itertools.pairwise(common):
        ss, se, ts, te = (ends[k].index(at) for k in (0, 1) for at in (begin, end))
        segments.append((ts, te, ss, se))
        text = b"".join(pieces[0][i] for i in own[ss:se])
        is_pair = (te - ts, se - ss) == (1, 1)
        kinds.append(SHARED if is_pair else UNIT)
        replaced.append(
            -1 if is_pair or text not in pieces[1] or text not in pieces[0] else pieces[0].index(text)
        )
    segments.append((len(others) - 1, len(others), len(own) - 1, len(own)))
    kinds.append(STOP)
    replaced.append(-1)
    found = oracle_of_tokens(
        rows_s,
        rows_t,
        student_labels=own,
        teacher_labels=others,
        segments=segments,
        kinds=kinds,
        replaced=replaced,
        shared=shared | {0: [0]},
        interface=interface.interface,
        divergence_name=interface.divergence,
    )
    return float(found.sum)


LANGUAGE = random_language(DIGITS, 3, seed=4)
INTERFACES = [config for name, config in COMPARED.items() if name not in ("code", "bytes, any")]
INTERFACES += [InterfaceConfig(divergence="forward_kl"), InterfaceConfig(interface="bytes", divergence="js")]


@pytest.mark.parametrize(("teacher", "student"), [(3, 1), (1, 3), (2, 3)])
def test_the_losses_are_those_of_the_oracles(teacher, student) -> None:
    words = {word: mass for word, mass in LANGUAGE.items() if word}
    pair = {"student": tokenizer_of(*grouped(student)), "teacher": tokenizer_of(*grouped(teacher))}
    language = spelled_by(words, *pair.values())
    found = measure_bias(language, INTERFACES, **pair)
    for interface, bias in zip(INTERFACES, found, strict=True):
        perfect, less_sure = oracle(language, interface, *pair.values())
        if np.isinf(perfect):  # `exact`: the teacher has no mass outside the shared tokens
            assert (
                interface.interface == "exact"
                and teacher < student
                and bias.perfect > 10
                and bias.flattened > 10
            )
            continue
        assert bias.perfect == pytest.approx(perfect, rel=1e-6, abs=1e-8), interface
        assert bias.flattened == pytest.approx(less_sure, rel=1e-6, abs=1e-8), interface
        assert bias.true == pytest.approx(divergence(flattened(language), language))
        is_biased = interface.interface != "bytes"
        assert bias.is_large == is_biased, "groups of digits: the longest match"
        assert bias.words == 14


@pytest.mark.parametrize("seed", [3, 8])
def test_merges_that_disagree_show_and_any_bounds_suit_them(seed) -> None:
    pair = random_byte_pairs(seed, length=4)
    sides = [of_byte_pairs(*of, cut) for *of, cut in zip(pair.pieces, pair.merges, pair.cuts, strict=True)]
    language = spelled_by({word: mass for word, mass in pair.language.items() if word}, *sides)
    names = ("paper", "strict", "exact", "alm", "bytes, longest-match", "bytes, any")
    interfaces = [COMPARED[name] for name in names]
    found = dict(
        zip(names, measure_bias(language, interfaces, student=sides[0], teacher=sides[1]), strict=True)
    )
    assert abs(found["bytes, any"].perfect) < 1e-9 < found["bytes, any"].flattened <= found["bytes, any"].true
    assert all(found[name].is_large for name in names[:-1]), found
    less_sure = oracle(language, COMPARED["bytes, any"], *sides)[1]
    assert found["bytes, any"].flattened == pytest.approx(less_sure, rel=1e-9)


def test_one_tokenizer_has_no_bias_and_keeps_all_of_the_true_distance() -> None:
    only = tokenizer_of(*grouped(2))
    language = {word: mass for word, mass in LANGUAGE.items() if word}
    found = measure_bias(language, list(COMPARED.values()), student=only, teacher=only)
    for name, bias in zip(COMPARED, found, strict=True):
        assert abs(bias.perfect) < 1e-9, name
        if name not in ("alm", "bytes, any"):
            assert bias.flattened == pytest.approx(bias.true, rel=1e-5), name


def test_a_sample_of_the_words_comes_near_to_all_of_them() -> None:
    pair = {"student": tokenizer_of(*grouped(1)), "teacher": tokenizer_of(*grouped(3))}
    language = random_language(DIGITS, 6, seed=1)
    language = spelled_by({word: mass for word, mass in language.items() if word}, *pair.values())
    (whole,), (some,) = (measure_bias(language, [COMPARED["paper"]], **pair, sampled=n) for n in (1000, 70))
    assert whole.words == some.words == 126
    assert some.perfect == pytest.approx(whole.perfect, rel=0.1)


def test_words_are_those_of_the_text_with_the_blank_before_them() -> None:
    assert words_of(["a a b\n", "a"]) == {b"a": 2 / 5, b" a": 1 / 5, b" b": 1 / 5, b"\n": 1 / 5}
    assert words_of(["x y y"], most=1) == {b" y": 1.0}
    only = tokenizer_of(*grouped(1))
    with pytest.raises(ValueError, match="fewer than two words"):
        measure_bias({b"0": 1.0}, [InterfaceConfig()], student=only, teacher=only)


def test_what_is_pointed_out() -> None:
    def is_large(perfect: float, true: float) -> bool:
        return Bias(words=9, perfect=perfect, flattened=1.0, true=true).is_large

    assert is_large(0.02, 0.1) and not is_large(0.02, 0.3) and not is_large(0.009, 0.01)
    assert not any(has_bias(InterfaceConfig(interface=name)) for name in ("kd", "sft", "scalar"))
    assert has_bias(InterfaceConfig(interface="sum"))
