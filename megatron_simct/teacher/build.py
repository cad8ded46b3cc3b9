"""Builds the teachers of a student's job: other jobs, answers on disk, or a model on its own ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_simct.alignment import VocabPlacement
from megatron_simct.config.options import Config, InterfaceConfig, TeacherOptions
from megatron_simct.loading import Pair, Teacher, build_byte_order, describe_teacher, load_model
from megatron_simct.losses import SharedColumns, SharedHead, gather_shared_head, teacher_needs
from megatron_simct.models.families import read_architecture
from megatron_simct.models.head import load_head_rows, read_head
from megatron_simct.models.hf_hashes import check_hashes
from megatron_simct.models.layout import token_multiple
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.packing import Cut
from megatron_simct.parallel.initialize import Groups, shared_store
from megatron_simct.teacher.average import Average, Model
from megatron_simct.teacher.client import Patience, TeacherClient
from megatron_simct.teacher.colocated import ColocatedScorer
from megatron_simct.teacher.endpoints import CLIENT_KEY, endpoint_folder
from megatron_simct.teacher.fingerprints import fingerprints
from megatron_simct.teacher.lookout import Lookout
from megatron_simct.teacher.remote import RemoteScorer
from megatron_simct.teacher.routing import RoutedScorer
from megatron_simct.teacher.scorer import NoTeacher, TeacherScorer
from megatron_simct.teacher.store import AnswerStore, SavingScorer, StoredClient
from megatron_simct.update.checkpoint import load_output_shard
from megatron_simct.update.step import TeacherHead


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """All teachers of a job."""

    scorer: TeacherScorer
    heads: Mapping[str, TeacherHead]
    """By AlignedPair.teacher; without a teacher, the student's placement alone."""
    average: Average | None = None
    """The average that is the only teacher's weights, with --teacher-ema."""


def build_teachers(
    config: Config,
    groups: Groups,
    pair: Pair,
    placements: Mapping[str, VocabPlacement],
    cut: Cut,
    student: Model,
) -> Teaching:
    """placements: of each teacher by its name. cut: how a teacher on these ranks cuts pairs into
    micro-batches. student: the model that a teacher with --teacher-ema follows.
    """
    if config.routes_rows:
        check_dense(config)
    if not pair.teachers:
        return Teaching(
            scorer=NoTeacher(),
            heads={
                name: TeacherHead(placement=of, interface=config.interface) for name, of in placements.items()
            },
        )
    built = {
        name: _build_teacher(config, groups, pair, teacher, placements[name], cut, student)
        for name, teacher in pair.by_name.items()
    }
    heads = {name: one.head for name, one in built.items()}
    scorers = {name: one.scorer for name, one in built.items()}
    if config.names_teachers:
        return Teaching(scorer=RoutedScorer(scorers, groups), heads=heads)
    (scorer,) = scorers.values()
    kept = {
        "--save-debug-scored-data": config.rollout.save_debug_scored_data,
        "--teacher-cache": config.teacher_job.cache,
    }
    for flag, folder in kept.items():
        if folder is not None:
            store = AnswerStore(folder, teacher_fingerprints(config, pair, pair.teachers[0]), flag=flag)
            scorer = SavingScorer(scorer, store, writes=groups.owns_teacher_socket)
    return Teaching(scorer=scorer, heads=heads, average=built[""].average)


def check_dense(config: Config) -> None:
    """Raises ValueError for experts that ranks share, of a teacher on these ranks: its rows are not equally
    many on every rank, and the exchange between experts would wait.
    """
    size = config.parallel.expert_model_parallel_size
    for teacher in config.teachers:
        flag = f"--{teacher.prefix}hf-checkpoint"
        if size > 1 and not teacher.job.endpoint:
            if read_architecture(teacher.model.folder, flag=flag).num_experts:
                raise ValueError(
                    f"{flag} {teacher.model.folder}: has experts, which --expert-model-parallel-size "
                    f"{size} divides over ranks, and these have different numbers of its rows; give it an "
                    "endpoint, a job of its own"
                )


@dataclass(frozen=True, kw_only=True)
class _Built:
    scorer: TeacherScorer
    head: TeacherHead
    average: Average | None = None


def _build_teacher(
    config: Config,
    groups: Groups,
    pair: Pair,
    teacher: Teacher,
    placement: VocabPlacement,
    cut: Cut,
    student: Model,
) -> _Built:
    """A teacher in another job, on disk, or on these ranks."""
    needs, options, interface = teacher.needs, teacher.of, teacher.interface
    flag = f"--{options.prefix}hf-checkpoint"
    softcap = describe_teacher(options.model.folder, flag=flag).final_logit_softcap
    if options.job.endpoint or config.rollout.load_debug_scored_data:
        head = load_shared_head(config, groups, options, placement, interface)
        return _Built(
            scorer=_build_remote(config, groups, pair, teacher),
            head=TeacherHead(
                placement=placement, interface=interface, shared_head=head, logit_softcap=softcap
            ),
        )
    model = load_model(config, options.model, groups, teacher.tokenizer, prefix=options.prefix)
    scorer = ColocatedScorer(
        model,
        groups,
        vocab_size=teacher.tokenizer.table.num_ids,
        cut=cut,
        byte_order=build_byte_order(model, groups, teacher.tokenizer) if needs.byte_events else None,
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(
            config.parallel, groups.device, context_parallel_size=config.teacher_context_parallel_size
        ),
        context_parallel_size=config.teacher_context_parallel_size,
    )
    head = None
    if groups.is_last_stage and needs.hidden_rows != "none" and not needs.topk:
        head = head_rows(model, placement, groups)
    average = None
    if config.teacher_job.ema is not None:

        def changed() -> None:
            if head is not None:
                head.weight.copy_(head_rows(model, placement, groups).weight)

        try:
            average = Average(model, student, decay=config.teacher_job.ema, changed=changed)
        except ValueError:
            folders = f"{flag} {options.model.folder} and --hf-checkpoint {config.model.folder}"
            raise ValueError(f"--teacher-ema: {folders} must be of one architecture and vocabulary") from None
    return _Built(
        scorer=scorer,
        head=TeacherHead(placement=placement, interface=interface, shared_head=head, logit_softcap=softcap),
        average=average,
    )


def head_rows(model: Model, placement: VocabPlacement, groups: Groups) -> SharedHead:
    """The rows of a teacher's head that this rank's columns need.

    Collective over the tensor-parallel group.
    """
    start, _ = model.vocab_shard
    return gather_shared_head(model.output_weight.detach(), start, placement, groups.tp)


def _build_remote(config: Config, groups: Groups, pair: Pair, teacher: Teacher) -> RemoteScorer:
    """A teacher in another job, behind answers on disk if there are any; or these answers alone."""
    marks = teacher_fingerprints(config, pair, teacher)
    stored = config.rollout.load_debug_scored_data
    folder, flag = (
        (stored, "--load-debug-scored-data") if stored else (config.teacher_job.cache, "--teacher-cache")
    )
    # On every rank, or the others would wait for the one that finds answers of another teacher.
    store = None if folder is None else AnswerStore(folder, marks, flag=flag)
    client: TeacherClient | StoredClient | None = None
    if groups.owns_teacher_socket:
        asked = build_client(config, groups, teacher, marks) if teacher.of.job.endpoint else None
        client = asked if store is None else StoredClient(store, asked)
    return RemoteScorer(client, groups, drops=config.routing.missing_teacher == "drop")


def teacher_fingerprints(config: Config, pair: Pair, teacher: Teacher) -> dict[str, object]:
    """The fingerprints of a teacher that this job knows."""
    flag, tables = f"--{teacher.of.prefix}hf-checkpoint", teacher.alignment_map
    return fingerprints(
        teacher.of.model,
        describe_teacher(teacher.of.model.folder, flag=flag),
        teacher.tokenizer,
        longest=config.rollout.rollout_max_prompt_len + config.rollout.rollout_max_response_len,
        student=pair.student,
        alignment_map=tables.fingerprint if tables is not None else None,
        prefix=teacher.of.prefix,
    )


def build_client(config: Config, groups: Groups, teacher: Teacher, marks: dict[str, object]) -> TeacherClient:
    """The connection to a teacher's job. marks: fingerprints. The first model replica reads the endpoints for
    all."""
    job = teacher.of.job
    addresses = tuple(place for place in job.endpoint if "://" in place)
    folder = None if addresses else endpoint_folder(job.endpoint[0])
    return TeacherClient(
        lookout=Lookout(folder, addresses, store=shared_store(), reads=groups.dp_rank == 0),
        key_file=Path(job.client_key) if job.client_key else (folder or Path()) / CLIENT_KEY,
        fingerprints=marks,
        patience=Patience(timeout_s=60 * config.teacher_job.timeout_minutes),
        window_tokens=config.teacher_job.window_tokens,
        where=f"--{teacher.of.prefix}endpoint {' '.join(job.endpoint)}",
    )


def load_shared_head(
    config: Config,
    groups: Groups,
    teacher: TeacherOptions,
    placement: VocabPlacement,
    interface: InterfaceConfig,
) -> SharedHead | None:
    """The head rows that this rank's columns need, straight from the teacher's checkpoint.

    Collective over the job.
    """
    options, flag, needs = teacher.model, f"--{teacher.prefix}hf-checkpoint", teacher_needs(interface)
    if needs.hidden_rows == "none" or needs.topk:
        return None
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    if options.pretrained_checkpoint is not None:
        shard = load_output_shard(
            read_architecture(options.folder, flag=flag),
            options.pretrained_checkpoint,
            groups=groups,
            divisible_by=options.make_vocab_size_divisible_by,
            dtype=dtype,
            flag=f"--{teacher.prefix}pretrained-checkpoint",
            verified=config.output.verify_checkpoint,
        ).to(groups.device)
        if not groups.is_last_stage:
            return None
        return gather_shared_head(shard, groups.tp_rank * len(shard), placement, groups.tp)
    if find_weights(options.folder, flag=flag) is None:
        raise ValueError(
            f"{flag} {options.hf_checkpoint}: has no weights; --simct-interface {interface.interface} "
            "needs the rows of the teacher's head that the student shares, although the teacher is another "
            "job"
        )
    if config.output.verify_checkpoint:
        check_hashes(options.folder, listed=options.hf_sha256, prefix=teacher.prefix)
    if not groups.is_last_stage:
        return None
    head = read_head(options.folder, flag=flag)
    rows = load_head_rows(head, options.folder, placement.teacher_rows, dtype=dtype, flag=flag)
    return SharedHead(
        weight=rows.to(groups.device), columns=SharedColumns.from_placement(placement, groups.device)
    )
