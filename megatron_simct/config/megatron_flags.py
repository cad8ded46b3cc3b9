"""Flags of Megatron-LM that are not options here: flags that have no effect because they ask for the default
behaviour, and what to use instead of the others.

A flag of the first kind is accepted with the listed values, and has no effect. Any other flag is an error,
which ends with the text of the second table."""

from __future__ import annotations

ALWAYS: dict[str, tuple[str, ...]] = {
    "--accumulate-allreduce-grads-in-fp32": (),
    "--attention-dropout": ("0",),
    "--check-for-nan-in-loss-and-grad": (),
    "--ckpt-format": ("torch_dist",),
    "--cp-comm-type": ("all_gather",),
    "--disable-bias-linear": (),
    "--dist-ckpt-format": ("torch_dist",),
    "--group-query-attention": (),
    "--hidden-dropout": ("0",),
    "--moe-aux-loss-coeff": ("0",),
    "--moe-grouped-gemm": (),
    "--moe-router-dtype": ("fp32",),
    "--moe-router-load-balancing-type": ("none",),
    "--moe-token-dispatcher-type": ("alltoall",),
    "--normalization": ("RMSNorm",),
    "--override-opt_param-scheduler": (),
    "--position-embedding-type": ("rope",),
    "--sgd-momentum": ("0.9",),
    "--swiglu": (),
    "--transformer-impl": ("transformer_engine", "local"),
    "--use-dist-ckpt": (),
    "--use-flash-attn": (),
    "--use-rotary-position-embeddings": (),
}
"""Flag -> the values that it may have; none for a switch.

If the model has a choice, its config.json decides.
"""

_MODEL = "config.json of --hf-checkpoint has it"
_PROMPTS = "training data are prompts: --prompt-data"
_SAMPLES = "lengths are --rollout-max-prompt-len and --rollout-max-response-len"
_ITERS = "a run is counted in steps: --train-iters"
_WARMUP = "use --lr-warmup-fraction, a share of --train-iters"
_DECAY = "the decay lasts --train-iters"
_WEIGHT_DECAY = "weight decay is constant: --weight-decay"
_LOAD = "--load resumes all of a run; --pretrained-checkpoint starts a new one from its weights"
_SAVE = "a checkpoint has all that a run needs to resume"
_FP16 = "use --bf16, which needs no loss scale"
_FP8 = "parameters are bf16 or float32"
_FSDP = "use --use-distributed-optimizer, --tensor-model-parallel-size and --pipeline-model-parallel-size"
_STAGES = "use --num-virtual-stages-per-pipeline-rank"
_OVERLAP_P2P = (
    "it is chosen by the schedule: megatron-core's interleaved one computes wrong gradients otherwise"
)
_FUSIONS = "fusions are chosen by the device"
_GRAPHS = "sequences differ in length, which a CUDA graph does not allow"
_TIMERS = "metrics.jsonl of --run-dir has seconds and memory of every step, and --tensorboard-dir the same"
_EVAL = "held-out prompts: --eval-prompt-data, --eval-interval"
_RERUN = "a step that is not finite stops all ranks before any weight changes, and keeps its rollouts"
_ROLLOUT = "rollouts: --rollout-batch-size, --rollout-engine-batch-size"
_CONTEXT = "keys and values are gathered over all ranks of --context-parallel-size at once"
_OFFLOAD = (
    "megatron-core splits the optimizer for it, which checkpoints here do not read; use "
    "--use-distributed-optimizer"
)
_LOSS_STAGE = "--pipeline-model-parallel-layout sets which layers share a stage with embedding and loss"
_ROUTES = "it needs kernels of TransformerEngine that have not been tested with this package"

_REASONS: dict[str, str] = {
    # The model
    **dict.fromkeys(
        "num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels num-query-groups "
        "max-position-embeddings rotary-base rotary-percent norm-epsilon untie-embeddings-and-output-weights "
        "add-qkv-bias qk-layernorm init-method-std num-experts moe-router-topk moe-ffn-hidden-size "
        "moe-shared-expert-intermediate-size multi-latent-attention vocab-size apply-layernorm-1p".split(),
        _MODEL,
    ),
    "mtp-num-layers": "layers that predict more than one token are not trained",
    "attention-softmax-in-fp32": "torch's attention decides; with a soft-cap the softmax is in float32",
    "position-embedding-type": f"rotary positions; {_MODEL}",
    "normalization": f"RMSNorm; {_MODEL}",
    "attention-dropout": "there is no dropout",
    "hidden-dropout": "there is no dropout",
    # Data and tokenizers
    **dict.fromkeys(
        ("tokenizer-type", "vocab-file", "merge-file"), "use --tokenizer-model; the file determines the type"
    ),
    **dict.fromkeys(
        "data-path train-data-path valid-data-path test-data-path data-cache-path split mock-data "
        "num-workers dataloader-type reset-position-ids reset-attention-mask eod-mask-loss".split(),
        _PROMPTS,
    ),
    **dict.fromkeys(("seq-length", "encoder-seq-length", "decoder-seq-length"), _SAMPLES),
    "sft": "use --simct-interface sft",
    # Length and schedule of a run
    **dict.fromkeys(("train-samples", "exit-interval", "lr-decay-samples", "lr-warmup-samples"), _ITERS),
    "lr-warmup-iters": _WARMUP,
    "lr-warmup-init": "the rate rises from 0; " + _WARMUP,
    "lr-decay-iters": _DECAY,
    **dict.fromkeys(
        ("lr-wsd-decay-style", "lr-wsd-decay-iters"), "--lr-decay-style is constant, linear or cosine"
    ),
    **dict.fromkeys(("start-weight-decay", "end-weight-decay", "weight-decay-incr-style"), _WEIGHT_DECAY),
    "sgd-momentum": "SGD's momentum is 0.9",
    **dict.fromkeys(("decoupled-lr", "decoupled-min-lr"), "all parameters have one rate: --lr"),
    **dict.fromkeys(
        ("rampup-batch-size", "decrease-batch-size-if-needed"),
        "a step is one rollout batch: --rollout-batch-size x --n-samples-per-prompt",
    ),
    # Checkpoints
    "ckpt-format": "checkpoints are torch_dist",
    "dist-ckpt-format": "checkpoints are torch_dist",
    "use-checkpoint-args": "options come from the command line and --config-file; --load prints which have "
    "changed",
    "use-checkpoint-opt_param-scheduler": "a resumed run uses the options of its command line",
    "exit-on-missing-checkpoint": "--load without a checkpoint is an error, unless it is the directory of "
    "--save",
    "save-retain-interval": "use --save-retain, the number of checkpoints to keep",
    "finetune": "use --pretrained-checkpoint, which starts a new run from a checkpoint's weights",
    **dict.fromkeys(("no-load-optim", "no-load-rng"), _LOAD),
    **dict.fromkeys(("no-save-optim", "no-save-rng"), _SAVE),
    "non-persistent-save-interval": "use --save-interval with --save-retain, and --async-save",
    # Evaluation and logs
    **dict.fromkeys(("eval-iters", "eval-batch-size"), _EVAL),
    "skip-train": "tools/evaluate.py measures a model without training",
    "wandb-exp-name": "the run is named by --run-dir",
    "wandb-entity": "set WANDB_ENTITY",
    **dict.fromkeys("log-timers-to-tensorboard log-memory-to-tensorboard log-progress".split(), _TIMERS),
    "log-params-norm": "metrics.jsonl has the gradient's norm",
    "log-num-zeros-in-grad": "metrics.jsonl has the gradient's norm",
    "use-pytorch-profiler": "--profile uses the PyTorch profiler",
    "nvtx-ranges": "NVTX ranges are always on with CUDA",
    # Numbers
    **dict.fromkeys("fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window".split(), _FP16),
    **dict.fromkeys("fp8-format fp8-recipe fp8-margin fp4-format".split(), _FP8),
    "grad-reduce-in-bf16": "gradients are summed in float32",
    # Memory and layout
    "num-distributed-optimizer-instances": "--use-distributed-optimizer divides the state over all "
    "data-parallel ranks",
    "use-precision-aware-optimizer": "the optimizer state is float32; --use-distributed-optimizer divides it "
    "over ranks",
    **dict.fromkeys(
        "optimizer-cpu-offload optimizer-offload-fraction use-torch-optimizer-for-cpu-offload "
        "overlap-cpu-optimizer-d2h-h2d".split(),
        _OFFLOAD,
    ),
    **dict.fromkeys(
        ("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"),
        _LOSS_STAGE,
    ),
    **dict.fromkeys(("use-megatron-fsdp", "use-torch-fsdp2", "data-parallel-sharding-strategy"), _FSDP),
    "recompute-activations": "use --recompute-granularity selective",
    "distribute-saved-activations": "use --sequence-parallel with --recompute-granularity full",
    "num-layers-per-virtual-pipeline-stage": _STAGES,
    "moe-grouped-gemm": "it is on with TransformerEngine's layers; megatron-core does not have it for others",
    "moe-token-dispatcher-type": "tokens go to experts by alltoall: allgather needs micro-batches of equal "
    "length on all ranks, and flex needs DeepEP's kernels",
    **dict.fromkeys(("moe-permute-fusion", "moe-router-fusion"), _ROUTES),
    "moe-shared-expert-overlap": "shared experts run before the others, not in parallel with them",
    "moe-router-dtype": "the router is in float32",
    "moe-router-load-balancing-type": "the router is trained only by the loss: none",
    "moe-aux-loss-coeff": "the router is trained only by the loss",
    **dict.fromkeys(("cp-comm-type", "hierarchical-context-parallel-sizes"), _CONTEXT),
    **dict.fromkeys(("overlap-p2p-communication-warmup-flush", "no-overlap-p2p-communication"), _OVERLAP_P2P),
    "tp-comm-overlap": "tensor-parallel communication is not overlapped; --sequence-parallel reduces its "
    "cost",
    # Kernels
    **dict.fromkeys(
        "no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion "
        "no-rope-fusion no-persist-layer-norm no-gradient-accumulation-fusion".split(),
        _FUSIONS,
    ),
    "transformer-impl": "TransformerEngine's layers are used if the model allows it",
    **dict.fromkeys(
        ("cross-entropy-loss-fusion", "cross-entropy-fusion-impl"),
        "the loss is --simct-interface, which is fused",
    ),
    **dict.fromkeys(("enable-cuda-graph", "cuda-graph-impl"), _GRAPHS),
    "te-rng-tracker": "there is no dropout",
    # The process
    "manual-gc-eval": "--manual-gc collects between steps",
    "distributed-backend": "NCCL with CUDA, otherwise gloo",
    "local-rank": "torchrun and Slurm set it in the environment",
    "use-cpu-initialization": "weights come from --hf-checkpoint",
    "empty-unused-memory-level": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    **dict.fromkeys(("rerun-mode", "error-injection-rate"), _RERUN),
    # Rollouts
    **dict.fromkeys(
        "inference-batch-times-seqlen-threshold inference-max-requests perform-rl-step "
        "rl-prompts-per-eval".split(),
        _ROLLOUT,
    ),
}

MEGATRON_FLAGS: dict[str, str] = {"--" + name: reason for name, reason in _REASONS.items()}
"""Flag -> what to use instead, or why there is no such option."""


def check_always(flag: str, value: object) -> None:
    """Raises ValueError if a flag of ALWAYS has an unsupported value."""
    values = ALWAYS[flag]
    if any(_same(value, one) for one in values or ("True",)):
        return
    only = f"only {' or '.join(values)}" if values else "it cannot be switched off"
    reason = f": {MEGATRON_FLAGS[flag]}" if flag in MEGATRON_FLAGS else ""
    raise ValueError(f"{flag} {value}: {only}{reason}")


def _same(value: object, wanted: str) -> bool:
    if str(value) == wanted:
        return True
    try:
        return float(str(value)) == float(wanted)
    except ValueError:
        return False
