"""Flags that users of Megatron-LM know and that this package does not implement, so that an error can say just that.

Architecture flags are among them on purpose: the architecture comes from --hf-checkpoint's config.json.
"""

MEGATRON_FLAGS = frozenset(
    "--" + name
    for name in """
    num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels group-query-attention num-query-groups
    max-position-embeddings position-embedding-type rotary-base rotary-percent use-rotary-position-embeddings
    normalization norm-epsilon swiglu untie-embeddings-and-output-weights disable-bias-linear add-qkv-bias
    qk-layernorm attention-dropout hidden-dropout init-method-std attention-softmax-in-fp32 seq-length
    encoder-seq-length decoder-seq-length num-experts moe-router-topk moe-router-load-balancing-type
    moe-aux-loss-coeff moe-grouped-gemm moe-token-dispatcher-type moe-ffn-hidden-size
    moe-shared-expert-intermediate-size multi-latent-attention mtp-num-layers tokenizer-type vocab-file merge-file
    vocab-size data-path train-data-path valid-data-path test-data-path data-cache-path split mock-data num-workers
    dataloader-type reset-position-ids reset-attention-mask eod-mask-loss sft train-samples lr-decay-iters
    lr-decay-samples lr-warmup-iters lr-warmup-samples lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
    start-weight-decay end-weight-decay weight-decay-incr-style sgd-momentum decoupled-lr decoupled-min-lr
    use-checkpoint-args ckpt-format ckpt-step async-save finetune no-load-optim no-load-rng no-save-optim
    no-save-rng ckpt-fully-parallel-save ckpt-fully-parallel-load dist-ckpt-format use-dist-ckpt
    non-persistent-save-interval override-opt_param-scheduler use-checkpoint-opt_param-scheduler
    exit-on-missing-checkpoint save-retain-interval exit-interval eval-iters eval-batch-size skip-train
    wandb-exp-name wandb-entity
    log-timers-to-tensorboard log-memory-to-tensorboard log-throughput log-params-norm log-num-zeros-in-grad
    log-progress timing-log-level profile profile-step-start profile-step-end fp16 fp8-format fp8-recipe fp8-margin
    fp4-format loss-scale initial-loss-scale min-loss-scale loss-scale-window grad-reduce-in-bf16
    accumulate-allreduce-grads-in-fp32 no-gradient-accumulation-fusion transformer-impl use-distributed-optimizer
    overlap-param-gather num-distributed-optimizer-instances use-precision-aware-optimizer
    optimizer-cpu-offload use-megatron-fsdp use-torch-fsdp2 data-parallel-sharding-strategy
    num-layers-per-virtual-pipeline-stage pipeline-model-parallel-layout
    decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers expert-tensor-parallel-size
    overlap-p2p-communication-warmup-flush no-overlap-p2p-communication tp-comm-overlap cp-comm-type
    hierarchical-context-parallel-sizes recompute-activations recompute-granularity recompute-method
    recompute-num-layers recompute-modules distribute-saved-activations use-flash-attn attention-backend
    no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion
    no-persist-layer-norm apply-layernorm-1p cross-entropy-loss-fusion cross-entropy-fusion-impl enable-cuda-graph
    cuda-graph-impl deterministic-mode check-for-nan-in-loss-and-grad manual-gc manual-gc-interval rampup-batch-size
    decrease-batch-size-if-needed distributed-backend local-rank use-cpu-initialization empty-unused-memory-level
    rerun-mode error-injection-rate inference-batch-times-seqlen-threshold inference-max-requests perform-rl-step
    rl-prompts-per-eval te-rng-tracker
    """.split()
)
