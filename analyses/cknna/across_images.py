"""Alignment of tokens of all images with one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from analyses.cknna.options import Config
from workbench.analysis.chunks import Part
from workbench.errors import DataError
from workbench.metrics import Metric
from workbench.metrics.alignment import MIN_ROWS
from workbench.spatial.within_image import GridFeatures, Scores
from workbench.stats import half_splits, null_scores, permutations, split_half_ci

SPLITS = 20  # random splits of the images into halves, for the interval of a score that is not a mean over images


class AcrossImages:
    """Compares tokens of all images with one another: sampled tokens of each image, or their mean.

    Only the tokens that are compared are kept.
    """

    def __init__(self, config: Config, metric: Metric) -> None:
        self.config, self.metric = config, metric
        self.hidden: list[list[Tensor]] = []  # [image][layer]
        self.patches: list[list[Tensor]] = []  # [image][target]
        self.grids = 0

    def add(self, hidden: Sequence[GridFeatures], patches: Sequence[GridFeatures], first: int) -> None:
        """Add a batch of images.

        Args:
            hidden: the visual tokens in each layer.
            patches: the patches of each target.
            first: number of the first image of the batch, among all.
        """
        for image, grids in enumerate(hidden[0]):
            rng = np.random.default_rng([self.config.seed, first + image])
            chosen = torch.from_numpy(rng.permutation(sum(map(len, grids)))[: self.config.tokens_per_image])
            for stored, representations in ((self.hidden, hidden), (self.patches, patches)):
                all_tokens = [torch.cat(list(representation[image])) for representation in representations]
                if self.config.pooling == "pooled":
                    stored.append([tokens.mean(dim=0, keepdim=True) for tokens in all_tokens])
                else:
                    stored.append([tokens[chosen] for tokens in all_tokens])
            self.grids += len(grids)

    def part(self) -> Part:
        """Return all tokens to store, by layer and by target, one image after another."""
        sides = {"hidden": self.hidden, "patches": self.patches}
        tensors = {
            f"{name}_{n}": torch.cat([image[n] for image in side])
            for name, side in sides.items()
            for n in range(len(side[0]))
        }
        return Part(tensors=tensors, record={"tokens": [len(image[0]) for image in self.hidden], "rasters": self.grids})

    def take(self, part: Part) -> None:
        """Add the stored tokens of the images that follow."""
        for name, side in (("hidden", self.hidden), ("patches", self.patches)):
            columns = [
                part.tensors[f"{name}_{n}"].split(part.record["tokens"])
                for n in range(sum(key.startswith(name) for key in part.tensors))
            ]
            side += [list(image) for image in zip(*columns, strict=True)]
        self.grids += part.record["rasters"]

    def finish(self) -> Scores:
        """Return the scores, with intervals from random halves of the images.

        Raises:
            DataError: half of the images have too few tokens for the metric.
        """
        n_images = len(self.hidden)
        splits = [
            [(split == side).nonzero()[0] for side in (1, 0)]
            for split in half_splits(n_images, splits=SPLITS, seed=self.config.seed)
        ]
        self._check(min(sum(len(self.hidden[i][0]) for i in half) for halves in splits for half in halves), n_images)
        n = sum(len(tokens[0]) for tokens in self.hidden)
        scores, nulls = self._scores(range(n_images), permutations(n, self.config.null, (self.config.seed,)))
        gaps = np.stack([np.subtract(*(self._scores(half)[0] for half in halves)) for halves in splits])
        intervals = [
            [split_half_ci(float(score), gaps[:, row, column], n_images) for column, score in enumerate(by_target)]
            for row, by_target in enumerate(scores)
        ]
        return Scores(intervals, nulls, n, self.grids, gaps)

    def _check(self, smallest: int, n_images: int) -> None:
        """Raise a DataError if half of the images have too few tokens, `smallest`, for the metric."""
        option, least = self.metric.option, max(self.config.option + 1, MIN_ROWS)
        if smallest < least:
            data = f"{option} is {self.config.option} with {n_images} images" if option else f"{n_images} images"
            raise DataError(
                f"{data}: half of the images have {smallest} tokens together, expected at least {least}; raise --limit"
            )

    def _scores(self, images: Iterable[int], orders: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (layer, target) of these images, and with `orders` their nulls (draw, layer, target)."""
        images = list(images)
        n, layers = sum(len(self.hidden[i][0]) for i in images), len(self.hidden[0])

        def prepared(side: list[list[Tensor]], number: int) -> object:
            return self.metric.prepare(
                torch.cat([side[i][number] for i in images]),
                self.config.option,
                "the tokens of all images",
                int(side is self.patches),
            )

        scores = np.zeros((layers, len(self.patches[0])))
        nulls = np.zeros((0 if orders is None else len(orders), *scores.shape))
        step = self.metric.max_batch(n, 1)
        for start in range(0, layers, step):
            block = range(start, min(start + step, layers))
            xs = [prepared(self.hidden, layer) for layer in block]
            for target in range(scores.shape[1]):
                y = prepared(self.patches, target)
                scores[block, target] = [float(self.metric.score(x, y)) for x in xs]
                if orders is not None:
                    nulls[:, block, target] = null_scores(self.metric, xs, y, orders)
        return scores, nulls
