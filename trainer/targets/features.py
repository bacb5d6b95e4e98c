"""Features of a frozen network for every image of a data set, and features derived from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ConfigError
from workbench.progress import progress_bar

BATCH = 32  # images per forward pass of a network


class Features(ABC):
    """Features (image, token, d) of every image of a data set, loaded or computed only when they are asked for."""

    shape: tuple[int, int, int]

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        """Return the features of the images at `indices`, in this order."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Float[Tensor, "token d"]:
        return self.rows([index])[0]

    def mean(self) -> Float[Tensor, " d"]:
        """Return the mean over all tokens of all images, summed in float64."""
        total = torch.zeros(self.shape[2], dtype=torch.float64)
        for start in progress_bar("mean feature", range(0, len(self), BATCH), unit="batch", leave=False):
            total += self.rows(range(start, min(start + BATCH, len(self)))).sum(dim=(0, 1), dtype=torch.float64)
        return (total / (self.shape[0] * self.shape[1])).float()


class DerivedFeatures(Features):
    """The features of `source` in another order of images, or with a mean subtracted.

    Args:
        order: for each image, the image whose features it gets; unchanged by default.
        minus: what is subtracted from every token; nothing by default.
    """

    def __init__(
        self, source: Features, *, order: Sequence[int] | None = None, minus: Float[Tensor, " d"] | None = None
    ) -> None:
        self.source, self.order, self.minus, self.shape = source, order, minus, source.shape

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        values = self.source.rows(indices if self.order is None else [int(self.order[i]) for i in indices])
        return values if self.minus is None else values - self.minus


def shuffle_images(images: Sequence[Hashable], seed: int) -> list[int]:
    """Return a permutation of `images` in which no entry is replaced by an equal one.

    Entries are put in a random order with equal ones side by side. Each is then replaced by the entry that stands as
    many places before it as the largest group of equal entries is long.

    Args:
        images: what identifies the image of each entry; an image may occur several times.

    Returns:
        For each entry, the index of the entry that takes its place.

    Raises:
        ConfigError: more than half of the entries are one image.
    """
    order = [int(i) for i in torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    groups: dict[Hashable, list[int]] = {}
    for number in order:
        groups.setdefault(images[number], []).append(number)
    order = [number for group in groups.values() for number in group]
    largest = max(map(len, groups.values()))  # a shift by the length of the largest group leaves every group
    if 2 * largest > len(order):
        raise ConfigError(
            f"alignment.images is others, but {largest} of the {len(order)} training images are the same image:"
            " expected at most half of them"
        )
    return [other for _, other in sorted(zip(order, order[-largest:] + order[:-largest], strict=True))]
