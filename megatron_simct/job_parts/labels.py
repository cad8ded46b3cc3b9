"""From a response to the loss: alignment with the teachers' tokens, micro-batches, the shared vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_simct.alignment import VocabPlacement
from megatron_simct.alignment.alignment_map import id_of_bytes
from megatron_simct.alignment.plan import plan_mixture, plan_pair, plan_without_teacher
from megatron_simct.alignment.translation import Translation
from megatron_simct.alignment.turns import plan_turns
from megatron_simct.config.options import Config, InterfaceConfig
from megatron_simct.loading import Pair
from megatron_simct.losses import check_labels
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.kinds.teacher_topk import response_entries
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.layout import context_pieces, token_multiple
from megatron_simct.packing import Context, Cut, Entries, by_number, by_tokens, pack_micro_batches
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import largest
from megatron_simct.records import AlignedPair, LabelBatch, MicroBatch, Prompt, Rollout


def build_alignment(config: Config, pair: Pair) -> Callable[[Prompt, Rollout], AlignedPair]:
    """The function that aligns a response: without a teacher, with one, or with several that are mixed."""
    given: dict[str, Any] = {"student": pair.student, "needs": pair.needs}
    match [teacher.tokenizer for teacher in pair.teachers]:
        case []:
            plan = partial(plan_without_teacher, **given)
        case [teacher]:
            given |= {"alignment_map": pair.alignment_map, "interface": config.interface}
            plan = partial(plan_pair, teacher=teacher, **given)
        case teachers:
            plan = partial(plan_mixture, teachers=teachers, interface=config.interface, **given)
    return partial(plan_turns, plan, pair.student.table)


def build_placement(config: Config, model: HiddenStateModel | InterleavedModel, pair: Pair) -> VocabPlacement:
    """The shared vocabulary on this rank's slice of the student's."""
    start, end = model.vocab_shard
    if pair.alignment_map is None:
        vocab_size = pair.student.table.num_ids
        return VocabPlacement.student_only(student_vocab_size=vocab_size, shard_start=start, shard_end=end)
    return pair.alignment_map.placement(
        shard_start=start, shard_end=end, stop_bridge=config.interface.stop_bridge
    )


def build_packing(
    config: Config,
    groups: Groups,
    placement: VocabPlacement,
    *,
    interface: InterfaceConfig,
    entries: Entries | None = None,
) -> Callable[..., list[MicroBatch]]:
    """The function that packs a rank's samples into micro-batches for the loss of this interface."""
    context = None
    if groups.cp_size > 1:
        pieces = partial(context_pieces, size=groups.cp_size)
        context = Context(rank=groups.cp_rank, size=groups.cp_size, pieces=pieces)
    return partial(
        pack_micro_batches,
        cut=build_cut(config, groups, context_parallel_size=groups.cp_size),
        check=(
            partial(check_labels, placement=placement, config=interface)
            if groups.is_last_stage
            else _leave_to_last_stage
        ),
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(config.parallel, groups.device, context_parallel_size=groups.cp_size),
        context=context,
        entries=entries,
    )


def build_cut(config: Config, groups: Groups, *, context_parallel_size: int) -> Cut:
    """The function that divides a rank's sequences into micro-batches, equally many on every rank.

    context_parallel_size: ranks that share each of them.
    """
    training, parallel = config.training, config.parallel
    if training.max_tokens_per_gpu is None:
        return partial(by_number, size=training.micro_batch_size)
    # The interleaved schedule needs a multiple of the number of stages.
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    stages = parallel.pipeline_model_parallel_size if interleaved else 1

    def agree(count: int) -> int:
        return -(-largest(count, groups.dp_cp) // stages) * stages

    return partial(by_tokens, max_tokens=training.max_tokens_per_gpu * context_parallel_size, agree=agree)


def build_entries(config: Config, pair: Pair) -> Entries | None:
    """The function that lists the single tokens to compare from a teacher's scores; None if the interface
    compares none.
    """
    entries_of, tables = interface_of(config.interface).entries, pair.alignment_map
    if entries_of is None:
        return None
    assert pair.teacher is not None and tables is not None, "this interface compares tokens with a teacher's"
    compares_stops = config.interface.stop_bridge
    translation = Translation(
        student=pair.student.table.pieces(),
        teacher=pair.teacher.table.pieces(),
        student_of_bytes=id_of_bytes(pair.student),
        stop_student_id=tables.stop_student_id if compares_stops else None,
        stop_teacher_ids=frozenset(tables.stop_teacher_ids),
    )
    return partial(response_entries, entries_of(config.interface), translation)


def _leave_to_last_stage(labels: LabelBatch) -> None:
    """Only the last stage has the teacher's scores of the labels."""
