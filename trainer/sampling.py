"""The order of the training images: one stream that does not depend on how many processes read it, or on where a run
was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """All images once, in an order that the seed and the number of the pass determine; no pass of one seed is a pass of
    another."""
    own = seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(own)).tolist()


class Stream(Sampler[int]):
    """Pass after pass over the data, cut off at `length`: position p is image p mod n of pass p div n.

    Whatever is read from it in order, in batches of any size that are dealt to any number of processes, is the same
    stream, so optimiser step s always sees the images s * global_batch to (s + 1) * global_batch - 1. A pass that ends
    within a batch is continued by the next one: no batch is short.

    Args:
        count: images.
        length: images of the whole training.
        order: from the number of a pass, from 0, to the order of the images in it; by default `shuffled`.
    """

    def __init__(self, count: int, length: int, seed: int, order: Callable[[int], Sequence[int]] | None = None) -> None:
        self.count, self.length = count, length
        self.order = order or partial(shuffled, count, seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for epoch, start in enumerate(range(0, self.length, self.count)):
            yield from self.order(epoch)[: self.length - start]
