"""Options of the layout over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over processes. Data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer and the vocabulary", at_least=1)
    pipeline_model_parallel_size: int = option(1, "stages of consecutive layers, one a rank", at_least=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1,
        "pieces of the model that each pipeline rank holds; above 1 the schedule interleaves them, with less "
        "idle time",
        at_least=1,
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None,
        "layers of the first pipeline stage; those between the ends get equally many. Default: equally many "
        "in all stages, or fewer in the first and the last where these do not divide the layers",
        at_least=1,
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last pipeline stage, which has the LM head and the loss, too", at_least=1
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "layers of every stage, one after the other, as Megatron-LM writes them: 'Etttt|tttt*3|ttL' has the "
        "embedding (E), layers (t) and the loss (L) in stages between |; x*3 repeats a letter, (x|)*3 a "
        "part. With --num-virtual-stages-per-pipeline-rank it has so many times the stages. Of a teacher on "
        "the student's ranks neither this nor the two options above are",
        metavar="STAGES",
    )
    context_parallel_size: int = option(
        1,
        "ranks that share each sequence of a forward pass, for responses that are too long for one; sampling "
        "does not split sequences, its ranks share the prompts",
        at_least=1,
    )
    expert_model_parallel_size: int = option(
        1, "data-parallel ranks that share the experts of each layer", at_least=1
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        "ranks that share each expert; default: --tensor-model-parallel-size. With 1 tensor-parallel ranks "
        "have whole experts, which --expert-model-parallel-size deals out to them too",
        at_least=1,
    )
    sequence_parallel: bool = option(
        False, "split norms and residuals along the sequence too, over the tensor ranks"
    )
    overlap_grad_reduce: bool = option(
        False, "sum gradients over data-parallel ranks bucket by bucket, while the backward pass still runs"
    )
    ddp_bucket_size: int | None = option(
        None,
        "parameters of a bucket of --overlap-grad-reduce; default: Megatron-Core's, which grows with the "
        "ranks",
        at_least=1,
    )
    distributed_timeout_minutes: int = option(
        10, "give up on a collective after this many minutes", at_least=1, at_most=366 * 24 * 60
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same samples; data parallelism is what remains of the world size."""
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
