"""What a launcher tells a process about its place."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Environment:
    """Who this process is among those that were launched together."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls) -> Environment:
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, else srun's SLURM_*, else one process."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
        return cls(0, 1, 0)
