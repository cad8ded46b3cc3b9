"""Options of checkpoints, logs and traces."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Checkpoints, logs and traces."""

    save: str | None = option(
        None, "directory for checkpoints: one at the end, and one every --save-interval steps", metavar="DIR"
    )
    save_interval: int | None = option(None, "steps between checkpoints", at_least=0)
    save_retain: int | None = option(
        None, "keep this many of the newest checkpoints; default: all", at_least=1
    )
    load: str | None = option(
        None,
        "resume from the newest checkpoint in this directory; if it is also --save and has no checkpoint "
        "yet, start from the beginning",
        metavar="DIR",
    )
    ckpt_step: int | None = option(
        None,
        "resume --load from the checkpoint of this iteration instead of the newest; leave it out of later "
        "restarts",
        metavar="N",
    )
    verify_checkpoint: bool = option(
        True,
        "before use, check the hash of every file of a checkpoint, and of weights whose hashes are known",
    )
    async_save: bool = option(
        False,
        "write checkpoints during training, from a copy in host memory; a checkpoint gets its name when it "
        "is complete, one or more steps later",
    )
    ckpt_fully_parallel_save: bool = option(
        True, "each data-parallel rank writes a part of the weights; if not, the first of them writes all"
    )
    ckpt_fully_parallel_load: bool = option(
        True,
        "each data-parallel rank reads a part of a checkpoint and sends it to the others; if not, each "
        "reads all",
    )
    exit_signal_handler: bool = option(
        False, "on SIGTERM finish the step, save a checkpoint and exit with code 0"
    )
    exit_duration_in_mins: float | None = option(
        None,
        "save a checkpoint and exit with code 0 after the first step that ends later than this",
        at_least=0,
        infinite=True,
    )
    run_dir: str | None = option(
        None,
        "directory for metrics.jsonl, samples.jsonl and config.yaml (tools/plot_run.py shows them)",
        metavar="DIR",
    )
    sample_interval: int = option(
        20,
        "steps between entries in samples.jsonl, which show responses with their units and losses",
        at_least=1,
    )
    log_interval: int = option(1, "steps between log lines", at_least=1)
    gradient_parts_interval: int = option(
        0,
        "steps between comparisons of the gradient of 1:1 positions with that of multi-token units "
        "(cosine, ratio of norms); each costs one more forward and backward pass and one more copy of the "
        "gradient; 0: never",
        at_least=0,
    )
    log_throughput: bool = option(
        False,
        "log TFLOP/s of a rank in the update and in sampling, and their share of the GPU's peak if that is "
        "known",
    )
    timing_log_level: int = option(
        0,
        "Megatron's timers below each log line, shortest and longest time over the ranks: 1: parts of the "
        "optimizer step; 2: also each forward and backward pass and communication between stages; 0: none",
        at_least=0,
        at_most=2,
    )
    profile: bool = option(
        False, "write a trace of the steps from --profile-step-start on into RUN_DIR/profile"
    )
    profile_step_start: int = option(10, "first step that --profile traces", at_least=1)
    profile_step_end: int = option(12, "the trace of --profile ends before this step", at_least=2)
    profile_ranks: tuple[int, ...] = option((0,), "ranks that --profile traces")
    tensorboard_dir: str | None = option(
        None, "write the metrics for TensorBoard to this directory", metavar="DIR"
    )
    wandb_project: str | None = option(
        None,
        "write the metrics for Weights & Biases under this project; offline unless WANDB_MODE is set",
    )
    wandb_save_dir: str | None = option(None, "directory of the Weights & Biases files", metavar="DIR")
