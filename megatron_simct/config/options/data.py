"""Options of the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_simct.config.options.declare import option


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
