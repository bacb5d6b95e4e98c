"""The rank of this process when accelerate, torchrun, srun or mpirun starts a command in several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


@dataclass(frozen=True)
class Ranks:
    """The number of this process among `count` processes.

    Attributes:
        rank: 0 to count - 1.
        local: its number among the processes of its machine, which decides the GPU that it uses.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """Read the rank from the environment variables of the launcher; without one, this is the only process."""
        for names in LAUNCHERS:
            rank, count, local = (os.environ.get(name, "") for name in names)
            if rank.isdigit() and count.isdigit() and int(count) > 1:
                return cls(int(rank), int(count), int(local) if local.isdigit() else 0)
        return cls()

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and shows progress."""
        return self.rank == 0

    def rotated(self, items: Sequence[T]) -> list[T]:
        """Return the items in rotated order, so that every rank begins at another one."""
        at = self.rank * len(items) // self.count
        return [*items[at:], *items[:at]]
