"""Layer-wise alignment of a model's visual tokens with vision foundation models (PAPER.md, A2).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10 --output_dir runs

What the number is: CKNNA, 1 where the visual tokens of layer l and the VFM's patches have the same neighbourhoods. What it is not: a measure of
what the model uses; and it is never 0 by chance, so each score carries its permutation null. Scores with another n, k or pooling may not share
an axis without their nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from workbench import figures as fig
from workbench.analysis import Analysis, Context, DataOptions, Result, main
from workbench.capture import check_layers, read
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError
from workbench.metrics.alignment import cknna_from_neighbors
from workbench.metrics.neighbors import Neighbors, nearest_neighbors
from workbench.mllm.base import Box
from workbench.runs import Run
from workbench.stats import Interval, bootstrap_ci, cknna_nulls, jackknife_ci, null_of
from workbench.vfm import VFM, find_vfm, load_vfm

PAGE = "Alignment"
GROUPS = 10  # of images, left out in turn, for the interval of a score that is not a mean over images


@dataclass(frozen=True)
class Config(DataOptions):
    """What to compare with, and how."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    k: int = 10
    """Neighbours."""
    pooling: Literal["within", "tokens", "pooled"] = "within"
    """within: tokens of one image, mean over images; tokens: sampled tokens of all images; pooled: one mean token per image."""
    tokens_per_image: int = 16
    """With pooling `tokens`: tokens sampled from each image."""
    null: int = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("tokens_per_image", 1), ("null", 10)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: expected at least 0")
        if not self.vfm:
            raise ConfigError("no VFM given: expected --vfm NAME ...")


@dataclass
class Side:
    """One representation, collected batch by batch: neighbour lists where each image is a problem of its own, the compared tokens otherwise."""

    config: Config
    near: list[Neighbors] = field(default_factory=list)
    tokens: list[Float[Tensor, "image token d"]] = field(default_factory=list)

    def add(self, values: Float[Tensor, "image token d"], picks: Int[Tensor, "image token"]) -> None:
        """Take a batch; `picks` are the tokens that pooling `tokens` keeps of each image."""
        if self.config.pooling == "within":
            self.near.append(nearest_neighbors(values, self.config.k, name="the visual tokens of an image"))
        elif self.config.pooling == "pooled":
            self.tokens.append(values.mean(dim=1, keepdim=True))
        else:
            self.tokens.append(values.gather(1, picks[..., None].expand(*picks.shape, values.shape[-1])))

    def neighbors(self, keep: np.ndarray | None = None) -> Neighbors:
        """The neighbour lists of all images, or of the images in `keep` only."""
        if self.near:
            return Neighbors(torch.cat([part.index for part in self.near]), torch.cat([part.kernel for part in self.near]))
        points = torch.cat(self.tokens)
        points = points if keep is None else points[torch.from_numpy(keep)]
        return nearest_neighbors(points.flatten(0, 1), self.config.k, name="the tokens of all images")


def run(config: Config, context: Context) -> Result:
    """Score every layer against every VFM."""
    layers = check_layers(context.mllm, config.layers)
    vfms = {name: load_vfm(name) for name in config.vfm}
    hidden, patches, image_ids = _collect(config, context, layers, vfms)
    near_patches = {name: side.neighbors() for name, side in patches.items()}
    rows, per_image = [], []
    for layer, side in context.progress(hidden.items(), "cknna", len(hidden)):
        near = side.neighbors()
        for name, near_vfm in near_patches.items():
            scores = cknna_from_neighbors(near, near_vfm)
            interval = _interval(scores, side, patches[name], len(image_ids), config)
            null = null_of(interval.estimate, cknna_nulls(near, near_vfm, n=config.null, seed=config.seed))
            rows.append(
                {
                    **{"layer": layer, "vfm": name, "score": interval.estimate, "low": interval.low, "high": interval.high},
                    **{"null_mean": null.mean, "null_q95": null.q95, "p": null.p, "n_images": len(image_ids)},
                    **{"n": near.n, "k": config.k, "pooling": config.pooling, "seed": config.seed},
                }
            )
            if config.pooling == "within":
                per_image += [(layer, name, image_id, score) for image_id, score in zip(image_ids, scores.tolist(), strict=True)]
    tables = {"scores": pd.DataFrame(rows), "per_image": pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"])}
    return Result(tables, record={"vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()}, "vfms": [vfm.record() for vfm in vfms.values()]})


def _collect(config: Config, context: Context, layers: list[int], vfms: Mapping[str, VFM]) -> tuple[dict[int, Side], dict[str, Side], list[str]]:
    """Visual tokens by layer, VFM patches on the model's own grid, and image ids; only what the pooling compares is kept of a batch."""
    images = [scene[0] for scene in context.data.scenes]
    hidden, patches = {layer: Side(config) for layer in layers}, {name: Side(config) for name in vfms}
    generator = torch.Generator().manual_seed(config.seed)
    starts = range(0, len(images), context.batch_size)
    for start in context.progress(starts, "reading layers", len(starts)):
        part = images[start : start + context.batch_size]
        batch = context.mllm.encode([s.image for s in part], [s.question or QUESTION for s in part])
        places = context.mllm.visual_tokens(batch)
        if any(len(sample) != 1 or sample[0].grid is None for sample in places):
            raise DataError(f"{context.mllm.name} gives several tiles an image or no raster: expected one raster of visual tokens")
        values = torch.stack([activations.values for activations in read(context.mllm, batch, layers=layers)])
        picks = torch.stack([torch.randperm(values.shape[2], generator=generator)[: config.tokens_per_image] for _ in part])
        for number, layer in enumerate(layers):
            hidden[layer].add(values[:, number], picks)
        seen = [_covered(s.image, sample[0].box) for s, sample in zip(part, places, strict=True)]
        for name, vfm in vfms.items():
            patches[name].add(vfm(seen, grid=places[0][0].grid).tokens(), picks)
    return hidden, patches, [s.image_id for s in images]


def _covered(image: Image.Image, box: Box) -> Image.Image:
    """The part of the image that the visual tokens cover, so that both sides see the same pixels under the same token."""
    width, height = image.size
    return image.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))


def _interval(scores: Float[Tensor, "*image"], x: Side, y: Side, n_images: int, config: Config) -> Interval:
    """Over images: a bootstrap of the images' own scores, or the score without one group of images at a time."""
    if config.pooling == "within":
        return bootstrap_ci(scores.numpy(), seed=config.seed)
    groups = np.random.default_rng(config.seed).permutation(n_images) % min(GROUPS, n_images)
    smallest = (n_images - int(np.bincount(groups).max())) * x.tokens[0].shape[1]
    if smallest <= config.k:
        raise DataError(f"k is {config.k} with {n_images} images: an interval leaves some out and then compares {smallest} tokens; expected more than k")
    left_out = [float(cknna_from_neighbors(x.neighbors(keep), y.neighbors(keep))) for keep in ((groups != g).nonzero()[0] for g in range(groups.max() + 1))]
    return jackknife_ci(float(scores), left_out, n_images)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, VFM and layer."""
    return pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()])[
        ["model", "vfm", "layer", "score", "low", "high", "null_mean", "null_q95", "p", "n_images", "n", "k", "pooling"]
    ]


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Layer curves of all models and VFMs with their intervals, over the null band."""
    curves = summary(found)
    return {"Alignment by layer": fig.layer_curves(curves, y="CKNNA", kind="vfm")}


def uses(config: Config) -> dict[str, str]:
    """The identity of every VFM: another copy of its weights is another question."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


ANALYSIS = Analysis("cknna", "Layer-wise alignment with vision foundation models (CKNNA)", Config, run, figures, summary, PAGE, uses=uses)

if __name__ == "__main__":
    main(ANALYSIS)
