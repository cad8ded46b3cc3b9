"""config.json -> Architecture: families, both spellings of rotary scaling, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from megatron_simct.models import families
from megatron_simct.models.families import Rope, read_architecture

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": True,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = {
    "kind": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}


@pytest.fixture
def read(tmp_path):
    def read(fields):
        (tmp_path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return read_architecture(str(tmp_path), flag="--hf-checkpoint")

    return read


def test_defaults_of_llama(read):
    found = read(LLAMA)
    assert (found.num_query_groups, found.head_dim, found.ropes) == (8, 8, (Rope(theta=10000.0, dim=8),))
    assert (found.windows, found.softmax_scale) == ((None, None, None), 8**-0.5)
    assert (found.qkv_bias, found.tied_embeddings) == (False, False)


def test_qwen2_has_biases_and_its_window_is_neutral_while_unused(read):
    found = read(QWEN2 | {"num_key_value_heads": 2, "rope_theta": 1e6})
    assert (found.num_query_groups, found.ropes[0].theta) == (2, 1e6)
    assert found.qkv_bias and found.tied_embeddings


@pytest.mark.parametrize(
    "fields, windows",
    [
        (MISTRAL, (5, 5, 5)),
        (MISTRAL | {"sliding_window": None}, (None, None, None)),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, (None, 32768, 32768)),
        (QWEN2 | {"use_sliding_window": True}, (None, None, None)),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            (32768, None, None),
        ),
    ],
)
def test_which_layers_have_a_window(read, fields, windows):
    assert read(fields).windows == windows


@pytest.mark.parametrize(
    "rope, theta, scaling",
    [
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, {}),
        ({"rope_parameters": None, "rope_theta": 7.0}, 7.0, {}),
        ({"rope_theta": 7.0, "rope_scaling": LLAMA3}, 7.0, SCALED),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 7.0}}, 7.0, SCALED),
        ({"rope_theta": 7.0, "rope_scaling": LLAMA3 | {"type": "llama3"}}, 7.0, SCALED),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "original_max_position_embeddings": 64}},
            10000.0,
            SCALED | {"low_freq_factor": 2.0, "original_length": 64},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"kind": "linear", "factor": 2.0}),
    ],
)
def test_both_spellings_of_the_rotary_embedding(read, rope, theta, scaling):
    found = read(LLAMA | rope)
    assert found.ropes == (Rope(theta=theta, dim=8, **scaling),)


GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
    "query_pre_attn_scalar": 144,
}
PHI4_MINI = LLAMA | {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3, 4]},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}


QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_window_layers": 3,
    "sliding_window": None,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def test_experts_of_qwen3_moe(read):
    found = read(QWEN3_MOE)
    assert (found.num_experts, found.experts_per_token, found.ffn_hidden_size) == (8, 2, 24)
    assert found.normalized_routing and found.qk_norm
    left_out = {k: v for k, v in QWEN3_MOE.items() if k not in ("norm_topk_prob", "num_experts")}
    found = read(left_out | {"num_local_experts": 8, "num_experts_per_tok": 1, "sliding_window": 4096})
    assert (found.num_experts, found.normalized_routing, found.windows) == (8, False, (None, None, None))
    assert read(QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 5}).windows == (5, 5, 5)
    assert read(LLAMA).num_experts == 0


def test_what_gemma2_leaves_out(read):
    found = read(GEMMA2)
    assert (found.head_dim, found.tied_embeddings, found.softmax_scale) == (256, True, 144**-0.5)
    assert (found.attention_softcap, found.final_logit_softcap) == (50.0, 30.0)
    assert (found.windows, found.embedding_scale) == ((4096, None, 4096), 8.0)
    assert found.zero_centered_norm and found.post_norms and found.activation == "gelu_pytorch_tanh"
    assert read(GEMMA2 | {"attn_logit_softcapping": None}).attention_softcap is None


def test_gemma3_has_two_rotary_embeddings(read):
    fields = GEMMA2 | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512}
    found = read(fields)
    assert found.ropes == (Rope(theta=1e6, dim=256), Rope(theta=1e4, dim=256))
    assert found.rope_of_layer == (1, 1, 1, 1, 1, 0, 1)
    assert found.windows == (*[512] * 5, None, 512)
    assert (found.attention_softcap, found.final_logit_softcap, found.qk_norm) == (None, None, True)


def test_phi4_mini_turns_a_part_of_each_head_by_longrope(read):
    found = read(PHI4_MINI)
    (rope,) = found.ropes
    assert (rope.kind, rope.dim, rope.original_length) == ("longrope", 4, 4096)
    assert (rope.short_factors, rope.long_factors) == ((1.0, 2.0), (3, 4))
    assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # log2(32) / log2(4096)
    assert found.fused_projections and found.windows == (262144,) * 3


SMOLLM3 = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 5, "sliding_window": 7, "max_window_layers": 28}


@pytest.mark.parametrize(
    "fields, turned",
    [
        ({}, (0, 0, 0, None, 0)),
        ({"no_rope_layer_interval": 2}, (0, None, 0, None, 0)),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 0], "no_rope_layer_interval": 2}, (None, 0, 0, None, 0)),
    ],
)
def test_layers_of_smollm3_without_rotary_embedding_have_the_window(read, fields, turned):
    found = read(SMOLLM3 | fields)
    assert (found.rope_of_layer, found.windows, found.tied_embeddings) == (turned, (None,) * 5, True)
    assert found.ropes == (Rope(theta=2e6, dim=8),)
    found = read(SMOLLM3 | fields | {"use_sliding_window": True})
    assert found.windows == tuple(7 if rope is None else None for rope in turned)
    assert read(SMOLLM3 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 5}).windows == (None,) * 5


@pytest.mark.parametrize(
    "fields, words",
    [
        (LLAMA | {"model_type": "gpt2"}, ["'gpt2' is not supported", "this version knows: llama, "]),
        (LLAMA | {"attention_bias": True}, ["attention_bias = True", "llama"]),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, ["sliding_window is None"]),
        (LLAMA | {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "llama"]),
        (MISTRAL | {"layer_types": ["full_attention"] * 3}, ["layer_types", "mistral"]),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 3}, ["layer_types", "chunked_attention"]),
        (LLAMA | {"sliding_window": 4096}, ["'sliding_window' is not known for llama"]),
        (QWEN2 | {"quantization_config": {"quant_method": "fp8"}}, ["it is quantised (fp8)"]),
        (LLAMA | {"rope_scaling": LLAMA3 | {"beta": 2.0}}, ["rope_scaling", "beta", "rope_type llama3 has factor"]),
        (LLAMA | {"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["high_freq_factor"]),
        (QWEN2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "qwen2", "rope_type default"]),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_parameters", "'yarn'"]),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, ["'vocab_size' is missing"]),
        (GEMMA2 | {"hidden_activation": "gelu"}, ["hidden_activation = 'gelu'", "gemma2"]),
        (GEMMA2 | {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        (GEMMA2 | {"model_type": "gemma3"}, ["'gemma3' is not supported", "gemma3_text"]),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, ["decoder_sparse_step = 2", "qwen3_moe"]),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, ["mlp_only_layers = [0]", "qwen3_moe"]),
        (QWEN3_MOE | {"num_experts": 1}, ["num_experts_per_tok = 2 of 1 experts"]),
        (QWEN3_MOE | {"num_local_experts": 4}, ["num_experts = 8, num_local_experts = 4"]),
        ({k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}, ["num_experts", "neither is there"]),
        (QWEN3_MOE | {"num_experts_per_tok": 9}, ["num_experts_per_tok = 9 of 8 experts"]),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, ["num_experts_per_tok = 1", "norm_topk_prob = True"]),
        ({k: v for k, v in QWEN3_MOE.items() if k != "moe_intermediate_size"}, ["'moe_intermediate_size' is missing"]),
        (PHI4_MINI | {"embd_pdrop": 0.1}, ["embd_pdrop = 0.1", "phi3"]),
        (PHI4_MINI | {"partial_rotary_factor": 1.0}, ["rope_type longrope has", "with 4 factors each"]),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0]}, ["no_rope_layers = [1, 1, 1, 0]", "each of 5 layers"]),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0, 2]}, ["no_rope_layers = [1, 1, 1, 0, 2]"]),
        (SMOLLM3 | {"no_rope_layers": 4}, ["no_rope_layers = 4"]),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, ["no_rope_layer_interval = 0"]),
        (SMOLLM3 | {"layer_types": ["sliding_attention"] * 5}, ["sliding_window is None"]),
        (LLAMA | {"partial_rotary_factor": 0.5}, ["'partial_rotary_factor' is not known for llama"]),
        (LLAMA | {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, ["nothing else"]),
        (LLAMA | {"model_type": ["llama"]}, ["model_type ['llama'] is not supported"]),
        (LLAMA | {"quantization_config": ["fp8"]}, ["it is quantised (of an unnamed kind)"]),
        (LLAMA | {"num_key_value_heads": 3}, ["num_key_value_heads = 3; expected a divisor of 8 heads"]),
        (LLAMA | {"num_attention_heads": 128}, ["of a head's 0 entries 0 would be turned; expected an even"]),
        (LLAMA | {"head_dim": 7}, ["of a head's 7 entries 7 would be turned; expected an even number"]),
        (PHI4_MINI | {"partial_rotary_factor": 0.4}, ["of a head's 8 entries 3 would be turned"]),
        (PHI4_MINI | {"partial_rotary_factor": 2}, ["of a head's 8 entries 16 would be turned"]),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            ["rope_scaling = {", "expected a high_freq_factor above low_freq_factor"],
        ),
        ('{"hidden_size": ' + "1" * 5000 + "}", ["not JSON", "5000 digits"]),
        ("[" * 100000, ["not JSON", "recursion"]),
        ("{", ["not JSON (line 1"]),
        ("[]", ["holds no JSON object"]),
    ],
)
def test_what_is_refused(read, tmp_path, fields, words):
    with pytest.raises(ValueError) as error:
        read(fields)
    assert str(error.value).startswith(f"--hf-checkpoint {tmp_path}: ") and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


GEMMA3 = GEMMA2 | {"model_type": "gemma3_text"}


@pytest.mark.parametrize(
    "fields, field, values, expected",
    [
        (LLAMA, "hidden_size", ["64", 0, -1, None, 64.0, True, [64], 2**64], "a whole number, at least 1"),
        (LLAMA, "num_hidden_layers", [0, 2.5, "3"], "a whole number, at least 1"),
        (LLAMA, "num_attention_heads", [0, -8, "8"], "a whole number, at least 1"),
        (LLAMA, "num_key_value_heads", [0, "2"], "a whole number, at least 1, or null"),
        (LLAMA, "head_dim", [0, 8.0], "a whole number, at least 1, or null"),
        (LLAMA, "intermediate_size", [0, None], "a whole number, at least 1"),
        (LLAMA, "vocab_size", ["100", 0], "a whole number, at least 1"),
        (LLAMA, "max_position_embeddings", [0, "512", math.inf], "a whole number, at least 1"),
        (LLAMA, "rms_norm_eps", [None, "1e-5", -1e-5, math.nan], "a number, at least 0"),
        (LLAMA, "initializer_range", ["0.02", -0.02, math.inf], "a number, at least 0"),
        (LLAMA, "rope_theta", ["x", 0, None, False, 10**400], "a number above 0"),
        (LLAMA, "rope_scaling", [[], "linear", 2.0], "an object, or null"),
        (LLAMA, "rope_parameters", [["default"], 1], "an object, or null"),
        (LLAMA, "tie_word_embeddings", ["yes", 1, None], "true or false"),
        (LLAMA, "layer_types", ["full_attention", [["full_attention"]], 3], "a list, each entry a string, or null"),
        (MISTRAL, "sliding_window", [0, "4096", 4096.0], "a whole number, at least 1, or null"),
        (QWEN2, "use_sliding_window", ["no"], "true or false"),
        (QWEN2, "max_window_layers", [-1, None, "28"], "a whole number, at least 0"),
        (QWEN3_MOE, "num_experts", [0, "8"], "a whole number, at least 1"),
        (QWEN3_MOE, "num_experts_per_tok", [0, "2"], "a whole number, at least 1"),
        (QWEN3_MOE, "moe_intermediate_size", [0, None], "a whole number, at least 1"),
        (QWEN3_MOE, "norm_topk_prob", ["true"], "true or false"),
        (GEMMA2, "query_pre_attn_scalar", [0, -256, "256"], "a number above 0"),
        (GEMMA2, "final_logit_softcapping", [0, "30"], "a number above 0, or null"),
        (GEMMA3, "sliding_window_pattern", [0, None], "a whole number, at least 1"),
        (GEMMA3, "rope_local_base_freq", [0, None], "a number above 0"),
        (PHI4_MINI, "original_max_position_embeddings", [1, None, "4096"], "a whole number, at least 2"),
        (PHI4_MINI, "partial_rotary_factor", [0, "0.5"], "a number above 0"),
        (SMOLLM3, "no_rope_layer_interval", [0, "4"], "a whole number, at least 1"),
        (SMOLLM3, "no_rope_layers", [4, ["1"]], "a list, each entry a whole number, at least 0, or null"),
    ],
)
def test_a_value_without_a_meaning_is_named(read, tmp_path, fields, field, values, expected):
    for value in values:
        with pytest.raises(ValueError) as error:
            read(fields | {field: value})
        where = f"--hf-checkpoint {tmp_path}: {tmp_path / 'config.json'}"
        assert str(error.value) == f"{where}: {field} = {value!r}; expected {expected}"


@pytest.mark.parametrize(
    "fields, scaling, change, said",
    [
        (LLAMA, LLAMA3, {"factor": "32"}, "rope_scaling: factor = '32'; expected a number above 0, or null"),
        (LLAMA, LLAMA3, {"low_freq_factor": 0}, "rope_scaling: low_freq_factor = 0; expected a number above 0"),
        (LLAMA, LLAMA3, {"rope_type": ["llama3"]}, "rope_scaling: rope_type = ['llama3']; expected a string"),
        (LLAMA, LLAMA3, {"rope_theta": None}, "rope_scaling: rope_theta = None; expected a number above 0"),
        (PHI4_MINI, PHI4_MINI["rope_scaling"], {"short_factor": 2}, "rope_scaling: short_factor = 2; expected a list"),
        (PHI4_MINI, PHI4_MINI["rope_scaling"], {"long_factor": [1, "2"]}, "rope_scaling: long_factor = [1, '2']"),
    ],
)
def test_a_value_without_a_meaning_in_the_scaling_is_named(read, tmp_path, fields, scaling, change, said):
    with pytest.raises(ValueError) as error:
        read(fields | {"rope_scaling": scaling | change})
    assert str(error.value).startswith(f"--hf-checkpoint {tmp_path}: {tmp_path / 'config.json'}: {said}")


def test_both_rotary_embeddings_of_gemma3_are_objects(read):
    both = {"full_attention": {"rope_type": "default"}, "sliding_attention": 1e4}
    with pytest.raises(ValueError, match=r"rope_parameters: sliding_attention = 10000\.0; expected an object"):
        read(GEMMA3 | {"rope_parameters": both})


def test_every_field_that_is_read_says_what_it_may_hold():
    assert families._READ.union(*(family.read for family in families.FAMILIES.values())) <= families._KINDS.keys()
    assert set().union(*families._ROPE_FIELDS.values()) <= families._ROPE_KINDS.keys()
