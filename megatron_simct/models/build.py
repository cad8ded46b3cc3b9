"""Builds the Megatron model of an architecture. The one place that constructs a GPTModel.

The model returns hidden states after the final norm, [S, B, H]; whoever needs logits multiplies by `output_weight`.
Of a pipeline each rank builds its stage: the first has the embedding, the last the final norm and the LM head, and the
others return what the stage after them reads.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch

from megatron_simct.config import ParallelConfig
from megatron_simct.models.attention import CoreAttention, SelfAttention
from megatron_simct.models.experts import Router
from megatron_simct.models.families import Architecture
from megatron_simct.models.norm import NormedRowParallelLinear, RMSNorm
from megatron_simct.models.rotary import Rotary
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build


_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


class HiddenStateModel(GPTModel):
    """A GPTModel whose output is what enters the LM head. The head itself belongs to the loss."""

    def __init__(self, *, architecture: Architecture, longest: int | None, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="rope", **kwargs)
        self.rotary_pos_emb = Rotary(architecture.ropes, longest=longest)
        self.logit_softcap = architecture.final_logit_softcap
        """Whoever multiplies by `output_weight` bounds the logits: cap * tanh(logit / cap). None: not bounded."""
        # As transformers does, the scale is rounded to the embedding's precision.
        scale = torch.tensor(architecture.embedding_scale, dtype=self.config.params_dtype, device="cpu")
        self.embedding_scale = float(scale)
        """Multiplies the embedding of a token on its way into the first layer."""

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> tuple[Any, ...]:
        if self.pre_process and self.embedding_scale != 1.0:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            kwargs["decoder_input"] = embedded * self.embedding_scale
        return super()._preprocess(input_ids, position_ids, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process and self.config.sequence_parallel:
            # Whoever reads the whole sequence brings a gradient that is complete on every rank (the loss sums it over
            # the group), so the way back is this rank's slice, not another sum.
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """[W, H]: this rank's rows of the LM head; the embedding itself where the two are tied. Last stage only."""
        assert self.post_process, "only the last pipeline stage has the LM head"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def vocab_shard(self) -> tuple[int, int]:
        """Ids [start, end) of the padded vocabulary whose rows this tensor-parallel rank holds, on any stage."""
        width = self.vocab_size // self.pg_collection.tp.size()
        start = self.pg_collection.tp.rank() * width
        return start, start + width


class InterleavedModel(torch.nn.ModuleList):
    """The pieces of the model that one rank of an interleaved pipeline holds, in their order: several stages of it."""

    @property
    def stages(self) -> list[HiddenStateModel]:
        """The pieces as what they are; a ModuleList knows modules only."""
        return cast("list[HiddenStateModel]", list(self))

    @property
    def config(self) -> TransformerConfig:
        return self.stages[0].config

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """See HiddenStateModel.output_weight."""
        return self.stages[-1].output_weight

    @property
    def vocab_shard(self) -> tuple[int, int]:
        """See HiddenStateModel.vocab_shard."""
        return self.stages[-1].vocab_shard

    @property
    def logit_softcap(self) -> float | None:
        """See HiddenStateModel.logit_softcap."""
        return self.stages[-1].logit_softcap

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Under this module's names; the keys in a checkpoint are those of the whole model, as for every layout."""
        return {
            f"{i}.{name}": value
            for i, chunk in enumerate(self.stages)
            for name, value in chunk.sharded_state_dict(*args, **kwargs).items()
        }


def chunks_of(model: HiddenStateModel | InterleavedModel) -> list[HiddenStateModel]:
    """The stages that this rank holds: one, or those of an InterleavedModel."""
    return model.stages if isinstance(model, InterleavedModel) else [model]


@contextlib.contextmanager
def whole_sequences(model: HiddenStateModel | InterleavedModel) -> Iterator[None]:
    """Without sequence parallelism, for inference: one token at a time leaves nothing to split."""
    owners = [(model.config, "sequence_parallel")]
    owners += [(m, name) for m in model.modules() for name in ("sequence_parallel", "reduce_scatter_embeddings")]
    owners = [(owner, name) for owner, name in owners if getattr(owner, name, False)]
    for owner, name in owners:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in owners:
            setattr(owner, name, True)


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
    initialize: bool = True,
    longest: int | None = None,
) -> HiddenStateModel | InterleavedModel:
    """This rank's part of the model, with random weights drawn from the seeded generators.

    Without `initialize` the weights are whatever lies in memory, for a caller that fills all of them: drawing takes
    time, and on a CPU megatron-core draws whole matrices before it splits them.

    vocab_size: the tokenizer's ids; the embedding holds at least these, padded. Random weights depend on the layout
    (the halves of a gated MLP are drawn in another order, each stage draws its own, and on a CPU ranks that share
    experts draw the same ones); loaded ones do not. `flag` names the checkpoint in errors. longest: see Rotary.
    """
    check_divides(architecture, parallel, flag=flag)
    if vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{flag}: the tokenizer has {vocab_size} ids, but config.json says vocab_size {architecture.vocab_size}"
        )
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    config = _transformer_config(
        architecture, parallel, bf16=bf16, on_cpu=groups.device.type == "cpu", initialize=initialize
    )

    def stage(chunk: int) -> HiddenStateModel:
        vp_stage = chunk if virtual > 1 else None
        return HiddenStateModel(
            config=config,
            architecture=architecture,
            longest=longest,
            transformer_layer_spec=_layers(
                config,
                architecture,
                vp_stage,
                transformer_engine=_uses_transformer_engine(architecture, groups.device),
            ),
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == virtual - 1,
            vp_stage=vp_stage,
            vocab_size=padded_vocab_size(
                architecture.vocab_size, divisible_by=divisible_by, tp_size=parallel.tensor_model_parallel_size
            ),
            max_sequence_length=architecture.max_position_embeddings,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
        )

    model = stage(0) if virtual == 1 else InterleavedModel(stage(chunk) for chunk in range(virtual))
    if not initialize:
        _mark_split(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Reduced and updated apart from the others, as megatron-core does where ranks share experts. In every
            # layout, so that a checkpoint of the optimizer has the same parts in all of them.
            parameter.allreduce = False  # type: ignore[union-attr]
    return model.to(groups.device)


def _transformer_config(
    architecture: Architecture, parallel: ParallelConfig, *, bf16: bool, on_cpu: bool, initialize: bool
) -> TransformerConfig:
    """Megatron's configuration of the model."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    dtype = torch.bfloat16 if bf16 else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated defaults of its own
        return TransformerConfig(
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            ffn_hidden_size=architecture.ffn_hidden_size,
            num_attention_heads=architecture.num_attention_heads,
            num_query_groups=architecture.num_query_groups,
            kv_channels=architecture.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=architecture.norm_epsilon,
            layernorm_zero_centered_gamma=architecture.zero_centered_norm,
            gated_linear_unit=True,
            activation_func=_ACTIVATIONS[architecture.activation],
            add_bias_linear=False,
            add_qkv_bias=architecture.qkv_bias,
            qk_layernorm=architecture.qk_norm,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            init_method_std=architecture.init_std,
            bf16=bf16,
            params_dtype=dtype,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            # The interleaved schedule computes wrong gradients, without a word, in any other mode of communication.
            overlap_p2p_comm=virtual > 1,
            batch_p2p_comm=virtual == 1,
            pipeline_dtype=dtype,
            sequence_parallel=parallel.sequence_parallel,
            # Stages tell each other the shape of each micro-batch. Megatron wants this dispatcher, dense or not; under
            # it ranks that share experts may have micro-batches of different shapes.
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            **_experts(architecture, parallel),
            **uneven_stages(architecture, parallel),
            # The loss is a sum over labels; the one division by their global number happens in finalize_model_grads.
            calculate_per_token_loss=True,
            use_cpu_initialization=on_cpu,
            perform_initialization=initialize,
            # Fusions that need CUDA extensions.
            apply_rope_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )


def _experts(architecture: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """Options of TransformerConfig for a mixture of experts: no auxiliary loss, nothing dropped, the router in fp32."""
    if not architecture.num_experts:
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_pre_softmax": not architecture.normalized_routing,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.tensor_model_parallel_size,
    }


def uneven_stages(architecture: Architecture, parallel: ParallelConfig) -> dict[str, int]:
    """Options of TransformerConfig where the stages do not divide the layers: those in the middle have equally many.

    The first and the last have more to do, so they get what is left if the others have one more than they.
    """
    layers, stages = architecture.num_layers, parallel.pipeline_model_parallel_size
    if layers % stages == 0:
        return {}
    at_ends = layers - (stages - 2) * -(-layers // stages)
    if at_ends < 2:
        at_ends = layers - (stages - 2) * (layers // stages)
    return {
        "num_layers_in_first_pipeline_stage": at_ends - at_ends // 2,
        "num_layers_in_last_pipeline_stage": at_ends // 2,
    }


def _mark_split(model: torch.nn.Module) -> None:
    """Say which parameters the tensor-parallel ranks share among them: the gradient norm counts the others once.

    megatron-core says so of a weight when it draws it, and not otherwise.
    """
    for module in model.modules():
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _uses_transformer_engine(architecture: Architecture, device: torch.device) -> bool:
    """Whether the layers are TransformerEngine's: on a GPU, where megatron-core could import it, for the families that
    its layers can express."""
    return gpt_layer_specs.HAVE_TE and device.type == "cuda" and not architecture.post_norms


def _layers(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None, *, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """Megatron's layers with our attention, as many as this stage has; its local ones also with our norm."""
    num_experts = architecture.num_experts or None
    if transformer_engine:
        layer: ModuleSpec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=architecture.qk_norm
        )
        attention: ModuleSpec = layer.submodules.self_attention
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention
        if architecture.qk_norm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
        if architecture.post_norms:
            attention.submodules.linear_proj = layer.submodules.mlp.submodules.linear_fc2 = NormedRowParallelLinear
        if architecture.num_experts:
            # In TransformerEngine's layers too this norm is fused with the MLP only where there is but one.
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention.module = SelfAttention
    attention.params["architecture"] = architecture
    attention.submodules.core_attention = partial(CoreAttention, architecture=architecture)
    if architecture.num_experts:
        layer.submodules.mlp.submodules.router = Router
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def check_divides(architecture: Architecture, parallel: ParallelConfig, *, flag: str) -> None:
    """ValueError, naming the flag and the number, where the layout does not divide layers, heads or MLP."""
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    layers = architecture.num_layers
    if virtual > 1 and layers % (pp * virtual):
        raise ValueError(
            f"--pipeline-model-parallel-size {pp} x --num-virtual-stages-per-pipeline-rank {virtual} does not divide "
            f"num_layers ({layers}) of {flag}"
        )
    if layers < pp:
        raise ValueError(f"--pipeline-model-parallel-size {pp} is more than num_layers ({layers}) of {flag}")
    ep = parallel.expert_model_parallel_size
    if architecture.num_experts % ep:
        raise ValueError(
            f"--expert-model-parallel-size {ep} does not divide num_experts ({architecture.num_experts}) of {flag}"
        )
    tp = parallel.tensor_model_parallel_size
    if architecture.num_query_groups % tp and tp % architecture.num_query_groups:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} neither divides num_query_groups ({architecture.num_query_groups}) of "
            f"{flag} nor is a multiple of it"
        )
    for name in ("num_attention_heads", "ffn_hidden_size"):
        value = getattr(architecture, name)
        if value % tp:
            raise ValueError(f"--tensor-model-parallel-size {tp} does not divide {name} ({value}) of {flag}")
