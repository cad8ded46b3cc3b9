"""Names of parameters in megatron-core's TransformerEngine layers, read from its sources. TransformerEngine itself does
not import without CUDA."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_simct.models.families import Architecture, Rope
from megatron_simct.models.hf_mapping import weights

DENSE = Architecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=99,
    max_position_embeddings=256,
    norm_epsilon=1e-6,
    ropes=(Rope(theta=1e4, dim=8),),
    rope_of_layer=(0, 0),
    windows=(None, None),
    softmax_scale=8**-0.5,
    qk_norm=True,
    tied_embeddings=False,
    init_std=0.02,
)
EXPERTS = replace(DENSE, num_experts=4, experts_per_token=2)


def source(path: str) -> str:
    return (Path(find_spec("megatron.core").submodule_search_locations[0]) / path).read_text()


def renamed() -> list[tuple[str, str]]:
    """(TransformerEngine's name, local name), of megatron-core's conversion of one kind of layers to the other."""
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
    """Names of the experts' weights of one kind of module, of megatron-core's conversion of dense models to experts."""
    text = source("transformer/moe/upcycling_utils.py")
    (branch,) = re.findall(rf"if experts_type == ExpertsType\.{kind}:\n(.*?)\n    el", text, flags=re.DOTALL)
    names = re.findall(r"key_replace_new='([^']+)'", branch)
    return [name.replace("{}", "*") for name in names if "bias" not in name]


def test_the_fused_norms_of_dense_layers_have_the_rules_of_the_separate_ones():
    rules = weights(DENSE)
    pairs = [pair for pair in renamed() if pair[0].startswith(("self_attention.linear_qkv", "mlp.linear_fc1"))]
    pairs = [(theirs, local) for theirs, local in pairs if theirs.endswith("weight")]
    assert len(pairs) == 2
    for theirs, local in pairs:
        assert rules["decoder.layers.*." + theirs] == rules["decoder.layers.*." + local]
    # A norm that is fused with the linear layer after it leaves its own place empty.
    assert "linear_qkv=backend.column_parallel_layer_norm_linear()" in source("models/gpt/gpt_layer_specs.py")


def test_grouped_experts_have_the_rules_of_sequential_ones():
    rules = weights(EXPERTS)
    grouped, sequential = of_experts("TEGroupedMLP"), of_experts("SequentialMLP")
    assert len(grouped) == len(sequential) == 2
    for theirs, local in zip(grouped, sequential, strict=True):
        assert rules["decoder.layers.*." + theirs] == rules["decoder.layers.*." + local]
    assert "decoder.layers.*.mlp.router.weight" in rules


@pytest.mark.parametrize("architecture", [DENSE, EXPERTS])
def test_no_rule_is_left_of_the_other_kind_of_mlp(architecture):
    mlp = {name.partition(".mlp.")[2] for name in weights(architecture) if ".mlp." in name}
    assert all(name.startswith(("experts.", "router.")) == bool(architecture.num_experts) for name in mlp)
