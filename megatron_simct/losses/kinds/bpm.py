"""`bpm`: the teacher's next-token distribution over the student's tokens, at every student label.

Byte-prefix marginals (arXiv:2607.22334). With b(.) the bytes of a token, c the bytes that the student has
written since the last end of a teacher token, q the teacher's distribution there, and phi_c(w) the student's
longest token that b(w) without c begins with:

    t(u) = sum of q(w) over the teacher's tokens w with c <= b(w), phi_c(w) = u        renormalized over the u
    loss = D(t || p) over the student's tokens, one row a label

"<=" is "is a prefix of". Where the student's token s goes on beyond the realized teacher token, t(s) is the
probability of the realized path to its end, taken from the token that the path began as:

    t(s) = q_j(w_j) * prod q_k(w_k) * sum of q(w) over r <= b(w)     r: the rest of s; before renormalizing

--simct-child-weight L adds the child term of ESCD (arXiv:2609.34738). The teacher's tokens without
a student token of the same bytes form groups g by common prefixes; y is the shortest token of a group. If the
student sampled s at the start of a segment, the row behind s gets, for every group whose y is s and then r:

    loss = loss - L sum over g of M(g) log sum of p(u) over r <= b(u)        M(g) = sum of q(w) over w in g

Of the teacher's tokens the k most likely of each row are read (teacher_topk.py), and the sampled one. Forward
KL or js: a target is 0 for most tokens, where reverse KL is infinite. The target knows where the student's
text ends a teacher token, so "goes on or stops here" gets what the student itself does as its target; and
where the student has the longer tokens, the mass of all texts but the sampled one goes to a short token.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from megatron_simct.alignment.translation import Translation
from megatron_simct.losses.kinds.teacher_topk import (
    Event,
    Likely,
    all_rows,
    as_entries,
    log_events,
    per_segment,
)
from megatron_simct.losses.rows import Interface, RowNeeds, Rows, RowValues
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY
from megatron_simct.records import EntryBatch


def targets_of_labels(
    segments: Sequence[Sequence[int]],
    labels: tuple[Sequence[int], Sequence[int]],
    likely: Likely,
    translation: Translation,
) -> EntryBatch:
    """Arguments as of `events_of_segments` in teacher_topk.py. An entry's teacher_log_probs is log t."""
    student, teacher, stops = translation.student, translation.teacher, translation.stop_teacher_ids
    stop_cell = -1 if translation.stop_student_id is None else translation.stop_student_id

    def masses(row: Mapping[int, float], behind: bytes) -> dict[int, float]:
        """What the teacher's tokens give each student token, not normalized; the stop tokens are one."""
        found: dict[int, float] = {}
        for token, log_q in row.items():
            piece = teacher[token]
            if token in stops:
                cell = -1 if behind else stop_cell
            elif not behind:
                cell = translation.begins[token]
            else:
                cell = translation.longest_prefix(piece[len(behind) :]) if piece.startswith(behind) else -1
            if cell >= 0:
                found[cell] = found.get(cell, 0.0) + math.exp(log_q)
        return found

    found = []
    for a, (ts, te, ss, se) in enumerate(segments):
        theirs = labels[1][ts:te]
        text = b"".join(teacher[i] for i in theirs)
        # Offsets are in bytes from the segment's start: ends[j] is where teacher token j ends, `at` where the
        # student's label begins.
        ends = list(itertools.accumulate(len(teacher[i]) for i in theirs))
        at = 0
        for label in range(ss, se):
            token = labels[0][label]
            # j: the teacher token that spells byte `at`; its row is conditioned on the text up to `start`, so
            # of its tokens those count that begin with text[start:at].
            j = min(bisect.bisect_right(ends, at), len(theirs) - 1)
            start, end = ends[j] - len(teacher[theirs[j]]), at + len(student[token])
            mass = masses(likely.rows[ts + j], text[start:at])
            if end > ends[j]:
                # Teacher tokens j .. inside - 1 end within the student's token; `left` are the bytes of it
                # behind them, which the teacher's next token must begin with.
                inside = bisect.bisect_right(ends, end)
                left = text[ends[inside - 1] : end]
                path = math.exp(math.fsum(likely.own_log_probs[ts + j : ts + inside]))
                if left:
                    row = likely.rows[ts + inside].items()
                    path *= math.fsum(math.exp(log_q) for w, log_q in row if teacher[w].startswith(left))
                # The realized path leaves the student token that its first bytes alone would give it to.
                cell = translation.longest_prefix(text[at : ends[j]])
                if cell >= 0:
                    mass[cell] = max(0.0, mass[cell] - path)
                mass[token] = mass.get(token, 0.0) + path
            total = math.fsum(mass.values())
            found += [(a, label, label, u, math.log(m / total)) for u, m in mass.items() if m > 0]
            at = end
    return as_entries(found)


def with_children(
    segments: Sequence[Sequence[int]],
    labels: tuple[Sequence[int], Sequence[int]],
    likely: Likely,
    translation: Translation,
) -> EntryBatch:
    """`targets_of_labels`, and behind them the tokens of the child term, of which teacher_log_probs is
    log M.
    """
    targets = targets_of_labels(segments, labels, likely, translation)
    found: list[Event] = []
    groups: list[int] = []
    num_groups = 0
    for a, (ts, _, ss, _) in enumerate(segments):
        # Only teacher tokens that begin with the student's first token and go on have children.
        sampled = translation.student[labels[0][ss]]
        if not sampled or ss + 1 == len(labels[0]):
            continue
        masses: dict[bytes, float] = {}
        for token, log_q in likely.rows[ts].items():
            y = translation.roots[token]
            if y.startswith(sampled) and y != sampled:
                masses[y] = masses.get(y, 0.0) + math.exp(log_q)
        for y, mass in masses.items():
            tokens = translation.beginning_with(y[len(sampled) :])
            if tokens and mass > 0:
                found += [(a, ss + 1, ss + 1, u, math.log(mass)) for u in tokens]
                groups += [num_groups] * len(tokens)
                num_groups += 1
    children, alone = as_entries(found), torch.full_like(targets.label, -1)
    both = {one.name: [getattr(side, one.name) for side in (targets, children)] for one in fields(EntryBatch)}
    both["group"] = [alone, torch.tensor(groups, dtype=torch.int64)]
    return EntryBatch(**{name: torch.cat(parts) for name, parts in both.items()})


def value(rows: Rows) -> RowValues:
    """[A]: the divergences of each segment's labels, added up."""
    log_p, log_t, entries = log_events(rows)
    is_target = (
        torch.ones_like(entries.label, dtype=torch.bool) if entries.group is None else entries.group < 0
    )
    p, t, beta = log_p.exp(), log_t.exp(), rows.config.js_beta
    others: torch.Tensor | float = 0.0
    if rows.config.divergence == "forward_kl":
        terms = t * (log_t - log_p)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_p + math.log1p(-beta))
        terms = beta * t * (log_t - log_m) + (1 - beta) * p * (log_p - log_m)
        # Tokens without a target: (1 - beta) p log(p / m) with m = (1 - beta) p; their p is what the others
        # leave of 1.
        has_target = torch.zeros_like(rows.log_probs).index_add(0, entries.label, is_target.to(p.dtype)) > 0
        left = rows.total(has_target.to(p.dtype), "student") - per_segment(
            torch.where(is_target, p, 0), entries, rows
        )
        others = -(1 - beta) * math.log1p(-beta) * left
    if entries.group is not None:
        terms = torch.where(
            is_target, terms, rows.config.child_weight * _children(log_p, log_t, entries.group)
        )
    return RowValues(value=per_segment(terms, entries, rows) + others)


def _children(log_p: torch.Tensor, log_mass: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[E]: the child term of each group, at its first entry; 0 elsewhere."""
    of_group = group + 1  # 0 is what has no group
    size = (len(group) + 1,)
    # Log-sum-exp over each group, relative to the largest of its entries.
    maxima = log_p.new_full(size, NEGATIVE_INFINITY)
    largest = maxima.scatter_reduce(0, of_group, log_p.detach(), "amax")[of_group]
    sums = log_p.new_zeros(size).index_add(0, of_group, (log_p - largest).exp())[of_group]
    # Entries of a group are side by side: the first is one whose predecessor has another group.
    is_first = (group >= 0) & (group != torch.cat([group.new_full((1,), -1), group[:-1]]))
    return torch.where(is_first, -log_mass.exp() * (sums.log() + largest), 0)


BPM = Interface(
    needs=all_rows,
    reads=frozenset(
        {
            "divergence",
            "js_beta",
            "teacher_topk",
            "child_weight",
            "unit_weight",
            "mask_whitespace",
            "stop_bridge",
        }
    ),
    # The row behind a segment may be in no segment.
    rows=lambda config: RowNeeds(
        first_rows=False, shared=False, dense="labels" if config.child_weight else "segments", entries=True
    ),
    value=value,
    entries=lambda config: with_children if config.child_weight else targets_of_labels,
)
