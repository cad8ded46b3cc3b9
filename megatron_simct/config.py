"""Every option, its default, its unit and its help. `arguments.py` spells these fields as command-line flags.

A field `train_iters` is the flag `--train-iters` and the key `train_iters` of a --config-file. Flags that Megatron-LM
or slime have keep their name and meaning; ours carry the prefix `simct`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_simct.evaluation.benchmarks import Name as Benchmark


def option(default: Any, text: str, *, metavar: str | None = None) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text, "metavar": metavar})


Interface = Literal[
    "paper", "sum", "code", "code_gh", "exact", "strict", "strict_topk", "no_unit_loss", "random_unit",
    "uld", "alm", "bytes", "kd", "sft",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js"]


@dataclass(frozen=True, kw_only=True)
class InterfaceConfig:
    """How the two models' next-token distributions are compared. Flags: --simct-*"""

    interface: Interface = option(
        "paper",
        "paper: shared tokens plus the realised multi-token unit, mean log-probability (SimCT, Eq. 6-9); "
        "sum: the same with the unit's whole log-probability; "
        "code: SimCT's released code, its walk and raw logits; code_gh: that without rows of low teacher mass; "
        "exact: a partition of events, the unit one of them and all else another; "
        "strict: shared tokens at 1:1 positions only; strict_topk: the student's --simct-topk likeliest of them; "
        "no_unit_loss: paper, without the loss of a share --simct-rho of the units; "
        "random_unit: strict, with a share --simct-rho of the positions joined to the next one as units; "
        "uld: sorted distributions at 1:1 positions; alm: the probability of each unit alone; "
        "bytes: next-byte distributions; kd: the whole vocabulary of one common tokenizer; "
        "sft: cross entropy on given responses, no teacher",
    )
    divergence: Divergence = option(
        "reverse_kl", "KL(student || teacher), KL(teacher || student), or the generalised Jensen-Shannon divergence"
    )
    temperature: float = option(1.0, "divides the row's scores before the softmax over U; no squared factor")
    js_beta: float = option(0.5, "weight of the teacher in the mixture of --simct-divergence js")
    alm_temperature: float = option(float("inf"), "temperature of the binary events of interface alm; inf: the limit")
    topk: int = option(16, "shared tokens that strict_topk compares in a row")
    uld_topk: int = option(1024, "largest probabilities of each model that uld compares one by one; 0: all")
    unit_weight: Literal["one", "student_length"] = option(
        "one", "what the loss of a multi-token unit is multiplied by: 1, or the number of its student tokens"
    )
    mask_whitespace: bool = option(
        False, "leave out segments that are blanks only, where models differ by their tokenizers' taste"
    )
    min_teacher_mass: float = option(
        0.0, "leave out segments where the teacher gives the compared tokens and the unit together less than this"
    )
    stop_bridge: bool = option(True, "compare the stop tokens, the student's with all of the teacher's as one")
    rho: float = option(0.5, "share of no_unit_loss and random_unit")
    interface_seed: int = option(0, "seed of no_unit_loss and random_unit")
    loss_memory_mib: int = option(
        128, "what the loss may hold of logits at a time, in MiB: sets how many columns of the vocabulary a tile has"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model and its tokenizer. Flags of the student have no prefix, those of the teacher start with --teacher-."""

    hf_checkpoint: str | None = option(
        None,
        "Hugging Face folder: config.json is the architecture, safetensors are the weights; random ones without",
        metavar="DIR",
    )
    tokenizer_model: str | None = option(
        None,
        "Hugging Face tokenizer.json or its folder, SentencePiece .model, tekken .json, or tiktoken ranks "
        "NAME.tiktoken beside NAME.tiktoken.json; default: the model's own folder",
        metavar="FILE",
    )
    pretrained_checkpoint: str | None = option(
        None,
        "Megatron checkpoint directory whose weights the model starts from, before those of --hf-checkpoint",
        metavar="DIR",
    )
    stop_token_ids: tuple[int, ...] = option(
        (),
        "ids that end a response, the first being the one a response is given; default: generation_config.json's "
        "beside the tokenizer, else the tokenizer's own",
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this times the tensor-parallel size; padded ids are never scored"
    )

    @property
    def folder(self) -> str:
        """--hf-checkpoint, once `check` has found it given."""
        assert self.hf_checkpoint is not None, "check() refuses a job without this folder"
        return self.hf_checkpoint

    @property
    def tokenizer(self) -> str | None:
        """--tokenizer-model, else --hf-checkpoint where that folder holds a tokenizer."""
        from megatron_simct.alignment.hf_folder import tokenizer_file

        if self.tokenizer_model is None and self.hf_checkpoint and tokenizer_file(Path(self.hf_checkpoint)):
            return self.hf_checkpoint
        return self.tokenizer_model


@dataclass(frozen=True, kw_only=True)
class TeacherJobConfig:
    """A teacher that runs as a job of its own (megatron_simct/serve_teacher.py). Flags: --teacher-*"""

    endpoint: tuple[str, ...] = option(
        (),
        "--run-dir of the teacher's job, where its replicas make themselves known; or their addresses, "
        "tcp://HOST:PORT ...; default: the teacher runs on the student's own ranks",
        metavar="DIR",
    )
    client_key: str | None = option(
        None, "client_key.json of the teacher's job, for tcp:// addresses that are given by hand", metavar="FILE"
    )
    timeout_minutes: float = option(5.0, "end the run, with a checkpoint, after so long without an answer that is due")
    window_tokens: int = option(65536, "tokens that one replica is given before it has answered")
    cache: str | None = option(
        None,
        "keep the answers of --teacher-endpoint in this directory, and ask only for what is not there",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A second teacher, in a job of its own, that is mixed with the first byte by byte. Flags: --second-teacher-*"""

    endpoint: tuple[str, ...] = option((), "as --teacher-endpoint, of the second teacher's job", metavar="DIR")
    client_key: str | None = option(None, "as --teacher-client-key", metavar="FILE")
    weight: float = option(
        0.5, "its share of the probability of the next byte, the first teacher's being what remains of 1"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over processes. Data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer and the vocabulary")
    pipeline_model_parallel_size: int = option(1, "stages of consecutive layers, one a rank")
    num_virtual_stages_per_pipeline_rank: int = option(
        1,
        "pieces of the model that each pipeline rank holds; above 1 the schedule interleaves them, with less idle time",
    )
    context_parallel_size: int = option(1, "ranks that share each sequence (this version: 1)")
    expert_model_parallel_size: int = option(1, "data-parallel ranks that share the experts of each layer")
    sequence_parallel: bool = option(False, "split norms and residuals along the sequence too, over the tensor ranks")
    overlap_grad_reduce: bool = option(
        False, "sum gradients over data-parallel ranks bucket by bucket, while the backward pass still runs"
    )
    ddp_bucket_size: int | None = option(
        None, "parameters of a bucket of --overlap-grad-reduce; default: Megatron-Core's, which grows with the ranks"
    )
    distributed_timeout_minutes: int = option(10, "give up on a collective after this many minutes")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, one JSON object a line, and how the two tokenizers' ids are paired."""

    prompt_data: str | None = option(None, "JSONL file of training prompts", metavar="FILE")
    input_key: str = option("prompt", "key of the prompt in each row: a text, or messages; without it, 'messages'")
    apply_chat_template: bool = option(
        False, "write each prompt with the chat template of each model's own folder; rows with messages need it"
    )
    response_key: str = option("response", "key of the given response, read by --simct-interface sft")
    label_key: str = option("label", "key of the expected response, read by evaluation")
    rollout_shuffle: bool = option(True, "reshuffle the prompts at every epoch, from --seed")
    eval_prompt_data: str | None = option(
        None, "file of held-out prompts: JSONL with labels, or that of --eval-benchmark", metavar="FILE"
    )
    simct_alignment_map: str | None = option(
        None,
        "alignment map of the two tokenizers, a folder of tools/build_alignment_map.py; default: built at start",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling from the student's current weights."""

    rollout_batch_size: int = option(64, "prompts a step")
    n_samples_per_prompt: int = option(1, "responses a prompt")
    rollout_temperature: float = option(1.0, "0 is greedy; log-probs are always of the untempered distribution")
    rollout_top_p: float = option(1.0, "sample from the smallest set of tokens with this much probability")
    rollout_top_k: int = option(-1, "sample from this many most probable tokens, before --rollout-top-p; -1: from all")
    rollout_max_prompt_len: int = option(2048, "prompts with more student or teacher tokens are skipped and counted")
    rollout_max_response_len: int = option(1024, "response tokens, the stop token included")
    rollout_engine_batch_size: int = option(64, "sequences decoded together on one rank: bounds the KV cache")
    rollout_wave_size: int | None = option(
        None,
        "prompts that one rank samples before they go to the teacher, while it samples the next; default: all at once",
    )
    save_debug_rollout_data: str | None = option(None, "write each step's rollouts under this directory", metavar="DIR")
    load_debug_rollout_data: str | None = option(
        None, "read each step's rollouts from this directory, instead of sampling", metavar="DIR"
    )
    save_debug_scored_data: str | None = option(
        None, "write what the teacher says of each rollout under this directory", metavar="DIR"
    )
    load_debug_scored_data: str | None = option(
        None, "read what the teacher says from this directory; no teacher is loaded or asked", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The update: one optimizer step on each rollout batch."""

    micro_batch_size: int = option(8, "sequences of one forward and backward pass on one rank")
    global_batch_size: int | None = option(
        None, "sequences of one optimizer step; default and only value: rollout batch size x samples a prompt"
    )
    schedule: Literal["on_policy", "one_step_off"] = option(
        "on_policy",
        "one_step_off: the rollouts of the next step are sampled, and are with --teacher-endpoint, before this step's "
        "update, so with weights one step older",
    )
    train_iters: int = option(100, "optimizer steps")
    seed: int = option(1234, "weights, order of the prompts, sampling")
    bf16: bool = option(False, "bf16 parameters with fp32 master weights and gradients (GPU only)")
    optimizer: Literal["adam", "sgd"] = option("adam", "adam is AdamW, as in Megatron-LM")
    lr: float = option(1e-6, "peak learning rate")
    min_lr: float = option(1e-8, "learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine"] = option("cosine", "shape of the decay over --train-iters")
    lr_warmup_fraction: float = option(0.05, "share of --train-iters over which the rate rises from 0")
    weight_decay: float = option(0.0, "decoupled weight decay")
    adam_beta1: float = option(0.9, "decay of Adam's mean of gradients")
    adam_beta2: float = option(0.98, "decay of Adam's mean of squared gradients")
    adam_eps: float = option(1e-8, "added to the root of Adam's mean of squared gradients")
    clip_grad: float = option(1.0, "clip the gradient to this global norm; 0: never")

    @property
    def lag(self) -> int:
        """Optimizer steps that weights may have seen since a step's rollouts were sampled."""
        return 1 if self.schedule == "one_step_off" else 0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How many greedy and sampled responses to held-out prompts are right."""

    eval_benchmark: Benchmark = option(
        "exact_match",
        "what --eval-prompt-data holds, and so what is right: the label itself, or by the first metric that "
        "tools/evaluate.py has for the benchmark; mbpp, humaneval and livecodebench run programs, confined",
    )
    eval_interval: int | None = option(
        None, "evaluate every so many steps; default: before the first and after the last"
    )
    eval_temperature: float = option(1.0, "temperature of the sampled responses")
    eval_samples: int = option(1, "sampled responses a prompt; 0: greedy only")
    exit_eval_accuracy: float | None = option(None, "stop training when greedy accuracy reaches this share")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    save: str | None = option(
        None, "directory for checkpoints: one at the end, and every --save-interval steps", metavar="DIR"
    )
    save_interval: int | None = option(None, "steps between checkpoints")
    save_retain: int | None = option(None, "keep this many of the newest checkpoints; default: all")
    load: str | None = option(
        None,
        "resume from this directory's newest checkpoint; where it is that of --save and has none yet, start afresh",
        metavar="DIR",
    )
    exit_signal_handler: bool = option(False, "on SIGTERM finish the step, save a checkpoint and exit with code 0")
    exit_duration_in_mins: float | None = option(
        None, "save a checkpoint and exit with code 0 after the first step that ends later than this"
    )
    run_dir: str | None = option(
        None, "directory for metrics.jsonl, samples.jsonl and config.yaml (tools/plot_run.py shows them)", metavar="DIR"
    )
    sample_interval: int = option(
        20, "steps between the responses that samples.jsonl shows with their units and losses"
    )
    log_interval: int = option(1, "steps between log lines")
    tensorboard_dir: str | None = option(None, "write the metrics for TensorBoard there", metavar="DIR")
    wandb_project: str | None = option(
        None, "write the metrics for Weights & Biases under this project, offline unless WANDB_MODE says otherwise"
    )
    wandb_save_dir: str | None = option(None, "directory of the Weights & Biases files", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole job. Groups with a prefix in their metadata spell it before each of their flags."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "teacher"})
    teacher_job: TeacherJobConfig = field(default_factory=TeacherJobConfig, metadata={"prefix": "teacher"})
    second_teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "second_teacher"})
    mixture: MixtureConfig = field(default_factory=MixtureConfig, metadata={"prefix": "second_teacher"})
    interface: InterfaceConfig = field(default_factory=InterfaceConfig, metadata={"prefix": "simct"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step."""
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    def check(self, *, data_parallel_size: int) -> None:
        """ValueError, with the numbers and the flag, where options have no meaning or contradict each other."""
        self._check_ranges()
        size = self.global_batch_size
        wanted = self.training.global_batch_size
        if wanted is not None and wanted != size:
            raise ValueError(
                f"--global-batch-size {wanted}: training is on policy, one optimizer step a rollout batch, so it "
                f"must equal --rollout-batch-size ({self.rollout.rollout_batch_size}) x --n-samples-per-prompt "
                f"({self.rollout.n_samples_per_prompt}) = {size}"
            )
        step = self.training.micro_batch_size * data_parallel_size
        if size % step:
            unit = step // math.gcd(step, self.rollout.n_samples_per_prompt)
            below = self.rollout.rollout_batch_size // unit * unit
            fitting = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"global batch size ({size}) must be a multiple of --micro-batch-size "
                f"({self.training.micro_batch_size}) x data-parallel size ({data_parallel_size}) = {step}; use a "
                f"--rollout-batch-size of {fitting}"
            )
        stages = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1 and size // step % stages:
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank {self.parallel.num_virtual_stages_per_pipeline_rank}: the "
                f"interleaved schedule needs micro-batches ({size // step} a step: global batch size ({size}) / "
                f"(--micro-batch-size x data-parallel size) ({step})) in a multiple of "
                f"--pipeline-model-parallel-size ({stages})"
            )
        required = {
            "--hf-checkpoint": self.model.hf_checkpoint,
            "--tokenizer-model": self.model.tokenizer,
            "--prompt-data": self.data.prompt_data,
        }
        if self.interface.interface != "sft":
            required["--teacher-hf-checkpoint"] = self.teacher.hf_checkpoint
            required["--teacher-tokenizer-model"] = self.teacher.tokenizer
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: --simct-interface {self.interface.interface} needs it")
        if self.evaluation.eval_benchmark != "exact_match" and self.data.eval_prompt_data is None:
            raise ValueError(
                f"--eval-benchmark {self.evaluation.eval_benchmark} needs --eval-prompt-data, the benchmark's file"
            )
        if self.evaluation.exit_eval_accuracy is not None and self.data.eval_prompt_data is None:
            raise ValueError("--exit-eval-accuracy needs --eval-prompt-data, a held-out set to measure it on")
        needs_save = {
            "--exit-signal-handler": self.output.exit_signal_handler,
            "--exit-duration-in-mins": self.output.exit_duration_in_mins is not None,
            "--save-interval": bool(self.output.save_interval),
            "--save-retain": self.output.save_retain is not None,
        }
        for flag, given in needs_save.items():
            if given and self.output.save is None:
                raise ValueError(f"{flag} needs --save, the directory of checkpoints")
        if self.parallel.ddp_bucket_size is not None and not self.parallel.overlap_grad_reduce:
            raise ValueError("--ddp-bucket-size needs --overlap-grad-reduce")
        if self.teacher_job.endpoint and self.teacher_job.timeout_minutes >= self.parallel.distributed_timeout_minutes:
            raise ValueError(
                f"--teacher-timeout-minutes ({self.teacher_job.timeout_minutes:g}) must be below "
                f"--distributed-timeout-minutes ({self.parallel.distributed_timeout_minutes}): while one rank waits "
                "for the teacher, others wait for that rank"
            )
        if self.training.lag and not self.teacher_job.endpoint:
            raise ValueError(
                "--schedule one_step_off needs --teacher-endpoint: it keeps a teacher in another job at work"
            )
        if self.teacher_job.cache is not None and not self.teacher_job.endpoint:
            raise ValueError("--teacher-cache needs --teacher-endpoint; --load-debug-scored-data reads one without it")
        if self.rollout.load_debug_scored_data is not None and self.teacher_job.endpoint:
            raise ValueError("--load-debug-scored-data needs no --teacher-endpoint; --teacher-cache asks for the rest")
        for prefix, places in (("", self.teacher_job.endpoint), ("second-", self.mixture.endpoint)):
            num_addresses = sum("://" in place for place in places)
            if num_addresses < len(places) and len(places) > 1:
                raise ValueError(
                    f"--{prefix}teacher-endpoint {' '.join(places)}: give one directory, or addresses only"
                )
        self._check_mixture()
        if self.output.wandb_save_dir is not None and self.output.wandb_project is None:
            raise ValueError("--wandb-save-dir needs --wandb-project")
        if self.training.bf16 and not _cuda_available():
            raise ValueError("--bf16 needs a GPU in this version; leave it out on CPU")

    @property
    def mixes_teachers(self) -> bool:
        """Whether there is a second teacher."""
        return bool(self.mixture.endpoint)

    def _check_mixture(self) -> None:
        """ValueError for options of a second teacher that is none, or cannot be mixed with the first."""
        if not self.mixes_teachers:
            if (self.second_teacher, self.mixture) != (ModelConfig(), MixtureConfig()):
                raise ValueError("--second-teacher-endpoint is missing: the other --second-teacher flags need it")
            return
        if self.interface.interface != "bytes":
            raise ValueError(
                f"--second-teacher-endpoint: --simct-interface {self.interface.interface} compares tokens, and only "
                "distributions over bytes can be mixed; use --simct-interface bytes"
            )
        for flag, value in {
            "--teacher-endpoint": self.teacher_job.endpoint,
            "--second-teacher-hf-checkpoint": self.second_teacher.hf_checkpoint,
            "--second-teacher-tokenizer-model": self.second_teacher.tokenizer,
        }.items():
            if not value:
                raise ValueError(f"missing {flag}: --second-teacher-endpoint needs it")
        for flag, value in {
            "--save-debug-scored-data": self.rollout.save_debug_scored_data,
            "--teacher-cache": self.teacher_job.cache,
            "--simct-alignment-map": self.data.simct_alignment_map,
        }.items():
            if value is not None:
                raise ValueError(f"{flag} is of one teacher; leave it out, or --second-teacher-endpoint")
        if not 0 < self.mixture.weight < 1:
            raise ValueError(f"--second-teacher-weight {self.mixture.weight}: must lie strictly between 0 and 1")

    def _check_ranges(self) -> None:
        """ValueError for a number outside the range in which it means something; nan is outside of every range."""
        rollout, training, output = self.rollout, self.training, self.output
        at_least = {
            "--make-vocab-size-divisible-by": (self.model.make_vocab_size_divisible_by, 1),
            "--teacher-make-vocab-size-divisible-by": (self.teacher.make_vocab_size_divisible_by, 1),
            "--ddp-bucket-size": (1 if self.parallel.ddp_bucket_size is None else self.parallel.ddp_bucket_size, 1),
            "--teacher-timeout-minutes": (self.teacher_job.timeout_minutes, 0),
            "--teacher-window-tokens": (self.teacher_job.window_tokens, 1),
            "--distributed-timeout-minutes": (self.parallel.distributed_timeout_minutes, 1),
            "--rollout-batch-size": (rollout.rollout_batch_size, 1),
            "--n-samples-per-prompt": (rollout.n_samples_per_prompt, 1),
            "--rollout-temperature": (rollout.rollout_temperature, 0),
            "--rollout-max-prompt-len": (rollout.rollout_max_prompt_len, 1),
            "--rollout-max-response-len": (rollout.rollout_max_response_len, 1),
            "--rollout-engine-batch-size": (rollout.rollout_engine_batch_size, 1),
            "--rollout-wave-size": (1 if rollout.rollout_wave_size is None else rollout.rollout_wave_size, 1),
            "--micro-batch-size": (training.micro_batch_size, 1),
            "--train-iters": (training.train_iters, 1),
            "--seed": (training.seed, 0),
            "--lr": (training.lr, 0),
            "--min-lr": (training.min_lr, 0),
            "--weight-decay": (training.weight_decay, 0),
            "--clip-grad": (training.clip_grad, 0),
            "--eval-interval": (self.evaluation.eval_interval or 0, 0),
            "--eval-temperature": (self.evaluation.eval_temperature, 0),
            "--eval-samples": (self.evaluation.eval_samples, 0),
            "--save-interval": (output.save_interval or 0, 0),
            "--save-retain": (1 if output.save_retain is None else output.save_retain, 1),
            "--exit-duration-in-mins": (output.exit_duration_in_mins or 0, 0),
            "--log-interval": (output.log_interval, 1),
            "--sample-interval": (output.sample_interval, 1),
        }
        for flag, (value, lowest) in at_least.items():
            if not value >= lowest:
                raise ValueError(f"{flag} {value}: must be at least {lowest}")
            if value == math.inf and flag not in ("--clip-grad", "--exit-duration-in-mins"):
                raise ValueError(f"{flag} {value}: must be finite")
        if not 0 < rollout.rollout_top_p <= 1:
            raise ValueError(f"--rollout-top-p {rollout.rollout_top_p}: must be above 0 and at most 1")
        if rollout.rollout_top_k < 1 and rollout.rollout_top_k != -1:
            raise ValueError(f"--rollout-top-k {rollout.rollout_top_k}: must be at least 1, or -1 for all tokens")
        if training.seed >= 2**63:
            raise ValueError(f"--seed {training.seed}: must be below 2**63")
        below_one = {
            "--lr-warmup-fraction": training.lr_warmup_fraction,
            "--adam-beta1": training.adam_beta1,
            "--adam-beta2": training.adam_beta2,
        }
        for flag, value in below_one.items():
            if not 0 <= value < 1:
                raise ValueError(f"{flag} {value}: must be at least 0 and below 1")
        accuracy = self.evaluation.exit_eval_accuracy
        if accuracy is not None and not 0 <= accuracy <= 1:
            raise ValueError(f"--exit-eval-accuracy {accuracy}: must be at least 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How the teacher's job answers."""

    run_dir: str | None = option(
        None, "directory where replicas make themselves known, the --teacher-endpoint of the student", metavar="DIR"
    )
    bind: str = option(
        "ipc",
        "ipc: students on this host; tcp://HOST or tcp://HOST:PORT: encrypted, HOST as students reach it, replica i at "
        "PORT + i",
        metavar="ADDRESS",
    )
    teacher_hidden_dtype: Literal["fp32", "bf16", "int8"] = option(
        "bf16",
        "what hidden states are rounded to, and sent as; int8 has a scale a row; below fp32 `bytes` is sent as float16",
    )
    max_tokens_per_batch: int = option(16384, "tokens of one micro-batch, padding included; longer samples are refused")
    simct_alignment_map: str | None = option(
        None, "the alignment map that students must use; default: any of this teacher's tokenizer", metavar="DIR"
    )
    rollout_max_prompt_len: int = option(2048, "as in the student's job; LongRoPE looks at it")
    rollout_max_response_len: int = option(1024, "likewise")
    bf16: bool = option(False, "bf16 parameters (GPU only)")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The whole job of a teacher."""

    teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "teacher"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def check(self) -> None:
        """ValueError, with the flag, where options have no meaning or one that is needed is missing."""
        required = {
            "--teacher-hf-checkpoint": self.teacher.hf_checkpoint,
            "--teacher-tokenizer-model": self.teacher.tokenizer,
            "--run-dir": self.serving.run_dir,
        }
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: a teacher's job needs it")
        at_least_one = {
            "--teacher-make-vocab-size-divisible-by": self.teacher.make_vocab_size_divisible_by,
            "--distributed-timeout-minutes": self.parallel.distributed_timeout_minutes,
            "--max-tokens-per-batch": self.serving.max_tokens_per_batch,
            "--rollout-max-prompt-len": self.serving.rollout_max_prompt_len,
            "--rollout-max-response-len": self.serving.rollout_max_response_len,
        }
        for flag, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")
        if self.serving.bf16 and not _cuda_available():
            raise ValueError("--bf16 needs a GPU in this version; leave it out on CPU")


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()
