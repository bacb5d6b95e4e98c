"""Layer-wise alignment of a model's visual tokens with vision foundation models (PAPER.md, A2).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10 --output_dir runs

Images of several rasters (tiles, a thumbnail) count as the mean over their rasters; `n` is then the median number of tokens of a raster.

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
from torch import Tensor

from workbench import figures as fig
from workbench.analysis import Analysis, Context, DataOptions, Result, main
from workbench.capture import check_layers, read
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError
from workbench.maps import patch_features
from workbench.metrics.alignment import MIN_ROWS, cknna_from_neighbors
from workbench.metrics.neighbors import Neighbors, nearest_neighbors
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
    """One representation, collected batch by batch: neighbour lists where each raster is a problem of its own, the compared tokens otherwise."""

    config: Config
    near: dict[int, list[Neighbors]] = field(default_factory=dict)  # by tokens of a raster
    tokens: list[Float[Tensor, "token d"]] = field(default_factory=list)  # of one image

    def add(self, rasters: list[list[Float[Tensor, "token d"]]], picks: list[Int[Tensor, pick]]) -> None:  # noqa: F821
        """Take a batch, [image][raster]; `picks` are the tokens that pooling `tokens` keeps of each image."""
        if self.config.pooling == "within":
            flat = [raster for image in rasters for raster in image]
            for length in dict.fromkeys(map(len, flat)):
                values = torch.stack([raster for raster in flat if len(raster) == length])
                self.near.setdefault(length, []).append(nearest_neighbors(values, self.config.k, name="the visual tokens of an image"))
            return
        for image, chosen in zip(map(torch.cat, rasters), picks, strict=True):
            self.tokens.append(image.mean(dim=0, keepdim=True) if self.config.pooling == "pooled" else image[chosen])

    def problems(self) -> dict[int, Neighbors]:
        """The neighbour lists of all rasters, by their number of tokens; one list where the tokens of all images are compared."""
        if self.config.pooling != "within":
            return {0: self.neighbors()}
        return {length: Neighbors(torch.cat([part.index for part in parts]), torch.cat([part.kernel for part in parts])) for length, parts in self.near.items()}

    def neighbors(self, keep: np.ndarray | None = None) -> Neighbors:
        """The neighbour lists among the tokens of all images, or of the images in `keep` only."""
        points = torch.cat(self.tokens if keep is None else [self.tokens[i] for i in keep])
        return nearest_neighbors(points, self.config.k, name="the tokens of all images")


def run(config: Config, context: Context) -> Result:
    """Score every layer against every VFM."""
    layers = check_layers(context.mllm, config.layers)
    vfms = {name: load_vfm(name) for name in config.vfm}
    seen = _collect(config, context, layers, vfms)
    near_patches = {name: side.problems() for name, side in seen.patches.items()}
    rows, per_image = [], []
    for layer, side in context.progress(seen.hidden.items(), "cknna", len(seen.hidden)):
        near = side.problems()
        for name, near_vfm in near_patches.items():
            scores = {length: cknna_from_neighbors(near[length], near_vfm[length]).numpy() for length in near}
            nulls = {length: cknna_nulls(near[length], near_vfm[length], n=config.null, seed=config.seed) for length in near}
            own = seen.by_image(scores)
            interval = bootstrap_ci(own, seed=config.seed) if config.pooling == "within" else _left_out(float(scores[0]), side, seen.patches[name], config)
            null = null_of(interval.estimate, seen.by_image(nulls).mean(-1) if config.pooling == "within" else nulls[0])
            rows.append(
                {
                    **{"layer": layer, "vfm": name, "score": interval.estimate, "low": interval.low, "high": interval.high},
                    **{"null_mean": null.mean, "null_q95": null.q95, "p": null.p, "n_images": len(seen.image_ids)},
                    **{"n": int(np.median(seen.lengths)) if config.pooling == "within" else near[0].n, "rasters": len(seen.lengths)},
                    **{"k": config.k, "pooling": config.pooling, "seed": config.seed},
                }
            )
            if config.pooling == "within":
                per_image += [(layer, name, image_id, score) for image_id, score in zip(seen.image_ids, own.tolist(), strict=True)]
    tables = {"scores": pd.DataFrame(rows), "per_image": pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"])}
    return Result(tables, record={"vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()}, "vfms": [vfm.record() for vfm in vfms.values()]})


@dataclass
class Seen:
    """Both sides of the comparison.

    Attributes:
        lengths, owners: tokens of each raster, and the number of its image, in the order they were met.
    """

    hidden: dict[int, Side]
    patches: dict[str, Side]
    image_ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def by_image(self, scores: Mapping[int, np.ndarray]) -> np.ndarray:
        """Scores of rasters (..., raster), by their number of tokens, as means over the rasters of each image (..., image)."""
        if 0 in scores:
            return scores[0]
        sums = np.zeros((*next(iter(scores.values())).shape[:-1], len(self.image_ids)))
        for length, values in scores.items():
            owners = [owner for owner, own in zip(self.owners, self.lengths, strict=True) if own == length]
            np.add.at(sums.T, np.array(owners), values.T)
        return sums / np.bincount(self.owners, minlength=len(self.image_ids))


def _collect(config: Config, context: Context, layers: list[int], vfms: Mapping[str, VFM]) -> Seen:
    """Visual tokens by layer and VFM patches on each raster's own grid; only what the pooling compares is kept of a batch."""
    images = [scene[0] for scene in context.data.scenes]
    seen = Seen({layer: Side(config) for layer in layers}, {name: Side(config) for name in vfms})
    generator = torch.Generator().manual_seed(config.seed)
    starts = range(0, len(images), context.batch_size)
    for start in context.progress(starts, "reading layers", len(starts)):
        part = images[start : start + context.batch_size]
        pictures = [s.image for s in part]
        batch = context.mllm.encode(pictures, [s.question or QUESTION for s in part])
        places = context.mllm.visual_tokens(batch)
        lengths = [[len(raster.index) for raster in sample] for sample in places]
        picks = [torch.randperm(sum(own), generator=generator)[: config.tokens_per_image] for own in lengths]
        found = read(context.mllm, batch, layers=layers)
        for number, layer in enumerate(layers):
            seen.hidden[layer].add([list(a.values[number].split(own)) for a, own in zip(found, lengths, strict=True)], picks)
        for name, vfm in vfms.items():
            seen.patches[name].add(patch_features(vfm, pictures, places), picks)
        seen.owners += [len(seen.image_ids) + row for row, own in enumerate(lengths) for _ in own]
        seen.lengths += [length for own in lengths for length in own]
        seen.image_ids += [s.image_id for s in part]
    return seen


def _left_out(score: float, x: Side, y: Side, config: Config) -> Interval:
    """Interval of a score that is no mean over images: the score without one group of images at a time."""
    n_images = len(x.tokens)
    groups = np.random.default_rng(config.seed).permutation(n_images) % min(GROUPS, n_images)
    kept = [(groups != g).nonzero()[0] for g in range(groups.max() + 1)]
    smallest = min(sum(len(x.tokens[i]) for i in keep) for keep in kept)
    least = max(config.k + 1, MIN_ROWS)
    if smallest < least:
        raise DataError(f"k is {config.k} with {n_images} images: an interval leaves some out and then compares {smallest} tokens; expected at least {least}")
    return jackknife_ci(score, [float(cknna_from_neighbors(x.neighbors(keep), y.neighbors(keep))) for keep in kept], n_images)


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
