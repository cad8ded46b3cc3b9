"""Tiny Hugging Face folders: models saved by transformers itself, tokenizers trained by the
tokenizers library.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch


def build_model(model_type: str, *, scale: float = 0.3, **fields: Any) -> torch.nn.Module:
    """A causal language model with random weights, biases and norms included."""
    import transformers

    defaults = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.AutoConfig.for_model(model_type, **(defaults | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: initial ones and zeros could be swapped unnoticed.
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() == 1) * 0.5
            )
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * scale)
    return model


def save_model(
    folder: Path, model_type: str, *, shard_size: str = "1GB", scale: float = 0.3, **fields: Any
) -> torch.nn.Module:
    """The model of `build_model`, written to the folder."""
    model = build_model(model_type, scale=scale, **fields)
    model.save_pretrained(str(folder), max_shard_size=shard_size)
    return model


CORPUS = [
    "the cat sat on the mat 1234",
    "Tom has 12 apples and gets 7 more. How many?",
    "Привет, мир",
    "你好 世界",
] * 10
PATTERN = r"'s|'t| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as in GPT-2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% "
    "endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ "
    "message['content'] }} [/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ "
    "eos_token }}{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
)


def save_byte_level(folder: Path, *, vocab_size: int = 320, **changes: Any) -> dict[str, Any]:
    """A tokenizer like Qwen's: NFC, byte-level, no BOS, two stop tokens, and a chat template.

    `changes` replace parts of tokenizer.json. Returns the written content.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 4, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    spec = json.loads(tokenizer.to_str())
    im_end = tokenizer.token_to_id("<|im_end|>")
    return _save(
        folder,
        spec | changes,
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": False,
                "bos_token": None,
                "eos_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
            },
            "generation_config.json": {"eos_token_id": [tokenizer.token_to_id("<|endoftext|>"), im_end]},
        },
    )


def save_byte_fallback(folder: Path, *, metaspace: bool = False, **changes: Any) -> dict[str, Any]:
    """A tokenizer like Llama-2's: '▁', byte fallback, a leading space, BOS, and a chat template in a file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *byte_pieces], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    spec = json.loads(tokenizer.to_str())
    # In real files the byte pieces are in the model only.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in byte_pieces]
    bos = {"__type": "AddedToken", "content": "<s>", "special": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "</s>"}
    written = _save(folder, spec | changes, {"tokenizer_config.json": settings})
    (folder / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    return written


def _save(folder: Path, spec: dict[str, Any], files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for name, content in ({"tokenizer.json": spec} | files).items():
        (folder / name).write_text(json.dumps(content))
    return spec


def save_real_byte_fallback(folder: Path) -> Path:
    """Mistral's SentencePiece model as a tokenizer.json, in the folder; returns the model's own file."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, models, normalizers

    path = _mistral_data() / "mistral_instruct_tokenizer_240323.model.v3"
    sp = SentencePieceProcessor(model_file=str(path))
    ids = range(sp.get_piece_size())
    vocabulary = {sp.id_to_piece(i): i for i in ids}
    special = [sp.id_to_piece(i) for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    byte_pieces = [sp.id_to_piece(i) for i in ids if sp.is_byte(i)]
    mergeable = {piece: i for piece, i in vocabulary.items() if piece not in {*special, *byte_pieces}}
    merges = _merges(mergeable, order={piece: -sp.get_score(i) for piece, i in mergeable.items()})
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(special)
    _save(folder, json.loads(tokenizer.to_str()), {"generation_config.json": {"eos_token_id": 2}})
    return path


def save_real_byte_level(folder: Path, *, num_ranks: int = 20000) -> Path:
    """The first ranks of Mistral's tekken as a tokenizer.json, in the folder. Returns them
    as a tiktoken file.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    content = json.loads((_mistral_data() / "tekken_240718.json").read_text())
    pattern, entries = content["config"]["pattern"], content["vocab"][:num_ranks]
    encoded = [base64.b64decode(entry["token_bytes"]) for entry in entries]
    # The library's alphabet, in the order of the bytes that it stands for: printable ones
    # first, then the others.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    written = sorted(alphabet, key=lambda c: (ord(c) > 255, c))
    printable = [ord(c) for c in written if ord(c) < 256]
    character = dict(zip([*printable, *(b for b in range(256) if b not in printable)], written, strict=True))
    vocabulary = {"".join(character[byte] for byte in piece): rank for rank, piece in enumerate(encoded)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(vocabulary, order=vocabulary), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    _save(folder, json.loads(tokenizer.to_str()), {"tokenizer_config.json": {"eos_token": "</s>"}})
    path = folder / "same.tiktoken"
    path.write_bytes(
        b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(encoded))
    )
    sidecar = {"pattern": pattern, "special_tokens": {"</s>": num_ranks}, "stop_tokens": ["</s>"]}
    path.with_name(path.name + ".json").write_text(json.dumps(sidecar))
    return path


def _mistral_data() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("the package mistral-common, whose tokenizer files this test reads, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


def _merges(ids: dict[str, int], *, order: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in the order of the joined pieces."""
    found = [
        (order[piece], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]
