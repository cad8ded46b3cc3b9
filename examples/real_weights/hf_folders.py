"""Writes a GGUF file as an ordinary Hugging Face folder: config.json, float32 safetensors, tokenizer.json.

    python examples/real_weights/hf_folders.py smollm2 --cache FOLDER --save DIR

transformers reads GGUF, but the model that it reads refuses `save_pretrained`. Therefore the weights are
loaded into a model built from the same configuration, which can be saved. The numbers are those of the
quantised file, written as float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from examples.real_weights.models import MODELS, Model, gguf_file


def restore_digits(spec: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json, with numbers cut into single digits before any other step.

    transformers' converter keeps only the second of SmolLM2's two pre-tokenizers. Without the first, numbers
    become tokens that the model was never trained on.
    """
    before = spec["pre_tokenizer"]
    if before["type"] != "ByteLevel":
        raise ValueError(
            f"the converted tokenizer cuts text by {before['type']}, expected ByteLevel; use "
            "transformers==5.24.0"
        )
    digits = {"type": "Digits", "individual_digits": True}
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, before]}}


def save_folder(model: Model, cache: Path, save: Path) -> None:
    """Write the folder `save`, which gets its name when it is complete."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    path = gguf_file(model, cache)
    arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    temporary = save.with_name(save.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)

    config = transformers.AutoConfig.from_pretrained(**arguments)
    read = transformers.AutoModelForCausalLM.from_pretrained(**arguments, config=config, dtype=torch.float32)
    with torch.device("meta"):
        fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(str(temporary))

    tokenizer = transformers.AutoTokenizer.from_pretrained(**arguments)
    tokenizer.save_pretrained(str(temporary))
    if model.digits:
        file = temporary / "tokenizer.json"
        file.write_text(json.dumps(restore_digits(json.loads(file.read_text())), ensure_ascii=False))
    shutil.rmtree(save, ignore_errors=True)
    os.replace(temporary, save)
    print(f" {save}: {sum(p.numel() for p in fresh.parameters()):,} parameters", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the GGUF file")
    parser.add_argument(
        "--save", type=Path, required=True, help="folder to write; an existing one is replaced"
    )
    options = parser.parse_args()
    save_folder(MODELS[options.model], options.cache, options.save)


if __name__ == "__main__":
    main()
