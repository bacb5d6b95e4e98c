"""Alignment within images: each patch grid of an image (a tile, the whole) is scored by itself.

The score of an image is the mean over its patch grids, and the score of a layer is the mean over images. Such a score
says whether tokens of one image resemble each other as the VFM's patches of that image do. It does not say whether
images differ from one another as they do for the VFM.
"""

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

GridFeatures = Sequence[Sequence[Float[Tensor, "_token _d"]]]
"""One representation of a batch, [image][patch grid]."""


def read_by_grid(
    mllm: MLLM,
    batch: Batch,
    places: Sequence[Sequence[VisualTokens]],
    layers: Sequence[int],
    *,
    encoder: bool = False,
    final_norm: bool = False,
) -> tuple[list[GridFeatures], GridFeatures | None]:
    """Return the visual tokens of each layer and the vision encoder's features, from one forward pass, by patch grid.

    Args:
        mllm: the model.
        batch: the encoded prompts.
        places: the visual tokens of each image, as `mllm.token_grids(batch)` or `by_tile` returns them.
        layers: the layers to read.
        encoder: whether to read the encoder's features too: for each visual token, what the projector receives for it
            (`Activations.encoder_features`).
        final_norm: read the last layer after the final norm (`workbench.capture.hidden_states.read`).

    Returns:
        One element for each layer; and the encoder's features, None unless `encoder` is set.

    Raises:
        ModelError: `encoder` is set, but a visual token mixes the features of several places.
    """
    lengths = [[len(part.index) for part in parts] for parts in places]
    activations = read(mllm, batch, layers=layers, encoder=encoder, places=places, final_norm=final_norm)
    hidden: list[GridFeatures] = [
        [sample.values[number].split(sizes) for sample, sizes in zip(activations, lengths, strict=True)]
        for number in range(len(layers))
    ]
    features = [sample.encoder_features for sample in activations if sample.encoder_features is not None]
    return hidden, [of.split(sizes) for of, sizes in zip(features, lengths, strict=True)] if encoder else None


@dataclass(frozen=True)
class Scores:
    """The score of every layer against every target.

    Attributes:
        intervals: [layer][target].
        nulls: (draw, layer, target).
        n: rows of one comparison.
        n_grids: how many patch grids were compared.
        parts: (part, layer, target), the values by which two models are paired: scores of single images, or differences
            between halves of the images.
    """

    intervals: list[list[Interval]]
    nulls: np.ndarray
    n: int
    n_grids: int
    parts: np.ndarray


class Within:
    """Collects scores within images, batch by batch, and averages them over images.

    An image that cannot be scored (too few visual tokens, or all of them equal) is left out.

    Args:
        metric: the metric.
        option: value of the metric's one option.
        null: number of permutations of the null distribution.
        seed: seed of the permutations.
        first: number of the first image, where these images are a chunk of more; `take` puts chunks together.

    Attributes:
        scored: numbers of the images that have a score, in the order in which they came.
        left_out: the reason why each other image has no score, by image number.
        scores: (layer, target) of each scored image.
        nulls: (draw, layer, target), summed over the scored images.
        lengths: number of visual tokens of each patch grid of the scored images.
    """

    def __init__(self, metric: Metric, option: int, *, null: int, seed: int, first: int = 0) -> None:
        self.metric, self.option, self.null, self.seed, self.first = metric, option, null, seed, first
        self.scored: list[int] = []
        self.left_out: dict[int, str] = {}
        self.scores: list[np.ndarray] = []
        self.nulls: np.ndarray | float = 0.0
        self.lengths: list[int] = []

    def add(self, hidden: Sequence[GridFeatures], patches: Sequence[GridFeatures]) -> None:
        """Score a batch of images.

        Args:
            hidden: the visual tokens of each layer.
            patches: the VFM patches of each target.

        Raises:
            DataError: a value that is not finite, which is the model's fault and not an image's.
        """
        first = self.first + len(self.scored) + len(self.left_out)
        has_k = self.metric.option == "k"
        least = max(self.option + 1 if has_k else 0, MIN_ROWS)
        with_k = f" with k {self.option}" if has_k else ""
        lengths = [[len(grid) for grid in image] for image in hidden[0]]
        reasons = {
            n: f"{min(sizes)} visual tokens, expected at least {least}{with_k}"
            for n, sizes in enumerate(lengths)
            if min(sizes) < least
        }
        usable = [n for n in range(len(lengths)) if n not in reasons]
        try:
            scores, nulls = self._scores(hidden, patches, usable, first)
        except DataError:
            for n in usable:
                if not all(grid.isfinite().all() for side in (*hidden, *patches) for grid in side[n]):
                    raise  # a fault of the model, not of an image
                try:
                    self._scores(hidden, patches, [n], first)
                except DataError as error:
                    reasons[n] = str(error)
            usable = [n for n in usable if n not in reasons]
            scores, nulls = self._scores(hidden, patches, usable, first)
        self.scores += scores
        self.nulls = self.nulls + nulls
        self.scored += [first + n for n in usable]
        self.left_out |= {first + n: why for n, why in reasons.items()}
        self.lengths += [length for n in usable for length in lengths[n]]

    def tensors(self) -> dict[str, Tensor]:
        """Return scores (image, layer, target) and summed nulls (draw, layer, target); empty without any score."""
        if not self.scores:
            return {}
        return {"scores": torch.from_numpy(np.stack(self.scores)), "nulls": torch.from_numpy(np.asarray(self.nulls))}

    def record(self) -> dict[str, Any]:
        """Return the rest of the state, as plain values."""
        return {
            "scored": self.scored,
            "left_out": [[n, why] for n, why in self.left_out.items()],
            "lengths": self.lengths,
        }

    def take(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Add the state (`tensors`, `record`) of another collector, whose images follow these."""
        if "scores" in tensors:
            self.scores += list(tensors["scores"].numpy())
            self.nulls = self.nulls + tensors["nulls"].numpy()
        self.scored += record["scored"]
        self.left_out |= {n: why for n, why in record["left_out"]}
        self.lengths += record["lengths"]

    def _scores(
        self, hidden: Sequence[GridFeatures], patches: Sequence[GridFeatures], images: Sequence[int], first: int
    ) -> tuple[list[np.ndarray], np.ndarray | float]:
        """Return the scores (layer, target) of each of `images`, and the sum of their nulls (draw, layer, target).

        Args:
            hidden: the visual tokens of each layer.
            patches: the VFM patches of each target.
            images: numbers within the batch.
            first: number of the batch's first image among all images.

        Raises:
            DataError: the metric refuses an image.
        """
        scores = {n: np.zeros((len(hidden), len(patches))) for n in images}
        nulls: np.ndarray | float = 0.0
        sides = (
            (hidden, "the visual tokens of an image"),
            (patches, "the features that they are compared with"),
        )
        grids = [(n, grid) for n in images for grid in range(len(hidden[0][n]))]
        for length in dict.fromkeys(len(hidden[0][n][grid]) for n, grid in grids):
            same_length = [(n, grid) for n, grid in grids if len(hidden[0][n][grid]) == length]
            step = self.metric.max_batch(length, len(hidden) + len(patches))
            for start in range(0, len(same_length), step):
                part = same_length[start : start + step]
                xs, ys = (
                    [
                        self.metric.prepare(torch.stack([features[i][g] for i, g in part]), self.option, name, number)
                        for features in side
                    ]
                    for number, (side, name) in enumerate(sides)
                )
                part_scores = np.array([[self.metric.score(x, y).cpu().numpy() for y in ys] for x in xs])
                # seeded by the numbers of image and grid, so that neither batch size nor other images change them
                orders = torch.stack(
                    [permutations(length, self.null, (self.seed, first + i, g)) for i, g in part], dim=1
                )
                weights = np.array([1 / len(hidden[0][i]) for i, _ in part])
                nulls = nulls + np.stack([null_scores(self.metric, xs, y, orders) @ weights for y in ys], axis=-1)
                for number, (image, _) in enumerate(part):
                    scores[image] += part_scores[..., number] * weights[number]
        return list(scores.values()), nulls

    def finish(self) -> Scores:
        """Return the mean scores with intervals over images.

        Raises:
            DataError: no image could be scored.
        """
        if not self.scores:
            raise DataError(
                f"none of the {len(self.left_out)} images can be scored: of the first,"
                f" {next(iter(self.left_out.values()), 'nothing')}"
            )
        scores = np.stack(self.scores)
        n_images, _, targets = scores.shape
        intervals = mean_intervals(scores.reshape(n_images, -1), kind="real")
        rows = [intervals[start : start + targets] for start in range(0, len(intervals), targets)]
        return Scores(rows, np.asarray(self.nulls) / n_images, int(np.median(self.lengths)), len(self.lengths), scores)

    def sentences(self, names: Sequence[str]) -> list[str]:
        """Return one sentence for each image that was left out; `names` are the names of all images."""
        return [f"image {shown(names[n])}: {why}" for n, why in sorted(self.left_out.items())]
