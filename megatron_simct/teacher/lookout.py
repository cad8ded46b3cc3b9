"""Discovery of the teacher's replicas: one rank reads the endpoint folder, the others get its result.

A shared file system serves every open from one place, so the number of readers must not grow with the ranks
of a job. The reading rank writes its result into the store of torch.distributed; the others read it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_simct.teacher.endpoints import Endpoint, check_folder, ignored_files, read_endpoints


class Lookout:
    """Lists the replicas of a teacher. Called by one thread."""

    def __init__(
        self,
        folder: Path | None = None,
        addresses: Sequence[str] = (),
        *,
        store: dist.Store | None = None,
        reads: bool = True,
    ) -> None:
        """folder or addresses: where the replicas are.

        store: shared by the ranks of a job; None: each rank reads the folder itself. reads: whether this rank
        reads it for all.
        """
        self._folder = folder
        self._fixed = {a: Endpoint(replica=a, address=a, life="") for a in addresses}
        self._store, self._reads = store, reads
        self._key = f"megatron_simct/endpoints/{folder}"
        self._published = ""

    def look(self) -> Mapping[str, Endpoint]:
        """The known replicas, by name.

        Raises ValueError, on every rank, for a folder that others can write to.
        """
        if self._folder is None:
            return self._fixed
        if self._store is not None and not self._reads:
            return self._fetch(self._store)
        try:
            check_folder(self._folder)
            found = read_endpoints(self._folder)
        except ValueError as error:
            self._publish({"error": str(error)})
            raise
        self._publish({"replicas": [asdict(endpoint) for endpoint in found.values()]})
        return found

    def ignored(self) -> list[str]:
        """See `ignored_files`."""
        return ignored_files(self._folder) if self._folder is not None and self._reads else []

    def _publish(self, what: Mapping[str, object]) -> None:
        text = json.dumps(what)
        if self._store is not None and text != self._published:
            self._store.set(self._key, text)
            self._published = text

    def _fetch(self, store: dist.Store) -> Mapping[str, Endpoint]:
        if not store.check([self._key]):
            return {}
        found = json.loads(store.get(self._key))
        if "error" in found:
            raise ValueError(found["error"])
        endpoints = [Endpoint(**values) for values in found["replicas"]]
        return {endpoint.replica: endpoint for endpoint in endpoints}
