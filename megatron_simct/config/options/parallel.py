"""Options of the layout over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is distributed over processes. The rest of the world size is data parallelism."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer and the vocabulary", at_least=1)
    pipeline_model_parallel_size: int = option(1, "stages of consecutive layers, one a rank", at_least=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1,
        "pieces of the model on each pipeline rank; above 1 the schedule interleaves them, which reduces "
        "idle time",
        at_least=1,
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None,
        "number of layers in the first pipeline stage; the stages between the first and the last have "
        "equally many. Default: equally many in all stages, or fewer in the first and the last if the "
        "layers do not divide evenly",
        at_least=1,
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None,
        "number of layers in the last pipeline stage, which also has the LM head and the loss",
        at_least=1,
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "the layers of every stage in order, as in Megatron-LM: 'Etttt|tttt*3|ttL' has the embedding (E), "
        "layers (t) and the loss (L) in stages separated by |; x*3 repeats a letter, (x|)*3 a group. With "
        "--num-virtual-stages-per-pipeline-rank N it lists N times as many stages. This and the two "
        "options above do not apply to a teacher on the student's ranks",
        metavar="STAGES",
    )
    context_parallel_size: int = option(
        1,
        "ranks that share each sequence in a forward pass, for responses that are too long for one rank; "
        "sampling does not split sequences: there these ranks divide the prompts",
        at_least=1,
    )
    expert_model_parallel_size: int = option(
        1, "data-parallel ranks that divide the experts of each layer among themselves", at_least=1
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        "ranks that share each expert; default: --tensor-model-parallel-size. With 1, each expert is "
        "whole, and --expert-model-parallel-size distributes the experts over the tensor-parallel ranks "
        "too",
        at_least=1,
    )
    sequence_parallel: bool = option(
        False, "split norms and residuals along the sequence too, over the tensor-parallel ranks"
    )
    overlap_grad_reduce: bool = option(
        False, "reduce gradients over the data-parallel ranks bucket by bucket during the backward pass"
    )
    ddp_bucket_size: int | None = option(
        None,
        "number of parameters in a bucket of --overlap-grad-reduce; default: Megatron-Core's, which grows "
        "with the number of ranks",
        at_least=1,
    )
    distributed_timeout_minutes: int = option(
        10, "abort a collective operation after this many minutes", at_least=1, at_most=366 * 24 * 60
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same samples. The rest of the world size is data parallelism."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def for_teacher(self) -> ParallelConfig:
        """The layout of a teacher on the same ranks, which has other layers."""
        return replace(
            self,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            pipeline_model_parallel_layout=None,
        )

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size
