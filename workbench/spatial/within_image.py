"""Alignment within images: each raster of an image (a tile, the whole) is a problem of its own, and an image counts as
the mean over its rasters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture.hidden_states import read
from workbench.data.images import shown
from workbench.errors import DataError
from workbench.metrics import Metric
from workbench.metrics.alignment import MIN_ROWS
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.stats import Interval, mean_intervals, null_scores, permutations

Rasters = Sequence[Sequence[Float[Tensor, "token d"]]]
"""One representation of a batch, [image][raster]."""


def read_rasters(
    mllm: MLLM, batch: Batch, places: Sequence[Sequence[VisualTokens]], layers: Sequence[int]
) -> list[Rasters]:
    """The visual tokens of each layer, from one pass.

    Args:
        places: `mllm.token_grids(batch)`.
    """
    lengths = [[len(raster.index) for raster in sample] for sample in places]
    found = read(mllm, batch, layers=layers)
    return [
        [own.values[number].split(sizes) for own, sizes in zip(found, lengths, strict=True)]
        for number in range(len(layers))
    ]


@dataclass(frozen=True)
class Scores:
    """Every layer against every target.

    Attributes:
        intervals: [layer][target].
        nulls: (draw, layer, target).
        n: rows of one comparison; rasters: how many rasters of tokens were seen.
        parts: (part, layer, target), the values that two models are paired by: scores of single images, or differences
            between halves of the images.
    """

    intervals: list[list[Interval]]
    nulls: np.ndarray
    n: int
    rasters: int
    parts: np.ndarray


class Within:
    """Each raster of an image is a problem of its own; an image is the mean of its rasters, the score the mean over
    images.

    An image that cannot be scored, having too few visual tokens or all of them alike, is left out.

    Args:
        first: number of the first image, where these are some of more, whose states are put together by `take`.

    Attributes:
        scored: numbers of the images that have a score, in the order in which they came.
        left_out: number of each other image, and why.
    """

    def __init__(self, metric: Metric, option: int, *, null: int, seed: int, first: int = 0) -> None:
        self.metric, self.option, self.null, self.seed, self.first = metric, option, null, seed, first
        self.scored: list[int] = []
        self.left_out: dict[int, str] = {}
        self.own: list[np.ndarray] = []  # (layer, target) of each scored image
        self.nulls: np.ndarray | float = 0.0  # summed over images
        self.lengths: list[int] = []

    def add(self, hidden: Sequence[Rasters], patches: Sequence[Rasters]) -> None:
        """Take a batch of images: a representation for each layer, and for each target."""
        first, least = (
            self.first + len(self.scored) + len(self.left_out),
            max(self.option + 1 if self.metric.option == "k" else 0, MIN_ROWS),
        )
        lengths = [[len(raster) for raster in image] for image in hidden[0]]
        given = f" with k {self.option}" if self.metric.option == "k" else ""
        reasons = {
            n: f"{min(own)} visual tokens, expected at least {least}{given}"
            for n, own in enumerate(lengths)
            if min(own) < least
        }
        fine = [n for n in range(len(lengths)) if n not in reasons]
        try:
            scores, nulls = self._scores(hidden, patches, fine, first)
        except DataError:
            for n in fine:
                if not all(raster.isfinite().all() for side in (*hidden, *patches) for raster in side[n]):
                    raise  # a fault of the model, not of an image
                try:
                    self._scores(hidden, patches, [n], first)
                except DataError as error:
                    reasons[n] = str(error)
            fine = [n for n in fine if n not in reasons]
            scores, nulls = self._scores(hidden, patches, fine, first)
        self.own += scores
        self.nulls = self.nulls + nulls
        self.scored += [first + n for n in fine]
        self.left_out |= {first + n: why for n, why in reasons.items()}
        self.lengths += [length for n in fine for length in lengths[n]]

    def tensors(self) -> dict[str, Tensor]:
        """Scores (image, layer, target) and nulls (draw, layer, target) summed over images, if there are any."""
        return (
            {"scores": torch.from_numpy(np.stack(self.own)), "nulls": torch.from_numpy(np.asarray(self.nulls))}
            if self.own
            else {}
        )

    def record(self) -> dict[str, Any]:
        """The rest of its state, as plain values."""
        return {
            "scored": self.scored,
            "left_out": [[n, why] for n, why in self.left_out.items()],
            "lengths": self.lengths,
        }

    def take(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Add the state of another one, of the images that follow."""
        if "scores" in tensors:
            self.own += list(tensors["scores"].numpy())
            self.nulls = self.nulls + tensors["nulls"].numpy()
        self.scored += record["scored"]
        self.left_out |= {n: why for n, why in record["left_out"]}
        self.lengths += record["lengths"]

    def _scores(
        self, hidden: Sequence[Rasters], patches: Sequence[Rasters], images: Sequence[int], first: int
    ) -> tuple[list[np.ndarray], np.ndarray | float]:
        """Scores (layer, target) of each of `images`, and their nulls (draw, layer, target) in sum.

        Args:
            images: numbers within the batch, whose first image is number `first` of all.

        Raises:
            DataError: the metric refuses an image.
        """
        scores = {n: np.zeros((len(hidden), len(patches))) for n in images}
        nulls: np.ndarray | float = 0.0
        where = [(n, raster) for n in images for raster in range(len(hidden[0][n]))]
        for length in dict.fromkeys(len(hidden[0][n][raster]) for n, raster in where):
            same = [(n, raster) for n, raster in where if len(hidden[0][n][raster]) == length]
            step = self.metric.together(length, len(hidden) + len(patches))
            for start in range(0, len(same), step):
                part = same[start : start + step]
                xs, ys = (
                    [
                        self.metric.prepare(torch.stack([side[i][r] for i, r in part]), self.option, name, number)
                        for side in sides
                    ]
                    for number, (sides, name) in enumerate(
                        ((hidden, "the visual tokens of an image"), (patches, "the VFM's patches of an image"))
                    )
                )
                found = np.array([[self.metric.score(x, y).cpu().numpy() for y in ys] for x in xs])
                # a raster's permutations are its own, so that neither the batch size nor the other images change them
                orders = torch.stack(
                    [permutations(length, self.null, (self.seed, first + i, r)) for i, r in part], dim=1
                )
                weights = np.array([1 / len(hidden[0][i]) for i, _ in part])
                nulls = nulls + np.stack([null_scores(self.metric, xs, y, orders) @ weights for y in ys], axis=-1)
                for number, (image, _) in enumerate(part):
                    scores[image] += found[..., number] * weights[number]
        return list(scores.values()), nulls

    def finish(self) -> Scores:
        """Intervals over images.

        Raises:
            DataError: no image could be scored.
        """
        if not self.own:
            raise DataError(
                f"none of the {len(self.left_out)} images can be scored: of the first,"
                f" {next(iter(self.left_out.values()), 'nothing')}"
            )
        own = np.stack(self.own)
        intervals = mean_intervals(own.reshape(len(own), -1), kind="real")
        rows = [intervals[start : start + own.shape[2]] for start in range(0, len(intervals), own.shape[2])]
        return Scores(rows, np.asarray(self.nulls) / len(own), int(np.median(self.lengths)), len(self.lengths), own)

    def sentences(self, names: Sequence[str]) -> list[str]:
        """What to say of the images that are left out.

        Args:
            names: of all images.
        """
        return [f"image {shown(names[n])}: {why}" for n, why in sorted(self.left_out.items())]
