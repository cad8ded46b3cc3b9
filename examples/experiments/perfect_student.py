"""Which interfaces do not change a perfect student: exact small languages and the package's own loss.

    python examples/experiments/perfect_student.py    # the table of docs/perfect_student.md, both directions
    python examples/experiments/perfect_student.py --interface bytes --pair 1,3

The language is a random distribution over the texts of up to three binary digits. Two tokenizers group up
to K digits from the left. The perfect student IS the teacher's distribution over texts, in its own
tokens. Each cell is

    G, D0 -> D1

G is the norm of the expected gradient over all of the perfect student's logits; texts are weighted as it
samples them. D is the total variation between the two models' distributions over texts: D0 for a student that
is disturbed by noise of --noise nats on every logit, D1 after --steps of Adam on its own samples (in
expectation: every text with its probability). An interface whose G is not 0 moves a student that is already
right. An interface whose D1 does not fall does not learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_simct.alignment import TokenTable, align, continuations
from megatron_simct.alignment.languages import ExactModel, Language, longest_match, random_language
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import Logits, Response, SharedVocabulary, cross_tokenizer_loss, teacher_needs

DIGITS, LENGTH = (b"0", b"1"), 3
PAIRS = ((3, 1), (1, 3), (3, 2), (2, 3), (1, 1))
"""Number of digits that teacher and student group."""
KINDS = {
    "bytes": InterfaceConfig(interface="bytes"),
    "bytes, forward": InterfaceConfig(interface="bytes", divergence="forward_kl"),
    "bytes, any": InterfaceConfig(interface="bytes", byte_bounds="any"),
    "bytes, any, forward": InterfaceConfig(interface="bytes", byte_bounds="any", divergence="forward_kl"),
    "paper": InterfaceConfig(),
    "paper, forward": InterfaceConfig(divergence="forward_kl"),
    "sum": InterfaceConfig(unit_score="sum"),
    "code": InterfaceConfig(interface="code"),
    "exact": InterfaceConfig(interface="exact"),
    "exact, forward": InterfaceConfig(interface="exact", divergence="forward_kl"),
    "strict": InterfaceConfig(interface="strict"),
    "strict_topk": InterfaceConfig(interface="strict_topk", topk=2),
    "uld": InterfaceConfig(interface="uld", uld_topk=0),
    "alm": InterfaceConfig(interface="alm"),
    "partition, forward": InterfaceConfig(interface="partition", divergence="forward_kl"),
    "partition": InterfaceConfig(interface="partition"),
    "topk_kl": InterfaceConfig(interface="topk_kl"),
    "bpm, forward": InterfaceConfig(interface="bpm", divergence="forward_kl"),
    "bpm, forward, child": InterfaceConfig(interface="bpm", divergence="forward_kl", child_weight=1),
    "scalar, dpca": InterfaceConfig(interface="scalar"),
    "scalar, spread": InterfaceConfig(interface="scalar", scalar="spread"),
}


def pieces_of(group: int) -> list[bytes]:
    """The end of a text, and every group of up to `group` digits."""
    groups, longest = [b""], [b""]
    for _ in range(group):
        longest = [piece + digit for piece in longest for digit in DIGITS]
        groups += longest
    return groups


@dataclass(frozen=True)
class Side:
    """One model of a language, as a table of logits: a row for each beginning of a text."""

    pieces: list[bytes]
    texts: list[list[int]]
    """The labels of each text of the language."""
    rows: list[list[int]]
    """The row that predicts each of them."""
    logits: torch.Tensor
    """float64 [beginnings, V]: the perfect model's logits."""

    @staticmethod
    def of(language: Language, group: int) -> Side:
        """The perfect model."""
        pieces = pieces_of(group)
        model = ExactModel.of(language, longest_match(pieces), 0)
        texts = [model.labels(text) for text in language]
        index: dict[tuple[int, ...], int] = {}
        for labels in texts:
            for k in range(len(labels)):
                index.setdefault(tuple(labels[:k]), len(index))
        logits = torch.zeros(len(index), len(pieces), dtype=torch.float64)
        rows = [[index[tuple(labels[:k])] for k in range(len(labels))] for labels in texts]
        for text, of_text in zip(language, rows, strict=True):
            logits[of_text] = torch.from_numpy(model.logits(text, len(pieces)))
        return Side(pieces, texts, rows, logits)

    def log_masses(self, logits: torch.Tensor) -> torch.Tensor:
        """[texts]: the log-probability of each text in the tokenizer's own tokens."""
        log_p = logits.log_softmax(1)
        return torch.stack(
            [log_p[rows, labels].sum() for rows, labels in zip(self.rows, self.texts, strict=True)]
        )


class Comparison:
    """One interface between two models of one language."""

    def __init__(self, language: Language, config: InterfaceConfig, *, teacher: int, student: int) -> None:
        self.masses = torch.tensor(list(language.values()), dtype=torch.float64)
        self.student, self.teacher = Side.of(language, student), Side.of(language, teacher)
        tables = [TokenTable.from_bytes(side.pieces, stop_ids=[0]) for side in (self.student, self.teacher)]
        known = (continuations.longest_match(tables[0]), continuations.longest_match(tables[1]))
        self.pair, self.config = replace(SharedVocabulary.of(*tables), continuations=known), config
        needs = teacher_needs(config)
        self.responses = []
        for labels_s, labels_t in zip(self.student.texts, self.teacher.texts, strict=True):
            response = Response.of(self.pair, student_labels=labels_s, teacher_labels=labels_t)
            if needs.segmentation == "authors":
                ids = (np.array(labels, dtype=np.int32) for labels in (labels_t, labels_s))
                found = align(tables[1], next(ids), tables[0], next(ids), segmentation="authors")
                segments = torch.from_numpy(found.segments.astype(np.int64))
                response = Response(
                    segments=segments,
                    student_labels=response.student_labels,
                    teacher_labels=response.teacher_labels,
                )
            self.responses.append(response)
        if not needs.byte_events:
            self.whole = _joined(self.responses)
            self.counts = torch.tensor([len(response.segments) for response in self.responses])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The expected loss of a text. Texts are weighted as the student samples them; these
        weights are constants.
        """
        student, teacher = self.student, self.teacher
        weights = student.log_masses(logits).exp().detach()
        if not teacher_needs(self.config).byte_events:
            response = Response(
                segments=self.whole.segments,
                student_labels=self.whole.student_labels,
                teacher_labels=self.whole.teacher_labels,
                replaced_columns=self.whole.replaced_columns,
                weights=weights.repeat_interleave(self.counts),
            )
            rows_s, rows_t = (sum(side.rows, []) for side in (student, teacher))
            sides = Logits(logits[rows_s]), Logits(teacher.logits[rows_t])
            return cross_tokenizer_loss(*sides, self.pair, response, self.config, normalizer=1).loss
        return self.one_by_one(logits, weights)

    def one_by_one(self, logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the texts' losses, with a call for each: `bytes` reads one
        response at a time.
        """
        student, teacher = self.student, self.teacher
        total = logits.new_zeros(())
        for weight, response, rows_s, rows_t in zip(
            weights, self.responses, student.rows, teacher.rows, strict=True
        ):
            sides = Logits(logits[rows_s]), Logits(teacher.logits[rows_t])
            found = cross_tokenizer_loss(*sides, self.pair, response, self.config, normalizer=1)
            total = total + weight * found.loss
        return total

    def gradient_norm(self) -> float:
        """The gradient of the expected loss, at the perfect student."""
        logits = self.student.logits.clone().requires_grad_()
        self.loss(logits).backward()
        return float(logits.grad.norm()) if logits.grad is not None else 0.0

    def distance(self, logits: torch.Tensor) -> float:
        """Total variation between the student's texts and the language. Other spellings of the student count
        as distant from every text.
        """
        masses = self.student.log_masses(logits).exp().detach()
        return float(((masses - self.masses).abs().sum() + (1 - masses.sum()).abs()) / 2)

    def learnt(self, *, steps: int, noise: float, lr: float = 0.03) -> tuple[float, float]:
        """The distance before and after."""
        generator = torch.Generator().manual_seed(0)
        perfect = self.student.logits
        logits = perfect + noise * torch.randn(perfect.shape, generator=generator, dtype=torch.float64)
        before = self.distance(logits)
        logits.requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(logits).backward()
            optimizer.step()
        return before, self.distance(logits.detach())


def _joined(responses: Iterable[Response]) -> Response:
    """The responses, one after another."""
    segments, student, teacher, replaced = [], [], [], []
    at = torch.zeros(4, dtype=torch.int64)
    for response in responses:
        segments.append(response.segments + at)
        student.append(response.student_labels)
        teacher.append(response.teacher_labels)
        none = torch.full((len(response.segments),), -1)
        replaced.append(none if response.replaced_columns is None else response.replaced_columns)
        at = at + torch.tensor([len(response.teacher_labels)] * 2 + [len(response.student_labels)] * 2)
    return Response(
        segments=torch.cat(segments),
        student_labels=torch.cat(student),
        teacher_labels=torch.cat(teacher),
        replaced_columns=torch.cat(replaced),
    )


def rows(
    names: Iterable[str], pairs: Iterable[tuple[int, int]], *, steps: int, noise: float
) -> Iterator[str]:
    """The rows of the table."""
    language = random_language(DIGITS, LENGTH, seed=0)
    for name in names:
        cells = []
        for teacher, student in pairs:
            comparison = Comparison(language, KINDS[name], teacher=teacher, student=student)
            before, after = comparison.learnt(steps=steps, noise=noise)
            norm = comparison.gradient_norm()
            size = f"{norm:.0e}" if norm < 1e-3 else f"{norm:.2f}"
            cells.append(f"{size}, {before:.3f} -> {after:.3f}")
        yield f"| `{name}` | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--interface",
        choices=KINDS,
        nargs="+",
        default=list(KINDS),
        help="interfaces of the table (default: all)",
    )
    parser.add_argument(
        "--pair",
        nargs="+",
        default=[f"{t},{s}" for t, s in PAIRS],
        help="TEACHER,STUDENT: number of digits that each tokenizer groups",
    )
    parser.add_argument(
        "--steps", type=int, default=150, help="steps of Adam, learning rate .03 (default: 150)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, help="noise on every logit, in nats (default: 0.5)"
    )
    options = parser.parse_args()
    pairs = [(int(t), int(s)) for t, s in (pair.split(",") for pair in options.pair)]
    torch.set_num_threads(1)
    print("| interface | " + " | ".join(f"teacher {t} -> student {s}" for t, s in pairs) + " |")
    print("|---" * (len(pairs) + 1) + "|")
    for row in rows(options.interface, pairs, steps=options.steps, noise=options.noise):
        print(row, flush=True)


if __name__ == "__main__":
    main()
