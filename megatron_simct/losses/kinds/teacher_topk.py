"""`partition` and `topk_kl`: the teacher's k likeliest tokens of a row, by id, as events of both models.

They need no more of a teacher than an inference service gives. An event is one student token behind some
student labels, and one teacher token behind some teacher labels, which together spell the same bytes.

`partition` (prefix-bidirectional partition KL: NeMo-RL, pull request 4177; CSD, arXiv:2610.28895), with q the
teacher:

    segment    event                          P_S                        P_T
    1:1        b(u) = b(t)                    p(u)                       q(t)
    1:n        b(u) = b(t_1 .. t_n-1) b(t)    p(u)                       prod_j<n q(t_j) q(t)
    m:1        b(s_1 .. s_m-1) b(u) = b(t)    prod_i<m p(s_i) p(u)       q(t)
    m:n        the sampled tokens alone

The tokens t are the teacher's k most likely of that row and always the sampled one; REST = 1 - sum. The loss
of a segment is the divergence of the two partitions; published with forward KL and js. A student's path of
several tokens is a prefix ("goes on with 0"), a teacher's token is not ("0, and no more of this token"):
behind a path the events are not the same events, so the loss moves a perfect student.

`topk_kl` (generalised KL, arXiv:2606.30406, Eq. 5), at 1:1 segments over the events (u, t), not renormalized:

    sum p(u) (log p(u) - log q(t)) - p(u) + q(t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_simct.alignment.translation import Translation
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.records import AlignedPair, EntryBatch, Rollout, ScoredPair, TeacherNeeds

Event = tuple[int, int, int, int, float]
"""Segment, first label of the student's path, its last label, its last token, log P_T."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """A teacher's log-probabilities for one response, by token id."""

    rows: Mapping[int, Mapping[int, float]]
    """For each teacher label whose row was requested: token -> log-probability, descending; the label itself
    is always among them.
    """
    own_log_probs: Sequence[float]
    """The log-probability of every teacher label."""

    @staticmethod
    def of(
        asked: Sequence[int],
        ids: torch.Tensor,
        log_probs: torch.Tensor,
        labels: Sequence[int],
        own_log_probs: torch.Tensor,
    ) -> Likely:
        """asked [R]: the labels of the rows; ids and log_probs [R, k]; labels and own_log_probs [M]."""
        own = own_log_probs.tolist()
        of_rows = zip(asked, ids.tolist(), log_probs.tolist(), strict=True)
        rows = {m: dict(zip(tokens, row, strict=True)) | {labels[m]: own[m]} for m, tokens, row in of_rows}
        return Likely(rows=rows, own_log_probs=own)


def events_of_segments(
    segments: Sequence[Sequence[int]],
    labels: tuple[Sequence[int], Sequence[int]],
    likely: Likely,
    translation: Translation,
) -> EntryBatch:
    """labels: student's and teacher's. Segments whose last row was not asked for have no events."""
    student, teacher, same = translation.student, translation.teacher, translation.same
    stop_s, stops_t = translation.stop_student_id, translation.stop_teacher_ids
    found: list[Event] = []
    for a, (ts, te, ss, se) in enumerate(segments):
        if te - 1 not in likely.rows:
            continue
        # The distributions of the last tokens, behind the realized tokens before them (`before`: log-
        # probability of the teacher's).
        own, theirs, row = labels[0][ss:se], labels[1][ts:te], likely.rows[te - 1]
        before = math.fsum(likely.own_log_probs[ts : te - 1])
        log_q = {own[-1]: row[theirs[-1]]}
        if len(own) == len(theirs) == 1:
            # 1:1: tokens of equal bytes; all stop tokens of the teacher are one event.
            stop = [math.exp(value) for token, value in row.items() if token in stops_t]
            if stop and stop_s is not None and (own[-1] == stop_s or theirs[-1] not in stops_t):
                log_q[stop_s] = math.log(math.fsum(stop))
            for token, value in row.items():
                if token != theirs[-1] and same[token] >= 0:
                    log_q.setdefault(same[token], value)
        elif len(own) == 1 or len(theirs) == 1:
            # 1:n or m:1: a teacher token counts if what it spells, from the segment's start on, is the
            # student's tokens before the last one and then a token of the student's vocabulary.
            behind_t = b"".join(teacher[i] for i in theirs[:-1])
            behind_s = b"".join(student[i] for i in own[:-1])
            for token, value in row.items():
                spelled = behind_t + teacher[token]
                if token == theirs[-1] or not teacher[token] or not spelled.startswith(behind_s):
                    continue
                last = translation.student_of_bytes.get(spelled[len(behind_s) :])
                if last is not None:
                    log_q.setdefault(last, value)
        found += [(a, ss, se - 1, last, before + value) for last, value in log_q.items()]
    return as_entries(found)


def response_entries(
    build: Callable[..., EntryBatch],
    translation: Translation,
    rollout: Rollout,
    pair: AlignedPair,
    scored: ScoredPair,
) -> EntryBatch:
    """The entries of one response of a run. build: the function of Interface.entries."""
    assert scored.topk is not None and scored.topk_ids is not None, "asked for by TeacherNeeds.token_ids"
    labels = pair.teacher_ids.tolist()
    likely = Likely.of(
        pair.teacher_rows.tolist(), scored.topk_ids, scored.topk, labels, scored.own_logit - scored.lse
    )
    return build(pair.segments.tolist(), (rollout.label_ids.tolist(), labels), likely, translation)


def as_entries(events: Sequence[Event]) -> EntryBatch:
    """On the CPU."""
    columns = list(zip(*events, strict=True)) or [()] * 5
    segment, start, label, column = (torch.tensor(values, dtype=torch.int64) for values in columns[:4])
    masses = torch.tensor(columns[4], dtype=torch.float64)
    return EntryBatch(segment=segment, start=start, label=label, column=column, teacher_log_probs=masses)


def log_events(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, EntryBatch]:
    """[E] each: log P_S, differentiable, and log P_T."""
    entries = rows.labels.entries
    assert entries is not None, "check_labels refuses labels without entries"
    # path[k]: the log-probability of the labels before k; an entry's path is labels [start, label).
    path = torch.cat([rows.log_probs.new_zeros(1), rows.log_probs.cumsum(0)])
    log_sums = rows.statistics.label_max[entries.label] + rows.log_sums[entries.label]
    log_p = rows.entries - log_sums + path[entries.label] - path[entries.start]
    return log_p, entries.teacher_log_probs.to(log_p.dtype), entries


def per_segment(values: torch.Tensor, entries: EntryBatch, rows: Rows) -> torch.Tensor:
    """[E] -> [A]: added up over the events of each row's segment."""
    return values.new_zeros(len(rows.segments)).index_add(0, entries.segment, values)[rows.chosen]


def partition(rows: Rows) -> RowValues:
    """[A]. Both rests are at least what sums to 1 are rounded by: below that their ratio is noise."""
    log_p, log_q, entries = log_events(rows)
    least = 64 * torch.finfo(log_p.dtype).eps
    rest_p, rest_q = (
        (1 - per_segment(x.exp(), entries, rows)).clamp(min=least).log() for x in (log_p, log_q)
    )
    value = per_segment(_terms(log_p, log_q, rows.config), entries, rows) + _terms(
        rest_p, rest_q, rows.config
    )
    return RowValues(value=value)


def _terms(log_p: torch.Tensor, log_q: torch.Tensor, config: InterfaceConfig) -> torch.Tensor:
    """What each event adds to the divergence."""
    p, q, beta = log_p.exp(), log_q.exp(), config.js_beta
    match config.divergence:
        case "reverse_kl":
            return p * (log_p - log_q)
        case "forward_kl":
            return q * (log_q - log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)


def topk_kl(rows: Rows) -> RowValues:
    """[A]"""
    log_p, log_q, entries = log_events(rows)
    return RowValues(
        value=per_segment(log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp(), entries, rows)
    )


def all_rows(config: InterfaceConfig) -> TeacherNeeds:
    """The needs of interfaces that compare tokens at every label."""
    return TeacherNeeds(hidden_rows="all", topk=config.teacher_topk, token_ids=True)


PARTITION = Interface(
    needs=all_rows,
    reads=frozenset(
        {"divergence", "js_beta", "teacher_topk", "unit_weight", "mask_whitespace", "stop_bridge"}
    ),
    rows=lambda config: RowNeeds(first_rows=False, shared=False, dense="segments", entries=True),
    value=partition,
    entries=lambda config: events_of_segments,
)
TOPK_KL = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="one_to_one", topk=config.teacher_topk, token_ids=True),
    reads=frozenset({"teacher_topk", "mask_whitespace", "stop_bridge"}),
    rows=lambda config: RowNeeds(units=False, first_rows=False, shared=False, dense="segments", entries=True),
    value=topk_kl,
    entries=lambda config: events_of_segments,
)
