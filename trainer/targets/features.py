"""Frozen features of every image of a data set, of which only those that are asked for are in memory."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.errors import ConfigError

BATCH = 32  # images that a network sees at once


class Features(ABC):
    """Features (image, token, d) of every image of a data set, of which only those that are asked for are in memory."""

    shape: tuple[int, int, int]

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        """The features of some images, in the order asked for."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Float[Tensor, "token d"]:
        return self.rows([index])[0]

    def mean(self) -> Float[Tensor, " d"]:
        """Mean over all tokens of all images, a batch at a time in float64."""
        total = torch.zeros(self.shape[2], dtype=torch.float64)
        for start in tqdm(
            range(0, len(self), BATCH),
            desc="mean feature",
            unit="batch",
            file=sys.stderr,
            mininterval=2,
            leave=False,
            delay=2,
        ):
            total += self.rows(range(start, min(start + BATCH, len(self)))).sum(dim=(0, 1), dtype=torch.float64)
        return (total / (self.shape[0] * self.shape[1])).float()


class DerivedFeatures(Features):
    """Other features with their images in another order, or less a mean.

    Args:
        order: for each image the one whose features it gets.
        minus: what is subtracted from every token.
    """

    def __init__(
        self, source: Features, *, order: Sequence[int] | None = None, minus: Float[Tensor, " d"] | None = None
    ) -> None:
        self.source, self.order, self.minus, self.shape = source, order, minus, source.shape

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        values = self.source.rows(indices if self.order is None else [int(self.order[i]) for i in indices])
        return values if self.minus is None else values - self.minus


def other_images(pictures: Sequence[Hashable], seed: int) -> list[int]:
    """For each of `pictures` the number of another one, all in turn: each goes to the next different one in a random
    order.

    Raises:
        ConfigError: more than half of them are one picture.
    """
    order = [int(i) for i in torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))]
    groups: dict[Hashable, list[int]] = {}
    for number in order:
        groups.setdefault(pictures[number], []).append(number)
    order = [number for group in groups.values() for number in group]
    most = max(map(len, groups.values()))  # a step as long as the longest group leaves every group
    if 2 * most > len(order):
        raise ConfigError(
            f"alignment.images is others, and one picture is {most} of {len(order)} training images: expected half of"
            " them at most"
        )
    return [other for _, other in sorted(zip(order, order[-most:] + order[:-most], strict=True))]
