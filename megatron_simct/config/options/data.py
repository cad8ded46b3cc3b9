"""Options of the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, and the map between the two vocabularies."""

    prompt_data: str | None = option(
        None, "file of training prompts: JSON lines, a JSON list, Parquet or Arrow", metavar="FILE"
    )
    input_key: str = option(
        "prompt",
        "key of the prompt in each row, a text or messages; 'messages' or 'conversations' is read if a row "
        "does not have it",
    )
    apply_chat_template: bool = option(
        False,
        "render each prompt with the chat template of each model; rows with messages need it",
    )
    chat_template_date: str | None = option(
        None,
        "date that strftime_now returns in chat templates; default: the day on which the run starts, also "
        "after a resume",
        metavar="YYYY-MM-DD",
    )
    response_key: str = option(
        "response",
        "key of the given response for --simct-interface sft, --simct-on given and --given-share; the answer "
        "that ends the messages is read if a row does not have it",
    )
    label_key: str = option("label", "key of the expected response, which evaluation reads")
    simct_on: Literal["sampled", "given"] = option(
        "sampled",
        "which responses are trained on: sampled: those that the student samples; given: all answers in each "
        "row's messages, or its response (--response-key)",
    )
    rollout_shuffle: bool = option(True, "shuffle the prompts at every epoch, with --seed")
    eval_prompt_data: str | None = option(
        None,
        "file of held-out prompts: JSON lines with labels, or the file of --eval-benchmark",
        metavar="FILE",
    )
    simct_alignment_map: str | None = option(
        None,
        "alignment map of the two tokenizers, a folder from tools/build_alignment_map.py; default: built "
        "at the start",
        metavar="DIR",
    )
