"""Opens what the options name: tokenizers, chat templates, the alignment map, models. Errors name the flag.
Used by the student's job (job.py), the teacher's (serve_teacher.py), the pre-flight and tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_simct.alignment import AlignmentMap, Tokenizer, build_alignment_map, load_tokenizer
from megatron_simct.alignment.alignment_map import identity_map, released_map
from megatron_simct.alignment.continuations import Continuations
from megatron_simct.alignment.cut_rules import with_continuations
from megatron_simct.alignment.hf_folder import locate_tokenizer
from megatron_simct.alignment.map_files import load_map
from megatron_simct.config.options import (
    AttentionBackend,
    Config,
    InterfaceConfig,
    ModelConfig,
    ParallelConfig,
    TeacherOptions,
)
from megatron_simct.data.prompts import Divide, Row, read_prompts, undivided
from megatron_simct.data.rendering import ChatTemplate, read_date
from megatron_simct.evaluation.answers import Thinking, find_thinking
from megatron_simct.evaluation.benchmarks import Problem, read_problems
from megatron_simct.losses import ByteOrder, comparisons, teacher_needs
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.formats import folder_format
from megatron_simct.models.head import Head, read_head
from megatron_simct.models.hf_hashes import check_hashes
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.kernels import describe
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import TeacherNeeds
from megatron_simct.update.checkpoint import load_weights, saved_options
from megatron_simct.update.support import model_fields


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One teacher of a run, with the files that its options name."""

    of: TeacherOptions
    tokenizer: Tokenizer
    alignment_map: AlignmentMap | None
    """The tokens that it shares with the student; None if no tokens are compared."""
    interface: InterfaceConfig
    """How its rows are compared."""

    @property
    def needs(self) -> TeacherNeeds:
        """What its interface asks of it."""
        return teacher_needs(self.interface)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Student and teachers, opened once for a run."""

    student: Tokenizer
    teachers: tuple[Teacher, ...]
    """Empty for an interface without a teacher. Several teachers have names, and each scores the rows that
    name it."""

    @property
    def by_name(self) -> dict[str, Teacher]:
        """The teachers by Prompt.teacher."""
        return {teacher.of.name: teacher for teacher in self.teachers}


def open_pair(
    config: Config, *, say: Callable[[str], object] = lambda line: None, divide: Divide = undivided
) -> Pair:
    """The tokenizers and the alignment maps of the run. Raises ValueError, naming the flag, if one cannot be
    opened. say: called with a line before work that takes long. divide: who makes which table of
    continuations.
    """
    student = open_tokenizer(config.model, prefix="")
    teachers = config.teachers if config.needs_teacher else ()
    interfaces = [comparisons(config)[one.name] for one in teachers]
    sides = [student, *(open_tokenizer(one.model, prefix=one.prefix) for one in teachers)]
    bounded = [compares_bounds(one) for one in interfaces]
    if any(bounded):
        chosen = [number for number, needed in enumerate([True, *bounded]) if needed]
        made = _with_continuations([sides[number] for number in chosen], say, divide)
        for number, tokenizer in zip(chosen, made, strict=True):
            sides[number] = tokenizer
    student, *others = sides
    return Pair(
        student=student,
        teachers=tuple(
            Teacher(
                of=one,
                tokenizer=tokenizer,
                alignment_map=(
                    None
                    if interface.interface == "bytes" and one.alignment_map is None
                    else open_alignment_map(one, student, tokenizer, interface=interface)
                ),
                interface=interface,
            )
            for one, tokenizer, interface in zip(teachers, others, interfaces, strict=True)
        ),
    )


def compares_bounds(interface: InterfaceConfig) -> bool:
    """Whether a comparison needs to know which tokens may follow each other (`with_continuations`)."""
    return interface.interface == "bytes" and interface.byte_bounds == "any"


def _with_continuations(
    tokenizers: Sequence[Tokenizer], say: Callable[[str], object], divide: Divide
) -> list[Tokenizer]:
    """The tokenizers with their tables of continuations."""
    for tokenizer in tokenizers:
        say(
            f" {tokenizer.name}: finding the tokens that may follow each of {tokenizer.table.num_ids:,} "
            "tokens"
        )

    def tables(some: range) -> Mapping[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for number in some:
            table = with_continuations(tokenizers[number]).continuations
            assert table is not None, "it has just been made"
            found |= {f"rows_{number}": table.rows, f"row_of_{number}": table.row_of}
        return found

    made = {name: array for part in divide(len(tokenizers), tables) for name, array in part.items()}
    return [
        replace(tokenizer, continuations=Continuations(made[f"rows_{number}"], made[f"row_of_{number}"]))
        for number, tokenizer in enumerate(tokenizers)
    ]


def open_tokenizer(options: ModelConfig, *, prefix: str) -> Tokenizer:
    """The tokenizer of one model."""
    place = locate_tokenizer(options, prefix=prefix)
    try:
        return load_tokenizer(place, options.stop_token_ids)
    except ValueError as error:
        raise ValueError(f"--{prefix}tokenizer-model: {error}") from None


def open_alignment_map(
    options: TeacherOptions, student: Tokenizer, teacher: Tokenizer, *, interface: InterfaceConfig
) -> AlignmentMap:
    """The alignment map that a teacher's options name, if it belongs to these two tokenizers; built if they
    name none."""
    folder, flag = options.alignment_map, options.map_flag
    if interface.interface == "kd":
        if folder is not None:
            raise ValueError(f"{flag} {folder}: interface kd pairs every id with itself; leave it out")
        try:
            return identity_map(student, teacher)
        except ValueError as error:
            raise ValueError(f"--teachers {options.name}: {error}" if options.name else str(error)) from None
    if interface.shared == "released":
        if folder is not None:
            raise ValueError(
                f"{flag} {folder}: it pairs tokens with equal bytes; leave out --simct-shared released"
            )
        return released_map(student, teacher)
    if folder is None:
        return build_alignment_map(student, teacher)
    try:
        return load_map(folder, student=student.table, teacher=teacher.table)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def open_chat_template(
    config: Config, options: ModelConfig, tokenizer: Tokenizer, *, prefix: str
) -> ChatTemplate | None:
    """The chat template of one model; None if prompts are plain texts."""
    if not config.data.apply_chat_template:
        return None
    if tokenizer.encode_chat is None:
        raise ValueError(
            f"--apply-chat-template: --{prefix}tokenizer-model {tokenizer.name} cannot encode the special "
            "tokens of a chat template; use a tokenizer.json"
        )
    return ChatTemplate.load(
        options.folder,
        flag=f"--{prefix}hf-checkpoint",
        kwargs=options.chat_template_kwargs,
        date=config.data.chat_template_date,
    )


def prompt_date(config: Config) -> str | None:
    """The default of --chat-template-date: the date of the run that --load resumes, otherwise today. None if
    no template is applied."""
    if not config.data.apply_chat_template:
        return None
    given, load = config.data.chat_template_date, config.output.load
    return read_date(given or (saved_options(load).get("chat_template_date") if load is not None else None))


def open_held_out(config: Config) -> tuple[list[Row], list[Problem]]:
    """The prompts of --eval-prompt-data, and the problems of --eval-benchmark, which the labels number; no
    problems if the labels themselves are compared. Raises ValueError, naming the flag, for an unexpected
    file.
    """
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
            keep_fields=config.rollout.environment is not None,
        )
        return rows, []
    problems = read_problems(benchmark, path, flag=flag)
    rows = [
        Row(
            prompt=problem.messages if data.apply_chat_template else _completion(problem, flag),
            response=None,
            label=str(number),
            fields=None if config.rollout.environment is None else problem.fields,
            where=f"{flag} {path}: problem {problem.problem_id}",
        )
        for number, problem in enumerate(problems)
    ]
    return rows, problems


def _completion(problem: Problem, flag: str) -> str:
    if problem.completion is None:
        raise ValueError(f"{flag}: {problem.problem_id} is a conversation; it needs --apply-chat-template")
    return problem.completion


def open_thinking(chat: ChatTemplate | None, marks: Sequence[str] | None = None) -> Thinking:
    """The marks around a model's thinking: those given, or those of its chat template."""
    if chat is None:
        return find_thinking("", "", marks)
    try:
        prompt = chat.text([{"role": "user", "content": "?"}])
    except ValueError:  # errors of the template are reported when prompts are rendered
        prompt = ""
    return find_thinking(chat.source, prompt, marks)


def load_model(
    config: Config, options: ModelConfig, groups: Groups, tokenizer: Tokenizer, *, prefix: str
) -> HiddenStateModel | InterleavedModel:
    """One model: weights of --[teacher-]pretrained-checkpoint, else of the folder, else
    random.
    """
    return open_model(
        options,
        config.parallel.for_teacher if prefix else config.parallel,
        groups,
        tokenizer,
        prefix=prefix,
        bf16=config.training.bf16,
        attention_backend=config.training.attention_backend,
        trains=not prefix and not config.lora.rank,
        longest=config.rollout.rollout_max_prompt_len + config.rollout.rollout_max_response_len,
        verified=config.output.verify_checkpoint,
        more={} if prefix else model_fields(config.update),
        local_layers=not prefix and bool(config.lora.rank),
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
    verified: bool = True,
    more: Mapping[str, Any] = MappingProxyType({}),
    local_layers: bool = False,
    attention_backend: AttentionBackend = "auto",
    trains: bool = False,
) -> HiddenStateModel | InterleavedModel:
    """See load_model; `longest` as in Rotary; `more`, `local_layers`, `attention_backend` and `trains` as in
    build_model. verified: compare files with their hashes first."""
    flag = f"--{prefix}hf-checkpoint"
    architecture = read_architecture(options.folder, flag=flag)
    has_weights = (
        options.pretrained_checkpoint is not None or find_weights(options.folder, flag=flag) is not None
    )
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
        more=more,
        local_layers=local_layers,
        attention_backend=attention_backend,
        trains=trains,
    )
    if groups.is_first_rank and groups.device.type == "cuda":
        said = describe(
            architecture.scores,
            attention_backend,
            bf16=bf16,
            longest=longest,
            context_parallel_size=parallel.context_parallel_size,
            device=groups.device,
        )
        print(f" attention of {flag}: {said}", flush=True)
    reads_folder = has_weights and options.pretrained_checkpoint is None
    if verified and (reads_folder or options.hf_sha256 is not None):
        check_hashes(options.folder, listed=options.hf_sha256, prefix=prefix)
    if options.pretrained_checkpoint is not None:
        checkpoint, flag = options.pretrained_checkpoint, f"--{prefix}pretrained-checkpoint"
        load_weights(model, checkpoint, flag=flag, verified=verified, among=groups.dp_cp)
    elif has_weights:
        quantised = folder_format(options.folder, flag=flag)
        if quantised is not None and groups.is_first_rank:
            kind = "bfloat16" if bf16 else "float32"
            print(f" {flag} {options.folder}: {quantised.label}, converted to {kind} in memory", flush=True)
        load_hf_weights(model, architecture, options.folder, groups, flag=flag)
    return model


def build_byte_order(
    model: HiddenStateModel | InterleavedModel, groups: Groups, tokenizer: Tokenizer
) -> ByteOrder:
    """This rank's slice of a vocabulary in the order of its bytes."""
    start, end = model.vocab_shard
    return ByteOrder.of(tokenizer.table, shard_start=start, shard_end=end, device=groups.device)


def describe_teacher(folder: str, *, flag: str) -> Architecture | Head:
    """The architecture of a teacher in another job, or only its LM head if its family is unknown."""
    try:
        return read_architecture(folder, flag=flag)
    except ValueError as error:
        try:
            return read_head(folder, flag=flag)
        except ValueError:
            raise error from None
