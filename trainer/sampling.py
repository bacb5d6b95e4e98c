"""The order of the training items, the same for any number of processes and after any interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers 0 to count - 1 in a random order, which depends on the seed and the epoch only.

    Different seeds have different orders in every epoch: seed 0 in epoch 1 is not seed 1 in epoch 0.
    """
    epoch_seed = seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch_seed)).tolist()


class Stream(Sampler[int]):
    """Epoch after epoch of the data, cut off at `length`: position p is item p mod count of epoch p div count.

    The stream is the same for every batch size and number of processes, so optimizer step s always trains on the
    positions s * global_batch to (s + 1) * global_batch - 1. A batch may contain the end of one epoch and the beginning
    of the next: no batch is short.

    Args:
        count: items of one epoch.
        length: items of the whole training.
        seed: determines the order of the items.
        order: function from the number of an epoch, from 0, to the order of its items; by default `shuffled`.
    """

    def __init__(self, count: int, length: int, seed: int, order: Callable[[int], Sequence[int]] | None = None) -> None:
        self.count, self.length = count, length
        self.order = order or partial(shuffled, count, seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for epoch, start in enumerate(range(0, self.length, self.count)):
            yield from self.order(epoch)[: self.length - start]
