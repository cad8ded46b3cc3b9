"""Options of the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option
from megatron_simct.config.options.model import AttentionBackend


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The update: one optimizer step on each rollout batch."""

    micro_batch_size: int = option(
        8,
        "sequences in one forward and backward pass on one rank, padded to the longest; not used with "
        "--max-tokens-per-gpu",
        at_least=1,
    )
    max_tokens_per_gpu: int | None = option(
        None,
        "divide the samples of each rank into micro-batches of at most this many tokens, equally many on "
        "all ranks, and pack their sequences without padding, for the student and for a teacher on its "
        "ranks; a longer sequence has a micro-batch of its own. Default: --micro-batch-size sequences in "
        "each. With --context-parallel-size, the tokens of a GPU are its part of the sequences",
        at_least=1,
    )
    teacher_context_parallel_size: int | None = option(
        None,
        "ranks that share each sequence of a teacher on the student's ranks: 1, or --context-parallel-size "
        "(default)",
        at_least=1,
    )
    global_batch_size: int | None = option(
        None,
        "sequences in one optimizer step; must be --rollout-batch-size x --n-samples-per-prompt, which is "
        "the default",
    )
    schedule: Literal["on_policy", "one_step_off"] = option(
        "on_policy",
        "one_step_off: sample the next step's rollouts and send them to --teacher-endpoint before this "
        "step's update, so from weights that are one step older",
    )
    train_iters: int = option(100, "optimizer steps", at_least=1)
    seed: int = option(1234, "seed of weights, prompt order and sampling", at_least=0, below=2**63)
    bf16: bool = option(False, "bf16 parameters with fp32 master weights and gradients (GPU only)")
    attention_backend: AttentionBackend = option(
        "auto",
        "kernel that computes attention on a GPU, in the update and in a teacher on the same ranks. auto: "
        "torch's flash kernel for one sequence without a window in bf16, and flex_attention for windows, "
        "soft-caps, sinks, packed sequences and float32. flash: torch's flash kernel, or an error. local: "
        "the kernel that torch chooses; with a soft-cap all scores are in memory. fused and unfused are "
        "TransformerEngine's and are refused. On a CPU auto means local; sampling always uses local",
    )
    optimizer: Literal["adam", "sgd"] = option("adam", "adam is AdamW, as in Megatron-LM")
    lr: float = option(1e-6, "peak learning rate", at_least=0)
    min_lr: float = option(1e-8, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = option(
        "cosine", "shape of the decay over --train-iters"
    )
    lr_warmup_fraction: float = option(
        0.05, "share of --train-iters over which the learning rate rises from 0", at_least=0, below=1
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
        """The most optimizer steps between sampling a rollout and training on it."""
        return 1 if self.schedule == "one_step_off" else 0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: small matrices that are trained while the student's weights stay frozen.

    Flags: --lora-*
    """

    rank: int = option(
        0,
        "rank of the adapters: A is [rank, in], B is [out, rank]; 0: train the weights themselves. There "
        "is no dropout",
        at_least=0,
        below=2**20,
    )
    alpha: float = option(32.0, "B A is multiplied by --lora-alpha / --lora-rank", above=0)
    target_modules: tuple[str, ...] = option(
        (),
        "projections that get adapters, by their names in the Hugging Face model: q_proj v_proj; default: "
        "all of attention and of dense MLPs",
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Raises ValueError, with the flag, if options contradict each other."""
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
    """Memory and time of the update: recomputation, and what data-parallel ranks divide among themselves.
    Megatron-LM's options, for the student."""

    use_distributed_optimizer: bool = option(
        False,
        "divide the optimizer state among the data-parallel ranks: each updates its part of the weights, "
        "and gathers the rest; checkpoints are the same with and without it",
    )
    overlap_param_gather: bool = option(
        False,
        "with --use-distributed-optimizer and --overlap-grad-reduce: gather weights during the next "
        "forward pass; if responses are sampled first, before sampling",
    )
    recompute_granularity: Literal["full", "selective"] | None = option(
        None,
        "recompute activations in the backward pass instead of keeping them: full: whole layers, one "
        "hidden state is kept for every --recompute-num-layers; selective: --recompute-modules; the "
        "results are the same to the last bit",
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None,
        "for --recompute-granularity full: uniform: all layers, in groups of --recompute-num-layers; "
        "block: the first --recompute-num-layers of each pipeline stage, one by one",
    )
    recompute_num_layers: int | None = option(
        None, "number of layers in a group, or in a stage: see --recompute-method", at_least=1
    )
    recompute_modules: tuple[RecomputeModule, ...] = option(
        (),
        "for --recompute-granularity selective; default: core_attn; layernorm needs TransformerEngine, moe "
        "needs a mixture of experts",
    )

    deterministic_mode: bool = option(
        False,
        "compute the same numbers in every run of one layout on GPUs too, with slower kernels; an "
        "operation without such a kernel is an error; no effect on a CPU",
    )
    manual_gc: bool = option(
        False,
        "run Python's garbage collector only every --manual-gc-interval steps, on all ranks at once",
    )
    manual_gc_interval: int = option(20, "steps between two runs of --manual-gc", at_least=1)

    def check(self) -> None:
        """Raises ValueError, with the flag, if options contradict each other."""
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("--overlap-param-gather needs --use-distributed-optimizer")
        full, selective = (self.recompute_granularity == name for name in ("full", "selective"))
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise ValueError(
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers; uniform "
                "and 1 keep the least"
            )
        if not full and (self.recompute_method is not None or self.recompute_num_layers is not None):
            raise ValueError(
                "--recompute-method and --recompute-num-layers need --recompute-granularity full"
            )
        if not selective and self.recompute_modules:
            raise ValueError("--recompute-modules needs --recompute-granularity selective")
