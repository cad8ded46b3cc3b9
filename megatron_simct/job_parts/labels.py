"""From a response to the loss: alignment with the teachers' tokens, micro-batches, the shared vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_simct.alignment import VocabPlacement
from megatron_simct.alignment.alignment_map import id_of_bytes
from megatron_simct.alignment.plan import plan_mixture, plan_pair, plan_without_teacher
from megatron_simct.alignment.translation import Translation
from megatron_simct.alignment.turns import plan_turns
from megatron_simct.config.options import Config, InterfaceConfig
from megatron_simct.loading import Pair
from megatron_simct.losses import check_labels, comparisons, teacher_needs
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.kinds.teacher_topk import response_entries
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.layout import context_pieces, token_multiple
from megatron_simct.packing import (
    Context,
    Cut,
    Entries,
    by_number,
    by_teacher,
    by_tokens,
    pack_micro_batches,
)
from megatron_simct.parallel.initialize import Groups
from megatron_simct.parallel.reductions import largest
from megatron_simct.records import (
    AlignedPair,
    EntryBatch,
    MicroBatch,
    Prompt,
    Rollout,
    ScoredPair,
)


def build_alignment(config: Config, pair: Pair) -> Callable[[Prompt, Rollout], AlignedPair]:
    """The function that aligns a response: without a teacher, with that of its row, or with several that are
    mixed."""
    return partial(plan_turns, _build_plan(config, pair), pair.student.table)


def _build_plan(config: Config, pair: Pair) -> Callable[[Prompt, Rollout], AlignedPair]:
    student = pair.student
    if not pair.teachers:
        return partial(plan_without_teacher, student=student, needs=teacher_needs(config.interface))

    def align(prompt: Prompt, rollout: Rollout) -> AlignedPair:
        teacher = pair.by_name[prompt.teacher]
        needs, interface = teacher.needs, teacher.interface
        if prompt.mixture:
            tokenizers = [pair.by_name[name].tokenizer for name, _ in prompt.mixture]
            aligned = plan_mixture(
                prompt, rollout, student=student, teachers=tokenizers, needs=needs, interface=interface
            )
            named = [
                replace(part, teacher=name, teacher_weight=weight)
                for part, (name, weight) in zip((aligned, *aligned.others), prompt.mixture, strict=True)
            ]
            return replace(named[0], others=tuple(named[1:]))
        aligned = plan_pair(
            prompt,
            rollout,
            student=student,
            teacher=teacher.tokenizer,
            alignment_map=teacher.alignment_map,
            needs=needs,
            interface=interface,
        )
        return replace(aligned, teacher=prompt.teacher)

    return align


def build_placements(
    config: Config, model: HiddenStateModel | InterleavedModel, pair: Pair
) -> dict[str, VocabPlacement]:
    """The tokens shared with each teacher, by its name, on this rank's slice of the student's vocabulary;
    without a teacher, that slice alone."""
    start, end = model.vocab_shard
    maps = {name: teacher.alignment_map for name, teacher in pair.by_name.items()} or {"": None}
    vocab_size, interfaces = pair.student.table.num_ids, comparisons(config)
    return {
        name: (
            VocabPlacement.student_only(student_vocab_size=vocab_size, shard_start=start, shard_end=end)
            if tables is None
            else tables.placement(shard_start=start, shard_end=end, stop_bridge=interfaces[name].stop_bridge)
        )
        for name, tables in maps.items()
    }


def build_packing(
    config: Config,
    groups: Groups,
    placements: Mapping[str, VocabPlacement],
    *,
    interfaces: Mapping[str, InterfaceConfig],
    entries: Entries | None = None,
) -> Callable[..., list[MicroBatch]]:
    """The function that packs a rank's samples into micro-batches. interfaces: by MicroBatch.teacher."""
    context = None
    if groups.cp_size > 1:
        pieces = partial(context_pieces, size=groups.cp_size)
        context = Context(rank=groups.cp_rank, size=groups.cp_size, pieces=pieces)
    placement = next(iter(placements.values()))  # only the student's vocabulary is checked, the same in all

    def check(batch: MicroBatch) -> None:
        if groups.is_last_stage:  # the others do not have the teacher's scores
            assert batch.teacher is not None, "labels without scores are not checked"
            check_labels(batch.labels, placement=placement, config=interfaces[batch.teacher])

    pack = partial(
        pack_micro_batches,
        check=check,
        packed=config.training.max_tokens_per_gpu is not None,
        multiple_of=token_multiple(config.parallel, groups.device, context_parallel_size=groups.cp_size),
        context=context,
        entries=entries,
    )
    cut = build_cut(config, groups, context_parallel_size=groups.cp_size, agrees=not config.names_teachers)
    if not config.names_teachers:
        return partial(pack, cut=cut)
    agree = build_agreement(config, groups)

    def pack_by_teacher(
        prompts: Sequence[Prompt],
        rollouts: Sequence[Rollout],
        pairs: Sequence[AlignedPair],
        *more: Any,
        **named: Any,
    ) -> list[MicroBatch]:
        teachers = [f"{pair.teacher}+" if pair.others else pair.teacher for pair in pairs]
        apart = partial(by_teacher, teachers=teachers, cut=cut, agree=agree)
        return pack(prompts, rollouts, pairs, *more, cut=apart, **named)

    return pack_by_teacher


def build_cut(config: Config, groups: Groups, *, context_parallel_size: int, agrees: bool = True) -> Cut:
    """The function that divides a rank's sequences into micro-batches, equally many on every rank.

    context_parallel_size: ranks that share each of them. agrees: False for sequences of which ranks have
    different numbers; then micro-batches need not be equally many.
    """
    training = config.training
    if training.max_tokens_per_gpu is None:
        return partial(by_number, size=training.micro_batch_size)
    cut = partial(by_tokens, max_tokens=training.max_tokens_per_gpu * context_parallel_size)
    return partial(cut, agree=build_agreement(config, groups)) if agrees else cut


def build_agreement(config: Config, groups: Groups) -> Callable[[int], int]:
    """From the number of micro-batches that a rank needs to the number that all ranks have. Collective."""
    parallel = config.parallel
    # The interleaved schedule needs a multiple of the number of stages.
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    stages = parallel.pipeline_model_parallel_size if interleaved else 1
    return lambda count: -(-largest(count, groups.dp_cp) // stages) * stages


def build_entries(pair: Pair) -> Entries | None:
    """The function that lists the single tokens to compare from a teacher's scores; None if no interface
    compares any.
    """
    of_teachers = {}
    for name, teacher in pair.by_name.items():
        entries_of = interface_of(teacher.interface).entries
        if entries_of is None:
            continue
        tables = teacher.alignment_map
        assert tables is not None, "this interface compares tokens with a teacher's"
        translation = Translation(
            student=pair.student.table.pieces(),
            teacher=teacher.tokenizer.table.pieces(),
            student_of_bytes=id_of_bytes(pair.student),
            stop_student_id=tables.stop_student_id if teacher.interface.stop_bridge else None,
            stop_teacher_ids=frozenset(tables.stop_teacher_ids),
        )
        of_teachers[name] = partial(response_entries, entries_of(teacher.interface), translation)

    def entries(rollout: Rollout, aligned: AlignedPair, scored: ScoredPair) -> EntryBatch:
        assert aligned.teacher is not None, "a pair that nobody has scored has no entries"
        return of_teachers[aligned.teacher](rollout, aligned, scored)

    return entries if of_teachers else None
