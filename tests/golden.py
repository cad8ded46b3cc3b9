"""Sample G0: two toy vocabularies, one response, and the expected result of every interface.

The student writes "ha" "ppy" " cat" <eos>, the teacher "hap" "py" " cat" <|im_end|>: one unit of two tokens
on both sides, one shared token, and the stop tokens. Logits are small fractions from a formula, so that
anyone can recompute them.
"""

from __future__ import annotations

import numpy as np

STUDENT_TOKENS = ("ha", "ppy", " cat", " the", "x", "<eos>", "h", "p")
TEACHER_TOKENS = ("hap", "py", " cat", " the", "x", "<|im_end|>", "h", "y", "p")
SHARED_PAIRS = ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 8))
"""(student id, teacher id), the stop pair (5, 5) among them."""

STUDENT_LABELS = (0, 1, 2, 5)
TEACHER_LABELS = (0, 1, 2, 5)
SEGMENTS = ((0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 4))
"""(ts, te, ss, se): the byte-exact minimal units."""
KINDS = (1, 0, 2)
"""UNIT, SHARED, STOP."""

_P = np.arange(4)[:, None]
STUDENT_LOGITS = ((7 * _P + 3 * np.arange(8)) % 11) / 4 - 1
TEACHER_LOGITS = ((5 * _P + 2 * np.arange(9) + 1) % 13) / 4 - 1

STUDENT_LSE = (2.664224, 2.639266, 2.680710, 2.732826)
TEACHER_LSE = (2.764528, 3.193775, 3.196185, 2.836027)

PAPER_ROWS = (0.741519, 0.293230, 0.551692)
LOSS = {
    ("paper", "reverse_kl", 1.0): 0.396610,
    ("paper", "forward_kl", 1.0): 0.468304,
    ("paper", "js", 1.0): 0.095336,
    ("paper", "reverse_kl", 2.0): 0.114886,
    ("strict", "reverse_kl", 1.0): 0.211230,
}
"""(interface, divergence, temperature) -> sum over rows / 4 labels; js with beta = .5."""

BYTES = {"reverse_kl": 0.833321, "forward_kl": 2.426343, "js": 0.214977}
"""divergence -> sum over byte positions / 4 labels, with every probability floored at 1e-8."""
BYTES_POSITIONS = (0.645330, 0.369621, 0, 0.496810, 0, 0.602705, 0.549142, 0, 0, 0.669675)
"""reverse_kl. At positions 2 and 4 the teacher or the student is inside a token that cannot end there."""
WALK = ((0, 3, 0, 3), (3, 4, 3, 4))
"""The segments of the released walk on G0: the unit includes the shared token that follows it."""
OTHER_LOSSES = {
    ("code", "reverse_kl", 1.0, "authors"): 0.321500,
    ("code", "reverse_kl", 2.0, "authors"): 0.094687,
    ("code", "forward_kl", 1.0, "authors"): 0.420118,
    ("code_gh", "reverse_kl", 1.0, "authors"): 0.321500,
    ("sum", "reverse_kl", 1.0, "minimal"): 0.412004,
    ("alm", "reverse_kl", 1.0, "minimal"): 0.358705,
    ("alm", "reverse_kl", 1.0, "authors"): 0.202014,
}
"""(interface, divergence, temperature, segments) -> loss, as in method 7.2."""
