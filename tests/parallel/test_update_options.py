"""Options of the update, alone and together, from the same rollouts as one process without any of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from megatron_simct.job import build_job
from megatron_simct.parallel.initialize import process_groups
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.steps import train_and_record
from tests.tiny import config

INTERFACES = ("paper", "strict", "bytes")
LAYOUTS = {
    "dp2": (2, ()),
    "tp2 sp": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "pp2 interleaved": (
        2,
        ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    ),
    "pp2, three and one": (
        2,
        ("--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "1"),
    ),
    "pp3, ends without layers": (
        3,
        ("--pipeline-model-parallel-size", "3", "--pipeline-model-parallel-layout", "E|tttt|L"),
    ),
    "pp2 interleaved, given": (
        2,
        (
            *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
            *("--pipeline-model-parallel-layout", "Et|t*2|t|L"),
        ),
    ),
    "cp2": (2, ("--context-parallel-size", "2")),
    "cp2 pp2": (4, ("--context-parallel-size", "2", "--pipeline-model-parallel-size", "2")),
    "cp2, ep2": (2, ("--context-parallel-size", "2", "--expert-model-parallel-size", "2")),
    "pp2 dp2": (4, ("--pipeline-model-parallel-size", "2")),
    "ep2 dp2": (4, ("--expert-model-parallel-size", "2")),
    "ep2 etp2": (4, ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "2")),
    "tp2, ep2 etp1": (
        2,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
        ),
    ),
    "ep2": (2, ("--expert-model-parallel-size", "2")),
    "one": (1, ()),
}


def full(method: str, num_layers: int) -> tuple[str, ...]:
    """Whole layers are recomputed."""
    return (
        *("--recompute-granularity", "full", "--recompute-method", method),
        *("--recompute-num-layers", str(num_layers)),
    )


def selective(*modules: str) -> tuple[str, ...]:
    """Parts of layers are recomputed."""
    return ("--recompute-granularity", "selective", *(("--recompute-modules", *modules) if modules else ()))


@dataclass(frozen=True)
class Outcome:
    """The result of a run of two steps on one rank."""

    steps: list[tuple[float, float, float]]
    """Loss sum, labels and gradient norm."""
    weights: dict[str, torch.Tensor] = field(repr=False)
    """This rank's, after the last step."""


def _run_each(rank, world_size, folder, runs) -> list[Outcome]:
    """The outcome of each set of flags, in the same processes."""
    outcomes = []
    for flags in runs:
        resolved = config(folder, *flags)
        with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
            job = build_job(resolved, groups)
            reports = train_and_record(job)
            chunks = job.updater._chunks
            weights = {
                f"{index}.{name}": parameter.detach().clone()
                for index, chunk in enumerate(chunks)
                for name, parameter in chunk.module.named_parameters()
            }
            steps = [(r.sums["loss"], r.sums["num_labels"], r.grad_norm) for r in reports]
            outcomes.append(Outcome(steps=steps, weights=weights))
    return outcomes


@dataclass(frozen=True)
class Recorded:
    """One process without any option."""

    flags: dict[str, tuple[str, ...]]
    """By interface: the same weights, rollouts and answers of the teacher."""
    outcomes: dict[str, Outcome]


def record(files, folder, student: tuple[str, ...], interfaces=INTERFACES) -> Recorded:
    """Sample and train on one process, and keep the rollouts."""
    base = {name: (*student, "--simct-interface", name, "--micro-batch-size", "2") for name in interfaces}
    kept = {
        verb: {
            name: (
                *(f"--{verb}-debug-rollout-data", str(folder / name)),
                *(f"--{verb}-debug-scored-data", str(folder / f"{name} scored")),
            )
            for name in interfaces
        }
        for verb in ("save", "load")
    }
    (outcomes,) = run_ranks(
        1, _run_each, files, [(*flags, *kept["save"][name]) for name, flags in base.items()]
    )
    replay = {name: (*flags, *kept["load"][name]) for name, flags in base.items()}
    return Recorded(flags=replay, outcomes=dict(zip(interfaces, outcomes, strict=True)))


@pytest.fixture(scope="module")
def student(weights, tmp_path_factory) -> tuple[str, ...]:
    """Flags of a student of four layers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dense")
    save_model(folder / "student", "llama", vocab_size=360, num_hidden_layers=4)
    return (*weights[2:], "--hf-checkpoint", str(folder / "student"), "--adam-eps", "1e-4")


@pytest.fixture(scope="module")
def dense(tiny, student, tmp_path_factory) -> Recorded:
    """The same student."""
    return record(tiny, tmp_path_factory.mktemp("dense"), student)


@pytest.fixture(scope="module")
def adapted(tiny, student, tmp_path_factory) -> Recorded:
    """Adapters of the same student, in steps that a run of one step takes too."""
    flags = (*student, "--lora-rank", "4", "--lr-decay-style", "constant")
    return record(tiny, tmp_path_factory.mktemp("adapted"), flags)


@pytest.fixture(scope="module")
def experts(tiny, weights, tmp_path_factory) -> Recorded:
    """A student of two layers with four experts each."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    save_model(folder / "student", "qwen3_moe", vocab_size=360, head_dim=8, **shape)
    flags = (*weights[2:], "--hf-checkpoint", str(folder / "student"), "--adam-eps", "1e-4")
    return record(tiny, folder, flags)


def outcomes_of(
    files, recorded: Recorded, layout: str, options: tuple[tuple[str, ...], ...]
) -> Iterator[dict[str, list[Outcome]]]:
    """By rank, by interface: the outcome of the layout with each set of options."""
    world_size, flags = LAYOUTS[layout]
    runs = [(*base, *flags, *more) for base in recorded.flags.values() for more in options]
    for outcomes in run_ranks(world_size, _run_each, files, runs):
        size = len(options)
        yield {name: outcomes[i * size : (i + 1) * size] for i, name in enumerate(recorded.flags)}


def assert_agrees(outcome: Outcome, reference: Outcome, note: object) -> None:
    """Loss, labels and gradient norm of every step to 1e-5."""
    assert len(outcome.steps) == len(reference.steps) == 2
    for (loss, labels, norm), (wanted, wanted_labels, wanted_norm) in zip(
        outcome.steps, reference.steps, strict=True
    ):
        assert wanted > 0.1 and wanted_norm > 0.01 and labels == wanted_labels
        assert math.isclose(loss, wanted, rel_tol=1e-5), (note, loss, wanted)
        assert math.isclose(norm, wanted_norm, rel_tol=1e-5), (note, norm, wanted_norm)


RECOMPUTE = {
    "dp2": (
        full("uniform", 1),
        full("uniform", 2),
        full("block", 1),
        selective(),
        selective("core_attn", "mlp"),
    ),
    "tp2 sp": (full("uniform", 1), selective("mlp")),
    "pp2 interleaved": (full("uniform", 1), full("block", 1), selective()),
}


@pytest.mark.parametrize("layout", RECOMPUTE)
def test_what_is_computed_again_is_the_same_to_the_last_bit(tiny, dense, layout) -> None:
    for outcomes in outcomes_of(tiny, dense, layout, ((), *RECOMPUTE[layout])):
        for name, (plain, *again) in outcomes.items():
            assert_agrees(plain, dense.outcomes[name], (layout, name))
            for option, outcome in zip(RECOMPUTE[layout], again, strict=True):
                assert outcome.steps == plain.steps, option
                assert all(
                    torch.equal(outcome.weights[key], value) for key, value in plain.weights.items()
                ), option


def test_experts_that_are_computed_again_are_the_same(tiny, experts) -> None:
    for outcomes in outcomes_of(tiny, experts, "ep2", ((), full("uniform", 1), selective("moe"))):
        for name, (plain, *again) in outcomes.items():
            assert_agrees(plain, experts.outcomes[name], ("ep2", name))
            for outcome in again:
                assert outcome.steps == plain.steps
                assert all(torch.equal(outcome.weights[key], value) for key, value in plain.weights.items())


DISTRIBUTED = ("--use-distributed-optimizer",)
PACKED = ("--max-tokens-per-gpu", "114")
OVERLAP = (*DISTRIBUTED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "6000")
SHARED = {
    "one": (DISTRIBUTED,),
    "dp2": (DISTRIBUTED, OVERLAP, (*DISTRIBUTED, *full("uniform", 1), *PACKED)),
    "tp2 sp": (DISTRIBUTED,),
    "pp2 interleaved": (OVERLAP, (*DISTRIBUTED, *full("uniform", 1))),
    "pp2 dp2": (DISTRIBUTED,),
    "cp2 pp2": ((*DISTRIBUTED, *full("uniform", 1), *PACKED),),
    "pp2, three and one": ((),),
    "pp3, ends without layers": ((*DISTRIBUTED, *full("uniform", 1), *PACKED),),
    "pp2 interleaved, given": ((*DISTRIBUTED, *full("block", 1)),),
}


@pytest.mark.parametrize("layout", SHARED)
def test_a_shared_optimizer_takes_the_same_steps(tiny, dense, layout) -> None:
    for outcomes in outcomes_of(tiny, dense, layout, SHARED[layout]):
        for name, found in outcomes.items():
            for option, outcome in zip(SHARED[layout], found, strict=True):
                assert_agrees(outcome, dense.outcomes[name], (layout, name, option))


def test_a_shared_optimizer_of_experts_takes_the_same_steps(tiny, experts) -> None:
    overlap = ("--overlap-grad-reduce", "--ddp-bucket-size", "3000")
    options = (DISTRIBUTED, overlap, OVERLAP, (*OVERLAP, *full("uniform", 1)))
    for outcomes in outcomes_of(tiny, experts, "ep2 dp2", options):
        for name, found in outcomes.items():
            for option, outcome in zip(options, found, strict=True):
                assert_agrees(outcome, experts.outcomes[name], (name, option))


@pytest.mark.parametrize("layout", ["ep2 etp2", "tp2, ep2 etp1", "cp2, ep2"])
def test_experts_that_are_split_otherwise_than_the_rest_take_the_same_steps(tiny, experts, layout) -> None:
    options = ((), (*DISTRIBUTED, *full("uniform", 1), *PACKED))
    for outcomes in outcomes_of(tiny, experts, layout, options):
        for name, found in outcomes.items():
            for option, outcome in zip(options, found, strict=True):
                assert_agrees(outcome, experts.outcomes[name], (layout, name, option))


OTHER_ATTENTION = {
    # Larger weights than usual; otherwise the caps and the gates would hardly matter. At 0.2 the
    # gradient norm of the delta nets differs by 1e-5 of itself between CPUs, by rounding alone; at
    # 0.05 by less than 2e-6.
    "gemma2": {
        "scale": 0.2,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "qwen3_5_text": {
        "scale": 0.05,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
    }
    | {"linear_value_head_dim": 12, "layer_types": ["linear_attention", "full_attention"] * 2},
}


@pytest.mark.parametrize("family, layouts", [("gemma2", ("dp2", "cp2")), ("qwen3_5_text", ("dp2",))])
def test_other_kinds_of_attention_take_the_same_steps(tiny, weights, tmp_path, family, layouts) -> None:
    """Soft-caps and windows, and gated delta nets, which refuse context parallelism."""
    shape = {"num_hidden_layers": 4, "head_dim": 8}
    save_model(tmp_path / "student", family, vocab_size=360, **shape, **OTHER_ATTENTION[family])
    flags = (*weights[2:], "--hf-checkpoint", str(tmp_path / "student"), "--adam-eps", "1e-2")
    recorded = record(tiny, tmp_path, flags, interfaces=("paper",))
    options = ((*DISTRIBUTED, *full("uniform", 1), *PACKED), selective("mlp"))
    for layout in layouts:
        for outcomes in outcomes_of(tiny, recorded, layout, options):
            for option, outcome in zip(options, outcomes["paper"], strict=True):
                assert_agrees(outcome, recorded.outcomes["paper"], (layout, option))


@pytest.mark.parametrize("layout", ["dp2", "cp2"])
def test_adapters_of_a_shared_optimizer_resume_and_take_the_same_steps(
    tiny, adapted, tmp_path, layout
) -> None:
    """--lora-rank with --use-distributed-optimizer: a run of one step, and one that continues
    from its checkpoint.
    """
    runs = []
    for name, flags in adapted.flags.items():
        folder = str(tmp_path / name)
        flags = (*flags, *LAYOUTS[layout][1], *DISTRIBUTED)
        runs.append((*flags, "--train-iters", "1", "--save", folder))
        runs.append((*flags, "--train-iters", "2", "--load", folder))
    for outcomes in run_ranks(2, _run_each, tiny, runs):
        for name, first, resumed in zip(adapted.flags, outcomes[::2], outcomes[1::2], strict=True):
            assert len(first.steps) == len(resumed.steps) == 1
            both = Outcome(steps=first.steps + resumed.steps, weights={})
            assert_agrees(both, adapted.outcomes[name], name)
