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
        1.0,
        "the scores are divided by this before the softmax over the shared tokens; the loss is not "
        "multiplied by its square",
        above=0,
    )
    js_beta: float = option(
        0.5,
        "weight of the teacher in the mixture of --simct-divergence js",
        above=0,
        below=1,
        note="; at 0 and 1 the divergence is 0; for the limits use --simct-divergence reverse_kl or "
        "forward_kl",
    )
    alm_temperature: float = option(
        float("inf"),
        "alm: temperature of the binary events; inf: the limit",
        above=0,
        infinite=True,
    )
    topk: int = option(
        16,
        "strict_topk: how many of the student's likeliest shared tokens are compared at each position",
        at_least=1,
    )
    teacher_topk: int = option(
        64,
        "partition, topk_kl, bpm: how many of the teacher's likeliest tokens are read at each position",
        at_least=1,
    )
    child_weight: float = option(
        0.0,
        "bpm: weight of ESCD's child term: the probability that the text goes on as the teacher's longer "
        "tokens do, after a student token that ends inside them",
        at_least=0,
    )
    uld_topk: int = option(
        1024, "uld: how many of the largest probabilities of each model are compared; 0: all", at_least=0
    )
    unit_score: Literal["mean", "sum"] = option(
        "mean", "paper: score of a multi-token unit: the mean of its log-probabilities, or their sum"
    )
    span_mse: float = option(
        0.0,
        "strict: weight of the squared difference between the two models' log-probabilities of each "
        "multi-token unit",
        at_least=0,
    )
    scalar: Literal["dpca", "spread"] = option(
        "dpca",
        "scalar: how the advantage of a unit is divided among its tokens: dpca: in proportion to the "
        "student's log-probabilities; spread: evenly",
    )
    drop_units: float = option(
        0.0,
        "paper, for ablations: share of the multi-token units whose loss is left out, at random",
        at_least=0,
        at_most=1,
    )
    random_units: float | None = option(
        None,
        "paper, for ablations: replace the real units by random ones: this share of the 1:1 positions is "
        "joined to the next position",
        at_least=0,
        at_most=1,
    )
    unit_weight: Literal["one", "student_length"] = option(
        "one", "factor of the loss of a multi-token unit: 1, or its number of student tokens"
    )
    mask_whitespace: bool = option(
        False, "leave out segments of white space only, where the models differ only because of tokenization"
    )
    min_teacher_mass: float = option(
        0.0,
        "leave out segments if the teacher's probability of the compared tokens and the unit together is "
        "below this",
        at_least=0,
        at_most=1,
    )
    byte_bounds: Literal["any", "longest-match"] = option(
        "longest-match",
        "bytes: what to assume of the tokenizers if a probability of the next byte is known only in part: "
        "any: nothing, the loss is the smallest divergence that the unknown part allows; longest-match: "
        "each tokenizer always takes the longest token, which biases the loss for tokenizers that do not",
    )
    shared: Literal["bytes", "released"] = option(
        "bytes",
        "code: which tokens are shared: bytes: tokens with the same bytes; released: tokens with the same "
        "string in both tokenizer.json files ('Ġ' is read as '▁'), as in SimCT's released code: fewer "
        "pairs, and some of them have different bytes",
    )
    stop_bridge: bool = option(
        True,
        "compare the student's stop token with all stop tokens of the teacher, taken as one",
    )
    rho: float = option(0.5, "RHO of the older names no_unit_loss and random_unit", at_least=0, at_most=1)
    interface_seed: int = option(0, "seed of --simct-drop-units and --simct-random-units")
    loss_memory_mib: int = option(
        128,
        "memory for logits in the loss, in MiB; it determines how many columns of the vocabulary are in a "
        "tile",
    )

    def method(self) -> InterfaceConfig:
        """The same configuration, with the older name of a variant replaced by its method and options."""
        if self.interface not in VARIANTS:
            return self
        name, changes = VARIANTS[self.interface]
        values: dict[str, Any] = {
            field: self.rho if value == "rho" else value for field, value in changes.items()
        }
        return replace(self, **values | {"interface": name})


@dataclass(frozen=True, kw_only=True)
class TermsConfig:
    """Terms that are added to the loss of a step."""

    given_share: float | None = option(
        None,
        "share of the prompts of a step whose response is given by its row (--response-key) and not "
        "sampled; these rows train by cross entropy, the others by --simct-interface",
        above=0,
        below=1,
    )
    sft_weight: float | None = option(
        None,
        "weight of the mean cross entropy over the labels of the --given-share rows; it is added to the mean "
        "loss over the sampled labels; default: 1",
        above=0,
    )
    reference_kl_weight: float = option(
        0.0,
        "add this number times KL(student || student at the start of the run), over the whole vocabulary, "
        "mean over the sampled labels; the weights of the start stay on the student's ranks; 0: no such term",
        at_least=0,
    )
