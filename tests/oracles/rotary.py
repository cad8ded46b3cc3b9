"""Frequencies of YaRN and the rotation of pairs, in float64 with plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def yarn_frequencies(
    dim: int, *, theta: float, factor: float, length: int, fast: float, slow: float, truncate: bool
) -> list[float]:
    """f_i = theta^(-2i/dim) if wave i turns more than `fast` times within `length` positions, f_i / factor if
    it turns less than `slow` times, and between the two a mixture that is linear in i (YaRN,
    arXiv:2309.00071, as published models use it: the i are rounded outwards if truncate).
    """

    def turns(i: float) -> float:
        return length * theta ** (-2 * i / dim) / (2 * math.pi)

    def crossing(times: float) -> float:
        below, above = -9.0 * dim, 9.0 * dim  # turns fall in i
        for _ in range(200):
            middle = (below + above) / 2
            below, above = (middle, above) if turns(middle) > times else (below, middle)
        return below

    first, last = crossing(fast), crossing(slow)
    if truncate:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, dim - 1.0)
    found = []
    for i in range(dim // 2):
        share = min(1.0, max(0.0, (i - first) / ((last - first) or 0.001)))
        plain = theta ** (-2 * i / dim)
        found.append(plain * (1 - share) + plain / factor * share)
    return found


def apply_rotary(
    x: Sequence[float], position: int, frequencies: Sequence[float], *, interleaved: bool
) -> list[float]:
    """Pairs of the first entries of x, as complex numbers, multiplied by e^(i position f)."""
    out, half = list(x), len(frequencies)
    for i, f in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        number = complex(x[a], x[b]) * complex(math.cos(position * f), math.sin(position * f))
        out[a], out[b] = number.real, number.imag
    return out
