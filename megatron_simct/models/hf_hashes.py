"""Verifies the files of a Hugging Face folder against published hashes, if these are known.

They come from --hf-sha256, which sha256sum writes and a model's page may show; else from SHA256SUMS in the
folder; else from the hub's metadata of each large file at its download: `hf download` keeps it under
.cache/huggingface in the folder, and the cache of the hub library names its files after it.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import torch.distributed as dist

from megatron_simct.files import hash_file
from megatron_simct.models.tensor_files import find_weights, weight_files
from megatron_simct.parallel.disk import first_of

_OWN_LIST = "SHA256SUMS"
_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_checked: set[tuple[str, str | None]] = set()
"""Folders and lists that this process has compared."""


def check_hashes(folder: str, *, listed: str | None, prefix: str) -> None:
    """Verify every file whose hash is known once a job, and print the result. Collective over the whole job.

    listed: --[prefix]hf-sha256. Raises ValueError on every rank, naming the file, if one differs, or if
    the list has no line for a file of weights.
    """
    if (folder, listed) in _checked:
        return
    begin = time.perf_counter()
    flag = f"--{prefix}hf-checkpoint"
    source, hashes, problem = "", dict[str, str](), None
    try:
        source, hashes = _known_hashes(Path(folder), listed, prefix=prefix)
        if listed is not None:
            for path in weight_files(folder, flag=flag) if find_weights(folder, flag=flag) else ():
                if path.name not in hashes:
                    raise ValueError(
                        f"--{prefix}hf-sha256 {listed}: has no line for {path.name} of {flag} {folder}"
                    )
        present = sorted(name for name in hashes if (Path(folder) / name).is_file())
        for name in present[dist.get_rank() :: dist.get_world_size()]:
            if problem is None and hash_file(Path(folder) / name).sha256 != hashes[name]:
                problem = (
                    f"{flag} {folder}: {name} is not the file that {source} names (SHA-256); download it "
                    "again"
                )
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{flag} {folder}: {error.filename}: {error.strerror}"
    problem = first_of(problem)
    if problem is not None:
        raise ValueError(problem)
    _checked.add((folder, listed))
    if hashes and dist.get_rank() == 0:
        seconds = time.perf_counter() - begin
        print(f" {flag} {folder}: {len(present)} files verified by {source} in {seconds:.2f} s", flush=True)


def _known_hashes(folder: Path, listed: str | None, *, prefix: str) -> tuple[str, dict[str, str]]:
    """The source of the hashes, and SHA-256 by name; empty if none are known."""
    if listed is not None:
        return listed, _read_list(Path(listed), f"--{prefix}hf-sha256 {listed}")
    if (folder / _OWN_LIST).is_file():
        return _OWN_LIST, _read_list(folder / _OWN_LIST, f"--{prefix}hf-checkpoint {folder}: {_OWN_LIST}")
    found = {}
    for path in folder.iterdir():
        kept = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        if path.is_symlink() and _SHA256.fullmatch(Path(os.readlink(path)).name):
            found[path.name] = Path(os.readlink(path)).name
        elif kept.is_file():
            etag = (kept.read_text(encoding="utf-8", errors="replace").splitlines() + ["", ""])[1]
            if _SHA256.fullmatch(etag):
                found[path.name] = etag
    return "the hub", found


def _read_list(path: Path, where: str) -> dict[str, str]:
    """Lines of sha256sum. A name counts without its folders. ValueError for anything else."""
    hashes: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{where}: is not a list that sha256sum wrote") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{where}: line {number} is not a line of sha256sum (64 hexadecimal digits, two blanks, a "
                "name)"
            )
        name, sha256 = Path(match[2]).name, match[1].lower()
        if hashes.setdefault(name, sha256) != sha256:
            raise ValueError(f"{where}: line {number} names {name} again, with another hash")
    return hashes
