"""Builds the Megatron model of an architecture. The one place that constructs a GPTModel.

The model returns hidden states after the final norm, [S, B, H]; whoever needs logits multiplies by `output_weight`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from megatron_simct.config import ParallelConfig
from megatron_simct.models.families import Architecture
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig


class HiddenStateModel(GPTModel):
    """A GPTModel whose output is what enters the LM head. The head itself belongs to the loss."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """[W, H]: this rank's rows of the LM head; the embedding itself where the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def vocab_shard(self) -> tuple[int, int]:
        """Ids [start, end) of the padded vocabulary whose rows `output_weight` holds."""
        width = self.output_weight.shape[0]
        start = self.pg_collection.tp.rank() * width
        return start, start + width


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tp_size: int) -> int:
    """The least multiple of divisible_by * tp_size that holds the vocabulary."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def build_model(
    architecture: Architecture,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    vocab_size: int,
    divisible_by: int,
    bf16: bool,
    flag: str,
) -> HiddenStateModel:
    """This rank's part of the model, with random weights drawn from the seeded generators.

    vocab_size: the tokenizer's ids; the embedding holds at least these, padded. Random weights depend on the
    tensor-parallel size (the halves of a gated MLP are drawn in another order); loaded ones do not. `flag` names the
    checkpoint in errors.
    """
    _check_divides(architecture, parallel.tensor_model_parallel_size, flag=flag)
    if vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{flag}: the tokenizer has {vocab_size} ids, but config.json says vocab_size {architecture.vocab_size}"
        )
    on_cpu = groups.device.type == "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated defaults of its own
        config = TransformerConfig(
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            ffn_hidden_size=architecture.ffn_hidden_size,
            num_attention_heads=architecture.num_attention_heads,
            num_query_groups=architecture.num_query_groups,
            kv_channels=architecture.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=architecture.norm_epsilon,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=architecture.qkv_bias,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            init_method_std=architecture.init_std,
            bf16=bf16,
            params_dtype=dtype,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            # The loss is a sum over labels; the one division by their global number happens in finalize_model_grads.
            calculate_per_token_loss=True,
            use_cpu_initialization=on_cpu,
            # Fusions that need CUDA extensions.
            apply_rope_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size(
            architecture.vocab_size, divisible_by=divisible_by, tp_size=parallel.tensor_model_parallel_size
        ),
        max_sequence_length=architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
    )
    return model.to(groups.device)


def _check_divides(architecture: Architecture, tp: int, *, flag: str) -> None:
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(architecture, name)
        if value % tp:
            raise ValueError(f"--tensor-model-parallel-size {tp} does not divide {name} ({value}) of {flag}")
