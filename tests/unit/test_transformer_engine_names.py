"""Names of parameters in megatron-core's TransformerEngine layers, read from its sources. TransformerEngine
itself does not import without CUDA.
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_simct.models.dense import Dense
from megatron_simct.models.experts import Experts
from megatron_simct.models.grouped_query import GroupedQuery
from megatron_simct.models.hf_mapping import layer_rules
from megatron_simct.models.layers import Layer
from megatron_simct.models.rotary import Rope

ATTENTION = GroupedQuery(heads=4, groups=2, head_dim=8, scale=8**-0.5, qk_norm=True)
DENSE = Layer(attention=ATTENTION, mlp=Dense(width=48), rope=Rope(theta=1e4, dim=8))
EXPERTS = replace(DENSE, mlp=Experts(count=4, width=48, chosen=2))


def source(path: str) -> str:
    return (Path(find_spec("megatron.core").submodule_search_locations[0]) / path).read_text()


def renamed() -> list[tuple[str, str]]:
    """(TransformerEngine's name, local name), from megatron-core's conversion between the
    two kinds of layers.
    """
    tree = ast.parse(source("post_training/modelopt/gpt/state_dict_hooks.py"))
    (found,) = {
        ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "module_name_rewrite_list"
        and "linear_qkv.layer_norm_weight" in ast.unparse(node.value)
        and "input_layernorm.weight" in ast.unparse(node.value)
    }
    return ast.literal_eval(found)


def of_experts(kind: str) -> list[str]:
    """Names of the experts' weights of one kind of module, from megatron-core's conversion of
    dense models to experts.
    """
    text = source("transformer/moe/upcycling_utils.py")
    (branch,) = re.findall(rf"if experts_type == ExpertsType\.{kind}:\n(.*?)\n    el", text, flags=re.DOTALL)
    names = re.findall(r"key_replace_new='([^']+)'", branch)
    return [name.replace("{}", "*") for name in names if "bias" not in name]


def test_the_fused_norms_of_dense_layers_have_the_rules_of_the_separate_ones() -> None:
    rules = layer_rules(DENSE)
    pairs = [
        pair for pair in renamed() if pair[0].startswith(("self_attention.linear_qkv", "mlp.linear_fc1"))
    ]
    pairs = [(theirs, local) for theirs, local in pairs if theirs.endswith("weight")]
    assert len(pairs) == 2
    for theirs, local in pairs:
        assert rules[theirs] == rules[local]
    # A norm that is fused with the linear layer after it leaves its own name unused.
    assert "linear_qkv=backend.column_parallel_layer_norm_linear()" in source("models/gpt/gpt_layer_specs.py")


def test_grouped_experts_have_the_rules_of_sequential_ones() -> None:
    rules = layer_rules(EXPERTS)
    grouped, sequential = of_experts("TEGroupedMLP"), of_experts("SequentialMLP")
    assert len(grouped) == len(sequential) == 2
    for theirs, local in zip(grouped, sequential, strict=True):
        assert rules[theirs] == rules[local]
    assert "mlp.router.weight" in rules


@pytest.mark.parametrize("layer", [DENSE, EXPERTS])
def test_no_rule_is_left_of_the_other_kind_of_mlp(layer) -> None:
    mlp = {name.partition("mlp.")[2] for name in layer_rules(layer) if name.startswith("mlp.")}
    assert mlp and all(
        name.startswith(("experts.", "router.")) == bool(layer.mlp.num_experts) for name in mlp
    )
