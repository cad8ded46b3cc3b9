"""A teacher's answers on disk, so that a repeated experiment needs no teacher.

    DIR/teacher.json       fingerprints of the teacher
    DIR/ab/abcd....bin     one encoded answer; its name is the hash of the request

`SavingScorer` writes the answers of any scorer. `StoredClient` reads them, and sends requests without a
stored answer to a TeacherClient, if there is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import torch

from megatron_simct.files import owner_tag, write_private
from megatron_simct.records import AlignedPair, ScoredPair
from megatron_simct.teacher.client import TeacherClient
from megatron_simct.teacher.fingerprints import mismatch
from megatron_simct.teacher.forward import TeacherRequest
from megatron_simct.teacher.payload import misfit, scored_message
from megatron_simct.teacher.scorer import TeacherError, TeacherScorer
from megatron_simct.teacher.wire import Message, WireError, decode, encode

_OF_A_TEACHER = ("teacher_config", "teacher_tokenizer", "teacher_weights", "longest_sequence")


class AnswerStore:
    """One directory. Any number of processes may read and write it."""

    def __init__(self, directory: str, fingerprints: Mapping[str, Any], *, flag: str) -> None:
        """fingerprints: see fingerprints.py.

        Raises ValueError, naming the flag, for answers of another teacher.
        """
        self._folder = Path(directory)
        self._sizes = {
            "hidden_size": fingerprints["hidden_size"],
            "vocab_size": fingerprints["teacher_vocabulary"],
        }
        self.where = f"{flag} {directory}"
        about = self._folder / "teacher.json"
        ours = {name: fingerprints[name] for name in _OF_A_TEACHER}
        try:
            if not about.exists():
                write_private(about, json.dumps(ours, indent=2) + "\n", mode=0o644, replace=False)
            theirs = json.loads(about.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.where}: {about.name} cannot be used ({error})") from None
        for name, value in ours.items():
            if value is not None and theirs.get(name) is not None and theirs[name] != value:
                raise ValueError(f"{self.where}: {mismatch(name, teacher=theirs[name], student=value)}")

    def get(self, request: TeacherRequest) -> tuple[Sequence[Any], Message] | None:
        """The stored answer to this request, as TeacherClient.next returns it; None if it is
        missing or damaged.
        """
        try:
            data = self._path(request).read_bytes()
            message = decode(msgpack.unpackb(data, max_bin_len=len(data)))
        except FileNotFoundError:
            return None
        except (OSError, WireError, ValueError, msgpack.UnpackException) as error:
            print(
                f" {self.where}: a damaged answer is asked for again ({error})", file=sys.stderr, flush=True
            )
            return None
        message = replace(message, fields={**message.fields, "sample_id": request.sample_id})
        if misfit(message, request, **self._sizes) is not None:
            return None
        return encode(message), message

    def put(self, request: TeacherRequest, scored: ScoredPair) -> None:
        """Store an answer, unless it is stored already. Raises OSError if it cannot be written."""
        path = self._path(request)
        if path.exists():
            return
        rounded = scored.hidden is not None and scored.hidden.dtype == torch.bfloat16
        parts = encode(scored_message(0, scored, "bf16" if rounded else "fp32"))
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.{owner_tag()}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgpack.packb([bytes(part) for part in parts]))
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, request: TeacherRequest) -> Path:
        wanted = f"hidden {request.hidden} topk {request.topk} token_ids {request.token_ids}"
        digest = hashlib.sha256(wanted.encode())
        arrays = {"prompt_ids": request.prompt_ids, "label_ids": request.label_ids, "rows": request.rows}
        if request.byte_side is not None:
            arrays |= asdict(request.byte_side)
        for name, array in arrays.items():
            digest.update(f"{name} {array.size} ".encode() + array.astype("<i4").tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name}.bin"


class StoredClient:
    """Acts as a TeacherClient: answers come from the store if it has them, else from a teacher, if any."""

    def __init__(self, store: AnswerStore, behind: TeacherClient | None) -> None:
        self._store, self._behind = store, behind
        self._found: deque[tuple[Sequence[Any], Message]] = deque()
        self._missing: deque[int] = deque()
        self.counts = behind.counts if behind is not None else {"again": 0}

    def start(self) -> None:
        if self._behind is not None:
            self._behind.start()

    def meet(self) -> None:
        """See TeacherClient.meet."""
        if self._behind is not None:
            self._behind.meet()

    def submit(self, request: TeacherRequest) -> None:
        """See TeacherClient.submit."""
        found = self._store.get(request)
        if found is not None:
            self._found.append(found)
        elif self._behind is not None:
            self._behind.submit(request)
        else:
            self._missing.append(request.sample_id)

    def arrived(self) -> bool:
        """See TeacherClient.arrived."""
        return bool(self._found or self._missing) or (self._behind is not None and self._behind.arrived())

    def next(self) -> tuple[Sequence[Any], Message]:
        """See TeacherClient.next."""
        if self._found:
            return self._found.popleft()
        if self._missing:
            raise TeacherError(
                f"{self._store.where}: no answer for sample {self._missing[0]} ({len(self._missing)} "
                "missing); it was saved from other rollouts, or for another --simct-interface"
            )
        assert self._behind is not None
        return self._behind.next()

    def status(self) -> dict[str, dict[str, Any]]:
        """See TeacherClient.status."""
        return self._behind.status() if self._behind is not None else {}


class SavingScorer:
    """Scores by another scorer, and stores its answers."""

    def __init__(self, scorer: TeacherScorer, store: AnswerStore, *, writes: bool) -> None:
        """writes: true on one rank of a model replica's last stage."""
        self._scorer, self._store, self._writes = scorer, store, writes

    def submit(self, pairs: Sequence[AlignedPair]) -> None:
        self._scorer.submit(pairs)

    def collect(self, pairs: Sequence[AlignedPair]) -> Iterator[ScoredPair]:
        """See TeacherScorer. Write errors are reported once; training goes on without the cache."""
        by_sample = {pair.sample_id: pair for pair in pairs}
        for scored in self._scorer.collect(pairs):
            if self._writes:
                try:
                    self._store.put(TeacherRequest.of(by_sample[scored.sample_id]), scored)
                except OSError as error:
                    self._writes = False
                    reason = f"{self._store.where}: {error.strerror}; nothing more is kept"
                    print(f" WARNING: {reason}", file=sys.stderr, flush=True)
            yield scored

    def status_text(self) -> str:
        return self._scorer.status_text()
