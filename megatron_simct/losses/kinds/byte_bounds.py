"""The least divergence that the unresolved mass permits: the algebra of the interface `bytes`
at one byte position.

Known masses s_e, t_e of the events, divided by each model's whole, known plus unresolved u_S, u_T, are lower
bounds. The truth is s_e + a_e and t_e + b_e with 0 <= a_e <= cS_e, sum of a = u_S, and the same for b. The
loss is

    min over a, b of  sum over e of  d(s_e + a_e, t_e + b_e),      d(p, q) = q f(p / q)

It is 0, with gradient 0, where max(s, t) <= min(s + cS, t + cT) for every event and the sums of both sides
have the whole between them. Else the minimizer is the same for every convex f (f' ascends, so what can still
be moved has one ratio). With clip(x) = clip(x, 0, cap):

    A  a = clip(lo t - s), b = clip(s / hi - t), lo and hi such that the sums are u_S and u_T; right if lo <
       hi
    B  a = clip(lo (t + cT) - s), b = clip((s + cS) / hi - t); right if lo > hi
    C  else one ratio r: events with (s + cS) / t < r have a = cS, b = 0, those with s / (t + cT) > r have a =
       0, b = cT, and the rest together have the ratio r = (1 - fixed s) / (1 - fixed t)

Each sum is piecewise linear in its unknown, so a sort of the events' break points finds
where it has its value.

Gradient, by the envelope theorem: f'(r_e) for s_e, f'(lo) for u_S (f'(r) in C) and, where the student's cap
binds, f'(r_e) - f'(lo) for cS_e, which is a sum of the student's own masses.

FLOOR is added to every known mass of both models: an event that one model cannot have at all costs at most
log(1 / FLOOR) nats, and two models that agree still do.

Shapes: `P` positions, `E` events of all positions, in any order. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOOR = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Events, and what is known of them."""

    position: torch.Tensor
    """int64 [E]"""
    known: tuple[torch.Tensor, torch.Tensor]
    """[E], student and teacher."""
    caps: tuple[torch.Tensor, torch.Tensor]
    """[E]: how much of the unresolved mass an event can have."""
    unresolved: tuple[torch.Tensor, torch.Tensor]
    """[P]; with the known masses of a position they add up to 1."""

    def take(self, chosen: torch.Tensor) -> tuple[Bounds, torch.Tensor]:
        """The positions where `chosen`, bool [P], numbered anew, and which events those are, bool [E]."""
        events = chosen[self.position]
        return (
            Bounds(
                position=(chosen.cumsum(0) - 1)[self.position[events]],
                known=(self.known[0][events], self.known[1][events]),
                caps=(self.caps[0][events], self.caps[1][events]),
                unresolved=(self.unresolved[0][chosen], self.unresolved[1][chosen]),
            ),
            events,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastDivergence:
    """Values, and derivatives with respect to what the student knows."""

    values: torch.Tensor
    """[P], nats"""
    of_known: torch.Tensor
    """[E]"""
    of_unresolved: torch.Tensor
    """[P]"""
    of_caps: torch.Tensor
    """[E]"""


def least_divergence(bounds: Bounds, *, divergence: str, js_beta: float) -> LeastDivergence:
    """The minimum over all that the bounds permit, position by position."""
    num_positions, position = len(bounds.unresolved[0]), bounds.position
    values = bounds.unresolved[0].new_zeros(num_positions)
    found = LeastDivergence(
        values=values,
        of_known=torch.zeros_like(bounds.known[0]),
        of_unresolved=torch.zeros_like(values),
        of_caps=torch.zeros_like(bounds.known[0]),
    )
    (s, t), (cap_s, cap_t) = bounds.known, bounds.caps
    s, t = s + FLOOR, t + FLOOR
    total = _sums(torch.full_like(s, FLOOR), position, num_positions) + 1
    highest_floor, lowest_ceiling = torch.maximum(s, t), torch.minimum(s + cap_s, t + cap_t)
    # Value 0: every event's intervals overlap, and a common distribution fits: the highest lower bounds add
    # up to at most the total, the lowest upper bounds to at least the total.
    apart = _sums((highest_floor > lowest_ceiling).to(s.dtype), position, num_positions)
    agree = (
        (apart == 0)
        & (_sums(highest_floor, position, num_positions) <= total)
        & (_sums(lowest_ceiling, position, num_positions) >= total)
    )
    left = ~agree
    tried = (_resolved, _outer, _inner, _joint)
    # Each candidate is tried on the positions that no earlier one has solved. `part` numbers these positions
    # and their events anew; `done` and `where` select the places of its results.
    for solve in tried:
        if not bool(left.any()):
            break
        part, events = bounds.take(left)
        solved = solve(part)
        right = solved.is_right
        done = left.clone()
        done[left] = right
        chosen = right[part.position]
        where = events.clone()
        where[events] = chosen
        _write(
            found, solved, right, chosen, done, where, part.position, divergence=divergence, js_beta=js_beta
        )
        left = left & ~done
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solved:
    """Per event p, q and whether the student's cap binds; of every position the ratio below
    which it is raised.
    """

    is_right: torch.Tensor
    """bool [P]"""
    p: torch.Tensor
    q: torch.Tensor
    ratio: torch.Tensor
    """[E]: p / q; in C that of the joint events."""
    low: torch.Tensor
    """[P]"""
    bound: torch.Tensor
    """bool [E]"""


def _write(
    found: LeastDivergence,
    solved: _Solved,
    right: torch.Tensor,
    chosen: torch.Tensor,
    done: torch.Tensor,
    where: torch.Tensor,
    position: torch.Tensor,
    *,
    divergence: str,
    js_beta: float,
) -> None:
    ratio, low = solved.ratio[chosen], solved.low.clamp(min=FLOOR**2)
    slope = _slope(ratio, divergence, js_beta)
    slope_low = _slope(low, divergence, js_beta)
    # Positions that are solved now are numbered without gaps, in the order of found.values[done].
    number = right.cumsum(0) - 1
    terms = solved.q[chosen] * _value(ratio, divergence, js_beta)
    found.values[done] = _sums(terms, number[position[chosen]], int(right.sum()))
    found.of_known[where] = slope
    found.of_unresolved[done] = slope_low[right]
    found.of_caps[where] = torch.where(solved.bound[chosen], slope - slope_low[position[chosen]], 0)


def _value(r: torch.Tensor, divergence: str, beta: float) -> torch.Tensor:
    """f(r)"""
    match divergence:
        case "reverse_kl":
            return r * r.log()
        case "forward_kl":
            return -r.log()
        case "js":
            mean = beta + (1 - beta) * r
            return -beta * mean.log() + (1 - beta) * r * (r / mean).log()
        case _:
            raise AssertionError(f"unknown divergence {divergence!r}")


def _slope(r: torch.Tensor, divergence: str, beta: float) -> torch.Tensor:
    """f'(r)"""
    match divergence:
        case "reverse_kl":
            return r.log() + 1
        case "forward_kl":
            return -1 / r
        case _:
            return (1 - beta) * (r / (beta + (1 - beta) * r)).log()


def _resolved(bounds: Bounds) -> _Solved:
    """Where everything is known on both sides."""
    (s, t), unresolved = bounds.known, bounds.unresolved
    p, q = s + FLOOR, t + FLOOR
    return _Solved(
        is_right=(unresolved[0] == 0) & (unresolved[1] == 0),
        p=p,
        q=q,
        ratio=p / q,
        low=torch.ones_like(unresolved[0]),
        bound=torch.zeros_like(p, dtype=torch.bool),
    )


def _outer(bounds: Bounds) -> _Solved:
    """A"""
    (s, t), (cap_s, cap_t), position = bounds.known, bounds.caps, bounds.position
    s, t = s + FLOOR, t + FLOOR
    # lo spends the student's unresolved mass, 1 / hi the teacher's; the candidate holds if lo < hi.
    low = _level(t, s, cap_s, bounds.unresolved[0], position)
    inverse_high = _level(s, t, cap_t, bounds.unresolved[1], position)
    a, b = _clip(low[position] * t - s, cap_s), _clip(inverse_high[position] * s - t, cap_t)
    p, q = s + a, t + b
    return _Solved(
        is_right=low * inverse_high < 1,
        p=p,
        q=q,
        ratio=p / q,
        low=low,
        bound=(cap_s > 0) & (low[position] * t - s >= cap_s),
    )


def _inner(bounds: Bounds) -> _Solved:
    """B"""
    (s, t), (cap_s, cap_t), position = bounds.known, bounds.caps, bounds.position
    s, t = s + FLOOR, t + FLOOR
    top_s, top_t = s + cap_s, t + cap_t
    # As in A, with the other model at its upper bound; the candidate holds if lo > hi.
    low = _level(top_t, s, cap_s, bounds.unresolved[0], position)
    inverse_high = _level(top_s, t, cap_t, bounds.unresolved[1], position)
    a, b = _clip(low[position] * top_t - s, cap_s), _clip(inverse_high[position] * top_s - t, cap_t)
    p, q = s + a, t + b
    return _Solved(
        is_right=low * inverse_high > 1,
        p=p,
        q=q,
        ratio=p / q,
        low=low,
        bound=(cap_s > 0) & (low[position] * top_t - s >= cap_s),
    )


def _joint(bounds: Bounds) -> _Solved:
    """C"""
    (s, t), (cap_s, cap_t), position = bounds.known, bounds.caps, bounds.position
    num_positions = len(bounds.unresolved[0])
    s, t = s + FLOOR, t + FLOOR
    top_s, top_t = s + cap_s, t + cap_t
    total = _sums(torch.full_like(s, FLOOR), position, num_positions) + 1
    # total - r total - the sum of (p - r q) of the events that are not joint, which is constant + slope r
    # between break points: an event stops to be high at s / (t + cT) and begins to be low at (s + cS) / t.
    above, below = s / top_t, top_s / t
    steps = torch.cat([above, below]), torch.cat([s, -top_s]), torch.cat([-top_t, t])
    start = total - _sums(s, position, num_positions), -total + _sums(top_t, position, num_positions)
    at, constant, slope = _running(steps, torch.cat([position, position]), start)
    # The sum falls in r: the root is behind the last break point at which it is positive.
    positive = constant + slope * at[0] > 0
    last = _largest(torch.where(positive, at[0], 0), at[1], num_positions)[position]
    is_high, is_low = above > last, below <= last
    fixed = is_high | is_low
    p = torch.where(is_high, s, top_s)
    q = torch.where(is_high, top_t, t)
    fixed_p, fixed_q = (_sums(torch.where(fixed, x, 0), position, num_positions) for x in (p, q))
    rest_p, rest_q = (total - fixed_p).clamp(min=FLOOR), (total - fixed_q).clamp(min=FLOOR)
    ratio = rest_p / rest_q
    # The joint events as one each with an equal part: only their sum has a meaning.
    joint = _sums((~fixed).to(s.dtype), position, num_positions).clamp(min=1)
    p = torch.where(fixed, p, (rest_p / joint)[position])
    q = torch.where(fixed, q, (rest_q / joint)[position])
    return _Solved(
        is_right=torch.ones(num_positions, dtype=torch.bool, device=s.device),
        p=p,
        q=q,
        ratio=p / q,
        low=ratio,
        bound=is_low & (cap_s > 0),
    )


def _level(
    slope: torch.Tensor, offset: torch.Tensor, cap: torch.Tensor, target: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """[P]: the x at which the sum of clip(slope x - offset, 0, cap) over a position's events is `target` [P].

    0 where the target is; where it is more than all caps, the x at which the last of them is reached.
    """
    num_positions = len(target)
    can = cap > 0
    slope, offset = torch.where(can, slope, 0), torch.where(can, offset, 0)
    begins, ends = (torch.where(can, x / torch.where(can, slope, 1), 0) for x in (offset, offset + cap))
    # clip(slope x - offset, 0, cap) starts to rise at offset / slope and stops at (offset + cap) / slope: at
    # the first point `slope x - offset` is added, at the second it is replaced by cap.
    steps = torch.cat([begins, ends]), torch.cat([-offset, offset + cap]), torch.cat([slope, -slope])
    zero = torch.zeros_like(target)
    at, constant, gradient = _running(steps, torch.cat([position, position]), (zero, zero))
    reached = constant + gradient * at[0] < target[at[1]]
    at_last = _largest(torch.where(reached, at[0], 0), at[1], num_positions)
    last = at_last[position]
    # At the level, events before it are full, those around it move, and the others have not begun.
    full = ends <= last
    moving = (begins <= last) & ~full
    rising = _sums(torch.where(moving, slope, 0), position, num_positions)
    needed = target - _sums(torch.where(full, cap, torch.where(moving, -offset, 0)), position, num_positions)
    # Rounding must not take it beyond the two break points that it is between: others may rise a lot there.
    beyond = torch.where(at[0] > at_last[at[1]], at[0], torch.inf)
    at_next = torch.full_like(zero, torch.inf).scatter_reduce(0, at[1], beyond, "amin")
    level = torch.where(rising > 0, needed / rising, at_last).clamp(at_last, at_next)
    return torch.where(target > 0, level, 0)


def _running(
    steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Break points in order, with their positions, and constant and slope of the sum behind each of them."""
    at, constant, slope = steps
    # Sort by break point, then, stably, by position: break points ascend within each position.
    order = at.argsort()
    order = order[position[order].argsort(stable=True)]
    at, constant, slope, position = at[order], constant[order], slope[order], position[order]
    first = torch.ones_like(position, dtype=torch.bool)
    first[1:] = position[1:] != position[:-1]
    begins = first.nonzero().squeeze(1)[first.cumsum(0) - 1]
    # Running sums that begin anew at each position: less what had been summed before its first entry.
    sums = []
    for values, initial in ((constant, start[0]), (slope, start[1])):
        running = values.cumsum(0)
        before = running[begins] - values[begins]
        sums.append(running - before + initial[position])
    return (at, position), sums[0], sums[1]


def _sums(values: torch.Tensor, position: torch.Tensor, num_positions: int) -> torch.Tensor:
    return values.new_zeros(num_positions).index_add(0, position, values)


def _largest(values: torch.Tensor, position: torch.Tensor, num_positions: int) -> torch.Tensor:
    return values.new_zeros(num_positions).scatter_reduce(0, position, values, "amax")


def _clip(values: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    return torch.minimum(values.clamp(min=0), cap)
