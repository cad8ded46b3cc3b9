"""Options of one model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_simct.config.options.declare import option

AttentionBackend = Literal["auto", "flash", "fused", "unfused", "local"]


def check_attention(backend: AttentionBackend) -> None:
    """ValueError for a kernel that is not here."""
    if backend in ("fused", "unfused"):
        raise ValueError(
            f"--attention-backend {backend}: that is TransformerEngine's attention, which is not used here; "
            "use auto, flash or local"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model and its tokenizer.

    The student's flags have no prefix. The teacher's begin with --teacher-, the second teacher's
    with --second-teacher-.
    """

    hf_checkpoint: str | None = option(
        None,
        "Hugging Face folder: config.json gives the architecture, safetensors files give the weights; a "
        "student without weights starts from random ones",
        metavar="DIR",
    )
    tokenizer_model: str | None = option(
        None,
        "Hugging Face tokenizer.json or its folder, SentencePiece .model, tekken .json, or tiktoken ranks "
        "NAME.tiktoken beside NAME.tiktoken.json; default: the model's own folder",
        metavar="FILE",
    )
    pretrained_checkpoint: str | None = option(
        None,
        "Megatron checkpoint to initialise from; takes precedence over the weights of --hf-checkpoint",
        metavar="DIR",
    )
    hf_sha256: str | None = option(
        None,
        "file in the format of sha256sum, with a line for each file of weights in --hf-checkpoint; "
        "default: SHA256SUMS in that folder, or the hashes that the Hugging Face hub gave at the download",
        metavar="FILE",
    )
    stop_token_ids: tuple[int, ...] = option(
        (),
        "ids of the tokens that end a response; a given response is ended with the first. Default: those "
        "of generation_config.json beside the tokenizer, else those of the tokenizer",
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "pad the vocabulary to a multiple of this times the tensor-parallel size; padding is never scored",
        at_least=1,
        at_most=2**20,
    )
    chat_template_kwargs: str | None = option(
        None,
        'arguments of the chat template, a JSON object such as {"enable_thinking": false}; a teacher\'s job '
        "does not read it, because it renders no prompts",
        metavar="JSON",
    )

    @property
    def folder(self) -> str:
        """--hf-checkpoint, once `check` has found it given."""
        assert self.hf_checkpoint is not None, "check() refuses a job without this folder"
        return self.hf_checkpoint

    @property
    def tokenizer_place(self) -> str | None:
        """Where the tokenizer is looked for: --tokenizer-model, else --hf-checkpoint."""
        return self.tokenizer_model or self.hf_checkpoint
