"""The interfaces by name: what each compares, who published it, and when it is known to harm.

`--help`, the log's first lines and `tools/check_pair.py` say this; the algebra is in
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

_LEAVES_U = "mass that leaves the compared tokens costs nothing (watch student_mass_outside_u)"
_SPLIT = (
    "a right first token is pushed down where the student spells in several tokens what the teacher says in "
    f"one; {_LEAVES_U}"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One value of --simct-interface."""

    text: str
    """What is compared."""
    source: str
    failure: str = ""
    """When it is known to harm; "" if that is not known."""
    teacher: bool = True
    """Whether it compares with one."""


METHODS = {
    "paper": Method(
        text="shared tokens plus the realised multi-token unit, mean log-probability; every minimal unit",
        source="SimCT, arXiv:2605.07711, Eq. 6-9",
        failure=_SPLIT,
    ),
    "code": Method(
        text="the released walk's units, raw logits; shared tokens by --simct-shared",
        source="SimCT's released code",
        failure=f"{_SPLIT}; a constant added to the logits of a unit's inner position changes the loss",
    ),
    "exact": Method(
        text="a partition of events: each shared token, the unit, and the rest, with their probabilities",
        source="this project",
        failure="where the student spells in several tokens what the teacher says in one, only its whole "
        "path counts",
    ),
    "strict": Method(
        text="shared tokens at 1:1 positions only",
        source="arXiv:2610.08448",
        failure=f"units of several tokens teach nothing; {_LEAVES_U}",
    ),
    "strict_topk": Method(
        text="strict over the student's --simct-topk likeliest shared tokens",
        source="arXiv:2610.08448",
        failure=f"units of several tokens teach nothing; {_LEAVES_U}",
    ),
    "uld": Method(
        text="both distributions sorted, at 1:1 positions",
        source="the distance of arXiv:2402.12030, which pairs positions by number",
        failure="which token has a probability is not compared, only how large the largest ones are",
    ),
    "alm": Method(
        text="the probability of each unit's bytes, as one event",
        source="arXiv:2503.20083",
        failure="only what was sampled is judged: nothing says what else could have been said",
    ),
    "scalar": Method(
        text="one number a unit, spread over its tokens as advantages of a policy gradient (--simct-scalar)",
        source="DPCA, arXiv:2606.09456; MOPD-x of NeMo-RL",
        failure="only what was sampled is judged, and how a unit's number is shared out is a guess",
    ),
    "partition": Method(
        text="1:1, 1:n, m:1 segments as partitions: the teacher's --simct-teacher-topk likeliest tokens, and "
        "the rest",
        source="NeMo-RL, pull request 4177; CSD, arXiv:2610.28895",
        failure="in units of several tokens a path of one model is compared with a whole token of the other",
    ),
    "topk_kl": Method(
        text="generalised KL over the teacher's --simct-teacher-topk likeliest tokens at 1:1 positions",
        source="MOPD, arXiv:2606.30406, Eq. 5",
        failure="units of several tokens teach nothing, and what is not among the k is left alone",
    ),
    "bpm": Method(
        text="byte-prefix marginals: the teacher's distribution rewritten over the student's tokens at every "
        "label",
        source="arXiv:2607.22334",
        failure=(
            "whether the text goes on or stops gets the student's own answer as its target; where the "
            "student has the longer tokens, a short token gets the mass"
        ),
    ),
    "bytes": Method(
        text="distributions over the next byte",
        source="this project",
        failure=(
            "with --simct-byte-bounds longest-match it is biased for byte-pair merges that are not "
            "longest-match; with any it is a lower bound, 0 for some students that are not right too"
        ),
    ),
    "kd": Method(text="the whole vocabulary of one common tokenizer", source="arXiv:1503.02531"),
    "sft": Method(
        text="cross entropy on given responses, no teacher", source="maximum likelihood", teacher=False
    ),
    "reward": Method(
        text="no comparison and no teacher: the policy gradient of --reward alone",
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
"""Older name -> method, and the fields it sets: to a value, or to that of --simct-rho."""


def interface_help() -> str:
    """One line a method: what it compares, its source, its known failure; then the older names."""
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
        "Where the tokenizers group digits differently, each of them but bytes moves even a perfect student; "
        "bpm with forward_kl only where the student has the longer tokens (docs/perfect_student.md). "
        "tools/check_pair.py measures it on your pair and text"
    )
    return "\n".join(lines)
