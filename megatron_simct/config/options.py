"""Every option, its default, its unit and its help. `flags.py` spells these fields as command-line flags.

A field `train_iters` is the flag `--train-iters` and the key `train_iters` of a --config-file. Flags that
Megatron-LM or slime have keep their name and meaning; ours carry the prefix `simct`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from megatron_simct.config.interfaces import METHODS, VARIANTS, Interface, interface_help


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may be. nan is in no range, and inf only in one that names it."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False
    """Whether inf has a meaning."""
    other: float | None = None
    """One more value, with a meaning of its own."""
    note: str = ""
    """The end of the message."""

    def check(self, flag: str, value: float) -> None:
        """ValueError, with the flag and the bounds, for a value outside."""
        if value == self.other:
            return
        within = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if not within:
            raise ValueError(f"{flag} {value}: must {self}{self.note}")
        if value == math.inf and not self.infinite:
            raise ValueError(f"{flag} {value}: must be finite")

    def __str__(self) -> str:
        if self.above is not None and self.below is not None:
            return f"lie strictly between {self.above} and {self.below}"
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        names = (f"{name} {_spelled(bound)}" for name, bound in bounds.items() if bound is not None)
        return "be " + " and ".join(names)


def _spelled(bound: float) -> str:
    """A bound as a reader knows it: 2**63 in place of its 19 digits."""
    power = int(bound).bit_length() - 1
    return f"2**{power}" if power > 32 and bound == 2**power else str(bound)


def option(default: Any, text: str, *, metavar: str | None = None, **bounds: Any) -> Any:
    """A dataclass field with its help text, and the bounds of its Range."""
    return field(
        default=default,
        metadata={"help": text, "metavar": metavar, "range": Range(**bounds) if bounds else None},
    )


def key_of(prefix: str | None, name: str) -> str:
    """The key in a --config-file of a field in a group with this prefix."""
    return f"{prefix}_{name}" if prefix else name


def flag_of(key: str) -> str:
    """The flag of a key."""
    return "--" + key.replace("_", "-")


def check_ranges(group: Any, *, prefix: str | None = None) -> None:
    """ValueError, with the flag, where a number of the group is outside of its range; None is in every
    range.
    """
    for one in fields(group):
        value, bounds = getattr(group, one.name), one.metadata["range"]
        if bounds is not None and value is not None:
            bounds.check(flag_of(key_of(prefix, one.name)), value)


Divergence = Literal["reverse_kl", "forward_kl", "js"]
Benchmark = Literal["gsm8k", "math500", "mbpp", "humaneval", "livecodebench", "exact_match", "math_label"]


@dataclass(frozen=True, kw_only=True)
class InterfaceConfig:
    """How the two models' next-token distributions are compared. Flags: --simct-*"""

    interface: Interface = option("paper", interface_help())
    divergence: Divergence = option(
        "reverse_kl",
        "KL(student || teacher), KL(teacher || student), or the generalised Jensen-Shannon divergence",
    )
    temperature: float = option(
        1.0, "divides the row's scores before the softmax over U; no squared factor", above=0
    )
    js_beta: float = option(
        0.5,
        "weight of the teacher in the mixture of --simct-divergence js",
        above=0,
        below=1,
        note=": at the ends the divergence vanishes; use --simct-divergence reverse_kl or forward_kl for the "
        "limits",
    )
    alm_temperature: float = option(
        float("inf"),
        "temperature of the binary events of interface alm; inf: the limit",
        above=0,
        infinite=True,
    )
    topk: int = option(16, "shared tokens that strict_topk compares in a row", at_least=1)
    teacher_topk: int = option(
        64, "partition, topk_kl and bpm: likeliest tokens of the teacher in a row", at_least=1
    )
    child_weight: float = option(
        0.0,
        "bpm: weight of ESCD's child term: behind a token that the teacher would have gone on from within "
        "one of its own, the probability of going on so",
        at_least=0,
    )
    uld_topk: int = option(
        1024, "largest probabilities of each model that uld compares one by one; 0: all", at_least=0
    )
    unit_score: Literal["mean", "sum"] = option(
        "mean", "score of a multi-token unit in paper: the mean of its log-probabilities, or their sum"
    )
    span_mse: float = option(
        0.0,
        "strict: weight of the squared difference of both models' log-probabilities of each multi-token unit",
        at_least=0,
    )
    scalar: Literal["dpca", "spread"] = option(
        "dpca",
        "scalar: how a unit's number is shared out, in proportion to the student's own log-probs, or evenly",
    )
    drop_units: float = option(
        0.0,
        "ablation: share of the multi-token units whose loss paper leaves out, at random",
        at_least=0,
        at_most=1,
    )
    random_units: float | None = option(
        None,
        "ablation: paper with this share of the 1:1 positions joined to the next one as units, in place of "
        "real units",
        at_least=0,
        at_most=1,
    )
    unit_weight: Literal["one", "student_length"] = option(
        "one", "what the loss of a multi-token unit is multiplied by: 1, or the number of its student tokens"
    )
    mask_whitespace: bool = option(
        False, "leave out segments that are blanks only, where the models differ only because of tokenization"
    )
    min_teacher_mass: float = option(
        0.0,
        "leave out segments where the teacher gives the compared tokens and the unit together less than this",
        at_least=0,
        at_most=1,
    )
    byte_bounds: Literal["any", "longest-match"] = option(
        "longest-match",
        "what interface bytes assumes of the tokenizers where a model's probability of the next byte is "
        "known in part: any: nothing, the loss is the least divergence that the unknown part permits; "
        "longest-match: always the longest token, which biases the loss of others",
    )
    shared: Literal["bytes", "released"] = option(
        "bytes",
        "tokens that code takes for shared: bytes: of equal bytes; released: of equal strings in both "
        "tokenizer.json, 'Ġ' read as '▁', as SimCT's released code has it: fewer pairs, and some of "
        "different bytes",
    )
    stop_bridge: bool = option(
        True, "compare the stop tokens, the student's with all of the teacher's as one"
    )
    rho: float = option(0.5, "RHO of the older names no_unit_loss and random_unit", at_least=0, at_most=1)
    interface_seed: int = option(0, "seed of --simct-drop-units and --simct-random-units")
    loss_memory_mib: int = option(
        128,
        "what the loss may hold of logits at a time, in MiB: sets how many columns of the vocabulary a tile "
        "has",
    )

    def method(self) -> InterfaceConfig:
        """The same with an older name of a variant spelled as its method and the values of its fields."""
        if self.interface not in VARIANTS:
            return self
        name, changes = VARIANTS[self.interface]
        values: dict[str, Any] = {
            field: self.rho if value == "rho" else value for field, value in changes.items()
        }
        return replace(self, **values | {"interface": name})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model and its tokenizer.

    Flags of the student have no prefix, those of the teacher start with --teacher-.
    """

    hf_checkpoint: str | None = option(
        None,
        "Hugging Face folder: config.json is the architecture, safetensors are the weights; random ones "
        "without",
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
        "Megatron checkpoint to initialise from; takes precedence over the weights of --hf-checkpoint",
        metavar="DIR",
    )
    hf_sha256: str | None = option(
        None,
        "file as sha256sum writes it, with a line for each file of weights in --hf-checkpoint; default: "
        "SHA256SUMS there, or what the Hugging Face hub said at the download",
        metavar="FILE",
    )
    stop_token_ids: tuple[int, ...] = option(
        (),
        "ids that end a response, the first being the one a response is given; default: "
        "generation_config.json's beside the tokenizer, else the tokenizer's own",
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "pad the vocabulary to a multiple of this times the tensor-parallel size; padded ids are never "
        "scored",
        at_least=1,
        at_most=2**20,
    )
    chat_template_kwargs: str | None = option(
        None,
        'arguments of the chat template, a JSON object such as {"enable_thinking": false}; read where '
        "prompts are "
        "rendered, which a teacher's job does not do",
        metavar="JSON",
    )

    @property
    def folder(self) -> str:
        """--hf-checkpoint, once `check` has found it given."""
        assert self.hf_checkpoint is not None, "check() refuses a job without this folder"
        return self.hf_checkpoint

    @property
    def tokenizer_place(self) -> str | None:
        """Where the tokenizer is looked for: --tokenizer-model, else --hf-checkpoint."""
        return self.tokenizer_model or self.hf_checkpoint


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
        None,
        "client_key.json of the teacher's job, for tcp:// addresses that are given by hand",
        metavar="FILE",
    )
    timeout_minutes: float = option(
        5.0, "save a checkpoint and stop if a pending teacher request gets no answer for so long", at_least=0
    )
    window_tokens: int = option(65536, "maximum tokens in flight per teacher replica", at_least=1)
    cache: str | None = option(
        None,
        "keep the answers of --teacher-endpoint in this directory, and ask only for what is not there",
        metavar="DIR",
    )
    ema: float | None = option(
        None,
        "after each update the teacher's weights become this share of themselves and the rest of the "
        "student's: an exponential average, for a model that teaches itself; the teacher is on the student's "
        "own ranks",
        above=0,
        below=1,
        metavar="DECAY",
    )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A second teacher, in a job of its own, that is mixed with the first byte by byte.

    Flags: --second-teacher-*
    """

    endpoint: tuple[str, ...] = option(
        (), "as --teacher-endpoint, of the second teacher's job", metavar="DIR"
    )
    client_key: str | None = option(None, "as --teacher-client-key", metavar="FILE")
    weight: float = option(
        0.5,
        "its share of the probability of the next byte, the first teacher's being what remains of 1",
        above=0,
        below=1,
    )


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, one JSON object a line, and how the two tokenizers' ids are paired."""

    prompt_data: str | None = option(
        None, "file of training prompts: JSON lines, a JSON list, Parquet or Arrow", metavar="FILE"
    )
    input_key: str = option(
        "prompt",
        "key of the prompt in each row: a text, or messages; without it, 'messages' or 'conversations'",
    )
    apply_chat_template: bool = option(
        False,
        "write each prompt with the chat template of each model's own folder; rows with messages need it",
    )
    chat_template_date: str | None = option(
        None,
        "the date that strftime_now gives in chat templates; default: the day the run starts, kept when it "
        "resumes",
        metavar="YYYY-MM-DD",
    )
    response_key: str = option(
        "response",
        "key of the given response, read by --simct-interface sft; without it, the answer that closes the "
        "messages",
    )
    label_key: str = option("label", "key of the expected response, read by evaluation")
    rollout_shuffle: bool = option(True, "reshuffle the prompts at every epoch, from --seed")
    eval_prompt_data: str | None = option(
        None, "file of held-out prompts: JSONL with labels, or that of --eval-benchmark", metavar="FILE"
    )
    simct_alignment_map: str | None = option(
        None,
        "alignment map of the two tokenizers, a folder of tools/build_alignment_map.py; default: built at "
        "start",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling from the student's current weights."""

    rollout_batch_size: int = option(64, "prompts a step", at_least=1, at_most=2**24)
    n_samples_per_prompt: int = option(1, "responses a prompt", at_least=1, at_most=2**16)
    rollout_temperature: float = option(
        1.0, "0 is greedy; log-probs are always of the untempered distribution", at_least=0
    )
    rollout_top_p: float = option(
        1.0, "sample from the smallest set of tokens with this much probability", above=0, at_most=1
    )
    rollout_top_k: int = option(
        -1,
        "sample from this many most probable tokens, before --rollout-top-p; -1: from all",
        at_least=1,
        other=-1,
        note=", or -1 for all tokens",
    )
    rollout_max_prompt_len: int = option(
        2048, "prompts with more student or teacher tokens are skipped and counted", at_least=1, at_most=2**24
    )
    rollout_max_response_len: int = option(
        1024, "response tokens, the stop token included", at_least=1, at_most=2**24
    )
    rollout_engine_batch_size: int = option(
        64, "sequences decoded together on one rank: bounds the KV cache", at_least=1
    )
    rollout_engine: Literal["megatron", "vllm"] = option(
        "megatron",
        "what samples: the training weights on their own ranks, or vLLM servers of "
        "--rollout-engine-endpoint, which are handed the weights after each step",
    )
    rollout_engine_endpoint: tuple[str, ...] = option(
        (),
        "http://HOST:PORT of vLLM servers that generate; each data-parallel replica asks one",
        metavar="URL",
    )
    rollout_engine_weights: str | None = option(
        None,
        "directory through which weights are handed over, which the servers see under the same name (on one "
        "host a folder in memory such as /dev/shm/NAME); default: engine_weights under --run-dir",
        metavar="DIR",
    )
    rollout_engine_timeout_minutes: float = option(
        5.0,
        "how long to wait for a rollout engine that does not answer, or for one of its responses",
        above=0,
    )
    rollout_logprob_bound: float = option(
        0.1,
        "stop where an engine's log-probs of a response differ from the training weights' by more nats in "
        "the mean",
        above=0,
    )
    rollout_importance_weights: float | None = option(
        None,
        "multiply the loss behind a response's first tokens by how likely these are under the weights in "
        "training, relative to those that sampled them, at most by so much (2 is usual); default: no weights",
        at_least=1,
    )
    rollout_max_lag: int | None = option(
        None,
        "stop where a response was sampled by weights that are more optimizer steps old; default: 0, with "
        "--schedule one_step_off 1, and stored responses may be of any age; with --rollout-oversample one "
        "more, and a step waits for responses that would be older in the next one",
        at_least=0,
    )
    rollout_oversample: float = option(
        0.0,
        "with --rollout-engine vllm: prompts in the works beside those that a step needs, as a share of "
        "--rollout-batch-size, rounded up on each data-parallel replica; a step closes as soon as it has the "
        "responses that it needs, and the next steps go on with the text of the others",
        at_least=0,
        at_most=1,
    )
    rollout_wave_size: int | None = option(
        None,
        "prompts that one rank samples before they go to the teacher, while it samples the next; default: "
        "all at once",
        at_least=1,
    )
    save_debug_rollout_data: str | None = option(
        None, "write each step's rollouts under this directory", metavar="DIR"
    )
    load_debug_rollout_data: str | None = option(
        None, "read each step's rollouts from this directory, instead of sampling", metavar="DIR"
    )
    save_debug_scored_data: str | None = option(
        None, "write what the teacher says of each rollout under this directory", metavar="DIR"
    )
    load_debug_scored_data: str | None = option(
        None, "read what the teacher says from this directory; no teacher is loaded or asked", metavar="DIR"
    )


_PLACE = re.compile(r"[\w.]+:\w+")
GRADED_REWARDS: dict[str, Benchmark] = {"exact_match": "exact_match", "math": "math_label", "code": "mbpp"}
"""Values of --reward that are graders of ours, and the benchmark whose rows each of them reads."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward beside the comparison, or alone (--simct-interface reward)."""

    reward: str | None = option(
        None,
        "what a response is worth: MODULE:FUNCTION, called with prompt, response and row; or exact_match "
        "(the row's label), math (the same by Math-Verify), code (programs by the row's test_list, confined)",
        metavar="FUNCTION",
    )
    reward_weight: float = option(1.0, "weight of its policy-gradient term beside --simct-interface", above=0)
    reward_workers: int = option(4, "processes of each model replica that call the function", at_least=1)
    reward_timeout_seconds: float = option(10.0, "a response that takes longer has no reward", above=0)


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


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How many greedy and sampled responses to held-out prompts are right."""

    eval_benchmark: Benchmark = option(
        "exact_match",
        "what --eval-prompt-data holds, and so what is right: the label itself, or by the first metric that "
        "tools/evaluate.py has for the benchmark; mbpp, humaneval and livecodebench run programs, confined",
    )
    eval_interval: int | None = option(
        None, "evaluate every so many steps; default: before the first and after the last", at_least=0
    )
    eval_temperature: float = option(1.0, "temperature of the sampled responses", at_least=0)
    eval_samples: int = option(1, "sampled responses a prompt; 0: greedy only", at_least=0)
    exit_eval_accuracy: float | None = option(
        None, "stop training when greedy accuracy reaches this share", at_least=0, at_most=1
    )


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
    reward: RewardConfig = field(default_factory=RewardConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig, metadata={"prefix": "lora"})
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def needs_teacher(self) -> bool:
        """Whether the interface compares with one."""
        method = METHODS.get(self.interface.method().interface)
        return method is None or method.teacher

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step."""
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    def check(self, *, data_parallel_size: int) -> None:
        """ValueError, with the numbers and the flag, where options have no meaning or contradict each
        other.
        """
        _check_all_ranges(self)
        size = self.global_batch_size
        wanted = self.training.global_batch_size
        if wanted is not None and wanted != size:
            raise ValueError(
                f"--global-batch-size {wanted}: training is on policy, one optimizer step a rollout batch, "
                f"so it must equal --rollout-batch-size ({self.rollout.rollout_batch_size}) x "
                f"--n-samples-per-prompt ({self.rollout.n_samples_per_prompt}) = {size}"
            )
        self._check_micro_batches(size, data_parallel_size)
        required = {
            "--hf-checkpoint": self.model.hf_checkpoint,
            "--tokenizer-model": self.model.tokenizer_place,
            "--prompt-data": self.data.prompt_data,
        }
        if self.needs_teacher:
            required["--teacher-hf-checkpoint"] = self.teacher.hf_checkpoint
            required["--teacher-tokenizer-model"] = self.teacher.tokenizer_place
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(
                f"missing {', '.join(missing)}: --simct-interface {self.interface.interface} needs it"
            )
        if self.evaluation.eval_benchmark != "exact_match" and self.data.eval_prompt_data is None:
            raise ValueError(
                f"--eval-benchmark {self.evaluation.eval_benchmark} needs --eval-prompt-data, the "
                "benchmark's file"
            )
        if self.evaluation.exit_eval_accuracy is not None and self.data.eval_prompt_data is None:
            raise ValueError("--exit-eval-accuracy needs --eval-prompt-data, a held-out set to measure it on")
        needs_save = {
            "--exit-signal-handler": self.output.exit_signal_handler,
            "--exit-duration-in-mins": self.output.exit_duration_in_mins is not None,
            "--save-interval": bool(self.output.save_interval),
            "--save-retain": self.output.save_retain is not None,
            "--async-save": self.output.async_save,
        }
        for flag, given in needs_save.items():
            if given and self.output.save is None:
                raise ValueError(f"{flag} needs --save, the directory of checkpoints")
        if self.output.profile and self.output.run_dir is None:
            raise ValueError("--profile needs --run-dir, where the trace is written")
        if self.output.profile and self.output.profile_step_end <= self.output.profile_step_start:
            raise ValueError(
                f"--profile-step-end {self.output.profile_step_end}: must be above --profile-step-start "
                f"({self.output.profile_step_start})"
            )
        self._check_rollout_engine()
        self._check_oversampling(data_parallel_size)
        self._check_reward()
        self._check_importance_weights()
        if self.output.ckpt_step is not None and self.output.load is None:
            raise ValueError("--ckpt-step needs --load, the directory of checkpoints")
        self.update.check()
        self.lora.check()
        if self.lora.rank and self.model.pretrained_checkpoint is not None:
            raise ValueError(
                "--lora-rank needs the weights of --hf-checkpoint, beside which adapters are exported; "
                "convert --pretrained-checkpoint to such a folder first (convert_checkpoint.py "
                "megatron-to-hf)"
            )
        if self.update.overlap_param_gather and not self.parallel.overlap_grad_reduce:
            raise ValueError("--overlap-param-gather needs --overlap-grad-reduce")
        if self.update.use_distributed_optimizer and self.training.optimizer != "adam":
            raise ValueError(
                f"--use-distributed-optimizer: megatron-core has it for adam, not for --optimizer "
                f"{self.training.optimizer}"
            )
        if self.parallel.ddp_bucket_size is not None and not self.parallel.overlap_grad_reduce:
            raise ValueError("--ddp-bucket-size needs --overlap-grad-reduce")
        if (
            self.teacher_job.endpoint
            and self.teacher_job.timeout_minutes >= self.parallel.distributed_timeout_minutes
        ):
            raise ValueError(
                f"--teacher-timeout-minutes ({self.teacher_job.timeout_minutes:g}) must be below "
                f"--distributed-timeout-minutes ({self.parallel.distributed_timeout_minutes}): while one "
                "rank waits for the teacher, others wait for that rank"
            )
        if self.training.lag and not self.teacher_job.endpoint:
            raise ValueError(
                "--schedule one_step_off needs --teacher-endpoint: it keeps a teacher in another job at work"
            )
        if self.teacher_job.cache is not None and not self.teacher_job.endpoint:
            raise ValueError(
                "--teacher-cache needs --teacher-endpoint; --load-debug-scored-data reads one without it"
            )
        if self.rollout.load_debug_scored_data is not None and self.teacher_job.endpoint:
            raise ValueError(
                "--load-debug-scored-data needs no --teacher-endpoint; --teacher-cache asks for the rest"
            )
        for prefix, places in (("", self.teacher_job.endpoint), ("second-", self.mixture.endpoint)):
            num_addresses = sum("://" in place for place in places)
            if num_addresses < len(places) and len(places) > 1:
                raise ValueError(
                    f"--{prefix}teacher-endpoint {' '.join(places)}: give one directory, or addresses only"
                )
        self._check_mixture()
        self._check_average()
        for flag, text in {
            "--chat-template-kwargs": self.model.chat_template_kwargs,
            "--teacher-chat-template-kwargs": self.teacher.chat_template_kwargs,
            "--second-teacher-chat-template-kwargs": self.second_teacher.chat_template_kwargs,
            "--chat-template-date": self.data.chat_template_date,
        }.items():
            if text is not None and not self.data.apply_chat_template:
                raise ValueError(f"{flag} needs --apply-chat-template")
        if self.output.wandb_save_dir is not None and self.output.wandb_project is None:
            raise ValueError("--wandb-save-dir needs --wandb-project")

    def _check_rollout_engine(self) -> None:
        """Raises ValueError for options of a rollout engine without one, or one without what it needs."""
        rollout = self.rollout
        if rollout.rollout_engine == "megatron":
            if rollout.rollout_engine_endpoint or rollout.rollout_engine_weights is not None:
                raise ValueError(
                    "--rollout-engine-endpoint and --rollout-engine-weights need --rollout-engine vllm"
                )
            return
        if not rollout.rollout_engine_endpoint:
            raise ValueError("--rollout-engine vllm needs --rollout-engine-endpoint, the servers' addresses")
        if rollout.rollout_engine_weights is None and self.output.run_dir is None:
            raise ValueError(
                "--rollout-engine vllm needs --rollout-engine-weights, or --run-dir to put them under"
            )
        if rollout.rollout_engine_timeout_minutes >= self.parallel.distributed_timeout_minutes:
            raise ValueError(
                f"--rollout-engine-timeout-minutes ({rollout.rollout_engine_timeout_minutes:g}) must be "
                f"below --distributed-timeout-minutes ({self.parallel.distributed_timeout_minutes}): while "
                "one rank waits for the engine, others wait for that rank"
            )
        if self.parallel.context_parallel_size > 1:
            raise ValueError(
                "--rollout-engine vllm: not implemented with --context-parallel-size; leave it out"
            )
        if self.lora.rank:
            raise ValueError("--rollout-engine vllm: is handed whole weights; leave out --lora-rank")
        if self.interface.interface == "sft":
            raise ValueError(
                "--rollout-engine vllm: --simct-interface sft trains on given responses; leave it out"
            )

    def _check_importance_weights(self) -> None:
        """Raises ValueError for an interface, or a layout, whose loss has none."""
        if self.rollout.rollout_importance_weights is None:
            return
        flag, name = "--rollout-importance-weights", self.interface.interface
        if name in ("sft", "scalar"):
            why = "trains on given responses" if name == "sft" else "has an importance ratio of its own"
            raise ValueError(f"{flag}: --simct-interface {name} {why}; leave it out")
        if self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"{flag}: needs whole responses on a rank; leave it out, or --context-parallel-size"
            )

    @property
    def max_lag(self) -> int | None:
        """The most optimizer steps between sampling and training weights; None: any."""
        if self.rollout.rollout_max_lag is not None:
            return self.rollout.rollout_max_lag
        if self.rollout.load_debug_rollout_data is not None:
            return None
        return self.training.lag + (1 if self.rollout.rollout_oversample else 0)

    def _check_oversampling(self, data_parallel_size: int) -> None:
        """ValueError where no response can be carried over into the next step."""
        rollout, lag = self.rollout, self.training.lag
        if not rollout.rollout_oversample:
            return
        flag = f"--rollout-oversample {rollout.rollout_oversample:g}"
        if rollout.rollout_engine != "vllm":
            raise ValueError(
                f"{flag}: needs --rollout-engine vllm; the training weights sample a wave of responses token "
                "by token together and then go on training, so nothing could go on with the longest of them"
            )
        for other, value, why in (
            ("--load-debug-rollout-data", rollout.load_debug_rollout_data, "stored responses are finished"),
            ("--rollout-wave-size", rollout.rollout_wave_size, "its responses are asked for all at once"),
        ):
            if value is not None:
                raise ValueError(f"{flag}: not with {other}: {why}; leave one of them out")
        if rollout.rollout_max_lag is not None and rollout.rollout_max_lag <= lag:
            raise ValueError(
                f"{flag}: a response that is carried over is at least {lag + 1} steps old, and "
                f"--rollout-max-lag is {rollout.rollout_max_lag}; leave one of them out"
            )
        if rollout.rollout_batch_size % data_parallel_size:
            raise ValueError(
                f"{flag}: each data-parallel replica has all responses to its prompts, so "
                f"--rollout-batch-size ({rollout.rollout_batch_size}) must be a multiple of their number "
                f"({data_parallel_size})"
            )

    def _check_micro_batches(self, size: int, data_parallel_size: int) -> None:
        """ValueError where `size` sequences cannot be dealt out to ranks and micro-batches."""
        context, of_teacher = self.parallel.context_parallel_size, self.training.teacher_context_parallel_size
        if of_teacher not in (None, 1, context):
            raise ValueError(
                f"--teacher-context-parallel-size {of_teacher}: a teacher on the student's ranks shares its "
                f"sequences over 1 rank, or over --context-parallel-size ({context}); one with "
                "--teacher-endpoint has --context-parallel-size of its own"
            )
        if of_teacher is not None and self.teacher_job.endpoint:
            raise ValueError(
                "--teacher-context-parallel-size is of a teacher on the student's ranks; with "
                "--teacher-endpoint give --context-parallel-size to the teacher's job"
            )
        by_tokens = self.training.max_tokens_per_gpu is not None
        step = data_parallel_size * (1 if by_tokens else self.training.micro_batch_size)
        unit = "" if by_tokens else f"--micro-batch-size ({self.training.micro_batch_size}) x "
        if of_teacher == 1 < context:  # the ranks share a teacher's sequences one by one
            step, unit = step * context, f"{unit}--context-parallel-size ({context}) x "
        if size % step:
            multiple = step // math.gcd(step, self.rollout.n_samples_per_prompt)
            below = self.rollout.rollout_batch_size // multiple * multiple
            fitting = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ValueError(
                f"global batch size ({size}) must be a multiple of {unit}data-parallel size "
                f"({data_parallel_size}){'' if by_tokens else f' = {step}'}; use a --rollout-batch-size of "
                f"{fitting}"
            )
        stages = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1 and size // step % stages:
            raise ValueError(
                "--num-virtual-stages-per-pipeline-rank "
                f"{self.parallel.num_virtual_stages_per_pipeline_rank}: the interleaved schedule needs "
                f"{'samples a rank' if by_tokens else 'micro-batches'} ({size // step} a step: global batch "
                f"size ({size}) / ({unit}data-parallel size) ({step})) in a multiple of "
                f"--pipeline-model-parallel-size ({stages})"
            )

    @property
    def teacher_context_parallel_size(self) -> int:
        """Ranks that share each sequence of a teacher on the student's ranks."""
        return self.training.teacher_context_parallel_size or self.parallel.context_parallel_size

    @property
    def mixes_teachers(self) -> bool:
        """Whether there is a second teacher."""
        return bool(self.mixture.endpoint)

    def _check_reward(self) -> None:
        """That a reward has samples to compare, and that one is given where it is all there is."""
        reward, interface = self.reward.reward, self.interface.interface
        if reward is None:
            if interface == "reward":
                raise ValueError("--simct-interface reward needs --reward, a function")
            given = {
                f"--{f.name.replace('_', '-')}": getattr(self.reward, f.name) != f.default
                for f in fields(RewardConfig)
            }
            for flag, differs in given.items():
                if differs:
                    raise ValueError(f"{flag} needs --reward")
            return
        if interface == "sft":
            raise ValueError(
                "--reward: --simct-interface sft trains on given responses; leave one of them out"
            )
        if reward not in GRADED_REWARDS and not _PLACE.fullmatch(reward):
            raise ValueError(f"--reward {reward}: is one of {', '.join(GRADED_REWARDS)}, or MODULE:FUNCTION")
        if self.rollout.n_samples_per_prompt < 2:
            raise ValueError(
                "--reward compares the responses to one prompt: --n-samples-per-prompt must be at least 2"
            )

    def _check_average(self) -> None:
        """That --teacher-ema has a teacher here whose weights may follow the student's."""
        if self.teacher_job.ema is None:
            return
        against = {
            "--teacher-endpoint": (
                self.teacher_job.endpoint,
                "the teacher of another job does not see the student's",
            ),
            "--load-debug-scored-data": (
                self.rollout.load_debug_scored_data,
                "stored answers are of other weights",
            ),
            "--save-debug-scored-data": (
                self.rollout.save_debug_scored_data,
                "its answers are of weights that change",
            ),
            "--lora-rank": (self.lora.rank, "the student has adapters, and the teacher has none"),
            f"--simct-interface {self.interface.interface}": (not self.needs_teacher, "it asks no teacher"),
        }
        for flag, (given, why) in against.items():
            if given:
                raise ValueError(
                    f"--teacher-ema {self.teacher_job.ema}: not with {flag}: {why}; leave one of them out"
                )

    def _check_mixture(self) -> None:
        """Raises ValueError for second-teacher options without an endpoint, or for teachers that cannot be
        mixed.
        """
        if not self.mixes_teachers:
            if (self.second_teacher, self.mixture) != (ModelConfig(), MixtureConfig()):
                raise ValueError(
                    "--second-teacher-endpoint is missing: the other --second-teacher flags need it"
                )
            return
        if self.interface.interface != "bytes":
            raise ValueError(
                f"--second-teacher-endpoint: --simct-interface {self.interface.interface} compares tokens, "
                "and only distributions over bytes can be mixed; use --simct-interface bytes"
            )
        for flag, value in {
            "--teacher-endpoint": self.teacher_job.endpoint,
            "--second-teacher-hf-checkpoint": self.second_teacher.hf_checkpoint,
            "--second-teacher-tokenizer-model": self.second_teacher.tokenizer_place,
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


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How the teacher's job answers."""

    run_dir: str | None = option(
        None,
        "directory where replicas make themselves known, the --teacher-endpoint of the student",
        metavar="DIR",
    )
    bind: str = option(
        "ipc",
        "ipc: students on this host; tcp://HOST or tcp://HOST:PORT: encrypted, HOST as students reach it, "
        "replica i at PORT + i",
        metavar="ADDRESS",
    )
    teacher_hidden_dtype: Literal["fp32", "bf16", "int8"] = option(
        "bf16",
        "what hidden states are rounded to, and sent as; int8 has a scale a row; below fp32 `bytes` is sent "
        "as float16",
    )
    max_tokens_per_batch: int = option(
        16384, "tokens of one micro-batch, packed one after another; longer samples are refused", at_least=1
    )
    simct_alignment_map: str | None = option(
        None,
        "the alignment map that students must use; default: any of this teacher's tokenizer",
        metavar="DIR",
    )
    rollout_max_prompt_len: int = option(
        2048, "must match the student's value; only LongRoPE reads it", at_least=1, at_most=2**24
    )
    rollout_max_response_len: int = option(
        1024, "must match the student's value; only LongRoPE reads it", at_least=1, at_most=2**24
    )
    bf16: bool = option(False, "bf16 parameters (GPU only)")
    verify_checkpoint: bool = option(True, "as in the student's job")


@dataclass(frozen=True, kw_only=True)
class EngineTeacherConfig:
    """An inference engine that computes the teacher's hidden states in the place of this job.

    Flags: --engine-*
    """

    endpoint: tuple[str, ...] = option(
        (),
        "http://HOST:PORT of vLLM servers in pooling mode that serve --teacher-hf-checkpoint; this job then "
        "holds its LM head only; default: this job runs the model",
        metavar="URL",
    )
    hidden_dtype: Literal["float32", "float16"] = option(
        "float32", "what the engine sends hidden states as; with float16 one beyond 65504 is an error"
    )
    answers: Literal["hidden_states", "prompt_logprobs", "echo"] = option(
        "hidden_states",
        "what the servers are asked for. prompt_logprobs, echo: the log-probabilities of the response's "
        "tokens, by a field of vLLM's or OpenAI's echo (SGLang) in /v1/completions of servers that generate; "
        "enough for the interfaces alm and scalar",
    )
    check_endpoint: str | None = option(
        None,
        "http://HOST:PORT of a server that generates with the same model: before the first answer its "
        "log-probabilities of the probe's text are compared with ours",
        metavar="URL",
    )
    probe_text: str | None = option(
        None,
        "file with a text that the teacher finds likely, for the check of head and engine before the first "
        "answer; default: a few sentences of English",
        metavar="FILE",
    )
    start_minutes: float = option(
        30.0, "how long to wait for an engine that has not answered yet", at_least=0
    )
    timeout_s: float = option(
        120.0, "seconds after which a request to an engine counts as lost, and is asked again", above=0
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The whole job of a teacher."""

    teacher: ModelConfig = field(default_factory=ModelConfig, metadata={"prefix": "teacher"})
    engine: EngineTeacherConfig = field(default_factory=EngineTeacherConfig, metadata={"prefix": "engine"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def check(self) -> None:
        """ValueError, with the flag, where options have no meaning or one that is needed is missing."""
        _check_all_ranges(self)
        required = {
            "--teacher-hf-checkpoint": self.teacher.hf_checkpoint,
            "--teacher-tokenizer-model": self.teacher.tokenizer_place,
            "--run-dir": self.serving.run_dir,
        }
        missing = [flag for flag, value in required.items() if not value]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: a teacher's job needs it")
        if not self.engine.endpoint:
            if self.engine != EngineTeacherConfig():
                raise ValueError("--engine-endpoint is missing: the other --engine flags need it")
            return
        if self.engine.answers != "hidden_states" and self.engine.check_endpoint is not None:
            raise ValueError(
                f"--engine-check-endpoint: --engine-answers {self.engine.answers} is one; leave it out"
            )
        if self.teacher.pretrained_checkpoint is not None:
            raise ValueError(
                "--teacher-pretrained-checkpoint: an engine serves Hugging Face folders; leave it out"
            )
        ranks = self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size
        if ranks > 1:
            raise ValueError(
                "--engine-endpoint: this job holds an LM head only, which one rank does; leave out "
                "--tensor-model-parallel-size and --pipeline-model-parallel-size"
            )


def _check_all_ranges(config: Config | TeacherConfig) -> None:
    for group in fields(config):
        check_ranges(getattr(config, group.name), prefix=group.metadata.get("prefix"))
