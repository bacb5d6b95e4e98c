"""Alignment within images: each raster of an image (a tile, the whole) is a problem of its own, and an image counts as the mean over its rasters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture import read
from workbench.metrics import Metric
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.stats import Interval, bootstrap_columns, null_scores, permutations

Rasters = Sequence[Sequence[Float[Tensor, "token d"]]]
"""One representation of a batch, [image][raster]."""


def read_rasters(mllm: MLLM, batch: Batch, places: Sequence[Sequence[VisualTokens]], layers: Sequence[int]) -> list[Rasters]:
    """The visual tokens of each layer, from one pass.

    Args:
        places: `mllm.rasters(batch)`.
    """
    lengths = [[len(raster.index) for raster in sample] for sample in places]
    found = read(mllm, batch, layers=layers)
    return [[own.values[number].split(sizes) for own, sizes in zip(found, lengths, strict=True)] for number in range(len(layers))]


@dataclass(frozen=True)
class Scores:
    """Every layer against every target.

    Attributes:
        intervals: [layer][target].
        nulls: (draw, layer, target).
        n: rows of one comparison; rasters: how many rasters of tokens were seen.
        parts: (part, layer, target), the values that two models are paired by: scores of single images, or with one group of images left out.
    """

    intervals: list[list[Interval]]
    nulls: np.ndarray
    n: int
    rasters: int
    parts: np.ndarray


class Within:
    """Each raster of an image is a problem of its own; an image is the mean of its rasters, the score the mean over images."""

    def __init__(self, metric: Metric, option: int, *, null: int, seed: int) -> None:
        self.metric, self.option, self.null, self.seed = metric, option, null, seed
        self.own: list[np.ndarray] = []  # (layer, target) of each image
        self.nulls: np.ndarray | float = 0.0  # summed over images
        self.lengths: list[int] = []

    def add(self, hidden: Sequence[Rasters], patches: Sequence[Rasters]) -> None:
        """Take a batch of images: a representation for each layer, and for each target."""
        first, lengths = len(self.own), [[len(raster) for raster in image] for image in hidden[0]]
        self.own += [np.zeros((len(hidden), len(patches))) for _ in lengths]
        where = [(image, raster) for image, own in enumerate(lengths) for raster in range(len(own))]
        for length in dict.fromkeys(lengths[image][raster] for image, raster in where):
            same = [(image, raster) for image, raster in where if lengths[image][raster] == length]
            step = self.metric.together(length, len(hidden) + len(patches))
            for start in range(0, len(same), step):
                part = same[start : start + step]
                xs, ys = (
                    [self.metric.prepare(torch.stack([side[i][r] for i, r in part]), self.option, name) for side in sides]
                    for sides, name in ((hidden, "the visual tokens of an image"), (patches, "the VFM's patches of an image"))
                )
                scores = np.array([[self.metric.score(x, y).numpy() for y in ys] for x in xs])
                # a raster's permutations are its own, so that neither the batch size nor the other images change them
                orders = torch.stack([permutations(length, self.null, (self.seed, first + i, r)) for i, r in part], dim=1)
                weights = np.array([1 / len(lengths[i]) for i, _ in part])
                self.nulls = self.nulls + np.stack([null_scores(self.metric, xs, y, orders) @ weights for y in ys], axis=-1)
                for number, (image, _) in enumerate(part):
                    self.own[first + image] += scores[..., number] * weights[number]
        self.lengths += [length for own in lengths for length in own]

    def finish(self) -> Scores:
        """Intervals over images."""
        own = np.stack(self.own)
        intervals = bootstrap_columns(own.reshape(len(own), -1), seed=self.seed)
        rows = [intervals[start : start + own.shape[2]] for start in range(0, len(intervals), own.shape[2])]
        return Scores(rows, np.asarray(self.nulls) / len(own), int(np.median(self.lengths)), len(self.lengths), own)
