"""Builds the Megatron model of an architecture. The one place that constructs a GPTModel.

The model returns hidden states after the final norm, [S, B, H]; whoever needs logits multiplies by
`output_weight`. Of a pipeline each rank builds its stage: the first has the embedding, the last the final
norm and the LM head, and the others return what the stage after them reads.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch

from megatron_simct.config.options import AttentionBackend, ParallelConfig
from megatron_simct.models.attention import CoreAttention
from megatron_simct.models.families import Architecture
from megatron_simct.models.kernels import check_backend
from megatron_simct.models.norm import RMSNorm
from megatron_simct.models.rotary import Rotary
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import Groups

with megatron_imports():
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel import layers as linear_layers
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


class HiddenStateModel(GPTModel):
    """A GPTModel whose output is what enters the LM head. The head itself belongs to the loss."""

    def __init__(self, *, architecture: Architecture, longest: int | None, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="rope", **kwargs)
        self.architecture = architecture
        self.rotary_pos_emb = Rotary(architecture.ropes, longest=longest)
        self.logit_softcap = architecture.final_logit_softcap
        """Soft-cap of the logits, cap * tanh(logit / cap), which the caller applies; None: no soft-cap."""
        # As transformers does, the scale is rounded to the embedding's precision.
        scale = torch.tensor(architecture.embedding_scale, dtype=self.config.params_dtype, device="cpu")
        self.embedding_scale = float(scale)
        """Factor of the embedding of a token."""

    def _preprocess(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[Any, ...]:
        if self.pre_process and self.embedding_scale != 1.0:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            kwargs["decoder_input"] = embedded * self.embedding_scale
        return super()._preprocess(input_ids, position_ids, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process and self.architecture.logit_scale != 1.0:
            hidden_states = hidden_states * self.architecture.logit_scale
        if self.post_process and self.config.sequence_parallel:
            # The gradient of the gathered sequence is complete on every rank (the loss sums it over the
            # group), so the backward pass takes this rank's slice, not another sum.
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """[W, H]: this rank's rows of the LM head; the embedding itself where the two are tied.

        Last stage only.
        """
        assert self.post_process, "only the last pipeline stage has the LM head"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def vocab_shard(self) -> tuple[int, int]:
        """Ids [start, end) of the padded vocabulary whose rows this tensor-parallel rank
        holds, on any stage.
        """
        width = self.vocab_size // self.pg_collection.tp.size()
        start = self.pg_collection.tp.rank() * width
        return start, start + width


class InterleavedModel(torch.nn.ModuleList):
    """The pieces of the model that one rank of an interleaved pipeline holds, in their order: several stages
    of it.
    """

    @property
    def stages(self) -> list[HiddenStateModel]:
        """The pieces with their type; a ModuleList has modules."""
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
        """Under this module's names; the keys in a checkpoint are those of the whole model,
        as for every layout.
        """
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
    owners += [
        (m, name) for m in model.modules() for name in ("sequence_parallel", "reduce_scatter_embeddings")
    ]
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
    more: Mapping[str, Any] = MappingProxyType({}),
    local_layers: bool = False,
    attention_backend: AttentionBackend = "auto",
    trains: bool = False,
) -> HiddenStateModel | InterleavedModel:
    """This rank's part of the model, with random weights drawn from the seeded generators.

    Without `initialize` the weights are uninitialised memory, for a caller that fills all of them: random
    numbers take time, and on a CPU megatron-core draws full matrices before it splits them.

    vocab_size: the tokenizer's ids; the embedding holds at least these, padded. Random weights depend on the
    layout (the halves of a gated MLP are drawn in another order, each stage draws its own, and on a CPU ranks
    that share experts draw the same ones); loaded ones do not. `flag` names the checkpoint in errors.
    longest: see Rotary. more: fields of TransformerConfig that have nothing to do with what the model
    computes. local_layers: megatron-core's own layers also where TransformerEngine's would do. trains:
    Megatron's DistributedDataParallel will have all weights.
    """
    check_divides(architecture, parallel, flag=flag)
    on_gpu = groups.device.type == "cuda"
    check_backend(
        attention_backend,
        architecture.scores,
        on_gpu=on_gpu,
        bf16=bf16,
        longest=longest,
        context_parallel_size=parallel.context_parallel_size,
        flag=flag,
    )
    if vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{flag}: the tokenizer has {vocab_size} ids, but config.json says vocab_size "
            f"{architecture.vocab_size}"
        )
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    config = _transformer_config(
        architecture,
        parallel,
        bf16=bf16,
        on_cpu=groups.device.type == "cpu",
        initialize=initialize,
        trains=trains,
        more=more,
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
                transformer_engine=not local_layers and uses_transformer_engine(architecture, groups.device),
            ),
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == virtual - 1,
            vp_stage=vp_stage,
            vocab_size=padded_vocab_size(
                architecture.vocab_size,
                divisible_by=divisible_by,
                tp_size=parallel.tensor_model_parallel_size,
            ),
            max_sequence_length=architecture.max_position_embeddings,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
        )

    # megatron-core warns that each expert runs without sequence parallelism
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`")
        model = stage(0) if virtual == 1 else InterleavedModel(stage(chunk) for chunk in range(virtual))
    for module in model.modules():
        if isinstance(module, CoreAttention):
            module.choose(attention_backend, on_gpu=on_gpu, bf16=bf16)
    if not initialize:
        _mark_split(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Reduced and updated apart from the others, as megatron-core does where ranks share experts. In
            # every layout, so that a checkpoint of the optimizer has the same parts in all of them.
            parameter.allreduce = False  # type: ignore[union-attr]
    return model.to(groups.device)


def _transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    *,
    bf16: bool,
    on_cpu: bool,
    initialize: bool,
    trains: bool,
    more: Mapping[str, Any],
) -> TransformerConfig:
    """Megatron's configuration of the model."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = _of_layers(architecture, parallel)
    has_biases = options.pop("add_bias_linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of deprecated defaults of its own
        config = TransformerConfig(
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            normalization="RMSNorm",
            layernorm_epsilon=architecture.norm_epsilon,
            layernorm_zero_centered_gamma=architecture.zero_centered_norm,
            gated_linear_unit=True,
            add_bias_linear=False,
            rotary_interleaved=any(rope.interleaved for rope in architecture.ropes),
            attention_dropout=0.0,
            hidden_dropout=0.0,
            init_method_std=architecture.init_std,
            bf16=bf16,
            params_dtype=dtype,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            # The interleaved schedule silently computes wrong gradients in any other mode of communication.
            overlap_p2p_comm=virtual > 1,
            batch_p2p_comm=virtual == 1,
            pipeline_dtype=dtype,
            sequence_parallel=parallel.sequence_parallel,
            context_parallel_size=parallel.context_parallel_size,
            # Stages send each other the shape of each micro-batch. Megatron requires this dispatcher, dense
            # or not; under it ranks that share experts may have micro-batches of different shapes.
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            **options,
            **_uneven_stages(architecture, parallel),
            # The loss is a sum over labels; the one division by their global number happens in
            # finalize_model_grads.
            calculate_per_token_loss=True,
            use_cpu_initialization=on_cpu,
            perform_initialization=initialize,
            **(fusions(architecture, on_gpu=not on_cpu, trains=trains) | dict(more)),
        )
    # Set later: Megatron refuses biases of experts under tensor parallelism, of which ours add theirs once.
    config.add_bias_linear = has_biases
    return config


def fusions(architecture: Architecture, *, on_gpu: bool, trains: bool) -> dict[str, bool]:
    """Which of Megatron's fused functions are on: on a GPU all that the model and what is installed allow.

    They are compiled by torch, apart from the rotary embedding, which is TransformerEngine's, and the sum of
    weight gradients into `main_grad` in float32, which is Apex's and is for weights that DDP has.
    """
    options = _of_layers(architecture, ParallelConfig())
    silu = options.get("activation_func") is torch.nn.functional.silu and not options["add_bias_linear"]
    interleaved = any(rope.interleaved for rope in architecture.ropes)
    return {
        "bias_activation_fusion": on_gpu and silu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": on_gpu and rope_utils.fused_apply_rotary_pos_emb is not None and not interleaved,
        "gradient_accumulation_fusion": on_gpu and trains and linear_layers._grad_accum_fusion_available,
        # Of modules that are ours: attention, and norms.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _of_layers(architecture: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """Options of TransformerConfig that the layers need."""
    options: dict[str, Any] = {}
    if len({(type(layer.attention), type(layer.mlp)) for layer in architecture.layers}) > 1:
        # Else a checkpoint stores the parameters of one name of all layers as one tensor.
        options["hetereogenous_dist_checkpoint"] = True  # as megatron-core spells it
    for part in (part for layer in architecture.kinds for part in (layer.attention, layer.mlp)):
        for name, value in part.options().items():
            assert options.setdefault(name, value) == value, f"layers differ in {name}"
    options.setdefault("add_bias_linear", False)
    if len({bool(layer.mlp.num_experts) for layer in architecture.layers}) == 2:
        options["moe_layer_freq"] = [int(layer.mlp.num_experts > 0) for layer in architecture.layers]
    if architecture.num_experts:
        options.setdefault("ffn_hidden_size", options["moe_ffn_hidden_size"])
        options["expert_model_parallel_size"] = parallel.expert_model_parallel_size
        options["expert_tensor_parallel_size"] = parallel.expert_tp
    return options


def layers_of_stages(architecture: Architecture, parallel: ParallelConfig) -> list[int]:
    """The number of layers of each piece of the model, in order. Pieces are stages, or in an interleaved
    pipeline parts of them: rank r of P has the pieces r, r + P, ...

    Where stages do not divide the layers and nothing else is given, those in the middle have equally many,
    and the ends, which have more to do, what is left if the others have one more than they. ValueError,
    naming the flag.
    """
    layers, stages = architecture.num_layers, parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        return _read_layout(parallel, layers)
    pieces = stages * parallel.num_virtual_stages_per_pipeline_rank
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is None and last is None:
        if layers % pieces == 0:
            return [layers // pieces] * pieces
        assert pieces == stages, "check_divides refuses interleaved stages that do not divide the layers"
        at_ends = layers - (stages - 2) * -(-layers // stages)
        if at_ends < 2:
            at_ends = layers - (stages - 2) * (layers // stages)
        first, last = at_ends - at_ends // 2, at_ends // 2
    rest = layers - (first or 0) - (last or 0)
    others = stages - sum(count is not None for count in (first, last))
    # Without middle stages nothing may be left; else they must share the rest evenly.
    fits = rest == 0 if others == 0 else rest % others == 0
    if rest < 0 or not fits:
        flags = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
        given = " and ".join(f"{flag} {count}" for flag, count in flags.items() if count is not None)
        raise ValueError(
            f"{given}: of {layers} layers {rest} are left for {others} stages, which must have equally many; "
            "--pipeline-model-parallel-layout can give the layers of each"
        )
    middle = [rest // others] * others if others else []
    return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]


def _read_layout(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """The number of layers of each piece, from --pipeline-model-parallel-layout."""
    text = parallel.pipeline_model_parallel_layout or ""
    where = f"--pipeline-model-parallel-layout {text}"
    if not re.fullmatch(r"(?:[EtL|,()]|\*\d{1,4})*", text):
        raise ValueError(f"{where}: is written with E, t, L, |, commas, and x*3 or (x|)*3")
    try:
        stages = [
            "".join(layer.name[0] for layer in stage)
            for stage in PipelineParallelLayerLayout.parse_str_to_list(text)
        ]
    except AssertionError:
        raise ValueError(f"{where}: its parentheses do not match") from None
    size, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if len(stages) != size * virtual:
        times = f" x --num-virtual-stages-per-pipeline-rank ({virtual})" if virtual > 1 else ""
        raise ValueError(
            f"{where}: has {len(stages)} stages, and --pipeline-model-parallel-size ({size}){times} asks for "
            f"{size * virtual}"
        )
    if not re.fullmatch(r"ed*(\|d*)*\|d*l", "|".join(stages)):
        raise ValueError(
            f"{where}: the first stage must begin with E, the last end with L, and neither stand elsewhere"
        )
    counts = [stage.count("d") for stage in stages]
    if 0 in counts[1:-1]:
        raise ValueError(f"{where}: a stage between the first and the last has no layers")
    if sum(counts) != num_layers:
        raise ValueError(f"{where}: has {sum(counts)} layers, and the model {num_layers}")
    return counts


def _uneven_stages(architecture: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """The option of TransformerConfig for pieces with different numbers of layers."""
    counts = layers_of_stages(architecture, parallel)
    if len(set(counts)) == 1:
        return {}
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _mark_split(model: torch.nn.Module) -> None:
    """Mark parameters that are split over the tensor-parallel ranks: the gradient norm
    counts the others once.

    megatron-core marks a weight only when it initialises it.
    """
    for module in model.modules():
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def uses_transformer_engine(architecture: Architecture, device: torch.device) -> bool:
    """Whether the layers are TransformerEngine's: on a GPU, where megatron-core could import it, for the
    families that its layers can express."""
    return (
        gpt_layer_specs.HAVE_TE
        and device.type == "cuda"
        and all(layer.has_transformer_engine for layer in architecture.kinds)
    )


def _layers(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None, *, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The layers of this stage."""
    backend = gpt_layer_specs.TESpecProvider() if transformer_engine else LocalSpecProvider()
    first = get_transformer_layer_offset(config, vp_stage)
    own = architecture.layers[first : first + get_num_layers_to_build(config, vp_stage)]
    specs = {layer: layer.spec(backend, architecture.ropes) for layer in dict.fromkeys(own)}
    return TransformerBlockSubmodules(layer_specs=[specs[layer] for layer in own], layer_norm=RMSNorm)


def check_divides(architecture: Architecture, parallel: ParallelConfig, *, flag: str) -> None:
    """ValueError, naming the flag and the number, if the layout does not divide layers, heads or MLP."""
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    layers = architecture.num_layers
    if virtual > 1 and layers % (pp * virtual) and parallel.pipeline_model_parallel_layout is None:
        raise ValueError(
            f"--pipeline-model-parallel-size {pp} x --num-virtual-stages-per-pipeline-rank {virtual} does "
            f"not divide num_layers ({layers}) of {flag}; --pipeline-model-parallel-layout can give the "
            "layers of each piece"
        )
    if layers < pp:
        raise ValueError(f"--pipeline-model-parallel-size {pp} is more than num_layers ({layers}) of {flag}")
    layers_of_stages(architecture, parallel)
    ep = parallel.expert_model_parallel_size
    if architecture.num_experts % ep:
        raise ValueError(
            f"--expert-model-parallel-size {ep} does not divide num_experts ({architecture.num_experts}) of "
            f"{flag}"
        )
    cp = parallel.context_parallel_size
    if cp > 1 and not all(layer.attention.has_context_parallel for layer in architecture.kinds):
        raise ValueError(
            f"--context-parallel-size {cp}: {flag} has linear attention, whose state goes through a sequence "
            "from its start to its end; leave it out"
        )
    tp = parallel.tensor_model_parallel_size
    for layer in architecture.kinds:
        layer.attention.check_divides(tp, flag=flag)
        layer.mlp.check_divides(tp, parallel.expert_tp, flag=flag)
