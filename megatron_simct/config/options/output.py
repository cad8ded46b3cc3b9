"""Options of checkpoints, logs and traces."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    save: str | None = option(
        None, "directory for checkpoints: one at the end, and every --save-interval steps", metavar="DIR"
    )
    save_interval: int | None = option(None, "steps between checkpoints", at_least=0)
    save_retain: int | None = option(
        None, "keep this many of the newest checkpoints; default: all", at_least=1
    )
    load: str | None = option(
        None,
        "resume from this directory's newest checkpoint; where it is that of --save and has none yet, start "
        "afresh",
        metavar="DIR",
    )
    ckpt_step: int | None = option(
        None,
        "resume --load from the checkpoint of this iteration instead; for one start, not for those that "
        "follow",
        metavar="N",
    )
    verify_checkpoint: bool = option(
        True,
        "compare every file of a checkpoint, and weights whose hashes are known, with their hashes before "
        "use",
    )
    async_save: bool = option(
        False,
        "write checkpoints while training goes on, from a copy in host memory of all that is written; one "
        "gets its name when it is whole, a step or more later",
    )
    ckpt_fully_parallel_save: bool = option(
        True, "data-parallel ranks write a share of the weights each; else the first of them writes all"
    )
    ckpt_fully_parallel_load: bool = option(
        True,
        "data-parallel ranks read a share of a checkpoint each, and tell the others; else each reads all",
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
        20, "steps between the responses that samples.jsonl shows with their units and losses", at_least=1
    )
    log_interval: int = option(1, "steps between log lines", at_least=1)
    gradient_parts_interval: int = option(
        0,
        "every so many steps compare the gradient of 1:1 positions with that of multi-token units (cosine, "
        "ratio of norms): one forward and backward pass more, and one more copy of the gradient; 0: never",
        at_least=0,
    )
    log_throughput: bool = option(
        False,
        "metrics of floating-point operations: TFLOP/s of a rank in the update and in sampling, and the "
        "share of the peak of a GPU that is known",
    )
    timing_log_level: int = option(
        0,
        "Megatron's timers, shortest and longest time over the ranks, below each log line: 1: parts of the "
        "optimizer step; 2: each forward and backward pass and what stages send, too; 0: none",
        at_least=0,
        at_most=2,
    )
    profile: bool = option(False, "trace the steps from --profile-step-start on, into RUN_DIR/profile")
    profile_step_start: int = option(10, "first step that --profile traces", at_least=1)
    profile_step_end: int = option(12, "first step that --profile does not trace any more", at_least=2)
    profile_ranks: tuple[int, ...] = option((0,), "ranks that --profile traces")
    tensorboard_dir: str | None = option(None, "write the metrics for TensorBoard there", metavar="DIR")
    wandb_project: str | None = option(
        None,
        "write the metrics for Weights & Biases under this project, offline unless WANDB_MODE says otherwise",
    )
    wandb_save_dir: str | None = option(None, "directory of the Weights & Biases files", metavar="DIR")
