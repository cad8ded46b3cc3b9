"""The loss that an interface has for a student that is already right, on a pair of tokenizers
and the user's texts.

The words of the texts, with their frequencies, are a small language (alignment/languages.py). Teacher and
student are exact models of it, each in the tokens of its own tokenizer: they have one distribution over
texts, so nothing is left to learn. The loss between them is the *bias* of the pair. It is 0 if the interface
leaves such a student alone.

A second student is less sure: its probabilities are proportional to p^0.8. Its true divergence from the
teacher is known, so its loss shows how much of this divergence the interface finds.

Words stand for the text: the figures leave out everything that depends on more than one word. No model runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from megatron_simct.alignment import Tokenizer, TokenTable, align
from megatron_simct.alignment.byte_bounds import Side, plan_byte_bounds
from megatron_simct.alignment.byte_events import byte_trie, plan_byte_events
from megatron_simct.alignment.languages import ExactModel, Language, divergence, flattened
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import Logits, Response, SharedVocabulary, cross_tokenizer_loss, teacher_needs
from megatron_simct.losses.kinds.bytes import log_masses, position_values
from megatron_simct.packing import pack_byte_events, pack_byte_sides
from megatron_simct.records import ByteEvents, ByteSide

COMPARED = {
    "paper": InterfaceConfig(),
    "code": InterfaceConfig(interface="code"),
    "exact": InterfaceConfig(interface="exact"),
    "strict": InterfaceConfig(interface="strict"),
    "alm": InterfaceConfig(interface="alm"),
    "bytes, longest-match": InterfaceConfig(interface="bytes"),
    "bytes, any": InterfaceConfig(interface="bytes", byte_bounds="any"),
}
"""The interfaces that build_alignment_map shows."""
_WITHOUT = ("kd", "sft", "scalar")
"""Interfaces without a bias: they need one tokenizer or no teacher, or are a policy gradient, whose
value is not a distance.
"""
_OF_A_RUN = ("drop_units", "random_units", "unit_weight", "mask_whitespace", "stop_bridge", "shared")
"""Options that act when a run makes its segments and pairs. The figure is that of their defaults."""

LIMIT, LIMIT_SHARE = 0.01, 0.1
"""Limits from which a bias is reported: nats a word, and a share of the less sure
student's true divergence.
"""
MAX_WORDS, MAX_SAMPLED, BATCH = 4000, 400, 64
FLOOR = 1e-10
"""Probability of a token that no word has at this place, for interfaces of tokens.
`bytes` has its own floor.
"""
_WORD = re.compile(r"\s?[^\s]+|\s+")


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Losses in nats a word."""

    words: int
    """Number of different words of the language."""
    perfect: float
    """The loss of a student that is the teacher's distribution."""
    flattened: float
    """The loss of a student that is less sure."""
    true: float
    """The true divergence of that student: KL(student || teacher)."""

    @property
    def is_large(self) -> bool:
        """Whether it should be reported."""
        return self.perfect > max(LIMIT, LIMIT_SHARE * self.true)

    @property
    def prefers_the_flattened(self) -> bool:
        """Whether the less sure student has the lower loss."""
        return self.flattened < self.perfect

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def has_bias(interface: InterfaceConfig) -> bool:
    """Whether an interface has this figure."""
    return interface.method().interface not in _WITHOUT


def words_of(texts: Iterable[str], *, most: int = MAX_WORDS) -> dict[bytes, float]:
    """The language of the texts' most frequent words, each with the space before it.

    Empty if the texts have no words.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    kept = counts.most_common(most)
    whole = sum(count for _, count in kept)
    return {word.encode(errors="replace"): count / whole for word, count in kept}


def spelled_by(language: Language, *tokenizers: Tokenizer) -> dict[bytes, float]:
    """The language without the words that a tokenizer changes."""
    kept = {
        word: mass
        for word, mass in language.items()
        if all(tokenizer.decode(tokenizer.encode(word)) == word for tokenizer in tokenizers)
    }
    whole = sum(kept.values())
    return {word: mass / whole for word, mass in kept.items()}


def measure_bias(
    language: Language,
    interfaces: Sequence[InterfaceConfig],
    *,
    student: Tokenizer,
    teacher: Tokenizer,
    sampled: int = MAX_SAMPLED,
    advance: Callable[[], object] = lambda: None,
) -> list[Bias]:
    """One result for each interface. The losses are means over all words, or over `sampled` of them: half are
    the likeliest words, and the others are drawn. `advance` is called num_steps(sampled) times at most.

    Interface bytes with byte_bounds "any" needs tokenizers of `with_continuations`. Raises ValueError if the
    texts have fewer than two words.
    """
    language = spelled_by(language, student, teacher)
    if len(language) < 2:
        raise ValueError(
            "the texts have fewer than two words that both tokenizers can represent; give other texts"
        )
    flat = flattened(language)
    of_teacher = ExactModel.of(language, teacher.encode, teacher.table.stop_ids[0])
    losses = np.zeros((2, len(interfaces)))
    for k, of_words in enumerate((language, flat)):
        of_student = ExactModel.of(of_words, student.encode, student.table.stop_ids[0])
        by_tokens = _ByTokens(of_student, of_teacher, student.table, teacher.table)
        by_bytes = _ByBytes(of_student, of_teacher, student, teacher)
        words, weights = _sample(of_words, sampled)
        for start in range(0, len(words), BATCH):
            some, shares = words[start : start + BATCH], weights[start : start + BATCH]
            for i, interface in enumerate(interfaces):
                of_bytes = interface.interface == "bytes"
                losses[k, i] += (by_bytes if of_bytes else by_tokens).loss(some, shares, interface)
            advance()
    true = divergence(flat, language)
    return [
        Bias(words=len(language), perfect=float(perfect), flattened=float(less_sure), true=true)
        for perfect, less_sure in losses.T
    ]


def num_steps(sampled: int = MAX_SAMPLED) -> int:
    """The number of calls of `advance`, for a progress bar."""
    return 2 * -(-sampled // BATCH)


def _sample(language: Language, count: int) -> tuple[list[bytes], np.ndarray]:
    """Words, and the weights of their losses in the mean."""
    words, masses = zip(*sorted(language.items(), key=lambda item: (-item[1], item[0])), strict=True)
    share = np.array(masses)
    if len(words) <= count:
        return list(words), share
    sure = count // 2
    rest = share[sure:].sum()
    drawn = (
        np.random.default_rng(0).choice(len(words) - sure, size=count - sure, p=share[sure:] / rest) + sure
    )
    weights = np.concatenate([share[:sure], np.full(count - sure, rest / (count - sure))])
    return [*words[:sure], *(words[i] for i in drawn)], weights


class _ByTokens:
    """Losses of the interfaces of tokens. Only ids that can have a probability get a column."""

    def __init__(
        self, of_student: ExactModel, of_teacher: ExactModel, student: TokenTable, teacher: TokenTable
    ) -> None:
        self._models = (of_student, of_teacher)
        said = [{i for row in model.next_tokens.values() for i in row} for model in self._models]
        tables = (student, teacher)
        pieces = [{table.bytes_of(i) for i in ids} for table, ids in zip(tables, said, strict=True)]
        # A token that one model alone uses is shared too, if the other's vocabulary has its bytes.
        for table, ids, others, own in zip(tables, said, pieces[::-1], pieces, strict=True):
            wanted = others - own
            ids |= set(
                {
                    piece: i for i, piece in reversed(list(enumerate(table.pieces()))) if piece in wanted
                }.values()
            )
        self._columns = [{i: column for column, i in enumerate(sorted(ids))} for ids in said]
        self._tables = [
            TokenTable.from_bytes([table.bytes_of(i) for i in column], stop_ids=[column[table.stop_ids[0]]])
            for table, column in zip(tables, self._columns, strict=True)
        ]
        self._pair = SharedVocabulary.of(*self._tables)
        student_ids = self._pair.student_ids.tolist()
        self._partner = dict(zip(student_ids, self._pair.teacher_ids.tolist(), strict=True))
        self._shared = {self._tables[0].bytes_of(i): i for i in student_ids}
        self._rows: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    def loss(self, words: Sequence[bytes], weights: np.ndarray, interface: InterfaceConfig) -> float:
        """The weighted sum of the words' losses."""
        method, defaults = interface.method(), InterfaceConfig()
        method = replace(method, **{name: getattr(defaults, name) for name in _OF_A_RUN})
        segmentation = teacher_needs(method).segmentation
        rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        labels: tuple[list[int], list[int]] = ([], [])
        segments, replaced, shares = [], [], []
        for word, weight in zip(words, weights.tolist(), strict=True):
            of_word = [
                np.array([column[i] for i in model.labels(word)], dtype=np.int32)
                for model, column in zip(self._models, self._columns, strict=True)
            ]
            found = align(self._tables[1], of_word[1], self._tables[0], of_word[0], segmentation=segmentation)
            own, others = (ids.tolist() for ids in of_word)
            for ts, te, ss, se in found.segments.tolist():
                segments.append(
                    [len(labels[1]) + ts, len(labels[1]) + te, len(labels[0]) + ss, len(labels[0]) + se]
                )
                is_pair = (te - ts, se - ss) == (1, 1) and self._partner.get(own[ss]) == others[ts]
                text = b"".join(self._tables[0].bytes_of(i) for i in own[ss:se])
                replaced.append(-1 if is_pair or segmentation == "authors" else self._shared.get(text, -1))
                shares.append(weight)
            for side, ids in enumerate((own, others)):
                rows[side].extend(self._row(side, tuple(ids[:k])) for k in range(len(ids)))
                labels[side].extend(ids)
        response = Response(
            segments=torch.tensor(segments).reshape(-1, 4),
            student_labels=torch.tensor(labels[0]),
            teacher_labels=torch.tensor(labels[1]),
            replaced_columns=torch.tensor(replaced),
            weights=torch.tensor(shares, dtype=torch.float64),
        )
        student, teacher = (Logits(torch.from_numpy(np.stack(of_side))) for of_side in rows)
        return float(cross_tokenizer_loss(student, teacher, self._pair, response, method, normalizer=1).sum)

    def _row(self, side: int, beginning: tuple[int, ...]) -> np.ndarray:
        """float64 [columns]: log-probabilities of the next token, in columns, after the
        beginning of a word.
        """
        found = self._rows.get((side, beginning))
        if found is None:
            column = self._columns[side]
            ids = list(column)
            shares = self._models[side].next_tokens[tuple(ids[k] for k in beginning)]
            found = np.full(len(column), np.log(FLOOR))
            found[[column[i] for i in shares]] = np.log(list(shares.values()))
            if not beginning:  # all words begin here; few words share any other beginning
                self._rows[side, beginning] = found
        return found


class _ByBytes:
    """Losses of interface `bytes`, whose bounds depend on the whole vocabularies. The rows are sparse."""

    def __init__(
        self, of_student: ExactModel, of_teacher: ExactModel, student: Tokenizer, teacher: Tokenizer
    ) -> None:
        self._models = (of_student, of_teacher)
        self._tokenizers = (student, teacher)
        self._rows: dict[tuple[int, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}

    def loss(self, words: Sequence[bytes], weights: np.ndarray, interface: InterfaceConfig) -> float:
        """The weighted sum of the words' losses."""
        events: list[ByteEvents] = []
        masses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        labels = [[np.array(model.labels(word), dtype=np.int32) for model in self._models] for word in words]
        for word, of_word in zip(words, labels, strict=True):
            planned = self._plan(word, of_word, interface)
            events.append(planned)
            for side, of_side in enumerate((planned.student, planned.teacher)):
                masses[side].append(self._log_masses(side, of_word[side].tolist(), of_side))
        batch = pack_byte_events(events, [own.size for own, _ in labels], masses[1])
        own = torch.cat(masses[0])
        values = position_values(own, batch, divergence=interface.divergence, js_beta=interface.js_beta)
        of_words = values.split([e.num_positions for e in events])
        return sum(
            weight * float(part.sum()) for weight, part in zip(weights.tolist(), of_words, strict=True)
        )

    def _plan(self, word: bytes, labels: list[np.ndarray], interface: InterfaceConfig) -> ByteEvents:
        text = np.frombuffer(word, dtype=np.uint8)
        student, teacher = self._tokenizers
        if interface.byte_bounds == "any":
            sides = [
                Side(table=tokenizer.table, ids=ids, continuations=tokenizer.continuations)
                for tokenizer, ids in zip(self._tokenizers, labels, strict=True)
            ]
            return plan_byte_bounds(text, stop=True, student=sides[0], teachers=sides[1:])[0]
        return plan_byte_events(
            text,
            stop=True,
            student=student.table,
            student_ids=labels[0],
            teacher=teacher.table,
            teacher_ids=labels[1],
        )

    def _log_masses(self, side: int, labels: list[int], sums: ByteSide) -> torch.Tensor:
        """float64 [E]: log mass of every slot, as the loss computes it from dense rows."""
        width = self._tokenizers[side].table.num_ids + 1
        key = sums.segment_row.astype(np.int64) * width + sums.segment_start
        segments, own = np.zeros(key.size), np.empty(len(labels))
        for row, label in enumerate(labels):
            places, shares = self._row(side, tuple(labels[:row]))
            np.add.at(segments, key.searchsorted(row * width + places, side="right") - 1, shares)
            own[row] = np.log(self._models[side].next_tokens[tuple(labels[:row])][label])
        with np.errstate(divide="ignore"):
            log_segments = torch.from_numpy(np.log(segments))
        return log_masses(log_segments, torch.from_numpy(own), pack_byte_sides([sums], [len(labels)]))

    def _row(self, side: int, beginning: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Places in byte order of the ids that may follow the beginning of a word, and
        their probabilities.
        """
        found = self._rows.get((side, beginning))
        if found is None:
            shares = self._models[side].next_tokens[beginning]
            ids = np.fromiter(shares.keys(), dtype=np.int64)
            probabilities = np.fromiter(shares.values(), dtype=np.float64)
            found = self._rows[side, beginning] = (_places(self._tokenizers[side].table)[ids], probabilities)
        return found


@lru_cache(maxsize=4)
def _places(table: TokenTable) -> np.ndarray:
    """int64 [V]: the place of each id in byte order."""
    return byte_trie(table).order.argsort()
