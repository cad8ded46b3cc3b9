"""What every job opens from its options: tokenizers, chat templates, the alignment map, models.

Errors name the flag. Used by the student's job (job.py), the teacher's (serve_teacher.py), the pre-flight and tools.
"""

from __future__ import annotations

from megatron_simct.alignment import AlignmentMap, Tokenizer, build_alignment_map, load_tokenizer
from megatron_simct.alignment.alignment_map import identity_map
from megatron_simct.alignment.map_files import load_map
from megatron_simct.config import Config, ModelConfig, ParallelConfig
from megatron_simct.data.prompts import Row, read_prompts
from megatron_simct.data.rendering import ChatTemplate
from megatron_simct.evaluation.benchmarks import Problem, read_problems
from megatron_simct.losses import ByteOrder
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import find_weights, load_hf_weights
from megatron_simct.parallel.initialize import Groups
from megatron_simct.update.checkpoint import load_weights


def open_tokenizer(options: ModelConfig, *, prefix: str) -> Tokenizer:
    """The tokenizer of one side."""
    assert options.tokenizer is not None, "check() refuses a job without a tokenizer"
    try:
        return load_tokenizer(options.tokenizer, options.stop_token_ids)
    except ValueError as error:
        raise ValueError(f"--{prefix}tokenizer-model: {error}") from None


def open_alignment_map(config: Config, student: Tokenizer, teacher: Tokenizer) -> AlignmentMap:
    """That of --simct-alignment-map, if it is one of these two tokenizers; else built."""
    folder = config.data.simct_alignment_map
    if config.interface.interface == "kd":
        if folder is not None:
            raise ValueError(f"--simct-alignment-map {folder}: interface kd pairs every id with itself; leave it out")
        return identity_map(student, teacher)
    if folder is None:
        return build_alignment_map(student, teacher)
    try:
        return load_map(folder, student=student.table, teacher=teacher.table)
    except ValueError as error:
        raise ValueError(f"--simct-alignment-map: {error}") from None


def open_chat_template(
    config: Config, options: ModelConfig, tokenizer: Tokenizer | None, *, prefix: str
) -> ChatTemplate | None:
    """How one side's prompts are written; None where they are plain texts or where nothing reads them."""
    if not config.data.apply_chat_template or tokenizer is None:
        return None
    if tokenizer.encode_chat is None:
        raise ValueError(
            f"--apply-chat-template: --{prefix}tokenizer-model {tokenizer.name} cannot read the special tokens of a "
            "chat; it needs a tokenizer.json"
        )
    return ChatTemplate.load(options.folder, flag=f"--{prefix}hf-checkpoint")


def open_held_out(config: Config) -> tuple[list[Row], list[Problem]]:
    """The prompts of --eval-prompt-data, and the problems of --eval-benchmark whose numbers are the prompts' labels; no
    problems where labels are what is compared. ValueError, naming the flag, for a file that is not as expected."""
    data, benchmark = config.data, config.evaluation.eval_benchmark
    path, flag = data.eval_prompt_data, "--eval-prompt-data"
    assert path is not None, "there are held-out prompts"
    if benchmark == "exact_match":
        rows = read_prompts(
            path,
            flag=flag,
            input_key=data.input_key,
            response_key=data.response_key,
            label_key=data.label_key,
            chat=data.apply_chat_template,
            need_response=False,
            need_label=True,
        )
        return rows, []
    problems = read_problems(benchmark, path, flag=flag)
    rows = [
        Row(
            prompt=[{"role": "user", "content": problem.chat}] if data.apply_chat_template else problem.completion,
            response=None,
            label=str(number),
            where=f"{flag} {path}: problem {problem.problem_id}",
        )
        for number, problem in enumerate(problems)
    ]
    return rows, problems


def load_model(
    config: Config, options: ModelConfig, groups: Groups, tokenizer: Tokenizer, *, prefix: str
) -> HiddenStateModel | InterleavedModel:
    """The model of one side: weights of --[teacher-]pretrained-checkpoint, else of the folder, else random."""
    return open_model(
        options,
        config.parallel,
        groups,
        tokenizer,
        prefix=prefix,
        bf16=config.training.bf16,
        longest=config.rollout.rollout_max_prompt_len + config.rollout.rollout_max_response_len,
    )


def open_model(
    options: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
    tokenizer: Tokenizer,
    *,
    prefix: str,
    bf16: bool,
    longest: int,
) -> HiddenStateModel | InterleavedModel:
    """See load_model; `longest` as in Rotary."""
    flag = f"--{prefix}hf-checkpoint"
    architecture = read_architecture(options.folder, flag=flag)
    has_weights = options.pretrained_checkpoint is not None or find_weights(options.folder, flag=flag) is not None
    model = build_model(
        architecture,
        parallel,
        groups,
        vocab_size=tokenizer.table.num_ids,
        divisible_by=options.make_vocab_size_divisible_by,
        bf16=bf16,
        flag=f"{flag} {options.hf_checkpoint}",
        initialize=not has_weights,
        longest=longest,
    )
    if options.pretrained_checkpoint is not None:
        load_weights(model, options.pretrained_checkpoint, flag=f"--{prefix}pretrained-checkpoint")
    elif has_weights:
        load_hf_weights(model, architecture, options.folder, tp_rank=groups.tp_rank, tp_size=groups.tp_size, flag=flag)
    return model


def build_byte_order(model: HiddenStateModel | InterleavedModel, groups: Groups, tokenizer: Tokenizer) -> ByteOrder:
    """This rank's slice of a vocabulary in the order of its bytes."""
    start, end = model.vocab_shard
    return ByteOrder.of(tokenizer.table, shard_start=start, shard_end=end, device=groups.device)
