"""Which of several processes this is, when one command is started in many: by accelerate, torchrun, srun or mpirun."""

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
    """This process among `count`.

    Attributes:
        rank: 0 to count - 1.
        local: its number on its machine, by which it takes a GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """As the launcher's environment says; alone without one."""
        for names in LAUNCHERS:
            rank, count, local = (os.environ.get(name, "") for name in names)
            if rank.isdigit() and count.isdigit() and int(count) > 1:
                return cls(int(rank), int(count), int(local) if local.isdigit() else 0)
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process prints and stores."""
        return self.rank == 0

    def turned(self, items: Sequence[T]) -> list[T]:
        """The items from this rank's share on, so that ranks begin at different ones."""
        at = self.rank * len(items) // self.count
        return [*items[at:], *items[:at]]
