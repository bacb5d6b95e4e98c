"""CKNNA within images: each raster of an image (a tile, the whole) is a problem of its own, and an image counts as the mean over its rasters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.metrics.alignment import cknna_from_neighbors
from workbench.metrics.neighbors import Neighbors, nearest_neighbors
from workbench.stats import cknna_nulls


class Rasters:
    """The neighbour lists of all rasters of some images, collected batch by batch; the features themselves are not kept."""

    def __init__(self, k: int, name: str) -> None:
        self.k, self.name, self.images = k, name, 0
        self._near: dict[int, list[Neighbors]] = {}  # by number of tokens
        self._owners: dict[int, list[int]] = {}

    def add(self, batch: Sequence[Sequence[Float[Tensor, "token d"]]]) -> None:
        """Take the features of some more images, [image][raster]."""
        flat = [(self.images + row, raster) for row, image in enumerate(batch) for raster in image]
        for length in dict.fromkeys(len(raster) for _, raster in flat):
            same = [(owner, raster) for owner, raster in flat if len(raster) == length]
            self._owners.setdefault(length, []).extend(owner for owner, _ in same)
            self._near.setdefault(length, []).append(nearest_neighbors(torch.stack([raster for _, raster in same]), self.k, name=self.name))
        self.images += len(batch)

    @property
    def tokens(self) -> int:
        """Median number of tokens of a raster."""
        return int(np.median([length for length, owners in self._owners.items() for _ in owners]))

    def cknna(self, other: Rasters, *, null: int, seed: int) -> tuple[Float[np.ndarray, image], Float[np.ndarray, "null image"]]:  # noqa: F821
        """CKNNA with `other`, which has the same rasters, for each image, and again under `null` random pairings of the tokens within each raster."""
        scores, nulls = np.zeros(self.images), np.zeros((null, self.images))
        for length, owners in self._owners.items():
            x, y = self._joined(length), other._joined(length)
            np.add.at(scores, owners, cknna_from_neighbors(x, y).numpy())
            np.add.at(nulls.T, owners, cknna_nulls(x, y, n=null, seed=seed).T)
        count = np.bincount([owner for owners in self._owners.values() for owner in owners], minlength=self.images)
        return scores / count, nulls / count

    def _joined(self, length: int) -> Neighbors:
        parts = self._near[length]
        return Neighbors(torch.cat([part.index for part in parts]), torch.cat([part.kernel for part in parts]))
