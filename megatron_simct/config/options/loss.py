"""Options of the loss: --simct-*"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_simct.config.interfaces import VARIANTS, Interface, interface_help
from megatron_simct.config.options.declare import option

Divergence = Literal["reverse_kl", "forward_kl", "js"]


@dataclass(frozen=True, kw_only=True)
class InterfaceConfig:
    """How the two models' next-token distributions are compared. Flags: --simct-*"""

    interface: Interface = option("paper", interface_help())
    divergence: Divergence = option(
        "reverse_kl",
        "KL(student || teacher), KL(teacher || student), or the generalised Jensen-Shannon divergence",
    )
    temperature: float = option(
        1.0, "divides the row's scores before the softmax over U; no squared factor", above=0
    )
    js_beta: float = option(
        0.5,
        "weight of the teacher in the mixture of --simct-divergence js",
        above=0,
        below=1,
        note=": at the ends the divergence vanishes; use --simct-divergence reverse_kl or forward_kl for the "
        "limits",
    )
    alm_temperature: float = option(
        float("inf"),
        "temperature of the binary events of interface alm; inf: the limit",
        above=0,
        infinite=True,
    )
    topk: int = option(16, "shared tokens that strict_topk compares in a row", at_least=1)
    teacher_topk: int = option(
        64, "partition, topk_kl and bpm: likeliest tokens of the teacher in a row", at_least=1
    )
    child_weight: float = option(
        0.0,
        "bpm: weight of ESCD's child term: behind a token that the teacher would have gone on from within "
        "one of its own, the probability of going on so",
        at_least=0,
    )
    uld_topk: int = option(
        1024, "largest probabilities of each model that uld compares one by one; 0: all", at_least=0
    )
    unit_score: Literal["mean", "sum"] = option(
        "mean", "score of a multi-token unit in paper: the mean of its log-probabilities, or their sum"
    )
    span_mse: float = option(
        0.0,
        "strict: weight of the squared difference of both models' log-probabilities of each multi-token unit",
        at_least=0,
    )
    scalar: Literal["dpca", "spread"] = option(
        "dpca",
        "scalar: how a unit's number is shared out, in proportion to the student's own log-probs, or evenly",
    )
    drop_units: float = option(
        0.0,
        "ablation: share of the multi-token units whose loss paper leaves out, at random",
        at_least=0,
        at_most=1,
    )
    random_units: float | None = option(
        None,
        "ablation: paper with this share of the 1:1 positions joined to the next one as units, in place of "
        "real units",
        at_least=0,
        at_most=1,
    )
    unit_weight: Literal["one", "student_length"] = option(
        "one", "what the loss of a multi-token unit is multiplied by: 1, or the number of its student tokens"
    )
    mask_whitespace: bool = option(
        False, "leave out segments that are blanks only, where the models differ only because of tokenization"
    )
    min_teacher_mass: float = option(
        0.0,
        "leave out segments where the teacher gives the compared tokens and the unit together less than this",
        at_least=0,
        at_most=1,
    )
    byte_bounds: Literal["any", "longest-match"] = option(
        "longest-match",
        "what interface bytes assumes of the tokenizers where a model's probability of the next byte is "
        "known in part: any: nothing, the loss is the least divergence that the unknown part permits; "
        "longest-match: always the longest token, which biases the loss of others",
    )
    shared: Literal["bytes", "released"] = option(
        "bytes",
        "tokens that code takes for shared: bytes: of equal bytes; released: of equal strings in both "
        "tokenizer.json, 'Ġ' read as '▁', as SimCT's released code has it: fewer pairs, and some of "
        "different bytes",
    )
    stop_bridge: bool = option(
        True, "compare the stop tokens, the student's with all of the teacher's as one"
    )
    rho: float = option(0.5, "RHO of the older names no_unit_loss and random_unit", at_least=0, at_most=1)
    interface_seed: int = option(0, "seed of --simct-drop-units and --simct-random-units")
    loss_memory_mib: int = option(
        128,
        "what the loss may hold of logits at a time, in MiB: sets how many columns of the vocabulary a tile "
        "has",
    )

    def method(self) -> InterfaceConfig:
        """The same with an older name of a variant spelled as its method and the values of its fields."""
        if self.interface not in VARIANTS:
            return self
        name, changes = VARIANTS[self.interface]
        values: dict[str, Any] = {
            field: self.rho if value == "rho" else value for field, value in changes.items()
        }
        return replace(self, **values | {"interface": name})
