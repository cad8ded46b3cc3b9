"""Which teacher a student's job has: another job, two of them, answers on disk, or a model on its own ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_simct.alignment import AlignmentMap, Tokenizer, VocabPlacement
from megatron_simct.config import Config, MixtureConfig, ModelConfig, TeacherJobConfig
from megatron_simct.loading import build_byte_order, load_model
from megatron_simct.losses import SharedColumns, SharedHead, gather_shared_head
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import find_weights, load_output_rows
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import TeacherNeeds
from megatron_simct.teacher.client import Patience, RemoteScorer, TeacherClient
from megatron_simct.teacher.colocated import ColocatedScorer
from megatron_simct.teacher.endpoints import CLIENT_KEY, endpoint_folder
from megatron_simct.teacher.fingerprints import fingerprints
from megatron_simct.teacher.mixture import MixtureScorer
from megatron_simct.teacher.scorer import NoTeacher, TeacherScorer
from megatron_simct.teacher.store import AnswerStore, SavingScorer, StoredClient
from megatron_simct.update.checkpoint import load_output_shard


def build_teacher(
    config: Config,
    groups: Groups,
    student: Tokenizer,
    tokenizer: Tokenizer | None,
    alignment_map: AlignmentMap | None,
    placement: VocabPlacement,
    needs: TeacherNeeds,
) -> tuple[TeacherScorer, SharedHead | None]:
    """The scorer, and on the last stage the teacher's head rows that this rank's columns need, if any."""
    if tokenizer is None:
        return NoTeacher(), None
    marks = teacher_fingerprints(config, config.teacher, student, tokenizer, alignment_map, prefix="teacher-")
    scorer, shared_head = _build_teacher(config, groups, tokenizer, placement, needs, marks)
    kept = {
        "--save-debug-scored-data": config.rollout.save_debug_scored_data,
        "--teacher-cache": config.teacher_job.cache,
    }
    for flag, folder in kept.items():
        if folder is not None:
            scorer = SavingScorer(scorer, AnswerStore(folder, marks, flag=flag), writes=groups.meets_teacher)
    return scorer, shared_head


def _build_teacher(
    config: Config,
    groups: Groups,
    tokenizer: Tokenizer,
    placement: VocabPlacement,
    needs: TeacherNeeds,
    marks: dict[str, object],
) -> tuple[TeacherScorer, SharedHead | None]:
    """See build_teacher: in another job, on disk, or here."""
    stored = config.rollout.load_debug_scored_data
    if config.teacher_job.endpoint or stored:
        folder, flag = (stored, "--load-debug-scored-data") if stored else (config.teacher_job.cache, "--teacher-cache")
        # On every rank, or the others would wait for the one that finds answers of another teacher.
        store = None if folder is None else AnswerStore(folder, marks, flag=flag)
        teacher: TeacherClient | None = None
        client: TeacherClient | StoredClient | None = None
        if groups.meets_teacher:
            if config.teacher_job.endpoint:
                client = teacher = build_client(config, config.teacher_job, marks, prefix="teacher-")
            if store is not None:
                client = StoredClient(store, teacher)
        return RemoteScorer(client, groups), load_shared_head(config, groups, placement, needs)
    model = load_model(config, config.teacher, groups, tokenizer, prefix="teacher-")
    scorer = ColocatedScorer(
        model,
        groups,
        vocab_size=tokenizer.table.num_ids,
        micro_batch_size=config.training.micro_batch_size,
        byte_order=build_byte_order(model, groups, tokenizer) if needs.byte_events else None,
    )
    if not groups.is_last_stage or needs.hidden_rows == "none" or needs.topk:
        return scorer, None
    start, _ = model.vocab_shard
    return scorer, gather_shared_head(model.output_weight.detach(), start, placement, groups.tp)


def build_mixture(
    config: Config, groups: Groups, first: TeacherScorer, student: Tokenizer, tokenizer: Tokenizer
) -> MixtureScorer:
    """The teacher's job and that of --second-teacher-endpoint, whose tokenizer this is, as one."""
    assert isinstance(first, RemoteScorer)
    client = None
    if groups.meets_teacher:
        marks = teacher_fingerprints(config, config.second_teacher, student, tokenizer, None, prefix="second-teacher-")
        client = build_client(config, config.mixture, marks, prefix="second-teacher-")
    weight = config.mixture.weight
    return MixtureScorer([first, RemoteScorer(client, groups)], [1 - weight, weight], groups)


def teacher_fingerprints(
    config: Config,
    options: ModelConfig,
    student: Tokenizer,
    teacher: Tokenizer,
    alignment_map: AlignmentMap | None,
    *,
    prefix: str,
) -> dict[str, object]:
    """What this job knows of the teacher of these options."""
    flag = f"--{prefix}hf-checkpoint"
    return fingerprints(
        options,
        read_architecture(options.folder, flag=flag),
        teacher,
        longest=config.rollout.rollout_max_prompt_len + config.rollout.rollout_max_response_len,
        student=student,
        alignment_map=alignment_map.fingerprint if alignment_map is not None else None,
        prefix=prefix,
    )


def build_client(
    config: Config, job: TeacherJobConfig | MixtureConfig, marks: dict[str, object], *, prefix: str
) -> TeacherClient:
    """The connection to a teacher's job. marks: fingerprints."""
    addresses = tuple(place for place in job.endpoint if "://" in place)
    folder = None if addresses else endpoint_folder(job.endpoint[0])
    return TeacherClient(
        folder=folder,
        addresses=addresses,
        key_file=Path(job.client_key) if job.client_key else (folder or Path()) / CLIENT_KEY,
        fingerprints=marks,
        patience=Patience(timeout_s=60 * config.teacher_job.timeout_minutes),
        window_tokens=config.teacher_job.window_tokens,
        where=f"--{prefix}endpoint {' '.join(job.endpoint)}",
    )


def load_shared_head(
    config: Config, groups: Groups, placement: VocabPlacement, needs: TeacherNeeds
) -> SharedHead | None:
    """The head rows that this rank's columns need, straight from the teacher's checkpoint. Collective over the job."""
    options, flag = config.teacher, "--teacher-hf-checkpoint"
    if needs.hidden_rows == "none" or needs.topk:
        return None
    architecture = read_architecture(options.folder, flag=flag)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    if options.pretrained_checkpoint is not None:
        shard = load_output_shard(
            architecture,
            options.pretrained_checkpoint,
            groups=groups,
            divisible_by=options.make_vocab_size_divisible_by,
            dtype=dtype,
            flag="--teacher-pretrained-checkpoint",
        ).to(groups.device)
        if not groups.is_last_stage:
            return None
        return gather_shared_head(shard, groups.tp_rank * len(shard), placement, groups.tp)
    if find_weights(options.folder, flag=flag) is None:
        raise ValueError(
            f"{flag} {options.hf_checkpoint}: has no weights; --simct-interface {config.interface.interface} needs the "
            "rows of the teacher's head that the student shares, although the teacher is another job"
        )
    if not groups.is_last_stage:
        return None
    rows = load_output_rows(architecture, options.folder, placement.teacher_rows, dtype=dtype, flag=flag)
    return SharedHead(weight=rows.to(groups.device), columns=SharedColumns.from_placement(placement, groups.device))


def teacher_logit_softcap(config: Config) -> float | None:
    """What bounds the teacher's logits, which the loss makes of its hidden states."""
    return read_architecture(config.teacher.folder, flag="--teacher-hf-checkpoint").final_logit_softcap
