"""config.json as transformers reads it: fields that change nothing, spellings of the rotary embedding, and
which head counts if a folder has two.
"""

from __future__ import annotations

import importlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.models.families import FAMILIES, INERT, read_architecture
from megatron_simct.models.rotary import Rope, frequencies
from tests.huggingface import save_model

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(0))

# For every field of INERT, a value that a reader of the field would notice.
INERT_VALUES: dict[str, Any] = {
    "architectures": ["AnotherForCausalLM"],
    "torch_dtype": "float32",
    "dtype": "float32",
    "transformers_version": "4.0.0",
    "transformers.js_config": {"dtype": {"model.onnx": "fp16"}, "use_external_data_format": True},
    "tokenizer_class": "LlamaTokenizer",
    "name_or_path": "a/b",
    "_name_or_path": "a/b",
    "_model_name_or_path": "a/b",
    "_commit_hash": "0123",
    "is_llama_config": True,
    **dict.fromkeys(
        "bos_token_id eos_token_id unk_token_id sep_token_id cls_token_id mask_token_id".split(), 5
    ),
    **dict.fromkeys("decoder_start_token_id forced_bos_token_id forced_eos_token_id".split(), 5),
    "pad_token_id": 5,
    "pretraining_tp": 2,
    "use_cache": False,
    "cache_implementation": "hybrid",
    "attn_implementation": "eager",
    "_attn_implementation": "eager",
    "_attn_implementation_autoset": True,
    "_attn_implementation_internal": "flash_attention_2",
    "_flash_attn_2_enabled": True,
    "use_flash_attn": True,
    "gradient_checkpointing": True,
    "chunk_size_feed_forward": 2,
    "torchscript": True,
    "use_bfloat16": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": True,
    "max_sequence_length": 3,
    "model_max_length": 3,
    "max_window_layers": 0,
    "num_labels": 3,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "problem_type": "regression",
    "finetuning_task": "task",
    "task_specific_params": {"task": {"max_length": 3}},
    "bad_words_ids": [[3]],
    "exponential_decay_length_penalty": [2, 1.5],
    "begin_suppress_tokens": [3],
    "suppress_tokens": [3],
    **dict.fromkeys(
        "do_sample early_stopping output_scores remove_invalid_values return_dict_in_generate".split(), True
    ),
    **dict.fromkeys(
        "encoder_no_repeat_ngram_size max_length max_new_tokens min_length no_repeat_ngram_size".split(), 3
    ),
    **dict.fromkeys("num_beam_groups num_beams num_return_sequences top_k".split(), 3),
    **dict.fromkeys(
        "diversity_penalty length_penalty repetition_penalty temperature top_p typical_p".split(), 0.5
    ),
}
# Fields of other models, each at a value that switches it off.
OFF: dict[str, Any] = {
    "quantization_config": None,
    "use_mrope": False,
    "rope_interleaved": False,
    "use_qk_norm": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": None,
    "per_layer_config": None,
    "pruned_heads": {},
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1,
    "logits_scaling": 1.0,
    "routed_scaling_factor": 1.0,
    "logit_scale": 1.0,
    "partial_rotary_factor": 1.0,
    "hidden_dropout": 0.0,
    "layerdrop": 0.0,
    "embd_pdrop": 0,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 0,
    "is_causal": True,
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.1",
    "mlp_bias": False,
    "attention_bias": False,
    "lm_head_bias": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}


DELTA = {"layer_types": ["full_attention", "linear_attention"], "head_dim": 8, "linear_num_key_heads": 2} | {
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = ROUTED | {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 20},
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    **dict.fromkeys(("glm4_moe", "solar_open", "dots1"), ROUTED | {"head_dim": 8, "n_shared_experts": 1}),
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 20},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20, "head_dim": 8},
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
        LATENT | {"num_key_value_heads": 4, "n_shared_experts": 1},
    ),
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0, "head_dim": 8},
    **dict.fromkeys(("ernie4_5", "ministral3", "hunyuan_v1_dense"), {"head_dim": 8}),
}


def _fields(family: str) -> dict[str, Any]:
    return FIELDS.get(family, {})


def _logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_every_inert_field_has_a_value_here() -> None:
    assert INERT_VALUES.keys() | {"model_type"} == INERT


@pytest.mark.parametrize("values", [INERT_VALUES, OFF], ids=["inert", "off"])
# transformers has no such class
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "kimi_k2"])
def test_a_field_that_is_accepted_changes_nothing(tmp_path, family, values) -> None:
    """It changes nothing in transformers or here."""
    save_model(tmp_path, family, **_fields(family))
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    expected, architecture = _logits(tmp_path), read_architecture(str(tmp_path), flag="")
    own = FAMILIES[family].read  # these are read here: another value gives another model
    fixed = {
        name for name, value in values.items() if value not in FAMILIES[family].fixed.get(name, (value,))
    }
    path.write_text(
        json.dumps(fields | {name: value for name, value in values.items() if name not in own | fixed})
    )
    assert torch.equal(_logits(tmp_path), expected)
    assert read_architecture(str(tmp_path), flag="") == architecture


# The rotary embedding.

ABSENT = object()
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 2.5}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.2, 3.0, 5.0, 7.0]}
CAPPED = {"original_max_position_embeddings": 32}


@dataclass(frozen=True, kw_only=True)
class Spellings:
    """Values of fields of config.json, each of which is tried with each of the others."""

    choices: dict[str, list[Any]]
    accepted: int
    """The number of combinations that both libraries accept."""

    def __iter__(self) -> Any:
        for values in itertools.product(*self.choices.values()):
            chosen = dict(zip(self.choices, values, strict=True))
            yield json.loads(
                json.dumps({name: value for name, value in chosen.items() if value is not ABSENT})
            )


FLAT = {
    "rope_theta": [ABSENT, 700.0],
    "rope_scaling": [
        *(ABSENT, None, {}, {"type": "linear", "factor": 2.0}, LINEAR | {"rope_theta": 90.0}),
        *({"type": "default"}, {"rope_type": "default", "type": "yarn"}, {"type": "yarn", "factor": 2.0}),
        *(
            LLAMA3 | CAPPED,
            LLAMA3,
            {"type": "default", "factor": 2.0},
            {"rope_type": "linear", "factor": 1.0},
        ),
    ],
    "rope_parameters": [
        *(ABSENT, None, {}, {"rope_theta": 50.0}, {"rope_type": "default", "rope_theta": 50.0}, LINEAR),
        *(LINEAR | {"rope_theta": 50.0}, LLAMA3 | CAPPED | {"rope_theta": 50.0}, {"rope_type": "default"}),
        *(
            {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 50.0},
            {"type": "linear", "factor": 2},
        ),
        {"full_attention": {"rope_theta": 50.0}},
    ],
}
PLAIN = {
    "rope_theta": FLAT["rope_theta"],
    "rope_scaling": [ABSENT, None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 90.0}],
    "rope_parameters": [ABSENT, None, {}, {"rope_theta": 50.0}, {"rope_type": "default"}, LINEAR],
}
SPELLINGS = {
    "llama": Spellings(choices=FLAT, accepted=258),
    "smollm3": Spellings(choices=PLAIN, accepted=54),
    "qwen2": Spellings(choices=PLAIN, accepted=54),
    "gemma2": Spellings(choices=PLAIN, accepted=54),
    "phi3": Spellings(
        choices={
            "rope_theta": FLAT["rope_theta"],
            "partial_rotary_factor": [ABSENT, 1.0],
            "original_max_position_embeddings": [ABSENT, 16],
            "rope_scaling": [ABSENT, {}, LONG, LONG | CAPPED, LONG | {"type": "su", "rope_type": "su"}],
            "rope_parameters": [
                *(
                    ABSENT,
                    None,
                    {"rope_theta": 50.0},
                    LONG | {"rope_theta": 50.0},
                    LONG | CAPPED | {"factor": 2.0},
                ),
                LONG | {"attention_factor": 1.25, "partial_rotary_factor": 1.0},
            ],
        },
        accepted=192,
    ),
    "gemma3_text": Spellings(
        choices={
            "rope_theta": FLAT["rope_theta"],
            "rope_local_base_freq": [ABSENT, 30.0],
            "rope_scaling": [
                ABSENT,
                None,
                {},
                LINEAR,
                {"type": "linear", "factor": 2.0},
                LINEAR | {"rope_theta": 90.0},
            ],
            "rope_parameters": [
                *(ABSENT, None, {"full_attention": {"rope_theta": 50.0}}, {"full_attention": LINEAR}),
                {"full_attention": LINEAR | {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 20.0}},
                {"full_attention": {"rope_type": "default"}, "sliding_attention": None},
                {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                    "full_attention": {"factor": 1.0},
                },
                LINEAR | {"rope_theta": 50.0},
            ],
        },
        accepted=156,
    ),
}
MODULES = {"gemma3_text": "gemma3", "gemma2": "gemma2"}
CLASSES = {"smollm3": "SmolLM3", "gemma3_text": "Gemma3"}


def _angles(rope: Rope, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 .. length - 1, as transformers uses them."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(rope, length))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SPELLINGS)
def test_spellings_of_the_rotary_embedding_mean_what_they_mean_in_transformers(tmp_path, family) -> None:
    """If one library refuses a spelling, the other may refuse or read it. If both read it, the
    result is the same.
    """
    name = MODULES.get(family, family)
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    embedding = getattr(module, f"{CLASSES.get(family, name.capitalize())}RotaryEmbedding")
    base = {
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        **({"head_dim": 8} if family.startswith("gemma") else {}),
    }
    accepted = 0
    for spelling in SPELLINGS[family]:
        (tmp_path / "config.json").write_text(json.dumps(base | spelling))
        try:
            theirs = embedding(transformers.AutoConfig.from_pretrained(str(tmp_path)))
            ours = read_architecture(str(tmp_path), flag="")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        accepted += 1
        ropes = {"full_attention": ours.layers[-1].rope, "sliding_attention": ours.layers[0].rope}
        ropes = ropes if family == "gemma3_text" else {None: ours.layers[0].rope}
        for length in (12, 40):
            for kind, rope in ropes.items():
                arguments = (torch.zeros(1), torch.arange(length)[None], *([kind] if kind else []))
                for found, expected in zip(_angles(rope, length), theirs(*arguments), strict=True):
                    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5, msg=f"{spelling}")
    assert accepted == SPELLINGS[family].accepted
