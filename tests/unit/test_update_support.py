"""Combinations that the options of the update do not support are refused, with the flag and the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import ParallelConfig, UpdateConfig
from megatron_simct.models.build import check_divides, layers_of_stages
from megatron_simct.models.delta_net import DeltaNet
from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.families import Architecture
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.layers import Layer
from megatron_simct.models.rotary import Rope
from megatron_simct.parallel.initialize import check_layout
from megatron_simct.preflight.memory import Sizes, stage_layers
from megatron_simct.update.support import check_support, model_fields

LAYER = Layer(
    attention=GroupedQuery(heads=4, groups=2, head_dim=16, scale=0.25),
    mlp=Dense(width=48),
    rope=Rope(theta=1e4, dim=16),
)
DENSE = Architecture(
    layers=(LAYER,) * 6,
    hidden_size=32,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    tied_embeddings=False,
    init_std=0.02,
)
EXPERTS = replace(DENSE, layers=(replace(LAYER, mlp=Experts(count=4, width=48, chosen=2)),) * 6)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers")


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--recompute-granularity", "full"],
            "needs --recompute-method and --recompute-num-layers; uniform and 1",
        ),
        (["--recompute-num-layers", "1"], "--recompute-num-layers need --recompute-granularity full"),
        ([*SELECTIVE[:2], "--recompute-method", "block"], "need --recompute-granularity full"),
        (["--recompute-modules", "mlp"], "--recompute-modules needs --recompute-granularity selective"),
    ],
)
def test_options_that_contradict_each_other(argv, words) -> None:
    with pytest.raises(ValueError, match=words):
        parse_config(argv).update.check()


@pytest.mark.parametrize(
    "argv, architecture, parallel, message",
    [
        (
            [*SELECTIVE, "layernorm"],
            DENSE,
            {},
            "layernorm: megatron-core implements it with TransformerEngine",
        ),
        ([*SELECTIVE, "moe"], DENSE, {}, "--recompute-modules moe: no experts in --hf-checkpoint X; use mlp"),
        (
            [*SELECTIVE, "mlp"],
            EXPERTS,
            {},
            "--recompute-modules mlp: the layers of --hf-checkpoint X have experts",
        ),
        ([*FULL, "4"], DENSE, {}, "--recompute-num-layers 4: .* must divide the layers of each .* one has 6"),
        ([*FULL, "2"], DENSE, {"pipeline_model_parallel_size": 4}, "--recompute-num-layers 2: .* one has 1"),
    ],
)
def test_what_a_model_or_layout_does_not_have(argv, architecture, parallel, message) -> None:
    update = parse_config(argv).update
    update.check()
    with pytest.raises(ValueError, match=message):
        check_support(
            update,
            ParallelConfig(**parallel),
            architecture,
            transformer_engine=False,
            flag="--hf-checkpoint X",
        )


def test_what_megatron_is_told() -> None:
    assert model_fields(UpdateConfig()) == {}
    assert model_fields(parse_config([*FULL, "3"]).update) == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 3,
    }
    assert model_fields(parse_config(SELECTIVE[:2]).update)["recompute_modules"] == ["core_attn"]
    update = parse_config([*SELECTIVE, "layernorm", "mlp"]).update
    check_support(update, ParallelConfig(), DENSE, transformer_engine=True, flag="")


@pytest.mark.parametrize(
    "layout, world_size, words",
    [
        ({"expert_tensor_parallel_size": 2}, 3, r"= 2 must divide the ranks of a pipeline stage \(3\)"),
        (
            {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 3},
            12,
            r"--expert-tensor-parallel-size \(3\) x .* = 3 must divide --tensor-model-parallel-size \(4\), "
            r"or",
        ),
    ],
)
def test_ranks_that_experts_cannot_be_dealt_out_to(layout, world_size, words) -> None:
    with pytest.raises(ValueError, match=words):
        check_layout(ParallelConfig(**layout), world_size)


def test_a_gated_delta_net_in_context_parallel_ranks() -> None:
    delta = DeltaNet(key_heads=4, value_heads=8, key_dim=8, value_dim=12, window=4, packed=False)
    model = replace(DENSE, layers=(LAYER, replace(LAYER, attention=delta)) * 3)
    with pytest.raises(ValueError, match="--context-parallel-size 2: --hf-checkpoint X has linear attention"):
        check_divides(model, ParallelConfig(context_parallel_size=2), flag="--hf-checkpoint X")


def test_an_expert_that_its_ranks_do_not_divide() -> None:
    with pytest.raises(
        ValueError, match=r"--expert-tensor-parallel-size 5 does not divide moe_ffn_hidden_size \(48\)"
    ):
        check_divides(EXPERTS, ParallelConfig(expert_tensor_parallel_size=5), flag="--hf-checkpoint X")


def stages(**options: object) -> ParallelConfig:
    return ParallelConfig(**{"pipeline_model_parallel_size": 3} | options)


def test_layers_of_stages_are_what_is_said() -> None:
    """Six layers over three stages, or six pieces of three."""
    assert layers_of_stages(DENSE, stages()) == [2, 2, 2]
    assert layers_of_stages(DENSE, stages(pipeline_model_parallel_size=4)) == [1, 2, 2, 1]
    assert layers_of_stages(DENSE, stages(decoder_first_pipeline_num_layers=4)) == [4, 1, 1]
    assert layers_of_stages(DENSE, stages(decoder_last_pipeline_num_layers=2)) == [2, 2, 2]
    ends = {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 1}
    assert layers_of_stages(DENSE, stages(**ends)) == [2, 3, 1]
    assert layers_of_stages(DENSE, stages(pipeline_model_parallel_layout="Ett,t|t*3|L")) == [3, 3, 0]
    virtual = {"num_virtual_stages_per_pipeline_rank": 2, "pipeline_model_parallel_layout": "Et*2|(t|)*4L"}
    assert layers_of_stages(DENSE, stages(**virtual)) == [2, 1, 1, 1, 1, 0]
    held = [
        stage_layers(Sizes(architecture=NUMBERED, parallel=stages(**virtual), vocab_size=1, bf16=False), i)
        for i in (0, 1, 2)
    ]
    assert [[layer.window for layer in layers] for layers in held] == [[1, 2, 5], [3, 6], [4]]


NUMBERED = replace(DENSE, layers=tuple(replace(LAYER, window=number) for number in range(1, 7)))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"decoder_first_pipeline_num_layers": 3},
            "--decoder-first-pipeline-num-layers 3: of 6 layers 3 are left for 2",
        ),
        (
            {"decoder_last_pipeline_num_layers": 7},
            "--decoder-last-pipeline-num-layers 7: of 6 layers -1 are left",
        ),
        (
            {"pipeline_model_parallel_layout": "Ettt|tttL"},
            r"has 2 stages, and --pipeline-model-parallel-size \(3\) asks",
        ),
        ({"pipeline_model_parallel_layout": "Ett|tt|ttmL"}, "is written with E, t, L"),
        ({"pipeline_model_parallel_layout": "Ett|tt|(ttL"}, "parentheses do not match"),
        ({"pipeline_model_parallel_layout": "tt|Ett|ttL"}, "the first stage must begin with E"),
        ({"pipeline_model_parallel_layout": "Ett|ttL|tt"}, "the last end with L"),
        ({"pipeline_model_parallel_layout": "Ettt||tttL"}, "between the first and the last has no layers"),
        ({"pipeline_model_parallel_layout": "Ett|tt|tL"}, "has 5 layers, and the model 6"),
    ],
)
def test_stages_that_are_not_the_models(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_divides(DENSE, stages(**options), flag="--hf-checkpoint X")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"pipeline_model_parallel_size": 1, "decoder_last_pipeline_num_layers": 1},
            "-size is 1; leave it out or raise",
        ),
        (
            {"decoder_last_pipeline_num_layers": 1, "pipeline_model_parallel_layout": "E|t|L"},
            "--decoder-last-pipeline-num-layers 1: --pipeline-model-parallel-layout sets it already",
        ),
        (
            {"decoder_last_pipeline_num_layers": 1, "num_virtual_stages_per_pipeline_rank": 2},
            "give it as --pipeline-model-parallel-layout",
        ),
    ],
)
def test_stages_that_are_said_twice_or_of_no_pipeline(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(stages(**options), 3)
