"""The child term of ESCD (arXiv:2609.34738) in float64, by looking at every pair of tokens.

Of the teacher's content tokens that no student token spells, two are connected if the bytes of one begin
those of the other. M(g) is the teacher's probability of a connected component g at the first row of a
segment, y(g) its shortest bytes. Where the student's token a there is a proper prefix of y(g), with r what is
left of it:

    loss = - sum over g of M(g) log sum of p(u) over u with r <= b(u)

with p at the row behind a; without such a u there is no term.
"""

from __future__ import annotations

import torch

from tests.oracles.reference import Sample


def components(sample: Sample) -> list[set[int]]:
    """Teacher ids from 2 on are content, student ids from 1 on."""
    spelled = set(sample.student_pieces[1:])
    left = {w for w in range(2, len(sample.teacher_pieces)) if sample.teacher_pieces[w] not in spelled}
    found = []
    while left:
        reached, edge = set(), {min(left)}
        while edge:
            reached |= edge
            pieces = [sample.teacher_pieces[w] for w in edge]
            edge = {
                w
                for w in left - reached
                if any(
                    p.startswith(sample.teacher_pieces[w]) or sample.teacher_pieces[w].startswith(p)
                    for p in pieces
                )
            }
        left -= reached
        found.append(reached)
    return found


def child_loss(sample: Sample, student_logits: torch.Tensor, *, k: int) -> torch.Tensor:
    """The sum over segments with their weights. The teacher has its k likeliest tokens of each row, and
    the sampled tokens.
    """
    log_p, log_q = student_logits.log_softmax(1), sample.teacher_logits.log_softmax(1)
    total, groups = 0 * student_logits.sum(), components(sample)
    for (ts, _, ss, _), weight in zip(sample.segments, sample.weights, strict=True):
        chosen = set(log_q[ts].topk(min(k, log_q.shape[1])).indices.tolist()) | {sample.teacher_labels[ts]}
        said = sample.student_pieces[sample.student_labels[ss]]
        if sample.student_labels[ss] == 0 or ss + 1 >= len(sample.student_labels) or weight == 0:
            continue
        for group in groups:
            mass = sum(float(log_q[ts, w].exp()) for w in group & chosen)
            shortest = min((sample.teacher_pieces[w] for w in group), key=len)
            if mass == 0 or not shortest.startswith(said) or shortest == said:
                continue
            rest = shortest[len(said) :]
            fitting = [u for u, piece in enumerate(sample.student_pieces) if u and piece.startswith(rest)]
            if fitting:
                total = total - weight * mass * log_p[ss + 1, fitting].exp().sum().log()
    return total
