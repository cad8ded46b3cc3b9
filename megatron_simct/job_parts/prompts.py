"""Prompts of a training job: the rows of --prompt-data, those that each step samples, and given responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_simct.alignment import Tokenizer
from megatron_simct.config.options import Config
from megatron_simct.data.prompts import Divide, PromptSource, Row, read_prompts, undivided
from megatron_simct.loading import Pair, open_chat_template, prompt_date
from megatron_simct.losses import mixable
from megatron_simct.parallel.initialize import Groups
from megatron_simct.records import MicroBatch
from megatron_simct.rollout.engine import Sampling, write_rollouts
from megatron_simct.rollout.given_rows import GivenRows
from megatron_simct.rollout.oversampling import Oversampling


def read_training_rows(config: Config) -> list[Row]:
    """The rows of --prompt-data, with their teachers if these have names."""
    assert config.data.prompt_data is not None, "check() refuses a job without --prompt-data"
    rows = read_prompts(
        config.data.prompt_data,
        flag="--prompt-data",
        input_key=config.data.input_key,
        response_key=config.data.response_key,
        label_key=config.data.label_key,
        chat=config.data.apply_chat_template,
        need_response=config.interface.interface == "sft" and config.data.simct_on == "sampled",
        need_label=False,
        keep_fields=config.keeps_fields,
        teachers=[teacher.name for teacher in config.teachers] if config.routes_rows else (),
        mixes=mixable(config),
        transcripts=config.data.simct_on == "given",
    )
    of_all = config.mixture_of_all_rows
    return [replace(row, teachers=of_all) for row in rows] if of_all else rows


def with_prompt_date(config: Config) -> Config:
    """The configuration with the date of its prompts; the first rank's date, because others may start after
    midnight."""
    date = [prompt_date(config)]
    dist.broadcast_object_list(date, src=0)
    return replace(config, data=replace(config.data, chat_template_date=date[0]))


def build_prompts(
    config: Config, groups: Groups, pair: Pair, rows: Sequence[Row], *, divide: Divide = undivided
) -> PromptSource:
    """The training prompts of each rank; with `sft` those with given responses. divide: who renders which."""
    reads = [
        (one.tokenizer, open_chat_template(config, one.of.model, one.tokenizer, prefix=one.of.prefix))
        for one in pair.teachers
    ]
    source = PromptSource(
        rows,
        student=pair.student,
        batch_size=config.sampled_prompts,
        samples_per_prompt=config.rollout.n_samples_per_prompt,
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=config.data.rollout_shuffle,
        seed=config.training.seed,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--prompt-data",
        student_chat=open_chat_template(config, config.model, pair.student, prefix=""),
        teachers=() if config.names_teachers else reads,
        named_teachers=dict(zip(pair.by_name, reads, strict=True)) if config.names_teachers else {},
        max_response_len=config.rollout.rollout_max_response_len,
        divide=divide,
    )
    report_skipped(config, groups, source, "prompts", of=len(rows))
    if source.num_masked and groups.is_first_rank:
        print(
            f" {source.num_masked} of {len(rows)} rows are left out: no answer in them stands in every chat "
            "template's text as it is and fits into --rollout-max-response-len",
            flush=True,
        )
    if source.num_teacher_prompts and groups.is_first_rank:
        print(
            f" the teacher has its own prompt in {source.num_teacher_prompts} of {len(source)} rows",
            flush=True,
        )
    if config.routes_rows and groups.is_first_rank:
        counts = Counter(name for row in rows for name in row.teachers)
        said = ", ".join(f"{name} {counts[name]}" for name in pair.by_name)
        print(f" rows of --prompt-data by teacher: {said}", flush=True)
    return source


def report_skipped(config: Config, groups: Groups, source: PromptSource, what: str, *, of: int) -> None:
    """Logs a line if prompts of a file are too long."""
    if source.num_skipped and groups.is_first_rank:
        limit = f"--rollout-max-prompt-len {config.rollout.rollout_max_prompt_len}"
        print(f" {source.num_skipped} of {of} {what} exceed {limit} and are left out", flush=True)


def build_oversampling(config: Config, groups: Groups, prompts: PromptSource) -> Oversampling | None:
    """The responses that steps carry over; None without --rollout-oversample."""
    rollout = config.rollout
    if not rollout.rollout_oversample:
        return None
    assert config.max_lag is not None, "check() refuses stored responses"
    share = config.sampled_prompts // groups.dp_size

    def gather(local: Any) -> list[Any]:
        values = [None] * groups.dp_size
        dist.all_gather_object(values, local, group=groups.dp)
        return values

    return Oversampling(
        prompts,
        share=share,
        more=math.ceil(rollout.rollout_oversample * share - 1e-6),
        samples_per_prompt=rollout.n_samples_per_prompt,
        max_lag=config.max_lag,
        dp_rank=groups.dp_rank,
        gather=gather,
        record=(
            partial(write_rollouts, Path(rollout.save_debug_rollout_data), dp_rank=groups.dp_rank)
            if rollout.save_debug_rollout_data is not None and groups.writes_samples
            else None
        ),
    )


def build_given_rows(
    config: Config,
    groups: Groups,
    student: Tokenizer,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    pack: Callable[..., list[MicroBatch]],
    divide: Divide,
) -> GivenRows | None:
    """The rows of --given-share; None without it. divide: who renders which. Raises ValueError if no row has
    a response."""
    if not config.given_rows:
        return None
    with_response = [row for row in rows if row.response is not None]
    flag = f"--given-share {config.terms.given_share}"
    if not with_response:
        raise ValueError(
            f"{flag}: no row of --prompt-data {config.data.prompt_data} has a response, under "
            f"{config.data.response_key!r} or as the answer that closes its messages"
        )
    prompts = PromptSource(
        with_response,
        student=student,
        batch_size=config.given_rows,
        samples_per_prompt=1,
        max_prompt_len=config.rollout.rollout_max_prompt_len,
        shuffle=config.data.rollout_shuffle,
        seed=config.training.seed + 1,  # another order than that of the sampled rows
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        flag="--prompt-data",
        student_chat=open_chat_template(config, config.model, student, prefix=""),
        divide=divide,
    )
    if groups.is_first_rank:
        print(
            f" {flag}: {config.given_rows} of {config.global_batch_size} sequences of a step come with their "
            f"response, from {len(prompts)} of {len(rows)} rows",
            flush=True,
        )
    return GivenRows(
        prompts=prompts,
        student=student,
        sampling=sampling,
        weight=config.sft_weight,
        group=groups.dp,
        pack=pack,
    )
