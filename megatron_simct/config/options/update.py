"""Options of the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The update: one optimizer step on each rollout batch."""

    micro_batch_size: int = option(
        8,
        "sequences of one forward and backward pass on one rank, padded to the longest; not read with "
        "--max-tokens-per-gpu",
        at_least=1,
    )
    max_tokens_per_gpu: int | None = option(
        None,
        "cut each rank's share of a step into micro-batches of at most so many tokens, equally many on all "
        "ranks, and pack their sequences one after another without padding, for the student and for a "
        "teacher on its ranks; a longer sequence is a micro-batch of its own. Default: --micro-batch-size "
        "sequences each. With --context-parallel-size the tokens of a GPU are its share of the sequences",
        at_least=1,
    )
    teacher_context_parallel_size: int | None = option(
        None,
        "ranks that share each sequence of a teacher on the student's ranks: 1, or --context-parallel-size "
        "(default)",
        at_least=1,
    )
    global_batch_size: int | None = option(
        None, "sequences of one optimizer step; default and only value: rollout batch size x samples a prompt"
    )
    schedule: Literal["on_policy", "one_step_off"] = option(
        "on_policy",
        "one_step_off: the rollouts of the next step are sampled, and are with --teacher-endpoint, before "
        "this step's update, so with weights one step older",
    )
    train_iters: int = option(100, "optimizer steps", at_least=1)
    seed: int = option(1234, "weights, order of the prompts, sampling", at_least=0, below=2**63)
    bf16: bool = option(False, "bf16 parameters with fp32 master weights and gradients (GPU only)")
    optimizer: Literal["adam", "sgd"] = option("adam", "adam is AdamW, as in Megatron-LM")
    lr: float = option(1e-6, "peak learning rate", at_least=0)
    min_lr: float = option(1e-8, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = option(
        "cosine", "shape of the decay over --train-iters"
    )
    lr_warmup_fraction: float = option(
        0.05, "share of --train-iters over which the rate rises from 0", at_least=0, below=1
    )
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    adam_beta1: float = option(0.9, "decay of Adam's mean of gradients", at_least=0, below=1)
    adam_beta2: float = option(0.98, "decay of Adam's mean of squared gradients", at_least=0, below=1)
    adam_eps: float = option(1e-8, "added to the root of Adam's mean of squared gradients")
    clip_grad: float = option(
        1.0, "clip the gradient to this global norm; 0: never", at_least=0, infinite=True
    )

    @property
    def lag(self) -> int:
        """Optimizer steps that weights may have seen since a step's rollouts were sampled."""
        return 1 if self.schedule == "one_step_off" else 0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Small matrices that are trained beside the student's weights, which stay as they are.

    Flags: --lora-*
    """

    rank: int = option(
        0,
        "rows of the matrix A [rank, in] beside each projection, and columns of B [out, rank]; 0: train the "
        "weights themselves; there is no dropout",
        at_least=0,
        below=2**20,
    )
    alpha: float = option(32.0, "B A is multiplied by this over --lora-rank", above=0)
    target_modules: tuple[str, ...] = option(
        (),
        "names of the projections that get them, as in the Hugging Face model: q_proj v_proj; default: all "
        "of attention and of dense MLPs",
    )

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return self.alpha / self.rank

    def check(self) -> None:
        """ValueError, with the flag, where options contradict each other."""
        given = {
            "--lora-alpha": self.alpha != LoraConfig.alpha,
            "--lora-target-modules": bool(self.target_modules),
        }
        for flag, differs in given.items():
            if differs and not self.rank:
                raise ValueError(f"{flag} needs --lora-rank")


RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe"]


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Memory and time of the update: what is computed again, and what data-parallel ranks share.
    Megatron-LM's options, for the student."""

    use_distributed_optimizer: bool = option(
        False,
        "share the optimizer's state among the data-parallel ranks: each updates its part, and gets the "
        "weights of the others; checkpoints are the same with it and without",
    )
    overlap_param_gather: bool = option(
        False,
        "of --use-distributed-optimizer, with --overlap-grad-reduce: get the weights of the others while the "
        "next forward pass runs; where responses are sampled first, before that",
    )
    recompute_granularity: Literal["full", "selective"] | None = option(
        None,
        "compute again in the backward pass, in place of keeping: full: whole layers, which keeps one hidden "
        "state a --recompute-num-layers; selective: --recompute-modules; results are the same to the last "
        "bit",
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None,
        "of --recompute-granularity full: uniform: all layers, in units of --recompute-num-layers; block: "
        "the first --recompute-num-layers of each pipeline stage, one by one",
    )
    recompute_num_layers: int | None = option(
        None, "layers of a unit, or of a stage: see --recompute-method", at_least=1
    )
    recompute_modules: tuple[RecomputeModule, ...] = option(
        (),
        "of --recompute-granularity selective; default: core_attn; layernorm needs TransformerEngine, moe a "
        "mixture of experts",
    )

    deterministic_mode: bool = option(
        False,
        "compute the same numbers at every run of one layout on GPUs too, by slower kernels; an operation "
        "that has no such kernel is an error; on a CPU it changes nothing",
    )
    manual_gc: bool = option(
        False,
        "Python collects its garbage every --manual-gc-interval steps, on all ranks at once, and never "
        "between",
    )
    manual_gc_interval: int = option(20, "steps between collections of --manual-gc", at_least=1)

    def check(self) -> None:
        """ValueError, with the flag, where options contradict each other."""
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("--overlap-param-gather needs --use-distributed-optimizer")
        full, selective = (self.recompute_granularity == name for name in ("full", "selective"))
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise ValueError(
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers; uniform "
                "and 1 keep least"
            )
        if not full and (self.recompute_method is not None or self.recompute_num_layers is not None):
            raise ValueError(
                "--recompute-method and --recompute-num-layers need --recompute-granularity full"
            )
        if not selective and self.recompute_modules:
            raise ValueError("--recompute-modules needs --recompute-granularity selective")
