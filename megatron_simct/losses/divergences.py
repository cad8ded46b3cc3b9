"""Divergences between the two models' distributions over a row's columns, from vocabulary-parallel scores.

A row has many columns that are spread over ranks and tiles (shared tokens) and a few that every rank knows (a
unit, a rest). With log p and log q the two models' log-probabilities of a column, each divergence is a sum
over columns:

    reverse_kl   KL(p || q)     the paper's (SimCT, arXiv:2605.07711, Eq. 9)
    forward_kl   KL(q || p)
    js           b KL(q || m) + (1 - b) KL(p || m),   m = b q + (1 - b) p

For the gradient a row needs D = d(value)/dp of each column, up to a constant of the row, which a distribution
(sum of p is 1) does not see:

    reverse_kl   D = log p - log q          forward_kl   D = -q / p          js   D = log(p / m), times 1 - b

Where p is a softmax of scores, d(value)/d(score) = p (D - offset) with offset = sum p D over the row: KL, -1
and so on.

Sums over the many columns are of scores relative to the row's largest, s - m_s and t - m_t, so that the large
common part is gone before anything is added:

    Z_s = sum e^(s - m_s),   Z_t = sum e^(t - m_t)
    X = sum e^(s - m_s) ((s - m_s) - (t - m_t)),      or, for forward_kl, with s and t exchanged

Maxima grow from tile to tile; what was summed before is rescaled. Ranks are joined the same way: one MAX, one
SUM. js needs log p and log q first, so its sums take another look at the tiles and one reduction more.

A column of probability zero adds nothing to a value it weights (0 log 0 = 0); nan goes through everywhere.

Shapes: `A` rows, `c` columns of a tile, `E` columns that every rank knows.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import torch

from megatron_simct.losses import bodies
from megatron_simct.losses.vocab_parallel import NEGATIVE_INFINITY, finite_reference, row_maxima


class RunningSums:
    """Z_s, Z_t and X of each row, over the columns seen so far."""

    def __init__(self, num_rows: int, *, divergence: str, temperature: float, like: torch.Tensor) -> None:
        self.student_max = like.new_full((num_rows,), NEGATIVE_INFINITY)
        self.teacher_max = self.student_max.clone()
        self.teacher_at_top = self.student_max.clone()
        """The teacher's score of the student's likeliest column."""
        names = ["z_s", "z_t"]
        if divergence != "js":
            names.append("cross")
        if temperature != 1:
            # Masses are sums of e^(temperature * score); at temperature 1 these are Z_s and Z_t.
            names += ["mass_s", "mass_t"]
        self.sums = {name: like.new_zeros(num_rows) for name in names}
        self._divergence, self._temperature = divergence, temperature

    def at(self, rows: slice) -> RunningSums:
        """Views of a slice of the rows."""
        part = copy(self)
        for name in ("student_max", "teacher_max", "teacher_at_top"):
            setattr(part, name, getattr(self, name)[rows])
        part.sums = {name: values[rows] for name, values in self.sums.items()}
        return part

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """student, teacher [A, c]: scores of a tile. Both are overwritten."""
        if student.shape[1] == 0:
            return
        # Of the student's likeliest column so far the teacher's score: it moves when the maximum rises.
        largest, where = student.max(dim=1, keepdim=True)
        rises = largest.squeeze(1) > self.student_max
        at_top = teacher.gather(1, where).squeeze(1)
        self.teacher_at_top.copy_(torch.where(rises, at_top, self.teacher_at_top))
        new_s = torch.maximum(self.student_max, largest.squeeze(1))
        new_t = torch.maximum(self.teacher_max, row_maxima(teacher))
        self.rescale(new_s, new_t)
        s = student.sub_(finite_reference(new_s).unsqueeze(1))
        t = teacher.sub_(finite_reference(new_t).unsqueeze(1))
        sums = self.sums
        if self._temperature != 1:
            sums["mass_s"].add_((s * self._temperature).exp_().sum(1))
            sums["mass_t"].add_((t * self._temperature).exp_().sum(1))
        # From here on s and t are relative to the new maxima, and the older sums are too.
        weights_s, weights_t = s.exp(), t.exp()
        sums["z_s"].add_(weights_s.sum(1))
        sums["z_t"].add_(weights_t.sum(1))
        if self._divergence == "reverse_kl":
            sums["cross"].add_(weighted_(weights_s, s.sub_(t)).sum(1))
        elif self._divergence == "forward_kl":
            sums["cross"].add_(weighted_(weights_t, t.sub_(s)).sum(1))

    def rescale(self, new_s: torch.Tensor, new_t: torch.Tensor) -> None:
        """Make the sums relative to larger maxima."""
        # X holds differences s - t: if the maxima rise by d_s and d_t, each difference falls by d_s - d_t and
        # each weight is multiplied by e^-d_s.
        rise_s, factor_s = _rise(self.student_max, new_s)
        rise_t, factor_t = _rise(self.teacher_max, new_t)
        sums = self.sums
        if self._divergence == "reverse_kl":
            sums["cross"].sub_(sums["z_s"] * (rise_s - rise_t)).mul_(factor_s)
        elif self._divergence == "forward_kl":
            sums["cross"].sub_(sums["z_t"] * (rise_t - rise_s)).mul_(factor_t)
        sums["z_s"].mul_(factor_s)
        sums["z_t"].mul_(factor_t)
        if self._temperature != 1:
            sums["mass_s"].mul_((-rise_s * self._temperature).exp())
            sums["mass_t"].mul_((-rise_t * self._temperature).exp())
        self.student_max.copy_(new_s)
        self.teacher_max.copy_(new_t)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Normalizers of a row: log p = (s - student_max) - student_log_z. Each is [A]."""

    student_max: torch.Tensor
    teacher_max: torch.Tensor
    student_log_z: torch.Tensor
    teacher_log_z: torch.Tensor

    def at(self, rows: slice) -> Norms:
        """The norms of a slice of the rows."""
        return Norms(**{name: getattr(self, name)[rows] for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSums:
    """Sums over columns of a row, from which value and offset follow. Each is [A]."""

    p: torch.Tensor
    """The student's probability of the columns."""
    q: torch.Tensor
    """The teacher's."""
    term: torch.Tensor
    """reverse_kl: sum p (log p - log q); forward_kl: sum q (log q - log p); js: -sum p log((1 - b) p / m)."""
    teacher_term: torch.Tensor
    """js: -sum q log(b q / m); else unused."""

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


def shared_sums(
    sums: dict[str, torch.Tensor], norms: Norms, deficits: list[torch.Tensor], divergence: str
) -> ColumnSums:
    """Over the columns of RunningSums; `deficits` are those of `mean_deficits`, summed over ranks, for js."""
    shrink_s, shrink_t = (-norms.student_log_z).exp(), (-norms.teacher_log_z).exp()
    p, q = sums["z_s"] * shrink_s, sums["z_t"] * shrink_t
    # log p - log q = (s - t) - lead, so sum p (log p - log q) = e^-student_log_z (X - Z_s lead).
    lead = norms.student_log_z - norms.teacher_log_z
    match divergence:
        case "reverse_kl":
            return ColumnSums(p=p, q=q, term=shrink_s * (sums["cross"] - sums["z_s"] * lead), teacher_term=p)
        case "forward_kl":
            return ColumnSums(p=p, q=q, term=shrink_t * (sums["cross"] + sums["z_t"] * lead), teacher_term=p)
        case "js":
            return ColumnSums(**dict(zip(ColumnSums.__slots__, deficits, strict=True)))
    raise AssertionError(f"unknown divergence {divergence!r}")


def known_sums(log_p: torch.Tensor, log_q: torch.Tensor, divergence: str, beta: float) -> ColumnSums:
    """Over columns [A, E] that every rank knows; a column with -inf for both models is ignored."""
    p, q = log_p.exp(), log_q.exp()
    teacher_term = p.sum(1)
    match divergence:
        case "reverse_kl":
            term = weighted_(log_p.exp(), log_p - log_q).sum(1)
        case "forward_kl":
            term = weighted_(log_q.exp(), log_q - log_p).sum(1)
        case "js":
            _, _, term, teacher_term = mean_deficits(log_p, log_q, beta)
    return ColumnSums(p=p.sum(1), q=q.sum(1), term=term, teacher_term=teacher_term)


def value_of(total: ColumnSums, divergence: str, beta: float) -> torch.Tensor:
    """[A]: the divergence of two distributions, from the sums over all their columns.

    js divides its means by the probabilities that were summed with them: what rounding leaves of 1 would be
    multiplied by deficits far larger than the value.
    """
    if divergence != "js":
        return total.term
    constant = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    return constant - (1 - beta) * total.term / total.p - beta * total.teacher_term / total.q


def mean_of_derivative(total: ColumnSums, divergence: str, beta: float) -> torch.Tensor:
    """[A]: sum p D over the columns of `total`."""
    match divergence:
        case "reverse_kl":
            return total.term
        case "forward_kl":
            return -total.q
    return -total.term / total.p


def known_gradient(
    log_p: torch.Tensor, log_q: torch.Tensor, offset: torch.Tensor, divergence: str, beta: float
) -> torch.Tensor:
    """[A, E]: p (D - offset) of columns that every rank knows, without `factor_of`; offset [A]."""
    offset = offset.unsqueeze(1)
    match divergence:
        case "reverse_kl":
            return weighted_(log_p.exp(), log_p - log_q - offset)
        case "forward_kl":
            return log_p.exp() * -offset - log_q.exp()
    return weighted_(log_p.exp(), -_deficit(log_p, log_q, 1 - beta) - offset)


def factor_of(divergence: str, beta: float) -> float:
    """The factor of D that is applied last: for js, differences of deficits are taken before it."""
    return 1 - beta if divergence == "js" else 1.0


def score_gradient_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    norms: Norms,
    *,
    offset: torch.Tensor,
    scale: torch.Tensor,
    divergence: str,
    beta: float,
) -> torch.Tensor:
    """[A, c]: scale p (D - offset), in place of a tile's student scores; the teacher's are overwritten too.

    offset, scale [A]; `factor_of` is part of the scale. Rows of scale 0 give 0, also where D is infinite.
    """
    s = student.sub_(norms.student_max.unsqueeze(1))
    t = teacher.sub_(norms.teacher_max.unsqueeze(1))
    log_z_s, log_z_t = norms.student_log_z.unsqueeze(1), norms.teacher_log_z.unsqueeze(1)
    offset, scale = offset.unsqueeze(1), scale.unsqueeze(1)
    match divergence:
        case "reverse_kl":
            derivative = torch.sub(s, t, out=t).sub_(log_z_s - log_z_t + offset)
            return weighted_(s.sub_(log_z_s).exp_().mul_(scale), derivative)
        case "forward_kl":
            # p (D - offset) with D = -q / p: there is no division, p may be 0.
            return s.sub_(log_z_s).exp_().mul_(-offset).sub_(t.sub_(log_z_t).exp_()).mul_(scale)
    log_p, log_q = s.sub_(log_z_s), t.sub_(log_z_t)
    derivative = _deficit(log_p, log_q, 1 - beta).add_(offset).neg_()
    return weighted_(log_p.exp_().mul_(scale), derivative)


def mean_deficits(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, ...]:
    """The fields of ColumnSums for js over columns [A, c]; each [A].

    KL(p || m) = -log(1 - b) - the mean deficit of log p/m from that bound. Where the models hardly overlap,
    the gradient is made of small differences of deficits, which log p - log m would round away.
    """
    p, q = log_p.exp(), log_q.exp()
    sums = p.sum(1), q.sum(1)
    student, teacher = _deficit(log_p, log_q, 1 - beta), _deficit(log_q, log_p, beta)
    return *sums, weighted_(p, student).sum(1), weighted_(q, teacher).sum(1)


def weighted_(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights * values, and 0 where the weight is 0: the value may be infinite or inf - inf there. nan
    weights stay.

    `weights` is overwritten and returned.
    """
    if bodies.by_blocks(weights.device) and weights.numel() > 0 and weights.amin() > 0:
        return weights.mul_(values)  # the common case: one look at the weights in place of a mask
    nothing = weights == 0
    return weights.mul_(values).masked_fill_(nothing, 0)


def _deficit(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(1 + (1 - share) b / (share a)): by how much log(a / m), m = share a + (1 - share) b,
    is below -log(share).
    """
    relative = log_b - log_a + math.log((1 - share) / share)
    return torch.logaddexp(relative, torch.zeros_like(relative))


def _rise(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rise of the maxima, e^-rise); (0, 0) where the old maximum is -inf."""
    none = old == NEGATIVE_INFINITY
    rise = torch.where(none, 0, new - old)
    return rise, torch.where(none, 0, (-rise).exp())
