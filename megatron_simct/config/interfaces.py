"""The interfaces by name: what each compares, who published it, and when it is known to harm.

`--help`, the first lines of the log and `tools/check_pair.py` show this; the algebra is in
megatron_simct/losses/kinds/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Interface = Literal[
    "paper", "code", "exact", "strict", "strict_topk", "uld", "alm", "scalar", "partition", "topk_kl", "bpm",
    "bytes", "kd", "sft", "reward", "sum", "code_gh", "no_unit_loss", "random_unit",
]  # fmt: skip
"""Methods, then older names of variants (`VARIANTS`)."""

_LEAVES_U = "probability outside the compared tokens costs nothing (watch student_mass_outside_u)"
_SPLIT = (
    "if the student needs several tokens for one teacher token, a correct first token is pushed down; "
    f"{_LEAVES_U}"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One value of --simct-interface."""

    text: str
    """What is compared."""
    source: str
    failure: str = ""
    """When it is known to harm; "" if no such case is known."""
    teacher: bool = True
    """Whether it needs a teacher."""


METHODS = {
    "paper": Method(
        text="shared tokens plus the realised multi-token unit, mean log-probability; every minimal unit",
        source="SimCT, arXiv:2605.07711, Eq. 6-9",
        failure=_SPLIT,
    ),
    "code": Method(
        text="the units and raw logits of the released code; shared tokens by --simct-shared",
        source="SimCT's released code",
        failure=f"{_SPLIT}; a constant added to the logits of a unit's inner position changes the loss",
    ),
    "exact": Method(
        text="a partition of events: each shared token, the unit, and the rest, with their probabilities",
        source="this project",
        failure="if the student needs several tokens for one teacher token, only the probability of all of "
        "them together counts",
    ),
    "strict": Method(
        text="shared tokens at 1:1 positions only",
        source="arXiv:2610.08448",
        failure=f"multi-token units have no loss without --simct-span-mse; {_LEAVES_U}",
    ),
    "strict_topk": Method(
        text="strict over the student's --simct-topk likeliest shared tokens",
        source="arXiv:2610.08448",
        failure=f"multi-token units have no loss; {_LEAVES_U}",
    ),
    "uld": Method(
        text="both distributions sorted, at 1:1 positions",
        source="the distance of arXiv:2402.12030, which pairs positions by number",
        failure="it compares how large the largest probabilities are, not which tokens have them",
    ),
    "alm": Method(
        text="the probability of each unit's bytes, as one event",
        source="arXiv:2503.20083",
        failure="it judges only the sampled text, not its alternatives",
    ),
    "scalar": Method(
        text="one advantage for each unit, divided among its tokens for a policy gradient (--simct-scalar)",
        source="DPCA, arXiv:2606.09456; MOPD-x of NeMo-RL",
        failure="it judges only the sampled text, and how a unit's advantage is divided is a guess",
    ),
    "partition": Method(
        text="1:1, 1:n, m:1 segments as partitions: the teacher's --simct-teacher-topk likeliest tokens, and "
        "the rest",
        source="NeMo-RL, pull request 4177; CSD, arXiv:2610.28895",
        failure="in multi-token units it compares a path of several tokens with a single token of the "
        "other model",
    ),
    "topk_kl": Method(
        text="generalised KL over the teacher's --simct-teacher-topk likeliest tokens at 1:1 positions",
        source="MOPD, arXiv:2606.30406, Eq. 5",
        failure="multi-token units have no loss, nor have tokens outside the k",
    ),
    "bpm": Method(
        text="byte-prefix marginals: the teacher's distribution, rewritten over the student's tokens, at "
        "every "
        "label",
        source="arXiv:2607.22334",
        failure=(
            "the target of 'continue or stop' is the student's own choice; if the student has the longer "
            "tokens, a short token gets their probability"
        ),
    ),
    "bytes": Method(
        text="distributions over the next byte",
        source="this project",
        failure=(
            "with --simct-byte-bounds longest-match it is biased for tokenizers that do not always take the "
            "longest token; with any it is a lower bound, which is 0 for some wrong students too"
        ),
    ),
    "kd": Method(text="the whole vocabulary of one common tokenizer", source="arXiv:1503.02531"),
    "sft": Method(
        text="cross entropy on given responses, no teacher", source="maximum likelihood", teacher=False
    ),
    "reward": Method(
        text="policy gradient of --reward alone, no comparison, no teacher",
        source="GRPO, arXiv:2402.03300",
        teacher=False,
    ),
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("paper", {"unit_score": "sum"}),
    "code_gh": ("code", {"min_teacher_mass": 0.5}),
    "no_unit_loss": ("paper", {"drop_units": "rho"}),
    "random_unit": ("paper", {"random_units": "rho"}),
}
"""Older name -> method, and the options it sets, to a value or to that of --simct-rho."""


def interface_help() -> str:
    """A line for each method: what it compares, its source, its known failure; then the older names."""
    lines = []
    for name, method in METHODS.items():
        failure = f"; known failure: {method.failure}" if method.failure else ""
        lines.append(f"{name}: {method.text} ({method.source}){failure}")
    for name, (method_name, changes) in VARIANTS.items():
        flags = " ".join(
            f"--simct-{field.replace('_', '-')} {'RHO' if value == 'rho' else value}"
            for field, value in changes.items()
        )
        lines.append(f"{name}: older name of {method_name} {flags}")
    lines.append(
        "If the two tokenizers group digits differently, all of them but bytes change even a perfect "
        "student; bpm with forward_kl does so only if the student has the longer tokens "
        "(docs/perfect_student.md). tools/check_pair.py measures this for your pair and text"
    )
    return "\n".join(lines)
