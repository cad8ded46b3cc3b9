"""Prompts of a run: they must be readable, both chat templates must render them, and some
must be short enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_simct.data.prompts import PromptSource, Row, read_prompts
from megatron_simct.loading import open_held_out
from megatron_simct.losses import mixable
from megatron_simct.preflight import pair
from megatron_simct.preflight.findings import Finding, failed, passed, warned
from megatron_simct.preflight.state import State


def check_prompts(state: State, student: pair.Side, teachers: Sequence[pair.Side]) -> list[Row]:
    """The prompts. Empty if they cannot be read or rendered. teachers: one, or those of --teachers."""
    config = state.config
    named = {side.name: side for side in teachers} if config.routes_rows else {}
    if config.data.prompt_data is None:
        return []  # the check of options reports it

    rows = state.attempt(
        "pair",
        "prompts",
        lambda: read_prompts(
            config.data.prompt_data or "",
            flag="--prompt-data",
            input_key=config.data.input_key,
            response_key=config.data.response_key,
            label_key=config.data.label_key,
            chat=config.data.apply_chat_template,
            need_response=config.interface.interface == "sft" and config.data.simct_on == "sampled",
            need_label=False,
            teachers=list(named),
            mixes=mixable(config),
            transcripts=config.data.simct_on == "given",
        ),
    )
    if config.data.eval_prompt_data is not None:
        state.attempt("pair", "prompts", lambda: open_held_out(config))
    if rows is None:
        return []
    share = config.terms.given_share
    if share is not None:
        count = sum(row.response is not None for row in rows)
        said = f"--given-share {share}: {count} of {len(rows)} rows of --prompt-data have a response"
        finding = passed if count else failed
        state.findings.append(finding("student", "prompts", said))
    looked_at = rows[:: max(1, len(rows) // pair.MAX_TEXTS)]
    try:
        templates: list[Finding] = []
        sides: list[pair.Side | None] = [*teachers] or [None]
        for side in sides:
            read = [row for row in looked_at if side is None or not named or side.name in row.teachers]
            templates += pair.check_templates(student, side, read, chat=config.data.apply_chat_template)
        source = PromptSource(
            looked_at,
            student=student.tokenizer,
            batch_size=None,
            samples_per_prompt=1,
            max_prompt_len=config.rollout.rollout_max_prompt_len,
            shuffle=False,
            seed=0,
            dp_rank=0,
            dp_size=1,
            flag="--prompt-data",
            student_chat=student.chat,
            teachers=[] if named else [(side.tokenizer, side.chat) for side in teachers],
            named_teachers={name: (side.tokenizer, side.chat) for name, side in named.items()},
            max_response_len=config.rollout.rollout_max_response_len,
        )
    except ValueError as error:
        message = str(error)
        flag = "--rollout-max-prompt-len" if "all " in message and "exceed" in message else "--prompt-data"
        state.findings.append(failed("pair", "prompts", message, flag=flag))
        return []
    state.findings += templates
    share = source.num_skipped / len(looked_at)
    said = f"{len(rows):,} prompts; {share:.1%} of the {len(looked_at)} checked are too long and left out"
    if source.num_masked:
        said += f"; {source.num_masked} have no answer that every chat template writes, and are left out"
    own = sum(row.teacher_prompt is not None for row in rows)
    if own and teachers:
        said += f"; in {own:,} rows the teacher has its own prompt"
    if share > pair.SKIPPED_WARN:
        state.findings.append(warned("pair", "prompts", said, flag="--rollout-max-prompt-len"))
    else:
        state.findings.append(passed("pair", "prompts", said))
    return rows
